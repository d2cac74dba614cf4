"""How far away a start may be: the share of random rigid starts that end within 3 mm, by initial error.

python benchmarks/capture.py -o capture.csv --starts 50

After Table 3 of the DISA paper. A pair with a known pose is disturbed by random rigid maps, drawn so that each bin
of initial error (mean distance of the body's points from where they belong) gets the same number. ``local``
methods run BFGS from there; ``global`` ones rank the paper's 500 random poses around the start and run BFGS from
the best ten; ``auto`` is what `crossmorph register --linear rigid` does. MIND-SSC and LC2 are evaluated on voxels
of about 4.4 mm, DISA on descriptors every four voxels of about 2.2 mm.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from cases import data_folder
from tables import Row, update_section
from tyro.conf import arg

if TYPE_CHECKING:
    from crossmorph.optimise.linear import Problem

BEST = 10
"""Starts of a global search from which BFGS runs; the paper runs it from all 500."""

BINS = (0, 25, 50, 75, 100)
CONVERGED_MM = 3.0
PAIRS = {
    "T1-T2": ("ms_mni/p07_T1.nii.gz", "ms_mni/p07_T2.nii.gz", ""),
    "T1-FLAIR": ("ms_mni/p07_T1.nii.gz", "ms_mni/p07_FLAIR.nii.gz", ""),
    "FLAIR-T1W, two sessions": (
        "ms_longitudinal/p01/study1_FLAIR.nii.gz",
        "ms_longitudinal/p01/study2_T1W.nii.gz",
        "points_ms_p01_T1W_s2_to_FLAIR_s1.csv",
    ),
}
"""Fixed, moving, and matching points; none where both are co-registered."""

Matrix = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Capture:
    """Measure capture ranges."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """CSV to write: a row a start and method."""

    starts: int = 50
    """Random starts in each bin and pair."""

    methods: tuple[str, ...] = ("mind local", "mind global", "disa local", "disa global", "lc2 local", "auto")
    """Which methods."""

    pairs: tuple[str, ...] = tuple(PAIRS)
    """Which pairs."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace by the table."""

    def run(self) -> None:
        """Measure, write the CSV, print the table."""
        from crossmorph.evaluate.tables import markdown, write_rows

        rows: list[Row] = []
        for name in self.pairs:
            pair = Pair(data_folder(), *PAIRS[name])
            for number, (error, start) in enumerate(pair.disturbed(self.starts)):
                for method in self.methods:
                    begin = time.perf_counter()
                    found, evaluations = pair.solved(method, start, number)
                    seconds = time.perf_counter() - begin
                    row = {"pair": name, "method": method, "start_mm": error, "end_mm": pair.error(found)}
                    rows.append({**row, "seconds": seconds, "evaluations": evaluations})
            write_rows(rows, self.output)
        text = markdown(table(rows))
        print(text)
        if self.update_readme:
            words = f"--starts {self.starts} --methods {' '.join(repr(m) for m in self.methods)}"
            command = f"`python benchmarks/capture.py {words}`, {time.strftime('%Y-%m-%d')}"
            update_section(Path(__file__).with_name("README.md"), self.update_readme, f"{command}\n\n{text}")


