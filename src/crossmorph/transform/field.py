"""Dense displacements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from crossmorph.errors import InputError
from crossmorph.resample import sample
from crossmorph.space import Grid
from crossmorph.transform.base import Transform

if TYPE_CHECKING:
    from crossmorph.transform.inverse import Inverse


@dataclass(frozen=True, eq=False)
class DisplacementField(Transform):
    """x -> x + u(x), with u linear between the voxel centres of its own grid.

    Between the last centres and the outer faces the border displacement holds; outside the grid points stay where
    they are. This is ITK's DisplacementFieldTransform, so that files mean the same in both.

    Args:
        field: (3, I, J, K) float32 mm along R, A, S.
        grid: where the displacements are, in the fixed space; may be coarser or larger than the images' grids.

    Raises:
        InputError: field and grid do not fit, or the field is not finite.
    """

    field: torch.Tensor
    grid: Grid

    def __post_init__(self) -> None:
        if tuple(self.field.shape) != (3, *self.grid.shape):
            raise InputError(
                f"a displacement field of shape {tuple(self.field.shape)} does not fit a grid of "
                f"{self.grid.shape}; it must be (3, I, J, K), mm along R, A, S"
            )
        if not torch.isfinite(self.field).all():
            raise InputError("a displacement field must be finite; this one holds NaN or infinity")

    def _map(self, points: torch.Tensor) -> torch.Tensor:
        precise = points if points.device.type == "mps" else points.double()
        moved = sample(self.field.to(points.device), self.grid.to_voxel(precise))
        return points + moved.movedim(0, -1).to(points.dtype)

    @cached_property
    def inversion(self) -> Inverse:
        """The numerical inverse and how good it is; computed when first asked for.

        It lies on this field's grid, padded by the largest displacement at the faces so that every point of the
        grid is found again.
        """
        from crossmorph.transform.inverse import covering_grid, invert_field

        return invert_field(self, covering_grid(self))

    def inverse(self) -> DisplacementField:
        """The numerical inverse; see ``inversion`` for its residual."""
        return self.inversion.field

    def resampled(self, grid: Grid) -> DisplacementField:
        """The same displacement sampled on another grid."""
        return replace(self, field=self.displacements(grid, self.field.device), grid=grid)

    def to(self, device: torch.device | str) -> DisplacementField:
        """The same transform with its field on another device."""
        return replace(self, field=self.field.to(device))
