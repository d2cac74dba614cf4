"""Settings: presets as files, every key, type and value checked, and the way back from a record."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmorph.errors import InputError
from crossmorph.settings import (
    PRESETS,
    Descriptor,
    GradientGuidance,
    Learned,
    Linear,
    Lumir,
    MacJNet,
    Mcbo,
    Preprocessing,
    Refinement,
    check,
    from_dict,
    load_settings,
    presets,
    to_dict,
)
from crossmorph.train.settings import (
    Augmentation,
    GradientGuidanceTraining,
    LumirTraining,
    MacJNetTraining,
    Synthesis,
    Training,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_promised_presets_are_there() -> None:
    assert {"default", "remind2reg", "comulis3dclem", "convexadam"} <= set(presets("mcbo"))
    assert not load_settings("mcbo", "default").reproduce


@pytest.mark.parametrize("name", presets("mcbo"))
def test_a_preset_says_what_its_file_says(name: str) -> None:
    settings = load_settings("mcbo", name)
    assert isinstance(settings, Mcbo)
    for key, value in tomllib.loads((PRESETS / "mcbo" / f"{name}.toml").read_text()).items():
        if key == "linear":
            assert {name: getattr(settings.linear, name) for name in value} == value
        elif key not in ("refine", "describe", "otherwise"):
            got = getattr(settings, key)
            assert (list(got) if isinstance(got, tuple) else got) == value


def test_published_values() -> None:
    """MCBO, section 3.1 and the released scripts: levels, weights, and what follows on the finest level."""
    remind, comulis = load_settings("mcbo", "remind2reg"), load_settings("mcbo", "comulis3dclem")
    assert dict(zip(remind.levels, remind.weights, strict=True)) == {1: 0.1, 2: 0.27, 4: 0.27, 6: 0.36}
    assert comulis.levels == (1, 2, 4)
    assert load_settings("mcbo").linear == Linear()
    for settings in (remind, comulis):
        assert settings.linear.model == "none"
        assert sum(settings.weights) == pytest.approx(1)
        assert (settings.fusion, settings.reproduce, settings.balanced) == ("signed", True, True)
    adam = load_settings("mcbo", "convexadam")
    assert (adam.levels, adam.balanced, adam.refine[0].iterations) == ((6,), False, 80)


@pytest.mark.parametrize("name", presets("mcbo"))
def test_the_record_leads_back_to_the_settings(name: str) -> None:
    settings = load_settings("mcbo", name)
    assert from_dict(Mcbo, to_dict(settings), "memory") == settings
    assert from_dict(Mcbo, json.loads(json.dumps(to_dict(settings))), "record") == settings


numbers = {"level": st.integers(1, 4), "iterations": st.integers(1, 100), "anchored": st.booleans()}
stages = st.one_of(
    st.builds(Refinement, **numbers, smoothness=st.floats(0, 100), similarity=st.sampled_from(["mind", "lncc"])),
    st.builds(Refinement, **numbers, smoothness=st.just(0.0), similarity=st.just("auto")),
)
informed = st.builds(Refinement, **numbers, smoothness=st.floats(0.01, 10), similarity=st.just("mi"))
linears = st.builds(
    Linear,
    model=st.sampled_from(["none", "translation", "rigid", "similarity", "affine"]),
    search=st.sampled_from(["auto", "header", "local", "global"]),
    similarity=st.sampled_from(["mi", "mind", "disa", "lc2", "ncc"]),
    random_starts=st.integers(0, 500),
    random_deg=st.floats(0, 180),
)


@given(
    st.builds(
        Mcbo,
        linear=linears,
        spacing_mm=st.floats(0, 10),
        levels=st.lists(st.integers(1, 8), min_size=1, max_size=4).map(tuple),
        refine=st.lists(stages, max_size=3).map(tuple),
        otherwise=st.lists(informed, max_size=2).map(tuple),
        fusion=st.sampled_from(["cost", "magnitude", "signed"]),
        balanced=st.booleans(),
    )
)
def test_any_settings_survive_the_record(settings: Mcbo) -> None:
    assert from_dict(Mcbo, json.loads(json.dumps(to_dict(settings))), "record") == settings


def test_a_file_replaces_only_what_it_names(tmp_path: Path) -> None:
    path = write(tmp_path, "spacing_mm = 2\nlevels = [4, 2]\n[[refine]]\niterations = 7\n[[refine]]\n")
    settings = load_settings("mcbo", path)
    assert settings == Mcbo(spacing_mm=2.0, levels=(4, 2), refine=(Refinement(iterations=7), Refinement()))
    assert type(settings.spacing_mm) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("levles = [6]", "unknown key 'levles'; did you mean 'levels'"),
        ("xyz = 1", "unknown key 'xyz'; known are linear, spacing_mm, "),
        ("[[refine]]\niteration = 5", "refine: unknown key 'iteration'; did you mean 'iterations'"),
        ("levels = 6", "levels must be a list, not 6"),
        ("levels = [6.5]", "levels must be int, not 6.5"),
        ("levels = []\nrefine = []", "levels must be one or more where nothing is refined, not ()"),
        ("levels = [0]", "levels must be numbers from 1, not (0,)"),
        ("balanced = 1", "balanced must be bool, not 1"),
        ("half_width = true", "half_width must be int, not True"),
        ("half_width = '4'", "half_width must be int, not '4'"),
        ("half_width = 9", "half_width must be 1 to 8, not 9"),
        ("spacing_mm = -1", "spacing_mm must be at least 0, not -1.0"),
        ("spacing_mm = nan", "spacing_mm must be finite"),
        ("spacing_mm = inf", "spacing_mm must be finite"),
        ("fusion = 'max'", "fusion must be one of cost, magnitude, signed, not 'max'"),
        ("levels = [4, 2]\nweights = [1.0]", "weights must be empty or one number a level"),
        ("smoothing = 4", "smoothing must be 0 or an odd width"),
        ("refine = [3]", "refine must be a table, not 3"),
        ("[refine]\nlevel = 2", "refine must be a list"),
        ("[[refine]]\niterations = 0", "refine: iterations must be at least 1, not 0"),
        ("[[refine]]\nlearning_rate = 0", "learning_rate must be above 0"),
        (
            "[[refine]]\nsimilarity = 'auto'",
            "refine: smoothness must be 0 (chosen) with auto similarity, not 1.25",
        ),
        ("[linear]\nmodle = 'none'", "linear: unknown key 'modle'; did you mean 'model'"),
        (
            "[linear]\nmodel = 'projective'",
            "linear: model must be one of none, translation, rigid, similarity, affine",
        ),
        ("[linear]\nsearch = 'everywhere'", "linear: search must be one of auto, header, local, global"),
        ("[linear]\nrandom_starts = -1", "linear: random_starts must be at least 0, not -1"),
        ("[linear]\nrandom_deg = 181", "linear: random_deg must be 0 to 180, not 181.0"),
        ("[linear]\nrandom_mm = -1", "linear: random_mm must be at least 0, not -1.0"),
        ("linear = 'affine'", "linear must be a table, not 'affine'"),
        ("reproduce = true\nrefine = []", "refine must be one refinement when reproducing"),
        ("a = = 3", "cannot read settings from"),
        ("a = '\\xff", "cannot read settings from"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_settings("mcbo", path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"cannot read settings from .*binary\.toml"):
        load_settings("mcbo", tmp_path / "binary.toml")
    with pytest.raises(InputError, match=r"there is no settings file .*none\.toml"):
        load_settings("mcbo", tmp_path / "none.toml")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match="no preset 'remind2ref'; did you mean 'remind2reg'"):
        load_settings("mcbo", "remind2ref")
    with pytest.raises(InputError, match="no preset 'qqq'; known are comulis3dclem, convexadam, default"):
        load_settings("mcbo", "qqq")
    with pytest.raises(InputError, match="no system 'mcob'; did you mean 'mcbo'"):
        load_settings("mcob")


def test_settings_made_in_python_are_checked_too() -> None:
    good = Mcbo()
    assert check(good) is good
    with pytest.raises(InputError, match="settings: refine: level must be at least 1, not 0"):
        check(dataclasses.replace(good, refine=(Refinement(level=0),)))


def test_the_page_names_every_preset_and_setting_with_its_default() -> None:
    page = (Path(__file__).parent.parent / "docs" / "mcbo.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")
    ]
    assert {row[0].strip("`") for row in rows if len(row) == 2} == set(presets("mcbo"))
    told = {row[0].strip("`"): row[2] for row in rows if len(row) == 4}
    named = {"linear": "a table", "describe": "MIND-SSC", "refine": "one stage"}
    for kind in (Mcbo, Descriptor, Refinement):
        for key, value in to_dict(kind()).items():
            shown = named.get(key, str(list(value) if isinstance(value, tuple) else value))
            assert told.pop(key) in (shown, shown.lower(), shown.removesuffix(".0")), key
    assert not told


def test_the_page_of_the_linear_stage_names_every_setting_with_its_default() -> None:
    page = (Path(__file__).parent.parent / "docs" / "linear.md").read_text()
    table = page.split("## Settings")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")
    ]
    told = {row[0].strip("`"): row[2] for row in rows}
    assert told == {key: str(value).removesuffix(".0") for key, value in to_dict(Linear()).items()}


@pytest.mark.parametrize(
    ("page", "training", "use"),
    [
        ("gradient-guidance.md", GradientGuidanceTraining, GradientGuidance),
        ("lumir.md", LumirTraining, Lumir),
        ("macjnet.md", MacJNetTraining, MacJNet),
    ],
)
def test_the_pages_of_learning_name_every_setting(page: str, training: type[Training], use: type[Learned]) -> None:
    """With the defaults where a row has one number; a row may name several keys of one table."""
    docs = Path(__file__).parent.parent / "docs"
    told: dict[str, str] = {}
    for name in ("learning.md", page):
        for line in (docs / name).read_text().split("## Settings")[1].split("\n## ")[0].splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if len(cells) > 2 and cells[0].startswith("`"):
                group = cells[0].strip("`").rpartition(".")[0].split("`")[0]
                for key in re.findall(r"`([\w.]+)`", cells[0]):
                    told[key if "." in key or not group else f"{group}.{key}"] = cells[-2]
    for key, value in to_dict(training()).items():
        for name, default in value.items() if isinstance(value, dict) else [("", value)]:
            row = told.pop(f"{key}.{name}".strip("."))
            own = key in vars(Training()) and default != vars(Training())[key]  # told in words
            if type(default) in (int, float) and "," not in row and not own:
                assert float(row) == default, (key, name)
    for key in to_dict(use()):
        told.pop(key)
    assert not told


def test_every_setting_explains_itself() -> None:
    """Each field is followed by a docstring: the command line, the docs and the reader need it."""
    source = "".join(Path(PRESETS.parent / name).read_text() for name in ("settings.py", "train/settings.py"))
    trainings = (Training, GradientGuidanceTraining, LumirTraining, MacJNetTraining)
    learning = (Learned, Preprocessing, *trainings, Augmentation, Synthesis)
    for kind in (Mcbo, Descriptor, Refinement, Linear, *learning):
        inherited = {
            f.name for base in kind.__bases__ if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)
        }
        body = source.split(f"class {kind.__name__}")[1].split("\n@dataclass")[0].split("\n\n\n")[0]
        for field in dataclasses.fields(kind):
            if field.name in inherited:
                continue
            line, _, after = body.split(f"\n    {field.name}: ")[1].partition("\n")
            assert after.lstrip().startswith('"""'), f"{kind.__name__}.{line} has no docstring"
