"""How much memory a file may ask for: what it claims must fit to the bytes that are there."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import BinaryIO

from crossmorph.errors import InputError

UNSUSPICIOUS = 2**28
"""Bytes that a file may always claim."""

DEFLATE = 1032
"""How many times smaller deflate makes the most boring data."""


def check_size(shape: Sequence[int], itemsize: int, stored: int, packed: bool = True) -> None:
    """Refuse an array that its file cannot hold, before memory is asked for.

    Args:
        shape, itemsize: of the array as claimed.
        stored: bytes of the file.
        packed: whether it may be compressed.

    Raises:
        InputError: it claims more than these bytes can hold.
    """
    if min(shape, default=1) < 0:
        raise InputError(f"it claims sizes of {tuple(shape)}, which are negative")
    claimed = math.prod(int(n) for n in shape) * itemsize
    if claimed > max(UNSUSPICIOUS, stored * (DEFLATE if packed else 1)):
        raise InputError(
            f"it claims {tuple(shape)} values, {claimed / 2**30:.1f} GiB, but has {stored / 2**20:.2f} MiB of file"
        )


def deflated_size(stream: BinaryIO, most: int) -> int:
    """Bytes that a gzip or zlib stream unpacks to, found without keeping them; it ends a little above ``most``."""
    unpacker, total = zlib.decompressobj(wbits=47), 0
    while total <= most and not unpacker.eof:
        block = unpacker.unconsumed_tail or stream.read(2**16)
        if not block:
            break
        total += len(unpacker.decompress(block, 2**20))
    return total
