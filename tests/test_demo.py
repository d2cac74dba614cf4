import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import crossmorph
from crossmorph import io, phantom
from crossmorph.commands import demo
from crossmorph.commands.demo import Demo
from crossmorph.image import Image
from crossmorph.report import figures
from crossmorph.transform import DisplacementField
from crossmorph.verdict import Verdict

VERDICT = Verdict("ok", ("by construction",))


@pytest.fixture
def registered_by_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """``register`` that knows the answer, on a small phantom."""
    make_pair = partial(phantom.make_pair, (32, 27, 24), 9.0)

    def register(fixed: Image, moving: Image, *, seed: int, **_: Any) -> Any:
        motion = make_pair(seed=seed).motion
        grid = fixed.grid
        voxels = torch.stack(torch.meshgrid(*map(torch.arange, grid.shape), indexing="ij"), -1)
        points = grid.to_world(voxels.reshape(-1, 3).double().numpy())
        field = torch.from_numpy(motion.to_moving(points) - points).float().T.reshape(3, *grid.shape)
        transform = DisplacementField(field, grid, fixed_grid=grid)
        return SimpleNamespace(
            transform=transform,
            warped=transform.apply(moving),
            verdict=VERDICT,
            save=lambda folder, overwrite: folder.mkdir(exist_ok=overwrite),
        )

    monkeypatch.setattr(phantom, "make_pair", make_pair)
    monkeypatch.setattr(demo, "_add_truth", lambda *_: None)
    monkeypatch.setattr(crossmorph, "register", register, raising=False)
    monkeypatch.setattr(figures, "PIXELS", 60)


@pytest.mark.usefixtures("registered_by_truth")
def test_demo_measures_and_leaves_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "demo"
    assert Demo(out, seed=4).run() == 0
    assert Demo(out, seed=4).run() == 0  # a second time over the first
    told = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in told.splitlines() if "│" in line}
    error = next(values for name, values in rows.items() if name.startswith("mean error"))
    dice = next(values for name, values in rows.items() if name.startswith("mean Dice"))
    assert float(error[0]) > 4
    assert float(error[1]) < 0.5  # the truth, but for the coarse grid
    assert float(dice[0]) + 0.05 < float(dice[1])
    assert "verdict: ok (by construction)" in told
    assert str(out / "before_after.png") in told
    assert {p.name for p in out.iterdir()} == {
        "before_after.png",
        "deformation.png",
        "fixed.nii.gz",
        "fixed_labels.nii.gz",
        "fixed_points.csv",
        "moving.nii.gz",
        "moving_labels.nii.gz",
        "moving_points.csv",
        "result",
    }
    pair = phantom.make_pair(seed=4)
    assert torch.equal(io.read(out / "moving.nii.gz").data, pair.moving.data)
    assert torch.allclose(io.read_points(out / "moving_points.csv").xyz, pair.moving_points.xyz, atol=1e-5)


@pytest.mark.usefixtures("registered_by_truth")
def test_a_failed_verdict_is_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "VERDICT", Verdict("failed", ("worse than before",)))
    assert Demo(tmp_path).run() == 3
    assert "verdict: failed (worse than before)" in capsys.readouterr().out


@pytest.mark.usefixtures("registered_by_truth")
def test_without_matplotlib_the_demo_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert Demo(tmp_path).run() == 0
    assert "crossmorph[report]" in capsys.readouterr().out


@pytest.mark.usefixtures("registered_by_truth")
def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(crossmorph.errors.InputError, match="--output"):
        Demo(tmp_path / "file").run()


@pytest.mark.slow
def test_demo_registers_the_phantom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Demo(tmp_path / "demo", quiet=True).run() == 0
    told = capsys.readouterr().out
    rows = {line.split("│")[1].split()[1]: line.split("│")[2:4] for line in told.splitlines() if "│" in line}
    assert float(rows["error"][1]) < 0.3 * float(rows["error"][0])
    assert float(rows["percentile,"][1]) < 0.4 * float(rows["percentile,"][0])
    assert float(rows["Dice"][1]) > float(rows["Dice"][0]) + 0.2
    assert {p.name for p in (tmp_path / "demo" / "result").iterdir()} == {
        "confidence.nii.gz",
        "report.html",
        "forward.h5",
        "inverse.h5",
        "record.json",
        "validity.nii.gz",
        "warped.nii.gz",
    }
