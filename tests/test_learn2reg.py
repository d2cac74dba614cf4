"""Learn2Reg files and scores: every layout, every variant of dataset.json, the official formulas written out."""

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from crossmorph.commands import learn2reg as command
from crossmorph.commands.learn2reg import Learn2Reg
from crossmorph.errors import InputError
from crossmorph.evaluate.learn2reg import (
    Dataset,
    Pair,
    displacement_name,
    find_displacement,
    from_transform,
    read_array,
    read_dataset,
    read_displacement,
    subject_and_modality,
    to_transform,
    write_displacement,
)
from crossmorph.evaluate.submission import (
    LUMIR_LABELS,
    TASKS,
    Task,
    landmark_errors,
    leaderboard_row,
    score_pair,
    score_submission,
    task_of,
    warp_nearest,
)
from crossmorph.image import Image
from crossmorph.space import Grid
from crossmorph.transform import Affine, DisplacementField

SHAPE = (20, 24, 18)
TASK = Task("AbdomenMRCT", SHAPE, ("sdlogj", "dice", "hd95"), (1, 2, 3), masked=True)


def oblique(shape: tuple[int, int, int] = SHAPE, shift: float = 0.0) -> Grid:
    from scipy.spatial.transform import Rotation

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec([0.2, -0.3, 0.4]).as_matrix() @ np.diag([-1.2, 2.0, 1.5])
    affine[:3, 3] = [10 + shift, -20, 30]
    return Grid(shape, affine)


def smooth_field(seed: int = 0, size: float = 3.0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(3, *shape))
    field = np.stack([gaussian_filter(component, 5, mode="nearest") for component in noise])
    return (size * field / np.abs(field).max()).astype(np.float32)


def blobs(seed: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 3)
    return np.digitize(noise, np.quantile(noise, [0.4, 0.6, 0.8])).astype(np.uint8)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1]) if affine is None else affine), path)


@pytest.fixture
def abdomen(tmp_path: Path) -> Dataset:
    """Two pairs of label blobs and images in the layout of AbdomenMRCT."""
    pairs = []
    for subject in (6, 7):
        for modality in (0, 1):
            name = f"AbdomenMRCT_{subject:04d}_{modality:04d}.nii.gz"
            labels = blobs(10 * subject + modality)
            save(tmp_path / "imagesTr" / name, labels.astype(np.float32) + 1)
            save(tmp_path / "labelsTr" / name, labels)
            save(tmp_path / "masksTr" / name, (labels > 0).astype(np.uint8))
        names = [f"./imagesTr/AbdomenMRCT_{subject:04d}_000{k}.nii.gz" for k in (0, 1)]
        pairs.append(dict(zip(("fixed", "moving"), names, strict=True)))
    write_json(tmp_path, name="AbdomenMRCT", registration_val=pairs, tensorImageShape={"0": list(SHAPE)})
    return read_dataset(tmp_path)


def write_json(folder: Path, **content: object) -> Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps(content))
    return path


# -- fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii.gz", ".npz"])
@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
def test_fields_come_back_whatever_the_layout(tmp_path: Path, layout: str, suffix: str) -> None:
    fixed, moving = oblique(), oblique(shift=7.0)
    transform = to_transform(smooth_field(), fixed, moving)
    path = tmp_path / f"disp{suffix}"
    write_displacement(transform, path, fixed, moving, layout)
    assert read_array(path, SHAPE).shape == (3, *SHAPE)
    back = read_displacement(path, fixed, moving)
    assert float((back.field - transform.field).abs().max()) < 1e-4


def test_a_field_maps_voxels_of_the_fixed_array_to_voxels_of_the_moving_array() -> None:
    fixed, moving = oblique(), oblique(shift=7.0)
    u = smooth_field(1)
    transform = to_transform(u, fixed, moving)
    for p in ([3, 4, 5], [10, 0, 17], [19, 23, 0]):
        there = moving.to_voxel(transform(fixed.to_world(np.array(p, float))))
        np.testing.assert_allclose(there, p + u[(slice(None), *p)], atol=1e-4)
    np.testing.assert_allclose(from_transform(transform, fixed, moving), u, atol=1e-4)


