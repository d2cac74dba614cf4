"""Transform files mean the same to SimpleITK as to us, in both directions."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.points import Points
from crossmorph.resample import resample
from crossmorph.space import Grid
from crossmorph.transform import Affine, Chain, DisplacementField, Transform

FLIP = np.array([-1.0, -1.0, 1.0])
TILT = np.array([[0.8, -0.6, 0.0], [0.48, 0.64, -0.6], [0.36, 0.48, 0.8]])  # a rotation
SHEAR = np.array([[1, 0.3, 0.1], [0, 1, 0.2], [0, 0, 1.0]])


def grid(shape: tuple[int, int, int] = (9, 8, 7), mirrored: bool = False, sheared: bool = False) -> Grid:
    """Oblique and anisotropic, around (12, -30, 55) mm."""
    affine = np.eye(4)
    affine[:3, :3] = TILT * [3.0, 4.5, 6.0] @ (SHEAR if sheared else np.eye(3)) * [-1 if mirrored else 1, 1, 1]
    affine[:3, 3] = [12, -30, 55] - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


GRIDS = {"oblique": grid(), "mirrored": grid(mirrored=True), "sheared": grid(sheared=True)}


def field(on: Grid, seed: int = 0) -> DisplacementField:
    generator = torch.Generator().manual_seed(seed)
    return DisplacementField(torch.randn(3, *on.shape, generator=generator) * 4, on)


def points(on: Grid, count: int = 200) -> np.ndarray:
    """Inside the grid and around it."""
    corners = on.corners()
    return np.random.default_rng(1).uniform(corners.min(0) - 5, corners.max(0) + 5, (count, 3))


def by_simpleitk(transform: sitk.Transform, xyz: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint((p * FLIP).tolist()) for p in xyz]) * FLIP


AFFINE = Affine.from_parts((5, -3, 8), (10, 20, -15), (1.1, 0.9, 1.05), (0.1, -0.05, 0.2), (10, -20, 50))
TURN = Affine.rotation((0, 0, 90), center_mm=(12, -30, 55))


def all_kinds(on: Grid) -> dict[str, Transform]:
    return {
        "affine": AFFINE,
        "field": field(on),
        "affine, field": Chain((AFFINE, field(on))),
        "field, affine": Chain((field(on), AFFINE)),
        "affine, field, turn, field": Chain((AFFINE, field(on), TURN, field(on, 1))),
    }


@pytest.mark.parametrize("where", GRIDS)
@pytest.mark.parametrize("kind", all_kinds(grid()))
def test_simpleitk_maps_points_as_we_do(tmp_path: Path, kind: str, where: str) -> None:
    on = GRIDS[where]
    transform = all_kinds(on)[kind]
    io.write_transform(transform, tmp_path / "t.h5")
    xyz = points(on)
    expected = transform(xyz)
    theirs = sitk.ReadTransform(str(tmp_path / "t.h5"))
    np.testing.assert_allclose(by_simpleitk(theirs, xyz), expected, atol=1e-3)
    np.testing.assert_allclose(io.read_transform(tmp_path / "t.h5")(xyz), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["t.tfm", "t.txt", "t.hdf5"])
def test_other_itk_endings(tmp_path: Path, name: str) -> None:
    transform = Chain((field(grid((3, 4, 2))), AFFINE))
    io.write_transform(transform, tmp_path / name)
    xyz = points(grid((3, 4, 2)))
    np.testing.assert_allclose(
        by_simpleitk(sitk.ReadTransform(str(tmp_path / name)), xyz), transform(xyz), atol=1e-3
    )


def test_mat_holds_an_affine_map_only(tmp_path: Path) -> None:
    io.write_transform(AFFINE, tmp_path / "t.mat")
    read = io.read_transform(tmp_path / "t.mat")
    assert isinstance(read, Affine)
    np.testing.assert_allclose(read.matrix, AFFINE.matrix, atol=1e-9)
    with pytest.raises(InputError, match=r"t\.mat: \.mat files hold one affine map"):
        io.write_transform(field(grid()), tmp_path / "t.mat")


def test_simpleitk_resamples_to_our_warped_image(tmp_path: Path) -> None:
    """``Resample(moving, fixed, ReadTransform("forward.h5"))`` is the warped image."""
    fixed = grid((20, 18, 12))
    shape = (24, 22, 20)
    smooth = np.random.default_rng(2).standard_normal(shape).cumsum(0).cumsum(1).astype(np.float32)
    moving = Image.from_array(smooth, Grid.from_spacing(shape, (4, 5, 4), (15, -28, 60)))
    forward = Chain(
        (field(fixed.resized((7, 6, 5))), Affine.from_parts((2, -3, 1), (5, 3, -4), center_mm=(12, -30, 55)))
    )
    warped = resample(moving, fixed, forward, fill=0.0)

    io.write_transform(forward, tmp_path / "forward.h5")
    for name, image in {"moving.nii.gz": moving, "fixed.nii.gz": warped}.items():
        io.write(image, tmp_path / name)
    theirs = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "moving.nii.gz")),
        sitk.ReadImage(str(tmp_path / "fixed.nii.gz")),
        sitk.ReadTransform(str(tmp_path / "forward.h5")),
    )
    voxels = moving.grid.to_voxel(forward(fixed.to_world(np.stack(np.indices(fixed.shape), -1).astype(float))))
    interior = ((voxels > 0.01) & (voxels < np.array(shape) - 1.01)).all(-1)
    assert interior.mean() > 0.5
    difference = np.abs(sitk.GetArrayFromImage(theirs).T - warped.data[0].numpy())[interior]
    assert difference.max() < 1e-3 * np.ptp(smooth)


@pytest.mark.parametrize("name", ["f.nii.gz", "f.mha", "f.nrrd"])
@pytest.mark.parametrize("where", ["oblique", "mirrored"])
def test_fields_as_images_are_itk_displacements(tmp_path: Path, name: str, where: str) -> None:
    transform = field(GRIDS[where])
    io.write(transform, tmp_path / name)
    xyz = points(GRIDS[where])
    theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / name), sitk.sitkVectorFloat64))
    np.testing.assert_allclose(by_simpleitk(theirs, xyz), transform(xyz), atol=1e-3)
    np.testing.assert_allclose(io.read_transform(tmp_path / name)(xyz), transform(xyz), atol=1e-3)


def test_a_nifti_field_looks_like_an_ants_warp(tmp_path: Path) -> None:
    io.write(field(grid()), tmp_path / "f.nii.gz")
    header = nib.load(tmp_path / "f.nii.gz").header
    assert header.get_data_shape() == (9, 8, 7, 1, 3)
    assert int(header["intent_code"]) == 1007


def test_fields_that_simpleitk_wrote(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).standard_normal((5, 6, 7, 3)), isVector=True)
    image.SetSpacing((3.0, 4.0, 5.0))
    image.SetDirection(TILT.ravel().tolist())
    xyz = np.random.default_rng(1).uniform(0, 8, (50, 3))
    for name in ("f.nii.gz", "f.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / name), sitk.sitkVectorFloat64))
        np.testing.assert_allclose(io.read_transform(tmp_path / name)(xyz), by_simpleitk(theirs, xyz), atol=1e-3)


def test_sheared_fields_go_where_itk_keeps_the_shear(tmp_path: Path) -> None:
    transform = field(GRIDS["sheared"])
    xyz = points(GRIDS["sheared"])
    io.write(transform, tmp_path / "f.mha")
    np.testing.assert_allclose(io.read_transform(tmp_path / "f.mha")(xyz), transform(xyz), atol=1e-3)
    with pytest.raises(InputError, match=r"cannot write .*f\.nii\.gz: ITK misreads .* sheared"):
        io.write(transform, tmp_path / "f.nii.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["f.mha"]


def itk_kinds() -> dict[str, sitk.Transform]:
    euler = sitk.Euler3DTransform((1, 2, 3), 0.1, -0.2, 0.3, (4, 5, 6))
    versor = sitk.VersorRigid3DTransform((0, 0, 1), 0.5, (1, 2, 3), (4, 5, 6))
    similarity = sitk.Similarity3DTransform(1.2, (0, 0, 1), 0.4, (1, 2, 3), (4, 5, 6))
    return {
        "identity": sitk.Transform(3, sitk.sitkIdentity),
        "translation": sitk.TranslationTransform(3, (1, 2, 3)),
        "euler": euler,
        "versor": versor,
        "similarity": similarity,
        "scale": sitk.ScaleTransform(3, (1.1, 0.9, 2)),
        "composite": sitk.CompositeTransform([euler, similarity]),
        "nested": sitk.CompositeTransform([sitk.CompositeTransform([euler, versor]), similarity]),
    }


@pytest.mark.parametrize("kind", itk_kinds())
def test_linear_itk_transforms(tmp_path: Path, kind: str) -> None:
    theirs = itk_kinds()[kind]
    flat = sitk.CompositeTransform([theirs])  # files hold no composites of composites
    flat.FlattenTransform()
    sitk.WriteTransform(flat, str(tmp_path / "t.tfm"))
    read = io.read_transform(tmp_path / "t.tfm")
    assert isinstance(read, Affine)
    xyz = points(grid())
    np.testing.assert_allclose(read(xyz), by_simpleitk(theirs, xyz), atol=1e-6)


def test_b_splines_are_sampled(tmp_path: Path) -> None:
    spline = sitk.BSplineTransform(3, 3)
    spline.SetTransformDomainOrigin((-40.0, -10.0, 20.0))
    spline.SetTransformDomainPhysicalDimensions((80.0, 90.0, 70.0))
    spline.SetTransformDomainMeshSize((4, 5, 3))
    spline.SetParameters(np.random.default_rng(0).uniform(-5, 5, len(spline.GetParameters())).tolist())
    affine = sitk.Euler3DTransform((0, 0, 0), 0.1, 0.05, 0.0, (1, 2, 3))
    both = sitk.CompositeTransform([affine, spline])  # the spline is applied first
    sitk.WriteTransform(both, str(tmp_path / "t.h5"))
    read = io.read_transform(tmp_path / "t.h5")
    assert isinstance(read, Chain)
    xyz = np.random.default_rng(1).uniform((-39, -9, 21), (39, 79, 89), (300, 3)) * FLIP
    error = np.linalg.norm(read(xyz) - by_simpleitk(both, xyz), axis=1)
    assert error.max() < 0.1  # of displacements up to 5 mm that change within 20 mm


def test_a_brain_sized_field_stays_small(tmp_path: Path) -> None:
    on = Grid.from_spacing((80, 96, 112), 2.0)
    io.write_transform(Chain((DisplacementField(torch.zeros(3, *on.shape), on), AFFINE)), tmp_path / "t.h5")
    assert (tmp_path / "t.h5").stat().st_size < 21e6


def test_real_transforms_fit_their_points(data_dir: Path) -> None:
    """The published ITK files of one patient, against the points that were made from them."""
    folder = data_dir / "ms_longitudinal" / "p01"
    read = io.read_transform(folder / "study1_T1W_intrastudy_to_FLAIR.txt")
    fixed, moving = io.read_point_pairs(folder / "points_ms_p01_s1_T1W_to_FLAIR.csv")
    assert len(fixed) == len(moving) > 100
    np.testing.assert_allclose(read(fixed.xyz).numpy(), moving.xyz.numpy(), atol=1e-3)


# -- bad files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.h5", "a.tfm", "a.mat", "a.mha", "a.nii.gz"])
@pytest.mark.parametrize("content", [b"", b"hello"])
def test_files_that_are_no_transform(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} cannot be read as a"):
        io.read_transform(tmp_path / name)


def test_transforms_of_the_wrong_kind(tmp_path: Path) -> None:
    sitk.WriteTransform(sitk.Euler2DTransform(), str(tmp_path / "flat.tfm"))
    with pytest.raises(InputError, match="is 2-D"):
        io.read_transform(tmp_path / "flat.tfm")
    for name in ("image.nii.gz", "image.mha"):
        io.write(Image.from_array(np.zeros((3, 4, 5), np.float32), np.eye(4)), tmp_path / name)
        with pytest.raises(InputError, match=r"image\.\w+.*(components|vector intent)"):
            io.read_transform(tmp_path / name)
    with pytest.raises(InputError, match=r"the ending must be one of \.h5"):
        io.read_transform(_touched(tmp_path / "a.json"))
    with pytest.raises(
        InputError, match=r"cannot write .*a\.mha: an image holds a displacement field, not a Chain"
    ):
        io.write_transform(Chain((AFFINE, field(grid()))), tmp_path / "a.mha")
    with pytest.raises(InputError, match="does not exist"):
        io.read_transform(tmp_path / "none.h5")


def _touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("name", ["t.h5", "t.tfm", "t.txt", "t.mha", "t.nii.gz"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, name: str) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the system then refuses larger files
    try:
        with pytest.raises(InputError, match=rf"cannot write .*{name}"):
            io.write_transform(field(grid((20, 20, 20))), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# -- points ------------------------------------------------------------------------------------------------------


def test_points_come_back(tmp_path: Path) -> None:
    xyz = torch.from_numpy(points(grid(), 5))
    for names in ((), ("a", "b, c", "d", "e", "f")):
        io.write(Points(xyz, names), tmp_path / "p.csv")
        back = io.read_points(tmp_path / "p.csv")
        assert back.names == names
        torch.testing.assert_close(back.xyz, xyz, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "column x, y, z is missing"),
        ("1,2,3\n4,5,6\n", r"column x, y, z is missing.* it is '1,2,3'"),
        ("x,y\n1,2\n", "column z is missing"),
        ("x,y,z\n", "no points"),
        ("x,y,z\n1,2,3\n1,two,3\n", "point 2: y is 'two', not a number"),
        ("x,y,z\n1,2\n", "point 1: z is '', not a number"),
        ("x,y,z\n1,2,nan\n", "NaN or infinite"),
        ("fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z\n1,2,3,4,5,6\n", "column x, y, z is missing"),
    ],
)
def test_bad_points(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        io.read_points(tmp_path / "p.csv")


def test_point_pairs(tmp_path: Path) -> None:
    text = "\ufefffixed_x, fixed_y, fixed_z, moving_x,moving_y,moving_z,note\n1,2,3,4,5,6,a\n\n7,8,9,10,11,12,b\n"
    (tmp_path / "p.csv").write_text(text, encoding="utf-8")
    fixed, moving = io.read_point_pairs(tmp_path / "p.csv")
    assert fixed.xyz.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert moving.xyz.tolist() == [[4, 5, 6], [10, 11, 12]]
    assert (fixed.space, moving.space) == ("fixed", "moving")
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n")
    with pytest.raises(InputError, match="column fixed_x, fixed_y"):
        io.read_point_pairs(tmp_path / "p.csv")
