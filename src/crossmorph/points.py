"""Landmarks and surfaces in world coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray

from crossmorph.errors import InputError


@dataclass(frozen=True, eq=False)
class Points:
    """Landmarks.

    Args:
        xyz: (N, 3) float64, RAS mm.
        names: one name a point, or none at all.
        space: name of the space they live in (``"fixed"``, ``"moving"``), if known.
    """

    xyz: torch.Tensor
    names: tuple[str, ...] = ()
    space: str | None = None

    def __post_init__(self) -> None:
        if self.xyz.ndim != 2 or self.xyz.shape[1] != 3:
            raise InputError(f"points must be (N, 3) in RAS mm, not {tuple(self.xyz.shape)}")
        if self.names and len(self.names) != len(self.xyz):
            raise InputError(f"{len(self.xyz)} points but {len(self.names)} names")
        object.__setattr__(self, "xyz", self.xyz.to(torch.float64))

    def __len__(self) -> int:
        return len(self.xyz)

    def moved_to(self, xyz: torch.Tensor, space: str | None) -> Points:
        """The same landmarks at other places."""
        return replace(self, xyz=xyz, space=space)


@dataclass(frozen=True, eq=False)
class Mesh:
    """A triangle surface. Warping moves points only.

    Args:
        points: of all triangles.
        faces: (F, 3) indices into them.
        point_data, cell_data: arrays by name, one entry a point or a face.
    """

    points: Points
    faces: torch.Tensor
    point_data: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    cell_data: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.faces.ndim != 2 or self.faces.shape[1] != 3:
            raise InputError(f"faces must be (F, 3), not {tuple(self.faces.shape)}")
        if len(self.faces) and not 0 <= int(self.faces.min()) <= int(self.faces.max()) < len(self.points):
            raise InputError("a face names a point that the mesh does not have")
        for data, count in ((self.point_data, len(self.points)), (self.cell_data, len(self.faces))):
            for name, values in data.items():
                if len(values) != count:
                    raise InputError(f"the mesh data {name} has {len(values)} entries; it needs {count}")

    @property
    def space(self) -> str | None:
        """The space the surface lives in."""
        return self.points.space

    def moved_to(self, xyz: torch.Tensor, space: str | None) -> Mesh:
        """The same surface with its points at other places; faces and data stay as they are."""
        return replace(self, points=self.points.moved_to(xyz, space))
