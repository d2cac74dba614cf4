"""macJNet on real brains, FLAIR to T1 of other subjects: joint, apart, and VoxelMorph, beside affine and elastix.

python benchmarks/macjnet_nichart.py OUT [--steps 450] [--pretrain 300] [--labelled 30] [--elastix 6]

Pairs, brains and linear maps are those of ``nichart.py``, the labels its ten groups; some of the training pairs
have them. LapIRN and macJNet are the same until ``pretrain`` steps, LapIRN and its segmenters then go on apart;
VoxelMorph sees no labels. All have the same steps and macMIND, and are measured after the last one. elastix sees
the stripped brains and finds its own linear map. Labels are warped by nearest neighbours onto the T1 at its own
2 mm; similarities and folding are those in the brain. OUT keeps trainings and results; started again, it goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from ixi import scores
from learned import HERE, append_rows, by_peer, read_rows, through, timed, train
from nichart import GROUPS, TEST, TEST_PAIRS, TRAIN_PAIRS, Brains, evenly, names
from tables import update_section
from tyro.conf import Positional

from crossmorph import io
from crossmorph.evaluate import label_overlap, label_surface_distances, mutual_information, ssim
from crossmorph.image import Image, Labels
from crossmorph.resample import resample
from crossmorph.systems.learned import Trained, load_trained, shown
from crossmorph.systems.segment import Side, segmented
from crossmorph.train.loop import LAST
from crossmorph.transform import Affine, Chain, Transform, folding, jacobian_determinant

METHODS = {"vm": "VoxelMorph", "lapirn": "LapIRN", "macjnet": "macJNet"}
SEGMENTING = {"lapirn": "alone", "macjnet": "joint"}
"""Folders of the trainings, and their names in the tables."""

OPTIONS = {
    "vm": 'registration = "vm"\njoint = false',
    "lapirn": "joint = false",
    "macjnet": "joint = true",
}
SHARED = ("steps", "pretrain", "spacing_mm", "channels", "features", "stages", "precision")
CONFIG = """steps = {steps}
pretrain = {pretrain}
freeze = 0
rate = 5e-4
segment_rate = 5e-4
pretrain_rate = 1e-3
precision = "{precision}"
clip = 1.0
validate_every = {every}
channels = {channels}
features = {features}
stages = {stages}
similarity_weight = 0.6
label_weight = 0.06
{options}

[preprocessing]
spacing_mm = {spacing_mm}

