"""Numerical inverses against closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import Warp, random_affine, reordered, signed_permutations, tilted_grid, world

from crossmorph.space import Grid
from crossmorph.transform import (
    Chain,
    DisplacementField,
    covering_grid,
    folding,
    invert_field,
    jacobian_determinant,
)
from crossmorph.transform.inverse import _solve, _solved

GRID = tilted_grid((24, 22, 26), (2.5, 3, 2.5), center=(0, 0, 0))


def inner(grid: Grid, share: float = 0.6) -> torch.Tensor:
    """(I, J, K) bool: the middle of a grid."""
    voxels = torch.from_numpy(np.stack(np.indices(grid.shape), -1) / (np.array(grid.shape) - 1) - 0.5)
    return (voxels.abs() < share / 2).all(-1)


def test_inverse_agrees_with_the_closed_form() -> None:
    warp = Warp(a=8, b=6)
    result = invert_field(warp.field(GRID))
    points = world(GRID)
    found = points + result.field.field.movedim(0, -1)
    middle = inner(GRID)
    assert result.covered[middle].all()
    gap = (found - warp.inverse(points)).norm(dim=-1)[middle]
    assert float(gap.max()) < 0.25  # linear interpolation of the forward field at 3 mm
    assert float(result.residual_mm[result.covered].max()) <= 0.0101
    assert (result.field.fixed, result.field.moving) == ("moving", "fixed")


@settings(max_examples=15)
@given(st.floats(0, 9), st.floats(0, 9), st.floats(0.02, 0.12), st.tuples(*[st.floats(-180, 180)] * 3))
def test_inverse_after_forward_is_the_identity(a: float, b: float, k: float, turn: tuple) -> None:
    forward = Warp(a, b, k, rotation_deg=turn).field(tilted_grid((14, 14, 14), (4, 4, 4), center=(0, 0, 0)))
    assert float(forward.inversion.residual_mm[forward.inversion.covered].max()) <= 0.0101
    points = world(forward.grid)
    back = forward.inverse()(forward(points))
    gap = (back - points).norm(dim=-1)[inner(forward.grid)]
    assert float(gap.max()) < 0.8  # the inverse is linear between voxels 4 mm apart, waves some 50 mm long


def test_residual_is_the_distance_after_a_round_trip() -> None:
    forward = Warp(a=8, b=6).field(GRID)
    result = invert_field(forward, max_iterations=1)
    points = world(GRID)
    gap = (forward(result.field(points)) - points).norm(dim=-1)
    np.testing.assert_allclose(result.residual_mm, gap, atol=1e-4)
    assert float(result.residual_mm[result.covered].max()) > 0.02


def test_large_gradients_need_no_contraction() -> None:
    """sinh stretches by up to 1.8 along one axis, so u's slope is near 1 and plain fixed points would crawl."""
    grid = tilted_grid((20, 20, 20), (4, 4, 4), center=(0, 0, 0))
    warp = Warp(a=15, b=15, k=0.06, s=30)
    forward = warp.field(grid)
    result = invert_field(forward)
    assert float(result.residual_mm[result.covered].max()) <= 0.0101


def test_folded_places_are_solved_as_well_as_can_be() -> None:
    grid = Grid.from_spacing((40, 40, 40), 1.5)
    field = torch.zeros(3, *grid.shape)
    field[0] = -6 * torch.sin(0.3 * world(grid)[..., 0])
    forward = DisplacementField(field, grid)
    assert folding(jacobian_determinant(forward, grid)) > 0.1
    result = invert_field(forward)
    assert result.field.field.isfinite().all()
    first_guess = invert_field(forward, max_iterations=0)
    assert (result.residual_mm <= first_guess.residual_mm + 1e-5)[result.covered & first_guess.covered].all()
    residual = result.residual_mm[result.covered]
    assert float((residual > 0.0101).float().mean()) < 0.05
    assert float(residual.max()) < 1.5


