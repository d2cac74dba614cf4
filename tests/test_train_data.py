"""Tables, the cache, augmentation by known maps, and generated pairs with exact displacements."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scene import GRID, WARP, bright, inverted, places, seen

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.image import Labels
from crossmorph.io.tables import FIXED, MOVING
from crossmorph.optimise.terms import displaced
from crossmorph.resample import sample
from crossmorph.settings import Linear, Preprocessing
from crossmorph.space import Grid
from crossmorph.train import pairs as tables
from crossmorph.train.augment import augmented, random_bend, random_motion, synthetic
from crossmorph.train.pairs import Data, load_data, read_table
from crossmorph.train.registration import measured
from crossmorph.train.sample import Batch, Sample
from crossmorph.train.settings import Augmentation, Synthesis
from crossmorph.transform.jacobian import displacement_determinant

COARSE = Preprocessing(spacing_mm=4.0, crop=False, linear=Linear(model="none"))
SHIFT = np.array([[1.0, 0, 0, 5], [0, 1, 0, -3], [0, 0, 1, 2], [0, 0, 0, 1]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(stage: str, share: float, numbers: dict[str, float]) -> None:
    """No progress."""


def load(table: Path, cache: Path, settings: Preprocessing = COARSE) -> Data:
    return load_data(table, settings, cache, quiet)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of a pair with labels and landmarks, ``pairs.csv`` with three rows of it, and ``volumes.csv``."""
    for name, warp, contrast in (("fixed", None, bright), ("moving", WARP, inverted)):
        io.write(seen(GRID, warp, contrast), tmp_path / f"{name}.nii.gz")
        tissue = seen(GRID, warp, bright).data[0]
        ids = (tissue > 60).int() + (tissue > 150).int()
        io.write(Labels(ids, GRID), tmp_path / f"{name}_labels.nii.gz")
    points = places()[:40]
    rows = torch.cat([points, WARP(points)], 1).tolist()
    lines = [",".join(FIXED + MOVING), *(",".join(f"{v:.6f}" for v in row) for row in rows)]
    (tmp_path / "points.csv").write_text("\n".join(lines))
    row = "fixed.nii.gz,moving.nii.gz,fixed_labels.nii.gz,moving_labels.nii.gz,points.csv"
    (tmp_path / "pairs.csv").write_text(
        f"fixed,moving,fixed_labels,moving_labels,points,split\n{row},train\n{row},\n{row},validation\n"
    )
    (tmp_path / "volumes.csv").write_text(
        "image,labels\n" + "\n".join(f"{name}.nii.gz,{name}_labels.nii.gz" for name in ("fixed", "moving") * 2)
    )
    return tmp_path


# -- tables ------------------------------------------------------------------------------------------------------


def test_a_pair_is_drawn_on_one_grid_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(folder / "pairs.csv", folder / "cache")
    assert (len(data.names), len(data.validation)) == (2, 1)
    pair = data.sample(0, generator())
    assert pair.fixed.shape == pair.moving_labels.shape == pair.grid.shape == data.shape
    inside = pair.fixed_valid
    world = pair.grid.to_world(np.stack(np.nonzero(inside.numpy()), 1).astype(float))
    found = sample(seen(contrast=bright).data, torch.from_numpy(GRID.to_voxel(world)))[0]
    assert float(torch.corrcoef(torch.stack([found.float(), pair.fixed[inside]]))[0, 1]) > 0.97
    monkeypatch.setattr(tables, "prepared", None)  # nothing is prepared twice
    again = load(folder / "pairs.csv", folder / "cache").sample(1, generator())
    assert torch.equal(again.fixed, pair.fixed)


def test_validation_measures_what_is_known(folder: Path) -> None:
    """The true displacement of the scene has no landmark error and no folds; none at all has that of the scene."""
    pair = load(folder / "pairs.csv", folder / "cache").validation[0]()
    world = pair.grid.to_world(displaced(torch.zeros(3, *pair.grid.shape)).double())
    truth = pair.grid.to_voxel(WARP(world)) - pair.grid.to_voxel(world)
    none = measured(pair, torch.zeros(3, *pair.grid.shape))
    right = measured(pair, truth.permute(3, 0, 1, 2).float())
    points = places()[:40]
    assert none["tre_mm"] == pytest.approx(float((WARP(points) - points).norm(dim=1).mean()), rel=1e-3)
    assert right["tre_mm"] < 0.1
    assert right["ndv_percent"] == 0
    assert right["dice"] > none["dice"] + 0.05


def test_landmarks_go_through_the_linear_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "align", lambda *given: SHIFT)
    moving = seen(contrast=bright)
    io.write(replace(moving, grid=Grid(GRID.shape, SHIFT @ GRID.affine)), folder / "moving.nii.gz")
    (folder / "points.csv").write_text(",".join(FIXED + MOVING) + "\n0,0,0,5,-3,2\n10,4,-6,15,1,-4\n")
    (folder / "pairs.csv").write_text("fixed,moving,points\n" + "fixed.nii.gz,moving.nii.gz,points.csv\n" * 2)
    pair = load(folder / "pairs.csv", folder / "cache").sample(0, generator())
    assert measured(pair, torch.zeros(3, *pair.grid.shape))["tre_mm"] < 1e-3
    assert float(torch.corrcoef(torch.stack([pair.fixed.flatten(), pair.moving.flatten()]))[0, 1]) > 0.98


