"""Inverse consistency and warping of fields."""

import plain_mcbo as plain
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.match.consistency import inverse_consistent, warp
from crossmorph.optimise.terms import smooth


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((3, *shape), generator=torch.Generator().manual_seed(seed))


def residual(u: torch.Tensor, v: torch.Tensor) -> float:
    """Mean length of u(x) + v(x + u(x)) away from the faces."""
    return float((u + warp(v, u)).norm(dim=0)[3:-3, 3:-3, 3:-3].mean())


def test_warp_is_linear_interpolation_with_the_ends_continued() -> None:
    values, field = noise(7, 6, 8), 3 * noise(7, 6, 8, seed=1)
    lines = [torch.arange(n, dtype=torch.float32) for n in (7, 6, 8)]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij")) + field
    last = torch.tensor([6.0, 5.0, 7.0])[:, None, None, None]
    grid = (2 * places / last - 1).flip(0).permute(1, 2, 3, 0)[None]
    expected = F.grid_sample(values[None], grid, padding_mode="border", align_corners=True)[0]
    torch.testing.assert_close(warp(values, field), expected, atol=1e-5, rtol=0)


def test_warp_of_a_thin_volume() -> None:
    values = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1)
    field = torch.zeros(3, 1, 2, 1)
    field[1] = 0.25
    field[0] = 7
    assert warp(values, field).flatten().tolist() == [1.5, 3.0]


@pytest.mark.parametrize("shape", [(1, 4, 9), (6, 7, 8)])
def test_opposite_shifts_stay(shape: tuple[int, int, int]) -> None:
    shift = torch.tensor([0.7, -1.2, 2.0])[:, None, None, None].expand(3, *shape)
    u, v = inverse_consistent(shift, -shift)
    torch.testing.assert_close(u, shift.contiguous())
    torch.testing.assert_close(v, -shift)


def test_both_fields_become_each_others_inverse() -> None:
    u, v = (6 * smooth(noise(14, 15, 16, seed=seed), 6) for seed in (0, 1))
    assert u.abs().max() > 1
    before = residual(u, v)
    after = inverse_consistent(u, v)
    assert residual(*after) < 0.05 * before
    assert residual(*reversed(after)) < 0.05 * before


def test_one_field_is_shared_between_both() -> None:
    u = 4 * smooth(noise(14, 15, 16), 6)
    first, second = inverse_consistent(u, torch.zeros_like(u))
    inner = (slice(None), *[slice(3, -3)] * 3)
    assert (first - u / 2)[inner].abs().mean() < 0.1 * u[inner].abs().mean()
    assert (second + u / 2)[inner].abs().mean() < 0.2 * u[inner].abs().mean()


def test_no_iteration_changes_nothing() -> None:
    u, v = noise(4, 5, 6), noise(4, 5, 6, seed=1)
    same = inverse_consistent(u, v, iterations=0)
    assert torch.equal(same[0], u)
    assert torch.equal(same[1], v)


@pytest.mark.parametrize("shape", [(6, 5, 7), (4, 9, 2)])
@pytest.mark.parametrize("iterations", [1, 15])
def test_reproduces_the_released_scale_and_borders(shape: tuple[int, int, int], iterations: int) -> None:
    u, v = 2 * noise(*shape), 2 * noise(*shape, seed=1)
    ours = inverse_consistent(u, v, iterations, reproduce=True)
    released = plain.consistent(u, v, iterations)
    for one, other in zip(ours, released, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    default = inverse_consistent(u, v, iterations)[0]
    assert (default - released[0]).abs().max() > 0.1


def test_threads_do_not_change_the_result(threads: None) -> None:
    u, v = noise(17, 6, 5), noise(17, 6, 5, seed=1)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(inverse_consistent(u, v)[0])
    assert torch.equal(*results)
