"""Matching landmarks as a term of the linear fit and of the deformable refinement.

Both push a landmark that is farther from its match than a tolerance, with max(0, distance - tolerance)^2, and
leave the rest to the images: a landmark placed by hand is only good to some millimetres.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.kernels.linear import Matrix
from crossmorph.optimise.terms import DataTerm
from crossmorph.points import Points
from crossmorph.space import Grid, map_points

Numbers = NDArray[np.floating[Any]]

LINEAR_STRENGTH = 4.0
"""A landmark one tolerance too far pulls eight times as much as the images do at the start."""

STRENGTH = 10.0
"""Weight of a landmark against the images in the region that a control point moves."""

REACH_MM = 20.0
"""How far around it a landmark that is off moves the start of the refinement, at least."""

FLAT = 1e-3
"""Ratio of spreads below which landmarks lie on a line, which leaves a rotation open."""


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Matching points.

    Args:
        fixed, moving: (N, 3) RAS mm, matching row by row.
        tolerance_mm: distance from its match at which a landmark is content.
        names: one a pair.
    """

    fixed: Numbers
    moving: Numbers
    tolerance_mm: float
    names: tuple[str, ...]

    @classmethod
    def paired(cls, fixed: Points, moving: Points, tolerance_mm: float) -> Landmarks:
        """Matched by their names where both have them, else by their order.

        Raises:
            InputError: names or numbers do not match, or the tolerance is not positive.
        """
        if not tolerance_mm > 0:
            raise InputError(f"the tolerance of landmarks must be above 0 mm, not {tolerance_mm}")
        if not len(fixed):
            raise InputError("there are no landmarks")
        names = fixed.names
        if names and moving.names and len(set(names)) == len(names):
            alone = set(names) ^ set(moving.names)
            if alone or len(moving) != len(fixed):
                raise InputError(
                    f"landmarks without a match: {', '.join(sorted(alone)) or 'names are there twice'}"
                )
            order = [moving.names.index(name) for name in names]
        elif len(fixed) == len(moving):
            order = list(range(len(fixed)))
        else:
            raise InputError(f"{len(fixed)} fixed and {len(moving)} moving landmarks; they must match one by one")
        names = names or moving.names or tuple(str(n) for n in range(1, len(fixed) + 1))
        return cls(fixed.xyz.cpu().numpy(), moving.xyz.cpu().numpy()[order], float(tolerance_mm), names)

    def chosen(self, keep: NDArray[np.bool_]) -> Landmarks:
        """Some of the pairs."""
        names = tuple(name for name, kept in zip(self.names, keep, strict=True) if kept)
        return replace(self, fixed=self.fixed[keep], moving=self.moving[keep], names=names)

    def errors_mm(self, mapping: Callable[[Numbers], Numbers]) -> Numbers:
        """(N,) distances of the mapped fixed landmarks from the moving ones."""
        errors: Numbers = np.linalg.norm(mapping(self.fixed) - self.moving, axis=1)
        return errors

    # -- linear --------------------------------------------------------------------------------------------------

    def pose(self, header: Matrix, rigid: bool = True) -> Matrix:
        """The map (4, 4) of fixed to moving points that fits best: rigid (Kabsch, Acta Cryst. A 1976), or where
        landmarks are too few for a rotation, lie on a line, or ``rigid`` is not set, ``header`` with a shift."""
        a, b = self.fixed - self.fixed.mean(0), self.moving - self.moving.mean(0)
        left, spread, right = np.linalg.svd(a.T @ b)
        pose: Matrix = np.array(header, np.float64)
        if rigid and len(a) >= 3 and spread[1] > FLAT * spread[0]:
            turn = np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
            pose[:3, :3] = (left @ turn @ right).T
        pose[:3, 3] = 0
        pose[:3, 3] = self.moving.mean(0) - map_points(pose, self.fixed.mean(0))
        return pose

    def pull(self, start: Matrix, matrix: Matrix) -> tuple[float, Numbers]:
        """The term of a linear fit, in mm: of the map ``start @ matrix``, and its derivative by ``matrix[:3]``."""
        points = np.column_stack((self.fixed, np.ones(len(self.fixed))))
        apart = points @ (start @ matrix)[:3].T - self.moving
        excess, unit = self._excess(apart)
        factor = LINEAR_STRENGTH / (len(points) * self.tolerance_mm)
        slope = 2 * factor * (excess[:, None] * unit) @ start[:3, :3]
        return factor * float(excess @ excess), slope.T @ points

    def _excess(self, apart: Numbers) -> tuple[Numbers, Numbers]:
        """How far beyond the tolerance, and in which direction."""
        length = np.linalg.norm(apart, axis=1)
        return np.maximum(length - self.tolerance_mm, 0), apart / np.maximum(length, 1e-12)[:, None]

    # -- deformable ----------------------------------------------------------------------------------------------

    def on(self, grid: Grid, linear: Matrix) -> OnGrid:
        """The same for displacements on a grid, before a linear map: where landmarks are and must go."""
        here = grid.to_voxel(self.fixed)
        there = grid.to_voxel(map_points(np.linalg.inv(linear), self.moving))
        return OnGrid(here, there, grid.affine[:3, :3].copy(), grid.shape, self.tolerance_mm)


