"""Settings of the trainings of registration networks: what every system has, and what each adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from crossmorph.errors import InputError
from crossmorph.settings import Preprocessing


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training pair by known maps. All of them are 0 by default."""

    turn_deg: float = 0.0
    """Largest turn of the moving image about each axis."""

    scale: float = 0.0
    """Largest change of its size along each axis, as a share."""

    shift_mm: float = 0.0
    """Largest shift of it along each axis."""

    bend_mm: float = 0.0
    """Typical length of a smooth random displacement of it, with waves of about a quarter of the volume."""

    contrast: float = 0.0
    """Values v of each image become v^exp(c), c from a normal distribution of this deviation."""

    noise: float = 0.0
    """Deviation of noise at each voxel; images reach from 0 to 1."""


@dataclass(frozen=True)
class Synthesis:
    """Generated pairs: random anatomies in random contrasts, with the exact displacement between them."""

    shape: tuple[int, ...] = (64, 64, 64)
    """Voxels along R, A, S where no pairs are given; else that of the pairs."""

    labels: int = 12
    """Structures of an anatomy."""

    bend_mm: float = 6.0
    """Typical length of the displacement."""

    pairs: int = 100
    """Pairs an epoch where no pairs are given."""

    share: float = 0.0
    """Share of the steps that see a generated pair in place of a given one."""


@dataclass(frozen=True)
class Training:
    """How a registration network is trained."""

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """What is done to a pair before."""

    augmentation: Augmentation = Augmentation()
    """Random changes of the pairs."""

    synthesis: Synthesis = Synthesis()
    """Generated pairs."""

    steps: int = 20_000
    """Optimiser steps."""

    batch: int = 1
    """Pairs a step, over all processes together."""

    rate: float = 1e-4
    """Learning rate of Adam."""

    amsgrad: bool = False
    """Adam's variant that never forgets a large gradient."""

    schedule: Literal["constant", "cosine", "poly"] = "constant"
    """constant; cosine: down to 0 at the last step; poly: (1 - step / steps)^0.9."""

    clip: float = 0.0
    """Largest norm of the gradient; 0 for no limit."""

    average: float = 0.0
    """Decay of a running mean of the weights (EMA), which is then what is validated and kept; 0 for none."""

    precision: Literal["32", "bf16", "16"] = "32"
    """Arithmetic of the convolutions; losses and displacements are always in 32 bits. 16 needs CUDA."""

    checkpointing: bool = False
    """Keep less memory for a longer backward pass."""

    validate_every: int = 0
    """Steps between validations; 0: an epoch."""

    seed: int = 0
    """Of every random choice."""

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            InputError: a value outside its range.
        """
        numbers = vars(self.augmentation) | {"clip": self.clip, "validate_every": self.validate_every}
        rules = {
            "steps and batch must be at least 1": min(self.steps, self.batch) >= 1,
            "rate must be above 0": self.rate > 0,
            "average must be at least 0 and below 1": 0 <= self.average < 1,
            f"{', '.join(numbers)} must not be negative": min(numbers.values()) >= 0,
            "synthesis.share must lie between 0 and 1": 0 <= self.synthesis.share <= 1,
            "synthesis.shape must be three sizes from 16": len(self.synthesis.shape) == 3
            and min(self.synthesis.shape) >= 16,
            "synthesis.labels must be at least 2": self.synthesis.labels >= 2,
            "synthesis.pairs must be at least 1": self.synthesis.pairs >= 1,
        }
        for rule, kept in rules.items():
            if not kept:
                raise InputError(f"training: {rule}; given {self}")


@dataclass(frozen=True)
class GradientGuidanceTraining(Training):
    """Training of the dual branch of Xu et al. (ISBI 2021) and of what the paper compares it with."""

    network: Literal["gated", "average", "vm", "vm-concat"] = "gated"
    """Two branches fused by gates, or by their mean; one branch (VoxelMorph), alone or with gradient maps."""

    version: Literal["text", "vm2", "vm1"] = "text"
    """The U-Net of a branch: as the paper's words have it, or one of VoxelMorph's two."""

    similarity: Literal["mind", "ssc"] = "mind"
    """MIND of six neighbours (equation 4), or MIND-SSC."""

    alpha: float = 0.5
    """Weight of the similarity of the gradient maps."""

    beta: float = 0.5
    """Weight of the smoothness of the displacement of the gradient maps."""

    gamma: float = 1.0
    """Weight of the smoothness of the displacement."""

    def check(self) -> None:
        """As for ``Training``; weights must not be negative."""
        super().check()
        if min(self.alpha, self.beta, self.gamma) < 0:
            raise InputError(f"training: alpha, beta and gamma must not be negative; given {self}")


@dataclass(frozen=True)
class LumirTraining(Training):
    """Training of the encoder-only pyramid of Zhang et al. (Learn2Reg 2024, LUMIR) and its variants."""

    rate: float = 4e-4
    """Learning rate of Adam."""

    amsgrad: bool = True
    """Adam's variant that never forgets a large gradient."""

    schedule: Literal["constant", "cosine", "poly"] = "poly"
    """As for all trainings."""

    network: Literal["pyramid", "voxelmorph"] = "pyramid"
    """The pyramid, or VoxelMorph's U-Net of one displacement, which the paper compares it with; what follows, to
    the filter, is the pyramid's."""

    channels: int = 32
    """Of the features: 16, 32, 36 or 64 in the paper; even."""

    cascade: Literal["add", "compose"] = "compose"
    """How levels are joined: displacements added (LC-1), or composed (LC-2)."""

    head_width: Literal[27, 216] = 27
    """Channels before the last convolution of a level."""

    large_kernel: int = 0
    """Width of large kernels beside those of 3^3 in the encoder, odd; 0 for none (LK: 5)."""

    attention: bool = False
    """Co-attention at the coarsest level (CA)."""

    bilateral: Literal["none", "fixed", "trained"] = "none"
    """Filter of the displacement guided by the fixed image (BF), its deviations fixed or trained."""

    smoothness: float = 6.0
    """Weight of the squared gradient of the velocities."""

    window: int = 9
    """Width in voxels of the windows of the local correlation, odd; larger voxels want fewer of them."""

    reproduce: bool = False
    """Do as the released code does: zeros outside, coarse displacements times 2, no masks in the loss."""

    def check(self) -> None:
        """As for ``Training``; also the shape of the network."""
        super().check()
        rules = {
            "channels must be even, from 2": self.channels >= 2 and self.channels % 2 == 0,
            "large_kernel must be 0 or odd, from 5": self.large_kernel == 0
            or (self.large_kernel >= 5 and self.large_kernel % 2 == 1),
            "smoothness must not be negative": self.smoothness >= 0,
            "window must be odd, from 3": self.window >= 3 and self.window % 2 == 1,
        }
        for rule, kept in rules.items():
            if not kept:
                raise InputError(f"training: {rule}; given {self}")


