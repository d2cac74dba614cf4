"""Numbers of a training as rows of a table, and for TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from crossmorph.files import atomic_path

Writer = Callable[[int, Mapping[str, float], Mapping[str, torch.Tensor]], None]


def silent(step: int, numbers: Mapping[str, float], pictures: Mapping[str, torch.Tensor]) -> None:
    """The writer of every process but the first."""


def writer(path: Path, step: int, stack: ExitStack) -> Writer:
    """A function that appends numbers to a CSV file and, where installed, these and pictures to TensorBoard.

    Args:
        path: of the CSV file; TensorBoard's files go into a folder beside it. Rows after ``step`` are dropped.
        step: that the training goes on from.
        stack: closes what is open.
    """
    rows = _rows_until(path, step)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "name", "value"), *rows])
    file = stack.enter_context(path.open("a", newline="", encoding="utf-8"))
    table = csv.writer(file)
    board: Any = None
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=step + 1)
        stack.callback(board.close)
    except ImportError:
        pass

    def write(step: int, numbers: Mapping[str, float], pictures: Mapping[str, torch.Tensor]) -> None:
        for name, value in numbers.items():
            table.writerow((step, name, f"{value:.6g}"))
            if board is not None:
                board.add_scalar(name, value, step)
        for name, picture in pictures.items():
            if board is not None:
                board.add_image(name, picture, step)
        file.flush()

    return write


def _rows_until(path: Path, step: int) -> list[tuple[str, ...]]:
    """The rows of an earlier metrics.csv that the state to go on from knows of."""
    if step == 0 or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [tuple(row) for row in rows if row and int(row[0]) <= step]
