"""One case and tables of cases: agreement with the data's own score.py, and what bad input is told."""

import csv
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from crossmorph import io
from crossmorph.commands.compare import Compare
from crossmorph.commands.evaluate import Evaluate
from crossmorph.errors import InputError
from crossmorph.evaluate.case import check_points, evaluate, warp_labels
from crossmorph.evaluate.cases import CaseFiles, parse_ids, read_cases, to_json
from crossmorph.evaluate.learn2reg import write_displacement
from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.space import Grid
from crossmorph.transform import Affine, DisplacementField

SHIFT = Affine.translation([4.0, 0, 0])


def balls(grid: Grid, offset_mm: float = 0.0) -> Labels:
    """Three balls of 8 mm along x, moved along x."""
    world = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1).astype(float))
    data = np.zeros(grid.shape, np.int16)
    for label, x in ((1, -18.0), (2, 0.0), (3, 18.0)):
        data[np.linalg.norm(world - [x + offset_mm, 0, 0], axis=-1) < 8] = label
    return Labels.from_array(data, grid, name="balls")


FIXED = Grid.from_spacing((36, 16, 16), 2.0)
MOVING = Grid.from_spacing((60, 24, 12), (1.5, 1.5, 3.0), (4, 0, 0))


def corners(n: int = 20) -> Points:
    return Points(torch.from_numpy(np.random.default_rng(0).uniform(-14, 14, (n, 3))))


# -- scores ------------------------------------------------------------------------------------------------------


def test_the_right_shift_scores_well_and_the_identity_badly() -> None:
    fixed, moving = balls(FIXED), balls(MOVING, 4.0)
    points = corners(), corners().moved_to(corners().xyz + torch.tensor([4.0, 0, 0]), None)
    good = evaluate(SHIFT, fixed_labels=fixed, moving_labels=moving, points=points, thresholds_mm=(1,))
    bad = evaluate(Affine.identity(), fixed_labels=fixed, moving_labels=moving, points=points)
    assert good.scores["tre_mean_mm"] == pytest.approx(0, abs=1e-9)
    assert good.scores["tre_under_1_mm_percent"] == 100
    assert good.scores["tre_before_mm"] == bad.scores["tre_mean_mm"] == pytest.approx(4)
    assert good.scores["dice"] > 0.85 > 0.75 > bad.scores["dice"] == good.scores["dice_before"]
    assert good.scores["hd95_mm"] < 3 < bad.scores["hd95_mm"]
    assert good.scores["folding_percent"] == good.scores["ndv_percent"] == 0
    assert abs(good.scores["volume_change"]) < 0.1
    assert good.notes == bad.notes == []


def test_voxel_distances_follow_the_challenge() -> None:
    moved = balls(FIXED, 4.0)
    mm = evaluate(Affine.identity(), fixed_labels=balls(FIXED), moving_labels=moved).scores["hd95_mm"]
    voxel = evaluate(Affine.identity(), fixed_labels=balls(FIXED), moving_labels=moved, voxel_distances=True)
    assert voxel.scores["hd95_voxel"] == pytest.approx(mm / 2)


def test_lost_and_absent_labels_are_in_the_rows_and_the_notes() -> None:
    moving = Labels.from_array(np.where(balls(FIXED).data.numpy() == 2, 7, balls(FIXED).data.numpy()), FIXED)
    result = evaluate(Affine.translation([30.0, 0, 0]), fixed_labels=balls(FIXED), moving_labels=moving)
    status = {row["id"]: row["status"] for row in result.labels}
    assert status == {1: "lost", 2: "absent in moving", 3: "scored", 7: "absent in fixed"}
    assert result.scores["labels_lost"] == 1
    assert result.labels[0]["hd95_mm"] == math.inf
    assert math.isfinite(result.scores["hd95_mm"])
    assert any("lost by the warp: Dice 0, no distance: 1" in note for note in result.notes)


