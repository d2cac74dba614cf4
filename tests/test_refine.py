"""Continuous refinement: what it recovers, that it does not fold, and how much detail it allows."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.optimise.choose import SMOOTHNESS, Choice, choose_smoothness
from crossmorph.optimise.field import Adam, refine, resize, resize_back
from crossmorph.optimise.terms import DescriptorSSD, folding, smooth


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def voxels(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")).float()


def waves(places: torch.Tensor, count: int = 6) -> torch.Tensor:
    """Smooth features (count, I, J, K) given by a formula, at places (3, I, J, K) in voxels."""
    direction = noise(count, 3, seed=11)
    direction = 0.55 * direction / direction.norm(dim=1, keepdim=True)  # a period of 11 voxels
    phase = 2 * math.pi * torch.rand(count, generator=torch.Generator().manual_seed(12))
    return torch.cos(torch.einsum("ca,aijk->cijk", direction, places) + phase[:, None, None, None])


def smooth_motion(shape: tuple[int, int, int], size: float = 1.5) -> torch.Tensor:
    """A displacement of up to ``size`` voxels with one period over the volume."""
    relative = voxels(shape) / torch.tensor(shape)[:, None, None, None]
    turned = relative.roll(1, 0) + relative.roll(2, 0)
    return size * torch.sin(math.pi * turned)


def ssd(fixed: torch.Tensor, moving: torch.Tensor, mask: torch.Tensor | None = None) -> DescriptorSSD:
    everywhere = torch.ones(fixed.shape[1:], dtype=torch.bool)
    return DescriptorSSD(fixed, moving, everywhere if mask is None else mask, everywhere)


@pytest.mark.parametrize("spread", [1, 2])
def test_a_smooth_motion_is_recovered(spread: int) -> None:
    shape = (24, 22, 26)
    truth = smooth_motion(shape)
    term = ssd(waves(voxels(shape) + truth), waves(voxels(shape)))
    start = torch.zeros(3, *[-(-n // spread) for n in shape])
    found = resize(refine(term, start, shape, 60, 1e-3, learning_rate=0.1), shape)
    inner = (slice(None), *[slice(3, -3)] * 3)
    error = (found - truth)[inner].norm(dim=0)
    assert truth[inner].norm(dim=0).mean() > 0.8
    assert error.mean() < 0.1


def test_the_value_falls_and_is_reported() -> None:
    shape = (14, 14, 14)
    term = ssd(waves(voxels(shape) + smooth_motion(shape)), waves(voxels(shape)))
    seen: list[tuple[int, float]] = []
    refine(term, torch.zeros(3, *shape), shape, 20, 0.01, learning_rate=0.1, each=lambda *pair: seen.append(pair))
    steps, values = zip(*seen, strict=True)
    assert steps == tuple(range(20))
    assert values[-1] < 0.1 * values[0]
    assert sum(after < before for before, after in pairwise(values)) > 15


def test_folds_are_prevented() -> None:
    """Unrelated images pull in all directions; only the penalty keeps the field a deformation."""
    shape = (16, 15, 14)
    term = ssd(*[smooth(noise(8, *shape, seed=seed), 2) for seed in (0, 1)])

    def folded(field: torch.Tensor) -> float:
        """Share of voxels whose central-difference Jacobian is not positive."""
        gradients = torch.stack(torch.gradient(field, dim=(1, 2, 3)), 1)
        matrix = gradients.permute(2, 3, 4, 0, 1) + torch.eye(3)
        return float((torch.linalg.det(matrix) <= 0).float().mean())

    free, kept = (refine(term, torch.zeros(3, *shape), shape, 40, 0.0, weight) for weight in (0.0, 50.0))
    assert folded(free) > 0.01
    assert folded(kept) == 0
    assert folding(kept, 0.0) < 1e-3 * folding(free, 0.0)


def test_an_anchor_keeps_a_large_motion() -> None:
    shape = (14, 14, 14)
    start = smooth_motion(shape, 4.0)
    flat = ssd(torch.ones(2, *shape), torch.ones(2, *shape))  # says nothing
    kept = refine(flat, start, shape, 20, 30.0, 0.0, anchor=smooth(start, 3))
    lost = refine(flat, start, shape, 20, 30.0, 0.0)
    assert torch.equal(kept, smooth(start, 3))
    assert lost.diff(dim=2).abs().mean() < 0.7 * kept.diff(dim=2).abs().mean()


def test_reproducing_returns_the_field_of_the_last_evaluation() -> None:
    shape = (8, 8, 8)
    start, term = noise(3, *shape), ssd(noise(2, *shape), noise(2, *shape, seed=1))
    once = refine(term, start, shape, 1, 1.0, 0.0, reproduce=True)
    assert torch.equal(once, smooth(start, 3, repeat=False))
    moved = refine(term, start, shape, 1, 1.0, 0.0)
    assert (moved - smooth(start, 3)).abs().max() > 0.1


def test_the_start_is_not_changed() -> None:
    shape = (8, 8, 8)
    start = noise(3, *shape)
    before = start.clone()
    refine(ssd(noise(2, *shape), noise(2, *shape, seed=1)), start, shape, 3, 1.0)
    assert torch.equal(start, before)


@pytest.mark.parametrize("shape", [(5, 7, 9), (12, 3, 6), (1, 1, 1)])
def test_resizing_keeps_the_motion_in_the_world(shape: tuple[int, int, int]) -> None:
    """A constant shift by a share of the field of view is the same share on any grid."""
    share = torch.tensor([0.1, -0.2, 0.3])[:, None, None, None]
    old = torch.tensor([6.0, 8.0, 4.0])[:, None, None, None]
    field = (share * old).expand(3, 6, 8, 4)
    new = resize(field, shape)
    expected = (share * torch.tensor(shape)[:, None, None, None]).expand(3, *shape)
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(resize(field, shape, scaled=False), (share * old).expand(3, *shape))


@pytest.mark.parametrize("shape", [(7, 9, 5), (3, 4, 6), (5, 2, 1)])
def test_compiled_resizing_agrees_with_torch_and_has_its_adjoint(shape: tuple[int, int, int]) -> None:
    field = noise(3, 5, 4, 3)
    expected = F.interpolate(field[None], shape, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(resize(field, shape, scaled=False), expected)
    if all(new >= old for new, old in zip(shape, field.shape[1:], strict=True)):
        gradient = noise(3, *shape, seed=1)
        there, back = (resize(field, shape) * gradient).sum(), (field * resize_back(gradient, (5, 4, 3))).sum()
        torch.testing.assert_close(there, back)


def test_adam_steps_as_that_of_torch() -> None:
    start, own = noise(3, 4, 5, 6), noise(3, 4, 5, 6)
    theirs = start.clone().requires_grad_()
    adam, oracle = Adam(own, 0.1), torch.optim.Adam([theirs], 0.1)
    for seed in range(5):
        theirs.grad = noise(3, 4, 5, 6, seed=seed)
        oracle.step()
        adam.step(theirs.grad)
    torch.testing.assert_close(own, theirs.detach())


# -- how much detail ---------------------------------------------------------------------------------------------


def chosen(truth: torch.Tensor, noisy: float) -> Choice:
    """The choice for a motion under noise that is smooth enough to be followed, judged by what shares no noise."""
    shape = tuple(truth.shape[1:])
    places = voxels(shape)
    one, other = (smooth(noise(6, *shape, seed=seed), 2) for seed in (21, 22))
    fitted = ssd(waves(places + truth) + noisy * one / one.std(), waves(places) + noisy * other / other.std())
    judge = ssd(waves(places + truth, 7), waves(places, 7))

    def fit(smoothness: float, begin: torch.Tensor) -> torch.Tensor:
        return refine(fitted, begin, shape, 25, smoothness)

    return choose_smoothness(fit, lambda field: -judge(field)[0], torch.zeros_like(truth), [0.01] * 4)


def test_smooth_motion_under_noise_is_fitted_smoothly_and_detail_in_detail() -> None:
    shape = (40, 40, 40)
    calm = torch.ones(3, *shape) * torch.tensor([0.5, -0.4, 0.3])[:, None, None, None]
    detailed = 8 * smooth(noise(3, *shape, seed=23), 8)
    assert chosen(calm, 0.7).smoothness == max(SMOOTHNESS)
    assert chosen(detailed, 0.02).smoothness == min(SMOOTHNESS)


def test_detail_is_added_until_it_does_not_pay() -> None:
    """Scores made by hand: the third candidate gains too little, so that the second is taken and no more tried."""
    scores = dict(zip(SMOOTHNESS, (-1.0, -0.8, -0.795, 0.0, 0.0), strict=True))
    begun: list[float] = []

    def fit(smoothness: float, begin: torch.Tensor) -> torch.Tensor:
        begun.append(float(begin.max()))
        return torch.full((3, 2, 2, 2), smoothness)

    choice = choose_smoothness(
        fit, lambda field: scores[round(float(field.max()), 3)], torch.zeros(3, 2, 2, 2), [0.01] * 4
    )
    assert choice.smoothness == SMOOTHNESS[1]
    assert choice.scores == {weight: scores[weight] for weight in SMOOTHNESS[:3]}
    assert torch.equal(choice.field, torch.full((3, 2, 2, 2), SMOOTHNESS[1]))
    assert begun == [0.0, SMOOTHNESS[0], SMOOTHNESS[1]]  # each begins with the field before
