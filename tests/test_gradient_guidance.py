"""The dual branch of Xu et al. (ISBI 2021): equations against slow references, learning, and use."""

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scene import NONE, WARP, bright, errors, inverted, seen
from torch import nn

from crossmorph.describe.mind import mind, mind_ssc_reference
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.networks.voxelmorph import VoxelMorph
from crossmorph.networks.warp import warp
from crossmorph.record import Journal
from crossmorph.registration import register
from crossmorph.settings import GradientGuidance, Preprocessing
from crossmorph.space import Grid
from crossmorph.systems.gradient_guidance import BRIGHT, DualBranch, gradient_map, loss, network
from crossmorph.systems.learned import displacement, load_trained, prepared, upright
from crossmorph.train.checkpoint import save_weights
from crossmorph.train.losses import mind_difference, roughness, seen_by_both
from crossmorph.train.sample import Batch
from crossmorph.train.settings import GradientGuidanceTraining
from crossmorph.transform import Affine

SMALL = (48, 32, 16)
VOLUME = Preprocessing(spacing_mm=2.0, crop=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def soft(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(1, 1, *shape, generator=generator(seed))
    for _ in range(3):
        noise = nn.functional.avg_pool3d(nn.functional.pad(noise, (1,) * 6, mode="replicate"), 3, 1)
    return (noise - noise.min()) / (noise.max() - noise.min())


def batch(fixed: torch.Tensor, moving: torch.Tensor) -> Batch:
    everywhere = torch.ones_like(fixed, dtype=torch.bool)
    return Batch(("a pair",), fixed, moving, everywhere, everywhere, None, None, None)


# -- equations ---------------------------------------------------------------------------------------------------


def test_gradient_maps_are_lengths_of_unhalved_central_differences() -> None:
    volume = torch.rand(1, 1, 6, 5, 4, generator=generator())
    v = volume[0, 0]
    lengths = torch.zeros(6, 5, 4)
    for place in product(range(6), range(5), range(4)):
        for axis, n in enumerate((6, 5, 4)):
            ends = []
            for side in (1, -1):
                near = list(place)
                near[axis] = min(max(near[axis] + side, 0), n - 1)
                ends.append(v[tuple(near)])
            lengths[place] += (ends[0] - ends[1]) ** 2
    lengths = lengths.sqrt()
    high = lengths.flatten().sort().values[round(BRIGHT * 119)]
    expected = (lengths / high).clamp(max=1)
    torch.testing.assert_close(gradient_map(volume)[0, 0], expected)


def test_mind_is_what_its_formula_says() -> None:
    image = torch.rand(5, 4, 6, generator=generator())
    shape = image.shape

    def at(*place: int) -> torch.Tensor:
        return image[tuple(min(max(p, 0), n - 1) for p, n in zip(place, shape, strict=True))]

    steps = [tuple(s if a == axis else 0 for a in range(3)) for axis in range(3) for s in (-1, 1)]
    distances = torch.zeros(6, *shape)
    for place in product(*map(range, shape)):
        for r, step in enumerate(steps):
            window = [
                tuple(p + o for p, o in zip(place, off, strict=True)) for off in product((-1, 0, 1), repeat=3)
            ]
            squares = [(at(*w) - at(*(p + s for p, s in zip(w, step, strict=True)))) ** 2 for w in window]
            distances[(r, *place)] = torch.stack(squares).mean()
    spread = distances.mean(0).clamp(1e-3 * distances.mean(0).mean(), 1e3 * distances.mean(0).mean())
    expected = torch.exp(-(distances - distances.amin(0)) / spread)
    torch.testing.assert_close(mind(image), expected, atol=2e-5, rtol=2e-5)


def test_mind_does_not_see_contrast_and_a_flat_volume_gives_ones() -> None:
    image = soft(8, 8, 8)[0, 0]
    torch.testing.assert_close(mind(7 - 3 * image), mind(image), atol=1e-4, rtol=1e-3)
    assert torch.equal(mind(torch.full((5, 5, 5), 3.0)), torch.ones(6, 5, 5, 5))


def test_the_similarity_is_the_mean_over_voxels_and_neighbours() -> None:
    first, second = soft(8, 7, 6), soft(8, 7, 6, seed=1)
    where = torch.zeros(1, 1, 8, 7, 6, dtype=torch.bool)
    where[..., 2:5] = True
    for kind, describe in (("mind", mind), ("ssc", mind_ssc_reference)):
        table = (describe(first[0, 0]) - describe(second[0, 0])).abs()
        expected = table[:, where[0, 0]].mean()
        torch.testing.assert_close(mind_difference(first, second, where, kind), expected)  # type: ignore[arg-type]


def test_the_loss_is_equation_two() -> None:
    settings = GradientGuidanceTraining(alpha=0.4, beta=0.3, gamma=0.8)
    fixed, moving = soft(16, 16, 16), soft(16, 16, 16, seed=1)
    pair = batch(fixed, moving)
    outputs = {
        "displacement": torch.zeros(1, 3, 16, 16, 16),
        "gradient_displacement": torch.zeros(1, 3, 16, 16, 16),
        "fixed_gradient": gradient_map(fixed),
        "moving_gradient": gradient_map(moving),
    }
    outputs["displacement"][:, 0] = (
        0.1 * torch.arange(16)[:, None, None]
    )  # slope 0.1 along one axis, one component
    outputs["gradient_displacement"][:, 1] = 0.2 * torch.arange(16)[:, None]
    assert float(roughness(outputs["displacement"])) == pytest.approx(0.01 / 9)
    parts = []
    for sides, field in (
        ((fixed, moving), outputs["displacement"]),
        ((outputs["fixed_gradient"], outputs["moving_gradient"]), outputs["gradient_displacement"]),
    ):
        where = seen_by_both(pair.fixed_valid, pair.moving_valid, field)
        parts.append(mind_difference(warp(sides[1], field), sides[0], where))
    expected = parts[0] + 0.4 * parts[1] + 0.8 * 0.01 / 9 + 0.3 * 0.04 / 9
    torch.testing.assert_close(loss(outputs, pair, settings), expected)
    alone = {"displacement": outputs["displacement"]}
    torch.testing.assert_close(loss(alone, pair, settings), parts[0] + 0.8 * 0.01 / 9)


def test_what_is_not_seen_has_no_say() -> None:
    fixed, moving = soft(16, 16, 16), soft(16, 16, 16, seed=1)
    pair = batch(fixed, moving)
    valid = pair.fixed_valid.clone()
    valid[:, :, 8:] = False
    pair = replace(pair, fixed_valid=valid)
    outputs = {"displacement": torch.zeros(1, 3, 16, 16, 16)}
    settings = GradientGuidanceTraining(network="vm")
    changed = fixed.clone()
    changed[:, :, 13:] = 0
    scaled = [loss(outputs, replace(pair, fixed=volume), settings) for volume in (fixed, changed)]
    assert float(scaled[0]) == pytest.approx(float(scaled[1]), rel=2e-2)  # V is clamped by the mean of the volume
    assert float(loss(outputs, batch(changed, moving), settings)) != pytest.approx(float(scaled[0]), rel=2e-2)


# -- networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("vm", 301_411),
        ("vm-concat", 301_411 + 2 * 27 * 16 + 2 * 27 * 32),
        ("average", 602_822),
        ("gated", 603_821),
    ],
)
def test_sizes_of_the_compared_networks(kind: str, count: int) -> None:
    made = network(GradientGuidanceTraining(network=kind))  # type: ignore[arg-type]
    assert sum(p.numel() for p in made.parameters()) == count


