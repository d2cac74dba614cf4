"""macJNet as a whole: joint training, resumption, tables of every kind, the commands."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scene import GRID, WARP, bright, inverted, seen

from crossmorph import io
from crossmorph.cli import main
from crossmorph.errors import InputError
from crossmorph.files import RECORD
from crossmorph.image import Image, Labels
from crossmorph.report.page import REPORT
from crossmorph.settings import MacJNet, Preprocessing, presets, read_settings
from crossmorph.systems.learned import load_trained
from crossmorph.systems.segment import segmented
from crossmorph.train.loop import METRICS, WEIGHTS, start_fabric
from crossmorph.train.pairs import Data
from crossmorph.train.registration import generated, train_registration
from crossmorph.train.settings import MacJNetTraining, Synthesis

TINY = MacJNetTraining(
    channels=4,
    features=2,
    stages=3,
    steps=6,
    pretrain=4,
    freeze=1,
    rate=1e-3,
    segment_rate=1e-3,
    pretrain_rate=1e-3,
    similarity="mind",
    validate_every=3,
    synthesis=Synthesis(shape=(16, 16, 16), labels=3, pairs=4),
)


def partly(settings: MacJNetTraining, known: set[int]) -> Data:
    """Generated pairs, of which only some keep their labels."""
    data = generated(settings, 2)

    def sample(index: int, generator: torch.Generator):
        pair = data.sample(index, generator)
        return pair if index in known else replace(pair, fixed_labels=None, moving_labels=None)

    ids = tuple(both if index in known else ((), ()) for index, both in enumerate(data.ids))
    return replace(data, sample=sample, ids=ids)


def train(
    folder: Path, settings: MacJNetTraining = TINY, data: Data | None = None, **more: object
) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    data = data or partly(settings, {1})
    return train_registration("macjnet", settings, data, folder, start_fabric(), **more)  # type: ignore[arg-type]


def rows(folder: Path) -> list[tuple[str, ...]]:
    with (folder / METRICS).open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


class StoppedError(Exception):
    """The user had enough."""


def test_a_stopped_training_goes_on_to_the_same_weights_of_all_networks(tmp_path: Path) -> None:
    """Stopped in the pretraining, and again in the joint part, whose optimisers must come back each to its own."""

    def stop_at(share: float):
        def progress(stage: str, done: float, numbers: dict[str, float]) -> None:
            if done >= share:
                raise StoppedError

        return progress

    settings = replace(TINY, average=0.9)
    train(tmp_path / "straight", settings, partly(settings, {1}))
    broken = tmp_path / "broken"
    for share in (0.3, 0.8):
        with pytest.raises(StoppedError):
            train(broken, settings, resume=True, save_seconds=0, progress=stop_at(share))
    train(broken, settings, resume=True)
    assert rows(broken) == rows(tmp_path / "straight")
    assert (broken / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()


def test_a_validation_measures_registration_and_both_segmentations(tmp_path: Path) -> None:
    best = train(tmp_path)
    dices = [best[name] for name in ("dice", "fixed_dice", "moving_dice")]
    assert best["error"] == pytest.approx(1 - np.mean(dices))
    about = json.loads((tmp_path / "weights.json").read_text())
    assert about["training"]["settings"]["labels"] == [1, 2]
    trained = load_trained("macjnet", tmp_path)
    assert set(trained.segmenters) == {"fixed", "moving"}
    names = {row[1] for row in rows(tmp_path)}
    assert {"registration_loss", "registration_rate", "segmentation_loss", "segmentation_rate"} <= names


def test_without_any_labels_the_registration_is_trained_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = train(tmp_path, data=partly(TINY, set()))
    assert "no training pair has labels" in caplog.text
    assert "fixed_dice" not in best
    trained = load_trained("macjnet", tmp_path)
    assert not trained.segmenters
    with pytest.raises(InputError, match="these weights have no segmenters"):
        segmented(trained, seen(), "fixed")


def test_what_cannot_be_trained_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"from 32 on, not \(16, 16, 16\) voxels; set stages = 3"):
        train(tmp_path / "small", replace(TINY, stages=4))
    for wrong in ({"segment_rate": 0.0}, {"channels": 3}, {"stages": 6}, {"labels": (0, 1)}, {"pretrain": -1}):
        with pytest.raises(InputError, match="training: "):
            replace(TINY, **wrong).check()  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"synthesis.share must be 0"):
        replace(TINY, synthesis=Synthesis(share=0.5)).check()


def test_presets_hold_the_papers_values() -> None:
    assert set(presets("macjnet-training")) == {"default", "paper"}
    for name in ("default", "paper"):
        s = read_settings(MacJNetTraining, "macjnet-training", name)
        assert (s.similarity_weight, s.label_weight, s.smoothness) == (20, 2, 0.5)
        assert (s.rate, s.segment_rate, s.batch, s.similarity, s.version) == (2e-5, 1e-5, 1, "macmind", "disp")
        assert (s.channels, s.gates, s.features, s.registration) == (28, True, 32, "lapirn")
    assert s.steps - s.pretrain == 200 * 90


@pytest.mark.slow
def test_one_labelled_pair_can_be_learnt_by_heart(tmp_path: Path) -> None:
    """Of two pairs one has labels; all networks come to label it, and the joint part keeps what was learnt."""
    settings = replace(
        TINY,
        features=4,
        steps=120,
        pretrain=80,
        rate=2e-3,
        segment_rate=1e-3,
        pretrain_rate=5e-3,
        validate_every=40,
        smoothness=0.1,
        synthesis=Synthesis(shape=(16, 16, 16), labels=2, pairs=2, bend_mm=2.0),
    )
    data = generated(settings, 1)
    first = data.validation[0]()
    other = data.sample(0, torch.Generator().manual_seed(5))
    pairs = (first, replace(other, fixed_labels=None, moving_labels=None))
    data = replace(data, sample=lambda index, generator: pairs[index], ids=(data.ids[0], ((), ())))
    best = train(tmp_path, settings, data)
    before = [float(row[2]) for row in rows(tmp_path) if row[1] == "fixed_dice"]
    assert best["fixed_dice"] > 0.9
    assert best["moving_dice"] > 0.9
    assert before[-1] > before[0] - 0.02


# -- images ------------------------------------------------------------------------------------------------------


class ByValue(torch.nn.Module):
    """Two classes by the brightness of a voxel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.3 - x, (x - 0.3), (x - 0.7) * 2], 1) * 50


