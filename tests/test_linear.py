"""Linear fits: derivatives against finite differences and autograd, similarities against their definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from scene import GRID, tissue

from crossmorph.evaluate.similarity import normalised_mutual_information
from crossmorph.image import Image
from crossmorph.kernels.linear import difference, joint_histogram, pulled, seen
from crossmorph.optimise.linear import LINE_SEARCH, SIZES, Frame, Model, Problem, Similarity, fit
from crossmorph.optimise.similarity import (
    correlation,
    dot_product,
    linear_combination,
    mutual_information,
    normalised_information,
    squared_difference,
)

MODELS: tuple[Model, ...] = ("translation", "rigid", "similarity", "affine")
CENTRE = np.array([3.0, -7.0, 11.0])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# -- frames ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@given(values=st.lists(st.floats(-60, 60), min_size=12, max_size=12), small=st.booleans())
def test_slopes_are_those_of_the_matrix(model: Model, values: list[float], small: bool) -> None:
    frame = Frame(model, CENTRE, 40.0)
    parameters = np.array(values[: SIZES[model]]) * (1e-9 if small else 1)
    slopes = frame.slopes(parameters)
    for number, slope in enumerate(slopes):
        step = np.zeros(len(parameters))
        step[number] = 1e-4
        numeric = (frame.matrix(parameters + step) - frame.matrix(parameters - step))[:3] / 2e-4
        np.testing.assert_allclose(slope, numeric, atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
def test_no_parameters_no_motion_and_the_centre_only_shifts(model: Model) -> None:
    frame = Frame(model, CENTRE, 40.0)
    np.testing.assert_array_equal(frame.matrix(np.zeros(SIZES[model])), np.eye(4))
    parameters = np.arange(1.0, SIZES[model] + 1)
    np.testing.assert_allclose((frame.matrix(parameters) @ np.append(CENTRE, 1))[:3], CENTRE + np.array([1, 2, 3]))


def test_a_model_is_what_its_name_says() -> None:
    parameters = np.array([1.0, 2, 3, 4, -5, 6, 8])
    rigid = Frame("rigid", CENTRE, 40.0).matrix(parameters[:6])[:3, :3]
    np.testing.assert_allclose(rigid @ rigid.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rigid) == pytest.approx(1)
    np.testing.assert_allclose(np.arccos((np.trace(rigid) - 1) / 2), np.linalg.norm([4, -5, 6]) / 40)
    similar = Frame("similarity", CENTRE, 40.0).matrix(parameters)[:3, :3]
    np.testing.assert_allclose(similar, np.exp(8 / 40) * rigid)


# -- volumes seen through a map ----------------------------------------------------------------------------------

MATRIX = np.eye(3, 4) + np.random.default_rng(4).uniform(-0.1, 0.1, (3, 4)) + [0, 0, 0, 0.4]
"""No place lies on a voxel centre, where the derivative would jump."""
SHAPE, MOVING = (9, 8, 10), (10, 11, 9)


def trilinear(features: torch.Tensor, matrix: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """(I, J, K, F) by hat functions, summed over all voxels: zero outside, differentiable by the matrix."""
    lines = [torch.arange(n, dtype=torch.float64) for n in shape]
    places = torch.stack((*torch.meshgrid(*lines, indexing="ij"), torch.ones(shape, dtype=torch.float64)), -1)
    x = places @ matrix.T
    hats = [
        (1 - (x[..., axis, None] - torch.arange(n)).abs()).clamp_min(0)
        for axis, n in enumerate(features.shape[:3])
    ]
    return torch.einsum("...a,...b,...c,abcf->...f", *hats, features.double())


def inside_of(matrix: np.ndarray, known: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As ``seen`` defines it: asked for, between the voxel centres, and the nearest voxel is known."""
    x = np.indices(mask.shape).reshape(3, -1).T @ matrix[:, :3].T + matrix[:, 3]
    between = ((x >= 0) & (x <= np.array(known.shape) - 1)).all(1)
    nearest = np.clip(np.floor(x + 0.5).astype(int), 0, np.array(known.shape) - 1)
    return torch.from_numpy(between & known.numpy()[tuple(nearest.T)]).reshape(mask.shape) & mask


