"""The network of DISA (Ronchetti et al., MICCAI 2023): ten convolutions, 90,752 parameters, 16 features, stride 4.

A volume goes in, a descriptor every fourth voxel comes out; output index k lies on input index 4 k. One descriptor
sees 49^3 voxels. The same weights give descriptors at every second or every voxel: where a stride is left out, all
convolutions after it are dilated by as much.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

REACH = 24
"""Voxels around a place that its descriptor depends on, at every stride."""

STRIDES = (4, 2, 1)
CHANNELS = 16
PARAMETERS = 90_752

TAPS = (1.0, 4.0, 6.0, 4.0, 1.0)
WIDE_TAPS = (1.0, 2.5, 4.0, 5.0, 6.0, 5.0, 4.0, 2.5, 1.0)
"""The five taps at twice the distance, linear in between: a dilated blur without holes."""


class Conv(nn.Conv3d):
    """Convolution of 3^3 taps, zeros outside, and a leaky rectifier of slope 0.01."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 3)

    def forward(self, x: torch.Tensor, dilation: int = 1) -> torch.Tensor:
        x = F.conv3d(x, self.weight, self.bias, padding=dilation, dilation=dilation)
        return F.leaky_relu(x, 0.01, inplace=True)


class Block(nn.Module):
    """Two convolutions, added to what came in; nothing acts on the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = Conv(channels, channels), Conv(channels, channels)

    def forward(self, x: torch.Tensor, dilation: int = 1) -> torch.Tensor:
        change: torch.Tensor = self.second(self.first(x, dilation), dilation)
        return change + x


class DisaNet(nn.Module):
    """(N, 1, I, J, K) z-scored volumes -> (N, 16, ceil(I / stride), ...) descriptors, not yet clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = Conv(1, 8)
        self.fine = Block(8)
        self.widen = Conv(8, 16)
        self.middle = Block(16)
        self.widen_again = Conv(16, 32)
        self.coarse = Block(32)
        self.leave = nn.Conv3d(32, CHANNELS, 1, bias=False)

    def forward(self, x: torch.Tensor, stride: int = 4) -> torch.Tensor:
        """Descriptors at every ``stride``-th voxel: 4, 2 or 1."""
        first = 1 if stride == 1 else 2  # stride of the first blur
        second = 2 if stride == 4 else 1
        x = self.widen(self.fine(self.enter(x)))
        x = blur(x, TAPS, first)
        x = self.widen_again(self.middle(x, 2 // first), 2 // first)
        x = blur(x, WIDE_TAPS if stride == 1 else TAPS, second)
        x = self.coarse(x, 4 // stride)
        found: torch.Tensor = self.leave(x)
        return found


def clipped(features: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """Descriptors with their length along ``axis`` cut to 1; shorter ones stay as they are."""
    length: torch.Tensor = torch.linalg.vector_norm(features, dim=axis, keepdim=True)
    return features / length.clamp_min(1)


def blur(x: torch.Tensor, taps: tuple[float, ...], stride: int) -> torch.Tensor:
    """Binomial smoothing with repeated ends, then every ``stride``-th voxel (Zhang, ICML 2019).

    One matrix product along each axis: several times faster than a convolution by channel on a CPU.
    """
    x = x.permute(0, 2, 3, 4, 1).contiguous()
    for axis in (1, 2, 3):
        shape = list(x.shape)
        matrix = _blur_matrix(shape[axis], taps, stride).to(x)
        lead = int(torch.Size(shape[:axis]).numel())
        shape[axis] = matrix.shape[0]
        x = (matrix @ x.reshape(lead, matrix.shape[1], -1)).reshape(shape)
    return x.permute(0, 4, 1, 2, 3)


@lru_cache(maxsize=256)
def _blur_matrix(length: int, taps: tuple[float, ...], stride: int) -> torch.Tensor:
    """(ceil(length / stride), length): what each output takes from each voxel."""
    with torch.inference_mode(False):  # it is kept, and must serve training too
        places = torch.arange(0, length, stride)
        matrix = torch.zeros(len(places), length)
        for offset, tap in enumerate(taps):
            near = (places + offset - len(taps) // 2).clamp(0, length - 1)
            matrix[torch.arange(len(places)), near] += tap / sum(taps)
    return matrix
