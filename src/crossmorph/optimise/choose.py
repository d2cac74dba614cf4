"""Choosing how smooth a deformation should be: as smooth as it can be without losing what the images show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SMOOTHNESS = (30.0, 10.0, 3.0, 1.0, 0.3)
"""Candidates, from little detail to much."""


@dataclass(frozen=True)
class Choice:
    """A chosen weight, the field fitted with it, and the score of each candidate tried."""

    smoothness: float
    field: torch.Tensor
    scores: dict[float, float]


def choose_smoothness(
    fit: Callable[[float, torch.Tensor], torch.Tensor],
    score: Callable[[torch.Tensor], float],
    start: torch.Tensor,
    gains: Sequence[float],
) -> Choice:
    """Fit smoothly, then with more and more detail, until detail does not pay.

    Args:
        fit: field fitted with a smoothness, from a field to begin with: that of the candidate before.
        score: of a field; the larger the better. It must not be what was fitted: noise that a weak regulariser
            follows raises the fitted similarity, true motion raises others as well.
        start: field that the first candidate begins with.
        gains: by what share of its size each candidate after the first must raise the score, or the one before is
            taken.
    """
    best: Choice | None = None
    scores: dict[float, float] = {}
    for weight, gain in zip(SMOOTHNESS, (0.0, *gains), strict=True):
        field = fit(weight, start if best is None else best.field)
        scores[weight] = round(score(field), 5)
        if best is not None and scores[weight] - scores[best.smoothness] < gain * abs(scores[best.smoothness]):
            break
        best = Choice(weight, field, scores)
    assert best is not None
    return best
