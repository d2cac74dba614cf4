"""LC2: linear correlation of a linear combination, a similarity of patches across modalities.

A patch b is explained by a patch x of the other image: by the least-squares fit of x, its gradient length g and a
constant. LC2 is the share of the variance of b that the fit explains (Wein et al. 2008; Fuerst et al. 2014). Here
in 3-D, averaged over cubes of radius 3, 5 and 7 voxels, the training target of DISA (Ronchetti et al., 2023):

    A = [x, g, 1]    C = A A^T / n + RIDGE I    h = A b / n
    LC2 = clamp((h^T C^-1 h - mean(b)^2) / max(var(b), LEAST_VARIANCE), 0, 1)

LC2 is not symmetric: b is explained, x explains. The floors are absolute, so values must be z-scored first
(``zscored``); the constant is ridged too, so a shift far from zero lowers the score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.errors import InputError

RADII = (3, 5, 7)
"""Radii of the cubes in voxels; the network is trained at 2 mm."""

RIDGE = 1e-3
LEAST_VARIANCE = 1e-2


def zscored(values: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """(I, J, K) with mean 0 and standard deviation 1 over the valid voxels, and 0 elsewhere.

    Raises:
        InputError: not three axes, fewer than two valid voxels, values that are not finite, or a constant.
    """
    if values.ndim != 3:
        raise InputError(f"a volume of shape {tuple(values.shape)} was given; one with three axes is needed")
    inside = values if valid is None else values[valid]
    if inside.numel() < 2:
        raise InputError("the volume has no valid voxels, so it cannot be z-scored; check its mask")
    inside = inside.double()
    if not bool(torch.isfinite(inside).all()):
        raise InputError("the volume holds NaN or infinite values; mark them as not valid first")
    mean, deviation = inside.mean(), inside.std(correction=0)
    if deviation <= 1e-9 * (1 + mean.abs()):
        raise InputError(f"the volume is constant ({float(mean):g}); there is nothing to compare")
    scaled = ((values.double() - mean) / deviation).float()
    return scaled if valid is None else torch.where(valid, scaled, 0)


def gradient_length(values: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Length of the central differences x(p + 1) - x(p - 1), not halved, over the last three axes.

    A neighbour that is outside the volume or not valid is replaced by the voxel itself; voxels that are not valid
    give 0.
    """
    total = torch.zeros_like(values)
    for axis in (-3, -2, -1):
        ends = []
        for side in (1, -1):
            near, seen = _neighbour(values, axis, side), valid
            if seen is not None:
                near = torch.where(_neighbour(seen, axis, side), near, values)
            ends.append(near)
        total += (ends[0] - ends[1]) ** 2
    length = total.sqrt()
    return length if valid is None else torch.where(valid, length, 0)


def lc2(
    b: torch.Tensor, x: torch.Tensor, valid: torch.Tensor | None = None, radii: Sequence[int] = RADII
) -> torch.Tensor:
    """Dense LC2 of two images on one grid: how well the cube of x around each voxel explains that of b.

    Args:
        b, x: (I, J, K) z-scored; b is explained, x explains.
        valid: (I, J, K) bool, where both count. Windows hold valid voxels only.
        radii: radii of the cubes in voxels; the maps are averaged.

    Returns:
        (I, J, K) float32 in [0, 1]; 0 where a voxel is not valid.
    """
    _check(b, x, valid)
    seen = torch.ones(b.shape, dtype=torch.bool, device=b.device) if valid is None else valid
    g = gradient_length(x, seen)
    b, x = (torch.where(seen, v, 0).double() for v in (b, x))
    g = g.double()
    fields = torch.stack([seen.double(), x, g, x * x, g * g, x * g, b * x, b * g, b, b * b])
    total = torch.zeros(b.shape, dtype=torch.float64, device=b.device)
    for radius in radii:
        sums = _box_sums(fields, radius)
        means = sums[1:] / sums[0].clamp_min(1)
        total += _explained(list(means[:5]), means[5], means[6], means[7], means[8])
    return torch.where(seen, total / len(radii), 0).float()


def lc2_similarity(
    b: torch.Tensor, x: torch.Tensor, valid: torch.Tensor | None = None, radii: Sequence[int] = RADII
) -> float:
    """One number for two aligned images: the mean of ``lc2`` weighted by the local deviation of b, 0 to 1.

    Both images are z-scored over the valid voxels here. The weight is the standard deviation of b in the largest
    cube (Wein et al. 2008), so that empty regions have no say.

    Raises:
        InputError: shapes differ, no valid voxels, NaN, or a constant image.
    """
    _check(b, x, valid)
    b, x = zscored(b, valid), zscored(x, valid)
    weight = local_deviation(b, valid, max(radii))
    return float((weight * lc2(b, x, valid, radii)).double().sum() / weight.double().sum())


