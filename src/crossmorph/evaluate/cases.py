"""From files to tables: one case named by paths, or a CSV of many."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.evaluate.case import Evaluation, evaluate
from crossmorph.evaluate.learn2reg import LAYOUTS, read_displacement
from crossmorph.evaluate.tables import Cell, latex, markdown, read_rows, summarise, write_rows
from crossmorph.files import RECORD, atomic_directory
from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.transform import Affine, Transform

Convention = Literal["itk", "learn2reg", "channels-last", "channels-first", "half-resolution"]
SUMMARY_COLUMNS = ("metric", "n", "undefined", "mean", "std", "p05", "p25", "p50", "p75", "p95")


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case; the fields are the columns of a table of cases.

    Attributes:
        transform: a file, or the word "identity".
        fixed, moving: images.
        fixed_labels, moving_labels: label maps.
        points: CSV of corresponding points, or of the fixed points alone where ``moving_points`` is given.
        moving_points: CSV of the moving points, row by row the partners of the fixed ones.
        mask: where regularity and similarity look, in the fixed world.
        labels: "all", ids joined by commas, or a text file of ids.
        convention: of the transform file: "itk", "learn2reg" or one of its layouts. An .npz is always Learn2Reg.
    """

    transform: str
    fixed: str = ""
    moving: str = ""
    fixed_labels: str = ""
    moving_labels: str = ""
    points: str = ""
    moving_points: str = ""
    mask: str = ""
    labels: str = ""
    convention: str = "itk"

    def score(
        self,
        thresholds_mm: Sequence[float] = (),
        voxel_distances: bool = False,
        transform: Transform | None = None,
    ) -> Evaluation:
        """Read everything and measure; a transform that is given is scored instead of the file's.

        Raises:
            InputError: a file is missing, damaged or does not fit the others; see ``evaluate``.
        """
        if bool(self.fixed_labels) != bool(self.moving_labels):
            raise InputError("overlap needs the labels of both sides: give --fixed-labels and --moving-labels")
        fixed, moving = (io.read(path) if path else None for path in (self.fixed, self.moving))
        fixed_labels, moving_labels, mask = (
            io.read_labels(path) if path else None for path in (self.fixed_labels, self.moving_labels, self.mask)
        )
        result = evaluate(
            transform or self._transform(fixed or fixed_labels, moving or moving_labels),
            points=self._points(),
            fixed_labels=fixed_labels,
            moving_labels=moving_labels,
            ids=parse_ids(self.labels),
            fixed=fixed,
            moving=moving,
            mask=mask,
            thresholds_mm=thresholds_mm,
            voxel_distances=voxel_distances,
        )
        for thing in (fixed, moving, fixed_labels, moving_labels, mask):
            if thing is not None:
                result.notes += [f"{thing.name}: {note}" for note in thing.notes]
        return result

    def _transform(self, fixed: Image | Labels | None, moving: Image | Labels | None) -> Transform:
        if self.transform == "identity":
            return Affine.identity()
        if self.convention not in get_args(Convention):
            raise InputError(f"unknown convention {self.convention!r}; choose {', '.join(get_args(Convention))}")
        if self.convention == "itk" and not self.transform.endswith(".npz"):
            return io.read_transform(self.transform)
        if fixed is None:
            raise InputError(
                "a Learn2Reg displacement says nothing of its geometry: give --fixed or --fixed-labels"
            )
        layout = next((name for name in LAYOUTS if name == self.convention), None)
        return read_displacement(self.transform, fixed.grid, moving.grid if moving else None, layout)

    def _points(self) -> tuple[Points, Points] | None:
        if self.moving_points:
            if not self.points:
                raise InputError("--moving-points needs the fixed ones: give --points")
            return io.read_points(self.points), io.read_points(self.moving_points)
        return io.read_point_pairs(self.points) if self.points else None


