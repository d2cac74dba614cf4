"""What the measurements say: CSV, Markdown tables, a plot, and sections of benchmarks/README.md."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "case", "kind", "tool", "tre_mean", "tre_median", "tre_p95", "tre_max", "dice_mean", "hd95_mean",
    "labels_lost", "fold_percent", "jacobian_min", "sdlogj", "seconds", "cpu_seconds", "peak_mib", "error",
)  # fmt: skip
WORDS = ("case", "kind", "tool", "error")
START = "start"
"""The row of a case without registration."""

ACCURACY = ("tre_mean", "dice_mean", "hd95_mean")
SUMMARY: tuple[tuple[str, str, Callable[[list[float]], float], int], ...] = (
    ("tre_mean", "TRE mm", statistics.mean, 2),
    ("dice_mean", "Dice", statistics.mean, 3),
    ("hd95_mean", "HD95 mm", statistics.mean, 2),
    ("fold_percent", "folds %, worst", max, 3),
    ("sdlogj", "SDlogJ", statistics.mean, 3),
    ("seconds", "seconds, median", statistics.median, 1),
    ("peak_mib", "peak MiB, worst", max, 0),
)

# -- results.csv -------------------------------------------------------------------------------------------------


def read_results(file: Path) -> list[Row]:
    """The rows of results.csv, numbers as numbers and without empty cells; none where there is no file yet."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [
            {name: value if name in WORDS else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(stream)
        ]


def append_result(file: Path, row: Row) -> None:
    """Add one row, below a header line where the file is new."""
    new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


# -- tables ------------------------------------------------------------------------------------------------------


def tools_of(rows: Sequence[Row]) -> list[str]:
    """The start, then the programs in order of appearance."""
    return list(dict.fromkeys([START, *(row["tool"] for row in rows)]))


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row a program: accuracy as means over the cases that all programs finished, the rest over its own."""
    tools = tools_of(rows)
    good = {
        tool: {row["case"]: row for row in rows if row["tool"] == tool and not row.get("error")} for tool in tools
    }
    shared = set.intersection(*(set(cases) for cases in good.values()))
    table = []
    for tool, mine in good.items():
        tried = sum(row["tool"] == tool for row in rows)
        line: Row = {"program": tool, "finished": f"{len(mine)} of {tried}"}
        for name, header, middle, digits in SUMMARY:
            within = shared if name in ACCURACY else set(mine)
            values = [row[name] for case, row in mine.items() if name in row and case in within]
            line |= {header: f"{middle(values):.{digits}f}"} if values else {}
        line["worse than start"] = sum(_worse(row, good[START][case]) for case, row in mine.items())
        table.append(line)
    return table


def _worse(row: Row, start: Row) -> bool:
    return bool(
        row["tre_mean"] > start["tre_mean"] if "tre_mean" in row else row["dice_mean"] < start["dice_mean"]
    )


def by_case(rows: Sequence[Row]) -> list[Row]:
    """One row a case, one column a program: mean TRE where there are points, else mean Dice; the best bold."""
    tools = tools_of(rows)
    table = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = {row["tool"]: row for row in rows if row["case"] == case}
        points = any("tre_mean" in row for row in mine.values())
        metric, better, unit = ("tre_mean", min, " mm") if points else ("dice_mean", max, "")
        values = {tool: row[metric] for tool, row in mine.items() if metric in row}
        texts = {tool: f"{value:.{2 if points else 3}f}{unit}" for tool, value in values.items()}
        if values:
            best = better(values, key=values.__getitem__)
            texts[best] = f"**{texts[best]}**"
        failed = {tool: "failed" for tool, row in mine.items() if row.get("error")}
        table.append({"case": case, **{tool: texts.get(tool, failed.get(tool, "")) for tool in tools}})
    return table


def write_report(out: Path) -> str:
    """Write report.md and plot.png from results.csv and run.json; the text of report.md."""
    from crossmorph.evaluate.tables import markdown

    rows = read_results(out / "results.csv")
    text = f"{conditions(json.loads((out / 'run.json').read_text()))}\n\n"
    text += f"{markdown(summary(rows))}\n{markdown(by_case(rows))}"
    (out / "report.md").write_text(text, encoding="utf-8")
    plot(rows, out / "plot.png")
    return text


def conditions(record: Row) -> str:
    """Command, date, machine and versions in words."""
    versions = ", ".join(f"{name} {version}" for name, version in record["conditions"]["versions"].items())
    where = f"{record['date']}; {record['machine']}; threads: {record['conditions']['threads']}"
    return f"`{record['command']}`\n\n{where}; {versions}."


# -- README ------------------------------------------------------------------------------------------------------


def update_section(page: Path, section: str, text: str) -> None:
    """Replace what stands between ``<!-- begin SECTION -->`` and ``<!-- end SECTION -->`` in a page."""
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    content = page.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"{page} needs one line {begin} and one line {end}")
    head, tail = content.split(begin)[0], content.split(end)[1]
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")


# -- plot --------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], file: Path) -> None:
    """Accuracy, seconds, memory and folding, one row a program, a dot a case and a bar at the median."""
    from matplotlib.figure import Figure

    tools = tools_of(rows)
    panels = [
        (name, title)
        for name, title in (
            ("tre_mean", "mean TRE, mm"),
            ("dice_mean", "mean Dice"),
            ("seconds", "wall time, s"),
            ("peak_mib", "peak memory, MiB"),
            ("fold_percent", "folded voxels, %"),
        )
        if any(name in row for row in rows)
    ]
    size = (3 * len(panels), 1 + 0.4 * len(tools))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (name, title) in zip(axes[0], panels, strict=True):
        for place, tool in enumerate(tools):
            mine = [row for row in rows if row["tool"] == tool and not row.get("error")]
            values = [row[name] for row in mine if name in row]
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
            if values:
                axis.plot(
                    [statistics.median(values)], [place], "|", color="black", markersize=14, markeredgewidth=2
                )
        axis.set_xlabel(title)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(tools)), tools)
    axes[0][0].invert_yaxis()
    figure.savefig(file, dpi=150)
