"""The problems that a linear fit solves: which features of two views are compared, where, and how."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.describe.macmind import msssc
from crossmorph.describe.mind import mind_ssc
from crossmorph.kernels.linear import Matrix
from crossmorph.match.cost import expected_cost
from crossmorph.match.view import View
from crossmorph.optimise.linear import Problem, Similarity
from crossmorph.optimise.similarity import (
    correlation,
    dot_product,
    linear_combination,
    mutual_information,
    squared_difference,
)

BORDER = 3
"""DISA descriptors around a view that are worked out and left out."""


def mind(fixed: View, moving: View, pose: Matrix) -> Problem:
    """Squared difference of MIND-SSC."""
    return _contexts(mind_ssc, fixed, moving, pose)


def context(fixed: View, moving: View, pose: Matrix) -> Problem:
    """Squared difference of msSSC, the 18 channels that macMIND takes its 288 means of."""
    return _contexts(msssc, fixed, moving, pose)


def _contexts(
    describe: Callable[[torch.Tensor], torch.Tensor], fixed: View, moving: View, pose: Matrix
) -> Problem:
    """Such descriptors know directions, so the moving image is described at the start."""
    seen = moving.seen(fixed.grid, pose)
    first, second = (describe(view.values) for view in (fixed, seen))
    unknown = expected_cost(first, second, fixed.valid, seen.valid)
    compared = squared_difference(_last(first), fixed.weight.float(), unknown)
    to_voxels = fixed.grid.inverse_affine
    return Problem(compared, _last(second), seen.valid, to_voxels, fixed.grid.affine, fixed.weight)


def disa(fixed: View, moving: View, pose: Matrix) -> Problem:
    """Dot product of DISA descriptors every 4 voxels, weighted by the local deviation of the fixed image.

    As published, each image is described once, in its own orientation. Its border is continued first, as a
    descriptor sees where a volume ends.
    """
    from crossmorph.describe.disa import disa_features, feature_grid
    from crossmorph.describe.lc2 import local_deviation, zscored

    around = 4 * BORDER
    padded = (F.pad(v.values[None], (around,) * 6, mode="replicate")[0] for v in (fixed, moving))
    inner = [[slice(BORDER, BORDER - (-n // 4)) for n in view.values.shape] for view in (fixed, moving)]
    first, second = (disa_features(p)[(slice(None), *i)] for p, i in zip(padded, inner, strict=True))
    mask, known = (view[::4, ::4, ::4].contiguous() for view in (fixed.weight, moving.valid))
    weight = local_deviation(zscored(fixed.values, fixed.valid), fixed.valid)[::4, ::4, ::4] * mask
    to_voxels = feature_grid(moving.grid).inverse_affine @ pose
    compared = dot_product(_last(first), weight)
    return Problem(compared, _last(second), known, to_voxels, feature_grid(fixed.grid).affine, mask)


def mi(fixed: View, moving: View, pose: Matrix) -> Problem:
    """Mutual information."""
    return _images(mutual_information(fixed.values[..., None], fixed.weight.float()), fixed, moving, pose)


def ncc(fixed: View, moving: View, pose: Matrix) -> Problem:
    """Squared normalised correlation."""
    return _images(correlation(fixed.values[..., None], fixed.weight.float()), fixed, moving, pose)


def lc2(fixed: View, moving: View, pose: Matrix) -> Problem:
    """LC2, the fixed image explained by the moving one."""
    return _images(linear_combination(fixed.values, fixed.weight), fixed, moving, pose)


def _images(similarity: Similarity, fixed: View, moving: View, pose: Matrix) -> Problem:
    to_voxels = moving.grid.inverse_affine @ pose
    values = moving.values[..., None].contiguous()
    return Problem(similarity, values, moving.valid, to_voxels, fixed.grid.affine, fixed.weight)


def _last(features: torch.Tensor) -> torch.Tensor:
    """(F, I, J, K) with the channels last, contiguous."""
    return features.permute(1, 2, 3, 0).contiguous()


OBJECTIVES: dict[str, Callable[[View, View, Matrix], Problem]] = {
    "mi": mi,
    "mind": mind,
    "msssc": context,
    "disa": disa,
    "lc2": lc2,
    "ncc": ncc,
}
