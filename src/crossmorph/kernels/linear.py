"""Feature volumes seen through an affine map, and the derivative of a function of what is seen by that map."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.kernels.parallel import Flags, Floats, compiled, inlined, over_planes

Matrix = NDArray[np.floating[Any]]


def seen(
    features: torch.Tensor, known: torch.Tensor, matrix: Matrix, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (A, B, C, F) at matrix @ (i, j, k, 1) for the voxels of ``mask`` (I, J, K).

    Args:
        features: float32, channels last.
        known: (A, B, C) bool; a place counts as seen where the nearest voxel is known.
        matrix: (3, 4) from voxels of the mask to voxels of the features.
        mask: bool; where nothing is asked for, zero is given.

    Returns:
        (I, J, K, F) values, and (I, J, K) whether the place is asked for, known, and between the voxel centres.
    """
    values = torch.zeros((*mask.shape, features.shape[-1]), dtype=torch.float32)
    inside = torch.zeros(mask.shape, dtype=torch.bool)
    volumes = [volume.contiguous().numpy() for volume in (features, known, mask, values, inside)]
    over_planes(_seen, mask.shape[0], np.ascontiguousarray(matrix, np.float64), *volumes)
    return values, inside


def pulled(features: torch.Tensor, matrix: Matrix, inside: torch.Tensor, slopes: torch.Tensor) -> Matrix:
    """d L / d matrix (3, 4), given the slopes d L / d values (I, J, K, F) of what ``seen`` returned."""
    arrays = (features.contiguous().numpy(), np.ascontiguousarray(matrix, np.float64), inside.contiguous().numpy())
    parts = over_planes(_pulled, inside.shape[0], *arrays, slopes.contiguous().numpy())
    total: Matrix = np.sum(parts, axis=0)
    return total


@inlined
def _along(matrix: Matrix, axis: int, i: int, j: int, k: int) -> float:
    """One coordinate of a mapped voxel."""
    place: float = matrix[axis, 0] * i + matrix[axis, 1] * j + matrix[axis, 2] * k + matrix[axis, 3]
    return place


@inlined
def _low(x: float, n: int) -> int:
    """Voxel below x, or -1 where x lies outside the voxel centres."""
    if not (x >= 0.0 and x <= n - 1.0):
        return -1
    return min(int(x), max(n - 2, 0))


@compiled
def _seen(
    first: int,
    last: int,
    matrix: Matrix,
    features: Floats,
    known: Flags,
    mask: Flags,
    values: Floats,
    inside: Flags,
) -> None:
    na, nb, nc, channels = features.shape
    _, rows, columns = mask.shape
    for i in range(first, last):
        for j in range(rows):
            for k in range(columns):
                if not mask[i, j, k]:
                    continue
                x, y, z = _along(matrix, 0, i, j, k), _along(matrix, 1, i, j, k), _along(matrix, 2, i, j, k)
                a, b, c = _low(x, na), _low(y, nb), _low(z, nc)
                if a < 0 or b < 0 or c < 0 or not known[int(x + 0.5), int(y + 0.5), int(z + 0.5)]:
                    continue
                inside[i, j, k] = True
                fx, fy, fz = np.float32(x - a), np.float32(y - b), np.float32(z - c)
                out = values[i, j, k]
                for corner in range(8):
                    p, q, r = corner >> 2, (corner >> 1) & 1, corner & 1
                    weight = (fx if p else 1 - fx) * (fy if q else 1 - fy) * (fz if r else 1 - fz)
                    if weight == 0:
                        continue
                    near = features[a + p, b + q, c + r]
                    for f in range(channels):
                        out[f] += weight * near[f]


@compiled
def _pulled(first: int, last: int, features: Floats, matrix: Matrix, inside: Flags, slopes: Floats) -> Matrix:
    na, nb, nc, channels = features.shape
    _, rows, columns = inside.shape
    total = np.zeros((3, 4))
    dots = np.zeros(8)
    for i in range(first, last):
        for j in range(rows):
            for k in range(columns):
                if not inside[i, j, k]:
                    continue
                x, y, z = _along(matrix, 0, i, j, k), _along(matrix, 1, i, j, k), _along(matrix, 2, i, j, k)
                a, b, c = _low(x, na), _low(y, nb), _low(z, nc)
                fx, fy, fz = x - a, y - b, z - c
                slope = slopes[i, j, k]
                for corner in range(8):
                    p, q, r = min(a + (corner >> 2), na - 1), min(b + ((corner >> 1) & 1), nb - 1), corner & 1
                    near = features[p, q, min(c + r, nc - 1)]
                    dot = np.float32(0)
                    for f in range(channels):
                        dot += slope[f] * near[f]
                    dots[corner] = dot
                gx = gy = gz = 0.0
                for corner in range(8):
                    p, q, r = corner >> 2, (corner >> 1) & 1, corner & 1
                    wx, wy, wz = fx if p else 1 - fx, fy if q else 1 - fy, fz if r else 1 - fz
                    gx += (dots[corner] if p else -dots[corner]) * wy * wz
                    gy += (dots[corner] if q else -dots[corner]) * wx * wz
                    gz += (dots[corner] if r else -dots[corner]) * wx * wy
                for axis, g in enumerate((gx, gy, gz)):
                    total[axis, 0] += g * i
                    total[axis, 1] += g * j
                    total[axis, 2] += g * k
                    total[axis, 3] += g
    return total


