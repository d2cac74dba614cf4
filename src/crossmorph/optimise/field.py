"""Continuous refinement of a displacement field with Adam (ConvexAdam: Siebert et al. 2021; MCBO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.optimise.terms import DataTerm, regularity, smooth

if TYPE_CHECKING:
    from crossmorph.kernels.axes import Band

FOLD_FLOOR = 0.3
"""Local volume below which the folding term acts; 1 is no change, 0 a fold."""


def resize(field: torch.Tensor, shape: Sequence[int], scaled: bool = True) -> torch.Tensor:
    """A displacement (3, I, J, K) in voxels on the same field of view cut into ``shape`` voxels.

    Linear interpolation between voxel centres, the nearest value beyond them. Values are rescaled to voxels of the
    new grid, unless ``scaled`` is False.
    """
    if tuple(field.shape[1:]) == tuple(shape):
        return field
    if field.is_cuda:
        new = F.interpolate(field[None], tuple(shape), mode="trilinear", align_corners=False)[0]
    else:
        from crossmorph.kernels.axes import along_axes

        new = along_axes(field.float(), _bands(tuple(field.shape[1:]), tuple(shape)))
    return new * _ratio(field.shape[1:], shape).to(new, non_blocking=True) if scaled else new


def resize_back(gradient: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The adjoint of ``resize``, scaled: from a gradient on the finer grid to that on the grid of ``shape``."""
    if tuple(gradient.shape[1:]) == tuple(shape):
        return gradient
    gradient = gradient * _ratio(shape, gradient.shape[1:]).to(gradient, non_blocking=True)
    if gradient.is_cuda:
        field = gradient.new_zeros((1, 3, *shape), requires_grad=True)
        with torch.enable_grad():
            fine = F.interpolate(field, gradient.shape[1:], mode="trilinear", align_corners=False)[0]
        return torch.autograd.grad(fine, field, gradient)[0][0]
    from crossmorph.kernels.axes import along_axes

    return along_axes(gradient, [band.transposed for band in _bands(tuple(shape), tuple(gradient.shape[1:]))])


def _ratio(old: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """(3, 1, 1, 1): voxels of a new grid in one of an old grid over the same field of view."""
    return torch.tensor([n / o for n, o in zip(new, old, strict=True)])[:, None, None, None]


@lru_cache(maxsize=64)
def _bands(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Band, ...]:
    """Linear interpolation along each axis, between voxel centres."""
    from crossmorph.kernels.axes import interpolation

    lines = [((np.arange(n) + 0.5) * o / n - 0.5, o) for o, n in zip(old, new, strict=True)]
    return tuple(interpolation(places, size) for places, size in lines)


def refine(
    term: DataTerm,
    start: torch.Tensor,
    shape: Sequence[int],
    iterations: int,
    smoothness: float,
    fold_weight: float = 50.0,
    learning_rate: float = 0.3,
    anchor: torch.Tensor | None = None,
    reproduce: bool = False,
    each: Callable[[int, float], None] | None = None,
) -> torch.Tensor:
    """Minimise data + smoothness * diffusion(w) + fold_weight * folding(w), where w is a smoothed parameter field.

        theta: free values on the control grid, w = three 3^3 means of theta (nearly a cubic B-spline),
        u = w, interpolated to the grid of the data term.

    Args:
        term: data term; takes displacements (3, *shape) in voxels of its grid.
        start: (3, A, B, C) displacement in voxels of the control grid: its size is the control grid's.
        shape: the grid of the data term.
        iterations: Adam steps.
        smoothness: weight of ``terms.diffusion`` of w, in control voxels.
        fold_weight: weight of ``terms.folding`` of w; 0 for none.
        learning_rate: in control voxels.
        anchor: (3, A, B, C) a field that costs nothing: diffusion is that of w - anchor. A large smooth motion
            found before is then not pulled back to zero.
        reproduce: means count the outside as zero, and the field of the last evaluation is returned, that is, the
            last step is not used, as released.
        each: called with (iteration, value).

    Returns:
        (3, A, B, C) float32: w, in voxels of the control grid.
    """
    theta = start.detach().clone().float().contiguous()
    adam = Adam(theta, learning_rate)
    field = smooth(theta, 3, repeat=not reproduce)
    for iteration in range(iterations):
        value, pull = _pulled_back(term, field, shape)
        rest, gradient = regularity(field, smoothness, fold_weight, FOLD_FLOOR, anchor, pull)
        if each is not None:
            each(iteration, value + rest)
        if reproduce and iteration == iterations - 1:
            break
        adam.step(smooth(gradient, 3, repeat=not reproduce))
        field = smooth(theta, 3, repeat=not reproduce)
    return field


def _pulled_back(term: DataTerm, field: torch.Tensor, shape: Sequence[int]) -> tuple[float, torch.Tensor]:
    """Value of the data term at ``field`` and its gradient on the control grid."""
    if tuple(field.shape[1:]) == tuple(shape):
        return term(field)
    value, gradient = term(resize(field, shape))
    return value, resize_back(gradient, field.shape[1:])


class Adam:
    """Adam (Kingma and Ba, 2015) with its usual constants; loading torch's takes a second or two.

        m <- 0.9 m + 0.1 g,   s <- 0.999 s + 0.001 g^2
        values <- values - rate m / (1 - 0.9^t) / (sqrt(s / (1 - 0.999^t)) + 1e-8)

    Args:
        values: (3, I, J, K) float32, which the steps change.
        rate: largest change of a value in one of the first steps.
    """

    MEMORY, FLOOR = (0.9, 0.999), 1e-8

    def __init__(self, values: torch.Tensor, rate: float) -> None:
        self.values, self.rate, self.steps = values, rate, 0
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)

    def step(self, gradient: torch.Tensor) -> None:
        """Move the values against their gradient."""
        self.steps += 1
        mean, square = (1 - memory**self.steps for memory in self.MEMORY)
        rate, scale = self.rate / mean, square**-0.5
        if gradient.is_cuda:
            self.mean.lerp_(gradient, 1 - self.MEMORY[0])
            self.square.lerp_(gradient.square(), 1 - self.MEMORY[1])
            self.values.addcdiv_(self.mean, scale * self.square.sqrt() + self.FLOOR, value=-rate)
            return
        from crossmorph.kernels.adam import adam

        moments = (self.mean.numpy(), self.square.numpy())
        adam(self.values.numpy(), gradient.numpy(), *moments, self.MEMORY, rate, scale, self.FLOOR)
