"""Sampling grids for PyTorch in a NumPy archive (.npz).

    import numpy, torch
    archive = numpy.load("grid.npz")
    grid = torch.from_numpy(archive["grid"])[None]         # (1, I, J, K, 3)
    warped = torch.nn.functional.grid_sample(moving[None], grid, align_corners=False)   # moving (C, A, B, C')

The last axis of ``grid`` is in torch's order, that of the moving array's last index first. The archive also tells
``fixed_affine``, ``moving_affine`` and ``moving_shape``, so that it can be read again without the images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from crossmorph.errors import InputError
from crossmorph.io.arrays import read_arrays
from crossmorph.io.fsl import both_grids
from crossmorph.io.volume import reading
from crossmorph.resample import world_blocks
from crossmorph.space import Grid
from crossmorph.transform import DisplacementField, Transform


def read_grid(path: Path, fixed: Grid | None = None, moving: Grid | None = None) -> DisplacementField:
    """Read an archive that ``write_grid`` wrote, or one with ``grid`` alone where both image grids are given.

    Raises:
        InputError: it is no such archive, or the grid does not have the fixed image's shape.
    """
    with reading(path, "a sampling grid"):
        wanted = ("grid",) if fixed and moving else ("grid", "fixed_affine", "moving_affine", "moving_shape")
        found = read_arrays(path, wanted)
        grid = found["grid"]
        if grid.ndim != 4 or grid.shape[-1] != 3:
            raise InputError(f"a sampling grid is (I, J, K, 3); this one is {grid.shape}")
        here = fixed or Grid(grid.shape[:3], found["fixed_affine"])
        there = moving or Grid(found["moving_shape"].tolist(), found["moving_affine"])
        if grid.shape[:3] != here.shape:
            raise InputError(f"the sampling grid has {grid.shape[:3]} voxels, the fixed image {here.shape}")
        voxels = ((grid[..., ::-1].astype(np.float64) + 1) * there.shape - 1) / 2
        centres = np.moveaxis(np.indices(here.shape, np.float64), 0, -1)
        moved = np.moveaxis(there.to_world(voxels) - here.to_world(centres), -1, 0)
        field = torch.from_numpy(np.ascontiguousarray(moved, np.float32))
        return DisplacementField(field, here, fixed_grid=here, moving_grid=there)


def write_grid(transform: Transform, path: Path) -> None:
    """Write any transform as the places, in the moving array, of the fixed voxels."""
    fixed, moving = both_grids("a sampling grid", transform.fixed_grid, transform.moving_grid)
    grid = np.empty((int(np.prod(fixed.shape)), 3), np.float32)
    for part, points in world_blocks(fixed):
        voxels = moving.to_voxel(transform(points)).numpy()
        grid[part] = ((2 * voxels + 1) / moving.shape - 1)[:, ::-1]
    np.savez_compressed(
        path,
        grid=grid.reshape(*fixed.shape, 3),
        fixed_affine=fixed.affine,
        moving_affine=moving.affine,
        moving_shape=np.asarray(moving.shape),
    )
