"""macMIND: multi-sampling cascaded MIND, as a descriptor and as a differentiable loss.

Zhou et al., "macJNet: weakly-supervised multimodal image deformable registration using joint learning framework
and multi-sampling cascaded MIND", 2023. Two steps: the self-similarity context of 18 pairs of patches at two
sampling distances (msSSC), and its means over log-polar bins around each voxel.

The text leaves some things open. Here the second distance is 4 voxels, the share of the small one 0.7 (as in the
figures; another passage has 0.3), and the bins are 8 angles, 2 radii and 1 height.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from crossmorph.describe.mind import window_mean
from crossmorph.device import constants
from crossmorph.errors import InputError

LAYOUT = ((0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
"""The central patch and its six neighbours."""

PAIRS = tuple((a, b) for a, b in combinations(LAYOUT, 2) if any(a[n] + b[n] for n in range(3)))
"""The 18 connections: all pairs of the layout but the three of opposite neighbours."""

RADIUS = 2
"""Of a patch, R1 = 5 voxels wide, and of the window of the bins, R2 = 5."""

ANGLES = 8
RADII = (2**0.5, 2 * 2**0.5)
"""Outer radii of the bins in voxels."""

FLOOR = 1e-3
"""V is at least this share of the mean squared difference over the volume, so that flat regions give ones."""


@dataclass(frozen=True)
class Sampling:
    """Where the self-similarity context looks.

    Attributes:
        distances: from the central patch to its neighbours, in voxels, one for each scale.
        shares: factor alpha_k of each scale.
        concatenated: keep the scales apart, as 18 channels each, instead of adding them (equation 10).
    """

    distances: tuple[int, ...] = (2, 4)
    shares: tuple[float, ...] = (0.7, 0.3)
    concatenated: bool = False

    def __post_init__(self) -> None:
        if not self.distances or min(self.distances) < 1 or len(self.shares) != len(self.distances):
            raise InputError(
                "macMIND needs distances of 1 voxel or more and a share for each, not "
                f"{self.distances} with {self.shares}"
            )

    @property
    def channels(self) -> int:
        """M: channels of the context."""
        return len(PAIRS) * (len(self.distances) if self.concatenated else 1)


DEFAULT = Sampling()


def bins() -> NDArray[np.float32]:
    """(16, 5, 5) float32: in-plane weights of the log-polar bins, each with sum 1, the inner radius first.

    Bin 8 r + a holds the cells beyond the radius before (or 0) and up to ``RADII[r]`` whose angle from the first
    to the second axis lies in [45 a, 45 (a + 1)) degrees. The central cell has no angle; the inner bins share it.
    """
    x, y = np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1]
    ring = np.searchsorted(np.square(RADII) + 1e-6, x**2 + y**2)
    angle = np.floor(np.rad2deg(np.arctan2(y, x)) % 360 / (360 / ANGLES) + 1e-6)
    off_centre = (x != 0) | (y != 0)
    weights = np.array([off_centre & (ring == r) & (angle == a) for r in range(len(RADII)) for a in range(ANGLES)])
    shared: NDArray[np.float32] = weights.astype(np.float32)
    shared[:ANGLES, RADIUS, RADIUS] = 1 / ANGLES
    shared /= shared.sum((1, 2), keepdims=True)
    return shared


@cache
def _weights() -> tuple[float, ...]:
    return tuple(bins().ravel().tolist())


def msssc(image: torch.Tensor, pool: int = 1, sampling: Sampling = DEFAULT) -> torch.Tensor:
    """Multi-scale self-similarity context of one volume, the first step of macMIND.

    For channel c with the patches a_c, b_c of the layout at distance L_k (equations 8 to 10; the sum of equation 8
    over connections is left out, as 18 channels remain in the figures):

        s_c(p) = mean over the 5^3 window of (I(p + L_k a_c) - I(p + L_k b_c))^2     borders repeat
        V(p) = mean over the 18 c of s_c(p), at least 1e-3 times the mean squared difference over the volume
        msSSC_c(p) = sum over k of alpha_k exp(-s_c(p) / V(p))

    Args:
        image: (I, J, K) float32. Fill what is not valid first (``preprocess.fill_invalid``): the context reaches 6
            voxels, macMIND 8.
        pool: take means over blocks of this many voxels along each axis; incomplete blocks at the high faces are
            dropped. On the CPU the descriptors of single voxels are never held in memory.
        sampling: distances and shares.

    Returns:
        (M, I // pool, J // pool, K // pool) float32, 0 to 1 for shares with sum 1, channels last in memory on the
        CPU. Scale and shift of the intensities, and their inversion, change nothing. A constant volume gives ones.

    Raises:
        InputError: a pool outside 1 to the smallest size.
    """
    return _described(image, pool, sampling, np.ones((1, 1, 1), np.float32), lambda context: context)


def macmind(image: torch.Tensor, pool: int = 1, sampling: Sampling = DEFAULT) -> torch.Tensor:
    """macMIND of one volume: the means of ``msssc`` over log-polar bins (equations 11 and 13).

    The bins are those of ``bins`` in the plane of the first two axes, through five voxels of the third; borders
    repeat the context.

    Args:
        image, pool, sampling: see ``msssc``.

    Returns:
        (16 M, I // pool, J // pool, K // pool) float32; channel 16 c + n is bin n of context channel c.

    Raises:
        InputError: a pool outside 1 to the smallest size.
    """
    return _described(image, pool, sampling, bins(), aggregated)


def _described(
    image: torch.Tensor,
    pool: int,
    sampling: Sampling,
    weights: NDArray[np.float32],
    then: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    if not 1 <= pool <= min(image.shape):
        raise InputError(f"{tuple(image.shape)} voxels cannot be pooled by {pool}")
    if image.is_cuda:
        return F.avg_pool3d(then(context_reference(image, sampling))[None], pool)[0]
    from crossmorph.kernels import macmind as kernels

    pairs = np.array(PAIRS, np.int64)
    near, far = (np.stack([d * pairs[:, side] for d in sampling.distances]) for side in (0, 1))
    shares = np.array(sampling.shares, np.float32)
    features = kernels.described(
        image.float().numpy(), near, far, RADIUS, FLOOR, shares, sampling.concatenated, weights, pool
    )
    return torch.from_numpy(features).permute(3, 0, 1, 2)


def context_reference(image: torch.Tensor, sampling: Sampling = DEFAULT) -> torch.Tensor:
    """``msssc`` in plain torch, differentiable, on any device; the compiled version is tested against it.

    Where a gradient is asked for, one scale at a time is worked out again on the way back, so that only its
    intermediate volumes are in memory together.
    """
    scales = zip(sampling.distances, sampling.shares, strict=True)
    parts = [share * _again(_one_scale, image, distance) for distance, share in scales]
    return torch.cat(parts) if sampling.concatenated else torch.stack(parts).sum(0)


def _one_scale(image: torch.Tensor, distance: int) -> torch.Tensor:
    """(18, I, J, K): exp(-s / V) at one distance; equations 8, 9 and 12."""
    shape = image.shape
    padded = F.pad(image[None, None], (distance,) * 6, mode="replicate")[0, 0]

    def shifted(offset: tuple[int, ...]) -> torch.Tensor:
        i, j, k = (distance * (1 + o) for o in offset)
        return padded[i : i + shape[0], j : j + shape[1], k : k + shape[2]]

    squares = torch.stack([(shifted(a) - shifted(b)) ** 2 for a, b in PAIRS])
    low = (FLOOR * squares.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    distances = squares
    for axis in (1, 2, 3):
        distances = window_mean(distances, axis, RADIUS)
    return torch.exp(-distances / distances.mean(0).clamp_min(low))


def aggregated(context: torch.Tensor) -> torch.Tensor:
    """(M, I, J, K) -> (16 M, I, J, K): means over the log-polar bins as fixed convolutions; equation 13."""
    width = 2 * RADIUS + 1
    windows = F.pad(context[:, None], (RADIUS,) * 6, mode="replicate")
    columns = F.avg_pool3d(windows, (1, 1, width), stride=1)
    kernels = constants(_weights(), context).view(-1, 1, width, width, 1)
    return F.conv3d(columns, kernels).flatten(0, 1)


def macmind_loss(
    fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None, sampling: Sampling = DEFAULT
) -> torch.Tensor:
    """Mean squared difference of macMIND (equation 14, divided by the number of channels too), differentiable.

    Memory stays bounded: see ``context_reference`` and ``aggregated_square``. Where the fixed image stays the
    same, keep its ``context_reference`` and call ``aggregated_square`` with the difference.

    Args:
        fixed, warped: (..., I, J, K) of one shape; leading axes are pairs.
        weight: how much each voxel counts, broadcast to their shape; None: all alike.
        sampling: distances and shares.

    Returns:
        Scalar, 0 where both agree.

    Raises:
        InputError: shapes that differ.
    """
    if fixed.shape != warped.shape or fixed.ndim < 3:
        shapes = f"{tuple(fixed.shape)} and {tuple(warped.shape)}"
        raise InputError(f"macMIND compares volumes of one shape, not {shapes}")
    size = fixed.shape[-3:]
    weights = torch.ones_like(fixed) if weight is None else weight.to(fixed).expand(fixed.shape)
    images = (volumes.reshape(-1, *size) for volumes in (fixed, warped, weights))
    terms = [
        aggregated_square(context_reference(f, sampling) - context_reference(m, sampling), w)
        for f, m, w in zip(*images, strict=True)
    ]
    return torch.stack(terms).sum() / (16 * sampling.channels * weights.sum().clamp_min(1e-12))


def aggregated_square(difference: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted sum over voxels and channels of the squared ``aggregated`` difference of two contexts.

    Aggregation is linear, so that the difference is aggregated instead of both sides. One channel of the context
    with its 16 bins is in memory at a time, on the way back too.

    Args:
        difference: (M, I, J, K).
        weight: (I, J, K).
    """

    def energy(channel: torch.Tensor) -> torch.Tensor:
        return (aggregated(channel[None]).square().sum(0) * weight).sum()

    return torch.stack([_again(energy, channel) for channel in difference]).sum()


def _again(part: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """``part(*inputs)``, of which nothing but the inputs is kept for the gradient."""
    result: torch.Tensor = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
