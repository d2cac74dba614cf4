"""Random changes of pairs by known maps, and pairs that are generated as a whole.

All randomness comes from the generator that is handed in, one of the processor wherever the volumes are, so that
a sample depends on its number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.device import constants
from crossmorph.optimise.terms import displaced, in_view, lengths
from crossmorph.preprocess import normalised
from crossmorph.resample import gaussian, sample
from crossmorph.space import Grid
from crossmorph.train.sample import Sample
from crossmorph.train.settings import Augmentation, Synthesis


def augmented(pair: Sample, settings: Augmentation, generator: torch.Generator) -> Sample:
    """The pair with its moving side moved by a random known map, and both sides in changed contrast.

    Landmarks of the moving side and an exact displacement would no longer fit, so they are left out.
    """
    if settings == Augmentation():
        return pair
    pair = replace(pair, fixed_points=None, moving_points=None, truth=None)
    if max(settings.turn_deg, settings.scale, settings.shift_mm, settings.bend_mm) > 0:
        places = displaced(random_motion(pair.grid, settings, generator, pair.moving.device))
        last = constants([n - 1 for n in pair.moving.shape], places)
        labels = pair.moving_labels
        pair = replace(
            pair,
            moving=sample(pair.moving[None], places.clamp_min(0).minimum(last))[0],
            moving_valid=in_view(places, pair.moving_valid),
            moving_labels=None if labels is None else sample(labels[None], places, "nearest")[0],
        )
    values = [_recoloured(side, settings, generator) for side in (pair.fixed, pair.moving)]
    return replace(pair, fixed=values[0], moving=values[1])


def random_motion(
    grid: Grid, settings: Augmentation, generator: torch.Generator, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(3, I, J, K) displacement in voxels: a random affine map about the middle, and a smooth random bend."""
    turn, scale, shift = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1 for _ in range(3))
    angle = torch.deg2rad(settings.turn_deg * turn)
    skew = torch.tensor([[0, -angle[2], angle[1]], [angle[2], 0, -angle[0]], [-angle[1], angle[0], 0]])
    matrix = torch.linalg.matrix_exp(skew.double()) @ torch.diag(1 + settings.scale * scale)
    lines = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in grid.shape]
    axes = torch.from_numpy(np.array(grid.affine[:3, :3]))
    linear = torch.linalg.inv(axes) @ (matrix - torch.eye(3)) @ axes  # of voxels from the middle
    away = torch.stack(torch.meshgrid(*lines, indexing="ij")).to(device)
    moved = torch.einsum("ab,bijk->aijk", linear.to(device), away)
    step = (torch.linalg.inv(axes) @ (settings.shift_mm * shift)).to(device)
    field: torch.Tensor = (moved + step[:, None, None, None]).float()
    if settings.bend_mm:
        field = field + random_bend(grid, settings.bend_mm, generator, device)
    return field


def random_bend(
    grid: Grid, length_mm: float, generator: torch.Generator, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(3, I, J, K) smooth displacement in voxels, ``length_mm`` long on average, with no fold."""
    coarse = [max(4, round(4 * n / max(grid.shape))) for n in grid.shape]
    field = _smooth_noise(3, coarse, grid.shape, generator, device)
    mm = torch.einsum("ab,bijk->aijk", torch.from_numpy(np.array(grid.affine[:3, :3])).to(field), field)
    field = field * (length_mm / lengths(mm).mean().clamp_min(1e-6))
    inner = [n - 1 for n in grid.shape]
    slopes = [field.diff(dim=axis).abs()[:, : inner[0], : inner[1], : inner[2]] for axis in (1, 2, 3)]
    steepest = float(torch.stack(slopes).sum(0).max())
    bent: torch.Tensor = field * min(1.0, 0.8 / max(steepest, 1e-6))  # below 1 there is no fold
    return bent


def _smooth_noise(
    channels: int,
    coarse: Sequence[int],
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(C, I, J, K) of a standard deviation near 1, smooth between ``coarse`` random values along each axis."""
    noise = torch.randn(1, channels, *coarse, generator=generator).to(device)
    fine = F.interpolate(noise, tuple(shape), mode="trilinear", align_corners=False)[0]
    sigmas = [0.5 * n / m for n, m in zip(shape, coarse, strict=True)]
    fine = gaussian(fine, sigmas)
    scaled: torch.Tensor = fine / fine.std().clamp_min(1e-6)
    return scaled


def _recoloured(values: torch.Tensor, settings: Augmentation, generator: torch.Generator) -> torch.Tensor:
    if settings.contrast:
        exponent = float(torch.randn(1, generator=generator)) * settings.contrast
        values = values.pow(float(np.exp(exponent)))
    if settings.noise:
        values = values + settings.noise * torch.randn(values.shape, generator=generator).to(values)
    return values.clamp(0, 1)


# -- generated pairs ---------------------------------------------------------------------------------------------


def synthetic(shape: Sequence[int], spacing_mm: float, settings: Synthesis, generator: torch.Generator) -> Sample:
    """A random anatomy seen twice, in two random contrasts, with the exact displacement between.

    The anatomy is a function of the place: the largest of as many smooth random fields as there are labels
    (Hoffmann et al., SynthMorph, IEEE TMI 2022). The moving volume shows it at voxel p, the fixed one at p + u(p),
    so u leads from fixed to moving and no map has to be inverted. Both images are made from their labels: a mean
    and a texture a label, blur, shading and noise.
    """
    grid = Grid.from_spacing(shape, spacing_mm)
    field = random_bend(grid, settings.bend_mm, generator)
    coarse = [max(3, round(n / 12)) for n in grid.shape]
    heights = _smooth_noise(settings.labels, coarse, grid.shape, generator)
    last = torch.tensor(grid.shape) - 1
    moving_labels = heights.argmax(0).int()
    fixed_labels = sample(heights, displaced(field).clamp_min(0).minimum(last)).argmax(0).int()
    images = [_scanned(labels, settings.labels, generator) for labels in (fixed_labels, moving_labels)]
    everywhere = torch.ones(grid.shape, dtype=torch.bool)
    return Sample(
        "a generated pair",
        images[0],
        images[1],
        everywhere,
        everywhere,
        grid,
        np.eye(4),
        fixed_labels,
        moving_labels,
        truth=field,
    )


def _scanned(labels: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(I, J, K) in [0, 1]: what a scanner of a random contrast shows of labels."""
    means, spreads = (torch.rand(count, generator=generator) for _ in range(2))
    values = means[labels.long()] + 0.1 * spreads[labels.long()] * torch.randn(labels.shape, generator=generator)
    blur = 0.3 + 0.7 * float(torch.rand(1, generator=generator))
    values = gaussian(values[None], [blur] * 3)[0]
    shading = _smooth_noise(1, (4, 4, 4), labels.shape, generator)[0]
    values = values * torch.exp(0.2 * shading) + 0.02 * torch.randn(labels.shape, generator=generator)
    return normalised(values, torch.ones_like(labels, dtype=torch.bool)).clamp(0, 1)
