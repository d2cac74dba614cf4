"""Terms of a registration objective.

A data term is a callable: displacement (3, I, J, K) in voxels of its grid -> (value, gradient of the same shape).
Regularity terms are plain differentiable functions of a field. On the CPU compiled kernels with analytic gradients
do the work; the torch formulas here are the reference and run on any other device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray

from crossmorph.device import constants
from crossmorph.optimise.linear import Similarity
from crossmorph.optimise.similarity import BINS, mutual_information
from crossmorph.resample import sample

if TYPE_CHECKING:
    from crossmorph.kernels.similarity import Windows

DataTerm = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


def diffusion(field: torch.Tensor) -> torch.Tensor:
    """Sum over the three axes of the mean squared forward difference (means over voxels and components)."""
    parts = [(field.diff(dim=1 + a) ** 2).mean() for a in range(3) if field.shape[1 + a] > 1]
    return torch.stack(parts).sum() if parts else field.sum() * 0


def folding(field: torch.Tensor, floor: float = 0.3) -> torch.Tensor:
    """How far the local volume falls below ``floor``: mean of max(0, floor - J)^2.

    J runs over the eight one-sided Jacobian determinants of x + u(x) at every voxel, those of the corners of the
    cells between voxels. A field with all of them positive has no fold by central differences either, nearly
    always: the central matrix is the mean of the one-sided ones.
    """
    steps = [field.diff(dim=1 + a) for a in range(3)]
    shape = [n - 1 for n in field.shape[1:]]
    if min(shape) < 1:
        return field.sum() * 0
    parts = []
    for i, j, k in np.ndindex(2, 2, 2):
        ii, jj, kk = (slice(s, s + n) for s, n in zip((i, j, k), shape, strict=True))
        columns = [steps[0][:, :, jj, kk], steps[1][:, ii, :, kk], steps[2][:, ii, jj, :]]
        parts.append((F.relu(floor - _determinant(*columns)) ** 2).mean())
    return torch.stack(parts).mean()


def _determinant(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """That of the unit matrix and columns (3, I, J, K) added to it, written out: faster than elimination."""
    a, b, c = (1 + x[0], x[1], x[2]), (y[0], 1 + y[1], y[2]), (z[0], z[1], 1 + z[2])
    return (
        a[0] * (b[1] * c[2] - b[2] * c[1])
        - a[1] * (b[0] * c[2] - b[2] * c[0])
        + a[2] * (b[0] * c[1] - b[1] * c[0])
    )


def regularity(
    field: torch.Tensor,
    smoothness: float,
    fold_weight: float,
    floor: float = 0.3,
    anchor: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor]:
    """smoothness * diffusion(field - anchor) + fold_weight * folding(field), and its gradient (3, I, J, K).

    The gradient is added to ``onto``, which is returned, where that is given.
    """
    change = field if anchor is None else field - anchor
    if field.is_cuda:
        total, gradient = with_gradient(lambda u: smoothness * diffusion(u), change)
        if fold_weight:
            value, push = with_gradient(lambda u: fold_weight * folding(u, floor), field)
            total, gradient = total + value, gradient + push
        return total, gradient if onto is None else onto.add_(gradient)
    from crossmorph.kernels import field as kernels

    array = field.contiguous().numpy()
    sums = np.zeros_like(array) if onto is None else onto.numpy()
    total = kernels.diffusion(change.contiguous().numpy(), smoothness, sums)
    if fold_weight and min(array.shape[1:]) > 1:
        total += kernels.folding(array, floor, fold_weight, sums)
    return total, torch.from_numpy(sums)


def smooth(field: torch.Tensor, passes: int, repeat: bool = True) -> torch.Tensor:
    """``passes`` means over 3^3 voxels, close to a B-spline of order ``passes``.

    Args:
        field: (C, I, J, K).
        passes: how many means; three make almost a cubic B-spline.
        repeat: borders repeat the nearest value, which keeps constants (and makes the operator its own adjoint);
            otherwise the outside counts as zero, as published, which damps the field at the faces.

    Returns:
        (C, I, J, K) float32.
    """
    if field.is_cuda:
        for _ in range(passes):
            padded = F.pad(field[None], (1,) * 6, mode="replicate" if repeat else "constant")
            field = F.avg_pool3d(padded, 3, stride=1)[0]
        return field
    from crossmorph.kernels import field as kernels

    return torch.from_numpy(kernels.smooth(field.numpy(), passes, repeat))


def box_mean(volume: torch.Tensor, radius: int, counted: bool = False) -> torch.Tensor:
    """Mean over (2 radius + 1)^3 windows of (C, I, J, K), sizes of one voxel included.

    Outside counts as zero if ``counted`` (published), else it is left out.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool3d(F.pad(values[None], (radius,) * 6), 2 * radius + 1, stride=1)[0]

    return mean(volume) if counted else mean(volume) / mean(torch.ones_like(volume[:1]))


