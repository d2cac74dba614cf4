"""Affine maps of RAS mm points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from crossmorph.errors import InputError
from crossmorph.space import Array, map_points
from crossmorph.transform.base import Transform


class AffineParts(NamedTuple):
    """An affine map about a centre c: x -> c + t + R K S (x - c); see ``Affine.from_parts``."""

    translation_mm: Array
    rotation_deg: Array
    scales: Array
    shears: Array


@dataclass(frozen=True, eq=False)
class Affine(Transform):
    """x -> matrix @ x.

    Args:
        matrix: (4, 4) float64, RAS mm to RAS mm, invertible, last row 0 0 0 1.

    Raises:
        InputError: the matrix is of another shape, not finite, or singular.
    """

    matrix: Array

    def __post_init__(self) -> None:
        matrix = np.array(self.matrix, np.float64)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise InputError(f"an affine transform needs a finite 4x4 matrix, not\n{matrix}")
        if not np.allclose(matrix[3], (0, 0, 0, 1)):
            raise InputError(f"the last row of an affine matrix must be 0 0 0 1, not {matrix[3].tolist()}")
        if np.linalg.cond(matrix[:3, :3]) > 1e9:
            raise InputError(f"the affine matrix is singular and has no inverse\n{matrix}")
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)

    @classmethod
    def identity(cls, **spaces: Any) -> Affine:
        """x -> x. ``spaces``: the names and grids of ``Transform``, as for all constructors here."""
        return cls(np.eye(4), **spaces)

    @classmethod
    def translation(cls, translation_mm: ArrayLike, **spaces: Any) -> Affine:
        """x -> x + t."""
        return cls.from_parts(translation_mm=translation_mm, **spaces)

    @classmethod
    def rotation(cls, rotation_deg: ArrayLike, center_mm: ArrayLike = (0, 0, 0), **spaces: Any) -> Affine:
        """Rotation about a centre; the vector's direction is the axis and its length the angle in degrees."""
        return cls.from_parts(rotation_deg=rotation_deg, center_mm=center_mm, **spaces)

    @classmethod
    def from_parts(
        cls,
        translation_mm: ArrayLike = (0, 0, 0),
        rotation_deg: ArrayLike = (0, 0, 0),
        scales: ArrayLike = (1, 1, 1),
        shears: ArrayLike = (0, 0, 0),
        center_mm: ArrayLike = (0, 0, 0),
        **spaces: Any,
    ) -> Affine:
        """x -> c + t + R K S (x - c).

        Args:
            translation_mm: t.
            rotation_deg: R as a rotation vector: axis times angle in degrees.
            scales: the diagonal of S.
            shears: (xy, xz, yz), the entries of the unit upper triangular K.
            center_mm: c.
            spaces: names and grids of ``Transform``.
        """
        from scipy.spatial.transform import Rotation

        shear = np.eye(3)
        shear[np.triu_indices(3, 1)] = np.asarray(shears, float)
        turn = Rotation.from_rotvec(np.asarray(rotation_deg, float), degrees=True).as_matrix()
        linear = turn @ shear @ np.diag(np.asarray(scales, float))
        center = np.asarray(center_mm, float)
        matrix = np.eye(4)
        matrix[:3, :3] = linear
        matrix[:3, 3] = center + np.asarray(translation_mm, float) - linear @ center
        return cls(matrix, **spaces)

    def decompose(self, center_mm: ArrayLike = (0, 0, 0)) -> AffineParts:
        """The parts from which ``from_parts`` makes this transform about the same centre.

        A mirroring map has a negative first scale.
        """
        from scipy.spatial.transform import Rotation

        linear, center = self.matrix[:3, :3], np.asarray(center_mm, float)
        turn, upper = np.linalg.qr(linear)
        signs = np.sign(np.diag(upper))
        signs[0] *= np.linalg.det(turn) * signs.prod()
        turn, upper = turn * signs, upper * signs[:, None]
        scales = np.diag(upper)
        shears = (upper / scales)[np.triu_indices(3, 1)]
        degrees = Rotation.from_matrix(turn).as_rotvec(degrees=True)
        return AffineParts(self.matrix[:3, 3] - center + linear @ center, degrees, scales, shears)

    def inverse(self) -> Affine:
        """The inverse matrix."""
        return Affine(np.linalg.inv(self.matrix), **self.swapped_spaces)

    def _map(self, points: torch.Tensor) -> torch.Tensor:
        return map_points(self.matrix, points)
