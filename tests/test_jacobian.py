"""Jacobian determinants against closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from truth import Warp, grids, random_affine, reordered, reordered_tensor, signed_permutations, tilted_grid, world

from crossmorph.errors import InputError
from crossmorph.space import Grid
from crossmorph.transform import (
    Affine,
    Chain,
    DisplacementField,
    displacement_determinant,
    folding,
    jacobian,
    jacobian_determinant,
    sdlogj,
)

GRID = tilted_grid((24, 22, 26), (2.5, 3, 2.5), shear=0.1, center=(0, 0, 0))


@given(grids(smallest=2), st.integers(0, 2**32 - 1))
def test_affine_determinant_is_constant(grid: Grid, seed: int) -> None:
    affine = random_affine(np.random.default_rng(seed), 2)
    expected = np.linalg.det(affine.matrix)
    np.testing.assert_allclose(jacobian_determinant(affine, grid), expected, atol=5e-3)


def test_expansion_is_above_one() -> None:
    grid = Grid.from_spacing((5, 5, 5), 2.0)
    grown = Affine(np.diag([2.0, 1.0, 1.5, 1.0]))
    np.testing.assert_allclose(jacobian_determinant(grown, grid), 3, atol=1e-5)
    np.testing.assert_allclose(jacobian_determinant(grown.inverse(), grid), 1 / 3, atol=1e-5)


def test_field_agrees_with_the_closed_form_and_chains_multiply() -> None:
    warp, affine = Warp(), random_affine(np.random.default_rng(1))
    truth = warp.determinant(world(GRID)).numpy()
    field = warp.field(GRID)
    own = jacobian_determinant(field, GRID).numpy()
    middle = (slice(1, -1),) * 3
    np.testing.assert_allclose(own[middle], truth[middle], atol=0.02)
    np.testing.assert_allclose(own, truth, atol=0.25)
    chained = jacobian_determinant(Chain((field, affine)), GRID)
    np.testing.assert_allclose(chained, own * np.linalg.det(affine.matrix), atol=1e-3)


def test_a_field_sampled_elsewhere() -> None:
    field = Warp().field(GRID)
    other = tilted_grid((9, 8, 7), (3, 3, 3), (0, 10, 70), center=(0, 0, 0))
    np.testing.assert_allclose(jacobian_determinant(field, other), Warp().determinant(world(other)), atol=0.12)


@pytest.mark.parametrize("order", signed_permutations())
def test_axis_order_does_not_matter(order: tuple) -> None:
    field = Warp().field(tilted_grid((7, 8, 9), (5, 6, 4), shear=0.2))
    expected = reordered_tensor(jacobian_determinant(field, field.grid), order)
    turned = reordered(field, order)
    np.testing.assert_allclose(jacobian_determinant(turned, turned.grid), expected, atol=1e-5)


def test_slabs_make_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Warp().field(GRID)
    whole = jacobian_determinant(field, GRID)
    monkeypatch.setattr(jacobian, "SLAB", 5 * 22 * 26)
    assert torch.equal(jacobian_determinant(field, GRID), whole)


def test_determinant_is_differentiable() -> None:
    grid = tilted_grid((3, 4, 3))
    field = torch.randn(3, *grid.shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda u: displacement_determinant(u, grid), (field,))


def test_folding_counts_what_is_turned_over() -> None:
    grid = Grid.from_spacing((8, 8, 8))
    mirrored = jacobian_determinant(Affine(np.diag([-1.0, 1.0, 1.0, 1.0])), grid)
    assert folding(mirrored) == 1
    assert folding(jacobian_determinant(Affine.identity(), grid)) == 0
    determinant = torch.ones(8, 8, 8)
    determinant[0] = 0
    assert folding(determinant) == 1 / 8
    mask = torch.zeros(8, 8, 8, dtype=torch.bool)
    mask[:2] = True
    assert folding(determinant, mask) == 1 / 2


def test_sdlogj_is_the_spread_of_log_volume() -> None:
    assert sdlogj(torch.full((4, 4, 4), 2.0)) == 0
    halves = torch.tensor([1.0, float(np.exp(2))])
    assert sdlogj(halves) == pytest.approx(1)
    assert sdlogj(halves, torch.tensor([True, False])) == 0
    assert np.isfinite(sdlogj(torch.tensor([-1.0, 0.0, 1.0])))


def test_impossible_questions_are_refused() -> None:
    flat = Grid((4, 4, 1), np.eye(4))
    with pytest.raises(InputError, match="two voxels"):
        jacobian_determinant(DisplacementField(torch.zeros(3, 4, 4, 1), flat), flat)
    with pytest.raises(InputError, match="no voxel"):
        folding(torch.ones(2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.bool))
