"""Many pairs at once: what Dask and the folder cost beside the registrations, and whether workers grow.

python benchmarks/cohort.py throughput -o results/cohort
python benchmarks/cohort.py dispatch -o results/cohort
python benchmarks/cohort.py memory -o results/cohort

All pairs are one and the same generated pair, so that every registration is the same work. Seconds are those of
warm processes: each has registered the pair once before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from peers import machine
from tables import Row
from tyro.conf import arg, subcommand

from crossmorph import io
from crossmorph.cohort import run
from crossmorph.cohort.cluster import Crew, Size, local
from crossmorph.cohort.pairs import Pair
from crossmorph.cohort.rows import waiting_row
from crossmorph.cohort.run import State, opened, run_cohort
from crossmorph.cohort.work import LOGS, attempt
from crossmorph.evaluate.tables import markdown, write_rows
from crossmorph.image import Image
from crossmorph.job import Job
from crossmorph.phantom import make_pair
from crossmorph.preprocess import onto
from crossmorph.settings import Linear, Mcbo, Refinement
from crossmorph.space import Grid

SETTINGS = Mcbo(Linear(model="none"), levels=(4,), half_width=3, refine=(Refinement(control=2, iterations=20),))


@dataclass(frozen=True)
class Throughput:
    """The pairs one after the other in one process, then by 1 and by 2 workers."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for throughput.csv and, meanwhile, the results."""

    pairs: int = 40
    """Registrations."""

    spacing_mm: float = 4.0
    """Voxel size."""

    def run(self) -> None:
        """Measure, write, print."""
        pairs = same_pairs(self.output, self.pairs + 2, self.spacing_mm)
        warm, pairs = pairs[:2], pairs[2:]
        rows = [self.loop(warm, pairs), *(self.workers(n, warm, pairs) for n in (1, 2))]
        for row in rows:
            for name in ("seconds", "processor_seconds"):
                workers = row["workers"] if name == "seconds" else 1
                row[name.replace("seconds", "overhead_percent")] = 100 * (workers * row[name] / rows[0][name] - 1)
        write_rows(rows, self.output / "throughput.csv")
        print(f"{machine()}; one thread each; {time.strftime('%Y-%m-%d')}\n\n{markdown(rows)}")

    def loop(self, warm: Sequence[Pair], pairs: Sequence[Pair]) -> Row:
        """One process, no Dask."""
        torch.set_num_threads(1)
        with fresh(self.output / "loop") as out:
            attempt(warm[0], out)
            start, busy = time.perf_counter(), time.process_time()
            for pair in pairs:
                attempt(pair, out)
            row = measured("plain loop", 1, time.perf_counter() - start, out, pairs)
            return row | {"processor_seconds": time.process_time() - busy}

    def workers(self, count: int, warm: Sequence[Pair], pairs: Sequence[Pair]) -> Row:
        """A cohort; how long its workers took to start is told apart."""
        with fresh(self.output / f"workers{count}") as out:
            begin = time.perf_counter()
            with local(Size(count, 1, 0)) as crew:
                run_cohort(warm[:count], out, crew)
                start, busy = time.perf_counter(), busy_seconds(crew)
                run_cohort(pairs, out, crew)
                row = measured(f"{count} workers", count, time.perf_counter() - start, out, pairs)
                row["processor_seconds"] = busy_seconds(crew) - busy
            return row | {"start_seconds": start - begin}


def busy_seconds(crew: Crew) -> float:
    """Processor seconds of the workers, and of this process with the scheduler in it."""
    return time.process_time() + sum(crew.client.run(time.process_time).values())


def fresh(out: Path) -> AbstractContextManager[Path]:
    """An empty cohort folder."""
    shutil.rmtree(out, ignore_errors=True)
    return opened(out)


def measured(name: str, workers: int, seconds: float, out: Path, pairs: Sequence[Pair]) -> Row:
    """A row; what lies between the pairs is the share of the workers' time in which none was registered."""
    inside = [attempt_seconds(out, pair) for pair in pairs]
    (out.parent / f"{out.name}.json").write_text(json.dumps(inside))
    return {
        "run": name,
        "workers": workers,
        "seconds": seconds,
        "pairs_per_hour": 3600 * len(pairs) / seconds,
        "seconds_in_a_pair": sum(inside) / len(pairs),
        "between_pairs_percent": 100 * (1 - sum(inside) / (workers * seconds)),
    }


