"""``crossmorph segment``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Segment:
    """Label an image with a segmenter that `crossmorph train macjnet` trained.

    The label map has the ids of the training and lies on the grid of the image.
    """

    image: Positional[Annotated[Path, arg(metavar="IMAGE")]]
    """The image to label."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """File for the labels, such as labels.nii.gz. It is replaced if it exists."""

    weights: Path
    """Folder of the training, or a .safetensors file with its .json file."""

    side: Literal["fixed", "moving"] = "fixed"
    """Whether the image is of the kind that was fixed or that was moving in the training."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    quiet: bool = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Read, segment, write and return the exit code."""
        from crossmorph import io
        from crossmorph.device import chosen_device
        from crossmorph.systems.learned import load_trained
        from crossmorph.systems.segment import segmented

        device = chosen_device(self.device)
        trained = load_trained("macjnet", self.weights, device)
        labels = segmented(trained, io.read(self.image), self.side, device)
        io.write(labels, self.output)
        if not self.quiet:
            volumes = ", ".join(f"{i}: {mm3 / 1000:.3g} ml" for i, mm3 in labels.volumes_mm3.items())
            print(f"{self.output}: {volumes or 'nothing found'}")
        return 0
