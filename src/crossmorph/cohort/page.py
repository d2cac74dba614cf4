"""The page of a cohort: the most suspicious pairs first, each with a link to its report. Offline, no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from crossmorph.cohort.rows import Row, suspicion
from crossmorph.cohort.work import LOGS, PAIRS
from crossmorph.files import atomic_path
from crossmorph.report.page import REPORT

PAGE = "cohort.html"

SHOWN = 5000
"""Rows on the page; browsers get slow beyond."""


def write_page(rows: Sequence[Row], path: Path) -> None:
    """Write ``cohort.html`` beside the results, which it links to.

    Raises:
        InputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(render(rows), encoding="utf-8")


def render(rows: Sequence[Row]) -> str:
    """The page as text."""
    from jinja2 import Environment

    style = (files("crossmorph.report") / "style.css").read_text("utf-8")
    page = (files("crossmorph.cohort") / "cohort.html").read_text("utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(page)
    shown = [_linked(row) for row in sorted(rows, key=suspicion)[:SHOWN]]
    return template.render(style=style, rows=shown, left_out=len(rows) - len(shown), counts=counts(rows))


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Pairs by how they ended: ok, check, failed (the verdicts), not registered, waiting."""
    found = Counter(_end(row) for row in rows)
    return {end: found[end] for end in ("ok", "check", "failed", "not registered", "waiting") if found[end]}


def _end(row: Row) -> str:
    words = {"done": str(row.get("verdict")), "failed": "not registered", "waiting": "waiting"}
    return words[str(row["status"])]


def _linked(row: Row) -> dict[str, str | float]:
    done = row["status"] == "done"
    target = f"{PAIRS}/{row['id']}/{REPORT}" if done else f"{LOGS}/{row['id']}.log"
    return {**row, "end": _end(row), "link": "" if row["status"] == "waiting" else quote(target)}
