"""Affine maps, displacement fields, chains, and moving things with them."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from truth import Warp, blobs, random_affine, reordered, signed_permutations, tilted_grid, volume, world

from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.points import Mesh, Points
from crossmorph.resample import resample
from crossmorph.space import Grid
from crossmorph.transform import Affine, Chain, DisplacementField, Transform, compose

GRID = tilted_grid((16, 14, 18), (3, 3.5, 2.5), center=(0, 0, 0))
SPOTS = torch.from_numpy(np.random.default_rng(0).uniform(-45, 45, (400, 3)))

T1, CT = tilted_grid((9, 8, 7), (2, 2, 2), center=(0, 0, 0)), tilted_grid((7, 9, 8), (3, 2, 2), center=(4, 0, 0))
TO_CT = Affine.from_parts((4, 1, -2), (0, 5, 10), fixed="t1", moving="ct", fixed_grid=T1, moving_grid=CT)

seeds = st.integers(0, 2**32 - 1)


# -- affine maps -------------------------------------------------------------------------------------------------


@given(seeds)
def test_affine_parts_round_trip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = rng.uniform(-30, 30, 3), rng.uniform(-90, 90, 3), rng.uniform(0.5, 2, 3), rng.uniform(-0.4, 0.4, 3)
    center = rng.uniform(-100, 100, 3)
    transform = Affine.from_parts(*parts, center_mm=center)
    for found, given_ in zip(transform.decompose(center), parts, strict=True):
        np.testing.assert_allclose(found, given_, atol=1e-6)
    np.testing.assert_allclose(transform(center), center + parts[0], atol=1e-9)


def test_rotation_turns_about_its_centre() -> None:
    turn = Affine.rotation((0, 0, 90), center_mm=(10, 0, 0))
    np.testing.assert_allclose(turn(np.array([11.0, 0, 5])), [10, 1, 5], atol=1e-12)
    np.testing.assert_allclose(turn(np.array([10.0, 0, 7])), [10, 0, 7], atol=1e-12)


def test_a_mirroring_map_decomposes_with_a_negative_scale() -> None:
    mirror = Affine(np.diag([1.0, -2.0, 3.0, 1.0]))
    parts = mirror.decompose()
    assert (np.sign(parts.scales) == [-1, 1, 1]).all()
    np.testing.assert_allclose(Affine.from_parts(*parts).matrix, mirror.matrix, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3), "4x4"),
        (np.full((4, 4), np.inf), "finite"),
        (np.ones((4, 4)), "last row"),
        (np.diag([1.0, 1.0, 0.0, 1.0]), "singular"),
    ],
)
def test_impossible_matrices_are_refused(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Affine(matrix)


@given(seeds)
def test_affine_inverse(seed: int) -> None:
    transform = replace(random_affine(np.random.default_rng(seed), 3), moving="ct", fixed_grid=GRID)
    inverse = transform.inverse()
    np.testing.assert_allclose(inverse(transform(SPOTS)), SPOTS, atol=1e-9)
    assert (inverse.fixed, inverse.moving, inverse.moving_grid) == ("ct", "fixed", GRID)


@pytest.mark.parametrize(
    "transform",
    [Affine.translation((1, 2, 3)), Warp().field(GRID), Chain((Warp().field(GRID), TO_CT))],
)
def test_points_keep_their_kind_type_and_shape(transform: Transform) -> None:
    for dtype in (torch.float32, torch.float64):
        points = SPOTS.to(dtype).reshape(20, 20, 3)
        mapped = transform(points)
        assert (mapped.dtype, mapped.shape) == (dtype, points.shape)
        array = transform(points.numpy())
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, mapped, atol=1e-4)
        assert array.dtype == points.numpy().dtype
    assert transform(np.array([1, 2, 3])).dtype == np.float64
    assert transform([1.0, 2.0, 3.0]).shape == (3,)


# -- displacement fields -----------------------------------------------------------------------------------------


def test_field_agrees_with_simpleitk_everywhere() -> None:
    """Inside, in the outer half voxel, and outside, where points stay."""
    field = Warp(a=6, b=5).field(GRID)
    flip = np.diag([-1.0, -1.0, 1.0])
    vectors = np.einsum("ab,bijk->kjia", flip, field.field.double().numpy())
    image = sitk.GetImageFromArray(np.ascontiguousarray(vectors), isVector=True)
    image.SetSpacing(GRID.spacing.tolist())
    image.SetOrigin((flip @ GRID.origin).tolist())
    image.SetDirection((flip @ GRID.direction).ravel().tolist())
    itk = sitk.DisplacementFieldTransform(image)
    voxels = np.random.default_rng(1).uniform(-1.5, 1.5, (600, 3)) + np.random.default_rng(2).uniform(
        0, np.array(GRID.shape) - 1, (600, 3)
    )
    points = GRID.to_world(voxels)
    expected = np.array([flip @ itk.TransformPoint((flip @ p).tolist()) for p in points])
    np.testing.assert_allclose(field(points), expected, atol=1e-5)
    outside = ~GRID.contains(points)
    assert 0.05 < outside.mean() < 0.7
    np.testing.assert_array_equal(field(points)[outside], points[outside])


@pytest.mark.parametrize("order", signed_permutations())
def test_a_field_stored_in_another_axis_order_is_the_same_map(order: tuple) -> None:
    field = Warp().field(GRID)
    np.testing.assert_allclose(reordered(field, order)(SPOTS), field(SPOTS), atol=1e-5)


def test_fields_must_fit_their_grid() -> None:
    with pytest.raises(InputError, match="does not fit a grid"):
        DisplacementField(torch.zeros(*GRID.shape, 3), GRID)
    with pytest.raises(InputError, match="NaN"):
        DisplacementField(torch.full((3, *GRID.shape), float("nan")), GRID)


def test_field_is_differentiable() -> None:
    field = Warp().field(GRID).field.requires_grad_()
    DisplacementField(field, GRID)(SPOTS).square().sum().backward()
    assert field.grad is not None
    assert float(field.grad.abs().max()) > 0


def test_resampled_field_is_the_same_map() -> None:
    field = replace(Warp().field(GRID), moving="ct")
    finer = field.resampled(GRID.resized((32, 28, 36)))
    inner = SPOTS[GRID.contains(SPOTS.numpy())]
    np.testing.assert_allclose(finer(inner), field(inner), atol=0.15)
    assert finer.moving == "ct"
    np.testing.assert_allclose(field.resampled(GRID).field, field.field, atol=1e-5)


# -- chains ------------------------------------------------------------------------------------------------------


@given(seeds)
def test_chains_apply_left_to_right_and_are_associative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = random_affine(rng), Warp(k=rng.uniform(0.05, 0.15)).field(GRID), random_affine(rng)
    expected = c(b(a(SPOTS)))
    left, right = Chain((Chain((a, b)), c)), Chain((a, Chain((b, c))))
    assert len(left.transforms) == len(right.transforms) == 3
    for chain in (left, right, compose(a, b, c)):
        np.testing.assert_allclose(chain(SPOTS), expected, atol=1e-9)


@given(seeds)
def test_chain_inverse(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chain = Chain((random_affine(rng), random_affine(rng)), moving_grid=GRID)
    inverse = chain.inverse()
    np.testing.assert_allclose(inverse(chain(SPOTS)), SPOTS, atol=1e-9)
    assert (inverse.fixed, inverse.moving, inverse.fixed_grid) == ("moving", "fixed", GRID)


def test_chain_takes_its_spaces_from_its_ends() -> None:
    ends = Affine.identity(fixed="t1", moving="mid", fixed_grid=GRID), Affine.identity(fixed="mid", moving="ct")
    chain = Chain(ends)
    assert (chain.fixed, chain.moving, chain.fixed_grid) == ("t1", "ct", GRID)
    assert Chain(ends, fixed="here").fixed == "here"
    assert Chain((ends[0], ends[0].inverse())).moving == "t1"
    with pytest.raises(InputError, match="at least one"):
        Chain(())


def test_compose_multiplies_neighbouring_affines() -> None:
    a, b = Affine.translation((1, 0, 0), fixed="t1"), Affine.rotation((0, 0, 90), moving="ct")
    both = compose(a, b)
    assert isinstance(both, Affine)
    assert (both.fixed, both.moving) == ("t1", "ct")
    np.testing.assert_allclose(both(SPOTS), b(a(SPOTS)), atol=1e-12)
    mixed = compose(a, b, Warp().field(GRID), b, a)
    assert isinstance(mixed, Chain)
    assert [type(t) for t in mixed.transforms] == [Affine, DisplacementField, Affine]


def test_collapse_samples_the_whole_chain_once() -> None:
    warp, affine = Warp(), random_affine(np.random.default_rng(3))
    chain = Chain((warp.field(GRID), affine), moving="ct")
    field = chain.collapse(GRID)
    points = world(GRID)
    np.testing.assert_allclose(field.field.movedim(0, -1), affine(warp(points)) - points, atol=1e-4)
    assert (field.fixed, field.moving) == ("fixed", "ct")


# -- apply -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["ct", None])
def test_images_of_the_moving_space_land_on_the_fixed_grid(space: str | None) -> None:
    image = replace(volume(CT), space=space)
    warped = TO_CT.apply(image)
    assert warped.grid is T1
    assert warped.space == "t1"
    assert torch.equal(warped.data, resample(image, T1, TO_CT).data)
    assert TO_CT.apply(image, CT).grid is CT
    assert TO_CT.apply(image, like=image).grid is CT
    assert not TO_CT.apply(image, mode="nearest", fill=-7).data.equal(warped.data)


def test_images_of_the_fixed_space_go_the_other_way() -> None:
    image = replace(volume(T1), space="t1")
    warped = TO_CT.apply(image)
    assert warped.grid is CT
    assert warped.space == "ct"
    assert torch.equal(warped.data, resample(image, CT, TO_CT.inverse()).data)


def test_labels_are_voted_and_points_move_the_other_way() -> None:
    labels = replace(blobs(CT), space="ct")
    warped = TO_CT.apply(labels)
    assert set(warped.ids) <= set(labels.ids)
    assert (warped.space, warped.grid) == ("t1", T1)
    marks = Points(SPOTS[:5], tuple("abcde"), "t1")
    sent = TO_CT.apply(marks)
    assert (sent.space, sent.names) == ("ct", marks.names)
    np.testing.assert_allclose(sent.xyz, TO_CT(marks.xyz))
    back = TO_CT.apply(sent)
    assert back.space == "t1"
    np.testing.assert_allclose(back.xyz, marks.xyz, atol=1e-9)
    mesh = Mesh(marks, torch.tensor([[0, 1, 2]]))
    np.testing.assert_allclose(TO_CT.apply(mesh).points.xyz, sent.xyz)
    assert TO_CT.apply(mesh).space == "ct"


def test_a_voxel_and_the_landmark_on_it_arrive_together() -> None:
    """The bright voxel of the moving image lands where the inverse sends its centre."""
    grid = Grid.from_spacing((30, 30, 30), 1.0)
    data = torch.exp(-(world(grid) - torch.tensor([4.0, -3, 5])).square().sum(-1) / 8)[None].float()
    image = Image(data, grid, torch.ones(grid.shape, dtype=torch.bool), space="moving")
    transform = Chain(
        (Affine.from_parts((2, -3, 1), (0, 0, 20)), Warp(a=2, b=1).field(grid.padded([9] * 3, [9] * 3)))
    )
    warped = transform.apply(image, grid)
    weights = warped.data[0].double()[..., None]
    centroid = (weights * world(grid)).sum((0, 1, 2)) / weights.sum()
    landmark = transform.apply(Points(torch.tensor([[4.0, -3, 5]]), space="moving"))
    np.testing.assert_allclose(centroid, landmark.xyz[0], atol=0.1)


def test_apply_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"'mr'.*'t1'.*'ct'"):
        TO_CT.apply(replace(volume(CT), space="mr"))
    with pytest.raises(InputError, match="'t1' or 'ct'"):
        TO_CT.apply(Points(SPOTS))
    with pytest.raises(InputError, match="pass like="):
        Affine.identity().apply(volume(CT))
    with pytest.raises(InputError, match="has no grid"):
        TO_CT.apply(volume(CT), like=(3, 3, 3))


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    chain = Chain((Warp().field(GRID).to("cuda"), random_affine(np.random.default_rng(9))))
    cpu = Chain((Warp().field(GRID), chain.transforms[1]))
    np.testing.assert_allclose(chain(SPOTS.cuda()).cpu(), cpu(SPOTS), atol=1e-9)
    np.testing.assert_allclose(chain.collapse(GRID, "cuda").field.cpu(), cpu.collapse(GRID).field, atol=1e-5)


def test_a_volume_on_the_grid_of_the_wrong_space_is_refused() -> None:
    fixed, moving = Grid.from_spacing((4, 5, 6), 2.0), Grid.from_spacing((5, 6, 7), 2.0)
    transform = Affine.identity(fixed_grid=fixed, moving_grid=moving)
    with pytest.raises(InputError, match=r"grid is that of 'fixed' .*4x5x6.* not of 'moving' .*5x6x7"):
        transform.apply(volume(fixed))
    assert transform.apply(volume(fixed, space="fixed")).grid is moving
    assert transform.apply(volume(moving)).grid is fixed
    assert transform.apply(volume(fixed, space="moving")).grid is fixed
