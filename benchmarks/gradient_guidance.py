"""The dual branch with gradient guidance against what its paper compares it with, FLAIR to T1 of other subjects.

python benchmarks/gradient_guidance.py OUT [--steps 1500] [--pairs 26] [--syn 6]

Six subjects of ``nichart`` are trained on (27 ordered pairs, 3 more to choose weights by), the other two are
tested on: pairs among all that touch them. Every method has the same pairs, steps and settings. All begin from
the linear stage of whole heads, and see, as SyN does, the brain and what lies within 4 mm of it. Labels are put
into groups and warped by nearest neighbours onto the T1 at its own 2 mm. OUT keeps trainings, linear maps and
results.csv; started again, it goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
import tyro
from cases import data_folder
from learned import HERE, append_rows, read_rows, syn, through, timed, train
from scipy.ndimage import binary_dilation
from tables import update_section
from tyro.conf import Positional

from crossmorph import io
from crossmorph.evaluate import label_overlap, label_surface_distances, warp_labels
from crossmorph.image import Labels
from crossmorph.preprocess import masked, onto
from crossmorph.record import Journal
from crossmorph.settings import Linear
from crossmorph.systems.learned import Trained, load_trained
from crossmorph.systems.linear import align
from crossmorph.transform import Affine, Chain, Transform, folding, jacobian_determinant

SUBJECTS = (1, 2, 4, 7, 9, 12, 13, 16)
TEST = {13, 16}
TEST_PAIRS = [pair for pair in permutations(SUBJECTS, 2) if set(pair) & TEST]
CHOSEN_BY = {(1, 2), (9, 4), (12, 7)}
LINEAR_MM = 4.0
"""Voxels that the linear stage sees: mean Dice of 0.606 on the one pair tried, where 2 mm gave 0.599."""

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


def both(*right: int) -> list[int]:
    """Ids of the right hemisphere and those of the left that follow them."""
    return [n for first in right for n in (first, first + 1)]


GROUPS = {
    "ventricles": [4, 11, *both(49, 51)],
    "deep grey": [23, 30, *both(31, 36, 47, 55, 57, 59, 61, 75)],
    "white matter": [*range(81, 96)],
    "frontal": both(104, 112, 118, 120, 124, 136, 140, 142, 146, 150, 152, 162, 164, 178, 182, 186, 190, 192, 204),
    "parietal": both(106, 148, 168, 174, 176, 194, 198),
    "temporal": both(122, 132, 154, 180, 184, 200, 202, 206),
    "occipital": both(108, 114, 128, 134, 144, 156, 160, 196),
    "limbic": both(100, 102, 116, 138, 166, 170, 172),
    "cerebellum": [38, 39, 40, 41, 71, 72, 73],
    "brain stem": [35],
}
"""MUSE regions by structure; the cortex by lobe, the insula with the limbic one."""


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
        data = data_folder() / "nichart"
        (self.output / "brains").mkdir(parents=True, exist_ok=True)
        for subject, kind in product(SUBJECTS, ("T1", "FL")):
            self._extract(data, f"Subj{subject}_{kind}")
        for method in self.methods:
            self._train(method, data)
        trained = {method: load_trained("gradient-guidance", self.output / method) for method in self.methods}
        done = {(row["fixed"], row["moving"]) for row in read_rows(self.output / "results.csv")}
        pairs = evenly(TEST_PAIRS, self.pairs)
        compared = evenly(pairs, self.syn)
        for fixed, moving in pairs:
            if (str(fixed), str(moving)) not in done:
                rows = self._measured(data, fixed, moving, trained, (fixed, moving) in compared)
                append_rows(self.output / "results.csv", rows)
        text = self._tables()
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", "gradient-guidance", text)

    def _train(self, method: str, data: Path) -> None:
        table = self._table(data)
        every = self.steps // 4
        config = CONFIG.format(network=method, steps=self.steps, every=every, spacing_mm=self.spacing_mm)
        train("gradient-guidance", table, self.output / method, config, self.output / "cache")

    def _table(self, data: Path) -> Path:
        """The pairs of six subjects, with masks, labels and linear maps, written once since caches go by times."""
        table = self.output / "pairs.csv"
        lines = ["fixed,moving,fixed_mask,moving_mask,fixed_labels,moving_labels,initial,split"]
        for a, b in permutations(sorted(set(SUBJECTS) - TEST), 2):
            start = self.output / f"linear-{a}-{b}.tfm"
            if not start.is_file():
                io.write(self._linear(data, a, b)[0], start)
            fixed, moving = f"Subj{a}_T1", f"Subj{b}_FL"
            masks = (self.output / "brains" / f"{name}_mask.nii.gz" for name in (fixed, moving))
            files = [data / f"{fixed}.nii.gz", data / f"{moving}.nii.gz", *masks]
            files += [data / f"{fixed}_DLMUSE.nii.gz", data / f"{moving}_DLMUSE.nii.gz", start]
            split = "validation" if (a, b) in CHOSEN_BY else "train"
            lines.append(",".join([*map(str, files), split]))
        table.write_text("\n".join(lines))
        return table

    def _extract(self, data: Path, name: str) -> None:
        """A mask of the brain and what lies within 4 mm of it, and the volume with nothing else in it."""
        folder = self.output / "brains"
        if (folder / f"{name}.nii.gz").is_file():
            return
        labels, image = io.read_labels(data / f"{name}_DLMUSE.nii.gz"), io.read(data / f"{name}.nii.gz")
        reach = max(1, round(4 / float(labels.grid.spacing.mean())))
        mask = torch.from_numpy(binary_dilation(labels.data.numpy() > 0, iterations=reach))
        io.write(Labels(mask.int(), labels.grid), folder / f"{name}_mask.nii.gz")
        inside = masked(image, Labels(mask.int(), labels.grid))
        io.write(replace(inside, data=inside.data * inside.valid), folder / f"{name}.nii.gz")

    # -- measuring -----------------------------------------------------------------------------------------------

    def _measured(
        self, data: Path, a: int, b: int, trained: dict[str, Trained], compared: bool
    ) -> list[dict[str, object]]:
        fixed, moving = (
            masked(io.read(data / f"{name}.nii.gz"), io.read(self.output / "brains" / f"{name}_mask.nii.gz"))
            for name in (f"Subj{a}_T1", f"Subj{b}_FL")
        )
        target, source = (
            grouped(io.read_labels(data / f"Subj{a}_T1_DLMUSE.nii.gz")),
            grouped(io.read_labels(data / f"Subj{b}_FL_DLMUSE.nii.gz")),
        )
        linear, seconds = self._linear(data, a, b)
        found: list[tuple[str, Transform, float]] = [
            ("before", Affine.identity(), 0.0),
            ("affine", linear, seconds),
        ]
        for method, ready in trained.items():
            field, seconds = timed(lambda ready=ready: through(ready, fixed, moving, linear))
            found.append((METHODS[method], Chain((field, linear)), seconds))
        if compared:
            files = (self.output / "brains" / f"Subj{name}.nii.gz" for name in (f"{a}_T1", f"{b}_FL"))
            found.append(("SyN", *syn(*files, self.output / f"syn-{a}-{b}.h5", ["--kind", "multi"])))
        return [
            {"fixed": a, "moving": b, "method": name, "seconds": round(seconds, 3), **row}
            for name, transform, seconds in found
            for row in scores(transform, target, source)
        ]

    def _linear(self, data: Path, a: int, b: int) -> tuple[Affine, float]:
        """The linear map of whole heads at 4 mm and its processor seconds, kept; that of (b, a) is its inverse.

        Starts are searched for from the first subject to each other one. T1 and FLAIR of a subject share a space,
        so these maps chained start all other pairs.
        """
        if a > b:
            opposite, seconds = self._linear(data, b, a)
            return opposite.inverse(), seconds
        path = self.output / f"linear-{a}-{b}.json"
        if not path.is_file():
            heads = [io.read(data / f"{name}.nii.gz") for name in (f"Subj{a}_T1", f"Subj{b}_FL")]
            fixed, moving = (onto(head, head.grid.respaced(LINEAR_MM)) for head in heads)
            settings, start = Linear(), np.eye(4)
            if a != SUBJECTS[0]:
                settings = Linear(search="header")
                start = self._linear(data, SUBJECTS[0], b)[0].matrix @ self._linear(data, a, SUBJECTS[0])[0].matrix
            matrix, seconds = timed(lambda: align(fixed, moving, settings, Journal(), start))
            path.write_text(json.dumps([matrix.tolist(), seconds]))
        matrix, seconds = json.loads(path.read_text())
        return Affine(np.array(matrix)), seconds

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


def evenly(pairs: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """So many of some pairs, taken evenly."""
    return [pairs[n * len(pairs) // count] for n in range(count)]


def grouped(labels: Labels) -> Labels:
    """Labels as numbers of groups, from 1."""
    data = torch.zeros_like(labels.data)
    for number, ids in enumerate(GROUPS.values(), start=1):
        data[torch.isin(labels.data, torch.tensor(ids))] = number
    return Labels(data, labels.grid)


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
