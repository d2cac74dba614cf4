"""Where voxels are: a grid is a shape and an affine.

World coordinates are RAS+ millimetres. Voxel coordinates are continuous array indices (i, j, k) with voxel
centres at whole numbers, so voxel 0 reaches from -0.5 to 0.5 along each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossmorph.errors import InputError

if TYPE_CHECKING:
    import torch

Array = NDArray[np.floating[Any]]
P = TypeVar("P", "torch.Tensor", NDArray[np.floating])


def map_points(matrix: Array, points: P) -> P:
    """Send points (..., 3) through a 4x4 matrix; numpy stays numpy, torch stays torch of the same type."""
    if isinstance(points, np.ndarray):
        return points @ matrix[:3, :3].T.astype(points.dtype) + matrix[:3, 3].astype(points.dtype)
    if points.device.type == "cpu" and str(points.dtype) == "torch.float64" and not points.requires_grad:
        from crossmorph.kernels.points import mapped

        return mapped(matrix, points.reshape(-1, 3)).reshape(points.shape)
    linear, offset = points.new_tensor(matrix[:3, :3]), points.new_tensor(matrix[:3, 3])
    return offset.addmm(points.reshape(-1, 3), linear.T).reshape(points.shape)


FACE = 1e-4
"""Voxels by which a point may lie outside an outer face and still count as inside, against rounding."""


@overload
def inside(voxels: torch.Tensor, shape: Sequence[int]) -> torch.Tensor: ...
@overload
def inside(voxels: Array, shape: Sequence[int]) -> NDArray[np.bool_]: ...
def inside(voxels: Any, shape: Sequence[int]) -> Any:
    """(..., 3) voxel coordinates -> (...,) bool: within the outer faces of a volume of this shape."""
    i, j, k = (
        (voxels[..., axis] >= -0.5 - FACE) & (voxels[..., axis] <= n - 0.5 + FACE) for axis, n in enumerate(shape)
    )
    return i & j & k


@dataclass(frozen=True, eq=False)
class Grid:
    """A lattice of voxels in the world.

    Args:
        shape: number of voxels along the array axes (i, j, k).
        affine: (4, 4), from voxel coordinates to RAS mm; any invertible matrix (shear, oblique, left-handed).

    Raises:
        InputError: shape is not three positive numbers, or the affine is singular or not finite.
    """

    shape: tuple[int, int, int]
    affine: Array

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"a grid needs three positive sizes, not {tuple(self.shape)}")
        affine = np.array(self.affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError(f"a grid needs a finite 4x4 affine, not\n{affine}")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if lengths.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / np.maximum(lengths, 1e-300))) < 1e-6:
            raise InputError(
                f"the affine is singular (axis lengths {lengths.round(6).tolist()} mm): two axes coincide or a "
                f"spacing is zero; repair the header\n{affine}"
            )
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def from_spacing(
        cls, shape: Sequence[int], spacing_mm: ArrayLike = 1.0, center_mm: ArrayLike = (0.0, 0.0, 0.0)
    ) -> Grid:
        """Axis-aligned RAS grid with the given voxel size whose middle lies at ``center_mm``."""
        spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = np.asarray(center_mm, float) - spacing * (np.asarray(shape) - 1) / 2
        return cls((int(shape[0]), int(shape[1]), int(shape[2])), affine)

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def spacing(self) -> Array:
        """Voxel size along i, j, k in mm (lengths of the affine's columns)."""
        lengths: Array = np.linalg.norm(self.affine[:3, :3], axis=0)
        return lengths

    @property
    def origin(self) -> Array:
        """World position of voxel (0, 0, 0) in RAS mm."""
        return self.affine[:3, 3].copy()

    @property
    def direction(self) -> Array:
        """(3, 3): unit vectors of the array axes as columns; orthogonal only where there is no shear."""
        directions: Array = self.affine[:3, :3] / self.spacing
        return directions

    @property
    def axcodes(self) -> str:
        """The world direction in which each index grows, such as ``"LPS"`` (nearest axes where oblique)."""
        from nibabel.orientations import aff2axcodes

        codes: tuple[str | None, ...] = aff2axcodes(self.affine)
        return "".join(code or "?" for code in codes)

    @property
    def obliquity_deg(self) -> float:
        """Largest angle between an array axis and its nearest world axis, in degrees."""
        cosines = np.abs(self.direction).max(0)
        return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))

    @property
    def shear_deg(self) -> float:
        """How far the array axes are from being at right angles, in degrees; 0 for almost every scan."""
        gram = self.direction.T @ self.direction - np.eye(3)
        return float(np.degrees(np.arcsin(np.clip(np.abs(gram).max(), 0, 1))))

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in mm^3."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def inverse_affine(self) -> Array:
        """(4, 4), from RAS mm to voxel coordinates."""
        inverse: Array = np.linalg.inv(self.affine)
        return inverse

    @property
    def center(self) -> Array:
        """World position of the middle of the volume in RAS mm."""
        return self.to_world((np.asarray(self.shape) - 1) / 2)

    @property
    def extent_mm(self) -> Array:
        """Edge lengths of the field of view along i, j, k in mm, whole voxels counted."""
        extent: Array = self.spacing * self.shape
        return extent

    def corners(self) -> Array:
        """(8, 3): the corners of the field of view (outer voxel faces) in RAS mm."""
        ends = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in self.shape], indexing="ij"), -1)
        return self.to_world(ends.reshape(8, 3))

    def same_as(self, other: Grid, tolerance_mm: float = 1e-3) -> bool:
        """True where both have one shape and no corner differs by more than the tolerance or 1 % of a voxel."""
        allowed = min(tolerance_mm, 0.01 * float(self.spacing.min()))
        return self.shape == other.shape and bool(np.abs(self.corners() - other.corners()).max() <= allowed)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        spacing = "x".join(f"{s:.3g}" for s in self.spacing)
        tilt = f", oblique {self.obliquity_deg:.1f} deg" if self.obliquity_deg > 0.05 else ""
        shear = f", sheared {self.shear_deg:.1f} deg" if self.shear_deg > 0.05 else ""
        return f"Grid({size} voxels of {spacing} mm, {self.axcodes}{tilt}{shear})"

    @property
    def place(self) -> str:
        """The grid in words with its middle, to tell it from one of the same voxels elsewhere."""
        return f"{self!r} around {self.center.round(1).tolist()} mm"

    # -- coordinates -----------------------------------------------------------------------------------------

    def to_world(self, voxels: P) -> P:
        """Voxel coordinates (..., 3) to RAS mm."""
        return map_points(self.affine, voxels)

    def to_voxel(self, world: P) -> P:
        """RAS mm (..., 3) to voxel coordinates."""
        return map_points(self.inverse_affine, world)

    def contains(self, world: Array) -> NDArray[np.bool_]:
        """(..., 3) RAS mm -> (...,): inside the field of view, outer faces included."""
        return inside(self.to_voxel(np.asarray(world, np.float64)), self.shape)

    # -- relatives -------------------------------------------------------------------------------------------

    def _with_corner(self, shape: Sequence[int], columns: Array, corner: Array) -> Grid:
        """Grid of the given axes whose outer corner (voxel -0.5, -0.5, -0.5) lies at ``corner`` (RAS mm)."""
        affine = np.eye(4)
        affine[:3, :3] = columns
        affine[:3, 3] = corner + columns @ np.full(3, 0.5)
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)

    def resized(self, shape: Sequence[int]) -> Grid:
        """The same field of view (outer faces kept) cut into another number of voxels."""
        columns = self.affine[:3, :3] * (np.asarray(self.shape) / np.asarray(shape))
        return self._with_corner(shape, columns, self.corners()[0])

    def respaced(self, spacing_mm: ArrayLike) -> Grid:
        """The same middle and axes with exactly this voxel size; the field of view is covered at least."""
        wanted = np.broadcast_to(np.asarray(spacing_mm, float), 3)
        shape = np.maximum(np.ceil(self.extent_mm / wanted - 1e-6).astype(int), 1)
        columns = self.direction * wanted
        corner = self.center - columns @ (shape / 2)
        return self._with_corner(shape.tolist(), columns, corner)

    def padded(self, before: Sequence[int], after: Sequence[int]) -> Grid:
        """More voxels on the low and high side of each axis (negative numbers crop)."""
        affine = np.array(self.affine)
        affine[:3, 3] = self.to_world(-np.asarray(before, float))
        shape = [n + b + a for n, b, a in zip(self.shape, before, after, strict=True)]
        return Grid((shape[0], shape[1], shape[2]), affine)

    def pooled(self, factor: int) -> Grid:
        """Blocks of ``factor``^3 voxels as one voxel each; the high faces are padded to whole blocks."""
        shape = [-(-n // factor) for n in self.shape]
        return self._with_corner(shape, self.affine[:3, :3] * factor, self.corners()[0])


def gap_mm(a: Grid, b: Grid, b_to_a: Array | None = None) -> float:
    """Distance in mm between the world boxes of two grids; 0 where they touch or overlap.

    ``b_to_a`` (4x4, RAS mm) moves b first. The boxes are the axis-aligned hulls of the fields of view.
    """
    first, second = a.corners(), b.corners()
    if b_to_a is not None:
        second = map_points(b_to_a, second)
    apart = np.maximum(first.min(0) - second.max(0), second.min(0) - first.max(0))
    return float(np.linalg.norm(np.maximum(apart, 0)))


def overlap_fraction(a: Grid, b: Grid, samples: int = 24) -> float:
    """Share of a's field of view that b sees, 0 to 1, counted on ``samples``^3 points of a."""
    lines = [(np.arange(samples) + 0.5) * n / samples - 0.5 for n in a.shape]
    points = a.to_world(np.stack(np.meshgrid(*lines, indexing="ij"), -1))
    return float(b.contains(points).mean())
