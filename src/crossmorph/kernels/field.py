"""Smoothing, warping and regularity of displacement fields on the CPU. Fields are (3, I, J, K), in voxels."""

from __future__ import annotations

import numpy as np

from crossmorph.kernels.parallel import Floats, Number, Offsets, compiled, inlined, over_planes

Sizes = tuple[int, int, int]

ROUNDING = np.float32(1e-4)
"""Determinants that are nearer to the floor than this are computed once more, for themselves."""


@compiled
def _mirrored(place: int, size: int, repeat: bool) -> tuple[int, Number]:
    """Where a place outside 0..size-1 takes its value from, and with which sign.

    Means of three that repeat the border are means of the line mirrored at its ends; those that count the outside
    as zero, of the line mirrored with opposite sign about the first places outside.
    """
    if repeat:
        place %= 2 * size
        return min(place, 2 * size - 1 - place), np.float32(1)
    place = (place + 1) % (2 * size + 2)
    if place % (size + 1) == 0:
        return 0, np.float32(0)
    return min(place, 2 * size + 2 - place) - 1, np.float32(1 if place <= size else -1)


@compiled
def _scaled(values: Floats, factor: Number, out: Floats) -> None:
    for k in range(out.size):
        out[k] = factor * values[k]


@compiled
def _mean(values: Floats, step: int, out: Floats) -> None:
    """Means over the places -step, 0 and step of lines in one piece: (N + 2 step) -> (N)."""
    a, b, c = values, values[step:], values[2 * step :]
    for k in range(out.size):
        out[k] = np.float32(1 / 3) * (a[k] + b[k] + c[k])


@compiled
def _three_means(values: Floats, step: int, out: Floats) -> None:
    """Three of them at once: (N + 6 step) -> (N)."""
    a, b, c, d = values, values[step:], values[2 * step :], values[3 * step :]
    e, f, g = values[4 * step :], values[5 * step :], values[6 * step :]
    for k in range(out.size):
        near, far = np.float32(6 / 27) * (c[k] + e[k]), np.float32(3 / 27) * (b[k] + f[k])
        out[k] = np.float32(7 / 27) * d[k] + near + far + np.float32(1 / 27) * (a[k] + g[k])


@compiled
def _means(values: Floats, step: int, passes: int, spare: Floats, out: Floats) -> None:
    """``passes`` of them: (N + 2 passes step) -> (N); ``values`` and ``spare`` are overwritten."""
    size = values.size
    while passes > 3:
        size -= 2 * step
        _mean(values[: size + 2 * step], step, spare[:size])
        values[:size] = spare[:size]
        passes -= 1
    if passes == 3:
        _three_means(values[:size], step, out)
        return
    if passes == 2:
        size -= 2 * step
        _mean(values[: size + 2 * step], step, spare[:size])
        _mean(spare[:size], step, out)
        return
    _mean(values[:size], step, out)


@compiled
def _borders(size: int, passes: int, repeat: bool) -> tuple[Offsets, Floats]:
    """For each of the ``passes`` places before and after a line: where it takes its value from, and the sign."""
    sources, signs = np.empty(2 * passes, np.int32), np.empty(2 * passes, np.float32)
    for t in range(passes):
        sources[t], signs[t] = _mirrored(t - passes, size, repeat)
        sources[passes + t], signs[passes + t] = _mirrored(size + t, size, repeat)
    return sources, signs


@compiled
def _continued(rows: Floats, sources: Offsets, signs: Floats) -> None:
    """Fill the first and last rows of (N + 2 passes, K) from the N between them."""
    passes = sources.size // 2
    for t in range(2 * passes):
        place = t if t < passes else rows.shape[0] - 2 * passes + t
        _scaled(rows[passes + sources[t]], signs[t], rows[place])


@compiled
def _smooth_in_plane(first: int, last: int, field: Floats, passes: int, repeat: bool, out: Floats) -> None:
    nj, nk = field.shape[2:]
    line, tall = np.empty(nk + 2 * passes, np.float32), np.empty((nj + 2 * passes, nk), np.float32)
    spare = np.empty(max(line.size, tall.size), np.float32)
    sources, signs = _borders(nk, passes, repeat)
    around = _borders(nj, passes, repeat)
    for i in range(first, last):
        for c in range(field.shape[0]):
            for j in range(nj):
                row = field[c, i, j]
                line[passes : passes + nk] = row
                for t in range(passes):
                    line[t] = signs[t] * row[sources[t]]
                    line[passes + nk + t] = signs[passes + t] * row[sources[passes + t]]
                _means(line, 1, passes, spare, tall[passes + j])
            _continued(tall, *around)
            _means(tall.reshape(-1), nk, passes, spare, out[c, i].reshape(-1))


@compiled
def _smooth_across(first: int, last: int, field: Floats, passes: int, repeat: bool) -> None:
    ni, nk = field.shape[1], field.shape[3]
    rows, smoothed = np.empty((ni + 2 * passes, nk), np.float32), np.empty((ni, nk), np.float32)
    spare = np.empty(rows.size, np.float32)
    around = _borders(ni, passes, repeat)
    for j in range(first, last):
        for c in range(field.shape[0]):
            for i in range(ni):
                rows[passes + i] = field[c, i, j]
            _continued(rows, *around)
            _means(rows.reshape(-1), nk, passes, spare, smoothed.reshape(-1))
            for i in range(ni):
                field[c, i, j] = smoothed[i]


