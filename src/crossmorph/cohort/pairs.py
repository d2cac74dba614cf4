"""The pairs of a cohort, from a table of pairs or of volumes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from crossmorph.errors import InputError
from crossmorph.io.paths import stem_of
from crossmorph.job import Job
from crossmorph.train.pairs import Row, read_table

ID = re.compile(r"\w[\w.,+=@-]{0,149}", re.ASCII)
"""What can be the name of a folder everywhere."""


@dataclass(frozen=True)
class Pair:
    """A registration with the name of its folder."""

    id: str
    job: Job

    @property
    def size(self) -> int:
        """Bytes of its images on disk."""
        paths = (self.job.fixed, *self.job.moving)
        return sum(
            file.stat().st_size for path in paths for file in (path.rglob("*") if path.is_dir() else [path])
        )


def read_pairs(
    table: Path, make: Callable[..., Job], template: Path | None = None, all_pairs: bool = False
) -> list[Pair]:
    """The pairs of a table, every file checked to be there and every id to be one folder of its own.

    Args:
        table: CSV, paths relative to it. With ``fixed`` and ``moving`` every row is a pair (further columns:
            ``train.pairs.PAIR``); with ``image`` it lists volumes (``VOLUME``). The column ``id`` names the
            folder; by default it is made of the names of both files.
        make: a job of ``fixed``, ``moving`` and its other files.
        template: the fixed image of every volume.
        all_pairs: every volume to every other one, in both directions.

    Raises:
        InputError: the table cannot be read, does not fit the options, or rows are wrong; all are told.
    """
    rows = read_table(table)
    volumes = "image" in rows[0].files
    if volumes != (template is not None or all_pairs) or (template is not None and all_pairs):
        raise InputError(
            f"{table} lists {'volumes' if volumes else 'pairs'}; a table of volumes (column image) needs either "
            "--to TEMPLATE or --all-pairs, one of pairs (columns fixed and moving) neither"
        )
    if template is not None and not template.exists():
        raise InputError(f"there is no template {template}")
    if not volumes:
        pairs = [_of_row(row, make) for row in rows]
    elif template is not None:
        pairs = [_of_volumes(None, row, make, template) for row in rows]
    else:
        pairs = [_of_volumes(fixed, moving, make) for fixed, moving in permutations(rows, 2)]
    if not pairs:
        raise InputError(f"{table} lists one volume; --all-pairs needs two or more")
    _check_ids(table, pairs)
    return pairs


def _of_row(row: Row, make: Callable[..., Job]) -> Pair:
    files = {name: file.absolute() for name, file in row.files.items()}
    job = make(
        fixed=files["fixed"],
        moving=(files["moving"],),
        initial=files.get("initial"),
        fixed_mask=files.get("fixed_mask"),
        moving_mask=files.get("moving_mask"),
        landmarks=(files["points"],) if "points" in files else (),
    )
    return Pair(row.id or _name(job), job)


def _of_volumes(fixed: Row | None, moving: Row, make: Callable[..., Job], template: Path | None = None) -> Pair:
    """One volume to another one, or to a template."""
    files = {} if fixed is None else fixed.files
    masks = {"fixed_mask": files.get("mask"), "moving_mask": moving.files.get("mask")}
    job = make(
        fixed=(template or files["image"]).absolute(),
        moving=(moving.files["image"].absolute(),),
        **{name: mask.absolute() for name, mask in masks.items() if mask},
    )
    if fixed is None:
        return Pair(moving.id or _name(job), job)
    return Pair(f"{moving.id}-to-{fixed.id}" if moving.id and fixed.id else _name(job), job)


def _name(job: Job) -> str:
    names = f"{stem_of(job.moving[0])}-to-{stem_of(job.fixed)}"
    return re.sub(r"[^\w.,+=@-]", "_", names, flags=re.ASCII).lstrip(".,+=@-")[:150]


def _check_ids(table: Path, pairs: list[Pair]) -> None:
    """Folders must differ on file systems that do not tell capitals from small letters, too."""
    counts = Counter(pair.id.lower() for pair in pairs)
    twice = [f"{pair.id} ({pair.job.fixed.name}, {pair.job.moving[0].name})" for pair in pairs
             if counts[pair.id.lower()] > 1]  # fmt: skip
    wrong = [repr(pair.id) for pair in pairs if not ID.fullmatch(pair.id)]
    problems = []
    if twice:
        problems.append(
            f"these rows have one output folder, {', '.join(twice)}; give each an id of its own in the column id"
        )
    if wrong:
        problems.append(
            f"the id {', '.join(wrong)} cannot be the name of a folder; use letters, digits and . , + = @ - _"
        )
    if problems:
        raise InputError(f"{table}: " + "; ".join(problems))
