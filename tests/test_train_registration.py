"""Training of registration networks: resumption, running means, several processes, bad ends, the command."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scene import GRID, WARP, bright, inverted, seen

from crossmorph import files, io
from crossmorph.cli import main
from crossmorph.errors import InputError
from crossmorph.image import Labels
from crossmorph.settings import PRESETS, presets, read_settings
from crossmorph.train import registration
from crossmorph.train.checkpoint import load_tensors
from crossmorph.train.loop import (
    EXPLODED,
    LAST,
    METRICS,
    STATE,
    WEIGHTS,
    Task,
    Turn,
    differences,
    fit,
    start_fabric,
)
from crossmorph.train.registration import (
    generated,
    picture,
    rate_at,
    seeded,
    train_registration,
)
from crossmorph.train.settings import (
    TRAININGS,
    Augmentation,
    GradientGuidanceTraining,
    Synthesis,
    Training,
)

TINY = GradientGuidanceTraining(
    network="vm",
    steps=6,
    rate=1e-3,
    validate_every=3,
    synthesis=Synthesis(shape=(16, 16, 16), labels=3, pairs=4),
    augmentation=Augmentation(noise=0.01),
)


def train(folder: Path, settings: Training = TINY, **more: object) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    return train_registration(
        "gradient-guidance",
        settings,
        generated(settings, 2),
        folder,
        start_fabric(),
        **more,  # type: ignore[arg-type]
    )


def losses(folder: Path) -> dict[int, str]:
    with (folder / METRICS).open(newline="") as file:
        return {int(row["step"]): row["value"] for row in csv.DictReader(file) if row["name"] == "loss"}


def line(loss: float | None = None, **changes: object) -> Task:
    """A straight line; with a value that it adds to its loss from step 3 on."""
    torch.manual_seed(1)
    network = torch.nn.Linear(3, 1)

    def of(model: torch.nn.Module, draw: torch.Generator, step: int) -> torch.Tensor:
        x = torch.randn(8, 3, generator=draw)
        value = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        return value + (loss if loss is not None and step >= 3 else 0)

    return Task(
        network=network,
        turns=(Turn(torch.optim.SGD(network.parameters(), lr=0.1), lambda step: 0.1, of),),
        validate=lambda: {"error": float((network.weight.detach() - 1).square().mean())},
        architecture="line",
        configuration={"kind": "line"},
        names=lambda step: f"pair {step}",
        **changes,  # type: ignore[arg-type]
    )


# -- the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "words"), [(math.nan, "became nan"), (1e9, "became 1e\\+09")])
def test_a_bad_loss_ends_with_step_pair_and_last_good_state(tmp_path: Path, value: float, words: str) -> None:
    with pytest.raises(
        InputError, match=f"{words} at step 4, which saw pair 3; the last good state is .* of step 3"
    ):
        fit(line(value), tmp_path, 9, seed=0, save_seconds=0)
    tensors, about = load_tensors(tmp_path / STATE)
    assert about["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert EXPLODED < 1e9


def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path: Path) -> None:
    task = line()

    def spoil(model: torch.nn.Module, draw: torch.Generator, step: int) -> torch.Tensor:
        root = model.weight.sum().sub(model.weight.sum().detach()).abs().sqrt()  # 0, with an infinite gradient
        return root if step == 3 else model(torch.ones(1, 3)).square().sum()

    with pytest.raises(InputError, match="the weights are not finite after step 4"):
        fit(replace(task, turns=(replace(task.turns[0], loss=spoil),)), tmp_path, 9, seed=0, save_seconds=0)
    assert load_tensors(tmp_path / STATE)[1]["step"] == 3


def test_the_running_mean_is_what_is_kept(tmp_path: Path) -> None:
    """w_mean follows w by the decay, which is smaller in the first steps."""
    task = line(average=0.9)
    expected = task.network.weight.detach().clone()
    seen_weights: list[torch.Tensor] = []

    def note(step: int, numbers: dict[str, float]) -> None:
        seen_weights.append(task.network.weight.detach().clone())

    fit(task, tmp_path, 7, seed=0, progress=note)
    for step, weight in enumerate(seen_weights, start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(load_file(tmp_path / WEIGHTS)["weight"], expected)
    torch.testing.assert_close(load_tensors(tmp_path / STATE)[0]["network.weight"], seen_weights[-1])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    task = line(clip=1e-3)
    before = task.network.weight.detach().clone()
    fit(task, tmp_path, 1, seed=0)
    assert 0 < float((task.network.weight.detach() - before).norm()) <= 0.1 * 1e-3 * 1.0001


def test_differences_go_into_tables() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "d": 3}
    assert differences(old, new) == ["a.c: 2 before, 4 now"]


def test_devices_and_precisions_that_are_not_there() -> None:
    with pytest.raises(InputError, match="at least 1, not 0"):
        start_fabric(devices=0)
    with pytest.raises(InputError, match="needs a CUDA device"):
        start_fabric(precision="16")


# -- registration ------------------------------------------------------------------------------------------------


def test_a_training_that_was_killed_while_saving_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of step 3 is being renamed into place when everything stops; it goes on from that of step 2."""
    settings = replace(TINY, network="gated", average=0.5, clip=1.0)
    train(tmp_path / "straight", settings, save_seconds=0.0)
    replacing, saves = os.replace, []

    def stop(source: Path, target: Path) -> None:
        saves.append(target)
        if len([save for save in saves if Path(save).name == STATE]) == 3:
            raise KeyboardInterrupt
        replacing(source, target)

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", settings, save_seconds=0.0)
    monkeypatch.setattr(files.os, "replace", replacing)
    assert load_tensors(tmp_path / "broken" / STATE)[1]["step"] == 2
    train(tmp_path / "broken", settings, resume=True, save_seconds=0.0)
    assert losses(tmp_path / "straight") == losses(tmp_path / "broken")
    for name in (WEIGHTS, LAST):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_the_folder_tells_everything(tmp_path: Path) -> None:
    best = train(tmp_path / "run", about={"licence": "CC0"})
    assert {"error", "loss", "dice", "tre_mm", "ndv_percent", "step"} == set(best)
    assert best["error"] == pytest.approx(1 - best["dice"])
    about = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert about["architecture"] == "gradient-guidance"
    assert about["training"]["settings"] == json.loads(json.dumps(asdict(TINY)))
    assert about["preprocessing"]["spacing_mm"] == 2.0
    assert about["licence"] == "CC0"
    assert about["metrics"] == best
    assert len(about["sha256"]) == 64
    assert (tmp_path / "run" / "last.json").is_file()


