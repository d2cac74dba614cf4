"""The pyramid of next-gen-nn (LUMIR 2024): blocks against slow references, learning, and use."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scene import WARP, bright, seen
from torch import nn

from crossmorph import io
from crossmorph.cli import main
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.networks.bilateral import Bilateral
from crossmorph.networks.pyramid import SLAB, CoAttention, Estimator, Layer, Pyramid, exponential
from crossmorph.networks.warp import warp
from crossmorph.optimise.field import resize
from crossmorph.record import Journal
from crossmorph.settings import Lumir, Preprocessing, presets, read_settings
from crossmorph.space import Grid
from crossmorph.systems.learned import Trained, displacement
from crossmorph.systems.lumir import loss, network
from crossmorph.train.losses import WINDOW, local_correlation, roughness, seen_by_both, softened, window_sums
from crossmorph.train.sample import Batch
from crossmorph.train.settings import LumirTraining
from crossmorph.transform import Affine

SIDE = (16, 32, 16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def soft(*shape: int) -> torch.Tensor:
    volume = noise(1, 1, *shape)
    for _ in range(3):
        volume = F.avg_pool3d(F.pad(volume, (1,) * 6, mode="replicate"), 3, 1)
    return (volume - volume.min()) / (volume.max() - volume.min())


def batch(fixed: torch.Tensor, moving: torch.Tensor) -> Batch:
    everywhere = torch.ones_like(fixed, dtype=torch.bool)
    return Batch(("a pair",), fixed, moving, everywhere, everywhere, None, None, None)


def awake(made: nn.Module) -> nn.Module:
    """A network with as much to say as after some training."""
    for name, weight in made.named_parameters():
        if name.endswith("last.weight"):
            nn.init.normal_(weight, std=0.1)
    return made


# -- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "width", "count"),
    [(16, 27, 294_272), (32, 27, 909_232), (36, 27, 1_114_812), (64, 27, 3_134_480), (64, 216, 6_477_890)],
)
def test_sizes_are_the_published_ones(channels: int, width: int, count: int) -> None:
    made = Pyramid(channels, head_width=width)
    assert sum(p.numel() for p in made.parameters()) == count
    assert sum(t.numel() for t in made.state_dict().values()) == count  # no grids are kept


def test_parallel_convolutions_are_one_kernel() -> None:
    torch.manual_seed(0)
    layer, volume = Layer(2, 4, 5), noise(1, 2, 9, 8, 7)
    total = sum(F.conv3d(volume, b.weight, b.bias, padding=b.weight.shape[2] // 2) for b in layer.branches)
    expected = F.prelu(F.instance_norm(total), layer.slope)
    torch.testing.assert_close(layer(volume), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(volume), expected, atol=1e-5, rtol=1e-5)
    slow = torch.autograd.grad(expected.square().sum(), layer.branches[2].weight, retain_graph=True)[0]
    fast = torch.autograd.grad(layer(volume).square().sum(), layer.branches[2].weight)[0]
    torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-3)


def test_as_released_each_parallel_convolution_is_normalised() -> None:
    layer, volume = Layer(2, 4, 5, reproduce=True), noise(1, 2, 9, 8, 7)
    parts = [F.conv3d(volume, b.weight, b.bias, padding=b.weight.shape[2] // 2) for b in layer.branches]
    total = sum((p - p.mean((2, 3, 4), True)) / (p.var((2, 3, 4), False, True) + 1e-5).sqrt() for p in parts)
    torch.testing.assert_close(layer(volume), torch.where(total > 0, total, 0.25 * total), atol=1e-4, rtol=1e-4)


def test_co_attention_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    block = CoAttention(4)
    block.share.data[:] = 0.7
    fixed, moving = noise(1, 4, 2, 3, 2), noise(1, 4, 2, 3, 2, seed=1)
    f, m = (x[0].flatten(1) for x in (fixed, moving))

    def project(layer: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
        return layer.weight[:, :, 0, 0, 0] @ x + layer.bias[:, None]

    matrix = project(block.query, m).T @ project(block.key, f) / 2**0.5
    to_moving = project(block.value, f) @ matrix.softmax(1).T
    to_fixed = project(block.value, m) @ matrix.T.softmax(1).T
    found = block(fixed, moving)
    torch.testing.assert_close(found[0][0].flatten(1), f + 0.7 * to_fixed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1][0].flatten(1), m + 0.7 * to_moving, atol=1e-5, rtol=1e-5)


def slow_filter(field: torch.Tensor, guide: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    s, found = logs.exp(), torch.zeros_like(field)
    for p in product(*map(range, field.shape[2:])):
        total, weights = torch.zeros(3, dtype=field.dtype), torch.zeros((), dtype=field.dtype)
        for q in product(*(range(max(0, x - 2), min(n, x + 3)) for x, n in zip(p, field.shape[2:], strict=True))):
            apart = sum(((a - b) / s[axis]) ** 2 for axis, (a, b) in enumerate(zip(p, q, strict=True)))
            weight = torch.exp(-0.5 * (apart + ((guide[0, 0][p] - guide[0, 0][q]) / s[3]) ** 2))
            total, weights = total + weight * field[(0, slice(None), *q)], weights + weight
        found = found.index_put(
            (torch.tensor(0), torch.arange(3), *map(torch.tensor, p)),  # type: ignore[arg-type]
            total / weights,
        )
    return found


def test_the_bilateral_filter_and_its_gradients() -> None:
    shape, block = (3, 6, 4), Bilateral(trained=True)
    guide = 0.3 * noise(1, 1, *shape)
    sides = []
    for slow in (False, True):
        field = noise(1, 3, *shape, seed=2).requires_grad_()
        block.zero_grad()
        found = slow_filter(field, guide, block.logs) if slow else block(field, guide)
        (found * noise(1, 3, *shape, seed=3)).sum().backward()
        assert block.logs.grad is not None
        sides.append((found.detach(), field.grad, block.logs.grad.clone()))
    for fast, truth in zip(*sides, strict=True):
        torch.testing.assert_close(fast, truth, atol=1e-5, rtol=1e-4)
    assert not Bilateral().logs.requires_grad


def test_slabs_are_the_whole() -> None:
    made, sides = Estimator(2, 5), (noise(1, 2, 3 * SLAB + 2, 6, 5), noise(1, 2, 3 * SLAB + 2, 6, 5, seed=1))
    with torch.no_grad():
        torch.testing.assert_close(made(*sides), made._whole(*sides), atol=1e-6, rtol=1e-5)


def test_the_exponential_of_a_linear_velocity() -> None:
    velocity = torch.zeros(1, 3, 32, 4, 4)
    velocity[:, 0] = 0.2 * (torch.arange(32.0) - 15.5)[:, None, None]
    inner = exponential(velocity)[0, 0, 10:22, 1, 1]
    torch.testing.assert_close(inner, (np.exp(0.2) - 1) * (torch.arange(10.0, 22) - 15.5), atol=2e-3, rtol=2e-3)


def test_cascades_compose_or_add() -> None:
    """U(x) = 2 + 0.05 x and a flow of 1: at x = 5 the composition gives 1 + U(6) = 3.30, the sum 3.25."""
    total, velocity = torch.zeros(1, 3, 16, 4, 4), torch.zeros(1, 3, 16, 4, 4)
    total[:, 0] = 2 + 0.05 * torch.arange(16.0)[:, None, None]
    velocity[:, 0] = 1
    for cascade, expected in (("compose", 3.30), ("add", 3.25)):
        found = Pyramid(2, cascade)._joined(velocity, total)  # type: ignore[arg-type]
        assert float(found[0, 0, 5, 1, 1]) == pytest.approx(expected, abs=1e-5)


def test_fields_die_at_the_border_only_as_released() -> None:
    velocity = torch.ones(1, 3, 8, 8, 8)
    assert torch.equal(exponential(velocity), velocity)
    assert float(exponential(velocity, zeros=True)[0, 0, -1, 4, 4]) < 0.9


def test_zero_padding_is_that_of_grid_sample() -> None:
    volume, field = noise(1, 2, 5, 6, 7), 6 * noise(1, 3, 5, 6, 7, seed=1) - 3
    size = torch.tensor([5.0, 6, 7])
    lines = torch.stack(torch.meshgrid(*map(torch.arange, (5, 6, 7)), indexing="ij"), -1)
    places = 2 * (lines + field[0].permute(1, 2, 3, 0)) / (size - 1) - 1
    expected = F.grid_sample(volume, places.flip(-1)[None], padding_mode="zeros", align_corners=True)
    torch.testing.assert_close(warp(volume, field, zeros=True), expected, atol=1e-4, rtol=1e-4)


def test_a_stretch_keeps_its_size_from_level_to_level() -> None:
    """Content at twice the distance stays there: exact by default, up to the released factor 2 else."""
    coarse = torch.zeros(1, 3, 8, 8, 8)
    coarse[:, 0] = 0.5 * torch.arange(8.0)[:, None, None]
    fine = Pyramid(2)._doubled(coarse, torch.Size((16, 16, 16)))
    torch.testing.assert_close(fine[0, 0, :, 3, 3], 0.5 * torch.arange(16.0))
    released = Pyramid(2, reproduce=True)._doubled(coarse, torch.Size((16, 16, 16)))
    torch.testing.assert_close(released[0, 0, :, 3, 3], 0.5 * torch.arange(16.0) * 14 / 15)


def test_training_starts_from_almost_no_motion_but_not_as_released() -> None:
    sides = noise(1, 1, 16, 16, 16), noise(1, 1, 16, 16, 16, seed=1)
    moves = [float(Pyramid(4, reproduce=r)(*sides)["displacement"].detach().abs().max()) for r in (False, True)]
    assert moves[0] < 1e-2 < moves[1]


@pytest.mark.parametrize(("reproduce", "said"), [(False, [1, 0.5, 0.25, 0.125, 0.0625]), (True, [1.0] * 5)])
def test_estimators_speak_in_voxels_of_the_finest_level(reproduce: bool, said: list[float]) -> None:
    made = Pyramid(2, reproduce=reproduce)
    for estimator in made.estimators:
        nn.init.zeros_(estimator.last.weight)
        nn.init.ones_(estimator.last.bias)
    found = made(noise(1, 1, 32, 32, 32), noise(1, 1, 32, 32, 32, seed=1))
    assert [found[f"velocity_{level}"][0, 0, 0, 0, 0].item() for level in range(5)] == said


# -- loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [WINDOW, 5])
def test_window_sums_are_the_dense_ones(width: int) -> None:
    volume = noise(2, 1, 11, 3, 13)
    dense = F.conv3d(volume, torch.ones(1, 1, *[width] * 3), padding=width // 2)
    torch.testing.assert_close(window_sums(volume, width), dense, atol=1e-4, rtol=1e-5)


def test_local_correlation_is_that_of_each_window() -> None:
    first, second = noise(1, 1, 10, 11, 10).double(), noise(1, 1, 10, 11, 10, seed=1).double()
    where = noise(1, 1, 10, 11, 10, seed=2) > 0.3
    masked, plain = [], []
    a, b, w = (F.pad(x[0, 0], (4,) * 6) for x in (first, second, where.double()))
    for i, j, k in product(range(10), range(11), range(10)):
        cut = (slice(i, i + 9), slice(j, j + 9), slice(k, k + 9))
        for values, weight in ((plain, torch.ones(9, 9, 9).double()), (masked, w[cut])):
            x, y, n = a[cut][weight > 0], b[cut][weight > 0], weight.sum()
            x, y = x - x.sum() / n, y - y.sum() / n
            values.append((x * y).sum() ** 2 / ((x * x).sum() * (y * y).sum() + 1e-5))
    torch.testing.assert_close(local_correlation(first, second), torch.stack(plain).mean())
    inside = torch.stack(masked)[where.flatten()].mean()
    torch.testing.assert_close(local_correlation(first, second, where), inside)


def test_softening_keeps_the_inside_of_a_constant() -> None:
    found = softened(torch.ones(1, 1, 9, 9, 9))
    assert float(found[0, 0, 4, 4, 4]) == pytest.approx(1)
    assert float(found[0, 0, 0, 4, 4]) == pytest.approx(0.7013, abs=1e-3)  # taps 0, 1, 2 of the five


def test_levels_are_weighted_by_halves() -> None:
    volume = soft(32, 32, 32)
    outputs = {"displacement": torch.zeros(1, 3, 32, 32, 32)}
    for level in range(5):
        shape = [32 // 2**level] * 3
        outputs |= {f"{name}_{level}": torch.zeros(1, 3, *shape) for name in ("velocity", "displacement")}
        outputs[f"velocity_{level}"][:, 0] = 0.1 * torch.arange(shape[0])[:, None, None]
    pair = batch(volume, volume)
    rough = sum(0.5**level * 0.01 / 9 for level in range(5))
    parts = [float(loss(outputs, pair, LumirTraining(smoothness=weight))) for weight in (6.0, 5.0)]
    assert parts[0] - parts[1] == pytest.approx(rough, rel=1e-4)


def test_voxelmorph_has_the_loss_of_the_finest_level() -> None:
    settings, pair = (
        LumirTraining(network="voxelmorph", window=5),
        batch(soft(32, 32, 32), soft(32, 32, 32).flip(2)),
    )
    outputs = network(settings)(pair.fixed, pair.moving)
    field = outputs["displacement"]
    everywhere = seen_by_both(pair.fixed_valid, pair.moving_valid, field)
    alike = local_correlation(pair.fixed, warp(pair.moving, field), everywhere, 5)
    torch.testing.assert_close(loss(outputs, pair, settings), 1 - alike + 6 * roughness(field))


# -- the whole ---------------------------------------------------------------------------------------------------


VARIANTS = [
    {},
    {"cascade": "add", "reproduce": True},
    {"large_kernel": 5},
    {"attention": True, "bilateral": "trained"},
    {"precision": "bf16"},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradients_reach_everything_and_checkpoints_change_nothing(changes: dict[str, object]) -> None:
    found = []
    half = changes.get("precision") == "bf16"
    for checkpointing in (False, True):
        settings = LumirTraining(channels=2, checkpointing=checkpointing, **changes)  # type: ignore[arg-type]
        torch.manual_seed(1)
        made = awake(network(settings))
        pair = batch(soft(32, 32, 32), soft(32, 32, 32).flip(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = made(pair.fixed, pair.moving)
        value = loss(outputs, pair, settings)
        value.backward()
        grads = {name: p.grad for name, p in made.named_parameters()}
        missing = {name for name, g in grads.items() if g is None or g.abs().sum() == 0}
        assert all(name.startswith("attention") for name in missing)  # its share begins at 0
        assert "attention.share" not in missing
        found.append((outputs["displacement"].detach(), made.encoder[0].branches[0].weight.grad))  # type: ignore[union-attr, index]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)


def test_use_gives_what_training_gives() -> None:
    torch.manual_seed(0)
    made, pair = (
        awake(Pyramid(2, large_kernel=5, attention=True, bilateral="fixed")),
        (noise(1, 1, *SIDE), noise(1, 1, *SIDE, seed=1)),
    )
    learning = made(*pair)["displacement"].detach()
    with torch.inference_mode():
        torch.testing.assert_close(made(*pair)["displacement"], learning, atol=1e-4, rtol=1e-3)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"multiples of 16, not \(16, 24, 16\)"):
        Pyramid(2)(noise(1, 1, 16, 24, 16), noise(1, 1, 16, 24, 16))


def test_one_pair_can_be_learnt_by_heart() -> None:
    torch.manual_seed(0)
    wide, settings = soft(34, 16, 16), LumirTraining(channels=4, smoothness=0.2)
    pair = batch(wide[:, :, :-2], wide[:, :, 2:])  # fixed p lies at p - 2
    made = network(settings)
    adam = torch.optim.Adam(made.parameters(), lr=3e-3, amsgrad=True)
    losses = []
    for _ in range(30):
        adam.zero_grad()
        outputs = made(pair.fixed, pair.moving)
        total = loss(outputs, pair, settings)
        total.backward()
        adam.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.6 * losses[0]
    inner = outputs["displacement"][0, :, 6:-6, 4:-4, 4:-4].detach().mean((1, 2, 3))
    assert float(inner[0]) < -1.2
    assert float(inner[1:].abs().max()) < 0.6


def test_presets_are_the_rows_of_table_2() -> None:
    rows = {
        "backbone": (32, "add", 0, False, "none"),
        "bf": (32, "add", 0, False, "fixed"),
        "ca": (32, "add", 0, True, "none"),
        "ca-bf": (32, "add", 0, True, "fixed"),
        "lk": (36, "add", 5, False, "none"),
        "lc-1": (64, "add", 0, False, "none"),
        "lc-2": (64, "compose", 0, False, "none"),
    }
    assert set(presets("lumir-training")) == {"default", *rows}
    for name, row in rows.items():
        s = read_settings(LumirTraining, "lumir-training", name)
        assert (s.channels, s.cascade, s.large_kernel, s.attention, s.bilateral) == row
        assert (s.rate, s.schedule, s.amsgrad, s.batch, s.smoothness) == (4e-4, "poly", True, 1, 6.0)
        assert s.reproduce
        assert s.steps == 200 * 3374


@pytest.mark.parametrize("wrong", [{"channels": 3}, {"large_kernel": 4}, {"smoothness": -1.0}, {"window": 4}])
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="training: "):
        LumirTraining(**wrong).check()  # type: ignore[arg-type]


def test_a_refinement_keeps_the_detail_that_the_network_found() -> None:
    """Waves of eight voxels, which MIND-SSC at half the resolution smooths away."""
    truth = torch.zeros(3, 32, 32, 32)
    truth[0] = torch.sin(torch.arange(32) * (2 * torch.pi / 8))[None, :, None]
    moving = soft(32, 32, 32)
    fixed = warp(moving, truth[None])

    class Exact(nn.Module):
        def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"displacement": truth[None]}

    images = [Image.from_array(v[0, 0].numpy(), Grid.from_spacing((32, 32, 32), 1.0)) for v in (fixed, moving)]
    trained = Trained(Exact(), Preprocessing(spacing_mm=1.0, crop=False), {"architecture": "lumir"})
    settings, processor = Lumir(refine=20), torch.device("cpu")
    _, _, field = displacement(trained, *images, Affine.identity(), settings, Journal(), processor)
    inner = (slice(None), *(slice(6, -6),) * 3)
    missed = (resize(field, (32, 32, 32)) - truth)[inner]
    assert float(missed.abs().mean()) < 0.4 * float(truth[inner].abs().mean())


def test_train_then_register(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, change in (("fixed", None), ("moving", WARP)):
        io.write(seen(warp=change, contrast=bright), tmp_path / f"{name}.nii.gz")
    (tmp_path / "pairs.csv").write_text("fixed,moving\n" + "fixed.nii.gz,moving.nii.gz\n" * 2)
    config = tmp_path / "config.toml"
    config.write_text('channels = 2\nsteps = 2\n[preprocessing]\nspacing_mm = 4.0\nlinear = {model = "none"}\n')
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    train = ["train", "lumir", str(tmp_path / "pairs.csv"), "-o", run]
    assert main([*train, "--config", str(config), "--quiet"]) == 0
    pair = [str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz")]
    use = ["register", *pair, "--system", "lumir", "--linear", "none", "-o", out, "--weights", run, "--quiet"]
    assert main([*use, "--refine", "5"]) in (0, 3)
    assert (tmp_path / "out" / "forward.h5").is_file()
    capsys.readouterr()
    assert main([*train, "--preset", "backbon"]) == 2
    assert "did you mean 'backbone'" in capsys.readouterr().err
