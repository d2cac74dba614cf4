"""A joint bilateral filter of displacements, guided by an image (Wagner et al., Scientific Reports 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

Part = tuple[Any, ...]
"""An index: ``...``, then three slices."""


class Bilateral(nn.Module):
    """Means over near voxels of alike guidance: weights exp(-d^2 / 2 s^2 - (g_p - g_q)^2 / 2 r^2), normalised.

    The window reaches 2.5 deviations along each axis and at least two voxels; voxels outside the volume are
    left out. One neighbour is looked at after the other, in the backward pass too, which bounds the memory.

    Args:
        trained: whether the deviations are learnt. They are kept as logarithms: along i, j, k in voxels, and of
            the guidance.
    """

    def __init__(self, trained: bool = False) -> None:
        super().__init__()
        logs = torch.tensor([1.0, 1.0, 1.0, 0.1]).log()
        self.logs = nn.Parameter(logs, requires_grad=trained)

    def forward(self, field: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        """(N, C, I, J, K) and (N, 1, I, J, K) -> (N, C, I, J, K) float32; no gradient to the guide."""
        found: torch.Tensor = _Filter.apply(  # type: ignore[no-untyped-call]  # torch has no types for apply
            field.float(), guide.detach().float(), self.logs.exp()
        )
        return found


def _neighbours(shape: torch.Size, sigmas: list[float]) -> Iterator[tuple[Part, Part, list[int]]]:
    """For each offset: the voxels that have such a neighbour, these neighbours, and the offset."""
    reach = [max(math.ceil(5 * sigma) // 2, 2) for sigma in sigmas[:3]]
    for offset in product(*(range(-min(r, n - 1), min(r, n - 1) + 1) for r, n in zip(reach, shape, strict=True))):
        here = tuple(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, shape, strict=True))
        there = tuple(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, shape, strict=True))
        yield (..., *here), (..., *there), list(offset)


class _Filter(torch.autograd.Function):
    """Weights are the same from p to q as from q to p, so the gradient is the same sum without the division."""

    @staticmethod
    def forward(ctx: Any, field: torch.Tensor, guide: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        total, weights = torch.zeros_like(field), torch.zeros_like(guide)
        values = sigmas.tolist()
        for here, there, offset in _neighbours(field.shape[2:], values):
            weight = _weight(guide[here] - guide[there], offset, values)
            total[here] += weight * field[there]
            weights[here] += weight
        found = total.div_(weights)
        ctx.save_for_backward(field, guide, sigmas, found, weights)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        field, guide, sigmas, found, weights = ctx.saved_tensors
        values, share = sigmas.tolist(), gradients[0] / weights
        back, slopes = torch.zeros_like(field), torch.zeros(4, dtype=torch.float64)
        for here, there, offset in _neighbours(field.shape[2:], values):
            difference = guide[here] - guide[there]
            weight = _weight(difference, offset, values)
            back[there] += weight * share[here]
            if ctx.needs_input_grad[2]:
                pull = (share[here] * (field[there] - found[here])).sum(1, keepdim=True) * weight
                slopes[:3] += float(pull.sum()) * torch.tensor(offset) ** 2
                slopes[3] += float((pull * difference**2).sum())
        return back, None, slopes.to(sigmas) / sigmas**3


def _weight(difference: torch.Tensor, offset: list[int], sigmas: list[float]) -> torch.Tensor:
    distance = sum((o / s) ** 2 for o, s in zip(offset, sigmas, strict=False))
    return torch.exp(-0.5 * (distance + (difference / sigmas[3]) ** 2))
