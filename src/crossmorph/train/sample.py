"""What a training step sees: one pair on the working grid, and several of them as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.space import Grid


@dataclass(frozen=True, eq=False)
class Sample:
    """A pair of volumes on one grid of the fixed space.

    Args:
        name: for messages.
        fixed, moving: (I, J, K) float32 in [0, 1]; invalid voxels hold about the nearest valid value.
        fixed_valid, moving_valid: (I, J, K) bool.
        grid: where the voxels are.
        linear: (4, 4) RAS mm, fixed to moving space; the moving volume was drawn through it.
        fixed_labels, moving_labels: (I, J, K) int32, both or neither.
        fixed_points, moving_points: (P, 3) RAS mm in their own spaces, both or neither.
        truth: (3, I, J, K) the exact displacement in voxels, fixed to moving, of generated pairs.
    """

    name: str
    fixed: torch.Tensor
    moving: torch.Tensor
    fixed_valid: torch.Tensor
    moving_valid: torch.Tensor
    grid: Grid
    linear: np.ndarray
    fixed_labels: torch.Tensor | None = None
    moving_labels: torch.Tensor | None = None
    fixed_points: torch.Tensor | None = None
    moving_points: torch.Tensor | None = None
    truth: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Sample:
        """The pair with its volumes on a device."""
        volumes = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor) and not field.name.endswith("points")
        }
        return replace(self, **volumes)  # type: ignore[arg-type]  # only fields that hold tensors

    def padded(self, shape: Sequence[int]) -> Sample:
        """The pair with voxels added at the high faces; they are not valid and repeat the border."""
        if tuple(self.fixed.shape) == tuple(shape):
            return self
        more = [n - m for n, m in zip(shape, self.fixed.shape, strict=True)]
        pad = [width for n in reversed(more) for width in (0, n)]
        changed: dict[str, torch.Tensor | Grid] = {"grid": self.grid.padded((0, 0, 0), more)}
        for name in ("fixed", "moving"):
            changed[name] = F.pad(getattr(self, name)[None, None], pad, mode="replicate")[0, 0]
        for name in ("fixed_valid", "moving_valid", "fixed_labels", "moving_labels", "truth"):
            value = getattr(self, name)
            if value is not None:
                changed[name] = F.pad(value, pad)
        return replace(self, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one shape: volumes (N, 1, I, J, K), labels (N, I, J, K) where all samples have them."""

    names: tuple[str, ...]
    fixed: torch.Tensor
    moving: torch.Tensor
    fixed_valid: torch.Tensor
    moving_valid: torch.Tensor
    fixed_labels: torch.Tensor | None
    moving_labels: torch.Tensor | None
    truth: torch.Tensor | None

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device | str = "cpu") -> Batch:
        """Samples of one shape, on a device."""
        found: dict[str, torch.Tensor | None] = {}
        for field in fields(cls):
            if field.name != "names":
                parts = [getattr(sample, field.name) for sample in samples]
                whole = None if any(part is None for part in parts) else torch.stack(parts).to(device)
                volume = field.name in ("fixed", "moving", "fixed_valid", "moving_valid")
                found[field.name] = whole[:, None] if volume and whole is not None else whole
        return cls(tuple(sample.name for sample in samples), **found)  # type: ignore[arg-type]
