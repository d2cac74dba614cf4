"""Cost volumes: how well every displacement of a small cube of displacements fits, for every cell of a level.

The displacement index runs over (d0, d1, d2), d0 fastest, each from -half_width to half_width cells, as in the
released code: among equal costs the first one counts.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.optimise.terms import box_mean


def offsets(half_width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(D, 3) float32: the displacements in cells, in the order of the cost volume's last axis."""
    line = torch.arange(-half_width, half_width + 1, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3).flip(-1)


def expected_cost(
    fixed: torch.Tensor, moving: torch.Tensor, fixed_valid: torch.Tensor, moving_valid: torch.Tensor
) -> float:
    """Mean squared distance of a random valid fixed descriptor to a random valid moving one.

    It stands for the cost of what cannot be seen, so that the outside of a field of view neither attracts nor
    repels: E|f|^2 + E|m|^2 - 2 E[f].E[m]. Numpy's sums, unlike torch's, do not depend on the number of threads.
    """
    if not fixed_valid.any() or not moving_valid.any():
        return 0.0
    total = 0.0
    for one, other in zip(fixed, moving, strict=True):
        f, m = one[fixed_valid].cpu().numpy(), other[moving_valid].cpu().numpy()
        total += np.square(f).mean(dtype=np.float64) + np.square(m).mean(dtype=np.float64)
        total -= 2 * f.mean(dtype=np.float64) * m.mean(dtype=np.float64)
    return float(total)


def smooth_twice(volume: torch.Tensor, counted: bool) -> torch.Tensor:
    """Two 3^3 means of (C, I, J, K)."""
    for _ in range(2):
        volume = box_mean(volume, 1, counted)
    return volume


def cost_volume_reference(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    half_width: int,
    valid: tuple[torch.Tensor, torch.Tensor] | None = None,
    counted: bool = False,
    unknown: float | None = None,
    planes: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Smoothed SSD cost volume in plain torch.

        cost(p, d) = mean over two 3^3 windows of |fixed(p) - moving(p + d)|^2

    Args:
        fixed, moving: (C, I, J, K) descriptors of one level.
        half_width: reach of the search in cells; D = (2 half_width + 1)^3.
        valid: (I, J, K) bool of fixed and moving. A pair with one side not valid or outside costs ``unknown``.
            None is the published rule: outside, the moving descriptor is zero, so that leaving the volume costs
            |fixed|^2.
        counted: the windows count outside cells as zero (published).
        unknown: None takes ``expected_cost`` of these descriptors; parts of a volume need that of the whole.
        planes: compute these planes, first to one after the last, instead of 0 to I.

    Returns:
        (I, J, K, D) float32.
    """
    start, stop = planes or (0, fixed.shape[1])
    low, high = max(start - 2, 0), min(stop + 2, fixed.shape[1])  # what the windows reach
    shape = (high - low, *fixed.shape[2:])
    here, padded = fixed[:, low:high], F.pad(moving, (half_width,) * 6)
    if valid is not None:
        outside = expected_cost(fixed, moving, *valid) if unknown is None else unknown
        seen = F.pad(valid[1], (half_width,) * 6)
    side = 2 * half_width + 1
    costs = torch.empty((stop - start, *shape[1:], side**3), device=fixed.device)
    for number, (k, j) in enumerate(np.ndindex(side, side)):  # all displacements along the first axis at once
        window = (slice(low, high + side - 1), slice(j, j + shape[1]), slice(k, k + shape[2]))
        moved = padded[(slice(None), *window)].unfold(1, high - low, 1).movedim(-1, 2)
        cost = ((here[:, None] - moved) ** 2).sum(0)
        if valid is not None:
            known = valid[0][low:high] & seen[window].unfold(0, high - low, 1).movedim(-1, 1)
            cost = torch.where(known, cost, outside)
        smoothed = smooth_twice(cost, counted)[:, start - low :][:, : stop - start]
        costs[..., number * side : (number + 1) * side] = smoothed.movedim(0, -1)
    return costs
