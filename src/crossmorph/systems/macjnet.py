"""macJNet (Zhou et al. 2023): a registration network and two segmenters that learn from each other, on one page.

Labels guide the registration, and where there are none what the segmenters say; the registration makes the
segmentations of both images agree. macMIND (``describe.macmind``) compares the images themselves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from crossmorph.describe.macmind import macmind_loss
from crossmorph.errors import InputError
from crossmorph.networks.lapirn import LapIRN, compared, pooled
from crossmorph.networks.segmenter import Segmenter
from crossmorph.networks.warp import warp
from crossmorph.systems import gradient_guidance, lumir
from crossmorph.train.loop import Turn
from crossmorph.train.losses import (
    dice_loss,
    indicators,
    local_information,
    mind_difference,
    roughness,
    seen_by_both,
)
from crossmorph.train.sample import Batch
from crossmorph.train.settings import GradientGuidanceTraining, LumirTraining, MacJNetTraining, rate_at

log = logging.getLogger("crossmorph")

Part = Literal["both", "registration", "segmentation"]
Seen = Callable[[int, bool], Batch]
"""The batch of a step; with True one of pairs with labels."""

Ids = tuple[Collection[int], Collection[int]]
"""Of the label maps of a fixed and a moving volume."""

SIDES = ("fixed", "moving")

SEGMENTING = 400.0
"""Bytes a voxel and feature while both segmenters learn from a pair with labels and one without; measured."""

AGAIN = 0.5
"""The share of them with ``checkpointing``."""

VANISHED = 0.01
"""A segmenter that finds less than this share of what is labelled has collapsed."""


class JointNetwork(nn.Module):
    """Fixed and moving (N, 1, I, J, K) in [0, 1] -> what ``registration`` says of them, and scores of both.

    Args:
        registration: any registration network of this package.
        segmenters: one for ``"fixed"`` and one for ``"moving"``, each (N, 1, I, J, K) -> (N, classes, I, J, K); or
            none.
    """

    def __init__(self, registration: nn.Module, segmenters: dict[str, nn.Module]) -> None:
        super().__init__()
        self.registration = registration
        self.segmenters = nn.ModuleDict(segmenters)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor, part: Part = "both") -> dict[str, torch.Tensor]:
        """``displacement`` and more of the registration; ``fixed_scores``, ``moving_scores``."""
        found: dict[str, torch.Tensor] = {}
        if part != "segmentation":
            found |= self.registration(fixed, moving)
        if part != "registration":
            volumes = {"fixed": fixed, "moving": moving}
            found |= {f"{side}_scores": net(volumes[side]) for side, net in self.segmenters.items()}
        return found


def network(settings: MacJNetTraining) -> JointNetwork:
    """The networks that the settings name, before their first step; without labels the registration alone."""
    registration: nn.Module
    if settings.registration == "lapirn":
        registration = LapIRN(
            settings.channels, settings.version, settings.gates, settings.reproduce, settings.checkpointing
        )
    elif settings.registration == "pyramid":
        registration = lumir.network(LumirTraining(checkpointing=settings.checkpointing))
    else:
        branch = GradientGuidanceTraining(network=settings.registration, checkpointing=settings.checkpointing)
        registration = gradient_guidance.network(branch)
    classes = 1 + len(settings.labels)
    sides = SIDES if settings.labels else ()
    shape = settings.features, settings.stages, settings.checkpointing
    return JointNetwork(registration, {side: Segmenter(classes, *shape) for side in sides})


def with_labels(settings: MacJNetTraining, ids: Sequence[Ids]) -> MacJNetTraining:
    """The settings with the labels to learn, from those of each training pair; none where no pair has labels.

    Raises:
        InputError: labels are asked for that no pair has on both sides.
    """
    shown = [set().union(*(pair[side] for pair in ids)) for side in (0, 1)]
    common, apart = shown[0] & shown[1], shown[0] ^ shown[1]
    if settings.labels and not set(settings.labels) <= common:
        raise InputError(
            f"labels {sorted(set(settings.labels) - common)} are in no training pair on both sides; fixed maps "
            f"have {sorted(shown[0])}, moving ones {sorted(shown[1])}"
        )
    if apart and not settings.labels:
        log.warning("labels %s are in the maps of one side only, and are not learnt", sorted(apart))
    if not common:
        log.warning("no training pair has labels: the registration is trained alone, and nothing is segmented")
    return settings if settings.labels else replace(settings, labels=tuple(sorted(common)))


def check_memory(settings: MacJNetTraining, shape: Sequence[int], free_bytes: float) -> None:
    """Refuse a window that the segmenters, which need by far the most, cannot learn from in the memory there is.

    Raises:
        InputError: the message says what to set.
    """
    each = SEGMENTING * settings.features * (AGAIN if settings.checkpointing else 1.0)
    needed = each * settings.batch * math.prod(shape)
    if settings.labels and needed > free_bytes:
        more = "" if settings.checkpointing else "checkpointing = true, "
        raise InputError(
            f"to learn from {' x '.join(map(str, shape))} voxels takes about {needed / 2**30:.1f} GiB; "
            f"{free_bytes / 2**30:.1f} GiB are free. Set {more}fewer features than {settings.features}, or a "
            f"wider preprocessing.spacing_mm than {settings.preprocessing.spacing_mm:g}"
        )


def turns(network: JointNetwork, settings: MacJNetTraining, seen: Seen) -> tuple[Turn, ...]:
    """What learns in a step: the registration with the segmenters at rest, then these with it at rest."""

    def registering(model: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        if isinstance(network.registration, LapIRN):
            network.registration.levels, network.registration.frozen = level_at(step, settings)
        batch = seen(step, False)
        outputs = model(batch.fixed, batch.moving, "registration")
        guided = settings.joint and step >= settings.pretrain and bool(settings.labels)
        return registration_loss(outputs, batch, settings, anatomy(model, batch, settings) if guided else None)

    def segmenting(model: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        batch = seen(step, False)
        truth = batch if batch.fixed_labels is not None else seen(step, True)
        total = supervised_loss(model, truth, settings, step >= settings.pretrain)
        if truth is batch or step < settings.pretrain // 2:
            return total
        together = settings.joint and step >= settings.pretrain
        return total + (consistency_loss if together else pseudo_loss)(model, batch)

    def rate(joint: float) -> Callable[[int], float]:
        scheduled = replace(settings, rate=joint), replace(settings, rate=settings.pretrain_rate)
        return lambda step: rate_at(step, scheduled[step < settings.pretrain])

    def turn(part: nn.Module, joint: float, loss: Callable[..., torch.Tensor], name: str) -> Turn:
        adam = torch.optim.Adam(part.parameters(), lr=joint, amsgrad=settings.amsgrad)
        return Turn(adam, rate(joint), loss, name)

    found = [turn(network.registration, settings.rate, registering, "registration")]
    if settings.labels:
        found.append(turn(network.segmenters, settings.segment_rate, segmenting, "segmentation"))
    return tuple(found)


def level_at(step: int, settings: MacJNetTraining) -> tuple[int, bool]:
    """How many levels of LapIRN are in use at a step, and whether the coarser ones rest."""
    if step >= settings.pretrain:
        return 3, False
    level = min(4 * step // settings.pretrain, 2)
    return level + 1, level > 0 and step - level * settings.pretrain / 4 < settings.freeze


def loss(outputs: dict[str, torch.Tensor], batch: Batch, settings: MacJNetTraining) -> torch.Tensor:
    """``registration_loss`` without labels, which is there for every pair: for validation."""
    return registration_loss(outputs, batch, settings, None)


# -- registration ----------------------------------------------------------------------------------------------

Anatomy = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Probabilities (N, classes, I, J, K) of the fixed and the moving volume, and the classes that count."""