def test_written_files_are_what_the_evaluations_want(tmp_path: Path) -> None:
    grid = oblique()
    write_displacement(Affine.translation(grid.affine[:3, 1] * 2), tmp_path / "d.nii.gz", grid)
    image = nib.load(tmp_path / "d.nii.gz")
    assert image.shape == (*SHAPE, 3)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, grid.affine, atol=1e-5)
    np.testing.assert_allclose(np.asarray(image.dataobj)[5, 6, 7], [0, 2, 0], atol=1e-5)


def test_half_resolution_keeps_smooth_fields_to_a_twentieth_voxel(tmp_path: Path) -> None:
    shape = (40, 48, 36)  # at 40 the challenge's own zoom loses the last face
    grid = oblique(shape)
    i, j, k = (np.linspace(0, np.pi, n).reshape(np.roll([-1, 1, 1], a)) for a, n in enumerate(shape))
    parts = 4 * np.cos(i) * np.cos(2 * j), 9 * np.cos(2 * k) * np.cos(i), np.cos(i) * np.cos(j) * np.cos(k)
    u = np.stack(np.broadcast_arrays(*parts))
    write_displacement(to_transform(u, grid), tmp_path / "d.npz", grid, layout="half-resolution")
    with np.load(tmp_path / "d.npz") as archive:
        stored = archive["arr_0"]
    assert stored.dtype == np.float16
    assert stored.shape == (3, 20, 24, 18)
    for corner in ((0, 0, 0), (-1, -1, -1)):  # end points meet, values are not scaled
        np.testing.assert_allclose(stored[(slice(None), *corner)], u[(slice(None), *corner)], atol=0.01)
    assert np.abs(read_array(tmp_path / "d.npz", shape) - u).max() < 0.05


