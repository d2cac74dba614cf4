"""``crossmorph convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crossmorph.commands._spaces import Spaces, written


@dataclass(frozen=True)
class Convert(Spaces):
    """Write a transform for another program.

    The ending tells the format: .h5 .tfm .txt .mat (ITK, ANTs, elastix), .nii.gz (ANTs), .nrrd .mha (3D Slicer),
    .lta (FreeSurfer), .npz (PyTorch); with --to fsl .mat (flirt) and .nii.gz (applywarp), with --to learn2reg
    .nii.gz and .npz. A format that is one field of displacements gets the whole transform, sampled on the fixed
    image's grid.
    """

    transform: Positional[Path]
    """Transform of any of these formats."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """File to write. It is replaced if it exists."""

    def run(self) -> int:
        """Read, write and return the exit code."""
        written(self.read(self.transform), self.output, self.to)
        return 0
