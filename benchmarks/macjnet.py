"""macJNet on generated trunks, CT-like to MR-like: descriptors, joint or apart, and how many labels it takes.

python benchmarks/macjnet.py OUT [--rows macmind-30 apart-mind-30 ...] [--steps 240]

Pairs are those of ``crossmorph demo`` with other seeds; the exact rigid part of their motion is taken as the
linear stage, so that rows differ in the deformation alone. As in the paper one organ, the liver, is labelled, in a
share of the training pairs; the others judge. OUT keeps trainings and results; started again, it goes on. What is
measured is the state after the last step.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import tyro
from tables import update_section
from tyro.conf import Positional

from crossmorph.evaluate import label_overlap, label_surface_distances
from crossmorph.evaluate.similarity import mutual_information, ssim
from crossmorph.optimise.terms import displaced
from crossmorph.phantom.pair import ORGANS, make_pair
from crossmorph.resample import resample_labels, sample
from crossmorph.settings import Preprocessing
from crossmorph.systems.learned import load_trained, prepared
from crossmorph.train.loop import LAST, STATE, start_fabric
from crossmorph.train.pairs import Data
from crossmorph.train.registration import measured, train_registration
from crossmorph.train.sample import Sample
from crossmorph.train.settings import MacJNetTraining
from crossmorph.transform import Affine

HERE = Path(__file__).resolve().parent
LIVER = 1
TEST, CHOSEN_BY = range(1000, 1008), range(2000, 2002)
WEIGHTS = {"macmind": 20.0, "mind": 6.0, "mi": 0.4}
"""Of the similarity: by MIND and local MI the exact motion of a pair then gains about what it gains by macMIND."""

NUMBERS = {
    "tre_mm": "TRE mm",
    "liver": "liver Dice %",
    "hd95_mm": "liver HD95 mm",
    "others": "other organs Dice %",
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

    rows: tuple[str, ...] = ("macmind-30", "apart-macmind-30", "apart-mind-30", "apart-mi-30", "macmind-100")
    """[apart-]SIMILARITY-SHARE each: macmind, mind or mi, and percent of the pairs with labels."""

    steps: int = 240
    """Of each training."""

    pretrain: int = 160
    """The first of them, with the networks apart."""

    pairs: int = 20
    """Training pairs."""

    shape: tuple[int, int, int] = (32, 32, 32)
    """Voxels along each axis, multiples of 16."""

    spacing_mm: float = 8.5
    """Of a voxel."""

    channels: int = 8
    """Of LapIRN."""

    features: int = 8
    """Of the segmenters."""

    stages: int = 4
    """Of the segmenters."""

    update_readme: bool = False
    """Write the tables into README.md beside this script."""

    def run(self) -> None:
        """All of it."""
        torch.set_num_threads(1)
        self.output.mkdir(parents=True, exist_ok=True)
        found = {"rigid": self._tested(None)}
        for row in self.rows:
            path = self.output / f"{row}.json"
            if not path.is_file():
                path.write_text(json.dumps(self._tested(self._trained(row))))
            found[row] = json.loads(path.read_text())
        text = self._tables(found)
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", "macjnet", text)

    @cache  # noqa: B019  # one object, one run
    def _pair(self, seed: int) -> Sample:
        """A generated pair on the working grid, its rigid motion undone, with labels, landmarks and all."""
        pair = make_pair(self.shape, self.spacing_mm, 15.0, seed)
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = pair.motion.rotation, pair.motion.translation_mm
        rigid = Affine(matrix)
        grid, fixed, moving = prepared(pair.fixed, pair.moving, rigid, self._preprocessing)
        return Sample(
            f"trunk {seed}",
            fixed.values,
            moving.values,
            fixed.valid,
            moving.valid,
            grid,
            matrix,
            resample_labels(pair.fixed_labels, grid).data.int(),
            resample_labels(pair.moving_labels, grid, rigid).data.int(),
            pair.fixed_points.xyz,
            pair.moving_points.xyz,
        )

    @property
    def _preprocessing(self) -> Preprocessing:
        return Preprocessing(spacing_mm=self.spacing_mm, crop=False)

    def _trained(self, row: str) -> Path:
        """The folder of a row's training, gone on with if it was stopped."""
        *apart, similarity, share = row.split("-")
        known = round(self.pairs * float(share) / 100)
        settings = MacJNetTraining(
            preprocessing=self._preprocessing,
            steps=self.steps,
            pretrain=self.pretrain,
            freeze=self.pretrain // 32,
            joint=not apart,
            rate=5e-4,
            segment_rate=5e-4,
            pretrain_rate=2e-3,
            channels=self.channels,
            features=self.features,
            stages=self.stages,
            labels=(LIVER,) if known else (),
            similarity=similarity,  # type: ignore[arg-type]
            similarity_weight=WEIGHTS[similarity],
            validate_every=self.steps // 2,
        )

        def drawn(index: int, generator: torch.Generator) -> Sample:
            pair = self._pair(index)
            return pair if index < known else replace(pair, fixed_labels=None, moving_labels=None)

        ids = tuple(((LIVER,), (LIVER,)) if n < known else ((), ()) for n in range(self.pairs))
        names = tuple(f"trunk {n}" for n in range(self.pairs))
        held = tuple(lambda seed=seed: self._pair(seed) for seed in CHOSEN_BY)
        data = Data(names, tuple(f"trunk {n}" for n in CHOSEN_BY), drawn, held, self.shape, ids)
        folder = self.output / row
        folder.mkdir(exist_ok=True)
        resume = (folder / STATE).is_file()
        train_registration("macjnet", settings, data, folder, start_fabric(), resume=resume, save_seconds=60)
        return folder

    def _tested(self, folder: Path | None) -> list[dict[str, float]]:
        """A row of numbers a test pair; without a folder those of the rigid map."""
        trained = None if folder is None else load_trained("macjnet", folder / LAST)
        found = []
        for seed in TEST:
            pair = self._pair(seed)
            field, seconds, segmented = torch.zeros(3, *pair.fixed.shape), 0.0, {}
            if trained is not None:
                volumes = pair.fixed[None, None], pair.moving[None, None]
                start = time.process_time()
                with torch.inference_mode():
                    field = trained.registration(*volumes)["displacement"][0]
                seconds = time.process_time() - start
                for (side, net), volume in zip(trained.segmenters.items(), volumes, strict=False):
                    with torch.inference_mode():
                        given = net(volume)[0].argmax(0)
                    truth = pair.fixed_labels if side == "fixed" else pair.moving_labels
                    assert truth is not None
                    scores = segmentation_scores(truth, given, pair)
                    segmented |= {f"{side} {name}": value for name, value in scores.items()}
            found.append(registration_scores(pair, field.float().clone()) | {"seconds": seconds} | segmented)
        return found

    def _tables(self, found: dict[str, list[dict[str, float]]]) -> str:
        options = (
            f"--rows {' '.join(self.rows)} --steps {self.steps} --pretrain {self.pretrain} "
            f"--pairs {self.pairs} --shape {' '.join(map(str, self.shape))} "
            f"--spacing-mm {self.spacing_mm:g} --channels {self.channels} --features {self.features} "
            f"--stages {self.stages}"
        )
        lines = [
            f"`python benchmarks/macjnet.py OUT {options}`, {time.strftime('%Y-%m-%d')}, one thread, "
            f"{len(TEST)} test pairs",
            "",
            *table("row", NUMBERS, found, ""),
        ]
        for side, kind in (("fixed", "CT-like"), ("moving", "MR-like")):
            some = {row: numbers for row, numbers in found.items() if f"{side} dice" in numbers[0]}
            lines += ["", *table(f"liver, {kind}", SEGMENTED, some, f"{side} ")]
        return "\n".join(lines)


