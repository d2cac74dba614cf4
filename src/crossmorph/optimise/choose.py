"""Choosing how smooth a deformation should be by what it predicts where it was not fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from crossmorph.optimise.field import DataTerm

SMOOTHNESS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Candidates, from much detail to little."""

BLOCK = 4
"""Edge of the held-out blocks in cells."""


@dataclass(frozen=True)
class Choice:
    """A chosen weight and what each candidate cost on the held-out blocks."""

    smoothness: float
    held_out: dict[float, float]


def choose_smoothness(
    parts: Callable[[torch.Tensor], DataTerm],
    fit: Callable[[DataTerm, float], torch.Tensor],
    shape: Sequence[int],
    seed: int = 0,
) -> Choice:
    """Fit on a random half of the blocks of 4^3 cells and measure on the other half, for each of ``SMOOTHNESS``.

    Noise that a weak regulariser follows in one block says nothing about its neighbours; true motion does. So
    pairs of one anatomy come out smooth, and pairs of two people with detail.

    Args:
        parts: the data term restricted to a mask (I, J, K) bool.
        fit: field fitted with a data term and a smoothness, on the grid of the data term.
        shape: the grid of the data term.
        seed: of the random halves.

    Returns:
        The candidate with the lowest cost on the held-out half.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand([-(-n // BLOCK) for n in shape], generator=generator) < 0.5
    half = blocks
    for axis in range(3):
        half = half.repeat_interleave(BLOCK, axis).narrow(axis, 0, shape[axis])
    fitted, held_out = parts(half), parts(~half)
    costs = {weight: held_out(fit(fitted, weight))[0] for weight in SMOOTHNESS}
    return Choice(min(costs, key=costs.__getitem__), costs)
