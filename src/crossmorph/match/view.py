"""An image as the linear stage sees it: coarse, around its body, with intensities in 0..1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from crossmorph.image import Image
from crossmorph.preprocess import fill_invalid, foreground, normalised, onto
from crossmorph.resample import PointMap, downsample, sample, world_blocks
from crossmorph.space import Grid

COARSE_VOXELS = 48_000
"""Voxels of the smaller body's box in a coarse view."""

FINE_VOXELS = 400_000
"""Voxels of the smaller body's box in a fine view."""

LARGEST = 8
"""The larger body's box has at most this many times more voxels."""

MARGIN = 4
"""Voxels around the body's box."""

KNOWN = 0.9
"""Weight of valid voxels from which a drawn value counts as valid."""


@dataclass(frozen=True)
class View:
    """An image around its body.

    Attributes:
        values: (I, J, K) float32, about 0..1, continued where not valid.
        valid, body: (I, J, K) bool.
        grid: isotropic, in the image's own world.
    """

    values: torch.Tensor
    valid: torch.Tensor
    body: torch.Tensor
    grid: Grid

    @property
    def weight(self) -> torch.Tensor:
        """What counts: the valid part of the body."""
        return self.valid & self.body

    def points(self) -> np.ndarray:
        """(N, 3) RAS mm of the body's voxels."""
        places: np.ndarray = self.grid.to_world(self.body.nonzero().numpy().astype(float))
        return places

    def seen(self, grid: Grid, matrix: np.ndarray) -> View:
        """This view on a grid of another world, ``matrix`` (4, 4) mapping that world's points to this one's."""
        inside = torch.from_numpy(_voxels(grid, np.linalg.inv(self.grid.affine) @ matrix @ grid.affine))
        return self._drawn(sample(self._layers(), inside, fill=0.0), grid)

    def through(self, grid: Grid, transform: PointMap) -> View:
        """This view on a grid of another world, any transform mapping that world's points to this one's."""
        layers = self._layers()
        parts = [sample(layers, self.grid.to_voxel(transform(p)), fill=0.0) for _, p in world_blocks(grid)]
        return self._drawn(torch.cat(parts, 1), grid)

    def _layers(self) -> torch.Tensor:
        return torch.stack((self.values, self.valid.float(), self.body.float()))

    def _drawn(self, layers: torch.Tensor, grid: Grid) -> View:
        values, valid, body = layers.reshape(3, *grid.shape)
        known = valid > KNOWN
        return View(fill_invalid(values, known), known, (body > 0.5) & known, grid)


def _voxels(grid: Grid, matrix: np.ndarray) -> np.ndarray:
    """(N, 3): all voxels of a grid mapped by a (4, 4)."""
    lines = [np.multiply.outer(np.arange(n), matrix[:3, axis]) for axis, n in enumerate(grid.shape)]
    places = lines[0][:, None, None] + lines[1][None, :, None] + lines[2][None, None] + matrix[:3, 3]
    flat: np.ndarray = places.reshape(-1, 3)
    return flat


def body_box(image: Image, body: torch.Tensor) -> Grid:
    """The part of the image's grid that holds its body."""
    reached = [body.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0] for axis in range(3)]
    low, high = [int(places[0]) for places in reached], [int(places[-1]) + 1 for places in reached]
    affine = image.grid.affine.copy()
    affine[:3, 3] = image.grid.to_world(np.asarray(low, float))
    i, j, k = (h - n for n, h in zip(low, high, strict=True))
    return Grid((i, j, k), affine)


def spacing_mm(boxes: Sequence[Grid], voxels: int, finest_mm: float) -> float:
    """Voxel size that gives the smaller box ``voxels`` voxels and the larger at most ``LARGEST`` times more."""
    volumes = [float(box.extent_mm.prod()) for box in boxes]
    wanted = max(min(volumes) / voxels, max(volumes) / (LARGEST * voxels))
    return max(float(wanted ** (1 / 3)), finest_mm)


BODIES: WeakKeyDictionary[Image, torch.Tensor] = WeakKeyDictionary()
"""Of images that views were made of: a run makes several of each, and to find a body takes a while."""


def _body(image: Image) -> torch.Tensor:
    if image not in BODIES:
        BODIES[image] = foreground(image)
    return BODIES[image]


def views(fixed: Image, moving: Image, voxels: int) -> tuple[View, View]:
    """Both images at one voxel size, each on its own grid."""
    bodies = [_body(image) for image in (fixed, moving)]
    boxes = [body_box(image, body) for image, body in zip((fixed, moving), bodies, strict=True)]
    finest = max(float(image.grid.spacing.min()) for image in (fixed, moving))
    size = spacing_mm(boxes, voxels, finest)
    first, second = (
        _view(image, body, box, size) for image, body, box in zip((fixed, moving), bodies, boxes, strict=True)
    )
    return first, second


def _view(image: Image, body: torch.Tensor, box: Grid, size_mm: float) -> View:
    grid = box.respaced(size_mm)
    grid = grid.padded((MARGIN,) * 3, [MARGIN + n % 2 for n in grid.shape])
    drawn = onto(image, grid)
    where = downsample(Image(body[None].float(), image.grid, torch.ones_like(body)), grid).data[0] > 0.5
    return View(normalised(drawn.data[0], drawn.valid), drawn.valid, where & drawn.valid, grid)
