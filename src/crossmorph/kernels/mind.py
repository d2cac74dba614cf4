"""MIND-SSC on the CPU: planes stream through a ring buffer, so only the pooled result is held in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crossmorph.kernels.parallel import Floats, Number, add, compiled, over_planes

Offset = NDArray[np.int64]
"""(3,): where a neighbour lies, in voxels; for a list of neighbours (n, 3)."""

LOG2_E = np.float32(1 / np.log(2))

EXP2 = np.array([0.69314717, 0.24022720, 0.055496024, 0.0096521951, 0.0012692166, 0.00020817915], np.float32)
"""2^x = 1 + x (c0 + x (c1 + ...)) on [0, 1] to 2e-8: interpolation of (2^x - 1) / x at Chebyshev nodes."""


@compiled
def squared_differences(image: Floats, i: int, j: int, a: Offset, b: Offset, out: Floats, radius: int) -> None:
    """(image(p + a) - image(p + b))^2 along the line (i, j), edges clamped; ``radius`` repeats at both ends."""
    ni, nj, nk = image.shape
    first = image[min(max(i + a[0], 0), ni - 1), min(max(j + a[1], 0), nj - 1)]
    second = image[min(max(i + b[0], 0), ni - 1), min(max(j + b[1], 0), nj - 1)]
    reach = min(max(abs(a[2]), abs(b[2])), nk)
    x, y, inner = first[reach + a[2] :], second[reach + b[2] :], out[radius + reach :]
    for k in range(nk - 2 * reach):
        inner[k] = (x[k] - y[k]) * (x[k] - y[k])
    for end in range(reach):
        for k in (end, nk - 1 - end):
            d = first[min(max(k + a[2], 0), nk - 1)] - second[min(max(k + b[2], 0), nk - 1)]
            out[radius + k] = d * d
    for t in range(radius):
        out[t] = out[radius]
        out[radius + nk + t] = out[radius + nk - 1]


@compiled
def _box_plane(image: Floats, i: int, a: Offset, b: Offset, radius: int, lines: Floats, out: Floats) -> None:
    """Sum of squared differences over the (2r+1)^2 in-plane window of plane i; borders repeat the last value."""
    nj, nk = out.shape
    width = 2 * radius + 1
    summed = np.empty(nk + 2 * radius, np.float32)
    ready = 0
    for j in range(nj):
        newest = min(j + radius, nj - 1)
        for row in range(ready, newest + 1):
            squared_differences(image, i, row, a, b, lines[row % width], radius)
        ready = newest + 1
        summed[:] = lines[max(j - radius, 0) % width]
        for step in range(1 - radius, radius + 1):
            add(summed, lines[min(max(j + step, 0), nj - 1) % width])
        out[j] = summed[:nk]
        for step in range(1, width):
            add(out[j], summed[step:])


@compiled
def patches(
    image: Floats, near: Offset, far: Offset, radius: int, first: int, last: int, lines: Floats, ring: Floats
) -> None:
    """In-plane sums of planes first..last of every channel, into the ring."""
    for plane in range(first, last + 1):
        for c in range(near.shape[0]):
            _box_plane(image, plane, near[c], far[c], radius, lines, ring[plane % ring.shape[0], c])


@compiled
def _distances(
    ring: Floats, planes: int, i: int, j: int, radius: int, scale: float, line: Floats, spread: Floats
) -> None:
    """Patch distances minus their minimum along the line (i, j) -> line (12, K), their mean -> spread (K,)."""
    channels, nk = line.shape
    low = np.empty(nk, np.float32)
    low[:] = np.inf
    for c in range(channels):
        values = line[c]
        values[:] = ring[max(i - radius, 0) % ring.shape[0], c, j]
        for step in range(1 - radius, radius + 1):
            add(values, ring[min(max(i + step, 0), planes - 1) % ring.shape[0], c, j])
        for k in range(nk):
            low[k] = min(low[k], values[k])
    spread[:] = 0.0
    for c in range(channels):
        values = line[c]
        for k in range(nk):
            values[k] = (values[k] - low[k]) * scale
        add(spread, values)
    for k in range(nk):
        spread[k] /= channels


@compiled
def _total_spread(
    first: int, last: int, image: Floats, near: Offset, far: Offset, radius: int, scale: float
) -> Number:
    """Sum of the mean distances of planes first..last."""
    ni, nj, nk = image.shape
    width = 2 * radius + 1
    ring = np.empty((width, near.shape[0], nj, nk), np.float32)
    lines = np.empty((width, nk + 2 * radius), np.float32)
    line, spread = np.empty((near.shape[0], nk), np.float32), np.empty(nk, np.float32)
    total: Number = 0.0
    ready = max(first - radius, 0)
    for i in range(first, last):
        newest = min(i + radius, ni - 1)
        patches(image, near, far, radius, ready, newest, lines, ring)
        ready = newest + 1
        for j in range(nj):
            _distances(ring, ni, i, j, radius, scale, line, spread)
            part: Number = np.float32(0)
            for k in range(nk):
                part += spread[k]
            total += part
    return total


@compiled
def decay(distances: Floats, rate: Floats, power: Floats, total: Floats) -> None:
    """``total`` += 2^(-distance * rate); ``power`` is a line to work in."""
    exponent = np.empty(power.size, np.int32)
    for k in range(power.size):
        power_of_two = max(-distances[k] * rate[k], np.float32(-126))
        whole = np.floor(power_of_two)
        x = power_of_two - whole
        exponent[k] = np.int32(whole) << 23
        tail = EXP2[2] + x * (EXP2[3] + x * (EXP2[4] + x * EXP2[5]))
        power[k] = np.float32(1) + x * (EXP2[0] + x * (EXP2[1] + x * tail))
    bits = power.view(np.int32)
    for k in range(power.size):
        bits[k] += exponent[k]
    add(total, power)


@compiled
def _features(
    first: int,
    last: int,
    image: Floats,
    near: Offset,
    far: Offset,
    radius: int,
    scale: float,
    low: float,
    high: float,
    pool: int,
    out: Floats,
) -> None:
    """Mean descriptors of blocks of ``pool``^3 voxels, for planes first..last of out (I / pool, ..., 12)."""
    ni, nj, nk = image.shape
    channels, width = near.shape[0], 2 * radius + 1
    ring = np.empty((width, channels, nj, nk), np.float32)
    lines = np.empty((width, nk + 2 * radius), np.float32)
    line, spread, power = np.empty((channels, nk), np.float32), np.empty(nk, np.float32), np.empty(nk, np.float32)
    total = np.empty((channels, nk), np.float32)
    sums = np.empty((out.shape[1], channels, out.shape[2]), np.float32)
    part = np.float32(1 / pool**3)
    ready = max(first * pool - radius, 0)
    for block in range(first, last):
        sums[:] = 0.0
        for i in range(block * pool, (block + 1) * pool):
            newest = min(i + radius, ni - 1)
            patches(image, near, far, radius, ready, newest, lines, ring)
            ready = newest + 1
            for row in range(out.shape[1]):
                total[:] = 0.0
                for j in range(row * pool, (row + 1) * pool):
                    _distances(ring, ni, i, j, radius, scale, line, spread)
                    for k in range(nk):
                        spread[k] = LOG2_E / min(max(spread[k], low), high)
                    for c in range(channels):
                        decay(line[c], spread, power, total[c])
                for c in range(channels):
                    for k in range(out.shape[2]):
                        for step in range(pool):
                            sums[row, c, k] += total[c, k * pool + step]
        for row in range(out.shape[1]):
            for k in range(out.shape[2]):
                for c in range(channels):
                    out[block, row, k, c] = part * sums[row, c, k]


def mind_ssc(image: Floats, near: Offset, far: Offset, radius: int, pool: int) -> Floats:
    """(I, J, K) float32 -> (I / pool, J / pool, K / pool, 12) float32; see ``describe.mind.mind_ssc``."""
    image = np.ascontiguousarray(image)
    out = np.empty((*(n // pool for n in image.shape), len(near)), np.float32)
    inputs = (image, near, far, radius, np.float32(1.0 / (2 * radius + 1) ** 3))
    totals = over_planes(_total_spread, image.shape[0], *inputs)
    mean = max(sum(totals) / image.size, np.finfo(np.float32).tiny)
    low, high = max(np.float32(1e-3 * mean), np.finfo(np.float32).tiny), np.float32(1e3 * mean)
    over_planes(_features, out.shape[0], *inputs, low, high, pool, out)
    return out
