"""Training data from a table: pairs of volumes, or volumes that are paired on the fly, prepared once and kept.

A table of pairs has the columns ``fixed`` and ``moving``; one of volumes has ``image``. More columns may follow
(see ``PAIR`` and ``VOLUME``); paths are relative to the table. Prepared volumes lie in a cache folder, one file a
row, named by a hash of the files' paths, sizes and times and of the preprocessing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.evaluate.tables import read_rows
from crossmorph.files import atomic_path
from crossmorph.image import Image
from crossmorph.kernels.linear import Matrix
from crossmorph.preprocess import check_registrable, foreground, masked, onto
from crossmorph.record import Journal
from crossmorph.resample import resample_labels
from crossmorph.settings import Linear, Preprocessing
from crossmorph.space import Grid
from crossmorph.systems.learned import boxed, on_lattice, prepared, shown
from crossmorph.systems.linear import align
from crossmorph.systems.volume import Volume
from crossmorph.train.checkpoint import load_about, load_tensors, save_tensors
from crossmorph.train.sample import Sample
from crossmorph.transform import Affine

PAIR = ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_mask", "moving_mask", "points", "initial")
"""Columns of a table of pairs. ``points``: matching landmarks; ``initial``: a linear transform to start from."""

ALIGNED = ("fixed", "moving", "fixed_mask", "moving_mask", "initial")
"""Those of them that the linear stage looks at."""

VOLUME = ("image", "labels", "mask")
"""Columns of a table of volumes."""

SPLIT = ("", "train", "validation")
"""Values of the column ``split`` of both; without it the last tenth of the rows is for validation."""

FORMAT = 2
"""Changes when what is kept changes."""

Report = Callable[[str, float, dict[str, float]], None]
Kept = tuple[dict[str, torch.Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of a table: its number in the file, its files by column, what it is for, and its id."""

    number: int
    files: dict[str, Path]
    validation: bool
    id: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        words = [self.files[key].name for key in ("image", "moving", "fixed") if key in self.files]
        return f"row {self.number} ({' to '.join(words)})"


@dataclass(frozen=True, eq=False)
class Data:
    """Samples to learn from and to validate on.

    Args:
        names: of the samples of an epoch, for the record of the training.
        validation_names: of those to validate on.
        sample: that of an index of an epoch and of a generator, which a volume's partner is drawn with.
        validation: one function a sample.
        shape: the largest size along each axis.
        ids: of the label maps of the fixed and the moving volume, two a sample; none where there are no labels.
    """

    names: tuple[str, ...]
    validation_names: tuple[str, ...]
    sample: Callable[[int, torch.Generator], Sample]
    validation: tuple[Callable[[], Sample], ...]
    shape: tuple[int, ...]
    ids: tuple[tuple[Collection[int], Collection[int]], ...]


def read_table(path: Path) -> list[Row]:
    """The rows of a table of pairs or of volumes, every file checked to be there.

    Raises:
        InputError: the table cannot be read, or a row has an empty cell, a missing file, one of two label maps, or
            an unknown split; the message tells them all with the row's number in the file, the header being row 1.
    """
    rows = read_rows(path)
    header = rows[0].keys()
    needed = ("image",) if "image" in header else ("fixed", "moving")
    known = VOLUME if "image" in header else PAIR
    missing = [name for name in needed if name not in header]
    if missing:
        raise InputError(
            f"{path}: column {', '.join(missing)} is missing; a table of pairs has the columns fixed and moving, "
            f"one of volumes has image. The columns are {', '.join(header)}"
        )
    found, wrong = [], []
    for number, row in enumerate(rows, start=2):
        files = {name: path.parent / row[name] for name in known if row.get(name)}
        wrong += [f"{path}, row {number}: {problem}" for problem in _problems(row, files, needed)]
        found.append(Row(number, files, row.get("split") == "validation", row.get("id", "")))
    if wrong:
        raise InputError(";\n".join(wrong))
    return found if "split" in header else _last_tenth(found)


def _problems(row: dict[str, str], files: dict[str, Path], needed: Sequence[str]) -> list[str]:
    """What is wrong with a row. Images may be folders of DICOM files."""
    empty = [name for name in needed if name not in files]
    wrong = [f"{name} is empty; every row needs {' and '.join(needed)}" for name in empty]
    for name, file in files.items():
        if not (file.exists() if name in needed else file.is_file()):
            wrong.append(f"there is no file {file} ({name}); paths are relative to the table")
    if ("fixed_labels" in files) != ("moving_labels" in files):
        wrong.append("labels are needed on both sides or on none")
    if row.get("split", "") not in SPLIT:
        wrong.append(f"split is {row['split']!r}; it must be train, validation or empty (train)")
    return wrong


