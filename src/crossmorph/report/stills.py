"""Still pictures of a report: three planes in a row, drawn from the same eight bits as the moving ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossmorph.report.colours import FOLD, GROWTH_STOPS, LENGTH_STOPS, rgb, table
from crossmorph.report.png import picture, side_by_side
from crossmorph.report.volumes import FOLDED, Bytes, Shown

DIM = 0.45
"""Brightness of the fixed image where the moving one says nothing."""

FIELDS = 8
"""Fields of the checkerboard along the longest side."""

Floats = NDArray[np.float64]


class Still(NamedTuple):
    """A picture and what it shows in words."""

    caption: str
    address: str


def stills(volumes: Shown) -> list[Still]:
    """The pictures that tell most: before and after, checkerboard, and what the transform does."""
    first = volumes.movings[0]
    rows = [
        _row(
            volumes,
            "Before: fixed green, moving magenta; grey where both are equally bright",
            first.before,
            _colours,
        ),
        _row(volumes, "After: fixed green, moving magenta", first.after, _colours),
        _row(volumes, "After, checkerboard of both", first.after, _checked),
    ]
    if volumes.displacement is not None:
        caption = "Volume change: purple grows from fixed to moving, orange shrinks, cyan folds"
        rows.append(_row(volumes, caption, _fine(volumes.jacobian, volumes), _growth))
        length = np.linalg.norm(volumes.displacement, axis=0)
        rows.append(_scale(volumes, length, "Displacement without its linear part"))
    if volumes.confidence_mm is not None:
        rows.append(_scale(volumes, volumes.confidence_mm, "Expected error"))
    return rows


Paint = Callable[[Any, Any], Floats]
"""From a plane of the fixed image and one of another volume to colours."""


def _row(volumes: Shown, caption: str, other: NDArray[Any], paint: Paint) -> Still:
    """Axial, coronal and sagittal plane side by side."""
    panels = [paint(*(_slice(v, volumes, through) for v in (volumes.fixed, other))) for through in (2, 1, 0)]
    return Still(caption, picture(side_by_side(panels)))


def _slice(volume: NDArray[Any], volumes: Shown, through: int) -> NDArray[Any]:
    """(rows, columns) as seen: patient's right or front on the left, head or front up."""
    plane: NDArray[Any] = volume.take(volumes.center[through], through)
    return plane.T[::-1, ::-1]


def _fine(volume: NDArray[Any], volumes: Shown) -> NDArray[Any]:
    """A volume of the field grid on the image grid, nearest."""
    places = [
        np.minimum((np.arange(n) + 0.5) * m / n, m - 1).astype(int)
        for n, m in zip(volumes.grid.shape, volume.shape, strict=True)
    ]
    return volume[np.ix_(*places)]


def _grey(plane: Bytes) -> Floats:
    return np.repeat(plane[..., None].astype(float), 3, -1)


def _colours(fixed: Bytes, moving: Bytes) -> Floats:
    both = np.stack((moving, fixed, moving), -1).astype(float)
    return np.where(moving[..., None] > 0, both, DIM * _grey(fixed))


def _checked(fixed: Bytes, moving: Bytes) -> Floats:
    rows, columns = fixed.shape
    size = max(1, round(max(rows, columns) / FIELDS))
    board = (np.arange(rows)[:, None] // size + np.arange(columns) // size) % 2 == 1
    chosen = np.where(board, moving, fixed)
    return np.where(moving[..., None] > 0, _grey(chosen), DIM * _grey(fixed))


def _growth(fixed: Bytes, codes: Bytes) -> Floats:
    colours = table(GROWTH_STOPS).astype(float)
    colours[FOLDED] = rgb(FOLD)
    return _over(fixed, colours[codes], codes > 0)


def _scale(volumes: Shown, values: NDArray[np.float32], name: str) -> Still:
    """A length in mm from dark blue (0) to yellow (its largest value)."""
    largest = float(np.nanmax(values, initial=1e-3))

    def paint(fixed: Bytes, plane: NDArray[np.float32]) -> Floats:
        known = np.isfinite(plane)
        places = np.where(known, plane, 0) * (255 / largest)
        return _over(fixed, table(LENGTH_STOPS)[places.astype(int)].astype(float), known)

    return _row(volumes, f"{name}: dark blue 0, yellow {largest:.1f} mm", _fine(values, volumes), paint)


def _over(fixed: Bytes, colours: Floats, where: NDArray[np.bool_]) -> Floats:
    """Colours over the fixed image, where they mean something and it says anything."""
    grey = _grey(fixed)
    return np.where((where & (fixed > 0))[..., None], 0.45 * grey + 0.55 * colours, grey)
