"""``crossmorph compose``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crossmorph.commands._spaces import Spaces, need, written


@dataclass(frozen=True)
class Compose(Spaces):
    """Write several transforms one after the other as one.

    Points go through the first one first: `crossmorph compose a_to_b.h5 b_to_c.h5 -o a_to_c.h5`. An image of space
    c then comes onto the grid of a in one step, interpolated once. Formats of several links (.h5, .tfm) keep them
    apart; neighbouring affine maps are multiplied.
    """

    transforms: Positional[Annotated[tuple[Path, ...], arg(metavar="TRANSFORM TRANSFORM ...")]]
    """Transforms of any format that `crossmorph convert` reads and that needs no images."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """File to write, of any format that `crossmorph convert` writes. It is replaced if it exists."""

    def run(self) -> int:
        """Read, compose, write and return the exit code."""
        from crossmorph import io
        from crossmorph.transform import compose

        need(self.transforms, 2, "composing")
        whole = compose(*(io.read_transform(path, self.kind) for path in self.transforms))
        fixed, moving = self.grids(self.transforms[0], self.transforms[-1])
        written(replace(whole, fixed_grid=fixed, moving_grid=moving), self.output, self.to)
        return 0
