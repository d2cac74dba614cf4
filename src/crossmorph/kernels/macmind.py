"""macMIND on the CPU: planes stream through ring buffers, so only the pooled result is held in memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.kernels.mind import LOG2_E, Offset, decay, patches, squared_differences
from crossmorph.kernels.parallel import Floats, Number, add, compiled, over_planes

TINY = np.finfo(np.float32).tiny


@compiled
def _total(first: int, last: int, image: Floats, near: Offset, far: Offset) -> Number:
    """Sum of the squared differences of planes first..last over all pairs of neighbours."""
    line = np.empty(image.shape[2], np.float32)
    total: Number = 0.0
    for i in range(first, last):
        for j in range(image.shape[1]):
            for c in range(near.shape[0]):
                squared_differences(image, i, j, near[c], far[c], line, 0)
                part: Number = np.float32(0)
                for k in range(line.size):
                    part += line[k]
                total += part
    return total


@compiled
def _context(
    ring: Floats, planes: int, i: int, j: int, scale: Number, low: Number, share: Number, work: Floats, out: Floats
) -> None:
    """``out`` (18, K) += share exp(-s / V) along the line (i, j) of one sampling distance; equation 8."""
    radius = ring.shape[0] // 2
    channels, nk = out.shape
    line, rate, power, value = work[:channels], work[channels], work[channels + 1], work[channels + 2]
    rate[:] = 0.0
    for c in range(channels):
        values = line[c]
        values[:] = ring[max(i - radius, 0) % ring.shape[0], c, j]
        for step in range(1 - radius, radius + 1):
            add(values, ring[min(max(i + step, 0), planes - 1) % ring.shape[0], c, j])
        for k in range(nk):
            values[k] *= scale
        add(rate, values)
    for k in range(nk):
        rate[k] = LOG2_E / max(rate[k] / channels, low)
    for c in range(channels):
        value[:] = 0.0
        decay(line[c], rate, power, value)
        total = out[c]
        for k in range(nk):
            total[k] += share * value[k]


@compiled
def _along_line(values: Floats, reach: int, pool: int, sums: Floats, out: Floats) -> None:
    """Block sums of ``pool`` voxels of the sums over 2 reach + 1 voxels; borders repeat."""
    nk = values.size
    for k in range(nk):
        sums[k] = values[k]
    for step in range(1, reach + 1):
        for k in range(nk):
            sums[k] += values[max(k - step, 0)] + values[min(k + step, nk - 1)]
    for k in range(out.size):
        total: Number = np.float32(0)
        for t in range(pool):
            total += sums[k * pool + t]
        out[k] = total


@compiled
def _bins(reduced: Floats, size: tuple[int, int], first: int, weights: Floats, pool: int, out: Floats) -> None:
    """Bin means of the block of planes from ``first`` -> out (J / pool, K / pool, M N)."""
    bins, side = weights.shape[0], weights.shape[1]
    reach, depth = side // 2, reduced.shape[0]
    part = np.float32(1 / (pool**3 * side))
    sums = np.empty((side, side, out.shape[1]), np.float32)
    line = np.empty(out.shape[1], np.float32)
    for row in range(out.shape[0]):
        for c in range(reduced.shape[1]):
            sums[:] = 0.0
            for di in range(side):
                for t in range(pool):
                    plane = reduced[min(max(first + t + di - reach, 0), size[0] - 1) % depth, c]
                    for dj in range(side):
                        for u in range(pool):
                            add(sums[di, dj], plane[min(max(row * pool + u + dj - reach, 0), size[1] - 1)])
            for n in range(bins):
                line[:] = 0.0
                for di in range(side):
                    for dj in range(side):
                        weight = weights[n, di, dj] * part
                        if weight > 0:
                            values = sums[di, dj]
                            for k in range(line.size):
                                line[k] += weight * values[k]
                for k in range(line.size):
                    out[row, k, c * bins + n] = line[k]


@compiled
def _described(
    first: int,
    last: int,
    image: Floats,
    near: Offset,
    far: Offset,
    radius: int,
    lows: Floats,
    shares: Floats,
    slots: NDArray[np.int64],
    weights: Floats,
    pool: int,
    out: Floats,
) -> None:
    """Pooled bin means for planes first..last of ``out``; scale s adds to the channels from slots[s]."""
    ni, nj, nk = image.shape
    scales, channels = near.shape[0], near.shape[1]
    width, reach = 2 * radius + 1, weights.shape[1] // 2
    scale = np.float32(1 / width**3)
    rings = np.empty((scales, width, channels, nj, nk), np.float32)
    lines = np.empty((width, nk + 2 * radius), np.float32)
    work, sums = np.empty((channels + 3, nk), np.float32), np.empty(nk, np.float32)
    context = np.empty((out.shape[3] // weights.shape[0], nk), np.float32)
    depth = 2 * reach + pool
    reduced = np.empty((depth, context.shape[0], nj, out.shape[2]), np.float32)
    ready = max(first * pool - reach, 0)
    patched = max(ready - radius, 0)
    for block in range(first, last):
        newest = min((block + 1) * pool - 1 + reach, ni - 1)
        for i in range(ready, newest + 1):
            top = min(i + radius, ni - 1)
            for s in range(scales):
                patches(image, near[s], far[s], radius, patched, top, lines, rings[s])
            patched = top + 1
            for j in range(nj):
                context[:] = 0.0
                for s in range(scales):
                    part = context[slots[s] : slots[s] + channels]
                    _context(rings[s], ni, i, j, scale, lows[s], shares[s], work, part)
                for c in range(context.shape[0]):
                    _along_line(context[c], reach, pool, sums, reduced[i % depth, c, j])
        ready = newest + 1
        _bins(reduced, (ni, nj), block * pool, weights, pool, out[block])


def described(
    image: Floats,
    near: Offset,
    far: Offset,
    radius: int,
    floor: float,
    shares: Floats,
    concatenated: bool,
    weights: Floats,
    pool: int,
) -> Floats:
    """Bin means of the self-similarity context, pooled; see ``describe.macmind``.

    Args:
        image: (I, J, K).
        near, far: (S, 18, 3) offsets of the compared neighbours at S sampling distances.
        radius: patch radius.
        floor: V is at least this share of the mean squared difference.
        shares: (S,) factors of the distances.
        concatenated: keep the distances apart instead of adding them.
        weights: (N, R, R) in-plane weights of the bins, each with sum 1; all R heights count alike.
        pool: block edge.

    Returns:
        (I / pool, J / pool, K / pool, M N) float32, M = 18, or 18 S where concatenated.
    """
    image = np.ascontiguousarray(image)
    scales, channels = near.shape[:2]
    totals = [sum(over_planes(_total, image.shape[0], image, near[s], far[s])) for s in range(scales)]
    lows = np.array([max(floor * total / (image.size * channels), TINY) for total in totals], np.float32)
    slots = channels * np.arange(scales) * concatenated
    out = np.empty((*(n // pool for n in image.shape), (slots[-1] + channels) * len(weights)), np.float32)
    # A range begins with the planes that its first one needs, and gives the same wherever it begins.
    over_planes(
        _described, out.shape[0], image, near, far, radius, lows, shares, slots, weights, pool, out,
        chunks=torch.get_num_threads(),
    )  # fmt: skip
    return out
