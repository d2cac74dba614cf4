"""Keeping two runs apart: a lock that the system frees when its owner dies, however it dies."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from crossmorph.errors import InputError
from crossmorph.files import explained

log = logging.getLogger("crossmorph")


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[TextIO]:
    """The file, open for appending, while no other process holds it; the system frees it when its owner dies.

    Where the file system has no locks this is logged, and nothing is kept apart.

    Args:
        path: made if it is not there.
        wait: until the other process is done.

    Raises:
        InputError: the file cannot be opened, or another process holds it and ``wait`` is not set.
    """
    with explained(path):
        stream = path.open("a", encoding="utf-8")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = path.read_text(encoding="utf-8").strip()
            raise InputError(
                f"another run is at work in {path.parent} ({owner or 'unknown'}); wait for it, stop it, or choose "
                "another output folder"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s); do not start two runs on one folder", path, error.strerror)
        yield stream
