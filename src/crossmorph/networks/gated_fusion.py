"""Two displacements of one pair made one by gates (Xu et al., ISBI 2021, section 2.2.3)."""

from __future__ import annotations

import torch
from torch import nn

from crossmorph.networks.convolution import Convolution, exact


class GatedFusion(nn.Module):
    """phi_ig = B [sigmoid(G [phi_i, phi_g]) * [phi_i, phi_g]]: gates from a convolution G, a 1^3 bottleneck B.

    G has 3^3 taps, which the paper does not say. It begins with zeros, so that all gates are a half, and B adds
    the two displacements: at the start the fused one is their mean, and its axes are not mixed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = Convolution(6, 6, 3, 1, 1)
        self.bottleneck = nn.Conv3d(6, 3, 1)
        for layer in (self.gate, self.bottleneck):
            nn.init.zeros_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.bottleneck.weight.copy_(torch.eye(3).repeat(1, 2)[:, :, None, None, None])

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two displacements (N, 3, I, J, K) in voxels -> one."""
        both = torch.cat([first, second], 1).float().contiguous(memory_format=torch.channels_last_3d)
        gates = torch.sigmoid(exact(self.gate, both))
        with torch.autocast(first.device.type, enabled=False):
            fused: torch.Tensor = self.bottleneck(gates * both)
        return fused
