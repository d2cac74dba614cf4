"""Smoothing, warping and regularity of displacement fields on the CPU. Fields are (3, I, J, K), in voxels."""

from __future__ import annotations

import numpy as np
from numba import njit

from crossmorph.kernels.parallel import JIT, over_planes


@njit(**JIT)
def _smooth_rows(rows, old, passes, repeat):
    """Means of three along the first axis of (N, K), in place; ``old`` (2, K) keeps the rows that change."""
    last = rows.shape[0] - 1
    third = np.float32(1 / 3)
    edge = np.float32(1) if repeat else np.float32(0)
    for _ in range(passes):
        for x in range(last + 1):
            row, here, before = rows[x], old[x % 2], old[(x + 1) % 2]
            here[:] = row
            for k in range(row.size):
                row[k] += before[k] if x > 0 else edge * here[k]
            after = rows[min(x + 1, last)]
            for k in range(row.size):
                row[k] = third * (row[k] + (after[k] if x < last else edge * here[k]))


@njit(**JIT)
def _smooth_line(line, old, passes, repeat):
    n = line.size
    third = np.float32(1 / 3)
    for _ in range(passes):
        old[1 : n + 1] = line
        old[0] = line[0] if repeat else np.float32(0)
        old[n + 1] = line[n - 1] if repeat else np.float32(0)
        for k in range(n):
            line[k] = (old[k] + old[k + 1] + old[k + 2]) * third


@njit(**JIT)
def _smooth_in_plane(first, last, field, passes, repeat):
    rows = np.empty((2, field.shape[3]), np.float32)
    line = np.empty(field.shape[3] + 2, np.float32)
    for i in range(first, last):
        for c in range(field.shape[0]):
            _smooth_rows(field[c, i], rows, passes, repeat)
            for j in range(field.shape[2]):
                _smooth_line(field[c, i, j], line, passes, repeat)


@njit(**JIT)
def _smooth_across(first, last, field, passes, repeat):
    rows = np.empty((2, field.shape[3]), np.float32)
    for j in range(first, last):
        for c in range(field.shape[0]):
            _smooth_rows(field[c, :, j], rows, passes, repeat)


def smooth(field: np.ndarray, passes: int, repeat: bool) -> np.ndarray:
    """``passes`` 3^3 means of each component; a new (C, I, J, K) float32 array."""
    out = np.array(field, np.float32, order="C")
    over_planes(_smooth_in_plane, out.shape[1], out, passes, repeat)
    over_planes(_smooth_across, out.shape[2], out, passes, repeat)
    return out


@njit(**JIT)
def _warp(first, last, values, field, scale, zeros, out):
    ni, nj, nk = values.shape[1:]
    top = np.array([ni, nj, nk])
    for i in range(first, last):
        for j in range(out.shape[2]):
            for k in range(out.shape[3]):
                place = (
                    i + field[0, i, j, k] * scale[0],
                    j + field[1, i, j, k] * scale[1],
                    k + field[2, i, j, k] * scale[2],
                )
                for c in range(out.shape[0]):
                    out[c, i, j, k] = 0
                for corner in range(8):
                    weight = np.float32(1)
                    index = [0, 0, 0]
                    inside = True
                    for a in range(3):
                        base = int(np.floor(place[a]))
                        part = np.float32(place[a] - base)
                        if (corner >> a) & 1:
                            base += 1
                            weight *= part
                        else:
                            weight *= np.float32(1) - part
                        inside &= 0 <= base < top[a]
                        index[a] = min(max(base, 0), top[a] - 1)
                    if inside or not zeros:
                        for c in range(out.shape[0]):
                            out[c, i, j, k] += weight * values[c, index[0], index[1], index[2]]


def warp(values: np.ndarray, field: np.ndarray, scale: np.ndarray, zeros: bool) -> np.ndarray:
    """values(p + scale * field(p)) by linear interpolation; outside is zero, or the nearest value."""
    out = np.empty((len(values), *field.shape[1:]), np.float32)
    over_planes(_warp, field.shape[1], np.ascontiguousarray(values), np.ascontiguousarray(field), scale, zeros, out)
    return out


@njit(**JIT)
def _diffusion(first, last, field, weights, gradient):
    """Adds the gradient of sum_a weights[a] * sum (forward difference along a)^2; returns the value."""
    total = 0.0
    ni, nj, nk = field.shape[1:]
    for c in range(field.shape[0]):
        w, g = field[c], gradient[c]
        for i in range(first, last):
            for j in range(nj):
                here, out = w[i, j], g[i, j]
                part = np.float32(0)
                for k in range(nk - 1):
                    d = here[k + 1] - here[k]
                    part += weights[2] * d * d
                    out[k] -= 2 * weights[2] * d
                    out[k + 1] += 2 * weights[2] * d
                if j < nj - 1:
                    there = w[i, j + 1]
                    for k in range(nk):
                        d = there[k] - here[k]
                        part += weights[1] * d * d
                        out[k] -= 2 * weights[1] * d
                if j > 0:
                    there = w[i, j - 1]
                    for k in range(nk):
                        out[k] += 2 * weights[1] * (here[k] - there[k])
                if i < ni - 1:
                    there = w[i + 1, j]
                    for k in range(nk):
                        d = there[k] - here[k]
                        part += weights[0] * d * d
                        out[k] -= 2 * weights[0] * d
                if i > 0:
                    there = w[i - 1, j]
                    for k in range(nk):
                        out[k] += 2 * weights[0] * (here[k] - there[k])
                total += part
    return total