[preprocessing.linear]
model = "none"
"""

NUMBERS = {
    "dice": "Dice %",
    "hd95_mm": "HD95 mm",
    "tre_mm": "TRE of centroids mm",
    "mi": "MI %",
    "ssim": "SSIM %",
    "folding": "folding per mille",
    "seconds": "seconds",
}
SEGMENTED = {
    "dice": "Dice %",
    "hd95_mm": "HD95 mm",
    "recall": "recall %",
    "precision": "precision %",
    "rvd": "RVD %",
    "voe": "VOE %",
}


@dataclass(frozen=True)
class Benchmark:
    """Train, test and tabulate."""

    output: Positional[Path]
    """Folder for trainings and results."""

    steps: int = 450
    """Optimiser steps of each method."""

    pretrain: int = 300
    """Those of them in which the networks learn apart."""

    spacing_mm: float = 3.0
    """Voxels that the networks see."""

    channels: int = 28
    """Of LapIRN."""

    features: int = 16
    """Of the segmenters."""

    stages: int = 4
    """Of the segmenters."""

    precision: Literal["32", "bf16", "16"] = "bf16"
    """Arithmetic of the networks while they learn."""

    labelled: int = 30
    """Share of the training pairs that have labels, in percent."""

    pairs: int = 26
    """Test pairs, taken evenly from the 26."""

    elastix: int = 0
    """Those of them that elastix registers too."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; tests run on the processor."""

    train_only: bool = False
    """Stop after the trainings."""

    update_readme: bool = False
    """Write the tables into README.md beside this script."""

    def run(self) -> None:
        """All of it."""
        torch.set_num_threads(1)
        brains = Brains(self.output)
        brains.prepare()
        for method in METHODS:
            self._train(method, brains)
        if self.train_only:
            return
        trained = {method: load_trained("macjnet", self.output / method / LAST) for method in METHODS}
        pairs = evenly(TEST_PAIRS, self.pairs)
        compared = evenly(pairs, self.elastix)
        for pair in pairs:
            self._register(brains, *pair, trained, pair in compared)
        self._segment(brains, trained)
        text = self._tables()
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", "macjnet-nichart", text)

    def _train(self, method: str, brains: Brains) -> None:
        share = 0 if method == "vm" else self.labelled
        labelled = evenly(TRAIN_PAIRS, round(len(TRAIN_PAIRS) * share / 100))
        table = brains.table(f"pairs-{share}.csv", brains.groups, labelled)
        train("macjnet", table, self.output / method, self.config(method), self.output / "cache", self.device)

    def config(self, method: str) -> str:
        """The settings of a training."""
        shared = {name: getattr(self, name) for name in SHARED}
        return CONFIG.format(**shared, every=max(1, self.steps // 3), options=OPTIONS[method])

    # -- measuring -----------------------------------------------------------------------------------------------

    def _register(self, brains: Brains, a: int, b: int, trained: dict[str, Trained], compared: bool) -> None:
        """Add a row for each method that has none yet."""
        path, pair = self.output / "results.csv", names(a, b)
        done = {row["method"] for row in read_rows(path) if (row["fixed"], row["moving"]) == (str(a), str(b))}
        wanted = ["before", "affine", *(["elastix"] if compared else []), *METHODS.values()]
        if set(wanted) <= done:
            return
        fixed, moving = (brains.brain(name) for name in pair)
        target, source = (io.read_labels(brains.groups(name)) for name in pair)
        linear, seconds = brains.linear(a, b)
        found: dict[str, tuple[Transform, float]] = {
            "before": (Affine.identity(), 0.0),
            "affine": (linear, seconds),
        }
        if "elastix" in wanted:
            files, output = map(brains.stripped, pair), self.output / f"elastix-{a}-{b}.h5"
            found["elastix"] = by_peer("run_elastix.py", *files, output, ["--kind", "multi", "--levels", "3"])
        for method, ready in trained.items():
            field, seconds = timed(lambda ready=ready: through(ready, fixed, moving, linear))
            found[METHODS[method]] = Chain((field, linear)), seconds
        for method, (transform, seconds) in found.items():
            if method not in done:
                numbers = scores(transform, target, source) | looks(transform, fixed, moving, target)
                rounded = {name: round(value, 4) for name, value in (numbers | {"seconds": seconds}).items()}
                append_rows(path, [{"fixed": a, "moving": b, "method": method} | rounded])

    def _segment(self, brains: Brains, trained: dict[str, Trained]) -> None:
        """Add a row for each segmentation of a test subject that has none yet."""
        path = self.output / "segmentations.csv"
        done = {(row["method"], row["image"]) for row in read_rows(path)}
        sides: dict[Side, str] = {"fixed": "T1", "moving": "FL"}
        for method, name in SEGMENTING.items():
            for side, kind in sides.items():
                for image in (f"Subj{subject}_{kind}" for subject in sorted(TEST)):
                    if (name, image) not in done:
                        given = segmented(trained[method], brains.brain(image), side)
                        numbers = segmentation_scores(io.read_labels(brains.groups(image)), given)
                        append_rows(path, [{"method": name, "kind": kind, "image": image} | numbers])

    # -- tables --------------------------------------------------------------------------------------------------

    def _tables(self) -> str:
        rows, segments = (read_rows(self.output / f"{name}.csv") for name in ("results", "segmentations"))
        compared = {(row["fixed"], row["moving"]) for row in rows if row["method"] == "elastix"}
        pairs = {(row["fixed"], row["moving"]) for row in rows}
        parts = [
            f"`python benchmarks/macjnet_nichart.py OUT --steps {self.steps} --pretrain {self.pretrain} "
            f"--spacing-mm {self.spacing_mm:g} --channels {self.channels} --features {self.features} --stages "
            f"{self.stages} --precision {self.precision} --labelled {self.labelled} --pairs {self.pairs} "
            f"--elastix {self.elastix}`, {time.strftime('%Y-%m-%d')}, one thread, processor seconds; means and "
            f"standard deviations over {len(pairs)} pairs, of the means over ten groups; segmentations of "
            f"{len(TEST)} subjects",
            table("method", NUMBERS, rows, ["before", "affine", *METHODS.values()]),
        ]
        if compared:
            some = [row for row in rows if (row["fixed"], row["moving"]) in compared]
            parts.append(f"The {len(compared)} pairs that elastix registered too:")
            parts.append(table("method", NUMBERS, some, ["before", "affine", "elastix", *METHODS.values()]))
        for kind, title in (("T1", "T1"), ("FL", "FLAIR")):
            some = [row for row in segments if row["kind"] == kind]
            parts.append(table(f"segmenter, {title}", SEGMENTED, some, list(SEGMENTING.values())))
        return "\n\n".join(parts)


def looks(transform: Transform, fixed: Image, moving: Image, target: Labels) -> dict[str, float]:
    """MI and SSIM of values from 0 to 1, times 100, and the share of voxels that fold, in the brain alone."""
    warped, inside = resample(moving, fixed.grid, transform), fixed.valid & (target.data > 0)
    values, drawn = (shown(image, ()).values for image in (fixed, warped))
    seen = (inside & warped.valid).numpy()
    return {
        "mi": 100 * mutual_information(values, drawn, seen),
        "ssim": 100 * ssim(values, drawn, seen),
        "folding": 1000 * folding(jacobian_determinant(transform, fixed.grid), inside),
    }


def segmentation_scores(truth: Labels, given: Labels) -> dict[str, float]:
    """Means over the groups; HD95 over those that were found."""
    ids = list(range(1, len(GROUPS) + 1))
    rows = label_overlap(truth, given, ids=ids)
    far = np.array([d.hausdorff() for d in label_surface_distances(truth, given, ids, truth.grid.affine).values()])
    ratios = {
        name: 100 * float(np.nanmean([getattr(row, name) for row in rows]))
        for name in ("dice", "recall", "precision", "rvd", "voe")
    }
    return ratios | {"hd95_mm": float(far[np.isfinite(far)].mean())}


def table(head: str, columns: dict[str, str], rows: list[dict[str, str]], methods: list[str]) -> str:
    """A row a method, mean and deviation in every column."""
    lines = [f"| {head} | {' | '.join(columns.values())} |", "| --- |" + " ---: |" * len(columns)]
    for method in methods:
        some = [row for row in rows if row["method"] == method]
        numbers = [np.array([float(row[name]) for row in some]) for name in columns]
        cells = [f"{values.mean():.2f} ± {values.std():.2f}" for values in numbers]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
