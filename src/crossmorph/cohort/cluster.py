"""Workers for a cohort: processes of this machine, a Dask scheduler by address, or jobs of a queueing system.

A worker registers one pair at a time on all its threads, so that pairs share no memory and a death costs one pair.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from crossmorph.errors import InputError
from crossmorph.record import versions

Queue = Literal["slurm", "pbs", "sge"]

SECONDS = 10
"""A scheduler that does not answer for so long is not there."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": 2**25, "MALLOC_TRIM_THRESHOLD_": 2**26}
"""Bytes at which glibc's own adaptation ends. Dask has workers give memory back at once, so that every large array
is asked from the system anew: a registration then takes a third more processor time."""

QUIET: dict[str, object] = {
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ALLOCATOR.items()},
    # Workers hold no data that could be spilled, and memory that is not given back must not pause them.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    # Sampling what a registration does, and ticking, cost processor time for nothing here.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500 ms",
    "distributed.comm.timeouts.connect": f"{SECONDS} s",
}


PATIENT = {"distributed.deploy.lost-worker-timeout": "1000 days"}
"""A local worker that died is replaced by the nanny that started it, however long that takes on a busy machine."""


@dataclass(frozen=True)
class Size:
    """Of the workers: how many, their threads, and the memory in bytes above which one is stopped; 0 for none."""

    workers: int
    threads: int
    memory: int

    def __post_init__(self) -> None:
        if self.workers < 1 or self.threads < 1:
            raise InputError(f"workers and threads must be 1 or more, not {self.workers} and {self.threads}")


@dataclass(frozen=True)
class Crew:
    """The workers of a run.

    Attributes:
        client: a ``distributed.Client``.
        tend: to be called now and then; asks again for workers that are lost for good.
    """

    client: Any
    tend: Callable[[], None] = lambda: None


@contextmanager
def local(size: Size, gpus: Sequence[str] = ()) -> Iterator[Crew]:
    """Workers on this machine.

    Args:
        size: of the workers.
        gpus: names for CUDA_VISIBLE_DEVICES, one for each worker; none without GPUs.
    """
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster

    with dask.config.set(QUIET | PATIENT):
        options = [worker_options(size, gpus[n : n + 1]) for n in range(size.workers)]
        workers = {n: {"cls": Nanny, "options": own} for n, own in enumerate(options)}
        scheduler = {
            "cls": Scheduler,
            "options": {"dashboard": False, "dashboard_address": ":0", "host": "127.0.0.1"},
        }
        with (
            SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            yield Crew(client)


def worker_options(size: Size, gpu: Sequence[str]) -> dict[str, Any]:
    """Options of a ``distributed.Nanny``, which starts a worker, watches its memory and replaces a dead one."""
    env = {"CUDA_VISIBLE_DEVICES": gpu[0]} if gpu else {}
    shared = {"host": "127.0.0.1", "silence_logs": logging.CRITICAL}
    return {"nthreads": size.threads, "memory_limit": size.memory, "env": env, **shared}


@contextmanager
def connected(address: str) -> Iterator[Crew]:
    """The workers of a running scheduler, now and later.

    Raises:
        InputError: nothing answers there.
    """
    import dask
    from distributed import Client

    try:
        with dask.config.set(QUIET):
            client = Client(address, timeout=SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(
            f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler`, which prints its "
            "address, and check names, ports and firewalls"
        ) from None
    with client:
        yield Crew(client)


@contextmanager
def queued(queue: Queue, options: str, size: Size) -> Iterator[Crew]:
    """Workers that are jobs of a queueing system; one that ends early is asked for again.

    Raises:
        InputError: the queueing system is not there, or takes no jobs.
    """
    import dask
    from distributed import Client, Status

    with dask.config.set(QUIET), queue_cluster(queue, options, size) as cluster:

        async def submitted() -> None:
            for _ in range(size.workers):
                cluster.worker_spec.update(cluster.new_worker_spec())
            try:
                await cluster._correct_state()  # as cluster.scale does, whose errors only reach a log
            except Exception:
                for job in cluster.workers.values():
                    if job.job_id is None:  # closing the cluster would trip over jobs that never were
                        job.status = Status.closed
                raise

        try:
            cluster.sync(submitted)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{queue} takes no jobs: {' '.join(str(error).split())}; see what its own commands say, and "
                f"change --workers, --threads, --memory or the options after --{queue}"
            ) from None
        with Client(cluster, set_as_default=False) as client:
            yield Crew(client, lambda: cluster.scale(jobs=size.workers))


def queue_cluster(queue: Queue, options: str, size: Size) -> Any:
    """The ``dask_jobqueue`` cluster of a queueing system, without jobs yet.

    Args:
        queue: which system.
        options: for its directives, as its manual writes them, such as ``--partition=long --time=04:00:00``.
        size: of the workers, each a job of its own.

    Raises:
        InputError: ``options`` is more than one line.
    """
    import dask
    import dask_jobqueue

    if not options.isprintable():
        raise InputError(f"--{queue} takes the options of a job on one line, not {options!r}")
    kind, time_limit = {
        "slurm": ("SLURMCluster", "#SBATCH -t "),
        "pbs": ("PBSCluster", "#PBS -l walltime="),
        "sge": ("SGECluster", "#$ -l h_rt="),
    }[queue]
    return getattr(dask_jobqueue, kind)(
        cores=size.threads,
        processes=1,
        memory=f"{size.memory} B",
        job_name="crossmorph",
        job_script_prologue=[
            *(dask.config.get(f"jobqueue.{queue}.job-script-prologue", None) or ()),
            *(f"export {name}={value}" for name, value in ALLOCATOR.items()),
        ],
        job_extra_directives=[options] if options else [],
        job_directives_skip=[time_limit],  # the library's half an hour; the queue's own limit holds, or the user's
        scheduler_options={"dashboard": False, "dashboard_address": ":0"},
    )


# -- looking after workers ---------------------------------------------------------------------------------------


def check_workers(client: Any, addresses: Sequence[str]) -> list[str]:
    """Those of the workers that answer, if they run this version of the package.

    Raises:
        InputError: one has another version, or none.
    """
    mine, answering = versions()["crossmorph"], []
    told = client.run(versions, workers=list(addresses), on_error="return")
    for address, found in told.items():
        if isinstance(found, OSError):  # it has gone meanwhile
            continue
        theirs = None if isinstance(found, Exception) else found["crossmorph"]
        if theirs != mine:
            what = f"has crossmorph {theirs}" if theirs else f"cannot run crossmorph ({found})"
            raise InputError(
                f"the worker {address} {what}, but this is crossmorph {mine}; install this version there, in the "
                "environment that `dask worker` is started from, and start it again"
            )
        answering.append(address)
    return answering


def local_gpus(device: str) -> list[str]:
    """Names of this machine's GPUs for CUDA_VISIBLE_DEVICES; none where the processor is asked for."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return []
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return told.split(",") if told else [str(n) for n in range(torch.cuda.device_count())]
