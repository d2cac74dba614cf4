"""LC2 against brute-force least squares, its dense map against patch by patch, and its invariances."""

import numpy as np
import pytest
import torch

from crossmorph.describe.lc2 import (
    RADII,
    gradient_length,
    lc2,
    lc2_map,
    lc2_pairs,
    lc2_similarity,
    local_deviation,
    zscored,
)
from crossmorph.errors import InputError


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """z-scored blobs of a few voxels."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        noise = torch.nn.functional.avg_pool3d(noise[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    return zscored(noise)


def differences(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, 1, mode="edge")
    steps = [np.roll(padded, -1, a) - np.roll(padded, 1, a) for a in range(3)]
    return np.sqrt(sum(s**2 for s in steps))[1:-1, 1:-1, 1:-1]


def by_least_squares(b: np.ndarray, x: np.ndarray, g: np.ndarray) -> float:
    """One window: the ridge as three more equations, LC2 = 1 - residual / variance."""
    n = b.size
    design = np.stack([x.ravel(), g.ravel(), np.ones(n)], 1)
    rows = np.concatenate([design, np.sqrt(1e-3 * n) * np.eye(3)])
    fit = np.linalg.lstsq(rows, np.concatenate([b.ravel(), np.zeros(3)]), rcond=None)[0]
    ridged = ((design @ fit - b.ravel()) ** 2).mean() + 1e-3 * (fit**2).sum()
    return float(np.clip((b.var() - ridged) / max(b.var(), 1e-2), 0, 1))


def brute(b: torch.Tensor, x: torch.Tensor, place: tuple[int, ...], radii: tuple[int, ...] = RADII) -> float:
    g = differences(x.double().numpy())
    scores = []
    for r in radii:
        cube = tuple(slice(max(p - r, 0), p + r + 1) for p in place)
        scores.append(by_least_squares(b.double().numpy()[cube], x.double().numpy()[cube], g[cube]))
    return float(np.mean(scores))


@pytest.mark.parametrize("place", [(9, 9, 9), (8, 10, 11), (0, 3, 18), (18, 18, 18)])
def test_dense_map_is_least_squares(place: tuple[int, int, int]) -> None:
    b, x = smooth(19, 19, 19), smooth(19, 19, 19, seed=1)
    b = zscored(0.5 * b + 0.8 * gradient_length(x) + 0.3 * x)
    assert float(lc2(b, x)[place]) == pytest.approx(brute(b, x, place), abs=1e-5)


def test_patch_against_volume_is_patch_by_patch() -> None:
    patch, volume = smooth(17, 17, 17), smooth(24, 20, 22, seed=1)
    dense = lc2_map(patch, volume)
    g = differences(volume.double().numpy())
    for place in [(8, 8, 8), (12, 10, 13), (16, 12, 14)]:
        scores = []
        for r in RADII:
            near = tuple(slice(p - r, p + r + 1) for p in place)
            middle = slice(8 - r, 9 + r)
            b = patch.double().numpy()[middle, middle, middle]
            scores.append(by_least_squares(b, volume.double().numpy()[near], g[near]))
        assert float(dense[place]) == pytest.approx(np.mean(scores), abs=1e-5)


def test_a_patch_finds_its_own_place() -> None:
    volume = smooth(30, 28, 26)
    place = (14, 12, 13)
    patch = volume[place[0] - 7 : place[0] + 8, place[1] - 7 : place[1] + 8, place[2] - 7 : place[2] + 8]
    dense = lc2_map(-0.8 * patch + 0.1, volume)
    assert np.unravel_index(int(dense.argmax()), dense.shape) == place
    assert dense[place] > 0.98


def test_all_pairs_are_each_pair() -> None:
    patches = torch.stack([smooth(17, 17, 17, seed=s) for s in range(4)])
    table = lc2_pairs(patches[:3], patches[1:])
    for i in range(3):
        for j in range(3):
            whole = lc2(patches[i], patches[j + 1])[8, 8, 8]
            assert float(table[i, j]) == pytest.approx(float(whole), abs=1e-5)


def test_explained_and_explaining_are_not_the_same() -> None:
    x = smooth(15, 15, 15)
    b = gradient_length(x)
    b = zscored(b)
    assert float(lc2(b, x)[7, 7, 7]) > 0.97  # b is the gradient length of x
    assert float(lc2(x, b)[7, 7, 7]) < 0.5  # and x is nothing that b or its gradient could make


def test_scale_and_sign_do_not_matter_after_z_scoring() -> None:
    b, x = smooth(20, 19, 18), smooth(20, 19, 18, seed=1)
    b = b + 0.7 * x
    once = lc2_similarity(b, x)
    assert lc2_similarity(-40 * b + 1000, 0.01 * x - 3) == pytest.approx(once, abs=1e-5)
    assert lc2_similarity(b, b) > 0.99
    assert lc2_similarity(smooth(20, 19, 18, seed=5), x) < 0.3


def test_what_is_not_valid_has_no_say() -> None:
    b, x = smooth(20, 18, 16), smooth(20, 18, 16, seed=1)
    valid = torch.ones(20, 18, 16, dtype=torch.bool)
    valid[12:] = False
    valid[3, 4, 5] = False
    spoiled_b, spoiled_x = b.clone(), x.clone()
    spoiled_b[~valid], spoiled_x[~valid] = 1e6, -1e6
    for pair in ((b, x), (spoiled_b, spoiled_x)):
        assert torch.equal(lc2(*pair, valid), lc2(b, x, valid))
        assert lc2_similarity(*pair, valid) == lc2_similarity(b, x, valid)
    assert not lc2(b, x, valid)[~valid].any()


def test_a_mask_is_the_same_as_a_smaller_volume() -> None:
    b, x = smooth(20, 18, 16), smooth(20, 18, 16, seed=1)
    valid = torch.zeros(20, 18, 16, dtype=torch.bool)
    valid[4:, :15, 2:] = True
    part = (slice(4, None), slice(None, 15), slice(2, None))
    torch.testing.assert_close(lc2(b, x, valid)[part], lc2(b[part].contiguous(), x[part].contiguous()))


def test_local_deviation_is_that_of_the_cube() -> None:
    values = smooth(18, 17, 16)
    found = local_deviation(values, radius=2)
    assert float(found[8, 8, 8]) == pytest.approx(float(values[6:11, 6:11, 6:11].std(correction=0)), abs=1e-6)
    assert float(found[0, 0, 0]) == pytest.approx(float(values[:3, :3, :3].std(correction=0)), abs=1e-6)


def test_constant_patches_score_zero() -> None:
    flat = torch.zeros(1, 17, 17, 17)
    some = smooth(17, 17, 17)[None]
    assert float(lc2_pairs(flat, some)) == 0
    assert float(lc2_pairs(some, flat)) < 1e-6


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        (torch.zeros(5, 5), "three axes"),
        (torch.full((5, 5, 5), 3.0), "constant"),
        (torch.full((5, 5, 5), float("nan")), "NaN"),
    ],
)
def test_nothing_to_compare_is_refused(volume: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        zscored(volume)


def test_other_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="no valid voxels"):
        zscored(torch.rand(4, 4, 4), torch.zeros(4, 4, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="on one grid"):
        lc2(torch.rand(4, 4, 4), torch.rand(4, 4, 5))
    with pytest.raises(InputError, match=r"needs a patch of 15\^3"):
        lc2_map(torch.rand(9, 9, 9), torch.rand(20, 20, 20))
    with pytest.raises(InputError, match="odd edge"):
        lc2_map(torch.rand(16, 16, 16), torch.rand(20, 20, 20))
