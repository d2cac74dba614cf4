"""The table of a cohort: one row a pair, the same columns and content whatever happened on the way."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from crossmorph.cohort.pairs import Pair
from crossmorph.files import atomic_path

Row = dict[str, str | float]

NAMED = ("id", "fixed", "moving", "status", "verdict", "reasons")
SCORES = (
    "nmi_before",
    "nmi_after",
    "confirmed",
    "agreement",
    "overlap",
    "folded",
    "jacobian_min",
    "jacobian_max",
    "displacement_p95_mm",
    "moved_p95_mm",
    "inverse_residual_p95_mm",
)
MEASURED = ("seconds", "peak_mib")
"""What no two runs agree on."""

COLUMNS = (*NAMED, *SCORES, "message", *MEASURED)
"""Of ``cohort.csv``; docs/cohort.md tells what they hold."""

VERDICTS = ("", "failed", "check", "ok")
"""From the most to the least suspicious; a pair that was not registered has none."""


def waiting_row(pair: Pair) -> Row:
    """A pair that was not reached yet."""
    job = pair.job
    return {"id": pair.id, "fixed": str(job.fixed), "moving": str(job.moving[0]), "status": "waiting"}


def failed_row(pair: Pair, message: str) -> Row:
    """A pair that could not be registered."""
    return {**waiting_row(pair), "status": "failed", "message": " ".join(message.split())}


def done_row(pair: Pair, record: Mapping[str, Any]) -> Row:
    """A pair with the record of its result; numbers of the first moving image."""
    scores = record["scores"]
    first = {key: next(iter(scores[key].values())) for key in ("nmi", "confirmed")}
    values = {
        "nmi_before": first["nmi"]["before"],
        "nmi_after": first["nmi"]["after"],
        "confirmed": first["confirmed"],
        "agreement": scores["agreement"],
        "overlap": scores["overlap"],
        "folded": scores["folded"],
        "jacobian_min": scores["jacobian"][0],
        "jacobian_max": scores["jacobian"][1],
        "displacement_p95_mm": scores["displacement_mm"]["p95"],
        "moved_p95_mm": scores["moved_mm"]["p95"],
        "inverse_residual_p95_mm": scores["inverse_residual_mm"]["p95"],
        "seconds": round(sum(stage["seconds"] for stage in record["stages"]), 3),
        "peak_mib": max(stage["peak_mib"] for stage in record["stages"]),
    }
    verdict = record["verdict"]
    return {
        **waiting_row(pair),
        "status": "done",
        "verdict": verdict["status"],
        "reasons": "; ".join(verdict["reasons"]),
        **{name: value for name, value in values.items() if value is not None},
    }


def suspicion(row: Row) -> tuple[int, float, str]:
    """Sorts the most suspicious first: not registered, failed, check, ok; then by what a new search confirms."""
    return VERDICTS.index(str(row.get("verdict", ""))), float(row.get("confirmed", 0)), str(row["id"])


def write_table(rows: Iterable[Row], path: Path) -> None:
    """Write ``cohort.csv``, all of it or nothing.

    Raises:
        InputError: it cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