def test_gated_begins_as_average() -> None:
    pair = soft(16, 16, 16), soft(16, 16, 16, seed=1)
    found = []
    for kind in ("average", "gated"):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(network(GradientGuidanceTraining(network=kind))(*pair)["displacement"])  # type: ignore[arg-type]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["gated", "vm-concat"])
def test_brightness_and_contrast_of_a_volume_do_not_matter(kind: str) -> None:
    torch.manual_seed(0)
    made = network(GradientGuidanceTraining(network=kind))  # type: ignore[arg-type]
    for layer in made.modules():
        if isinstance(layer, VoxelMorph):
            nn.init.normal_(layer.flow.weight, std=0.05)
    fixed, moving = soft(32, 16, 16), soft(32, 16, 16, seed=1)
    with torch.no_grad():
        plain, changed = (made(fixed, one)["displacement"] for one in (moving, 0.2 + 0.5 * moving))
    torch.testing.assert_close(changed, plain, atol=0.01 * float(plain.abs().max()), rtol=0)


def test_gradients_reach_everything() -> None:
    torch.manual_seed(0)
    settings = GradientGuidanceTraining()
    made = network(settings)
    for branch in (made.images, made.gradients):  # type: ignore[union-attr]
        nn.init.normal_(branch.flow.weight, std=0.05)
    pair = batch(soft(16, 16, 16), soft(16, 16, 16, seed=1))
    loss(made(pair.fixed, pair.moving), pair, settings).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


