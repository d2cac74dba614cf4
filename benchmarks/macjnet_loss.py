"""What macJNet's similarities ask for, without a network: a smooth displacement fitted to pairs by Adam.

python benchmarks/macjnet_loss.py OUT [--pairs trunks|nichart] [--spacing-mm 4] [--weights 0.2 0.6]

The displacement is linear between control points 16 mm apart; the loss is that of the registration without
labels. ``trunks`` are two pairs that ``macjnet.py`` neither trains on nor tests; ``nichart`` four pairs of FLAIR
to T1 of other subjects behind their affine maps, brain alone, labels in the groups of ``nichart.py``. A
row a similarity and weight, means over the pairs: landmarks, Dice, folding, and the loss of no displacement, of
the one reached, and of the exact one where it is known. For choosing weights and voxels before a training.
``near`` is macMIND with the sampling distances 1 and 2 in place of 2 and 4. OUT keeps the rows, and started again
goes on; what ``gradient_guidance.py`` has left there, linear maps and brains, is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from learned import append_rows, read_rows, timed
from macjnet import generated
from nichart import Brains, names
from tyro.conf import Positional

from crossmorph import io
from crossmorph.describe.macmind import Sampling, macmind_loss
from crossmorph.networks.warp import warp
from crossmorph.resample import resample_labels
from crossmorph.settings import Preprocessing
from crossmorph.systems.learned import prepared
from crossmorph.systems.macjnet import dissimilarity
from crossmorph.train.losses import roughness, seen_by_both
from crossmorph.train.registration import measured
from crossmorph.train.sample import Batch, Sample

Similarity = Literal["mi", "mind", "ssc", "macmind", "near"]

TRUNKS = (2000, 2001)
SUBJECTS = ((13, 1), (16, 2), (4, 13), (9, 16))
CONTROL_MM = 16.0
RATE_MM = 0.4
SMOOTHNESS = 0.5


@dataclass(frozen=True)
class Fits:
    """Fit and print."""

    output: Positional[Path]
    """Folder for the rows."""

    pairs: Literal["trunks", "nichart"] = "trunks"
    """Which pairs."""

    shape: tuple[int, int, int] = (48, 32, 32)
    """Of trunks: voxels along each axis, multiples of 16."""

    spacing_mm: float = 4.0
    """Of a voxel."""

    similarities: tuple[Similarity, ...] = ("mi", "mind", "macmind")
    """Which to fit."""

    weights: tuple[float, ...] = (0.04, 0.2, 0.6, 2.0)
    """Of the similarity; that of the smoothness is 0.5."""

    steps: int = 30
    """Of Adam."""

    def run(self) -> None:
        """All that the rows lack."""
        torch.set_num_threads(1)
        self.output.mkdir(parents=True, exist_ok=True)
        if self.pairs == "trunks":
            pairs = [generated(self.shape, self.spacing_mm, seed) for seed in TRUNKS]
        else:
            pairs = [self._heads(*subjects) for subjects in SUBJECTS]
        self._row("none", 0.0, pairs)
        for similarity in self.similarities:
            for weight in self.weights:
                self._row(similarity, weight, pairs)
        rows = read_rows(self.output / f"{self.pairs}.csv")
        print("\n".join(["| " + " | ".join(row.values()) + " |" for row in rows]))

    def _heads(self, a: int, b: int) -> Sample:
        """FLAIR of one subject to T1 of another."""
        brains = Brains(self.output)
        brains.prepare()
        images = [brains.brain(name) for name in names(a, b)]
        labels = [io.read_labels(brains.groups(name)) for name in names(a, b)]
        linear, _ = brains.linear(a, b)
        grid, fixed, moving = prepared(*images, linear, Preprocessing(spacing_mm=self.spacing_mm))
        return Sample(
            f"{a} and {b}",
            fixed.values,
            moving.values,
            fixed.valid,
            moving.valid,
            grid,
            linear.matrix,
            resample_labels(labels[0], grid).data.int(),
            resample_labels(labels[1], grid, linear).data.int(),
        )

    def _fitted(self, batch: Batch, similarity: str, weight: float) -> torch.Tensor:
        """(1, 3, I, J, K) displacement in voxels that lowers the loss of a pair."""
        shape = batch.fixed.shape[2:]
        points = torch.zeros(1, 3, *(round(n * self.spacing_mm / CONTROL_MM) for n in shape), requires_grad=True)
        adam = torch.optim.Adam([points], lr=RATE_MM / self.spacing_mm)

        def dense() -> torch.Tensor:
            return torch.nn.functional.interpolate(points, tuple(shape), mode="trilinear")

        for _ in range(self.steps):
            adam.zero_grad()
            loss(batch, dense(), similarity, weight).backward()
            adam.step()
        return dense().detach()

    def _row(self, similarity: str, weight: float, pairs: list[Sample]) -> None:
        path = self.output / f"{self.pairs}.csv"
        key = {"spacing_mm": f"{self.spacing_mm:g}", "similarity": similarity, "weight": f"{weight:g}"}
        if any(key.items() <= row.items() for row in read_rows(path)):
            return
        found = []
        for pair in pairs:
            batch, field = Batch.of([pair]), torch.zeros(1, 3, *pair.fixed.shape)
            fields, seconds = {"zero": field}, 0.0
            if weight:
                field, seconds = timed(lambda b=batch: self._fitted(b, similarity, weight))
                fields |= {"reached": field} | ({} if pair.truth is None else {"exact": pair.truth[None]})
            losses = {
                f"loss_{name}": float(loss(batch, u, similarity, weight)) if weight else 0.0
                for name, u in fields.items()
            }
            found.append(measured(pair, field[0]) | losses | {"seconds": seconds})
        columns = ("tre_mm", "dice", "ndv_percent", "loss_zero", "loss_reached", "loss_exact", "seconds")
        means = {name: f"{np.mean([row.get(name, np.nan) for row in found]):.4g}" for name in columns}
        append_rows(path, [key | means])


def loss(batch: Batch, field: torch.Tensor, similarity: str, weight: float) -> torch.Tensor:
    """Weighted dissimilarity and roughness of a displacement."""
    warped = warp(batch.moving, field)
    where = seen_by_both(batch.fixed_valid, batch.moving_valid, field)
    if similarity == "near":
        apart = macmind_loss(batch.fixed, warped, where, Sampling(distances=(1, 2)))
    else:
        apart = dissimilarity(batch.fixed, warped, where, similarity)  # type: ignore[arg-type]
    return weight * apart + SMOOTHNESS * roughness(field)


if __name__ == "__main__":
    tyro.cli(Fits, description=__doc__).run()
