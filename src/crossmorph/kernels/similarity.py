"""Data terms with analytic gradients on the CPU: descriptor SSD and squared local correlation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crossmorph.kernels.parallel import Flags, Floats, Number, Offsets, compiled, over_planes

LANES = 16
"""Descriptors have a multiple of this many channels here; those that are not there are zero."""


@compiled
def _places(
    first: int, step: int, field: Floats, scale: Number, size: int, cells: Offsets, parts: Floats, weights: Floats
) -> None:
    """One axis of where the voxels of a line go, clamped to the volume.

    The lower one of the two voxels around each place -> cells, the weight of the other (NaN for NaN) -> parts. The
    weight of voxels that go outside becomes zero.
    """
    last, highest = np.float32(size - 1), np.float32(max(size - 2, 0))
    for k in range(weights.size):
        place = np.float32(first + step * k) + field[k] * scale
        if not 0 <= place <= last:  # nor NaN
            weights[k] = 0
        place = min(max(place, np.float32(0)), last)
        low = min(np.floor(place), highest)
        cells[k] = np.int32(low if low > 0 else 0)
        parts[k] = place - low


@compiled
def _ssd(
    first: int,
    last: int,
    fixed: Floats,
    moving: Floats,
    fixed_weight: Floats,
    moving_cells: Flags,
    field: Floats,
    scale: Floats,
    zeros: bool,
    factor: float,
    gradient: Floats,
) -> Number:
    """sum_p w(p) |moving(p + u) - fixed(p)|^2; the gradient with respect to u is added, times ``factor``."""
    ni, nj, nk, channels = moving.shape
    one = np.float32(1)
    f, m, whole = fixed.reshape(-1), moving.reshape(-1), moving_cells.reshape(-1)
    depth = np.uint64(channels)  # unsigned: signed offsets are checked for wrapping, which keeps vectors away
    row, plane = depth * np.uint64(nk), depth * np.uint64(nk * nj)
    di = plane if ni > 1 else np.uint64(0)
    dj = row if nj > 1 else np.uint64(0)
    dk = depth if nk > 1 else np.uint64(0)
    cells, parts = np.empty((3, nk), np.int32), np.empty((3, nk), np.float32)
    x0, y0, z0, part_x, part_y, part_z = cells[0], cells[1], cells[2], parts[0], parts[1], parts[2]
    weights = np.empty(nk, np.float32)
    total: Number = 0.0
    for i in range(first, last):
        for j in range(nj):
            weights[:] = fixed_weight[i, j]
            _places(i, 0, field[0, i, j], scale[0], ni, x0, part_x, weights)
            _places(j, 0, field[1, i, j], scale[1], nj, y0, part_y, weights)
            _places(0, 1, field[2, i, j], scale[2], nk, z0, part_z, weights)
            pull_x, pull_y, pull_z = gradient[0, i, j], gradient[1, i, j], gradient[2, i, j]
            line = np.uint64(i) * plane + np.uint64(j) * row
            part = np.float32(0)
            for k in range(nk):
                weight, voxel = weights[k], np.uint64((x0[k] * nj + y0[k]) * nk + z0[k])
                if weight == 0 or not whole[voxel]:
                    continue
                here, there = line + np.uint64(k) * depth, voxel * depth
                fx, fy, fz = part_x[k], part_y[k], part_z[k]
                sx, sy, sz, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for block in range(0, channels, LANES):
                    for lane in range(LANES):
                        n = np.uint64(block + lane)
                        a, b = m[there + n], m[there + dk + n]
                        c, d = m[there + dj + n], m[there + dj + dk + n]
                        e, g = m[there + di + n], m[there + di + dk + n]
                        h, q = m[there + di + dj + n], m[there + di + dj + dk + n]
                        ab, cd, eg, hq = a + (b - a) * fz, c + (d - c) * fz, e + (g - e) * fz, h + (q - h) * fz
                        low, high = ab + (cd - ab) * fy, eg + (hq - eg) * fy
                        r = low + (high - low) * fx - f[here + n]
                        s += r * r
                        sx += r * (high - low)
                        sy += r * ((cd - ab) * (one - fx) + (hq - eg) * fx)
                        near = (b - a) * (one - fy) + (d - c) * fy
                        far = (g - e) * (one - fy) + (q - h) * fy
                        sz += r * (near * (one - fx) + far * fx)
                part += weight * s
                twice = np.float32(2) * factor * weight
                pull_x[k] += twice * sx * scale[0]
                pull_y[k] += twice * sy * scale[1]
                pull_z[k] += twice * sz * scale[2]
            if zeros:
                for k in range(nk):
                    weight = fixed_weight[i, j, k]
                    if weight != weights[k]:
                        place_x = i + field[0, i, j, k] * scale[0]
                        place_y = j + field[1, i, j, k] * scale[1]
                        place_z = k + field[2, i, j, k] * scale[2]
                        pull, strength = gradient[:, i, j, k], factor * weight
                        target = fixed[i, j, k]
                        part += weight * _outside(moving, target, place_x, place_y, place_z, strength, scale, pull)
            total += part
    return total


@compiled
def _outside(
    moving: Floats, f: Floats, x: Number, y: Number, z: Number, factor: Number, scale: Floats, gradient: Floats
) -> Number:
    """The term at a place outside the volume where that is zero (published rule): corners drop out one by one."""
    ni, nj, nk, channels = moving.shape
    x0, y0, z0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
    fx, fy, fz = np.float32(x - x0), np.float32(y - y0), np.float32(z - z0)
    total = np.float32(0)
    for n in range(channels):
        value, dx, dy, dz = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for corner in range(8):
            a, b, c = corner & 1, (corner >> 1) & 1, (corner >> 2) & 1
            if 0 <= x0 + a < ni and 0 <= y0 + b < nj and 0 <= z0 + c < nk:
                v = moving[x0 + a, y0 + b, z0 + c, n]
                wx = fx if a else np.float32(1) - fx
                wy = fy if b else np.float32(1) - fy
                wz = fz if c else np.float32(1) - fz
                value += v * wx * wy * wz
                dx += v * wy * wz * (1 if a else -1)
                dy += v * wx * wz * (1 if b else -1)
                dz += v * wx * wy * (1 if c else -1)
        r = value - f[n]
        total += r * r
        gradient[0] += 2 * factor * r * dx * scale[0]
        gradient[1] += 2 * factor * r * dy * scale[1]
        gradient[2] += 2 * factor * r * dz * scale[2]
    return total


def ssd(
    fixed: Floats,
    moving: Floats,
    fixed_weight: Floats,
    moving_cells: Flags,
    field: Floats,
    scale: Floats,
    zeros: bool,
    factor: float,
    gradient: Floats,
) -> float:
    """See ``optimise.terms.DescriptorSSD``; arrays (I, J, K, C), field and gradient (3, I, J, K).

    ``moving_cells`` (I, J, K): whether a voxel and its upper neighbours are all valid.
    """
    arrays = (fixed, moving, fixed_weight, moving_cells, field)
    parts = over_planes(_ssd, field.shape[1], *arrays, scale, zeros, np.float32(factor), gradient)
    return float(factor * sum(parts))


@compiled
def _sample(
    first: int, last: int, moving: Floats, moving_cells: Flags, field: Floats, out: Floats, slope: Floats
) -> None:
    """out = moving(p + u) and slope (3, I, J, K), its derivative; the slope is zero where moving is not valid."""
    ni, nj, nk = moving.shape
    lines = field.shape[3]
    one = np.float32(1)
    m, whole = moving.reshape(-1), moving_cells.reshape(-1)
    di = np.uint64(nj * nk if ni > 1 else 0)
    dj = np.uint64(nk if nj > 1 else 0)
    dk = np.uint64(1 if nk > 1 else 0)
    cells, parts = np.empty((3, lines), np.int32), np.empty((3, lines), np.float32)
    x0, y0, z0, part_x, part_y, part_z = cells[0], cells[1], cells[2], parts[0], parts[1], parts[2]
    inside = np.empty(lines, np.float32)
    for i in range(first, last):
        for j in range(field.shape[2]):
            inside[:] = 1
            _places(i, 0, field[0, i, j], one, ni, x0, part_x, inside)
            _places(j, 0, field[1, i, j], one, nj, y0, part_y, inside)
            _places(0, 1, field[2, i, j], one, nk, z0, part_z, inside)
            value, slope_x, slope_y, slope_z = out[i, j], slope[0, i, j], slope[1, i, j], slope[2, i, j]
            for k in range(lines):
                fx, fy, fz = part_x[k], part_y[k], part_z[k]
                n = np.uint64((x0[k] * nj + y0[k]) * nk + z0[k])
                a, b, c, d = m[n], m[n + dk], m[n + dj], m[n + dj + dk]
                e, g, h, q = m[n + di], m[n + di + dk], m[n + di + dj], m[n + di + dj + dk]
                ab, cd, eg, hq = a + (b - a) * fz, c + (d - c) * fz, e + (g - e) * fz, h + (q - h) * fz
                low, high = ab + (cd - ab) * fy, eg + (hq - eg) * fy
                keep = inside[k] * np.float32(whole[n])
                near, far = (b - a) * (one - fy) + (d - c) * fy, (g - e) * (one - fy) + (q - h) * fy
                value[k] = low + (high - low) * fx
                slope_x[k] = keep * (high - low)
                slope_y[k] = keep * ((cd - ab) * (one - fx) + (hq - eg) * fx)
                slope_z[k] = keep * (near * (one - fx) + far * fx)


def sampled(moving: Floats, moving_cells: Flags, field: Floats) -> tuple[Floats, Floats]:
    """moving(p + u) (I, J, K) and its derivative by u (3, I, J, K), zero where moving is not valid."""
    moved, slope = np.empty(field.shape[1:], np.float32), np.empty_like(field)
    over_planes(_sample, field.shape[1], moving, moving_cells, field, moved, slope)
    return moved, slope


@compiled
def _sum(a: Floats, b: Floats, c: Floats, out: Floats) -> None:
    for k in range(out.size):
        out[k] = a[k] + b[k] + c[k]


@compiled
def _add_both(a: Floats, b: Floats, out: Floats) -> None:
    for k in range(out.size):
        out[k] += a[k] + b[k]


@compiled
def _box_plane(plane: Floats, radius: int, out: Floats) -> None:
    """Sums over (2r+1)^2 windows of (J, K), cut off at the borders; r >= 1."""
    nj, nk = plane.shape
    nothing, padded = np.zeros(nk, np.float32), np.zeros(nk + 2 * radius, np.float32)
    line = padded[radius : radius + nk]
    for j in range(nj):
        for t in range(1, radius + 1):
            before = plane[j - t] if j >= t else nothing
            after = plane[j + t] if j + t < nj else nothing
            if t == 1:
                _sum(plane[j], before, after, line)
            else:
                _add_both(before, after, line)
        _sum(line, padded[radius - 1 : radius - 1 + nk], padded[radius + 1 : radius + 1 + nk], out[j])
        for t in range(2, radius + 1):
            _add_both(padded[radius - t : radius - t + nk], padded[radius + t : radius + t + nk], out[j])


@compiled
def _sum_of_planes(ring: Floats, plane: int, planes: int, number: int, out: Floats) -> None:
    """Sum of a field of a ring (2r+1, fields, J, K) over the planes around one, cut off at the borders."""
    width = len(ring)
    nothing = np.zeros(out.shape[1], np.float32)
    for j in range(out.shape[0]):
        for t in range(1, width // 2 + 1):
            before = ring[(plane - t) % width, number, j] if plane >= t else nothing
            after = ring[(plane + t) % width, number, j] if plane + t < planes else nothing
            if t == 1:
                _sum(ring[plane % width, number, j], before, after, out[j])
            else:
                _add_both(before, after, out[j])


@compiled
def _product(a: Floats, b: Floats, out: Floats) -> None:
    for j in range(out.shape[0]):
        x, y, z = a[j], b[j], out[j]
        for k in range(z.size):
            z[k] = x[k] * y[k]


RANGES = 8
"""Ranges of planes of local correlation: each also sums the planes that its windows reach beyond it."""


class Windows(NamedTuple):
    """What local correlation needs of the fixed image, once for all displacements.

    Arrays are (I, J, K): values, weights, and of the windows around each voxel the mean and the variance, with
    what counts as nothing.
    """

    fixed: Floats
    weight: Floats
    mean: Floats
    variance: Floats
    radius: int
    noise: np.float32


@compiled
def _counted(place: int, radius: int, size: int) -> int:
    """Voxels of a line that lie in the window around one of them."""
    return min(place + radius, size - 1) - max(place - radius, 0) + 1


@compiled
def _moments(
    first: int, last: int, fixed: Floats, radius: int, noise: float, mean: Floats, variance: Floats
) -> None:
    ni, nj, nk = fixed.shape
    ring = np.empty((2 * radius + 1, 2, nj, nk), np.float32)
    product = np.empty((nj, nk), np.float32)
    ready = max(first - radius, 0) - 1
    for i in range(first, last):
        low, high = max(i - radius, 0), min(i + radius, ni - 1)
        for plane in range(ready + 1, high + 1):
            slot, f = ring[plane % (2 * radius + 1)], fixed[plane]
            _box_plane(f, radius, slot[0])
            _product(f, f, product)
            _box_plane(product, radius, slot[1])
            ready = plane
        _sum_of_planes(ring, i, ni, 0, mean[i])
        _sum_of_planes(ring, i, ni, 1, variance[i])
        for j in range(nj):
            count = np.float32((high - low + 1) * _counted(j, radius, nj))
            for k in range(nk):
                inverse = np.float32(1) / (count * np.float32(_counted(k, radius, nk)))
                f = mean[i, j, k] * inverse
                mean[i, j, k] = f
                variance[i, j, k] = max(variance[i, j, k] * inverse - f * f, np.float32(0)) + noise


def windows(fixed: Floats, weight: Floats, radius: int, noise: float) -> Windows:
    """The fixed side of ``optimise.terms.LocalCorrelation``; arrays (I, J, K)."""
    mean, variance = np.empty_like(fixed), np.empty_like(fixed)
    over_planes(_moments, len(fixed), fixed, radius, np.float32(noise), mean, variance)
    return Windows(fixed, weight, mean, variance, radius, np.float32(noise))


@compiled
def _correlation(
    first: int,
    last: int,
    fixed: Floats,
    weight: Floats,
    mean: Floats,
    variance: Floats,
    radius: int,
    noise: float,
    moved: Floats,
    coefficients: Floats,
) -> Number:
    """Squared local correlation at every voxel and the three fields its gradient is made of."""
    ni, nj, nk = fixed.shape
    ring = np.empty((2 * radius + 1, 3, nj, nk), np.float32)
    product = np.empty((nj, nk), np.float32)
    sums = np.empty((3, nj, nk), np.float32)
    total: Number = 0.0
    ready = max(first - radius, 0) - 1
    for i in range(first, last):
        low, high = max(i - radius, 0), min(i + radius, ni - 1)
        for plane in range(ready + 1, high + 1):
            slot, f, m = ring[plane % (2 * radius + 1)], fixed[plane], moved[plane]
            _box_plane(m, radius, slot[0])
            for n, other in enumerate((m, f)):
                _product(m, other, product)
                _box_plane(product, radius, slot[1 + n])
            ready = plane
        for n in range(3):
            _sum_of_planes(ring, i, ni, n, sums[n])
        for j in range(nj):
            count = np.float32((high - low + 1) * _counted(j, radius, nj))
            c0, c1, c2, w = coefficients[0, i, j], coefficients[1, i, j], coefficients[2, i, j], weight[i, j]
            s0, s1, s2, means, variances = sums[0, j], sums[1, j], sums[2, j], mean[i, j], variance[i, j]
            part = np.float32(0)
            for k in range(nk):
                inverse = np.float32(1) / (count * np.float32(_counted(k, radius, nk)))
                f, ff, m = means[k], variances[k], s0[k] * inverse
                mm = max(s1[k] * inverse - m * m, np.float32(0)) + noise
                fm = s2[k] * inverse - f * m
                ratio = fm / (ff * mm)
                part += w[k] * fm * ratio
                a = np.float32(2) * w[k] * ratio * inverse
                b = a * fm / mm
                c0[k], c1[k], c2[k] = a, b, a * f - b * m
            total += part
    return total


@compiled
def _correlation_gradient(
    first: int,
    last: int,
    fixed: Floats,
    moved: Floats,
    coefficients: Floats,
    radius: int,
    factor: float,
    slope: Floats,
    gradient: Floats,
) -> None:
    """``factor`` times the derivative: f sum(a) - m sum(b) - sum(c) over the window, times the slope."""
    ni, nj, nk = fixed.shape
    ring = np.empty((2 * radius + 1, 3, nj, nk), np.float32)
    sums = np.empty((3, nj, nk), np.float32)
    ready = max(first - radius, 0) - 1
    for i in range(first, last):
        for plane in range(ready + 1, min(i + radius, ni - 1) + 1):
            for n in range(3):
                _box_plane(coefficients[n, plane], radius, ring[plane % (2 * radius + 1), n])
            ready = plane
        for n in range(3):
            _sum_of_planes(ring, i, ni, n, sums[n])
        for j in range(nj):
            f, m, a, b, c = fixed[i, j], moved[i, j], sums[0, j], sums[1, j], sums[2, j]
            for n in range(3):
                s, g = slope[n, i, j], gradient[n, i, j]
                for k in range(nk):
                    g[k] = factor * (f[k] * a[k] - m[k] * b[k] - c[k]) * s[k]


def lncc(
    fixed: Windows, moving: Floats, moving_cells: Flags, field: Floats, factor: float, gradient: Floats
) -> float:
    """See ``optimise.terms.LocalCorrelation``: factor * sum of w * LNCC^2; its gradient in u is written."""
    moved, slope = sampled(moving, moving_cells, field)
    coefficients = np.empty_like(field)
    planes = len(moved)
    parts = over_planes(_correlation, planes, *fixed, moved, coefficients, chunks=RANGES)
    inputs = (fixed.fixed, moved, coefficients, fixed.radius, np.float32(factor), slope)
    over_planes(_correlation_gradient, planes, *inputs, gradient, chunks=RANGES)
    return float(factor * sum(parts))
