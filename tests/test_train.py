"""The training loop goes on exactly; patches, pairs, loss and schedule of DISA do what they say."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crossmorph.cli import main
from crossmorph.describe.lc2 import RADII, lc2_map, zscored
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.networks.disa import DisaNet
from crossmorph.train.checkpoint import load_tensors, save_tensors
from crossmorph.train.disa import (
    CPU,
    PAPER,
    DisaTraining,
    augmented,
    batch_loss,
    chosen_places,
    described,
    evening_weights,
    of_two_volumes,
    predictions,
    rate_at,
    remapped,
    similarities,
    started,
    train_disa,
)
from crossmorph.train.loop import METRICS, STATE, WEIGHTS, Task, Turn, fit
from crossmorph.train.patches import (
    LOW,
    Volume,
    cut,
    cut_turned,
    draw_pool,
    prepared,
    random_turn,
    volume_pairs,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator(seed))
    for _ in range(2):
        noise = torch.nn.functional.avg_pool3d(noise[None, None], 3, 1, 1)[0, 0]
    return zscored(noise)


def some_volumes() -> list[Volume]:
    first = blobs(28, 26, 24)
    other = zscored(first.abs() + 0.3 * blobs(28, 26, 24, seed=1))
    return [Volume(first, "a", "a1"), Volume(other, "a", "a2"), Volume(blobs(26, 26, 26, seed=2), "b", "b1")]


TINY = DisaTraining(
    pairs=20, candidates=64, patch=17, batch=2, places=1, steps=6, unseen_pairs=8, schedule="cosine", rate=1e-2
)


# -- the loop ----------------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


def line_task(error: float | None = None) -> Task:
    """A straight line fitted to random points; the dropout and the draws use different generators."""
    torch.manual_seed(1)
    network = torch.nn.Linear(3, 1)

    def loss(model: torch.nn.Module, draw: torch.Generator, step: int) -> torch.Tensor:
        x = torch.randn(8, 3, generator=draw)
        return ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()

    return Task(
        network=network,
        turns=(Turn(torch.optim.AdamW(network.parameters(), lr=1.0), lambda step: 0.1 / (1 + step), loss),),
        validate=lambda: {
            "error": float((network.weight.detach() - 1).square().mean()) if error is None else error
        },
        architecture="line",
        configuration={"kind": "line", "sizes": (3, 1)},
        about={"licence": "none"},
    )


def stopped_at(step: int):
    def progress(now: int, numbers: dict[str, float]) -> None:
        if now == step:
            raise StopError

    return progress


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    fit(line_task(), straight, 20, seed=3, validate_every=5, write_every=1)
    for stop in (4, 13):
        with pytest.raises(StopError):
            fit(
                line_task(),
                broken,
                20,
                seed=3,
                resume=True,
                validate_every=5,
                write_every=1,
                save_seconds=0,
                progress=stopped_at(stop),
            )
    fit(line_task(), broken, 20, seed=3, resume=True, validate_every=5, write_every=1)
    ended = [load_tensors(folder / STATE) for folder in (straight, broken)]
    assert ended[0][1] == ended[1][1]
    assert ended[0][0].keys() == ended[1][0].keys()
    assert all(torch.equal(ended[0][0][name], ended[1][0][name]) for name in ended[0][0])
    assert (straight / METRICS).read_text() == (broken / METRICS).read_text()
    assert (straight / WEIGHTS).read_bytes() == (broken / WEIGHTS).read_bytes()


def test_the_rate_is_that_of_the_step(tmp_path: Path) -> None:
    fit(line_task(), tmp_path, 4, seed=0, write_every=2)
    with (tmp_path / METRICS).open(newline="") as file:
        rates = {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["name"] == "rate"}
    assert rates == {2: pytest.approx(0.1 / 2), 4: pytest.approx(0.1 / 4)}


def test_the_best_weights_are_kept_not_the_last(tmp_path: Path) -> None:
    errors = iter([3.0, 1.0, 2.0])
    task = replace(line_task(), validate=lambda: {"error": next(errors)})
    best = fit(task, tmp_path, 6, seed=0, validate_every=2)
    assert best == {"error": 1.0, "step": 4}
    last = load_tensors(tmp_path / STATE)[0]["network.weight"]
    assert not torch.equal(load_file(tmp_path / WEIGHTS)["weight"], last)


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    fit(line_task(), tmp_path, 2, seed=0)
    other = replace(line_task(), configuration={"kind": "curve", "sizes": (3, 1)})
    with pytest.raises(InputError, match='kind: "line" before, "curve" now'):
        fit(other, tmp_path, 4, seed=0, resume=True)
    with pytest.raises(InputError, match='network: "line" before, "spline" now'):
        fit(replace(line_task(), architecture="spline"), tmp_path, 4, seed=0, resume=True)


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path) -> None:
    task = line_task()
    spoilt = replace(task.turns[0], loss=lambda model, draw, step: model(torch.full((1, 3), math.nan)).sum())
    broken = replace(task, turns=(spoilt,))
    with pytest.raises(InputError, match="the loss became nan at step 1"):
        fit(broken, tmp_path, 2, seed=0)


def test_foreign_states_are_refused(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"not a state")
    with pytest.raises(InputError, match="no safetensors file"):
        fit(line_task(), tmp_path, 2, seed=0, resume=True)
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {"b": [1, math.inf]})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"b": [1, math.inf]}


# -- patches -----------------------------------------------------------------------------------------------------


def test_pairs_are_within_a_subject() -> None:
    assert sorted(volume_pairs(some_volumes())) == [(0, 1), (1, 0), (2, 2)]


def test_cutting_upright_is_slicing() -> None:
    volume = some_volumes()[0]
    centre = torch.tensor([9, 12, 11])
    expected = volume.values[1:18, 4:21, 3:20]
    torch.testing.assert_close(cut_turned(volume, centre, torch.eye(3), 17), expected)
    assert torch.equal(cut(volume.values, centre[None], 8)[0], expected)
    assert torch.equal(cut(volume.values, torch.tensor([[0, 0, 0]]), 8)[0][8:, 8:, 8:], volume.values[:9, :9, :9])
    assert not cut(volume.values, torch.tensor([[0, 0, 0]]), 8)[0][:8].any()


def test_turning_turns_about_the_centre() -> None:
    volume = some_volumes()[0]
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # axis i of the patch runs along j of the volume
    centre = torch.tensor([12, 12, 12])
    found = cut_turned(volume, centre, turn, 17)
    expected = torch.empty(17, 17, 17)
    for place in np.ndindex(17, 17, 17):
        i, j, k = (torch.tensor(place).float() - 8) @ turn.T + 12
        expected[place] = volume.values[int(i), int(j), int(k)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_random_turns_are_rotations_and_mirrorings() -> None:
    draw = generator()
    turns = torch.stack([random_turn(draw) for _ in range(200)])
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(200, 3, 3), atol=1e-5, rtol=0)
    mirrored = (torch.linalg.det(turns) < 0).float().mean()
    assert 0.35 < mirrored < 0.65
    assert turns.mean(0).abs().max() < 0.15  # no direction is preferred


@pytest.mark.parametrize("candidates", [0, 400])
def test_the_pool_holds_the_similarities_it_says(candidates: int) -> None:
    volumes = some_volumes()
    pool = draw_pool(volumes, 12, candidates, generator())
    assert pool.volumes.shape == (len(pool.scores), 2)
    for which, centres, score in zip(pool.volumes, pool.centres, pool.scores, strict=True):
        b, x = (volumes[int(index)] for index in which)
        patch = cut(b.values, centres[:1], max(RADII))[0]
        found = lc2_map(patch, x.values)[tuple(centres[1].tolist())]
        assert float(score) == pytest.approx(float(found), abs=1e-4)
    assert (pool.scores <= LOW).sum() <= 0.1 * len(pool.scores) + 1


def test_similarities_of_the_pool_are_spread() -> None:
    """A volume against itself offers every similarity, so a third lies in each third."""
    pool = draw_pool(some_volumes()[2:], 90, 0, generator())
    counts = torch.histc(pool.scores, 3, 0, 1)
    assert (counts > 15).all()


def test_centres_are_drawn_where_there_is_something() -> None:
    values = torch.zeros(40, 20, 20)
    values[30:] = blobs(10, 20, 20)
    pool = draw_pool([Volume(values, "a", "a")], 30, 64, generator())
    assert (pool.centres[:, 0, 0] >= 30 - max(RADII)).all()


def test_preparing_brings_volumes_to_the_spacing() -> None:
    image = Image.from_array(100 + 9 * blobs(24, 20, 16).numpy(), np.diag([1.0, 2, 3, 1]))
    volume = prepared(image, "s", 2.0)
    assert tuple(volume.values.shape) == (12, 20, 24)
    assert float(volume.values.mean()) == pytest.approx(0, abs=1e-5)
    assert float(volume.values.std(correction=0)) == pytest.approx(1, abs=1e-5)


# -- loss and schedule -------------------------------------------------------------------------------------------


def test_the_published_rate() -> None:
    assert rate_at(0, PAPER) == 1e-3  # the released code steps its scheduler after the optimiser
    assert rate_at(100, PAPER) == pytest.approx(1e-3 * (math.exp(0.5) - 1) / (math.e - 1))
    assert rate_at(200, PAPER) == rate_at(7999, PAPER) == 1e-3
    assert rate_at(8000, PAPER) == 5e-4
    assert rate_at(CPU.steps, CPU) == pytest.approx(0)
    assert max(rate_at(step, CPU) for step in range(CPU.steps)) <= CPU.rate


def test_a_lively_start_gives_descriptors_of_some_length() -> None:
    x = torch.stack([blobs(33, 33, 33, seed=s) for s in range(3)])[:, None]
    with torch.no_grad():
        lengths = [float(started(replace(PAPER, lively=on))(x).norm(dim=1).mean()) for on in (False, True)]
    assert lengths[0] < 0.3
    assert 0.5 < lengths[1] < 3


def test_pairs_of_a_batch_are_of_two_volumes() -> None:
    """In the order a, its copy, b, its copy, for each pair."""
    found = of_two_volumes(8, 1)
    one = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(found, torch.block_diag(one, one).bool())
    assert torch.equal(of_two_volumes(4, 0).nonzero(), torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]]))


def test_augmenting_changes_values_as_published() -> None:
    patch = blobs(17, 17, 17)
    draw = generator()
    found = torch.stack([augmented(patch, replace(PAPER, noise=0.0), draw) for _ in range(400)])
    design = torch.stack([patch.flatten(), torch.ones(patch.numel())], 1)
    fits = torch.linalg.lstsq(design, found.flatten(1).T).solution
    torch.testing.assert_close(design @ fits, found.flatten(1).T, atol=1e-4, rtol=0)
    factor, shift = fits
    assert 0.22 < (factor < 0).float().mean() < 0.38
    assert 0.7 <= factor.abs().min() < 0.72 < 1.28 < factor.abs().max() <= 1.3
    assert 0.17 < shift.std() < 0.23


def test_noise_is_another_number_at_each_voxel() -> None:
    quiet = replace(PAPER, sign=0.0, shift=0.0, scale=(1.0, 1.0), noise=0.01)
    patch = blobs(17, 17, 17)
    assert float((augmented(patch, quiet, generator()) - patch).std()) == pytest.approx(0.01, rel=0.1)


def test_remapping_is_a_function_of_the_value() -> None:
    patch = blobs(17, 17, 17)
    found = remapped(patch, generator())
    order = patch.flatten().argsort()
    steps = found.flatten()[order].diff().abs()
    assert steps.max() < 1.0  # equal values go to equal values
    assert float(found.std()) == pytest.approx(float(patch.std()), rel=1e-4)
    assert float(torch.corrcoef(torch.stack([found.flatten(), patch.flatten()]))[0, 1]) < 0.99
    assert float(remapped(torch.ones(5, 5, 5), generator()).std()) < 1e-5


def test_places_begin_with_the_centre_and_keep_their_windows_inside() -> None:
    places = chosen_places(5, replace(CPU, places=30), generator())
    assert (places[:, 0] == 5).all()
    assert 4 * places.min() - 8 >= 0
    assert 4 * places.max() + 8 <= 40


def test_similarities_are_those_of_the_places() -> None:
    x = torch.stack([blobs(33, 33, 33, seed=s) for s in (0, 1)])
    places = torch.tensor([[[4, 4, 4], [2, 3, 6]], [[4, 4, 4], [5, 5, 3]]])
    table = similarities(x, places)
    b = cut(x[0], torch.tensor([[8, 12, 24]]), 7)[0]
    found = lc2_map(b, x[1])[20, 20, 12]
    assert float(table[1, 3]) == pytest.approx(float(found), abs=1e-4)


def test_descriptors_are_taken_at_the_places() -> None:
    torch.manual_seed(0)
    network, x = DisaNet(), torch.stack([blobs(33, 33, 33, seed=s) for s in (0, 1)])
    places = torch.tensor([[[4, 4, 4]], [[2, 3, 6]]])
    found = described(network, x, places, PAPER)
    expected = network(x[:, None])[1, :, 2, 3, 6]
    torch.testing.assert_close(found[1], expected / expected.norm().clamp_min(1))


def test_even_weights_give_each_tenth_the_same_say() -> None:
    """Unless it has hardly any pairs: two of ten thousand count as two of five."""
    target = torch.cat([torch.full((9900,), 0.05), torch.full((98,), 0.55), torch.full((2,), 0.95)])
    weight = evening_weights(target)
    assert float(weight.sum()) == pytest.approx(1)
    shares = [float(weight[target == target[index]].sum()) for index in (0, 9950, -1)]
    assert shares == pytest.approx([1 / 2.4, 1 / 2.4, 0.4 / 2.4], rel=1e-4)


@pytest.mark.parametrize("places", [1, 5])
def test_the_loss_is_the_squared_error_of_the_dots(places: int) -> None:
    """A network that gives zeros is wrong by the mean square of the similarities, and by no more."""
    settings = replace(TINY, patch=33, places=places)
    volumes = some_volumes()
    network = DisaNet()
    torch.nn.init.zeros_(network.leave.weight)
    pool = draw_pool(volumes, 10, 64, generator())
    loss = batch_loss(network, volumes, pool, settings, generator(1))
    assert 0 < float(loss.detach()) < 1


def test_pairs_count_more_in_the_last_steps() -> None:
    settings = replace(TINY, patch=33, places=4, paired=0.0, finish=2)
    volumes, network = some_volumes(), DisaNet()
    pool = draw_pool(volumes, 10, 64, generator())

    def at(step: int, paired: float) -> float:
        chosen = replace(settings, paired=paired)
        return float(batch_loss(network, volumes, pool, chosen, generator(1), step).detach())

    assert at(3, 0.0) != pytest.approx(at(4, 0.0))
    assert at(4, 0.0) == at(5, 1.0) == pytest.approx((at(3, 0.0) + at(3, 1.0)) / 2)


def test_the_network_learns_a_few_pairs() -> None:
    volumes = some_volumes()[:2]
    settings = replace(TINY, batch=4)
    pool = draw_pool(volumes, 6, 64, generator())
    torch.manual_seed(0)
    network = DisaNet()
    before = predictions(network, volumes, pool, settings)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    still = replace(settings, sign=0.0, shift=0.0, scale=(1.0, 1.0), noise=0.0)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = batch_loss(network, volumes, pool, still, generator(step % 2))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])
    assert before[0].shape == before[1].shape == (len(pool.scores),)


def test_a_whole_training(tmp_path: Path) -> None:
    volumes = some_volumes()
    best = train_disa(volumes[:2], volumes[2:], tmp_path, TINY, {"licence": "CC0"})
    assert 0 < best["error"] < 1
    assert set(best) == {"error", "error_of_mean", "correlation", "step"}
    pool = load_tensors(tmp_path / "pairs.safetensors")[0]
    again = train_disa(volumes[:2], volumes[2:], tmp_path, TINY, {"licence": "CC0"}, resume=True)
    assert again == best
    assert torch.equal(load_tensors(tmp_path / "pairs.safetensors")[0]["centres"], pool["centres"])
    with pytest.raises(InputError, match=r"rate: 0\.01 before, 0\.02 now"):
        train_disa(volumes[:2], volumes[2:], tmp_path, replace(TINY, rate=0.02), {}, resume=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch": 34},
        {"patch": 9},
        {"spacing_mm": 0.0},
        {"schedule": "linear"},
        {"scale": (1.3, 0.7)},
        {"batch": 0},
        {"candidates": -1},
        {"paired": 1.5},
        {"copies": 1, "places": 1},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        replace(PAPER, **wrong).check()


# -- the command -------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, array: np.ndarray) -> str:
    folder.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.diag([2.0, 2, 2, 1])), folder / name)
    return str(folder / name)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [written(tmp_path / v.subject, f"{v.name}.nii.gz", v.values.numpy()) for v in some_volumes()]


def test_bad_input_is_one_line(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "out")]
    flat = written(tmp_path / "c", "flat.nii.gz", np.ones((20, 20, 20)))
    slice_ = written(tmp_path / "c", "slice.nii.gz", np.random.default_rng(0).normal(size=(20, 20, 1)))
    empty = written(tmp_path / "c", "nan.nii.gz", np.full((20, 20, 20), np.nan))
    (tmp_path / "file").write_text("")
    cases = [
        ([files[0], *out], "at least two volumes"),
        ([*files[:2], *out], "on one side"),
        ([*files, *out, "--unseen", "nobody"], "on one side"),
        ([*files, *out, "--unseen", "("], "no regular expression"),
        ([*files, *out, "--subject-pattern", "sub-.."], "finds nothing"),
        ([*files, flat, *out], "flat.nii.gz is constant"),
        ([*files, slice_, *out], "2-D"),
        ([*files, empty, *out], "no valid voxel"),
        ([*files, *out, "--steps", "0"], "steps"),
        *([] if torch.cuda.is_available() else [([*files, *out, "--device", "cuda"], "no CUDA device")]),
        ([*files, "-o", str(tmp_path / "nowhere"), "--resume"], "no training to go on with"),
        ([*files, "-o", str(tmp_path / "file" / "out")], "cannot write"),
    ]
    for arguments, words in cases:
        assert main(["train", "disa", *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.strip().splitlines()) == 1


def test_a_folder_with_a_training_is_not_started_again(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / STATE).write_bytes(b"")
    assert main(["train", "disa", *files, "-o", str(out)]) == 2
    assert "add --resume" in capsys.readouterr().err