def diffusion(field: np.ndarray, weight: float, gradient: np.ndarray) -> float:
    """See ``optimise.terms.diffusion``; adds its gradient to ``gradient``."""
    counts = [field.size / n * max(n - 1, 1) for n in field.shape[1:]]
    weights = np.array([weight / n for n in counts], np.float32)
    return float(sum(over_planes(_diffusion, field.shape[1], field, weights, gradient)))


@njit(**JIT)
def _folding(first, last, field, floor, scale, halo, gradient):
    """Penalty of the corner Jacobians of planes first..last; gradients of planes outside go to ``halo``."""
    ni, nj, nk = field.shape[1:]
    total = 0.0
    e = np.empty((3, 2, 3), np.float32)  # axis, side, component: one-sided differences of x + w
    for i in range(first, last):
        for j in range(nj):
            for k in range(nk):
                for c in range(3):
                    here = field[c, i, j, k]
                    e[0, 0, c] = here - field[c, i - 1, j, k] if i > 0 else np.float32(0)
                    e[0, 1, c] = field[c, i + 1, j, k] - here if i < ni - 1 else np.float32(0)
                    e[1, 0, c] = here - field[c, i, j - 1, k] if j > 0 else np.float32(0)
                    e[1, 1, c] = field[c, i, j + 1, k] - here if j < nj - 1 else np.float32(0)
                    e[2, 0, c] = here - field[c, i, j, k - 1] if k > 0 else np.float32(0)
                    e[2, 1, c] = field[c, i, j, k + 1] - here if k < nk - 1 else np.float32(0)
                steep = np.float32(0)
                for a in range(3):
                    for s in range(2):
                        for c in range(3):
                            steep = max(steep, abs(e[a, s, c]))
                        e[a, s, a] += 1
                if steep < np.float32(0.2):  # then no determinant is below 0.4 (the 512 extreme cases)
                    continue
                for corner in range(8):
                    sides = (corner & 1, (corner >> 1) & 1, (corner >> 2) & 1)
                    if (sides[0] == 0 and i == 0) or (sides[0] == 1 and i == ni - 1):
                        continue
                    if (sides[1] == 0 and j == 0) or (sides[1] == 1 and j == nj - 1):
                        continue
                    if (sides[2] == 0 and k == 0) or (sides[2] == 1 and k == nk - 1):
                        continue
                    x, y, z = e[0, sides[0]], e[1, sides[1]], e[2, sides[2]]
                    cx0, cx1, cx2 = y[1] * z[2] - y[2] * z[1], y[2] * z[0] - y[0] * z[2], y[0] * z[1] - y[1] * z[0]
                    determinant = x[0] * cx0 + x[1] * cx1 + x[2] * cx2
                    if determinant >= floor:
                        continue
                    short = floor - determinant
                    total += short * short
                    pull = -2 * scale * short
                    cy = (z[1] * x[2] - z[2] * x[1], z[2] * x[0] - z[0] * x[2], z[0] * x[1] - z[1] * x[0])
                    cz = (x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0])
                    cx = (cx0, cx1, cx2)
                    for c in range(3):
                        gx, gy, gz = pull * cx[c], pull * cy[c], pull * cz[c]
                        if sides[0] == 1:
                            if i + 1 < last:
                                gradient[c, i + 1, j, k] += gx
                            else:
                                halo[1, c, j, k] += gx
                            gradient[c, i, j, k] -= gx
                        else:
                            if i - 1 >= first:
                                gradient[c, i - 1, j, k] -= gx
                            else:
                                halo[0, c, j, k] -= gx
                            gradient[c, i, j, k] += gx
                        step = 1 if sides[1] == 1 else -1
                        gradient[c, i, j + step, k] += step * gy
                        gradient[c, i, j, k] -= step * gy
                        step = 1 if sides[2] == 1 else -1
                        gradient[c, i, j, k + step] += step * gz
                        gradient[c, i, j, k] -= step * gz
    return total


@njit(**JIT)
def _folding_with_halo(first, last, field, floor, scale, gradient):
    halo = np.zeros((2, 3, field.shape[2], field.shape[3]), np.float32)
    return _folding(first, last, field, floor, scale, halo, gradient), first, last, halo


def folding(field: np.ndarray, floor: float, weight: float, gradient: np.ndarray) -> float:
    """See ``optimise.terms.folding``; adds its gradient to ``gradient``."""
    corners = 8.0 * np.prod([max(n - 1, 1) for n in field.shape[1:]])
    scale = np.float32(weight / corners)
    planes = field.shape[1]
    parts = over_planes(_folding_with_halo, planes, field, np.float32(floor), scale, gradient)
    for _, first, last, halo in parts:
        if first > 0:
            gradient[:, first - 1] += halo[0]
        if last < planes:
            gradient[:, last] += halo[1]
    return float(weight / corners * sum(part[0] for part in parts))
