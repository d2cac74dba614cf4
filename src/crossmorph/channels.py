"""Pairs of images that are compared in one objective, each on its own grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.preprocess import check_registrable, masked
from crossmorph.settings import Descriptor, check, to_dict
from crossmorph.space import gap_mm


@dataclass(frozen=True, eq=False)
class Channel:
    """An image of the fixed and one of the moving body that are compared: one term of the objective.

    All fixed images of a registration lie in one world, all moving ones in another, each on a grid of its own.

    Args:
        fixed, moving: the images.
        weight: of the term, relative to the others. The images that ``register`` is given first weigh 1.
        describe: what the deformable stage compares; empty for what the settings say.
    """

    fixed: Image
    moving: Image
    weight: float = 1.0
    describe: tuple[Descriptor, ...] = ()

    def changed(self, change: Callable[[Image], Image]) -> Channel:
        """The same with both images changed."""
        return replace(self, fixed=change(self.fixed), moving=change(self.moving))

    def record(self) -> dict[str, Any]:
        """Weight and descriptors as plain values."""
        return {"weight": self.weight, "describe": [to_dict(descriptor) for descriptor in self.describe]}


def fixed_images(channels: Sequence[Channel]) -> list[Image]:
    """The fixed images, one that several channels share once."""
    return list({id(channel.fixed): channel.fixed for channel in channels}.values())


def checked(
    channels: Sequence[Channel], fixed_mask: Image | Labels | None, moving_mask: Image | Labels | None
) -> list[Channel]:
    """The channels within their masks, images named apart, in the spaces ``fixed`` and ``moving``.

    Raises:
        InputError: an image cannot be registered, a mask does not meet one, a fixed image lies elsewhere than the
            first, a weight is not positive or a descriptor not known.
    """
    shared = fixed_images(channels)
    targets = dict(zip(map(id, shared), _images(shared, "fixed", fixed_mask), strict=True))
    fixed = [targets[id(channel.fixed)] for channel in channels]
    moving = _images([channel.moving for channel in channels], "moving", moving_mask)
    for channel, image, partner in zip(channels, fixed, moving, strict=True):
        names = f"{image.name} and {partner.name}"
        if not (channel.weight > 0 and math.isfinite(channel.weight)):
            raise InputError(
                f"the weight of {names} must be above 0 and finite, not {channel.weight}; leave out a channel "
                "that should not count"
            )
        for descriptor in channel.describe:
            check(descriptor, names)
        gap = gap_mm(fixed[0].grid, image.grid)
        if gap > 0:
            raise InputError(
                f"{image.name} lies {gap:.0f} mm away from {fixed[0].name}; all fixed images must show "
                "one body in one world (were fixed and moving exchanged?)"
            )
    return [replace(channel, fixed=f, moving=m) for channel, f, m in zip(channels, fixed, moving, strict=True)]


def _images(images: list[Image], space: str, mask: Image | Labels | None) -> list[Image]:
    """The images of one side."""
    for image in images:
        check_registrable(image)
    if mask is not None:
        images = [masked(image, mask, f"the {space} mask") for image in images]
        for image in images:
            check_registrable(image)
    names = _distinct([image.name for image in images])
    return [replace(image, space=space, name=name) for image, name in zip(images, names, strict=True)]


def _distinct(names: list[str]) -> list[str]:
    """The names, all of them numbered where two are equal: results are told apart by them."""
    return names if len(set(names)) == len(names) else [f"{n}_{name}" for n, name in enumerate(names, start=1)]
