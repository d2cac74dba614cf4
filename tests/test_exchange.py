"""Transforms for other programs: each file is applied by an oracle of that program, on an awkward pair.

The fixed image is oblique, anisotropic and left-handed, the moving one oblique and right-handed, or the reverse.
"""

from pathlib import Path
from typing import Any

import nibabel as nib
import nitransforms
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nitransforms.io.lta import FSLinearTransform
from scipy.ndimage import map_coordinates
from truth import Warp, mirrored, tilted_grid, volume, world

from crossmorph import io
from crossmorph.cli import main
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.resample import resample
from crossmorph.space import Grid
from crossmorph.transform import Affine, Chain, DisplacementField, Transform

RIGHT = tilted_grid((17, 19, 13), (2.0, 1.5, 3.0))
LEFT = mirrored(tilted_grid((20, 16, 18), (1.7, 2.2, 2.4), (-12.0, 30.0, 8.0), center=(-3.0, -6.0, 15.0)))
PAIRS = {"left to right": (LEFT, RIGHT), "right to left": (RIGHT, LEFT)}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def affine(fixed: Grid, moving: Grid) -> Affine:
    parts: Any = ((3.0, -2.0, 1.5), (6.0, -9.0, 12.0), (1.05, 0.95, 1.1), (0.05, -0.02, 0.04), (1.0, -7.0, 13.0))
    return Affine.from_parts(*parts, fixed_grid=fixed, moving_grid=moving)


def bent(fixed: Grid, moving: Grid) -> Chain:
    """A displacement on a grid of its own, then an affine map."""
    own = tilted_grid((24, 22, 20), (2.5, 2.5, 2.5), (3.0, 4.0, 5.0))
    return Chain((Warp().field(own), affine(fixed, moving)), fixed_grid=fixed, moving_grid=moving)


KINDS = {"affine": affine, "bent": bent}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def saved(image: Image, path: Path) -> Path:
    io.write(image, path)
    return path


def assert_same_warp(theirs: np.ndarray, transform: Transform, moving: Image) -> None:
    """Another program's warped image is ours, where neither looks beyond the moving volume."""
    assert transform.fixed_grid is not None
    ours = resample(moving, transform.fixed_grid, transform, fill=0.0)
    voxels = moving.grid.to_voxel(transform(world(transform.fixed_grid)).numpy())
    inner = ((voxels > 0.05) & (voxels < np.array(moving.grid.shape) - 1.05)).all(-1)
    assert inner.mean() > 0.25
    np.testing.assert_allclose(theirs[inner], ours.data[0].numpy()[inner], atol=2e-4)


# -- linear ------------------------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize(("name", "kind", "theirs"), [("t.mat", "fsl", "fsl"), ("t.lta", "freesurfer", "fs")])
def test_linear_files_map_points_as_nitransforms_does(
    tmp_path: Path, pair: tuple[Grid, Grid], name: str, kind: Any, theirs: str
) -> None:
    fixed, moving = pair
    transform = affine(fixed, moving)
    io.write_transform(transform, tmp_path / name, kind)
    images = [saved(volume(grid), tmp_path / f"{n}.nii.gz") for n, grid in enumerate(pair)]
    loaded = nitransforms.linear.load(tmp_path / name, fmt=theirs, reference=images[0], moving=images[1])
    xyz = world(fixed).reshape(-1, 3).numpy()
    np.testing.assert_allclose(loaded.map(xyz).squeeze(), transform(xyz), atol=1e-3)
    back = io.read_transform(tmp_path / name, kind, fixed=fixed, moving=moving)
    assert isinstance(back, Affine)
    np.testing.assert_allclose(back.matrix, transform.matrix, atol=1e-8)


@pairs
def test_lta_files_that_nitransforms_wrote(tmp_path: Path, pair: tuple[Grid, Grid]) -> None:
    fixed, moving = pair
    transform = affine(fixed, moving)
    images = [saved(volume(grid), tmp_path / f"{n}.nii.gz") for n, grid in enumerate(pair)]
    theirs = nitransforms.linear.Affine(transform.matrix, reference=str(images[0]))
    theirs.to_filename(str(tmp_path / "t.lta"), fmt="fs", moving=nib.load(images[1]))
    back = io.read_transform(tmp_path / "t.lta", fixed=fixed, moving=moving)
    np.testing.assert_allclose(back.matrix, transform.matrix, atol=1e-5)


