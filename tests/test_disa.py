"""The network's size and lattice; features of whole volumes: tiles, masks, strides, eight bits."""

import json
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch

from crossmorph.describe.disa import (
    ARCHITECTURE,
    SPACING_MM,
    dequantised,
    disa_features,
    feature_grid,
    load_network,
    quantised,
)
from crossmorph.errors import InputError
from crossmorph.networks.disa import PARAMETERS, REACH, STRIDES, TAPS, WIDE_TAPS, DisaNet, blur, clipped
from crossmorph.space import Grid
from crossmorph.train.checkpoint import save_weights


@pytest.fixture(scope="module")
def network() -> DisaNet:
    """Random weights, large enough that far voxels matter measurably."""
    torch.manual_seed(0)
    net = DisaNet().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.7)
    return net


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_has_as_many_parameters_as_published(network: DisaNet) -> None:
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == PARAMETERS == 90_752
    assert not list(network.buffers())


@pytest.mark.parametrize("length", [1, 2, 9, 12, 33])
@pytest.mark.parametrize(("taps", "stride"), [(TAPS, 2), (TAPS, 1), (WIDE_TAPS, 1)])
def test_blur_is_a_convolution_with_repeated_ends(length: int, taps: tuple[float, ...], stride: int) -> None:
    x = noise(2, 3, length, 7, 10)
    line = torch.tensor(taps) / sum(taps)
    kernel = (line[:, None, None] * line[:, None] * line).expand(3, 1, *[len(taps)] * 3)
    padded = torch.nn.functional.pad(x, (len(taps) // 2,) * 6, mode="replicate")
    expected = torch.nn.functional.conv3d(padded, kernel, stride=stride, groups=3)
    torch.testing.assert_close(blur(x, taps, stride), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", STRIDES)
def test_index_k_lies_on_voxel_stride_times_k(network: DisaNet, stride: int) -> None:
    """The gradient of one descriptor is centred on its voxel and ends 24 voxels from it."""
    x = noise(1, 1, 65, 3, 3).requires_grad_()
    k = 32 // stride
    network(x, stride)[0, :, k].sum().backward()
    assert x.grad is not None
    touched = (x.grad[0, 0].abs().amax((1, 2)) > 0).nonzero()[:, 0]
    assert touched.min() >= 32 - REACH
    assert touched.max() <= 32 + REACH
    assert touched.float().mean() == 32
    assert touched.max() - touched.min() == 2 * REACH


def test_denser_strides_give_nearly_the_same_where_they_meet(network: DisaNet) -> None:
    """A smooth input: dilated convolutions see the same neighbours that the strided ones see."""
    x = torch.nn.functional.avg_pool3d(noise(1, 1, 64, 64, 64), 9, 1) * 20
    coarse = network(x, 4)
    inside = (slice(None), slice(None), *[slice(6, 8)] * 3)
    spread = coarse[inside].std()
    for stride in (2, 1):
        step = 4 // stride
        fine = network(x, stride)[..., ::step, ::step, ::step]
        assert (fine - coarse)[inside].abs().mean() < 0.15 * spread
    torch.testing.assert_close(network(x, 2)[..., ::2, ::2, ::2][inside], coarse[inside], atol=1e-4, rtol=1e-4)


def test_descriptors_are_cut_to_length_one_not_stretched() -> None:
    features = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).T[None]
    torch.testing.assert_close(clipped(features), torch.tensor([[0.6, 0.8], [0.3, 0.4]]).T[None])


@pytest.mark.parametrize("stride", STRIDES)
def test_tiles_do_not_show(network: DisaNet, stride: int) -> None:
    values = noise(61, 14, 70)
    whole = disa_features(values, stride=stride, tile=128, network=network)
    tiled = disa_features(values, stride=stride, tile=32, network=network)
    assert tuple(whole.shape) == (16, *(-(-n // stride) for n in values.shape))
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)
    assert whole.norm(dim=0).max() <= 1 + 1e-5


def test_what_is_not_valid_does_not_matter(network: DisaNet) -> None:
    values = noise(40, 36, 33)
    valid = torch.ones(values.shape, dtype=torch.bool)
    valid[25:] = False
    spoiled = torch.where(valid, values, 1e4)
    spoiled[30, 3, 3] = float("nan")
    expected = disa_features(values, valid, network=network)
    torch.testing.assert_close(disa_features(spoiled, valid, network=network), expected)


def test_describing_does_not_spoil_training() -> None:
    """Describing runs without gradients; what it keeps for the next call must not carry that over."""
    fresh = DisaNet()
    disa_features(noise(22, 23, 19), network=fresh)
    fresh(noise(1, 1, 22, 23, 19)).sum().backward()
    assert fresh.enter.weight.grad is not None


def test_scale_and_shift_of_the_intensities_do_not_matter(network: DisaNet) -> None:
    values = noise(24, 24, 24)
    expected = disa_features(values, network=network)
    found = disa_features(1000 + 300 * values, network=network)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_feature_grid_keeps_the_first_voxel() -> None:
    grid = Grid((10, 11, 12), [[0, 2, 0, 5], [-2, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    coarse = feature_grid(grid, 4)
    assert coarse.shape == (3, 3, 3)
    place = torch.tensor([2.0, 1, 2])
    torch.testing.assert_close(coarse.to_world(place), grid.to_world(4 * place))


def test_eight_bits_cost_little() -> None:
    """The rounding error of dot products of random unit descriptors, and its bound."""
    a, b = (torch.nn.functional.normalize(noise(20_000, 16, seed=s)) for s in (0, 1))
    codes = quantised(a), quantised(b)
    assert codes[0].dtype == torch.int8
    whole = (codes[0].int() * codes[1].int()).sum(1) / 127**2
    error = (whole - (a * b).sum(1)).abs()
    assert 0.001 < error.mean() < 0.003
    assert error.max() < 0.016
    torch.testing.assert_close((dequantised(codes[0]) * dequantised(codes[1])).sum(1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (torch.rand(20, 20), {}, "at least two voxels along each axis"),
        (torch.rand(20, 20, 1), {}, "at least two voxels along each axis"),
        (torch.ones(20, 20, 20), {}, "constant"),
        (torch.full((20, 20, 20), float("nan")), {}, "NaN"),
        (torch.rand(20, 20, 20), {"stride": 3}, "stride of 4, 2 or 1"),
        (torch.rand(20, 20, 20), {"tile": 30}, "multiple of 4"),
        (torch.rand(20, 20, 20), {"valid": torch.zeros(20, 20, 20, dtype=torch.bool)}, "no valid voxels"),
    ],
)
def test_bad_volumes_are_refused(network: DisaNet, values: torch.Tensor, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        disa_features(values, network=network, **options)


def test_weights_come_back(network: DisaNet, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", network, ARCHITECTURE, {})
    values = noise(16, 16, 16)
    again = disa_features(values, network=load_network(tmp_path / "w.safetensors"))
    assert torch.equal(again, disa_features(values, network=network))


def test_unusable_weights_are_refused(network: DisaNet, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match="is missing"):
        load_network(path)
    save_weights(path, network, "voxelmorph", {})
    with pytest.raises(InputError, match="'voxelmorph'; those of 'disa' are needed"):
        load_network(path)
    headless = DisaNet()
    del headless.leave
    save_weights(path, headless, ARCHITECTURE, {})
    with pytest.raises(InputError, match=r"the first is leave\.weight \(missing, needed \(16, 32, 1, 1, 1\)\)"):
        load_network(path)
    save_weights(path, network, ARCHITECTURE, {})
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(InputError, match="sha256"):
        load_network(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(InputError, match="does not describe weights"):
        load_network(path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no tensors")
    about = {"architecture": ARCHITECTURE, "sha256": hashlib.sha256(b"no tensors").hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="no safetensors file"):
        load_network(path)


def test_the_weights_of_the_package_are_what_their_description_says() -> None:
    with as_file(files("crossmorph") / "weights" / "disa.json") as side:
        about = json.loads(side.read_text())
    assert about["architecture"] == ARCHITECTURE
    assert about["preprocessing"]["spacing_mm"] == SPACING_MM
    assert "CC BY" in about["licence"]
    assert about["metrics"]["error"] < about["metrics"]["error_of_mean"]
    assert not {"ixi", "nichart"} & {name.split(":")[0] for name in about["training"]["volumes"]}
    assert load_network() is load_network()  # read and checked once
