"""How far off a registration may be, place by place, told by the images alone.

After a registration the images are compared once more, at the found transform and one cell around it, forth and
back. Where the cost rises steeply on all sides a small error would be seen, so there is none; where it is flat
along some direction the place could be elsewhere; and where it still falls, the search would go on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from crossmorph.image import Image
from crossmorph.match.cost import expected_cost
from crossmorph.match.pose import Cells, cells
from crossmorph.match.view import FINE_VOXELS, views
from crossmorph.resample import PointMap, gaussian, resample
from crossmorph.space import Grid

POOLED = 1.5
"""Width in cells of the Gaussian over which slopes and curvatures are taken together."""

FLATTEST = 0.02
"""Curvature, as a share of the cost of unrelated images a squared cell, below which nothing is told apart."""

STEADY = 0.01
"""Added to curvatures before slopes are divided by them."""

LIMIT = 2.0
"""Cells that no error exceeds: a smooth deformation is held by what surrounds a place that shows nothing."""

FACTOR, POWER, REST = 0.035, 0.4, 0.02
"""Error in cells = factor * trace of the inverse curvature * (cells still to go + rest)^power; docs/report.md."""


class Curvature(NamedTuple):
    """The cost around no displacement: its slope (I, J, K, 3) and curvature (I, J, K, 3, 3) by cells."""

    slope: torch.Tensor
    curvature: torch.Tensor


def expected_error(fixed: Image, moving: Image, transform: PointMap) -> Image:
    """Expected distance in mm between where a transform puts a place of the fixed image and where it belongs.

    The cost c(d) is the squared difference of MIND-SSC in cells of two voxels, relative to that of unrelated
    images (``expected_cost``). With H its curvature and g its slope at d = 0, both pooled over neighbouring cells,
    of the search forth (f) and back (b):

        m^2 = (|H^-1 g_f|^2 + |H^-1 g_b|^2) / 2,    H = (H_f + H_b) / 2
        e = FACTOR tr(H^-1) (m + REST)^POWER,       error = e / (1 + e / LIMIT)

    The trace is the sharpness of the cost volume: the inverse curvature is the shape of the covariance of a
    least-squares match (Förstner 1982). m is inverse consistency: how far each direction would still go, which is
    zero for both where they agree. Factor and power were fitted to registrations with known errors.

    Args:
        fixed, moving: one channel each.
        transform: from fixed to moving points.

    Returns:
        An image on the fixed grid in mm, valid where the body is seen by both images.
    """
    views_ = views(fixed, moving, FINE_VOXELS)
    grid = views_[0].grid
    first, second = cells(views_[0]), cells(views_[1].through(grid, transform))
    known = first.body & first.valid & second.valid
    forth, back = _pooled(_around(first, second), known), _pooled(_around(second, first), known)
    matrix = (forth.curvature + back.curvature) / 2
    values, axes = torch.linalg.eigh(matrix)
    flatness = (1 / values.clamp_min(FLATTEST)).sum(-1)
    inverse = axes @ torch.diag_embed(1 / (values.clamp_min(0) + STEADY)) @ axes.mT
    moves = [(inverse @ side.slope[..., None])[..., 0].square().sum(-1) for side in (forth, back)]
    cell = grid.resized(known.shape)
    to_go = ((moves[0] + moves[1]) / 2).sqrt()
    cells_off = FACTOR * flatness * (to_go + REST) ** POWER
    error = cells_off / (1 + cells_off / LIMIT) * float(cell.spacing[0])
    return _on_fixed(error, known, cell, fixed)


def _around(fixed: Cells, moving: Cells) -> Curvature:
    """Central differences of the cost in the 27 displacements of at most one cell along each axis."""
    from crossmorph.match.convex import cost_volume

    unknown = expected_cost(fixed.features, moving.features, fixed.valid, moving.valid)
    valid = (fixed.valid, moving.valid)
    cost = cost_volume(fixed.features, moving.features, 1, valid, unknown) / max(unknown, 1e-12)
    cube = cost.reshape(*cost.shape[:3], 3, 3, 3).movedim((-1, -2, -3), (0, 1, 2))
    middle = torch.ones(3, dtype=torch.long)

    def at(shift: torch.Tensor) -> torch.Tensor:
        i, j, k = middle + shift
        return cube[i, j, k].clone()

    slope = torch.empty(*cost.shape[:3], 3)
    curvature = torch.empty(*cost.shape[:3], 3, 3)
    units = torch.eye(3, dtype=torch.long)
    for i, a in enumerate(units):
        slope[..., i] = (at(a) - at(-a)) / 2
        curvature[..., i, i] = at(a) + at(-a) - 2 * at(0 * a)
        for j, b in enumerate(units[:i]):
            mixed = (at(a + b) + at(-a - b) - at(a - b) - at(b - a)) / 4
            curvature[..., i, j] = curvature[..., j, i] = mixed
    return Curvature(slope, curvature)


def _pooled(side: Curvature, known: torch.Tensor) -> Curvature:
    """Gaussian means over the known cells."""
    weight = gaussian(known[None].float(), [POOLED] * 3).clamp_min(1e-3)

    def mean(values: torch.Tensor) -> torch.Tensor:
        flat = values.flatten(3).movedim(-1, 0)
        pooled = gaussian(flat * known, [POOLED] * 3) / weight
        return pooled.movedim(0, -1).reshape(values.shape)

    return Curvature(mean(side.slope), mean(side.curvature))


def _on_fixed(error: torch.Tensor, known: torch.Tensor, grid: Grid, fixed: Image) -> Image:
    """From the cells to the fixed image's voxels."""
    drawn = resample(Image(error[None], grid, known, name="confidence", space="fixed"), fixed.grid, fill=0.0)
    return drawn.restricted(fixed.valid)
