"""What LUMIR's loss asks for, without a network: velocities of the five levels fitted to one pair by Adam.

python benchmarks/lumir_loss.py VOLUMES FIXED MOVING [--spacing-mm 4.5] [--window 5] [--smoothness 1] [--steps 20]

VOLUMES is the folder ``volumes`` of ``lumir.py``; FIXED and MOVING are subjects. A row every ten steps: the loss,
Dice of all labels at 2 mm, and the non-diffeomorphic volume. For choosing voxels, windows and weights before a
training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from ixi import folding
from learned import timed
from torch import nn
from tyro.conf import Positional

from crossmorph import io
from crossmorph.evaluate import label_overlap, mean_dice, warp_labels
from crossmorph.networks.pyramid import LEVELS, Pyramid
from crossmorph.registration import faded_field
from crossmorph.settings import Linear, Preprocessing
from crossmorph.systems.learned import prepared
from crossmorph.systems.lumir import loss
from crossmorph.train.sample import Batch
from crossmorph.train.settings import LumirTraining
from crossmorph.transform import Affine

COARSER = 1.4
"""Learning rate of a level, in voxels of the finest one, in shares of that of the next finer one."""


class Free(nn.Module):
    """An estimator that has one velocity to say, whatever it is shown."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.velocity = nn.Parameter(torch.zeros(1, 3, *shape))

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        return self.velocity


@dataclass(frozen=True)
class Fit:
    """Fit and print."""

    volumes: Positional[Path]
    """Folder of the prepared images and labels."""

    fixed: Positional[str]
    """Subject."""

    moving: Positional[str]
    """Subject."""

    spacing_mm: float = 4.5
    """Voxels of the finest level."""

    window: int = 5
    """Width in voxels of the windows of the correlation."""

    smoothness: float = 1.0
    """Weight of the regulariser."""

    cascade: Literal["compose", "add"] = "compose"
    """How levels are joined."""

    steps: int = 20
    """Of Adam."""

    rate: float = 0.05
    """Learning rate of the finest level, in voxels."""

    def run(self) -> None:
        """All of it."""
        torch.set_num_threads(1)
        target, source = (io.read(self.volumes / f"{name}.nii.gz") for name in (self.fixed, self.moving))
        labels = [io.read_labels(self.volumes / f"{name}_labels.nii.gz") for name in (self.fixed, self.moving)]
        settings = LumirTraining(
            preprocessing=Preprocessing(spacing_mm=self.spacing_mm, crop=False, linear=Linear(model="none")),
            window=self.window,
            smoothness=self.smoothness,
        )
        grid, fixed, moving = prepared(target, source, Affine.identity(), settings.preprocessing)
        volumes = [v[None, None] for v in (fixed.values, moving.values, fixed.valid, moving.valid)]
        pair = Batch((f"{self.moving} to {self.fixed}",), *volumes, None, None, None)
        pyramid = Pyramid(2, self.cascade)
        pyramid.estimators = nn.ModuleList(Free([n // 2**level for n in grid.shape]) for level in range(LEVELS))
        levels = enumerate(pyramid.estimators.parameters())
        adam = torch.optim.Adam([{"params": [v], "lr": self.rate * COARSER**level} for level, v in levels])
        print(f"{pair.names[0]}, {grid}\n\n| step | loss | Dice % | NDV % |\n| ---: | ---: | ---: | ---: |")
        spent = 0.0
        for step in range(self.steps + 1):
            (value, field), seconds = timed(lambda: fitted(pyramid, pair, settings, adam))
            spent += seconds
            if step % 10 == 0:
                transform = faded_field(field, grid)
                warped = warp_labels(labels[1], labels[0].grid, transform)
                dice = 100 * mean_dice(label_overlap(labels[0], warped, labels[1]))
                print(f"| {step} | {value:.4f} | {dice:.2f} | {folding(transform):.4f} |", flush=True)
        print(f"\n{spent / (self.steps + 1):.2f} processor seconds a step")


def fitted(
    pyramid: Pyramid, pair: Batch, settings: LumirTraining, adam: torch.optim.Optimizer
) -> tuple[float, torch.Tensor]:
    """One step; the loss and the displacement (3, I, J, K) in voxels before it."""
    outputs = pyramid(pair.fixed, pair.moving)
    value = loss(outputs, pair, settings)
    adam.zero_grad()
    value.backward()
    adam.step()
    return float(value.detach()), outputs["displacement"][0].detach()


if __name__ == "__main__":
    tyro.cli(Fit, description=__doc__).run()
