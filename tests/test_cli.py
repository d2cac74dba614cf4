"""The command line: exit codes, one line for every mistake, and nothing left behind."""

import gzip
import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scene import GRID, QUICK, WARP, inverted, seen

from crossmorph import io
from crossmorph.cli import main
from crossmorph.commands.register import Register
from crossmorph.errors import InputError
from crossmorph.files import RECORD
from crossmorph.image import Image, Labels
from crossmorph.result import Result
from crossmorph.settings import Refinement, to_dict
from crossmorph.space import Grid
from crossmorph.transform import Affine, DisplacementField
from crossmorph.verdict import Verdict

PROMISED = {"warped.nii.gz", "validity.nii.gz", "confidence.nii.gz", "forward.h5", "inverse.h5", "record.json"}
PROMISED |= {"report.html"}
MINE = """
levels = [4]
half_width = 3
[[refine]]
control = 2
iterations = 20
smoothness = 0.3
[linear]
model = "none"
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good inputs and bad ones; read only."""
    folder = tmp_path_factory.mktemp("scans")
    (folder / "mine.toml").write_text(MINE)
    fixed, moving = seen(name="fixed"), seen(GRID, WARP, inverted)
    io.write(fixed, folder / "fixed.nii.gz")
    io.write(moving, folder / "moving.nii.gz")
    _bad_values(folder, fixed)
    _bad_headers(folder, fixed)
    _bad_masks(folder)
    whole = (folder / "moving.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.nii").write_bytes(gzip.decompress(whole)[:50_000])
    (folder / "notes.nii.gz").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.nii.gz").mkdir()
    (folder / "key.toml").write_text("levles = [4]\n")
    (folder / "value.toml").write_text("half_width = 99\n")
    (folder / "syntax.toml").write_text("levels = = 4\n")
    io.write_transform(DisplacementField(torch.zeros(3, *GRID.shape), GRID), folder / "field.h5")
    return folder


def _bad_values(folder: Path, good: Image) -> None:
    values = good.data[0].numpy()
    variants = {
        "constant": np.full_like(values, 7),
        "nan": np.full_like(values, np.nan),
        "few": np.where(np.indices(GRID.shape).sum(0) < 4, values, np.nan),
        "slice": values[:, :, :1],
        "two_d": values[:, :, 0],
    }
    for name, array in variants.items():
        nib.save(nib.Nifti1Image(array, GRID.affine), folder / f"{name}.nii.gz")
    far = Grid(GRID.shape, Affine.translation((300, 0, 40)).matrix @ GRID.affine)
    io.write(replace(good, grid=far), folder / "far.nii.gz")


def _bad_headers(folder: Path, good: Image) -> None:
    """NIfTI: pixdim[1] is at byte 80, the codes of qform and sform at 252 and 254, srow_x at 280."""
    nib.save(nib.Nifti1Image(good.data[0].numpy(), GRID.affine), folder / "good.nii")
    changes: dict[str, dict[int, bytes]] = {
        "zero": {80: struct.pack("<f", 0)},
        "negative": {80: struct.pack("<f", -2), 252: struct.pack("<2h", 1, 0)},
        "singular": {252: struct.pack("<2h", 0, 1), 280: struct.pack("<4f", 0, 2, 0, 0)},
    }
    for name, parts in changes.items():
        raw = bytearray((folder / "good.nii").read_bytes())
        for place, part in parts.items():
            raw[place : place + len(part)] = part
        (folder / f"{name}.nii").write_bytes(raw)


