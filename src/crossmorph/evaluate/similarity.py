"""Agreement of two images inside a mask: MI, NMI, SSIM, NCC, LNCC.

Every function takes two images on the same voxels, (I, J, K) or (1, I, J, K) (``Image``, torch or numpy), and
looks only where ``mask`` and the validity of both are true. None of them shows that a registration is right: an
image can look alike where the anatomy is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from crossmorph.errors import InputError
from crossmorph.image import Image

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def _pair(fixed: Any, warped: Any, mask: ArrayLike | None) -> tuple[Floats, Floats, Bools]:
    """Both images as (I, J, K) float64 and where they may be compared."""
    arrays, valid = [], []
    for image in (fixed, warped):
        data = image.data if isinstance(image, Image) else image
        array = np.asarray(data.detach().cpu() if isinstance(data, torch.Tensor) else data, np.float64)
        if array.ndim == 4 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 3:
            raise InputError(
                f"similarity compares single-channel volumes (I, J, K); this one has shape {array.shape}"
            )
        finite = np.isfinite(array)
        valid.append(finite & image.valid.cpu().numpy() if isinstance(image, Image) else finite)
        arrays.append(np.where(finite, array, 0))
    if arrays[0].shape != arrays[1].shape:
        raise InputError(
            f"the images have shapes {arrays[0].shape} and {arrays[1].shape}; warp onto the fixed grid"
        )
    inside = valid[0] & valid[1]
    if mask is not None:
        chosen = np.asarray(mask) != 0
        if chosen.shape != inside.shape:
            raise InputError(f"the mask has shape {chosen.shape}, the images {inside.shape}; put both on one grid")
        inside &= chosen
    if not inside.any():
        raise InputError("no voxel is valid in both images and inside the mask; check that they overlap")
    return arrays[0], arrays[1], inside


def _entropies(fixed: Any, warped: Any, mask: ArrayLike | None, bins: int) -> tuple[float, float, float]:
    """Entropies in nats of either image and of both, from a histogram of ``bins`` by ``bins`` equal bins."""
    a, b, inside = _pair(fixed, warped, mask)
    joint = np.histogram2d(a[inside], b[inside], bins=bins)[0]
    joint /= joint.sum()
    parts = [p[p > 0] for p in (joint.sum(1), joint.sum(0), joint)]
    h_a, h_b, h_ab = (float(-(p * np.log(p)).sum()) for p in parts)
    return h_a, h_b, h_ab


def mutual_information(fixed: Any, warped: Any, mask: ArrayLike | None = None, bins: int = 64) -> float:
    """MI = H(F) + H(W) - H(F, W) in nats, from a histogram of equal bins between the least and greatest value.

    Other programs use bits (1 bit = 0.693 nats), Parzen windows (ITK), or print 100 MI as a percentage (macJNet).
    The value depends on the number of bins and on the mask. Source: Viola and Wells 1995, Collignon et al. 1995.
    """
    h_f, h_w, h_fw = _entropies(fixed, warped, mask, bins)
    return h_f + h_w - h_fw


def normalised_mutual_information(fixed: Any, warped: Any, mask: ArrayLike | None = None, bins: int = 64) -> float:
    """NMI = (H(F) + H(W)) / H(F, W), from 1 (independent) to 2 (one determines the other).

    Source: Studholme et al. 1999; the same as scikit-image. Other normalisations (MI over the mean or the
    geometric mean of the entropies) run from 0 to 1. NaN where both images are constant.
    """
    h_f, h_w, h_fw = _entropies(fixed, warped, mask, bins)
    return (h_f + h_w) / h_fw if h_fw > 0 else float("nan")


def ncc(fixed: Any, warped: Any, mask: ArrayLike | None = None) -> float:
    """NCC: Pearson's correlation over the mask, -1 to 1; NaN where an image is constant.

    Some papers print its square, or leave the means in.
    """
    a, b, inside = _pair(fixed, warped, mask)
    x, y = a[inside] - a[inside].mean(), b[inside] - b[inside].mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else float("nan")


def _local_moments(a: Floats, b: Floats, inside: Bools, side: int) -> tuple[Floats, ...]:
    """Means, variances and covariance over the valid voxels of the window around each voxel."""
    from scipy.ndimage import uniform_filter

    def box(values: Floats) -> Floats:
        filtered: Floats = uniform_filter(np.where(inside, values, 0), side, mode="constant")
        return filtered

    share = np.maximum(box(np.ones_like(a)), 1e-12)
    mean_a, mean_b = box(a) / share, box(b) / share
    var_a = np.maximum(box(a * a) / share - mean_a**2, 0)
    var_b = np.maximum(box(b * b) / share - mean_b**2, 0)
    return mean_a, mean_b, var_a, var_b, box(a * b) / share - mean_a * mean_b


def _centred(values: Floats, inside: Bools) -> Floats:
    """Zero mean and unit deviation over the mask, so that products of small numbers keep their digits."""
    deviation = values[inside].std()
    result: Floats = (values - values[inside].mean()) / (deviation if deviation > 0 else 1)
    return result


def lncc_map(fixed: Any, warped: Any, mask: ArrayLike | None = None, side: int = 9) -> Floats:
    """(I, J, K): cov^2 / (var var) in windows of ``side``^3 voxels, 0 to 1, NaN outside the mask.

    The squared form that VoxelMorph, MONAI and the LUMIR systems train on (Avants et al. 2008). Windows hold valid
    voxels only, where those programs pad with zeros; a window without contrast in either image gives 0.
    """
    a, b, inside = _pair(fixed, warped, mask)
    _, _, var_a, var_b, cov = _local_moments(_centred(a, inside), _centred(b, inside), inside, side)
    product = var_a * var_b
    squared = np.where(product > 1e-10, cov**2 / np.maximum(product, 1e-10), 0)
    return np.where(inside, np.minimum(squared, 1), np.nan)


def lncc(fixed: Any, warped: Any, mask: ArrayLike | None = None, side: int = 9) -> float:
    """LNCC: the mean of ``lncc_map`` over the mask, 0 to 1."""
    return float(np.nanmean(lncc_map(fixed, warped, mask, side)))


def ssim_map(
    fixed: Any, warped: Any, mask: ArrayLike | None = None, side: int = 7, data_range: float | None = None
) -> Floats:
    """(I, J, K): structural similarity in windows of ``side``^3 voxels, -1 to 1, NaN outside the mask.

    (2 m_F m_W + c1)(2 cov + c2) / ((m_F^2 + m_W^2 + c1)(var_F + var_W + c2)), c1 = (0.01 L)^2, c2 = (0.03 L)^2,
    with population variances and flat windows of valid voxels. Source: Wang et al. 2004, who weight by a Gaussian;
    scikit-image divides variances by N - 1 unless told otherwise; some papers use one window for the whole image.

    Args:
        fixed, warped, mask: see the module.
        side: edge of the window in voxels.
        data_range: L; the range of the fixed image inside the mask by default.

    Raises:
        InputError: as for all functions here, and where the fixed image is constant and no range is given.
    """
    a, b, inside = _pair(fixed, warped, mask)
    span = float(np.ptp(a[inside])) if data_range is None else data_range
    if span <= 0:
        raise InputError("SSIM needs contrast: the fixed image is constant inside the mask; pass data_range")
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_a, mean_b, var_a, var_b, cov = _local_moments(a, b, inside, side)
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return np.where(inside, top / below, np.nan)


def ssim(
    fixed: Any, warped: Any, mask: ArrayLike | None = None, side: int = 7, data_range: float | None = None
) -> float:
    """SSIM: the mean of ``ssim_map`` over the mask, -1 to 1."""
    return float(np.nanmean(ssim_map(fixed, warped, mask, side, data_range)))
