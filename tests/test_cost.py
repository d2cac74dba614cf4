"""Cost volumes against brute force, and the compiled against the torch version."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import uniform_filter

from crossmorph.kernels.convex import cost_slab
from crossmorph.match.cost import cost_volume_reference, expected_cost, offsets


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((3, *shape), generator=torch.Generator().manual_seed(seed))


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(100 + seed)) > 0.2


def compiled(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    half: int,
    valid: tuple[torch.Tensor, torch.Tensor] | None,
    counted: bool,
    planes: tuple[int, int],
) -> torch.Tensor:
    lines = [x.permute(1, 2, 0, 3).contiguous().numpy() for x in (fixed, moving)]
    unknown = -1.0 if valid is None else expected_cost(fixed, moving, *valid)
    everywhere = torch.ones(fixed.shape[1:], dtype=torch.bool)
    f, m = (x.numpy() for x in valid or (everywhere, everywhere))
    return torch.from_numpy(cost_slab(lines[0], lines[1], f, m, half, unknown, counted, *planes))


def test_the_first_component_changes_fastest() -> None:
    table = offsets(1)
    assert table.shape == (27, 3)
    assert table[:4].tolist() == [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [-1, 0, -1]]


@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    half=st.integers(1, 3),
    masked=st.booleans(),
    counted=st.booleans(),
    data=st.data(),
)
def test_compiled_equals_torch(
    shape: tuple[int, int, int], half: int, masked: bool, counted: bool, data: st.DataObject
) -> None:
    fixed, moving = features(*shape), features(*shape, seed=1)
    valid = (mask(*shape), mask(*shape, seed=1)) if masked else None
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    whole = cost_volume_reference(fixed, moving, half, valid, counted)
    assert whole.shape == (*shape, (2 * half + 1) ** 3)
    part = compiled(fixed, moving, half, valid, counted, (start, stop))
    torch.testing.assert_close(part, whole[start:stop], atol=1e-5, rtol=1e-5)
    again = cost_volume_reference(fixed, moving, half, valid, counted, planes=(start, stop))
    torch.testing.assert_close(again, whole[start:stop], atol=1e-6, rtol=1e-6)


def test_costs_by_brute_force() -> None:
    shape = (5, 6, 4)
    fixed, moving = features(*shape), features(*shape, seed=1)
    valid = (mask(*shape), mask(*shape, seed=1))
    unknown = expected_cost(fixed, moving, *valid)
    volume = cost_volume_reference(fixed, moving, 2, valid).numpy()
    count = uniform_filter(np.ones(shape), 3, mode="constant")
    for number in (0, 31, 62, 101, 124):
        step = offsets(2)[number].int().numpy()
        raw = np.full(shape, unknown)
        for place in np.ndindex(*shape):
            there = tuple((np.array(place) + step).tolist())
            inside = all(0 <= x < n for x, n in zip(there, shape, strict=True))
            if inside and valid[0][place] and valid[1][there]:
                raw[place] = ((fixed[(slice(None), *place)] - moving[(slice(None), *there)]) ** 2).sum()
        for _ in range(2):  # means over the voxels that exist
            raw = uniform_filter(raw, 3, mode="constant") / count
        np.testing.assert_allclose(volume[..., number], raw, rtol=1e-5)


def test_published_borders_shrink_the_costs_as_the_release_does() -> None:
    fixed = torch.ones(1, 9, 9, 9)  # |fixed|^2 = 1 against a zero moving image, whatever the displacement
    cost = cost_volume_reference(fixed, torch.zeros_like(fixed), 1, counted=True)
    assert cost[4, 4, 4, 0] == pytest.approx(1)
    assert cost[0, 4, 4, 0] == pytest.approx(5 / 9, abs=1e-6)  # measured on the released code
    assert cost[0, 0, 0, 0] == pytest.approx(0.17, abs=0.005)
    uncounted = cost_volume_reference(fixed, torch.zeros_like(fixed), 1)
    torch.testing.assert_close(uncounted, torch.ones_like(uncounted))


def test_what_is_not_valid_has_no_influence() -> None:
    shape = (5, 6, 7)
    fixed, moving = features(*shape), features(*shape, seed=1)
    valid = (mask(*shape), mask(*shape, seed=1))
    changed = [
        torch.where(v, x, 1e3 * features(*shape, seed=2)) for x, v in zip((fixed, moving), valid, strict=True)
    ]
    for version in (cost_volume_reference, lambda *a: compiled(*a, False, (0, 5))):
        assert torch.equal(version(fixed, moving, 2, valid), version(*changed, 2, valid))


def test_expected_cost_is_the_mean_over_all_pairs() -> None:
    fixed, moving = features(3, 4, 2), features(3, 4, 2, seed=1)
    valid = mask(3, 4, 2), mask(3, 4, 2, seed=1)
    f, m = fixed[:, valid[0]].double(), moving[:, valid[1]].double()
    pairs = ((f[:, :, None] - m[:, None, :]) ** 2).sum(0)
    assert expected_cost(fixed, moving, *valid) == pytest.approx(pairs.mean().item(), rel=1e-6)
    assert expected_cost(fixed, moving, torch.zeros(3, 4, 2, dtype=torch.bool), valid[1]) == 0
