"""Landmarks as CSV with a header line, RAS mm."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from crossmorph.errors import InputError
from crossmorph.io.volume import reading
from crossmorph.points import Points

XYZ = ("x", "y", "z")
FIXED = tuple(f"fixed_{axis}" for axis in XYZ)
MOVING = tuple(f"moving_{axis}" for axis in XYZ)


LARGEST_TEXT = 2**28
"""Bytes of a text file of points, at most."""


def read_points(path: Path) -> Points:
    """Columns x, y, z and, if there, name; other columns are left out.

    Raises:
        InputError: a column is missing, a value is not a number, or there is no row.
    """
    rows = _rows(path, XYZ)
    names = tuple(row["name"] for row in rows) if "name" in rows[0] else ()
    return Points(_numbers(path, rows, XYZ), names)


def read_point_pairs(path: Path) -> tuple[Points, Points]:
    """Columns fixed_x, fixed_y, fixed_z, moving_x, moving_y, moving_z: matching points of both spaces.

    Raises:
        InputError: as for ``read_points``.
    """
    rows = _rows(path, FIXED + MOVING)
    return (
        Points(_numbers(path, rows, FIXED), space="fixed"),
        Points(_numbers(path, rows, MOVING), space="moving"),
    )


def write_points(points: Points, path: Path) -> None:
    """Columns x, y, z and, if there are names, name; micrometres are kept."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(XYZ + (("name",) if points.names else ()))
        for n, row in enumerate(points.xyz.tolist()):
            writer.writerow([f"{v:.6f}" for v in row] + ([points.names[n]] if points.names else []))


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with reading(path, "a CSV of points"), path.open(newline="", encoding="utf-8-sig") as stream:
        if path.stat().st_size > LARGEST_TEXT:
            raise InputError(f"the file is larger than {LARGEST_TEXT >> 20} MiB")
        header = [name.strip() for name in next(csv.reader([stream.readline()]), [])]
        missing = [name for name in columns if name not in header]
        if missing:
            raise InputError(
                f"column {', '.join(missing)} is missing; the first line must name the columns "
                f"{','.join(columns)} (RAS mm), but it is {','.join(header)!r}"
            )
        rows = [row for row in csv.DictReader(stream, header, restval="") if any(row.values())]
        if not rows:
            raise InputError("there are no points below the header line")
        return rows


def _numbers(path: Path, rows: list[dict[str, str]], columns: Sequence[str]) -> torch.Tensor:
    values = torch.empty(len(rows), len(columns), dtype=torch.float64)
    for line, row in enumerate(rows):
        for column, name in enumerate(columns):
            try:
                values[line, column] = float(row[name])
            except ValueError:
                raise InputError(f"{path}: point {line + 1}: {name} is {row[name]!r}, not a number") from None
    with reading(path):
        return finite(values)


def finite(xyz: torch.Tensor) -> torch.Tensor:
    """The same coordinates, if they are numbers."""
    if not torch.isfinite(xyz).all():
        raise InputError("a coordinate is NaN or infinite")
    return xyz
