"""What commands about transforms share: options, and the grids that a record beside a transform tells."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crossmorph.errors import InputError

if TYPE_CHECKING:
    from crossmorph.space import Grid
    from crossmorph.transform import Transform

Kind = Literal["itk", "fsl", "freesurfer", "torch", "learn2reg"]


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """Options of commands that read and write transforms."""

    fixed: Path | None = None
    """The fixed image (of the first transform). By default the record.json beside the transform tells its grid."""

    moving: Path | None = None
    """The moving image (of the last transform), the same."""

    kind: Kind | None = None
    """Program that the input is of, where its ending does not tell: fsl, learn2reg."""

    to: Kind | None = None
    """Program that the output is for, where its ending does not tell: fsl, learn2reg."""

    def grids(self, first: Path, last: Path) -> tuple[Grid | None, Grid | None]:
        """Of both images: as told by the options, else by the records beside the transforms."""
        from crossmorph import io

        told = io.read(self.fixed).grid if self.fixed else recorded_grids(first)[0]
        return told, io.read(self.moving).grid if self.moving else recorded_grids(last)[1]

    def read(self, path: Path) -> Transform:
        """A transform that knows its grids, as far as they are known."""
        from crossmorph import io

        fixed, moving = self.grids(path, path)
        return io.read_transform(path, self.kind, fixed=fixed, moving=moving)


def recorded_grids(transform: Path) -> tuple[Grid | None, Grid | None]:
    """Grids of the spaces that a transform's points come from and go to, as its record.json tells; else None.

    The record holds ``{"inputs": {"fixed": {"shape", "affine"}, "moving": [{"shape", "affine"}, ...]}}``; a file
    whose name begins with inverse goes from moving to fixed points.
    """
    from crossmorph.files import RECORD
    from crossmorph.space import Grid

    try:
        inputs = json.loads(transform.with_name(RECORD).read_text(encoding="utf-8"))["inputs"]
        fixed, moving = (Grid(e["shape"], e["affine"]) for e in (inputs["fixed"], inputs["moving"][0]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None, None
    return (moving, fixed) if transform.name.startswith("inverse") else (fixed, moving)


def written(transform: Transform, path: Path, kind: Kind | None) -> None:
    """Write and say what was written."""
    from crossmorph import io

    io.write_transform(transform, path, kind)
    print(f"{path}: {', '.join(names(transform))}")


def names(transform: Transform) -> list[str]:
    """Every link of a transform in words."""
    from crossmorph.transform import Affine, Chain, DisplacementField

    if isinstance(transform, Chain):
        return [name for link in transform.transforms for name in names(link)]
    if isinstance(transform, DisplacementField):
        return [f"displacements on {transform.grid}"]
    return ["affine map"] if isinstance(transform, Affine) else [type(transform).__name__]


def need(paths: tuple[Path, ...], count: int, what: str) -> None:
    """Refuse too few files."""
    if len(paths) < count:
        raise InputError(f"{what} needs at least {count} transforms; {len(paths)} were given")
