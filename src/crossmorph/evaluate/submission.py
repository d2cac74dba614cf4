"""Score a folder of displacement fields as the Learn2Reg and LUMIR evaluations do.

Everything here is in voxels of the arrays, as in those programs: they never look at an affine. In millimetres, and
on any grid, measure with the functions of this package's other modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.evaluate.landmarks import label_centroid_error
from crossmorph.evaluate.learn2reg import Dataset, Floats, Pair, find_displacement, read_array
from crossmorph.evaluate.overlap import label_overlap
from crossmorph.evaluate.regularity import learn2reg_sdlogj, non_diffeomorphic_volume, voxel_determinant
from crossmorph.evaluate.surface import label_surface_distances
from crossmorph.evaluate.tables import Cell
from crossmorph.space import Grid

Metric = Literal["sdlogj", "dice", "hd95", "tre", "ndv"]


@dataclass(frozen=True)
class Task:
    """What a task's leaderboard shows.

    Attributes:
        name: as at the head of the image names.
        shape: of the images in voxels, where the challenge fixes it.
        metrics: in the order of the leaderboard.
        labels: scored by Dice and HD95; 0 is the background, which LUMIR counts.
        landmarks: where TRE looks: "keypoints" or "landmarks".
        masked: SDlogJ only inside the fixed mask.
        lumir: the LUMIR program's rules (TRE from label centroids, NDV, quantiles) instead of the general one's.
    """

    name: str
    shape: tuple[int, int, int] | None
    metrics: tuple[Metric, ...]
    labels: tuple[int, ...] = ()
    landmarks: str = "landmarks"
    masked: bool = False
    lumir: bool = False


LUMIR_LABELS = (
    *(
        0,
        4,
        11,
        23,
        *range(30, 33),
        *range(35, 42),
        44,
        45,
        *range(47, 53),
        *range(55, 63),
        *range(71, 74),
        75,
        76,
    ),
    *(*range(100, 110), *range(112, 126), 128, 129, *range(132, 158), *range(160, 188), *range(190, 208)),
)
"""The 133 ids of the LUMIR evaluation's configuration."""

TASKS = {
    task.name: task
    for task in (
        Task("AbdomenMRCT", (192, 160, 192), ("sdlogj", "dice", "hd95"), (1, 2, 3, 4), masked=True),
        Task("LUMIR", (160, 224, 192), ("dice", "tre", "ndv", "hd95"), LUMIR_LABELS, lumir=True),
        Task("ReMIND2Reg", (256, 256, 256), ("tre",)),
        Task("COMULIS3DCLEM", None, ("tre",)),
        Task("OASIS", (160, 224, 192), ("sdlogj", "dice", "hd95"), tuple(range(1, 36))),
        Task("NLST", (224, 192, 224), ("sdlogj", "tre"), landmarks="keypoints", masked=True),
    )
}


def task_of(name: str) -> Task:
    """The task of a name, whatever follows it or its case ("LUMIR25", "AbdomenMRCT_v2").

    Raises:
        InputError: none is known.
    """
    for task in TASKS.values():
        if name.lower().startswith(task.name.lower()):
            return task
    raise InputError(f"no preset for the task {name!r}; name one of {', '.join(TASKS)}")


def score_submission(
    dataset: Dataset,
    pairs: Sequence[Pair],
    folder: str | Path,
    task: Task,
    ndv_mask: Literal["moving", "fixed"] = "moving",
) -> list[dict[str, Cell]]:
    """One row a pair: its metrics, Dice and HD95 by label, and the labels lost by the warp.

    Args:
        dataset: where the ground truth lies.
        pairs: which of them to score; a pair without some ground truth lacks those columns.
        folder: the submission.
        task: what to measure and by which rules.
        ndv_mask: whose foreground NDV looks at: "moving" as the LUMIR program does, or "fixed", which is right.

    Raises:
        InputError: a displacement field is missing or has another shape than the fixed image.
    """
    rows = []
    for pair in pairs:
        path = find_displacement(folder, pair, task.lumir)
        rows.append(score_pair(dataset, pair, read_array(path, _array(pair.fixed).shape), task, ndv_mask))
    return rows


def score_pair(
    dataset: Dataset,
    pair: Pair,
    displacement: Floats,
    task: Task,
    ndv_mask: Literal["moving", "fixed"] = "moving",
) -> dict[str, Cell]:
    """The scores of one displacement (3, X, Y, Z) in voxels; see ``score_submission``."""
    row: dict[str, Cell] = {"id": pair.id}
    labels, landmarks = (_companions(dataset, pair, kind) for kind in ("labels", task.landmarks))
    if labels and "dice" in task.metrics:
        row |= _label_scores(*labels, displacement, task)
    if landmarks and "tre" in task.metrics:
        row["tre"] = _landmark_error(*landmarks, pair, displacement)
    if "sdlogj" in task.metrics:
        mask = dataset.companion(pair.fixed, "masks") if task.masked else None
        determinant = voxel_determinant(displacement)
        row["sdlogj"] = learn2reg_sdlogj(determinant, None if mask is None else _array(mask))
    if "ndv" in task.metrics:
        image = pair.moving if ndv_mask == "moving" else pair.fixed
        row["ndv"] = non_diffeomorphic_volume(displacement, _array(image) > 0)[1]
    return row


