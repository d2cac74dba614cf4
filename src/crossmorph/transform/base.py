"""What every transform can do: map points, invert itself, and move whatever it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.points import Mesh, Points
from crossmorph.resample import Mode, resample, resample_labels, world_blocks
from crossmorph.space import Grid

Numbers = NDArray[np.floating[Any]]
T = TypeVar("T", Image, Labels, Points, Mesh)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transform(ABC):
    """A map of the points of the fixed space to points of the moving space, both in RAS mm.

    Args:
        fixed: name of the space that points come from.
        moving: name of the space that they are sent to.
        fixed_grid: grid of the fixed image, if known; warped images land on it by default.
        moving_grid: grid of the moving image, if known; for images sent the other way.
    """

    fixed: str = "fixed"
    moving: str = "moving"
    fixed_grid: Grid | None = None
    moving_grid: Grid | None = None

    @overload
    def __call__(self, points: torch.Tensor, /) -> torch.Tensor: ...
    @overload
    def __call__(self, points: Numbers, /) -> Numbers: ...
    def __call__(self, points: Any, /) -> Any:
        """Points (..., 3) of the fixed space to points of the moving space; numpy stays numpy, torch torch."""
        if isinstance(points, torch.Tensor):
            return self._map(points)
        given = np.asarray(points)
        given = given if np.issubdtype(given.dtype, np.floating) else given.astype(np.float64)
        return self._map(torch.tensor(given)).numpy()

    @abstractmethod
    def _map(self, points: torch.Tensor) -> torch.Tensor:
        """As ``__call__``, for floating tensors."""

    @abstractmethod
    def inverse(self) -> Transform:
        """The map of moving points to fixed points; the names of the spaces swap places."""

    @property
    def spaces(self) -> dict[str, Any]:
        """Names and grids of both spaces, as keyword arguments for another transform between them."""
        return {name: getattr(self, name) for name in ("fixed", "moving", "fixed_grid", "moving_grid")}

    @property
    def swapped_spaces(self) -> dict[str, Any]:
        """As ``spaces``, for a transform of the other direction."""
        names = ("moving", "fixed", "moving_grid", "fixed_grid")
        return dict(zip(self.spaces, (getattr(self, name) for name in names), strict=True))

    def displacements(self, grid: Grid, device: torch.device | str = "cpu") -> torch.Tensor:
        """(3, I, J, K) float32 RAS mm: how far the transform moves each voxel centre of a grid."""
        field = torch.empty(3, int(np.prod(grid.shape)), device=device)
        for part, points in world_blocks(grid, device):
            field[:, part] = (self._map(points) - points).T.float()
        return field.reshape(3, *grid.shape)

    def apply(self, thing: T, like: Any = None, *, mode: Mode = "linear", fill: float | None = None) -> T:
        """Move an image, a label map, points or a mesh into the other space.

        The direction follows from ``thing.space``. Images and labels of the moving space come out in the fixed
        space, those of the fixed space in the moving space; where they name no space they are taken to be of the
        moving space. Points and meshes of the fixed space go to the moving space and the other way round.

        Args:
            thing: Image, Labels, Points or Mesh.
            like: grid to put an image on: a ``Grid`` or anything with a ``grid``. None takes the grid that the
                transform knows for that space.
            mode: interpolation of an image, see ``resample.sample``.
            fill: value of an image outside its field of view; None guesses it.

        Raises:
            InputError: the space is neither of the transform's, points without a space, or no grid to land on.
        """
        if isinstance(thing, Points | Mesh):
            forward = self._is_from(self.fixed, self.moving, thing)
            mapping = self if forward else self.inverse()
            points = thing if isinstance(thing, Points) else thing.points
            moved: Any = thing.moved_to(mapping(points.xyz), mapping.moving)
            return moved  # type: ignore[no-any-return]
        forward = self._is_from(self.moving, self.fixed, thing)
        mapping = self if forward else self.inverse()
        grid = mapping._landing_grid(like)
        if isinstance(thing, Labels):
            return resample_labels(thing, grid, mapping)
        return resample(thing, grid, mapping, mode, fill)

    def _is_from(self, first: str, second: str, thing: Image | Labels | Points | Mesh) -> bool:
        """True where the thing lives in the first of the two spaces, False where in the second."""
        kind, space = type(thing).__name__.lower(), thing.space
        if space is None and isinstance(thing, Points | Mesh):
            raise InputError(
                f"these {kind} do not say which space they live in; set space to {self.fixed!r} or {self.moving!r}"
            )
        if space is None and isinstance(thing, Image | Labels):
            self._check_grid(thing)
        if space in (first, None):
            return True
        if space == second:
            return False
        raise InputError(
            f"the {kind} to move live in space {space!r}, but this transform joins {self.fixed!r} and "
            f"{self.moving!r}; name one of these, or use another transform"
        )

    def _check_grid(self, thing: Image | Labels) -> None:
        """Refuse a volume that names no space and has the fixed image's grid, but not the moving one's."""
        if self.fixed_grid is None or self.moving_grid is None:
            return
        if thing.grid.same_as(self.fixed_grid) and not thing.grid.same_as(self.moving_grid):
            raise InputError(
                f"{thing.name} names no space, and its grid is that of {self.fixed!r} ({self.fixed_grid.place}), "
                f"not of {self.moving!r} ({self.moving_grid.place}), which a transform draws; set its space"
            )

    def _landing_grid(self, like: Any) -> Grid:
        grid = self.fixed_grid if like is None else getattr(like, "grid", like)
        if not isinstance(grid, Grid):
            given = "no grid was given and the transform knows none" if like is None else f"{like!r} has no grid"
            raise InputError(f"{given}; pass like=, a Grid or an image of space {self.fixed!r}")
        return grid