def test_geometries_in_an_lta(tmp_path: Path) -> None:
    """Source is the moving image, as for FreeSurfer; nitransforms reads where both lie."""
    io.write_transform(affine(LEFT, RIGHT), tmp_path / "t.lta")
    theirs = FSLinearTransform.from_filename(tmp_path / "t.lta")
    for name, grid in {"src": RIGHT, "dst": LEFT}.items():
        np.testing.assert_allclose(theirs[name].as_affine(), grid.affine, atol=1e-4)


def test_an_lta_of_voxels_and_its_own_geometry(tmp_path: Path) -> None:
    transform = affine(LEFT, RIGHT)
    io.write_transform(transform, tmp_path / "t.lta")
    assert io.read_transform(tmp_path / "t.lta").moving_grid.same_as(RIGHT)  # type: ignore[union-attr]
    text = (tmp_path / "t.lta").read_text()
    matrix = np.linalg.inv(transform.matrix)
    between = LEFT.inverse_affine @ matrix @ RIGHT.affine
    rows = ["1 4 4", *(" ".join(f"{v:.12f}" for v in row) for row in between)]
    lines = text.splitlines()
    at = lines.index("1 4 4")
    (tmp_path / "v.lta").write_text("\n".join(["type = 0", *lines[1:at], *rows, *lines[at + 5 :]]) + "\n")
    np.testing.assert_allclose(io.read_transform(tmp_path / "v.lta").matrix, transform.matrix, atol=1e-8)
    unknown = (tmp_path / "v.lta").read_text().replace("valid = 1", "valid = 0")
    (tmp_path / "u.lta").write_text(unknown)
    with pytest.raises(InputError, match="only together with both images"):
        io.read_transform(tmp_path / "u.lta")


# -- displacements -----------------------------------------------------------------------------------------------


def applywarp(warp: Path, fixed: Grid, moving: Image, absolute: bool = False) -> np.ndarray:
    """FSL's applywarp in closed form: everything in voxel sizes, x counted to the left."""
    d = np.asarray(nib.load(warp).dataobj, np.float64)
    x = np.stack(np.indices(fixed.shape), -1) * fixed.spacing
    if np.linalg.det(fixed.affine) > 0:
        x[..., 0] = (fixed.shape[0] - 1) * fixed.spacing[0] - x[..., 0]
    there = d if absolute else x + d
    if np.linalg.det(moving.grid.affine) > 0:
        there[..., 0] = (moving.grid.shape[0] - 1) * moving.grid.spacing[0] - there[..., 0]
    return map_coordinates(moving.data[0].numpy(), np.moveaxis(there / moving.grid.spacing, -1, 0), order=1)


@pairs
@kinds
def test_fsl_warps(tmp_path: Path, pair: tuple[Grid, Grid], make: Any) -> None:
    fixed, moving = pair
    transform = make(fixed, moving)
    io.write_transform(transform, tmp_path / "w.nii.gz", "fsl")
    assert_same_warp(applywarp(tmp_path / "w.nii.gz", fixed, volume(moving)), transform, volume(moving))
    relative = nib.load(tmp_path / "w.nii.gz")
    assert int(relative.header["intent_code"]) == 2006
    x = np.stack(np.indices(fixed.shape), -1) * fixed.spacing
    if np.linalg.det(fixed.affine) > 0:
        x[..., 0] = (fixed.shape[0] - 1) * fixed.spacing[0] - x[..., 0]
    nib.save(nib.Nifti1Image(relative.get_fdata() + x, fixed.affine), tmp_path / "a.nii.gz")
    for name in ("w.nii.gz", "a.nii.gz"):
        back = io.read_transform(tmp_path / name, "fsl", fixed=fixed, moving=moving)
        np.testing.assert_allclose(back(world(fixed)), transform(world(fixed)), atol=1e-3)


