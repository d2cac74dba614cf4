"""Names of files: endings, whether a file is there, and writing under a temporary name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from crossmorph.errors import InputError
from crossmorph.files import atomic_path
from crossmorph.io.volume import reason

T = TypeVar("T")


def suffix_of(path: Path) -> str:
    """The ending in small letters; two-part for .nii.gz, .mrk.json and the like."""
    double = path.suffix.lower() == ".gz" or path.name.lower().endswith(".mrk.json")
    return "".join(path.suffixes[-2:] if double else path.suffixes[-1:]).lower()


def stem_of(path: Path) -> str:
    """The file name without its ending (see ``suffix_of``)."""
    return path.name[: len(path.name) - len(suffix_of(path))] or path.name


def existing(path: str | Path, folders: bool = False) -> Path:
    """The path of a file that can be opened, or if they will do of a folder.

    Raises:
        InputError: it is missing, a folder, or may not be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            if folders:
                return path
            raise InputError(f"{path} is a folder; give a file")
        path.open("rb").close()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; check the spelling and the folder ({path.absolute().parent})"
        ) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be opened: {why}; check its name and permissions") from error
    return path


def by_suffix(table: Mapping[str, T], path: Path, task: str) -> T:
    """The entry of a table for the ending of a path.

    Raises:
        InputError: there is none.
    """
    suffix = suffix_of(path)
    if suffix not in table:
        raise InputError(f"cannot {task} {path}: the ending must be one of {', '.join(table)}, not {suffix!r}")
    return table[suffix]


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; what formats refuse and where ITK fails is told of the path asked for."""
    with atomic_path(path) as temporary:
        try:
            yield temporary
        except InputError as error:
            raise InputError(f"cannot write {path}: {error}") from None
        except RuntimeError as error:
            why = reason(error).replace(temporary.name, path.name)
            raise InputError(
                f"cannot write {path}: {why}; nothing half-written remains. "
                "Check the free space and that you may write there"
            ) from error
