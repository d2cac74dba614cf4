"""Running a kernel over planes on all threads, with a result that does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

JIT = {
    "nogil": True,
    "cache": True,
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
    "error_model": "numpy",
}
CHUNKS = 16


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="crossmorph")


def over_planes(kernel: Callable[..., Any], planes: int, *args: Any) -> list[Any]:
    """Call ``kernel(first, last, *args)`` for up to 16 fixed ranges of 0..planes; returns what each call gave.

    The ranges depend on ``planes`` alone. Kernels must write to the planes of their own range only.
    """
    chunks = min(CHUNKS, planes)
    edges = [planes * c // chunks for c in range(chunks + 1)]
    ranges = list(zip(edges[:-1], edges[1:], strict=True))
    threads = torch.get_num_threads()
    if threads == 1 or chunks == 1:
        return [kernel(first, last, *args) for first, last in ranges]
    return list(_pool(threads).map(lambda r: kernel(r[0], r[1], *args), ranges))