@dataclass(frozen=True)
class MacJNetTraining(Training):
    """Joint training of a registration network and two segmenters (Zhou et al. 2023)."""

    rate: float = 2e-5
    """Learning rate of the registration network in the joint training."""

    segment_rate: float = 1e-5
    """Of the segmenters in the joint training."""

    pretrain_rate: float = 1e-4
    """Of all networks before."""

    pretrain: int = 12_000
    """First steps, in which the networks learn apart: LapIRN level by level (a quarter of them at a quarter of the
    resolution, a quarter at half, the rest at the full one), the segmenters on labels, and in the second half
    also on what they say of unlabelled pairs themselves."""

    freeze: int = 200
    """Steps after a level of LapIRN joins, in which the coarser ones do not learn."""

    joint: bool = True
    """After the pretraining the networks learn from each other; else they go on apart."""

    registration: Literal["lapirn", "vm", "gated", "pyramid"] = "lapirn"
    """LapIRN, VoxelMorph, the dual branch of gradient guidance, or the pyramid of LUMIR, these as by default."""

    version: Literal["disp", "diff"] = "disp"
    """LapIRN: fields of the levels add up to a displacement, or to a velocity."""

    channels: int = 28
    """LapIRN: of all features, even."""

    gates: bool = True
    """LapIRN: attention gates on the skip connections."""

    features: int = 32
    """Segmenters: channels at full resolution."""

    stages: int = 5
    """Segmenters: resolutions, each half of the one before, 1 to 5; volumes need 4 * 2^(stages - 1) voxels."""

    labels: tuple[int, ...] = ()
    """Ids to segment. Empty: all that fixed and moving label maps of the training pairs have in common."""

    similarity: Literal["macmind", "mind", "ssc", "mi"] = "macmind"
    """What both images have to agree in: macMIND, MIND of six neighbours or MIND-SSC, all by squared difference,
    or local mutual information."""

    similarity_weight: float = 20.0
    """Weight of the similarity."""

    label_weight: float = 2.0
    """Weight of 1 - Dice of the labels."""

    smoothness: float = 0.5
    """Weight of the squared gradient of the displacement."""

    reproduce: bool = False
    """LapIRN does as its released code does, and no masks enter the loss of the registration."""

    def check(self) -> None:
        """As for ``Training``; also the networks and the schedule."""
        super().check()
        weights = (self.similarity_weight, self.label_weight, self.smoothness)
        rules = {
            "segment_rate and pretrain_rate must be above 0": min(self.segment_rate, self.pretrain_rate) > 0,
            "pretrain and freeze must not be negative": min(self.pretrain, self.freeze) >= 0,
            "channels must be even, from 2": self.channels >= 2 and self.channels % 2 == 0,
            "features must be at least 2": self.features >= 2,
            "stages must lie between 1 and 5": 1 <= self.stages <= 5,
            "labels must be different ids above 0": len(set(self.labels)) == len(self.labels)
            and min(self.labels, default=1) > 0,
            "the weights must not be negative": min(weights) >= 0,
            "synthesis.share must be 0, as generated pairs have other labels": self.synthesis.share == 0,
        }
        for rule, kept in rules.items():
            if not kept:
                raise InputError(f"training: {rule}; given {self}")


def rate_at(step: int, settings: Training) -> float:
    """The learning rate of a step, counted from 0."""
    share = step / settings.steps
    if settings.schedule == "cosine":
        return settings.rate * 0.5 * (1 + math.cos(math.pi * share))
    return settings.rate * ((1 - share) ** 0.9 if settings.schedule == "poly" else 1.0)


TRAININGS: dict[str, type[Training]] = {
    "gradient-guidance": GradientGuidanceTraining,
    "lumir": LumirTraining,
    "macjnet": MacJNetTraining,
}