def lc2_map(
    patch: torch.Tensor, volume: torch.Tensor, valid: torch.Tensor | None = None, radii: Sequence[int] = RADII
) -> torch.Tensor:
    """LC2 of one patch against every position of a volume: box sums, and correlations by FFT.

    Args:
        patch: (S, S, S) z-scored, odd S >= 2 max(radii) + 1; it is explained. Only its centre is used.
        volume: (I, J, K) z-scored; it explains.
        valid: (I, J, K) bool. Voxels of the volume that are not valid count as 0 (the mean) without gradient.
        radii: radii of the cubes in voxels; the maps are averaged.

    Returns:
        (I, J, K) float32 in [0, 1]; 0 where a voxel is not valid. Cubes that leave the volume see zeros there.
    """
    if patch.ndim != 3 or len(set(patch.shape)) != 1 or patch.shape[0] % 2 == 0:
        raise InputError(f"a patch must be a cube with an odd edge, not {tuple(patch.shape)}")
    if patch.shape[0] < 2 * max(radii) + 1:
        raise InputError(
            f"LC2 of radius {max(radii)} needs a patch of {2 * max(radii) + 1}^3, not {patch.shape[0]}^3"
        )
    _check(volume, volume, valid)
    seen = torch.ones(volume.shape, dtype=torch.bool, device=volume.device) if valid is None else valid
    g = gradient_length(volume, seen).double()
    x = torch.where(seen, volume, 0).double()
    fields = torch.stack([x, g, x * x, g * g, x * g])
    shape = [n + 2 * max(radii) for n in x.shape]
    spectra = [torch.fft.rfftn(v, shape) for v in (x, g)]
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for radius in radii:
        b = _centre(patch, radius).to(x)
        count = b.numel()
        kernel = torch.fft.rfftn(b.flip(0, 1, 2), shape)
        crop = tuple(slice(radius, radius + n) for n in x.shape)
        bx, bg = (torch.fft.irfftn(s * kernel, shape)[crop] / count for s in spectra)
        total += _explained(list(_box_sums(fields, radius) / count), bx, bg, b.mean(), (b * b).mean())
    return torch.where(seen, total / len(radii), 0).float()


def lc2_pairs(
    b: torch.Tensor, x: torch.Tensor, g: torch.Tensor | None = None, radii: Sequence[int] = RADII
) -> torch.Tensor:
    """LC2 of every patch b explained by every patch x; the cross terms are two matrix products a radius.

    Args:
        b: (N, S, S, S), odd S >= 2 max(radii) + 1; explained.
        x: (M, S, S, S); explaining.
        g: (M, S, S, S) gradient length of x. By default it is taken from x, whose outermost voxels then have
            one-sided differences: give patches with S >= 2 max(radii) + 3, or g.

    Returns:
        (N, M) float32 in [0, 1].
    """
    g = gradient_length(x) if g is None else g
    total = torch.zeros(len(b), len(x), device=b.device)
    for radius in radii:
        rows, xs, gs = (_centre(v, radius).reshape(len(v), -1) for v in (b, x, g))
        count = rows.shape[1]
        means = [v.mean(1)[None] for v in (xs, gs, xs * xs, gs * gs, xs * gs)]
        bx, bg = (rows @ v.T / count for v in (xs, gs))
        total += _explained(means, bx, bg, rows.mean(1)[:, None], (rows * rows).mean(1)[:, None])
    return total / len(radii)


def local_deviation(
    values: torch.Tensor, valid: torch.Tensor | None = None, radius: int = max(RADII)
) -> torch.Tensor:
    """(I, J, K) standard deviation over the valid voxels of the cube around each voxel; 0 where not valid."""
    seen = torch.ones(values.shape, dtype=torch.bool, device=values.device) if valid is None else valid
    v = torch.where(seen, values, 0).double()
    count, first, second = _box_sums(torch.stack([seen.double(), v, v * v]), radius)
    count = count.clamp_min(1)
    variance = second / count - (first / count) ** 2
    return torch.where(seen, variance.clamp_min(0).sqrt(), 0).float()


def _explained(
    explaining: Sequence[torch.Tensor], bx: torch.Tensor, bg: torch.Tensor, b: torch.Tensor, bb: torch.Tensor
) -> torch.Tensor:
    """LC2 of one radius from means over the window: of x, g, xx, gg, xg, and of bx, bg, b, bb."""
    x, g, xx, gg, xg = explaining  # the constant is eliminated first, which keeps digits
    one = 1 + RIDGE
    s_xx, s_gg, s_xg = xx - x * x / one + RIDGE, gg - g * g / one + RIDGE, xg - x * g / one
    h_x, h_g = bx - x * b / one, bg - g * b / one
    quadratic = (h_x * h_x * s_gg - 2 * h_x * h_g * s_xg + h_g * h_g * s_xx) / (s_xx * s_gg - s_xg * s_xg)
    gained = quadratic - b * b * (RIDGE / one)
    return (gained / (bb - b * b).clamp_min(LEAST_VARIANCE)).clamp(0, 1)


def _box_sums(fields: torch.Tensor, radius: int) -> torch.Tensor:
    """(F, I, J, K) float64 -> sums over cubes of ``radius``, zeros outside."""
    side = 2 * radius + 1
    for axis in (1, 2, 3):
        pad = [0] * 6
        pad[2 * (3 - axis)], pad[2 * (3 - axis) + 1] = radius + 1, radius
        running = F.pad(fields, pad).cumsum(axis)
        length = fields.shape[axis]
        fields = running.narrow(axis, side, length) - running.narrow(axis, 0, length)
    return fields


def _centre(patches: torch.Tensor, radius: int) -> torch.Tensor:
    """The cube of ``radius`` in the middle of the last three axes."""
    start = patches.shape[-1] // 2 - radius
    side = slice(start, start + 2 * radius + 1)
    return patches[..., side, side, side]


def _neighbour(values: torch.Tensor, axis: int, side: int) -> torch.Tensor:
    """Values one step further along an axis; the last one again at the end."""
    length = values.shape[axis]
    index = (torch.arange(length, device=values.device) + side).clamp(0, length - 1)
    return values.index_select(axis, index)


def _check(b: torch.Tensor, x: torch.Tensor, valid: torch.Tensor | None) -> None:
    if b.ndim != 3 or b.shape != x.shape or (valid is not None and valid.shape != b.shape):
        mask = "" if valid is None else f" and a mask of {tuple(valid.shape)}"
        raise InputError(
            f"LC2 compares volumes of three axes on one grid, not {tuple(b.shape)} and {tuple(x.shape)}{mask}"
        )
