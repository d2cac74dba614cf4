"""macJNet on generated trunks, CT-like to MR-like: descriptors, joint or apart, and how many labels it takes.

python benchmarks/macjnet.py OUT [--levels 250] [--pretrain 200] [--steps 30] [--update-readme]

Pairs are those of ``crossmorph demo`` with other seeds, seen in a window of the trunk; the exact rigid part of
their motion is taken as the linear stage, so that rows differ in the deformation alone. As in the paper one organ,
the liver, is labelled, in some of the training pairs. Registration and segmenters learn apart first, once for each
similarity and each number of labelled pairs; every row goes on from there for as many steps. So few steps teach a
registration the pairs that it sees, not new ones: it is judged on those, by landmarks, other organs, and the liver
where it was not labelled; new pairs have a column of their own, and segmentations are of new pairs. OUT keeps
trainings and results; started again, it goes on. What is measured is the state after the last step.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from learned import HERE, PEERS, children_timed, finished, timed
from tables import update_section
from tyro.conf import Positional

from crossmorph import io
from crossmorph.evaluate import label_overlap, label_surface_distances
from crossmorph.evaluate.similarity import mutual_information, ssim
from crossmorph.image import Image
from crossmorph.optimise.terms import displaced
from crossmorph.phantom.pair import ORGANS, make_pair
from crossmorph.resample import resample_labels, sample
from crossmorph.settings import Preprocessing
from crossmorph.systems.learned import load_trained, prepared
from crossmorph.systems.macjnet import JointNetwork, network, turns
from crossmorph.train.loop import LAST, STATE, Task, fit, start_fabric
from crossmorph.train.losses import seen_by_both
from crossmorph.train.registration import measured, seeded
from crossmorph.train.sample import Batch, Sample
from crossmorph.train.settings import MacJNetTraining
from crossmorph.transform import Affine

LIVER = 1
MOTION_MM = 15.0
NEW = range(1000, 1006)
"""Seeds of pairs that no network has seen."""

WEIGHTS = {"mi": 0.04, "mind": 0.2, "macmind": 0.6}
"""Of each similarity: the one by which ``macjnet_loss.py`` meets the landmarks of two other pairs best."""

KNOWN = 30
"""Share of labelled pairs of the main rows, in percent."""

LABEL_WEIGHT = 0.06
"""A tenth of that of macMIND, as published."""

UNTRAINED = ("rigid", "elastix")
METHODS = {
    "rigid": "rigid",
    "elastix": "elastix",
    "VoxelMorph": "vm",
    "LapIRN": "macmind",
    "macJNet": f"macmind-{KNOWN}",
}
COMPARED = {
    "MI": "mi",
    "MIND": "mind",
    "macMIND": "macmind",
    "MI, joint": f"mi-{KNOWN}",
    "MIND, joint": f"mind-{KNOWN}",
    "macMIND, joint": f"macmind-{KNOWN}",
}
LABELLED = {f"{share} %": f"macmind-{share}" if share else "macmind" for share in (0, 5, 10, 30, 100)}
SEGMENTING = {
    "alone": f"labels-{KNOWN}",
    **{f"joint, {name}": f"{name}-{KNOWN}" for name in ("mi", "mind", "macmind")},
}
"""Names in the tables and rows: SIMILARITY without labels, SIMILARITY-N joint with N percent of the pairs labelled
and labels-N segmenters alone."""

NUMBERS = {
    "tre_mm": "TRE mm",
    "new_mm": "TRE mm, new pairs",
    "liver": "liver Dice %",
    "hd95_mm": "liver HD95 mm",
    "centroids_mm": "organ centroids mm",
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

    levels: int = 250
    """Steps of each of the two coarser levels of LapIRN."""

    pretrain: int = 200
    """Steps of the segmenters alone."""

    steps: int = 30
    """Steps that every row takes after its networks learnt apart."""

    last: int = 50
    """Steps of the last level of LapIRN before."""

    vm: int = 120
    """Steps of VoxelMorph, which has no coarse level: about as many processor seconds."""

    pairs: int = 20
    """Training pairs."""

    shape: tuple[int, int, int] = (32, 32, 32)
    """Voxels along each axis, multiples of 16."""

    spacing_mm: float = 4.5
    """Of a voxel."""

    channels: int = 8
    """Of LapIRN."""

    features: int = 4
    """Of the segmenters."""

    stages: int = 4
    """Of the segmenters."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; tests run on the processor."""

    train_only: bool = False
    """Stop after the trainings, as where there is no elastix to compare with."""

    update_readme: bool = False
    """Write the tables into README.md beside this script."""

    def run(self) -> None:
        """All of it; the rows of the first tables first."""
        torch.set_num_threads(1)
        self.output.mkdir(parents=True, exist_ok=True)
        rows = dict.fromkeys(
            [*COMPARED.values(), *SEGMENTING.values(), *reversed(METHODS.values()), *LABELLED.values()]
        )
        if self.train_only:
            for row in rows:
                if row not in UNTRAINED:
                    self._trained(row)
            return
        found = {}
        for row in rows:
            path = self.output / f"{row}.json"
            if not path.is_file():
                path.write_text(json.dumps(self._tested(row)))
            found[row] = json.loads(path.read_text())
        text = self._tables(found)
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", "macjnet", text)

    # -- training ------------------------------------------------------------------------------------------------

    def _settings(self, similarity: str = "macmind", known: int = 0, pretrain: int = 0) -> MacJNetTraining:
        return MacJNetTraining(
            preprocessing=Preprocessing(spacing_mm=self.spacing_mm, crop=False),
            steps=pretrain or self.steps,
            pretrain=pretrain,
            freeze=0,
            rate=5e-4,
            segment_rate=5e-4,
            pretrain_rate=1e-3,
            channels=self.channels,
            features=self.features,
            stages=self.stages,
            labels=(LIVER,) if known else (),
            similarity=similarity,  # type: ignore[arg-type]
            similarity_weight=WEIGHTS[similarity],
        )

    def _trained(self, row: str) -> JointNetwork:
        """The networks of a row after its last step; its weights are all that is needed where they are there."""
        if not finished(self.output / row, self.vm if row == "vm" else self.steps):
            self._train(row)
        trained = load_trained("macjnet", self.output / row / LAST).network
        assert isinstance(trained, JointNetwork)
        return trained

    def _train(self, row: str) -> JointNetwork:
        if row == "vm":
            settings = replace(self._settings(pretrain=self.vm), registration="vm")
            return self._fitted(row, network(settings), settings, 0, ("registration",))
        similarity = row.partition("-")[0]
        known = self._known(row)
        if similarity == "labels":
            begun = self._segmenters(known)
            settings = replace(self._settings(known=known), joint=False)
            return self._fitted(row, begun, settings, known, ("segmentation",))
        start = replace(self._settings(similarity, 0, 4 * self.levels), steps=2 * self.levels + self.last)
        begun = self._fitted(f"begun-{similarity}", network(start), start, 0, ("registration",))
        settings = self._settings(similarity, known)
        if known:
            settings = replace(settings, label_weight=LABEL_WEIGHT)
            begun = JointNetwork(begun.registration, dict(self._segmenters(known).segmenters))
        return self._fitted(row, begun, settings, known, ("registration", "segmentation"))

    def _known(self, row: str) -> int:
        """Labelled pairs of a row."""
        return round(self.pairs * int(row.partition("-")[2] or 0) / 100)

    def _segmenters(self, known: int) -> JointNetwork:
        """Segmenters that have learnt alone."""
        start = self._settings(known=known, pretrain=self.pretrain)
        return self._fitted(f"begun-labels-{known}", network(start), start, known, ("segmentation",))

    def _fitted(
        self, name: str, start: JointNetwork, settings: MacJNetTraining, known: int, parts: tuple[str, ...]
    ) -> JointNetwork:
        """A network after a training that ``parts`` of it take part in, gone on with if it was stopped."""
        torch.manual_seed(settings.seed)
        folder = self.output / name
        folder.mkdir(exist_ok=True)

        @lru_cache(maxsize=2)
        def seen(step: int, labelled: bool) -> Batch:
            among = known if labelled else self.pairs
            epoch, place = divmod(step, among)
            index = int(torch.randperm(among, generator=seeded(settings.seed, epoch))[place])
            pair = self._pair(index)
            pair = pair if index < known else replace(pair, fixed_labels=None, moving_labels=None)
            return Batch.of([pair], self.device)

        task = Task(
            start,
            tuple(turn for turn in turns(start, settings, seen) if turn.name in parts),
            lambda: {"error": 0.0},
            "macjnet",
            {"settings": asdict(settings)},
            {"preprocessing": asdict(settings.preprocessing)},
        )
        resume = (folder / STATE).is_file()
        fabric = start_fabric(self.device)
        fit(task, folder, settings.steps, settings.seed, resume, settings.steps, 10, 60.0, fabric=fabric)
        trained = load_trained("macjnet", folder / LAST).network
        assert isinstance(trained, JointNetwork)
        return trained

    @cache  # noqa: B019  # one object, one run
    def _pair(self, seed: int) -> Sample:
        return generated(self.shape, self.spacing_mm, seed)

    # -- testing -------------------------------------------------------------------------------------------------

    def _tested(self, row: str) -> dict[str, list[float]]:
        """By name, a number for each pair; of the liver where the main rows have no labels."""
        trained = None if row in UNTRAINED else self._trained(row)
        known = self._known(row)
        found: dict[str, list[float]] = {}
        for seed in (*range(self.pairs), *NEW):
            pair, seconds = self._pair(seed), 0.0
            field = torch.zeros(3, *pair.fixed.shape)
            if trained is not None:
                field, seconds = timed(lambda p=pair: displacement_of(trained, p))
            elif row == "elastix" and seed < self.pairs:
                field, seconds = self._elastix(pair)
            scores = registration_scores(pair, field) | {"seconds": seconds}
            if seed >= self.pairs:
                new = trained is not None and bool(trained.segmenters)
                scores = {"new_mm": scores["tre_mm"]} if row != "elastix" else {}
                scores |= segmentation_scores(trained, pair) if new and trained is not None else {}
            elif seed < max(known, self._known(f"-{KNOWN}")):
                scores = {name: value for name, value in scores.items() if name not in ("liver", "hd95_mm")}
            for name, value in scores.items():
                found.setdefault(name, []).append(value)
        return found

    def _elastix(self, pair: Sample) -> tuple[torch.Tensor, float]:
        """The displacement in voxels by B-splines and Mattes' mutual information, and processor seconds."""
        files = [self.output / name for name in ("fixed.nii.gz", "moving.nii.gz", "elastix.h5")]
        for volume, path in zip((pair.fixed, pair.moving), files, strict=False):
            io.write(Image(volume[None], pair.grid, torch.ones_like(volume, dtype=torch.bool)), path)
        alone = {**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
        command = [str(PEERS), str(HERE / "peers" / "run_elastix.py"), *map(str, files), "--start", "header"]
        seconds = children_timed(
            lambda: subprocess.run([*command, "--levels", "3", "--points", "5"], check=True, env=alone)
        )
        world = pair.grid.to_world(torch.from_numpy(np.indices(pair.grid.shape).reshape(3, -1).T.astype(float)))
        there = pair.grid.to_voxel(io.read_transform(files[2])(world)) - pair.grid.to_voxel(world)
        return there.T.reshape(3, *pair.grid.shape).float(), seconds

    def _tables(self, found: dict[str, dict[str, list[float]]]) -> str:
        options = (
            f"--levels {self.levels} --last {self.last} --pretrain {self.pretrain} --steps {self.steps} "
            f"--vm {self.vm} --pairs {self.pairs} --shape {' '.join(map(str, self.shape))} "
            f"--spacing-mm {self.spacing_mm:g} --channels {self.channels} --features {self.features} "
            f"--stages {self.stages}"
        )
        lines = [
            f"`python benchmarks/macjnet.py OUT {options}`, {time.strftime('%Y-%m-%d')}, AMD EPYC, one "
            f"thread of a shared machine, processor seconds; means and standard deviations over "
            f"{self.pairs} pairs; segmentations of {len(NEW)} new pairs"
        ]
        for head, rows in (("method", METHODS), ("similarity", COMPARED), ("labelled pairs", LABELLED)):
            lines += ["", *table(head, NUMBERS, {name: found[row] for name, row in rows.items()}, "")]
        for side, kind in (("fixed", "CT-like"), ("moving", "MR-like")):
            some = {name: found[row] for name, row in SEGMENTING.items()}
            lines += ["", *table(f"segmenter, {kind}", SEGMENTED, some, f"{side} ")]
        return "\n".join(lines)


def generated(shape: tuple[int, int, int], spacing_mm: float, seed: int) -> Sample:
    """A generated pair on the working grid, its rigid motion undone, with labels, landmarks and the exact rest."""
    pair = make_pair(shape, spacing_mm, MOTION_MM, seed)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = pair.motion.rotation, pair.motion.translation_mm
    rigid = Affine(matrix)
    grid, fixed, moving = prepared(
        pair.fixed, pair.moving, rigid, Preprocessing(spacing_mm=spacing_mm, crop=False)
    )
    points = grid.to_world(np.indices(grid.shape, np.float64).reshape(3, -1).T)
    ended = rigid.inverse()(torch.from_numpy(pair.motion.to_moving(points))).numpy()
    truth = (grid.to_voxel(ended) - grid.to_voxel(points)).T.reshape(3, *grid.shape)
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
        torch.from_numpy(truth).float(),
    )


