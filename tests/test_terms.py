"""Objective terms: values by formula, gradients by autograd and finite differences, and masks."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import plain_mcbo as plain
import pytest
import torch

from crossmorph.optimise.terms import (
    DescriptorSSD,
    LocalCorrelation,
    MutualInformation,
    box_mean,
    diffusion,
    folding,
    in_view,
    regularity,
    smooth,
    with_gradient,
)

SHAPE = (7, 6, 8)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def voxels() -> torch.Tensor:
    """The coordinates of every voxel, (3, I, J, K)."""
    return torch.stack(torch.meshgrid(*[torch.arange(n) for n in SHAPE], indexing="ij"))


def mask(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return noise(*shape, seed=seed) > -1.3


def ssd(reproduce: bool = False, dtype: torch.dtype = torch.float32) -> DescriptorSSD:
    fixed, moving = noise(5, *SHAPE).to(dtype), noise(5, *SHAPE, seed=1).to(dtype)
    return DescriptorSSD(fixed, moving, mask(2), mask(3), reproduce)


def correlation(dtype: torch.dtype = torch.float32, radius: int = 2) -> LocalCorrelation:
    fixed, moving = noise(*SHAPE).to(dtype), noise(*SHAPE, seed=1).to(dtype)
    return LocalCorrelation(fixed, moving, mask(2), mask(3), radius, 1e-2)


def information(dtype: torch.dtype = torch.float32) -> MutualInformation:
    fixed, moving = (torch.sigmoid(noise(*SHAPE, seed=seed)).to(dtype) for seed in (0, 1))
    return MutualInformation(fixed, moving, mask(2), mask(3), 8)


TERMS: list[Callable[..., DescriptorSSD | LocalCorrelation | MutualInformation]] = [
    ssd,
    information,
    lambda **kwargs: ssd(True, **kwargs),
    correlation,
    lambda **kwargs: correlation(radius=1, **kwargs),
]


@pytest.mark.parametrize("make", TERMS)
@pytest.mark.parametrize("size", [0.4, 3.0])  # inside, and well beyond the faces
def test_compiled_value_and_gradient_equal_autograd(make: Callable[..., DescriptorSSD], size: float) -> None:
    term, field = make(), size * noise(3, *SHAPE, seed=4)
    value, gradient = term(field)
    expected, slope = with_gradient(term.value, field)
    assert value == pytest.approx(expected, rel=1e-4)
    assert slope.abs().max() > 1e-4
    torch.testing.assert_close(gradient, slope, atol=1e-4 * float(slope.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("make", TERMS)
def test_gradient_is_the_slope_of_the_value(make: Callable[..., DescriptorSSD]) -> None:
    term = replace(make(dtype=torch.float64), moving_valid=torch.ones(SHAPE, dtype=torch.bool))
    last = torch.tensor(SHAPE)[:, None, None, None] - 1
    places = (voxels() + 0.8 * noise(3, *SHAPE, seed=5).double()).clamp_min(0.1).minimum(last - 0.1)
    field, step = places - voxels(), 1e-6 * noise(3, *SHAPE, seed=6).double()
    _, gradient = with_gradient(term.value, field)
    slope = (term.value(field + step) - term.value(field - step)) / 2
    assert float(slope) == pytest.approx(float((gradient * step).sum()), rel=1e-5)


def test_ssd_by_brute_force() -> None:
    term, field = ssd(), 1.5 * noise(3, *SHAPE, seed=4)
    moving, total = term.moving.double().numpy(), 0.0
    for place in np.ndindex(*SHAPE):
        there = np.array(place) + field[(slice(None), *place)].double().numpy()
        low = np.floor(there).astype(int)
        corners = [low + c for c in np.ndindex(2, 2, 2)]
        seen = all((c >= 0).all() and (c < SHAPE).all() and term.moving_valid[tuple(c)] for c in corners)
        if seen and term.fixed_valid[place]:
            weights = [np.prod(1 - np.abs(there - c)) for c in corners]
            moved = sum(w * moving[(slice(None), *c)] for w, c in zip(weights, corners, strict=True))
            total += float(((moved - term.fixed[(slice(None), *place)].numpy()) ** 2).sum())
    assert term(field)[0] == pytest.approx(total / int(term.fixed_valid.sum()), rel=1e-5)


def test_released_ssd_by_grid_sample() -> None:
    everywhere = torch.ones(SHAPE, dtype=torch.bool)
    fixed, moving, field = noise(5, *SHAPE), noise(5, *SHAPE, seed=1), 2 * noise(3, *SHAPE, seed=4)

    def objective(w: torch.Tensor) -> torch.Tensor:
        return ((plain.sampled(moving, w) - fixed) ** 2).sum(0).mean()

    expected, slope = with_gradient(objective, field)
    value, gradient = DescriptorSSD(fixed, moving, everywhere, everywhere, reproduce=True)(field)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-4)


def test_squared_correlation_by_brute_force() -> None:
    term = correlation()
    fixed, moving = term.fixed.double().numpy(), term.moving.double().numpy()
    total = 0.0
    for place in np.ndindex(*SHAPE):
        window = tuple(slice(max(p - 2, 0), p + 3) for p in place)
        f, m = fixed[window].ravel(), moving[window].ravel()
        squared = np.cov(f, m, bias=True)[0, 1] ** 2 / ((f.var() + 1e-2) * (m.var() + 1e-2))
        total += squared * bool(term.fixed_valid[place])
    value, _ = term(torch.zeros(3, *SHAPE))
    assert value == pytest.approx(-total / int(term.fixed_valid.sum()), rel=1e-5)


def test_what_is_not_valid_adds_nothing_to_the_ssd() -> None:
    term, field = ssd(), noise(3, *SHAPE, seed=4)
    garbage = 1e4 * noise(5, *SHAPE, seed=7)
    fixed = torch.where(term.fixed_valid, term.fixed, garbage)
    moving = torch.where(term.moving_valid, term.moving, torch.full_like(garbage, torch.nan))
    changed = DescriptorSSD(fixed, moving, term.fixed_valid, term.moving_valid)
    value, gradient = term(field)
    assert changed(field)[0] == value
    assert torch.equal(changed(field)[1], gradient)
    assert (gradient[:, ~term.fixed_valid] == 0).all()
    _, slope = with_gradient(ssd().value, field)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-4)


def test_correlation_windows_around_unused_voxels_do_not_count() -> None:
    """What lies further than the window's radius from every used voxel has no influence."""
    shape = (12, 6, 6)
    used = torch.zeros(shape, dtype=torch.bool)
    used[:4] = True
    everywhere, near = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    near[:6] = True  # two voxels, the radius, around what is used
    fixed, moving, field = noise(*shape), noise(*shape, seed=1), 0.3 * noise(3, *shape, seed=2)
    field[0, :6].clamp_(max=-0.01)  # so that moving is read at planes 0 to 6 only
    value, gradient = LocalCorrelation(fixed, moving, used, everywhere)(field)
    assert (gradient[:, 6:] == 0).all()
    assert gradient[:, 5].abs().max() > 0
    garbage = torch.where(near, fixed, 50.0), torch.where(near, moving, -50.0)
    other, slope = LocalCorrelation(*garbage, used, everywhere)(field)
    assert other == value
    assert torch.equal(slope, gradient)


