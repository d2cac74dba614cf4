"""``crossmorph cohort``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from crossmorph.commands.register import chosen_settings, parsed_gib, trained_settings
from crossmorph.errors import InputError
from crossmorph.settings import LinearModel, LinearSearch, Mcbo

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from crossmorph.cohort.cluster import Crew
    from crossmorph.cohort.pairs import Pair
    from crossmorph.cohort.run import State


@dataclass(frozen=True)
class Cohort:
    """Register many pairs, on this machine or a cluster: a table in, a table out.

    Writes cohort.csv (a row a pair), cohort.html (the most suspicious pairs first), pairs/ID (what crossmorph
    register writes) and logs/ID.log into the output folder. A pair that cannot be registered is a row with a
    message. The same command again goes on where a run stopped: a pair is done when its record tells of the same
    files, settings and version. Exit code 3: some pairs could not be registered, or their verdict is failed.
    """

    table: Positional[Annotated[Path, arg(metavar="PAIRS.csv")]]
    """CSV, paths relative to it: columns fixed, moving and, if wanted, id, fixed_mask, moving_mask, points
    (matching landmarks), initial (a linear transform); or a list of volumes: image and, if wanted, id, mask."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for the cohort, new or of an earlier run."""

    to: Path | None = None
    """Template: the fixed image for every volume of a list."""

    all_pairs: bool = False
    """Register every volume of a list to every other one."""

    system: str = "mcbo"
    """Registration system."""

    preset: str = "default"
    """Name of a preset of the system."""

    settings: Path | None = None
    """TOML file with settings, in place of a preset."""

    weights: Path | None = None
    """Weights, for a system that is a trained network."""

    refine: int | None = None
    """Adam steps on the pair itself after a trained network."""

    linear: LinearModel | None = None
    """Linear stage: affine (after rigid), one model alone, or none; by default what the preset says."""

    search: LinearSearch | None = None
    """Where the linear stage looks for a start; by default what the preset says."""

    deformable: bool = True
    """Follow the linear stage by the deformable one."""

    memory: Annotated[str, arg(metavar="SIZE")] = ""
    """Memory that each registration may use, such as 4GiB. By default what is planned for the largest files; a
    trained network is not planned, nor does it keep to a limit: its workers get that much."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; each worker gets a GPU of its own."""

    seed: int = 0
    """Seed of every random choice."""

    workers: int | None = None
    """Processes that register, each a pair at a time; jobs of a queueing system. By default as many as this
    machine has processors and memory for."""

    threads: int | None = None
    """Of each worker. By default this machine's are shared out; 1 for jobs."""

    scheduler: str | None = None
    """Address of a running Dask scheduler, such as tcp://node1:8786, whose workers are used."""

    slurm: Annotated[str | None, arg(metavar="OPTIONS")] = None
    """Start workers as SLURM jobs with options of sbatch: --slurm="--partition=long --time=04:00:00"."""

    pbs: Annotated[str | None, arg(metavar="OPTIONS")] = None
    """The same with PBS: --pbs="-q long -l walltime=04:00:00"."""

    sge: Annotated[str | None, arg(metavar="OPTIONS")] = None
    """The same with SGE: --sge="-q long.q -pe smp 4"."""

    quiet: bool = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Check everything, register, write and return the exit code."""
        from crossmorph.cohort.page import counts
        from crossmorph.cohort.pairs import read_pairs
        from crossmorph.cohort.run import TABLE, opened, run_cohort
        from crossmorph.job import Job

        settings = chosen_settings(self.system, self.preset, self.settings, self.linear, self.search, "")
        if self.memory and isinstance(settings, Mcbo):
            settings = replace(settings, memory_gib=parsed_gib(self.memory))
        settings = trained_settings(settings, self.weights, self.refine)
        make = partial(Job, settings=settings, deformable=self.deformable, device=self.device, seed=self.seed)
        pairs = read_pairs(self.table, make, self.to, self.all_pairs)
        with opened(self.output) as out, self._crew(pairs) as crew, watched(self.quiet) as tell:
            rows = run_cohort(pairs, out, crew, tell)
        ends = counts(rows)
        if not self.quiet:
            print(f"{self.output / TABLE}: " + ", ".join(f"{count} {end}" for end, count in ends.items()))
        return 3 if ends.get("failed") or ends.get("not registered") else 0

    def _crew(self, pairs: list[Pair]) -> AbstractContextManager[Crew]:
        """The workers that were asked for."""
        try:
            import distributed  # noqa: F401

            from crossmorph.cohort import cluster
        except ImportError as error:
            raise InputError(f"{error}; install the extra: pip install 'crossmorph[cohort]'") from None
        from crossmorph.cohort.memory import local_size, worker_bytes

        queues: dict[cluster.Queue, str | None] = {"slurm": self.slurm, "pbs": self.pbs, "sge": self.sge}
        queued = [(queue, options) for queue, options in queues.items() if options is not None]
        if len(queued) + (self.scheduler is not None) > 1:
            raise InputError("give one of --scheduler, --slurm, --pbs and --sge; each says where the workers are")
        if self.scheduler is not None:
            if self.workers or self.threads:
                raise InputError("--workers and --threads are those of the scheduler's workers; leave them out")
            return cluster.connected(self.scheduler)
        memory = worker_bytes(pairs, parsed_gib(self.memory) if self.memory else 0.0)
        if queued:
            if self.workers is None:
                raise InputError("say with --workers how many jobs to start")
            if not memory:
                raise InputError(f"the memory of {self.system} is not planned; say it with --memory")
            return cluster.queued(*queued[0], cluster.Size(self.workers, self.threads or 1, memory))
        gpus = cluster.local_gpus(self.device)
        return cluster.local(local_size(self.workers, self.threads, memory, len(gpus)), gpus)


@contextmanager
def watched(quiet: bool) -> Iterator[Callable[[State], None]]:
    """A view of pairs done, failed and the time left on a terminal; a line a pair elsewhere, or nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Left

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if quiet:
        yield lambda state: None
    elif not console.is_terminal:
        yield lambda state: console.print(told(state)) if state.last else None
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Left(),
        )
        with Progress(*columns, console=console) as bars:
            task = bars.add_task("starting workers", total=None)

            def show(state: State) -> None:
                words = f"{state.done} done, {state.failed} failed, {state.workers} workers"
                words = words if state.workers else f"{words}: waiting for some"
                bars.update(task, total=state.pairs, completed=state.done + state.failed, description=words)
                if state.last and state.last["status"] == "failed":
                    bars.console.print(told(state), markup=False)

            yield show


def told(state: State) -> str:
    """A line on the pair that has ended last."""
    row = state.last or {}
    return f"{state.done + state.failed}/{state.pairs} {row['id']}: {row.get('verdict') or row.get('message')}"