def attempt_seconds(out: Path, pair: Pair) -> float:
    """What the log of a pair tells."""
    return float(re.findall(r"ended after ([\d.]+) s", (out / LOGS / f"{pair.id}.log").read_text())[-1])


@dataclass(frozen=True)
class Dispatch:
    """What a pair costs the client and the scheduler, which are one process here: rows come back at once."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for dispatch.json."""

    pairs: int = 1000
    """Rows."""

    def run(self) -> None:
        """Measure, write, print."""
        pairs = same_pairs(self.output, self.pairs, 16.0)
        run.on_worker = nothing
        with fresh(self.output / "nothing") as out, local(Size(2, 1, 0)) as crew:
            run_cohort(pairs[:10], out, crew)
            busy = time.process_time()
            run_cohort(pairs, out, crew)
            seconds = (time.process_time() - busy) / len(pairs)
        (self.output / "dispatch.json").write_text(json.dumps({"seconds_a_pair": seconds}))
        print(f"{machine()}; {1000 * seconds:.1f} ms of a processor a pair")


def nothing(pair: Pair, out: Path) -> dict[str, str]:
    """In the place of a registration."""
    return {**waiting_row(pair), "status": "done", "verdict": "ok"}


@dataclass(frozen=True)
class Memory:
    """Memory of one worker after each of many tiny pairs."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for memory.csv and, meanwhile, the results."""

    pairs: int = 500
    """Registrations."""

    spacing_mm: float = 8.0
    """Voxel size."""

    def run(self) -> None:
        """Measure, write, print."""
        pairs = same_pairs(self.output, self.pairs, self.spacing_mm)
        rows: list[Row] = []
        with fresh(self.output / "many") as out, local(Size(1, 1, 0)) as crew:
            process = worker_process(crew)

            def note(state: State) -> None:
                if state.last is not None:
                    rows.append({"pairs": state.done + state.failed, "mib": resident_mib(process)})

            ended = run_cohort(pairs, out, crew, note)
        write_rows(rows, self.output / "memory.csv")
        last = rows[len(rows) // 5 :]
        slope = torch.tensor([[row["pairs"], row["mib"]] for row in last], dtype=torch.float64)
        centred = slope - slope.mean(0)
        growth = float((centred[:, 0] * centred[:, 1]).sum() / (centred[:, 0] ** 2).sum())
        shown = [row for row in rows if row["pairs"] in (1, 10, 50, 100, 200, 300, 400, 500)]
        done = sum(row["status"] == "done" for row in ended)
        print(f"{machine()}; {done} of {len(ended)} done\n\n{markdown(shown)}")
        print(f"growth over the last four fifths: {1024 * growth:.1f} KiB a pair")


def worker_process(crew: Crew) -> int:
    """Process id of the one worker."""
    crew.client.wait_for_workers(1)
    return next(iter(crew.client.run(os.getpid).values()))


def resident_mib(process: int) -> float:
    """Memory of a process now."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def same_pairs(folder: Path, count: int, spacing_mm: float) -> list[Pair]:
    """So many pairs of the two volumes of the phantom, drawn in voxels of a size."""
    folder.mkdir(parents=True, exist_ok=True)
    phantom = make_pair(seed=0)
    files = []
    for name in ("fixed", "moving"):
        image: Image = getattr(phantom, name)
        extent, center = image.grid.extent_mm, image.grid.center
        shape = tuple(int(n) for n in extent // spacing_mm)
        grid = Grid.from_spacing(shape, spacing_mm)
        affine = grid.affine.copy()
        affine[:3, 3] += center - grid.center
        file = folder / f"{name}.nii.gz"
        io.write(onto(image, Grid(shape, affine)), file)
        files.append(file.absolute())
    job = Job(files[0], (files[1],), SETTINGS, device="cpu")
    return [Pair(f"p{n:03d}", job) for n in range(count)]


if __name__ == "__main__":
    kinds = (
        Annotated[Throughput, subcommand("throughput")]
        | Annotated[Dispatch, subcommand("dispatch")]
        | Annotated[Memory, subcommand("memory")]
    )
    tyro.cli(kinds, description=__doc__).run()  # type: ignore[arg-type]
