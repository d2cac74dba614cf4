"""Smoothing, warping and regularity of displacement fields on the CPU. Fields are (3, I, J, K), in voxels."""

from __future__ import annotations

import numpy as np

from crossmorph.kernels.parallel import Floats, Number, compiled, inlined, over_planes

Sizes = tuple[int, int, int]

ZERO, REPEAT, OMIT = 0, 1, 2
"""What a mean takes for the outside: zero, the nearest value, or nothing."""

GENTLE = 0.2
"""Where no one-sided difference is larger, no determinant is below 0.4: the lowest of the 512 extreme matrices."""


@compiled
def smooth_rows(rows: Floats, old: Floats, passes: int, border: int) -> None:
    """Means of three along the first axis of (N, K), in place; ``old`` (2, K) keeps the rows that change."""
    last = rows.shape[0] - 1
    for _ in range(passes):
        for x in range(last + 1):
            row, here, before = rows[x], old[x % 2], old[(x + 1) % 2]
            here[:] = row
            if 0 < x < last:
                after = rows[x + 1]
                for k in range(row.size):
                    row[k] = np.float32(1 / 3) * (before[k] + here[k] + after[k])
                continue
            missing = 1 if last > 0 else 2
            scale = np.float32(1 / (3 - missing) if border == OMIT else 1 / 3)
            own = scale * np.float32(1 + missing if border == REPEAT else 1)
            for k in range(row.size):
                row[k] *= own
            if last > 0:
                other = rows[1] if x == 0 else before
                for k in range(row.size):
                    row[k] += scale * other[k]


@compiled
def _smooth_line(line: Floats, old: Floats, passes: int, border: int) -> None:
    n = line.size
    for _ in range(passes):
        old[1 : n + 1] = line
        old[0] = line[0] if border == REPEAT else np.float32(0)
        old[n + 1] = line[n - 1] if border == REPEAT else np.float32(0)
        for k in range(n):
            line[k] = (old[k] + old[k + 1] + old[k + 2]) * np.float32(1 / 3)


@compiled
def _smooth_in_plane(first: int, last: int, field: Floats, passes: int, border: int) -> None:
    rows = np.empty((2, field.shape[3]), np.float32)
    line = np.empty(field.shape[3] + 2, np.float32)
    for i in range(first, last):
        for c in range(field.shape[0]):
            smooth_rows(field[c, i], rows, passes, border)
            for j in range(field.shape[2]):
                _smooth_line(field[c, i, j], line, passes, border)


@compiled
def _smooth_across(first: int, last: int, field: Floats, passes: int, border: int) -> None:
    rows = np.empty((2, field.shape[3]), np.float32)
    for j in range(first, last):
        for c in range(field.shape[0]):
            smooth_rows(field[c, :, j], rows, passes, border)


def smooth(field: Floats, passes: int, repeat: bool) -> Floats:
    """``passes`` 3^3 means of each component; a new (C, I, J, K) array."""
    out = np.array(field, np.float32, order="C")
    border = REPEAT if repeat else ZERO
    over_planes(_smooth_in_plane, out.shape[1], out, passes, border)
    over_planes(_smooth_across, out.shape[2], out, passes, border)
    return out


@compiled
def _corner(place: Number, high: bool, size: int) -> tuple[int, Number, bool]:
    """One of the two voxels around a coordinate: its index, clamped; its weight; whether it exists."""
    base = int(np.floor(place))
    part = np.float32(place - base)
    index = base + 1 if high else base
    return min(max(index, 0), size - 1), part if high else np.float32(1) - part, 0 <= index < size


@compiled
def _warp(
    first: int, last: int, values: Floats, shape: Sizes, field: Floats, scale: Floats, zeros: bool, out: Floats
) -> None:
    """See ``warp``; values are (C, voxels) of a volume of ``shape``."""
    ni, nj, nk = shape
    weights, where = np.empty(8, np.float32), np.empty(8, np.int64)
    for i in range(first, last):
        for j in range(out.shape[2]):
            for k in range(out.shape[3]):
                x = i + field[0, i, j, k] * scale[0]
                y = j + field[1, i, j, k] * scale[1]
                z = k + field[2, i, j, k] * scale[2]
                for corner in range(8):
                    a, fa, has_a = _corner(x, corner & 4 > 0, ni)
                    b, fb, has_b = _corner(y, corner & 2 > 0, nj)
                    c, fc, has_c = _corner(z, corner & 1 > 0, nk)
                    counts = not zeros or (has_a and has_b and has_c)
                    weights[corner] = fa * fb * fc if counts else np.float32(0)
                    where[corner] = (a * nj + b) * nk + c
                for n in range(out.shape[0]):
                    total = np.float32(0)
                    for corner in range(8):
                        total += weights[corner] * values[n, where[corner]]
                    out[n, i, j, k] = total


def warp(values: Floats, field: Floats, scale: Floats, zeros: bool) -> Floats:
    """values(p + scale * field(p)) by linear interpolation; outside is zero, or the nearest value."""
    out = np.empty((len(values), *field.shape[1:]), np.float32)
    lines = np.ascontiguousarray(values).reshape(len(values), -1)
    inputs = (lines, values.shape[1:], np.ascontiguousarray(field), scale)
    over_planes(_warp, field.shape[1], *inputs, zeros, out)
    return out


