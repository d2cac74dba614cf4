"""What is done to images before they are registered."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scene import GRID, seen, tissue
from truth import (
    Order,
    grids,
    reordered,
    reordered_grid,
    reordered_tensor,
    signed_permutations,
    tilted_grid,
    volume,
    waves,
    world,
)

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.phantom import ORGANS, make_pair
from crossmorph.preprocess import (
    MAX_OVERSAMPLING,
    MAX_WORKING_VOXELS,
    check_registrable,
    fill_invalid,
    foreground,
    masked,
    normalised,
    onto,
    working_grid,
)
from crossmorph.resample import downsample
from crossmorph.space import Grid
from crossmorph.transform import Affine

# -- is there anything to register -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((5, 5, 5), 7.0), "is constant: every valid voxel is 7"),
        (np.full((5, 5, 5), np.nan), "has no valid voxel"),
        (np.arange(25.0).reshape(5, 5, 1), r"is 2-D: its shape is \(5, 5, 1\)"),
        (np.arange(27.0).reshape(3, 3, 3), "has only 27 valid voxels; at least 64"),
        (np.where(np.arange(125) < 70, 3.0, np.nan).reshape(5, 5, 5), "is constant"),
    ],
)
def test_what_cannot_be_registered_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_registrable(Image.from_array(values, np.eye(4), name="odd"))


def test_a_thin_slab_is_fine() -> None:
    check_registrable(Image.from_array(np.arange(128.0).reshape(8, 8, 2), np.eye(4)))


# -- masks -------------------------------------------------------------------------------------------------------


def test_a_mask_on_another_grid_chooses_by_world_position() -> None:
    image = seen()
    other = tilted_grid((50, 40, 60), (1.5, 2.0, 1.0), center=(0, 0, 0))
    chosen = masked(image, Labels((world(other)[..., 0] > 1).int(), other))
    x = world(image.grid)
    inside = torch.from_numpy(other.contains(x.numpy()))
    sure = (x[..., 0] - 1).abs() > 2  # a mask voxel is up to 2 mm wide
    assert torch.equal(chosen.valid[sure & inside], (x[..., 0] > 1)[sure & inside])
    assert not chosen.valid[~inside].any()
    assert torch.equal(chosen.data, image.data)
    assert chosen.notes == ("only voxels inside mask count",)


def test_a_mask_may_be_an_image_and_keeps_what_was_invalid() -> None:
    image = seen()
    image = image.restricted(torch.arange(40)[:, None, None].expand(image.grid.shape) > 9)
    mask = Image.from_array(
        np.where(np.arange(40) < 20, 0.5, 0)[:, None, None] * np.ones((40, 36, 32)), image.grid
    )
    assert masked(image, mask).valid[:, 0, 0].nonzero()[:, 0].tolist() == list(range(10, 20))


def test_masks_that_choose_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="the fixed mask is empty"):
        masked(seen(), Labels(torch.zeros(GRID.shape, dtype=torch.int32), GRID), "the fixed mask")
    far = Grid.from_spacing((5, 5, 5), 2.0, (300, 0, 0))
    with pytest.raises(InputError, match=r"\(125 voxels, 1000 mm\^3\) does not meet image"):
        masked(seen(), Labels(torch.ones(far.shape, dtype=torch.int32), far))


# -- the working grid --------------------------------------------------------------------------------------------


@given(grids(2, 9), grids(2, 9), st.sampled_from([1, 2, 12]))
def test_the_working_grid_is_isotropic_and_covers_the_fixed_view(fixed: Grid, moving: Grid, multiple: int) -> None:
    grid = working_grid([(fixed, moving)], 0, multiple)
    expected = grid.spacing[0]
    finest = max(fixed.spacing.min(), moving.spacing.min())
    assert finest / MAX_OVERSAMPLING - 1e-9 <= expected <= finest + 1e-9
    np.testing.assert_allclose(grid.spacing, expected, rtol=1e-9)
    assert all(n % multiple == 0 for n in grid.shape)
    edge = grid.to_voxel(fixed.corners())
    assert (edge >= -0.5 - 1e-6).all()
    assert (edge <= np.array(grid.shape) - 0.5 + 1e-6).all()
    assert (np.array(grid.shape) * grid.spacing < fixed.extent_mm + (multiple + 1) * expected).all()
    np.testing.assert_allclose(grid.direction, fixed.direction, atol=1e-9)


def test_the_working_grid_follows_the_setting_and_stops_at_8_million_voxels() -> None:
    fixed = Grid.from_spacing((512, 512, 400), (0.5, 0.5, 1.0))
    assert working_grid([(fixed, fixed)], 4.0, 1).shape == (64, 64, 100)
    grid = working_grid([(fixed, fixed)], 0, 1)
    assert 0.9 * MAX_WORKING_VOXELS < np.prod(grid.shape) < 1.05 * MAX_WORKING_VOXELS


def test_the_finest_of_several_moving_images_counts() -> None:
    """240 mm wide: 1.5 million voxels are reached at 2 mm without going finer than both images."""
    fixed, fine, coarse = (Grid.from_spacing((n, n, n), 240 / n) for n in (240, 120, 40))
    assert working_grid([(fixed, coarse), (fixed, fine)], 0, 1).spacing[0] == pytest.approx(2)
    assert working_grid([(fixed, coarse)], 0, 1).spacing[0] == pytest.approx(6 / MAX_OVERSAMPLING)


# -- drawing on the working grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(0, 0, 0), (3, -2, 0), (-4, 5, 6)])
@pytest.mark.parametrize("after", [(0, 0, 0), (2, 7, -5)])
def test_a_shared_lattice_is_copied_as_resampling_would(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    image = volume(tilted_grid())
    image = image.restricted(torch.rand(image.grid.shape, generator=torch.manual_seed(0)) > 0.1)
    grid = image.grid.padded(before, after)
    copied, sampled = onto(image, grid), downsample(image, grid)
    assert torch.equal(copied.valid, sampled.valid)
    torch.testing.assert_close(copied.data[0][copied.valid], sampled.data[0][sampled.valid], atol=1e-4, rtol=0)


def test_half_a_voxel_apart_is_not_the_same_lattice() -> None:
    image = volume(GRID, waves)
    half = Grid(GRID.shape, GRID.affine @ Affine.translation((0.5, 0, 0)).matrix)
    drawn = onto(image, half)
    torch.testing.assert_close(drawn.data[:, :-1], waves(world(half)).float()[:, :-1], atol=0.03, rtol=0)
    assert (drawn.data - image.data).abs().max() > 0.1


@pytest.mark.parametrize("order", signed_permutations()[::7])
def test_storage_order_does_not_matter(order: Order) -> None:
    image = volume(tilted_grid((14, 15, 16)), waves)
    target = Grid.from_spacing((12, 12, 12), 1.2, image.grid.center)
    drawn = onto(image, target)
    assert drawn.valid.all()
    torch.testing.assert_close(onto(reordered(image, order), target).data, drawn.data, atol=1e-5, rtol=0)
    other = onto(image, reordered_grid(target, order))
    torch.testing.assert_close(other.data, reordered_tensor(drawn.data, order), atol=1e-5, rtol=0)


def test_the_start_is_applied() -> None:
    start = Affine.from_parts((4, -3, 2), (5, -8, 3))
    moving = volume(Grid.from_spacing((60, 60, 60), 1.5), waves)
    target = Grid.from_spacing((20, 20, 20), 2.0)
    expected = waves(start(world(target))).float()
    torch.testing.assert_close(onto(moving, target, start).data, expected, atol=0.04, rtol=0)


def test_drawing_on_a_coarser_grid_averages() -> None:
    """Noise of one voxel is gone on a grid four times as coarse, and invalid voxels have no part in it."""
    rng = np.random.default_rng(0)
    noise = Image.from_array(5 + rng.standard_normal((48, 48, 48)), np.eye(4))
    assert float(onto(noise, noise.grid.pooled(4)).data.std()) < 0.25
    spoilt = replace(noise, data=torch.where(torch.rand(48, 48, 48) > 0.3, noise.data, 1e4))
    drawn = onto(spoilt.restricted(spoilt.data[0] < 1e3), noise.grid.pooled(4))
    assert float(drawn.data.max()) < 8


# -- values where nothing was measured ---------------------------------------------------------------------------


def test_invalid_voxels_take_values_from_nearby() -> None:
    grid = Grid.from_spacing((30, 20, 20), 1.0)
    values = world(grid)[..., 0].float()
    valid = values.abs() < 8
    filled = fill_invalid(torch.where(valid, values, 1e6), valid)
    assert torch.equal(filled[valid], values[valid])
    torch.testing.assert_close(filled[~valid], values[~valid].clamp(-7.5, 7.5), atol=1.01, rtol=0)


def test_nothing_to_fill_and_nothing_to_fill_from() -> None:
    values, everywhere = torch.rand(4, 5, 6), torch.ones(4, 5, 6, dtype=torch.bool)
    assert fill_invalid(values, everywhere) is values
    assert fill_invalid(values, ~everywhere) is values


def test_one_hole_in_a_constant_is_closed() -> None:
    values = torch.full((7, 7, 7), 3.0)
    values[2, 3, 4] = torch.nan
    valid = torch.isfinite(values)
    assert (fill_invalid(torch.nan_to_num(values), valid) == 3).all()


# -- where the body is -------------------------------------------------------------------------------------------


def test_the_body_of_a_ct_and_an_mr_is_found() -> None:
    """Lungs are left out: dark in MR, and cut open by the field of view, they may count as background there."""
    pair = make_pair((64, 54, 48), 4.5)
    lungs = next(label for label, name in ORGANS.items() if name == "lungs")
    for image, labels in ((pair.fixed, pair.fixed_labels), (pair.moving, pair.moving_labels)):
        body = foreground(image)
        assert body[(labels.data > 0) & (labels.data != lungs)].all()
        corner = np.linalg.norm(image.grid.to_world(np.indices(image.grid.shape).T.astype(float)).T[:2], axis=0)
        assert not body[torch.from_numpy(corner > 190)].any()
        assert 0.3 < float(body.float().mean()) < 0.95


def test_without_background_everything_counts() -> None:
    assert foreground(volume(GRID, waves)).all()


def test_the_body_is_inside_the_valid_part() -> None:
    half = seen().restricted(torch.arange(40)[:, None, None].expand(GRID.shape) < 20)
    body = foreground(half)
    assert body[(tissue(world(GRID)) > 0.4) & half.valid].all()
    assert not body[~half.valid].any()


def test_the_kind_of_background_does_not_matter() -> None:
    """Dark, bright or beyond the field of view: the same body."""
    image = seen()
    body = foreground(image)
    assert body[tissue(world(GRID)) > 0.4].all()
    assert not body[world(GRID).norm(dim=-1) > 34 + 8 + 8].any()
    negative = replace(image, data=-image.data)
    assert torch.equal(foreground(negative), body)


def test_a_real_brain_and_a_real_head(data_dir: Path) -> None:
    brain = io.read(data_dir / "ms_mni" / "p07_T1.nii.gz")
    body = foreground(brain)
    assert body[brain.data[0] > 0.2 * float(brain.data.max())].all()
    assert float(body.float().mean()) < 0.6
    ct = io.read(data_dir / "ct_mr" / "totalseg_ct.nii.gz")
    organs = io.read_labels(data_dir / "ct_mr" / "totalseg_ct_labels.nii.gz")
    assert float(foreground(ct)[organs.data > 0].float().mean()) > 0.99


# -- values ------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 100), st.floats(-1000, 1000))
def test_normalising_undoes_any_gain_and_offset(gain: float, offset: float) -> None:
    values = torch.rand(8, 9, 10, generator=torch.manual_seed(1), dtype=torch.float64)
    valid = values < 0.9
    once = normalised(values, valid)
    torch.testing.assert_close(normalised(values * gain + offset, valid), once, atol=1e-4, rtol=0)
    inside = once[valid]
    assert float(torch.quantile(inside, 0.01)) == pytest.approx(0, abs=1e-5)
    assert float(torch.quantile(inside, 0.99)) == pytest.approx(1, abs=1e-5)


def test_invalid_values_do_not_set_the_range() -> None:
    values = torch.rand(8, 8, 8)
    valid = torch.ones(8, 8, 8, dtype=torch.bool)
    valid[0] = False
    spoilt = torch.where(valid, values, 1e9)
    torch.testing.assert_close(normalised(spoilt, valid)[valid], normalised(values, valid)[valid])
