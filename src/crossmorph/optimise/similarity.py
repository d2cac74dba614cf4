"""What a linear map is fitted to: each takes the fixed side once and then judges what is seen of the moving side.

Every function returns a ``linear.Similarity``: from moving features (I, J, K, F) on the fixed grid and where they
are known (I, J, K), to a value to be made small and its derivative by those features.
"""

from __future__ import annotations

import numpy as np
import torch

from crossmorph.kernels.linear import difference, histogram_slopes, joint_histogram
from crossmorph.optimise.linear import Similarity

BINS = 32


def squared_difference(fixed: torch.Tensor, weight: torch.Tensor, unknown: float) -> Similarity:
    """Weighted mean of |f - m|^2; what the moving image does not know costs ``unknown``.

    So a map gains nothing by moving what fits badly out of view, and loses nothing that random descriptors would
    have gained (``match.cost.expected_cost``).

    Args:
        fixed: (I, J, K, F).
        weight: (I, J, K), zero where the fixed image does not count.
        unknown: cost of a voxel out of view.
    """
    share = weight / weight.sum()

    def similarity(moving: torch.Tensor, inside: torch.Tensor) -> tuple[float, torch.Tensor]:
        value, known, slope = difference(fixed, moving, share, inside)
        return value + unknown * (1 - known), slope

    return similarity


def dot_product(fixed: torch.Tensor, weight: torch.Tensor) -> Similarity:
    """Minus the weighted mean of f . m; what the moving image does not know counts as zero (DISA, eq. 4)."""
    share = (weight / weight.sum())[..., None] * fixed

    def similarity(moving: torch.Tensor, inside: torch.Tensor) -> tuple[float, torch.Tensor]:
        slope = share * inside[..., None]
        return -float((slope * moving).sum(dtype=torch.float64)), -slope

    return similarity


def correlation(fixed: torch.Tensor, weight: torch.Tensor) -> Similarity:
    """Minus the square of the weighted normalised correlation of two images (F = 1) where both are known."""

    def similarity(moving: torch.Tensor, inside: torch.Tensor) -> tuple[float, torch.Tensor]:
        w = (weight * inside)[..., None].double()
        w = w / w.sum().clamp_min(1e-12)
        f, m = fixed.double(), moving.double()
        f, m = f - (w * f).sum(), m - (w * m).sum()
        ff, mm, fm = ((w * a * b).sum() for a, b in ((f, f), (m, m), (f, m)))
        if ff * mm < 1e-12:
            return 0.0, torch.zeros_like(moving)
        squared = fm * fm / (ff * mm)
        slope = 2 * w * (fm / (ff * mm) * f - squared / mm * m)
        return -float(squared), -slope.float()

    return similarity


def mutual_information(fixed: torch.Tensor, weight: torch.Tensor, bins: int = BINS) -> Similarity:
    """Minus the mutual information in nats of two images (F = 1) with values in about 0..1, where both are known.

    A Parzen estimate as in Mattes et al., IEEE TMI 2003, with linear B-splines on the fixed side and cubic ones on
    the moving side, so that it can be differentiated.
    """
    place = fixed[..., 0].clamp(0, 1) * (bins - 1)

    def similarity(moving: torch.Tensor, inside: torch.Tensor) -> tuple[float, torch.Tensor]:
        joint = joint_histogram(place, moving, weight, inside, bins)
        total = joint.sum()
        if total == 0:
            return 0.0, torch.zeros_like(moving)
        joint /= total
        unrelated = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        logs = np.log(np.where(joint > 0, joint / np.where(joint > 0, unrelated, 1), 1))
        # d MI / d p(f, m) is log(p(f, m) / (p(f) p(m))) up to constants, which the slopes of the splines cancel
        slope = histogram_slopes(place, moving, weight, inside, -logs / total)
        return -float((joint * logs).sum()), slope

    return similarity


def linear_combination(fixed: torch.Tensor, mask: torch.Tensor) -> Similarity:
    """Minus LC2 (``describe.lc2``), the fixed image explained by the moving one, weighted by its local deviation.

    Evaluated directly on all windows, and differentiated by autograd: hundreds of times slower than what DISA
    puts in its place, and here to be compared with it.

    Args:
        fixed: (I, J, K).
        mask: (I, J, K) bool.
    """
    from crossmorph.describe.lc2 import lc2, local_deviation, zscored

    explained = zscored(fixed, mask)
    share = local_deviation(explained, mask)
    share = share / share.sum()

    def similarity(moving: torch.Tensor, inside: torch.Tensor) -> tuple[float, torch.Tensor]:
        known = inside & mask
        values = moving[..., 0]
        middle, spread = values[known].mean(), values[known].std().clamp_min(1e-6)
        with torch.enable_grad():
            seen = ((values - middle) / spread).requires_grad_()
            loss = -(share * lc2(explained, seen, known)).sum()
            (slope,) = torch.autograd.grad(loss, seen)
        return float(loss.detach()), (torch.nan_to_num(slope) / spread)[..., None]

    return similarity


def normalised_information(
    fixed: torch.Tensor, moving: torch.Tensor, where: torch.Tensor, bins: int = BINS
) -> float:
    """(H(f) + H(m)) / H(f, m) of two images over a region (Studholme 1999): 1 unrelated, 2 one to one.

    Args:
        fixed, moving: (I, J, K), values in about 0..1.
        where: (I, J, K) bool.
        bins: of equal width, of both images.
    """
    f, m = (np.clip((v[where].numpy() * bins).astype(np.int64), 0, bins - 1) for v in (fixed, moving))
    joint = np.bincount(f * bins + m, minlength=bins * bins).reshape(bins, bins) / max(len(f), 1)
    both, first, second = (_entropy(p) for p in (joint, joint.sum(0), joint.sum(1)))
    return (first + second) / both if both > 0 else 1.0


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
