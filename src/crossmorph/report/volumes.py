"""The volumes that a report shows: eight bits, on one grid whose axes are R, A and S."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.image import Image, Labels
from crossmorph.report.evidence import Evidence
from crossmorph.report.figures import middle, scaled, window
from crossmorph.resample import blurred_like, downsample, resample, resample_labels
from crossmorph.space import Grid
from crossmorph.transform import Affine, Transform, jacobian_determinant

Bytes = NDArray[np.uint8]

MAX_BYTES = 5_000_000
"""Of all images together, before packing; as text in the page they are a third larger at most."""

MAX_VOXELS = 1_500_000
"""Of one image."""

MAX_FIELD_VOXELS = 120_000
"""Of what varies slowly: displacement, Jacobian, confidence."""

FOLDED = 255
"""Jacobian code of places that fold."""

DOUBLED = 126
"""Jacobian codes away from 1 (127 + 1) that mean a doubled or halved volume."""


@dataclass(frozen=True, eq=False)
class Moving:
    """One moving image on the display grid, 0 where it says nothing, else 1 to 255."""

    before: Bytes
    after: Bytes


@dataclass(frozen=True, eq=False)
class Shown:
    """All volumes of a report, (I, J, K) with axes R, A, S.

    Attributes:
        grid: of the images and labels.
        field_grid: of the other volumes, the same field of view in fewer voxels.
        fixed: 0 where it says nothing, else 1 to 255.
        movings: one entry a moving image.
        labels: fixed, moving before and moving after, numbered from 1 in the order of ``label_ids``.
        label_ids: the ids that the numbers stand for.
        displacement: (3, I, J, K) mm of the deformable part, or None.
        jacobian: 0 outside the fixed field of view, ``FOLDED``, or 128 + ``DOUBLED`` log2 of the determinant.
        confidence_mm: expected error, NaN where unknown, or None.
        center: (3,) voxel of ``grid`` where the planes start.
    """

    grid: Grid
    field_grid: Grid
    fixed: Bytes
    movings: tuple[Moving, ...]
    labels: tuple[Bytes, Bytes, Bytes] | None
    label_ids: tuple[int, ...]
    displacement: NDArray[np.float32] | None
    jacobian: Bytes
    confidence_mm: NDArray[np.float32] | None
    center: tuple[int, int, int]


def shown(evidence: Evidence) -> Shown:
    """Everything drawn anew for the page."""
    fixed, transform = evidence.fixed, evidence.transform
    count = 1 + 2 * len(evidence.movings)
    grid = display_grid(fixed.grid, min(MAX_VOXELS, MAX_BYTES // count))
    field_grid = _coarser(grid, MAX_FIELD_VOXELS)
    drawn = downsample(fixed, grid)
    dense = evidence.displacement
    labels, ids = _labels(evidence, grid)
    center = np.clip(np.round(grid.to_voxel(middle(fixed))), 0, np.array(grid.shape) - 1).astype(int)
    return Shown(
        grid,
        field_grid,
        _eight_bits(drawn, window(fixed)),
        tuple(_moving(image, grid, evidence.initial, transform) for image in evidence.movings),
        labels,
        ids,
        None if dense is None else dense.displacements(field_grid).numpy(),
        _jacobian(transform, field_grid, fixed.grid),
        _confidence(evidence.confidence, field_grid),
        (int(center[0]), int(center[1]), int(center[2])),
    )


def display_grid(fixed: Grid, voxels: int) -> Grid:
    """Isotropic RAS grid around a field of view, as fine as its finest axis but with about ``voxels`` at most."""
    low, high = fixed.corners().min(0), fixed.corners().max(0)
    spacing = max(float(fixed.spacing.min()), (float((high - low).prod()) / voxels) ** (1 / 3))
    shape = np.maximum(np.round((high - low) / spacing).astype(int), 2)
    return Grid.from_spacing(shape.tolist(), spacing, (low + high) / 2)


def _coarser(grid: Grid, voxels: int) -> Grid:
    shrink = max(1.0, (np.prod(grid.shape) / voxels) ** (1 / 3))
    return grid.resized([max(2, round(n / shrink)) for n in grid.shape])


def _moving(image: Image, grid: Grid, initial: Affine, transform: Transform) -> Moving:
    limits, source = window(image), blurred_like(image, grid)
    before, after = (_eight_bits(resample(source, grid, pose, fill=0.0), limits) for pose in (initial, transform))
    return Moving(before, after)


def _eight_bits(image: Image, limits: tuple[float, float]) -> Bytes:
    valid = image.valid.numpy()
    levels = 1 + np.round(254 * scaled(image.data[0].numpy(), valid, limits))
    return np.where(valid, levels, 0).astype(np.uint8)


def _labels(evidence: Evidence, grid: Grid) -> tuple[tuple[Bytes, Bytes, Bytes] | None, tuple[int, ...]]:
    """Label maps on the grid; of more than 254 common ids the first are taken."""
    if evidence.labels is None:
        return None, ()
    fixed, moving = evidence.labels
    ids = tuple(sorted(set(fixed.ids) & set(moving.ids)))[:254]
    poses: tuple[tuple[Labels, Transform | None], ...] = (
        (fixed, None),
        (moving, evidence.initial),
        (moving, evidence.transform),
    )
    first, second, third = (_numbered(resample_labels(map_, grid, pose), ids) for map_, pose in poses)
    return (first, second, third), ids


def _numbered(labels: Labels, ids: tuple[int, ...]) -> Bytes:
    values = labels.data.numpy()
    known = np.array([0, *ids])
    place = np.clip(np.searchsorted(known, values), 0, len(known) - 1)
    return np.where(known[place] == values, place, 0).astype(np.uint8)


def _jacobian(transform: Transform, grid: Grid, seen: Grid) -> Bytes:
    determinant = jacobian_determinant(transform, grid).numpy()
    codes = 128 + np.round(DOUBLED * np.log2(np.clip(determinant, 0.5, 2)))
    codes = np.where(determinant <= 0, FOLDED, codes)
    return np.where(_inside(grid, seen), codes, 0).astype(np.uint8)


def _confidence(image: Image | None, grid: Grid) -> NDArray[np.float32] | None:
    if image is None:
        return None
    drawn = resample(image, grid, fill=0.0)
    values: NDArray[np.float32] = torch.where(drawn.valid, drawn.data[0], torch.nan).numpy()
    return values


def _inside(grid: Grid, seen: Grid) -> NDArray[np.bool_]:
    places: NDArray[np.floating[Any]] = grid.to_world(np.moveaxis(np.indices(grid.shape, np.float64), 0, -1))
    return seen.contains(places)
