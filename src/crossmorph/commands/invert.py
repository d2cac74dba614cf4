"""``crossmorph invert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from crossmorph.commands._spaces import Spaces, written

if TYPE_CHECKING:
    from crossmorph.transform import Transform


@dataclass(frozen=True)
class Invert(Spaces):
    """Write the inverse of a transform, and say how good it is.

    Affine maps are inverted exactly, displacement fields point by point until 0.01 mm are reached. What remains is
    where a field folds.
    """

    transform: Positional[Path]
    """Transform from fixed to moving points, of any format that `crossmorph convert` reads."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """File to write, of any format that `crossmorph convert` writes. It is replaced if it exists."""

    def run(self) -> int:
        """Read, invert, write and return the exit code."""
        transform = self.read(self.transform)
        written(transform.inverse(), self.output, self.to)
        for worst, median in residuals_mm(transform):
            print(f"inverse consistent to {median:.3f} mm (median), {worst:.3f} mm (worst)")
        return 0


def residuals_mm(transform: Transform) -> list[tuple[float, float]]:
    """Largest and median residual of each displacement field among the links, where it is covered."""
    from crossmorph.transform import Chain, DisplacementField

    links = transform.transforms if isinstance(transform, Chain) else (transform,)
    found = []
    for link in links:
        if isinstance(link, DisplacementField):
            residual = link.inversion.residual_mm[link.inversion.covered]
            if residual.numel():
                found.append((float(residual.max()), float(residual.median())))
    return found
