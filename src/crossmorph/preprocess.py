"""From an image as read to what a registration works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from scipy import ndimage

from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.resample import downsample, resample
from crossmorph.space import Grid
from crossmorph.transform import Affine

MIN_VOXELS = 64
"""Fewer valid voxels than this say nothing about alignment."""

MAX_WORKING_VOXELS = 8_000_000
"""The working grid is made coarser where it would have more voxels than this."""


def check_registrable(image: Image) -> None:
    """Refuse an image that holds nothing to align.

    Raises:
        InputError: a single slice, fewer than 64 valid voxels (all NaN, say), or one constant value.
    """
    name = str(image.source or image.name)
    if min(image.grid.shape) < 2:
        raise InputError(
            f"{name} is 2-D: its shape is {image.grid.shape}; crossmorph registers volumes, with at least two "
            "voxels along each axis"
        )
    count = int(image.valid.sum())
    if count == 0:
        raise InputError(f"{name} has no valid voxel: every value is NaN or infinite, or the mask is empty")
    if count < MIN_VOXELS:
        raise InputError(f"{name} has only {count} valid voxels; at least {MIN_VOXELS} are needed")
    values = image.data[:, image.valid]
    if float(values.min()) == float(values.max()):
        raise InputError(
            f"{name} is constant: every valid voxel is {float(values.min()):g}; there is nothing to align"
        )


def masked(image: Image, mask: Image | Labels, name: str = "mask") -> Image:
    """The image, valid only where a mask is above zero; the mask may lie on any grid of the same world.

    Raises:
        InputError: the mask is empty, or does not meet the valid part of the image.
    """
    values = mask.data[0] if isinstance(mask, Image) else mask.data
    inside = values > 0
    where = str(mask.source or name)
    if not inside.any():
        raise InputError(f"{where} is empty: no voxel is above zero; a mask is true where voxels count")
    drawn = resample(Image(inside[None].float(), mask.grid, torch.ones_like(inside)), image.grid, mode="nearest", fill=0)
    chosen = image.valid & (drawn.data[0] > 0.5)
    count, volume = int(inside.sum()), int(inside.sum()) * mask.grid.voxel_volume
    if not chosen.any():
        raise InputError(
            f"{where} ({count} voxels, {volume:.0f} mm^3) does not meet {image.source or image.name}; "
            "are both in the same world? `crossmorph info` shows the boxes of both"
        )
    return replace(image, valid=chosen)


def working_grid(fixed: Grid, movings: Sequence[Grid], spacing_mm: float, multiple: int) -> Grid:
    """Isotropic grid over the fixed field of view on which a system works.

    Args:
        fixed, movings: grids of the images.
        spacing_mm: voxel size; 0 takes the finest spacing that the fixed and some moving image have, coarser where
            that gave more than 8 million voxels.
        multiple: sizes are rounded up to a multiple of this, beyond the high faces.
    """
    if spacing_mm == 0:
        finest = max(fixed.spacing.min(), min(grid.spacing.min() for grid in movings))
        spacing_mm = max(float(finest), (float(fixed.extent_mm.prod()) / MAX_WORKING_VOXELS) ** (1 / 3))
    grid = fixed.respaced(spacing_mm)
    return grid.padded((0, 0, 0), [-n % multiple for n in grid.shape])


def onto(image: Image, grid: Grid, start: Affine | None = None) -> Image:
    """The image drawn on a grid without aliasing, values repeated where it is not valid.

    Args:
        image: one channel.
        grid: target, in the fixed space.
        start: from the fixed to the image's space; None where both are one.
    """
    if start is not None:
        back = np.linalg.inv(start.matrix)
        image = replace(image, grid=Grid(image.grid.shape, back @ image.grid.affine))
    drawn = downsample(image, grid)
    return replace(drawn, data=fill_invalid(drawn.data[0], drawn.valid)[None])


def fill_invalid(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(I, J, K) with every invalid voxel replaced by about the nearest valid value (nearest block of 2^3 voxels)."""
    if valid.all() or not valid.any():
        return values
    counts = F.avg_pool3d(valid[None, None].float(), 2, ceil_mode=True)[0, 0]
    sums = F.avg_pool3d((values * valid)[None, None], 2, ceil_mode=True)[0, 0]
    coarse = sums / counts.clamp_min(1e-6)
    nearest = ndimage.distance_transform_edt((counts == 0).cpu().numpy(), return_distances=False, return_indices=True)
    i, j, k = (torch.from_numpy(index).to(values.device) for index in nearest)
    filled = coarse[i, j, k]
    for axis, size in enumerate(values.shape):
        filled = filled.repeat_interleave(2, axis).narrow(axis, 0, size)
    return torch.where(valid, values, filled)


