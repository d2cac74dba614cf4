"""NumPy archives (.npz), read with bounded memory and without running anything they hold."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.io.limits import check_size

Shape = tuple[int, ...]


def declared(path: Path) -> dict[str, tuple[Shape, np.dtype[Any]]]:
    """Names, shapes and types of the arrays in an archive, without unpacking them.

    Raises:
        InputError: a member is no plain array, or holds fewer bytes than its head says.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                raise InputError(f"the archive holds {member.filename[:80]!r}, which is no array")
            with archive.open(member) as stream:
                read_head = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                    np.lib.format.read_magic(stream), np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_head(stream)
            if dtype.hasobject or dtype.kind not in "iufb":
                raise InputError(f"{member.filename[:80]!r} holds {dtype}, not plain numbers")
            check_size(shape, dtype.itemsize, member.compress_size)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise InputError(f"{member.filename[:80]!r} claims {shape} but has {member.file_size} bytes")
            found[member.filename.removesuffix(".npy")] = (shape, dtype)
    return found


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Some arrays of a .npz archive.

    Raises:
        InputError: an array is missing, or one is no plain array or claims more than the file can hold.
    """
    heads = declared(path)
    missing = [name for name in names if name not in heads]
    if missing:
        there = ", ".join(sorted(heads))[:200] or "nothing"
        raise InputError(f"the archive has no {', '.join(missing)}; it holds {there}")
    with np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name]) for name in names}
