"""From an image as read to an image that can be registered."""

from __future__ import annotations

from crossmorph.errors import InputError
from crossmorph.image import Image

MIN_VOXELS = 64
"""Fewer valid voxels than this say nothing about alignment."""


def check_registrable(image: Image) -> None:
    """Refuse an image that holds nothing to align.

    Raises:
        InputError: a single slice, fewer than 64 valid voxels (all NaN, say), or one constant value.
    """
    name = str(image.source or image.name)
    if min(image.grid.shape) < 2:
        raise InputError(
            f"{name} is 2-D: its shape is {image.grid.shape}; crossmorph registers volumes, with at least two "
            "voxels along each axis"
        )
    count = int(image.valid.sum())
    if count == 0:
        raise InputError(f"{name} has no valid voxel: every value is NaN or infinite, or the mask is empty")
    if count < MIN_VOXELS:
        raise InputError(f"{name} has only {count} valid voxels; at least {MIN_VOXELS} are needed")
    values = image.data[:, image.valid]
    if float(values.min()) == float(values.max()):
        raise InputError(
            f"{name} is constant: every valid voxel is {float(values.min()):g}; there is nothing to align"
        )