def test_what_is_seen_and_its_derivative_are_those_of_a_plain_interpolation() -> None:
    features, known = noise(*MOVING, 3), noise(*MOVING, seed=1) > 0.1
    mask = noise(*SHAPE, seed=2) > 0.3
    values, inside = seen(features, known, MATRIX, mask)
    assert torch.equal(inside, inside_of(MATRIX, known, mask))
    assert 50 < int(inside.sum()) < int(mask.sum())
    matrix = torch.from_numpy(MATRIX).requires_grad_()
    expected = trilinear(features, matrix, SHAPE) * inside[..., None]
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=0)
    slopes = noise(*SHAPE, 3, seed=3) - 0.5
    (expected * slopes).sum().backward()
    assert matrix.grad is not None
    np.testing.assert_allclose(pulled(features, MATRIX, inside, slopes), matrix.grad.numpy(), rtol=1e-4)


def test_the_outermost_voxel_centres_are_seen() -> None:
    features, everywhere = noise(4, 5, 6, 2), torch.ones(4, 5, 6, dtype=torch.bool)
    values, inside = seen(features, everywhere, np.eye(4)[:3], everywhere)
    assert inside.all()
    torch.testing.assert_close(values, features)
    nudged = np.eye(4)[:3]
    nudged[0, 3] = 1e-3
    assert not seen(features, everywhere, nudged, everywhere)[1][3].any()


# -- similarities ------------------------------------------------------------------------------------------------

SIDE = (7, 6, 8)
WEIGHT = noise(*SIDE, seed=5) * (noise(*SIDE, seed=6) > 0.2)
INSIDE = noise(*SIDE, seed=7) > 0.2
ONE, OTHER = 0.1 + 0.8 * noise(*SIDE, 1), 0.1 + 0.8 * noise(*SIDE, 1, seed=1)
MIXED = 0.5 * OTHER + 0.5 * ONE**2
SIMILARITIES: dict[str, tuple[Similarity, torch.Tensor]] = {
    "squared difference": (squared_difference(noise(*SIDE, 4), WEIGHT, 0.7), noise(*SIDE, 4, seed=1)),
    "dot product": (dot_product(noise(*SIDE, 4) - 0.5, WEIGHT), noise(*SIDE, 4, seed=1)),
    "correlation": (correlation(ONE, WEIGHT), MIXED),
    "mutual information": (mutual_information(ONE, WEIGHT), MIXED),
}


def check_slope(
    similarity: Similarity, moving: torch.Tensor, inside: torch.Tensor, step: float, rtol: float
) -> None:
    """The derivative along random directions, and none where nothing is known."""
    _, slope = similarity(moving, inside)
    assert slope.shape == moving.shape
    assert not slope[~inside].any()
    for seed in range(3):
        way = noise(*moving.shape, seed=20 + seed) - 0.5
        there, back = (similarity(moving + sign * step * way, inside)[0] for sign in (1, -1))
        along = float((slope.double() * way).sum())
        assert along == pytest.approx((there - back) / (2 * step), rel=rtol, abs=1e-7)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_derivatives_agree_with_finite_differences(name: str) -> None:
    check_slope(*SIMILARITIES[name], INSIDE, 1e-3, 0.01)


def test_the_derivative_of_lc2_agrees_with_finite_differences() -> None:
    """Mean and spread of the moving image are held in the derivative, so that it is nearly, not exactly, right."""
    shape = (14, 13, 12)
    fixed = F.avg_pool3d(noise(1, *(n + 2 for n in shape)), 3, 1)[0]
    moving = F.avg_pool3d(noise(1, *(n + 2 for n in shape), seed=1), 3, 1)[0] + fixed**2
    everywhere = torch.ones(shape, dtype=torch.bool)
    check_slope(linear_combination(fixed, everywhere), moving[..., None], everywhere, 1e-4, 0.1)


