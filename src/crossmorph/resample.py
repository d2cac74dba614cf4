"""Values between voxels: the one place of the package where images are interpolated.

Rules shared by everything here. A voxel reaches half a voxel around its centre, so the field of view ends on the
outer voxel faces. Inside it, beyond the last voxel centres, the border value is continued; outside it the fill
value is given and the result is not valid. This is what ITK does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch.nn.functional import grid_sample

from crossmorph.device import constants
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.space import FACE, Grid, inside

Mode = Literal["linear", "nearest", "cubic"]

BLOCK = 2**18
"""Points handled at once; bounds the memory of temporaries to about 100 MB."""

ON_GPU = 2**22
"""The same on a GPU, where every piece costs some microseconds."""

SUPPORTED = 0.999
"""Weight of valid voxels from which an interpolated value counts as valid."""

TIE = 1e-6
"""Difference of weights below which two labels are tied."""


class PointMap(Protocol):
    """What resampling needs to know of a transform."""

    @property
    def fixed(self) -> str:
        """Name of the space that points come from."""

    def __call__(self, points: torch.Tensor, /) -> torch.Tensor:
        """Points (..., 3) of the fixed space, RAS mm, to points of the moving space."""


# -- values at points --------------------------------------------------------------------------------------------


def sample(data: torch.Tensor, voxels: torch.Tensor, mode: Mode = "linear", fill: float = 0.0) -> torch.Tensor:
    """Values of a volume at voxel coordinates.

    Args:
        data: (C, I, J, K); any type, whole numbers give float32 except with ``"nearest"``.
        voxels: (..., 3) continuous voxel coordinates. The arithmetic is done in the wider of the two types, so
            float64 coordinates lose nothing.
        mode: ``"linear"`` (differentiable in data and voxels), ``"nearest"`` (halves round up), or ``"cubic"``
            (interpolating cubic B-spline with mirrored ends, not differentiable).
        fill: value outside the field of view, which reaches from -0.5 to n - 0.5.

    Returns:
        (C, ...) in the type of ``data``.

    Raises:
        InputError: unknown mode.
    """
    points, at = voxels.reshape(-1, 3), _sampler(data, mode)
    block = BLOCK if points.device.type == "cpu" else ON_GPU
    parts = [at(points[start : start + block], fill) for start in range(0, max(len(points), 1), block)]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return joined.reshape(data.shape[0], *voxels.shape[:-1])


def _sampler(data: torch.Tensor, mode: Mode) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """One volume made ready: a function of (n, 3) voxel coordinates and the fill value that gives (C, n)."""
    if mode == "nearest":
        return partial(_nearest, data)
    if mode == "linear":
        return partial(_linear, data if data.is_floating_point() else data.float())
    if mode == "cubic":
        return partial(_cubic, _spline_coefficients(data))
    raise InputError(f"unknown interpolation {mode!r}; choose linear, nearest or cubic")


def _linear(data: torch.Tensor, voxels: torch.Tensor, fill: float) -> torch.Tensor:
    learning = torch.is_grad_enabled() and (data.requires_grad or voxels.requires_grad)
    plain = data.dtype in (torch.float32, torch.float64) and not learning
    if plain and data.device.type == voxels.device.type == "cpu":
        from crossmorph.kernels import sampling

        return sampling.linear(data.detach(), voxels.detach(), fill)
    return _filled(_linear_torch(data, voxels), data, voxels, fill)


def _filled(values: torch.Tensor, data: torch.Tensor, voxels: torch.Tensor, fill: float) -> torch.Tensor:
    return torch.where(inside(voxels, data.shape[1:]), values, torch.full_like(values[:1, :1], fill))


def _linear_torch(data: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """(C, I, J, K) at (n, 3) -> (C, n), ends continued."""
    exact = torch.promote_types(data.dtype, voxels.dtype)
    result = data.dtype
    if result != exact and len(voxels):
        data, voxels = _window(data, voxels)
    last = constants([n - 1 for n in data.shape[1:]], voxels, exact)
    relative = (voxels.to(exact) * 2 - last) / last.clamp(min=1)
    relative = torch.nan_to_num(relative).flip(-1)[None, None, None]
    values = grid_sample(data[None].to(exact), relative, padding_mode="border", align_corners=True)
    return values[0, :, 0, 0].to(result)


def _window(data: torch.Tensor, voxels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of the volume that the points touch, so that only this part changes its type."""
    last = torch.as_tensor(data.shape[1:], device=voxels.device) - 1
    found = torch.nan_to_num(voxels.detach())
    low = torch.minimum(found.amin(0).floor().clamp(min=0), last).long()
    high = torch.minimum(found.amax(0).floor().clamp(min=0) + 1, last).long()
    (a, b, c), (d, e, f) = low.tolist(), high.tolist()
    return data[:, a : d + 1, b : e + 1, c : f + 1], voxels - low


