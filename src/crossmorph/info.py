"""What volumes are and how they lie to each other, as plain data and as tables."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.preprocess import check_registrable
from crossmorph.space import gap_mm, overlap_fraction

if TYPE_CHECKING:
    from rich.table import Table

PERCENTILES = (1, 25, 50, 75, 99)


def describe(images: list[Image]) -> dict[str, Any]:
    """Geometry and values of each image and, for each two of them, how their fields of view meet.

    Returns:
        ``{"images": [...], "pairs": [...]}`` of plain numbers, strings and lists that JSON can hold. Lengths are
        in mm, positions in RAS mm, values over valid voxels. ``overlap_of_first`` is the share of the first field
        of view that the second sees; ``gap_mm`` is the distance between the two world boxes, 0 where they meet.
    """
    return {
        "images": [_describe_one(image) for image in images],
        "pairs": [_describe_pair(a, b) for a, b in combinations(images, 2)],
    }


def _describe_one(image: Image) -> dict[str, Any]:
    grid, corners = image.grid, image.grid.corners()
    return {
        "name": image.name,
        "path": str(image.source) if image.source else None,
        "shape": list(grid.shape),
        "frames": image.channels,
        "dtype": str(image.dtype),
        "axes": grid.axcodes,
        "spacing_mm": _plain(grid.spacing),
        "extent_mm": _plain(grid.extent_mm),
        "center_mm": _plain(grid.center),
        "box_low_mm": _plain(corners.min(0)),
        "box_high_mm": _plain(corners.max(0)),
        "oblique_deg": round(grid.obliquity_deg, 3),
        "shear_deg": round(grid.shear_deg, 3),
        "left_handed": bool(np.linalg.det(grid.affine[:3, :3]) < 0),
        "affine": [_plain(row, 6) for row in grid.affine],
        "valid_share": round(float(image.valid.float().mean()), 6),
        "values": _values(image),
        "registrable": _registrable(image),
        "notes": list(image.notes),
    }


def _values(image: Image) -> dict[str, Any] | None:
    values = image.data[:, image.valid].numpy()
    if not values.size:
        return None
    levels = np.percentile(values, PERCENTILES)
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean(dtype=np.float64)),
        "percentiles": {str(p): float(v) for p, v in zip(PERCENTILES, levels, strict=True)},
    }


def _registrable(image: Image) -> str:
    """``"yes"``, or why the image would be refused."""
    try:
        check_registrable(image)
    except InputError as error:
        return str(error)
    return "yes"


def _describe_pair(a: Image, b: Image) -> dict[str, Any]:
    return {
        "first": a.name,
        "second": b.name,
        "same_grid": a.grid.same_as(b.grid),
        "overlap_of_first": round(overlap_fraction(a.grid, b.grid), 4),
        "overlap_of_second": round(overlap_fraction(b.grid, a.grid), 4),
        "gap_mm": round(gap_mm(a.grid, b.grid), 3),
        "center_distance_mm": round(float(np.linalg.norm(a.grid.center - b.grid.center)), 3),
    }


def _plain(numbers: np.ndarray[Any, Any], digits: int = 4) -> list[float]:
    return [round(float(n), digits) for n in numbers]


# -- tables ------------------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> list[Table]:
    """The result of ``describe`` for people: one column an image, then one row a pair."""
    from rich.table import Table

    images = Table(show_lines=False)
    images.add_column()
    for image in report["images"]:
        images.add_column(image["name"], overflow="fold")
    rows = [_rows(image) for image in report["images"]]
    for label in rows[0] if rows else ():
        images.add_row(label, *[row[label] for row in rows])
    if not report["pairs"]:
        return [images]
    pairs = Table("pair", "overlap of first", "overlap of second", "gap", "centres apart", "same grid")
    for pair in report["pairs"]:
        pairs.add_row(
            f"{pair['first']} - {pair['second']}",
            f"{pair['overlap_of_first']:.1%}",
            f"{pair['overlap_of_second']:.1%}",
            f"{pair['gap_mm']:.1f} mm",
            f"{pair['center_distance_mm']:.1f} mm",
            "yes" if pair["same_grid"] else "no",
        )
    return [images, pairs]


def _rows(image: dict[str, Any]) -> dict[str, str]:
    tilts = {"oblique": image["oblique_deg"], "sheared": image["shear_deg"]}
    axes = [image["axes"]] + [f"{degrees:.1f} deg {word}" for word, degrees in tilts.items() if degrees > 0.05]
    values = image["values"]
    return {
        "shape": " x ".join(map(str, image["shape"])),
        "frames": str(image["frames"]),
        "spacing": _mm(image["spacing_mm"], " x ", ".4g"),
        "field of view": _mm(image["extent_mm"], " x "),
        "axes": ", ".join(axes),
        "handedness": "left" if image["left_handed"] else "right",
        "centre (RAS)": _mm(image["center_mm"], ", "),
        "box from (RAS)": _mm(image["box_low_mm"], ", "),
        "box to (RAS)": _mm(image["box_high_mm"], ", "),
        "type": image["dtype"],
        "values": f"{values['min']:g} to {values['max']:g}, mean {values['mean']:.4g}" if values else "none",
        f"percentiles {', '.join(map(str, PERCENTILES))}": (
            ", ".join(f"{v:.4g}" for v in values["percentiles"].values()) if values else "none"
        ),
        "valid": f"{image['valid_share']:.2%}",
        "can be registered": image["registrable"],
        "notes": "\n".join(image["notes"]) or "none",
    }


def _mm(numbers: list[float], join: str, form: str = ".1f") -> str:
    return join.join(format(n, form) for n in numbers) + " mm"
