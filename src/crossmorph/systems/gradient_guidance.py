"""Unsupervised multimodal registration with adaptive gradient guidance (Xu et al., ISBI 2021), on one page.

One U-Net registers the images, another their gradient maps; a gated fusion makes one displacement of both. The
second branch is also held to align the gradient maps, so that boundaries have a say of their own.
"""

from __future__ import annotations

import torch
from torch import nn

from crossmorph.describe.lc2 import gradient_length
from crossmorph.networks.convolution import standardised
from crossmorph.networks.gated_fusion import GatedFusion
from crossmorph.networks.voxelmorph import VoxelMorph, stacked
from crossmorph.networks.warp import warp
from crossmorph.train.losses import mind_difference, roughness, seen_by_both
from crossmorph.train.sample import Batch
from crossmorph.train.settings import GradientGuidanceTraining

BRIGHT = 0.99
"""Quantile of the gradient lengths of a volume that becomes 1 in its map; longer ones are cut."""


class DualBranch(nn.Module):
    """Fixed and moving (N, 1, I, J, K) in [0, 1] -> displacements in voxels, fixed to moving.

    ``displacement`` is that of the images; ``gradient_displacement``, ``fixed_gradient`` and ``moving_gradient``
    belong to the second branch.
    """

    def __init__(self, settings: GradientGuidanceTraining) -> None:
        super().__init__()
        self.images = VoxelMorph(2, settings.version, settings.checkpointing)
        self.gradients = VoxelMorph(2, settings.version, settings.checkpointing)
        self.fusion = GatedFusion() if settings.network == "gated" else None

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = gradient_map(fixed), gradient_map(moving)
        of_images = self.images(stacked(standardised(moving), standardised(fixed)))
        of_gradients = self.gradients(stacked(*(standardised(volumes) for volumes in reversed(maps))))
        both = (of_images + of_gradients) / 2 if self.fusion is None else self.fusion(of_images, of_gradients)
        return {
            "displacement": both,
            "gradient_displacement": of_gradients,
            "fixed_gradient": maps[0],
            "moving_gradient": maps[1],
        }


class SingleBranch(nn.Module):
    """The paper's baselines: one U-Net for the images, or for images and gradient maps as four channels."""

    def __init__(self, settings: GradientGuidanceTraining) -> None:
        super().__init__()
        self.concat = settings.network == "vm-concat"
        self.branch = VoxelMorph(4 if self.concat else 2, settings.version, settings.checkpointing)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
        volumes = [moving, fixed]
        if self.concat:
            volumes += [gradient_map(moving), gradient_map(fixed)]
        return {"displacement": self.branch(stacked(*(standardised(v) for v in volumes)))}


def network(settings: GradientGuidanceTraining) -> nn.Module:
    """The network that the settings name, before its first step."""
    return DualBranch(settings) if settings.network in ("gated", "average") else SingleBranch(settings)


def loss(outputs: dict[str, torch.Tensor], batch: Batch, settings: GradientGuidanceTraining) -> torch.Tensor:
    """Equation 2: (L_isim + alpha L_gsim) + (gamma L_igreg + beta L_greg); one branch has the first and third.

    Equation 3 sums lengths of the displacement's gradient over the volume; here, as in VoxelMorph, squared forward
    differences are averaged, which keeps the terms of one size whatever the size of the volume.
    """

    def similarity(fixed: torch.Tensor, moving: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
        where = seen_by_both(batch.fixed_valid, batch.moving_valid, field)
        return mind_difference(warp(moving, field), fixed, where, settings.similarity)

    field = outputs["displacement"]
    total = similarity(batch.fixed, batch.moving, field) + settings.gamma * roughness(field)
    if "gradient_displacement" in outputs:
        maps, second = (outputs["fixed_gradient"], outputs["moving_gradient"]), outputs["gradient_displacement"]
        total = total + settings.alpha * similarity(*maps, second) + settings.beta * roughness(second)
    return total


def gradient_map(volumes: torch.Tensor) -> torch.Tensor:
    """Equation 1 for (N, 1, I, J, K): lengths of central differences, borders repeated, scaled to [0, 1]."""
    with torch.no_grad():
        lengths = gradient_length(volumes.float())
        sample = lengths.flatten(1)[:, :: max(1, lengths[0].numel() // 1_000_000)]
        rank = 1 + round(BRIGHT * (sample.shape[1] - 1))
        high = sample.kthvalue(rank, dim=1).values.clamp_min(1e-6)  # selects; torch.quantile sorts
        return (lengths / high[:, None, None, None, None]).clamp(max=1)
