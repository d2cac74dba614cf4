"""An image on the working grid with its descriptors, and means of it over blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.match.consistency import warp
from crossmorph.match.convex import Matched
from crossmorph.match.cost import expected_cost
from crossmorph.settings import Descriptor
from crossmorph.systems.blocks import Box

POOLED_PLANES = 16
"""About so many planes are pooled at once."""


@dataclass(frozen=True, eq=False)
class Volume:
    """One image on the working grid: values (I, J, K), where they are valid, and where they matter.

    Its descriptors, once there, are means over blocks of ``base``^3 voxels.
    """

    values: torch.Tensor
    valid: torch.Tensor
    weight: torch.Tensor
    features: torch.Tensor | None = None
    base: int = 1

    def pooled(self, level: int) -> Volume:
        """Blocks of level^3 voxels as one; incomplete blocks at the high faces are dropped, as published."""
        if level == 1:
            return self
        valid, weight = pooled(torch.stack((self.valid, self.weight)), level) > 0.5
        features = None if self.features is None else pooled(self.features, level // self.base)
        return Volume(pooled(self.values[None], level)[0], valid, weight, features)

    def warped(self, field: torch.Tensor) -> Volume:
        """Features and validity at x + field(x)."""
        assert self.features is not None
        valid = warp(self.valid[None].float(), field)[0] > 0.999
        return replace(self, features=warp(self.features.float(), field), valid=valid)

    def cropped(self, box: Box) -> Volume:
        """The part in a box."""
        assert self.features is not None
        features = self.features[(slice(None), *box)]
        return Volume(self.values[box], self.valid[box], self.weight[box], features)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two volumes on one grid that are compared: a term of the objective.

    Attributes:
        fixed, moving: the volumes.
        weight: of the term.
        describe: what is compared; empty for what the settings say.
    """

    fixed: Volume
    moving: Volume
    weight: float = 1.0
    describe: tuple[Descriptor, ...] = ()

    def turned(self) -> Pair:
        """The same from moving to fixed."""
        return replace(self, fixed=self.moving, moving=self.fixed)

    def cropped(self, box: Box) -> Pair:
        """The part in a box."""
        return replace(self, fixed=self.fixed.cropped(box), moving=self.moving.cropped(box))

    def pooled(self, level: int) -> Pair:
        """Both pooled, see ``Volume.pooled``."""
        return replace(self, fixed=self.fixed.pooled(level), moving=self.moving.pooled(level))

    def expected(self) -> float:
        """Weighted cost of a random pair of valid descriptors, see ``match.cost.expected_cost``."""
        fixed, moving = self.fixed, self.moving
        assert fixed.features is not None
        assert moving.features is not None
        return self.weight * expected_cost(fixed.features, moving.features, fixed.valid, moving.valid)

    def matched(self, unknown: float | None) -> Matched:
        """What a search compares: descriptors scaled so that their squared difference has the weight."""
        features = []
        for volume in (self.fixed, self.moving):
            assert volume.features is not None
            full = volume.features.float()
            features.append(full if self.weight == 1 else full * math.sqrt(self.weight))
        return Matched(features[0], features[1], (self.fixed.valid, self.moving.valid), unknown)


def shared(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with weights whose sum is 1, so that regularity weighs the same however many there are."""
    total = sum(pair.weight for pair in pairs)
    return [replace(pair, weight=pair.weight / total) for pair in pairs]


Levels = dict[int, Volume]
"""A volume with its descriptors at each level that is used."""


def pooled(values: torch.Tensor, level: int) -> torch.Tensor:
    """(C, I, J, K) average-pooled by ``level``, some planes at a time: descriptors lie channels last in memory."""
    if level == 1:
        return values
    step = level * max(1, POOLED_PLANES // level)
    stop = values.shape[1] // level * level
    starts = range(0, stop, step)
    return torch.cat([F.avg_pool3d(values[None, :, i : min(i + step, stop)].float(), level)[0] for i in starts], 1)
