"""Drawing moving volumes under displacements, batched: the spatial transformer of registration networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.device import constants
from crossmorph.optimise.terms import displaced
from crossmorph.resample import sample


def warp(volumes: torch.Tensor, displacements: torch.Tensor, zeros: bool = False) -> torch.Tensor:
    """Moving volumes at p + u(p), linear, differentiable in both; beyond the last voxel centres the border holds.

    Args:
        volumes: (N, C, I, J, K).
        displacements: (N, 3, I, J, K) in voxels.
        zeros: fall to zero within a voxel beyond the last voxel centres, as published.

    Returns:
        (N, C, I, J, K) float32.
    """
    last = constants([n - 1 for n in volumes.shape[2:]], volumes, torch.float32)
    drawn = []
    for volume, field in zip(volumes.float(), displacements.float(), strict=True):
        places = displaced(field)
        if zeros:
            drawn.append(sample(F.pad(volume, (1,) * 6), places + 1))
        else:
            drawn.append(sample(volume, places.clamp_min(0).minimum(last)))
    return torch.stack(drawn)
