"""FSL's transforms: flirt matrices (.mat) and fnirt warps (.nii.gz).

FSL measures in scaled voxels: voxel index times voxel size, the first axis counted from its other end where the
affine has a positive determinant. World coordinates do not enter, so both images are needed to read or write.

A flirt matrix M sends moving to fixed points in these coordinates, against our direction. A warp has the fixed
image's grid and sends a fixed point x to x + d(x), or to d(x) itself where it is absolute; its components run
along the voxel axes. nitransforms agrees on flirt matrices and is the oracle of the tests. Of warps it takes the
components for world axes, which is wrong on oblique volumes; there the closed form is the oracle.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from crossmorph.errors import InputError
from crossmorph.io import nifti
from crossmorph.io.volume import reading
from crossmorph.resample import world_blocks
from crossmorph.space import Array, Grid, map_points
from crossmorph.transform import Affine, DisplacementField, Transform

RELATIVE = 2006  # FSL_FNIRT_DISPLACEMENT_FIELD
SPLINES = (2007, 2008, 2009)  # coefficients of fnirt and topup: a model, not displacements


def scaled_voxels(grid: Grid) -> Array:
    """(4, 4) from voxels to FSL's coordinates in mm."""
    matrix = np.diag([*grid.spacing, 1.0])
    if np.linalg.det(grid.affine[:3, :3]) > 0:
        matrix[0, 0] *= -1
        matrix[0, 3] = (grid.shape[0] - 1) * grid.spacing[0]
    return matrix


def _to_world(grid: Grid) -> Array:
    """(4, 4) from FSL's coordinates to RAS mm."""
    matrix: Array = grid.affine @ np.linalg.inv(scaled_voxels(grid))
    return matrix


def read_affine(path: Path, fixed: Grid | None, moving: Grid | None) -> Affine:
    """Read a flirt matrix, made with ``-in moving -ref fixed``.

    Raises:
        InputError: it is no 4x4 matrix of numbers, or a grid is missing.
    """
    fixed, moving = both_grids("a flirt matrix", fixed, moving)
    with reading(path, "a flirt matrix"):
        if path.stat().st_size > 10_000:
            raise InputError("a flirt matrix is 16 numbers of text; this file is larger")
        matrix = np.array([line.split() for line in path.read_text("ascii").splitlines() if line.strip()], float)
        if matrix.shape != (4, 4):
            raise InputError(f"a flirt matrix has four rows of four numbers; this file has {matrix.shape}")
        back = np.linalg.inv(matrix)
        return Affine(_to_world(moving) @ back @ np.linalg.inv(_to_world(fixed)))


def write_affine(transform: Transform, path: Path) -> None:
    """Write a linear transform as a flirt matrix, for ``flirt -applyxfm -init``."""
    fixed, moving = both_grids("a flirt matrix", transform.fixed_grid, transform.moving_grid)
    if not isinstance(transform, Affine):
        raise InputError(
            f"a flirt matrix holds one affine map, not a {type(transform).__name__}; write a warp (.nii.gz)"
        )
    matrix = np.linalg.inv(_to_world(moving)) @ transform.matrix @ _to_world(fixed)
    path.write_text("".join("  ".join(f"{v:.12g}" for v in row) + "\n" for row in np.linalg.inv(matrix)))


def read_warp(path: Path, fixed: Grid | None, moving: Grid | None) -> DisplacementField:
    """Read a warp that applywarp takes, relative or absolute.

    Files do not say which. As in FSL, values that vary less once the voxel positions are taken off are absolute.

    Raises:
        InputError: it is no such image, holds spline coefficients, or is not on the fixed grid.
    """
    fixed, moving = both_grids("an FSL warp", fixed, moving)
    with reading(path, "an FSL warp"):
        values, affine, intent = nifti.read_components(path)
        if intent in SPLINES:
            raise InputError(
                "it holds spline coefficients, not displacements; expand it: fnirtfileutils --in=FILE --ref=REF "
                "--out=WARP"
            )
        if not Grid(values.shape[1:], affine).same_as(fixed, tolerance_mm=0.01):
            raise InputError(
                f"its grid, {Grid(values.shape[1:], affine)}, is not that of the fixed image, {fixed}"
            )
        here = _coordinates(fixed)
        target = np.moveaxis(values, 0, -1).astype(np.float64)
        spread = [float(np.std(v, axis=(0, 1, 2)).sum()) for v in (target, target - here)]
        if spread[0] <= spread[1]:
            target = here + target
        moved = map_points(_to_world(moving), target) - map_points(_to_world(fixed), here)
        field = np.ascontiguousarray(np.moveaxis(moved, -1, 0), np.float32)
        return DisplacementField(torch.from_numpy(field), fixed)


def write_warp(transform: Transform, path: Path) -> None:
    """Write any transform as a relative warp on the fixed grid, for ``applywarp --rel``."""
    fixed, moving = both_grids("an FSL warp", transform.fixed_grid, transform.moving_grid)
    to_moving = np.linalg.inv(_to_world(moving))
    to_fixed = np.linalg.inv(_to_world(fixed))
    warp = np.empty((int(np.prod(fixed.shape)), 3), np.float32)
    for part, points in world_blocks(fixed):
        warp[part] = map_points(to_moving, transform(points).numpy()) - map_points(to_fixed, points.numpy())
    nifti.write_components(warp.reshape(*fixed.shape, 3), fixed, RELATIVE, path)


def _coordinates(grid: Grid) -> Array:
    """(I, J, K, 3) of the voxel centres in FSL's coordinates."""
    return map_points(scaled_voxels(grid), np.moveaxis(np.indices(grid.shape, np.float64), 0, -1))


def both_grids(what: str, fixed: Grid | None, moving: Grid | None) -> tuple[Grid, Grid]:
    """The grids of both images, or a message that asks for them."""
    if fixed is None or moving is None:
        raise InputError(
            f"{what} means something only together with both images; name them (--fixed, --moving or the grids)"
        )
    return fixed, moving
