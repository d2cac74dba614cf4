"""How a transform changes volume."""

from __future__ import annotations

import torch

from crossmorph.errors import InputError
from crossmorph.space import Grid
from crossmorph.transform.base import Transform
from crossmorph.transform.field import DisplacementField

SLAB = 2**21
"""Voxels handled at once."""


def jacobian_determinant(transform: Transform, grid: Grid, device: torch.device | str = "cpu") -> torch.Tensor:
    """The determinant of dT(x)/dx in world mm at the voxel centres of a grid.

    Above 1 the neighbourhood grows from the fixed to the moving space, below 1 it shrinks, at 0 or less it folds.
    Central differences of T along the array axes (one-sided at the faces), so that sheared and oblique grids
    are right. A field on its own grid is differenced as it is; anything else is sampled on the grid first.

    Args:
        transform: any transform.
        grid: at least two voxels along each axis; should lie where the transform is defined.
        device: where to compute, unless the field says so.

    Returns:
        (I, J, K) float32.

    Raises:
        InputError: the grid is one voxel thick.
    """
    if isinstance(transform, DisplacementField) and transform.grid.same_as(grid):
        return displacement_determinant(transform.field, grid)
    return displacement_determinant(transform.displacements(grid, device), grid)


def displacement_determinant(field: torch.Tensor, grid: Grid) -> torch.Tensor:
    """As ``jacobian_determinant``, of x + u(x) from u itself: (3, I, J, K) mm on its grid. Differentiable."""
    if min(grid.shape) < 2:
        raise InputError(f"a Jacobian needs at least two voxels along each axis, not a grid of {grid.shape}")
    rows, parts = grid.shape[0], []
    height = max(2, SLAB // (grid.shape[1] * grid.shape[2]))
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        low, high = max(start - 1, 0), min(stop + 1, rows)
        parts.append(_determinant(field[:, low:high], grid)[start - low : stop - low])
    return torch.cat(parts)


def _determinant(field: torch.Tensor, grid: Grid) -> torch.Tensor:
    axes = field.new_tensor(grid.affine[:3, :3])
    slopes = torch.gradient(field, dim=(1, 2, 3))
    a, b, c = (slope + axis[:, None, None, None] for slope, axis in zip(slopes, axes.T, strict=True))
    volume: torch.Tensor = (a * torch.linalg.cross(b, c, dim=0)).sum(0)
    return volume / float(torch.linalg.det(axes))


def folding(determinant: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Share of voxels (of the mask, if given) whose determinant is 0 or less, 0 to 1."""
    return float((_inside(determinant, mask) <= 0).double().mean())


def sdlogj(determinant: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Standard deviation of the logarithm of the determinant (clipped to 1e-9 .. 1e9), in the mask if given."""
    return float(_inside(determinant, mask).double().clamp(1e-9, 1e9).log().std(correction=0))


def _inside(determinant: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    chosen = determinant.reshape(-1) if mask is None else determinant[mask]
    if not chosen.numel():
        raise InputError("the mask holds no voxel to measure the determinant in")
    return chosen
