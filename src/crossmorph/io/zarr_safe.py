"""A look at a zarr array before it is unpacked: plain compression only, and no chunk larger than it may be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from crossmorph.errors import InputError
from crossmorph.io.limits import deflated_size

CODECS = {
    "blosc",
    "zstd",
    "gzip",
    "zlib",
    "lz4",
    "bytes",
    "crc32c",
    "transpose",
    "sharding_indexed",
    "delta",
    "shuffle",
}
"""Plain compression. Others (pickle, for one) may run what a file says."""


def check_array(folder: Path, array: Any) -> None:
    """Refuse codecs that are not plain compression, objects, and chunks that unpack to more than a chunk's bytes.

    The inner chunks of shards are not looked into.

    Raises:
        InputError: with the chunk or codec.
    """
    head = folder / ("zarr.json" if (folder / "zarr.json").is_file() else ".zarray")
    told = json.loads(head.read_text(encoding="utf-8"))
    steps = told.get("codecs") or [*(told.get("filters") or []), told.get("compressor")]
    codecs = [str(step.get("name", step.get("id"))) for step in steps if step]
    unknown = [codec for codec in codecs if codec not in CODECS]
    if unknown or array.dtype.kind not in "iufb":
        raise InputError(
            f"it holds {array.dtype} packed by {', '.join(codecs)}; plain numbers and packers are needed"
        )
    most = math.prod(array.chunks) * array.dtype.itemsize
    if math.prod(array.shape) * array.dtype.itemsize > 2**36:
        raise InputError(f"it claims {array.shape} values; levels above 64 GiB are not read")
    for file in folder.rglob("*"):
        if file.is_file() and not file.name.startswith((".", "zarr.json")):
            size = unpacked(file, codecs, most)
            if size > most:
                raise InputError(
                    f"the chunk {file.relative_to(folder)} unpacks to more than the {most} bytes of a chunk"
                )


def unpacked(file: Path, codecs: list[str], most: int) -> int:
    """Bytes that a chunk unpacks to, as far as can be told without doing so; at most a little above ``most``."""
    with file.open("rb") as stream:
        head = stream.read(18)
        if "sharding_indexed" in codecs:
            return 0
        if "blosc" in codecs:
            return int.from_bytes(head[4:8], "little")
        if "lz4" in codecs:
            return int.from_bytes(head[:4], "little")
        if "zstd" in codecs:
            return _zstd_size(head)
        if "gzip" in codecs or "zlib" in codecs:
            stream.seek(0)
            return deflated_size(stream, most)
    return file.stat().st_size


def _zstd_size(head: bytes) -> int:
    """The content size in the head of a zstd frame (RFC 8878, 3.1.1.1)."""
    flags = head[4] if len(head) > 4 else 0
    single = flags >> 5 & 1
    width = {0: single, 1: 2, 2: 4, 3: 8}[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    if not width:
        raise InputError("a chunk does not tell the size that it unpacks to")
    return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0)
