"""Points through affine maps, voxel centres, and the inverse of a displacement, point by point on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from crossmorph.kernels.parallel import Floats, inlined, over_planes
from crossmorph.kernels.sampling import _place

Doubles = NDArray[np.float64]
Point = tuple[float, float, float]

precise = njit(cache=True, nogil=True, error_model="numpy")


def mapped(matrix: NDArray[Any], points: torch.Tensor) -> torch.Tensor:
    """(N, 3) float64 points through a 4x4 matrix."""
    out = torch.empty_like(points, memory_format=torch.contiguous_format)
    arrays = (np.ascontiguousarray(matrix, np.float64), points.contiguous().numpy(), out.numpy())
    over_planes(_mapped, len(points), *arrays)
    return out


@inlined
def _through(matrix: Doubles, x: float, y: float, z: float) -> Point:
    return (
        matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] * z + matrix[0, 3],
        matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] * z + matrix[1, 3],
        matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2] * z + matrix[2, 3],
    )


@precise
def _mapped(first: int, last: int, matrix: Doubles, points: Doubles, out: Doubles) -> None:
    for p in range(first, last):
        out[p, 0], out[p, 1], out[p, 2] = _through(matrix, points[p, 0], points[p, 1], points[p, 2])


def centres(matrix: NDArray[Any], shape: tuple[int, int, int], start: int, stop: int) -> torch.Tensor:
    """(stop - start, 3) float64: some voxel centres of a flattened volume through a 4x4 matrix."""
    out = torch.empty(stop - start, 3, dtype=torch.float64)
    over_planes(_centres, len(out), np.ascontiguousarray(matrix, np.float64), shape, start, out.numpy())
    return out


@precise
def _centres(
    first: int, last: int, matrix: Doubles, shape: tuple[int, int, int], start: int, out: Doubles
) -> None:
    _, nj, nk = shape
    for p in range(first, last):
        line, k = divmod(start + p, nk)
        out[p, 0], out[p, 1], out[p, 2] = _through(matrix, line // nj, line % nj, k)


def inverted(
    field: torch.Tensor, to_voxel: NDArray[Any], targets: torch.Tensor, step: float, tolerance: float, rounds: int
) -> torch.Tensor:
    """See ``transform.inverse._solve``: (N, 3) points x with x + u(x) = target, as nearly as can be.

    Args:
        field: u (3, I, J, K), continued beyond its ends.
        to_voxel: (4, 4) from points to voxels of the field.
        targets: (N, 3) float64.
        step: of the differences that stand for derivatives.
        tolerance: a point that comes so near to its target is done.
        rounds: steps at most.
    """
    out = torch.empty_like(targets)
    arrays = (field.contiguous().numpy(), np.ascontiguousarray(to_voxel, np.float64), targets.contiguous().numpy())
    over_planes(_inverted, len(targets), *arrays, step, tolerance, rounds, out.numpy())
    return out


@precise
def _gap(field: Floats, to_voxel: Doubles, x: Doubles, target: Doubles, out: Doubles) -> float:
    """x + u(x) - target into ``out``; returns its square."""
    place = _through(to_voxel, x[0], x[1], x[2])
    i, i1, fx = _place(place[0], field.shape[1])
    j, j1, fy = _place(place[1], field.shape[2])
    k, k1, fz = _place(place[2], field.shape[3])
    square = 0.0
    for c in range(3):
        block = field[c]
        near = (block[i, j, k] * (1 - fz) + block[i, j, k1] * fz) * (1 - fy)
        near += (block[i, j1, k] * (1 - fz) + block[i, j1, k1] * fz) * fy
        far = (block[i1, j, k] * (1 - fz) + block[i1, j, k1] * fz) * (1 - fy)
        far += (block[i1, j1, k] * (1 - fz) + block[i1, j1, k1] * fz) * fy
        out[c] = x[c] + near * (1 - fx) + far * fx - target[c]
        square += out[c] * out[c]
    return square


@precise
def _dot(a: Doubles, b: Doubles) -> float:
    total: float = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return total


@precise
def _damped_newton(columns: Doubles, gap: Doubles, damping: float) -> Point:
    """(J^T J + damping I)^-1 J^T gap; the columns of J are rows here."""
    a, b, c = columns[0], columns[1], columns[2]
    aa, bb, cc = _dot(a, a) + damping, _dot(b, b) + damping, _dot(c, c) + damping
    ab, bc, ca = _dot(a, b), _dot(b, c), _dot(c, a)
    p, q, r = _dot(a, gap), _dot(b, gap), _dot(c, gap)
    minor_a, minor_b, minor_c = bb * cc - bc * bc, cc * aa - ca * ca, aa * bb - ab * ab
    minor_ab, minor_bc, minor_ca = bc * ca - ab * cc, ca * ab - bc * aa, ab * bc - ca * bb
    scale = 1 / (aa * minor_a + ab * minor_ab + ca * minor_ca)
    return (
        (minor_a * p + minor_ab * q + minor_ca * r) * scale,
        (minor_ab * p + minor_b * q + minor_bc * r) * scale,
        (minor_ca * p + minor_bc * q + minor_c * r) * scale,
    )


@precise
def _inverted(
    first: int,
    last: int,
    field: Floats,
    to_voxel: Doubles,
    targets: Doubles,
    step: float,
    tolerance: float,
    rounds: int,
    out: Doubles,
) -> None:
    columns, gap, trial, new = np.empty((3, 3)), np.empty(3), np.empty(3), np.empty(3)
    for p in range(first, last):
        y, x = targets[p], out[p]
        _gap(field, to_voxel, y, y, gap)
        x[:] = y - gap
        square = _gap(field, to_voxel, x, y, gap)
        damping = 1e-6
        for _ in range(rounds):
            if square <= tolerance * tolerance:
                break
            for axis in range(3):
                trial[:] = x
                trial[axis] += step
                _gap(field, to_voxel, trial, y, new)
                for c in range(3):
                    columns[axis, c] = (new[c] - gap[c]) / step
            move = _damped_newton(columns, gap, damping)
            trial[0], trial[1], trial[2] = x[0] - move[0], x[1] - move[1], x[2] - move[2]
            better = _gap(field, to_voxel, trial, y, new)
            if better < square:
                x[:], gap[:], square = trial, new, better
                damping /= 10
            else:
                damping = max(damping * 10, 1e-3)
