"""Linear maps along the axes of a volume on the CPU: smoothing, coarser and finer grids, and their adjoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.kernels.parallel import Floats, compiled, over_planes


class Band(NamedTuple):
    """A matrix (N, M) with few numbers in each row: row n holds ``weights[n]`` from column ``starts[n]`` on."""

    starts: NDArray[np.int64]
    weights: Floats
    columns: int

    @property
    def transposed(self) -> Band:
        """The matrix (M, N), for one whose columns hold their numbers without gaps."""
        dense = np.zeros((self.columns, len(self.starts)), np.float32)
        for n, (start, weights) in enumerate(zip(self.starts, self.weights, strict=True)):
            dense[start : start + len(weights), n] = weights
        used = dense != 0
        first, last = used.argmax(1), used.shape[1] - 1 - used[:, ::-1].argmax(1)
        width = int(np.where(used.any(1), last - first + 1, 1).max())
        starts = np.minimum(first, used.shape[1] - width)
        return Band(starts, np.take_along_axis(dense, starts[:, None] + np.arange(width), 1), len(self.starts))


def interpolation(places: NDArray[np.float64], size: int, kernel: Sequence[float] = (1.0,)) -> Band:
    """Linear interpolation at ``places`` of a line of ``size`` voxels, smoothed by a kernel of odd length.

    Beyond its ends the line goes on with its last value.
    """
    places = np.clip(places, 0, size - 1)
    low = np.floor(places).astype(np.int64)
    reach, share = len(kernel) // 2, (places - low)[:, None]
    around = np.array([*kernel, 0.0])
    columns = np.clip(low[:, None] + np.arange(-reach, reach + 2), 0, size - 1)
    width = min(2 * reach + 2, size)
    starts = np.clip(low - reach, 0, size - width)
    weights = np.zeros((len(places), width))
    rows = np.arange(len(places))[:, None]
    np.add.at(weights, (rows, columns - starts[:, None]), (1 - share) * around + share * np.roll(around, 1))
    return Band(starts, weights.astype(np.float32), size)


@compiled
def _across(
    first: int, last: int, values: Floats, starts: NDArray[np.int64], weights: Floats, out: Floats
) -> None:
    """Rows first..last of (N, B) = matrix x values (M, B), for each of the (A, M, B)."""
    for a in range(values.shape[0]):
        for n in range(first, last):
            total = out[a, n]
            total[:] = 0.0
            for t in range(weights.shape[1]):
                row, weight = values[a, starts[n] + t], weights[n, t]
                for b in range(total.size):
                    total[b] += weight * row[b]


@compiled
def _along(first: int, last: int, values: Floats, starts: NDArray[np.int64], weights: Floats, out: Floats) -> None:
    """Lines first..last of (A, N) = values (A, M) x matrix^T."""
    for a in range(first, last):
        row, line = values[a], out[a]
        for n in range(line.size):
            part, weight = row[starts[n] :], weights[n]
            total = np.float32(0)
            for t in range(weight.size):
                total += weight[t] * part[t]
            line[n] = total


def along_axes(values: torch.Tensor, bands: Sequence[Band | None]) -> torch.Tensor:
    """(C, I, J, K) float32 with a matrix applied along each of its three axes; None leaves an axis as it is.

    Axes are taken in the order that keeps what lies between small: the first one first where it shrinks.
    """
    array = values.contiguous().numpy()
    shrinks = all(b is None or len(b.starts) <= b.columns for b in bands)
    for axis in (1, 2, 3) if shrinks else (3, 2, 1):
        matrix = bands[axis - 1]
        if matrix is None:
            continue
        shape = (*array.shape[:axis], len(matrix.starts), *array.shape[axis + 1 :])
        out = np.empty(shape, np.float32)
        if axis == 3:
            lines = array.reshape(-1, array.shape[3])
            over_planes(_along, len(lines), lines, matrix.starts, matrix.weights, out.reshape(-1, shape[3]))
        else:
            before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
            blocks, rows = array.reshape(before, -1, after), out.reshape(before, -1, after)
            over_planes(_across, shape[axis], blocks, matrix.starts, matrix.weights, rows)
        array = out
    return torch.from_numpy(array)
