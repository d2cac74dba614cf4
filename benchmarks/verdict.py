"""Whether the verdict tells right registrations from wrong ones.

python benchmarks/verdict.py -o FOLDER

Right: the pairs of pairs.csv, the cases of truth_cases.csv and three phantoms, registered by default. Wrong on
purpose: the same transforms with left and right exchanged, 30 mm off, or of another subject; another anatomy
put in the place of the moving image or registered to the fixed one; and moving images whose headers exchange left
and right, registered. Registrations and verdicts that FOLDER holds already are not made again. All are judged on
images of at most a million voxels, as most scores are anyhow.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from cases import TRUTH_CACHE, data_folder, pairs, truth
from numpy.typing import NDArray
from tables import Row, update_section
from tyro.conf import arg

from crossmorph import io, register
from crossmorph.channels import Channel
from crossmorph.evaluate.tables import markdown, write_rows
from crossmorph.image import Image
from crossmorph.match.view import COARSE_VOXELS, views
from crossmorph.phantom import make_pair
from crossmorph.record import Journal
from crossmorph.report.evidence import Evidence, read_evidence
from crossmorph.resample import downsample
from crossmorph.result import Result
from crossmorph.settings import Mcbo
from crossmorph.space import Grid
from crossmorph.transform import Affine, Chain, Transform

OTHER_BODIES = (
    ("ixi_head-totalseg_ct", "ixi_train/IXI538-HH-2411_T1", "ct_mr/totalseg_ct"),
    ("totalseg_ct-spinal_t2", "ct_mr/totalseg_ct", "spinal_cord/t2"),
    ("nichart_T1-totalseg_mr", "nichart/Subj1_T1", "ct_mr/totalseg_mr"),
)
"""Name, fixed and moving image of registrations that cannot be right."""

HELD_OUT = (
    ("ixi_IXI014_to_IXI012", "ixi_train/IXI012-HH-1211_T1", "ixi_train/IXI014-HH-1236_T1"),
    ("ixi_IXI048_to_IXI033", "ixi_train/IXI033-HH-1259_T1", "ixi_train/IXI048-HH-1326_T1"),
    ("spinal_mt1_to_t1w", "spinal_cord/mt_t1w", "spinal_cord/mt1"),
    ("prostate_cor_to_tra", "prostate/t2_tra", "prostate/t2_cor"),
    ("infant_t2_to_t1", "infant_t1t2/month0_T1", "infant_t1t2/month0_T2"),
)
"""Name, fixed and moving image of right registrations that had no part in setting the limits."""

MIRRORED = ("nichart_T1of2_to_T1of1", "ixi_IXI634_to_IXI631", "phantom0")
"""Pairs that are registered once more with the moving header mirrored."""

Floats = NDArray[np.floating[Any]]

SHIFT_MM = 30.0
SMALL_MM = 80.0
"""Bodies shorter than this are shifted by a third of their length instead."""


@dataclass(frozen=True)
class Verdicts:
    """Judge right and wrong registrations."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder of the registrations, and of verdict.csv, whose rows are kept."""

    truth_cache: Path = TRUTH_CACHE
    """Where cases with known truth are kept."""

    held_out: bool = False
    """Judge the cases that had no part in setting the limits, and what is made of them."""

    only_made: bool = False
    """Judge the registrations that are there, and make no other."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace by the table."""

    def run(self) -> None:
        """Register what is missing, judge, write the CSV and print the table."""
        self.output.mkdir(parents=True, exist_ok=True)
        table_file = self.output / "verdict.csv"
        rows = kept_rows(table_file)
        known = {(row["kind"], row["case"]) for row in rows}
        for kind, case, score in self._judged():
            if (kind, case) in known:
                continue
            result = score()
            scores = result.scores
            row: Row = {"kind": kind, "case": case, "status": result.verdict.status}
            row |= {"confirmed": min(scores["confirmed"].values()), "overlap": round(scores["overlap"], 3)}
            row |= {"mirrored_cost_ratio": min(scores["mirrored_cost_ratio"].values())}
            row |= {"reasons": "; ".join(result.verdict.reasons)}
            rows.append(row)
            print(*row.values(), flush=True)
            write_rows(rows, table_file)
        table = markdown(summary(rows))
        print(table)
        if self.update_readme:
            page = Path(__file__).with_name("README.md")
            update_section(page, self.update_readme, f"`python benchmarks/verdict.py -o FOLDER`\n\n{table}")

    def _judged(self) -> Iterator[tuple[str, str, Callable[[], Result]]]:
        """Kind, case and how to get at the result."""
        files = named(HELD_OUT) if self.held_out else self._right()
        if not self.held_out:
            files |= {f"body-{case}": pair for case, pair in named(OTHER_BODIES).items()}
            for case in MIRRORED:
                files[f"mirror-{case}"] = files[case][0], mirrored(files[case][1], self.output)
        evidence = cache(lambda case: made(self.output, case, *files[case]))
        there = [case for case in files if not self.only_made or (self.output / case).is_dir()]
        special = {"body": "other body, registered", "mirror": "mirrored header, registered"}
        right = [case for case in there if case.split("-")[0] not in special]
        for case in (case for case in there if case not in right):
            yield special[case.split("-")[0]], case, partial(registered, evidence(case))
        for number, case in enumerate(by_turns(right)):
            yield "right", case, partial(registered, evidence(case))
            yield from ((kind, case, make) for kind, make in wrong(number, case, right, evidence))

    def _right(self) -> dict[str, tuple[Path, Path]]:
        data = data_folder()
        every = [*pairs(data, self.truth_cache), *truth(data, self.truth_cache)]
        files = {case.id: (case.fixed, case.moving) for case in every}
        return files | {f"phantom{seed}": phantom_files(self.output, seed) for seed in range(3)}