def test_segmentations_lie_where_the_image_does(tmp_path: Path) -> None:
    """A known function of the brightness in place of the network, on an image of another storage order."""
    train(tmp_path, replace(TINY, preprocessing=Preprocessing(spacing_mm=2.0)))
    trained = load_trained("macjnet", tmp_path)
    for side in ("fixed", "moving"):
        trained.network.segmenters[side] = ByValue()  # type: ignore[union-attr, operator]
    image = seen(GRID)
    values = image.data[0]
    low, high = (float(torch.quantile(values[image.valid], q)) for q in (0.01, 0.99))
    scaled = ((values - low) / (high - low)).clamp(0, 1)
    scores = ByValue()(scaled[None, None])[0]
    found = segmented(trained, image, "fixed")
    assert found.grid.same_as(GRID)
    truth = scores.argmax(0)
    assert float((found.data == truth).float().mean()) > 0.97
    turned = Image(image.data.permute(0, 2, 1, 3).contiguous(), _swapped(), image.valid.permute(1, 0, 2))
    again = segmented(trained, turned, "moving")
    assert float((again.data.permute(1, 0, 2) == found.data).float().mean()) > 0.99


def _swapped():
    from crossmorph.space import Grid

    affine = GRID.affine[:, [1, 0, 2, 3]]
    return Grid((GRID.shape[1], GRID.shape[0], GRID.shape[2]), affine)


def files(folder: Path) -> None:
    for name, warp, contrast in (("fixed", None, bright), ("moving", WARP, inverted)):
        io.write(seen(GRID, warp, contrast), folder / f"{name}.nii.gz")
        body = seen(GRID, warp, bright).data[0]
        io.write(Labels((body > 60).int() + (body > 110).int(), GRID), folder / f"{name}_labels.nii.gz")


CONFIG = """
steps = 4
pretrain = 2
channels = 4
features = 2
stages = {stages}
similarity = "mind"
[preprocessing]
spacing_mm = 4.0
linear = {{model = "none"}}
"""


def test_train_then_register_then_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(tmp_path)
    four = "fixed.nii.gz,moving.nii.gz,fixed_labels.nii.gz,moving_labels.nii.gz\n"
    header = "fixed,moving,fixed_labels,moving_labels\n"
    (tmp_path / "pairs.csv").write_text(header + "fixed.nii.gz,moving.nii.gz,,\n" + four * 2)
    (tmp_path / "half.csv").write_text(header + four + "fixed.nii.gz,moving.nii.gz,fixed_labels.nii.gz,\n")
    (tmp_path / "config.toml").write_text(CONFIG.format(stages=3))
    (tmp_path / "deep.toml").write_text(CONFIG.format(stages=5))
    run, out, pair = (
        str(tmp_path / "run"),
        tmp_path / "out",
        [str(tmp_path / f"{n}.nii.gz") for n in ("fixed", "moving")],
    )
    options = ["--config", str(tmp_path / "config.toml"), "--quiet", "--device", "cpu"]
    assert main(["train", "macjnet", str(tmp_path / "pairs.csv"), "-o", run, *options]) == 0
    use = [
        "register",
        *pair,
        "--system",
        "macjnet",
        "--linear",
        "none",
        "-o",
        str(out),
        "--weights",
        run,
        "--quiet",
    ]
    assert main(use) in (0, 3)
    told = json.loads((out / RECORD).read_text())["segmentations"]
    page = (out / REPORT).read_text()
    for side, image in zip(("fixed", "moving"), pair, strict=True):
        labels = io.read_labels(out / f"{side}_labels.nii.gz")
        assert labels.grid.same_as(io.read(image).grid)
        assert set(labels.ids) <= {1, 2}
        assert told[side]["file"] == f"{side}_labels.nii.gz"
        assert told[side]["volumes_mm3"] == {str(i): mm3 for i, mm3 in labels.volumes_mm3.items()}
        assert f"segmentation of the {side} image" in page
        alone = tmp_path / f"{side}_alone.nii.gz"
        assert main(["segment", image, "-o", str(alone), "--weights", run, "--side", side]) == 0
        assert torch.equal(io.read_labels(alone).data, labels.data)
    assert read_settings(MacJNet, "macjnet", "default").refine == 0
    capsys.readouterr()
    deep = ["--config", str(tmp_path / "deep.toml"), "--quiet"]
    for arguments, words in (
        (
            ["train", "macjnet", str(tmp_path / "half.csv"), "-o", f"{run}2", *options],
            "row 3: labels are needed on both",
        ),
        (["train", "macjnet", str(tmp_path / "pairs.csv"), "-o", f"{run}3", *deep], "set stages = 3"),
        (["segment", pair[0], "-o", str(tmp_path / "x.nii.gz"), "--weights", str(tmp_path)], "is missing"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
