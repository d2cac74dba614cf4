"""MIND-SSC, the modality independent neighbourhood descriptor with self-similarity context, and its elder MIND.

Heinrich et al., "Towards realtime multimodal fusion for image-guided interventions using self-similarities",
MICCAI 2013. Each voxel is described by 12 patch distances between pairs of its six neighbours; the descriptor does
not change when the intensities are scaled or shifted, and hardly when their order is reversed. MIND (Medical Image
Analysis 2012) compares a voxel's patch with those of its six neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.errors import InputError

# The 12 pairs of neighbours at mutual distance sqrt(2), along the array axes, in the order of the released code.
NEAR = ((1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 1, 0), (0, -1, 0), (0, 1, 0),
        (0, 0, -1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 0, 1))  # fmt: skip
FAR = ((0, -1, 0), (-1, 0, 0), (-1, 0, 0), (1, 0, 0), (0, 0, -1), (0, 0, 1),
       (-1, 0, 0), (0, 0, 1), (0, 0, -1), (0, -1, 0), (0, 0, -1), (-1, 0, 0))  # fmt: skip


def mind_ssc(image: torch.Tensor, radius: int = 1, dilation: int = 2, pool: int = 1) -> torch.Tensor:
    """MIND-SSC descriptors of one volume.

    For channel k with neighbours a_k, b_k at ``dilation`` voxels:

        s_k(p) = mean over the (2 radius + 1)^3 window of (I(p + a_k) - I(p + b_k))^2     borders repeat
        m_k = s_k - min_k s_k,   V = mean_k m_k clamped to [1e-3, 1e3] times its mean over the volume
        descriptor_k = exp(-m_k / V)

    Args:
        image: (I, J, K) float32. Fill what is not valid first (``preprocess.fill_invalid``): descriptors reach
            ``dilation + radius`` voxels.
        radius: patch radius in voxels.
        dilation: distance of the six neighbours from the centre in voxels.
        pool: take means over blocks of this many voxels along each axis; incomplete blocks at the high faces are
            dropped. On the CPU the descriptors of single voxels are never held in memory then.

    Returns:
        (12, I // pool, J // pool, K // pool) float32 in (0, 1], channels last in memory on the CPU. A constant
        volume gives all ones.

    Raises:
        InputError: radius below 0, dilation below 1, or a pool outside 1 to the smallest size.
    """
    if radius < 0 or dilation < 1:
        raise InputError(f"MIND-SSC needs radius >= 0 and dilation >= 1, not {radius} and {dilation}")
    if not 1 <= pool <= min(image.shape):
        raise InputError(f"{tuple(image.shape)} voxels cannot be pooled by {pool}")
    if image.is_cuda:
        return F.avg_pool3d(mind_ssc_reference(image, radius, dilation)[None], pool)[0]
    from crossmorph.kernels import mind

    near, far = (np.array(offsets, np.int64) * dilation for offsets in (NEAR, FAR))
    return torch.from_numpy(mind.mind_ssc(image.float().numpy(), near, far, radius, pool)).permute(3, 0, 1, 2)


def mind_ssc_reference(image: torch.Tensor, radius: int = 1, dilation: int = 2) -> torch.Tensor:
    """``mind_ssc`` in plain torch, for any device; the compiled version is tested against it."""
    shape = image.shape
    padded = F.pad(image.float()[None, None], (dilation,) * 6, mode="replicate")[0, 0]

    def shifted(offset: tuple[int, int, int]) -> torch.Tensor:
        i, j, k = (dilation * (1 + o) for o in offset)
        return padded[i : i + shape[0], j : j + shape[1], k : k + shape[2]]

    distances = torch.stack([(shifted(a) - shifted(b)) ** 2 for a, b in zip(NEAR, FAR, strict=True)])
    for axis in (1, 2, 3):
        distances = window_mean(distances, axis, radius)
    distances = distances - distances.amin(0)
    spread = distances.mean(0)
    mean = spread.mean().clamp_min(torch.finfo(torch.float32).tiny)
    spread = spread.clamp((1e-3 * mean).clamp_min(torch.finfo(torch.float32).tiny), 1e3 * mean)
    return torch.exp(-distances / spread)


def mind(image: torch.Tensor) -> torch.Tensor:
    """MIND descriptors of one volume with the six neighbours as search region, differentiable.

    For neighbour r, with patches of 3^3 voxels:

        D_r(p) = mean over the window of (I(p) - I(p + r))^2                             borders repeat
        V = mean_r D_r clamped to [1e-3, 1e3] times its mean over the volume
        descriptor_r = exp(-(D_r - min_r D_r) / V)

    Heinrich et al. 2012, equations 4 to 6, with a box for the patch.

    Args:
        image: (I, J, K), of any intensity scale.

    Returns:
        (6, I, J, K) float32 in (0, 1]; neighbours before and after along i, j, k. A constant volume gives ones.
    """
    distances = []
    for axis in range(3):
        square = _between(image.float(), axis)
        mean = square
        for along in range(3):
            mean = window_mean(mean, along, 1)
        n = image.shape[axis]
        distances += [mean.narrow(axis, 0, n), mean.narrow(axis, 1, n)]
    table = torch.stack(distances)
    spread = table.mean(0)
    tiny = torch.finfo(torch.float32).tiny
    mean = spread.detach().mean().clamp_min(tiny)
    spread = spread.clamp((1e-3 * mean).clamp_min(tiny), 1e3 * mean)
    return torch.exp(-(table - table.amin(0)) / spread)


def _between(image: torch.Tensor, axis: int) -> torch.Tensor:
    """(I(p) - I(p + 1))^2 along an axis, from before the first voxel to after the last: one more than voxels."""
    padded = torch.cat([image.narrow(axis, 0, 1), image, image.narrow(axis, -1, 1)], axis)
    return padded.diff(dim=axis).square()


def window_mean(values: torch.Tensor, axis: int, radius: int) -> torch.Tensor:
    """Mean of 2 radius + 1 neighbours along an axis, ends repeated; by sums of slices, far faster than pooling."""
    ends = [values.narrow(axis, place, 1) for place in (0, -1)]
    padded = torch.cat([*[ends[0]] * radius, values, *[ends[1]] * radius], axis)
    n = values.shape[axis]
    total = padded.narrow(axis, 0, n)
    for place in range(1, 2 * radius + 1):
        total = total + padded.narrow(axis, place, n)
    return total / (2 * radius + 1)
