"""Numerical inverses of displacement fields."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from crossmorph.resample import sample, world_blocks
from crossmorph.space import Grid, inside
from crossmorph.transform.field import DisplacementField

STEP = 1e-3
"""Voxels between the places whose difference stands for a derivative."""


class Inverse(NamedTuple):
    """An inverse displacement field and how good it is.

    Attributes:
        field: maps moving points y to fixed points.
        residual_mm: (I, J, K) on the inverse's grid, |T(T^-1(y)) - y| in mm at every voxel centre y.
        covered: (I, J, K) bool; False where T^-1(y) lies outside the grid of the forward field, which knows
            nothing there and whose residual therefore means nothing.
    """

    field: DisplacementField
    residual_mm: torch.Tensor
    covered: torch.Tensor


def covering_grid(forward: DisplacementField) -> Grid:
    """The field's grid, padded until it holds T(x) of all its voxel centres (by its own size at most)."""
    to_voxels = forward.field.new_tensor(forward.grid.inverse_affine[:3, :3])
    before, after = [], []
    for axis, n in enumerate(forward.grid.shape):
        shape = [n if a == axis else 1 for a in range(3)]
        place = torch.arange(n, device=forward.field.device).reshape(shape)
        place = place + torch.tensordot(to_voxels[axis], forward.field, 1)
        before.append(int(np.clip(np.ceil(-float(place.min())), 0, n)))
        after.append(int(np.clip(np.ceil(float(place.max()) - (n - 1)), 0, n)))
    return forward.grid.padded(before, after)


def invert_field(
    forward: DisplacementField, grid: Grid | None = None, tolerance_mm: float = 0.01, max_iterations: int = 40
) -> Inverse:
    """Solve T(x) = y for x at every voxel centre y of a grid.

    Levenberg-Marquardt steps on |T(x) - y|^2 from x = y - u(y), point by point: Newton's method where the map is
    regular, descent where it is not, so that folded places get the nearest point that can be reached and keep
    their residual. Beyond its grid the displacement is continued while solving.

    Args:
        forward: T(x) = x + u(x).
        grid: where to define the inverse, in the moving space; None takes the grid of ``forward``.
        tolerance_mm: points with a smaller residual are done; never more than 1 % of the smallest voxel edge.
        max_iterations: points that are not done by then keep their best x.
    """
    grid = forward.grid if grid is None else grid
    tolerance_mm = min(tolerance_mm, 0.01 * float(forward.grid.spacing.min()))
    device, total = forward.field.device, int(np.prod(grid.shape))
    field = torch.empty(3, total, device=device)
    residual = torch.empty(total, device=device)
    covered = torch.empty(total, dtype=torch.bool, device=device)
    for part, y in world_blocks(grid, device):
        x = _solved(forward, y, tolerance_mm, max_iterations)
        field[:, part] = (x - y).T.float()
        residual[part] = (forward(x) - y).norm(dim=-1).float()
        covered[part] = inside(forward.grid.to_voxel(x), forward.grid.shape)
    inverse = DisplacementField(field.reshape(3, *grid.shape), grid, **forward.swapped_spaces)
    return Inverse(inverse, residual.reshape(grid.shape), covered.reshape(grid.shape))


def _solved(forward: DisplacementField, y: torch.Tensor, tolerance_mm: float, max_iterations: int) -> torch.Tensor:
    """(n, 3) points y -> (n, 3) points x with T(x) = y, as nearly as can be."""
    if y.device.type != "cpu":
        return _solve(forward, y, tolerance_mm, max_iterations)
    from crossmorph.kernels.points import inverted

    step = STEP * float(forward.grid.spacing.min())
    return inverted(forward.field, forward.grid.inverse_affine, y, step, tolerance_mm, max_iterations)


def _solve(forward: DisplacementField, y: torch.Tensor, tolerance_mm: float, max_iterations: int) -> torch.Tensor:
    """``_solved`` in plain torch."""
    step = STEP * float(forward.grid.spacing.min())
    x = 2 * y - _continued(forward, y)
    gap = _continued(forward, x) - y
    damping = torch.full_like(y[:, 0], 1e-6)
    todo = (gap.norm(dim=-1) > tolerance_mm).nonzero()[:, 0]
    for _ in range(max_iterations):
        if not len(todo):
            break
        at, off, damp = x[todo], gap[todo], damping[todo]
        here = off + y[todo]
        columns = [(_continued(forward, at + step * unit) - here) / step for unit in torch.eye(3).to(y)]
        trial = at - _damped_newton(columns, off, damp)
        trial_gap = _continued(forward, trial) - y[todo]
        better = trial_gap.norm(dim=-1) < off.norm(dim=-1)
        x[todo] = torch.where(better[:, None], trial, at)
        gap[todo] = torch.where(better[:, None], trial_gap, off)
        damping[todo] = torch.where(better, damp / 10, (damp * 10).clamp(min=1e-3))
        todo = todo[gap[todo].norm(dim=-1) > tolerance_mm]
    return x


def _continued(forward: DisplacementField, x: torch.Tensor) -> torch.Tensor:
    """T(x), with the displacement continued beyond the grid."""
    voxels = forward.grid.to_voxel(x)
    last = torch.as_tensor(forward.grid.shape).to(voxels) - 1
    return x + sample(forward.field, torch.minimum(voxels.clamp(min=0), last)).T.to(x.dtype)


def _damped_newton(columns: list[torch.Tensor], gap: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """(J^T J + damping I)^-1 J^T gap for many 3x3 J given by columns of (n, 3)."""
    normal = torch.stack([torch.stack([(a * b).sum(-1) for b in columns], -1) for a in columns], -1)
    normal = normal + damping[:, None, None] * torch.eye(3).to(normal)
    target = torch.stack([(a * gap).sum(-1) for a in columns], -1)
    a, b, c = normal.unbind(-1)
    bc, ca, ab = torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)
    solution = torch.stack([(side * target).sum(-1) for side in (bc, ca, ab)], -1)
    determinant: torch.Tensor = (a * bc).sum(-1, keepdim=True)
    return solution / determinant
