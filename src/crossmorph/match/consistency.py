"""Making a forward and a backward displacement each other's inverse."""

from __future__ import annotations

import torch

from crossmorph.device import constants
from crossmorph.optimise.terms import displaced, released_stretch
from crossmorph.resample import sample


def inverse_consistent(
    forward: torch.Tensor, backward: torch.Tensor, iterations: int = 15, reproduce: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw two fields of one level towards each other's inverse (Heinrich et al., WBIR 2014).

        u <- (u - v(x + u)) / 2,    v <- (v - u(x + v)) / 2    at once, ``iterations`` times

    Args:
        forward, backward: (3, I, J, K) in cells of the grid they share.
        iterations: the released code uses 15.
        reproduce: as released, sampled displacements are N / (N - 1) too long and the outside is zero; otherwise
            places are exact and the nearest value continues outside.

    Returns:
        Both fields after the last iteration, (3, I, J, K) float32.
    """
    scale = released_stretch(forward.shape[1:]) if reproduce else torch.ones(3)
    for _ in range(iterations):
        there = _warp(backward, forward, scale, reproduce)
        back = _warp(forward, backward, scale, reproduce)
        forward, backward = 0.5 * (forward - there), 0.5 * (backward - back)
    return forward, backward


def _warp(values: torch.Tensor, field: torch.Tensor, scale: torch.Tensor, zeros: bool) -> torch.Tensor:
    """values(x + scale * field(x)), linear; outside zero or the nearest value."""
    if not field.is_cuda:
        from crossmorph.kernels import field as kernels

        arrays = (values.contiguous().numpy(), field.contiguous().numpy(), scale.numpy())
        return torch.from_numpy(kernels.warp(*arrays, zeros))
    places = displaced(field, scale)
    if zeros:
        return sample(torch.nn.functional.pad(values, (1,) * 6), places + 1)
    last = constants([n - 1 for n in values.shape[1:]], places)
    return sample(values, places.clamp_min(0).minimum(last))


def warp(values: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """values (C, I, J, K) at x + field(x), field (3, I, J, K) in cells; the nearest value continues outside."""
    return _warp(values, field, torch.ones(3), False)
