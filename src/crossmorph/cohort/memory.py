"""How much memory and how many threads the workers of a cohort get."""

from __future__ import annotations

import os
from collections.abc import Sequence

from crossmorph.channels import Channel, checked
from crossmorph.cohort.cluster import Size
from crossmorph.cohort.pairs import Pair
from crossmorph.errors import InputError
from crossmorph.plan import GIB, available_bytes, unlimited
from crossmorph.settings import Mcbo

WORKER = 0.15 * GIB
"""Bytes of the worker itself, beside the registration."""

ROOM = 1.25
"""A worker is stopped when it takes so much more than was planned: plans are not exact, nor are file sizes."""


def worker_bytes(pairs: Sequence[Pair], told_gib: float = 0.0) -> int:
    """Memory above which a worker is stopped: of the pair with the largest files as planned, and some room.

    0, no limit, for trained networks, whose memory is not planned.

    Args:
        pairs: of the cohort.
        told_gib: in place of the plan.

    Raises:
        InputError: the images of that pair cannot be read.
    """
    from crossmorph import io

    job = max(pairs, key=lambda pair: pair.size).job
    if isinstance(job.settings, Mcbo):
        told_gib = told_gib or job.settings.memory_gib
    if told_gib:
        return int(ROOM * told_gib * GIB + WORKER)
    if not isinstance(job.settings, Mcbo):
        return 0
    fixed = io.read(job.fixed)
    channels = checked([Channel(fixed, io.read(path)) for path in job.moving], None, None)
    plan = unlimited(channels, job.settings, job.deformable, elsewhere=True)
    return int(ROOM * plan.peak_bytes + WORKER)


def local_size(workers: int | None, threads: int | None, memory: int, gpus: int) -> Size:
    """Workers of this machine that its processors, memory and GPUs suffice for.

    Args:
        workers: wanted; None for one a GPU, else as many as there are processors, less where memory is short.
        threads: of each; None shares the processors out.
        memory: bytes of each, 0 where it is not known.
        gpus: that may be used.

    Raises:
        InputError: so many do not fit.
    """
    processors, free = len(os.sched_getaffinity(0)), available_bytes()
    if workers is None:
        workers = gpus or max(1, min(processors, int(free // memory) if memory else processors))
    elif gpus and workers > gpus:
        raise InputError(
            f"{workers} workers need a GPU each, but there are {gpus}; use --workers {gpus} or --device cpu"
        )
    elif workers > 1 and workers * memory > free:
        raise InputError(
            f"{workers} workers need {memory / GIB:.2f} GiB each, but {free / GIB:.2f} GiB are free in all; use "
            f"--workers {max(1, int(free // memory))}, or a smaller --memory"
        )
    return Size(workers, threads or max(1, processors // max(workers, 1)), memory)
