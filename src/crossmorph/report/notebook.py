"""What an image and a result look like in a notebook: three slices and a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossmorph.image import Image
from crossmorph.report.figures import middle, planes, scaled, window
from crossmorph.report.png import picture, side_by_side

if TYPE_CHECKING:
    from crossmorph.result import Result

Floats = NDArray[np.floating[Any]]


def image_html(image: Image) -> str:
    """Axial, coronal and sagittal slice through the middle of what is bright, and what the image is."""
    limits = window(image)
    panels = [scaled(*plane.show(image), limits)[..., None].repeat(3, -1) for plane in planes(image)]
    grid = image.grid
    rows = [
        (
            "voxels",
            " x ".join(map(str, grid.shape)) + (f", {image.channels} channels" if image.channels > 1 else ""),
        ),
        ("spacing", " x ".join(f"{size:.3g}" for size in grid.spacing) + " mm"),
        ("axes", grid.axcodes),
        ("values", f"{float(image.data.min()):g} to {float(image.data.max()):g}, {image.dtype}"),
        ("valid", f"{100 * float(image.valid.float().mean()):.1f} %"),
        *(("note", note) for note in image.notes),
    ]
    return _html(image.name, panels, rows)


def result_html(result: Result) -> str:
    """The registered images over each other, fixed green and moving magenta, with the verdict and the scores."""
    from crossmorph.report import words

    fixed, moving = result.fixed_frame, result.warped.frame(0)
    limits = window(fixed), window(moving)
    panels = []
    for plane in planes(fixed, middle(fixed)):
        green, magenta = (
            scaled(*plane.show(image), limit) for image, limit in zip((fixed, moving), limits, strict=True)
        )
        panels.append(np.stack((magenta, green, magenta), -1))
    record = {"scores": result.scores}
    rows = [("verdict", str(result.verdict)), *((row.name, row.value) for row in words.measurements(record))]
    return _html(f"{result.fixed.name} and {', '.join(image.name for image in result.movings)}", panels, rows)


def _html(title: str, panels: Sequence[Floats], rows: Sequence[tuple[str, str]]) -> str:
    """Panels hold 0 to 1, (up, across, 3); right or front is drawn on the left."""
    address = picture(side_by_side([255 * panel[::-1, ::-1] for panel in panels]))
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    alt = f"{escape(title)}: axial, coronal and sagittal slice, right or front on the left"
    return f'<figure><img src="{address}" alt="{alt}" style="max-width:100%"></figure><table>{cells}</table>'