def test_correlation_does_not_pull_on_what_is_not_valid() -> None:
    term, field = correlation(), 0.8 * noise(3, *SHAPE, seed=4)
    _, gradient = term(field)
    unseen = ~in_view((voxels() + field).permute(1, 2, 3, 0), term.moving_valid)
    assert unseen.any()
    assert (gradient[:, unseen] == 0).all()
    assert (gradient[:, ~unseen] != 0).any()


def test_correlation_of_one_image_with_itself_is_one_whatever_the_contrast() -> None:
    image, everywhere = noise(*SHAPE), torch.ones(SHAPE, dtype=torch.bool)
    value, _ = LocalCorrelation(image, -3 * image + 2, everywhere, everywhere)(torch.zeros(3, *SHAPE))
    assert value == pytest.approx(-1, abs=1e-3)


def test_nothing_in_use_costs_nothing() -> None:
    nowhere, zero = torch.zeros(SHAPE, dtype=torch.bool), torch.zeros(3, *SHAPE)
    for term in (
        DescriptorSSD(noise(2, *SHAPE), noise(2, *SHAPE), nowhere, nowhere),
        LocalCorrelation(noise(*SHAPE), noise(*SHAPE), nowhere, nowhere),
    ):
        value, gradient = term(zero)
        assert value == 0
        assert (gradient == 0).all()