def test_similarity_of_a_pair_that_the_transform_aligns() -> None:
    rng = np.random.default_rng(1)
    array = rng.random((20, 20, 20)).astype(np.float32)
    fixed = Image.from_array(array, np.eye(4))
    moving = Image.from_array(100 - 50 * array, Affine.translation([30.0, 0, 0]).matrix)
    result = evaluate(Affine.translation([30.0, 0, 0]), fixed=fixed, moving=moving)
    assert result.scores["ncc"] == pytest.approx(-1, abs=1e-5)
    assert result.scores["lncc"] == pytest.approx(1, abs=1e-4)
    assert result.scores["nmi"] > 1.7


# -- agreement with score.py ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def score_py(data_dir: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("score", data_dir / "score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bent(grid: Grid, size_mm: float) -> DisplacementField:
    """A smooth field on a grid of its own, with folds where the size is large."""
    coarse = Grid.from_spacing((14, 14, 14), grid.extent_mm.max() / 9, grid.center)
    rng = np.random.default_rng(3)
    return DisplacementField(torch.from_numpy(rng.normal(0, size_mm, (3, 14, 14, 14)).astype(np.float32)), coarse)


@pytest.mark.parametrize("size_mm", [2.0, 9.0])
def test_agreement_with_the_scores_of_the_data_folder(
    data_dir: Path, score_py: ModuleType, tmp_path: Path, size_mm: float
) -> None:
    """Dice, TRE, folding and SDlogJ are defined alike; its HD95 is not weighted by area and is not compared."""
    names = {
        "fixed": str(data_dir / "nichart/Subj9_T1_DLMUSE.nii.gz"),
        "moving": str(data_dir / "nichart/Subj12_FL_DLMUSE.nii.gz"),
    }
    fixed = io.read_labels(names["fixed"])
    transform = bent(fixed.grid, size_mm)
    io.write(transform, tmp_path / "t.h5")
    points = data_dir / "ms_longitudinal/p01/points_ms_p01_T1W_s2_to_FLAIR_s1.csv"
    theirs = score_py.score(str(tmp_path / "t.h5"), str(points), None, names["fixed"], names["moving"])
    ours = CaseFiles(
        str(tmp_path / "t.h5"), fixed_labels=names["fixed"], moving_labels=names["moving"], points=str(points)
    )
    result = ours.score()
    assert result.scores["labels"] == theirs["labels"] > 100
    assert result.scores["labels_lost"] == theirs["labels_lost"]
    assert result.scores["dice"] == pytest.approx(theirs["dice_mean"], abs=2e-4)  # voxels at ties
    for ours_name, name in (
        ("mean", "tre_mean"),
        ("median", "tre_median"),
        ("p95", "tre_p95"),
        ("max", "tre_max"),
    ):
        assert result.scores[f"tre_{ours_name}_mm"] == pytest.approx(theirs[name], abs=1e-3)
    assert result.scores["folding_percent"] == pytest.approx(theirs["fold_percent"], abs=0.01)
    assert result.scores["sdlogj"] == pytest.approx(theirs["sdlogj"], rel=5e-3)
    if size_mm > 5:
        assert result.scores["folding_percent"] > 0.1


# -- bad input ---------------------------------------------------------------------------------------------------


def test_a_transform_of_the_wrong_direction_is_told_from_points_and_from_labels() -> None:
    away = Affine.translation([-4.0, 0, 0])
    points = corners(), corners().moved_to(corners().xyz + torch.tensor([4.0, 0, 0]), None)
    (note,) = evaluate(away, points=points).notes
    assert note.startswith("wrong direction?")
    assert "mean TRE in mm worse (4 to 8)" in note
    (note,) = evaluate(away, fixed_labels=balls(FIXED), moving_labels=balls(MOVING, 4.0)).notes
    assert "mean Dice worse" in note


