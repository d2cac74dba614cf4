"""Overlap of label maps: Dice and its relatives, label by label, with the reason where a label has no score."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.errors import InputError

LabelArray = NDArray[np.integer[Any]]
Status = Literal["scored", "lost", "absent in fixed", "absent in moving", "absent in both"]


@dataclass(frozen=True)
class LabelOverlap:
    """How well one label agrees; F, W are the voxel sets of the label in the fixed and the warped moving map.

    Every ratio has no unit. A label that one side never had (``status`` begins with "absent") has NaN
    everywhere and takes no part in a mean. A label that the moving map had but the warp moved out of view or
    squeezed below a voxel is "lost": Dice 0.

    Attributes:
        id: the label.
        status: "scored", "lost", "absent in fixed", "absent in moving" or "absent in both".
        dice: 2 |F & W| / (|F| + |W|). Other programs score a label absent on both sides 1 (MONAI can) or drop
            lost labels; here neither happens.
        recall: |F & W| / |F|, also called sensitivity.
        precision: |F & W| / |W|, also called positive predictive value; NaN for a lost label.
        rvd: | |W| / |F| - 1 |, the absolute relative volume difference. Some papers keep the sign.
        voe: 1 - |F & W| / |F | W|, the volume overlap error, which is one minus the Jaccard index.
        volume_change: |W| / |unwarped moving| - 1 in mm^3 on both grids; NaN where the moving map is not given.
        fixed_mm3, warped_mm3, moving_mm3: volumes.
    """

    id: int
    status: Status
    dice: float
    recall: float
    precision: float
    rvd: float
    voe: float
    volume_change: float
    fixed_mm3: float
    warped_mm3: float
    moving_mm3: float


def as_labels(labels: Any) -> LabelArray:
    """The integers of a label map: ``Labels``, torch or numpy, (I, J, K).

    Raises:
        InputError: the values are not whole numbers.
    """
    data = getattr(labels, "data", labels)
    array = data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(labels)
    if array.dtype == bool:
        return array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        whole = np.round(array)
        if not np.isfinite(array).all() or np.abs(array - whole).max(initial=0) > 1e-3:
            raise InputError("a label map holds whole numbers; this one holds fractions or NaN")
        return whole.astype(np.int64)
    return array


def number_labels(array: LabelArray, ids: Sequence[int]) -> NDArray[np.int32]:
    """The map with ``ids[k]`` written as k + 1 and every other label as 0."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    place = {label: k + 1 for k, label in enumerate(ids)}
    if high - low < 1 << 22:  # a table is ten times faster than sorting
        table = np.zeros(high - low + 1, np.int32)
        for label, number in place.items():
            if low <= label <= high:
                table[label - low] = number
        return table[array.astype(np.int64) - low]
    present, inverse = np.unique(array, return_inverse=True)
    numbers = np.array([place.get(int(label), 0) for label in present], np.int32)
    return numbers[inverse].reshape(array.shape)


def status_of(in_fixed: bool, in_moving: bool, in_warped: bool) -> Status:
    """The status of a label from where it is present."""
    if in_fixed and in_moving:
        return "scored" if in_warped else "lost"
    if in_fixed:
        return "absent in moving"
    return "absent in fixed" if in_moving else "absent in both"


def label_overlap(
    fixed: Any,
    warped: Any,
    moving: Any = None,
    *,
    ids: Collection[int] | None = None,
    voxel_mm3: float = 1.0,
    moving_voxel_mm3: float | None = None,
) -> list[LabelOverlap]:
    """Dice, recall, precision, relative volume difference and overlap error of every label, in one pass.

    Source: Dice 1945; van Ginneken et al. 2007 for RVD and VOE; the rules for missing labels are those of the
    Learn2Reg evaluation, except that a lost label also says so.

    Args:
        fixed: label map on the fixed grid; ``Labels``, torch or numpy, (I, J, K).
        warped: the moving label map resampled on the same voxels.
        moving: the moving label map before warping, on any grid. Without it every label of the fixed map counts
            as present in the moving one, so that nothing lost goes unseen.
        ids: the labels to score, 0 (background) among them if wanted; all labels but 0 that any map holds by
            default.
        voxel_mm3: voxel volume of the fixed grid.
        moving_voxel_mm3: voxel volume of the moving grid; that of the fixed one by default.

    Returns:
        One row a label, in rising order of id.

    Raises:
        InputError: the maps differ in shape.
    """
    f, w = as_labels(fixed), as_labels(warped)
    if f.shape != w.shape:
        raise InputError(
            f"the fixed labels have shape {f.shape}, the warped ones {w.shape}; warp onto the fixed grid"
        )
    moving_count = _counts(as_labels(moving)) if moving is not None else None
    if ids is None:
        seen = set(np.unique(f).tolist()) | set(np.unique(w).tolist()) | set(moving_count or ())
        ids = seen - {0}
    wanted = sorted({int(i) for i in ids})
    n = len(wanted) + 1
    pairs = number_labels(f, wanted).ravel().astype(np.int64) * n + number_labels(w, wanted).ravel()
    joint = np.bincount(pairs, minlength=n * n).reshape(n, n)
    in_fixed, in_warped, in_both = joint.sum(1)[1:], joint.sum(0)[1:], joint.diagonal()[1:]
    rows = []
    for label, f_n, w_n, both in zip(wanted, in_fixed.tolist(), in_warped.tolist(), in_both.tolist(), strict=True):
        m_n = None if moving_count is None else moving_count.get(label, 0)
        m_mm3 = np.nan if m_n is None else m_n * (voxel_mm3 if moving_voxel_mm3 is None else moving_voxel_mm3)
        status = status_of(f_n > 0, m_n is None or m_n > 0, w_n > 0)
        rows.append(_row(label, status, both, (f_n, w_n), (f_n * voxel_mm3, w_n * voxel_mm3, m_mm3)))
    return rows


def _counts(labels: LabelArray) -> dict[int, int]:
    values, counts = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _row(
    label: int, status: Status, both: int, counts: tuple[int, int], mm3: tuple[float, float, float]
) -> LabelOverlap:
    f, w = counts
    change = mm3[1] / mm3[2] - 1 if mm3[2] > 0 else np.nan
    if status not in ("scored", "lost"):
        return LabelOverlap(label, status, np.nan, np.nan, np.nan, np.nan, np.nan, change, *mm3)
    precision = both / w if w else np.nan
    voe = 1 - both / (f + w - both)
    return LabelOverlap(
        label,
        status,
        2 * both / (f + w),
        both / f,
        precision,
        abs(w / f - 1),
        voe,
        change,
        *mm3,
    )


def mean_dice(rows: Sequence[LabelOverlap]) -> float:
    """Mean Dice over labels that both sides had, lost ones counting 0; NaN where there is none."""
    scores = [row.dice for row in rows if not np.isnan(row.dice)]
    return float(np.mean(scores)) if scores else float("nan")
