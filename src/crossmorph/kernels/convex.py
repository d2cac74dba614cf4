"""Cost volumes and coupled convex optimisation on the CPU, for a slab of planes at a time."""

from __future__ import annotations

import numpy as np

from crossmorph.kernels.field import OMIT, ZERO, smooth_rows
from crossmorph.kernels.parallel import Flags, Floats, compiled, over_planes


@compiled
def _raw_cost(
    first: int,
    last: int,
    start: int,
    fixed: Floats,
    moving: Floats,
    fixed_valid: Flags,
    moving_valid: Flags,
    half: int,
    unknown: float,
    out: Floats,
) -> None:
    """Sum of squared differences of every displacement; ``unknown`` where either side is not valid.

    fixed, moving: (I, J, C, K), the line of voxels last. out: (T, J, K, D), plane 0 being plane ``start``.
    """
    ni, nj, channels, nk = fixed.shape
    width = 2 * half + 1
    line = np.empty((width, width, width, nk), np.float32)
    seen = np.empty(nk + 2 * half, np.bool_)
    row = np.empty((channels, nk + 2 * half), np.float32)
    for t in range(first, last):
        i = start + t
        for j in range(nj):
            for di in range(width):
                for dj in range(width):
                    mi, mj = i + di - half, j + dj - half
                    inside = 0 <= mi < ni and 0 <= mj < nj
                    seen[:] = False
                    row[:] = 0.0
                    if inside:
                        seen[half : half + nk] = moving_valid[mi, mj]
                        row[:, half : half + nk] = moving[mi, mj]
                    for dk in range(width):
                        total = line[dk, dj, di]
                        total[:] = 0.0
                        for c in range(channels):
                            x = fixed[i, j, c]
                            y = row[c, dk : dk + nk]
                            for k in range(nk):
                                total[k] += (x[k] - y[k]) * (x[k] - y[k])
                        if unknown >= 0:
                            there = seen[dk : dk + nk]
                            here = fixed_valid[i, j]
                            for k in range(nk):
                                if not (there[k] and here[k]):
                                    total[k] = unknown
            flat = line.reshape(width**3, nk)
            for k in range(nk):
                cell = out[t, j, k]
                for d in range(cell.size):
                    cell[d] = flat[d, k]


@compiled
def _smooth_in_plane(first: int, last: int, cost: Floats, border: int) -> None:
    old = np.empty((2, cost.shape[3]), np.float32)
    for t in range(first, last):
        for j in range(cost.shape[1]):
            smooth_rows(cost[t, j], old, 2, border)
        for k in range(cost.shape[2]):
            smooth_rows(cost[t, :, k], old, 2, border)


@compiled
def _smooth_across(first: int, last: int, cost: Floats, border: int) -> None:
    old = np.empty((2, cost.shape[3]), np.float32)
    for j in range(first, last):
        for k in range(cost.shape[2]):
            smooth_rows(cost[:, j, k], old, 2, border)


def cost_slab(
    fixed: Floats,
    moving: Floats,
    fixed_valid: Flags,
    moving_valid: Flags,
    half: int,
    unknown: float,
    counted: bool,
    start: int,
    stop: int,
) -> Floats:
    """Smoothed cost of planes start..stop: (stop - start, J, K, D). See ``match.cost.cost_volume_reference``.

    fixed, moving: (I, J, C, K). ``unknown`` < 0 stands for the published rule: moving features outside the volume
    are zero.
    """
    low, high = max(start - 2, 0), min(stop + 2, fixed.shape[0])
    size = (high - low, fixed.shape[1], fixed.shape[3], (2 * half + 1) ** 3)
    cost = np.empty(size, np.float32)
    inputs = (fixed, moving, fixed_valid, moving_valid)
    over_planes(_raw_cost, high - low, low, *inputs, half, np.float32(unknown), cost)
    border = ZERO if counted else OMIT
    over_planes(_smooth_in_plane, high - low, cost, border)
    over_planes(_smooth_across, fixed.shape[1], cost, border)
    return cost[start - low : stop - low]


@compiled
def _cheapest(
    first: int, last: int, cost: Floats, centre: Floats, theta: float, offsets: Floats, out: Floats
) -> None:
    """argmin_d cost + theta |d - centre|^2 -> the displacement itself."""
    width = offsets.size
    along = np.empty(width, np.float32)
    for t in range(first, last):
        for j in range(cost.shape[1]):
            for k in range(cost.shape[2]):
                u = centre[t, j, k]
                cell = cost[t, j, k]
                best = np.float32(np.inf)
                where = 0
                for d in range(width):
                    along[d] = theta * (offsets[d] - u[0]) * (offsets[d] - u[0])
                for dk in range(width):
                    z = theta * (offsets[dk] - u[2]) * (offsets[dk] - u[2])
                    for dj in range(width):
                        y = z + theta * (offsets[dj] - u[1]) * (offsets[dj] - u[1])
                        base = (dk * width + dj) * width
                        line = cell[base : base + width]
                        low = np.float32(np.inf)
                        for d in range(width):
                            low = min(low, line[d] + along[d])
                        if low + y < best:
                            best = low + y
                            for d in range(width):
                                if line[d] + along[d] == low:
                                    where = base + d
                                    break
                out[t, j, k, 0] = offsets[where % width]
                out[t, j, k, 1] = offsets[(where // width) % width]
                out[t, j, k, 2] = offsets[where // (width * width)]


def cheapest(cost: Floats, centre: Floats, theta: float, half: int) -> Floats:
    """(T, J, K, D) costs and (T, J, K, 3) centres -> (T, J, K, 3) displacements in cells; first minimum wins."""
    out = np.empty(centre.shape, np.float32)
    offsets = np.arange(-half, half + 1).astype(np.float32)
    over_planes(_cheapest, cost.shape[0], cost, np.ascontiguousarray(centre), np.float32(theta), offsets, out)
    return out
