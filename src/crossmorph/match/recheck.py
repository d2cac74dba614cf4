"""A second look at a finished registration: would a new search move it, and would a mirror image fit better?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crossmorph.image import Image
from crossmorph.match.consistency import warp
from crossmorph.match.convex import coupled_convex
from crossmorph.match.cost import expected_cost
from crossmorph.match.pose import FEWEST, HALF_WIDTH, Cells, cells
from crossmorph.match.view import COARSE_VOXELS, views
from crossmorph.optimise.terms import lengths
from crossmorph.resample import PointMap
from crossmorph.transform import Affine, Chain, Transform


@dataclass(frozen=True)
class Recheck:
    """What a second look found.

    Attributes:
        confirmed: share of the body, where both images see it, in which a new coarse search forth and one back
            stay within a cell of the transform and agree with each other; 0 where too little is seen.
        cost: mean squared difference of descriptors there, as a share of that of unrelated images.
        mirrored_cost: the same with left and right of the fixed body exchanged.
    """

    confirmed: float
    cost: float
    mirrored_cost: float


def recheck(fixed: Image, moving: Image, transform: Transform) -> Recheck:
    """Look again at a transform from fixed to moving points, on the coarse views of the linear stage."""
    first, second = views(fixed, moving, COARSE_VOXELS)
    target = cells(first)

    def seen(mapping: PointMap) -> Cells:
        return cells(second.through(first.grid, mapping))

    source = seen(transform)
    mirrored = seen(Chain((_mirror(first.points()), transform)))
    return Recheck(_confirmed(target, source), _cost(target, source), _cost(target, mirrored))


def _mirror(points: np.ndarray) -> Affine:
    """Left to right, about the middle of some points."""
    matrix = np.diag([-1.0, 1.0, 1.0, 1.0])
    matrix[0, 3] = 2 * float(points[:, 0].mean())
    return Affine(matrix)


def _confirmed(target: Cells, source: Cells) -> float:
    if int((target.body & target.valid & source.valid).sum()) < FEWEST:
        return 0.0
    valid = (target.valid, source.valid)
    forth = coupled_convex(target.features, source.features, HALF_WIDTH, valid)
    back = coupled_convex(source.features, target.features, HALF_WIDTH, valid[::-1])
    there = warp(torch.cat((back, source.valid[None].float())), forth)
    looked = target.body & target.valid & source.valid & (there[3] > 0.5)
    stays = lengths(forth) < 1
    agrees = lengths(forth + there[:3]) < 1
    return float((looked & stays & agrees).sum() / looked.sum().clamp_min(1))


def _cost(target: Cells, source: Cells) -> float:
    known = target.body & target.valid & source.valid
    unknown = expected_cost(target.features, source.features, target.valid, source.valid)
    if int(known.sum()) < FEWEST or not unknown > 0:
        return 1.0
    apart = (target.features - source.features).square().sum(0)[known].numpy()
    return float(apart.mean(dtype=np.float64)) / unknown
