"""``crossmorph apply``: images, label maps, frames and points through transform files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crossmorph import io
from crossmorph.commands.apply import Apply
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.points import Mesh, Points
from crossmorph.space import Grid
from crossmorph.transform import Affine, DisplacementField

SHAPE = (8, 9, 10)
GRID = Grid.from_spacing(SHAPE, 2.0)
SHIFT = (4.0, 0.0, -2.0)  # two voxels along i, one down along k


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A transform that adds SHIFT to fixed points, a moving image, and the fixed image (of another grid)."""
    io.write_transform(Affine.translation(SHIFT), tmp_path / "forward.h5")
    io.write_transform(Affine.translation(SHIFT).inverse(), tmp_path / "inverse.h5")
    values = np.random.default_rng(0).integers(1, 1000, SHAPE).astype(np.int16)
    io.write(Image.from_array(values, GRID), tmp_path / "moving.nii.gz")
    io.write(Image.from_array(values[:6, :6, 1:], GRID.padded((0, 0, -1), (-2, -3, 0))), tmp_path / "fixed.nii.gz")
    return tmp_path


def test_an_image_lands_on_the_grid_of_like(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moving, fixed = io.read(folder / "moving.nii.gz"), io.read(folder / "fixed.nii.gz")
    out = folder / "out.nii.gz"
    assert Apply(folder / "forward.h5", folder / "moving.nii.gz", out, like=folder / "fixed.nii.gz").run() == 0
    warped = io.read(out)
    assert warped.grid.same_as(fixed.grid)
    assert warped.dtype == np.int16
    torch.testing.assert_close(warped.data[0], moving.data[0, 2:, :6, :9])
    assert "0 was put" in capsys.readouterr().out


def test_fill_and_mode(folder: Path) -> None:
    out = folder / "out.mha"
    like = folder / "moving.nii.gz"
    Apply(folder / "forward.h5", like, out, like=like, fill=-7, mode="nearest").run()
    warped = io.read(out).data[0]
    assert (warped[6:] == -7).all()
    assert (warped[:6, :, 0] == -7).all()
    assert (warped[:6, :, 1:] > 0).all()


def test_every_frame_is_warped(folder: Path) -> None:
    frames = np.random.default_rng(1).standard_normal((3, *SHAPE)).astype(np.float32)
    io.write(Image.from_array(frames, GRID), folder / "frames.nii.gz")
    like, out = folder / "fixed.nii.gz", folder / "out.nii.gz"
    Apply(folder / "forward.h5", folder / "frames.nii.gz", out, like=like).run()
    np.testing.assert_allclose(io.read(out).data.numpy(), frames[:, 2:, :6, :9], atol=1e-5)


def test_labels_keep_their_ids(folder: Path) -> None:
    ids = np.zeros(SHAPE, np.uint8)
    ids[3:6, 2:5, 2:6] = 200
    io.write(Labels.from_array(ids, GRID), folder / "labels.nii.gz")
    io.write_transform(Affine.translation((4.5, 0.3, -2.2)), folder / "between.tfm")
    for name in ("forward.h5", "between.tfm"):
        out = folder / "out.nii.gz"
        Apply(folder / name, folder / "labels.nii.gz", out, like=folder / "moving.nii.gz", labels=True).run()
        warped = io.read_labels(out)
        assert warped.ids == [200]
        assert warped.dtype == np.uint8
        assert warped.data[1:4, 2:5, 3:7].eq(200).all()
        assert int(warped.data.eq(200).sum()) == 3 * 3 * 4


def test_points_travel_with_the_transform(folder: Path) -> None:
    xyz = torch.tensor([[0.0, 1.0, 2.0], [-3.0, 4.0, 5.5]])
    io.write(Points(xyz, ("a", "b")), folder / "points.csv")
    Apply(folder / "forward.h5", folder / "points.csv", folder / "out.csv").run()
    moved = io.read_points(folder / "out.csv")
    np.testing.assert_allclose(moved.xyz.numpy(), xyz.numpy() + SHIFT)
    assert moved.names == ("a", "b")
    with pytest.raises(InputError, match="holds points; --like and --labels"):
        Apply(folder / "forward.h5", folder / "points.csv", folder / "out.csv", labels=True).run()


def test_the_record_beside_a_transform_tells_the_grid(folder: Path) -> None:
    fixed = GRID.padded((0, 0, 0), (-3, 0, 0))

    def geometry(grid: Grid) -> dict[str, object]:
        return {"shape": list(grid.shape), "affine": grid.affine.tolist()}

    record = {"inputs": {"fixed": geometry(fixed), "moving": [geometry(GRID)]}}
    (folder / "record.json").write_text(json.dumps(record))
    for name, image, grid in (("forward.h5", "moving", fixed), ("inverse.h5", "fixed", GRID)):
        Apply(folder / name, folder / f"{image}.nii.gz", folder / "out.nii.gz").run()
        assert io.read(folder / "out.nii.gz").grid.same_as(grid)


@pytest.fixture
def result(folder: Path) -> Path:
    """The folder of a registration: both transforms and a record."""

    def geometry(name: str) -> dict[str, object]:
        grid = io.read(folder / name).grid
        return {"shape": list(grid.shape), "affine": grid.affine.tolist()}

    inputs = {"fixed": geometry("fixed.nii.gz"), "moving": [geometry("moving.nii.gz")]}
    (folder / "record.json").write_text(json.dumps({"inputs": inputs}))
    return folder


def test_a_folder_sends_each_volume_to_the_other_space(result: Path) -> None:
    moving, fixed = io.read(result / "moving.nii.gz"), io.read(result / "fixed.nii.gz")
    Apply(result, result / "moving.nii.gz", result / "a.nii.gz").run()
    torch.testing.assert_close(io.read(result / "a.nii.gz").data[0], moving.data[0, 2:, :6, :9])
    Apply(result, result / "fixed.nii.gz", result / "b.nii.gz").run()
    back = io.read(result / "b.nii.gz")
    assert back.grid.same_as(moving.grid)
    torch.testing.assert_close(back.data[0, 2:, :6, :9], fixed.data[0])


def test_the_space_turns_a_transform_file_round(folder: Path) -> None:
    like = folder / "moving.nii.gz"
    Apply(folder / "inverse.h5", like, folder / "a.nii.gz", like=like).run()
    Apply(folder / "forward.h5", like, folder / "b.nii.gz", like=like, space="fixed").run()
    torch.testing.assert_close(io.read(folder / "a.nii.gz").data, io.read(folder / "b.nii.gz").data)
    io.write(Points(torch.tensor([[1.0, 2.0, 3.0]])), folder / "p.csv")
    Apply(folder / "forward.h5", folder / "p.csv", folder / "q.csv", space="moving").run()
    np.testing.assert_allclose(io.read_points(folder / "q.csv").xyz[0].numpy(), np.array([1, 2, 3]) - SHIFT)


def test_a_volume_of_the_other_space_is_refused_with_both_geometries(result: Path) -> None:
    with pytest.raises(InputError, match=r"grid of the other image .* fixed image is Grid\(6x6x9.*8x9x10"):
        Apply(result / "forward.h5", result / "fixed.nii.gz", result / "out.nii.gz").run()
    third = io.read(result / "moving.nii.gz").grid.resized((4, 4, 4))
    io.write(Image.from_array(np.ones((4, 4, 4), np.uint8), third), result / "third.nii.gz")
    with pytest.raises(InputError, match=r"grid of neither image .*4x4x4.*6x6x9.*8x9x10.* --space fixed"):
        Apply(result, result / "third.nii.gz", result / "out.nii.gz").run()
    Apply(result, result / "third.nii.gz", result / "out.nii.gz", space="moving").run()
    Apply(result / "forward.h5", result / "third.nii.gz", result / "same.nii.gz").run()
    assert (result / "out.nii.gz").read_bytes() == (result / "same.nii.gz").read_bytes()


def test_points_of_the_other_space_are_refused(result: Path) -> None:
    far = GRID.to_world(np.array([[7.0, 8.0, 0.0]]))  # in the moving volume only
    io.write(Points(torch.from_numpy(far)), result / "p.csv")
    with pytest.raises(InputError, match=r"no point of .*p\.csv lies in the fixed image .*; say --space moving"):
        Apply(result / "forward.h5", result / "p.csv", result / "q.csv").run()
    with pytest.raises(InputError, match=r"in which space .*p\.csv live\? Say --space"):
        Apply(result, result / "p.csv", result / "q.csv").run()
    Apply(result, result / "p.csv", result / "q.csv", space="moving").run()
    np.testing.assert_allclose(io.read_points(result / "q.csv").xyz.numpy(), far - SHIFT)


def test_a_folder_without_record(folder: Path) -> None:
    with pytest.raises(InputError, match=r"is no result of crossmorph: it has no record\.json"):
        Apply(folder, folder / "moving.nii.gz", folder / "out.nii.gz").run()


def test_volumes_of_labels_and_lost_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.zeros(SHAPE, np.int16)
    ids[3:6, 2:5, 2:6], ids[0, 0, 0] = 200, 3
    io.write(Labels.from_array(ids, GRID), folder / "labels.nii.gz")
    like = folder / "fixed.nii.gz"
    Apply(folder / "forward.h5", folder / "labels.nii.gz", folder / "out.nii.gz", like=like, labels=True).run()
    said = capsys.readouterr().out
    assert "label 3: 8.0 mm3 before, 0.0 mm3 after" in said
    assert "label 200: 288.0 mm3 before, 288.0 mm3 after" in said
    assert "lost: 3; too small" in said


def test_a_surface_travels_with_its_data(folder: Path) -> None:
    xyz = torch.tensor([[0.0, 0, 0], [4, 0, 0], [0, 5, 0], [0, 0, 6]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    surface = Mesh(Points(xyz), faces, {"t": np.arange(4.0)}, {"r": np.arange(4)})
    io.write(surface, folder / "a.vtk")
    Apply(folder / "forward.h5", folder / "a.vtk", folder / "b.vtk").run()
    moved = io.read_mesh(folder / "b.vtk")
    np.testing.assert_allclose(moved.points.xyz.numpy(), xyz.numpy() + SHIFT)
    assert torch.equal(moved.faces, faces)
    np.testing.assert_array_equal(moved.point_data["t"], np.arange(4.0))
    np.testing.assert_array_equal(moved.cell_data["r"], np.arange(4))


@pytest.mark.parametrize("record", [None, "{}", "no json", '{"inputs": {"fixed": null}}', '{"inputs": []}'])
def test_without_a_grid_like_is_asked_for(folder: Path, record: str | None) -> None:
    if record is not None:
        (folder / "record.json").write_text(record)
    with pytest.raises(InputError, match=r"record\.json does not tell it; give a volume with --like"):
        Apply(folder / "forward.h5", folder / "moving.nii.gz", folder / "out.nii.gz").run()
    assert not (folder / "out.nii.gz").exists()


@pytest.mark.parametrize("labels", [False, True])
def test_an_output_that_would_be_empty_is_refused(folder: Path, labels: bool) -> None:
    io.write_transform(Affine.translation((500, 0, 0)), folder / "far.h5")
    like = folder / "fixed.nii.gz"
    with pytest.raises(InputError, match=r"nothing of .*moving\.nii\.gz reaches the output grid"):
        Apply(folder / "far.h5", folder / "moving.nii.gz", folder / "out.nii.gz", like=like, labels=labels).run()
    assert not (folder / "out.nii.gz").exists()


def test_a_displacement_image_serves_as_transform(folder: Path) -> None:
    coarse = Grid.from_spacing((4, 4, 4), 10.0)
    shift = torch.tensor(SHIFT)[:, None, None, None].expand(3, *coarse.shape)
    io.write(DisplacementField(shift, coarse), folder / "warp.nii.gz")
    like = folder / "fixed.nii.gz"
    for name in ("warp.nii.gz", "forward.h5"):
        Apply(folder / name, folder / "moving.nii.gz", folder / f"by_{name[:4]}.nii.gz", like=like).run()
    both = [io.read(folder / f"by_{name}.nii.gz").data for name in ("warp", "forw")]
    torch.testing.assert_close(*both)


def test_real_axis_orders_are_one_volume(data_dir: Path, tmp_path: Path) -> None:
    """A volume stored in one axis order, drawn on the grid of another order, is that other file."""
    odd = data_dir / "robustness"
    io.write_transform(Affine.identity(), tmp_path / "identity.tfm")
    Apply(
        tmp_path / "identity.tfm", odd / "orient_AIL.nii.gz", tmp_path / "a.nii.gz", like=odd / "orient_PIR.nii.gz"
    ).run()
    ours, other = io.read(tmp_path / "a.nii.gz"), io.read(odd / "orient_PIR.nii.gz")
    torch.testing.assert_close(ours.data, other.data, atol=1e-3 * float(other.data.max()), rtol=0)
