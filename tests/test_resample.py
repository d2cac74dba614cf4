"""The sampler against formulas, SimpleITK, scipy and its own torch version."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from truth import (
    Warp,
    blobs,
    grids,
    ramp,
    random_affine,
    reordered,
    signed_permutations,
    tilted_grid,
    volume,
    waves,
    world,
)

from crossmorph import resample as module
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.resample import downsample, gaussian, guess_fill, resample, resample_labels, sample, world_blocks
from crossmorph.space import Grid
from crossmorph.transform import Affine, Chain

MOVING = tilted_grid((24, 26, 22), (1.6, 1.4, 2.0), (10, 20, -30), center=(3, -5, 9))
FIXED = tilted_grid((14, 12, 16), (1.7, 2.1, 1.3), (-25, 5, 15), center=(3, -5, 9))


def random_voxels(shape: tuple[int, ...], count: int = 500, margin: float = 1.5, seed: int = 0) -> torch.Tensor:
    """Voxel coordinates in and around a volume."""
    size = torch.tensor(shape, dtype=torch.float64)
    rand = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rand * (size - 1 + 2 * margin) - margin


def to_sitk(image: Image | Labels) -> sitk.Image:
    """The same image in ITK's terms, made here from the affine so that the package's own writer is not trusted."""
    data = image.data[0] if isinstance(image, Image) else image.data
    flip = np.diag([-1.0, -1.0, 1.0])
    out = sitk.GetImageFromArray(data.numpy().transpose(2, 1, 0))
    out.SetSpacing(image.grid.spacing.tolist())
    out.SetOrigin((flip @ image.grid.origin).tolist())
    out.SetDirection((flip @ image.grid.direction).ravel().tolist())
    return out


def sitk_affine(affine: Affine) -> sitk.AffineTransform:
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    matrix = flip @ affine.matrix @ flip
    out = sitk.AffineTransform(3)
    out.SetMatrix(matrix[:3, :3].ravel().tolist())
    out.SetTranslation(matrix[:3, 3].tolist())
    return out


# -- sample ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_sample_agrees_with_scipy_inside(mode: str) -> None:
    data = torch.rand(2, 7, 9, 8, generator=torch.Generator().manual_seed(1))
    voxels = random_voxels((7, 9, 8), margin=-0.01)
    order = {"nearest": 0, "linear": 1, "cubic": 3}[mode]
    expected = np.stack([map_coordinates(c, voxels.numpy().T, order=order, mode="mirror") for c in data.numpy()])
    np.testing.assert_allclose(sample(data, voxels, mode).numpy(), expected, atol=2e-6)


def test_sample_continues_the_border_to_the_face_and_fills_beyond() -> None:
    data = torch.tensor([2.0, 4.0, 8.0]).reshape(1, 3, 1, 1)
    at = torch.tensor([-0.6, -0.5, -0.2, 0.0, 0.5, 1.5, 2.0, 2.5, 2.6, float("nan"), float("inf")])
    voxels = torch.stack((at, 0 * at.nan_to_num(posinf=0), 0.3 + 0 * at.nan_to_num(posinf=0)), -1)
    for grad in (False, True):
        values = sample(data.clone().requires_grad_(grad), voxels.double(), fill=-1)[0].tolist()
        assert values == pytest.approx([-1, 2, 2, 2, 3, 6, 8, 8, -1, -1, -1])
    nearest = sample(data, voxels, "nearest", fill=-1)[0].tolist()
    assert nearest == [-1, 2, 2, 2, 4, 8, 8, 8, -1, -1, -1]
    assert sample(data, voxels, "cubic", fill=-1)[0, 0] == -1


@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 6)] * 3))
def test_compiled_and_torch_sampling_agree(seed: int, shape: tuple[int, int, int]) -> None:
    data = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))
    voxels = random_voxels(shape, 60, seed=seed)
    compiled = sample(data, voxels, fill=3)
    differentiable = sample(data.clone().requires_grad_(), voxels, fill=3)
    np.testing.assert_allclose(compiled.numpy(), differentiable.detach().numpy(), atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 5)] * 3))
def test_compiled_and_torch_votes_agree(seed: int, shape: tuple[int, int, int]) -> None:
    labels = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    voxels = random_voxels(shape, 60, margin=0.49, seed=seed)
    assert torch.equal(module._vote(labels, voxels), module._vote_torch(labels, voxels))
    halves = (voxels * 2).round() / 2
    assert torch.equal(module._vote(labels, halves), module._vote_torch(labels, halves))


def test_sample_has_the_right_derivatives() -> None:
    data = torch.rand(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    voxels = random_voxels((4, 5, 3), 12, margin=-0.1).requires_grad_()
    torch.autograd.gradcheck(sample, (data, voxels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int16, torch.uint8, torch.bool])
def test_sample_types(dtype: torch.dtype) -> None:
    data = (torch.rand(1, 5, 5, 5) * 3).to(dtype)
    voxels = random_voxels((5, 5, 5), 40).reshape(4, 10, 3)
    linear, nearest = sample(data, voxels), sample(data, voxels, "nearest")
    assert linear.shape == nearest.shape == (1, 4, 10)
    assert linear.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert nearest.dtype == dtype
    np.testing.assert_allclose(linear.double(), sample(data.double(), voxels), atol=2e-3)


def test_sample_of_nothing_and_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.rand(2, 4, 4, 4)
    assert sample(data, torch.zeros(0, 3)).shape == (2, 0)
    voxels = random_voxels((4, 4, 4), 100)
    for mode in ("linear", "nearest", "cubic"):
        whole = sample(data, voxels, mode)
        with monkeypatch.context() as patch:
            patch.setattr(module, "BLOCK", 7)
            assert torch.equal(sample(data, voxels, mode), whole)
    with pytest.raises(InputError, match="linear, nearest or cubic"):
        sample(data, voxels, "sinc")


def test_float64_coordinates_lose_nothing() -> None:
    data = torch.arange(4001.0).reshape(1, -1, 1, 1) * 1000
    at = torch.tensor([[3999.123456789, 0, 0]], dtype=torch.float64)
    for tensor in (data.double(), data.double().requires_grad_()):
        assert sample(tensor, at).item() == pytest.approx(3999123.456789, abs=1e-4)


# -- images ------------------------------------------------------------------------------------------------------


def test_world_blocks_walk_the_grid_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 100)
    points = torch.cat([points for _, points in world_blocks(FIXED)])
    np.testing.assert_allclose(points.reshape(*FIXED.shape, 3), world(FIXED), atol=1e-9)


@given(grids(smallest=2), st.sampled_from(["linear", "nearest", "cubic"]))
def test_resampling_onto_the_own_grid_changes_nothing(grid: Grid, mode: str) -> None:
    image = volume(grid, waves, name="scan", dtype=np.dtype(np.int16), space="here")
    image = image.restricted(image.data[0] > -0.5)
    same = resample(image, grid, mode=mode)
    np.testing.assert_allclose(same.data, image.data, atol=1e-5)
    assert torch.equal(same.valid, image.valid)
    assert (same.name, same.dtype, same.space) == ("scan", np.int16, "here")


@given(grids(smallest=2), st.integers(0, 2**32 - 1))
def test_linear_functions_are_resampled_exactly(grid: Grid, seed: int) -> None:
    moving = volume(tilted_grid((20, 20, 20), (40, 50, 60), center=(0, 0, 0)), ramp)
    transform = random_affine(np.random.default_rng(seed))
    warped = resample(moving, grid, transform)
    expected = ramp(transform(world(grid)))
    middle = ((moving.grid.to_voxel(transform(world(grid))) - 9.5).abs() < 9.5).all(-1)
    np.testing.assert_allclose(warped.data[:, middle], expected[:, middle], atol=2e-3)
    assert warped.valid[middle].all()


@pytest.mark.parametrize("order", signed_permutations())
def test_axis_order_does_not_matter(order: tuple) -> None:
    moving, transform = volume(MOVING), random_affine(np.random.default_rng(3))
    moving = moving.restricted(moving.data[0] > -1)
    labels = blobs(MOVING)
    expected, voted = resample(moving, FIXED, transform), resample_labels(labels, FIXED, transform)
    result = resample(reordered(moving, order), FIXED, transform)
    np.testing.assert_allclose(result.data, expected.data, atol=1e-5)
    assert torch.equal(result.valid, expected.valid)
    assert torch.equal(resample_labels(reordered(labels, order), FIXED, transform).data, voted.data)
    coarse = tilted_grid((4, 5, 3), (9, 3, 6), (10, 25, -30), center=(3, -5, 9))
    small = downsample(moving, coarse)
    np.testing.assert_allclose(downsample(reordered(moving, order), coarse).data, small.data, atol=1e-5)
    onto = reordered(expected, order)
    turned = resample(moving, onto.grid, transform)
    np.testing.assert_allclose(turned.data, onto.data, atol=1e-5)
    assert torch.equal(turned.valid, onto.valid)


@pytest.mark.parametrize(
    ("mode", "interpolator"),
    [("linear", sitk.sitkLinear), ("nearest", sitk.sitkNearestNeighbor), ("cubic", sitk.sitkBSpline3)],
)
def test_resample_agrees_with_simpleitk(mode: str, interpolator: int) -> None:
    moving, transform = volume(MOVING), random_affine(np.random.default_rng(4), 2)
    ours = resample(moving, FIXED, transform, mode, fill=-9)
    theirs = sitk.Resample(to_sitk(moving), to_sitk(volume(FIXED)), sitk_affine(transform), interpolator, -9.0)
    np.testing.assert_allclose(ours.data[0], sitk.GetArrayFromImage(theirs).transpose(2, 1, 0), atol=2e-5)
    assert 0.2 < ours.valid.float().mean() < 1
    assert torch.equal(ours.data[0] == -9, ~ours.valid)


def test_warped_by_a_smooth_map_is_the_volume_at_the_mapped_points() -> None:
    fine = Grid.from_spacing((70, 70, 70), 1.0, (3, -5, 9))
    warp = Warp()
    field = warp.field(tilted_grid((40, 40, 40), (1.5, 1.5, 1.5), center=(3, -5, 9)))
    affine = random_affine(np.random.default_rng(5))
    warped = resample(volume(fine), FIXED, Chain((field, affine)))
    expected = waves(affine(warp(world(FIXED))))
    assert warped.valid.all()
    np.testing.assert_allclose(warped.data, expected, atol=0.02)


def test_validity_narrows_and_is_not_smeared() -> None:
    grid = Grid.from_spacing((8, 8, 8))
    image = volume(grid)
    mask = torch.ones(grid.shape, dtype=torch.bool)
    mask[4] = False
    holed = image.restricted(mask)
    shift = lambda mm, **k: resample(holed, grid, Affine.translation((mm, 0, 0)), **k).valid[:, 4, 4].tolist()  # noqa: E731
    assert shift(0) == [True] * 4 + [False] + [True] * 3
    assert shift(0.3) == [True] * 3 + [False] * 2 + [True] * 3
    assert shift(0.3, mode="nearest") == [True] * 4 + [False] + [True] * 3
    assert shift(0.3, mode="cubic") == shift(0.3)
    assert shift(0.7) == [True] * 3 + [False] * 2 + [True] * 2 + [False]


def test_edges_do_not_mix_with_the_fill_value() -> None:
    image = Image.from_array(np.full((4, 4, 4), 50.0), np.eye(4))
    moved = resample(image, image.grid, Affine.translation((0.4, 0, 0)), fill=-1000)
    assert (moved.data == 50).all()
    assert moved.valid.all()
    gone = resample(image, image.grid, Affine.translation((0.6, 0, 0)), fill=-1000)
    assert (gone.data[0, 3] == -1000).all()
    assert not gone.valid[3].any()
    assert (gone.data[0, :3] == 50).all()


def test_the_guessed_fill_is_used_and_noted() -> None:
    image = Image.from_array(np.full((4, 4, 4), 50.0), np.eye(4), notes=("read",))
    far = resample(image, image.grid, Affine.translation((100, 0, 0), fixed="atlas"))
    assert (far.data == 0).all()
    assert far.notes == ("read", "outside the field of view 0 was put: no negative values")
    assert far.space == "atlas"


def test_results_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    big = volume(Grid.from_spacing((40, 50, 60), 1.1))
    holed, labels = big.restricted(big.data[0] > -1), blobs(big.grid)
    chain = Chain((Warp().field(tilted_grid((20, 20, 20), (4, 4, 4))), random_affine(np.random.default_rng(6))))

    def everything() -> list[torch.Tensor]:
        warped, small = resample(holed, big.grid, chain), downsample(holed, FIXED)
        return [warped.data, warped.valid, small.data, resample_labels(labels, big.grid, chain).data]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


# -- labels ------------------------------------------------------------------------------------------------------


def test_vote_is_the_largest_of_the_interpolated_indicators() -> None:
    labels, transform = blobs(MOVING), random_affine(np.random.default_rng(7), 2)
    ours = resample_labels(labels, FIXED, transform)
    voxels = MOVING.to_voxel(transform(world(FIXED)))
    ids = [0, *labels.ids]
    weights = torch.stack([sample((labels.data == i)[None].double(), voxels)[0] for i in ids])
    best = torch.tensor(ids, dtype=torch.int32)[weights.argmax(0)]
    assert torch.equal(ours.data, best)
    assert ours.dtype == np.uint8
    itk = sitk.Resample(to_sitk(labels), to_sitk(volume(FIXED)), sitk_affine(transform), sitk.sitkLabelLinear, 0)
    assert (sitk.GetArrayFromImage(itk).transpose(2, 1, 0) == ours.data.numpy()).mean() > 0.999


@given(grids(), st.integers(0, 2**32 - 1))
def test_vote_invents_no_label_and_keeps_its_own_grid(grid: Grid, seed: int) -> None:
    labels = blobs(grid, seed % 1000)
    moved = resample_labels(labels, grid.resized((5, 4, 3)), random_affine(np.random.default_rng(seed)))
    assert set(moved.ids) <= set(labels.ids)
    assert moved.data.dtype == labels.data.dtype
    assert torch.equal(resample_labels(labels, grid).data, labels.data)


def test_ties_go_to_the_lowest_label_and_outside_is_background() -> None:
    for pair in ([9, 5], [5, 9]):
        labels = Labels.from_array(np.array(pair).reshape(2, 1, 1), np.eye(4))
        at = Grid((1, 1, 1), np.array([[1, 0, 0, 0.5], [0, 1, 0, 0.2], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
        assert resample_labels(labels, at).data.item() == 5
    far = resample_labels(labels, labels.grid, Affine.translation((0, 0, 0.6), fixed="atlas"))
    assert (far.data == 0).all()
    assert far.space == "atlas"
    large = Labels.from_array(np.full((2, 2, 2), 2**40), np.eye(4))
    assert resample_labels(large, large.grid).ids == [2**40]


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- coarser grids -----------------------------------------------------------------------------------------------


def test_gaussian_agrees_with_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    data = torch.rand(2, 12, 9, 10)
    for sigmas in ([1.0, 0.0, 2.5], [0.6, 1.2, 0.8]):
        expected = [gaussian_filter(c, sigmas, mode="nearest", truncate=3.5) for c in data.double().numpy()]
        np.testing.assert_allclose(gaussian(data, sigmas), expected, atol=2e-3)


def test_compiled_and_torch_smoothing_agree() -> None:
    data = noise(2, 9, 4, 12, seed=3)
    for sigmas in ([1.0, 0.0, 2.5], [0.6, 5.0, 0.8]):  # the second line is shorter than its kernel
        np.testing.assert_allclose(gaussian(data, sigmas), module._gaussian_torch(data, sigmas), atol=1e-5)


@pytest.mark.parametrize("hole", [False, True])
def test_axis_by_axis_downsampling_is_smoothing_then_sampling(hole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = tilted_grid((24, 20, 22), (1, 1.5, 1), rotation_deg=(10, 20, 30))
    coarse = grid.respaced((2.5, 1.2, 1.7)).padded((1, 0, 2), (0, 3, 1))
    valid = torch.ones(grid.shape, dtype=torch.bool)
    valid[3:9, 4:12, 8:] = not hole
    image = Image(noise(1, *grid.shape, seed=4), grid, valid)
    found = downsample(image, coarse)
    monkeypatch.setattr(module, "_plain", lambda data: False)
    expected = downsample(image, coarse)
    np.testing.assert_allclose(found.data, expected.data, atol=1e-5)
    assert torch.equal(found.valid, expected.valid)


def test_downsampling_keeps_linear_functions_and_suppresses_noise() -> None:
    fine = tilted_grid((40, 36, 44), (1, 1, 1), center=(0, 0, 0))
    coarse = tilted_grid((6, 5, 6), (3, 3, 3), rotation_deg=(5, 0, 60), center=(0, 0, 0))
    small = downsample(volume(fine, ramp), coarse)
    np.testing.assert_allclose(small.data, ramp(world(coarse)), atol=1e-3)
    assert small.valid.all()
    noise = Image(
        torch.randn(1, *fine.shape, generator=torch.Generator().manual_seed(0)),
        fine,
        small.valid.new_ones(fine.shape),
    )
    assert downsample(noise, coarse).data.std() < 0.4 * resample(noise, coarse).data.std()


def test_downsampling_learns_nothing_from_invalid_voxels() -> None:
    grid = Grid.from_spacing((24, 24, 24))
    array = np.full(grid.shape, 10.0, np.float32)
    array[12:] = 1e6
    image = Image.from_array(array, grid)
    image = image.restricted(image.data[0] < 100)
    small = downsample(image, grid.pooled(4))
    assert small.valid[:3].all()
    assert not small.valid[3:].any()
    np.testing.assert_allclose(small.data[0, :3], 10, rtol=1e-5)
    assert (small.data[0, 4:] == 0).all()


def test_downsampling_to_the_own_grid_changes_nothing() -> None:
    image = volume(MOVING)
    np.testing.assert_allclose(downsample(image, MOVING).data, image.data, atol=1e-5)


# -- fill --------------------------------------------------------------------------------------------------------


def test_fill_of_each_kind_of_image() -> None:
    rng = np.random.default_rng(0)

    def fill(array: np.ndarray) -> float:
        value, reason = guess_fill(Image.from_array(array, np.eye(4)))
        assert reason
        return value

    body = np.full((10, 10, 10), -1000)
    body[2:8, 2:8, 2:8] = rng.integers(-50, 800, (6, 6, 6))
    assert fill(body) == -1000
    padded = body.copy()
    padded[0] = -3024
    assert fill(padded) == -1000
    assert fill(np.where(body == -1000, -1024, body)) == -1024
    assert fill(np.abs(body)) == 0
    scored = np.full((10, 10, 10), -0.7)
    scored[2:8, 2:8, 2:8] = rng.normal(size=(6, 6, 6))
    assert fill(scored) == pytest.approx(-0.7)
    assert fill(np.full((3, 3, 3), np.nan)) == 0


def test_fill_looks_at_valid_voxels_only() -> None:
    image = Image.from_array(np.linspace(-4, 4, 125).reshape(5, 5, 5), np.eye(4))
    assert guess_fill(image.restricted(image.data[0] >= 0))[0] == 0
    inner = torch.zeros(5, 5, 5, dtype=torch.bool)
    inner[1:-1, 1:-1, 1:-1] = True
    value, reason = guess_fill(image.restricted(inner))
    assert value == pytest.approx(float(image.data[0][inner].min()))
    assert "minimum" in reason


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    moving, labels, transform = volume(MOVING), blobs(MOVING), random_affine(np.random.default_rng(8))
    moving = moving.restricted(moving.data[0] > -1)
    for mode in ("linear", "nearest", "cubic"):
        cpu, gpu = resample(moving, FIXED, transform, mode), resample(moving.to("cuda"), FIXED, transform, mode)
        np.testing.assert_allclose(cpu.data, gpu.data.cpu(), atol=1e-5)
        assert torch.equal(cpu.valid, gpu.valid.cpu())
    voted = resample_labels(labels.to("cuda"), FIXED, transform)
    assert torch.equal(voted.data.cpu(), resample_labels(labels, FIXED, transform).data)
    small = downsample(moving.to("cuda"), FIXED.pooled(3))
    np.testing.assert_allclose(small.data.cpu(), downsample(moving, FIXED.pooled(3)).data, atol=1e-5)
