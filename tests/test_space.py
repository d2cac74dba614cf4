"""Grids: coordinates, headers, relatives."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from truth import grids, reordered_grid, signed_permutations, tilted_grid, world

from crossmorph.errors import InputError
from crossmorph.space import Grid, gap_mm, inside, map_points, overlap_fraction


@given(grids(), st.integers(0, 2**32 - 1))
def test_voxels_and_world_are_inverse(grid: Grid, seed: int) -> None:
    voxels = np.random.default_rng(seed).uniform(-3, 12, (5, 2, 3))
    np.testing.assert_allclose(grid.to_voxel(grid.to_world(voxels)), voxels, atol=1e-8)
    tensor = torch.from_numpy(voxels)
    np.testing.assert_allclose(grid.to_world(tensor).numpy(), grid.to_world(voxels), atol=1e-9)


def test_world_agrees_with_simpleitk() -> None:
    grid = tilted_grid()
    flip = np.diag([-1.0, -1.0, 1.0])
    image = sitk.Image(*map(int, grid.shape), sitk.sitkUInt8)
    image.SetSpacing(grid.spacing.tolist())
    image.SetOrigin((flip @ grid.origin).tolist())
    image.SetDirection((flip @ grid.direction).ravel().tolist())
    for voxel in ([0, 0, 0], [10, 0, 3], [2.25, 7.5, 8.1]):
        expected = flip @ image.TransformContinuousIndexToPhysicalPoint(voxel)
        np.testing.assert_allclose(grid.to_world(np.array(voxel, float)), expected, atol=1e-9)


@pytest.mark.parametrize("order", signed_permutations())
def test_reordered_axes_are_the_same_place(order: tuple) -> None:
    grid = tilted_grid(shear=0.1)
    other = reordered_grid(grid, order)
    np.testing.assert_allclose(other.center, grid.center, atol=1e-9)
    assert sorted(other.spacing) == pytest.approx(sorted(grid.spacing))
    assert other.voxel_volume == pytest.approx(grid.voxel_volume)
    assert other.obliquity_deg == pytest.approx(grid.obliquity_deg)
    same = lambda corners: np.array(sorted(corners.round(6).tolist()))  # noqa: E731
    np.testing.assert_allclose(same(other.corners()), same(grid.corners()), atol=1e-5)


def test_axcodes_name_the_direction_of_growth() -> None:
    assert Grid((2, 2, 2), np.eye(4)).axcodes == "RAS"
    assert Grid((2, 2, 2), np.diag([-1.0, -1.0, 1.0, 1.0])).axcodes == "LPS"
    codes = {reordered_grid(Grid((2, 3, 4), np.eye(4)), order).axcodes for order in signed_permutations()}
    assert len(codes) == 48


def test_angles() -> None:
    assert tilted_grid(rotation_deg=(0, 0, 12)).obliquity_deg == pytest.approx(12)
    assert tilted_grid().shear_deg == pytest.approx(0, abs=1e-6)
    sheared = tilted_grid(rotation_deg=(0, 0, 0), shear=np.tan(np.radians(10)))
    assert sheared.shear_deg == pytest.approx(10)
    assert "oblique" in repr(tilted_grid())
    assert "sheared" in repr(sheared)


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((2, 2), np.eye(4), "three positive sizes"),
        ((2, 0, 2), np.eye(4), "three positive sizes"),
        ((2, 2, 2), np.eye(3), "4x4"),
        ((2, 2, 2), np.full((4, 4), np.nan), "finite"),
        ((2, 2, 2), np.diag([1.0, 0.0, 1.0, 1.0]), "singular"),
        ((2, 2, 2), np.ones((4, 4)), "singular"),
    ],
)
def test_impossible_grids_are_refused(shape: tuple, affine: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Grid(shape, affine)


def test_tiny_voxels_are_no_singularity() -> None:
    grid = Grid((5, 5, 5), np.diag([4e-6, 4e-6, 5e-6, 1.0]))
    np.testing.assert_allclose(grid.to_voxel(grid.to_world(np.array([1.0, 2.0, 3.0]))), [1, 2, 3])


def test_from_spacing_centres_the_volume() -> None:
    grid = Grid.from_spacing((4, 5, 6), (1, 2, 3), (10, 20, 30))
    np.testing.assert_allclose(grid.center, (10, 20, 30))
    np.testing.assert_allclose(grid.extent_mm, (4, 10, 18))
    np.testing.assert_allclose(grid.corners().min(0), (8, 15, 21))


def test_faces_belong_to_the_field_of_view() -> None:
    grid = tilted_grid()
    assert grid.contains(grid.corners()).all()
    assert grid.contains(world(grid).numpy()).all()
    outwards = grid.center + (grid.corners() - grid.center) * 1.01
    assert not grid.contains(outwards).any()
    voxels = torch.tensor([[-0.5, 0, 0], [-0.51, 0, 0], [10.5, 12.5, 8.5], [0, float("nan"), 0]])
    assert inside(voxels, grid.shape).tolist() == [True, False, True, False]


@given(grids(), st.tuples(*[st.integers(1, 12)] * 3))
def test_resized_keeps_the_field_of_view(grid: Grid, shape: tuple[int, int, int]) -> None:
    other = grid.resized(shape)
    assert other.shape == shape
    np.testing.assert_allclose(other.corners(), grid.corners(), atol=1e-7)


@given(grids(), st.floats(0.5, 8))
def test_respaced_covers_around_the_same_middle(grid: Grid, spacing: float) -> None:
    other = grid.respaced(spacing)
    np.testing.assert_allclose(other.spacing, spacing)
    np.testing.assert_allclose(other.center, grid.center, atol=1e-7)
    assert (other.extent_mm >= grid.extent_mm - 1e-4).all()
    assert (other.extent_mm < grid.extent_mm + spacing * 1.001).all()


@given(grids(smallest=3))
def test_padding_and_cropping_leave_voxels_where_they_are(grid: Grid) -> None:
    other = grid.padded((1, 0, 2), (0, 3, -1))
    assert other.shape == (grid.shape[0] + 1, grid.shape[1] + 3, grid.shape[2] + 1)
    np.testing.assert_allclose(other.to_world(np.array([1.0, 0, 2])), grid.origin, atol=1e-7)
    assert other.padded((-1, 0, -2), (0, -3, 1)).same_as(grid)


def test_pooled_blocks_sit_on_their_voxels() -> None:
    grid = tilted_grid((4, 5, 6))
    pooled = grid.pooled(2)
    assert pooled.shape == (2, 3, 3)
    np.testing.assert_allclose(pooled.origin, grid.to_world(np.full(3, 0.5)))
    np.testing.assert_allclose(pooled.spacing, grid.spacing * 2)


def test_same_as_has_a_tolerance_in_mm() -> None:
    grid = tilted_grid()
    near, far = np.array(grid.affine), np.array(grid.affine)
    near[0, 3] += 5e-4
    far[0, 3] += 5e-3
    assert grid.same_as(Grid(grid.shape, near))
    assert not grid.same_as(Grid(grid.shape, far))
    assert not grid.same_as(grid.padded((0, 0, 0), (0, 0, 1)))
    micrometres = Grid.from_spacing((4, 4, 4), 4e-6)
    assert micrometres.same_as(Grid.from_spacing((4, 4, 4), 4e-6, (1e-8, 0, 0)))
    assert not micrometres.same_as(Grid.from_spacing((4, 4, 4), 4e-6, (2e-6, 0, 0)))


def test_gap_and_overlap() -> None:
    a = Grid.from_spacing((10, 10, 10))
    b = Grid.from_spacing((10, 10, 10), center_mm=(13, 14, 0))
    assert gap_mm(a, b) == pytest.approx(5)
    assert overlap_fraction(a, b) == 0
    back = np.eye(4)
    back[:3, 3] = (-8, -14, 0)
    assert gap_mm(a, b, back) == 0
    half = Grid.from_spacing((10, 10, 10), center_mm=(5, 0, 0))
    assert overlap_fraction(a, half) == pytest.approx(0.5)


def test_map_points_keeps_kind_and_type() -> None:
    matrix = np.diag([2.0, 3.0, 4.0, 1.0])
    for points in (np.ones((2, 3), np.float32), np.ones((2, 3))):
        assert map_points(matrix, points).dtype == points.dtype
    assert map_points(matrix, torch.ones(4, 5, 3)).shape == (4, 5, 3)
    np.testing.assert_array_equal(map_points(matrix, torch.ones(3)).numpy(), [2, 3, 4])


def test_compiled_and_plain_points_agree() -> None:
    matrix = tilted_grid((3, 3, 3), (1, 2, 3), rotation_deg=(10, 20, 30)).affine
    points = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(map_points(matrix, points), map_points(matrix, points.numpy()), rtol=1e-13)


def test_no_points_are_mapped_to_no_points() -> None:
    for none in (torch.zeros(0, 3, dtype=torch.float64), np.zeros((0, 3))):
        assert tuple(map_points(np.eye(4), none).shape) == (0, 3)
