"""The dual branch with gradient guidance against what its paper compares it with, FLAIR to T1 of other subjects.

python benchmarks/gradient_guidance.py OUT [--steps 1500] [--pairs 26] [--syn 6]

Six subjects of ``nichart`` are trained on (27 ordered pairs, 3 more to choose weights by), the other two are
tested on: pairs among all that touch them. Every method has the same pairs, steps and settings. All begin from
the linear stage of whole heads, and see, as SyN does, the brain and what lies within 4 mm of it. Labels are put
into groups and warped by nearest neighbours onto the T1 at its own 2 mm. OUT keeps trainings, linear maps and
results.csv; started again, it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from learned import HERE, append_rows, by_peer, read_rows, through, timed, train
from nichart import GROUPS, TEST_PAIRS, TRAIN_PAIRS, Brains, evenly, grouped, names
from tables import update_section
from tyro.conf import Positional

from crossmorph import io
from crossmorph.evaluate import label_overlap, label_surface_distances, warp_labels
from crossmorph.image import Labels
from crossmorph.systems.learned import Trained, load_trained
from crossmorph.transform import Affine, Chain, Transform, folding, jacobian_determinant

METHODS = {"vm": "VM", "vm-concat": "VM(concat)", "average": "average", "gated": "gated"}

CONFIG = """network = "{network}"
version = "vm1"
steps = {steps}
rate = 1e-3
schedule = "cosine"
clip = 1.0
precision = "bf16"
validate_every = {every}
similarity = "ssc"
alpha = 0.5
beta = 2.0
gamma = 4.0

[augmentation]
turn_deg = 3
scale = 0.03
shift_mm = 2
bend_mm = 2

[preprocessing]
spacing_mm = {spacing_mm}

[preprocessing.linear]
model = "none"
"""


@dataclass(frozen=True)
class Benchmark:
    """Train, test and tabulate."""

    output: Positional[Path]
    """Folder for trainings and results."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Networks."""

    steps: int = 1500
    """Optimiser steps of each method."""

    spacing_mm: float = 2.0
    """Voxels that the networks see."""

    pairs: int = 26
    """Test pairs, taken evenly from the 26."""

    syn: int = 0
    """Test pairs that SyN (antspyx) registers too."""

    update_readme: bool = False
    """Write the tables into README.md beside this script."""

    def run(self) -> None:
        """All of it."""
        torch.set_num_threads(1)
        brains = Brains(self.output)
        brains.prepare()
        table = brains.table("pairs.csv", brains.labels, TRAIN_PAIRS)
        for method in self.methods:
            self._train(method, table)
        trained = {method: load_trained("gradient-guidance", self.output / method) for method in self.methods}
        done = {(row["fixed"], row["moving"]) for row in read_rows(self.output / "results.csv")}
        pairs = evenly(TEST_PAIRS, self.pairs)
        compared = evenly(pairs, self.syn)
        for fixed, moving in pairs:
            if (str(fixed), str(moving)) not in done:
                rows = self._measured(brains, fixed, moving, trained, (fixed, moving) in compared)
                append_rows(self.output / "results.csv", rows)
        text = self._tables()
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", "gradient-guidance", text)

    def _train(self, method: str, table: Path) -> None:
        every = self.steps // 4
        config = CONFIG.format(network=method, steps=self.steps, every=every, spacing_mm=self.spacing_mm)
        train("gradient-guidance", table, self.output / method, config, self.output / "cache")

    # -- measuring -----------------------------------------------------------------------------------------------

    def _measured(
        self, brains: Brains, a: int, b: int, trained: dict[str, Trained], compared: bool
    ) -> list[dict[str, object]]:
        pair = names(a, b)
        fixed, moving = (brains.brain(name) for name in pair)
        target, source = (grouped(io.read_labels(brains.labels(name))) for name in pair)
        linear, seconds = brains.linear(a, b)
        found: list[tuple[str, Transform, float]] = [
            ("before", Affine.identity(), 0.0),
            ("affine", linear, seconds),
        ]
        for method, ready in trained.items():
            field, seconds = timed(lambda ready=ready: through(ready, fixed, moving, linear))
            found.append((METHODS[method], Chain((field, linear)), seconds))
        if compared:
            files = (brains.stripped(name) for name in pair)
            output = self.output / f"syn-{a}-{b}.h5"
            found.append(("SyN", *by_peer("run_ants.py", *files, output, ["--kind", "multi"])))
        return [
            {"fixed": a, "moving": b, "method": name, "seconds": round(seconds, 3), **row}
            for name, transform, seconds in found
            for row in scores(transform, target, source)
        ]

    # -- tables --------------------------------------------------------------------------------------------------

    def _tables(self) -> str:
        rows = read_rows(self.output / "results.csv")
        pairs = {(row["fixed"], row["moving"]) for row in rows}
        methods = [METHODS[method] for method in self.methods]
        parts = [
            f"`python benchmarks/gradient_guidance.py OUT --methods {' '.join(self.methods)} --steps {self.steps} "
            f"--spacing-mm {self.spacing_mm:g} --pairs {self.pairs} --syn {self.syn}`, "
            f"{time.strftime('%Y-%m-%d')}, one thread, {len(pairs)} pairs"
        ]
        compared = {(r["fixed"], r["moving"]) for r in rows if r["method"] == "SyN"}
        parts.append(table(rows, ["before", "affine", *methods]))
        if compared:
            some = [row for row in rows if (row["fixed"], row["moving"]) in compared]
            parts.append(f"The {len(compared)} pairs that SyN registered too:")
            parts.append(table(some, ["affine", "SyN", *methods]))
        return "\n\n".join(parts)


def scores(transform: Transform, target: Labels, source: Labels) -> Iterator[dict[str, object]]:
    """Dice and average surface distance by group, and the share of voxels of the brain that fold."""
    warped = warp_labels(source, target.grid, transform)
    ids = list(range(1, len(GROUPS) + 1))
    overlaps = label_overlap(target, warped, source, ids=ids)
    distances = label_surface_distances(target, warped, ids, target.grid.affine)
    folds = 100 * folding(jacobian_determinant(transform, target.grid), target.data > 0)
    for name, overlap in zip(GROUPS, overlaps, strict=True):
        asd = distances[overlap.id].average()
        yield {"group": name, "dice": round(overlap.dice, 5), "asd_mm": round(asd, 4), "folding_percent": folds}


def table(rows: list[dict[str, str]], methods: list[str]) -> str:
    """Dice and surface distance by group and in the mean; a row a method."""
    head = ["method", "mean", *GROUPS]
    text = []
    for column, unit, digits in (("dice", "Dice in percent", 1), ("asd_mm", "average surface distance in mm", 2)):
        extra = ["folding %", "seconds"] if column == "dice" else []
        lines = [
            f"{unit}:",
            "",
            f"| {' | '.join(head + extra)} |",
            "| --- |" + " ---: |" * (len(head + extra) - 1),
        ]
        for method in methods:
            some = [row for row in rows if row["method"] == method]

            def mean(name: str, group: str | None = None, some: list[dict[str, str]] = some) -> float:
                return float(np.mean([float(row[name]) for row in some if group in (None, row["group"])]))

            factor = 100 if column == "dice" else 1
            cells = [f"{factor * mean(column, group):.{digits}f}" for group in (None, *GROUPS)]
            cells += [f"{mean('folding_percent'):.3f}", f"{mean('seconds'):.2f}"] if extra else []
            lines.append(f"| {method} | {' | '.join(cells)} |")
        text.append("\n".join(lines))
    return "\n\n".join(text)


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
