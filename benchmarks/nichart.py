"""FLAIR to T1 of other subjects of ``nichart``: brains, linear maps, grouped labels, and who is tested.

Six subjects are learnt from (27 ordered pairs, 3 more to validate on), the other two are tested on: pairs among
all that touch them. Networks see the brain and what lies within 4 mm of it, behind the linear map of whole heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations, product
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from cases import data_folder
from learned import timed
from scipy.ndimage import binary_dilation

from crossmorph import io
from crossmorph.image import Image, Labels
from crossmorph.preprocess import masked, onto
from crossmorph.record import Journal
from crossmorph.settings import Linear
from crossmorph.systems.linear import align
from crossmorph.transform import Affine

SUBJECTS = (1, 2, 4, 7, 9, 12, 13, 16)
TEST = {13, 16}
TEST_PAIRS = [pair for pair in permutations(SUBJECTS, 2) if set(pair) & TEST]
CHOSEN_BY = {(1, 2), (9, 4), (12, 7)}
"""Pairs to validate on."""

TRAIN_PAIRS = [pair for pair in permutations(sorted(set(SUBJECTS) - TEST), 2) if pair not in CHOSEN_BY]
LINEAR_MM = 4.0
"""Voxels that the linear stage sees: mean Dice of 0.606 on the one pair tried, where 2 mm gave 0.599."""

MARGIN_MM = 4.0
"""Of what is kept around the labels."""

T = TypeVar("T")


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
class Brains:
    """The subjects and where their files lie; pairs are of the T1 of one and the FLAIR of another.

    Args:
        folder: for linear maps and tables, and in ``brains`` masks, label maps and stripped volumes.
    """

    folder: Path

    @cached_property
    def source(self) -> Path:
        """The folder of the scans."""
        return data_folder() / "nichart"

    def scan(self, name: str) -> Path:
        """A whole head."""
        return self.source / f"{name}.nii.gz"

    def labels(self, name: str) -> Path:
        """Its MUSE regions."""
        return self.source / f"{name}_DLMUSE.nii.gz"

    def stripped(self, name: str) -> Path:
        """The volume with nothing but the brain in it."""
        return self.folder / "brains" / f"{name}.nii.gz"

    def mask(self, name: str) -> Path:
        """Where that is."""
        return self.folder / "brains" / f"{name}_mask.nii.gz"

    def groups(self, name: str) -> Path:
        """Regions by group; written where they are not there."""
        path = self.folder / "brains" / f"{name}_groups.nii.gz"
        if not path.is_file():
            io.write(grouped(io.read_labels(self.labels(name))), path)
        return path

    def brain(self, name: str) -> Image:
        """A scan whose valid voxels are those of the brain."""
        return masked(io.read(self.scan(name)), io.read(self.mask(name)))

    def prepare(self) -> None:
        """Masks and stripped volumes that are not there yet."""
        (self.folder / "brains").mkdir(parents=True, exist_ok=True)
        for subject, kind in product(SUBJECTS, ("T1", "FL")):
            name = f"Subj{subject}_{kind}"
            if self.stripped(name).is_file():
                continue
            labels, image = io.read_labels(self.labels(name)), io.read(self.scan(name))
            reach = max(1, round(MARGIN_MM / float(labels.grid.spacing.mean())))
            near = torch.from_numpy(binary_dilation(labels.data.numpy() > 0, iterations=reach))
            mask = Labels(near.int(), labels.grid)
            io.write(mask, self.mask(name))
            inside = masked(image, mask)
            io.write(replace(inside, data=inside.data * inside.valid), self.stripped(name))

    def linear(self, a: int, b: int) -> tuple[Affine, float]:
        """The linear map of whole heads at 4 mm and its processor seconds, kept; that of (b, a) is its inverse.

        Starts are searched for from the first subject to each other one. T1 and FLAIR of a subject share a space,
        so these maps chained start all other pairs.
        """
        if a > b:
            opposite, seconds = self.linear(b, a)
            return opposite.inverse(), seconds
        path = self.folder / f"linear-{a}-{b}.json"
        if not path.is_file():
            heads = [io.read(self.scan(name)) for name in names(a, b)]
            fixed, moving = (onto(head, head.grid.respaced(LINEAR_MM)) for head in heads)
            settings, start = Linear(), np.eye(4)
            if a != SUBJECTS[0]:
                settings = Linear(search="header")
                start = self.linear(SUBJECTS[0], b)[0].matrix @ self.linear(a, SUBJECTS[0])[0].matrix
            matrix, seconds = timed(lambda: align(fixed, moving, settings, Journal(), start))
            path.write_text(json.dumps([matrix.tolist(), seconds]))
        matrix, seconds = json.loads(path.read_text())
        return Affine(np.array(matrix)), seconds

    def table(self, file: str, labels: Callable[[str], Path], labelled: Sequence[tuple[int, int]]) -> Path:
        """The pairs to learn from and to validate on, with masks and linear maps; labels of some of the former.

        Maps are written once, since caches go by times.
        """
        lines = ["fixed,moving,fixed_mask,moving_mask,fixed_labels,moving_labels,initial,split"]
        for a, b in permutations(sorted(set(SUBJECTS) - TEST), 2):
            fixed, moving = names(a, b)
            start = self.folder / f"linear-{a}-{b}.lta"
            if not start.is_file():
                grids = [io.read(self.scan(name)).grid for name in (fixed, moving)]
                io.write(replace(self.linear(a, b)[0], fixed_grid=grids[0], moving_grid=grids[1]), start)
            held = (a, b) in CHOSEN_BY
            maps = [labels(fixed), labels(moving)] if held or (a, b) in labelled else ["", ""]
            files = [self.scan(fixed), self.scan(moving), self.mask(fixed), self.mask(moving), *maps, start]
            paths = [str(Path(file).absolute()) if file else "" for file in files]  # tables name files beside them
            lines.append(",".join([*paths, "validation" if held else "train"]))
        path = self.folder / file
        path.write_text("\n".join(lines))
        return path


def names(a: int, b: int) -> tuple[str, str]:
    """Of the T1 of one subject and the FLAIR of another."""
    return f"Subj{a}_T1", f"Subj{b}_FL"


def evenly(items: Sequence[T], count: int) -> list[T]:
    """So many of some items, taken evenly."""
    return [items[n * len(items) // count] for n in range(count)]


def grouped(labels: Labels) -> Labels:
    """Labels as numbers of groups, from 1."""
    data = torch.zeros_like(labels.data)
    for number, ids in enumerate(GROUPS.values(), start=1):
        data[torch.isin(labels.data, torch.tensor(ids))] = number
    return Labels(data, labels.grid)