def _nearest(data: torch.Tensor, voxels: torch.Tensor, fill: float) -> torch.Tensor:
    index = torch.nan_to_num(torch.floor(voxels + 0.5)).long()
    i, j, k = (index[:, axis].clamp(0, n - 1) for axis, n in enumerate(data.shape[1:]))
    return _filled(data[:, i, j, k], data, voxels, fill)


def _cubic(coefficients: torch.Tensor, voxels: torch.Tensor, fill: float) -> torch.Tensor:
    from scipy.ndimage import map_coordinates

    where = np.nan_to_num(voxels.detach().double().cpu().numpy()).T
    channels = coefficients.cpu().numpy()
    values = np.stack([map_coordinates(c, where, order=3, mode="mirror", prefilter=False) for c in channels])
    return _filled(torch.from_numpy(values).to(coefficients), coefficients, voxels, fill)


def _spline_coefficients(data: torch.Tensor) -> torch.Tensor:
    from scipy.ndimage import spline_filter

    channels = data.detach().cpu().numpy()
    smooth = np.stack([spline_filter(c, order=3, output=np.float32, mode="mirror") for c in channels])
    return torch.from_numpy(smooth).to(data.device)


# -- whole volumes -----------------------------------------------------------------------------------------------


def world_blocks(grid: Grid, device: torch.device | str = "cpu") -> Iterator[tuple[slice, torch.Tensor]]:
    """The voxel centres of a grid, piece by piece.

    Yields:
        A slice of the flattened volume, and (n, 3) float64 RAS mm of its voxels (float32 where the device has no
        float64).
    """
    device = torch.device(device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total, (_, nj, nk) = math.prod(grid.shape), grid.shape
    for start in range(0, total, BLOCK):
        part = slice(start, min(start + BLOCK, total))
        if device.type == "cpu":
            from crossmorph.kernels.points import centres

            yield part, centres(grid.affine, grid.shape, part.start, part.stop)
            continue
        flat = torch.arange(part.start, part.stop, device=device)
        voxels = torch.stack((flat // (nj * nk), flat // nk % nj, flat % nk), -1)
        yield part, grid.to_world(voxels.to(dtype))


def resample(
    image: Image, like: Grid, transform: PointMap | None = None, mode: Mode = "linear", fill: float | None = None
) -> Image:
    """The image on another grid: at every voxel centre x of ``like`` its value at transform(x).

    Args:
        image: values of the moving space.
        like: grid to sample on, in the fixed space.
        transform: maps points of the fixed space to the moving space; None leaves points where they are.
        mode: see ``sample``.
        fill: value outside the field of view; None guesses it (``guess_fill``) and notes the reason.

    Returns:
        An image with the name and dtype of the input. A voxel is valid inside the field of view of ``image`` where
        at least 99.9 % of the interpolation weight (nearest: the voxel taken) is valid. Values there never mix
        with the fill value: between the last voxel centre and the outer face the border value holds.
    """
    notes = image.notes
    if fill is None:
        fill, reason = guess_fill(image)
        notes = (*notes, f"outside the field of view {fill:g} was put: {reason}")
    values, validity = _sampler(image.data, mode), None
    if not image.valid.all():
        validity = _sampler(image.valid[None], mode if mode == "nearest" else "linear")
    data = image.data.new_empty(image.channels, math.prod(like.shape))
    valid = torch.empty(data.shape[1], dtype=torch.bool, device=data.device)
    for part, points in world_blocks(like, data.device):
        voxels = image.grid.to_voxel(transform(points) if transform else points)
        data[:, part] = values(voxels, fill)
        valid[part] = validity(voxels, 0)[0] > SUPPORTED if validity else inside(voxels, image.grid.shape)
    return replace(
        image,
        data=data.reshape(image.channels, *like.shape),
        grid=like,
        valid=valid.reshape(like.shape),
        space=transform.fixed if transform else image.space,
        notes=notes,
    )


def resample_labels(labels: Labels, like: Grid, transform: PointMap | None = None) -> Labels:
    """The label map on another grid; in every voxel the label with the largest linear weight wins.

    This is linear interpolation of every label's indicator (background is a label like any other) followed by the
    maximum, worked out from the eight labels around a point. Ties go to the lowest label; outside the field of
    view is 0. Arguments as for ``resample``.
    """
    data = labels.data.new_empty(math.prod(like.shape))
    for part, points in world_blocks(like, data.device):
        voxels = labels.grid.to_voxel(transform(points) if transform else points)
        data[part] = _vote(labels.data, voxels)
    space = transform.fixed if transform else labels.space
    return replace(labels, data=data.reshape(like.shape), grid=like, space=space)


def _vote(labels: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """(I, J, K) labels at (n, 3) voxel coordinates -> (n,) the label with the largest linear weight."""
    if labels.device.type == "cpu":
        from crossmorph.kernels import sampling

        return sampling.vote(labels, voxels)
    return torch.where(inside(voxels, labels.shape), _vote_torch(labels, voxels), 0)


def _vote_torch(labels: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """As ``_vote``, ends continued instead of 0 outside."""
    last = torch.as_tensor(labels.shape, device=voxels.device) - 1
    clamped = torch.minimum(torch.nan_to_num(voxels).clamp(min=0), last.to(voxels))
    low = clamped.long()
    share = clamped - low
    high = torch.minimum(low + 1, last)
    (i, j, k), (i1, j1, k1) = low.unbind(-1), high.unbind(-1)
    ids = torch.stack([labels[a, b, c] for a in (i, i1) for b in (j, j1) for c in (k, k1)])
    winners = ids[0].clone()
    mixed = (ids != ids[0]).any(0).nonzero()[:, 0]
    if not len(mixed):
        return winners
    ids = ids[:, mixed]
    x, y, z = share[mixed].unbind(-1)
    weights = torch.stack([a * b * c for a in (1 - x, x) for b in (1 - y, y) for c in (1 - z, z)])
    votes = torch.stack([((ids == own) * weights).sum(0) for own in ids])
    tied = votes >= votes.amax(0) - TIE
    winners[mixed] = ids.masked_fill(~tied, torch.iinfo(ids.dtype).max).amin(0)
    return winners


# -- coarser grids -----------------------------------------------------------------------------------------------


def downsample(image: Image, like: Grid) -> Image:
    """The image on a coarser grid without aliasing: Gaussian smoothing, then linear interpolation.

    Only valid voxels enter the mean. The width makes a voxel's point spread grow from the image's to that of
    ``like``: FWHM^2 = f^2 - 1 voxels along each array axis, f being how many voxels of the image one of ``like``
    spans along it (Cardoso et al. 2015, Scale factor point spread function matching). Grids may be turned and
    sheared against each other; axes along which ``like`` is finer are not smoothed.

    Returns:
        An image on ``like``, valid where at least half of the weight came from valid voxels, both grids being of
        one space. Elsewhere the value is the fill of ``guess_fill``.
    """
    fill, _ = guess_fill(image)
    if image.valid.all():
        return _smoothly_drawn(image, like, fill)
    weights = image.valid[None].to(image.data.dtype)
    whole = replace(image, data=torch.cat((image.data * weights, weights)), valid=torch.ones_like(image.valid))
    drawn = _smoothly_drawn(whole, like, 0.0)
    weight = drawn.data[-1:]
    valid = weight[0] > 0.5
    data = torch.where(valid, drawn.data[:-1] / weight.clamp(min=0.5), torch.full_like(weight, fill))
    return replace(drawn, data=data, valid=valid)


def _smoothly_drawn(image: Image, like: Grid, fill: float) -> Image:
    """``downsample`` of an image that is valid everywhere; one axis after the other where grids share axes."""
    steps = image.grid.inverse_affine[:3, :3] @ like.affine[:3, :3]
    sigmas = np.sqrt(np.maximum((steps**2).sum(1) - 1, 0)) / (2 * math.sqrt(2 * math.log(2)))
    skewed = np.abs(steps - np.diag(np.diag(steps))).max() * max(like.shape) > 1e-3
    if skewed or not _plain(image.data):
        return resample(replace(image, data=gaussian(image.data, sigmas.tolist())), like, fill=fill)
    from crossmorph.kernels.axes import along_axes, interpolation

    lines = [first + step * np.arange(n) for first, step, n in zip(
        image.grid.to_voxel(like.origin), np.diag(steps), like.shape, strict=True
    )]  # fmt: skip
    axes = list(zip(lines, image.grid.shape, sigmas, strict=True))
    values = along_axes(image.data, [interpolation(line, n, _bell(sigma)) for line, n, sigma in axes])
    seen = [torch.from_numpy((line >= -0.5 - FACE) & (line <= n - 0.5 + FACE)) for line, n, _ in axes]
    valid = seen[0][:, None, None] & seen[1][:, None] & seen[2]
    return replace(image, data=torch.where(valid, values, values.new_tensor(fill)), grid=like, valid=valid)


def blurred_like(image: Image, grid: Grid) -> Image:
    """The image on a grid of its own as coarse as ``grid``, so that it can be sampled there without aliasing."""
    spacing = np.maximum(image.grid.spacing, float(grid.spacing.min()))
    if np.allclose(spacing, image.grid.spacing, rtol=0.3):
        return image
    return downsample(image, image.grid.respaced(spacing))


def gaussian(data: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Gaussian smoothing of (C, I, J, K) along its three axes, widths in voxels, border values continued."""
    if not _plain(data):
        return _gaussian_torch(data, sigmas)
    from crossmorph.kernels.axes import along_axes, interpolation

    axes = zip(data.shape[1:], map(_bell, sigmas), strict=True)
    return along_axes(
        data, [interpolation(np.arange(float(n)), n, bell) if len(bell) > 1 else None for n, bell in axes]
    )


def _gaussian_torch(data: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    for axis, bell in enumerate(map(_bell, sigmas), start=1):
        size, reach = data.shape[axis], len(bell) // 2
        index = torch.arange(-reach, size + reach, device=data.device).clamp(0, size - 1)
        wide = data.index_select(axis, index)
        data = torch.zeros_like(data)
        for shift, weight in enumerate(bell):
            data.add_(wide.narrow(axis, shift, size), alpha=weight)
    return data


def _bell(sigma: float) -> list[float]:
    """A Gaussian of some voxels' width, cut off at three times that and normalised; 1 for almost no width."""
    reach = math.ceil(3 * sigma) if sigma >= 1e-3 else 0
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-3)) ** 2)
    bell: list[float] = (kernel / kernel.sum()).tolist()
    return bell


def _plain(data: torch.Tensor) -> bool:
    """Whether compiled kernels can take it: float32 on the processor, nothing to be differentiated."""
    return data.dtype == torch.float32 and data.device.type == "cpu" and not data.requires_grad


# -- the value outside -------------------------------------------------------------------------------------------


def guess_fill(image: Image) -> tuple[float, str]:
    """A value for places that the image does not see, and why it was chosen.

    Rules, in this order, looking at valid voxels only:
        CT: whole numbers that reach below -500 and at least 1 % of which lie within 100 of -1000 (air). The
        minimum where it lies there as well (-1024, say), else -1000.
        No negative values: 0.
        Otherwise: the median on the faces of the volume, where background usually is.
    """
    values = image.data if image.valid.all() else image.data[:, image.valid]
    if not values.numel():
        return 0.0, "no voxel is valid"
    lowest = float(values.min())
    airy = lowest <= -500 and float(((values + 1000).abs() <= 100).float().mean()) >= 0.01
    if airy and bool((values == values.round()).all()):
        air = lowest if abs(lowest + 1000) <= 100 else -1000.0
        return air, "air of a CT: whole numbers with a mass near -1000"
    if lowest >= 0:
        return 0.0, "no negative values"
    faces = torch.ones_like(image.valid)
    faces[1:-1, 1:-1, 1:-1] = False
    border = image.data[:, faces & image.valid]
    if border.numel():
        return float(border.median()), "the median on the faces of the volume"
    return lowest, "the minimum, as no voxel on the faces is valid"
