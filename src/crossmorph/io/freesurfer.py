"""FreeSurfer's linear transforms, .lta files.

They send points of the source (our moving image) to the destination (our fixed image), against our direction,
and carry the geometry of both. nitransforms agrees on the matrix and is the oracle of the tests, but writes the
two geometries the wrong way round.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from crossmorph.errors import InputError
from crossmorph.io.fsl import both_grids
from crossmorph.io.volume import reading
from crossmorph.space import Array, Grid
from crossmorph.transform import Affine, Transform

VOXELS, WORLD = 0, 1  # LINEAR_VOX_TO_VOX, LINEAR_RAS_TO_RAS
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def read_lta(path: Path, fixed: Grid | None = None, moving: Grid | None = None) -> Affine:
    """Read an .lta file of world (type 1) or voxel coordinates (type 0).

    Args:
        path: the file.
        fixed, moving: grids of the images; None takes those that the file tells.

    Raises:
        InputError: it is no such file, of another type, has several transforms, or lacks a geometry it needs.
    """
    with reading(path, "an LTA transform"):
        if path.stat().st_size > 1_000_000:
            raise InputError("an LTA file is a page of text; this file is larger")
        text = path.read_text("utf-8", errors="replace")
        kind, count = (int(_numbers(text, name, 1)[0]) for name in ("type", "nxforms"))
        if kind not in (VOXELS, WORLD) or count != 1:
            raise InputError(f"type {kind} with {count} transforms is not understood; it must be 0 or 1 with one")
        row = rf"\s*{NUMBER}(?:[ \t]+{NUMBER}){{3}}[ \t]*\n"
        found = re.search(rf"^1 4 4[ \t]*\n((?:{row}){{4}})", text, re.MULTILINE)
        if not found:
            raise InputError("there is no 4x4 matrix after a line '1 4 4'")
        matrix = np.array(found[1].split(), float).reshape(4, 4)
        source, _, destination = text.partition("dst volume info")
        moving = moving or _geometry(source.partition("src volume info")[2])
        fixed = fixed or _geometry(destination)
        if kind == VOXELS:
            fixed, moving = both_grids("an LTA file of voxels without geometries", fixed, moving)
            matrix = fixed.affine @ matrix @ moving.inverse_affine
        return Affine(np.linalg.inv(matrix), fixed_grid=fixed, moving_grid=moving)


def write_lta(transform: Transform, path: Path) -> None:
    """Write a linear transform as .lta of world coordinates, for ``mri_vol2vol --lta``."""
    fixed, moving = both_grids("an LTA file", transform.fixed_grid, transform.moving_grid)
    if not isinstance(transform, Affine):
        raise InputError(f"an LTA file holds one affine map, not a {type(transform).__name__}; use .h5")
    lines = ["type      = 1 # LINEAR_RAS_TO_RAS", "nxforms   = 1", "mean      = 0 0 0", "sigma     = 1", "1 4 4"]
    lines += [_line(row) for row in np.linalg.inv(transform.matrix)]
    lines += ["src volume info", *_described(moving), "dst volume info", *_described(fixed)]
    path.write_text("\n".join(lines) + "\n")


def _geometry(text: str) -> Grid | None:
    """The grid that a block of ``name = numbers`` tells; None where it says that it does not know."""
    if not re.search(r"^valid\s*=\s*1", text, re.MULTILINE):
        return None
    i, j, k = (int(n) for n in _numbers(text, "volume", 3))
    affine = np.eye(4)
    columns = np.stack([_numbers(text, f"{axis}ras", 3) for axis in "xyz"], 1)
    affine[:3, :3] = columns * _numbers(text, "voxelsize", 3)
    affine[:3, 3] = _numbers(text, "cras", 3) - affine[:3, :3] @ (np.array([i, j, k]) / 2)
    return Grid((i, j, k), affine)


def _described(grid: Grid) -> list[str]:
    middle = grid.to_world(np.asarray(grid.shape) / 2)
    named = dict(zip(("xras", "yras", "zras"), grid.direction.T, strict=True))
    lines = ["valid = 1  # volume info valid", "filename = unknown", f"volume = {' '.join(map(str, grid.shape))}"]
    lines.append(f"voxelsize = {_line(grid.spacing)}")
    return lines + [f"{name}   = {_line(values)}" for name, values in {**named, "cras": middle}.items()]


def _numbers(text: str, name: str, count: int) -> Array:
    """The numbers after ``name =``."""
    found = re.search(rf"^{name}\s*=((?:[ \t]+{NUMBER}){{{count}}})", text, re.MULTILINE)
    if not found:
        raise InputError(f"there is no line '{name} = ' with {count} numbers")
    return np.array(found[1].split(), float)


def _line(numbers: Array) -> str:
    return " ".join(f"{v:.15e}" for v in numbers)
