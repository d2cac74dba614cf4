"""LapIRN (Mok and Chung, MICCAI 2020): a Laplacian pyramid of three networks, with attention gates on request.

The first level sees the pair at a quarter of the resolution; the next ones see the moving volume as warped so far,
the fixed one and the field so far, and add to it. Fields are learnt in units of half a volume, which are the same
at every level, and come out in voxels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from crossmorph.device import constants
from crossmorph.errors import InputError
from crossmorph.networks.convolution import Convolution, exact, standardised
from crossmorph.networks.pyramid import exponential
from crossmorph.networks.warp import warp
from crossmorph.optimise.terms import displaced
from crossmorph.resample import sample

Version = Literal["disp", "diff"]

LEVELS = 3
BLOCKS = 5
REACH = 0.4
"""Longest field of a level along each axis, in half volumes."""

MULTIPLE = 2**LEVELS
"""Sizes must be multiples of this."""


class Residual(nn.Module):
    """x + conv(lrelu(conv(lrelu(x)))), and a rectifier over the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (Convolution(channels, channels, 3, 1, 1, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x + self.second(F.leaky_relu(self.first(F.leaky_relu(x, 0.2)), 0.2)), 0.2)


class AttentionGate(nn.Module):
    """Additive attention (Oktay et al. 2018): skip features are weighted by what the coarse features ask for.

    a = sigmoid(psi(relu(theta(e) + phi(g)))) at the coarse resolution, linearly enlarged; the result is W(a e).
    The normalisation after W is left out: one pair is no batch, and LapIRN has none elsewhere.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv3d(channels, channels // 2, 2, 2, bias=False)
        self.phi = nn.Conv3d(channels, channels // 2, 1)
        self.psi = nn.Conv3d(channels // 2, 1, 1)
        self.leave = nn.Conv3d(channels, channels, 1)

    def forward(self, skip: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        """Skip features (N, C, I, J, K), coarse ones (N, C, I / 2, J / 2, K / 2) -> (N, C, I, J, K)."""
        asked = torch.sigmoid(self.psi(F.relu(self.theta(skip) + self.phi(coarse))))
        found: torch.Tensor = self.leave(skip * doubled(asked))
        return found


class Level(nn.Module):
    """What one level sees (N, B, I, J, K), the coarser level's features -> a field in half volumes, features."""

    def __init__(self, before: int, channels: int, gate: bool) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1) -> Convolution:
            return Convolution(inputs, outputs, 3, stride, 1, bias=False)

        self.enter = nn.Sequential(conv(before, channels), nn.LeakyReLU(0.2), conv(channels, channels))
        self.down = conv(channels, channels, 2)
        self.blocks = nn.Sequential(*(Residual(channels) for _ in range(BLOCKS)))
        self.up = nn.ConvTranspose3d(channels, channels, 2, 2, bias=False)
        self.leave = nn.Sequential(conv(2 * channels, channels), nn.LeakyReLU(0.2))
        self.field = conv(channels, 3)
        self.gate = AttentionGate(channels) if gate else None

    def forward(
        self, volumes: torch.Tensor, embedding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        skip = self.enter(volumes)
        coarse = self.down(skip)
        coarse = self.blocks(coarse if embedding is None else coarse + embedding)
        fine = self.up(coarse)
        skip = skip if self.gate is None else self.gate(skip, coarse)
        x = self.leave(torch.cat([fine, skip], 1))
        return REACH * F.softsign(exact(self.field, x)), fine


class LapIRN(nn.Module):
    """Fixed and moving (N, 1, I, J, K) in [0, 1] -> displacements in voxels, fixed to moving.

    Args:
        channels: of all features, even; 28 makes 923,748 parameters without gates, as published.
        version: fields of the levels add up to a displacement (``"disp"``) or a stationary velocity (``"diff"``).
        gates: attention gates on the skip connections, 4,369 parameters each with 28 channels.
        reproduce: as released: means over 3^3 voxels of stride 2, which move the voxel centres by half a voxel,
            and units between the outer voxel centres. By default means over 2^3 and units between the outer faces,
            so that a displacement is exactly doubled from level to level; the network sees volumes of mean 0 and
            deviation 1, without which it learns far more slowly; the last convolution begins near 0.
        checkpointing: compute features a second time in the backward pass instead of keeping them.

    Attributes:
        levels: how many levels are in use, 1 to 3; for progressive training.
        frozen: no gradient reaches the levels before the last one in use.
    """

    def __init__(
        self,
        channels: int = 28,
        version: Version = "disp",
        gates: bool = False,
        reproduce: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.version, self.reproduce, self.checkpointing = version, reproduce, checkpointing
        self.estimators = nn.ModuleList(Level(5 if level else 2, channels, gates) for level in range(LEVELS))
        if not reproduce:
            for estimator in self.estimators:
                nn.init.normal_(estimator.get_parameter("field.weight"), std=1e-3)
        self.levels, self.frozen = LEVELS, False

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
        """``displacement``; ``flow``, that of the last level in its own voxels; ``velocity``, what is smooth.

        Raises:
            InputError: sizes that are no multiples of 8.
        """
        if any(n % MULTIPLE for n in fixed.shape[2:]):
            raise InputError(
                f"LapIRN needs sizes that are multiples of {MULTIPLE}, not {tuple(fixed.shape[2:])}; "
                "pad the volumes"
            )
        pairs = [(fixed, moving) if self.reproduce else (standardised(fixed), standardised(moving))]
        for _ in range(LEVELS - 1):
            pairs.append((pooled(pairs[-1][0], self.reproduce), pooled(pairs[-1][1], self.reproduce)))
        total = embedding = None
        for level in range(self.levels):
            learns = torch.is_grad_enabled() and not (self.frozen and level < self.levels - 1)
            with torch.set_grad_enabled(learns):
                total, embedding = self._level(level, *pairs.pop(), total, embedding)
        assert total is not None
        flow = self._flow(total)
        displacement = flow
        for _ in range(LEVELS - self.levels):
            displacement = 2 * doubled(displacement)
        return {"displacement": displacement, "flow": flow, "velocity": self._voxels(total)}

    def _level(
        self,
        level: int,
        fixed: torch.Tensor,
        moving: torch.Tensor,
        total: torch.Tensor | None,
        embedding: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Field so far in half volumes, and the features for the next level."""
        if total is None:
            return self._kept(level, torch.cat([moving, fixed], 1))
        flow, total = self._flow(total), doubled(total)
        growth = [self._unit(2 * n) / self._unit(n) for n in flow.shape[2:]]
        warped = warp(moving, doubled(flow) * constants(growth, flow)[:, None, None, None])
        field, embedding = self._kept(level, torch.cat([warped, fixed, total], 1), embedding)
        return field + total, embedding

    def _kept(
        self, level: int, volumes: torch.Tensor, embedding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.checkpointing and torch.is_grad_enabled():
            again: tuple[torch.Tensor, torch.Tensor] = checkpoint(
                self.estimators[level], volumes, embedding, use_reentrant=False
            )
            return again
        found: tuple[torch.Tensor, torch.Tensor] = self.estimators[level](volumes, embedding)
        return found

    def _unit(self, size: int) -> float:
        return (size - 1) / 2 if self.reproduce else size / 2

    def _voxels(self, field: torch.Tensor) -> torch.Tensor:
        units = constants([self._unit(n) for n in field.shape[2:]], field)
        return field * units[:, None, None, None]

    def _flow(self, field: torch.Tensor) -> torch.Tensor:
        """The displacement in voxels that a field in half volumes is, or makes."""
        voxels = self._voxels(field)
        return exponential(voxels) if self.version == "diff" else voxels


def doubled(volumes: torch.Tensor) -> torch.Tensor:
    """(N, C, I, J, K) at twice the resolution, linear, the outer faces kept."""
    return F.interpolate(volumes, scale_factor=2, mode="trilinear", align_corners=False)


def pooled(volumes: torch.Tensor, reproduce: bool = False) -> torch.Tensor:
    """(N, C, I, J, K) at half the resolution: means over 2^3 voxels, or, as released, 3^3 around even ones."""
    if reproduce:
        return F.avg_pool3d(volumes, 3, 2, 1, count_include_pad=False)
    return F.avg_pool3d(volumes, 2)


def compared(
    fixed: torch.Tensor, moving: torch.Tensor, flow: torch.Tensor, reproduce: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fixed volume at the resolution of ``flow``, and the moving one under it: what a level's loss looks at.

    Args:
        fixed, moving: (N, C, I, J, K) at full resolution.
        flow: (N, 3, ...) in its own voxels, as fine or a whole number of times half as fine.
        reproduce: as released: single voxels of the full resolution are drawn on the coarse grid, which aliases.
    """
    whole = moving
    while fixed.shape[2] > flow.shape[2]:
        fixed, moving = pooled(fixed, reproduce), pooled(moving, reproduce)
    if not reproduce:
        return fixed, warp(moving, flow)
    last, ends = (constants([n - 1 for n in volumes.shape[2:]], flow) for volumes in (whole, flow))
    stretch = last / ends
    places = [(stretch * displaced(field)).clamp_min(0).minimum(last) for field in flow]
    return fixed, torch.stack([sample(volume, place) for volume, place in zip(whole, places, strict=True)])
