"""Making a result again from its record, and telling what differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.job import Job, changed_files, from_request
from crossmorph.record import Progress
from crossmorph.space import Grid

POINTS = 40
"""Transforms are compared at so many places along each axis of the fixed image."""

FORWARD = "forward.h5"


@dataclass(frozen=True)
class Comparison:
    """A result beside its rerun.

    Attributes:
        same: names of files that are the same to the last bit.
        differ: names of files that are not, or are only there once.
        causes: what was not the same before: inputs, versions, machine.
        effects: by how much the results differ.
    """

    same: tuple[str, ...]
    differ: tuple[str, ...]
    causes: tuple[str, ...]
    effects: tuple[str, ...]


def read_job(path: Path) -> tuple[Job, dict[str, Any]]:
    """The job of a record, and the record.

    Raises:
        InputError: it is no record, or of a run that did not come from files.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        request = record["choices"].get("request")
        record["outputs"], record["versions"], record["machine"], record["scores"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not the record of a registration: {type(error).__name__}: {error}") from None
    if request is None:
        raise InputError(
            f"{path} does not tell what was asked for: it is of a run in Python, or of an older version; only "
            "what `crossmorph register` and `crossmorph cohort` wrote can be rerun"
        )
    try:
        return from_request(request), record
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the request cannot be read: {type(error).__name__}: {error}") from None


def rerun(path: Path, out: Path, overwrite: bool = False, progress: Progress | None = None) -> Comparison:
    """Register again what a record tells of, write the result, and compare.

    Args:
        path: of the record; the transform beside it is looked at, if it is there.
        out: folder for the new result.
        overwrite: replace an earlier one.
        progress: called with (stage, share done).

    Raises:
        InputError: the record cannot be used, a file is gone, or see ``Job.save``.
    """
    job, before = read_job(path)
    after = job.save(out, overwrite, progress).record
    return compare(before, after, path.with_name(FORWARD), out / FORWARD)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], old: Path, new: Path) -> Comparison:
    """Two records, and the transforms of both where ``old`` is still there."""
    names = sorted(before["outputs"] | after["outputs"])
    same = tuple(name for name in names if before["outputs"].get(name) == after["outputs"].get(name))
    differ = tuple(name for name in names if name not in same)
    causes = [f"{name}: the file has other contents now" for name in
              changed_files(after["choices"]["request"], before["choices"]["request"])]  # fmt: skip
    for what in ("versions", "machine"):
        causes += _changes(before[what], after[what])
    causes += _changes({"device": before["device"]}, {"device": after["device"]})
    effects = _changes(_numbers(before["scores"]), _numbers(after["scores"]))
    if FORWARD in differ:
        effects = [_distance(old, new, after["inputs"]["fixed"]), *effects]
    return Comparison(same, differ, tuple(causes), tuple(effects))


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name}: {before.get(name)} then, {after.get(name)} now" for name in names]


def _numbers(scores: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested values by their path."""
    if isinstance(scores, dict):
        items = [(f"{name}.{key}" if name else str(key), value) for key, value in scores.items()]
        return {leaf: number for key, value in items for leaf, number in _numbers(value, key).items()}
    return {name: scores}


def _distance(old: Path, new: Path, fixed: Mapping[str, Any]) -> str:
    """How far apart two transforms send the places of the fixed image."""
    if not old.is_file():
        return f"the transform differs, by how much cannot be told: there is no {old}"
    grid = Grid(fixed["shape"], fixed["affine"])
    grid = grid.resized([min(POINTS, n) for n in grid.shape])
    index = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid.shape))
    places = grid.to_world(index)
    apart = (io.read_transform(old)(places) - io.read_transform(new)(places)).norm(dim=1)
    return f"the transforms are {float(apart.mean()):.2g} mm apart on average, {float(apart.max()):.2g} mm at most"