@dataclass(frozen=True, eq=False)
class DescriptorSSD:
    """Mean over the fixed voxels in use of |moving(p + u) - fixed(p)|^2, summed over channels.

    Args:
        fixed, moving: (C, I, J, K) descriptors on one grid.
        fixed_valid, moving_valid: (I, J, K) bool. Voxels that are not valid on either side add nothing.
        reproduce: the released sampling: displacements are N / (N - 1) too long, the outside is zero, and the
            moving image counts everywhere.
    """

    fixed: torch.Tensor
    moving: torch.Tensor
    fixed_valid: torch.Tensor
    moving_valid: torch.Tensor
    reproduce: bool = False

    @property
    def scale(self) -> torch.Tensor:
        """(3,): factor on displacements; 1 unless the released mismatch is reproduced."""
        return released_stretch(self.fixed.shape[1:]) if self.reproduce else torch.ones(3)

    def __call__(self, field: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Value and gradient at a displacement (3, I, J, K) in voxels."""
        if field.is_cuda:
            return with_gradient(self.value, field)
        from crossmorph.kernels import similarity

        fixed, moving = self._lasting
        gradient = np.zeros(field.shape, np.float32)
        value = similarity.ssd(
            fixed,
            moving,
            self._weight,
            self._moving_cells.numpy(),
            field.contiguous().numpy(),
            self.scale.numpy(),
            self.reproduce,
            1 / self._count,
            gradient,
        )
        return value, torch.from_numpy(gradient)

    @cached_property
    def _lasting(self) -> list[NDArray[np.float32]]:
        """Both descriptors with their channels last in memory, and enough of those for whole vectors."""
        from crossmorph.kernels.similarity import LANES

        lasting = [features.permute(1, 2, 3, 0) for features in (self.fixed, self.moving)]
        missing = -len(self.fixed) % LANES
        if missing:  # padding by nothing would copy
            lasting = [F.pad(features, (0, missing)) for features in lasting]
        return [features.contiguous().numpy() for features in lasting]

    @cached_property
    def _weight(self) -> NDArray[np.float32]:
        return self.fixed_valid.float().numpy()

    @cached_property
    def _count(self) -> int:
        return max(int(self.fixed_valid.sum()), 1)

    @cached_property
    def _moving_cells(self) -> torch.Tensor:
        return valid_cells(self.moving_valid | self.reproduce)

    def value(self, field: torch.Tensor) -> torch.Tensor:
        """The same value, differentiable, in plain torch."""
        places = displaced(field, self.scale)
        inside = in_view(places, self.moving_valid) | self.reproduce
        moved = sample(_zero_bordered(self.moving) if self.reproduce else self.moving, places + self.reproduce)
        error = ((moved - self.fixed) ** 2).sum(0)
        return (error * (inside & self.fixed_valid)).sum() / self._count


@dataclass(frozen=True, eq=False)
class LocalCorrelation:
    """Minus the mean squared local correlation of two images, over the fixed voxels in use.

    For windows of (2 radius + 1)^3 voxels with covariance c and variances v, v' of fixed and warped moving:
    LNCC^2 = c^2 / ((v + noise) (v' + noise)) (Avants et al. 2008, with the exact gradient of the windowed sums).

    Args:
        fixed, moving: (I, J, K) images on one grid, of order one.
        fixed_valid, moving_valid: (I, J, K) bool.
        radius: of the window in voxels.
        noise: variance that counts as nothing, so that flat regions do not pull.
    """

    fixed: torch.Tensor
    moving: torch.Tensor
    fixed_valid: torch.Tensor
    moving_valid: torch.Tensor
    radius: int = 2
    noise: float = 1e-5

    def __call__(self, field: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Value and gradient at a displacement (3, I, J, K) in voxels."""
        if field.is_cuda:
            return with_gradient(self.value, field)
        from crossmorph.kernels import similarity

        box = (slice(None), *self._box)
        corner = torch.tensor([side.start for side in self._box], dtype=field.dtype)[:, None, None, None]
        part = (field[box] + corner).contiguous().numpy()
        moving, cells = self.moving.contiguous().numpy(), self._moving_cells.numpy()
        gradient = np.empty_like(part)
        value = similarity.lncc(self._windows, moving, cells, part, -1 / self._count, gradient)
        whole = torch.zeros_like(field)
        whole[box] = torch.from_numpy(gradient)
        return value, whole

    @cached_property
    def _count(self) -> int:
        return max(int(self.fixed_valid.sum()), 1)

    @cached_property
    def _windows(self) -> Windows:
        from crossmorph.kernels import similarity

        fixed, weight = self.fixed[self._box].contiguous(), self.fixed_valid[self._box].float().contiguous()
        return similarity.windows(fixed.numpy(), weight.numpy(), self.radius, self.noise)

    @cached_property
    def _moving_cells(self) -> torch.Tensor:
        return valid_cells(self.moving_valid)

    @cached_property
    def _box(self) -> tuple[slice, ...]:
        """What the windows around the fixed voxels in use, and the windows around those, reach."""
        sides = []
        for axis, size in enumerate(self.fixed_valid.shape):
            used = self.fixed_valid.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0]
            ends = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
            sides.append(slice(max(ends[0] - 2 * self.radius, 0), min(ends[1] + 2 * self.radius + 1, size)))
        return tuple(sides)

    def value(self, field: torch.Tensor) -> torch.Tensor:
        """The same value, differentiable, in plain torch."""
        places = displaced(field)
        last = constants([n - 1 for n in self.moving.shape], places)
        moved = sample(self.moving[None], places.clamp_min(0).minimum(last))[0]
        seen = in_view(places, self.moving_valid)
        moved = torch.where(seen, moved, moved.detach())

        def mean(values: torch.Tensor) -> torch.Tensor:
            return box_mean(values[None], self.radius)[0]

        f, m = mean(self.fixed), mean(moved)
        ff = (mean(self.fixed**2) - f * f).clamp_min(0) + self.noise
        mm = (mean(moved**2) - m * m).clamp_min(0) + self.noise
        squared = (mean(self.fixed * moved) - f * m) ** 2 / (ff * mm)
        return -(squared * self.fixed_valid).sum() / self._count


@dataclass(frozen=True, eq=False)
class MutualInformation:
    """Minus the mutual information of two images in nats, over the fixed voxels in use that see valid moving ones.

    The Parzen estimate of ``similarity.mutual_information`` (Mattes et al., IEEE TMI 2003). It looks at the image
    as a whole: where the local structure of two modalities differs, it still knows which value goes with which.

    Args:
        fixed, moving: (I, J, K) images on one grid, values in about 0..1.
        fixed_valid, moving_valid: (I, J, K) bool.
        bins: of both images.
    """

    fixed: torch.Tensor
    moving: torch.Tensor
    fixed_valid: torch.Tensor
    moving_valid: torch.Tensor
    bins: int = BINS

    def __call__(self, field: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Value and gradient at a displacement (3, I, J, K) in voxels."""
        if field.is_cuda:
            return with_gradient(self.value, field)
        from crossmorph.kernels import similarity

        moved, slope = similarity.sampled(
            self.moving.contiguous().numpy(), self._moving_cells.numpy(), field.contiguous().numpy()
        )
        inside = in_view(displaced(field), self.moving_valid)
        value, by_moved = self._compared(torch.from_numpy(moved)[..., None], inside)
        return value, by_moved[..., 0] * torch.from_numpy(slope)

    @cached_property
    def _moving_cells(self) -> torch.Tensor:
        return valid_cells(self.moving_valid)

    @cached_property
    def _compared(self) -> Similarity:
        return mutual_information(self.fixed[..., None], self.fixed_valid.float(), self.bins)

    def value(self, field: torch.Tensor) -> torch.Tensor:
        """The same value, differentiable, in plain torch."""
        places = displaced(field)
        seen = self.fixed_valid & in_view(places, self.moving_valid)
        moved = sample(self.moving[None], places)[0][seen].clamp(0, 1) * (self.bins - 1)
        fixed = self.fixed[seen].clamp(0, 1) * (self.bins - 1)
        row, first = (v.detach().long().clamp(max=self.bins - 2) for v in (fixed, moved))
        high, t = fixed - row, moved - first
        s = 1 - t
        splines = torch.stack((s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3)) / 6
        width = self.bins + 2
        joint = torch.zeros(self.bins * width, dtype=moved.dtype, device=moved.device)
        for n, spline in enumerate(splines):
            joint = joint.index_add(0, row * width + first + n, (1 - high) * spline)
            joint = joint.index_add(0, (row + 1) * width + first + n, high * spline)
        joint = (joint / joint.sum().clamp_min(1e-12)).reshape(self.bins, width)
        unrelated = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        ratio = torch.where(joint > 0, joint, 1) / torch.where(joint > 0, unrelated, 1)
        return -(joint * ratio.log()).sum()


def with_gradient(
    value: Callable[[torch.Tensor], torch.Tensor], field: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Value and gradient of a differentiable function of a field."""
    field = field.detach().requires_grad_(True)
    result = value(field)
    (gradient,) = torch.autograd.grad(result, field)
    return result.item(), gradient


def released_stretch(shape: Sequence[int]) -> torch.Tensor:
    """(3,) N / (N - 1): by how much the released code samples displacements too far.

    It normalises them for places where -1 and 1 are voxel centres and samples where those are voxel faces.
    """
    sizes = torch.tensor(list(shape), dtype=torch.float32)
    return sizes / (sizes - 1).clamp_min(1)


def displaced(field: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """(3, I, J, K) displacement in voxels -> (I, J, K, 3) voxel coordinates p + scale * u(p)."""
    lines = [torch.arange(n, device=field.device, dtype=field.dtype) for n in field.shape[1:]]
    identity = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    step = field.permute(1, 2, 3, 0)
    return identity + (step if scale is None else step * scale.to(step, non_blocking=True))


def lengths(field: torch.Tensor) -> torch.Tensor:
    """Lengths (...) of vectors (3, ...); torch's own norm along the first axis takes 17 times as long."""
    return field.square().sum(0).sqrt()


def valid_cells(valid: torch.Tensor) -> torch.Tensor:
    """(I, J, K) bool: whether a voxel and its upper neighbours (where they exist) are all valid."""
    for axis in range(3):
        above = torch.cat((valid.narrow(axis, 1, valid.shape[axis] - 1), valid.narrow(axis, -1, 1)), axis)
        valid = valid & above
    return valid.contiguous()


def in_view(places: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """True where all voxels around a place (..., 3) exist and are valid."""
    last, before = (constants([max(n - less, 0) for n in valid.shape], places) for less in (1, 2))
    inside = ((places >= 0) & (places <= last)).all(-1)
    i, j, k = places.detach().clamp_min(0).minimum(before).long().unbind(-1)
    return inside & valid_cells(valid)[i, j, k]


def _zero_bordered(volume: torch.Tensor) -> torch.Tensor:
    return F.pad(volume, (1,) * 6)
