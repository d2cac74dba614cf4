"""The brains of ``ixi_train`` in one space: affine to the first subject, in a box around its brain, at 2 mm.

As in LUMIR, scans are stripped to the brain before anything looks at them: to the union of its labels and 4 mm
around. The last ten subjects by id are for testing, all 90 ordered pairs of them; the others are learnt from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from cases import data_folder
from scipy import ndimage

from crossmorph import io
from crossmorph.evaluate import (
    label_centroid_error,
    label_overlap,
    label_surface_distances,
    mean_dice,
    warp_labels,
)
from crossmorph.evaluate.regularity import non_diffeomorphic_volume, voxel_displacement
from crossmorph.image import Image, Labels
from crossmorph.preprocess import onto
from crossmorph.record import Journal
from crossmorph.resample import resample_labels
from crossmorph.settings import Linear
from crossmorph.space import Grid
from crossmorph.systems.linear import align
from crossmorph.transform import Affine, Chain, Transform

BOX = Grid.from_spacing((72, 96, 72), 2.0, center_mm=(4.0, -18.0, 6.0))
"""144 x 192 x 144 mm: the brains of the aligned subjects."""

MARGIN_VOXELS = 2
"""Of what is kept around the labels."""

TESTED = 10
HELD = 3
"""Subjects that the weights are chosen by: the last ones before those for testing."""


@dataclass(frozen=True)
class Brains:
    """The subjects and where their files lie.

    Args:
        folder: for what is prepared: an image, a label map and an affine map a subject.
        learnt: subjects to learn from, the first ones.
    """

    folder: Path
    learnt: int = 50

    @cached_property
    def ids(self) -> list[str]:
        """Of the subjects in use, in order; the last ones are those for testing."""
        found = sorted(path.name.removesuffix("_T1.nii.gz") for path in self.source.glob("*_T1.nii.gz"))
        return found[: min(self.learnt, len(found) - TESTED)] + found[-TESTED:]

    @property
    def source(self) -> Path:
        """The folder of the scans."""
        return data_folder() / "ixi_train"

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Ordered test pairs, fixed first: each subject with the next one, then with the one after that, ..."""
        tested = self.ids[-TESTED:]
        return [(one, tested[(n + step) % TESTED]) for step in range(1, TESTED) for n, one in enumerate(tested)]

    def image(self, subject: str) -> Path:
        """The prepared image."""
        return self.folder / f"{subject}.nii.gz"

    def labels(self, subject: str) -> Path:
        """The prepared label map."""
        return self.folder / f"{subject}_labels.nii.gz"

    def affine(self, subject: str) -> Affine:
        """From the common space to the subject's own."""
        return Affine(np.array(json.loads((self.folder / f"{subject}.json").read_text())))

    def own_labels(self, subject: str) -> Labels:
        """The label map on the subject's own grid."""
        return io.read_labels(self.source / f"{subject}_T1_DLMUSE.nii.gz")

    def brain(self, subject: str) -> Image:
        """The scan on its own grid, 0 away from the brain."""
        scan = io.read(self.source / f"{subject}_T1.nii.gz")
        near = ndimage.binary_dilation(self.own_labels(subject).data.numpy() > 0, iterations=MARGIN_VOXELS)
        return replace(scan, data=scan.data * torch.from_numpy(ndimage.binary_fill_holes(near)))

    def prepare(self, pairs: int) -> None:
        """What is not there yet of the subjects to learn from and of the first test pairs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self.brain(self.ids[0])
        tested = {subject for pair in self.pairs[:pairs] for subject in pair}
        for subject in (*self.ids[:-TESTED], *sorted(tested)):
            if self.labels(subject).is_file():
                continue
            scan = self.brain(subject)
            linear = Affine.identity()
            if subject != self.ids[0]:
                linear = Affine(align(first, scan, Linear(), Journal()))
            (self.folder / f"{subject}.json").write_text(json.dumps(linear.matrix.tolist()))
            io.write(onto(scan, BOX, linear), self.image(subject))
            io.write(resample_labels(self.own_labels(subject), BOX, linear), self.labels(subject))

    def table(self) -> Path:
        """A table of volumes to train on, with those that weights are chosen by."""
        seen = self.ids[:-TESTED]
        lines = ["image,labels,split"]
        for number, subject in enumerate(seen):
            split = "validation" if number >= len(seen) - HELD else "train"
            lines.append(f"{self.image(subject).name},{self.labels(subject).name},{split}")
        path = self.folder / "volumes.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    def between(self, fixed: str, moving: str, field: Transform) -> Transform:
        """A transform of the common space as one from the fixed to the moving subject's own space."""
        return Chain((self.affine(fixed).inverse(), field, self.affine(moving)))


def scores(transform: Transform, fixed: Labels, moving: Labels) -> dict[str, float]:
    """Dice in percent, HD95 and error of the labels' centroids in mm, each the mean over labels on both sides."""
    warped = warp_labels(moving, fixed.grid, transform)
    overlaps = [row for row in label_overlap(fixed, warped, moving) if not np.isnan(row.dice)]
    ids = [row.id for row in overlaps if row.status == "scored"]
    far = label_surface_distances(fixed, warped, ids, fixed.grid.affine)
    apart = label_centroid_error(fixed, warped, fixed.grid, ids)
    return {
        "dice": 100 * mean_dice(overlaps),
        "hd95_mm": float(np.mean([far[n].hausdorff() for n in ids])),
        "tre_mm": float(np.mean(list(apart.values()))),
    }


def folding(field: Transform) -> float:
    """Non-diffeomorphic volume of a transform of the common space, in percent of the box."""
    return non_diffeomorphic_volume(voxel_displacement(field, BOX))[1]
