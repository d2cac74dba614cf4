"""The page of a registration: one file, offline, nothing fetched."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from crossmorph.files import atomic_path
from crossmorph.report import boxes, colours, words
from crossmorph.report.evidence import Evidence
from crossmorph.report.figures import round_number
from crossmorph.report.png import packed
from crossmorph.report.stills import stills
from crossmorph.report.volumes import DOUBLED, FOLDED, Shown, shown

REPORT = "report.html"
"""Name of the page in a result folder."""

STEP_MM = 0.01
"""Displacements are stored as whole numbers of this, at most 327 mm long."""

MAX_POINTS = 20_000
"""Landmarks that are drawn."""


def write_report(evidence: Evidence, path: str | Path) -> Path:
    """Write the page, which shows everything in ``evidence`` and names no file.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(render(evidence), encoding="utf-8")
    return Path(path)


def render(evidence: Evidence) -> str:
    """The page as text: pictures, volumes, script and style are all inside."""
    from jinja2 import Environment

    volumes, record = shown(evidence), evidence.record
    here = files("crossmorph.report")
    style, script, page = ((here / name).read_text("utf-8") for name in ("style.css", "viewer.js", "page.html"))
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(page)
    command = record["choices"].get("command")
    return template.render(
        style=style,
        script=script,
        data=_data(evidence, volumes),
        verdict=words.verdict(record),
        movings=words.moving_names(len(evidence.movings)),
        stills=stills(volumes),
        measurements=words.measurements(record),
        candidates=words.candidates(record),
        decisions=words.decisions(record),
        inputs=words.inputs(record),
        boxes=boxes.drawings(evidence),
        stages=words.stages(record),
        landmarks=words.landmarks(evidence),
        fitted=words.fitted_landmarks(record),
        overlaps=words.overlaps(evidence),
        command=command["line"] if command else None,
        settings=json.dumps(record["settings"], indent=1),
        run={"seed": record["seed"], "device": record["device"], **record["machine"]},
        versions=record["versions"],
        line_mm=_line_mm(volumes),
    )


def _data(evidence: Evidence, volumes: Shown) -> str:
    """What the script needs, as JSON that is safe inside a page."""
    steps = None
    if volumes.displacement is not None:
        whole = np.round(np.moveaxis(volumes.displacement, 0, -1) / STEP_MM)
        steps = packed(np.clip(whole, -32767, 32767).astype(np.int16))
    confidence, largest = None, 0.0
    if volumes.confidence_mm is not None:
        largest = float(np.nanmax(volumes.confidence_mm, initial=1e-3))
        levels = 1 + np.nan_to_num(volumes.confidence_mm) * (254 / largest)
        confidence = packed(np.where(np.isfinite(volumes.confidence_mm), levels, 0).round().astype(np.uint8))
    data: dict[str, Any] = {
        "shape": volumes.grid.shape,
        "spacing": float(volumes.grid.spacing[0]),
        "origin": volumes.grid.origin.tolist(),
        "fieldShape": volumes.field_grid.shape,
        "center": volumes.center,
        "linear": evidence.linear.matrix.tolist(),
        "fixed": packed(volumes.fixed),
        "movings": [{"before": packed(m.before), "after": packed(m.after)} for m in volumes.movings],
        "labels": None if volumes.labels is None else [packed(map_) for map_ in volumes.labels],
        "labelIds": volumes.label_ids,
        "displacement": steps,
        "stepMm": STEP_MM,
        "jacobian": packed(volumes.jacobian),
        "folded": FOLDED,
        "doubled": DOUBLED,
        "confidence": confidence,
        "confidenceMaxMm": largest,
        "points": _points(evidence),
        "lineMm": _line_mm(volumes),
        "growthColours": colours.table(colours.GROWTH_STOPS).tolist(),
        "lengthColours": colours.table(colours.LENGTH_STOPS).tolist(),
        "foldColour": colours.rgb(colours.FOLD).tolist(),
        "fixedLine": colours.FIXED_LINE,
        "movingLine": colours.MOVING_LINE,
    }
    return json.dumps(data).replace("<", "\\u003c")


def _points(evidence: Evidence) -> list[list[list[float]]] | None:
    """Landmarks in the fixed space: fixed, moving before, moving after."""
    if evidence.points is None:
        return None
    fixed, moving = (points.xyz[:MAX_POINTS] for points in evidence.points)
    places = fixed, evidence.initial.inverse()(moving), evidence.inverse(moving)
    return [place.round(decimals=2).tolist() for place in places]


def _line_mm(volumes: Shown) -> float:
    return round_number(float(volumes.grid.extent_mm.max()) / 20)
