"""How regular a deformation is: SDlogJ, NDV, inverse consistency. ``transform.jacobian`` counts folds.

The functions take the displacement in voxels along the array axes, (3, I, J, K), as ``voxel_displacement`` gives
it for any transform on any grid. Determinants and volume shares are the same in voxels and in mm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from crossmorph.errors import InputError
from crossmorph.space import Grid
from crossmorph.transform.base import Transform
from crossmorph.transform.jacobian import displacement_determinant, sdlogj

Floats = NDArray[np.float64]
Mapping = Callable[[Any], Any]
"""Maps world points (N, 3), RAS mm, float64 numpy, of one space to another; every Transform is one."""

SLAB_VOXELS = 1 << 20


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cuts of the first axis with about ``SLAB_VOXELS`` voxels each."""
    thick = max(1, SLAB_VOXELS // max(1, int(np.prod(shape[1:]))))
    return (slice(start, min(start + thick, shape[0])) for start in range(0, shape[0], thick))


def voxel_displacement(transform: Transform, grid: Grid) -> Floats:
    """(3, I, J, K): how far a transform moves each voxel of the fixed grid, in voxels along its array axes.

    A^-1 (T(A p) - A p) for voxel p and the grid's affine A.
    """
    mm = transform.displacements(grid).cpu().numpy().astype(np.float64)
    voxels: Floats = np.einsum("ij,j...->i...", grid.inverse_affine[:3, :3], mm)
    return voxels


def voxel_determinant(displacement: ArrayLike) -> torch.Tensor:
    """(I, J, K) Jacobian determinants of a displacement (3, I, J, K) in voxels; see ``transform.jacobian``."""
    u = _displacement(displacement)
    return displacement_determinant(torch.from_numpy(u), Grid(u.shape[1:], np.eye(4)))


def learn2reg_sdlogj(determinant: torch.Tensor, mask: ArrayLike | None = None) -> float:
    """SDlogJ as the Learn2Reg evaluation prints it: the standard deviation of log(clip(J + 3, 1e-9, 1e9)).

    No unit; population deviation, two voxels off each face, inside the fixed mask if given. The plain definition
    (Leow et al. 2007; ``sdlogj``) leaves the 3 out: its values are larger and one fold weighs log(1e-9). The
    number of folds that the official code prints is taken after clipping and is always 0; ``folding`` is not.

    Args:
        determinant: (I, J, K), of ``voxel_determinant`` for example.
        mask: (I, J, K) fixed mask (``masked_evaluation``).
    """
    inner = (slice(2, -2),) * 3
    inside = _mask(mask, tuple(determinant.shape))[inner]
    return sdlogj(determinant[inner] + 3, torch.from_numpy(np.ascontiguousarray(inside)))


def _determinant(rows: list[Floats]) -> Floats:
    """Triple product of three vector fields (3, ...)."""
    a, b, c = rows
    result: Floats = (
        a[0] * (b[1] * c[2] - b[2] * c[1])
        - a[1] * (b[0] * c[2] - b[2] * c[0])
        + a[2] * (b[0] * c[1] - b[1] * c[0])
    )
    return result


def _displacement(displacement: ArrayLike) -> Floats:
    u = np.asarray(displacement, np.float64)
    if u.ndim != 4 or u.shape[0] != 3:
        raise InputError(f"a displacement must be (3, I, J, K) in voxels, not {u.shape}")
    return u


def _mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones(shape, bool)
    inside: NDArray[np.bool_] = np.asarray(mask) != 0
    if inside.shape != shape:
        raise InputError(f"the mask has shape {inside.shape}, the displacement {shape}; put both on one grid")
    return inside


# -- digital diffeomorphism --------------------------------------------------------------------------------------


def _ten_determinants(u: Floats) -> Iterator[Floats]:
    """The ten determinants of every interior voxel, each (I - 2, J - 2, K - 2), from differences of u.

    Eight use a forward or backward step along each axis; two use the diagonals of the faces that meet in the
    voxel's neighbours. The identity adds the step itself, so large coordinates cost no digits.
    """

    def step(*offset: int) -> Floats:
        """T(p + offset) - T(p) for all interior p."""
        window = tuple(slice(1 + o, n - 1 + o) for o, n in zip(offset, u.shape[1:], strict=True))
        result: Floats = u[(slice(None), *window)] - centre + np.reshape(offset, (3, 1, 1, 1))
        return result

    centre = u[:, 1:-1, 1:-1, 1:-1]
    forward = [step(1, 0, 0), step(0, 1, 0), step(0, 0, 1)]
    backward = [-step(-1, 0, 0), -step(0, -1, 0), -step(0, 0, -1)]
    for rows in product(*zip(forward, backward, strict=True)):
        yield _determinant(list(rows))
    yield _determinant([step(-1, -1, 0), step(-1, 0, -1), step(0, -1, -1)])
    yield _determinant([step(1, 1, 0), step(0, 1, 1), step(1, 0, 1)])


def non_diffeomorphic_volume(displacement: ArrayLike, mask: ArrayLike | None = None) -> tuple[float, float]:
    """NDV: the volume that folds under piecewise-linear interpolation, from ten tetrahedra a voxel.

    NDV = sum_p m(p) sum_10 -min(J, 0) / 12. |J| / 6 is a tetrahedron's volume, and the ten tetrahedra fill the
    voxel twice. Source: Liu et al., "On finite difference Jacobian computation in deformable image registration",
    IJCV 2024. Unlike a count of voxels with J <= 0 it measures how much volume folds, and no fold escapes it.
    The outermost voxels of the grid are left out.

    Args:
        displacement: (3, I, J, K) in voxels along the array axes.
        mask: (I, J, K); the LUMIR evaluation takes moving > 0 here, the fixed foreground is right.

    Returns:
        Volume in voxels, and the percentage of the mask's (interior) voxels; NaN for an empty mask.
    """
    u = _displacement(displacement)
    if min(u.shape[1:]) < 3:
        raise InputError(f"NDV needs three voxels along each axis, this field has {u.shape[1:]}")
    inside = _mask(mask, u.shape[1:])[1:-1, 1:-1, 1:-1]
    total = 0.0
    for slab in _slabs(inside.shape):
        part = inside[slab]
        if part.any():
            window = u[:, slab.start : slab.stop + 2]
            total -= sum(float(np.minimum(j, 0)[part].sum()) for j in _ten_determinants(window)) / 12
    count = int(inside.sum())
    return total, 100 * total / count if count else float("nan")


def non_diffeomorphic_tetrahedra_percent(displacement: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Percentage of the ten tetrahedra of every interior voxel whose determinant is 0 or less (see NDV)."""
    u = _displacement(displacement)
    inside = _mask(mask, u.shape[1:])[1:-1, 1:-1, 1:-1]
    bad = 0
    for slab in _slabs(inside.shape):
        window, part = u[:, slab.start : slab.stop + 2], inside[slab]
        bad += sum(int((j <= 0)[part].sum()) for j in _ten_determinants(window))
    return 10 * bad / int(inside.sum()) if inside.any() else float("nan")


# -- both ways ---------------------------------------------------------------------------------------------------


def inverse_consistency(forward: Mapping, backward: Mapping, points: ArrayLike) -> Floats:
    """(N,) mm: |B(F(p)) - p| at points (N, 3) of the fixed space, RAS mm.

    ``forward`` maps fixed to moving points, ``backward`` moving to fixed points. Voxel-based residuals found in
    papers also count the error of interpolating one field on the other's grid; here each transform answers for
    itself.
    """
    start = np.asarray(points, np.float64)
    error: Floats = np.linalg.norm(np.asarray(backward(np.asarray(forward(start)))) - start, axis=-1)
    return error
