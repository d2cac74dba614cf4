"""Coupled convex optimisation of a discrete displacement (Heinrich et al., WBIR 2014; weight balance: MCBO).

The data term picks the cheapest displacement of a cell near the current field; the regulariser smooths what was
picked; a growing coupling weight draws the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from crossmorph.match import cost as costs
from crossmorph.optimise.terms import box_mean

COUPLING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights theta of |d - u|^2, in squared cells, of the six iterations."""

TIE = 3e-4
"""Weight of |d|^2 in the first pick: flat regions stay where they are instead of taking the first index."""

_HALO = len(COUPLING) + 1  # planes that one plane's result depends on: one smoothing an iteration and one before


class Matched(NamedTuple):
    """Descriptors of one level that are to match, see ``coupled_convex``."""

    fixed: torch.Tensor
    moving: torch.Tensor
    valid: tuple[torch.Tensor, torch.Tensor] | None = None
    unknown: float | None = None


def coupled_convex(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    half_width: int,
    valid: tuple[torch.Tensor, torch.Tensor] | None = None,
    balanced: bool = True,
    reproduce: bool = False,
    unknown: float | None = None,
    memory_bytes: float = 2**32,
) -> torch.Tensor:
    """Best smooth displacement from fixed to moving descriptors of one level.

        u <- mean_3^3(argmin_d cost + TIE |d|^2)   (without TIE when reproducing);   for theta in COUPLING:
            d*(p) = argmin_d cost(p, d) + theta |d - u(p)|^2;   u <- mean_3^3(d*);   keep u

    Args:
        fixed, moving: (C, I, J, K) descriptors.
        half_width: reach of the search in cells.
        valid: (I, J, K) bool of fixed and moving; see ``cost_volume_reference``. Ignored when reproducing.
        balanced: return the mean of the six kept fields (MCBO's weight balance) instead of the last (ConvexAdam).
        reproduce: windows count the outside as zero, as released, which shrinks the field at the faces; and the
            moving descriptor is zero outside.
        unknown: cost of what is not valid on either side. None takes ``expected_cost`` of these descriptors; parts
            of a volume need that of the whole.
        memory_bytes: the cost volume is worked on in slabs of at most about this size; the result is the same.

    Returns:
        (3, I, J, K) float32, displacement in cells along the array axes.
    """
    one = Matched(fixed, moving, valid, unknown)
    return coupled_convex_of_sum([one], half_width, balanced, reproduce, memory_bytes)


def coupled_convex_of_sum(
    pairs: Sequence[Matched],
    half_width: int,
    balanced: bool = True,
    reproduce: bool = False,
    memory_bytes: float = 2**32,
) -> torch.Tensor:
    """The same where the costs of several pairs of descriptors, of one shape, are added."""
    shape = pairs[0].fixed.shape[1:]
    plane_bytes = 4 * shape[1] * shape[2] * (2 * half_width + 1) ** 3 * min(len(pairs), 2)
    thickness = max(int(memory_bytes / plane_bytes) - 2 * (_HALO + 2), 1)
    cost = _sum([_cost_of(pair, half_width, reproduce) for pair in pairs])
    result = torch.empty((3, *shape), dtype=torch.float32, device=pairs[0].fixed.device)
    planes = shape[0]
    for start in range(0, planes, thickness):
        stop = min(start + thickness, planes)
        low, high = max(start - _HALO, 0), min(stop + _HALO, planes)
        iterates = couple(cost(low, high), half_width, reproduce)
        field = sum(iterates[1:], iterates[0]) / len(iterates) if balanced else iterates[-1]
        result[:, start:stop] = field[:, start - low : stop - low]
    return result


Costs = Callable[[int, int], torch.Tensor]
"""A cost volume as a function of the planes wanted, first to one after the last."""


def _cost_of(pair: Matched, half_width: int, reproduce: bool) -> Costs:
    fixed, moving, valid, unknown = pair
    if reproduce:
        valid = None
    elif valid is not None and unknown is None:
        unknown = costs.expected_cost(fixed, moving, *valid)
    return _cost(fixed, moving, half_width, valid, reproduce, unknown)


def _sum(parts: Sequence[Costs]) -> Costs:
    def total(low: int, high: int) -> torch.Tensor:
        volume = parts[0](low, high)
        for part in parts[1:]:
            volume += part(low, high)
        return volume

    return total


def cost_volume(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    half_width: int,
    valid: tuple[torch.Tensor, torch.Tensor],
    unknown: float,
) -> torch.Tensor:
    """The whole smoothed cost volume, (I, J, K, D); see ``cost_volume_reference``."""
    return _cost(fixed, moving, half_width, valid, False, unknown)(0, fixed.shape[1])


def _cost(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    half_width: int,
    valid: tuple[torch.Tensor, torch.Tensor] | None,
    counted: bool,
    unknown: float | None,
) -> Costs:
    if fixed.is_cuda:
        return lambda low, high: costs.cost_volume_reference(
            fixed, moving, half_width, valid, counted, unknown, (low, high)
        )
    from crossmorph.kernels import convex

    f, m = (x.permute(1, 2, 0, 3).contiguous().numpy() for x in (fixed, moving))
    everywhere = torch.ones(fixed.shape[1:], dtype=torch.bool)
    f_valid, m_valid = (x.contiguous().numpy() for x in (valid or (everywhere, everywhere)))
    outside = unknown if valid is not None and unknown is not None else -1.0

    def compiled(low: int, high: int) -> torch.Tensor:
        slab = convex.cost_slab(f, m, f_valid, m_valid, half_width, outside, counted, low, high)
        return torch.from_numpy(slab)

    return compiled


def couple(cost: torch.Tensor, half_width: int, counted: bool) -> list[torch.Tensor]:
    """The six kept fields of one slab, each (3, T, J, K)."""
    picked, pick = (_reference_picker if cost.is_cuda else _picker)(cost, 0.0 if counted else TIE, half_width)
    field = box_mean(picked, 1, counted)
    kept = []
    for theta in COUPLING:
        field = box_mean(pick(field, theta), 1, counted)
        kept.append(field)
    return kept


Picker = Callable[[torch.Tensor, float], torch.Tensor]
"""argmin_d cost + theta |d - u|^2, as displacements in cells, of a field u and theta."""


def _picker(cost: torch.Tensor, theta: float, half_width: int) -> tuple[torch.Tensor, Picker]:
    """What is cheapest about no displacement, and how to pick about others."""
    from crossmorph.kernels import convex

    volume = cost.numpy()
    first, minima = convex.cheapest_of_all(volume, theta, half_width)

    def pick(field: torch.Tensor, theta: float) -> torch.Tensor:
        picked = convex.cheapest(volume, minima, field.permute(1, 2, 3, 0).numpy(), theta, half_width)
        return torch.from_numpy(picked).permute(3, 0, 1, 2)

    return torch.from_numpy(first).permute(3, 0, 1, 2), pick


def _reference_picker(cost: torch.Tensor, theta: float, half_width: int) -> tuple[torch.Tensor, Picker]:
    steps = costs.offsets(half_width, cost.device)

    def pick(field: torch.Tensor, theta: float) -> torch.Tensor:
        total = cost.clone()
        for axis in range(3):
            total += theta * (steps[:, axis] - field[axis][..., None]) ** 2
        return steps[total.argmin(-1)].permute(3, 0, 1, 2)

    return pick(torch.zeros((3, *cost.shape[:3]), device=cost.device), theta), pick