def test_the_linear_map_is_kept_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "align", lambda *given: SHIFT)
    coarse = load(folder / "pairs.csv", folder / "cache")
    monkeypatch.setattr(tables, "align", None)
    finer = load(folder / "pairs.csv", folder / "cache", replace(COARSE, spacing_mm=3.0))
    assert finer.shape != coarse.shape
    np.testing.assert_allclose(finer.sample(0, generator()).linear, SHIFT)


def test_a_changed_file_is_prepared_again(folder: Path) -> None:
    before = load(folder / "pairs.csv", folder / "cache").sample(0, generator())
    io.write(seen(contrast=inverted), folder / "fixed.nii.gz")
    after = load(folder / "pairs.csv", folder / "cache").sample(0, generator())
    assert not torch.equal(before.fixed, after.fixed)


def test_every_volume_moves_once_an_epoch_towards_another_one(folder: Path) -> None:
    (folder / "volumes.csv").write_text(
        "image,split\n"
        + "".join(f"{n}.nii.gz,{s}\n" for s in ("train", "validation") for n in ("fixed", "moving"))
    )
    data = load(folder / "volumes.csv", folder / "cache")
    assert (len(data.names), len(data.validation)) == (2, 2)
    for index in range(2):
        pair = data.sample(index, generator())
        assert pair.name.startswith(data.names[index])
        assert not torch.equal(pair.fixed, pair.moving)
    first, second = (pair() for pair in data.validation)
    assert torch.equal(first.fixed, second.moving)
    assert torch.equal(first.moving, second.fixed)


