"""macJNet on generated trunks, CT-like to MR-like: descriptors, joint or apart, and how many labels it takes.

python benchmarks/macjnet.py OUT [--levels 400] [--pretrain 100] [--steps 40] [--update-readme]

Pairs are those of ``crossmorph demo`` with other seeds, seen in a window of the trunk; the exact rigid part of their
motion is taken as the linear stage, so that rows differ in the deformation alone. As in the paper one organ, the
liver, is labelled, in a share of the training pairs; the others judge. Registration and segmenters learn apart first,
once for each similarity and each share; every row goes on from there for as many steps. OUT keeps trainings and
results; started again, it goes on. What is measured is the state after the last step.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import tyro
from learned import HERE, PEERS, children_timed, timed
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
from crossmorph.train.loop import LAST, STATE, Task, fit
from crossmorph.train.losses import seen_by_both
from crossmorph.train.registration import measured, seeded
from crossmorph.train.sample import Batch, Sample
from crossmorph.train.settings import MacJNetTraining
from crossmorph.transform import Affine

LIVER = 1
MOTION_MM = 15.0
TEST = range(1000, 1006)
WEIGHTS = {"mi": 0.04, "mind": 0.2, "macmind": 0.6}
"""Of each similarity: the one by which ``macjnet_loss.py`` meets the landmarks of two other pairs best."""

METHODS = {
    "rigid": "rigid",
    "elastix": "elastix",
    "VoxelMorph": "vm",
    "LapIRN": "macmind",
    "macJNet": "macmind-30",
}
COMPARED = {
    "MI": "mi",
    "MIND": "mind",
    "macMIND": "macmind",
    "MI, joint": "mi-30",
    "MIND, joint": "mind-30",
    "macMIND, joint": "macmind-30",
}
SHARES = {f"{share} %": f"macmind-{share}" if share else "macmind" for share in (0, 5, 10, 30, 100)}
SEGMENTING = {"alone": "labels-30", **{f"joint, {name}": f"{name}-30" for name in ("mi", "mind", "macmind")}}
"""Names in the tables and rows: SIMILARITY without labels, SIMILARITY-SHARE joint, labels-SHARE segmenters alone."""

NUMBERS = {
    "tre_mm": "TRE mm",
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

    levels: int = 400
    """Steps of each of the two coarser levels of LapIRN."""

    pretrain: int = 100
    """Steps of the segmenters alone."""

    steps: int = 40
    """Steps of LapIRN's last level, and again those that every row takes after that."""

    vm: int = 260
    """Steps of VoxelMorph, which has no coarse level: about as many processor seconds."""

    pairs: int = 20
    """Training pairs."""

    shape: tuple[int, int, int] = (32, 32, 32)
    """Voxels along each axis, multiples of 16."""

    spacing_mm: float = 4.5
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
        """All of it; the rows of the first tables first."""
        torch.set_num_threads(1)
        self.output.mkdir(parents=True, exist_ok=True)
        found = {}
        for row in dict.fromkeys([*COMPARED.values(), *SEGMENTING.values(), *METHODS.values(), *SHARES.values()]):
            path = self.output / f"{row}.json"
            if not path.is_file():
                path.write_text(json.dumps(self._tested(row)))
            found[row] = json.loads(path.read_text())
        text = self._tables(found)
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", "macjnet", text)

    # -- training ------------------------------------------------------------------------------------------------

    def _settings(self, similarity: str = "macmind", share: int = 0, pretrain: int = 0) -> MacJNetTraining:
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
            labels=(LIVER,) if share else (),
            similarity=similarity,  # type: ignore[arg-type]
            similarity_weight=WEIGHTS[similarity],
        )

    def _trained(self, row: str) -> JointNetwork:
        """The networks of a row after its last step."""
        if row == "vm":
            settings = replace(self._settings(pretrain=self.vm), registration="vm")
            return self._fitted(row, network(settings), settings, 0, ("registration",))
        similarity, _, share = row.partition("-")
        known = round(self.pairs * int(share or 0) / 100)
        if similarity == "labels":
            begun = self._segmenters(int(share), known)
            settings = replace(self._settings(share=int(share)), joint=False)
            return self._fitted(row, begun, settings, known, ("segmentation",))
        start = replace(self._settings(similarity, 0, 4 * self.levels), steps=2 * self.levels + self.steps)
        begun = self._fitted(f"begun-{similarity}", network(start), start, 0, ("registration",))
        if known:
            begun = JointNetwork(begun.registration, dict(self._segmenters(int(share), known).segmenters))
        settings = self._settings(similarity, int(share or 0))
        return self._fitted(row, begun, settings, known, ("registration", "segmentation"))

    def _segmenters(self, share: int, known: int) -> JointNetwork:
        """Segmenters that have learnt alone."""
        start = self._settings(share=share, pretrain=self.pretrain)
        return self._fitted(f"begun-labels-{share}", network(start), start, known, ("segmentation",))

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
            return Batch.of([pair if index < known else replace(pair, fixed_labels=None, moving_labels=None)])

        task = Task(
            start,
            tuple(turn for turn in turns(start, settings, seen) if turn.name in parts),
            lambda: {"error": 0.0},
            "macjnet",
            {"settings": asdict(settings)},
            {"preprocessing": asdict(settings.preprocessing)},
        )
        resume = (folder / STATE).is_file()
        fit(task, folder, settings.steps, settings.seed, resume, settings.steps, 10, save_seconds=60)
        trained = load_trained("macjnet", folder / LAST).network
        assert isinstance(trained, JointNetwork)
        return trained

    @cache  # noqa: B019  # one object, one run
    def _pair(self, seed: int) -> Sample:
        return generated(self.shape, self.spacing_mm, seed)

    # -- testing -------------------------------------------------------------------------------------------------

    def _tested(self, row: str) -> list[dict[str, float]]:
        """A row of numbers for each test pair."""
        trained = None if row in ("rigid", "elastix") else self._trained(row)
        found = []
        for seed in TEST:
            pair = self._pair(seed)
            field, seconds, segmented = torch.zeros(3, *pair.fixed.shape), 0.0, {}
            if row == "elastix":
                field, seconds = self._elastix(pair)
            if trained is not None:
                volumes = pair.fixed[None, None], pair.moving[None, None]
                with torch.inference_mode():
                    outputs, seconds = timed(lambda v=volumes: trained.registration(*v))
                field = outputs["displacement"][0].float().clone()
                for (side, net), volume in zip(trained.segmenters.items(), volumes, strict=False):
                    with torch.inference_mode():
                        given = net(volume)[0].argmax(0)
                    truth = pair.fixed_labels if side == "fixed" else pair.moving_labels
                    assert truth is not None
                    scores = segmentation_scores(truth, given, pair)
                    segmented |= {f"{side} {name}": value for name, value in scores.items()}
            found.append(registration_scores(pair, field) | {"seconds": seconds} | segmented)
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

    def _tables(self, found: dict[str, list[dict[str, float]]]) -> str:
        options = (
            f"--levels {self.levels} --pretrain {self.pretrain} --steps {self.steps} --vm {self.vm} --pairs {self.pairs} "
            f"--shape {' '.join(map(str, self.shape))} --spacing-mm {self.spacing_mm:g} "
            f"--channels {self.channels} --features {self.features} --stages {self.stages}"
        )
        lines = [
            f"`python benchmarks/macjnet.py OUT {options}`, {time.strftime('%Y-%m-%d')}, AMD EPYC, one thread of a "
            f"shared machine, processor seconds; means and standard deviations over {len(TEST)} test pairs"
        ]
        for head, rows in (("method", METHODS), ("similarity", COMPARED), ("labelled", SHARES)):
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