def _last_tenth(rows: list[Row]) -> list[Row]:
    fewest = 2 if "image" in rows[0].files else 1
    first = len(rows) - max(fewest, len(rows) // 10)
    return [replace(row, validation=n >= first) for n, row in enumerate(rows)]


def load_data(table: Path, settings: Preprocessing, cache: Path, progress: Report) -> Data:
    """Prepare what is not prepared yet, and give access to all of it.

    Raises:
        InputError: see ``read_table``; also nothing to learn from or to validate on, a volume that cannot be used,
            or a cache that cannot be written.
    """
    rows = read_table(table)
    volumes = "image" in rows[0].files
    seen, held = ([row for row in rows if row.validation == side] for side in (False, True))
    fewest = 2 if volumes else 1
    for some, what in ((seen, "train on"), (held, "validate on")):
        if len(some) < fewest:
            raise InputError(
                f"{table} has {len(some)} {'volumes' if volumes else 'pairs'} to {what}; {fewest} are needed. The "
                "column split says train or validation; without it the last tenth of the rows is for validation"
            )
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep prepared volumes in {cache}: {error.strerror}; give --cache") from error
    paths: dict[int, Path] = {}
    for done, row in enumerate(rows):
        progress("preparing", done / len(rows), {})
        paths[row.number] = _kept(row, rows[0] if volumes else None, settings, cache)
    abouts = {number: load_about(path) for number, path in paths.items()}
    shape = tuple(max(sizes) for sizes in zip(*(about["shape"] for about in abouts.values()), strict=True))
    if volumes:
        return _of_volumes(seen, held, paths, shape, [abouts[row.number]["ids"] for row in seen])
    return Data(
        tuple(row.name for row in seen),
        tuple(row.name for row in held),
        lambda index, generator: _load_pair(seen[index], paths),
        tuple(partial(_load_pair, row, paths) for row in held),
        shape,
        tuple((ids["fixed_labels"], ids["moving_labels"]) for ids in (abouts[row.number]["ids"] for row in seen)),
    )


def _kept(row: Row, reference: Row | None, settings: Preprocessing, cache: Path) -> Path:
    """The file of a prepared row, made if it is not there; of volumes ``reference`` is the first."""
    files = {**row.files, **({"reference": reference.files["image"]} if reference else {})}
    path = cache / f"{_key(files, settings)}.safetensors"
    if path.exists():
        return path
    try:
        if reference is None:
            tensors, about = _prepare_pair(row, settings, cache)
        else:
            tensors, about = _prepare_volume(row, reference, settings, cache)
    except InputError as error:
        raise InputError(f"{row.name}: {error}") from error
    save_tensors(path, tensors, about)
    return path


def _key(files: dict[str, Path], settings: Preprocessing | Linear) -> str:
    """Changes when a file or a setting does."""
    stats = [(name, str(file.resolve()), file.stat()) for name, file in sorted(files.items())]
    stamps = [(name, file, stat.st_size, stat.st_mtime_ns) for name, file, stat in stats]
    return hashlib.sha256(json.dumps([FORMAT, stamps, asdict(settings)]).encode()).hexdigest()[:20]


def _aligned(
    fixed: Image, moving: Image, files: dict[str, Path], settings: Linear, cache: Path, start: Matrix
) -> Affine:
    """The linear map of two images, kept by itself, so that another spacing or crop does not cost it again."""
    path = cache / f"linear-{_key(files, settings)}.json"
    if not path.exists():
        matrix = align(fixed, moving, settings, Journal(), start)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(matrix.tolist()), encoding="utf-8")
    return Affine(np.array(json.loads(path.read_text(encoding="utf-8"))))


def _read(row: Row, image: str, mask: str) -> Image:
    found = io.read(row.files[image])
    if found.channels != 1:
        raise InputError(f"{found.source} has {found.channels} frames; training takes volumes of one")
    found = masked(found, io.read(row.files[mask]), str(row.files[mask])) if mask in row.files else found
    check_registrable(found)
    return found


def _tensors(volume: Volume, side: str) -> dict[str, torch.Tensor]:
    return {side: volume.values, f"{side}_valid": volume.valid}


