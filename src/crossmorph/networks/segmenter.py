"""A 3-D U-Net as nnU-Net plans it, with concurrent squeeze and excitation in every stage of its decoder.

Isensee et al., Nature Methods 2021; Roy et al., MICCAI 2018 (scSE): the larger of both gates, as in their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from crossmorph.errors import InputError
from crossmorph.networks.convolution import Convolution, standardised

WIDEST = 320
"""Most channels of a stage."""

SMALLEST = 4
"""Voxels that the coarsest stage must have along each axis to learn."""


class Excitation(nn.Module):
    """Features weighted by channel (a gate from their means) and by place (a gate from each voxel): the larger."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 2)
        self.excite = nn.Linear(channels // 2, channels)
        self.place = nn.Conv3d(channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, I, J, K) -> the same."""
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3, 4))))))
        return torch.maximum(x * gate[:, :, None, None, None], x * torch.sigmoid(self.place(x)))


def stage(before: int, after: int, stride: int) -> nn.Sequential:
    """Two convolutions with instance normalisation; the first has the stride."""
    parts: list[nn.Module] = []
    for inputs, step in ((before, stride), (after, 1)):
        parts += [
            Convolution(inputs, after, 3, step, 1),
            nn.InstanceNorm3d(after, affine=True),
            nn.LeakyReLU(0.01),
        ]
    return nn.Sequential(*parts)


class Segmenter(nn.Module):
    """(N, 1, I, J, K) in [0, 1] -> (N, classes, I, J, K) float32 scores, whose softmax are probabilities.

    Args:
        classes: background among them.
        features: channels at full resolution; every stage has twice as many, up to 320.
        stages: how many resolutions, each half of the one before.
        checkpointing: compute features a second time in the backward pass instead of keeping them.
    """

    def __init__(self, classes: int, features: int = 32, stages: int = 5, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        widths = [min(features * 2**level, WIDEST) for level in range(stages)]
        self.down = nn.ModuleList([stage(1, widths[0], 1), *(stage(a, b, 2) for a, b in pairwise(widths))])
        coarse_to_fine = list(pairwise(reversed(widths)))
        self.grow = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, 2) for a, b in coarse_to_fine)
        self.up = nn.ModuleList(nn.Sequential(stage(2 * b, b, 1), Excitation(b)) for _, b in coarse_to_fine)
        self.head = nn.Conv3d(widths[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores.

        Raises:
            InputError: sizes that cannot be halved so often; in training also those that leave the coarsest stage
                too few voxels.
        """
        check_size(x.shape[2:], len(self.down), SMALLEST if self.training else 1)
        x, beside = standardised(x), []
        for part in self.down:
            x = self._kept(part, x)
            beside.append(x)
        beside.pop()
        for grow, part in zip(self.grow, self.up, strict=True):
            x = self._kept(part, torch.cat([grow(x), beside.pop()], 1))
        scores: torch.Tensor = self.head(x)
        return scores.float()

    def _kept(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            found: torch.Tensor = checkpoint(part, x, use_reentrant=False)
        else:
            found = part(x)
        return found


def check_size(shape: Sequence[int], stages: int, least: int) -> None:
    """Refuse volumes that a segmenter of so many stages cannot take.

    Raises:
        InputError: the message says how many stages would fit.
    """
    halvings = 2 ** (stages - 1)
    if any(n % halvings or n < least * halvings for n in shape):
        fitting = max(1, int(min(shape) / least).bit_length())
        raise InputError(
            f"a segmenter of {stages} stages needs sizes that are multiples of {halvings}, from "
            f"{least * halvings} on, not {tuple(shape)} voxels; set stages = {fitting}, take a smaller "
            "preprocessing.spacing_mm, or preprocessing.crop = false"
        )
