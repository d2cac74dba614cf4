"""Loss functions of registration networks. Volumes are (N, 1, I, J, K), displacements (N, 3, I, J, K) in voxels.

Only voxels that both images see have a say: masks are (N, 1, I, J, K) bool.
"""

from __future__ import annotations

from typing import Literal

import torch

from crossmorph.describe.mind import mind, mind_ssc, mind_ssc_reference
from crossmorph.networks.warp import warp
from crossmorph.optimise.terms import diffusion
from crossmorph.resample import SUPPORTED


def seen_by_both(fixed_valid: torch.Tensor, moving_valid: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """Where the fixed image is valid and the moving one is at p + u(p); no gradient."""
    with torch.no_grad():
        return fixed_valid & (warp(moving_valid.float(), field) > SUPPORTED)


def mind_difference(
    warped: torch.Tensor, fixed: torch.Tensor, where: torch.Tensor, kind: Literal["mind", "ssc"] = "mind"
) -> torch.Tensor:
    """Mean over the voxels in use and the channels of |MIND(warped) - MIND(fixed)| (Xu et al. 2021, equation 5).

    ``kind``: MIND of six neighbours, or MIND-SSC of radius 1 and dilation 2.
    """
    describe = mind if kind == "mind" else mind_ssc_reference  # differentiable
    totals = []
    for image, target, mask in zip(warped[:, 0], fixed[:, 0], where[:, 0], strict=True):
        with torch.no_grad():
            wanted = mind(target) if kind == "mind" else mind_ssc(target)
        error = (describe(image) - wanted).abs().mean(0)
        totals.append((error * mask).sum() / mask.sum().clamp_min(1))
    return torch.stack(totals).mean()


def roughness(fields: torch.Tensor) -> torch.Tensor:
    """Mean of squared forward differences over the three axes, the voxels and the components."""
    return torch.stack([diffusion(field) for field in fields]).mean() / 3
