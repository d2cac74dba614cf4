"""macMIND against its equations, its torch twin and its invariances; as a loss, and inside a registration."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import atan2, degrees, exp, hypot, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import QUICK, errors, pair

from crossmorph.describe.macmind import (
    PAIRS,
    Sampling,
    aggregated,
    aggregated_square,
    bins,
    context_reference,
    macmind,
    macmind_loss,
    msssc,
)
from crossmorph.errors import InputError
from crossmorph.registration import register
from crossmorph.settings import Descriptor
from crossmorph.systems.mcbo import Volume, _described

Describe = Callable[..., torch.Tensor]

APART = Sampling(concatenated=True)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    volume = noise(*(n + 4 for n in shape), seed=seed)
    return torch.nn.functional.avg_pool3d(volume[None], 5, 1)[0] * 10


# -- the equations -----------------------------------------------------------------------------------------------


def test_eighteen_connections_in_nine_orientations() -> None:
    lengths = [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in PAIRS]
    assert sorted(lengths) == [1] * 6 + [2] * 12
    steps = {tuple(x - y for x, y in zip(a, b, strict=True)) for a, b in PAIRS}
    assert len({max(step, tuple(-s for s in step)) for step in steps}) == 9
    assert len({frozenset(ends) for ends in PAIRS}) == 18


def context_by_the_formula(image: torch.Tensor, distance: int) -> np.ndarray:
    """exp(-s / V) at one distance, voxel by voxel in float64 (equations 8 and 9)."""
    values = image.double().numpy()
    last = np.array(values.shape) - 1

    def at(place: np.ndarray) -> float:
        i, j, k = np.clip(place, 0, last)
        return float(values[i, j, k])

    window = [np.array(step) for step in product(range(-2, 3), repeat=3)]
    squares = np.empty((18, *values.shape))
    for channel, (a, b) in enumerate(PAIRS):
        for place in np.ndindex(*values.shape):
            ends = [at(np.array(place) + distance * np.array(end)) for end in (a, b)]
            squares[(channel, *place)] = (ends[0] - ends[1]) ** 2
    found = np.empty_like(squares)
    for place in np.ndindex(*values.shape):
        around = [tuple(np.clip(np.array(place) + step, 0, last)) for step in window]
        found[(slice(None), *place)] = np.mean([squares[(slice(None), *p)] for p in around], 0)
    return np.exp(-found / found.mean(0).clip(1e-3 * squares.mean()))


def test_the_context_follows_the_formula() -> None:
    image = noise(3, 4, 2)
    near, far = (context_by_the_formula(image, distance) for distance in (2, 4))
    for version in (msssc, context_reference):
        np.testing.assert_allclose(version(image).numpy(), 0.7 * near + 0.3 * far, atol=2e-6)
        both = version(image, sampling=Sampling((4, 2), (0.5, 1.0), True))
        np.testing.assert_allclose(both.numpy(), np.concatenate((0.5 * far, near)), atol=2e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_in_closed_form(axis: int) -> None:
    """10 connections go up by one distance, 8 stay level: V = 10/18 of the square, exp(-1.8) and 1."""
    shape = [19, 19, 19]
    line = 3.0 * torch.arange(19.0) - 20
    image = line.reshape([-1 if a == axis else 1 for a in range(3)]).expand(shape)
    climbing = [a[axis] != b[axis] for a, b in PAIRS]
    assert sum(climbing) == 10
    expected = torch.tensor([exp(-1.8) if climbs else 1.0 for climbs in climbing])
    for sampling in (Sampling(), Sampling((3,), (1.0,))):
        torch.testing.assert_close(msssc(image, sampling=sampling)[:, 9, 9, 9], expected)
        torch.testing.assert_close(macmind(image, sampling=sampling)[:, 9, 9, 9], expected.repeat_interleave(16))


def cells_of(n: int) -> Iterator[tuple[int, int, float]]:
    """(di, dj, weight before division by their sum) of the cells in bin n, from angles and radii."""
    for i, j in product(range(-2, 3), repeat=2):
        radius, angle = hypot(i, j), degrees(atan2(j, i)) % 360
        if radius == 0:
            if n < 8:
                yield i, j, 1 / 8
        elif (n >= 8) == (radius > sqrt(2) + 1e-9) and 45 * (n % 8) <= angle + 1e-9 < 45 * (n % 8 + 1):
            yield i, j, 1.0


def test_every_bin_holds_its_share_of_the_window() -> None:
    sizes = [sum(weight for *_, weight in cells_of(n)) for n in range(16)]
    assert sizes == pytest.approx([1 + 1 / 8] * 8 + [2.0] * 8)  # 25 cells, nothing left out, no bin empty
    expected = np.zeros((16, 5, 5))
    for n in range(16):
        for i, j, weight in cells_of(n):
            expected[n, i + 2, j + 2] = weight / sizes[n]
    np.testing.assert_allclose(bins(), expected, atol=1e-7)


def test_bins_are_means_of_the_context_around() -> None:
    image = noise(6, 5, 7)
    context = context_reference(image).numpy()
    found = macmind(image).reshape(18, 16, 6, 5, 7).numpy()
    for n, place in product(range(16), ((0, 0, 0), (3, 2, 3), (5, 4, 6), (1, 4, 2))):
        cells, total = list(cells_of(n)), np.zeros(18)
        for (i, j, weight), h in product(cells, range(-2, 3)):
            at = np.clip(np.add(place, (i, j, h)), 0, np.array(image.shape) - 1)
            total += weight * context[(slice(None), *at)]
        expected = total / (5 * sum(weight for *_, weight in cells))
        np.testing.assert_allclose(found[(slice(None), n, *place)], expected, atol=2e-6)


@settings(max_examples=25)
@given(
    shape=st.tuples(*[st.integers(1, 11)] * 3),
    pool=st.integers(1, 4),
    sampling=st.sampled_from([Sampling(), APART, Sampling((1,), (1.0,)), Sampling((3, 1, 2), (0.2, 0.3, 0.5))]),
    seed=st.integers(0, 1000),
)
def test_compiled_equals_torch(shape: tuple[int, int, int], pool: int, sampling: Sampling, seed: int) -> None:
    image, pool = noise(*shape, seed=seed), min(pool, *shape)
    context = context_reference(image, sampling)
    for found, whole in ((msssc, context), (macmind, aggregated(context))):
        expected = torch.nn.functional.avg_pool3d(whole[None], pool)[0]
        torch.testing.assert_close(found(image, pool, sampling), expected, atol=2e-6, rtol=0)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_nothing() -> None:
    image = noise(14, 9, 8)
    torch.set_num_threads(1)
    alone = macmind(image, 2)
    torch.set_num_threads(3)
    assert torch.equal(macmind(image, 2), alone)


# -- what it promises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("describe", [msssc, macmind])
def test_scale_shift_and_inversion_of_intensities_do_not_matter(describe: Describe) -> None:
    image = noise(9, 10, 11)
    features = describe(image)
    assert torch.equal(describe(-4 * image), features)  # a power of two: exact
    torch.testing.assert_close(describe(3 * image + 10), features, atol=1e-4, rtol=0)
    torch.testing.assert_close(describe(100 - 7 * image), features, atol=1e-4, rtol=0)
    assert features.min() > 0
    assert features.max() <= 1
    assert features.std() > 0.01


@pytest.mark.parametrize("describe", [msssc, macmind])
@pytest.mark.parametrize("value", [0.0, 3.7, -1e6])
def test_a_constant_volume_gives_ones(describe: Describe, value: float) -> None:
    found = describe(torch.full((5, 6, 7), value))
    torch.testing.assert_close(found, torch.ones_like(found))
    reference = context_reference(torch.full((5, 6, 7), value))
    assert torch.equal(reference, torch.ones_like(reference))


def test_flat_air_beside_a_body_gives_ones() -> None:
    image = torch.zeros(30, 12, 12)
    image[:10] = noise(10, 12, 12)
    image[10:] += 1e-4 * noise(20, 12, 12, seed=1)
    assert msssc(image)[:, 20:].min() > 0.999
    assert msssc(image[20:]).min() < 0.5  # alone, it is described like any other


def test_nothing_is_seen_beyond_the_reach() -> None:
    """What is not valid is filled, and has no vote 6 (context) or 8 voxels (macMIND) on."""
    image = noise(23, 23, 23)
    spoiled = image.clone()
    spoiled[11, 11, 11] += 1
    distance = np.abs(np.indices(image.shape) - 11).max(0)
    for describe, reach in ((msssc, 6), (macmind, 8)):
        changed = (describe(spoiled) != describe(image)).any(0).numpy()
        assert not changed[distance > reach].any()
        assert changed[11 + reach, 11, 11]


@pytest.mark.parametrize("pool", [0, 5])
def test_impossible_pools_are_refused(pool: int) -> None:
    with pytest.raises(InputError, match=f"cannot be pooled by {pool}"):
        macmind(noise(4, 6, 6), pool=pool)


@pytest.mark.parametrize("given", [((), ()), ((0, 2), (0.5, 0.5)), ((2, 4), (1.0,))])
def test_impossible_samplings_are_refused(given: tuple[tuple[int, ...], tuple[float, ...]]) -> None:
    with pytest.raises(InputError, match="distances of 1 voxel or more and a share for each"):
        Sampling(*given)


# -- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), APART])
def test_the_loss_is_the_mean_squared_difference_of_descriptors(sampling: Sampling) -> None:
    fixed, warped = noise(2, 1, 7, 8, 6), noise(2, 1, 7, 8, 6, seed=1)
    weight = torch.rand(2, 1, 7, 8, 6, generator=torch.Generator().manual_seed(2))
    pairs = zip(fixed[:, 0], warped[:, 0], strict=True)
    squares = torch.stack([(macmind(f, 1, sampling) - macmind(w, 1, sampling)).square().mean(0) for f, w in pairs])
    torch.testing.assert_close(macmind_loss(fixed, warped, sampling=sampling), squares.mean())
    expected = (squares * weight[:, 0]).sum() / weight.sum()
    torch.testing.assert_close(macmind_loss(fixed, warped, weight, sampling), expected)
    assert macmind_loss(fixed, 5 - 2 * fixed, sampling=sampling) < 1e-9


def test_the_gradient_is_that_of_finite_differences() -> None:
    fixed, warped = noise(3, 2, 4).double(), noise(3, 2, 4, seed=1).double().requires_grad_()
    weight = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(2)).double()
    assert torch.autograd.gradcheck(lambda image: 100 * macmind_loss(fixed, image, weight), (warped,))


def test_the_gradient_is_that_of_whole_descriptors_and_needs_little_memory() -> None:
    fixed, warped = noise(12, 10, 8), noise(12, 10, 8, seed=1).requires_grad_()
    kept = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = macmind_loss(fixed, warped)
    (found,) = torch.autograd.grad(loss, warped)
    whole = aggregated(context_reference(warped)) - aggregated(context_reference(fixed))
    (expected,) = torch.autograd.grad(whole.square().mean(), warped)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-4)
    assert expected.abs().max() > 1e-5
    assert kept[0] < 30 * warped.numel()  # the descriptors alone have 288 channels


def test_the_loss_is_least_where_images_of_two_contrasts_agree() -> None:
    image = smooth_noise(20, 18, 16)
    other = torch.exp(-image / 4)
    losses = [float(macmind_loss(image, other.roll(shift, 0))) for shift in (-2, -1, 0, 1, 2)]
    assert losses[0] > losses[1] > losses[2] < losses[3] < losses[4]


def test_a_fixed_context_may_be_kept() -> None:
    fixed, warped = noise(6, 7, 8), noise(6, 7, 8, seed=1)
    difference = context_reference(fixed) - context_reference(warped)
    found = aggregated_square(difference, torch.ones(6, 7, 8)) / (288 * fixed.numel())
    torch.testing.assert_close(found, macmind_loss(fixed, warped))


def test_volumes_of_two_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"one shape, not \(4, 5, 6\) and \(4, 5, 7\)"):
        macmind_loss(noise(4, 5, 6), noise(4, 5, 7))


# -- in a registration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), [("msssc", 18), ("macmind", 288)])
def test_as_a_descriptor_it_costs_0_to_12_whatever_its_channels(name: str, channels: int) -> None:
    image, ones = noise(12, 12, 12), torch.ones(12, 12, 12, dtype=torch.bool)
    chosen = replace(QUICK, describe=(Descriptor(name),))  # type: ignore[arg-type]
    found = _described(Volume(image, ones, ones), chosen, 0)
    assert found.features is not None
    whole = msssc(image, 2) if name == "msssc" else macmind(image, 2)
    torch.testing.assert_close(found.features, whole * sqrt(12 / channels))
    assert found.base == 2


@pytest.mark.parametrize("name", ["msssc", "macmind"])
def test_a_pair_of_two_contrasts_is_registered(name: str) -> None:
    result = register(*pair(), settings=replace(QUICK, describe=(Descriptor(name),)))  # type: ignore[arg-type]
    assert errors(result.transform).mean() < 0.35 * errors(lambda points: points).mean()
    assert result.record["settings"]["describe"] == ({"name": name, "weight": 1.0, "stride": 2},)