def test_places_that_are_not_numbers_do_not_crash() -> None:
    field = torch.full((3, *SHAPE), torch.nan)
    ssd()(field)
    value, _ = correlation()(field)
    assert np.isnan(value)


# -- regularity --------------------------------------------------------------------------------------------------


def corner_determinants(field: torch.Tensor) -> list[float]:
    """The one-sided Jacobian determinants of x + u(x) at every voxel, one by one."""
    u, found = field.double().numpy(), []
    for place in product(*[range(n) for n in u.shape[1:]]):
        for side in product((-1, 1), repeat=3):
            matrix = np.eye(3)
            for axis in range(3):
                other = np.array(place)
                other[axis] += side[axis]
                if not 0 <= other[axis] < u.shape[1 + axis]:
                    break
                matrix[:, axis] += side[axis] * (u[(slice(None), *other)] - u[(slice(None), *place)])
            else:
                found.append(np.linalg.det(matrix))
    return found


def test_folding_by_brute_force() -> None:
    field = 0.4 * noise(3, 5, 4, 6)
    determinants = corner_determinants(field)
    assert len(determinants) == 8 * 4 * 3 * 5
    assert min(determinants) < 0 < max(determinants)
    expected = np.mean([max(0.3 - d, 0) ** 2 for d in determinants])
    assert folding(field).item() == pytest.approx(expected, rel=1e-5)
    assert regularity(field, 0.0, 2.0)[0] == pytest.approx(2 * expected, rel=1e-5)


@pytest.mark.parametrize("size", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(19, 4, 5), (2, 3, 2), (1, 4, 5)])
def test_regularity_equals_autograd(shape: tuple[int, int, int], size: float) -> None:
    field = size * noise(3, *shape)
    expected, slope = with_gradient(lambda u: 1.7 * diffusion(u) + 40 * folding(u), field)
    value, gradient = regularity(field, 1.7, 40.0)
    assert value == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradient, slope, atol=1e-4 * float(slope.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("term", [diffusion, folding])
def test_regularity_gradients_are_slopes(term: Callable[[torch.Tensor], torch.Tensor]) -> None:
    field, step = 0.5 * noise(3, 4, 5, 3).double(), 1e-6 * noise(3, 4, 5, 3, seed=1).double()
    _, gradient = with_gradient(term, field)
    slope = (term(field + step) - term(field - step)) / 2
    assert float(slope) == pytest.approx(float((gradient * step).sum()), rel=1e-5)


def test_diffusion_of_a_linear_field() -> None:
    i, _, k = voxels().float()
    field = torch.stack([2 * i, 3 * k, torch.zeros(SHAPE)])
    assert diffusion(field).item() == pytest.approx(2**2 / 3 + 3**2 / 3)
    value, gradient = regularity(field, 2.0, 0.0)
    assert value == pytest.approx(2 * (2**2 / 3 + 3**2 / 3))
    inner = gradient[:, 1:-1, 1:-1, 1:-1]  # the gradient is minus the Laplacian
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-6, rtol=0)


