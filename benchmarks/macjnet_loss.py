"""What macJNet's similarities ask for, without a network: a smooth displacement fitted to generated pairs by Adam.

python benchmarks/macjnet_loss.py OUT.csv [--shape 48 32 32] [--spacing-mm 4] [--similarities mi mind] [--weights 0.2 0.6]

The displacement is linear between control points four voxels apart. The loss is that of the registration without labels,
for pairs that ``macjnet.py`` neither trains on nor tests. A row a similarity and weight, means over the pairs: what the
landmarks and organs say, and the loss of no displacement, of the one reached and of the exact one. For choosing weights
and voxels before a training. ``near`` is macMIND with the sampling distances 1 and 2 in place of 2 and 4. OUT.csv keeps
the rows; those that it holds are not made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import tyro
from learned import append_rows, read_rows, timed
from macjnet import generated, registration_scores
from tyro.conf import Positional

from crossmorph.describe.macmind import Sampling, macmind_loss
from crossmorph.networks.warp import warp
from crossmorph.systems.macjnet import dissimilarity
from crossmorph.train.losses import roughness, seen_by_both
from crossmorph.train.sample import Batch, Sample

Similarity = Literal["mi", "mind", "ssc", "macmind", "near"]

CHOSEN_BY = (2000, 2001)
CONTROL = 4
SMOOTHNESS = 0.5
RATE = 0.1
SCORES = ("tre_mm", "liver", "others", "folding")


@dataclass(frozen=True)
class Fits:
    """Fit and print."""

    output: Positional[Path]
    """Table of the rows, CSV."""

    shape: tuple[int, int, int] = (48, 32, 32)
    """Voxels along each axis, multiples of 16."""

    spacing_mm: float = 4.0
    """Of a voxel."""

    similarities: tuple[Similarity, ...] = ("mi", "mind", "macmind")
    """Which to fit."""

    weights: tuple[float, ...] = (0.04, 0.2, 0.6, 2.0)
    """Of the similarity; that of the smoothness is 0.5."""

    steps: int = 30
    """Of Adam."""

    def run(self) -> None:
        """All that the table lacks."""
        torch.set_num_threads(1)
        pairs = [generated(self.shape, self.spacing_mm, seed) for seed in CHOSEN_BY]
        self._row("none", 0.0, pairs)
        for similarity in self.similarities:
            for weight in self.weights:
                self._row(similarity, weight, pairs)
        for row in read_rows(self.output):
            print("| " + " | ".join(row.values()) + " |")

    def _row(self, similarity: str, weight: float, pairs: list[Sample]) -> None:
        key = {"spacing_mm": f"{self.spacing_mm:g}", "similarity": similarity, "weight": f"{weight:g}"}
        if any(key.items() <= row.items() for row in read_rows(self.output)):
            return
        found = []
        for pair in pairs:
            assert pair.truth is not None
            batch, field = Batch.of([pair]), torch.zeros_like(pair.truth)[None]
            reached, seconds = field, 0.0
            if weight:
                reached, seconds = timed(lambda b=batch: fitted(b, similarity, weight, self.steps))
            fields = {"zero": field, "reached": reached, "exact": pair.truth[None]}
            losses = {
                name: float(loss(batch, u, similarity, weight)) if weight else 0.0 for name, u in fields.items()
            }
            scores = registration_scores(pair, reached[0])
            found.append({name: scores[name] for name in SCORES} | losses | {"seconds": seconds})
        means = {name: f"{np.mean([row[name] for row in found]):.4g}" for name in found[0]}
        append_rows(self.output, [key | means])


def fitted(batch: Batch, similarity: str, weight: float, steps: int) -> torch.Tensor:
    """(1, 3, I, J, K) displacement in voxels that lowers the loss of a pair."""
    shape = batch.fixed.shape[2:]
    points = torch.zeros(1, 3, *(n // CONTROL for n in shape), requires_grad=True)
    adam = torch.optim.Adam([points], lr=RATE)
    for _ in range(steps):
        adam.zero_grad()
        loss(batch, dense(points), similarity, weight).backward()
        adam.step()
    return dense(points.detach())


def dense(points: torch.Tensor) -> torch.Tensor:
    """Displacements of control points at every voxel."""
    return F.interpolate(points, scale_factor=CONTROL, mode="trilinear")


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