def test_what_the_field_never_reaches_is_not_covered() -> None:
    grid = Grid.from_spacing((20, 20, 20), 1.0)
    field = torch.zeros(3, *grid.shape)
    field[0] = 5
    result = invert_field(DisplacementField(field, grid))
    assert not result.covered[:5].any()
    assert result.covered[5:].all()
    np.testing.assert_allclose(result.residual_mm[5:], 0, atol=1e-5)
    np.testing.assert_allclose(result.residual_mm[:4], 5, atol=1e-5)


def test_covering_grid_holds_every_image_point() -> None:
    forward = Warp(a=12, b=9).field(GRID)
    grid = covering_grid(forward)
    assert grid.contains(forward(world(GRID)).numpy()).all()
    still = DisplacementField(torch.zeros(3, *GRID.shape), GRID)
    assert covering_grid(still).same_as(GRID)
    far = DisplacementField(torch.full((3, *GRID.shape), 1e6), GRID)
    assert all(a <= 3 * b for a, b in zip(covering_grid(far).shape, GRID.shape, strict=True))


def test_inverse_on_another_grid() -> None:
    forward = Warp().field(GRID)
    other = tilted_grid((10, 9, 8), (3, 3, 3), (0, 40, 0), center=(0, 0, 0))
    result = invert_field(forward, other)
    assert result.field.grid is other
    found = world(other) + result.field.field.movedim(0, -1)
    np.testing.assert_allclose(found, Warp().inverse(world(other)), atol=0.15)


def test_size_does_not_matter() -> None:
    """Micrometres are inverted as well as millimetres: the tolerance follows the voxels."""
    tiny = Grid(GRID.shape, np.diag([1e-6, 1e-6, 1e-6, 1.0]) @ GRID.affine)
    field = Warp(a=8, b=6).field(GRID).field
    large = invert_field(DisplacementField(field, GRID))
    small = invert_field(DisplacementField(field * 1e-6, tiny))
    gap = (small.field.field * 1e6 - large.field.field).norm(dim=0)
    assert float(gap[large.covered].max()) < 0.05
    assert float(small.residual_mm[small.covered].max()) <= 2.6e-8


@pytest.mark.parametrize("order", signed_permutations()[::5])
def test_axis_order_does_not_matter(order: tuple) -> None:
    small = tilted_grid((9, 10, 11), (5, 5, 5), center=(0, 0, 0))
    forward = Warp().field(small)
    expected = reordered(invert_field(forward, tolerance_mm=1e-6).field, order)
    found = invert_field(reordered(forward, order), tolerance_mm=1e-6).field
    np.testing.assert_allclose(found.field, expected.field, atol=1e-4)


def test_chain_with_a_field_inverts() -> None:
    chain = Chain((Warp().field(GRID), random_affine(np.random.default_rng(2))))
    points = world(GRID)[inner(GRID)]
    np.testing.assert_allclose(chain.inverse()(chain(points)), points, atol=0.25)
    assert chain.transforms[0].inverse() is chain.transforms[0].inverse()


@pytest.mark.parametrize("size", [4.0, 40.0])  # the second one folds
def test_compiled_and_torch_solutions_agree(size: float) -> None:
    forward = Warp(a=size, b=6).field(GRID)
    targets = world(GRID)[::2, ::2, ::2].reshape(-1, 3)
    one, other = (solve(forward, targets, 1e-4, 40) for solve in (_solved, _solve))
    gaps = [(forward(x) - targets).norm(dim=1) for x in (one, other)]
    solved = [gap < 1e-3 for gap in gaps]
    assert torch.equal(solved[0], solved[1])
    if size == 4:
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_result_does_not_depend_on_threads() -> None:
    forward, before = Warp(a=8, b=6).field(GRID), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = invert_field(forward)
        torch.set_num_threads(3)
        three = invert_field(forward)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.field.field, three.field.field)
    assert torch.equal(one.residual_mm, three.residual_mm)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    forward = Warp().field(GRID)
    cpu, gpu = invert_field(forward), invert_field(forward.to("cuda"))
    np.testing.assert_allclose(cpu.field.field, gpu.field.field.cpu(), atol=0.01)
    assert torch.equal(cpu.covered, gpu.covered.cpu())
