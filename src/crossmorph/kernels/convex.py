"""Cost volumes and coupled convex optimisation on the CPU, for a slab of planes at a time."""

from __future__ import annotations

import numpy as np

from crossmorph.kernels.parallel import Flags, Floats, Number, compiled, inlined, over_planes


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
def _smooth_rows(rows: Floats, old: Floats, counted: bool) -> None:
    """Two means of three along the first axis of (N, D), in place; ``old`` (2, D) keeps the rows that change.

    The outside counts as zero, or is left out.
    """
    last = rows.shape[0] - 1
    for _ in range(2):
        for x in range(last + 1):
            row, here, before = rows[x], old[x % 2], old[(x + 1) % 2]
            here[:] = row
            if 0 < x < last:
                after = rows[x + 1]
                for d in range(row.size):
                    row[d] = np.float32(1 / 3) * (before[d] + here[d] + after[d])
                continue
            there = 1 if last == 0 else 2
            scale = np.float32(1 / 3 if counted else 1 / there)
            for d in range(row.size):
                row[d] *= scale
            if last > 0:
                other = rows[1] if x == 0 else before
                for d in range(row.size):
                    row[d] += scale * other[d]


@compiled
def _smooth_in_plane(first: int, last: int, cost: Floats, counted: bool) -> None:
    old = np.empty((2, cost.shape[3]), np.float32)
    for t in range(first, last):
        for j in range(cost.shape[1]):
            _smooth_rows(cost[t, j], old, counted)
        for k in range(cost.shape[2]):
            _smooth_rows(cost[t, :, k], old, counted)


@compiled
def _smooth_across(first: int, last: int, cost: Floats, counted: bool) -> None:
    old = np.empty((2, cost.shape[3]), np.float32)
    for j in range(first, last):
        for k in range(cost.shape[2]):
            _smooth_rows(cost[:, j, k], old, counted)


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
    over_planes(_smooth_in_plane, high - low, cost, counted)
    over_planes(_smooth_across, fixed.shape[1], cost, counted)
    return cost[start - low : stop - low]


@inlined
def _distances(theta: float, offsets: Floats, x: float, y: float, out: Floats) -> None:
    """theta times the squared distance of (x, y) from the displacements of a sheet."""
    width = offsets.size
    for dj in range(width):
        for di in range(width):
            from_x, from_y = offsets[di] - x, offsets[dj] - y
            out[dj * width + di] = theta * (from_x * from_x + from_y * from_y)


@inlined
def _displacement(sheet: Floats, away: Floats, low: Number, dk: int, offsets: Floats, out: Floats) -> None:
    """The first displacement of sheet ``dk`` that costs ``low``."""
    where = 0
    for d in range(sheet.size):
        if sheet[d] + away[d] == low:
            where = d
            break
    out[0], out[1], out[2] = offsets[where % offsets.size], offsets[where // offsets.size], offsets[dk]


@compiled
def _cheapest_of_all(
    first: int, last: int, cost: Floats, theta: float, offsets: Floats, minima: Floats, out: Floats
) -> None:
    """argmin_d cost + theta |d|^2, and the minimal cost of each sheet (of one step along the third axis)."""
    width = offsets.size
    sheet = width * width
    away = np.empty(sheet, np.float32)
    _distances(theta, offsets, 0.0, 0.0, away)
    for t in range(first, last):
        for j in range(cost.shape[1]):
            for k in range(cost.shape[2]):
                cell = cost[t, j, k]
                best, best_in_sheet = np.float32(np.inf), np.float32(np.inf)
                chosen = 0
                for dk in range(width):
                    extra = theta * offsets[dk] * offsets[dk]
                    here = cell[dk * sheet : (dk + 1) * sheet]
                    bare, low = np.float32(np.inf), np.float32(np.inf)
                    for d in range(sheet):
                        bare = min(bare, here[d])
                        low = min(low, here[d] + away[d])
                    minima[t, j, k, dk] = bare
                    if low + extra < best:
                        best, best_in_sheet, chosen = low + extra, low, dk
                here = cell[chosen * sheet : (chosen + 1) * sheet]
                _displacement(here, away, best_in_sheet, chosen, offsets, out[t, j, k])


def cheapest_of_all(cost: Floats, theta: float, half: int) -> tuple[Floats, Floats]:
    """``cheapest`` about no displacement, and below which cost it need not look into a sheet later.

    Returns:
        Displacements (T, J, K, 3) in cells, minima (T, J, K, 2 half + 1).
    """
    picked = np.empty((*cost.shape[:3], 3), np.float32)
    minima = np.empty((*cost.shape[:3], 2 * half + 1), np.float32)
    offsets = np.arange(-half, half + 1).astype(np.float32)
    over_planes(_cheapest_of_all, cost.shape[0], cost, np.float32(theta), offsets, minima, picked)
    return picked, minima


@compiled
def _cheapest(
    first: int, last: int, cost: Floats, minima: Floats, centre: Floats, theta: float, offsets: Floats, out: Floats
) -> None:
    """argmin_d cost + theta |d - centre|^2 -> the displacement itself.

    The sheet nearest to the centre comes first; another is looked into only if its minimum, that much farther
    away, could still win. Rounding is monotone, so nothing that would have won is passed over.
    """
    width = offsets.size
    sheet = width * width
    away = np.empty(sheet, np.float32)
    for t in range(first, last):
        for j in range(cost.shape[1]):
            for k in range(cost.shape[2]):
                x, y, z = centre[t, j, k]
                cell, lowest = cost[t, j, k], minima[t, j, k]
                _distances(theta, offsets, x, y, away)
                nearest = min(max(int(np.rint(z - offsets[0])), 0), width - 1)
                best, best_in_sheet = np.float32(np.inf), np.float32(np.inf)
                chosen = nearest
                for n in range(-1, width):
                    dk = nearest if n < 0 else n
                    extra = theta * (offsets[dk] - z) * (offsets[dk] - z)
                    bound = lowest[dk] + extra
                    if n == nearest or bound > best or (bound == best and dk > chosen):
                        continue
                    here = cell[dk * sheet : (dk + 1) * sheet]
                    low = np.float32(np.inf)
                    for d in range(sheet):
                        low = min(low, here[d] + away[d])
                    if low + extra < best or (low + extra == best and dk < chosen):
                        best, best_in_sheet, chosen = low + extra, low, dk
                here = cell[chosen * sheet : (chosen + 1) * sheet]
                _displacement(here, away, best_in_sheet, chosen, offsets, out[t, j, k])


def cheapest(cost: Floats, minima: Floats, centre: Floats, theta: float, half: int) -> Floats:
    """The displacements (T, J, K, 3) in cells that are cheapest; the first of equals.

    Args:
        cost: (T, J, K, D).
        minima: (T, J, K, 2 half + 1), of ``cheapest_of_all``.
        centre: (T, J, K, 3) in cells.
        theta: cost of a squared cell from it.
        half: width of the search.
    """
    out = np.empty(centre.shape, np.float32)
    offsets = np.arange(-half, half + 1).astype(np.float32)
    inputs = (cost, minima, np.ascontiguousarray(centre), np.float32(theta), offsets)
    over_planes(_cheapest, cost.shape[0], *inputs, out)
    return out