def test_squared_difference_by_its_formula() -> None:
    similarity, moving = SIMILARITIES["squared difference"]
    fixed, share = noise(*SIDE, 4), WEIGHT / WEIGHT.sum()
    apart = (fixed - moving).square().sum(-1)
    expected = float((share * torch.where(INSIDE, apart, 0.7)).sum())
    assert similarity(moving, INSIDE)[0] == pytest.approx(expected, rel=1e-5)
    assert similarity(moving, torch.zeros_like(INSIDE))[0] == pytest.approx(0.7)
    value, known, _ = difference(fixed, moving, share, INSIDE)
    assert known == pytest.approx(float(share[INSIDE].sum()), rel=1e-5)
    assert value + 0.7 * (1 - known) == pytest.approx(expected, rel=1e-5)


def test_dot_product_by_its_formula() -> None:
    similarity, moving = SIMILARITIES["dot product"]
    expected = ((noise(*SIDE, 4) - 0.5) * moving).sum(-1)[INSIDE] @ (WEIGHT / WEIGHT.sum())[INSIDE]
    assert similarity(moving, INSIDE)[0] == pytest.approx(-float(expected), rel=1e-5)


def test_correlation_is_that_of_numpy_and_blind_to_gain_and_sign() -> None:
    even = torch.ones(SIDE)
    expected = np.corrcoef(ONE[INSIDE][:, 0], MIXED[INSIDE][:, 0])[0, 1] ** 2
    similarity = correlation(ONE, even)
    assert similarity(MIXED, INSIDE)[0] == pytest.approx(-expected, rel=1e-4)
    assert similarity(4 - 3 * MIXED, INSIDE)[0] == pytest.approx(-expected, rel=1e-4)
    assert similarity(torch.ones_like(MIXED), INSIDE)[0] == 0


def test_mutual_information_of_steps_is_their_entropy() -> None:
    """Four equally frequent values one to one: log 4 of the fixed side, less what the wide splines blur."""
    values = (torch.arange(8000) % 4).reshape(20, 20, 20, 1) / 3 * 30 / 31
    everywhere = torch.ones(20, 20, 20, dtype=torch.bool)
    similarity = mutual_information(values, torch.ones(20, 20, 20))
    assert similarity(values, everywhere)[0] == pytest.approx(-np.log(4), abs=1e-6)
    assert similarity(1 - values, everywhere)[0] == pytest.approx(-np.log(4), abs=1e-6)
    assert similarity(torch.full_like(values, 0.3), everywhere)[0] == pytest.approx(0, abs=1e-9)
    assert similarity(values, ~everywhere)[0] == 0


def test_mutual_information_of_normal_values_is_their_closed_form() -> None:
    """-log(1 - r^2) / 2 for a correlation of r, where splines 1/31 apart add variances of a sixth and a third."""
    generator = torch.Generator().manual_seed(0)
    first, rest = (torch.randn(60, 60, 60, 1, generator=generator) for _ in range(2))
    weight, everywhere = torch.ones(60, 60, 60), torch.ones(60, 60, 60, dtype=torch.bool)
    for r in (0.0, 0.5, 0.8):
        second = r * first + np.sqrt(1 - r * r) * rest
        told = -mutual_information(0.5 + first / 10, weight)(0.5 + second / 10, everywhere)[0]
        blurred = r * r / ((1 + (10 / 31) ** 2 / 6) * (1 + (10 / 31) ** 2 / 3))
        assert told == pytest.approx(-np.log(1 - blurred) / 2, abs=0.005)


def test_a_joint_histogram_counts_every_weight_once() -> None:
    place = ONE[..., 0] * 15
    counts = joint_histogram(place, MIXED, WEIGHT, INSIDE, 16)
    assert counts.shape == (16, 18)
    assert counts.sum() == pytest.approx(float(WEIGHT[INSIDE].sum()), rel=1e-5)
    expected = [float((WEIGHT * INSIDE * (1 - (place - n).abs()).clamp_min(0)).sum()) for n in range(16)]
    np.testing.assert_allclose(counts.sum(1), expected, rtol=1e-4, atol=1e-5)