def _about(grid: Grid, linear: Matrix, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    ids = {
        name: [int(i) for i in torch.unique(tensors[name]).tolist() if i] if name in tensors else []
        for name in ("labels", "fixed_labels", "moving_labels")
    }
    return {"shape": grid.shape, "affine": grid.affine.tolist(), "linear": linear.tolist(), "ids": ids}


# -- pairs -------------------------------------------------------------------------------------------------------


def _prepare_pair(
    row: Row, settings: Preprocessing, cache: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    fixed, moving = _read(row, "fixed", "fixed_mask"), _read(row, "moving", "moving_mask")
    start: Matrix = np.eye(4)
    if "initial" in row.files:
        initial = io.read_transform(row.files["initial"])
        if not isinstance(initial, Affine):
            raise InputError(f"{row.files['initial']} must be a linear transform, not {type(initial).__name__}")
        start = initial.matrix
    files = {
        name: file for name, file in row.files.items() if name not in ("fixed_labels", "moving_labels", "points")
    }
    linear = _aligned(fixed, moving, files, settings.linear, cache, start)
    grid, target, source = prepared(fixed, moving, linear, settings)
    tensors = _tensors(target, "fixed") | _tensors(source, "moving")
    if "fixed_labels" in row.files:
        maps = [io.read_labels(row.files[f"{side}_labels"]) for side in ("fixed", "moving")]
        if not set(maps[0].ids) & set(maps[1].ids):
            raise InputError(
                f"the label maps have no id in common: {maps[0].ids[:8]} in {row.files['fixed_labels'].name}, "
                f"{maps[1].ids[:8]} in {row.files['moving_labels'].name}"
            )
        tensors["fixed_labels"] = resample_labels(maps[0], grid).data.int()
        tensors["moving_labels"] = resample_labels(maps[1], grid, linear).data.int()
    if "points" in row.files:
        points = io.read_point_pairs(row.files["points"])
        tensors |= {"fixed_points": points[0].xyz, "moving_points": points[1].xyz}
    return tensors, _about(grid, linear.matrix, tensors)


def _load_pair(row: Row, paths: dict[int, Path]) -> Sample:
    tensors, about = load_tensors(paths[row.number])
    grid = Grid(about["shape"], np.array(about["affine"]))
    return Sample(row.name, **tensors, grid=grid, linear=np.array(about["linear"]))


# -- volumes -----------------------------------------------------------------------------------------------------


def _prepare_volume(row: Row, reference: Row, settings: Preprocessing, cache: Path) -> Kept:
    """Every volume is drawn on one grid: that of the first, in whose space a linear map brings it."""
    first, image = _read(reference, "image", "mask"), _read(row, "image", "mask")
    lattice = on_lattice(first, settings)
    grid = boxed(lattice.grid, foreground(lattice) if settings.crop else None)
    linear = Affine.identity()
    if row.number != reference.number:
        files = {"fixed": reference.files["image"], "moving": row.files["image"]}
        linear = _aligned(first, image, files, settings.linear, cache, np.eye(4))
    tensors = _tensors(shown(onto(image, grid, linear), settings.fixed_window), "image")
    if "labels" in row.files:
        tensors["labels"] = resample_labels(io.read_labels(row.files["labels"]), grid, linear).data.int()
    return tensors, _about(grid, linear.matrix, tensors)


def _load_two(fixed: Row, moving: Row, paths: dict[int, Path]) -> Sample:
    tensors: dict[str, torch.Tensor] = {}
    labels: dict[str, torch.Tensor] = {}
    for side, row in (("fixed", fixed), ("moving", moving)):
        found, about = load_tensors(paths[row.number])
        tensors |= {side: found["image"], f"{side}_valid": found["image_valid"]}
        labels |= {f"{side}_labels": found["labels"]} if "labels" in found else {}
    grid = Grid(about["shape"], np.array(about["affine"]))
    both = labels if len(labels) == 2 else {}
    return Sample(f"{moving.name} to {fixed.name}", **tensors, **both, grid=grid, linear=np.eye(4))


def _of_volumes(
    seen: Sequence[Row],
    held: Sequence[Row],
    paths: dict[int, Path],
    shape: tuple[int, ...],
    ids: Sequence[dict[str, list[int]]],
) -> Data:
    """Each volume is the moving one once an epoch, with a random partner; validation pairs each with the next."""

    def sample(index: int, generator: torch.Generator) -> Sample:
        other = int(torch.randint(1, len(seen), (1,), generator=generator))
        return _load_two(seen[(index + other) % len(seen)], seen[index], paths)

    common = set(ids[0]["labels"]).intersection(*(row["labels"] for row in ids))  # whoever the partner is

    def pair(n: int) -> Callable[[], Sample]:
        return lambda: _load_two(held[(n + 1) % len(held)], held[n], paths)

    return Data(
        tuple(row.name for row in seen),
        tuple(row.name for row in held),
        sample,
        tuple(pair(n) for n in range(len(held))),
        shape,
        ((common, common),) * len(seen),
    )
