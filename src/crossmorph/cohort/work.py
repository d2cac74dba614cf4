"""What a worker does with a pair: look whether it is done, register it, and give back a row."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crossmorph.cohort.lock import locked
from crossmorph.cohort.pairs import Pair
from crossmorph.cohort.rows import Row, done_row, failed_row
from crossmorph.errors import InputError
from crossmorph.files import RECORD
from crossmorph.job import same_work

PAIRS, LOGS, LOCK = "pairs", "logs", ".lock"
"""Folders of results and of logs in the folder of a cohort, and the file that a run holds."""

log = logging.getLogger("crossmorph")

turn = threading.Lock()
"""A worker registers one pair at a time, on all its threads."""


def on_worker(pair: Pair, out: Path) -> Row:
    """``attempt`` on a Dask worker, with as many threads as the worker was given."""
    import torch
    from distributed import get_worker

    with turn:
        torch.set_num_threads(get_worker().state.nthreads)
        return attempt(pair, out)


def attempt(pair: Pair, out: Path) -> Row:
    """Register a pair into its folder unless that is done; whatever goes wrong becomes the row's message.

    Args:
        pair: its result goes to ``out/pairs/ID``.
        out: folder of the cohort.
    """
    try:
        check_there(out)
        with logged(out / LOGS / f"{pair.id}.log"):
            try:
                return _done(pair, out)
            except InputError as error:
                log.error("%s", error)
                return failed_row(pair, str(error))
            except Exception as error:
                log.exception("this should not happen")
                return failed_row(pair, f"a bug: {type(error).__name__}: {error}; the log of the pair tells where")
    except InputError as error:  # there is no folder to write a log to
        return failed_row(pair, str(error))


def _done(pair: Pair, out: Path) -> Row:
    folder = out / PAIRS / pair.id
    record = finished(pair, folder)
    if record is None:
        pair.job.save(folder, overwrite=folder.exists())
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    log.info("%s", record["verdict"]["status"])
    return done_row(pair, record)


def finished(pair: Pair, folder: Path) -> dict[str, Any] | None:
    """The record of an earlier result of the same files, settings and version, complete on disk; else None."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        whole = all((folder / name).is_file() for name in record["outputs"])
        same = whole and same_work(pair.job.request(), record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record if same else None


def check_there(out: Path) -> None:
    """Refuse to write where a disk was unplugged or a folder deleted, though the place could be written to.

    Raises:
        InputError: the folder of the cohort, as its run made it, is not there.
    """
    if not all((out / name).exists() for name in (PAIRS, LOGS, LOCK)):
        raise InputError(
            f"the output folder {out} is gone or was emptied; bring it back and give the same command again"
        )


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What the package logs meanwhile goes to a file; another process with the same pair is waited for."""
    with locked(path, wait=True) as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handler.setLevel(logging.INFO)
        before = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        start = time.perf_counter()
        log.info("started on %s, process %d", platform.node(), os.getpid())
        try:
            yield
        finally:
            log.info("ended after %.1f s", time.perf_counter() - start)
            log.removeHandler(handler)
            log.setLevel(before)