def parse_ids(text: str) -> Collection[int] | None:
    """Label ids from "1,2,3", from a text file of whole numbers, or None for "all" and "".

    Raises:
        InputError: neither ids nor such a file.
    """
    if text in ("", "all"):
        return None
    words = text
    if not text[0].isdigit():
        try:
            words = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read label ids from {text}: {error}") from error
    try:
        return [int(word) for word in words.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"label ids must be whole numbers: {error} in {text}") from error


def read_cases(
    table: str | Path, required: Sequence[str] = ("id", "transform")
) -> Iterator[tuple[str, dict[str, str], CaseFiles]]:
    """Id, row and files of every case of a CSV with the required columns and any field of ``CaseFiles``.

    Paths are relative to the table's folder. Further columns, such as subject, stay in the row.

    Raises:
        InputError: the table cannot be read, lacks a column, or names an id twice.
    """
    table = Path(table)
    rows = read_rows(table, required)
    ids = [row["id"] for row in rows]
    twice = sorted({case for case in ids if ids.count(case) > 1})
    if twice:
        raise InputError(f"{table}: the id {', '.join(twice)} stands in more than one row")
    for row in rows:
        given = {f.name: row[f.name] for f in fields(CaseFiles) if row.get(f.name)}
        for name, value in given.items():
            words = (
                name == "convention" or value in ("identity", "all") or (name == "labels" and value[0].isdigit())
            )
            given[name] = value if words else str(table.parent / value)
        yield row["id"], row, CaseFiles(**{"transform": "", **given})


@dataclass
class Report:
    """Scores of many cases.

    Attributes:
        cases: one row a case: id, subject where given, scores, error where it failed, notes.
        labels: one row a label of a case.
    """

    cases: list[dict[str, Cell]]
    labels: list[dict[str, Cell]]

    def add(self, line: dict[str, Cell], result: Evaluation) -> None:
        """Complete the line of a case with what was measured, and take it in."""
        line |= result.scores
        if result.notes:
            line["notes"] = "; ".join(result.notes)
        self.cases.append(line)
        self.labels += [{"case": line["id"], **label} for label in result.labels]

    @property
    def failed(self) -> int:
        """Number of cases that could not be scored."""
        return sum("error" in row for row in self.cases)

    def summary(self) -> list[dict[str, Cell]]:
        """One row a metric; see ``tables.summarise``."""
        return summarise(self.cases)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write cases.csv, labels.csv, summary.csv, summary.md, summary.tex and record.json, all or nothing."""
        summary = self.summary()
        short = [{name: row[name] for name in SUMMARY_COLUMNS if name in row} for row in summary]
        with atomic_directory(folder, overwrite) as out:
            write_rows(self.cases, out / "cases.csv")
            if self.labels:
                write_rows(self.labels, out / "labels.csv")
            if summary:
                write_rows(summary, out / "summary.csv")
                (out / "summary.md").write_text(markdown(short), encoding="utf-8")
                (out / "summary.tex").write_text(latex(short), encoding="utf-8")
            content = {"cases": self.cases, "labels": self.labels, "summary": summary}
            (out / RECORD).write_text(to_json(content), encoding="utf-8")


def score_cases(
    table: str | Path,
    thresholds_mm: Sequence[float] = (),
    voxel_distances: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Score every case of a table; a case that cannot be scored becomes a row with an ``error``.

    Args:
        table: see ``read_cases``.
        thresholds_mm, voxel_distances: see ``evaluate``.
        progress: called with one line a case.
    """
    report = Report([], [])
    for case, row, files in read_cases(table):
        line: dict[str, Cell] = {name: row[name] for name in ("id", "subject") if row.get(name)}
        try:
            report.add(line, files.score(thresholds_mm, voxel_distances))
        except InputError as error:
            line["error"] = str(error)
            report.cases.append(line)
        progress(f"{case}: {line.get('error', 'scored')}")
    return report


def to_json(content: Any) -> str:
    """JSON with null for numbers that are not finite, which JSON does not have."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=2) + "\n"
