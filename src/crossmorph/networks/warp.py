"""Drawing moving volumes under displacements, batched: the spatial transformer of registration networks."""

from __future__ import annotations

import torch

from crossmorph.optimise.terms import displaced
from crossmorph.resample import sample


def warp(volumes: torch.Tensor, displacements: torch.Tensor) -> torch.Tensor:
    """Moving volumes at p + u(p), linear, differentiable in both; beyond the last voxel centres the border holds.

    Args:
        volumes: (N, C, I, J, K).
        displacements: (N, 3, I, J, K) in voxels.

    Returns:
        (N, C, I, J, K) float32.
    """
    last = torch.tensor(volumes.shape[2:], device=volumes.device) - 1
    drawn = []
    for volume, field in zip(volumes.float(), displacements.float(), strict=True):
        drawn.append(sample(volume, displaced(field).clamp_min(0).minimum(last)))
    return torch.stack(drawn)
