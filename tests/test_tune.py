"""The search of settings, on functions whose optimum is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from crossmorph import io
from crossmorph.commands.tune import Tune
from crossmorph.errors import InputError
from crossmorph.evaluate.tables import read_rows
from crossmorph.image import Image
from crossmorph.report.sensitivity import sensitivity
from crossmorph.settings import SYSTEMS, Linear, Mcbo, Refinement, load_settings, presets, to_dict
from crossmorph.transform import Affine, Transform
from crossmorph.tune import SPACES, Space, Tuning, expand, mean_ranks, score_pairs, to_toml, tune, with_values

Scores = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """A part of the toy settings."""

    weight: float = 4.0


@dataclass(frozen=True)
class Toy:
    """Settings with a known optimum: width 5, weight 1."""

    width: int = 1
    stages: tuple[Stage, ...] = (Stage(),)


SPACE: Space = {"width": (1, 8, "int"), "stages.*.weight": (0.1, 10.0, "log")}


def toy_scores(settings: Toy) -> Scores:
    loss = (settings.width - 5) ** 2 / 16 + math.log10(settings.stages[0].weight) ** 2
    return {"dice": 1 - loss, "hd95_mm": 1 + loss, "sdlogj": 0.1 + loss / 10}


def without_time(tuning: Tuning[Toy]) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in tuning.trials]


def test_finds_a_known_optimum(tmp_path: Path) -> None:
    found = tune(toy_scores, Toy(), SPACE, 40, tmp_path)
    assert found.best.width == 5
    assert found.best.stages[0].weight == pytest.approx(1, rel=0.5)
    assert toy_scores(found.best)["dice"] == max(row["dice"] for row in found.trials) > toy_scores(Toy())["dice"]
    assert found.trials[found.place]["rank"] == 1  # best in every metric
    assert found.trials[0]["width"] == 1


def test_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = tune(toy_scores, Toy(), SPACE, 16, tmp_path / "whole")
    tune(toy_scores, Toy(), SPACE, 7, tmp_path / "parts")
    calls = []

    def interrupted(settings: Toy) -> Scores:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(settings)
        return toy_scores(settings)

    with pytest.raises(KeyboardInterrupt):
        tune(interrupted, Toy(), SPACE, 16, tmp_path / "parts")
    parts = tune(toy_scores, Toy(), SPACE, 16, tmp_path / "parts")
    assert without_time(parts) == without_time(whole)
    assert parts.best == whole.best
    again = tune(lambda settings: pytest.fail("nothing is left to try"), Toy(), SPACE, 16, tmp_path / "parts")
    assert without_time(again) == without_time(whole)


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"seed": 1}, "seed"), ({"start": Toy(width=2)}, "start"), ({"about": {"pairs": 2}}, "about")],
)
def test_refuses_to_mix_searches(tmp_path: Path, changed: dict[str, object], word: str) -> None:
    same: dict[str, object] = {"score": toy_scores, "start": Toy(), "space": SPACE, "trials": 2, "out": tmp_path}
    tune(**same)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"another {word}"):
        tune(**{**same, **changed})  # type: ignore[arg-type]


def test_a_failed_trial_is_a_row(tmp_path: Path) -> None:
    def fails(settings: Toy) -> Scores:
        if settings.width > 4:
            raise InputError("too wide")
        return {**toy_scores(settings), "hd95_mm": math.nan if settings.width == 3 else 1.0}

    found = tune(fails, Toy(), SPACE, 25, tmp_path)
    errors = {row["error"] for row in found.trials if "error" in row}
    assert errors == {"too wide", "no finite hd95_mm"}
    assert all(("error" in row) == (row["width"] in (3, 5, 6, 7, 8)) for row in found.trials)
    assert found.best.width in (2, 4)
    assert len(found.trials) == 25


def test_start_that_fails_is_the_users_to_mend(tmp_path: Path) -> None:
    def fails(settings: Toy) -> Scores:
        raise InputError("no such file")

    with pytest.raises(InputError, match="no such file"):
        tune(fails, Toy(), SPACE, 3, tmp_path)
    with pytest.raises(InputError, match="needs a Dice or a TRE"):
        tune(lambda settings: {"sdlogj": 0.1}, Toy(), SPACE, 3, tmp_path)
    assert len(tune(toy_scores, Toy(), SPACE, 3, tmp_path).trials) == 3


def test_smoothness_never_buys_accuracy_away(tmp_path: Path) -> None:
    def trade(settings: Toy) -> Scores:
        return {"dice": 0.9 - 0.01 * settings.width, "hd95_mm": 9.0 - settings.width, "sdlogj": 1 / settings.width}

    found = tune(trade, Toy(), SPACE, 12, tmp_path)
    assert found.best == Toy(stages=found.best.stages)  # every wider one overlaps less
    assert max(row["rank"] for row in found.trials) > found.trials[0]["rank"]


def test_what_starts_outside_its_limits_is_left_alone(tmp_path: Path) -> None:
    def only_width(settings: Toy) -> Scores:
        assert settings.stages == (Stage(weight=0.0),)
        return {"dice": 1 - abs(settings.width - 2)}

    found = tune(only_width, Toy(stages=(Stage(weight=0.0),)), SPACE, 20, tmp_path)
    assert found.best.width == 2
    assert list(found.space) == ["width"]


def test_mean_ranks_by_hand() -> None:
    rows: list[dict[str, float | str | int]] = [
        {"dice": 0.9, "sdlogj": 0.3},
        {"dice": 0.5, "sdlogj": 0.1},
        {"dice": 0.5, "sdlogj": 0.2},
    ]
    # Dice ranks 3, 1.5, 1.5 of 3; SDlogJ ranks 1, 3, 2 of 3
    expected = [math.sqrt(1 * 1 / 3), math.sqrt(0.5 * 1), math.sqrt(0.5 * 2 / 3)]
    np.testing.assert_allclose(mean_ranks(rows, ["dice", "sdlogj"]), expected)


def test_preset_file_holds_all_settings(tmp_path: Path) -> None:
    tuned = replace(
        Mcbo(),
        linear=Linear(model="rigid"),
        half_width=3,
        weights=(1.0,),
        refine=(Refinement(smoothness=1e-5), Refinement(level=1)),
    )
    file = tmp_path / "preset.toml"
    file.write_text("# a word about its origin\n" + to_toml(tuned))
    assert load_settings("mcbo", file) == tuned


@pytest.mark.parametrize("system", list(SPACES))
def test_spaces_fit_the_systems(system: str) -> None:
    for start in (SYSTEMS[system](), *(load_settings(system, preset) for preset in presets(system))):
        space = expand(SPACES[system], start)
        assert not any("*" in path for path in space)
        for end in (0, 1):
            moved = with_values(start, {path: limits[end] for path, limits in space.items()})
            assert to_dict(moved) != to_dict(start)


def test_places_of_lists_are_searched_one_by_one() -> None:
    space = expand({"levels.*": (2, 8, "even")}, Mcbo(levels=(6, 4, 3)))
    assert list(space) == ["levels.0", "levels.1"]
    assert with_values(Mcbo(levels=(6, 4, 3)), {"levels.1": 2}).levels == (6, 2, 3)
    with pytest.raises(InputError, match="half_width"):
        with_values(Mcbo(), {"half_width": 99})


def test_plot_has_a_panel_a_setting(tmp_path: Path) -> None:
    from matplotlib.image import imread

    found = tune(toy_scores, Toy(), SPACE, 5, tmp_path)
    picture = imread(sensitivity(found, tmp_path / "plot.png"))
    wide = picture.shape[1]
    middles = [picture[:, int(wide * (k - 0.05)) : int(wide * (k + 0.05)), :3] for k in (1 / 6, 1 / 2, 5 / 6)]
    assert [bool((middle < 0.5).any()) for middle in middles] == [True, True, False]  # two settings, three places


# -- pairs -------------------------------------------------------------------------------------------------------


def write_pair(folder: Path, name: str, shift_mm: float) -> str:
    """A volume, the same moved along x, and points that know; a line of pairs.csv."""
    data = np.random.default_rng(len(name)).normal(size=(12, 12, 12)).astype(np.float32)
    moved = np.eye(4)
    moved[0, 3] = shift_mm
    io.write(Image.from_array(data, np.eye(4)), folder / f"{name}_fixed.nii.gz")
    io.write(Image.from_array(data, moved), folder / f"{name}_moving.nii.gz")
    rows = [f"{x},5,5,{x + shift_mm},5,5" for x in (3, 5, 7)]
    header = "fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z"
    (folder / f"{name}_points.csv").write_text("\n".join([header, *rows]) + "\n")
    return f"{name},{name}_fixed.nii.gz,{name}_moving.nii.gz,{name}_points.csv"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = ["id,fixed,moving,points", write_pair(tmp_path, "seen_a", 3.0), write_pair(tmp_path, "seen_b", 4.0)]
    file = tmp_path / "pairs.csv"
    file.write_text("\n".join([*lines, write_pair(tmp_path, "other", 5.0)]) + "\n")
    return file


def shifts_by_half_width(self: Tune, settings: Mcbo) -> Callable[[Image, Image], Transform]:
    matrix = np.eye(4)
    matrix[0, 3] = settings.half_width
    return lambda fixed, moving: Affine(matrix)


def test_command_writes_a_preset_that_loads(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Tune, "_registration", shifts_by_half_width)
    out = table.parent / "tuned"
    start = out.with_suffix(".toml")
    start.write_text(to_toml(Mcbo(half_width=6)))
    assert Tune(table, out, preset=str(start), trials=15, unseen="^other$").run() == 0
    best = load_settings("mcbo", out / "preset.toml")
    assert best.half_width in (3, 4)  # the shifts are 3 and 4 mm
    trials = read_rows(out / "trials.csv")
    assert len(trials) == 15
    assert float(trials[0]["tre_mean_mm"]) == pytest.approx(2.5)  # 6 mm against 3 and 4
    assert (out / "sensitivity.png").stat().st_size > 1000
    (unseen,) = read_rows(out / "unseen_best.csv")
    assert unseen["id"] == "other"
    assert float(unseen["tre_mean_mm"]) == pytest.approx(5 - best.half_width)
    assert "best, unseen" in capsys.readouterr().out


def test_command_explains_what_is_wrong(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pair has an id with nothing; the ids are seen_a"):
        Tune(table, tmp_path / "out", only="nothing").run()
    with pytest.raises(InputError, match="leave some to tune on"):
        Tune(table, tmp_path / "out", unseen=".").run()
    with pytest.raises(InputError, match="no regular expression"):
        Tune(table, tmp_path / "out", only="(").run()
    blind = table.with_name("blind.csv")
    blind.write_text("id,fixed,moving\na,seen_a_fixed.nii.gz,seen_a_moving.nii.gz\n")
    with pytest.raises(InputError, match="a has neither labels of both sides nor points"):
        Tune(blind, tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


def test_a_pair_that_fails_is_named(table: Path) -> None:
    from crossmorph.evaluate.cases import read_cases

    pairs = {name: files for name, _, files in read_cases(table, ("id", "fixed", "moving"))}
    Path(pairs["other"].fixed).unlink()
    with pytest.raises(InputError, match=r"other: .* does not exist"):
        score_pairs(pairs, lambda fixed, moving: Affine.identity())