def smooth(field: Floats, passes: int, repeat: bool) -> Floats:
    """``passes`` 3^3 means of each component; a new (C, I, J, K) array."""
    field = np.ascontiguousarray(field, np.float32)
    out = np.empty_like(field)
    over_planes(_smooth_in_plane, field.shape[1], field, passes, repeat, out)
    over_planes(_smooth_across, field.shape[2], out, passes, repeat)
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
    line = np.empty(nk + 2, np.float32)
    for c in range(field.shape[0]):
        for i in range(first, last):
            for j in range(nj):
                here = field[c, i, j]
                line[1:-1], line[0], line[-1] = here, here[0], here[-1]  # no difference beyond the ends
                before = field[c, max(i - 1, 0), j], field[c, i, max(j - 1, 0)], line[:-2]
                after = field[c, min(i + 1, ni - 1), j], field[c, i, min(j + 1, nj - 1)], line[2:]
                total += _pull(here, before, after, weights, gradient[c, i, j])
    return total


@compiled
def _pull(
    here: Floats,
    before: tuple[Floats, Floats, Floats],
    after: tuple[Floats, Floats, Floats],
    weights: Floats,
    gradient: Floats,
) -> Number:
    """The terms of a line with the lines before and after it along each axis; the gradient is added."""
    total, two = np.float32(0), np.float32(2)
    x, y, z = weights[0], weights[1], weights[2]
    low_x, low_y, low_z = before
    high_x, high_y, high_z = after
    for k in range(here.size):
        h = here[k]
        dx, dy, dz = h - high_x[k], h - high_y[k], h - high_z[k]
        total += x * dx * dx + y * dy * dy + z * dz * dz
        pull = x * (dx + h - low_x[k]) + y * (dy + h - low_y[k]) + z * (dz + h - low_z[k])
        gradient[k] += two * pull
    return total


def diffusion(field: Floats, weight: float, gradient: Floats) -> float:
    """weight * ``optimise.terms.diffusion``; its gradient is added to ``gradient``."""
    counts = [field.size / n * max(n - 1, 1) for n in field.shape[1:]]
    weights = np.array([weight / n for n in counts], np.float32)
    return float(sum(over_planes(_diffusion, field.shape[1], field, weights, gradient)))


@compiled
def _step(here: Floats, there: Floats, own: Number, out: Floats) -> None:
    for k in range(out.size):
        out[k] = own + there[k] - here[k]


@compiled
def _columns(field: Floats, i: int, j: int, out: Floats) -> None:
    """Columns of the one-sided Jacobians of x + u(x) along the line (i, j): (axis, side, component, K).

    At the ends of the volume, where there is no neighbour, those of no displacement.
    """
    ni, nj = field.shape[1:3]
    for c in range(3):
        here = field[c, i, j]
        own = (np.float32(c == 0), np.float32(c == 1), np.float32(c == 2))
        _step(field[c, max(i - 1, 0), j], here, own[0], out[0, 0, c])
        _step(here, field[c, min(i + 1, ni - 1), j], own[0], out[0, 1, c])
        _step(field[c, i, max(j - 1, 0)], here, own[1], out[1, 0, c])
        _step(here, field[c, i, min(j + 1, nj - 1)], own[1], out[1, 1, c])
        out[2, :, c] = own[2]
        _step(here[:-1], here[1:], own[2], out[2, 0, c, 1:])
        _step(here[:-1], here[1:], own[2], out[2, 1, c, :-1])


@compiled
def _lowest(columns: Floats, out: Floats) -> None:
    """The smallest of the eight one-sided determinants at each voxel of a line."""
    out[:] = np.inf
    for corner in range(8):
        x, y, z = columns[0, corner & 1], columns[1, (corner >> 1) & 1], columns[2, corner >> 2]
        x0, x1, x2, y0, y1, y2, z0, z1, z2 = x[0], x[1], x[2], y[0], y[1], y[2], z[0], z[1], z[2]
        for k in range(out.size):
            first = x0[k] * (y1[k] * z2[k] - y2[k] * z1[k])
            second = x1[k] * (y2[k] * z0[k] - y0[k] * z2[k])
            third = x2[k] * (y0[k] * z1[k] - y1[k] * z0[k])
            out[k] = min(out[k], first + second + third)


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
    columns = np.empty((3, 2, 3, nk), np.float32)
    lowest = np.empty(nk, np.float32)
    total = 0.0
    for i in range(first, last):
        for j in range(nj):
            _columns(field, i, j, columns)
            _lowest(columns, lowest)
            for k in range(nk):
                if lowest[k] > floor + ROUNDING:
                    continue
                e = columns[:, :, :, k]
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
    """weight * ``optimise.terms.folding``; its gradient is added to ``gradient``."""
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