def _companions(dataset: Dataset, pair: Pair, kind: str) -> tuple[Path, Path] | None:
    fixed, moving = dataset.companion(pair.fixed, kind), dataset.companion(pair.moving, kind)
    return (fixed, moving) if fixed and moving else None


def _array(path: Path) -> NDArray[Any]:
    from crossmorph.io import read

    return read(path).data[0].numpy()


def _label_scores(fixed_path: Path, moving_path: Path, displacement: Floats, task: Task) -> dict[str, Cell]:
    """Means of Dice and HD95 (voxels) over the labels that fixed and unwarped moving map share, and each label's.

    A lost label makes the mean HD95 infinite, as it does on the leaderboard; ``hd95_kept`` leaves lost ones out.
    """
    from crossmorph.io import read_labels

    fixed, moving = (read_labels(path).data.numpy() for path in (fixed_path, moving_path))
    warped = warp_nearest(moving, displacement)
    rows = label_overlap(fixed, warped, moving, ids=task.labels)
    scored = [row for row in rows if row.status in ("scored", "lost")]
    lost = [row.id for row in rows if row.status == "lost"]
    result: dict[str, Cell] = {"labels": len(scored), "labels_lost": len(lost)}
    result["dice"] = float(np.mean([row.dice for row in scored])) if scored else float("nan")
    details: dict[str, Cell] = {f"dice_{row.id}": row.dice for row in rows}
    if "hd95" in task.metrics and scored:
        far = label_surface_distances(fixed, warped, [row.id for row in scored])
        distances = {label: surfaces.hausdorff(95) for label, surfaces in far.items()}
        result["hd95"] = float(np.mean(list(distances.values())))
        kept = [d for d in distances.values() if np.isfinite(d)]
        result["hd95_kept"] = float(np.mean(kept)) if kept else float("nan")
        details |= {f"hd95_{row.id}": distances.get(row.id, float("nan")) for row in rows}
    return result | details


def warp_nearest(moving: NDArray[Any], displacement: Floats) -> NDArray[Any]:
    """A label array pulled through a displacement in voxels; what comes from beyond the outer voxel centres is 0.

    This is scipy's ``map_coordinates`` of order 0, as in the challenges, which ends the image at the voxel centres
    where the rest of this package ends it at the voxel faces.
    """
    from scipy.ndimage import map_coordinates

    places = np.stack(np.meshgrid(*map(np.arange, displacement.shape[1:]), indexing="ij")) + displacement
    warped: NDArray[Any] = map_coordinates(moving, places, order=0, mode="constant", cval=0)
    return warped


def _landmark_error(fixed: Path, moving: Path, pair: Pair, displacement: Floats) -> float:
    """Mean TRE: in mm from .csv landmarks (general program), in voxels from label blobs (LUMIR).

    The general program reads the field at the landmarks by cubic splines. A blob that the warp loses is left out
    here; there it makes the whole case NaN.
    """
    from crossmorph.io import read

    if fixed.suffix == ".csv":
        p, q = (_voxels(path) for path in (fixed, moving))
        return float(landmark_errors(p, q, displacement, read(pair.moving).grid.spacing).mean())
    blobs = [_array(path).astype(np.int32) for path in (fixed, moving)]
    grid = Grid(displacement.shape[1:], np.eye(4))
    errors = list(label_centroid_error(blobs[0], warp_nearest(blobs[1], displacement), grid).values())
    found = [error for error in errors if not np.isnan(error)]
    return float(np.mean(found)) if found else float("nan")


def _voxels(path: Path) -> Floats:
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise InputError(
            f"{path}: landmarks are rows of x,y,z in voxels without a header line ({error})"
        ) from error


def landmark_errors(fixed: Floats, moving: Floats, displacement: Floats, spacing_mm: Floats) -> Floats:
    """(N,) mm: |(p + u(p) - q) * spacing| for landmarks (N, 3) in voxels, u by cubic splines, 0 outside."""
    from scipy.ndimage import map_coordinates

    if fixed.shape != moving.shape:
        raise InputError(
            f"{len(fixed)} fixed landmarks but {len(moving)} moving ones; they must be partners row by row"
        )
    u = np.stack([map_coordinates(component, fixed.T, order=3) for component in displacement], -1)
    errors: Floats = np.linalg.norm((fixed + u - moving) * spacing_mm, axis=1)
    return errors


def leaderboard_row(rows: Sequence[dict[str, Cell]], task: Task) -> dict[str, Cell]:
    """Mean, standard deviation (of the population) and "30" of each metric over the cases.

    "30" is the 30th percentile of the case values, the 70th for SDlogJ and TRE in the general program: the value
    that the worse cases reach. A metric without ground truth is "-".
    """
    result: dict[str, Cell] = {"task": task.name, "cases": len(rows)}
    for metric in task.metrics:
        values = np.array([float(row[metric]) for row in rows if metric in row])
        if not len(values):
            result[metric] = "-"
            continue
        percent = 70 if metric in ("sdlogj", "tre") and not task.lumir else 30
        with np.errstate(invalid="ignore"):  # an infinite HD95 stays infinite
            result |= {metric: float(values.mean()), f"{metric}_std": float(values.std())}
            result[f"{metric}30"] = float(np.quantile(values, percent / 100))
    return result