def foreground(image: Image, margin_mm: float = 8.0) -> torch.Tensor:
    """Where the body is: (I, J, K) bool, generous; everything valid where no background stands out.

    Voxels, after pooling to about 4 mm (or a 48th of the field of view), that differ from the commonest value at the
    faces of the volume by more than a tenth of the range between the 2nd and 98th percentile; the largest such
    part, holes filled, widened by ``margin_mm`` or two blocks.
    """
    size = float(image.grid.spacing.mean())
    step = max(1, round(max(4.0 / size if size > 0.5 else 0.0, max(image.grid.shape) / 48)))
    values = F.avg_pool3d((image.data[:1] * image.valid)[None], step, ceil_mode=True)[0, 0]
    weight = F.avg_pool3d(image.valid[None, None].float(), step, ceil_mode=True)[0, 0]
    values = (values / weight.clamp_min(1e-6)).cpu().numpy()
    seen = weight.cpu().numpy() > 0.25
    if not seen.any():
        return image.valid
    low, high = np.percentile(values[seen], (2, 98))
    faces = np.concatenate([values.take(end, axis)[seen.take(end, axis)] for axis in range(3) for end in (0, -1)])
    if faces.size == 0 or high <= low:
        return image.valid
    body = seen & (np.abs(values - np.median(faces)) > 0.1 * (high - low))
    parts, count = ndimage.label(body)
    if count == 0:
        return image.valid
    body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    body = ndimage.binary_fill_holes(body)
    share = body.sum() / seen.sum()
    if not 0.02 < share < 0.95:
        return image.valid
    rounds = max(2, round(margin_mm / (size * step)) if size > 0.5 else 2)
    wide = torch.from_numpy(ndimage.binary_dilation(body, iterations=rounds)).to(image.valid.device)
    for axis, length in enumerate(image.grid.shape):
        wide = wide.repeat_interleave(step, axis).narrow(axis, 0, length)
    return wide & image.valid


def normalised(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Values shifted and scaled so that the 1st and 99th percentile of the valid ones are 0 and 1."""
    sample = values[valid]
    sample = sample[:: max(1, sample.numel() // 1_000_000)]
    low, high = (float(torch.quantile(sample, q)) for q in (0.01, 0.99))
    return (values - low) / max(high - low, 1e-12)


def of_one_kind(fixed: torch.Tensor, moved: torch.Tensor, mask: torch.Tensor) -> tuple[bool, float]:
    """Whether two roughly aligned images show tissue in the same contrast, and the evidence.

    The evidence is the signed local correlation in windows of 5^3 voxels, averaged with the geometric mean of the
    local variances as weight: near 1 for one contrast, near 0 or below where tissues change order.

    Args:
        fixed, moved: (I, J, K), of order one.
        mask: where to look.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool3d(values[None, None], 5, 1, 2, count_include_pad=False)[0, 0]

    f, m = mean(fixed), mean(moved)
    covariance = (mean(fixed * moved) - f * m)[mask]
    spread = ((mean(fixed**2) - f * f).clamp_min(0) * (mean(moved**2) - m * m).clamp_min(0)).sqrt()[mask]
    evidence = float(covariance.sum() / spread.sum().clamp_min(1e-12))
    return evidence > ONE_KIND, round(evidence, 3)


ONE_KIND = 0.5
"""Signed local correlation above which two images count as one kind."""