def registration_scores(pair: Sample, field: torch.Tensor) -> dict[str, float]:
    """Of a displacement in voxels on the grid of a pair."""
    assert pair.fixed_labels is not None
    assert pair.moving_labels is not None
    places = displaced(field)
    warped = sample(pair.moving[None], places)[0]
    labels = sample(pair.moving_labels[None], places, "nearest")[0]
    overlaps = {
        o.id: o.dice for o in label_overlap(pair.fixed_labels, labels, pair.moving_labels, ids=list(ORGANS))
    }
    distances = label_surface_distances(pair.fixed_labels, labels, [LIVER], pair.grid.affine)
    numbers = measured(pair, field)
    seen = (pair.fixed_valid & pair.moving_valid).numpy()
    steps = [torch.stack([field[a].diff(dim=b) for a in range(3)], -1) for b in range(3)]
    inner = [s[: field.shape[1] - 1, : field.shape[2] - 1, : field.shape[3] - 1] for s in steps]
    folds = torch.linalg.det(torch.stack(inner, -1) + torch.eye(3)) <= 0
    return {
        "tre_mm": numbers["tre_mm"],
        "liver": 100 * overlaps[LIVER],
        "hd95_mm": distances[LIVER].hausdorff(),
        "others": 100 * float(np.nanmean([dice for i, dice in overlaps.items() if i != LIVER])),
        "mi": 100 * mutual_information(pair.fixed, warped, seen),
        "ssim": 100 * ssim(pair.fixed, warped, seen),
        "folding": 1000 * float(folds.float().mean()),
    }


def segmentation_scores(truth: torch.Tensor, given: torch.Tensor, pair: Sample) -> dict[str, float]:
    """Of the liver on the grid of a pair."""
    (row,) = label_overlap(truth, given, ids=[LIVER])
    distances = label_surface_distances(truth, given.int(), [LIVER], pair.grid.affine)
    return {
        "dice": 100 * row.dice,
        "hd95_mm": distances[LIVER].hausdorff(),
        "recall": 100 * row.recall,
        "precision": 100 * row.precision,
        "rvd": 100 * abs(row.rvd),
        "voe": 100 * row.voe,
    }


def table(head: str, columns: dict[str, str], found: dict[str, list[dict[str, float]]], prefix: str) -> list[str]:
    """A row a method, mean and deviation over the test pairs in every column."""
    lines = [f"| {head} | {' | '.join(columns.values())} |", "| --- |" + " ---: |" * len(columns)]
    for name, numbers in found.items():
        values = [[pair[prefix + key] for pair in numbers] for key in columns]
        cells = [f"{np.nanmean(some):.2f} ± {np.nanstd(some):.2f}" for some in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
