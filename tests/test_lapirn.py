"""LapIRN with attention gates, and segmenters with scSE: sizes, formulas, levels."""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.errors import InputError
from crossmorph.networks.convolution import standardised
from crossmorph.networks.lapirn import LEVELS, AttentionGate, LapIRN, Residual, compared, pooled
from crossmorph.networks.pyramid import exponential
from crossmorph.networks.segmenter import Excitation, Segmenter
from crossmorph.networks.warp import warp

SHAPE = (16, 24, 16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def size(part: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


# -- LapIRN ------------------------------------------------------------------------------------------------------


def test_lapirn_has_the_published_size() -> None:
    """923,748 parameters of 4 bytes are the released checkpoint of 3.7 MB; a gate is 3136 + 406 + 15 + 812."""
    assert [size(level) for level in LapIRN().estimators] == [306_404, 308_672, 308_672]
    assert size(LapIRN(version="diff")) == 923_748
    assert size(LapIRN(gates=True)) == 923_748 + LEVELS * 4369


def test_a_residual_block_is_its_formula() -> None:
    block, x = Residual(3), noise(1, 3, 4, 5, 4) - 0.5
    inner = F.conv3d(torch.where(x > 0, x, 0.2 * x), block.first.weight, padding=1)
    total = x + F.conv3d(torch.where(inner > 0, inner, 0.2 * inner), block.second.weight, padding=1)
    torch.testing.assert_close(block(x), torch.where(total > 0, total, 0.2 * total))


def test_a_gate_is_its_formula_voxel_by_voxel() -> None:
    torch.manual_seed(0)
    gate, skip, coarse = AttentionGate(4), noise(1, 4, 4, 4, 2), noise(1, 4, 2, 2, 1, seed=1)
    asked = torch.zeros(1, 1, 2, 2, 1)
    for i, j in product(range(2), range(2)):
        cut = skip[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        theta = torch.stack([(kernel * cut).sum() for kernel in gate.theta.weight])
        phi = gate.phi.weight[:, :, 0, 0, 0] @ coarse[0, :, i, j, 0] + gate.phi.bias
        psi = gate.psi.weight[0, :, 0, 0, 0] @ (theta + phi).clamp_min(0) + gate.psi.bias
        asked[0, 0, i, j, 0] = 1 / (1 + torch.exp(-psi))
    weights = torch.zeros(1, 1, 4, 4, 2)
    for i, j in product(range(4), range(4)):  # voxel centres of the coarse grid lie at 0.5 and 2.5
        places = [min(max((p - 0.5) / 2, 0), 1) for p in (i, j)]
        a, b = places
        corners = asked[0, 0, :, :, 0]
        mixed = (1 - a) * ((1 - b) * corners[0, 0] + b * corners[0, 1])
        weights[0, 0, i, j] = mixed + a * ((1 - b) * corners[1, 0] + b * corners[1, 1])
    expected = torch.einsum("oc,ncijk->noijk", gate.leave.weight[:, :, 0, 0, 0], skip * weights)
    expected = expected + gate.leave.bias[:, None, None, None]
    torch.testing.assert_close(gate(skip, coarse), expected, atol=1e-6, rtol=1e-5)


def with_fields(made: LapIRN, *fields: torch.Tensor) -> LapIRN:
    """The network with the fields that its levels add, in half volumes."""
    for level, field in zip(made.estimators, fields, strict=True):
        level.forward = lambda volumes, embedding=None, field=field: (field, volumes)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(("reproduce", "factor"), [(False, 8.0), (True, 7.5)])
def test_fields_of_the_levels_add_up_in_half_volumes(reproduce: bool, factor: float) -> None:
    fields = [torch.full((1, 3, n, n, n), value) for n, value in ((4, 0.1), (8, 0.02), (16, -0.01))]
    made = with_fields(LapIRN(2, reproduce=reproduce), *fields)
    found = made(noise(1, 1, 16, 16, 16), noise(1, 1, 16, 16, 16, seed=1))
    torch.testing.assert_close(found["displacement"], torch.full((1, 3, 16, 16, 16), 0.11 * factor))
    made.levels = 1
    flow = made(noise(1, 1, 16, 16, 16), noise(1, 1, 16, 16, 16, seed=1))["flow"]
    torch.testing.assert_close(flow, torch.full((1, 3, 4, 4, 4), 0.1 * (1.5 if reproduce else 2.0)))


def test_a_stretch_keeps_its_place_from_level_to_level() -> None:
    """u = 0.1 (x - 7.5) voxels at full resolution, given by the coarsest level alone, inside its outer centres."""
    line = 0.1 * (torch.arange(4.0) - 1.5) / 2
    fields = [torch.zeros(1, 3, n, n, n) for n in (4, 8, 16)]
    fields[0][0, 0] = line[:, None, None]
    found = with_fields(LapIRN(2), *fields)(noise(1, 1, 16, 16, 16), noise(1, 1, 16, 16, 16))["displacement"]
    expected = 0.1 * (torch.arange(16.0) - 7.5)
    torch.testing.assert_close(found[0, 0, 3:-3, 8, 8], expected[3:-3])


def test_velocities_become_flows() -> None:
    torch.manual_seed(0)
    made = LapIRN(2, "diff", reproduce=True)
    found = made(noise(1, 1, 16, 16, 16), noise(1, 1, 16, 16, 16, seed=1))
    torch.testing.assert_close(found["displacement"], exponential(found["velocity"]))
    assert not torch.equal(found["displacement"], found["velocity"])


def test_the_next_level_sees_the_pooled_moving_volume_warped() -> None:
    fixed, moving = standardised(noise(1, 1, 16, 16, 16)), standardised(noise(1, 1, 16, 16, 16, seed=1))
    fields = [torch.full((1, 3, n, n, n), 0.125) for n in (4, 8, 16)]
    made = with_fields(LapIRN(2), *fields)
    seen: list[torch.Tensor] = []
    made.estimators[1].forward = lambda volumes, embedding: (seen.append(volumes), (fields[1], volumes))[1]  # type: ignore[assignment, func-returns-value]
    made(3 * fixed + 1, moving / 2)  # whatever their scale
    warped = warp(pooled(moving), torch.full((1, 3, 8, 8, 8), 0.5))
    torch.testing.assert_close(seen[0], torch.cat([warped, pooled(fixed), fields[1]], 1))


def test_a_loss_compares_pooled_volumes_and_as_released_single_voxels() -> None:
    fixed, moving = noise(1, 1, 16, 8, 16), noise(1, 1, 16, 8, 16, seed=1)
    flow = noise(1, 3, 8, 4, 8, seed=2) - 0.5
    coarse, warped = compared(fixed, moving, flow)
    torch.testing.assert_close(coarse, F.avg_pool3d(fixed, 2))
    torch.testing.assert_close(warped, warp(F.avg_pool3d(moving, 2), flow))
    released, drawn = compared(fixed, moving, flow, reproduce=True)
    torch.testing.assert_close(released, F.avg_pool3d(fixed, 3, 2, 1, count_include_pad=False))
    last = torch.tensor([7.0, 3.0, 7.0])
    lines = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (8, 4, 8)), indexing="ij"), -1)
    places = (2 * (lines + flow[0].permute(1, 2, 3, 0)) / last - 1).flip(-1)[None]
    expected = F.grid_sample(moving, places, padding_mode="border", align_corners=True)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("levels", "frozen", "learning"), [(1, False, [0]), (2, True, [1]), (3, False, [0, 1, 2])]
)
def test_only_levels_in_use_and_not_at_rest_learn(levels: int, frozen: bool, learning: list[int]) -> None:
    made = LapIRN(2, gates=True)
    made.levels, made.frozen = levels, frozen
    found = made(noise(1, 1, *SHAPE), noise(1, 1, *SHAPE, seed=1))
    (found["flow"] * noise(*found["flow"].shape)).sum().backward()
    reached = [all(p.grad is not None for p in level.parameters()) for level in made.estimators]
    none = [all(p.grad is None for p in level.parameters()) for level in made.estimators]
    assert [n for n in range(3) if reached[n]] == learning
    assert [n for n in range(3) if not none[n]] == learning
    assert found["displacement"].shape == (1, 3, *SHAPE)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"multiples of 8, not \(16, 12, 16\)"):
        LapIRN(2)(noise(1, 1, 16, 12, 16), noise(1, 1, 16, 12, 16))
    with pytest.raises(InputError, match=r"from 64 on, not \(32, 32, 32\) voxels; set stages = 4"):
        Segmenter(2, 2)(noise(1, 1, 32, 32, 32))
    assert Segmenter(2, 2, 4)(noise(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)
    assert Segmenter(2, 2).eval()(noise(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)


# -- segmenters --------------------------------------------------------------------------------------------------


def test_excitation_is_its_formula_voxel_by_voxel() -> None:
    torch.manual_seed(0)
    block, x = Excitation(4), noise(1, 4, 3, 2, 2) - 0.5
    means = torch.stack([x[0, c].mean() for c in range(4)])
    hidden = (block.squeeze.weight @ means + block.squeeze.bias).clamp_min(0)
    channel = 1 / (1 + torch.exp(-(block.excite.weight @ hidden + block.excite.bias)))
    expected = torch.zeros_like(x)
    for i, j, k in product(range(3), range(2), range(2)):
        v = x[0, :, i, j, k]
        place = 1 / (1 + torch.exp(-(block.place.weight[0, :, 0, 0, 0] @ v + block.place.bias)))
        for c in range(4):
            expected[0, c, i, j, k] = max(v[c] * channel[c], v[c] * place[0])
    torch.testing.assert_close(block(x), expected)


def test_a_segmenter_has_as_many_parameters_as_its_plan() -> None:
    """Convolutions with bias and instance normalisation; scSE of c channels has c c + c / 2 + c and c + 1."""
    widths = [32, 64, 128, 256, 320]
    ins = [1, *widths[:-1]]
    down = sum(27 * a * b + 27 * b * b + 6 * b for a, b in zip(ins, widths, strict=True))
    up = sum(8 * a * b + b + 27 * 3 * b * b + 6 * b for b, a in pairwise(widths))
    scse = sum(b * b + b // 2 + b + b + 1 for b in widths[:-1])
    assert size(Segmenter(3)) == down + up + scse + 3 * 32 + 3


def test_a_segmenter_sees_no_scale_and_no_shift() -> None:
    torch.manual_seed(0)
    made, volume = Segmenter(2, 2, 2), noise(1, 1, 8, 8, 8)
    torch.testing.assert_close(made(3 * volume + 5), made(volume), atol=1e-4, rtol=1e-4)