@dataclass(frozen=True, eq=False)
class OnGrid:
    """Landmarks in voxels of a grid.

    Args:
        here, there: (N, 3) where they are, and where x + u(x) must put them.
        to_mm: (3, 3) from voxels to mm.
        shape: of the grid.
        tolerance_mm: as for ``Landmarks``.
    """

    here: Numbers
    there: Numbers
    to_mm: Numbers
    shape: tuple[int, ...]
    tolerance_mm: float

    def resized(self, shape: tuple[int, ...]) -> OnGrid:
        """On the same field of view cut into other voxels."""
        ratio = np.asarray(shape) / np.asarray(self.shape)
        here, there = ((p + 0.5) * ratio - 0.5 for p in (self.here, self.there))
        return replace(self, here=here, there=there, to_mm=self.to_mm / ratio, shape=tuple(shape))

    def added_to(self, term: DataTerm, share: float) -> DataTerm:
        """A data term and STRENGTH * share * sum max(0, distance / tolerance - 1)^2.

        ``share``: of the data that a control point speaks for.
        """
        factor = STRENGTH * min(share, 1.0)

        def both(field: torch.Tensor) -> tuple[float, torch.Tensor]:
            value, gradient = term(field)
            apart = self._apart(field)
            length = apart.norm(dim=1)
            excess = (length / self.tolerance_mm - 1).clamp_min(0)
            slope = apart * (2 * factor * excess / (length.clamp_min(1e-9) * self.tolerance_mm))[:, None]
            by_voxels = (slope @ torch.from_numpy(self.to_mm).to(slope)).T
            index, weights = (tensor.to(field.device) for tensor in self._corners)
            spread = (by_voxels[:, :, None] * weights).reshape(3, -1)
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            gradient.view(3, -1).index_add_(1, index.reshape(-1), spread.to(gradient))
            return value + factor * float(excess.square().sum()), gradient

        return both

    def moved(self, field: torch.Tensor) -> torch.Tensor:
        """The field (3, I, J, K), changed smoothly where a landmark is off by more than the tolerance.

        Gaussians around the landmarks whose sum takes each as far as it lacks (with a little ridge, so that
        contradictions average out), wide enough not to fold.
        """
        apart = self._apart(field).double().cpu().numpy()
        length = np.linalg.norm(apart, axis=1)
        excess = np.maximum(length - self.tolerance_mm, 0)
        if not excess.any():
            return field
        lack = -apart * (excess / np.maximum(length, 1e-12))[:, None]
        width = max(REACH_MM, 3 * float(excess.max()))
        places = self.here @ self.to_mm.T
        kernel = np.exp(-0.5 * (np.linalg.norm(places[:, None] - places, axis=2) / width) ** 2)
        coefficients = np.linalg.solve(kernel + 1e-2 * np.eye(len(kernel)), lack) @ np.linalg.inv(self.to_mm).T
        centres = np.moveaxis(np.indices(self.shape, np.float64), 0, -1) @ self.to_mm.T
        change = np.zeros(centres.shape)
        for place, coefficient in zip(places, coefficients, strict=True):
            change += np.exp(-0.5 * np.square(centres - place).sum(-1, keepdims=True) / width**2) * coefficient
        return field + torch.from_numpy(np.moveaxis(change, -1, 0)).to(field)

    def _apart(self, field: torch.Tensor) -> torch.Tensor:
        """(N, 3) mm from where the field puts the landmarks to where they must go, seen from there."""
        index, weights = (tensor.to(field.device) for tensor in self._corners)
        found = (field.reshape(3, -1)[:, index] * weights.to(field)).sum(-1).T
        wanted = torch.from_numpy(self.there - self.here).to(field)
        return (found - wanted) @ torch.from_numpy(self.to_mm).to(field).T

    @cached_property
    def _corners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 8) flat indices of the voxels around each landmark, the nearest ones outside, and their weights."""
        last = np.asarray(self.shape) - 1
        inside = np.clip(self.here, 0, last)
        low = np.minimum(np.floor(inside).astype(np.int64), np.maximum(last - 1, 0))
        part = inside - low
        index, weights = [], []
        for corner in np.ndindex(2, 2, 2):
            i, j, k = np.minimum(low + corner, last).T
            index.append((i * self.shape[1] + j) * self.shape[2] + k)
            weights.append(np.where(corner, part, 1 - part).prod(1))
        return torch.from_numpy(np.stack(index, 1)), torch.from_numpy(np.stack(weights, 1))
