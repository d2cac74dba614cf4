"""The cases of the benchmarks: development pairs, and pairs with a known transform that are built on demand."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRUTH_CACHE = Path(tempfile.gettempdir()) / "crossmorph-truth"


@dataclass(frozen=True)
class Case:
    """Two volumes, and what the data folder's score.py needs to judge a transform between them.

    Attributes:
        id: names the case in all tables.
        kind: "mono" where both images show the same contrast, else "multi"; the peers are configured by it.
        fixed, moving: volumes.
        truth: options of score.py.
    """

    id: str
    kind: str
    fixed: Path
    moving: Path
    truth: tuple[str, ...]


def data_folder() -> Path:
    """``$CROSSMORPH_DATA``, else ``../shared/data`` beside the repository."""
    folder = Path(os.environ.get("CROSSMORPH_DATA") or ROOT.parent / "shared" / "data").resolve()
    if not (folder / "score.py").is_file():
        sys.exit(f"no data at {folder}; set CROSSMORPH_DATA to the folder that holds pairs.csv and score.py")
    return folder


def brain(data: Path, cache: Path) -> Iterator[Case]:
    """Two skull-stripped T1 at 1 mm, affinely aligned, 30 labels."""
    return (case for case in pairs(data, cache) if case.id.startswith("brain1mm"))


def pairs(data: Path, cache: Path) -> Iterator[Case]:
    """All pairs of pairs.csv with labels."""
    for row in _rows(data / "pairs.csv"):
        if row["fixed_labels"]:
            kind = "mono" if row["kind"].startswith("mono") else "multi"
            labels = {"--fixed-labels": row["fixed_labels"], "--moving-labels": row["moving_labels"]}
            options = [word for name, file in labels.items() for word in (name, str(data / file))]
            if row["labels"] != "all":
                ids = row["labels"] if row["labels"][0].isdigit() else str(data / row["labels"])
                options += ["--labels", ids]
            yield Case(row["id"], kind, data / row["fixed"], data / row["moving"], tuple(options))


def truth15(data: Path, cache: Path) -> Iterator[Case]:
    """T1 -> T2 and T1 -> FLAIR of two patients, each under three deformations of up to 15 mm, nothing else."""
    for patient, moving, seed in product(("p07", "p26"), ("T2", "FLAIR"), (1, 2, 3)):
        yield deformed(data, cache, patient, "T1", moving, seed)


def truth(data: Path, cache: Path) -> Iterator[Case]:
    """All cases of truth_cases.csv: rotations, offsets, thick slices, half a field of view, CT, microscopy."""
    for row in _rows(data / "truth_cases.csv"):
        yield build(data, cache, row["id"], row["a"], row["b"], *shlex.split(row["options"]))


def poses(data: Path, cache: Path) -> Iterator[Case]:
    """T1 -> T2 and T1 -> FLAIR of one patient, moved rigidly: 40 degrees and 60 mm, 120 degrees and 150 mm."""
    for (degrees, shift), moving, seed in product(((40, 60), (120, 150)), ("T2", "FLAIR"), (1, 2, 3)):
        files = (f"ms_mni/p07_{contrast}.nii.gz" for contrast in ("T1", moving))
        options = (
            "--seed",
            str(seed),
            "--max-mm",
            "0",
            "--rotate-deg",
            str(degrees),
            "--translate-mm",
            str(shift),
        )
        yield build(data, cache, f"rot{degrees}_{moving}_s{seed}", *files, *options)


SETS = {"brain": brain, "truth15": truth15, "pairs": pairs, "truth": truth, "poses": poses}


def deformed(data: Path, cache: Path, patient: str, fixed: str, moving: str, seed: int) -> Case:
    """One contrast onto another of an ms_mni patient; one seed moves every moving contrast by one transform."""
    files = (f"ms_mni/{patient}_{contrast}.nii.gz" for contrast in (fixed, moving))
    options = ("--seed", str(seed), "--max-mm", "15", "--rotate-deg", "0", "--translate-mm", "0")
    return build(data, cache, f"{patient}_{fixed}_{moving}_s{seed}", *files, *options)


def build(data: Path, cache: Path, name: str, *arguments: str) -> Case:
    """The case that make_truth.py makes of these arguments, from the cache where it is there already."""
    folder = cache / name
    if not (folder / "case.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            a, b, *options = arguments
            command = [sys.executable, "make_truth.py", a, b, f"{temporary}/case", *options]
            subprocess.run(command, cwd=data, check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(f"{temporary}/case", folder)
    known = {"--points": "points.csv", "--fixed": "fixed.nii.gz", "--mask": "fixed_mask.nii.gz"}
    known |= {"--fixed-labels": "fixed_labels.nii.gz", "--moving-labels": "moving_labels.nii.gz"}
    there = {name: folder / file for name, file in known.items() if (folder / file).is_file()}
    truth = tuple(word for name, file in there.items() for word in (name, str(file)))
    return Case(name, "multi", folder / "fixed.nii.gz", folder / "moving.nii.gz", truth)


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
