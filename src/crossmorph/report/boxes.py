"""Fields of view as drawings: the boxes of both images in three projections."""

from __future__ import annotations

from typing import Any

import numpy as np

from crossmorph.report.evidence import Evidence
from crossmorph.space import Array, map_points

SIZE = 200
"""Of a drawing, in its own units."""


def drawings(evidence: Evidence) -> list[dict[str, Any]]:
    """For each projection its name and letters, and polygons: the fixed box, the moving one before and after.

    The moving box is drawn where the linear part puts it in the fixed world.
    """
    from scipy.spatial import ConvexHull

    moving = evidence.movings[0].grid.corners()
    poses = (evidence.initial.matrix, evidence.linear.matrix)
    solids = [evidence.fixed.grid.corners(), *(map_points(np.linalg.inv(pose), moving) for pose in poses)]
    every = np.concatenate(solids)
    low, high = every.min(0), every.max(0)
    scale = (SIZE - 20) / float((high - low).max())
    found = []
    for name, across, up in (("axial", 0, 1), ("coronal", 0, 2), ("sagittal", 1, 2)):
        polygons = []
        for solid in solids:
            flat = solid[:, (across, up)]
            ring = flat[ConvexHull(flat).vertices]
            polygons.append(_text((np.array([high[across], high[up]]) - ring) * scale + 10))
        width, height = ((high[axis] - low[axis]) * scale + 20 for axis in (across, up))
        sides = {"left": "RAS"[across], "right": "LPI"[across], "top": "RAS"[up], "bottom": "LPI"[up]}
        found.append({"name": name, "polygons": polygons, "width": width, "height": height, **sides})
    return found


def _text(points: Array) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
