"""Changes to files that get past their outer layers: words for odd words, lines, magic numbers, cuts,
brackets without end."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from random import Random

WORD = re.compile(rb'[^\s,:=\[\]{}()"]+')
HEAD = 4096
"""Bytes in which words and lines are looked for."""

ODD = tuple(
    b"0,-1,1,2,3,7,255,65536,2147483647,-2147483648,9223372036854775807,99999999999999999999,1e9,1e-320,-0.0,1e309,nan,"
    b'-inf,null,true,{},[],[[]],"",\\u0000,\xff\xfe,../x,/etc/passwd,a.raw,LOCAL,LIST,%d.raw,"1",x,\x00'.split(
        b","
    )
)
NUMBERS = tuple(
    struct.pack(kind, value)
    for kind, values in (
        ("<b", (0, -1, 127, -128)),
        ("<h", (0, -1, 1, 256, 32767, -32768)),
        ("<i", (0, -1, 1, 65536, 2**31 - 1, -(2**31))),
        ("<q", (0, -1, 2**32, 2**63 - 1)),
        ("<f", (0, -1, 1e-38, 3e38, float("nan"), float("inf"))),
        ("<d", (0, -1, 1e300, float("nan"), float("-inf"))),
    )
    for value in values
)


def mutated(raw: bytes, random: Random) -> bytes:
    """The bytes with one to four changes."""
    for _ in range(random.choice((1, 1, 2, 4))):
        raw = random.choice(CHANGES)(raw, random)
    return raw


def _word(raw: bytes, random: Random) -> bytes:
    """One word becomes an odd one, or another of the same file."""
    words = list(WORD.finditer(raw, 0, HEAD))
    if not words:
        return raw
    old = random.choice(words)
    new = random.choice(ODD) if random.random() < 0.7 else random.choice(words)[0]
    return raw[: old.start()] + new + raw[old.end() :]


def _line(raw: bytes, random: Random) -> bytes:
    """One line is left out, doubled, or moved to the front."""
    head, rest = raw[:HEAD], raw[HEAD:]
    lines = head.split(b"\n")
    line = random.randrange(len(lines))
    changed = random.choice(
        (
            lines[:line] + lines[line + 1 :],
            lines[: line + 1] + lines[line:],
            [lines[line], *lines[:line], *lines[line + 1 :]],
        )
    )
    return b"\n".join(changed) + rest


def _number(raw: bytes, random: Random) -> bytes:
    """A magic number over what was there."""
    number = random.choice(NUMBERS)
    at = random.randrange(max(1, len(raw) - len(number) + 1))
    at -= at % len(number) if random.random() < 0.8 else 0
    return raw[:at] + number + raw[at + len(number) :]


def _byte(raw: bytes, random: Random) -> bytes:
    """One byte differs."""
    at = random.randrange(max(1, len(raw)))
    return raw[:at] + bytes([random.randrange(256)]) + raw[at + 1 :]


def _cut(raw: bytes, random: Random) -> bytes:
    """The end, or a piece, is missing."""
    low, high = sorted((random.randrange(len(raw) + 1), random.randrange(len(raw) + 1)))
    return raw[:low] if random.random() < 0.5 else raw[:low] + raw[high:]


def _nested(raw: bytes, random: Random) -> bytes:
    """One word becomes more brackets than a parser that calls itself can follow."""
    words = list(WORD.finditer(raw, 0, HEAD))
    if not words:
        return raw
    old = random.choice(words)
    return raw[: old.start()] + random.choice((b"[", b'{"a":', b'[{"a":')) * 2500 + raw[old.end() :]


Change = Callable[[bytes, Random], bytes]
CHANGES: tuple[Change, ...] = (_word, _word, _word, _line, _number, _number, _byte, _cut, _nested)