def test_normalised_information_is_that_of_the_metrics() -> None:
    fixed, moving = noise(12, 13, 14), noise(12, 13, 14, seed=1)
    moving = 0.7 * fixed.square() + 0.3 * moving
    where = noise(12, 13, 14, seed=2) > 0.3
    images = [
        Image.from_array((v - v[where].min()) / (v[where].max() - v[where].min()), np.eye(4))
        for v in (fixed, moving)
    ]
    told = normalised_information(*(image.data[0] for image in images), where)
    assert told == pytest.approx(normalised_mutual_information(*images, where.numpy(), bins=32), abs=1e-3)
    assert normalised_information(fixed, fixed, where) == pytest.approx(2)
    assert normalised_information(fixed, torch.zeros_like(fixed), where) == pytest.approx(1)


# -- fits --------------------------------------------------------------------------------------------------------

LATTICE = GRID.to_world(np.moveaxis(np.indices(GRID.shape), 0, -1).astype(float))
BODY = torch.from_numpy(np.linalg.norm(LATTICE, axis=-1) < 26)
TRUTH: dict[Model, np.ndarray] = {
    "translation": np.array([2.0, -1.5, 1.0]),
    "rigid": np.array([1.0, -1.5, 2.0, 2.0, -1.5, 1.0]),
    "similarity": np.array([1.0, -1.5, 2.0, 2.0, -1.5, 1.0, -1.2]),
    "affine": np.array([1.0, -1.5, 2.0, 0.8, -0.6, 1.0, 0.5, -1.0, 0.9, -0.7, 0.4, 0.6]),
}


def values_at(matrix: np.ndarray) -> torch.Tensor:
    """The scene moved by a map: what lies at x in it lies at matrix x here; 0 to 1."""
    back = np.linalg.inv(matrix)
    values = tissue(torch.from_numpy(LATTICE @ back[:3, :3].T + back[:3, 3])).float()[..., None]
    return values / 3.3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["squared difference", "correlation", "mutual information"])
def test_a_known_map_is_recovered(model: Model, kind: str) -> None:
    frame = Frame(model, np.zeros(3), 24.0)
    truth = frame.matrix(TRUTH[model])
    fixed, moving = values_at(np.eye(4)), values_at(truth)
    assert 0.7 < float(fixed.max()) < 1
    weight, everywhere = BODY.float(), torch.ones(GRID.shape, dtype=torch.bool)
    similarities: dict[str, Similarity] = {
        "squared difference": squared_difference(fixed, weight, 0.1),
        "correlation": correlation(fixed, weight),
        "mutual information": mutual_information(fixed, weight),
    }
    found = fit([Problem(similarities[kind], moving, everywhere, GRID.inverse_affine, GRID.affine, BODY)], model)
    assert found.value < found.before
    places = GRID.to_world(BODY.nonzero().numpy().astype(float))
    error = places @ (found.matrix - truth)[:3, :3].T + (found.matrix - truth)[:3, 3]
    start = places @ (np.eye(4) - truth)[:3, :3].T + (np.eye(4) - truth)[:3, 3]
    assert np.linalg.norm(start, axis=1).mean() > 2
    assert np.linalg.norm(error, axis=1).mean() < 0.15


def test_two_problems_tell_together_what_neither_tells_alone() -> None:
    """Stripes across the first axis leave the other two open, and those across the others leave the first."""
    shift = np.array([2.0, -1.5, 1.0])
    everywhere = torch.ones(GRID.shape, dtype=torch.bool)

    def problem(axes: list[int]) -> Problem:
        fixed, moving = (
            torch.from_numpy(np.sin((LATTICE - by)[..., axes] / 4).sum(-1, keepdims=True)).float()
            for by in (np.zeros(3), shift)
        )
        similarity = squared_difference(fixed, BODY.float(), 4.0)
        return Problem(similarity, moving, everywhere, GRID.inverse_affine, GRID.affine, BODY, 0.5)

    first, second = problem([0]), problem([1, 2])
    for problems, known in (([first], [1, 0, 0]), ([second], [0, 1, 1]), ([first, second], [1, 1, 1])):
        found = fit(problems, "translation").matrix[:3, 3]
        np.testing.assert_allclose(found, shift * known, atol=0.1)


