"""The run of a cohort: pairs go to free workers, rows come back, and the folder always tells how far it is."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from crossmorph.cohort.cluster import Crew, check_workers
from crossmorph.cohort.lock import locked
from crossmorph.cohort.page import PAGE, write_page
from crossmorph.cohort.pairs import Pair
from crossmorph.cohort.rows import Row, failed_row, waiting_row, write_table
from crossmorph.cohort.work import LOCK, LOGS, PAIRS, check_there, on_worker
from crossmorph.errors import InputError
from crossmorph.files import check_output, explained

TABLE = "cohort.csv"

TRIES = 3
"""A pair that so many workers died of is given up."""

GONE = "the Dask scheduler is gone; finished pairs are kept: start it again and give the same command"

DEADLY = (
    f"{TRIES} workers died of it, each in the middle; most often because memory ran out: give workers more with "
    "--memory, or take fewer of them"
)

LOOK_SECONDS = 1.0
"""How often new workers are looked for while nothing else happens."""

KEEP_SECONDS = 30.0
"""How often the table is written and lost workers are asked for while pairs are registered."""


@dataclass(frozen=True)
class State:
    """How far a run is."""

    pairs: int
    done: int
    failed: int
    workers: int
    last: Row | None = None


Tell = Callable[[State], None]


@contextmanager
def opened(out: Path) -> Iterator[Path]:
    """The folder of a cohort, made or found, and kept from other runs; what killed runs left is removed.

    Raises:
        InputError: it cannot be written, holds something else, or another run is at work in it.
    """
    out = out.absolute()
    if not out.exists():
        check_output(out)
    elif not out.is_dir() or (any(out.iterdir()) and not (out / LOCK).exists()):
        raise InputError(f"{out} is not the folder of a cohort; choose another one or empty this one yourself")
    with explained(out):
        for name in (PAIRS, LOGS):
            (out / name).mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK) as stream:
        stream.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        stream.write(f"process {os.getpid()} on {platform.node()}, since {since}\n")
        stream.flush()
        for left in (out / PAIRS).glob(".*"):
            shutil.rmtree(left, ignore_errors=True)
        yield out


def run_cohort(pairs: Sequence[Pair], out: Path, crew: Crew, tell: Tell = lambda state: None) -> list[Row]:
    """Register every pair that is not done yet, and write ``cohort.csv`` and ``cohort.html``.

    Args:
        pairs: see ``read_pairs``.
        out: an ``opened`` folder.
        crew: the workers.
        tell: called whenever something has changed.

    Returns:
        A row a pair, in their order.

    Raises:
        InputError: the output folder or the scheduler is gone, or a worker has another version. What is finished
            then is kept, and the same call goes on from there.
    """
    rows = {pair.id: waiting_row(pair) for pair in pairs}
    done = failed = 0
    kept = time.monotonic()
    write_table(rows.values(), out / TABLE)
    try:
        for row, workers in _rows(pairs, out, crew.client):
            if row is not None:
                rows[str(row["id"])] = row
                done, failed = done + (row["status"] == "done"), failed + (row["status"] == "failed")
            tell(State(len(pairs), done, failed, workers, row))
            if time.monotonic() > kept + KEEP_SECONDS:
                crew.tend()
                write_table(rows.values(), out / TABLE)
                kept = time.monotonic()
    finally:
        if (out / LOCK).exists():
            write_table(rows.values(), out / TABLE)
            write_page(list(rows.values()), out / PAGE)
    return list(rows.values())


def _rows(pairs: Sequence[Pair], out: Path, client: Any) -> Iterator[tuple[Row | None, int]]:
    """A row whenever a pair has ended, None now and then meanwhile, and the number of workers.

    A worker is given a pair when it has none, so that one that dies takes one pair with it. The pair then goes to
    another worker, at most ``TRIES`` times in all.
    """
    waiting, ended = deque(pairs), SimpleQueue[Any]()
    running: dict[Any, tuple[Pair, str]] = {}
    checked: set[str] = set()
    deaths: Counter[str] = Counter()
    while waiting or running:
        check_there(out)
        present = _present(client)
        new = sorted(present - checked)
        checked = (checked & present) | set(check_workers(client, new) if new else ())
        free = sorted(checked - {address for _, address in running.values()})
        for address in free[: len(waiting)]:
            pair = waiting.popleft()
            future = client.submit(on_worker, pair, out, pure=False, workers=[address])
            running[future] = pair, address
            future.add_done_callback(ended.put)
        over = [future for future, (_, address) in running.items() if address not in present and not future.done()]
        if not over:
            try:
                over = [ended.get(timeout=LOOK_SECONDS)]
            except Empty:
                yield None, len(present)
        for future in over:
            if future not in running:  # its worker was taken for dead
                continue
            pair, _ = running.pop(future)
            row = _row(future, pair)
            if row is None:
                future.cancel()
                deaths[pair.id] += 1
                if deaths[pair.id] < TRIES:
                    waiting.appendleft(pair)
                    continue
                row = failed_row(pair, DEADLY)
            yield row, len(present)


def _present(client: Any) -> set[str]:
    """Addresses of the workers.

    Raises:
        InputError: the scheduler is gone.
    """
    try:
        if client.status == "running":
            return set(client.nthreads())
    except (OSError, TimeoutError):
        pass
    raise InputError(GONE)


def _row(future: Any, pair: Pair) -> Row | None:
    """Of a pair that has ended; None where its worker died."""
    from distributed import KilledWorker

    if future.status == "finished":
        row: Row = future.result()
        return row
    if future.status == "pending":
        return None
    if future.status == "error":
        error = future.exception()
        if isinstance(error, KilledWorker):
            return None
        raise InputError(f"workers cannot run crossmorph: {type(error).__name__}: {error}")
    raise InputError(GONE)
