"""Landmarks of 3D Slicer: .mrk.json and .fcsv. They say whether their numbers are LPS or RAS mm.

Written files are LPS, as Slicer writes them. Points that are not placed yet are left out.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch

from crossmorph.errors import InputError
from crossmorph.io.itk import LPS
from crossmorph.io.tables import LARGEST_TEXT, finite
from crossmorph.io.volume import reading
from crossmorph.points import Points

SIGNS = torch.from_numpy(LPS.diagonal()[:3].copy())
SYSTEMS = {"LPS": SIGNS, "1": SIGNS, "RAS": torch.ones_like(SIGNS), "0": torch.ones_like(SIGNS)}
"""Slicer wrote numbers for the systems once."""

FCSV = ("id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label", "desc", "associatedNodeID")
SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"


def read_mrk_json(path: Path) -> Points:
    """All control points of all markups in a .mrk.json file, labels as names.

    Raises:
        InputError: it is no such file, a markup does not say LPS or RAS or is not in mm, or no point is placed.
    """
    with reading(path, "markups of 3D Slicer"):
        if path.stat().st_size > LARGEST_TEXT:
            raise InputError(f"the file is larger than {LARGEST_TEXT >> 20} MiB; markups are a page of text")
        document = json.loads(path.read_text(encoding="utf-8"))
        markups = document.get("markups") if isinstance(document, dict) else None
        if not isinstance(markups, list) or not all(isinstance(markup, dict) for markup in markups):
            raise InputError("there is no list of markups in it")
        xyz: list[torch.Tensor] = []
        names: list[str] = []
        for markup in markups:
            signs = _signs(markup.get("coordinateSystem"))
            units = markup.get("coordinateUnits", "mm")
            if "mm" not in (units, *(units if isinstance(units, list) else ())):
                raise InputError(f"its coordinates are in {units}, not mm")
            for point in markup.get("controlPoints", ()):
                if point.get("positionStatus", "defined") == "defined":
                    xyz.append(torch.tensor(point["position"], dtype=torch.float64) * signs)
                    names.append(str(point.get("label", "")))
        return _points(xyz, names)


def read_fcsv(path: Path) -> Points:
    """The points of a .fcsv file, labels as names.

    Raises:
        InputError: it is no such file, it does not say LPS or RAS, or there is no point.
    """
    with reading(path, "fiducials of 3D Slicer"):
        if path.stat().st_size > LARGEST_TEXT:
            raise InputError(f"the file is larger than {LARGEST_TEXT >> 20} MiB; fiducials are a page of text")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        said = dict(_said(line) for line in lines if line.startswith("#"))
        signs = _signs(said.get("coordinatesystem"))
        columns = tuple(said.get("columns", ",".join(FCSV)).replace(" ", "").split(","))
        rows = [
            dict(zip(columns, row, strict=False))
            for row in csv.reader(line for line in lines if line.strip() and not line.startswith("#"))
        ]
        xyz = [torch.tensor([float(row[axis]) for axis in "xyz"], dtype=torch.float64) * signs for row in rows]
        return _points(xyz, [row.get("label", "") for row in rows])


def write_mrk_json(points: Points, path: Path) -> None:
    """Write a markup of fiducials."""
    control = [
        {
            "id": str(n),
            "label": name,
            "position": position,
            "orientation": [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0],
            "positionStatus": "defined",
        }
        for n, (name, position) in enumerate(_labelled(points), start=1)
    ]
    markup: dict[str, Any] = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm"}
    document = {
        "@schema": f"{SCHEMA}markups-schema-v1.0.3.json#",
        "markups": [markup | {"controlPoints": control}],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_fcsv(points: Points, path: Path) -> None:
    """Write fiducials as Slicer 5 does."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        stream.write("# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n")
        stream.write(f"# columns = {','.join(FCSV)}\n")
        writer = csv.writer(stream, lineterminator="\n")
        for n, (name, position) in enumerate(_labelled(points), start=1):
            place = [f"{v:.6f}" for v in position]
            writer.writerow([n, *place, 0, 0, 0, 1, 1, 1, 0, name, "", ""])


def _said(comment: str) -> tuple[str, str]:
    name, _, value = comment.lstrip("#").partition("=")
    return name.strip().lower(), value.strip()


def _signs(system: Any) -> torch.Tensor:
    if str(system) not in SYSTEMS:
        raise InputError(f"its coordinate system must be LPS or RAS, but the file says {system!r}")
    return SYSTEMS[str(system)]


def _points(xyz: list[torch.Tensor], names: list[str]) -> Points:
    if not xyz:
        raise InputError("no point is placed in it")
    return Points(finite(torch.stack(xyz)), tuple(names) if any(names) else ())


def _labelled(points: Points) -> list[tuple[str, list[float]]]:
    names = points.names or tuple(f"P-{n}" for n in range(1, len(points) + 1))
    return list(zip(names, (points.xyz * SIGNS).tolist(), strict=True))
