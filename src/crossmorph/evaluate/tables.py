"""Tables of results: one row a case, a summary a metric, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from crossmorph.errors import InputError

Cell = str | float | int
Row = Mapping[str, Cell]

HIGHER_IS_BETTER = ("dice", "recall", "precision", "mi", "nmi", "ncc", "lncc", "ssim", "tre_under")
LOWER_IS_BETTER = ("tre", "fre", "hd95", "asd", "rvd", "voe", "folding", "ndv", "sdlogj", "labels_lost", "seconds",
                   "memory")  # fmt: skip
NAMES = ("id", "subject")
QUANTILES = (5, 25, 30, 50, 70, 75, 95)
"""Percentiles of a summary; Learn2Reg prints the 30th of Dice and the 70th of errors."""


def read_rows(path: str | Path, required: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line, as text.

    Raises:
        InputError: the file is missing, has no rows or lacks a required column.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="", skipinitialspace=True)
            header = list(reader.fieldnames or ())
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the table {path}: {error}") from error
    missing = [name for name in required if name not in header]
    if missing:
        raise InputError(f"{path}: column {', '.join(missing)} is missing; the columns are {', '.join(header)}")
    if not rows:
        raise InputError(f"{path}: there are no rows below the header line")
    return rows


def write_rows(rows: Sequence[Row], path: str | Path) -> None:
    """Write rows as CSV; columns in the order in which they first appear, numbers with every digit."""
    columns = _columns(rows)
    with Path(path).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _columns(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def number(value: Cell) -> float:
    """The number in a cell; NaN where there is none."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def numeric_columns(rows: Sequence[Row]) -> list[str]:
    """Columns that hold at least one number and nothing but numbers and empty cells; never the names of cases."""
    texts = {name: [str(row[name]) for row in rows if str(row.get(name, "")) != ""] for name in _columns(rows)}
    return [
        name
        for name, cells in texts.items()
        if name not in NAMES and cells and all(_is_number(cell) for cell in cells)
    ]


def _is_number(cell: str) -> bool:
    return cell.lower() == "nan" or not math.isnan(number(cell))


def summarise(rows: Sequence[Row]) -> list[dict[str, Cell]]:
    """Mean, standard deviation and quantiles of every numeric column.

    The deviation is that of the population (division by n), as the Learn2Reg evaluation prints it. Cases without a
    finite value are left out of the numbers and counted in ``undefined``.
    """
    table: list[dict[str, Cell]] = []
    for name in numeric_columns(rows):
        values = np.array([number(row.get(name, "")) for row in rows])
        finite = values[np.isfinite(values)]
        line: dict[str, Cell] = {"metric": name, "n": len(finite), "undefined": len(values) - len(finite)}
        if len(finite):
            line |= {"mean": float(finite.mean()), "std": float(finite.std())}
            line |= {"min": float(finite.min())}
            line |= {f"p{q:02d}": float(np.percentile(finite, q)) for q in QUANTILES}
            line |= {"max": float(finite.max())}
        table.append(line)
    return table


def higher_is_better(metric: str) -> bool:
    """Which way a metric improves, from its name or from an ending ``:higher`` or ``:lower``.

    Raises:
        InputError: the name says nothing.
    """
    name, _, ending = metric.partition(":")
    if ending in ("higher", "lower"):
        return ending == "higher"
    for prefixes, answer in ((HIGHER_IS_BETTER, True), (LOWER_IS_BETTER, False)):
        if any(name == prefix or name.startswith(f"{prefix}_") for prefix in prefixes):
            return answer
    raise InputError(f"does {name} improve upwards or downwards? write {name}:higher or {name}:lower")


# -- for reading ------------------------------------------------------------------------------------------------


def pretty(cell: Cell) -> str:
    """A cell for reading: numbers with four digits that matter, NaN as a dash."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or not math.isfinite(cell):
        return "-" if isinstance(cell, float) and math.isnan(cell) else str(cell)
    return f"{cell:.4g}"


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, numbers aligned to the right."""
    columns = _columns(rows)
    numeric = set(numeric_columns(rows))
    rule = [("---:" if name in numeric else "---") for name in columns]
    lines = [columns, rule, *[[pretty(row.get(name, "")) for name in columns] for row in rows]]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def latex(rows: Sequence[Row]) -> str:
    """A LaTeX tabular with booktabs rules."""
    columns = _columns(rows)
    numeric = set(numeric_columns(rows))
    align = "".join("r" if name in numeric else "l" for name in columns)
    head = " & ".join(_tex(name) for name in columns)
    body = [" & ".join(_tex(pretty(row.get(name, ""))) for name in columns) for row in rows]
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", head + r" \\", r"\midrule"]
    return "\n".join([*lines, *[line + r" \\" for line in body], r"\bottomrule", r"\end{tabular}", ""])


def _tex(text: str) -> str:
    if text.startswith("\\"):  # a cell that is LaTeX already
        return text
    for character in "&%#_":
        text = text.replace(character, "\\" + character)
    return text.replace("±", r"$\pm$")
