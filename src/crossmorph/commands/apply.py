"""``crossmorph apply``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from crossmorph.errors import InputError

if TYPE_CHECKING:
    from crossmorph.image import Image, Labels
    from crossmorph.space import Grid
    from crossmorph.transform import Transform


@dataclass(frozen=True)
class Apply:
    """Resample a volume, or move points, through a transform.

    A transform sends points of one space to points of another: forward.h5 those of the fixed image to the moving
    image. A volume travels the other way: with forward.h5 give the moving image; it is drawn on the fixed grid.
    Points in a CSV (columns x, y, z in RAS mm) travel with the transform: with forward.h5 give points of the
    fixed image.
    """

    transform: Positional[Path]
    """ITK transform (.h5, .tfm, .txt, .mat) or displacement field (.nii.gz, .mha, .nrrd)."""

    input: Positional[Path]
    """Volume to resample (every frame of a 4-D one), or CSV of points."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """File to write (.nii, .nii.gz, .mha, .nrrd; .csv for points). It is replaced if it exists."""

    like: Path | None = None
    """Volume whose grid the output gets. By default the record.json beside the transform tells."""

    labels: bool = False
    """The input is a label map: the label with the largest share wins, and no new ids appear."""

    mode: Literal["linear", "nearest", "cubic"] = "linear"
    """Interpolation of an image."""

    fill: float | None = None
    """Value outside the field of view of the input. By default it is guessed from the image and printed."""

    def run(self) -> int:
        """Read, move, write and return the exit code."""
        from crossmorph import io

        transform = io.read_transform(self.transform)
        if self.input.suffix.lower() == ".csv":
            self._move_points(transform)
        else:
            moved = self._resample(transform)
            io.write(moved, self.output)
            print("; ".join([f"{self.output}: {moved.grid}", *moved.notes]))
        return 0

    def _move_points(self, transform: Transform) -> None:
        from crossmorph import io

        if self.like or self.labels:
            raise InputError(f"{self.input} holds points; --like and --labels are for volumes")
        points = io.read_points(self.input)
        io.write(points.moved_to(transform(points.xyz), None), self.output)
        print(f"{self.output}: {len(points)} points")

    def _resample(self, transform: Transform) -> Image | Labels:
        from crossmorph import io
        from crossmorph.resample import resample, resample_labels

        grid = io.read(self.like).grid if self.like else self._recorded_grid()
        if self.labels:
            labels = io.read_labels(self.input)
            moved: Image | Labels = resample_labels(labels, grid, transform)
            empty = bool(labels.data.any()) and not bool(moved.data.any())
        else:
            image = resample(io.read(self.input), grid, transform, self.mode, self.fill)
            moved, empty = image, not bool(image.valid.any())
        if empty:
            raise InputError(
                f"nothing of {self.input} reaches the output grid ({grid}) through {self.transform}; is the "
                "transform of the other direction meant, or another --like?"
            )
        return moved

    def _recorded_grid(self) -> Grid:
        """The grid in the record beside the transform: of the fixed image, for inverse* of the first moving one.

        The record holds ``{"inputs": {"fixed": {"shape", "affine"}, "moving": [{"shape", "affine"}, ...]}}``.
        """
        from crossmorph.files import RECORD
        from crossmorph.space import Grid

        record = self.transform.with_name(RECORD)
        side = "moving" if self.transform.name.startswith("inverse") else "fixed"
        try:
            entry = json.loads(record.read_text())["inputs"][side]
            entry = entry[0] if isinstance(entry, list) else entry
            return Grid(entry["shape"], entry["affine"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"the grid of the output is not known: {record} does not tell it; give a volume with --like"
            ) from error
