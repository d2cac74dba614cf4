"""Images and label maps: values, the grid they lie on, and where they are valid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from crossmorph.errors import InputError
from crossmorph.space import Grid


@dataclass(frozen=True, eq=False)
class Image:
    """Values on a grid.

    Args:
        data: (C, I, J, K) float32; C counts channels or time frames and is 1 for an ordinary scan.
        grid: where the voxels are.
        valid: (I, J, K) bool; False outside the field of view, outside a mask, and where values were not finite.
            Nothing is ever learnt from a voxel that is not valid. Values there are finite all the same.
        name: short name for messages and output files.
        space: name of the space the image lives in (``"fixed"``, ``"moving"``), if known.
        dtype: type of the stored values; written files keep it.
        source: the file it came from.
        notes: what reading had to decide or repair, in words.
    """

    data: torch.Tensor
    grid: Grid
    valid: torch.Tensor
    name: str = "image"
    space: str | None = None
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    source: Path | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or tuple(self.data.shape[1:]) != self.grid.shape:
            raise InputError(
                f"{self.name}: data of shape {tuple(self.data.shape)} does not fit a grid of {self.grid.shape}; "
                "it must be (channels, I, J, K)"
            )
        if tuple(self.valid.shape) != self.grid.shape:
            raise InputError(
                f"{self.name}: validity of shape {tuple(self.valid.shape)} does not fit {self.grid.shape}"
            )

    @classmethod
    def from_array(cls, array: ArrayLike, affine: ArrayLike | Grid, **kwargs: Any) -> Image:
        """From an (I, J, K) or (C, I, J, K) array and an affine (voxel to RAS mm) or a grid.

        Values that are not finite become the smallest finite value and are not valid.
        """
        values = np.asarray(array)
        values = values[None] if values.ndim == 3 else values
        if values.ndim != 4:
            raise InputError(f"an image needs 3 axes, or 4 with channels first; this array has {values.ndim}")
        kwargs.setdefault("dtype", values.dtype)
        data = np.ascontiguousarray(values, np.float32)
        finite = np.isfinite(data)
        if not finite.all():
            lowest = data[finite].min() if finite.any() else 0.0
            data = np.where(finite, data, lowest)
        grid = affine if isinstance(affine, Grid) else Grid(_shape3(data), np.asarray(affine, float))
        valid = torch.from_numpy(np.ascontiguousarray(finite.all(0)))
        return cls(torch.from_numpy(data), grid, valid, **kwargs)

    @property
    def channels(self) -> int:
        """Number of channels or time frames."""
        return int(self.data.shape[0])

    def frame(self, index: int) -> Image:
        """One channel or time frame as an image of its own."""
        return replace(self, data=self.data[index : index + 1])

    def mean_frame(self) -> Image:
        """The mean over channels or time frames."""
        return replace(self, data=self.data.mean(0, keepdim=True))

    def restricted(self, mask: torch.Tensor) -> Image:
        """The same image, valid only where ``mask`` (I, J, K) is true as well."""
        return replace(self, valid=self.valid & mask.to(self.valid.device))

    def to(self, device: torch.device | str) -> Image:
        """The same image on another device."""
        return replace(self, data=self.data.to(device), valid=self.valid.to(device))

    def __repr__(self) -> str:
        channels = f"{self.channels} channels, " if self.channels > 1 else ""
        return f"Image({self.name}: {channels}{self.dtype!s}, {self.grid})"

    def _repr_html_(self) -> str:
        """Three slices and a table, in a notebook."""
        from crossmorph.report.notebook import image_html

        return image_html(self)


@dataclass(frozen=True, eq=False)
class Labels:
    """Integer labels on a grid; 0 is background.

    Args:
        data: (I, J, K) int32 (int64 where a label needs it).
        grid: where the voxels are.
        name, space, dtype, source, notes: as for ``Image``.
    """

    data: torch.Tensor
    grid: Grid
    name: str = "labels"
    space: str | None = None
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.int32))
    source: Path | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if tuple(self.data.shape) != self.grid.shape:
            raise InputError(
                f"{self.name}: labels of shape {tuple(self.data.shape)} do not fit a grid of {self.grid.shape}"
            )
        if self.data.is_floating_point():
            raise InputError(f"{self.name}: labels must be whole numbers, not {self.data.dtype}")

    @classmethod
    def from_array(cls, array: ArrayLike, affine: ArrayLike | Grid, **kwargs: Any) -> Labels:
        """From an (I, J, K) array of whole numbers (floats that are whole are taken) and an affine or grid."""
        values = np.asarray(array)
        kwargs.setdefault("dtype", values.dtype)
        name = kwargs.get("name", "labels")
        if values.ndim != 3:
            raise InputError(f"{name}: a label map needs 3 axes; this array has {values.ndim}")
        if not np.issubdtype(values.dtype, np.integer):
            rounded = np.round(values)
            if not np.isfinite(values).all() or np.abs(values - rounded).max() > 1e-3:
                raise InputError(f"{name}: label maps hold whole numbers; this one holds fractions or NaN")
            values = rounded
        wide = np.abs(values.astype(np.float64)).max(initial=0) > np.iinfo(np.int32).max
        data = np.ascontiguousarray(values, np.int64 if wide else np.int32)
        grid = affine if isinstance(affine, Grid) else Grid(_shape3(data), np.asarray(affine, float))
        return cls(torch.from_numpy(data), grid, **kwargs)

    @property
    def ids(self) -> list[int]:
        """The labels present, without 0, in rising order."""
        return [int(i) for i in torch.unique(self.data).tolist() if i != 0]

    @property
    def volumes_mm3(self) -> dict[int, float]:
        """Volume of each label but 0."""
        ids, counts = torch.unique(self.data, return_counts=True)
        sizes = zip(ids.tolist(), counts.tolist(), strict=True)
        return {int(i): count * self.grid.voxel_volume for i, count in sizes if i != 0}

    def to(self, device: torch.device | str) -> Labels:
        """The same labels on another device."""
        return replace(self, data=self.data.to(device))

    def __repr__(self) -> str:
        return f"Labels({self.name}: {len(self.ids)} labels, {self.grid})"


def _shape3(array: np.ndarray[Any, Any]) -> tuple[int, int, int]:
    return (int(array.shape[-3]), int(array.shape[-2]), int(array.shape[-1]))
