"""Transforms one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from crossmorph.errors import InputError
from crossmorph.space import Grid
from crossmorph.transform.affine import Affine
from crossmorph.transform.base import Transform
from crossmorph.transform.field import DisplacementField


@dataclass(frozen=True, eq=False)
class Chain(Transform):
    """Transforms applied left to right: ``Chain((a, b))(x)`` is ``b(a(x))``. Nothing is resampled in between.

    Args:
        transforms: at least one; chains among them are unpacked.
        fixed, moving, fixed_grid, moving_grid: taken from the first and the last transform where not given.

    Raises:
        InputError: no transform.
    """

    transforms: Sequence[Transform]
    fixed: str = field(default="", kw_only=True)
    moving: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if not self.transforms:
            raise InputError("a chain needs at least one transform; use Affine.identity() to do nothing")
        first, last = self.transforms[0], self.transforms[-1]
        flat: list[Transform] = []
        for transform in self.transforms:
            flat.extend(transform.transforms if isinstance(transform, Chain) else [transform])
        object.__setattr__(self, "transforms", tuple(flat))
        object.__setattr__(self, "fixed", self.fixed or first.fixed)
        object.__setattr__(self, "moving", self.moving or last.moving)
        object.__setattr__(self, "fixed_grid", self.fixed_grid or first.fixed_grid)
        object.__setattr__(self, "moving_grid", self.moving_grid or last.moving_grid)

    def _map(self, points: torch.Tensor) -> torch.Tensor:
        for transform in self.transforms:
            points = transform(points)
        return points

    def inverse(self) -> Chain:
        """The inverses in reverse order."""
        return Chain(tuple(t.inverse() for t in reversed(self.transforms)), **self.swapped_spaces)

    def collapse(self, grid: Grid, device: torch.device | str = "cpu") -> DisplacementField:
        """One displacement field on a grid of the fixed space, every link sampled once."""
        return DisplacementField(self.displacements(grid, device), grid, **self.spaces)


def compose(*transforms: Transform) -> Transform:
    """Left to right, neighbouring affine maps multiplied into one; a lone link comes back without a chain."""
    chain = Chain(transforms)
    links: list[Transform] = []
    for link in chain.transforms:
        if links and isinstance(link, Affine) and isinstance(links[-1], Affine):
            links[-1] = Affine(link.matrix @ links[-1].matrix)
        else:
            links.append(link)
    return replace(links[0], **chain.spaces) if len(links) == 1 else Chain(links, **chain.spaces)