def registration_loss(
    outputs: dict[str, torch.Tensor], batch: Batch, settings: MacJNetTraining, labels: Anatomy | None
) -> torch.Tensor:
    """lambda_sim E_sim + lambda_label E_label + lambda_smo E_smo (equations 14 and 15), at the level in use.

    Equation 14 sums squared differences over the channels, equation 15 squared gradients over the volume; here
    both are means, so that their sizes depend neither on the descriptor nor on the volume.
    """
    field = outputs["displacement"]
    flow = outputs.get("flow", field)
    fixed, warped = compared(batch.fixed, batch.moving, flow, settings.reproduce)
    if settings.reproduce:
        where = torch.ones_like(fixed, dtype=torch.bool)
    else:
        masks = batch.fixed_valid.float(), batch.moving_valid.float()
        while masks[0].shape[2] > flow.shape[2]:
            masks = pooled(masks[0]), pooled(masks[1])
        where = seen_by_both(masks[0] > 0.5, masks[1] > 0.5, flow)
    total = settings.similarity_weight * dissimilarity(fixed, warped, where, settings.similarity)
    total = total + settings.smoothness * roughness(outputs.get("velocity", flow))
    if labels is not None:
        both = seen_by_both(batch.fixed_valid, batch.moving_valid, field)
        total = total + settings.label_weight * dice_loss(labels[0], warp(labels[1], field), both, labels[2])
    return total