class Pair:
    """Two images with a known pose between them."""

    def __init__(self, data: Path, fixed: str, moving: str, points: str) -> None:
        from crossmorph import io
        from crossmorph.match.pose import trimmed_fit
        from crossmorph.match.view import COARSE_VOXELS, FINE_VOXELS, views

        self.fixed, self.moving = io.read(data / fixed), io.read(data / moving)
        self.views = views(self.fixed, self.moving, COARSE_VOXELS)
        self.fine = views(self.fixed, self.moving, FINE_VOXELS)
        self.problems: dict[str, Problem] = {}
        self.truth: Matrix = np.eye(4)
        if points:
            here, there = io.read_point_pairs(data / "ms_longitudinal/p01" / points)
            self.truth = trimmed_fit(here.xyz.numpy(), there.xyz.numpy(), "rigid", keep=1.0)
        self.places = self.views[0].points()[::50]

    def error(self, matrix: Matrix) -> float:
        """Mean distance in mm, over the fixed body, from the known pose."""
        difference = matrix - self.truth
        return float(np.linalg.norm(self.places @ difference[:3, :3].T + difference[:3, 3], axis=1).mean())

    def disturbed(self, count: int) -> list[tuple[float, Matrix]]:
        """Poses with their errors, ``count`` in every bin."""
        from crossmorph.match.start import random_starts

        found: dict[int, list[tuple[float, Matrix]]] = {n: [] for n in range(len(BINS) - 1)}
        seed = 0
        while min(map(len, found.values())) < count:
            reach = (seed % 20 + 1) / 20
            for start in random_starts(self.views[0], self.truth, 20, 60 * reach, 70 * reach, seed):
                error = self.error(start.matrix)
                place = int(np.searchsorted(BINS, error)) - 1
                if place in found and len(found[place]) < count:
                    found[place].append((error, start.matrix))
            seed += 1
        return [item for items in found.values() for item in items]

    def solved(self, method: str, start: Matrix, seed: int) -> tuple[Matrix, int]:
        """The pose found, and how often the objective was evaluated (0: not counted)."""
        from crossmorph.match.start import random_starts
        from crossmorph.optimise.linear import fit

        if method == "auto":
            return self._automatic(start), 0
        name, reach = method.split()
        if reach == "local":
            found = fit([self._problem(name, start)], "rigid")
            return start @ found.matrix, found.evaluations
        begins = [start] + [s.matrix for s in random_starts(self.views[0], start, 500, 40, 100, seed)]
        problem = self._problem(name, start)
        values = [value(problem, np.linalg.inv(start) @ begin) for begin in begins]
        fits = [(begins[n], fit([self._problem(name, begins[n])], "rigid")) for n in np.argsort(values)[:BEST]]
        begin, best = min(fits, key=lambda pair: pair[1].value)
        return begin @ best.matrix, len(values) + sum(found.evaluations for _, found in fits)

    def _problem(self, name: str, pose: Matrix) -> Problem:
        """The objective at a pose; what does not depend on the pose is worked out once."""
        from crossmorph.optimise.objectives import OBJECTIVES

        views = self.fine if name == "disa" else self.views
        if name == "mind":
            return OBJECTIVES[name](*views, pose)
        if name not in self.problems:
            self.problems[name] = OBJECTIVES[name](*views, np.eye(4))
        problem = self.problems[name]
        return replace(problem, to_voxels=problem.to_voxels @ pose)

    def _automatic(self, start: Matrix) -> Matrix:
        from crossmorph.record import Journal
        from crossmorph.settings import Linear
        from crossmorph.systems.linear import align

        return align(self.fixed, self.moving, Linear(model="rigid"), Journal(), start)


def value(problem: Problem, matrix: Matrix) -> float:
    """The objective with a map of fixed points before its start."""
    from crossmorph.kernels.linear import seen

    voxels = (problem.to_voxels @ matrix @ problem.from_voxels)[:3]
    return problem.similarity(*seen(problem.features, problem.known, voxels, problem.mask))[0]


def table(rows: list[Row]) -> list[Row]:
    """A row a method: percent converged in each bin, median seconds and mean evaluations."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        line: Row = {"method": method}
        for low, high in pairwise(BINS):
            ends = [row["end_mm"] for row in mine if low < row["start_mm"] <= high]
            line[f"{low}-{high} mm, %"] = round(100 * float(np.mean(np.asarray(ends) < CONVERGED_MM)), 1)
        line["median end, mm"] = round(float(np.median([row["end_mm"] for row in mine])), 2)
        line["seconds, median"] = round(float(np.median([row["seconds"] for row in mine])), 2)
        line["evaluations, mean"] = round(float(np.mean([row["evaluations"] for row in mine])))
        lines.append(line)
    return lines


if __name__ == "__main__":
    tyro.cli(Capture, description=__doc__).run()
