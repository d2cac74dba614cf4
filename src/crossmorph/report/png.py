"""PNG pictures and compact volumes as text, with nothing but the standard library."""

from __future__ import annotations

import base64
import gzip
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def png(pixels: NDArray[np.uint8]) -> bytes:
    """(rows, columns, 3) RGB as a PNG file (ISO/IEC 15948: 8 bits a channel, no filter)."""
    rows, columns, _ = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def picture(pixels: NDArray[np.uint8]) -> str:
    """(rows, columns, 3) RGB as the address of an ``img``."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def side_by_side(panels: Sequence[NDArray[np.floating[Any]]], gap: int = 6) -> NDArray[np.uint8]:
    """Pictures (rows, columns, 3) of 0 to 255 in a row, centred, with black between."""
    height = max(len(panel) for panel in panels)
    joined = []
    for panel in panels:
        above = (height - len(panel)) // 2
        joined.append(np.pad(panel, ((above, height - len(panel) - above), (0, gap), (0, 0))))
    return np.concatenate(joined, axis=1)[:, :-gap].round().astype(np.uint8)


def packed(values: NDArray[np.integer[Any]]) -> str:
    """The little-endian bytes of an array, gzipped, as base64. The first axis runs fastest."""
    flat = np.asarray(values).astype(values.dtype.newbyteorder("<")).tobytes(order="F")
    return base64.b64encode(gzip.compress(flat, 6, mtime=0)).decode()
