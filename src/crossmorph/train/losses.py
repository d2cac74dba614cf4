"""Loss functions of registration networks. Volumes are (N, 1, I, J, K), displacements (N, 3, I, J, K) in voxels.

Only voxels that both images see have a say: masks are (N, 1, I, J, K) bool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.describe.mind import mind, mind_ssc, mind_ssc_reference
from crossmorph.networks.warp import warp
from crossmorph.optimise.terms import diffusion
from crossmorph.resample import SUPPORTED


def seen_by_both(fixed_valid: torch.Tensor, moving_valid: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """Where the fixed image is valid and the moving one is at p + u(p); no gradient."""
    with torch.no_grad():
        return fixed_valid & (warp(moving_valid.float(), field) > SUPPORTED)


def mind_difference(
    warped: torch.Tensor,
    fixed: torch.Tensor,
    where: torch.Tensor,
    kind: Literal["mind", "ssc"] = "mind",
    squared: bool = False,
) -> torch.Tensor:
    """Mean over the voxels in use and the channels of |MIND(warped) - MIND(fixed)| (Xu et al. 2021, equation 5).

    ``kind``: MIND of six neighbours, or MIND-SSC of radius 1 and dilation 2. ``squared``: the squares, as macJNet
    has them.
    """
    describe = mind if kind == "mind" else mind_ssc_reference  # differentiable
    totals = []
    for image, target, mask in zip(warped[:, 0], fixed[:, 0], where[:, 0], strict=True):
        with torch.no_grad():
            wanted = mind(target) if kind == "mind" else mind_ssc(target)
        apart = describe(image) - wanted
        error = (apart.square() if squared else apart.abs()).mean(0)
        totals.append((error * mask).sum() / mask.sum().clamp_min(1))
    return torch.stack(totals).mean()


def roughness(fields: torch.Tensor) -> torch.Tensor:
    """Mean of squared forward differences over the three axes, the voxels and the components."""
    return torch.stack([diffusion(field) for field in fields]).mean() / 3


WINDOW = 9
"""Width in voxels of the windows of the local correlation, as published."""


def window_sums(volumes: torch.Tensor, width: int = WINDOW) -> torch.Tensor:
    """Sums over width^3 windows of (N, 1, I, J, K), zeros outside: a product with a band along each axis."""
    i, j, k = (_band(n, width, volumes) for n in volumes.shape[2:])
    along = j @ volumes @ k  # k is symmetric
    return (i @ along.flatten(3)).view(volumes.shape)


def _band(size: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(size, size): 1 where a window around one place reaches the other."""
    places = torch.arange(size, device=like.device)
    return ((places[:, None] - places).abs() <= width // 2).to(like)


def local_correlation(
    first: torch.Tensor, second: torch.Tensor, where: torch.Tensor | None = None, width: int = WINDOW
) -> torch.Tensor:
    """Mean squared local correlation over width^3 windows: c^2 / (v v' + 1e-5), sums of products about the means.

    Args:
        first, second: (N, 1, I, J, K) of order one.
        where: (N, 1, I, J, K) bool: what windows sum over, and the mean is taken of. None: everything, and zeros
            outside that count as voxels (published).
        width: of the windows, odd.
    """
    weight = torch.ones_like(first) if where is None else where.to(first)
    a, b = first * weight, second * weight
    parts = [a, b, a * b, a * a, b * b, *([] if where is None else [weight])]
    sums = window_sums(torch.cat(parts), width).view(len(parts), *first.shape)
    sum_a, sum_b, sum_ab, sum_aa, sum_bb, *counts = sums
    count = counts[0].clamp_min(1) if counts else float(width**3)
    cross = sum_ab - sum_a * sum_b / count
    variances = (sum_aa - sum_a**2 / count).clamp_min(0) * (sum_bb - sum_b**2 / count).clamp_min(0)
    squared: torch.Tensor = cross**2 / (variances + 1e-5)
    return (squared * weight).sum() / weight.sum().clamp_min(1)


BLOCK = 9
BINS = 16


def local_information(first: torch.Tensor, second: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean over blocks of 9^3 voxels of their mutual information in nats, each weighted by its voxels in use.

    Every block has a joint histogram of 16 x 16 bins; a value counts for the two nearest bins by its distance.

    Args:
        first, second: (N, 1, I, J, K) in [0, 1].
        where: (N, 1, I, J, K) bool.
    """

    def blocks(volumes: torch.Tensor) -> torch.Tensor:
        padded = F.pad(volumes, [w for n in reversed(volumes.shape[2:]) for w in (0, -n % BLOCK)])
        for axis in (2, 3, 4):
            padded = padded.unfold(axis, BLOCK, BLOCK)
        return padded.reshape(-1, BLOCK**3)

    def shares(volumes: torch.Tensor) -> torch.Tensor:
        place = blocks(volumes).clamp(0, 1) * (BINS - 1)
        centres = torch.arange(BINS, device=place.device)
        return (1 - (place[..., None] - centres).abs()).clamp_min(0)

    weight = blocks(where.to(first))
    count = weight.sum(1)
    joint = (shares(first) * weight[..., None]).transpose(1, 2) @ shares(second)
    joint = joint / count.clamp_min(1)[:, None, None]
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    tiny = torch.finfo(joint.dtype).tiny
    information = (joint * (joint.clamp_min(tiny).log() - apart.clamp_min(tiny).log())).sum((1, 2))
    return (information * count).sum() / count.sum().clamp_min(1)


def indicators(labels: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """(N, I, J, K) label maps -> (N, 1 + len(ids), I, J, K) float32: background (all else) first, then each id."""
    classes = torch.stack([labels == i for i in ids], 1)
    return torch.cat([~classes.any(1, keepdim=True), classes], 1).float()


def dice_loss(
    first: torch.Tensor, second: torch.Tensor, where: torch.Tensor, present: torch.Tensor | None = None
) -> torch.Tensor:
    """1 - (2 sum ab + 1) / (sum a + sum b + 1), the mean over all classes but the background.

    Args:
        first, second: (N, classes, I, J, K) probabilities, background first.
        where: (N, 1, I, J, K) bool: voxels that count.
        present: (N, classes - 1) bool: classes that count; None: all. Without any the loss is 0.
    """
    a, b = (volumes[:, 1:] * where for volumes in (first, second))
    over = (2, 3, 4)
    terms = 1 - (2 * (a * b).sum(over) + 1) / (a.sum(over) + b.sum(over) + 1)
    weight = torch.ones_like(terms) if present is None else present.to(terms)
    return (terms * weight).sum() / weight.sum().clamp_min(1)


def softened(volumes: torch.Tensor) -> torch.Tensor:
    """(N, 1, I, J, K) under a Gaussian of deviation 1 with five taps along each axis, zeros outside."""
    taps = torch.exp(-0.5 * torch.arange(-2.0, 3.0, device=volumes.device) ** 2)
    taps = taps / taps.sum()
    for axis in range(3):
        shape = [5 if a == axis else 1 for a in range(3)]
        volumes = F.conv3d(volumes, taps.view(1, 1, *shape), padding=[n // 2 for n in shape])
    return volumes