def test_the_last_tenth_validates_without_a_split(folder: Path) -> None:
    (folder / "many.csv").write_text("fixed,moving\n" + "fixed.nii.gz,moving.nii.gz\n" * 30)
    assert [row.validation for row in read_table(folder / "many.csv")] == [False] * 27 + [True] * 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fixed,moving\nfixed.nii.gz,\n", "row 2: moving is empty"),
        ("fixed,moving\nfixed.nii.gz,moving.nii.gz\nfixed.nii.gz,gone.nii.gz\n", "row 3: there is no file"),
        ("image,labels\nfixed.nii.gz,gone.nii.gz\n", "row 2: there is no file"),
        ("fixed,other\nfixed.nii.gz,moving.nii.gz\n", "column moving is missing"),
        (
            "fixed,moving,fixed_labels\nfixed.nii.gz,moving.nii.gz,fixed_labels.nii.gz\n",
            "row 2: labels are needed",
        ),
        ("fixed,moving,split\nfixed.nii.gz,moving.nii.gz,test\n", "row 2: split is 'test'"),
        ("fixed,moving,split\nfixed.nii.gz,moving.nii.gz,train\n", "0 pairs to validate on"),
        ("fixed,moving\nfixed.nii.gz,moving.nii.gz\n", "0 pairs to train on"),
        ("image,split\nfixed.nii.gz,train\nmoving.nii.gz,validation\n", "1 volumes to train on; 2 are needed"),
        ("fixed,moving\n", "no rows"),
    ],
)
def test_bad_tables_are_told_by_row(folder: Path, text: str, words: str) -> None:
    (folder / "bad.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        load(folder / "bad.csv", folder / "cache")


def test_bad_volumes_are_told_by_row(folder: Path) -> None:
    flat = seen(contrast=bright)
    io.write(replace(flat, data=torch.ones_like(flat.data)), folder / "flat.nii.gz")
    (folder / "bad.csv").write_text("fixed,moving\nfixed.nii.gz,flat.nii.gz\nfixed.nii.gz,moving.nii.gz\n")
    with pytest.raises(InputError, match=r"row 2 \(flat.nii.gz to fixed.nii.gz\): .* is constant"):
        load(folder / "bad.csv", folder / "cache")
    ids = io.read_labels(folder / "moving_labels.nii.gz")
    io.write(replace(ids, data=ids.data + 10 * (ids.data > 0)), folder / "moving_labels.nii.gz")
    with pytest.raises(InputError, match="no id in common"):
        load(folder / "pairs.csv", folder / "cache")


def test_a_full_disk_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        load(folder / "pairs.csv", folder / "cache")
    assert not list((folder / "cache").glob("*.safetensors"))
    (folder / "file").write_text("")
    with pytest.raises(InputError, match="give --cache"):
        load(folder / "pairs.csv", folder / "file" / "cache")


# -- samples -----------------------------------------------------------------------------------------------------


def made(shape: tuple[int, int, int] = (32, 24, 16), bend_mm: float = 4.0, seed: int = 0) -> Sample:
    return synthetic(shape, 2.0, Synthesis(labels=6, bend_mm=bend_mm), generator(seed))


def test_padding_adds_what_is_not_valid() -> None:
    pair = made()
    wide = pair.padded((32, 32, 32))
    assert torch.equal(wide.fixed[:, :24, :16], pair.fixed)
    assert not wide.fixed_valid[:, 24:].any()
    assert wide.truth.shape == (3, 32, 32, 32)
    np.testing.assert_allclose(wide.grid.origin, pair.grid.origin)
    both = Batch.of([pair, made(seed=1)])
    assert both.fixed.shape == (2, 1, 32, 24, 16)
    assert both.moving_labels.shape == (2, 32, 24, 16)


# -- augmentation ------------------------------------------------------------------------------------------------


def test_no_augmentation_changes_nothing() -> None:
    pair = made()
    assert augmented(pair, Augmentation(), generator()) is pair


def test_a_random_motion_is_about_the_middle_and_within_its_limits() -> None:
    grid = Grid.from_spacing((21, 21, 21), (2.0, 3.0, 1.0))
    for seed in range(5):
        limits = Augmentation(turn_deg=10, scale=0.1, shift_mm=4)
        field = random_motion(grid, limits, generator(seed))
        middle = field[:, 10, 10, 10] * torch.tensor([2.0, 3, 1])
        assert float(middle.abs().max()) <= 4
        slopes = torch.stack([field.diff(dim=axis)[:, :20, :20, :20].mean((1, 2, 3)) for axis in (1, 2, 3)], 1)
        spacing = torch.tensor([2.0, 3, 1])
        matrix = torch.eye(3) + slopes * spacing[:, None] / spacing[None]
        stretch = torch.linalg.svdvals(matrix)
        assert float((stretch - 1).abs().max()) <= 0.1 + 1e-4
        assert torch.allclose(
            slopes, torch.stack([field.diff(dim=a)[:, 3, 4, 5] for a in (1, 2, 3)], 1), atol=1e-4
        )


def test_augmentation_moves_image_labels_and_validity_by_one_map() -> None:
    pair = replace(made(bend_mm=0.0), truth=None)
    labels = pair.moving_labels
    pair = replace(pair, moving=labels.float() / 5)  # an image that shows its labels
    moved = augmented(pair, Augmentation(shift_mm=6.0, turn_deg=8.0), generator(3))
    assert not torch.equal(moved.moving, pair.moving)
    whole = moved.moving_valid
    shown = (moved.moving * 5).round().int()
    assert float((shown == moved.moving_labels)[whole].float().mean()) > 0.8
    assert 0.3 < float(whole.float().mean()) < 1
    assert torch.equal(moved.fixed, pair.fixed)


def test_contrast_and_noise_keep_the_range() -> None:
    pair = made()
    changed = augmented(pair, Augmentation(contrast=0.5, noise=0.05), generator())
    assert 0 <= float(changed.fixed.min()) <= float(changed.fixed.max()) <= 1
    assert not torch.equal(changed.fixed, pair.fixed)
    again = augmented(pair, Augmentation(contrast=0.5, noise=0.05), generator())
    assert torch.equal(changed.fixed, again.fixed)
    assert changed.truth is None


# -- generated pairs ---------------------------------------------------------------------------------------------


def test_generated_displacements_are_exact() -> None:
    """The labels of the moving volume at p + u(p) are those of the fixed one, but for voxels on a boundary."""
    pair = made((48, 40, 32), 5.0)
    warped = sample(pair.moving_labels[None], displaced(pair.truth), "nearest")[0]
    same = (warped == pair.fixed_labels)[4:-4, 4:-4, 4:-4]
    still = (pair.moving_labels == pair.fixed_labels)[4:-4, 4:-4, 4:-4]
    assert float(same.float().mean()) > 0.96 > 0.93 > float(still.float().mean())
    exact = measured(pair, pair.truth)
    assert exact["tre_mm"] == pytest.approx(0, abs=1e-6)
    assert exact["dice"] > 0.9
    assert exact["ndv_percent"] == 0


def test_generated_pairs_have_all_labels_in_two_contrasts() -> None:
    pair = made((48, 40, 32))
    assert len(torch.unique(pair.moving_labels)) == 6
    for side in (pair.fixed, pair.moving):
        assert float(side.min()) == 0
        assert float(side.max()) == 1
    assert abs(float(torch.corrcoef(torch.stack([pair.fixed.flatten(), pair.moving.flatten()]))[0, 1])) < 0.95
    assert torch.equal(made((48, 40, 32)).fixed, pair.fixed)
    assert not torch.equal(made((48, 40, 32), seed=1).fixed, pair.fixed)


def test_bends_have_the_wanted_length_where_they_may_and_never_fold() -> None:
    grid = Grid.from_spacing((32, 32, 32), 2.0)
    for length in (1.0, 30.0):
        field = random_bend(grid, length, generator())
        mean = float((field * 2).norm(dim=0).mean())
        assert mean == pytest.approx(1.0, rel=1e-3) if length == 1 else mean < 30
        assert float(displacement_determinant(field, Grid((32, 32, 32), np.eye(4))).min()) > 0