def dissimilarity(
    fixed: torch.Tensor,
    warped: torch.Tensor,
    where: torch.Tensor,
    kind: Literal["macmind", "mind", "ssc", "mi"],
) -> torch.Tensor:
    """E_sim: mean squared difference of a descriptor, or less the local mutual information."""
    if kind == "macmind":
        return macmind_loss(fixed, warped, where)
    if kind == "mi":
        return -local_information(fixed, warped, where)
    return mind_difference(warped, fixed, where, kind, squared=True)


def anatomy(model: nn.Module, batch: Batch, settings: MacJNetTraining) -> Anatomy:
    """The labels of a batch, with the classes that both sides show; else what the resting segmenters say."""
    if batch.fixed_labels is not None and batch.moving_labels is not None:
        fixed, moving = (indicators(ids, settings.labels) for ids in (batch.fixed_labels, batch.moving_labels))
        return fixed, moving, shown_classes(fixed) & shown_classes(moving)
    with torch.no_grad():
        fixed, moving = probabilities(model, batch)
    return fixed, moving, None


def shown_classes(labels: torch.Tensor) -> torch.Tensor:
    """(N, classes - 1) bool: which classes but the background have a voxel."""
    return labels[:, 1:].amax((2, 3, 4)) > 0


def probabilities(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """(N, classes, I, J, K) of the fixed and of the moving volumes."""
    scores = model(batch.fixed, batch.moving, "segmentation")
    return [scores[f"{side}_scores"].softmax(1) for side in SIDES]


# -- segmentation ------------------------------------------------------------------------------------------------


def supervised_loss(model: nn.Module, batch: Batch, settings: MacJNetTraining, guarded: bool) -> torch.Tensor:
    """1 - Dice with the labels of both sides, of the classes that each shows (equation 16, second case).

    Raises:
        InputError: ``guarded``, and a segmenter finds next to nothing of what is labelled.
    """
    total = batch.fixed.new_zeros(())
    sides = (batch.fixed_valid, batch.fixed_labels), (batch.moving_valid, batch.moving_labels)
    for side, found, (valid, ids) in zip(SIDES, probabilities(model, batch), sides, strict=True):
        assert ids is not None
        truth = indicators(ids, settings.labels)
        wanted, given = (float((volumes[:, 1:].detach() * valid).sum()) for volumes in (truth, found))
        if guarded and given < VANISHED * wanted:
            raise InputError(
                f"the segmentation of the {side} images has collapsed: it finds {given / wanted:.1%} of what is "
                f"labelled in {', '.join(batch.names)}. Label more pairs, lower segment_rate, or pretrain longer"
            )
        total = total + dice_loss(found, truth, valid, shown_classes(truth))
    return total


def pseudo_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """1 - Dice of both segmentations with their own most likely classes: self-training on pairs without labels."""
    total = batch.fixed.new_zeros(())
    for found, valid in zip(probabilities(model, batch), (batch.fixed_valid, batch.moving_valid), strict=True):
        likely = indicators(found.detach().argmax(1), range(1, found.shape[1]))
        total = total + dice_loss(found, likely, valid, shown_classes(likely))
    return total


def consistency_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """1 - Dice of the fixed and the warped moving segmentation, registration at rest (equation 16, first case)."""
    with torch.no_grad():
        field = model(batch.fixed, batch.moving, "registration")["displacement"]
    fixed, moving = probabilities(model, batch)
    return dice_loss(fixed, warp(moving, field), seen_by_both(batch.fixed_valid, batch.moving_valid, field))