def test_another_configuration_is_told_entry_by_entry(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"settings.gamma: 1.0 before, 2.0 now; settings.rate: 0.001 before, 0.002"
    ):
        train(tmp_path / "run", replace(TINY, gamma=2.0, rate=0.002), resume=True)


def test_bf16_trains_to_nearly_the_same_losses(tmp_path: Path) -> None:
    train(tmp_path / "exact")
    settings = replace(TINY, precision="bf16")
    (tmp_path / "half").mkdir()
    fabric = start_fabric(precision="bf16")
    train_registration("gradient-guidance", settings, generated(settings, 2), tmp_path / "half", fabric)
    exact, half = losses(tmp_path / "exact"), losses(tmp_path / "half")
    assert exact.keys() == half.keys()
    assert all(float(half[step]) == pytest.approx(float(exact[step]), rel=0.02) for step in exact)


def test_processes_share_a_batch_without_gaps(tmp_path: Path) -> None:
    settings = replace(TINY, batch=6)
    shares = [
        list(registration._numbers(5, settings, SimpleNamespace(global_rank=rank, world_size=3)))  # type: ignore[arg-type]
        for rank in range(3)
    ]
    assert sorted(number for share in shares for number in share) == list(range(30, 36))
    assert {len(share) for share in shares} == {2}
    fabric = SimpleNamespace(world_size=2)
    with pytest.raises(InputError, match="a batch of 3 pairs cannot be shared by 2 processes"):
        train_registration("gradient-guidance", replace(TINY, batch=3), generated(TINY), tmp_path, fabric)  # type: ignore[arg-type]


def test_every_pair_is_seen_once_an_epoch() -> None:
    data = generated(TINY)
    count = len(data.names)
    orders = [registration._order(0, epoch, count) for epoch in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert orders[0] != orders[1] or orders[1] != orders[2]
    assert float(torch.rand(1, generator=seeded(1, 2))) == float(torch.rand(1, generator=seeded(1, 2)))
    assert float(torch.rand(1, generator=seeded(1, 2))) != float(torch.rand(1, generator=seeded(2, 1)))


def test_rates() -> None:
    cosine, poly = (replace(TINY, schedule=name, steps=10, rate=1.0) for name in ("cosine", "poly"))
    assert rate_at(0, TINY) == rate_at(5, TINY) == 1e-3
    assert [rate_at(step, cosine) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert [rate_at(step, poly) for step in (0, 5, 10)] == pytest.approx([1, 0.5**0.9, 0])


def test_the_picture_shows_four_panels_with_the_front_up() -> None:
    pair = generated(TINY).validation[0]()
    pair.fixed[:, -2:] = 1  # the front, all white
    found = picture(pair, pair.truth)
    assert found.shape == (3, 16, 64)
    assert (found[:, :2, :16] == 1).all()


# -- settings and presets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", list(TRAININGS))
def test_every_preset_can_be_read(system: str) -> None:
    for name in presets(f"{system}-training"):
        assert isinstance(read_settings(TRAININGS[system], f"{system}-training", name), Training)
    assert (PRESETS / system / "default.toml").is_file()


def test_the_papers_values() -> None:
    """Section 3.1.2."""
    for name, weights in (("pig-kidney", (0.4, 0.3, 0.8)), ("abdomen", (0.5, 0.5, 1.0))):
        found = read_settings(GradientGuidanceTraining, "gradient-guidance-training", name)
        assert (found.alpha, found.beta, found.gamma) == weights
        assert (found.rate, found.batch, found.preprocessing.spacing_mm) == (1e-5, 1, 1.0)
        assert (found.network, found.version, found.augmentation) == ("gated", "text", Augmentation())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"rate": 0.0},
        {"average": 1.0},
        {"clip": -1.0},
        {"gamma": -1.0},
        {"synthesis": Synthesis(shape=(8, 16, 16))},
        {"synthesis": Synthesis(share=1.5)},
        {"augmentation": Augmentation(noise=-1.0)},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="training: "):
        replace(TINY, **wrong).check()  # type: ignore[arg-type]


