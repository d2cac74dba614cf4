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

MIN_WORKING_VOXELS = 1_500_000
"""It is made finer, by up to ``MAX_OVERSAMPLING``, where it would have fewer, so that patches of descriptors are
smaller than organs in coarse scans too."""

MAX_OVERSAMPLING = 1.5


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
    values = image.data if count == image.valid.numel() else image.data.masked_select(image.valid)
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
    drawn = Image(inside[None].float(), mask.grid, torch.ones_like(inside))
    chosen = image.valid & (resample(drawn, image.grid, mode="nearest", fill=0).data[0] > 0.5)
    count, volume = int(inside.sum()), int(inside.sum()) * mask.grid.voxel_volume
    if not chosen.any():
        raise InputError(
            f"{where} ({count} voxels, {volume:.0f} mm^3) does not meet {image.source or image.name}; "
            "are both in the same world? `crossmorph info` shows the boxes of both"
        )
    return replace(image, valid=chosen, notes=(*image.notes, f"only voxels inside {where} count"))


def working_grid(pairs: Sequence[tuple[Grid, Grid]], spacing_mm: float, multiple: int) -> Grid:
    """Isotropic grid over the (first) fixed field of view on which a system works.

    Args:
        pairs: grids of the fixed and moving images that are compared.
        spacing_mm: voxel size; 0 takes the finest spacing that both images of some pair have, coarser where that
            gave more than 8 million voxels, finer (by 1.5 at most) where it gave less than 1.5 million.
        multiple: sizes are rounded up to a multiple of this, beyond the high faces.
    """
    fixed = pairs[0][0]
    if spacing_mm == 0:
        finest = min(max(grid.spacing.min() for grid in pair) for pair in pairs)
        volume = float(fixed.extent_mm.prod())
        finer = max((volume / MIN_WORKING_VOXELS) ** (1 / 3), float(finest) / MAX_OVERSAMPLING)
        spacing_mm = min(max(float(finest), (volume / MAX_WORKING_VOXELS) ** (1 / 3)), finer)
    grid = fixed.respaced(spacing_mm)
    return grid.padded((0, 0, 0), [-n % multiple for n in grid.shape])


def onto(image: Image, grid: Grid, start: Affine | None = None) -> Image:
    """The image drawn on a grid as ``seen_on`` does, values repeated where it is not valid."""
    drawn = seen_on(image, grid, start)
    return replace(drawn, data=fill_invalid(drawn.data[0], drawn.valid)[None])


def seen_on(image: Image, grid: Grid, start: Affine | None = None) -> Image:
    """The image drawn on a grid without aliasing; any value where it is not valid.

    Args:
        image: one channel.
        grid: target, in the fixed space.
        start: from the fixed to the image's space; None where both are one.
    """
    if start is not None:
        back = np.linalg.inv(start.matrix)
        image = replace(image, grid=Grid(image.grid.shape, back @ image.grid.affine))
    shift = _whole_voxels(image.grid, grid)
    return downsample(image, grid) if shift is None else _shifted(image, grid, shift)


def _whole_voxels(a: Grid, b: Grid) -> list[int] | None:
    """How many voxels of a lie before b's first along each axis, where both share one lattice; else None."""
    place = a.to_voxel(b.origin)
    step = np.abs(a.inverse_affine[:3, :3] @ b.affine[:3, :3] - np.eye(3)).max()
    if step * max(b.shape) > 1e-3 or np.abs(place - place.round()).max() > 1e-3:
        return None
    return [int(n) for n in place.round()]


def _shifted(image: Image, grid: Grid, shift: list[int]) -> Image:
    """The image cropped and padded to a grid of its own lattice."""
    pad = []
    for n, size, wanted in reversed(list(zip(shift, image.grid.shape, grid.shape, strict=True))):
        pad += [-n, wanted + n - size]
    return replace(image, data=F.pad(image.data, pad), valid=F.pad(image.valid, pad), grid=grid)


def fill_invalid(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(I, J, K) with every invalid voxel replaced by about the nearest valid value (of a block of 2^3 voxels)."""
    if valid.all() or not valid.any():
        return values
    counts = F.avg_pool3d(valid[None, None].float(), 2, ceil_mode=True)[0, 0]
    sums = F.avg_pool3d((values * valid)[None, None], 2, ceil_mode=True)[0, 0]
    coarse = sums / counts.clamp_min(1e-6)
    empty = (counts == 0).cpu().numpy()
    nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
    i, j, k = (torch.from_numpy(index).to(values.device) for index in nearest)
    filled = coarse[i, j, k]
    for axis, size in enumerate(values.shape):
        filled = filled.repeat_interleave(2, axis).narrow(axis, 0, size)
    return torch.where(valid, values, filled)


def foreground(image: Image, margin_mm: float = 8.0) -> torch.Tensor:
    """Where the body is: (I, J, K) bool, generous; everything valid where no background stands out.

    Voxels, after pooling to about 4 mm (or a 48th of the field of view), that differ from the commonest value at
    the faces of the volume by more than a tenth of the range between the 2nd and 98th percentile; the largest such
    part, holes filled, widened by ``margin_mm`` or two blocks.
    """
    size = float(image.grid.spacing.mean())
    step = max(1, round(max(4.0 / size if size > 0.5 else 0.0, max(image.grid.shape) / 48)))
    sums = F.avg_pool3d((image.data[:1] * image.valid)[None], step, ceil_mode=True)[0, 0]
    weight = F.avg_pool3d(image.valid[None, None].float(), step, ceil_mode=True)[0, 0]
    values = (sums / weight.clamp_min(1e-6)).cpu().numpy()
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
    """Values shifted and scaled so that the 1st and 99th percentile of the valid ones are 0 and 1.

    Where all of them differ by no more than rounding does, nothing is shown: 0 everywhere.
    """
    sample = values.masked_select(valid)
    sample = sample[:: max(1, sample.numel() // 1_000_000)]
    low, high = np.quantile(sample.cpu().numpy(), (0.01, 0.99)).tolist()  # selects; torch's sorts, 20 times slower
    least, most = float(sample.min()), float(sample.max())
    if most - least <= 1e-6 * max(abs(least), abs(most)):
        return torch.zeros_like(values)
    shown: torch.Tensor = (values - low) / max(high - low, 1e-12)
    return shown