def test_a_search_that_gets_nowhere_is_given_up() -> None:
    """Value 1 - cos of the shift along z less 1 mm; from the fifth evaluation on it is worse than ever before."""
    places = torch.arange(16.0)[None, None, :, None].expand(16, 16, 16, 1).contiguous()
    mask = torch.zeros(16, 16, 16, dtype=torch.bool)
    mask[6:10, 6:10, 6:10] = True
    evaluated = 0

    def similarity(values: torch.Tensor, inside: torch.Tensor) -> tuple[float, torch.Tensor]:
        nonlocal evaluated
        evaluated += 1
        off = float((values - places)[mask].mean()) - 1.0
        slope = np.sin(off) / int(mask.sum()) * mask[..., None].float()
        return (1 - np.cos(off) if evaluated <= 4 else 2.0), slope

    known = torch.ones(16, 16, 16, dtype=torch.bool)
    found = fit([Problem(similarity, places, known, np.eye(4), np.eye(4), mask)], "translation")
    assert found.evaluations <= 4 + LINE_SEARCH
    assert found.value < found.before
    assert found.matrix[2, 3] == pytest.approx(1.0, abs=0.6)


def test_nothing_to_follow_leaves_everything_where_it_is() -> None:
    flat = torch.full((*GRID.shape, 1), 0.5)
    everywhere = torch.ones(GRID.shape, dtype=torch.bool)
    similarity = squared_difference(values_at(np.eye(4)), BODY.float(), 0.1)
    found = fit([Problem(similarity, flat, everywhere, GRID.inverse_affine, GRID.affine, BODY)], "rigid")
    np.testing.assert_array_equal(found.matrix, np.eye(4))
    assert found.value == found.before


def test_the_range_of_a_similarity_does_not_matter() -> None:
    frame = Frame("affine", np.zeros(3), 24.0)
    everywhere = torch.ones(GRID.shape, dtype=torch.bool)
    plain = squared_difference(values_at(np.eye(4)), BODY.float(), 0.1)
    moving = values_at(frame.matrix(TRUTH["affine"]))

    def large(moving: torch.Tensor, inside: torch.Tensor) -> tuple[float, torch.Tensor]:
        value, slope = plain(moving, inside)
        return 1024 * value, 1024 * slope

    one, other = (
        fit([Problem(similarity, moving, everywhere, GRID.inverse_affine, GRID.affine, BODY)], "affine")
        for similarity in (plain, large)
    )
    assert one.evaluations == other.evaluations
    np.testing.assert_allclose(one.matrix, other.matrix, atol=1e-6)


def test_the_size_of_a_body_does_not_matter() -> None:
    """The scene in microns, with the millimetres that files write."""
    shrunk = np.diag([1e-3, 1e-3, 1e-3, 1.0])
    truth = Frame("affine", np.zeros(3), 24.0).matrix(TRUTH["affine"])
    everywhere = torch.ones(GRID.shape, dtype=torch.bool)
    similarity, moving = mutual_information(values_at(np.eye(4)), BODY.float()), values_at(truth)
    to_voxels, from_voxels = GRID.inverse_affine @ np.linalg.inv(shrunk), shrunk @ GRID.affine
    found = fit([Problem(similarity, moving, everywhere, to_voxels, from_voxels, BODY)], "affine").matrix
    apart = np.linalg.inv(shrunk) @ found @ shrunk - truth
    places = GRID.to_world(BODY.nonzero().numpy().astype(float))
    assert np.linalg.norm(places @ apart[:3, :3].T + apart[:3, 3], axis=1).mean() < 0.15