# -- the command -------------------------------------------------------------------------------------------------

CONFIG = """
network = "{network}"
steps = {steps}
rate = 1e-3
batch = {batch}
validate_every = {steps}
[preprocessing]
spacing_mm = 4.0
[preprocessing.linear]
model = "none"
[synthesis]
shape = [16, 16, 16]
pairs = 4
labels = 3
"""


def configured(folder: Path, network: str = "vm", steps: int = 3, batch: int = 1) -> list[str]:
    path = folder / "config.toml"
    path.write_text(CONFIG.format(network=network, steps=steps, batch=batch))
    return ["--config", str(path)]


def test_train_then_register(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, warp, contrast in (("fixed", None, bright), ("moving", WARP, inverted)):
        io.write(seen(GRID, warp, contrast), tmp_path / f"{name}.nii.gz")
        ids = (seen(GRID, warp, bright).data[0] > 60).int()
        io.write(Labels(ids, GRID), tmp_path / f"{name}_labels.nii.gz")
    row = "fixed.nii.gz,moving.nii.gz,fixed_labels.nii.gz,moving_labels.nii.gz\n"
    (tmp_path / "pairs.csv").write_text("fixed,moving,fixed_labels,moving_labels\n" + row * 2)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    pair = [str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz")]
    train = ["train", "gradient-guidance", str(tmp_path / "pairs.csv"), "-o", run, *configured(tmp_path)]
    assert main(train) == 0
    assert "weights.safetensors: loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "cache").is_dir()
    use = ["register", *pair, "--system", "gradient-guidance", "--linear", "none", "-o", out]
    assert main([*use, "--weights", run, "--refine", "10", "--json"]) in (0, 3)
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["refine"] == 10
    assert record["settings"]["weights"] == run
    for arguments, words in (
        (use, "needs weights"),
        ([*use, "--weights", str(tmp_path)], "is missing"),
        (["register", *pair, "-o", f"{out}2", "--weights", run], "--weights is for trained networks"),
        (train, "add --resume to go on"),
        ([*train, "--resume", "--preset", "abdomen"], "give --preset or --config"),
        ([*train[:5], "--preset", "abdomen", "--resume"], "settings.rate: 0.001 before, 1e-05 now"),
        (["train", "gradient-guidance", "gone.csv", "-o", f"{run}2"], "cannot read the table"),
        ([*train[:5], "--devices", "0", "--resume"], "at least 1"),
    ):
        assert main([arg.replace(out, f"{out}3") if arg == out else arg for arg in arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert words in said[-1]


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "crossmorph",
        "train",
        "gradient-guidance",
        "synthetic",
        "-o",
        str(folder),
        *more,
    ]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    """SIGKILL when the first state is there, again a little later, most likely while another one is written."""
    settings = [*configured(tmp_path, "gated", 20), "--save-seconds", "0", "--quiet"]
    subprocess.run(command(tmp_path / "straight", *settings), check=True)
    broken = tmp_path / "broken"
    steps = []
    for least in (3, 9):
        resume = ["--resume"] if broken.is_dir() else []
        process = subprocess.Popen(command(broken, *settings, *resume))
        while process.poll() is None:
            if (broken / STATE).exists() and load_tensors(broken / STATE)[1]["step"] >= least:
                process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(load_tensors(broken / STATE)[1]["step"])
    assert 3 <= steps[0] < steps[1] < 20
    subprocess.run(command(broken, *settings, "--resume"), check=True)
    assert losses(broken) == losses(tmp_path / "straight")
    assert (broken / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    settings = [*configured(tmp_path, "gated", 8, batch=2), "--quiet", "--device", "cpu"]
    weights = []
    for devices in ("1", "2"):
        folder = tmp_path / devices
        subprocess.run(command(folder, *settings, "--devices", devices), check=True)
        weights.append(load_file(folder / LAST))
    assert all(np.isfinite(float(value)) for value in losses(tmp_path / "2").values())
    for step, value in losses(tmp_path / "1").items():
        # Sums of two processes round otherwise, and Adam makes much of gradients near 0: 7e-6 at 2, 2e-4 at 8.
        assert float(losses(tmp_path / "2")[step]) == pytest.approx(float(value), rel=3e-5 if step == 2 else 2e-3)
    apart = torch.cat([(weights[1][name] - tensor).abs().flatten() for name, tensor in weights[0].items()])
    assert float(apart.mean()) < 1e-4  # of 8e-3 that weights move; 5e-5 was seen
