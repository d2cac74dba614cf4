"""Landmark errors in mm: TRE and FRE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from crossmorph.errors import InputError
from crossmorph.evaluate.overlap import as_labels
from crossmorph.evaluate.regularity import Mapping
from crossmorph.points import Points
from crossmorph.space import Grid

Floats = NDArray[np.float64]


def _places(points: Points | ArrayLike) -> Floats:
    data: Any = points.xyz if isinstance(points, Points) else points
    array = data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)
    array = array.astype(np.float64)
    if array.ndim != 2 or array.shape[1] != 3:
        raise InputError(f"points must be (N, 3) in RAS mm, not {array.shape}")
    return array


def target_registration_error(transform: Mapping, fixed: Points | ArrayLike, moving: Points | ArrayLike) -> Floats:
    """TRE: |T(p) - q| for each pair of corresponding points, in mm.

    Source: Fitzpatrick, West and Maurer 1998. On points that took part in finding the transform the same number is
    the fiducial registration error, FRE; papers give FRE as a mean a case (DISA) or as a root mean square (image
    guidance): ``summarise_errors`` has both. The points themselves go through the transform. Evaluations that
    round to voxels, read a field by cubic splines (Learn2Reg) or compare centroids of warped label volumes (LUMIR,
    here ``label_centroid_error``) differ by up to half a voxel.

    Args:
        transform: maps fixed points to moving points, RAS mm.
        fixed: (N, 3) RAS mm in the fixed space.
        moving: (N, 3) RAS mm, their partners in the moving space.

    Returns:
        (N,) mm.

    Raises:
        InputError: the two sides differ in number.
    """
    p, q = _places(fixed), _places(moving)
    if len(p) != len(q):
        raise InputError(
            f"{len(p)} fixed landmarks but {len(q)} moving ones; row n of both must be one anatomical place"
        )
    errors: Floats = np.linalg.norm(np.asarray(transform(p)) - q, axis=1)
    return errors


def summarise_errors(errors: ArrayLike, thresholds_mm: Sequence[float] = ()) -> dict[str, float]:
    """Mean, root mean square, median, 5/25/75/95 percentiles and maximum of errors, and shares under thresholds.

    Args:
        errors: (N,) mm. Errors that are not finite are counted in ``undefined`` and left out of the rest.
        thresholds_mm: for each one a key ``under_<t>_mm``: the percentage of points with a smaller error.

    Returns:
        Name to number; NaN where there are no points.
    """
    values = np.asarray(errors, np.float64).ravel()
    finite = values[np.isfinite(values)]
    result = {"points": float(values.size), "undefined": float(values.size - finite.size)}
    if not finite.size:
        finite = np.array([np.nan])
    result |= {"mean": float(finite.mean()), "rms": float(np.sqrt((finite**2).mean()))}
    result["median"] = float(np.median(finite))
    result |= {f"p{percent:02d}": float(np.percentile(finite, percent)) for percent in (5, 25, 75, 95)}
    result["max"] = float(finite.max())
    for limit in thresholds_mm:
        result[f"under_{limit:g}_mm"] = 100 * float((finite < limit).mean()) if values.size else float("nan")
    return result


def label_centroid_error(
    fixed: Any, warped: Any, grid: Grid, ids: Sequence[int] | None = None
) -> dict[int, float]:
    """Distance in mm between the centroids of each label in two maps on one grid: the TRE of the LUMIR evaluation.

    LUMIR stores landmarks as small label blobs and warps them with nearest neighbours, in voxels of 1 mm. A blob
    that vanishes makes its case NaN there; here only that label is NaN. Where points exist, prefer
    ``target_registration_error``.

    Args:
        fixed, warped: label maps, (I, J, K).
        grid: their grid.
        ids: the landmarks; all labels of the fixed map but 0 by default.
    """
    from scipy.ndimage import center_of_mass

    f, w = as_labels(fixed), as_labels(warped)
    wanted = [int(i) for i in np.unique(f) if i != 0] if ids is None else list(ids)
    present = [set(np.unique(labels).tolist()) for labels in (f, w)]
    both = [i for i in wanted if i in present[0] and i in present[1]]
    errors = dict.fromkeys(wanted, float("nan"))
    if both:
        centres = [np.array(center_of_mass(np.ones(v.shape, np.uint8), v, both)) for v in (f, w)]
        apart = np.linalg.norm(grid.to_world(centres[0]) - grid.to_world(centres[1]), axis=1)
        errors |= dict(zip(both, apart.tolist(), strict=True))
    return errors
