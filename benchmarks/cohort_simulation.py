"""What a large cohort takes, from what was measured of a small one: workers, one dispatcher, one storage.

python benchmarks/cohort_simulation.py results/cohort

A worker asks for a pair; the dispatcher (client and scheduler) serves one worker after the other; the pair is
computed, with seconds drawn from the measured ones; its files go through the storage, one pair after the other.
First the measured runs are simulated, then 100,000 pairs of brains on more and more workers.
"""

from __future__ import annotations

import csv
import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tables import Row
from tyro.conf import Positional, arg

from crossmorph.evaluate.tables import markdown

COMPUTED, WRITTEN = 0, 1


@dataclass(frozen=True)
class Simulation:
    """Simulate the measured runs, then a large one."""

    measured: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """What `cohort.py throughput` and `cohort.py dispatch` wrote."""

    pairs: int = 100_000
    """Of the large run."""

    pair_seconds: float = 40.0
    """Mean seconds of a pair of the large run on one thread; the spread is the measured one."""

    megabytes: float = 66.0
    """Read and written for a pair."""

    storage: float = 1000.0
    """Megabytes a second that all workers together can read and write."""

    workers: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    """Sizes of the crew."""

    def run(self) -> None:
        """Print both tables."""
        dispatch = json.loads((self.measured / "dispatch.json").read_text())["seconds_a_pair"]
        with (self.measured / "throughput.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        print(f"dispatching: {1000 * dispatch:.1f} ms a pair\n")
        print(markdown([self.again(row, dispatch) for row in rows if row["run"] != "plain loop"]))
        seconds = json.loads((self.measured / "loop.json").read_text())
        scale = self.pair_seconds * len(seconds) / sum(seconds)
        large = [scale * value for value in seconds]
        print(markdown([self.large(count, large, dispatch) for count in self.workers]))

    def again(self, row: Row, dispatch: float) -> Row:
        """A measured run beside a simulated one, with the seconds that pairs took in it."""
        count = int(row["workers"])
        seconds = json.loads((self.measured / f"workers{count}.json").read_text())
        simulated = simulate(seconds, len(seconds), count, dispatch, 0.0)
        measured = float(row["seconds"])
        error = 100 * (simulated / measured - 1)
        return {"workers": count, "measured_s": measured, "simulated_s": simulated, "error_percent": error}

    def large(self, count: int, seconds: Sequence[float], dispatch: float) -> Row:
        """A row of the large run."""
        took = simulate(seconds, self.pairs, count, dispatch, self.megabytes / self.storage)
        busy = self.pairs * sum(seconds) / len(seconds)
        return {
            "workers": count,
            "hours": took / 3600,
            "pairs_per_second": self.pairs / took,
            "MB_per_second": self.megabytes * self.pairs / took,
            "busy_percent": 100 * busy / (count * took),
        }


def simulate(seconds: Sequence[float], pairs: int, workers: int, dispatch: float, storing: float) -> float:
    """Seconds until the last of the pairs is written.

    Args:
        seconds: that pairs took; drawn from with replacement, or taken in order where there are as many.
        pairs, workers: how many.
        dispatch: seconds of the dispatcher for a pair.
        storing: seconds of the storage for a pair.
    """
    draw = random.Random(0)
    queue = seconds if len(seconds) == pairs else draw.choices(seconds, k=pairs)
    events = [(0.0, WRITTEN, worker) for worker in range(workers)]
    dispatcher = storage = last = 0.0
    given = 0
    while events:
        now, kind, worker = heapq.heappop(events)
        if kind == COMPUTED:
            storage = max(now, storage) + storing
            heapq.heappush(events, (storage, WRITTEN, worker))
            last = max(last, storage)
        elif given < pairs:
            dispatcher = max(now, dispatcher) + dispatch
            heapq.heappush(events, (dispatcher + queue[given], COMPUTED, worker))
            given += 1
    return last


if __name__ == "__main__":
    tyro.cli(Simulation, description=__doc__).run()
