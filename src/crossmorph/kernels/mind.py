"""MIND-SSC on the CPU: planes stream through a ring buffer, so only the result is held in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crossmorph.kernels.parallel import Floats, add, compiled, over_planes

Offset = NDArray[np.int64]
"""(3,): where a neighbour lies, in voxels; for a list of neighbours (n, 3)."""


@compiled
def _squared_differences(image: Floats, i: int, j: int, a: Offset, b: Offset, out: Floats, radius: int) -> None:
    """(image(p + a) - image(p + b))^2 along the line (i, j), edges clamped; ``radius`` repeats at both ends."""
    ni, nj, nk = image.shape
    first = image[min(max(i + a[0], 0), ni - 1), min(max(j + a[1], 0), nj - 1)]
    second = image[min(max(i + b[0], 0), ni - 1), min(max(j + b[1], 0), nj - 1)]
    reach = max(abs(a[2]), abs(b[2]))
    inner = out[radius : radius + nk]
    if nk > 2 * reach:
        x = first[reach + a[2] : nk - reach + a[2]]
        y = second[reach + b[2] : nk - reach + b[2]]
        core = inner[reach : nk - reach]
        for k in range(core.size):
            core[k] = (x[k] - y[k]) * (x[k] - y[k])
    for k in range(nk):
        if k < reach or k >= nk - reach:
            d = first[min(max(k + a[2], 0), nk - 1)] - second[min(max(k + b[2], 0), nk - 1)]
            inner[k] = d * d
    for t in range(radius):
        out[t] = inner[0]
        out[radius + nk + t] = inner[nk - 1]


@compiled
def _box_plane(image: Floats, i: int, a: Offset, b: Offset, radius: int, lines: Floats, out: Floats) -> None:
    """Sum of squared differences over the (2r+1)^2 in-plane window of plane i; borders repeat the last value."""
    nj, nk = out.shape
    width = 2 * radius + 1
    summed = np.empty(nk + 2 * radius, np.float32)
    ready = -1
    for j in range(nj):
        for row in range(ready + 1, min(j + radius, nj - 1) + 1):
            _squared_differences(image, i, row, a, b, lines[row % width], radius)
            ready = row
        summed[:] = 0.0
        for step in range(-radius, radius + 1):
            add(summed, lines[min(max(j + step, 0), nj - 1) % width])
        out[j] = summed[:nk]
        for step in range(1, width):
            add(out[j], summed[step : step + nk])


@compiled
def _distances(
    first: int,
    last: int,
    image: Floats,
    near: Offset,
    far: Offset,
    radius: int,
    scale: float,
    out: Floats,
    spread: Floats,
) -> float:
    """Patch distances minus their minimum -> out (I, J, K, 12), their mean -> spread (I, J, K), its sum."""
    ni, nj, nk = image.shape
    channels = near.shape[0]
    width = 2 * radius + 1
    ring = np.empty((width, channels, nj, nk), np.float32)
    lines = np.empty((width, nk + 2 * radius), np.float32)
    line = np.empty((channels, nk), np.float32)
    low = np.empty(nk, np.float32)
    ready = max(first - radius, 0) - 1
    total = 0.0
    for i in range(first, last):
        for plane in range(ready + 1, min(i + radius, ni - 1) + 1):
            for c in range(channels):
                _box_plane(image, plane, near[c], far[c], radius, lines, ring[plane % width, c])
            ready = plane
        for j in range(nj):
            low[:] = np.inf
            for c in range(channels):
                values = line[c]
                values[:] = 0.0
                for step in range(-radius, radius + 1):
                    add(values, ring[min(max(i + step, 0), ni - 1) % width, c, j])
                for k in range(nk):
                    low[k] = min(low[k], values[k])
            mean = spread[i, j]
            mean[:] = 0.0
            for c in range(channels):
                values = line[c]
                for k in range(nk):
                    values[k] = (values[k] - low[k]) * scale
                add(mean, values)
            for k in range(nk):
                mean[k] /= channels
                total += mean[k]
                for c in range(channels):
                    out[i, j, k, c] = line[c, k]
    return total


@compiled
def _exponentials(first: int, last: int, spread: Floats, low: float, high: float, out: Floats) -> None:
    """Distances -> exp(-distance / spread), in place."""
    for i in range(first, last):
        for j in range(out.shape[1]):
            for k in range(out.shape[2]):
                inverse = np.float32(-1.0) / min(max(spread[i, j, k], low), high)
                cell = out[i, j, k]
                for c in range(cell.size):
                    cell[c] = np.exp(cell[c] * inverse)


def mind_ssc(image: Floats, near: Offset, far: Offset, radius: int) -> Floats:
    """(I, J, K) float32 -> (I, J, K, 12) float32; see ``crossmorph.describe.mind.mind_ssc``."""
    image = np.ascontiguousarray(image)
    out = np.empty((*image.shape, len(near)), np.float32)
    spread = np.empty_like(image)
    scale = np.float32(1.0 / (2 * radius + 1) ** 3)
    totals = over_planes(_distances, image.shape[0], image, near, far, radius, scale, out, spread)
    mean = max(sum(totals) / image.size, np.finfo(np.float32).tiny)
    low, high = np.float32(1e-3 * mean), np.float32(1e3 * mean)
    over_planes(_exponentials, image.shape[0], spread, max(low, np.finfo(np.float32).tiny), high, out)
    return out
