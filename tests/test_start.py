"""Where a registration may start: candidate rotations, the best translation of each, and fits to a majority."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scene import bright, inverted, seen, tissue
from scipy.spatial.transform import Rotation
from truth import reordered, signed_permutations, volume

from crossmorph.image import Image
from crossmorph.match.cost import expected_cost
from crossmorph.match.pose import cells, step, trimmed_fit
from crossmorph.match.start import (
    MIN_OVERLAP,
    Start,
    Translations,
    about,
    moment_starts,
    random_starts,
    rotations,
    simple_starts,
    turned_starts,
)
from crossmorph.match.view import View, views
from crossmorph.phantom import make_pair
from crossmorph.space import Grid
from crossmorph.transform import Affine

COARSE = 12_000
GRID = Grid.from_spacing((42, 42, 42), 2.0)


def moved(matrix: np.ndarray, grid: Grid = GRID) -> Image:
    """The scene as the moving image: what lies at x in the scene lies at matrix x in it."""
    back = Affine(np.linalg.inv(matrix))
    return volume(grid, lambda points: inverted(tissue(back(points)))[None], name="moving")


def scene_views(matrix: np.ndarray, grid: Grid = GRID) -> tuple[View, View]:
    return views(seen(GRID, contrast=bright, name="fixed"), moved(matrix, grid), COARSE)


def angle_deg(turn: np.ndarray) -> float:
    return float(np.degrees(Rotation.from_matrix(turn).magnitude()))


# -- rotations ---------------------------------------------------------------------------------------------------


def test_sixty_proper_rotations_that_form_a_group() -> None:
    turns = rotations()
    assert turns.shape == (60, 3, 3)
    np.testing.assert_allclose(
        turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (60, 3, 3)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    products = (turns[:, None] @ turns[None]).reshape(-1, 1, 9)
    nearest = np.abs(products - turns.reshape(1, 60, 9)).max(2).min(1)
    assert nearest.max() < 1e-9


def test_every_rotation_is_within_44_5_degrees_of_one_of_them() -> None:
    anything = Rotation.random(20_000, random_state=1).as_matrix()
    traces = np.einsum("nab,mab->nm", anything, rotations())
    apart = np.degrees(np.arccos(np.clip((traces.max(1) - 1) / 2, -1, 1)))
    assert 43 < apart.max() < 44.6


def test_turned_starts_keep_the_centre_of_mass_and_the_headers_orientation() -> None:
    fixed, moving = scene_views(Affine.from_parts((10, 0, -5), (0, 0, 30)).matrix)
    header = Affine.from_parts((100, 0, 0), (10, 0, 0)).matrix
    starts = turned_starts(fixed, moving, header)
    assert len({start.name for start in starts}) == 60
    middles = [view.points().mean(0) for view in (fixed, moving)]
    for start, turn in zip(starts, rotations(), strict=True):
        np.testing.assert_allclose((start.matrix @ np.append(middles[0], 1))[:3], middles[1])
        np.testing.assert_allclose(start.matrix[:3, :3], header[:3, :3] @ turn)


# -- simple, moment and random starts ----------------------------------------------------------------------------


def test_simple_starts_put_centre_on_centre() -> None:
    shift = np.array([400.0, -300, 200])
    fixed, moving = scene_views(Affine.translation(shift).matrix, Grid.from_spacing((42, 42, 42), 2.0, shift))
    header, mass, box = simple_starts(fixed, moving, np.eye(4))
    np.testing.assert_array_equal(header.matrix, np.eye(4))
    for start in (mass, box):
        np.testing.assert_allclose(start.matrix[:3, :3], np.eye(3))
        np.testing.assert_allclose(start.matrix[:3, 3], shift, atol=2 * fixed.grid.spacing[0])


def ellipsoid(matrix: np.ndarray, grid: Grid) -> Image:
    """Half axes of 34, 24 and 15 mm, with a knob that tells one end of each from the other."""
    back = Affine(np.linalg.inv(matrix))

    def values(points: torch.Tensor) -> torch.Tensor:
        places = back(points)
        body = (places / torch.tensor([34.0, 24, 15])).norm(dim=-1)
        knob = (places - torch.tensor([18.0, 12, 6])).norm(dim=-1)
        return (torch.sigmoid((1 - body) / 0.05) + 0.2 * torch.sigmoid(6 - knob))[None]

    return volume(grid, values)


@pytest.mark.parametrize("order", signed_permutations()[::11])
def test_one_of_the_moments_is_right_and_none_is_a_mirror_image(order: tuple) -> None:
    truth = Affine.from_parts((5, -8, 3), (50, -70, 120)).matrix
    big = Grid.from_spacing((50, 50, 50), 2.0)
    moving = reordered(ellipsoid(truth, big), order)
    starts = moment_starts(*views(ellipsoid(np.eye(4), big), moving, COARSE))
    for start in starts:
        assert np.linalg.det(start.matrix[:3, :3]) == pytest.approx(1)
        np.testing.assert_allclose(start.matrix[:3, :3] @ start.matrix[:3, :3].T, np.eye(3), atol=1e-9)
    assert min(angle_deg(start.matrix[:3, :3] @ truth[:3, :3].T) for start in starts) < 8


def test_random_starts_are_reproducible_and_within_limits() -> None:
    fixed, _ = scene_views(np.eye(4))
    header = Affine.from_parts((30, 0, 0), (0, 20, 0)).matrix
    one, again, other = (random_starts(fixed, header, 200, 25, 60, seed) for seed in (3, 3, 4))
    assert all((a.matrix == b.matrix).all() for a, b in zip(one, again, strict=True))
    assert not (one[0].matrix == other[0].matrix).all()
    assert [start.name for start in one[:2]] == ["random 0", "random 1"]
    middle = np.append(fixed.points().mean(0), 1)
    own = [np.linalg.inv(header) @ start.matrix for start in one]
    shifts = np.array([(matrix @ middle - middle)[:3] for matrix in own])
    angles = np.array([Rotation.from_matrix(matrix[:3, :3]).as_euler("xyz", degrees=True) for matrix in own])
    for values, limit in ((shifts, 60), (angles, 25)):
        assert np.abs(values).max() <= limit + 1e-9
        assert np.abs(values).max() > 0.95 * limit
        assert np.abs(values.mean(0)).max() < 0.2 * limit


# -- translations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [(30.0, -18.0, 8.0), (-90.0, 70.0, 55.0)])
def test_the_best_translation_is_the_known_one(shift: tuple[float, float, float]) -> None:
    """To half a cell, from a header that is far off."""
    fixed, moving = scene_views(Affine.translation(shift).matrix, Grid.from_spacing((42, 42, 42), 2.0, shift))
    cost, start = Translations(fixed, cells(fixed), moving).best(Start("x", np.eye(4)))
    np.testing.assert_array_equal(start.matrix[:3, :3], np.eye(3))
    np.testing.assert_allclose(start.matrix[:3, 3], shift, atol=1.01 * fixed.grid.spacing[0])
    assert cost < 0.6
    turned = about(Rotation.from_euler("z", 180, degrees=True).as_matrix(), np.zeros(3), np.zeros(3))
    assert Translations(fixed, cells(fixed), moving).best(Start("y", turned))[0] > cost + 0.1


def test_costs_are_those_of_their_definition() -> None:
    """The mean of |f - m|^2 over the fixed body, or of what unrelated descriptors cost where m is unknown."""
    fixed, moving = scene_views(Affine.translation((10.0, -6.0, 8.0)).matrix)
    target = cells(fixed)
    cost, start = Translations(fixed, target, moving).best(Start("x", np.eye(4)))
    source = cells(moving.seen(fixed.grid, start.matrix))
    counted = target.body & target.valid
    apart = (target.features - source.features).square().sum(0)
    unknown = expected_cost(target.features, source.features, target.valid, source.valid)
    mean = float(torch.where(source.valid, apart, unknown)[counted].mean())
    assert cost == pytest.approx(mean / unknown, rel=0.03)


def test_too_small_an_overlap_is_never_chosen() -> None:
    """Bright junk at one end of the moving image: whatever is cheapest, a fifth of the smaller body is seen."""
    for seed in range(3):
        noise = torch.rand((1, *GRID.shape), generator=torch.manual_seed(seed))
        fixed, moving = views(seen(GRID), Image(noise, GRID, torch.ones(GRID.shape, dtype=torch.bool)), COARSE)
        target = cells(fixed)
        cost, start = Translations(fixed, target, moving).best(Start("x", np.eye(4)))
        assert np.isfinite(cost)
        source = cells(moving.seen(fixed.grid, start.matrix))
        weight = target.body & target.valid
        assert int((weight & source.valid).sum()) > 0.9 * MIN_OVERLAP * min(
            int(weight.sum()), int(source.body.sum())
        )


# -- steps -------------------------------------------------------------------------------------------------------


def test_a_step_goes_towards_the_truth() -> None:
    truth = Affine.from_parts((6, -4, 5), (8, -6, 10)).matrix
    fixed, moving = scene_views(truth)
    found = step(fixed, cells(fixed), moving, np.eye(4))
    assert found is not None
    assert angle_deg(found.matrix[:3, :3] @ truth[:3, :3].T) < 0.75 * angle_deg(truth[:3, :3])
    np.testing.assert_allclose(found.matrix[:3, 3], truth[:3, 3], atol=1.5)
    still = step(fixed, cells(fixed), moving, truth)
    assert still is not None
    assert angle_deg(still.matrix[:3, :3] @ truth[:3, :3].T) < 2
    assert step(fixed, cells(fixed), moving, Affine.translation((500, 0, 0)).matrix) is None


def test_agreement_tells_right_from_wrong() -> None:
    """On a body with a shape; a ball seen coarsely agrees with itself however it is turned."""
    known = make_pair((64, 54, 48), 4.5)
    fixed, moving = views(known.fixed, known.moving, COARSE)
    middle = fixed.points().mean(0)
    found = []
    for degrees in (0, 90, 180):
        turn = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
        moved = step(fixed, cells(fixed), moving, about(turn, middle, middle))
        found.append(0.0 if moved is None else moved.agreement)
    assert found[0] > 0.6
    assert max(found[1:]) < 0.4


# -- fits to a majority ------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from(["rigid", "affine"]))
def test_three_in_ten_outliers_do_not_matter(seed: int, model: str) -> None:
    rng = np.random.default_rng(seed)
    truth = np.eye(4)
    truth[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    if model == "affine":
        truth[:3, :3] += rng.uniform(-0.2, 0.2, (3, 3))
    truth[:3, 3] = rng.uniform(-50, 50, 3)
    places = rng.uniform(-40, 40, (400, 3))
    target = places @ truth[:3, :3].T + truth[:3, 3]
    target[:120] += rng.normal(0, 15, (120, 3))
    found = trimmed_fit(places, target, model)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, truth, atol=1e-6)


@given(st.integers(0, 1000))
def test_a_rigid_fit_is_never_a_mirror_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(50, 3)) * (30, 20, 10)
    found = trimmed_fit(places, places * (-1, 1, 1) + rng.normal(0, 0.1, (50, 3)), "rigid")
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(found[:3, :3]) == pytest.approx(1)
