"""Searching a level in blocks, so that its cost volume fits into the memory there is; the result is the same.

A cost volume holds (2 half_width + 1)^3 numbers a cell, 729 by default. ``coupled_convex`` works through it in
slabs of planes; where planes are large, they are cut into rectangles as well, each with a halo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch

WINDOWS = 9
"""Cells that a cell's result depends on: one for each of seven smoothings and two cost windows."""

MOST_PARTS = 16
"""An axis is cut into at most this many parts."""

BYTES = 4
"""Of one number of a cost volume."""


@dataclass(frozen=True)
class Economy:
    """How a run saves memory.

    Attributes:
        cost_bytes: a cost volume is worked on in blocks of at most about this size. The result is the same.
        half: descriptors of single voxels are kept in half precision until a block needs them.
    """

    cost_bytes: float = 2.0**32
    half: bool = False


@dataclass(frozen=True)
class Division:
    """How one level is cut.

    Attributes:
        parts: along the three axes; slabs along the first are made by ``coupled_convex``.
        bytes: of the largest piece of a cost volume.
        cells: cells whose costs are computed, halos counted each time.
    """

    parts: tuple[int, int, int]
    bytes: float
    cells: int


Box = tuple[slice, slice, slice]


def pieces(shape: Sequence[int], parts: Sequence[int], halo: int) -> Iterator[tuple[Box, Box, Box]]:
    """A volume cut along its axes: (where in the volume, where in the piece with halo, piece with halo).

    The larger pieces come first: of 5 cells in 2 parts the first gets 3. With a halo of half_width + ``WINDOWS``
    cells the stitched result of the coupled convex optimisation equals that of the undivided volume.
    """
    lines = []
    for n, count in zip(shape, parts, strict=True):
        cuts = [-(-n * p // count) for p in range(count + 1)]
        lines.append([(low, high) for low, high in pairwise(cuts) if low < high])
    for ends in product(*lines):
        outer = [(max(low - halo, 0), min(high + halo, n)) for (low, high), n in zip(ends, shape, strict=True)]
        inner = [(low - o[0], high - o[0]) for (low, high), o in zip(ends, outer, strict=True)]
        whole, part, around = (tuple(slice(*e) for e in box) for box in (ends, inner, outer))
        yield (*whole,), (*part,), (*around,)  # type: ignore[misc]  # three slices each


def divided(shape: Sequence[int], half_width: int, cost_bytes: float) -> Division:
    """The division that computes the fewest costs with at most ``cost_bytes`` at once; else the thriftiest one."""
    planes, halo = shape[0], half_width + WINDOWS
    found: list[Division] = []
    for rows, columns in product(range(1, MOST_PARTS + 1), repeat=2):
        sides = [_widest(n, count, halo) for n, count in zip(shape[1:], (rows, columns), strict=True)]
        plane = BYTES * sides[0] * sides[1] * (2 * half_width + 1) ** 3
        thick = max(int(min(cost_bytes / plane, planes + 2 * WINDOWS)) - 2 * WINDOWS, 1)
        slabs = -(-planes // thick)
        computed = planes + 2 * WINDOWS * (slabs - 1)
        need = plane * min(thick + 2 * WINDOWS, planes)
        found.append(Division((1, rows, columns), need, rows * columns * sides[0] * sides[1] * computed))
    able = [division for division in found if division.bytes <= cost_bytes]
    return min(able, key=lambda d: d.cells) if able else min(found, key=lambda d: (d.bytes, d.cells))


def _widest(n: int, count: int, halo: int) -> int:
    """Cells of the largest part with its halo."""
    return min(n, -(-n // count) + halo * min(count - 1, 2))


def in_blocks(
    shape: Sequence[int], half_width: int, cost_bytes: float, solve: Callable[[Box, float], torch.Tensor]
) -> torch.Tensor:
    """The field (3, I, J, K) of a level from those of its pieces.

    Args:
        shape: of the level.
        half_width: reach of the search in cells.
        cost_bytes: see ``Economy``.
        solve: field of the piece in a box, and the bytes that its slabs may take.
    """
    division = divided(shape, half_width, cost_bytes)
    if division.parts == (1, 1, 1):
        return solve((slice(None),) * 3, division.bytes)
    field: torch.Tensor | None = None
    for whole, inner, outer in pieces(shape, division.parts, half_width + WINDOWS):
        part = solve(outer, division.bytes)[(slice(None), *inner)]
        field = part.new_empty((3, *shape)) if field is None else field
        field[(slice(None), *whole)] = part
    assert field is not None
    return field