def named(cases: tuple[tuple[str, str, str], ...]) -> dict[str, tuple[Path, Path]]:
    """Files of cases that are named by hand."""
    data = data_folder()
    return {case: (data / f"{fixed}.nii.gz", data / f"{moving}.nii.gz") for case, fixed, moving in cases}


def by_turns(cases: list[str]) -> list[str]:
    """One case of every family, then the second ones, and so on."""
    seen: Counter[str] = Counter()
    places = {}
    for case in cases:
        places[case] = seen[family(case)]
        seen[family(case)] += 1
    return sorted(cases, key=lambda case: places[case])


def kept_rows(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [{**row, "confirmed": float(row["confirmed"])} for row in csv.DictReader(stream)]


def phantom_files(out: Path, seed: int) -> tuple[Path, Path]:
    """The scans of a phantom, written when first asked for."""
    folder = out / "phantoms" / str(seed)
    fixed, moving = folder / "fixed.nii.gz", folder / "moving.nii.gz"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        pair = make_pair(seed=seed)
        io.write(pair.fixed, fixed)
        io.write(pair.moving, moving)
    return fixed, moving


def made(out: Path, case: str, fixed: Path, moving: Path) -> Evidence:
    """What a registration left, which is made first where it is missing."""
    folder = out / case
    if not folder.is_dir():
        register(io.read(fixed), io.read(moving), device="cpu").save(folder)
    evidence = read_evidence(folder, fixed, (moving,))
    return replace(evidence, fixed=at_most(evidence.fixed), movings=tuple(map(at_most, evidence.movings)))


def at_most(image: Image, voxels: int = 1_000_000) -> Image:
    """The image, made coarser where it has more voxels."""
    shrink = (np.prod(image.grid.shape) / voxels) ** (1 / 3)
    if shrink <= 1:
        return image
    return downsample(image, image.grid.resized([max(2, round(n / shrink)) for n in image.grid.shape]))


def registered(evidence: Evidence) -> Result:
    """The result that a folder holds."""
    return as_result(evidence, evidence.movings[0], evidence.transform, evidence.record["choices"])


def as_result(
    evidence: Evidence, moving: Image, transform: Transform, choices: dict[str, Any] | None = None
) -> Result:
    """A transform as if it were the result of a registration to the fixed image."""
    journal = Journal()
    journal.notes = choices or {}
    pairs = (Channel(evidence.fixed, moving),)
    chain = Chain((transform,), fixed_grid=evidence.fixed.grid, moving_grid=moving.grid)
    return Result(pairs, pairs, chain, evidence.initial, Mcbo(), journal, 0, "cpu")


def wrong(
    number: int, case: str, right: list[str], evidence: Callable[[str], Evidence]
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Kinds of registrations that are wrong on purpose, and what makes them.

    Args:
        number: seed of the direction of a shift, and which of the strangers is taken.
        case: the right one that they are made of.
        right: all cases.
        evidence: of a case.
    """

    def turned(change: Callable[[Floats], Affine]) -> Result:
        own = evidence(case)
        body = views(own.fixed, own.movings[0], COARSE_VOXELS)[0].points()
        return as_result(own, own.movings[0], Chain((change(body), own.transform)))

    def mirror(body: Floats) -> Affine:
        matrix = np.diag([-1.0, 1.0, 1.0, 1.0])
        matrix[0, 3] = 2 * body[:, 0].mean()
        return Affine(matrix)

    def shift(body: Floats) -> Affine:
        direction = np.random.default_rng(number).normal(size=3)
        length = float(np.ptp(body, axis=0).max())
        amount = SHIFT_MM if length > SMALL_MM else length / 3
        return Affine.translation(amount * direction / np.linalg.norm(direction))

    def confused(other: str) -> Result:
        return as_result(evidence(case), evidence(case).movings[0], evidence(other).transform)

    def exchanged(other: str) -> Result:
        own, stranger = evidence(case), evidence(other).movings[0]
        first, second = views(own.fixed, stranger, COARSE_VOXELS)
        centred = Affine.translation(second.points().mean(0) - first.points().mean(0))
        return as_result(own, stranger, centred)

    yield "mirrored", partial(turned, mirror)
    yield "30 mm off", partial(turned, shift)
    place = right.index(case)
    others = right[place + 1 :] + right[:place]
    alike = [other for other in others if family(other) == family(case) and not same_subjects(other, case)]
    if alike:
        yield "another subject's transform", partial(confused, alike[0])
    strangers = [other for other in others if body_of(other) != body_of(case)]
    yield "other body, centred", partial(exchanged, strangers[number % len(strangers)])


def family(case: str) -> str:
    """Sets of cases whose transforms could be mixed up."""
    return next(name for name in ("nichart", "ixi", "mni", "phantom", "ms", case) if case.startswith(name))


def same_subjects(one: str, other: str) -> bool:
    """The same two people of nichart, in T1 or FLAIR."""
    digits = [[word.strip("FLTof") for word in case.replace("T1of", "").split("_")[1::2]] for case in (one, other)]
    return one.startswith("nichart") and other.startswith("nichart") and digits[0] == digits[1]


def body_of(case: str) -> str:
    """What the images of a case show."""
    bodies = {"prostate": "pelvis", "phantom": "trunk", "totalseg": "trunk", "spinal": "neck", "mouse": "mouse"}
    return next((body for name, body in bodies.items() if case.startswith(name)), "head")


def mirrored(path: Path, folder: Path) -> Path:
    """A copy of a volume whose header exchanges left and right."""
    copy = folder / f"mirrored-{path.parent.name}-{path.name}"
    if copy.is_file():
        return copy
    image = io.read(path)
    grid = Grid(image.grid.shape, np.diag([-1.0, 1.0, 1.0, 1.0]) @ image.grid.affine)
    io.write(replace(image, grid=grid), copy)
    return copy


def summary(rows: list[Row]) -> list[Row]:
    """Counts of each kind."""
    table = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        counts = {status: sum(row["status"] == status for row in own) for status in ("ok", "check", "failed")}
        shares = sorted(row["confirmed"] for row in own)
        spread = f"{shares[0]:.2f} to {shares[-1]:.2f}"
        table.append({"registrations": kind, "number": len(own), **counts, "confirmed": spread})
    return table


if __name__ == "__main__":
    tyro.cli(Verdicts).run()