def _bad_masks(folder: Path) -> None:
    first = np.indices(GRID.shape)[0]
    masks = {"empty": first < 0, "low": first < 10, "high": first > 30}
    for name, mask in masks.items():
        io.write(Labels.from_array(mask.astype(np.uint8), GRID), folder / f"mask_{name}.nii.gz")
    far = Grid(GRID.shape, Affine.translation((500, 0, 0)).matrix @ GRID.affine)
    io.write(Labels.from_array((first < 50).astype(np.uint8), far), folder / "mask_far.nii.gz")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``run("fixed.nii.gz", "moving.nii.gz", ...)``: registers into ``tmp_path/out``; code, stdout, stderr.

    Captures what C libraries print as well.
    """
    monkeypatch.chdir(scans)

    def registered(*arguments: str, out: Path | None = None) -> tuple[int, str, str]:
        quick = () if {"--preset", "--settings", "--system"} & set(arguments) else ("--settings", "mine.toml")
        code = main(["register", *arguments, "-o", str(out or tmp_path / "out"), *quick])
        told = capfd.readouterr()
        return code, told.out, told.err

    return registered


# -- what works --------------------------------------------------------------------------------------------------


def test_a_pair_is_registered(run: Run, tmp_path: Path) -> None:
    code, out, err = run("fixed.nii.gz", "moving.nii.gz")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == PROMISED
    assert f"{tmp_path / 'out'}: ok (moving: mutual information" in out
    assert err == ""
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert {key: record["settings"][key] for key in ("levels", "half_width")} == {"levels": [4], "half_width": 3}
    assert record["settings"]["refine"] == [to_dict(QUICK.refine[0])]


def test_a_descriptor_replaces_those_of_the_preset(run: Run) -> None:
    code, out, _ = run("fixed.nii.gz", "moving.nii.gz", "--json", "--descriptor", "msssc")
    assert code == 0
    assert [one["name"] for one in json.loads(out)["settings"]["describe"]] == ["msssc"]


def test_json_is_the_record_and_nothing_else(run: Run, tmp_path: Path) -> None:
    code, out, err = run("fixed.nii.gz", "moving.nii.gz", "--json", "--seed", "9")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["seed"] == 9
    kept = json.loads((tmp_path / "out" / RECORD).read_text())
    assert told.pop("stages")[:-1] == kept.pop("stages")[:-1]  # writing still runs when the file is written
    assert told == kept


def test_quiet_says_nothing(run: Run, tmp_path: Path) -> None:
    assert run("fixed.nii.gz", "moving.nii.gz", "--quiet") == (0, "", "")
    assert (tmp_path / "out" / RECORD).is_file()


def test_masks_start_and_frames_reach_the_registration(run: Run, tmp_path: Path) -> None:
    io.write_transform(Affine.translation((1, 2, 3)), tmp_path / "start.tfm")
    masks = ("--fixed-mask", "mask_low.nii.gz", "--moving-mask", "mask_low.nii.gz")
    code, _, _ = run("fixed.nii.gz", "moving.nii.gz", *masks, "--initial", str(tmp_path / "start.tfm"))
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert code in (0, 3)
    for key in ("initial", "linear"):  # these settings have no linear stage
        assert [row[3] for row in record[key]] == pytest.approx([1, 2, 3, 1])
    assert record["inputs"]["fixed"]["valid_voxels"] == 10 * 36 * 32
    assert any("mask_low.nii.gz" in note for note in record["inputs"]["fixed"]["notes"])


def test_isolated_nan_is_masked_and_reported(run: Run, scans: Path, tmp_path: Path) -> None:
    values = io.read(scans / "moving.nii.gz").data[0].numpy().copy()
    values[20, 20, 20], values[10, 9, 8] = np.nan, np.inf
    nib.save(nib.Nifti1Image(values, GRID.affine), tmp_path / "holed.nii.gz")
    code, out, _ = run("fixed.nii.gz", str(tmp_path / "holed.nii.gz"))
    assert code == 0
    assert "holed: 2 voxels are NaN or infinite and were masked" in out
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["inputs"]["moving"][0]["notes"] == ["2 voxels are NaN or infinite and were masked"]


def test_overwrite_replaces_an_earlier_result(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD).write_text("{}")
    (tmp_path / "out" / "stale").write_text("")
    code, _, err = run("fixed.nii.gz", "moving.nii.gz")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already; choose another output folder or add --overwrite" in err
    assert run("fixed.nii.gz", "moving.nii.gz", "--overwrite")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == PROMISED


# -- what cannot work: exit code 2, one line, no output -----------------------------------------------------------

PAIR = ("fixed.nii.gz", "moving.nii.gz")
BAD = {
    "no such file": (("fixed.nii.gz", "none.nii.gz"), "none.nii.gz does not exist"),
    "no moving image": (("fixed.nii.gz",), "at least one moving image"),
    "a folder": (("folder.nii.gz", "moving.nii.gz"), "folder.nii.gz: it is a folder without DICOM images"),
    "truncated gzip": (("fixed.nii.gz", "truncated.nii.gz"), "truncated.nii.gz cannot be read as an image"),
    "cut short": (("fixed.nii.gz", "cut.nii"), "cut.nii cannot be read as an image"),
    "text as gzip": (("fixed.nii.gz", "notes.nii.gz"), "notes.nii.gz cannot be read as an image"),
    "text": (("notes.txt", "moving.nii.gz"), "notes.txt cannot be read as an image"),
    "constant": (("fixed.nii.gz", "constant.nii.gz"), "constant.nii.gz is constant: every valid voxel is 7"),
    "all NaN": (("nan.nii.gz", "moving.nii.gz"), "nan.nii.gz has no valid voxel"),
    "hardly a value": (("fixed.nii.gz", "few.nii.gz"), "few.nii.gz has only 20 valid voxels"),
    "one slice": (("fixed.nii.gz", "slice.nii.gz"), "slice.nii.gz is 2-D"),
    "two axes": (("fixed.nii.gz", "two_d.nii.gz"), "two_d.nii.gz: this image is 2-D"),
    "zero spacing": (("fixed.nii.gz", "zero.nii"), "zero.nii: the voxel size (pixdim) is [0.0, 2.0, 2.0]"),
    "negative spacing": (("fixed.nii.gz", "negative.nii"), "negative.nii: the voxel size (pixdim) is [-2.0"),
    "singular affine": (("fixed.nii.gz", "singular.nii"), "singular.nii: the affine is singular"),
    "far away": (("fixed.nii.gz", "far.nii.gz"), "far lies 220 mm away from fixed"),
    "empty mask": ((*PAIR, "--fixed-mask", "mask_empty.nii.gz"), "mask_empty.nii.gz is empty"),
    "mask elsewhere": ((*PAIR, "--moving-mask", "mask_far.nii.gz"), "mask_far.nii.gz (46080 voxels"),
    "masks apart": (
        (*PAIR, "--fixed-mask", "mask_low.nii.gz", "--moving-mask", "mask_high.nii.gz"),
        "have no valid voxel in common",
    ),
    "no such mask": ((*PAIR, "--fixed-mask", "none.nii.gz"), "none.nii.gz does not exist"),
    "preset": ((*PAIR, "--preset", "remind2ref"), "no preset 'remind2ref'; did you mean 'remind2reg'"),
    "system": ((*PAIR, "--system", "mbco"), "no system 'mbco'; did you mean 'mcbo'"),
    "preset and settings": ((*PAIR, "--preset", "convexadam", "--settings", "mine.toml"), "not both"),
    "key": ((*PAIR, "--settings", "key.toml"), "key.toml: unknown key 'levles'; did you mean 'levels'"),
    "value": ((*PAIR, "--settings", "value.toml"), "value.toml: half_width must be 1 to 8, not 99"),
    "syntax": ((*PAIR, "--settings", "syntax.toml"), "cannot read settings from syntax.toml"),
    "no settings": ((*PAIR, "--settings", "none.toml"), "there is no settings file none.toml"),
    "start": ((*PAIR, "--initial", "middle"), "middle does not exist"),
    "start of text": ((*PAIR, "--initial", "notes.txt"), "notes.txt cannot be read as a transform"),
    "start that bends": ((*PAIR, "--initial", "field.h5"), "the initial transform must be linear"),
    "frame": ((*PAIR, "--frame", "2"), "moving has the one frame 0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("crossmorph: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_volume_with_frames_is_asked_about(run: Run, scans: Path, tmp_path: Path) -> None:
    moving = io.read(scans / "moving.nii.gz")
    frames = tmp_path / "frames.nii.gz"
    io.write(replace(moving, data=torch.cat((moving.data, 2 * moving.data))), frames)
    code, _, err = run("fixed.nii.gz", str(frames), "--frame", "last")
    assert code == 2
    assert "frames has frames 0 to 1; frame must be a number of these or 'mean', not 'last'" in err
    assert run("fixed.nii.gz", str(frames), "--frame", "mean")[0] == 0
    assert io.read(tmp_path / "out" / "warped.nii.gz").channels == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(run: Run) -> None:
    code, _, err = run(*PAIR, "--device", "cuda")
    assert code == 2
    assert "torch finds no CUDA device; use --device cpu or auto" in err


def test_places_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = run(*PAIR, out=tmp_path / "file" / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a folder you may write to" in err
    for extra in ((), ("--overwrite",)):
        code, _, err = run(*PAIR, *extra, out=tmp_path / "file")
        assert code == 2
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years")
    code, _, err = run(*PAIR, "--overwrite", out=tmp_path / "papers")
    assert code == 2
    assert "is not an earlier result and is not overwritten" in err
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "years"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code, _, err = run(*PAIR)
    tmp_path.chmod(0o700)
    assert code == 2
    assert "is not a folder you may write to" in err


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond ``size`` bytes meanwhile: writing fails half-way, in C libraries too."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [1_000, 60_000])
def test_a_disk_that_fills_up_leaves_nothing(run: Run, tmp_path: Path, size: int) -> None:
    """1 kB stops the first volume, 60 kB the first transform."""
    run(*PAIR, out=tmp_path / "first")
    with largest_file(size):
        code, out, err = run(*PAIR)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("crossmorph: cannot write")
    assert "nothing half-written remains" in err
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    code, _, _ = run(*PAIR, "--overwrite", out=tmp_path / "first")
    assert code == 0
    with largest_file(size):
        assert run(*PAIR, "--overwrite", out=tmp_path / "first")[0] == 2
    assert {path.name for path in (tmp_path / "first").iterdir()} == PROMISED


# -- other ends --------------------------------------------------------------------------------------------------


def test_a_failed_verdict_is_exit_code_3_and_the_result_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Result, "verdict", Verdict("failed", ("it is on its head",)))
    code, out, _ = run(*PAIR)
    assert code == 3
    assert "failed (it is on its head)" in out
    assert json.loads((tmp_path / "out" / RECORD).read_text())["verdict"]["status"] == "failed"


def test_stopping_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scans: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(io, "write_transform", stop)
    code, out, err = run(*PAIR)
    assert (code, out, err) == (130, "", "crossmorph: stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_not_hidden(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Register) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(Register, "run", broken)
    with pytest.raises(ZeroDivisionError):
        run(*PAIR)


def test_a_message_of_several_lines_becomes_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Register) -> int:
        raise InputError("first\nsecond")

    monkeypatch.setattr(Register, "run", wrong)
    assert run(*PAIR) == (2, "", "crossmorph: first second\n")


@pytest.mark.parametrize(
    "arguments", [[], ["regster"], ["register"], ["register", "a", "b", "-o", "c", "--no-such"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err


# -- as a program ------------------------------------------------------------------------------------------------


def program(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crossmorph", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_the_program_ends_with_the_exit_code(scans: Path, tmp_path: Path) -> None:
    bad = program("register", "fixed.nii.gz", "none.nii.gz", "-o", str(tmp_path / "out"), cwd=scans)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("crossmorph: none.nii.gz does not exist")
    assert bad.stderr.count("\n") == 1
    usage = program("register")
    assert usage.returncode == 2
    assert "Traceback" not in usage.stderr


def test_the_program_registers(scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = program("register", *PAIR, "-o", str(out), "--settings", "mine.toml", "--json", cwd=scans)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["verdict"]["status"] == "ok"
    assert {path.name for path in out.iterdir()} == PROMISED


def test_a_reader_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "crossmorph", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


HEAVY = ("torch", "numpy", "scipy", "SimpleITK", "nibabel", "numba", "matplotlib", "optuna")


@pytest.mark.parametrize("statement", ["import crossmorph", "from crossmorph.cli import main; main(['--help'])"])
def test_help_and_import_load_nothing_heavy(statement: str) -> None:
    code = f"""
import sys
try:
    {statement}
except SystemExit as end:
    assert end.code == 0
print("LOADED", *[name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_help_names_every_command_and_the_exit_codes() -> None:
    told = program("--help").stdout
    commands = Path(__file__).parent.parent / "src" / "crossmorph" / "commands"
    for path in commands.glob("[a-z]*.py"):
        assert f"• {path.stem} " in told
    assert "Exit codes: 0 done, 1 a bug, 2 bad input, 3 done but the verdict is failed" in told


def test_settings_of_these_tests_are_those_of_the_scene() -> None:
    assert QUICK.refine == (Refinement(control=2, iterations=20, smoothness=0.3),)