@pytest.mark.parametrize("kind", ["gated", "vm"])
def test_one_pair_can_be_learnt_by_heart(kind: str) -> None:
    """A shift of two voxels and inverted contrast: the similarity falls, and displacements point the right way."""
    torch.manual_seed(0)
    settings = GradientGuidanceTraining(network=kind, gamma=0.1, beta=0.1)  # type: ignore[arg-type]
    wide = soft(SMALL[0] + 2, *SMALL[1:])
    pair = batch(wide[:, :, :-2], 1 - wide[:, :, 2:])  # moving(p) = 1 - fixed(p + 2): fixed p lies at p - 2
    made = network(settings)
    adam = torch.optim.Adam(made.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = made(pair.fixed, pair.moving)
        total = loss(outputs, pair, settings)
        total.backward()
        adam.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.75 * losses[0]
    inner = outputs["displacement"][0, :, 8:-8, 8:-8, 4:-4].detach().mean((1, 2, 3))
    assert float(inner[0]) < -0.8
    assert float(inner[1:].abs().max()) < 0.5


# -- use ---------------------------------------------------------------------------------------------------------


def turned(image: Image, order: tuple[int, int, int], flips: tuple[int, ...]) -> Image:
    """The same image with its voxels stored in another order."""
    data = image.data[0].permute(order).flip(flips) if flips else image.data[0].permute(order)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, old in enumerate(order):
        change[old, new] = -1 if new in flips else 1
        change[old, 3] = image.grid.shape[old] - 1 if new in flips else 0
    shape = tuple(image.grid.shape[old] for old in order)
    return Image.from_array(data.numpy(), Grid(shape, image.grid.affine @ change), name=image.name)


def weights(folder: Path, shift: float = 0.0, **changes: object) -> Path:
    """Weights of an untrained dual branch whose displacement is about ``shift`` voxels along R."""
    torch.manual_seed(1)
    settings = GradientGuidanceTraining(preprocessing=VOLUME, **changes)  # type: ignore[arg-type]
    made = network(settings)
    assert isinstance(made, DualBranch)
    for branch in (made.images, made.gradients):
        nn.init.normal_(branch.flow.weight, std=0.005)
        branch.flow.bias.data[0] = shift
    about = {"training": {"settings": asdict(settings)}, "preprocessing": asdict(settings.preprocessing)}
    folder.mkdir(exist_ok=True)
    save_weights(folder / "weights.safetensors", made, "gradient-guidance", about)
    return folder


def test_upright_keeps_the_voxels_where_they_are() -> None:
    grid = Grid((4, 5, 6), np.array([[0, 0, -2.0, 7], [1.5, 0.1, 0, 3], [0, -3, 0, 9], [0, 0, 0, 1]]))
    found = upright(grid)
    assert found.axcodes == "RAS"
    assert found.shape == (6, 4, 5)
    np.testing.assert_allclose(np.sort(found.corners(), 0), np.sort(grid.corners(), 0))


def test_a_pair_is_shown_in_one_way_however_it_is_stored() -> None:
    fixed, moving = seen(contrast=bright), seen(contrast=inverted)
    linear = Affine.identity()
    grid, *volumes = prepared(fixed, moving, linear, VOLUME)
    assert all(n % 16 == 0 for n in grid.shape)
    assert 0 <= float(volumes[0].values.min()) < float(volumes[0].values.max()) <= 1
    again, *others = prepared(turned(fixed, (2, 0, 1), (1,)), turned(moving, (1, 0, 2), (0, 2)), linear, VOLUME)
    np.testing.assert_allclose(again.affine, grid.affine, atol=1e-9)
    for volume, other in zip(volumes, others, strict=True):
        torch.testing.assert_close(volume.values, other.values, atol=1e-4, rtol=0)
        assert torch.equal(volume.valid, other.valid)


def test_cropping_keeps_what_both_see() -> None:
    fixed = seen()
    half = Grid.from_spacing((20, 36, 32), 2.0, (20, 0, 0))  # the right half of the field of view
    grid, *_ = prepared(fixed, seen(half), Affine.identity(), Preprocessing(spacing_mm=2.0))
    assert grid.shape[0] < 48
    assert grid.extent_mm[0] >= 34
    assert grid.corners()[:, 0].max() > 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights(tmp_path_factory.mktemp("run") / "run")


def test_the_transform_does_not_depend_on_the_order_of_voxels(trained: Path) -> None:
    settings = GradientGuidance(str(trained), NONE)
    fixed, moving = seen(contrast=bright, name="fixed"), seen(warp=WARP, contrast=bright, name="moving")
    first = register(fixed, moving, settings=settings)
    second = register(turned(fixed, (1, 2, 0), (2,)), turned(moving, (2, 1, 0), (0,)), settings=settings)
    if first.displacement is None:  # untrained displacements help nobody, and are dropped in both
        assert second.displacement is None
    else:
        points = torch.tensor([[5.0, -8, 3], [-12, 4, 10]])
        torch.testing.assert_close(first.transform(points), second.transform(points), atol=1e-2, rtol=0)


@pytest.mark.parametrize("instructions", [True, False])
def test_a_network_computes_as_it_learnt_where_the_processor_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": instructions})
    given = seen(contrast=bright), seen(warp=WARP, contrast=bright)
    device, fields = torch.device("cpu"), {}
    for name in ("32", "bf16"):
        learnt = load_trained("gradient-guidance", weights(tmp_path / name, precision=name))
        settings, journal = GradientGuidance(str(tmp_path / name)), Journal()
        _, _, fields[name] = displacement(learnt, *given, Affine.identity(), settings, journal, device)
        assert journal.notes["weights"]["bfloat16"] == (instructions and name == "bf16")
    assert torch.equal(fields["bf16"], fields["32"]) != instructions
    assert all(field.dtype == torch.float32 for field in fields.values())
    torch.testing.assert_close(fields["bf16"], fields["32"], atol=0.02, rtol=0)


def test_voxels_become_millimetres_along_the_axes(tmp_path: Path) -> None:
    """Moving content lies 4 mm to the right: a network that says two voxels of 2 mm along R is right."""
    shifted = Affine(np.array([[1.0, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    moving = seen(contrast=bright)
    moving = replace(moving, grid=Grid(moving.grid.shape, shifted.matrix @ moving.grid.affine))
    folder = weights(tmp_path / "run", 2.0)
    stored = turned(seen(contrast=bright), (2, 1, 0), (0, 1))
    result = register(stored, moving, settings=GradientGuidance(str(folder), NONE))
    assert result.displacement is not None
    points = torch.tensor([[5.0, -8, 3], [-12, 4, 10]])
    torch.testing.assert_close(
        result.transform(points) - points, torch.tensor([[4.0, 0, 0]] * 2), atol=0.4, rtol=0
    )


def test_refining_on_the_pair_finds_what_the_network_does_not(trained: Path, tmp_path: Path) -> None:
    fixed, moving = seen(contrast=bright), seen(warp=WARP, contrast=inverted)
    result = register(fixed, moving, settings=GradientGuidance(str(trained), NONE, refine=40))
    assert result.displacement is not None
    before = errors(lambda points: points).mean()
    assert float(errors(result.transform).mean()) < 0.6 * float(before)
    result.save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"warped.nii.gz", "validity.nii.gz", "forward.h5", "inverse.h5", "record.json"} <= names
    record = result.record
    assert record["settings"]["system"] == "gradient-guidance"
    assert len(record["choices"]["weights"]["sha256"]) == 64
    assert {"draw", "network", "refine"} <= {entry["stage"] for entry in record["stages"]}


def test_weights_that_cannot_be_used_are_refused(trained: Path, tmp_path: Path) -> None:
    fixed = seen()
    with pytest.raises(InputError, match="needs weights: give the folder"):
        register(fixed, fixed, settings=GradientGuidance())
    with pytest.raises(InputError, match="is missing"):
        register(fixed, fixed, settings=GradientGuidance(str(tmp_path)))
    with pytest.raises(InputError, match="registers one to one"):
        register(fixed, [fixed, fixed], settings=GradientGuidance(str(trained), NONE))
    other = tmp_path / "other"
    other.mkdir()
    save_weights(other / "weights.safetensors", nn.Linear(2, 2), "disa", {})
    with pytest.raises(InputError, match="holds weights of 'disa'; those of 'gradient-guidance' are needed"):
        load_trained("gradient-guidance", other)
    save_weights(other / "weights.safetensors", nn.Linear(2, 2), "gradient-guidance", {})
    with pytest.raises(InputError, match="does not tell the settings"):
        load_trained("gradient-guidance", other)
    copied = weights(tmp_path / "copied")
    data = bytearray((copied / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "weights.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="sha256"):
        load_trained("gradient-guidance", copied)
