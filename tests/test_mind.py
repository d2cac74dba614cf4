"""MIND-SSC against its formula, its torch twin and its invariances."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_mcbo import neighbours

from crossmorph.describe.mind import mind_ssc, mind_ssc_reference
from crossmorph.errors import InputError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_the_formula(image: torch.Tensor, radius: int, dilation: int) -> np.ndarray:
    """MIND-SSC voxel by voxel in float64."""
    values = image.double().numpy()
    last = np.array(values.shape) - 1

    def at(place: np.ndarray) -> float:
        i, j, k = np.clip(place, 0, last)
        return float(values[i, j, k])

    window = [np.array(step) for step in product(range(-radius, radius + 1), repeat=3)]
    distances = np.empty((12, *values.shape))
    for channel, (a, b) in enumerate(neighbours(dilation)):
        for place in np.ndindex(*values.shape):
            centres = [np.clip(place + step, 0, last) for step in window]
            squares = [(at(centre + a) - at(centre + b)) ** 2 for centre in centres]
            distances[(channel, *place)] = np.mean(squares)
    distances -= distances.min(0)
    variance = distances.mean(0)
    variance = variance.clip(1e-3 * variance.mean(), 1e3 * variance.mean())
    return np.exp(-distances / variance)


@pytest.mark.parametrize(
    ("shape", "radius", "dilation"),
    [((4, 5, 6), 1, 2), ((6, 4, 3), 0, 1), ((3, 5, 4), 2, 1), ((2, 3, 5), 1, 4), ((1, 4, 2), 1, 3)],
)
def test_both_versions_follow_the_formula(shape: tuple[int, int, int], radius: int, dilation: int) -> None:
    image = noise(*shape)
    expected = by_the_formula(image, radius, dilation)
    for version in (mind_ssc, mind_ssc_reference):
        np.testing.assert_allclose(version(image, radius, dilation).numpy(), expected, atol=2e-6)


@settings(max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    radius=st.integers(0, 3),
    dilation=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_compiled_equals_torch(shape: tuple[int, int, int], radius: int, dilation: int, seed: int) -> None:
    image = noise(*shape, seed=seed)
    features = mind_ssc(image, radius, dilation)  # wide windows have much the same distances, which cancel
    torch.testing.assert_close(features, mind_ssc_reference(image, radius, dilation), atol=5e-4, rtol=0)


def test_the_variance_is_clamped_to_a_thousandth_and_a_thousandfold_of_its_mean() -> None:
    image = noise(40, 12, 12) * 1e-3
    image[:4] += 10 * noise(4, 12, 12, seed=1)  # a strong region, so that the weak one lies below the clamp
    features = mind_ssc(image)
    torch.testing.assert_close(features, mind_ssc_reference(image), atol=2e-5, rtol=0)
    weak = features[:, 12:]
    assert weak.min() > 0.99  # distances far below the clamped variance
    assert mind_ssc(image[12:]).min() < 0.5  # alone, the weak region is described like any other


def test_intensity_scale_and_shift_do_not_matter() -> None:
    image = noise(9, 10, 11)
    features = mind_ssc(image)
    assert torch.equal(mind_ssc(-4 * image), features)  # a power of two: exact
    torch.testing.assert_close(mind_ssc(3 * image + 10), features, atol=1e-4, rtol=0)


def test_values_lie_above_zero_and_reach_exactly_one_everywhere() -> None:
    features = mind_ssc(noise(9, 10, 11))
    assert features.shape == (12, 9, 10, 11)
    assert features.dtype == torch.float32
    assert (features > 0).all()
    assert (features.amax(0) == 1).all()
    assert features.min() < 0.1


@pytest.mark.parametrize("value", [0.0, 3.7, -1e6])
def test_a_constant_volume_gives_ones(value: float) -> None:
    image = torch.full((5, 6, 7), value)
    assert torch.equal(mind_ssc(image), torch.ones(12, 5, 6, 7))
    assert torch.equal(mind_ssc_reference(image), torch.ones(12, 5, 6, 7))


def test_volumes_are_described_one_by_one() -> None:
    weak, strong = noise(8, 8, 8), 1000 * noise(8, 8, 8, seed=1)
    before = mind_ssc(weak)
    mind_ssc(strong)
    assert torch.equal(mind_ssc(weak), before)


@pytest.mark.parametrize("layout", [(2, 1, 0), (1, 0, 2)])
def test_memory_layout_does_not_matter(layout: tuple[int, int, int]) -> None:
    image = noise(6, 7, 8)
    view = image.permute(layout).contiguous().permute(*np.argsort(layout).tolist())
    assert torch.equal(mind_ssc(view), mind_ssc(image))


@pytest.mark.parametrize(("radius", "dilation"), [(-1, 2), (1, 0)])
def test_impossible_windows_are_refused(radius: int, dilation: int) -> None:
    with pytest.raises(InputError, match=f"not {radius} and {dilation}"):
        mind_ssc(noise(4, 4, 4), radius, dilation)


@pytest.mark.parametrize(("shape", "pool"), [((9, 10, 11), 2), ((12, 7, 8), 3), ((5, 6, 7), 5)])
def test_pooling_takes_means_over_whole_blocks(shape: tuple[int, int, int], pool: int) -> None:
    image = noise(*shape)
    blocks = [n // pool for n in shape]
    a, b, c = (n * pool for n in blocks)
    whole = mind_ssc(image)[:, :a, :b, :c].reshape(12, blocks[0], pool, blocks[1], pool, blocks[2], pool)
    torch.testing.assert_close(mind_ssc(image, pool=pool), whole.mean((2, 4, 6)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", [0, 5])
def test_impossible_pools_are_refused(pool: int) -> None:
    with pytest.raises(InputError, match=f"cannot be pooled by {pool}"):
        mind_ssc(noise(4, 6, 6), pool=pool)
