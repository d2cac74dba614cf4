"""The benchmarks measure what they say: cases, processes, tables, and the scripts of the other programs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import cases
import descriptors
import fusion
import ixi
import lumir
import macjnet_nichart
import nibabel as nib
import nichart
import numpy as np
import peers
import pytest
import stages
import tables
import torch
from cases import Case
from peers import Peers, Tool
from scipy.ndimage import gaussian_filter

from crossmorph import io
from crossmorph.image import Labels
from crossmorph.settings import Mcbo, from_dict
from crossmorph.space import Grid
from crossmorph.train.settings import LumirTraining, MacJNetTraining
from crossmorph.transform import Affine, DisplacementField

BENCHMARKS = Path(peers.__file__).parent
SHIFT_MM = 4.0
# turned by 30 degrees, anisotropic, left-handed
AFFINE = np.array([[-2.6, 0.0, -0.75, 40.0], [0.0, 2.5, 0.0, -60.0], [-1.5, 0.0, 1.3, 10.0], [0.0, 0.0, 0.0, 1.0]])


# -- cases -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with tables like the real ones, and a make_truth.py that writes what it was told."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "pairs.csv").write_text(
        "id,kind,fixed,moving,fixed_labels,moving_labels,labels,note,points\n"
        'brain1mm_x,"mono inter-subject T1, aligned",f.nii.gz,m.nii.gz,fl.nii.gz,ml.nii.gz,ids.txt,,\n'
        'other,multimodal MR->CT,f.nii.gz,m.nii.gz,fl.nii.gz,ml.nii.gz,"1,2",,\n'
        "everything,mono,f.nii.gz,m.nii.gz,fl.nii.gz,ml.nii.gz,all,,\n"
        "points_only,rigid/affine multimodal,f.nii.gz,m.nii.gz,,,,,p.csv\n"
    )
    (data / "truth_cases.csv").write_text("id,a,b,options\ncase1,a.nii.gz,b.nii.gz,--seed 7 --labels l.nii.gz\n")
    (data / "make_truth.py").write_text(
        "import sys, pathlib\n"
        "if 'broken.nii.gz' in sys.argv: sys.exit('broken')\n"
        "out = pathlib.Path(sys.argv[3]); out.mkdir()\n"
        "for name in ('fixed.nii.gz', 'moving.nii.gz', 'fixed_mask.nii.gz', 'points.csv', 'case.json'):\n"
        "    (out / name).write_text(' '.join(sys.argv[1:3] + sys.argv[4:]))\n"
    )
    return data


def test_pairs_carry_their_truth(folder: Path, tmp_path: Path) -> None:
    brain, other, everything = cases.pairs(folder, tmp_path)
    labels = ("--fixed-labels", str(folder / "fl.nii.gz"), "--moving-labels", str(folder / "ml.nii.gz"))
    assert (brain.kind, brain.truth) == ("mono", (*labels, "--labels", str(folder / "ids.txt")))
    assert (other.kind, other.truth) == ("multi", (*labels, "--labels", "1,2"))
    assert (everything.kind, everything.truth) == ("mono", labels)
    assert [case.id for case in cases.brain(folder, tmp_path)] == ["brain1mm_x"]


def test_cases_with_truth_are_built_once(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (case,) = cases.truth(folder, cache)
    home = cache / "case1"
    assert case.truth == (
        "--points", str(home / "points.csv"), "--fixed", str(home / "fixed.nii.gz"),
        "--mask", str(home / "fixed_mask.nii.gz"),
    )  # fmt: skip
    assert (home / "case.json").read_text() == "a.nii.gz b.nii.gz --seed 7 --labels l.nii.gz"
    (home / "case.json").write_text("kept")
    assert next(cases.truth(folder, cache)) == case
    assert (home / "case.json").read_text() == "kept"
    with pytest.raises(subprocess.CalledProcessError):
        cases.build(folder, cache, "bad", "broken.nii.gz", "b.nii.gz")
    assert sorted(path.name for path in cache.iterdir()) == ["case1"]


def test_truth15_is_twelve_deformations(folder: Path, tmp_path: Path) -> None:
    built = list(cases.truth15(folder, tmp_path / "cache"))
    assert len({case.id for case in built}) == 12
    assert built[0].id == "p07_T1_T2_s1"
    said = (tmp_path / "cache/p26_T1_FLAIR_s3/case.json").read_text()
    assert said == (
        "ms_mni/p26_T1.nii.gz ms_mni/p26_FLAIR.nii.gz --seed 3 --max-mm 15 --rotate-deg 0 --translate-mm 0"
    )


def volume(file: Path, seed: int, affine: np.ndarray = AFFINE, side: int = 24) -> Path:
    """A smooth random blob."""
    data = gaussian_filter(np.random.default_rng(seed).normal(size=(side, side, side)), 2)
    inside = np.linalg.norm(np.indices(data.shape) - (side - 1) / 2, axis=0) < side / 2.4
    nib.Nifti1Image((inside * (600 + 4000 * data)).astype(np.float32), affine).to_filename(file)
    return file


def test_one_seed_moves_every_contrast_alike(data_dir: Path, tmp_path: Path) -> None:
    files = [str(volume(tmp_path / f"{seed}.nii.gz", seed, np.diag([8.0, 8, 8, 1]))) for seed in (1, 2, 3)]
    options = ("--seed", "5", "--max-mm", "4", "--smooth-mm", "40")
    built = [cases.build(data_dir, tmp_path, str(k), files[0], files[k], *options) for k in (1, 2)]
    points = [case.fixed.with_name("points.csv").read_text() for case in built]
    assert points[0] == points[1]
    assert built[0].moving.read_bytes() != built[1].moving.read_bytes()


def test_a_missing_data_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSMORPH_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="set CROSSMORPH_DATA"):
        cases.data_folder()


# -- measuring ---------------------------------------------------------------------------------------------------


def test_a_process_is_measured(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    program = "import os; block = b'x' * 600_000_000; print(os.environ['OMP_NUM_THREADS']); os._exit(3)"
    code, seconds, mib = peers.run_measured([sys.executable, "-c", program], log, threads=2)
    assert code == 3
    assert seconds > 0
    assert 570 < mib < max(700, resident_mib() + 100)  # a child begins with the peak of its parent
    assert log.read_text() == "2\n"


def resident_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def shifted_case(folder: Path, side: int = 24) -> Case:
    """A volume, the same moved by SHIFT_MM to the right, points that know it."""
    moved = AFFINE.copy()
    moved[0, 3] += SHIFT_MM
    volume(folder / "fixed.nii.gz", 0, AFFINE, side)
    volume(folder / "moving.nii.gz", 0, moved, side)
    middle = AFFINE[:3, :3] @ np.full(3, (side - 1) / 2) + AFFINE[:3, 3]
    rows = [[*(middle + offset), *(middle + offset + [SHIFT_MM, 0, 0])] for offset in 5 * np.eye(3)]
    header = "fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z"
    np.savetxt(folder / "points.csv", rows, delimiter=",", header=header, comments="")
    truth = ("--points", str(folder / "points.csv"), "--fixed", str(folder / "fixed.nii.gz"))
    return Case("shifted", "multi", folder / "fixed.nii.gz", folder / "moving.nii.gz", truth)


def fake_tool(name: str, source: Path | None, trace: Path) -> Tool:
    """A program that copies a transform, or complains and fails; it leaves a trace that it ran."""
    leave = f"open({str(trace)!r}, 'a').write({name!r} + ' ')"
    act = f"shutil.copy({str(source)!r}, sys.argv[1])" if source else "sys.exit('no idea')"

    def command(case: Case, folder: Path) -> list[str]:
        return [sys.executable, "-c", f"import shutil, sys; {leave}; {act}", str(folder / "forward.tfm")]

    return Tool(name, command, "forward.tfm")


def test_all_programs_are_scored_in_turn(data_dir: Path, tmp_path: Path) -> None:
    case = shifted_case(tmp_path)
    io.write_transform(Affine.translation([SHIFT_MM, 0, 0]), tmp_path / "right.tfm")
    trace, out = tmp_path / "trace", tmp_path / "out"
    out.mkdir()
    tools = [fake_tool("right", tmp_path / "right.tfm", trace), fake_tool("fails", None, trace)]
    twice = [case, Case("again", *(getattr(case, name) for name in ("kind", "fixed", "moving", "truth")))]
    for _ in range(2):  # the second time nothing is left to do
        peers.measure_all(twice, tools, out, 1, data_dir / "score.py", keep=False)
    assert trace.read_text().split() == ["right", "fails", "fails", "right"]
    rows = tables.read_results(out / "results.csv")
    assert [(row["case"], row["tool"]) for row in rows] == [
        ("shifted", "start"), ("shifted", "right"), ("shifted", "fails"),
        ("again", "start"), ("again", "fails"), ("again", "right"),
    ]  # fmt: skip
    assert rows[0]["tre_mean"] == pytest.approx(SHIFT_MM, abs=1e-4)
    assert rows[1]["tre_mean"] == pytest.approx(0, abs=1e-4)
    assert rows[1]["fold_percent"] == 0
    assert rows[1]["seconds"] > 0
    assert rows[2]["error"] == "exit code 1: no idea"
    assert "tre_mean" not in rows[2]


def test_command_lines(tmp_path: Path) -> None:
    case = Case("x", "mono", Path("f.nii.gz"), Path("m.nii.gz"), ())
    ours = peers.crossmorph_tool("convexadam", ("--linear", "none"))
    words = ours.command(case, tmp_path)
    assert ours.name == "crossmorph-convexadam"
    assert words[1:4] == ["register", "f.nii.gz", "m.nii.gz"]
    assert words[words.index("--preset") + 1] == "convexadam"
    assert words[words.index("--linear") + 1] == "none"
    tuned = peers.crossmorph_tool("tuned/mine.toml")
    words = tuned.command(case, tmp_path)
    assert tuned.name == "crossmorph-mine"
    assert Path(words[words.index("--settings") + 1]).is_absolute()
    assert "--linear" not in words
    for name in peers.PEERS:
        words = peers.peer_tool(name, Path("python"), "header").command(case, tmp_path)
        assert Path(words[1]).is_file()
        assert words[-4:] == ["--kind", "mono", "--start", "header"]


def test_crossmorph_accepts_its_command_line(tmp_path: Path) -> None:
    import tyro

    from crossmorph.commands.register import Register

    case = Case("x", "mono", Path("f.nii.gz"), Path("m.nii.gz"), ())
    words = peers.crossmorph_tool("default", ("--linear", "none")).command(case, tmp_path)
    given = tyro.cli(Register, args=words[2:])
    assert (given.fixed, given.moving, given.linear) == (case.fixed, (case.moving,), "none")


def test_a_run_refuses_other_conditions_and_a_missing_environment(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make bench-setup"):
        Peers("brain", tmp_path, peers_python=tmp_path / "none").tools()
    assert [tool.name for tool in Peers("brain", tmp_path, peers=()).tools()] == ["crossmorph-default"]
    Peers("brain", tmp_path, peers=())._check_record()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"].startswith("python benchmarks/peers.py brain --start own")
    assert str(tmp_path) not in record["command"]
    with pytest.raises(SystemExit, match="choose another folder"):
        Peers("brain", tmp_path, peers=(), start="header")._check_record()


# -- tables ------------------------------------------------------------------------------------------------------


ROWS: list[tables.Row] = [
    {"case": "a", "tool": "start", "tre_mean": 5.0, "fold_percent": 0.0},
    {"case": "a", "tool": "one", "tre_mean": 1.0, "fold_percent": 0.2, "seconds": 4.0, "peak_mib": 100.0},
    {"case": "a", "tool": "two", "tre_mean": 2.0, "fold_percent": 0.0, "seconds": 8.0, "peak_mib": 300.0},
    {"case": "b", "tool": "start", "tre_mean": 4.0, "fold_percent": 0.0},
    {"case": "b", "tool": "one", "seconds": 1.0, "peak_mib": 900.0, "error": "exit code 1: no"},
    {"case": "b", "tool": "two", "tre_mean": 4.5, "fold_percent": 0.1, "seconds": 10.0, "peak_mib": 200.0},
]


def test_summary_compares_what_all_finished() -> None:
    start, one, two = tables.summary(ROWS)
    assert (start["program"], start["TRE mm"]) == ("start", "5.00")  # case b counts for nobody
    assert (one["finished"], one["TRE mm"], one["seconds, median"], one["peak MiB, worst"]) == (
        "1 of 2", "1.00", "4.0", "100",
    )  # fmt: skip
    assert (two["TRE mm"], two["folds %, worst"], two["worse than start"]) == ("2.00", "0.100", 1)


def test_table_of_cases_marks_the_best() -> None:
    assert tables.by_case(ROWS) == [
        {"case": "a", "start": "5.00 mm", "one": "**1.00 mm**", "two": "2.00 mm"},
        {"case": "b", "start": "**4.00 mm**", "one": "failed", "two": "4.50 mm"},
    ]
    dice = [{"case": "c", "tool": tool, "dice_mean": value} for tool, value in (("start", 0.5), ("one", 0.71234))]
    assert tables.by_case(dice) == [{"case": "c", "start": "0.500", "one": "**0.712**"}]


def test_report_has_tables_conditions_and_a_plot(tmp_path: Path) -> None:
    for row in ROWS:
        tables.append_result(tmp_path / "results.csv", row)
    assert tables.read_results(tmp_path / "results.csv") == ROWS
    conditions = {"threads": 2, "versions": {"crossmorph": "1"}}
    record = {"conditions": conditions, "command": "run it", "date": "2000-01-01", "machine": "abacus, 2 cores"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    text = tables.write_report(tmp_path)
    assert text.startswith("`run it`\n\n2000-01-01; abacus, 2 cores; threads: 2; crossmorph 1.\n\n| program |")
    assert (tmp_path / "report.md").read_text() == text
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_sections_of_the_page_are_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- begin x -->\nold\n<!-- end x -->\nbelow\n")
    for _ in range(2):
        tables.update_section(page, "x", "| new |\n")
        assert page.read_text() == "above\n<!-- begin x -->\n| new |\n<!-- end x -->\nbelow\n"
    with pytest.raises(SystemExit, match="begin y"):
        tables.update_section(page, "y", "text")


def test_readme_has_a_place_for_every_result() -> None:
    page = (BENCHMARKS / "README.md").read_text()
    for section in (*cases.SETS, "fusion", "descriptors", "stages", "fixes"):
        assert page.count(f"<!-- begin {section} -->") == page.count(f"<!-- end {section} -->") == 1
    wanted = (BENCHMARKS / "requirements-peers.txt").read_text()
    assert all(f"{package}==" in wanted for package in peers.PEERS.values())


def test_stages_beside_their_floors() -> None:
    least = stages.floors({"search": (1e9, 4e9), "fit": (3e9, 1e9)}, 1e9, 2e9)
    assert least == {"search": 2.0, "fit": 3.0}
    assert stages.table({"search": 4.0, "writing": 0.5}, {"search": 50.0}, least) == [
        {"stage": "search", "crossmorph s": "4.000", "convexAdam s": "50.00", "ratio": "12.5", "floor s": "2.000"},
        {"stage": "writing", "crossmorph s": "0.500", "convexAdam s": "", "ratio": "", "floor s": ""},
    ]


@pytest.mark.slow
def test_every_stage_is_timed() -> None:
    import torch

    from crossmorph.image import Image
    from crossmorph.space import Grid

    values = torch.randn((2, 36, 40, 44), generator=torch.Generator().manual_seed(0))
    grid = Grid((36, 40, 44), np.eye(4))
    everywhere = torch.ones(grid.shape, dtype=torch.bool)
    seconds, work = stages.measure(*(Image(v[None], grid, everywhere) for v in values), 1, "cpu")
    assert set(work) < set(seconds)
    assert all(value > 0 for value in seconds.values())


# -- fusion ------------------------------------------------------------------------------------------------------


def test_fusion_compares_modes_with_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import crossmorph

    case = shifted_case(tmp_path)
    ones = np.ones(nib.load(case.fixed).shape, np.uint8)
    nib.Nifti1Image(ones, AFFINE).to_filename(tmp_path / "fixed_mask.nii.gz")
    asked = []

    def register(fixed: object, moving: object, *, channels: list[object], settings: Mcbo) -> object:
        asked.append((1 + len(channels), settings.fusion))
        shift = SHIFT_MM if channels else SHIFT_MM - 1
        return type("Result", (), {"transform": Affine.translation([shift, 0, 0])})()

    monkeypatch.setattr(crossmorph, "register", register)
    rows = list(fusion.compare("p", case, case, case.fixed, Mcbo(), ""))
    assert [count for count, _ in asked] == [1, 1, 1, 2, 2, 2, 2]
    assert [mode for _, mode in asked[3:]] == [*fusion.MODES, "cost"]
    means = {row["moving"]: row for row in fusion.means([*rows, *rows])}
    assert means["T1-T2"]["tre_mean_mm"] == pytest.approx(1)
    assert means["T1-T2 and FLAIR-T1"]["tre_mean_mm"] == pytest.approx(0, abs=1e-6)
    assert means["T1-T2 and FLAIR-T2, signed"]["cases"] == 2
    assert len(list(fusion.compare("p", case, case, case.fixed, Mcbo(), "FLAIR-T1$"))) == 2


# -- descriptors -------------------------------------------------------------------------------------------------


def test_descriptors_are_measured_once(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, trace = shifted_case(tmp_path), tmp_path / "trace"
    right = tmp_path / "right.h5"
    io.write_transform(Affine.translation([SHIFT_MM, 0, 0]), right)

    def tool(preset: str, stages: tuple[str, str]) -> Tool:
        """Leaves the right transform where crossmorph would."""

        def command(_: Case, folder: Path) -> list[str]:
            program = f"import os, shutil; os.mkdir({str(folder / 'out')!r}); "
            program += f"shutil.copy({str(right)!r}, {str(folder / 'out')!r} + '/forward.h5'); "
            program += f"open({str(trace)!r}, 'a').write({' '.join([preset, *stages])!r} + ';')"
            return [sys.executable, "-c", program]

        return Tool(preset, command, "out/forward.h5")

    monkeypatch.setattr(descriptors, "crossmorph_tool", tool)
    monkeypatch.setattr(descriptors, "data_folder", lambda: data_dir)
    monkeypatch.setattr(descriptors, "truth", lambda data, cache: [case])
    monkeypatch.setattr(descriptors, "pairs", lambda data, cache: [])
    for _ in range(2):
        descriptors.Descriptors(tmp_path / "out", only="shif", descriptors=("mind", "macmind")).run()
    warmed_and_run = 2 * ["default --descriptor mind", "default --descriptor macmind"]
    assert trace.read_text().split(";")[:-1] == warmed_and_run
    start, mind, _ = tables.read_results(tmp_path / "out" / "results.csv")
    assert 0 < mind["cpu_seconds"] < 60
    assert descriptors.table([start, mind])[0] == {
        "case": "shifted", "descriptor": "start", "TRE mm": "4.000", "TRE p95 mm": "4.000", "Dice": "",
        "folds %": "0.000", "SDlogJ": "0.000", "CPU s": "", "peak MiB": "",
    }  # fmt: skip
    assert descriptors.table([mind])[0]["TRE mm"] == "0.000"
    with pytest.raises(SystemExit, match="no case matches nothing"):
        descriptors.Descriptors(tmp_path / "out", only="nothing").run()


# -- the other programs ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", ["header", "own"])
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_other_programs_find_a_shift(name: str, start: str, tmp_path: Path, data_dir: Path) -> None:
    """On a tilted, anisotropic, left-handed grid: every conversion of axes and signs counts."""
    python = Path(os.environ.get("CROSSMORPH_PEERS_PYTHON", BENCHMARKS / ".venv-peers" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"no environment with the other programs at {python}; make bench-setup makes it")
    case = shifted_case(tmp_path, side=60)
    tool = peers.peer_tool(name, python, start)
    row = peers.register(tool, case, tmp_path / "run", threads=1)
    assert not row.get("error"), (tmp_path / "run" / "log.txt").read_text()
    scores = peers.score(data_dir / "score.py", case, tmp_path / "run" / tool.transform)
    assert scores["tre_mean"] < 0.25 * SHIFT_MM
    read = io.read_transform(tmp_path / "run" / tool.transform)
    corner = Grid((60, 60, 60), AFFINE).to_world(np.full((1, 3), 29.5))
    np.testing.assert_allclose(read(corner) - corner, [[SHIFT_MM, 0, 0]], atol=0.5 * SHIFT_MM)


def test_structures_share_no_region_and_have_both_sides() -> None:
    ids = [label for group in nichart.GROUPS.values() for label in group]
    assert len(ids) == len(set(ids))
    labels = Labels.from_array(np.array([[[0, 51, 52, 59, 35, 999]]]), np.eye(4))
    assert nichart.grouped(labels).data.flatten().tolist() == [0, 1, 1, 2, 10, 0]


def test_no_test_subject_is_trained_on() -> None:
    pairs = nichart.TEST_PAIRS
    assert len(set(pairs)) == 26
    assert all(set(pair) & nichart.TEST for pair in pairs)
    assert not any(set(pair) & nichart.TEST for pair in nichart.CHOSEN_BY)
    some = nichart.evenly(pairs, 8)
    assert len(set(some)) == 8
    assert {fixed in nichart.TEST for fixed, _ in some} == {True, False}


def test_some_training_pairs_have_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nichart, "data_folder", lambda: tmp_path)
    brains = nichart.Brains(tmp_path)
    for a, b in [*nichart.TRAIN_PAIRS, *nichart.CHOSEN_BY]:
        (tmp_path / f"linear-{a}-{b}.lta").touch()
    table = brains.table("pairs.csv", brains.labels, nichart.evenly(nichart.TRAIN_PAIRS, 8)).read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert not any(f"Subj{subject}_" in table for subject in nichart.TEST)
    assert [row["split"] for row in rows].count("validation") == 3
    for split, count in (("train", 8), ("validation", 3)):
        assert sum(bool(row["fixed_labels"]) for row in rows if row["split"] == split) == count
    assert all(bool(row["fixed_labels"]) == bool(row["moving_labels"]) for row in rows)


def test_macjnet_differs_from_what_it_is_compared_with_in_being_joint(tmp_path: Path) -> None:
    made = macjnet_nichart.Benchmark(tmp_path, steps=9, pretrain=6)
    rows = {
        name: from_dict(MacJNetTraining, tomllib.loads(made.config(name)), name)
        for name in macjnet_nichart.METHODS
    }
    assert rows["macjnet"] == replace(rows["lapirn"], joint=True)
    assert rows["lapirn"] == replace(rows["vm"], registration="lapirn")
    assert not rows["lapirn"].joint
    assert (rows["vm"].steps, rows["vm"].pretrain, rows["vm"].validate_every) == (9, 6, 3)


@pytest.fixture
def brains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ixi.Brains:
    """Sixteen subjects without scans."""
    (tmp_path / "ixi_train").mkdir()
    for n in range(16):
        (tmp_path / "ixi_train" / f"s{n:02}_T1.nii.gz").touch()
    monkeypatch.setattr(ixi, "data_folder", lambda: tmp_path)
    return ixi.Brains(tmp_path)


def test_brains_are_tested_on_unseen_pairs(brains: ixi.Brains) -> None:
    assert len(set(brains.pairs)) == 90
    assert {one for one, _ in brains.pairs[:10]} == {other for _, other in brains.pairs[:10]}
    table = brains.table().read_text()
    assert not any(one in table or one == other for one, other in brains.pairs)
    assert [line.split(",")[2] for line in table.splitlines()[1:]] == ["train"] * 3 + ["validation"] * 3
    assert ixi.Brains(brains.folder, 4).ids == [f"s{n:02}" for n in (0, 1, 2, 3, *range(6, 16))]


def test_brains_meet_in_the_common_space(brains: ixi.Brains) -> None:
    """A shift of 3 mm to the right, between a subject at +10 mm and one that is twice as large."""
    moved, grown = np.eye(4), np.diag([2.0, 2, 2, 1])
    moved[0, 3] = 10
    for name, matrix in (("a", moved), ("b", grown)):
        (brains.folder / f"{name}.json").write_text(json.dumps(matrix.tolist()))
    field = torch.zeros(3, *ixi.BOX.shape)
    field[0] = 3
    whole = brains.between("a", "b", DisplacementField(field, ixi.BOX))
    np.testing.assert_allclose(whole(np.array([[12.0, 4, -6]])), [[10, 8, -12]], atol=1e-5)
    assert ixi.folding(DisplacementField(field, ixi.BOX)) == 0


def test_variants_are_those_of_table_2(tmp_path: Path) -> None:
    made = lumir.Benchmark(tmp_path, channels=32)
    rows = {
        name: from_dict(LumirTraining, tomllib.loads(made.config(8, made.variant(name), 4.5, 1)), name)
        for name in lumir.VARIANTS
    }
    published = {"backbone": 32, "+BF": 32, "+CA": 32, "+CA+BF": 32, "+LK": 36, "LC-1": 64, "LC-2": 64}
    assert {name: row.channels for name, row in rows.items()} == published
    assert [name for name, row in rows.items() if row.cascade == "compose"] == ["LC-2"]
    assert [name for name, row in rows.items() if row.attention] == ["+CA", "+CA+BF"]
    assert [name for name, row in rows.items() if row.bilateral == "fixed"] == ["+BF", "+CA+BF"]
    assert rows["+LK"].large_kernel == 5
    assert {(row.steps, row.seed, row.validate_every) for row in rows.values()} == {(8, 1, 2)}


def test_a_table_has_the_mean_of_every_method() -> None:
    numbers = {"hd95_mm": "2", "ndv_percent": "0.5", "tre_mm": "1", "seconds": "3"}
    text = lumir.table([{"method": "one", "dice": dice, **numbers} for dice in ("50", "60")])
    assert text.splitlines()[-1] == "| one | 2 | 55.00 ± 5.00 | 2.00 | 0.5000 | 1.00 | 3.0 |"
