"""An image on the working grid with its descriptors, and means of it over blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.match.consistency import warp
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