def difference(
    fixed: torch.Tensor, moving: torch.Tensor, share: torch.Tensor, inside: torch.Tensor
) -> tuple[float, float, torch.Tensor]:
    """Sum of share |f - m|^2 and of share over what is inside, and the slope of the first by m.

    Args:
        fixed, moving: (I, J, K, F).
        share: (I, J, K) weights.
        inside: (I, J, K) bool.
    """
    slope = torch.zeros_like(moving)
    volumes = [volume.contiguous().numpy() for volume in (fixed, moving, share, inside, slope)]
    parts = over_planes(_difference, inside.shape[0], *volumes)
    value, known = np.sum(parts, axis=0)
    return float(value), float(known), slope


@compiled
def _difference(
    first: int, last: int, fixed: Floats, moving: Floats, share: Floats, inside: Flags, slope: Floats
) -> tuple[float, float]:
    _, rows, columns, channels = fixed.shape
    value = known = 0.0
    for i in range(first, last):
        for j in range(rows):
            for k in range(columns):
                weight = share[i, j, k]
                if not inside[i, j, k] or weight == 0:
                    continue
                f, m, s = fixed[i, j, k], moving[i, j, k], slope[i, j, k]
                total = np.float32(0)
                for c in range(channels):
                    apart = m[c] - f[c]
                    total += apart * apart
                    s[c] = 2 * weight * apart
                value += weight * total
                known += weight
    return value, known


def joint_histogram(
    place: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor, inside: torch.Tensor, bins: int
) -> Matrix:
    """(bins, bins + 2) weighted counts of a fixed and a moving image over what is inside.

    A fixed value is shared linearly by two bins, a moving one by four with cubic B-splines.

    Args:
        place: (I, J, K) fixed values as bin numbers, 0 to bins - 1.
        moving: (I, J, K, 1) moving values, 0 to 1 (others are moved to the ends).
        weight: (I, J, K).
        inside: (I, J, K) bool.
        bins: number of bins of both.
    """
    volumes = [volume.contiguous().numpy() for volume in (place, moving, weight, inside)]
    total: Matrix = np.sum(over_planes(_joint, inside.shape[0], *volumes, bins), axis=0)
    return total


def histogram_slopes(
    place: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor, inside: torch.Tensor, by_counts: Matrix
) -> torch.Tensor:
    """(I, J, K, 1): slope by the moving values of a function of ``joint_histogram`` with slopes ``by_counts``."""
    slope = torch.zeros_like(moving)
    volumes = [volume.contiguous().numpy() for volume in (place, moving, weight, inside)]
    over_planes(_histogram_slopes, inside.shape[0], *volumes, by_counts, slope.numpy())
    return slope


@inlined
def _bin(value: float, bins: int) -> tuple[int, float]:
    """First of the four splines that reach a moving value, and how far it is into its interval."""
    x = min(max(value, 0.0), 1.0) * (bins - 1)
    first = min(int(x), bins - 2)
    return first, x - first


@compiled
def _joint(
    start: int, stop: int, place: Floats, moving: Floats, weight: Floats, inside: Flags, bins: int
) -> Matrix:
    total = np.zeros((bins, bins + 2))
    _, rows, columns = inside.shape
    for i in range(start, stop):
        for j in range(rows):
            for k in range(columns):
                w = weight[i, j, k]
                if not inside[i, j, k] or w == 0:
                    continue
                row = min(int(place[i, j, k]), bins - 2)
                high = w * (place[i, j, k] - row)
                low = w - high
                n, t = _bin(moving[i, j, k, 0], bins)
                s = 1 - t
                splines = (s * s * s, 3 * t * t * t - 6 * t * t + 4, 3 * s * s * s - 6 * s * s + 4, t * t * t)
                for c in range(4):
                    total[row, n + c] += low * splines[c] / 6
                    total[row + 1, n + c] += high * splines[c] / 6
    return total


@compiled
def _histogram_slopes(
    start: int,
    stop: int,
    place: Floats,
    moving: Floats,
    weight: Floats,
    inside: Flags,
    by_counts: Matrix,
    slope: Floats,
) -> None:
    bins = by_counts.shape[0]
    _, rows, columns = inside.shape
    for i in range(start, stop):
        for j in range(rows):
            for k in range(columns):
                w = weight[i, j, k]
                if not inside[i, j, k] or w == 0:
                    continue
                row = min(int(place[i, j, k]), bins - 2)
                high = place[i, j, k] - row
                n, t = _bin(moving[i, j, k, 0], bins)
                s = 1 - t
                splines = (-s * s / 2, 1.5 * t * t - 2 * t, 2 * s - 1.5 * s * s, t * t / 2)
                value = 0.0
                for c in range(4):
                    value += splines[c] * ((1 - high) * by_counts[row, n + c] + high * by_counts[row + 1, n + c])
                slope[i, j, k, 0] = w * value * (bins - 1)
