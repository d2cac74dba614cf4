"""Choosing how smooth a deformation should be by what it predicts where it was not fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.optimise.terms import DataTerm

SMOOTHNESS = (30.0, 10.0, 3.0, 1.0, 0.3)
"""Candidates, from little detail to much."""

BLOCK = 8
"""Edge of the fitted and held-out blocks in cells."""

GUARD = 2
"""Cells around the fitted blocks that are not measured: there, descriptors and windows share voxels with them."""


@dataclass(frozen=True)
class Choice:
    """A chosen weight and what each candidate tried cost on the held-out blocks."""

    smoothness: float
    held_out: dict[float, float]


def choose_smoothness(
    parts: Callable[[torch.Tensor], DataTerm],
    fit: Callable[[DataTerm, float], torch.Tensor],
    shape: Sequence[int],
    seed: int = 0,
) -> Choice:
    """Fit on a random half of the blocks of 8^3 cells and measure inside the others.

    Noise that a weak regulariser follows in one block says nothing about its neighbours; true motion does. So
    pairs of one anatomy come out smooth, and pairs of two people with detail. Candidates are tried from smooth to
    detailed until one is worse than the one before.

    Args:
        parts: the data term restricted to a mask (I, J, K) bool.
        fit: field fitted with a data term and a smoothness, on the grid of the data term.
        shape: the grid of the data term.
        seed: of the random halves.

    Returns:
        The best candidate.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand([-(-n // BLOCK) for n in shape], generator=generator) < 0.5
    for axis in range(3):
        half = half.repeat_interleave(BLOCK, axis).narrow(axis, 0, shape[axis])
    near = F.max_pool3d(half[None, None].float(), 2 * GUARD + 1, stride=1, padding=GUARD)[0, 0] > 0
    if near.all():  # too small to hold anything out
        return Choice(SMOOTHNESS[0], {})
    fitted, held_out = parts(half), parts(~near)
    costs: dict[float, float] = {}
    best = SMOOTHNESS[0]
    for weight in SMOOTHNESS:
        costs[weight] = held_out(fit(fitted, weight))[0]
        if costs[weight] > costs[best]:
            break
        best = weight
    return Choice(best, costs)
