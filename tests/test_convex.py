"""Coupled convex optimisation: the recursion, what is recovered, and what must not change the result."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.match import convex
from crossmorph.match.convex import COUPLING, TIE, coupled_convex
from crossmorph.match.cost import cost_volume_reference, offsets


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((4, *shape), generator=torch.Generator().manual_seed(seed))


def everywhere(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    valid = torch.ones(shape, dtype=torch.bool)
    return valid, valid


def iterates(
    fixed: torch.Tensor, moving: torch.Tensor, half: int, valid: tuple[torch.Tensor, torch.Tensor]
) -> list:
    """The six kept fields, from the formula."""
    cost = cost_volume_reference(fixed, moving, half, valid)
    steps = offsets(half)

    def picked(total: torch.Tensor) -> torch.Tensor:
        best = steps[total.argmin(-1)].permute(3, 0, 1, 2)
        return F.avg_pool3d(best[None], 3, 1, 1, count_include_pad=False)[0]

    field, kept = picked(cost + TIE * (steps**2).sum(1)), []
    for theta in COUPLING:
        field = picked(cost + theta * ((steps - field.permute(1, 2, 3, 0)[..., None, :]) ** 2).sum(-1))
        kept.append(field)
    return kept


def test_the_recursion_and_its_balance() -> None:
    shape = (7, 6, 8)
    fixed, moving = features(*shape), features(*shape, seed=1)
    valid = (features(*shape, seed=2)[0] > 0.1, features(*shape, seed=3)[0] > 0.1)
    kept = iterates(fixed, moving, 2, valid)
    assert (kept[0] - kept[-1]).abs().max() > 0.1  # or the two below could not be told apart
    last = coupled_convex(fixed, moving, 2, valid, balanced=False)
    torch.testing.assert_close(last, kept[-1], atol=1e-5, rtol=0)
    balanced = coupled_convex(fixed, moving, 2, valid)
    torch.testing.assert_close(balanced, torch.stack(kept).mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reproduce", [False, True])
def test_slabs_do_not_change_the_result(reproduce: bool) -> None:
    shape = (23, 6, 5)
    fixed, moving = features(*shape), features(*shape, seed=1)
    valid = (features(*shape, seed=2)[0] > 0.1,) * 2
    whole = coupled_convex(fixed, moving, 2, valid, reproduce=reproduce)
    plane = 4 * 6 * 5 * 5**3
    for memory in (0, 20 * plane, 23 * plane):
        assert torch.equal(coupled_convex(fixed, moving, 2, valid, True, reproduce, memory_bytes=memory), whole)


def test_the_torch_version_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs: torch's cost volume and pick instead of the compiled ones."""
    shape = (9, 6, 5)
    fixed, moving = features(*shape), features(*shape, seed=1)
    valid = (features(*shape, seed=2)[0] > 0.1,) * 2
    for reproduce in (False, True):
        compiled = coupled_convex(fixed, moving, 2, valid, reproduce=reproduce)
        with monkeypatch.context() as patch:
            patch.setattr(convex, "_picker", convex._reference_picker)
            patch.setattr(convex, "_cost", lambda *inputs: lambda *planes: cost_volume_reference(*inputs, planes))
            plain = coupled_convex(fixed, moving, 2, valid, reproduce=reproduce, memory_bytes=0)
        torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize("theta", [0.0, 0.25, 1.0, 4.0])
def test_the_first_of_equally_cheap_displacements_is_picked(theta: float) -> None:
    """Whole costs and centres at halves: every sum is exact, and many are equal."""
    random = torch.Generator().manual_seed(0)
    cost = torch.randint(0, 12, (4, 5, 6, 5**3), generator=random).float()
    centre = torch.randint(-6, 7, (3, 4, 5, 6), generator=random) / 2
    (first, pick), (first_expected, expected) = (
        of(cost, theta, 2) for of in (convex._picker, convex._reference_picker)
    )
    assert torch.equal(first, first_expected)
    assert torch.equal(pick(centre, theta), expected(centre, theta))


def test_threads_do_not_change_the_result(threads: None) -> None:
    fixed, moving = features(19, 8, 7), features(19, 8, 7, seed=1)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(coupled_convex(fixed, moving, 2, everywhere(19, 8, 7)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("balanced", [False, True])
def test_a_shift_is_recovered(balanced: bool) -> None:
    shift = (2, -1, 3)
    fixed = features(15, 14, 16)
    moving = fixed.roll(shift, (1, 2, 3))  # moving(p + shift) = fixed(p)
    field = coupled_convex(fixed, moving, 3, everywhere(15, 14, 16), balanced)
    inner = field[:, 5:-5, 5:-5, 5:-5]
    expected = torch.tensor(shift, dtype=torch.float32)[:, None, None, None].expand_as(inner)
    torch.testing.assert_close(inner, expected, atol=1e-5, rtol=0)


def test_flat_regions_stay() -> None:
    flat = torch.ones(4, 8, 7, 6)
    assert (coupled_convex(flat, flat, 2, everywhere(8, 7, 6)) == 0).all()
    published = coupled_convex(flat, flat, 2, reproduce=True)
    assert published[:, 4, 3, 3].max() < -0.5  # the release takes the first of equal displacements


def test_the_released_field_shrinks_at_the_faces_and_the_default_does_not() -> None:
    fixed = features(14, 14, 14)
    moving = fixed.roll((0, 0, 2), (1, 2, 3))
    middle = (slice(4, 10), 0, slice(4, 10))  # a face that the shift runs along
    default = coupled_convex(fixed, moving, 2, everywhere(14, 14, 14))[2][middle]
    released = coupled_convex(fixed, moving, 2, reproduce=True)[2][middle]
    torch.testing.assert_close(default, torch.full_like(default, 2.0))
    torch.testing.assert_close(released, torch.full_like(released, 2 * 2 / 3), atol=0.05, rtol=0)


def test_what_is_not_valid_has_no_influence() -> None:
    shape = (8, 7, 6)
    fixed, moving = features(*shape), features(*shape, seed=1)
    valid = (features(*shape, seed=2)[0] > 0.2, features(*shape, seed=3)[0] > 0.2)
    garbage = 1e3 * features(*shape, seed=4)
    changed = [torch.where(v, x, garbage) for x, v in zip((fixed, moving), valid, strict=True)]
    assert torch.equal(coupled_convex(*changed, 2, valid), coupled_convex(fixed, moving, 2, valid))


@pytest.mark.parametrize("shape", [(1, 2, 9), (2, 1, 1)])
@pytest.mark.parametrize("reproduce", [False, True])
def test_thin_volumes(shape: tuple[int, int, int], reproduce: bool) -> None:
    fixed = features(*shape)
    field = coupled_convex(fixed, fixed, 2, everywhere(*shape), reproduce=reproduce)
    assert field.shape == (3, *shape)
    assert field.abs().max() < 0.5


def test_nothing_valid_gives_no_displacement() -> None:
    nowhere = torch.zeros(6, 6, 6, dtype=torch.bool)
    field = coupled_convex(features(6, 6, 6), features(6, 6, 6, seed=1), 2, (nowhere, nowhere))
    assert (field == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("reproduce", [False, True])
def test_cuda_gives_the_same(reproduce: bool) -> None:
    fixed, moving = features(9, 8, 7), features(9, 8, 7, seed=1)
    valid = everywhere(9, 8, 7)
    on_cuda = coupled_convex(fixed.cuda(), moving.cuda(), 2, (valid[0].cuda(), valid[1].cuda()), True, reproduce)
    torch.testing.assert_close(on_cuda.cpu(), coupled_convex(fixed, moving, 2, valid, True, reproduce))
