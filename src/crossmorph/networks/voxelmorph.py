"""VoxelMorph's U-Net (Balakrishnan et al., CVPR 2018): stacked volumes in, a displacement in voxels out.

Four convolutions of stride 2 go down, four upsamplings come up, beside each the features of the way down.
``"text"`` is the version that the words of Xu et al. (ISBI 2021) describe, with all refining convolutions at full
resolution; ``"vm2"`` and ``"vm1"`` are those of the CVPR paper, whose first one is at half resolution.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from crossmorph.networks.convolution import Convolution, exact

Version = Literal["text", "vm2", "vm1"]

DOWN = (16, 32, 32, 32)
"""Channels on the way down, at a half to a sixteenth of the resolution."""

UP = 32
"""Channels of each of the four convolutions on the way up, each before its upsampling."""

REFINE: dict[Version, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "text": ((), (32, 16, 16)),
    "vm2": ((32,), (16, 16)),
    "vm1": ((8,), (8,)),
}
"""Channels of the refining convolutions at half and at full resolution."""

MULTIPLE = 16
"""Sizes must be multiples of this."""


class Block(nn.Module):
    """Convolution of 3^3 taps, zeros outside, He's start, and a leaky rectifier of slope 0.2."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = Convolution(before, after, 3, stride, 1)
        nn.init.kaiming_normal_(self.convolution.weight, a=0.2)
        assert self.convolution.bias is not None
        nn.init.zeros_(self.convolution.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.convolution(x), 0.2)


class VoxelMorph(nn.Module):
    """(N, C, I, J, K) stacked volumes -> (N, 3, I, J, K) float32 displacements in voxels along i, j, k.

    Args:
        channels: of the input; 2 for a pair of images.
        version: ``"text"`` (301,411 parameters for a pair), ``"vm2"`` (300,547) or ``"vm1"`` (259,675).
        checkpointing: compute the features of the full resolution a second time in the backward pass instead of
            keeping them.
    """

    def __init__(self, channels: int = 2, version: Version = "text", checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        half, full = REFINE[version]
        self.down = nn.ModuleList(Block(a, b, 2) for a, b in pairwise((channels, *DOWN)))
        before = (DOWN[3], *(UP + beside for beside in DOWN[2::-1]))
        self.up = nn.ModuleList(Block(a, UP) for a in before)
        self.coarse = nn.ModuleList(Block(a, b) for a, b in pairwise((UP, *half)))
        self.fine = nn.ModuleList(Block(a, b) for a, b in pairwise(((UP, *half)[-1] + channels, *full)))
        self.flow = still(Convolution(full[-1], 3, 3, 1, 1))

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Displacements; the sizes must be multiples of 16."""
        x, beside = volumes, []
        for block in self.down:
            x = block(x)
            beside.append(x)
        for block, finer in zip(self.up, (*beside[2::-1], None), strict=True):
            x = block(x)
            if finer is not None:
                x = torch.cat([_doubled(x), finer.to(x.dtype)], 1)
        for block in self.coarse:
            x = block(x)
        if self.checkpointing and torch.is_grad_enabled():
            found: torch.Tensor = checkpoint(self._refined, x, volumes, use_reentrant=False)
            return found
        return self._refined(x, volumes)

    def _refined(self, x: torch.Tensor, volumes: torch.Tensor) -> torch.Tensor:
        x = torch.cat([_doubled(x), volumes.to(x.dtype)], 1)
        for block in self.fine:
            x = block(x)
        return exact(self.flow, x)  # a displacement needs more digits than bfloat16 has


def still(layer: nn.Conv3d) -> nn.Conv3d:
    """The layer, started so that it says almost no motion whatever it sees."""
    nn.init.normal_(layer.weight, std=1e-5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def stacked(*volumes: torch.Tensor) -> torch.Tensor:
    """Volumes as channels, laid out as convolutions on a CPU like it."""
    return torch.cat(volumes, 1).contiguous(memory_format=torch.channels_last_3d)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
