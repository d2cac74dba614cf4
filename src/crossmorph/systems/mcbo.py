"""MCBO: unsupervised multimodal registration by multilevel correlation balanced optimisation.

Wang et al., Learn2Reg 2024 (MCBO), on ConvexAdam (Siebert et al. 2021). The page reads top to bottom: describe
both images, search each level, make both directions agree, fuse modalities and levels, refine with Adam.

The default departs from the release where that is better: nothing is damped at the faces, coarse fields scale
exactly, what lies outside a field of view neither attracts nor repels, each level searches around the one before,
the refinement starts smooth and takes on only as much detail as the images confirm, and folds are penalised.
``reproduce`` restores the released behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.describe.disa import disa_volume
from crossmorph.describe.macmind import macmind, msssc
from crossmorph.describe.mind import mind_ssc
from crossmorph.describe.own import own_features
from crossmorph.errors import InputError
from crossmorph.match.consistency import inverse_consistent, warp
from crossmorph.match.convex import coupled_convex_of_sum
from crossmorph.optimise.choose import SMOOTHNESS, Choice, choose_smoothness
from crossmorph.optimise.field import refine, resize
from crossmorph.optimise.landmarks import OnGrid
from crossmorph.optimise.similarity import normalised_information
from crossmorph.optimise.terms import DataTerm, DescriptorSSD, LocalCorrelation, MutualInformation, smooth
from crossmorph.preprocess import working_grid
from crossmorph.record import Journal
from crossmorph.resample import SUPPORTED
from crossmorph.settings import Descriptor, Mcbo, Refinement
from crossmorph.space import Grid
from crossmorph.systems.blocks import Box, Economy, in_blocks, pieces
from crossmorph.systems.volume import Levels, Pair, Volume, pooled, shared

TRIED = {"lncc": (0.4, 0.35), "mind": (0.5, 0.5)}
"""By similarity: shares of a refinement's steps that the first smoothness and each next one are tried with.

What the latter leaves goes on with the chosen one. Ten steps are too few to compare by, and mutual information
is told apart by so little that it needs all twenty.
"""

MIND_GAINS = (0.011, 0.007, 0.007, 0.007)
"""Each step to more detail in a fit of local correlation must lower the MIND-SSC cost by this share.

