"""``crossmorph learn2reg``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from crossmorph.errors import InputError
from crossmorph.settings import LinearModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from crossmorph.evaluate.learn2reg import Dataset, Pair
    from crossmorph.evaluate.submission import Task
    from crossmorph.evaluate.tables import Cell
    from crossmorph.image import Image
    from crossmorph.transform import Transform


@dataclass(frozen=True)
class Learn2Reg:
    """Register the pairs of a Learn2Reg task, write a submission, score it where ground truth is there.

    Started again with the same output it goes on where it stopped. The folder OUTPUT/submission then holds the
    displacement fields under the challenge's names; zip its files to submit them.
    """

    dataset: Positional[Path]
    """dataset.json of the task, or the folder that holds it."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for submission/, scores.csv, leaderboard.md and run.json."""

    system: str = "mcbo"
    """System to register with."""

    preset: str = "default"
    """Settings of the system, by name."""

    linear: LinearModel = "none"
    """Linear stage before. The images of the challenges come aligned; choose affine for others in their layout."""

    split: Literal["validation", "test", "training"] = "validation"
    """Which pairs of dataset.json."""

    task: str | None = None
    """AbdomenMRCT, LUMIR, ReMIND2Reg, COMULIS3DCLEM, OASIS or NLST. Default: from the dataset's name."""

    submission: Path | None = None
    """Score the displacement fields of this folder instead of registering."""

    before: bool = False
    """Score the zero field as well: the row "initial" of the challenges."""

    ndv_mask: Literal["moving", "fixed"] = "moving"
    """Foreground for NDV; the LUMIR program takes the moving image's, the fixed image's is right."""

    seed: int = 0
    """Of the registration."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Register what is missing, score, print and return the exit code; 2 where a pair failed."""
        import numpy as np

        from crossmorph import io
        from crossmorph.evaluate.cases import to_json
        from crossmorph.evaluate.learn2reg import read_dataset
        from crossmorph.evaluate.submission import leaderboard_row, score_pair, score_submission, task_of
        from crossmorph.evaluate.tables import markdown, write_rows

        dataset = read_dataset(self.dataset)
        task = task_of(self.task or dataset.name)
        pairs = self._pairs(dataset)
        failed: list[Pair] = [] if self.submission else self._register_all(pairs, task)
        done = [pair for pair in pairs if pair not in failed]
        folder = self.submission or self.output / "submission"
        rows = score_submission(dataset, done, folder, task, self.ndv_mask) if done else []
        board: list[dict[str, Cell]] = [{"row": self.submission.name if self.submission else self.system}]
        board[0] |= leaderboard_row(rows, task)
        if self.before:
            zeros = (np.zeros((3, *io.read(pair.fixed).grid.shape), np.float32) for pair in done)
            start = [score_pair(dataset, *pair, task, self.ndv_mask) for pair in zip(done, zeros, strict=True)]
            board.append({"row": "initial", **leaderboard_row(start, task)})
        self.output.mkdir(parents=True, exist_ok=True)
        write_rows(rows, self.output / "scores.csv")
        (self.output / "leaderboard.md").write_text(markdown(board), encoding="utf-8")
        print(to_json({"leaderboard": board, "cases": rows}) if self.json else markdown(board), end="")
        return 2 if failed else 0

    def _pairs(self, dataset: Dataset) -> Sequence[Pair]:
        pairs = dataset.pairs[self.split]
        if not pairs:
            there = ", ".join(f"{split} ({len(found)})" for split, found in dataset.pairs.items() if found)
            raise InputError(
                f"{self.dataset} lists no pairs of fixed and moving for {self.split}; it has {there or 'none'}"
            )
        return pairs

    def _register_all(self, pairs: Sequence[Pair], task: Task) -> list[Pair]:
        """Write the fields that are missing; the pairs that could not be registered."""
        from crossmorph import io
        from crossmorph.evaluate.learn2reg import displacement_name, write_displacement

        register = registration(self.system, self.preset, self.linear, self.seed)
        folder = self.output / "submission"
        folder.mkdir(parents=True, exist_ok=True)
        self._check_run()
        failed = []
        for count, pair in enumerate(pairs, start=1):
            path = folder / displacement_name(pair, task.lumir)
            if path.is_file():
                continue  # files appear whole or not at all
            try:
                fixed, moving = io.read(pair.fixed), io.read(pair.moving)
                write_displacement(register(fixed, moving), path, fixed.grid, moving.grid)
                word = "registered"
                if task.shape not in (None, fixed.grid.shape):
                    word += f", but the challenge expects images of {task.shape}, not {fixed.grid.shape}"
            except InputError as error:
                failed.append(pair)
                word = f"failed: {error}"
            print(f"{count}/{len(pairs)} {pair.id}: {word}", file=sys.stderr)
        return failed

    def _check_run(self) -> None:
        """Refuse to go on with other settings in the folder of an earlier run."""
        record = self.output / "run.json"
        mine = {name: getattr(self, name) for name in ("system", "preset", "linear", "seed", "split")}
        if record.is_file():
            earlier = json.loads(record.read_text(encoding="utf-8"))
            if earlier != mine:
                raise InputError(f"{self.output} was begun with {earlier}, not {mine}; choose another output")
        record.write_text(json.dumps(mine, indent=2), encoding="utf-8")


def registration(system: str, preset: str, linear: LinearModel, seed: int) -> Callable[[Image, Image], Transform]:
    """A function that registers one pair by a system's preset with another linear stage."""
    from dataclasses import replace

    from crossmorph.registration import register
    from crossmorph.settings import load_settings

    settings = load_settings(system, preset)
    settings = replace(settings, linear=replace(settings.linear, model=linear))
    return lambda fixed, moving: register(fixed, moving, settings=settings, seed=seed).transform