@compiled
def _diffusion(first: int, last: int, field: Floats, weights: Floats, gradient: Floats) -> Number:
    """Adds the gradient of sum_a weights[a] * sum (forward difference along a)^2; returns the value."""
    total: Number = 0.0
    ni, nj, nk = field.shape[1:]
    for c in range(field.shape[0]):
        for i in range(first, last):
            for j in range(nj):
                here, out = field[c, i, j], gradient[c, i, j]
                part = np.float32(0)
                for k in range(nk - 1):
                    d = here[k + 1] - here[k]
                    part += weights[2] * d * d
                    out[k] -= 2 * weights[2] * d
                    out[k + 1] += 2 * weights[2] * d
                if j > 0:
                    _pull(here, field[c, i, j - 1], weights[1], out)
                if j < nj - 1:
                    part += _pull(here, field[c, i, j + 1], weights[1], out)
                if i > 0:
                    _pull(here, field[c, i - 1, j], weights[0], out)
                if i < ni - 1:
                    part += _pull(here, field[c, i + 1, j], weights[0], out)
                total += part
    return total


@compiled
def _pull(here: Floats, there: Floats, weight: Number, gradient: Floats) -> Number:
    """weight * sum (here - there)^2; its gradient in ``here`` is added."""
    total = np.float32(0)
    for k in range(here.size):
        d = here[k] - there[k]
        total += weight * d * d
        gradient[k] += 2 * weight * d
    return total


def diffusion(field: Floats, weight: float, gradient: Floats) -> float:
    """weight * ``optimise.terms.diffusion``; its gradient is added to ``gradient``."""
    counts = [field.size / n * max(n - 1, 1) for n in field.shape[1:]]
    weights = np.array([weight / n for n in counts], np.float32)
    return float(sum(over_planes(_diffusion, field.shape[1], field, weights, gradient)))


@inlined
def _differences(field: Floats, i: int, j: int, k: int, out: Floats) -> Number:
    """One-sided differences of the field (axis, side, component), zero at the ends; returns the largest."""
    ni, nj, nk = field.shape[1:]
    largest = np.float32(0)
    for c in range(3):
        here, zero = field[c, i, j, k], np.float32(0)
        out[0, 0, c] = here - field[c, i - 1, j, k] if i > 0 else zero
        out[0, 1, c] = field[c, i + 1, j, k] - here if i < ni - 1 else zero
        out[1, 0, c] = here - field[c, i, j - 1, k] if j > 0 else zero
        out[1, 1, c] = field[c, i, j + 1, k] - here if j < nj - 1 else zero
        out[2, 0, c] = here - field[c, i, j, k - 1] if k > 0 else zero
        out[2, 1, c] = field[c, i, j, k + 1] - here if k < nk - 1 else zero
        for axis in range(3):
            for side in range(2):
                largest = max(largest, abs(out[axis, side, c]))
    return largest


@inlined
def _cross(a: Floats, b: Floats) -> tuple[float, float, float]:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@compiled
def _folding(
    first: int, last: int, field: Floats, floor: float, scale: float, gradient: Floats
) -> tuple[float, int, int, Floats]:
    """Sum of max(0, floor - J)^2 over the corner Jacobians of planes first..last.

    ``scale`` times its gradient is added to ``gradient``; that of the planes before and after the range is
    returned as (3, 2, J, K), after the sum and the range.
    """
    ni, nj, nk = field.shape[1:]
    halo = np.zeros((3, 2, nj, nk), np.float32)
    e = np.empty((3, 2, 3), np.float32)
    total = 0.0
    for i in range(first, last):
        for j in range(nj):
            for k in range(nk):
                if _differences(field, i, j, k, e) < np.float32(GENTLE):
                    continue
                for axis in range(3):
                    e[axis, :, axis] += 1
                for corner in range(8):
                    a, b, c = corner & 1, (corner >> 1) & 1, corner >> 2
                    si, sj, sk = 2 * a - 1, 2 * b - 1, 2 * c - 1
                    if i == (ni - 1 if a else 0) or j == (nj - 1 if b else 0) or k == (nk - 1 if c else 0):
                        continue
                    x, y, z = e[0, a], e[1, b], e[2, c]
                    cx = _cross(y, z)
                    short = floor - (x[0] * cx[0] + x[1] * cx[1] + x[2] * cx[2])
                    if short <= 0:
                        continue
                    total += short * short
                    cy, cz = _cross(z, x), _cross(x, y)
                    for n in range(3):
                        pull = -2 * scale * short
                        gx, gy, gz = pull * si * cx[n], pull * sj * cy[n], pull * sk * cz[n]
                        if first <= i + si < last:
                            gradient[n, i + si, j, k] += gx
                        else:
                            halo[n, a, j, k] += gx
                        gradient[n, i, j + sj, k] += gy
                        gradient[n, i, j, k + sk] += gz
                        gradient[n, i, j, k] -= gx + gy + gz
    return total, first, last, halo


def folding(field: Floats, floor: float, weight: float, gradient: Floats) -> float:
    """weight * ``optimise.terms.folding``, floor at most 0.4; its gradient is added to ``gradient``."""
    corners = 8.0 * np.prod([max(n - 1, 1) for n in field.shape[1:]])
    scale = weight / corners
    planes = field.shape[1]
    parts = over_planes(_folding, planes, field, np.float32(floor), np.float32(scale), gradient)
    for _, first, last, halo in parts:
        if first > 0:
            gradient[:, first - 1] += halo[:, 0]
        if last < planes:
            gradient[:, last] += halo[:, 1]
    return float(scale * sum(part[0] for part in parts))
