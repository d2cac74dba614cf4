"""Registration by a trained network: what it sees of a pair, its weights, and the displacement that it gives.

Training and use prepare a pair by the same function, with the settings that the weights carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from crossmorph.device import has_bfloat16
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.networks.voxelmorph import MULTIPLE
from crossmorph.preprocess import MIN_VOXELS, foreground, normalised, onto, seen_on
from crossmorph.record import Journal
from crossmorph.settings import Learned, Preprocessing, Refinement, from_dict
from crossmorph.space import Grid
from crossmorph.systems import gradient_guidance, lumir, macjnet
from crossmorph.systems.mcbo import refined_on_pair
from crossmorph.systems.volume import Pair, Volume
from crossmorph.train.checkpoint import described, load_weights
from crossmorph.train.settings import TRAININGS, Training
from crossmorph.transform import Affine

NETWORKS: dict[str, Callable[[Any], nn.Module]] = {
    "gradient-guidance": gradient_guidance.network,
    "lumir": lumir.network,
    "macjnet": macjnet.network,
}
"""By system: the network of a training's settings. It maps fixed and moving (N, 1, I, J, K) to tensors by name, of
which ``displacement`` (N, 3, I, J, K) float32 is in voxels along i, j, k, from fixed to moving."""

REFINEMENTS = {"lumir": Refinement(level=1, smoothness=0.3, anchored=True, similarity="lncc")}
"""By system: the refinement on the pair itself, where it is not by MIND-SSC at half the resolution. Images
of one modality have detail in common that MIND-SSC would take back."""

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with its weights, and what it wants to be shown."""

    network: nn.Module
    preprocessing: Preprocessing
    about: dict[str, Any]
    precision: Literal["32", "bf16", "16"] = "32"
    """In which the network learnt."""

    def bfloat16(self, device: torch.device) -> bool:
        """Whether it computes in bfloat16: where it learnt in it, and the device has instructions for it.

        Displacements with and without differ by some hundredths of a voxel.
        """
        return self.precision == "bf16" and has_bfloat16(device)

    @contextmanager
    def inference(self, device: torch.device) -> Iterator[None]:
        """Within, the network computes as it learnt to, and keeps nothing for gradients."""
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16(device)):
            yield

    @property
    def registration(self) -> nn.Module:
        """The part of the network that registers."""
        return self.network.registration if isinstance(self.network, macjnet.JointNetwork) else self.network

    @property
    def segmenters(self) -> Mapping[str, nn.Module]:
        """The parts that segment images of the ``"fixed"`` and the ``"moving"`` kind, if there are any."""
        return dict(self.network.segmenters) if isinstance(self.network, macjnet.JointNetwork) else {}


def load_trained(system: str, weights: str | Path, device: torch.device | str = "cpu") -> Trained:
    """The network of a training's folder, or of a .safetensors file with its .json file.

    Raises:
        InputError: no weights were named, or they are missing, damaged, or those of another system.
    """
    if not str(weights):
        raise InputError(
            f"{system} needs weights: give the folder of a training with --weights "
            f"(`crossmorph train {system} PAIRS.csv -o RUN` makes one)"
        )
    path = weights_file(weights)
    about = described(path, system)
    side = path.with_suffix(".json")
    if "settings" not in about.get("training", {}):
        raise InputError(f"{side} does not tell the settings of the network; train it anew")
    settings: Training = from_dict(TRAININGS[system], about["training"]["settings"], str(side))
    network = load_weights(lambda: NETWORKS[system](settings), path, system)
    return Trained(network.to(device).eval(), settings.preprocessing, about, settings.precision)


def weights_file(weights: str | Path) -> Path:
    """The file of weights that a training's folder holds, or the file itself."""
    path = Path(weights)
    return path / WEIGHTS if path.is_dir() else path


