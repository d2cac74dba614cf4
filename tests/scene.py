"""A small scene for registrations: soft blobs in the world, any contrast, any grid, moved by a known warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from truth import Warp, volume

from crossmorph.image import Image
from crossmorph.settings import Linear, Mcbo, Refinement
from crossmorph.space import Grid

NONE = Linear(model="none")
"""No linear stage: the start is taken as it is."""

QUICK = Mcbo(NONE, levels=(4,), half_width=3, refine=(Refinement(control=2, iterations=20, smoothness=0.3),))
"""Settings for tests of the deformable stage: a fraction of a second, and right to about a voxel."""

GRID = Grid.from_spacing((40, 36, 32), 2.0)
"""Fixed grid: 80 x 72 x 64 mm around the origin."""

WARP = Warp(a=5.0, b=4.0, k=0.07, s=200.0)
"""Moves the points of ``places`` by 4.0 mm on average and 6.2 mm at most."""

Contrast = Callable[[torch.Tensor], torch.Tensor]


def tissue(points: torch.Tensor) -> torch.Tensor:
    """(..., 3) RAS mm -> (...,): 70 soft blobs of 5 to 9 mm in a ball of 34 mm; 0 outside it."""
    rng = np.random.default_rng(11)
    centers = rng.uniform(-32, 32, (70, 3))
    widths, heights = rng.uniform(5, 9, 70), rng.uniform(0.3, 1, 70)
    total = torch.zeros(points.shape[:-1], dtype=torch.float64)
    for center, width, height in zip(centers, widths, heights, strict=True):
        total += height * torch.exp(-((points - torch.from_numpy(center)) ** 2).sum(-1) / (2 * width**2))
    ball = torch.sigmoid((34 - points.norm(dim=-1)) / 0.8)
    return ball * (0.5 + total)


def bright(values: torch.Tensor) -> torch.Tensor:
    """As the tissue is."""
    return 100 * values


def inverted(values: torch.Tensor) -> torch.Tensor:
    """Another modality: dark tissue is bright and the other way round; what is empty stays dark."""
    return 100 * torch.sigmoid((values - 0.25) / 0.05) * torch.exp(1 - values)


def seen(grid: Grid = GRID, warp: Warp | None = None, contrast: Contrast = bright, name: str = "image") -> Image:
    """The scene on a grid; with a warp, as the moving image: what lies at x in the scene lies at warp(x) in it."""

    def values(points: torch.Tensor) -> torch.Tensor:
        return contrast(tissue(points if warp is None else warp.inverse(points)))[None]

    return volume(grid, values, name=name)


def pair(contrast: Contrast = inverted, moving_grid: Grid | None = None) -> tuple[Image, Image]:
    """Fixed, and a moving image of another contrast that ``WARP`` maps onto."""
    return seen(name="fixed"), seen(moving_grid or GRID, WARP, contrast, name="moving")


def places(radius: float = 27.0) -> torch.Tensor:
    """(N, 3) RAS mm: a lattice of 4.5 mm inside the ball."""
    line = torch.arange(-30, 30.1, 4.5, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    return lattice[lattice.norm(dim=1) < radius]


def errors(transform: Callable[[torch.Tensor], torch.Tensor], warp: Warp = WARP) -> torch.Tensor:
    """(N,) mm between where a transform and the truth send ``places``."""
    points = places()
    return (transform(points) - warp(points)).norm(dim=1)
