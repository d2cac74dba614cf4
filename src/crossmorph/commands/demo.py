"""``crossmorph demo``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

if TYPE_CHECKING:
    from rich.table import Table

    from crossmorph.image import Image
    from crossmorph.phantom import PhantomPair
    from crossmorph.result import Result
    from crossmorph.transform import Transform


@dataclass(frozen=True)
class Demo:
    """Register a generated pair: a CT-like and an MR-like scan of one trunk with a known deformation between.

    Prints the error in mm and the overlap of the organs before and after. The output folder then holds the
    volumes, the landmarks, the result and pictures. Exit code 3: the verdict on the result is failed.
    """

    output: Annotated[Path, arg(aliases=("-o",))] = Path("demo-output")
    """Folder to write to. Files of an earlier demo are replaced."""

    seed: int = 0
    """Another number gives another anatomy and another deformation."""

    quiet: bool = False
    """No progress bar."""

    def run(self) -> int:
        """Generate, register, measure, draw, and return the exit code."""
        from rich.console import Console

        from crossmorph import register
        from crossmorph.commands.register import progress_bar
        from crossmorph.phantom import make_pair

        console = Console(soft_wrap=True, highlight=False, markup=False)
        pair = make_pair(seed=self.seed)
        _write_inputs(pair, self.output)
        console.print(f"fixed:  {pair.fixed}\nmoving: {pair.moving}")
        start = time.perf_counter()
        with progress_bar(self.quiet) as progress:
            result = register(pair.fixed, pair.moving, seed=self.seed, progress=progress)
            folder = result.save(self.output / "result", overwrite=True)
            _add_truth(pair, result, folder)
        seconds = time.perf_counter() - start
        console.print(f"registered and saved in {seconds:.1f} s; verdict: {result.verdict}")
        console.print(_scores(pair, result.transform))
        console.print(f"volumes, landmarks and the result are in {self.output}")
        console.print(_draw(pair, result.warped, result.transform, self.output))
        return 3 if result.verdict.status == "failed" else 0


def _write_inputs(pair: PhantomPair, folder: Path) -> None:
    from crossmorph import io
    from crossmorph.errors import InputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        io.write(getattr(pair, name), folder / f"{name}.nii.gz")
    for name in ("fixed_points", "moving_points"):
        io.write(getattr(pair, name), folder / f"{name}.csv")


def _add_truth(pair: PhantomPair, result: Result, folder: Path) -> None:
    """The report again, with the organs and the landmarks."""
    from crossmorph.report.evidence import evidence_of
    from crossmorph.report.page import REPORT, write_report

    labels, points = (pair.fixed_labels, pair.moving_labels), (pair.fixed_points, pair.moving_points)
    write_report(evidence_of(result, labels=labels, points=points), folder / REPORT)


def _scores(pair: PhantomPair, transform: Transform) -> Table:
    """Landmark error and Dice, before and after."""
    from rich.table import Table

    from crossmorph.evaluate import label_overlap, mean_dice, summarise_errors, target_registration_error
    from crossmorph.phantom import ORGANS
    from crossmorph.transform import Affine

    columns = []
    for mapping in (Affine.identity(), transform):
        errors = summarise_errors(target_registration_error(mapping, pair.fixed_points, pair.moving_points))
        warped = mapping.apply(pair.moving_labels, like=pair.fixed)
        dice = mean_dice(label_overlap(pair.fixed_labels, warped, pair.moving_labels, ids=ORGANS))
        columns.append([f"{errors['mean']:.2f}", f"{errors['p95']:.2f}", f"{dice:.3f}"])
    table = Table("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    names = (
        f"mean error of {len(pair.fixed_points)} landmarks, mm",
        "95th percentile, mm",
        f"mean Dice of {len(ORGANS)} organs",
    )
    for row in zip(names, *columns, strict=True):
        table.add_row(*row)
    return table


def _draw(pair: PhantomPair, warped: Image, transform: Transform, folder: Path) -> str:
    """Write the pictures and say where they are, or what is missing for them."""
    from crossmorph.errors import InputError
    from crossmorph.report.figures import before_after, deformation_grid

    try:
        pictures = (
            before_after(pair.fixed, pair.moving, warped, folder / "before_after.png"),
            deformation_grid(transform, pair.fixed, folder / "deformation.png"),
        )
    except InputError as error:
        return f"no pictures: {error}"
    return f"pictures: {', '.join(map(str, pictures))}"
