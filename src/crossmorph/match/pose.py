"""One step towards a pose: a coarse coupled convex search, and the map that most of it agrees on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.describe.mind import mind_ssc
from crossmorph.kernels.linear import Matrix
from crossmorph.match.consistency import warp
from crossmorph.match.convex import coupled_convex
from crossmorph.match.view import View
from crossmorph.optimise.terms import lengths
from crossmorph.space import Array

POOL = 2
"""Voxels of a view that make a cell of the search."""

HALF_WIDTH = 4
"""Reach of the search in cells."""

TRIM = 0.6
"""Share of the displacements that a fit keeps (least trimmed squares)."""

FEWEST = 24
"""Cells below which nothing can be fitted."""


@dataclass(frozen=True)
class Cells:
    """Descriptors of a view, pooled to the cells of the search."""

    features: torch.Tensor
    valid: torch.Tensor
    body: torch.Tensor


def cells(view: View) -> Cells:
    """MIND-SSC of radius 1 and dilation 1, averaged over ``POOL``^3 voxels."""
    features = mind_ssc(view.values, 1, 1, POOL)
    valid, body = (F.avg_pool3d(mask[None, None].float(), POOL)[0, 0] for mask in (view.valid, view.weight))
    return Cells(features, valid > 0.5, body > 0.3)


@dataclass(frozen=True)
class Step:
    """A better pose.

    Attributes:
        matrix: (4, 4) from fixed to moving points.
        agreement: share of the body's cells where the search forth and back agree within a cell. Right poses give
            more than 0.8, wrong ones less than 0.5.
    """

    matrix: Matrix
    agreement: float


def step(
    fixed: View, target: Cells, moving: View, matrix: Matrix, model: Literal["rigid", "affine"] = "rigid"
) -> Step | None:
    """Search around a pose; None where too little of both images is seen together.

    Args:
        fixed, target: the fixed view and its cells.
        moving: view of the moving image on its own grid.
        matrix: (4, 4) pose from fixed to moving points.
        model: what is fitted to the displacements.
    """
    source = cells(moving.seen(fixed.grid, matrix))
    if int((target.body & source.valid).sum()) < FEWEST:
        return None
    forth = coupled_convex(target.features, source.features, HALF_WIDTH, (target.valid, source.valid))
    back = coupled_convex(source.features, target.features, HALF_WIDTH, (source.valid, target.valid))
    both = warp(torch.cat((back, source.valid[None].float())), forth)
    looked = target.body & target.valid & (both[3] > 0.5)
    agreeing = looked & (lengths(forth + both[:3]) < 1)
    agreement = float(agreeing.sum() / looked.sum().clamp_min(1))
    used = agreeing if int(agreeing.sum()) >= FEWEST else looked
    if int(used.sum()) < FEWEST:
        return None
    grid = fixed.grid.resized(forth.shape[1:])
    places = grid.to_world(used.nonzero().numpy().astype(float))
    moved = places + forth[:, used].numpy().T @ grid.affine[:3, :3].T
    return Step(matrix @ trimmed_fit(places, moved, model), agreement)


def trimmed_fit(
    places: Array, moved: Array, model: Literal["rigid", "affine"], keep: float = TRIM, rounds: int = 8
) -> Matrix:
    """The map that moves the best-fitting share ``keep`` of points with the smallest squares (Rousseeuw 1984).

    Args:
        places, moved: (N, 3) points before and after.
        model: ``rigid`` by singular values (Arun et al. 1987, never a mirror image), ``affine`` by least squares.
        keep: share of the points that counts.
        rounds: fits, each on the points that fitted best in the one before.
    """
    used = np.ones(len(places), bool)
    for _ in range(rounds):
        a, b = places[used], moved[used]
        middle_a, middle_b = a.mean(0), b.mean(0)
        if model == "rigid":
            u, _, vt = np.linalg.svd((a - middle_a).T @ (b - middle_b))
            linear = vt.T @ np.diag((1, 1, np.sign(np.linalg.det(vt.T @ u.T)))) @ u.T
        else:
            linear = np.linalg.lstsq(a - middle_a, b - middle_b, rcond=None)[0].T
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = linear, middle_b - linear @ middle_a
        misfit = np.linalg.norm(places @ linear.T + matrix[:3, 3] - moved, axis=1)
        chosen = misfit <= np.quantile(misfit, keep)
        if (chosen == used).all():
            break
        used = chosen
    return matrix
