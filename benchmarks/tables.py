"""What the measurements say: CSV, Markdown tables, a plot, and sections of benchmarks/README.md."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "case", "kind", "tool", "tre_mean", "tre_median", "tre_p95", "tre_max", "dice_mean", "hd95_mean",
    "labels_lost", "fold_percent", "jacobian_min", "sdlogj", "seconds", "peak_mib", "error",
)  # fmt: skip
WORDS = ("case", "kind", "tool", "error")
START = "start"
"""The row of a case without registration."""


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
    """One row a program: means over its cases, the worst folding and memory, how often it did harm."""
    start = {row["case"]: row for row in rows if row["tool"] == START}
    table = []
    for tool in tools_of(rows):
        mine = [row for row in rows if row["tool"] == tool]
        good = [row for row in mine if not row.get("error")]
        line: Row = {"program": tool, "cases": len(good)}
        line |= {"failed": len(mine) - len(good)}
        for name, header in (("tre_mean", "TRE mm"), ("dice_mean", "Dice"), ("hd95_mean", "HD95 mm")):
            line |= _cell(header, [row[name] for row in good if name in row], statistics.mean)
        line |= {"worse than start": sum(_worse(row, start[row["case"]]) for row in good if row["case"] in start)}
        line |= _cell("folds %, worst", [row["fold_percent"] for row in good if "fold_percent" in row], max)
        line |= _cell("SDlogJ", [row["sdlogj"] for row in good if "sdlogj" in row], statistics.mean)
        line |= _cell("seconds, median", [row["seconds"] for row in good if "seconds" in row], statistics.median)
        line |= _cell("peak MiB", [row["peak_mib"] for row in good if "peak_mib" in row], max)
        table.append(line)
    return table


def _cell(header: str, values: Sequence[float], of: Any) -> Row:
    digits = 0 if header == "peak MiB" else 3 if header in ("Dice", "SDlogJ", "folds %, worst") else 2
    return {header: f"{of(values):.{digits}f}"} if values else {}


def _worse(row: Row, start: Row) -> bool:
    if "tre_mean" in row:
        return bool(row["tre_mean"] > start["tre_mean"])
    return bool(row["dice_mean"] < start["dice_mean"])


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
    threads = record["conditions"]["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"`{record['command']}`\n\n{record['date']}; {record['machine']}; {threads} threads; {versions}."


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(3 * len(panels), 1 + 0.4 * len(tools)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, (name, title) in zip(axes[0], panels, strict=True):
        for place, tool in enumerate(tools):
            values = [row[name] for row in rows if row["tool"] == tool and name in row]
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
    pyplot.close(figure)