def registration_scores(pair: Sample, field: torch.Tensor) -> dict[str, float]:
    """Of a displacement in voxels on the grid of a pair."""
    assert pair.fixed_labels is not None
    assert pair.moving_labels is not None
    places = displaced(field)
    both = seen_by_both(pair.fixed_valid[None, None], pair.moving_valid[None, None], field[None])[0, 0]
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
        "centroids_mm": centroid_distance(pair.fixed_labels * both, labels * both, pair.grid.spacing),
        "others": 100 * float(np.nanmean([dice for i, dice in overlaps.items() if i != LIVER])),
        "mi": 100 * mutual_information(pair.fixed, warped, seen),
        "ssim": 100 * ssim(pair.fixed, warped, seen),
        "folding": 1000 * float(folds.float().mean()),
    }


def centroid_distance(first: torch.Tensor, second: torch.Tensor, spacing: np.ndarray) -> float:
    """Mean distance in mm of the centroids of the organs that two label maps both show."""
    found = []
    for label in ORGANS:
        places = [(labels == label).nonzero().double() for labels in (first, second)]
        if all(len(place) for place in places):
            apart = (places[0].mean(0) - places[1].mean(0)).numpy() * spacing
            found.append(float(np.linalg.norm(apart)))
    return float(np.mean(found))