def test_shapes_that_fit_nothing_or_two_layouts_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((4, 5, 6, 3)))
    with pytest.raises(InputError, match=r"\(4, 5, 6, 3\) fits none of \(20, 24, 18, 3\)"):
        read_array(tmp_path / "a.npz", SHAPE)
    np.savez(tmp_path / "b.npz", np.zeros((3, 3, 3, 3)))
    with pytest.raises(InputError, match="more than one layout"):
        read_array(tmp_path / "b.npz", (3, 3, 3))
    assert read_array(tmp_path / "b.npz", (3, 3, 3), "channels-last").shape == (3, 3, 3, 3)
    np.savez(tmp_path / "c.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(InputError, match="a, b; it must hold one"):
        read_array(tmp_path / "c.npz", SHAPE)
    (tmp_path / "d.nii.gz").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        read_array(tmp_path / "d.nii.gz", SHAPE)
    np.savez(tmp_path / "e.npz", np.full((*SHAPE, 3), np.nan))
    with pytest.raises(InputError, match="NaN"):
        read_array(tmp_path / "e.npz", SHAPE)


# -- names and dataset.json --------------------------------------------------------------------------------------


def test_names_follow_the_challenge(tmp_path: Path) -> None:
    pair = Pair(Path("imagesTr/AbdomenMRCT_0006_0000.nii.gz"), Path("imagesTr/AbdomenMRCT_0006_0001.nii.gz"))
    assert displacement_name(pair) == "disp_0006_0000_0006_0001.nii.gz"
    assert displacement_name(pair, lumir=True) == "disp_0006_0006.nii.gz"
    assert subject_and_modality("LUMIRMRI_3455_0000.nii.gz") == ("3455", "0000")
    with pytest.raises(InputError, match="TASK_SSSS_MMMM"):
        subject_and_modality("brain.nii.gz")


def test_fields_are_found_in_the_order_of_the_evaluations(tmp_path: Path) -> None:
    pair = Pair(Path("A_0001_0000.nii.gz"), Path("A_0001_0001.nii.gz"))
    same = Pair(Path("L_3455_0000.nii.gz"), Path("L_3454_0000.nii.gz"))
    (tmp_path / "disp_0001_0001.nii.gz").touch()
    assert find_displacement(tmp_path, pair).name == "disp_0001_0001.nii.gz"
    (tmp_path / "disp_0001_0000_0001_0001.npz").touch()
    assert find_displacement(tmp_path, pair).suffix == ".npz"
    (tmp_path / "disp_3455_3454.nii.gz").touch()
    with pytest.raises(InputError, match=r"disp_3455_0000_3454_0000\.npz or"):
        find_displacement(tmp_path, same)
    assert find_displacement(tmp_path, same, lumir=True).name == "disp_3455_3454.nii.gz"


def test_variants_of_dataset_json(tmp_path: Path) -> None:
    pairs = [{"fixed": "/imagesVal/L_3455_0000.nii.gz", "moving": "imagesVal/L_3454_0000.nii.gz"}]
    expected = (Pair(tmp_path / "imagesVal/L_3455_0000.nii.gz", tmp_path / "imagesVal/L_3454_0000.nii.gz"),)
    for key in ("validation", "registration_val"):
        assert read_dataset(write_json(tmp_path, **{key: pairs})).pairs["validation"] == expected
    numbered = [{"0": "./imagesVal/L_3455_0000.nii.gz", "1": "./imagesVal/L_3454_0000.nii.gz"}]
    assert read_dataset(write_json(tmp_path, registration_test=numbered)).pairs["test"] == expected
    edited = read_dataset(
        write_json(
            tmp_path,
            training=["./imagesTr/L_0001_0000.nii.gz"],
            validation=[{"image": "/imagesTr/L_3364_0000.nii.gz", "seg": "/segs/L_3364.nii.gz"}],
            test=pairs,
        )
    )
    assert edited.pairs["validation"] == ()
    assert edited.pairs["test"] == expected
    assert edited.images["training"] == (tmp_path / "imagesTr/L_0001_0000.nii.gz",)
    assert edited.name == tmp_path.name
    save(tmp_path / "segs/L_3364.nii.gz", np.zeros((2, 2, 2), np.uint8))
    assert edited.companion(edited.images["validation"][0], "labels") == tmp_path / "segs/L_3364.nii.gz"


def test_companions_lie_in_folders_named_after_them(tmp_path: Path) -> None:
    image = tmp_path / "imagesVal" / "N_0101_0000.nii.gz"
    dataset = read_dataset(write_json(tmp_path, name="NLST"))
    assert dataset.companion(image, "keypoints") is None
    (tmp_path / "keypointsTr").mkdir()
    (tmp_path / "keypointsTr" / "N_0101_0000.csv").write_text("1,2,3\n")
    assert dataset.companion(image, "keypoints") == tmp_path / "keypointsTr" / "N_0101_0000.csv"


def test_damaged_dataset_json(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="list"):
        read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        read_dataset(tmp_path / "dataset.json")


# -- scores ------------------------------------------------------------------------------------------------------


def official_labels(
    fixed: np.ndarray, moving: np.ndarray, u: np.ndarray, ids: tuple[int, ...]
) -> tuple[float, float]:
    """Mean Dice and HD95 by the evaluation's formulas, with its own distance program."""
    oracle = pytest.importorskip("surface_distance")
    warped = map_coordinates(moving, np.indices(fixed.shape) + u, order=0)
    dice, hd95 = [], []
    for i in ids:
        a, b = fixed == i, warped == i
        if not a.any() or not (moving == i).any():
            dice.append(math.nan)
            hd95.append(math.nan)
            continue
        dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        hd95.append(oracle.compute_robust_hausdorff(oracle.compute_surface_distances(a, b, np.ones(3)), 95))
    return float(np.nanmean(dice)), float(np.nanmean(hd95))


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
def test_scores_equal_the_official_formulas(abdomen: Dataset) -> None:
    (pair, _), u = abdomen.pairs["validation"], smooth_field(3)
    row = score_pair(abdomen, pair, u, TASK)
    fixed, moving = (nib.load(str(p).replace("images", "labels")).get_fdata() for p in (pair.fixed, pair.moving))
    dice, hd95 = official_labels(fixed, moving, u, TASK.labels)
    assert row["dice"] == pytest.approx(dice)
    assert row["hd95"] == pytest.approx(hd95)
    gradient = np.stack([np.gradient(u, axis=axis) for axis in (1, 2, 3)], -1)
    jacobian = np.linalg.det(np.moveaxis(gradient, 0, -2) + np.eye(3))[2:-2, 2:-2, 2:-2]
    inside = (fixed > 0)[2:-2, 2:-2, 2:-2]
    assert row["sdlogj"] == pytest.approx(np.log(jacobian + 3)[inside].std(), rel=1e-5)


def test_zero_fields_score_the_start(abdomen: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "submission"
    out.mkdir()
    for pair in abdomen.pairs["validation"]:
        grid = Grid(SHAPE, nib.load(pair.fixed).affine)
        write_displacement(Affine.identity(), out / displacement_name(pair), grid)
    rows = score_submission(abdomen, abdomen.pairs["validation"], out, TASK)
    for row, subject in zip(rows, (6, 7), strict=True):
        fixed, moving = blobs(10 * subject), blobs(10 * subject + 1)
        dice = [
            2 * ((fixed == i) & (moving == i)).sum() / ((fixed == i).sum() + (moving == i).sum())
            for i in (1, 2, 3)
        ]
        assert row["dice"] == pytest.approx(np.mean(dice))
        assert row["sdlogj"] == pytest.approx(0, abs=1e-12)
    board = leaderboard_row(rows, TASK)
    assert board["dice"] == pytest.approx(np.mean([row["dice"] for row in rows]))
    assert board["dice30"] == pytest.approx(np.quantile([row["dice"] for row in rows], 0.3))


def test_swapped_axes_are_seen(abdomen: Dataset, tmp_path: Path) -> None:
    """The moving labels are the fixed ones moved by (3, -2, 1) voxels; only the right order undoes it."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[6:12, 7:15, 6:11] = 1
    pair = abdomen.pairs["validation"][0]
    for path, array in ((pair.fixed, labels), (pair.moving, np.roll(labels, (3, -2, 1), (0, 1, 2)))):
        save(Path(str(path).replace("images", "labels")), array)
    u = np.broadcast_to(np.reshape([3.0, -2, 1], (3, 1, 1, 1)), (3, *SHAPE)).astype(np.float32)
    task = Task("AbdomenMRCT", SHAPE, ("dice",), (1,))
    assert score_pair(abdomen, pair, u, task)["dice"] == 1
    for order in ([1, 0, 2], [2, 1, 0], [0, 2, 1]):
        assert score_pair(abdomen, pair, u[order], task)["dice"] < 0.8
    grid = Grid(SHAPE, np.diag([2.0, 2, 2, 1]))
    write_displacement(to_transform(u, grid), tmp_path / displacement_name(pair), grid)
    assert score_submission(abdomen, [pair], tmp_path, task)[0]["dice"] == 1


def test_a_label_lost_by_the_warp_is_counted_and_poisons_only_the_mean_it_must(abdomen: Dataset) -> None:
    pair = abdomen.pairs["validation"][0]
    away = np.full((3, *SHAPE), 100.0, np.float32)
    row = score_pair(abdomen, pair, away, TASK)
    assert (row["labels_lost"], row["dice"]) == (3, 0)
    assert row["hd95"] == math.inf
    assert math.isnan(row["hd95_kept"])
    board = leaderboard_row([row, score_pair(abdomen, pair, 0 * away, TASK)], TASK)
    assert board["hd95"] == math.inf


def test_general_landmarks_are_voxels_read_through_the_field_in_mm() -> None:
    rng = np.random.default_rng(4)
    p = rng.uniform(4, 14, (12, 3))
    u = np.stack([0.5 + 0.1 * axis for axis in np.indices(SHAPE)])  # linear: cubic splines are exact
    q = p + 0.5 + 0.1 * p
    np.testing.assert_allclose(landmark_errors(p, q + np.array([1, 0, 0]), u, np.array([2.0, 1, 1])), 2, atol=0.02)
    with pytest.raises(InputError, match="12 fixed landmarks but 11"):
        landmark_errors(p, q[1:], u, np.ones(3))


def lumir_folder(folder: Path) -> Dataset:
    fixed, moving = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    fixed[4:9, 5:12, 6:10] = 4
    fixed[11:15, 5:12, 6:10] = 11
    moving[6:11, 5:12, 6:10] = 4
    points = [np.zeros(SHAPE, np.uint8) for _ in range(2)]
    for n, (i, j, k) in enumerate([(5, 6, 7), (12, 15, 9), (15, 20, 15)], start=1):
        points[0][i - 1 : i + 2, j - 1 : j + 2, k - 1 : k + 2] = n
    points[1][...] = np.roll(points[0], 2, 0)
    for number, labels, marks in ((3455, fixed, points[0]), (3454, moving, points[1])):
        name = f"LUMIRMRI_{number}_0000.nii.gz"
        save(folder / "imagesVal" / name, (labels > 0).astype(np.uint8), np.eye(4))
        save(folder / "labelsVal" / name, labels, np.eye(4))
        save(folder / "landmarksVal" / name, marks, np.eye(4))
    write_json(folder, name="LUMIR", validation=[
        {"fixed": "/imagesVal/LUMIRMRI_3455_0000.nii.gz", "moving": "/imagesVal/LUMIRMRI_3454_0000.nii.gz"},
    ])  # fmt: skip
    return read_dataset(folder)


def test_lumir_rules(tmp_path: Path) -> None:
    dataset = lumir_folder(tmp_path)
    pair = dataset.pairs["validation"][0]
    task = Task("LUMIR", SHAPE, TASKS["LUMIR"].metrics, LUMIR_LABELS, lumir=True)
    zero = np.zeros((3, *SHAPE), np.float32)
    row = score_pair(dataset, pair, zero, task)
    fixed, moving = (nib.load(str(p).replace("images", "labels")).get_fdata() for p in (pair.fixed, pair.moving))
    background = 2 * ((fixed == 0) & (moving == 0)).sum() / ((fixed == 0).sum() + (moving == 0).sum())
    assert row["dice"] == pytest.approx((background + 0.6) / 2)  # label 11 is not in the moving map
    assert row["labels"] == 2
    assert row["ndv"] == 0
    assert row["tre"] == pytest.approx(2.0)
    right = zero.copy()
    right[0] = 2
    assert score_pair(dataset, pair, right, task)["tre"] == 0
    grid = Grid(SHAPE, np.eye(4))
    write_displacement(to_transform(right, grid), tmp_path / "disp_3455_3454.nii.gz", grid)
    assert score_submission(dataset, [pair], tmp_path, task)[0]["dice_4"] == 1


def test_volume_of_folds_looks_where_the_program_looks(tmp_path: Path) -> None:
    dataset = lumir_folder(tmp_path)
    pair = dataset.pairs["validation"][0]
    folded = np.zeros((3, *SHAPE), np.float32)
    folded[0, 4] = 3.0  # only at i = 4, inside the fixed and outside the moving foreground
    task = Task("LUMIR", SHAPE, ("ndv",), lumir=True)
    assert score_pair(dataset, pair, folded, task, "fixed")["ndv"] > score_pair(dataset, pair, folded, task)["ndv"]


def test_tasks_are_found_by_name() -> None:
    assert task_of("LUMIR25").lumir
    assert task_of("abdomenmrct").labels == (1, 2, 3, 4)
    assert len(LUMIR_LABELS) == len(set(LUMIR_LABELS)) == 133
    with pytest.raises(InputError, match="no preset for the task 'Elbow'"):
        task_of("Elbow")


def test_missing_truth_leaves_a_dash(abdomen: Dataset) -> None:
    import shutil

    shutil.rmtree(abdomen.folder / "labelsTr")
    row = score_pair(abdomen, abdomen.pairs["validation"][0], np.zeros((3, *SHAPE), np.float32), TASK)
    assert set(row) == {"id", "sdlogj"}
    assert leaderboard_row([row], TASK)["dice"] == "-"


# -- the command -------------------------------------------------------------------------------------------------


def test_command_registers_writes_scores_and_resumes(
    abdomen: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The registration is replaced: the first pair gets the identity, the second fails, and succeeds later."""
    calls: list[str] = []
    broken = True

    def registration(system: str, preset: str, linear: str, seed: int) -> object:
        def register(fixed: Image, moving: Image) -> Affine:
            calls.append(fixed.name)
            if broken and "0007" in fixed.name:
                raise InputError("no overlap")
            return Affine.identity()

        return register

    monkeypatch.setattr(command, "registration", registration)
    run = Learn2Reg(abdomen.folder, tmp_path / "out", before=True)
    assert run.run() == 2
    assert [p.name for p in (tmp_path / "out/submission").iterdir()] == ["disp_0006_0000_0006_0001.nii.gz"]
    captured = capsys.readouterr()
    assert "0007_0000_0007_0001: failed: no overlap" in captured.err
    assert "the challenge expects images of (192, 160, 192), not (20, 24, 18)" in captured.err
    broken = False
    assert run.run() == 0
    assert calls == ["AbdomenMRCT_0006_0000", "AbdomenMRCT_0007_0000", "AbdomenMRCT_0007_0000"]
    board = (tmp_path / "out/leaderboard.md").read_text().splitlines()
    assert board[0].startswith("| row | task | cases | sdlogj |")
    assert board[2].replace("mcbo", "initial") == board[3]  # the identity scores what the zero field does
    with pytest.raises(InputError, match="was begun with"):
        Learn2Reg(abdomen.folder, tmp_path / "out", seed=1).run()
    with pytest.raises(InputError, match=r"no pairs of fixed and moving for test; it has validation \(2\)"):
        Learn2Reg(abdomen.folder, tmp_path / "out", split="test").run()


def test_command_scores_a_folder_of_any_program(
    abdomen: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for pair in abdomen.pairs["validation"]:
        name = displacement_name(pair).replace(".nii.gz", ".npz")
        np.savez(theirs / name, np.zeros((*SHAPE, 3), np.float32))
    assert Learn2Reg(abdomen.folder, tmp_path / "out", submission=theirs, json=True).run() == 0
    (row,) = json.loads(capsys.readouterr().out)["leaderboard"]
    assert (row["row"], row["cases"]) == ("theirs", 2)
    (theirs / name).unlink()
    with pytest.raises(InputError, match="no displacement field for 0007_0000_0007_0001"):
        Learn2Reg(abdomen.folder, tmp_path / "out", submission=theirs).run()


# -- real volumes ------------------------------------------------------------------------------------------------


def cropped(path: Path, size: int = 40) -> np.ndarray:
    array = np.asarray(nib.load(path).dataobj)
    middle = [n // 2 for n in array.shape]
    return np.ascontiguousarray(array[tuple(slice(m - size // 2, m + size // 2) for m in middle)])


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
@pytest.mark.parametrize("name", ["AbdomenMRCT", "LUMIR"])
def test_real_labels_in_challenge_folders(data_dir: Path, tmp_path: Path, name: str) -> None:
    """Real anatomy, real label counts: the zero field scores what the formulas say, a smooth field as well."""
    lumir = name == "LUMIR"
    scans = ["ixi_train/IXI538-HH-2411_T1", "ixi_train/IXI634-HH-2690_T1"]
    if not lumir:
        scans = ["nichart/Subj9_T1", "nichart/Subj12_T1"]
    files = [f"imagesVal/X_{3455 - k if lumir else 6:04d}_000{0 if lumir else k}.nii.gz" for k in (0, 1)]
    for scan, file in zip(scans, files, strict=True):
        save(tmp_path / file, cropped(data_dir / f"{scan}.nii.gz").astype(np.float32))
        save(
            tmp_path / file.replace("images", "labels"),
            cropped(data_dir / f"{scan}_DLMUSE.nii.gz").astype(np.int16),
        )
    write_json(tmp_path, name=name, validation=[dict(zip(("fixed", "moving"), files, strict=True))])
    dataset = read_dataset(tmp_path)
    pair = dataset.pairs["validation"][0]
    fixed, moving = (cropped(data_dir / f"{scan}_DLMUSE.nii.gz").astype(int) for scan in scans)
    ids = tuple(range(0 if lumir else 1, 60))
    task = Task(name, None, ("dice", "hd95"), ids, lumir=lumir)
    for u in (np.zeros((3, 40, 40, 40), np.float32), smooth_field(5, 2.0, (40, 40, 40))):
        row = score_pair(dataset, pair, u, task)
        kept = tuple(i for i in ids if (fixed == i).any() and (moving == i).any())
        assert row["labels"] == len(kept) > 10
        dice, hd95 = official_labels(fixed, moving, u, kept)
        assert row["dice"] == pytest.approx(dice)
        assert row["hd95"] == pytest.approx(hd95)


def test_nearest_warp_ends_at_the_outer_voxel_centres() -> None:
    ones = np.ones((4, 4, 4), int)
    u = np.zeros((3, 4, 4, 4), np.float32)
    u[0] = 0.4
    assert (warp_nearest(ones, u)[3] == 0).all()
    assert (warp_nearest(ones, u)[:3] == 1).all()
    assert isinstance(to_transform(u, Grid((4, 4, 4), np.eye(4))), DisplacementField)
    assert torch.is_tensor(to_transform(u, Grid((4, 4, 4), np.eye(4))).field)