def prepared(fixed: Image, moving: Image, linear: Affine, settings: Preprocessing) -> tuple[Grid, Volume, Volume]:
    """A pair as networks see it: on one grid along the axes nearest to R, A, S, values from 0 to 1.

    Sizes are rounded up to multiples of 16, on both sides alike; voxels beyond the images are not valid and repeat
    what is nearest.

    Raises:
        InputError: the images have hardly a valid voxel in common.
    """
    target = on_lattice(fixed, settings)
    source = seen_on(moving, target.grid, linear)
    both = target.valid & source.valid
    if int(both.sum()) < MIN_VOXELS:
        raise InputError(
            f"{moving.source or moving.name} and {fixed.source or fixed.name} have {int(both.sum())} voxels of "
            f"{settings.spacing_mm:g} mm in common under the linear map; {MIN_VOXELS} are needed. Check headers "
            "and masks, or the linear stage"
        )
    grid = boxed(target.grid, both & foreground(target) if settings.crop else None)
    return (
        grid,
        shown(onto(target, grid), settings.fixed_window),
        shown(onto(source, grid), settings.moving_window),
    )


def on_lattice(image: Image, settings: Preprocessing) -> Image:
    """A fixed image at the spacing of a training, along the axes nearest to R, A, S, as ``seen_on`` draws it."""
    return seen_on(image, upright(image.grid).respaced(settings.spacing_mm))


def shown(image: Image, window: tuple[float, ...]) -> Volume:
    """An image on its final grid with values from 0 to 1."""
    values = image.data[0]
    scaled = (values - window[0]) / (window[1] - window[0]) if window else normalised(values, image.valid)
    return Volume(scaled.clamp(0, 1), image.valid, foreground(image))


def upright(grid: Grid) -> Grid:
    """The same voxels in the order and direction of the axes that are nearest to R, A, S."""
    from nibabel.orientations import io_orientation

    codes = io_orientation(grid.affine)
    change = np.zeros((4, 4))  # from voxels of the new grid to those of the old one
    change[3, 3] = 1
    shape = [0, 0, 0]
    for axis, (world, sign) in enumerate(codes):
        change[axis, int(world)] = sign
        change[axis, 3] = grid.shape[axis] - 1 if sign < 0 else 0
        shape[int(world)] = grid.shape[axis]
    return Grid((shape[0], shape[1], shape[2]), grid.affine @ change)


def boxed(grid: Grid, kept: torch.Tensor | None) -> Grid:
    """The box of ``kept`` (all by default), its sizes rounded up to multiples of 16 on both sides alike."""
    if kept is None or not kept.any():
        kept = torch.ones(grid.shape, dtype=torch.bool)
    before, after = [], []
    for axis, n in enumerate(grid.shape):
        used = kept.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0]
        low, high = int(used[0]), int(used[-1]) + 1
        more = -(high - low) % MULTIPLE
        before.append(more // 2 - low)
        after.append(high + more - more // 2 - n)
    return grid.padded(before, after)


def displacement(
    trained: Trained,
    fixed: Image,
    moving: Image,
    linear: Affine,
    settings: Learned,
    journal: Journal,
    device: torch.device,
) -> tuple[Grid, Pair, torch.Tensor]:
    """What the network says of a pair.

    Returns:
        The grid that it saw, both volumes on it, and the displacement: (3, A, B, C) in cells over that grid.
    """
    with journal.stage("draw"):
        grid, *drawn = prepared(fixed, moving, linear, trained.preprocessing)
        first, second = (Volume(v.values.to(device), v.valid.to(device), v.weight.to(device)) for v in drawn)
    with journal.stage("network"), trained.inference(device):
        outputs = trained.registration(first.values[None, None], second.values[None, None])
    field = outputs["displacement"][0].float().clone()  # an inference tensor cannot be refined
    kept = {name: trained.about.get(name) for name in ("architecture", "sha256", "preprocessing", "licence")}
    journal.note("weights", kept | {"bfloat16": trained.bfloat16(device)})
    if settings.refine:
        with journal.stage("refine"):
            stage = REFINEMENTS.get(trained.about["architecture"], Refinement())
            stage = replace(stage, iterations=settings.refine)
            field = refined_on_pair(first, second, field, stage, journal)
    return grid, Pair(first, second), field
