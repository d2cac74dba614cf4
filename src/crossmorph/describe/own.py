"""Descriptors that the caller brings along."""

from __future__ import annotations

from collections.abc import Callable

import torch

from crossmorph.errors import InputError

OwnDescriptor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Values (I, J, K) float32 of an image on the working grid, from 0 to 1, and where they are valid, (I, J, K) bool,
to features (F, I, J, K). Values that are not valid repeat what is near."""


def own_features(describe: OwnDescriptor, values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The caller's features (F, I, J, K) float32.

    Raises:
        InputError: they have another shape, or are not finite.
    """
    features = torch.as_tensor(describe(values, valid)).to(values)
    name = getattr(describe, "__name__", "the descriptor")
    if features.ndim != 4 or features.shape[1:] != values.shape or not len(features):
        raise InputError(
            f"{name} returned {tuple(features.shape)} for an image of {tuple(values.shape)} voxels; a descriptor "
            "returns (features, I, J, K) on the grid of the image"
        )
    if not features.isfinite().all():
        raise InputError(f"{name} returned values that are not finite; give them a value where nothing is seen")
    return features
