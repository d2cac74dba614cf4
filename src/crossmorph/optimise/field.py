"""Continuous refinement of a displacement field with Adam (ConvexAdam: Siebert et al. 2021; MCBO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.optimise.terms import DataTerm, regularity, smooth

FOLD_FLOOR = 0.3
"""Local volume below which the folding term acts; 1 is no change, 0 a fold."""


def resize(field: torch.Tensor, shape: Sequence[int], scaled: bool = True) -> torch.Tensor:
    """A displacement (3, I, J, K) in voxels on the same field of view cut into ``shape`` voxels.

    Linear interpolation between voxel centres, the nearest value beyond them. Values are rescaled to voxels of the
    new grid, unless ``scaled`` is False.
    """
    if tuple(field.shape[1:]) == tuple(shape):
        return field
    new = F.interpolate(field[None], tuple(shape), mode="trilinear", align_corners=False)[0]
    if scaled:
        ratio = [new_n / old_n for new_n, old_n in zip(shape, field.shape[1:], strict=True)]
        new = new * torch.tensor(ratio, device=new.device, dtype=new.dtype)[:, None, None, None]
    return new


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
    adam = torch.optim.Adam([theta], lr=learning_rate)
    field = smooth(theta, 3, repeat=not reproduce)
    for iteration in range(iterations):
        value, pull = _pulled_back(term, field, shape)
        rest, gradient = regularity(field, smoothness, fold_weight, FOLD_FLOOR, anchor)
        theta.grad = smooth(gradient + pull, 3, repeat=not reproduce)
        if each is not None:
            each(iteration, value + rest)
        if reproduce and iteration == iterations - 1:
            break
        adam.step()
        field = smooth(theta, 3, repeat=not reproduce)
    return field


def _pulled_back(term: DataTerm, field: torch.Tensor, shape: Sequence[int]) -> tuple[float, torch.Tensor]:
    """Value of the data term at ``field`` and its gradient on the control grid."""
    if tuple(field.shape[1:]) == tuple(shape):
        return term(field)
    control = field.detach().requires_grad_(True)
    with torch.enable_grad():
        fine = resize(control, shape)
    value, gradient = term(fine.detach())
    (pull,) = torch.autograd.grad(fine, control, gradient)
    return value, pull
