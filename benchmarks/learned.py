"""What the benchmarks of trained networks share: trainings, other programs, rows on disk; all can go on."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from crossmorph import io
from crossmorph.image import Image
from crossmorph.record import Journal
from crossmorph.registration import faded_field
from crossmorph.settings import Learned
from crossmorph.systems.learned import Trained, displacement
from crossmorph.transform import Affine, DisplacementField, Transform

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".venv-peers" / "bin" / "python"
"""Python of the environment with the other programs."""

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What work returns, and its processor seconds, which a busy machine does not stretch."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def children_timed(work: Callable[[], object]) -> float:
    """The processor seconds of the processes that work starts and waits for."""
    before = os.times()
    work()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def train(system: str, table: Path, folder: Path, config: str, cache: Path, device: str = "auto") -> None:
    """Train to the end, from where an earlier run was stopped; weights of the last step are all that is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "config.toml"
    settings.write_text(config)
    if finished(folder, tomllib.loads(config)["steps"]):
        return
    command = [sys.executable, "-m", "crossmorph", "train", system, str(table), "-o", str(folder)]
    command += ["--config", str(settings), "--cache", str(cache), "--device", device, "--resume", "--quiet"]
    subprocess.run(command, check=True)


def finished(folder: Path, steps: int) -> bool:
    """Whether a folder has the weights after so many steps."""
    last = folder / "last.json"
    return last.is_file() and json.loads(last.read_text())["metrics"]["step"] == steps


def by_peer(
    script: str, fixed: Path, moving: Path, output: Path, options: Sequence[str]
) -> tuple[Transform, float]:
    """What a script of ``peers`` makes of a pair in a process of its own, and its processor seconds; kept."""
    spent = output.with_suffix(".json")
    if not spent.is_file():
        command = [str(PEERS), str(HERE / "peers" / script), str(fixed), str(moving), str(output), *options]
        spent.write_text(json.dumps(children_timed(lambda: subprocess.run(command, check=True))))
    return io.read_transform(output), json.loads(spent.read_text())


def through(trained: Trained, fixed: Image, moving: Image, linear: Affine, refine: int = 0) -> DisplacementField:
    """What the network says, from the fixed space to that before ``linear``; nothing judges it or is dropped."""
    settings, device = Learned(refine=refine), torch.device("cpu")
    grid, _, field = displacement(trained, fixed, moving, linear, settings, Journal(), device)
    return faded_field(field, grid)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows, below a header line where the file is new."""
    new = not path.is_file()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
