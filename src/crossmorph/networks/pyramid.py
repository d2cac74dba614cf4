"""The encoder-only pyramid of next-gen-nn (Zhang et al., Learn2Reg 2024, task LUMIR) and its cascade.

Three convolutions at full resolution see each image by itself. Five levels of their features, each half of the
one before with no convolution between, are compared from coarse to fine: three convolutions a level look at sum
and difference of the fixed and the warped moving features and give a velocity, whose flow joins the displacement.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from crossmorph.device import constants
from crossmorph.errors import InputError
from crossmorph.networks.bilateral import Bilateral
from crossmorph.networks.convolution import Convolution
from crossmorph.networks.voxelmorph import MULTIPLE, still
from crossmorph.networks.warp import warp

LEVELS = 5
SQUARINGS = 7
SLAB = 16
"""Planes that an estimator sees at once where no gradient is needed."""


class Layer(nn.Module):
    """Convolution, instance normalisation and a rectifier with one learnt slope.

    With ``kernel`` 5, say, convolutions of 3^3, 5^3 and 1^3 taps run in parallel (Jia et al., MLMI 2022). Their
    sum is a convolution with the sum of their kernels, and is computed as such. ``reproduce`` normalises each of
    them by itself before the sum, as released, which no single kernel can do.
    """

    def __init__(self, before: int, after: int, kernel: int = 0, reproduce: bool = False) -> None:
        super().__init__()
        sizes = (3, kernel, 1) if kernel else (3,)
        self.branches = nn.ModuleList(nn.Conv3d(before, after, n, padding=n // 2) for n in sizes)
        self.slope = nn.Parameter(torch.tensor([0.25]))
        self.apart = reproduce and kernel > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.apart:
            total = sum(F.instance_norm(branch(x)) for branch in self.branches)
            assert isinstance(total, torch.Tensor)
            return F.prelu(total, self.slope.to(total.dtype))
        weight, bias = self.merged()
        x = F.conv3d(x, weight, bias, padding=weight.shape[2] // 2)
        if torch.is_grad_enabled():
            return F.prelu(F.instance_norm(x), self.slope.to(x.dtype))
        var, mean = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)
        return F.leaky_relu(x.sub_(mean).mul_((var + 1e-5).rsqrt()), float(self.slope), inplace=True)

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One kernel and bias for all branches."""
        kernels: list[torch.Tensor] = [branch.get_parameter("weight") for branch in self.branches]
        biases: list[torch.Tensor] = [branch.get_parameter("bias") for branch in self.branches]
        width = max(kernel.shape[2] for kernel in kernels)
        wide = [F.pad(kernel, ((width - kernel.shape[2]) // 2,) * 6) for kernel in kernels]
        return torch.stack(wide).sum(0), torch.stack(biases).sum(0)


class CoAttention(nn.Module):
    """Features of each image take up those of all places of the other that they match (after Chen et al. 2021).

    CAR-Net's paper gives no details: here one matrix of scaled products serves both directions, and a learnt
    factor, 0 at the start, says how much is taken up. Memory grows with the square of the number of voxels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Conv3d(channels, channels // 2, 1) for _ in range(2))
        self.value = nn.Conv3d(channels, channels, 1)
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def rows(x: torch.Tensor) -> torch.Tensor:
            return x.flatten(2).transpose(1, 2)

        query, key = rows(self.query(moving)), rows(self.key(fixed))
        values = [rows(self.value(x)) for x in (fixed, moving)]
        to_moving = F.scaled_dot_product_attention(query, key, values[0])
        to_fixed = F.scaled_dot_product_attention(key, query, values[1])
        taken = [x.transpose(1, 2).reshape(fixed.shape) for x in (to_fixed, to_moving)]
        return fixed + self.share * taken[0], moving + self.share * taken[1]


class Estimator(nn.Module):
    """Fixed and warped moving features (N, C, I, J, K) -> a velocity (N, 3, I, J, K) float32 in voxels."""

    def __init__(self, channels: int, width: int, reproduce: bool = False) -> None:
        super().__init__()
        self.first = Convolution(2 * channels, 2 * channels, 3, 1, 1)
        self.second = Convolution(2 * channels, width, 3, 1, 1)
        last = nn.Conv3d(width, 3, 3, 1, 1)
        self.last = last if reproduce else still(last)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or fixed.shape[2] <= SLAB:
            return self._whole(fixed, moving)
        parts, halo = [], 3  # three convolutions of radius 1
        for start in range(0, fixed.shape[2], SLAB):
            low = max(start - halo, 0)
            cut = slice(low, start + SLAB + halo)
            parts.append(self._whole(fixed[:, :, cut], moving[:, :, cut])[:, :, start - low :][:, :, :SLAB])
        return torch.cat(parts, 2)

    def _whole(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(torch.cat([fixed + moving, fixed - moving], 1)))
        x = F.relu(self.second(x))
        with torch.autocast(x.device.type, enabled=False):
            found: torch.Tensor = self.last(x.float())
        return found


class Pyramid(nn.Module):
    """Fixed and moving (N, 1, I, J, K) in [0, 1] -> displacements in voxels, fixed to moving.

    Args:
        channels: of the features; 16, 32, 36 and 64 make 294,272, 909,232, 1,114,812 and 3,134,480 parameters.
        cascade: how the flow d of a level joins the displacement U so far: ``"compose"``, d + U(x + d), or
            ``"add"``, d + U.
        head_width: channels before the last convolution of a level.
        large_kernel: taps of the parallel large kernel of the encoder; 0 for none.
        attention: co-attention at the coarsest level.
        bilateral: filter the displacement, guided by the fixed image.
        reproduce: zeros outside, coarse displacements times 2, torch's random start, and estimators that speak in
            voxels of their level, as released. By default the border holds, displacements grow by the ratio of the
            distances between the outer voxel centres, which sampling goes by, training starts from almost no
            motion, and estimators speak in voxels of the finest level, so that a step of the optimiser moves all
            levels about as far.
        checkpointing: compute features a second time in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        channels: int = 32,
        cascade: Literal["add", "compose"] = "compose",
        head_width: int = 27,
        large_kernel: int = 0,
        attention: bool = False,
        bilateral: Literal["none", "fixed", "trained"] = "none",
        reproduce: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.cascade, self.reproduce, self.checkpointing = cascade, reproduce, checkpointing
        widths = ((1, channels), (channels, 2 * channels), (2 * channels, channels))
        self.encoder = nn.Sequential(*(Layer(a, b, large_kernel, reproduce) for a, b in widths))
        self.estimators = nn.ModuleList(Estimator(channels, head_width, reproduce) for _ in range(LEVELS))
        self.attention = CoAttention(channels) if attention else None
        self.bilateral = None if bilateral == "none" else Bilateral(bilateral == "trained")

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
        """``displacement``; for each level from 0, the finest, ``velocity_0`` and ``displacement_0``.

        Raises:
            InputError: sizes that are no multiples of 16.
        """
        if any(n % MULTIPLE for n in fixed.shape[2:]):
            raise InputError(
                f"the pyramid needs sizes that are multiples of {MULTIPLE}, not "
                f"{tuple(fixed.shape[2:])}; pad the volumes"
            )
        # one image at a time: half the memory
        pyramids = [self._features(fixed), self._features(moving)]
        if self.attention is not None:
            pyramids[0][-1], pyramids[1][-1] = self.attention(pyramids[0][-1], pyramids[1][-1])
        found: dict[str, torch.Tensor] = {}
        total: torch.Tensor | None = None
        for level in reversed(range(LEVELS)):
            first, second = pyramids[0].pop(), pyramids[1].pop()
            if total is not None:
                total = self._doubled(total, first.shape[2:])
                second = warp(second, total, self.reproduce)
            velocity = self._kept(self.estimators[level], first, second)
            if not self.reproduce:
                velocity = velocity * 0.5**level
            del first, second
            total = self._joined(velocity, total)
            if level == 0 and self.bilateral is not None:
                total = self.bilateral(total, fixed)
            found |= {f"velocity_{level}": velocity, f"displacement_{level}": total}
        assert total is not None
        return found | {"displacement": total}

    def _features(self, image: torch.Tensor) -> list[torch.Tensor]:
        x = image
        for layer in self.encoder:
            x = self._kept(layer, x)
        found = [x]
        for _ in range(LEVELS - 1):
            found.append(halved(found[-1]))
        return found

    def _kept(self, part: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            found: torch.Tensor = checkpoint(part, *inputs, use_reentrant=False)
        else:
            found = part(*inputs)
        return found

    def _joined(self, velocity: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        flow = exponential(velocity, self.reproduce)
        if total is None:
            return flow
        return flow + (warp(total, flow, self.reproduce) if self.cascade == "compose" else total)

    def _doubled(self, field: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        fine = F.interpolate(field, shape, mode="trilinear", align_corners=True)
        growth = [2.0] * 3
        if not self.reproduce:
            growth = [(n - 1) / (m - 1) if m > 1 else 2.0 for n, m in zip(shape, field.shape[2:], strict=True)]
        return fine * constants(growth, fine)[:, None, None, None]


def halved(volumes: torch.Tensor) -> torch.Tensor:
    """(N, C, I, J, K) at half the resolution, linear, the outer voxel centres kept."""
    shape = [n // 2 for n in volumes.shape[2:]]
    return F.interpolate(volumes, shape, mode="trilinear", align_corners=True)


def exponential(velocity: torch.Tensor, zeros: bool = False) -> torch.Tensor:
    """The displacement after time 1 of a stationary velocity (N, 3, I, J, K), voxels, by scaling and squaring."""
    field: torch.Tensor = velocity * 0.5**SQUARINGS
    for _ in range(SQUARINGS):
        field = field + warp(field, field, zeros)
    return field
