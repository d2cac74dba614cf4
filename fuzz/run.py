"""Fuzz the readers, each in a process of its own: python fuzz/run.py [TARGET ...] --inputs 100000

What breaks a reader is kept in ``--finds`` with its traceback, once for each place in the code. The exit code is
then 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from targets import TARGETS
from tyro.conf import Positional

DEATHS = 20
"""A target whose process died so often is given up."""


@dataclass(frozen=True)
class Fuzz:
    """Fuzz the readers."""

    targets: Positional[tuple[str, ...]] = tuple(TARGETS)
    """Names in ``targets.TARGETS``."""

    inputs: int = 1000
    """For each target."""

    seed: int = 1
    """Of the mutations."""

    finds: Path = Path("fuzz/finds")
    """Folder for the files that break a reader."""

    def run(self) -> int:
        """A line each target; the exit code."""
        print("target              inputs      read   seconds  inputs/s   finds", flush=True)
        found = 0
        for name in self.targets:
            start = time.perf_counter()
            done = self.fuzzed(name)
            seconds = time.perf_counter() - start
            found += done["finds"]
            numbers = f"{done['inputs']:>10}{done['read']:>10}{seconds:>10.1f}{done['inputs'] / seconds:>10.0f}"
            print(f"{name:<16}{numbers}{done['finds']:>8}", flush=True)
        return 1 if found else 0

    def fuzzed(self, name: str) -> dict[str, int]:
        """Inputs, how many of them were read, and finds of one target; it goes on where its process died."""
        total = {"inputs": 0, "read": 0, "finds": 0}
        for death in range(DEATHS):
            with tempfile.TemporaryDirectory() as folder:
                state, log = Path(folder) / "state.json", Path(folder) / "log"
                command = [sys.executable, str(Path(__file__).with_name("one.py")), name]
                command += [
                    str(self.inputs - total["inputs"]),
                    str(self.seed + death),
                    str(self.finds),
                    str(state),
                ]
                with log.open("wb") as stream:
                    code = subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode
                for key, value in (json.loads(state.read_text()) if state.is_file() else {}).items():
                    total[key] += value
                if code == 0:
                    break
                total["finds"] += 1
                (self.finds / f"{name}-death-{death}.log").write_bytes(log.read_bytes()[-20_000:])
            if total["inputs"] >= self.inputs:
                break
        return total


if __name__ == "__main__":
    sys.exit(tyro.cli(Fuzz, description=__doc__).run())
