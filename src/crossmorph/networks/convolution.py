"""Convolutions that are right and fast on a CPU where torch's are not, and what they like to be shown."""

from __future__ import annotations

import torch
from torch import nn

THIN = 2
"""Size along an axis up to which bfloat16 is not used."""

ONEDNN = 20_480
"""Channels times voxels of a plane of one volume up to which torch (``use_mkldnn`` in its Convolution.cpp) does
without oneDNN in 32 bits on a CPU, seven times slower at 16 channels."""


class Convolution(nn.Conv3d):
    """``torch.nn.Conv3d``, in 32 bits where a volume is thin, and by oneDNN where one volume is small.

    In thin volumes the CPU's gradient of bfloat16 weights is what memory held before, often 1e36 or NaN (torch
    2.13; kernels of 3^3 with padding 1, two planes along the first axis). Pyramids meet such volumes at their
    coarsest level. A small volume is joined by an empty one, as torch takes oneDNN for two.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # named by the base class
        if min(input.shape[2:]) > THIN:
            return self._fast(input)
        with torch.autocast(input.device.type, enabled=False):
            return self._fast(input.float())

    def _fast(self, x: torch.Tensor) -> torch.Tensor:
        small = x.device.type == "cpu" and len(x) == 1 and x[0, :, :, :, 0].numel() <= ONEDNN
        if small and self.stride == (1, 1, 1) and not torch.is_autocast_enabled("cpu"):
            return super().forward(torch.cat([x, torch.zeros_like(x)]))[:1]
        return super().forward(x)


def exact(layer: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """A convolution in 32 bits whatever the precision of the network."""
    with torch.autocast(x.device.type, enabled=False):
        found: torch.Tensor = layer(x.float())
    return found


def standardised(volumes: torch.Tensor) -> torch.Tensor:
    """(N, C, I, J, K) with mean 0 and deviation 1 in each volume; a constant one becomes 0."""
    middle, spread = (part(volumes, (2, 3, 4), keepdim=True) for part in (torch.mean, torch.std))
    return (volumes - middle) / spread.clamp_min(1e-6)