@pairs
@kinds
def test_torch_grids(tmp_path: Path, pair: tuple[Grid, Grid], make: Any) -> None:
    fixed, moving = pair
    transform = make(fixed, moving)
    io.write_transform(transform, tmp_path / "g.npz")
    archive = np.load(tmp_path / "g.npz")
    image = volume(moving)
    grid = torch.from_numpy(archive["grid"])[None]
    theirs = torch.nn.functional.grid_sample(image.data[None], grid, align_corners=False)[0, 0]
    assert_same_warp(theirs.numpy(), transform, image)
    back = io.read_transform(tmp_path / "g.npz")
    assert back.fixed_grid is not None
    assert back.fixed_grid.same_as(fixed)
    np.testing.assert_allclose(back(world(fixed)), transform(world(fixed)), atol=1e-3)
    np.savez(tmp_path / "alone.npz", grid=archive["grid"])
    alone = io.read_transform(tmp_path / "alone.npz", fixed=fixed, moving=moving)
    np.testing.assert_allclose(alone(world(fixed)), transform(world(fixed)), atol=1e-3)


@pairs
@kinds
@pytest.mark.parametrize("name", ["d.nii.gz", "d.npz"])
def test_learn2reg_displacements(tmp_path: Path, pair: tuple[Grid, Grid], make: Any, name: str) -> None:
    fixed, moving = pair
    transform = make(fixed, moving)
    io.write_transform(transform, tmp_path / name, "learn2reg")
    stored = np.load(tmp_path / name)["arr_0"] if name.endswith("npz") else nib.load(tmp_path / name).get_fdata()
    places = np.indices(fixed.shape) + np.moveaxis(stored, -1, 0)
    assert_same_warp(map_coordinates(volume(moving).data[0].numpy(), places, order=1), transform, volume(moving))
    back = io.read_transform(tmp_path / name, "learn2reg", fixed=fixed, moving=moving)
    np.testing.assert_allclose(back(world(fixed)), transform(world(fixed)), atol=2e-3)


@pairs
@kinds
@pytest.mark.parametrize("name", ["w.nii.gz", "w.nrrd", "w.mha", "w.h5"])
def test_itk_resamples_with_every_file(tmp_path: Path, pair: tuple[Grid, Grid], make: Any, name: str) -> None:
    """ANTs' warp, 3D Slicer's grid transform and ITK's composite, applied by SimpleITK."""
    fixed, moving = pair
    transform = make(fixed, moving)
    io.write_transform(transform, tmp_path / name)
    images = [saved(volume(grid), tmp_path / f"{n}.nii.gz") for n, grid in enumerate(pair)]
    if name == "w.h5":
        theirs = sitk.ReadTransform(str(tmp_path / name))
    else:
        theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / name), sitk.sitkVectorFloat64))
    warped = sitk.Resample(sitk.ReadImage(str(images[1])), sitk.ReadImage(str(images[0])), theirs)
    assert_same_warp(sitk.GetArrayFromImage(warped).T, transform, volume(moving))


def test_slicer_finds_the_space_in_a_grid_transform(tmp_path: Path) -> None:
    io.write_transform(bent(LEFT, RIGHT), tmp_path / "w.nrrd")
    head = (tmp_path / "w.nrrd").read_bytes()[:1000].decode("latin-1")
    assert "space: left-posterior-superior" in head
    assert "kinds: vector domain domain domain" in head


# -- the commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both images, and a transform from fixed to moving points."""
    for name, grid in {"fixed": LEFT, "moving": RIGHT}.items():
        saved(volume(grid), tmp_path / f"{name}.nii.gz")
    io.write_transform(bent(LEFT, RIGHT), tmp_path / "forward.h5")
    return tmp_path


def run(folder: Path, *words: str) -> int:
    return main(
        [str(folder / word) if (folder / word).parent.is_dir() and "." in word else word for word in words]
    )