Where the first one does not, the contrasts are too different for local correlation, and MIND-SSC is fitted.
"""

INFORMATION_GAINS = (0.015, 0.015, 0.015, 0.015)
"""Each step to more detail in a fit of MIND-SSC must raise normalised mutual information above 1 by this share."""

JUDGED = 2
"""Level at which descriptors judge a deformation that they did not find."""

PLENTY = Economy()


def mcbo(
    pairs: Sequence[Pair],
    settings: Mcbo,
    journal: Journal,
    landmarks: OnGrid | None = None,
    economy: Economy = PLENTY,
) -> torch.Tensor:
    """Displacement from fixed to moving on the working grid.

    Args:
        pairs: volumes on one grid; several pairs share one displacement, each with its weight in the objective.
        settings: see ``Mcbo``. Without ``reproduce`` the grid should divide into the levels used.
        journal: takes progress, seconds and notes.
        landmarks: on the working grid; the refinements keep them near their matches. Where fields are summed
            (``weights``), the sum is moved towards them smoothly.
        economy: how memory is saved.

    Returns:
        (3, A, B, C) float32: displacement in cells of a grid of A x B x C cells over the working grid's field of
        view. A, B, C are those of the last refinement's control points, or of the working grid where fields were
        summed.
    """
    shape = pairs[0].fixed.values.shape
    _check_size(shape, settings)
    with journal.stage("descriptors"):
        levels = _pyramid(shared(pairs), settings, economy)
    if settings.weights:
        total = _weighted_sum(shape, levels, settings, journal, economy)
        return total if landmarks is None else landmarks.resized(total.shape[1:]).moved(total)
    field: torch.Tensor | None = None
    for level in settings.levels:
        with journal.stage(f"search level {level}"):
            field = search(levels[level], level, settings, field, economy)
    if field is None:
        first = levels[settings.refine[0].level][0].fixed.values
        field = first.new_zeros((3, *first.shape))
    if landmarks is not None:
        field = landmarks.resized(field.shape[1:]).moved(field)
    for number, stage in enumerate(settings.refine, start=1):
        with journal.stage(f"refine {number}"):
            field = _refined(levels, field, stage, settings, journal, landmarks)
    return field


def _check_size(shape: Sequence[int], settings: Mcbo) -> None:
    coarsest = max(used_levels(settings))
    if min(shape) < coarsest:
        raise InputError(
            f"the working grid has {tuple(shape)} voxels, along one axis fewer than the {coarsest} "
            "that a level of these settings takes together; choose smaller levels, a finer spacing_mm, or the "
            "default preset"
        )


def grid_of(pairs: Sequence[tuple[Grid, Grid]], settings: Mcbo) -> Grid:
    """The grid that the system works on, over the first of the fixed grids."""
    if settings.reproduce:
        return pairs[0][0]
    steps = [stage.level * (stage.control if settings.weights else 1) for stage in settings.refine]
    return working_grid(pairs, settings.spacing_mm, math.lcm(*settings.levels, *steps))


def used_levels(settings: Mcbo) -> set[int]:
    """Levels at which descriptors are compared."""
    return {*settings.levels, *(stage.level for stage in settings.refine)}


Pyramid = dict[int, list[Pair]]
"""The pairs with their descriptors at each level that is used."""


def _pyramid(pairs: Sequence[Pair], settings: Mcbo, economy: Economy) -> Pyramid:
    """A volume that several pairs share is described once, where descriptors are compared at all."""
    if not settings.levels and all(stage.similarity == "mi" for stage in settings.refine):
        return {level: [pair.pooled(level) for pair in pairs] for level in used_levels(settings)}
    made: dict[tuple[int, int, tuple[Descriptor, ...]], Levels] = {}

    def levels(volume: Volume, side: int, describe: tuple[Descriptor, ...]) -> Levels:
        key = id(volume), side, describe
        if key not in made:
            made[key] = _levels(volume, replace(settings, describe=describe), side, economy)
        return made[key]

    found: Pyramid = {level: [] for level in used_levels(settings)}
    for pair in pairs:
        describe = pair.describe or settings.describe
        fixed, moving = levels(pair.fixed, 0, describe), levels(pair.moving, 1, describe)
        for level, described in found.items():
            described.append(replace(pair, fixed=fixed[level], moving=moving[level]))
    return found


def _levels(volume: Volume, settings: Mcbo, side: int, economy: Economy) -> Levels:
    """The volume with its descriptors at each level used; those of single voxels are kept only where used."""
    described = _described(volume, settings, side)
    levels = {level: described.pooled(level) for level in sorted(used_levels(settings))}
    if economy.half and 1 in levels:
        assert described.features is not None
        levels[1] = replace(described, features=described.features.half())
    return levels


def _described(volume: Volume, settings: Mcbo, side: int) -> Volume:
    """The volume with its descriptors, each scaled so that squared differences weigh as they should.

    They are kept at the finest resolution from which all levels can be pooled. ``side``: 0 for the fixed, 1 for a
    moving image.
    """
    base = math.gcd(*used_levels(settings))
    parts = []
    for descriptor in settings.describe:
        if callable(descriptor.name):
            features = pooled(own_features(descriptor.name, volume.values, volume.valid), base)
        elif descriptor.name == "mind":
            features = mind_ssc(volume.values, settings.mind_radius, settings.mind_dilation, base)
        elif descriptor.name == "disa":
            features = disa_volume(volume.values, volume.valid, descriptor.stride)
            features = pooled(_dot_as_difference(features, side), base)
        else:
            features = (macmind if descriptor.name == "macmind" else msssc)(volume.values, base)
        if descriptor.name not in ("mind", "disa"):
            features = features * math.sqrt(12 / len(features))  # one cost, whatever the number of channels
        parts.append(features if descriptor.weight == 1 else features * math.sqrt(descriptor.weight))
    return replace(volume, features=parts[0] if len(parts) == 1 else torch.cat(parts), base=base)


def _dot_as_difference(features: torch.Tensor, side: int) -> torch.Tensor:
    """Two channels more, after which |f - m|^2 = 1 - f . m for descriptors no longer than 1.

    With f' = (f, sqrt(1 - |f|^2), 0) and m' = (m, 0, sqrt(1 - |m|^2)), |f' - m'|^2 = 2 (1 - f . m).
    """
    rest = (1 - features.square().sum(0, keepdim=True)).clamp_min(0).sqrt()
    extra = [rest, torch.zeros_like(rest)]
    return torch.cat((features, extra[side], extra[1 - side])) / math.sqrt(2)


def search(
    pairs: Sequence[Pair],
    level: int,
    settings: Mcbo,
    start: torch.Tensor | None = None,
    economy: Economy = PLENTY,
) -> torch.Tensor:
    """Discrete search of one level: (3, A, B, C) in its cells.

    The costs of all pairs are added, or (published) each is searched alone and the fields are fused. The volumes
    are pooled to the level. With ``start``, the moving features are warped by it first and what is found is
    composed with it: u(x) = r(x) + start(x + r(x)).
    """
    if start is not None:
        start = resize(start, pairs[0].fixed.values.shape)
        pairs = [replace(pair, moving=pair.moving.warped(start)) for pair in pairs]
    found = [_consistent(group, level, settings, economy) for group in _groups(pairs, settings)]
    field = fuse(found, settings.fusion)
    return field if start is None else field + warp(start, field)


def _groups(pairs: Sequence[Pair], settings: Mcbo) -> list[Sequence[Pair]]:
    """The pairs that are searched together."""
    return [pairs] if settings.fusion == "cost" else [[replace(pair, weight=1.0)] for pair in pairs]


def _consistent(pairs: Sequence[Pair], level: int, settings: Mcbo, economy: Economy) -> torch.Tensor:
    """Both directions of one level made consistent; the forward one."""
    rounds = settings.consistency_iterations
    both = (pairs, [pair.turned() for pair in pairs]) if rounds else (pairs,)
    if settings.reproduce and level == 1:  # published: each octant on its own
        shape = pairs[0].fixed.values.shape
        field = torch.empty((3, *shape), device=pairs[0].fixed.values.device)
        for octant, _, _ in pieces(shape, (2, 2, 2), 0):
            parts = [_convex([pair.cropped(octant) for pair in side], settings, economy) for side in both]
            found = inverse_consistent(parts[0], parts[1], rounds, True)[0] if rounds else parts[0]
            field[(slice(None), *octant)] = found
        return field
    fields = [_convex(side, settings, economy) for side in both]
    return inverse_consistent(fields[0], fields[1], rounds, settings.reproduce)[0] if rounds else fields[0]


def _convex(pairs: Sequence[Pair], settings: Mcbo, economy: Economy) -> torch.Tensor:
    """The coupled convex search of pairs whose costs are added, in blocks where memory asks for them."""
    unknown = [None if settings.reproduce else pair.expected() for pair in pairs]

    def solve(box: Box, slab_bytes: float) -> torch.Tensor:
        parts = [pair.cropped(box).matched(cost) for pair, cost in zip(pairs, unknown, strict=True)]
        return coupled_convex_of_sum(parts, settings.half_width, settings.balanced, settings.reproduce, slab_bytes)

    return in_blocks(pairs[0].fixed.values.shape, settings.half_width, economy.cost_bytes, solve)


def fuse(fields: Sequence[torch.Tensor], mode: str) -> torch.Tensor:
    """Fields (3, I, J, K) of several pairs as one.

    ``magnitude``: at each voxel the longest vector; ``signed``: at each voxel and component the largest signed
    value, as released, which depends on the orientation of the array.
    """
    if len(fields) == 1:
        return fields[0]
    stack = torch.stack(list(fields))
    if mode == "signed":
        return stack.amax(0)
    longest = stack.square().sum(1).argmax(0)
    return stack.gather(0, longest[None, None].expand(1, 3, -1, -1, -1))[0]


def _weighted_sum(
    shape: Sequence[int], levels: Pyramid, settings: Mcbo, journal: Journal, economy: Economy
) -> torch.Tensor:
    """Published fusion: the sum of weighted level fields, the finest of them refined (MCBO, multilevel fusion)."""
    total: torch.Tensor | None = None
    for level, weight in zip(settings.levels, settings.weights, strict=True):
        fields = []
        for n in range(len(_groups(levels[level], settings))):
            own = {size: _groups(pairs, settings)[n] for size, pairs in levels.items()}
            with journal.stage(f"search level {level}"):
                field = search(own[level], level, settings, economy=economy)
                field = _in_voxels(field, level, shape, settings)
            if level == min(settings.levels):
                for number, stage in enumerate(settings.refine, start=1):
                    with journal.stage(f"refine {number}"):
                        field = _refined(own, field, stage, settings, journal)
                        field = _in_voxels(field, stage.level * stage.control, shape, settings)
                field = _box_smoothed(field, settings)
            fields.append(field)
        part = weight * fuse(fields, settings.fusion)
        total = part if total is None else total + part
    assert total is not None
    return total


def _in_voxels(field: torch.Tensor, cell: int, shape: Sequence[int], settings: Mcbo) -> torch.Tensor:
    """A field in cells of ``cell`` voxels, in voxels of the full grid; released: as if none had been dropped."""
    return resize(field * cell, shape, scaled=False) if settings.reproduce else resize(field, shape)


def _box_smoothed(field: torch.Tensor, settings: Mcbo) -> torch.Tensor:
    """Three means over ``smoothing``^3 voxels."""
    if settings.smoothing < 2:
        return field
    pad = (settings.smoothing // 2,) * 6
    for _ in range(3):
        padded = F.pad(field[None], pad, mode="constant" if settings.reproduce else "replicate")
        field = F.avg_pool3d(padded, settings.smoothing, stride=1)[0]
    return field


def _refined(
    levels: Mapping[int, Sequence[Pair]],
    field: torch.Tensor,
    stage: Refinement,
    settings: Mcbo,
    journal: Journal,
    landmarks: OnGrid | None = None,
) -> torch.Tensor:
    """``field`` after one refinement, in cells of the stage's control grid."""
    pairs = levels[stage.level]
    target = pairs[0].fixed
    shape = target.values.shape
    control = [-(-n // stage.control) for n in shape]
    if settings.reproduce:
        start = resize(field, control, scaled=False) / (stage.level * stage.control)
    else:
        start = resize(field, control)
    anchor = smooth(start, 3) if stage.anchored else None

    def term(similarity: str) -> DataTerm:
        data = _weighted_term(pairs, similarity, settings.reproduce)
        if landmarks is None:
            return data
        share = (3 * stage.control) ** 3 / max(int(target.weight.sum()), 1)
        return landmarks.resized(shape).added_to(data, share)

    def fit(data: DataTerm, smoothness: float, begin: torch.Tensor, iterations: int) -> torch.Tensor:
        return refine(
            data, begin, shape, iterations, smoothness, stage.fold_weight, stage.learning_rate, anchor,
            settings.reproduce, lambda step, _: journal.progress((step + 1) / iterations),
        )  # fmt: skip

    if stage.smoothness > 0:
        return fit(term(stage.similarity), stage.smoothness, start, stage.iterations)
    mind = term("mind")

    def chosen(similarity: str, score: Callable[[torch.Tensor], float], gains: Sequence[float]) -> Choice:
        data = term(similarity)
        first, following = (math.ceil(share * stage.iterations) for share in TRIED[similarity])
        choice = choose_smoothness(
            lambda weight, begin: fit(data, weight, begin, first if weight == SMOOTHNESS[0] else following),
            lambda found: score(resize(found, shape)),
            start,
            gains,
        )
        journal.note(f"smoothness, {similarity}", {"chosen": choice.smoothness, "scores": choice.scores})
        journal.note("similarity", similarity)
        rest = stage.iterations - following
        return replace(choice, field=fit(data, choice.smoothness, choice.field, rest))

    if stage.similarity != "mind":
        choice = chosen("lncc", lambda found: -mind(found)[0], MIND_GAINS)
        if stage.similarity == "lncc" or choice.smoothness < SMOOTHNESS[0]:
            return choice.field
    return chosen("mind", lambda found: information(pairs, found)[0] - 1, INFORMATION_GAINS).field


def refined_on_pair(
    fixed: Volume, moving: Volume, field: torch.Tensor, stage: Refinement, journal: Journal
) -> torch.Tensor:
    """A displacement that another system found, after one refinement by MIND-SSC on the pair itself.

    Args:
        fixed, moving: volumes on one grid.
        field: (3, A, B, C) in cells over that grid.

    Returns:
        (3, A', B', C') in cells of the stage's control grid.
    """
    settings = Mcbo(levels=(stage.level,), refine=(stage,))
    return _refined(_pyramid([Pair(fixed, moving)], settings, PLENTY), field, stage, settings, journal)


def information(pairs: Sequence[Pair], *fields: torch.Tensor | None) -> tuple[float, ...]:
    """Normalised mutual information under each of some fields, where all of them show valid voxels.

    Args:
        pairs: volumes on one grid; the weighted mean over the pairs is taken.
        fields: (3, I, J, K) in voxels of that grid; None for no motion.
    """
    found = []
    for pair in pairs:
        fixed, moving = pair.fixed, pair.moving
        layers = torch.stack((moving.values, moving.valid.float()))
        seen = [layers if field is None else warp(layers, field) for field in fields]
        common = fixed.weight & torch.stack([share > SUPPORTED for _, share in seen]).all(0)
        found.append([normalised_information(fixed.values.cpu(), v.cpu(), common.cpu()) for v, _ in seen])
    weights = [pair.weight for pair in pairs]
    return tuple(float(np.average(values, weights=weights)) for values in zip(*found, strict=True))


def difference(pairs: Sequence[Pair], settings: Mcbo, *fields: torch.Tensor) -> tuple[float, ...]:
    """Mean squared difference of descriptors under each of some fields, where all of them show valid voxels.

    Args:
        pairs: volumes on one grid; the weighted mean over the pairs is taken.
        settings: what is compared.
        fields: (3, A, B, C) in cells over that grid.
    """
    described = _pyramid(shared(pairs), replace(settings, levels=(JUDGED,), refine=()), PLENTY)[JUDGED]
    totals = [0.0] * len(fields)
    for pair in described:
        target = pair.fixed.features
        assert target is not None
        seen = [pair.moving.warped(resize(field, pair.fixed.values.shape)) for field in fields]
        common = pair.fixed.weight & torch.stack([moving.valid for moving in seen]).all(0)
        for n, moving in enumerate(seen):
            assert moving.features is not None
            apart = (moving.features - target).square().sum(0)
            totals[n] += pair.weight * float(apart[common].mean())
    return tuple(totals)


def _weighted_term(pairs: Sequence[Pair], similarity: str, reproduce: bool) -> DataTerm:
    """The sum of the data terms of all pairs, each with its weight."""
    terms: list[DataTerm] = []
    for pair in pairs:
        fixed, moving = pair.fixed, pair.moving
        if similarity != "mind":
            kind = LocalCorrelation if similarity == "lncc" else MutualInformation
            terms.append(kind(fixed.values, moving.values, fixed.weight, moving.valid))
        else:
            assert fixed.features is not None
            assert moving.features is not None
            terms.append(DescriptorSSD(fixed.features, moving.features, fixed.weight, moving.valid, reproduce))

    def total(field: torch.Tensor) -> tuple[float, torch.Tensor]:
        value, slope = 0.0, torch.zeros_like(field)
        for pair, term in zip(pairs, terms, strict=True):  # in this order whatever the number of threads
            own, by_field = term(field)
            value += pair.weight * own
            slope += pair.weight * by_field
        return value, slope

    return terms[0] if len(terms) == 1 else total
