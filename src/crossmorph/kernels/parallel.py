"""Compiling kernels, and running them over planes on all threads; the result does not depend on how many."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
Offsets = NDArray[np.int32]
Number = float | np.float32

P = ParamSpec("P")
R = TypeVar("R")

CHUNKS = 16


def compiled(kernel: Callable[P, R]) -> Callable[P, R]:
    """A kernel as machine code, kept on disk. Sums may be reordered; NaN and infinity keep their meaning."""
    fast = {"contract", "reassoc", "nsz", "arcp"}
    dispatcher: Callable[P, R] = njit(nogil=True, cache=True, fastmath=fast, error_model="numpy")(kernel)
    return dispatcher


def inlined(part: Callable[P, R]) -> Callable[P, R]:
    """A part that is compiled into the kernels that call it, where a call would be slow."""
    dispatcher: Callable[P, R] = njit(inline="always")(part)
    return dispatcher


@compiled
def add(total: Floats, values: Floats) -> None:
    """``total`` += ``values``, two lines of voxels."""
    for k in range(total.size):
        total[k] += values[k]


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool a process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"crossmorph-{process}")


def over_planes(kernel: Callable[..., Any], planes: int, *args: Any, chunks: int = CHUNKS) -> list[Any]:
    """Call ``kernel(first, last, *args)`` for up to ``chunks`` ranges of 0..planes; returns what each call gave.

    The ranges depend on ``planes`` and ``chunks`` alone. Kernels must write to the planes of their own range only.
    """
    if planes == 0:
        return []
    chunks = min(chunks, planes)
    ranges = list(pairwise(planes * c // chunks for c in range(chunks + 1)))
    helpers = min(torch.get_num_threads(), chunks) - 1
    if helpers == 0:
        return [kernel(first, last, *args) for first, last in ranges]
    found: list[Any] = [None] * chunks
    left = iter(range(chunks))

    def work() -> None:
        for chunk in left:
            found[chunk] = kernel(*ranges[chunk], *args)

    others = [_pool(helpers, os.getpid()).submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        wait(others)
    for other in others:
        other.result()
    return found
