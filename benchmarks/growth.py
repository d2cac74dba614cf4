"""Seconds and memory as the volume grows, from 64^3 to 384^3 voxels of one and the same field of view.

python benchmarks/growth.py -o growth.csv

A cube of 128 mm of the two T1 of brain_1mm is drawn in finer and finer voxels. Each size is registered by a
process of its own. The slope is that of a line through log(seconds) over log(voxels); the processor's seconds
count, which other programs on the machine change less than the clock's. What the CSV holds is not measured again.
"""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from cases import data_folder
from peers import machine, run_measured, versions
from tables import Row, update_section
from tyro.conf import arg

HERE = Path(__file__).resolve().parent
EDGE_MM = 128.0
COLUMNS = ("edge", "voxels", "seconds", "processor_seconds", "peak_mib", "planned_mib", "error")


@dataclass(frozen=True)
class Growth:
    """Register one pair in growing sizes."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """CSV to write; the plot goes beside it."""

    edges: tuple[int, ...] = (64, 96, 128, 192, 256, 384)
    """Voxels along each axis."""

    preset: str = "convexadam"
    """Of crossmorph."""

    memory: str = ""
    """Limit for register --memory."""

    threads: int = 1
    """Threads of each run."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace."""

    def run(self) -> None:
        """Measure what is missing, write the CSV and the plot, print the table."""
        rows = read(self.output)
        for edge in self.edges:
            if edge not in {int(row["edge"]) for row in rows}:
                rows.append(self.measured(edge))
                write(rows, self.output)
                print(rows[-1], flush=True)
        text = f"{self.conditions()}\n\n{report(rows)}"
        print(text)
        plot(rows, self.output.with_suffix(".png"))
        if self.update_readme:
            update_section(HERE / "README.md", self.update_readme, text)

    def measured(self, edge: int) -> Row:
        """One row: a registration of edge^3 voxels."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = [str(file) for file in drawn(edge, folder)]
            program = str(Path(sys.executable).with_name("crossmorph"))
            command = [program, "register", *files, "-o", str(folder / "out"), "--preset", self.preset, "--quiet"]
            command += ["--memory", self.memory] if self.memory else []
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            code, seconds, peak = run_measured(command, folder / "log.txt", self.threads)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            row: Row = {"edge": edge, "voxels": edge**3, "seconds": seconds, "processor_seconds": busy}
            row["peak_mib"] = peak
            record = folder / "out" / "record.json"
            if not record.is_file():
                return row | {"error": f"exit code {code}: {(folder / 'log.txt').read_text()[-200:]}"}
            planned = json.loads(record.read_text())["choices"]["memory"]["planned_gib"]
            return row | {"planned_mib": 1024 * planned}

    def conditions(self) -> str:
        """Command, date, machine and versions."""
        words = f"--preset {self.preset}{f' --memory {self.memory}' if self.memory else ''}"
        words += f" --edges {' '.join(map(str, self.edges))}"
        found = versions(Path(sys.executable), ())
        said = ", ".join(f"{name} {version}" for name, version in found.items())
        when = time.strftime("%Y-%m-%d")
        return f"`python benchmarks/growth.py {words}`\n\n{when}; {machine()}; threads: {self.threads}; {said}."


def drawn(edge: int, folder: Path) -> list[Path]:
    """The pair in edge^3 voxels; in a process of its own, whose memory does not count as that of a run."""
    files = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
    process = os.fork()
    if process == 0:
        draw(edge, files)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if status:
        sys.exit(f"could not draw the pair in {edge}^3 voxels")
    return files


def draw(edge: int, files: Sequence[Path]) -> None:
    """Write the pair in edge^3 voxels, as whole numbers."""
    from dataclasses import replace

    import numpy as np

    from crossmorph import io
    from crossmorph.preprocess import onto
    from crossmorph.space import Grid

    sources = [data_folder() / "brain_1mm" / f"{name}_T1.nii.gz" for name in ("subject_1", "test_scan")]
    affine = np.diag([EDGE_MM / edge] * 3 + [1.0])
    affine[:3, 3] = io.read(sources[0]).grid.center - EDGE_MM / 2 + EDGE_MM / edge / 2
    for source, file in zip(sources, files, strict=True):
        image = onto(io.read(source), Grid((edge, edge, edge), affine))
        io.write(replace(image, data=image.data.round(), dtype=np.dtype(np.int16)), file)


def slope(rows: Sequence[Row]) -> float:
    """Of a line through log(seconds) over log(voxels)."""
    x, y = ([math.log(float(row[name])) for row in rows] for name in ("voxels", "processor_seconds"))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return product / sum((a - mean_x) ** 2 for a in x)


def report(rows: Sequence[Row]) -> str:
    """A table, and the slopes over all sizes and over the three largest."""
    from crossmorph.evaluate.tables import markdown

    table = [
        {
            "voxels": f"{int(row['edge'])}^3",
            "seconds": f"{float(row['seconds']):.1f}",
            "processor seconds": f"{float(row['processor_seconds']):.1f}",
            "peak MiB": f"{float(row['peak_mib']):.0f}",
            "planned MiB": f"{float(row['planned_mib']):.0f}" if row.get("planned_mib") else row["error"],
        }
        for row in rows
    ]
    good = [row for row in rows if row.get("planned_mib")]
    if len(good) < 2:
        return markdown(table)
    largest = good[-3:]
    words = f"Slope of the seconds: {slope(good):.2f} over all sizes, {slope(largest):.2f} over the largest three."
    return f"{markdown(table)}\n{words}"


def plot(rows: Sequence[Row], file: Path) -> None:
    """Seconds and memory over voxels, logarithmic."""
    from matplotlib.figure import Figure

    good = [row for row in rows if row.get("planned_mib")]
    voxels = [float(row["voxels"]) for row in good]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    seconds = [float(row["processor_seconds"]) for row in good]
    time_axis.loglog(voxels, seconds, "o-", color="tab:blue", label="measured")
    line = [seconds[-1] * n / voxels[-1] for n in voxels] if good else []
    time_axis.loglog(voxels, line, ":", color="gray", label="slope 1")
    time_axis.set_ylabel("processor seconds")
    for name, style in (("peak_mib", "o-"), ("planned_mib", "x--")):
        memory_axis.loglog(voxels, [float(row[name]) for row in good], style, label=name.removesuffix("_mib"))
    memory_axis.set_ylabel("MiB")
    for axis in (time_axis, memory_axis):
        axis.set_xlabel("voxels")
        axis.grid(which="both", alpha=0.2)
        axis.legend()
    figure.savefig(file, dpi=150)


def read(file: Path) -> list[Row]:
    """Rows measured before."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write(rows: Sequence[Row], file: Path) -> None:
    """All rows, by size."""
    rows = sorted(rows, key=lambda row: int(row["edge"]))
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    tyro.cli(Growth, description=__doc__).run()