IMAGES = ("--fixed", "fixed.nii.gz", "--moving", "moving.nii.gz")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("o.npz", None), ("o.nii.gz", None), ("o.nii.gz", "fsl"), ("o.npz", "learn2reg"), ("o.nrrd", None)],
)
def test_convert_there_and_back(folder: Path, name: str, kind: str | None) -> None:
    transform = bent(LEFT, RIGHT)
    to, source = (["--to", kind], ["--kind", kind]) if kind else ([], [])
    assert run(folder, "convert", "forward.h5", "-o", name, *IMAGES, *to) == 0
    assert run(folder, "convert", name, "-o", "back.h5", *IMAGES, *source) == 0
    inner = world(LEFT)[2:-2, 2:-2, 2:-2]
    np.testing.assert_allclose(io.read_transform(folder / "back.h5")(inner), transform(inner), atol=2e-3)


def test_convert_takes_the_grids_from_the_record(folder: Path) -> None:
    def told(grid: Grid) -> str:
        return f'{{"shape": {list(grid.shape)}, "affine": {grid.affine.tolist()}}}'

    record = f'{{"inputs": {{"fixed": {told(LEFT)}, "moving": [{told(RIGHT)}]}}}}'
    (folder / "record.json").write_text(record)
    assert run(folder, "convert", "forward.h5", "-o", "a.nii.gz", "--to", "fsl") == 0
    assert io.read(folder / "a.nii.gz").grid.same_as(LEFT)
    io.write_transform(affine(RIGHT, LEFT), folder / "inverse.h5")
    assert run(folder, "convert", "inverse.h5", "-o", "b.lta") == 0
    assert io.read_transform(folder / "b.lta").fixed_grid.same_as(RIGHT)  # type: ignore[union-attr]


def test_invert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "invert", "forward.h5", "-o", "inverse.h5") == 0
    out = capsys.readouterr().out
    assert "affine map, displacements on" in out
    assert "inverse consistent to 0.00" in out
    xyz = world(LEFT)[4:-4, 4:-4, 4:-4]
    there = bent(LEFT, RIGHT)(xyz)
    np.testing.assert_allclose(io.read_transform(folder / "inverse.h5")(there), xyz, atol=0.1)


def test_compose(folder: Path) -> None:
    first, second = affine(LEFT, RIGHT), Affine.translation((1, 2, 3))
    io.write_transform(first, folder / "a.tfm")
    io.write_transform(second, folder / "b.tfm")
    assert run(folder, "compose", "a.tfm", "b.tfm", "forward.h5", "-o", "c.h5") == 0
    xyz = world(LEFT)
    expected = bent(LEFT, RIGHT)(second(first(xyz)))
    np.testing.assert_allclose(io.read_transform(folder / "c.h5")(xyz), expected, atol=1e-3)
    assert run(folder, "compose", "a.tfm", "b.tfm", "-o", "d.lta", *IMAGES) == 0
    np.testing.assert_allclose(io.read_transform(folder / "d.lta")(xyz), second(first(xyz)), atol=1e-6)
    assert run(folder, "compose", "a.tfm", "-o", "d.lta") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "forward.h5", "-o", "o.mat"), r".mat files hold one affine map"),
        (("convert", "forward.h5", "-o", "o.lta", *IMAGES), "an LTA file holds one affine map, not a Chain"),
        (("convert", "forward.h5", "-o", "o.nii.gz"), "tell the grid of the fixed image"),
        (("convert", "forward.h5", "-o", "o.nii.gz", "--to", "fsl"), "only together with both images"),
        (("convert", "forward.h5", "-o", "o.npz", "--to", "learn2reg"), "only with the fixed image"),
        (("convert", "forward.h5", "-o", "o.h5", "--to", "fsl"), "must be one of .mat, .txt, .nii, .nii.gz"),
        (("convert", "flirt.mat", "-o", "o.h5"), "it is a matrix of FSL's flirt; say so"),
        (("convert", "flirt.mat", "-o", "o.h5", "--kind", "fsl"), "only together with both images"),
    ],
)
def test_what_cannot_be_converted(
    folder: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savetxt(folder / "flirt.mat", np.eye(4))
    before = set(folder.iterdir())
    assert run(folder, *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert set(folder.iterdir()) == before


def test_a_lone_field_needs_no_image(folder: Path) -> None:
    io.write_transform(Warp().field(RIGHT), folder / "f.h5")
    assert run(folder, "convert", "f.h5", "-o", "f.nrrd") == 0
    assert isinstance(io.read_transform(folder / "f.nrrd"), DisplacementField)
