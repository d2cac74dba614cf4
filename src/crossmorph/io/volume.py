"""What every image format shares: the numbers as stored, and one message for whatever goes wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.space import Array


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as its file gives it.

    Args:
        values: (C, I, J, K), of any real type, scale factors applied.
        affine: (4, 4), voxels to RAS mm.
        dtype: the type a file written from these values should have.
        notes: what reading had to decide, in words.
    """

    values: NDArray[Any]
    affine: Array
    dtype: np.dtype[Any]
    notes: tuple[str, ...] = ()


def to_dtype(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values in a type that files can hold: rounded and clipped for whole numbers, bool as uint8."""
    dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")
    if dtype.kind not in "iu":
        return values.astype(np.float64 if dtype.itemsize >= 8 else np.float32)
    if values.dtype == dtype:
        return values
    limits = np.iinfo(dtype)
    wide = np.rint(values.astype(np.float64 if dtype.itemsize >= 4 else np.float32))
    out: NDArray[Any] = np.clip(wide, limits.min, limits.max).astype(dtype)
    if dtype.itemsize == 8:  # the largest 64-bit numbers have no exact float64
        out[wide >= limits.max] = limits.max
    return out


@contextmanager
def reading(path: Path, what: str = "an image") -> Iterator[None]:
    """Turn whatever a malformed file makes a reader raise into one message that names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error.__cause__
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as {what}: {reason(error)}. It may be damaged, cut short, or of another "
            "format than its ending says; open it in a viewer or fetch it again"
        ) from error


def reason(error: Exception) -> str:
    """The sentence that matters in an exception; ITK wraps it in file names and addresses."""
    text = re.split(r"(?:ITK |sitk::)ERROR: ", str(error))[-1]
    text = re.sub(r"\w+\(0x[0-9a-f]+\): ", "", text).split("Reason:")[0]
    return " ".join(text.split()).rstrip(".") or type(error).__name__
