"""Large-scale unsupervised brain registration (Zhang et al., Learn2Reg 2024, task LUMIR): network and loss."""

from __future__ import annotations

import torch
from torch import nn

from crossmorph.networks.pyramid import LEVELS, Pyramid, halved
from crossmorph.networks.voxelmorph import VoxelMorph, stacked
from crossmorph.networks.warp import warp
from crossmorph.train.losses import local_correlation, roughness, seen_by_both, softened
from crossmorph.train.sample import Batch
from crossmorph.train.settings import LumirTraining


class Single(nn.Module):
    """VoxelMorph's U-Net as a cascade of one level, whose displacement is what is kept smooth."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.branch = VoxelMorph(2, "vm2", checkpointing)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
        field = self.branch(stacked(moving, fixed))
        return {"displacement": field, "displacement_0": field, "velocity_0": field}


def network(settings: LumirTraining) -> nn.Module:
    """The network that the settings name, before its first step."""
    if settings.network == "voxelmorph":
        return Single(settings.checkpointing)
    return Pyramid(
        settings.channels,
        settings.cascade,
        settings.head_width,
        settings.large_kernel,
        settings.attention,
        settings.bilateral,
        settings.reproduce,
        settings.checkpointing,
    )


def loss(outputs: dict[str, torch.Tensor], batch: Batch, settings: LumirTraining) -> torch.Tensor:
    """Equation 1: sum over the levels i of 2^-i (1 - NCC_i + smoothness R(v_i)).

    NCC is local and squared, as in the released code, whose windows are 9^3; equation 2 is the global form. R is
    the mean of squared forward differences of the velocity. Only voxels that both images see count; when
    reproducing, all do, and windows are filled up with zeros outside.
    """
    total = outputs["displacement"].new_zeros(())
    fixed, moving = batch.fixed.float(), batch.moving.float()
    masks = batch.fixed_valid, batch.moving_valid
    levels = sum(f"displacement_{level}" in outputs for level in range(LEVELS))
    for level in range(levels):
        field = outputs[f"displacement_{level}"]
        where = None if settings.reproduce else seen_by_both(masks[0], masks[1], field)
        alike = local_correlation(fixed, warp(moving, field, settings.reproduce), where, settings.window)
        rough = roughness(outputs[f"velocity_{level}"])
        total = total + 2.0**-level * (1 - alike + settings.smoothness * rough)
        if level < levels - 1:
            fixed, moving = (halved(softened(volume)) for volume in (fixed, moving))
            masks = halved(masks[0].float()) > 0.5, halved(masks[1].float()) > 0.5
    return total
