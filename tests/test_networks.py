"""Registration networks: their sizes, their start, what they compute; warping against slow references."""

from itertools import product

import pytest
import torch

from crossmorph.networks.convolution import Convolution
from crossmorph.networks.gated_fusion import GatedFusion
from crossmorph.networks.voxelmorph import Version, VoxelMorph, exact
from crossmorph.networks.warp import warp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=generator(seed))


def size(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("version", "count"), [("text", 301_411), ("vm2", 300_547), ("vm1", 259_675)])
def test_a_branch_has_as_many_parameters_as_published(version: Version, count: int) -> None:
    assert size(VoxelMorph(2, version)) == count


def test_gated_fusion_adds_999_parameters() -> None:
    """6 x 6 x 27 + 6 of the gates, 6 x 3 + 3 of the bottleneck."""
    assert size(GatedFusion()) == 978 + 21


@pytest.mark.parametrize("version", ["text", "vm2", "vm1"])
def test_displacements_are_tiny_at_the_start_and_as_large_as_the_volume(version: Version) -> None:
    torch.manual_seed(0)
    found = VoxelMorph(2, version)(random(2, 2, 32, 16, 16))
    assert found.shape == (2, 3, 32, 16, 16)
    assert found.dtype == torch.float32
    assert 0 < float(found.detach().abs().max()) < 1e-2


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    network = VoxelMorph()
    network(random(1, 2, 16, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("shape", [(32, 32, 32), (16, 32, 16)])
def test_gradients_in_bfloat16_are_those_of_32_bits(shape: tuple[int, int, int]) -> None:
    """The coarsest level has two voxels or one along an axis, where oneDNN's gradient was garbage; memory is
    filled with NaN before, so that garbage shows."""
    torch.manual_seed(0)
    network = VoxelMorph(2, "vm1")
    torch.nn.init.normal_(network.flow.weight, std=0.05)
    volumes, weights = random(1, 2, *shape), torch.randn(1, 3, *shape)
    gradients = []
    for half in (False, True):
        network.zero_grad()
        for size in range(4, 18):  # freed at once, and handed out again
            torch.full((2**size,), torch.nan)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = network(volumes.contiguous(memory_format=torch.channels_last_3d))
        (found * weights).sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for exact_one, half_one in zip(*gradients, strict=True):
        assert float((half_one - exact_one).norm()) < 0.2 * float(exact_one.norm())


def test_an_exact_convolution_is_one_in_32_bits() -> None:
    """The empty volume beside a small one changes neither values nor gradients; autocast has no say."""
    layer, volume = torch.nn.Conv3d(6, 6, 3, 1, 1), random(1, 6, 8, 8, 8)
    plain = layer(volume)
    plain.square().sum().backward()
    wanted = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = exact(layer, volume)
    found.square().sum().backward()
    torch.testing.assert_close(found, plain)
    for one, two in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(one.grad, two, rtol=1e-4, atol=1e-4)


def test_checkpointing_changes_nothing_but_the_memory() -> None:
    gradients = []
    for keep in (False, True):
        torch.manual_seed(0)
        network = VoxelMorph(2, "text", keep)
        network(random(1, 2, 16, 16, 16)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_fusion_begins_as_the_mean() -> None:
    first, second = (torch.randn(1, 3, 6, 5, 4, generator=generator(s)) for s in (0, 1))
    torch.testing.assert_close(GatedFusion()(first, second), (first + second) / 2)


def test_fusion_is_what_the_paper_draws() -> None:
    """Gates of all six channels by 3^3 taps with zeros outside; products; a matrix a voxel."""
    torch.manual_seed(0)
    fusion = GatedFusion()
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    first, second = (torch.randn(1, 3, 4, 3, 3, generator=generator(s)) for s in (0, 1))
    found = fusion(first, second)[0].detach()
    both = torch.cat([first, second], 1)[0]
    gate, bias = fusion.gate.weight.detach(), fusion.gate.bias.detach()
    mix = fusion.bottleneck.weight.detach()[:, :, 0, 0, 0]
    for place in product(range(4), range(3), range(3)):
        total = bias.clone()
        for offset in product(range(3), repeat=3):
            near = [p + o - 1 for p, o in zip(place, offset, strict=True)]
            if all(0 <= n < s for n, s in zip(near, (4, 3, 3), strict=True)):
                total += gate[:, :, offset[0], offset[1], offset[2]] @ both[:, near[0], near[1], near[2]]
        here = both[:, place[0], place[1], place[2]]
        expected = mix @ (torch.sigmoid(total) * here) + fusion.bottleneck.bias.detach()
        torch.testing.assert_close(found[:, place[0], place[1], place[2]], expected, atol=1e-5, rtol=1e-5)


def test_warping_takes_the_value_at_p_plus_u_along_the_arrays_axes() -> None:
    volume = random(1, 1, 6, 7, 8)
    field = torch.zeros(1, 3, 6, 7, 8)
    field[:, 0], field[:, 1], field[:, 2] = 1, 2, -3
    found = warp(volume, field)
    torch.testing.assert_close(found[0, 0, :5, :5, 3:], volume[0, 0, 1:, 2:, :5])


def test_beyond_the_border_the_border_holds() -> None:
    volume = random(1, 1, 5, 5, 5)
    field = torch.zeros(1, 3, 5, 5, 5)
    field[:, 0] = 9
    torch.testing.assert_close(warp(volume, field), volume[:, :, -1:].expand(-1, -1, 5, -1, -1))


def test_warping_is_differentiable_in_both() -> None:
    volume = random(2, 1, 4, 4, 4).double()
    field = (0.3 * torch.randn(2, 3, 4, 4, 4, generator=generator())).float()
    volume, field = volume.float().requires_grad_(), field.requires_grad_()
    warp(volume, field).square().sum().backward()
    step = 1e-3
    for index in ((0, 0, 1, 2, 1), (1, 2, 2, 1, 2)):
        shifted = field.detach().clone()
        shifted[index] += step
        with torch.no_grad():
            change = warp(volume, shifted).square().sum() - warp(volume, field).square().sum()
        assert float(change / step) == pytest.approx(float(field.grad[index]), rel=0.05, abs=5e-3)
    assert volume.grad.abs().sum() > 0


def test_gradients_of_two_planes_are_right_in_half_precision() -> None:
    """torch alone gives numbers of 1e36 for most of these seeds."""
    for seed in range(8):
        torch.manual_seed(seed)
        layer, volume = Convolution(32, 32, 3, 1, 1), torch.randn(1, 32, 2, 4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            (half,) = torch.autograd.grad(layer(volume).float().square().sum(), layer.weight)
        (full,) = torch.autograd.grad(layer(volume).square().sum(), layer.weight)
        torch.testing.assert_close(half, full, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_small_volume_is_convolved_as_torch_does(stride: int) -> None:
    """Another one joins it on the way, of which nothing may be seen, nor in the gradients."""
    layer, x = Convolution(3, 4, 3, stride, 1), random(1, 3, 6, 7, 8).requires_grad_()
    assert layer.bias is not None
    plain = torch.nn.functional.conv3d(x, layer.weight, layer.bias, stride, 1)
    found = layer(x)
    torch.testing.assert_close(found, plain)
    wanted, given = (torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias)) for y in (plain, found))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
