"""``reproduce=True`` against a plain transcription of the released MCBO and ConvexAdam."""

from dataclasses import replace

import plain_mcbo as plain
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.describe.mind import mind_ssc
from crossmorph.match import convex
from crossmorph.match.convex import coupled_convex
from crossmorph.optimise.field import refine, resize
from crossmorph.optimise.terms import DescriptorSSD
from crossmorph.record import Journal
from crossmorph.settings import Mcbo, Refinement, load_settings
from crossmorph.systems.mcbo import mcbo, search
from crossmorph.systems.volume import Pair, Volume

EVEN, ODD = (24, 20, 28), (13, 17, 15)
ADAM = Refinement(level=2, iterations=15, smoothness=1.25, learning_rate=1.0, fold_weight=0.0)


def texture(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
    return F.avg_pool3d(values, 3, 1, 1)[0] + 0.2 * values[0]


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A texture, and the same shifted with other noise: there is something to find at every level."""
    fixed = texture(shape, 0)
    return fixed, fixed.roll((2, -1, 1), (0, 1, 2)) + 0.1 * texture(shape, 1)


def everywhere(values: torch.Tensor) -> Volume:
    seen = torch.ones_like(values, dtype=torch.bool)
    return Volume(values, seen, seen, mind_ssc(values))


def published(levels: dict[int, float], smoothing: int = 5) -> Mcbo:
    """Settings that reproduce, with a small search to save time."""
    return Mcbo(
        levels=tuple(levels),
        weights=tuple(levels.values()),
        half_width=2,
        fusion="signed",
        refine=(ADAM,),
        smoothing=smoothing,
        reproduce=True,
    )


def ours(fixed: torch.Tensor, movings: list[torch.Tensor], settings: Mcbo) -> torch.Tensor:
    target = everywhere(fixed)
    return mcbo([Pair(target, everywhere(moving)) for moving in movings], settings, Journal())


def same(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-4) -> None:
    """Equal, and worth comparing."""
    assert other.abs().max() > 0.3
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def alike(one: torch.Tensor, other: torch.Tensor, mean: float = 2e-3) -> None:
    """Equal but for what many steps of Adam make of rounding: it takes full steps however small the gradient."""
    assert other.abs().max() > 0.3
    assert (one - other).abs().mean() < mean
    assert (one - other).abs().max() < 50 * mean


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("shape", [EVEN, ODD])
def test_search_of_one_grid(shape: tuple[int, int, int], balanced: bool) -> None:
    fixed, moving = (F.avg_pool3d(plain.mind(image), 2) for image in pair(shape))
    field = coupled_convex(fixed, moving, 2, None, balanced, reproduce=True)
    same(field, plain.convex(fixed, moving, 2, balanced), atol=1e-5)


def test_equal_costs_take_the_first_displacement_as_released() -> None:
    """A flat background, as in most scans: every displacement inside it costs nothing."""
    image = torch.zeros(EVEN)
    image[8:16, 6:14, 10:18] = texture((8, 8, 8), 0)
    fixed = F.avg_pool3d(plain.mind(image), 2)
    cost = plain.costs(fixed, fixed, 2)
    assert ((cost == cost.amin(0)).sum(0) > 1).float().mean() > 0.1
    kept = plain.displacements(2)[cost.argmin(0)].permute(3, 0, 1, 2)
    volume = cost.permute(1, 2, 3, 0).contiguous()
    assert torch.equal(convex._picker(volume, 0.0, 2)[0], kept)


@pytest.mark.parametrize(("shape", "level"), [(EVEN, 2), (EVEN, 4), (ODD, 2), (ODD, 3)])
def test_one_level(shape: tuple[int, int, int], level: int) -> None:
    """Level 3 of 13 voxels pools 12: the last is dropped and the field is stretched over the volume."""
    fixed, moving = pair(shape)
    field = search([Pair(everywhere(fixed), everywhere(moving)).pooled(level)], level, published({level: 1.0}))
    expected = plain.coarse_level(plain.mind(fixed), plain.mind(moving), level, 2)
    same(resize(field * level, shape, scaled=False), expected)


@pytest.mark.parametrize("shape", [EVEN, ODD])
def test_octants_without_halo(shape: tuple[int, int, int]) -> None:
    fixed, moving = pair(shape)
    field = search([Pair(everywhere(fixed), everywhere(moving))], 1, published({1: 1.0}))
    same(field, plain.octant_level(plain.mind(fixed), plain.mind(moving), 2))


@pytest.mark.parametrize("shape", [EVEN, ODD])
@pytest.mark.parametrize("iterations", [1, 3, 15])
def test_adam(shape: tuple[int, int, int], iterations: int) -> None:
    fixed, moving = (plain.mind(image) for image in pair(shape))
    start = plain.coarse_level(fixed, moving, 2, 2)
    expected, objectives = plain.adam(fixed, moving, start, iterations, 0)
    small, other = F.avg_pool3d(fixed, 2), F.avg_pool3d(moving, 2)
    size, values = tuple(small.shape[1:]), []
    valid = torch.ones(size, dtype=torch.bool)
    found = refine(
        DescriptorSSD(small, other, valid, valid, reproduce=True),
        resize(start, size, scaled=False) / 2,
        size,
        iterations,
        1.25,
        fold_weight=0.0,
        learning_rate=1.0,
        reproduce=True,
        each=lambda _, value: values.append(value),
    )
    few = iterations <= 3
    assert values == pytest.approx(objectives, rel=1e-5 if few else 2e-3)
    (same if few else alike)(resize(found * 2, shape, scaled=False), expected)


@pytest.mark.parametrize("shape", [EVEN, ODD])
def test_refined_and_smoothed_level_1(shape: tuple[int, int, int]) -> None:
    fixed, moving = pair(shape)
    expected = plain.mcbo(fixed, [moving], {1: 1.0}, 2)
    alike(ours(fixed, [moving], published({1: 1.0})), expected)
    rougher = ours(fixed, [moving], published({1: 1.0}, smoothing=0))
    assert (rougher - expected).abs().mean() > 0.02


def test_weighted_sum_of_levels_with_signed_maximum_of_modalities() -> None:
    fixed, first = pair(EVEN)
    second = -first.roll((-1, 2, 0), (0, 1, 2)) + 0.1 * texture(EVEN, 2)
    weights = {1: 0.10, 2: 0.27, 4: 0.27, 6: 0.36}
    both = ours(fixed, [first, second], published(weights))
    alike(both, plain.mcbo(fixed, [first, second], weights, 2))
    alone = ours(fixed, [first], published(weights))
    assert (both - alone).abs().mean() > 0.1


@pytest.mark.parametrize(("preset", "levels", "steps", "smoothing"), [
    ("remind2reg", {1: 0.10, 2: 0.27, 4: 0.27, 6: 0.36}, 15, 5),
    ("comulis3dclem", {1: 1 / 3, 2: 1 / 3, 4: 1 / 3}, 15, 5),
    ("convexadam", {6: 1.0}, 80, 0),
])  # fmt: skip
def test_presets_are_the_published_settings(
    preset: str, levels: dict[int, float], steps: int, smoothing: int
) -> None:
    """The whole preset; only the reach of the search is cut to 2 cells."""
    fixed, moving = pair(EVEN)
    settings = load_settings("mcbo", preset)
    assert settings.half_width == 4
    found = ours(fixed, [moving], replace(settings, half_width=2))
    expected = plain.mcbo(fixed, [moving], levels, 2, steps, smoothing, balanced=preset != "convexadam")
    alike(found, expected, 2e-3 if steps == 15 else 2e-2)