@pytest.mark.parametrize(
    ("unit", "move"),
    [
        ("voxel coordinates", FIXED.to_voxel),
        ("metres", lambda x: x / 1e3 + 0.0),
        ("micrometres", lambda x: x * 1e3),
    ],
)
def test_points_in_other_units_are_named(unit: str, move: object) -> None:
    grid = Grid(FIXED.shape, Affine.translation([200.0, 150, 90]).matrix @ FIXED.affine)
    inside = corners().xyz.numpy() + np.array([200, 150, 90])
    points = Points(torch.from_numpy(grid.to_voxel(inside) if unit.startswith("voxel") else move(inside)))
    with pytest.raises(InputError, match=f"inside as {unit}"):
        check_points(points, grid, "fixed")
    with pytest.raises(InputError, match="inside as LPS mm"):
        check_points(Points(torch.from_numpy(inside * [-1, -1, 1])), grid, "fixed")


def test_points_outside_are_counted() -> None:
    points = Points(torch.tensor([[0.0, 0, 0], [1, 1, 1], [500, 0, 0]]))
    assert check_points(points, FIXED, "moving") == [
        "1 of 3 moving points lie outside the field of view of the moving image"
    ]
    assert "2 of 2" in check_points(Points(torch.tensor([[500.0, 0, 0], [700, 9, 9]])), FIXED, "fixed")[0]


def test_truth_far_from_the_image_shows_both_geometries() -> None:
    far = Grid(FIXED.shape, Affine.translation([900.0, 0, 0]).matrix @ FIXED.affine)
    image = Image.from_array(np.ones(FIXED.shape, np.float32), far, name="scan")
    with pytest.raises(InputError, match=r"balls \(Grid.*scan \(Grid.*mm apart.*fixed image's world"):
        evaluate(SHIFT, fixed_labels=balls(FIXED), moving_labels=balls(MOVING), fixed=image)
    with pytest.raises(InputError, match="moving image's world"):
        evaluate(SHIFT, fixed_labels=balls(FIXED), moving_labels=balls(MOVING), moving=image)


def test_labels_on_a_grid_of_their_own_are_scored_there_and_said_so() -> None:
    image = Image.from_array(np.ones(MOVING.shape, np.float32), MOVING)
    result = evaluate(SHIFT, fixed_labels=balls(FIXED), moving_labels=balls(MOVING, 4.0), fixed=image)
    assert result.scores["dice"] > 0.85
    assert any("own grid, Grid(36x16x16" in note for note in result.notes)


def test_a_mask_on_another_grid_is_resampled_and_said_so() -> None:
    mask = Labels.from_array(np.ones((10, 10, 10), np.uint8), Grid.from_spacing((10, 10, 10), 3), name="mask")
    result = evaluate(SHIFT, fixed=Image.from_array(np.ones(FIXED.shape), FIXED), mask=mask)
    assert any("mask (Grid(10x10x10" in note and "resampled" in note for note in result.notes)
    empty = Labels.from_array(np.zeros((10, 10, 10), np.uint8), mask.grid, name="mask")
    with pytest.raises(InputError, match="mask is empty"):
        evaluate(SHIFT, fixed=Image.from_array(np.ones(FIXED.shape), FIXED), mask=empty)


def test_a_field_that_covers_half_the_image_is_told() -> None:
    half = Grid.from_spacing((18, 16, 16), 2.0, FIXED.center - [18, 0, 0])
    field = DisplacementField(torch.zeros(3, *half.shape), half)
    result = evaluate(field, fixed=Image.from_array(np.ones(FIXED.shape), FIXED))
    assert any("covers 50 % of the fixed grid" in note for note in result.notes)


def test_nothing_to_measure_with_and_nothing_in_common() -> None:
    with pytest.raises(InputError, match="nothing to measure with"):
        evaluate(SHIFT)
    other = Labels.from_array(np.full(FIXED.shape, 9, np.int16), FIXED, name="other")
    with pytest.raises(InputError, match=r"balls and other share no label.*\[1, 2, 3\].*\[9\]"):
        evaluate(SHIFT, fixed_labels=balls(FIXED), moving_labels=other)