def displacement_of(trained: JointNetwork, pair: Sample) -> torch.Tensor:
    """What the registration says of a pair: (3, I, J, K) in voxels."""
    with torch.no_grad():
        outputs = trained.registration(pair.fixed[None, None], pair.moving[None, None])
    field: torch.Tensor = outputs["displacement"][0]
    return field


def segmentation_scores(trained: JointNetwork, pair: Sample) -> dict[str, float]:
    """Of the liver in both images of a pair."""
    found = {}
    sides = (("fixed", pair.fixed, pair.fixed_labels), ("moving", pair.moving, pair.moving_labels))
    for side, volume, truth in sides:
        assert truth is not None
        with torch.no_grad():
            given = trained.segmenters[side](volume[None, None])[0].argmax(0).int()
        (row,) = label_overlap(truth, given, ids=[LIVER])
        distances = label_surface_distances(truth, given, [LIVER], pair.grid.affine)
        found |= {
            f"{side} dice": 100 * row.dice,
            f"{side} hd95_mm": distances[LIVER].hausdorff(),
            f"{side} recall": 100 * row.recall,
            f"{side} precision": 100 * row.precision,
            f"{side} rvd": 100 * abs(row.rvd),
            f"{side} voe": 100 * row.voe,
        }
    return found


def table(head: str, columns: dict[str, str], found: dict[str, dict[str, list[float]]], prefix: str) -> list[str]:
    """A row a method, mean and deviation over the pairs in every column."""
    lines = [f"| {head} | {' | '.join(columns.values())} |", "| --- |" + " ---: |" * len(columns)]
    for name, numbers in found.items():
        some = [numbers.get(prefix + key, []) for key in columns]
        cells = [f"{np.nanmean(values):.2f} ± {np.nanstd(values):.2f}" if values else "" for values in some]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
