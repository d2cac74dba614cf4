"""Large-scale unsupervised brain registration (Zhang et al., Learn2Reg 2024, task LUMIR): network and loss."""

from __future__ import annotations

import torch
from torch import nn

from crossmorph.networks.pyramid import LEVELS, Pyramid, halved
from crossmorph.networks.warp import warp
from crossmorph.train.losses import local_correlation, roughness, seen_by_both, softened
from crossmorph.train.sample import Batch
from crossmorph.train.settings import LumirTraining


def network(settings: LumirTraining) -> nn.Module:
    """The network that the settings name, before its first step."""
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

    NCC is local and squared over 9^3 windows, as in the released code; the paper's equation 2 is the global form.
    R is the mean of squared forward differences of the velocity. Only voxels that both images see count; when
    reproducing, all do, and windows are filled up with zeros outside.
    """
    total = outputs["displacement"].new_zeros(())
    fixed, moving = batch.fixed.float(), batch.moving.float()
    masks = batch.fixed_valid, batch.moving_valid
    for level in range(LEVELS):
        field = outputs[f"displacement_{level}"]
        where = None if settings.reproduce else seen_by_both(masks[0], masks[1], field)
        alike = local_correlation(fixed, warp(moving, field, settings.reproduce), where)
        rough = roughness(outputs[f"velocity_{level}"])
        total = total + 2.0**-level * (1 - alike + settings.smoothness * rough)
        if level < LEVELS - 1:
            fixed, moving = (halved(softened(volume)) for volume in (fixed, moving))
            masks = halved(masks[0].float()) > 0.5, halved(masks[1].float()) > 0.5
    return total