def test_label_ids_from_text_and_files(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("2 4\n7,8\n")
    assert parse_ids("1,2, 3") == [1, 2, 3]
    assert parse_ids(str(tmp_path / "ids.txt")) == [2, 4, 7, 8]
    assert parse_ids("all") is None
    with pytest.raises(InputError, match="whole numbers"):
        parse_ids("1,two")
    with pytest.raises(InputError, match="cannot read label ids"):
        parse_ids(str(tmp_path / "none.txt"))


# -- files and commands ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    io.write(balls(FIXED), tmp_path / "fixed_labels.nii.gz")
    io.write(balls(MOVING, 4.0), tmp_path / "moving_labels.nii.gz")
    io.write(SHIFT, tmp_path / "shift.tfm")
    io.write(Image.from_array(balls(FIXED).data.numpy().astype(np.float32), FIXED), tmp_path / "fixed.nii.gz")
    xyz = corners().xyz
    io.write(Points(xyz), tmp_path / "p.csv")
    io.write(Points(xyz + torch.tensor([4.0, 0, 0])), tmp_path / "q.csv")
    io.write(Points(xyz[1:]), tmp_path / "short.csv")
    with (tmp_path / "pairs.csv").open("w") as stream:
        stream.write("fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z\n")
        for x, y, z in xyz.tolist():
            stream.write(f"{x},{y},{z},{x + 4},{y},{z}\n")
    (tmp_path / "cases.csv").write_text(
        "id,subject,transform,fixed_labels,moving_labels,points,labels\n"
        "a,s1,shift.tfm,fixed_labels.nii.gz,moving_labels.nii.gz,pairs.csv,all\n"
        'b,s2,identity,fixed_labels.nii.gz,moving_labels.nii.gz,,"1,2"\n'
        "c,s2,lost.tfm,fixed_labels.nii.gz,moving_labels.nii.gz,,\n"
    )
    return tmp_path


def test_command_prints_json_that_any_program_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = Evaluate(
        str(folder / "shift.tfm"),
        fixed_labels=folder / "fixed_labels.nii.gz",
        moving_labels=folder / "moving_labels.nii.gz",
        points=folder / "p.csv",
        moving_points=folder / "q.csv",
        json=True,
    )
    assert command.run() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["cases"][0]["tre_mean_mm"] < 1e-5
    assert "notes" not in printed["cases"][0]
    assert [row["status"] for row in printed["labels"]] == ["scored"] * 3
    assert to_json({"x": [math.nan, math.inf, 1.0]}) == '{\n  "x": [\n    null,\n    null,\n    1.0\n  ]\n}\n'


def test_a_table_of_cases_becomes_tables_and_failures_become_rows(folder: Path) -> None:
    out = folder / "out"
    assert Evaluate(cases=folder / "cases.csv", output=out).run() == 2
    rows = {row["id"]: row for row in csv.DictReader((out / "cases.csv").open())}
    assert "lost.tfm" in rows["c"]["error"]
    assert float(rows["a"]["dice"]) > float(rows["b"]["dice"])
    assert (rows["a"]["labels"], rows["b"]["labels"]) == ("3", "2")
    labels = [*csv.DictReader((out / "labels.csv").open())]
    assert [(row["case"], row["id"]) for row in labels] == [
        ("a", "1"),
        ("a", "2"),
        ("a", "3"),
        ("b", "1"),
        ("b", "2"),
    ]
    summary = {row["metric"]: row for row in csv.DictReader((out / "summary.csv").open())}
    assert float(summary["dice"]["mean"]) == pytest.approx(
        (float(rows["a"]["dice"]) + float(rows["b"]["dice"])) / 2
    )
    assert summary["dice"]["undefined"] == "1"
    assert "| dice | 2 | 1 |" in (out / "summary.md").read_text()
    assert r"\begin{tabular}" in (out / "summary.tex").read_text()
    assert json.loads((out / "record.json").read_text())["cases"][0]["subject"] == "s1"
    with pytest.raises(InputError, match="exists already"):
        Evaluate(cases=folder / "cases.csv", output=out).run()


def test_learn2reg_fields_of_any_layout_are_scored(folder: Path) -> None:
    for name, layout in (("d.nii.gz", "channels-last"), ("d.npz", "channels-first")):
        write_displacement(SHIFT, folder / name, FIXED, MOVING, layout)
        files = {
            "fixed_labels": str(folder / "fixed_labels.nii.gz"),
            "moving_labels": str(folder / "moving_labels.nii.gz"),
        }
        result = CaseFiles(
            str(folder / name), **files, points=str(folder / "pairs.csv"), convention="learn2reg"
        ).score()
        assert result.scores["tre_max_mm"] < 1e-3
    with pytest.raises(InputError, match="unknown convention"):
        CaseFiles("d.npz", fixed=str(folder / "fixed.nii.gz"), convention="fsl").score()
    with pytest.raises(InputError, match="says nothing of its geometry"):
        CaseFiles(str(folder / "d.npz"), points=str(folder / "pairs.csv")).score()


def test_mistakes_with_files_are_told(folder: Path) -> None:
    shift, labels = str(folder / "shift.tfm"), str(folder / "fixed_labels.nii.gz")
    with pytest.raises(InputError, match="both sides"):
        CaseFiles(shift, fixed_labels=labels).score()
    with pytest.raises(InputError, match="20 fixed landmarks but 19 moving"):
        CaseFiles(shift, points=str(folder / "p.csv"), moving_points=str(folder / "short.csv")).score()
    with pytest.raises(InputError, match="needs the fixed ones"):
        CaseFiles(shift, moving_points=str(folder / "p.csv")).score()
    with pytest.raises(InputError, match=r"column fixed_x.* missing"):
        CaseFiles(shift, points=str(folder / "p.csv")).score()
    soft = nib.Nifti1Image(np.full(FIXED.shape, 0.5, np.float32), FIXED.affine)
    nib.save(soft, folder / "soft.nii.gz")
    with pytest.raises(InputError, match=r"soft.*whole numbers"):
        CaseFiles(shift, fixed_labels=str(folder / "soft.nii.gz"), moving_labels=labels).score()
    with pytest.raises(InputError, match="one of them"):
        Evaluate().run()
    (folder / "twice.csv").write_text("id,transform\na,identity\na,identity\n")
    with pytest.raises(InputError, match="the id a stands"):
        [*read_cases(folder / "twice.csv")]


def test_compare_reads_what_evaluate_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for system, gain in (("ours", 0.1), ("theirs", 0.0)):
        (folder / system).mkdir()
        rows = "".join(f"sub{n // 2}_{n},{0.5 + 0.01 * n + gain},{2 - gain}\n" for n in range(10))
        (folder / system / "cases.csv").write_text(f"id,dice,tre_mean_mm\n{rows}")
    command = Compare((folder / "ours", folder / "theirs"), subject_pattern=r"(sub\d+)_", output=folder / "cmp")
    assert command.run() == 0
    assert "| ours | **0.645 ± 0.029** | **1.9 ± 0** |" in capsys.readouterr().out
    (dice, tre) = csv.DictReader((folder / "cmp" / "comparisons.csv").open())
    assert (dice["subjects"], dice["wins"], tre["wins"]) == ("5", "10", "10")
    assert float(dice["p"]) == pytest.approx(2 / 2**5)
    with pytest.raises(InputError, match="finds nothing in the id"):
        Compare((folder / "ours", folder / "theirs"), subject_pattern="patient").run()
    with pytest.raises(InputError, match="different names"):
        Compare((folder / "ours", folder / "ours")).run()


def test_nearest_warp_equals_simpleitk(tmp_path: Path) -> None:
    transform = bent(FIXED, 1.5)
    io.write(transform, tmp_path / "t.h5")
    io.write(balls(MOVING, 4.0), tmp_path / "m.nii.gz")
    io.write(balls(FIXED), tmp_path / "f.nii.gz")
    oracle = sitk.Resample(
        sitk.ReadImage(tmp_path / "m.nii.gz"), sitk.ReadImage(tmp_path / "f.nii.gz"),
        sitk.ReadTransform(str(tmp_path / "t.h5")), sitk.sitkNearestNeighbor,
    )  # fmt: skip
    expected = sitk.GetArrayFromImage(oracle).transpose(2, 1, 0)
    assert (warp_labels(balls(MOVING, 4.0), FIXED, transform).data.numpy() != expected).mean() < 1e-3