def test_only_the_change_from_an_anchor_costs() -> None:
    anchor, change = 0.05 * noise(3, *SHAPE), 0.05 * noise(3, *SHAPE, seed=1)
    value, gradient = regularity(anchor, 3.0, 50.0, anchor=anchor)
    assert value == 0
    assert (gradient == 0).all()
    value, gradient = regularity(anchor + change, 3.0, 0.0, anchor=anchor)
    expected, slope = with_gradient(lambda u: 3 * diffusion(u), change)
    assert value == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-4)


# -- smoothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (1, 2, 5)])
def test_smoothing_is_its_own_adjoint(repeat: bool, shape: tuple[int, int, int]) -> None:
    x, y = noise(3, *shape), noise(3, *shape, seed=1)
    left, right = (smooth(x, 3, repeat) * y).sum(), (x * smooth(y, 3, repeat)).sum()
    assert float(left) == pytest.approx(float(right), abs=1e-4)


def test_smoothing_keeps_constants_or_damps_them_as_released() -> None:
    ones = torch.ones(2, 9, 9, 9)
    torch.testing.assert_close(smooth(ones, 3), ones)
    damped = smooth(ones, 3, repeat=False)
    assert float(damped[0, 4, 4, 4]) == pytest.approx(1)
    assert float(damped[0, 0, 4, 4]) == pytest.approx(0.48, abs=0.005)  # measured on the released code
    assert float(damped[0, 0, 0, 0]) == pytest.approx(0.11, abs=0.005)
    field = noise(3, *SHAPE)
    released = plain.mean3(plain.mean3(plain.mean3(field)))
    torch.testing.assert_close(smooth(field, 3, repeat=False), released, atol=1e-6, rtol=1e-5)


def test_smoothing_repeats_the_border() -> None:
    field = noise(3, *SHAPE)
    expected = field
    for _ in range(2):
        padded = torch.nn.functional.pad(expected[None], (1,) * 6, mode="replicate")
        expected = torch.nn.functional.avg_pool3d(padded, 3, stride=1)[0]
    torch.testing.assert_close(smooth(field, 2), expected, atol=1e-6, rtol=1e-5)


def test_box_mean_leaves_out_what_does_not_exist() -> None:
    volume = noise(2, *SHAPE)
    mean = box_mean(volume, 2)
    for place in ((0, 0, 0), (3, 2, 4), (6, 0, 7)):
        window = tuple(slice(max(p - 2, 0), p + 3) for p in place)
        expected = volume[(slice(None), *window)].mean(dim=(1, 2, 3))
        torch.testing.assert_close(mean[(slice(None), *place)], expected)
    torch.testing.assert_close(box_mean(volume, 1, counted=True), plain.mean3(volume))


def test_threads_do_not_change_anything(threads: None) -> None:
    field, found = noise(3, *SHAPE), []
    for count in (1, 2):
        torch.set_num_threads(count)
        parts = [ssd()(field), correlation()(field), regularity(field, 1.0, 50.0), (0.0, smooth(field, 3))]
        found.append(parts)
    for (one, slope), (other, again) in zip(*found, strict=True):
        assert one == other
        assert torch.equal(slope, again)


@pytest.mark.gpu
def test_cuda_gives_the_same() -> None:
    field = 0.8 * noise(3, *SHAPE)
    for make in TERMS:
        term = make()
        names = ("fixed", "moving", "fixed_valid", "moving_valid")
        on_cuda = replace(term, **{name: getattr(term, name).cuda() for name in names})
        for found, expected in zip(on_cuda(field.cuda()), term(field), strict=True):
            torch.testing.assert_close(
                torch.as_tensor(found).cpu(), torch.as_tensor(expected), atol=1e-4, rtol=1e-3
            )
    value, gradient = regularity(field.cuda(), 1.0, 50.0)
    expected, slope = regularity(field, 1.0, 50.0)
    assert value == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradient.cpu(), slope, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(smooth(field.cuda(), 3).cpu(), smooth(field, 3))
