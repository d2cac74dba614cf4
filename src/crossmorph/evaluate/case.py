"""Everything that can be measured of one registration, from whatever truth there is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from crossmorph.errors import InputError
from crossmorph.evaluate.landmarks import summarise_errors, target_registration_error
from crossmorph.evaluate.overlap import LabelOverlap, label_overlap, mean_dice
from crossmorph.evaluate.regularity import (
    learn2reg_sdlogj,
    non_diffeomorphic_volume,
    voxel_determinant,
    voxel_displacement,
)
from crossmorph.evaluate.similarity import lncc, mutual_information, ncc, normalised_mutual_information, ssim
from crossmorph.evaluate.surface import SurfaceDistances, label_surface_distances
from crossmorph.evaluate.tables import Cell
from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.resample import resample, sample, world_blocks
from crossmorph.space import Grid, gap_mm, overlap_fraction
from crossmorph.transform import Affine, DisplacementField, Transform, folding, sdlogj


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        scores: one number a metric, units in the names.
        labels: one row a label, with its status.
        notes: what had to be assumed, repaired or doubted, in words.
    """

    scores: dict[str, Cell] = field(default_factory=dict)
    labels: list[dict[str, Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate(
    transform: Transform,
    *,
    points: tuple[Points, Points] | None = None,
    fixed_labels: Labels | None = None,
    moving_labels: Labels | None = None,
    ids: Collection[int] | None = None,
    fixed: Image | None = None,
    moving: Image | None = None,
    mask: Labels | None = None,
    thresholds_mm: Sequence[float] = (),
    voxel_distances: bool = False,
) -> Evaluation:
    """Score a transform with all the truth that is given.

    Args:
        transform: maps fixed points to moving points.
        points: corresponding landmarks: TRE.
        fixed_labels, moving_labels: label maps, each on its own grid: overlap and surface distances on the fixed
            labels' grid, the moving labels pulled over by nearest neighbours as all challenges do.
        ids: labels to score; all that a map holds, without 0, by default.
        fixed, moving: images: similarity, and the grid of the regularity where there are no fixed labels.
        mask: where regularity and similarity look, in the fixed world on any grid; the foreground of the fixed
            labels by default, else everything.
        thresholds_mm: shares of landmarks below these errors.
        voxel_distances: surface distances in voxels, as Learn2Reg has them, and not in mm.

    Raises:
        InputError: nothing to measure with, truth that lies nowhere near the images, or points in other units.
    """
    grid = next((thing.grid for thing in (fixed_labels, fixed, mask) if thing is not None), None)
    if points is None and grid is None:
        raise InputError("nothing to measure with: give points, label maps, or at least the fixed image")
    result = Evaluation()
    _check_worlds("fixed", fixed_labels, fixed, mask)
    _check_worlds("moving", moving_labels, moving)
    if fixed is not None and fixed_labels is not None and not fixed.grid.same_as(fixed_labels.grid):
        result.notes.append(f"labels and regularity are scored on the fixed labels' own grid, {fixed_labels.grid}")
    if points is not None:
        moving_grid = next((thing.grid for thing in (moving_labels, moving) if thing is not None), None)
        _landmarks(result, transform, points, (grid, moving_grid), thresholds_mm)
    if fixed_labels is not None and moving_labels is not None:
        _labels(result, transform, fixed_labels, moving_labels, ids, voxel_distances)
    if grid is not None:
        inside = _inside(result, mask, fixed_labels, grid)
        _regularity(result, transform, grid, inside)
        if fixed is not None and moving is not None:
            where = inside if fixed.grid.same_as(grid) else _inside(result, mask, fixed_labels, fixed.grid)
            _similarity(result, transform, fixed, moving, where)
    return result


def _check_worlds(side: str, *things: Image | Labels | None) -> None:
    """Everything of one space must lie in one place."""
    given = [thing for thing in things if thing is not None]
    for other in given[1:]:
        apart = gap_mm(given[0].grid, other.grid)
        if apart > 0:
            raise InputError(
                f"{given[0].name} ({given[0].grid}) and {other.name} ({other.grid}) lie {apart:.1f} mm apart; "
                f"both must be of the {side} image's world. Was one saved without its geometry?"
            )


def _inside(
    result: Evaluation, mask: Labels | None, fixed_labels: Labels | None, grid: Grid
) -> torch.Tensor | None:
    """Where to look, on the given grid; None is everywhere."""
    chosen = mask if mask is not None else fixed_labels
    if chosen is None:
        return None
    if not chosen.grid.same_as(grid):
        result.notes.append(f"{chosen.name} ({chosen.grid}) was resampled by its geometry onto {grid}")
        chosen = warp_labels(chosen, grid, Affine.identity())
    inside = chosen.data != 0
    if not bool(inside.any()):
        raise InputError(f"{chosen.name} is empty on {grid}; there is nowhere to look")
    return inside


# -- landmarks ---------------------------------------------------------------------------------------------------


def _landmarks(
    result: Evaluation,
    transform: Transform,
    points: tuple[Points, Points],
    grids: tuple[Grid | None, Grid | None],
    thresholds_mm: Sequence[float],
) -> None:
    for side, some, grid in zip(("fixed", "moving"), points, grids, strict=True):
        if grid is not None:
            result.notes += check_points(some, grid, side)
    fixed, moving = points
    errors = target_registration_error(transform, fixed, moving)
    before = float(target_registration_error(Affine.identity(), fixed, moving).mean())
    summary = summarise_errors(errors, thresholds_mm)
    result.scores["points"] = int(summary.pop("points"))
    undefined = int(summary.pop("undefined"))
    if undefined:
        result.notes.append(f"{undefined} landmarks have no finite error and were left out")
    for name, value in summary.items():
        unit = "percent" if name.startswith("under") else "mm"
        result.scores[f"tre_{name}_{unit}"] = value
    result.scores["tre_before_mm"] = before
    if summary["mean"] > before:
        swapped = float(target_registration_error(transform, moving, fixed).mean())
        if swapped < min(before, summary["mean"] / 2):
            result.notes.append(_wrong_way("mean TRE in mm", before, summary["mean"], swapped))


def _wrong_way(what: str, before: float, after: float, swapped: float) -> str:
    return (
        f"wrong direction? the transform makes the {what} worse ({before:.3g} to {after:.3g}) but read from "
        f"moving to fixed it gives {swapped:.3g}: a transform must map fixed points to moving points; give its "
        "inverse, or swap fixed and moving"
    )


def check_points(points: Points, grid: Grid, side: str) -> list[str]:
    """Notes on landmarks outside the image; an error where they fit it in other units only.

    Raises:
        InputError: most points lie outside, and inside if read as voxels, LPS, metres or micrometres.
    """
    xyz = points.xyz.cpu().numpy()
    inside = grid.contains(xyz)
    outside = int((~inside).sum())
    if outside <= len(xyz) / 2:
        plural = f"{outside} of {len(xyz)} {side} points lie outside the field of view of the {side} image"
        return [plural] if outside else []
    readings = {
        "LPS mm": xyz * [-1, -1, 1], "metres": xyz * 1e3, "micrometres": xyz / 1e3,
        "voxel coordinates": grid.to_world(xyz),
    }  # fmt: skip
    for name, candidate in readings.items():
        spread = np.ptp(candidate, axis=0).max() > 0.1 * grid.extent_mm.max()  # else a small unit fits anything
        if spread and grid.contains(candidate).mean() > 0.9:
            raise InputError(
                f"{outside} of {len(xyz)} {side} points lie outside the {side} image ({grid}), but they would lie "
                f"inside as {name}; points must be RAS mm, convert them first"
            )
    return [f"{outside} of {len(xyz)} {side} points lie outside the field of view of the {side} image ({grid})"]


# -- labels ------------------------------------------------------------------------------------------------------


def warp_labels(labels: Labels, grid: Grid, transform: Transform) -> Labels:
    """The label map pulled onto a fixed grid by nearest neighbours, 0 outside its field of view.

    Challenges score labels warped this way; ``resample_labels`` gives smoother maps and other scores.
    """
    data = labels.data.new_empty(int(np.prod(grid.shape)))
    for part, world in world_blocks(grid):
        data[part] = sample(labels.data[None], labels.grid.to_voxel(transform(world)), "nearest")[0]
    return Labels(data.reshape(grid.shape), grid, name=labels.name)


def _labels(
    result: Evaluation,
    transform: Transform,
    fixed: Labels,
    moving: Labels,
    ids: Collection[int] | None,
    voxel_distances: bool,
) -> None:
    def rows_of(way: Transform, target: Labels, source: Labels) -> tuple[Labels, list[LabelOverlap]]:
        warped = warp_labels(source, target.grid, way)
        volumes = {"voxel_mm3": target.grid.voxel_volume, "moving_voxel_mm3": source.grid.voxel_volume}
        return warped, label_overlap(target, warped, source, ids=ids, **volumes)

    warped, rows = rows_of(transform, fixed, moving)
    scored = [row for row in rows if row.status == "scored"]
    lost = [row.id for row in rows if row.status == "lost"]
    absent = [row.id for row in rows if row.status.startswith("absent")]
    if not scored and not lost:
        raise InputError(
            f"{fixed.name} and {moving.name} share no label to score: fixed holds {fixed.ids[:10]}, moving holds "
            f"{moving.ids[:10]}" + ("" if ids is None else f", asked for {sorted(ids)[:10]}")
        )
    voxel = 1.0 if voxel_distances else fixed.grid.affine
    far = label_surface_distances(fixed, warped, [row.id for row in scored], voxel)
    unit = "voxel" if voxel_distances else "mm"
    result.labels = [_label_row(row, far.get(row.id), unit) for row in rows]
    result.scores |= {"labels": len(scored) + len(lost), "labels_lost": len(lost), "labels_absent": len(absent)}
    result.scores["dice"] = mean_dice(rows)
    for name in ("recall", "precision", "rvd", "voe", "volume_change", f"hd95_{unit}", f"asd_{unit}"):
        values = [float(line[name]) for line in result.labels if line["status"] == "scored"]
        result.scores[name] = float(np.mean(values)) if values else float("nan")
    for found, what in (
        (lost, "lost by the warp: Dice 0, no distance"),
        (absent, "not on both sides: not scored"),
    ):
        if found:
            result.notes.append(f"labels {what}: {', '.join(map(str, found))}")
    before = mean_dice(rows_of(Affine.identity(), fixed, moving)[1])
    result.scores["dice_before"] = before
    if mean_dice(rows) < before:
        swapped = mean_dice(rows_of(transform, moving, fixed)[1])
        if swapped > before:
            result.notes.append(_wrong_way("mean Dice", before, mean_dice(rows), swapped))


def _label_row(row: LabelOverlap, far: SurfaceDistances | None, unit: str) -> dict[str, Cell]:
    infinite = float("inf") if row.status == "lost" else float("nan")
    distances: dict[str, Cell] = {
        f"hd95_{unit}": far.hausdorff(95) if far else infinite,
        f"asd_{unit}": far.average() if far else infinite,
    }
    return vars(row) | distances


# -- the deformation and the images ------------------------------------------------------------------------------


def _regularity(result: Evaluation, transform: Transform, grid: Grid, inside: torch.Tensor | None) -> None:
    if isinstance(transform, DisplacementField):
        share = overlap_fraction(grid, transform.grid)
        if share < 0.99:
            result.notes.append(
                f"the displacement field covers {100 * share:.0f} % of the fixed grid; elsewhere it moves nothing"
            )
    if min(grid.shape) < 5:
        result.notes.append(f"too few voxels to judge regularity: {grid}")
        return
    u = voxel_displacement(transform, grid)
    determinant = voxel_determinant(u)
    where = None if inside is None else inside.numpy()
    result.scores |= {
        "folding_percent": 100 * folding(determinant, inside),
        "jacobian_min": float((determinant if inside is None else determinant[inside]).min()),
        "sdlogj": sdlogj(determinant, inside),
        "sdlogj_l2r": learn2reg_sdlogj(determinant, where),
        "ndv_percent": non_diffeomorphic_volume(u, where)[1],
    }


def _similarity(
    result: Evaluation, transform: Transform, fixed: Image, moving: Image, inside: torch.Tensor | None
) -> None:
    if fixed.channels > 1 or moving.channels > 1:
        result.notes.append("similarity looks at the first channel")
        fixed, moving = fixed.frame(0), moving.frame(0)
    warped = resample(moving, fixed.grid, transform)
    where = None if inside is None else inside.numpy()
    for name, measure in (
        ("mi_nats", mutual_information), ("nmi", normalised_mutual_information),
        ("ncc", ncc), ("lncc", lncc), ("ssim", ssim),
    ):  # fmt: skip
        result.scores[name] = measure(fixed, warped, where)
