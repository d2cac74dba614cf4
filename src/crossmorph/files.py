"""Writing without leaving halves behind: a file or a folder appears complete, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crossmorph.errors import InputError

RECORD = "record.json"
"""The file that marks a folder as a result of ours; only such a folder is ever replaced."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path``, with the same ending, that becomes ``path`` when the block succeeds.

    Raises:
        InputError: the folder is missing or not writable, the disk is full, or ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file name")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    temporary = _beside(path)
    try:
        with explained(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block succeeds and vanishes when it fails.

    Missing parents are made. With ``overwrite`` an earlier result (a folder with a record.json in it) or an
    empty folder is replaced; anything else is never touched.

    Raises:
        InputError: ``out`` exists and may not be replaced, its parent is not writable, or the disk is full.
    """
    out = Path(out)
    check_output(out, overwrite)
    temporary = _beside(out.absolute())
    try:
        with explained(out):
            temporary.mkdir(parents=True)
            yield temporary
            check_output(out, overwrite)
            _swap(temporary, out.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(out: str | Path, overwrite: bool = False) -> None:
    """Refuse an output folder that could not be written in the end; call it before the long work starts.

    Raises:
        InputError: ``out`` exists and may not be replaced, or the folder it would be made in is not writable.
    """
    out = Path(out)
    if not os.path.lexists(out):
        above = next(p for p in out.absolute().parents if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"cannot write {out}: {above} is not a folder you may write to; choose another place")
        return
    if not overwrite:
        raise InputError(f"{out} exists already; choose another output folder or add --overwrite")
    if out.is_symlink() or not out.is_dir():
        raise InputError(f"{out} is not a folder; choose another output folder")
    if any(out.iterdir()) and not (out / RECORD).is_file():
        raise InputError(
            f"{out} holds files but no {RECORD}, so it is not an earlier result and is not overwritten; "
            "choose another output folder or empty this one yourself"
        )


def _swap(new: Path, out: Path) -> None:
    """Put ``new`` in the place of ``out``; the old folder comes back if that fails."""
    if not out.exists():
        new.rename(out)
        return
    old = _beside(out)
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(4)}-{path.name}")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says while writing into one message."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}; nothing half-written remains. "
            "Check the free space and that you may write there"
        ) from error
