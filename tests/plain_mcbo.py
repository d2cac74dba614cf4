"""The released MCBO and ConvexAdam written down plainly, as the oracle of ``reproduce=True``.

Slow, small, and made from formulas alone: nothing here comes from the package. Tensors are (C, I, J, K); a
displacement (3, I, J, K) is in voxels of its own grid and component c moves along axis c.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F  # noqa: N812

PAIRS = "+x-y +y-x -y-x +y+x -y-z +y+z -z-x +x+z +y-z +z-y +x-z +z-x"
"""The neighbours a|b that each MIND-SSC channel compares; x, y, z are the array axes 0, 1, 2."""

COUPLING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def neighbours(dilation: int) -> list[tuple[list[int], list[int]]]:
    """The offsets a and b of every channel in voxels."""

    def offset(name: str) -> list[int]:
        return [(dilation if name[0] == "+" else -dilation) if axis == name[1] else 0 for axis in "xyz"]

    return [(offset(pair[:2]), offset(pair[2:])) for pair in PAIRS.split()]


def repeated(image: torch.Tensor, offset: list[int]) -> torch.Tensor:
    """image(p + offset), borders repeated."""
    for axis, step in enumerate(offset):
        places = (torch.arange(image.shape[axis]) + step).clamp(0, image.shape[axis] - 1)
        image = image.index_select(axis, places)
    return image


def mind(image: torch.Tensor, radius: int = 1, dilation: int = 2) -> torch.Tensor:
    window = list(itertools.product(range(-radius, radius + 1), repeat=3))
    channels = []
    for a, b in neighbours(dilation):
        squares = (repeated(image, a) - repeated(image, b)) ** 2
        channels.append(sum(repeated(squares, list(step)) for step in window) / len(window))
    distances = torch.stack(channels)
    distances = distances - distances.amin(0)
    variance = distances.mean(0)
    variance = variance.clamp(1e-3 * variance.mean(), 1e3 * variance.mean())
    return torch.exp(-distances / variance)


def mean3(values: torch.Tensor, width: int = 3) -> torch.Tensor:
    """Mean over width^3 voxels, zeros outside and counted."""
    return F.avg_pool3d(values[None], width, stride=1, padding=width // 2)[0]


def displacements(half: int) -> torch.Tensor:
    """(D, 3): component 0 changes fastest."""
    line = range(-half, half + 1)
    return torch.tensor([(x, y, z) for z in line for y in line for x in line], dtype=torch.float32)


def costs(fixed: torch.Tensor, moving: torch.Tensor, half: int) -> torch.Tensor:
    """(D, I, J, K)."""
    ni, nj, nk = fixed.shape[1:]
    padded = F.pad(moving, (half,) * 6)
    volume = []
    for x, y, z in (displacements(half) + half).int().tolist():
        cost = ((fixed - padded[:, x : x + ni, y : y + nj, z : z + nk]) ** 2).sum(0, keepdim=True)
        volume.append(mean3(mean3(cost))[0])
    return torch.stack(volume)


def convex(fixed: torch.Tensor, moving: torch.Tensor, half: int, balanced: bool) -> torch.Tensor:
    mesh = displacements(half)
    cost = costs(fixed, moving, half)

    def picked(total: torch.Tensor) -> torch.Tensor:
        return mean3(mesh[total.argmin(0)].permute(3, 0, 1, 2))

    field, kept = picked(cost), []
    for theta in COUPLING:
        distance = sum((mesh[:, c, None, None, None] - field[c]) ** 2 for c in range(3))
        field = picked(cost + theta * distance)
        kept.append(field)
    return torch.stack(kept).mean(0) if balanced else kept[-1]


def sampled(values: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """values(x + field(x)) with the released mismatch: normalised by (N - 1) / 2, sampled as if by N / 2."""
    half = (torch.tensor(field.shape[1:]) - 1)[:, None, None, None] / 2
    identity = F.affine_grid(torch.eye(3, 4)[None], (1, 3, *field.shape[1:]), align_corners=False)
    grid = identity + (field / half).flip(0).permute(1, 2, 3, 0)[None]
    return F.grid_sample(values[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def consistent(u: torch.Tensor, v: torch.Tensor, iterations: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    for _ in range(iterations):
        u, v = 0.5 * (u - sampled(v, u)), 0.5 * (v - sampled(u, v))
    return u, v


def registered(fixed: torch.Tensor, moving: torch.Tensor, half: int, balanced: bool) -> torch.Tensor:
    """Both directions searched and made consistent; the forward one."""
    return consistent(convex(fixed, moving, half, balanced), convex(moving, fixed, half, balanced))[0]


def resized(field: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(field[None], shape, mode="trilinear", align_corners=False)[0]


def coarse_level(
    fixed: torch.Tensor, moving: torch.Tensor, n: int, half: int, balanced: bool = True
) -> torch.Tensor:
    """Field of level n in voxels of the full grid; fixed and moving are full-resolution features."""
    field = registered(F.avg_pool3d(fixed, n), F.avg_pool3d(moving, n), half, balanced)
    return resized(field * n, tuple(fixed.shape[1:]))


def octant_level(fixed: torch.Tensor, moving: torch.Tensor, half: int, balanced: bool = True) -> torch.Tensor:
    """Level 1: each octant alone; ``torch.chunk`` gives the larger half first."""

    def split(values: torch.Tensor, axis: int) -> tuple[torch.Tensor, ...]:
        return torch.chunk(values, 2, axis)

    rows = []
    for f0, m0 in zip(split(fixed, 1), split(moving, 1), strict=True):
        columns = []
        for f1, m1 in zip(split(f0, 2), split(m0, 2), strict=True):
            parts = zip(split(f1, 3), split(m1, 3), strict=True)
            columns.append(torch.cat([registered(f, m, half, balanced) for f, m in parts], 3))
        rows.append(torch.cat(columns, 2))
    return torch.cat(rows, 1)


def adam(
    fixed: torch.Tensor, moving: torch.Tensor, field: torch.Tensor, iterations: int, smoothing: int, g: int = 2
) -> tuple[torch.Tensor, list[float]]:
    """The refined field in voxels of the full grid, and the objective at every iteration."""
    shape = tuple(fixed.shape[1:])
    fixed, moving = F.avg_pool3d(fixed, g), F.avg_pool3d(moving, g)
    theta = torch.nn.Parameter(resized(field, tuple(fixed.shape[1:])) / g)
    optimiser = torch.optim.Adam([theta], lr=1.0)
    objectives = []
    for _ in range(iterations):
        optimiser.zero_grad()
        w = mean3(mean3(mean3(theta)))
        data = ((sampled(moving, w) - fixed) ** 2).sum(0).mean()
        rough = sum((w.diff(dim=axis) ** 2).mean() for axis in (1, 2, 3))
        objective = data + 1.25 * rough
        objective.backward()
        optimiser.step()
        objectives.append(objective.item())
    refined = resized(w.detach() * g, shape)
    for _ in range(3 if smoothing else 0):
        refined = mean3(refined, smoothing)
    return refined, objectives


def mcbo(
    fixed: torch.Tensor,
    movings: list[torch.Tensor],
    weights: dict[int, float],
    half: int,
    iterations: int = 15,
    smoothing: int = 5,
    balanced: bool = True,
) -> torch.Tensor:
    """Weighted sum over the levels of the signed maximum over the moving modalities; volumes are (I, J, K)."""
    target, total = mind(fixed), torch.zeros((3, *fixed.shape))
    sources = [mind(moving) for moving in movings]
    for n, weight in weights.items():
        fields = []
        for source in sources:
            one = octant_level(target, source, half, balanced) if n == 1 else None
            field = coarse_level(target, source, n, half, balanced) if one is None else one
            if n == min(weights):
                field = adam(target, source, field, iterations, smoothing)[0]
            fields.append(field)
        total += weight * torch.stack(fields).amax(0)
    return total
