"""Cost volumes: how well every displacement of a small cube of displacements fits, for every cell of a level.

The displacement index runs over (d0, d1, d2), d2 fastest, each from -half_width to half_width cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def offsets(half_width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(D, 3) float32: the displacements in cells, in the order of the cost volume's last axis."""
    line = torch.arange(-half_width, half_width + 1, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)


def expected_cost(
    fixed: torch.Tensor, moving: torch.Tensor, fixed_valid: torch.Tensor, moving_valid: torch.Tensor
) -> float:
    """Mean squared distance of a random valid fixed descriptor to a random valid moving one.

    It stands for the cost of what cannot be seen, so that the outside of a field of view neither attracts nor
    repels: E|f|^2 + E|m|^2 - 2 E[f].E[m].
    """
    f, m = fixed[:, fixed_valid].double(), moving[:, moving_valid].double()
    if f.shape[1] == 0 or m.shape[1] == 0:
        return 0.0
    square = (f**2).sum(0).mean() + (m**2).sum(0).mean()
    return float(square - 2 * (f.mean(1) * m.mean(1)).sum())


def smooth_twice(volume: torch.Tensor, counted: bool) -> torch.Tensor:
    """Two 3^3 means over the last three axes; outside counts as zero if ``counted``, else it is left out."""
    for _ in range(2):
        volume = F.avg_pool3d(volume, 3, stride=1, padding=1, count_include_pad=counted)
    return volume


def cost_volume_reference(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    half_width: int,
    valid: tuple[torch.Tensor, torch.Tensor] | None = None,
    counted: bool = False,
) -> torch.Tensor:
    """Smoothed SSD cost volume in plain torch.

        cost(p, d) = mean over two 3^3 windows of |fixed(p) - moving(p + d)|^2

    Args:
        fixed, moving: (C, I, J, K) descriptors of one level.
        half_width: reach of the search in cells; D = (2 half_width + 1)^3.
        valid: (I, J, K) bool of fixed and moving. A pair with one side not valid or outside costs
            ``expected_cost``. None is the published rule: outside, the moving descriptor is zero, so that leaving
            the volume costs |fixed|^2.
        counted: the windows count outside cells as zero (published).

    Returns:
        (I, J, K, D) float32.
    """
    shape = fixed.shape[1:]
    pad = (half_width,) * 6
    padded = F.pad(moving, pad)
    if valid is not None:
        unknown = expected_cost(fixed, moving, *valid)
        seen = F.pad(valid[1], pad)
    costs = []
    for i, j, k in (offsets(half_width) + half_width).int().tolist():
        window = (slice(i, i + shape[0]), slice(j, j + shape[1]), slice(k, k + shape[2]))
        cost = ((fixed - padded[(slice(None), *window)]) ** 2).sum(0)
        if valid is not None:
            cost = torch.where(valid[0] & seen[window], cost, unknown)
        costs.append(smooth_twice(cost[None, None], counted)[0, 0])
    return torch.stack(costs, -1)
