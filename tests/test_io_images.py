"""Volumes from and to files: geometry against other tools, values by round trip, bad files by message."""

import contextlib
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.preprocess import check_registrable
from crossmorph.space import Grid

DTYPES = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
SUFFIXES = [".nii", ".nii.gz", ".mha", ".nrrd"]
TILT = np.array([[0.8, -0.6, 0.0], [0.48, 0.64, -0.6], [0.36, 0.48, 0.8]])  # a rotation
OBLIQUE = np.block([[TILT * [0.7, 1.5, 4.0], np.array([[12.0], [-30.0], [55.5]])], [np.zeros(3), np.ones(1)]])
MIRRORED = OBLIQUE @ np.diag([-1.0, 1.0, 1.0, 1.0])
SHEARED = OBLIQUE @ np.array([[1, 0.3, 0.1, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any invertible axes: turned, mirrored, anisotropic, sheared."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    shear = np.eye(3) + np.triu(rng.uniform(-0.3, 0.3, (3, 3)), 1) * draw(st.booleans())
    affine = np.eye(4)
    affine[:3, :3] = turn @ shear @ np.diag(rng.uniform(0.3, 5, 3))
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Values that both the type and float32 hold exactly."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(np.float32).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(max(limits.min, -(2**23)), min(limits.max, 2**23), shape, endpoint=True).astype(dtype)


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray = OBLIQUE, **header: Any) -> Path:
    image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


# -- round trips -------------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(2, 6)] * 3),
    channels=st.sampled_from([1, 2, 3, 5]),
    dtype=st.sampled_from(DTYPES),
    suffix=st.sampled_from(SUFFIXES),
    affine=affines(),
)
def test_images_come_back_as_they_were(
    tmp_path: Path, shape: tuple[int, int, int], channels: int, dtype: str, suffix: str, affine: np.ndarray
) -> None:
    image = Image.from_array(numbers((channels, *shape), dtype), affine)
    path = tmp_path / f"image{suffix}"
    io.write(image, path)
    back = io.read(path)
    assert torch.equal(back.data, image.data)
    assert back.dtype == image.dtype == np.dtype(dtype)
    assert back.grid.same_as(image.grid)
    assert back.valid.all()
    assert (back.name, back.source) == ("image", path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "float32"])
def test_labels_keep_their_ids_exactly(tmp_path: Path, suffix: str, dtype: str) -> None:
    ids = np.zeros((3, 4, 5), dtype)
    top = {"uint8": 255, "int16": 2035, "int32": 2**24 + 1, "int64": 2**40 + 1, "float32": 4000}[dtype]
    ids[1, 2, 3], ids[0, 0, 0] = top, 7
    io.write(Labels.from_array(ids, MIRRORED), tmp_path / f"a{suffix}")
    back = io.read_labels(tmp_path / f"a{suffix}")
    assert back.ids == [7, top]
    assert int(back.data[1, 2, 3]) == top
    assert back.dtype == np.dtype(dtype)
    assert back.grid.same_as(Grid((3, 4, 5), MIRRORED))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whole_numbers_are_rounded_and_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([-40000, -1.6, 0.4, 0.6, 2.5, 40000, 3e9, 0], np.float32).reshape(2, 2, 2)
    for dtype, expected in {
        "int16": [-32768, -2, 0, 1, 2, 32767, 32767, 0],
        "uint8": [0, 0, 0, 1, 2, 255, 255, 0],
        "int32": [-40000, -2, 0, 1, 2, 40000, 2**31 - 1, 0],
        "uint64": [0, 0, 0, 1, 2, 40000, 3_000_000_000, 0],
    }.items():
        io.write(Image.from_array(values, np.eye(4), dtype=np.dtype(dtype)), tmp_path / f"a{suffix}")
        stored = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"a{suffix}"))).T
        assert stored.dtype == np.dtype(dtype)
        assert stored.ravel().tolist() == expected


def test_masks_are_written_as_bytes(tmp_path: Path) -> None:
    mask = np.arange(24).reshape(2, 3, 4) % 5 == 0
    io.write(Image.from_array(mask, OBLIQUE), tmp_path / "mask.nii.gz")
    stored = nib.load(tmp_path / "mask.nii.gz")
    assert stored.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(stored.dataobj), mask)


def test_the_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    image = Image.from_array(numbers((4, 5, 6), "int16"), OBLIQUE)
    for name in ("a.nii.gz", "b.nii.gz"):
        io.write(image, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


# -- geometry against other tools --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("affine", [OBLIQUE, MIRRORED], ids=["oblique", "mirrored"])
def test_simpleitk_sees_written_voxels_where_we_do(tmp_path: Path, suffix: str, affine: np.ndarray) -> None:
    image = Image.from_array(numbers((4, 5, 6), "int16"), affine)
    io.write(image, tmp_path / f"a{suffix}")
    theirs = sitk.ReadImage(str(tmp_path / f"a{suffix}"))
    for index in [(0, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, 5), (3, 4, 5)]:
        point = np.array(theirs.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose(point, image.grid.to_world(np.array(index, float)), atol=1e-3)
        assert theirs[index] == image.data[0][index]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_voxels_that_simpleitk_wrote_are_where_it_says(tmp_path: Path, suffix: str) -> None:
    theirs = sitk.GetImageFromArray(numbers((6, 5, 4), "int16"))
    theirs.SetSpacing((0.7, 1.5, 4.0))
    theirs.SetOrigin((-12.0, 30.0, 55.5))
    theirs.SetDirection(TILT.ravel().tolist())
    sitk.WriteImage(theirs, str(tmp_path / f"a{suffix}"))
    image = io.read(tmp_path / f"a{suffix}")
    for index in [(0, 0, 0), (3, 4, 5), (1, 0, 2)]:
        point = np.array(theirs.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose(image.grid.to_world(np.array(index, float)), point, atol=1e-3)
        assert theirs[index] == image.data[0][index]


def test_both_forms_are_written_and_the_qform_only_where_it_can(tmp_path: Path) -> None:
    for affine, code in ((OBLIQUE, 2), (MIRRORED, 2), (SHEARED, 0)):
        io.write(Image.from_array(numbers((4, 5, 6), "int16"), affine), tmp_path / "a.nii")
        header = nib.load(tmp_path / "a.nii").header
        assert (int(header["sform_code"]), int(header["qform_code"])) == (2, code)
        np.testing.assert_allclose(header.get_sform(), affine, atol=1e-4)
        np.testing.assert_allclose(header.get_zooms(), np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-6)
        assert header.get_xyzt_units()[0] == "mm"
        if code:
            np.testing.assert_allclose(header.get_qform(), affine, atol=1e-4)


def test_sform_wins_and_the_difference_is_told_in_mm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = nib.Nifti1Image(numbers((4, 5, 6), "int16"), None)
    shifted = OBLIQUE.copy()
    shifted[:3, 3] += [3, 0, 4]
    image.set_sform(OBLIQUE, 1)
    image.set_qform(shifted, 1)
    nib.save(image, tmp_path / "a.nii")
    read = io.read(tmp_path / "a.nii")
    assert read.grid.same_as(Grid((4, 5, 6), OBLIQUE))
    assert read.notes == ("sform and qform differ by up to 5.0 mm; the sform was used",)
    assert "5.0 mm" in caplog.text


def test_qform_is_used_alone_and_without_both_the_guess_is_noted(tmp_path: Path) -> None:
    image = nib.Nifti1Image(numbers((4, 5, 6), "int16"), None)
    image.set_qform(MIRRORED, 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "q.nii")
    assert io.read(tmp_path / "q.nii").grid.same_as(Grid((4, 5, 6), MIRRORED))
    assert io.read(tmp_path / "q.nii").notes == ()
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "none.nii")
    guessed = io.read(tmp_path / "none.nii")
    np.testing.assert_allclose(guessed.grid.spacing, [0.7, 1.5, 4.0], rtol=1e-6)
    np.testing.assert_allclose(guessed.grid.center, 0, atol=4)
    assert "neither sform nor qform" in guessed.notes[0]


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0), ("unknown", 1.0)])
def test_units_become_millimetres(tmp_path: Path, unit: str, factor: float) -> None:
    image = nib.Nifti1Image(numbers((4, 5, 6), "int16"), OBLIQUE)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    read = io.read(tmp_path / "a.nii")
    np.testing.assert_allclose(read.grid.affine[:3], OBLIQUE[:3] * factor, rtol=1e-5)
    assert bool(read.notes) == (factor != 1)


def test_a_minus_in_pixdim_does_not_matter_beside_an_sform(tmp_path: Path) -> None:
    path = patched(tmp_path / "a.nii", 80, [-0.7], "sform")
    assert io.read(path).grid.same_as(Grid((4, 5, 6), OBLIQUE))


def test_mgz_agrees_with_nibabel(tmp_path: Path) -> None:
    data = numbers((4, 5, 6), "float32")
    nib.save(nib.MGHImage(data, OBLIQUE.astype(np.float32)), tmp_path / "a.mgz")
    read = io.read(tmp_path / "a.mgz")
    assert read.grid.same_as(Grid((4, 5, 6), OBLIQUE))
    np.testing.assert_array_equal(read.data[0].numpy(), data)


# -- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "slope", "inter", "kept"),
    [
        ("uint8", 1, -1024, "int16"),
        ("int16", 2, 0, "int32"),
        ("uint8", 7.1, -1024, "float32"),
        ("int8", 1, 3, "int16"),
    ],
)
def test_scaled_integers(tmp_path: Path, stored: str, slope: float, inter: float, kept: str) -> None:
    raw = numbers((4, 5, 6), stored)
    image = nib.Nifti1Image(raw, np.eye(4))
    image.header.set_slope_inter(slope, inter)
    nib.save(image, tmp_path / "a.nii.gz")
    read = io.read(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read.data[0].numpy(), raw * float(np.float32(slope)) + inter, rtol=1e-6, atol=1e-3)
    assert read.dtype == np.dtype(kept)


def test_frames_colours_and_spare_axes(tmp_path: Path) -> None:
    frames = numbers((4, 5, 6, 3), "int16")
    path = save_nifti(tmp_path / "frames.nii.gz", frames)
    np.testing.assert_array_equal(io.read(path).data.numpy(), np.moveaxis(frames, -1, 0))
    assert io.read(path).notes == ("3 frames or channels",)
    np.testing.assert_array_equal(io.read(path, frame=2).data[0].numpy(), frames[..., 2])
    with pytest.raises(InputError, match=r"frame must be from 0 to 2, not 3"):
        io.read(path, frame=3)
    with pytest.raises(InputError, match="one frame; this file has 3"):
        io.read_labels(path)

    spare = save_nifti(tmp_path / "spare.nii.gz", frames[..., :1, None])
    assert tuple(io.read(spare).data.shape) == (1, 4, 5, 6)
    channels = save_nifti(tmp_path / "channels.nii.gz", frames[..., None, :])
    np.testing.assert_array_equal(io.read(channels).data.numpy(), np.moveaxis(frames, -1, 0))

    colours = np.zeros((4, 5, 6), [(c, "u1") for c in "RGB"])
    colours["G"] = numbers((4, 5, 6), "uint8")
    read = io.read(save_nifti(tmp_path / "rgb.nii.gz", colours))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read.data[1].numpy(), colours["G"])
    assert not read.data[[0, 2]].any()


def test_itk_series_and_vectors_are_channels(tmp_path: Path) -> None:
    frames = [sitk.GetImageFromArray(numbers((6, 5, 4), "int16", n)) for n in range(3)]
    sitk.WriteImage(sitk.JoinSeries(frames), str(tmp_path / "series.mha"))
    sitk.WriteImage(sitk.Compose(frames), str(tmp_path / "vectors.nrrd"))
    expected = np.stack([sitk.GetArrayFromImage(f).T for f in frames])
    for name in ("series.mha", "vectors.nrrd"):
        np.testing.assert_array_equal(io.read(tmp_path / name).data.numpy(), expected)


def test_values_that_are_not_finite_are_masked_and_counted(tmp_path: Path) -> None:
    data = numbers((4, 5, 6), "float32")
    data[0, 0, 0], data[1, 2, 3], data[3, 4, 5] = np.nan, np.inf, -np.inf
    read = io.read(save_nifti(tmp_path / "a.nii.gz", data))
    assert int((~read.valid).sum()) == 3
    assert torch.isfinite(read.data).all()
    assert read.notes == ("3 voxels are NaN or infinite and were masked",)


# -- bad files ---------------------------------------------------------------------------------------------------


def mha(path: Path, spacing: str = "1 1 1", matrix: str = "1 0 0 0 1 0 0 0 1", size: str = "4 4 4") -> Path:
    header = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = {matrix}\nOffset = 0 0 0\n"
        f"ElementSpacing = {spacing}\nDimSize = {size}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    )
    path.write_bytes(header.encode() + bytes(range(64)))
    return path


def truncated(path: Path) -> Path:
    data = np.random.default_rng(0).integers(0, 30000, (20, 20, 20)).astype(np.int16)
    whole = save_nifti(path, data).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def patched(path: Path, offset: int, value: Any, form: str = "qform") -> Path:
    """A NIfTI with one of the two forms and some header bytes replaced."""
    image = nib.Nifti1Image(numbers((4, 5, 6), "int16"), None)
    getattr(image, f"set_{form}")(OBLIQUE, 1)
    nib.save(image, path)
    raw, new = bytearray(path.read_bytes()), np.asarray(value, np.float32).tobytes()
    raw[offset : offset + len(new)] = new
    path.write_bytes(raw)
    return path


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def displacement(path: Path) -> Path:
    image = nib.Nifti1Image(np.zeros((4, 5, 6, 1, 3), np.float32), OBLIQUE)
    image.header.set_intent("vector")
    nib.save(image, path)
    return path


def flat(path: Path) -> Path:
    sitk.WriteImage(sitk.Image(4, 5, sitk.sitkUInt8), str(path))
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "none.nii.gz", "does not exist"),
    "folder": (lambda d: d, "it is a folder without DICOM images"),
    "empty": (lambda d: text(d / "a.nii.gz", b""), "cannot be read as an image"),
    "text as gzip": (lambda d: text(d / "a.nii.gz", b"hello"), "not a gzip file"),
    "text in gzip": (lambda d: text(d / "a.nii.gz", gzip.compress(b"hello" * 200)), "cannot be read as an image"),
    "text": (lambda d: text(d / "a.nii", b"hello"), "cannot be read as an image"),
    "text as mha": (lambda d: text(d / "a.mha", b"hello"), "cannot be read as an image"),
    "unknown ending": (lambda d: text(d / "a.docx", b"hello"), "cannot be read as an image"),
    "truncated gzip": (lambda d: truncated(d / "a.nii.gz"), "cut short"),
    "truncated nii": (lambda d: truncated(d / "a.nii"), "cut short"),
    "truncated mha": (lambda d: mha(d / "a.mha", size="4 4 8"), "cut short"),
    "zero pixdim": (
        lambda d: patched(d / "a.nii", 84, [0]),
        r"voxel size \(pixdim\) is \[.*, 0.0, 4.0\]",
    ),
    "negative pixdim": (lambda d: patched(d / "a.nii", 80, [-1]), "must be positive"),
    "infinite pixdim": (lambda d: patched(d / "a.nii", 80, [np.inf]), "must be positive"),
    "zero pixdim beside an sform": (lambda d: patched(d / "a.nii", 84, [0], "sform"), "must be positive"),
    "zero spacing": (lambda d: mha(d / "a.mha", spacing="1 0 1"), "Zero-valued spacing"),
    "negative spacing": (lambda d: mha(d / "a.mha", spacing="1 1 -2"), "voxel size is 1 1 -2"),
    "nan spacing": (lambda d: mha(d / "a.mha", spacing="nan 1 1"), "spacing"),
    "singular mha": (lambda d: mha(d / "a.mha", matrix="1 0 0 1 0 0 0 0 1"), "(?i)direction, determinant is 0"),
    "singular sform": (lambda d: patched(d / "a.nii", 312, [0, 0, 0, 1], "sform"), "affine is singular"),
    "nan sform": (lambda d: patched(d / "a.nii", 280, [np.nan], "sform"), "finite 4x4 affine"),
    "2-D": (lambda d: save_nifti(d / "a.nii", numbers((4, 5), "int16"), np.eye(4)), r"2-D \(4, 5\)"),
    "2-D itk": (lambda d: flat(d / "a.mha"), r"2-D \(4, 5\)"),
    "complex": (lambda d: save_nifti(d / "a.nii", np.ones((4, 5, 6), np.complex64)), "complex"),
    "displacement": (lambda d: displacement(d / "a.nii.gz"), "where a transform is asked for"),
    "five axes": (lambda d: save_nifti(d / "a.nii", numbers((4, 5, 6, 2, 3), "int16")), "at most four axes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_give_one_message_with_their_path(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        io.read(path)
    assert str(path) in str(caught.value)


def test_label_maps_hold_whole_numbers(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", np.full((4, 5, 6), 1.5, np.float32))
    with pytest.raises(InputError, match=r"a\.nii: .*whole numbers"):
        io.read_labels(path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read anything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = mha(tmp_path / "a.mha")
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        io.read(path)


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_are_read_or_refused(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    path = tmp_path / f"whole{suffix}"
    if not path.exists():
        io.write(Image.from_array(numbers((4, 5, 6), "int16"), OBLIQUE), path)
    raw = bytearray(path.read_bytes())
    header = min(len(raw), 352)
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), max_size=4)
    ):
        raw[place] = value
    damaged = tmp_path / f"damaged{suffix}"
    damaged.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    with contextlib.suppress(InputError):  # any other exception fails the test
        assert torch.isfinite(io.read(damaged).data).all()


# -- writing -----------------------------------------------------------------------------------------------------


def test_unknown_endings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    image = Image.from_array(numbers((4, 5, 6), "int16"), OBLIQUE)
    for name in ("a.jpg", "a.mhd", "a", "a.csv"):
        with pytest.raises(InputError, match=r"the ending must be one of \.nii, \.nii\.gz, \.mha, \.nrrd"):
            io.write(image, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    resource = pytest.importorskip("resource")
    image = Image.from_array(np.random.default_rng(0).standard_normal((40, 40, 40)), OBLIQUE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the system then refuses larger files
    try:
        with pytest.raises(InputError, match=rf"cannot write .*a{suffix}"):
            io.write(image, tmp_path / f"a{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# -- what can be registered --------------------------------------------------------------------------------------


def test_images_with_nothing_to_align_are_refused() -> None:
    values = numbers((6, 6, 6), "float32")
    check_registrable(Image.from_array(values, np.eye(4)))
    for bad, message in (
        (values[:, :, :1], "is 2-D"),
        (np.full_like(values, np.nan), "no valid voxel"),
        (np.full_like(values, 3), "constant: every valid voxel is 3"),
        (np.where(np.arange(6) < 1, values, np.nan), "only 36 valid voxels"),
    ):
        with pytest.raises(InputError, match=message):
            check_registrable(Image.from_array(bad, np.eye(4)))


# -- real files --------------------------------------------------------------------------------------------------

REAL = {  # shape, axes, channels, type, spacing, masked voxels: read off with nibabel and SimpleITK
    "asl_4d.nii.gz": ((52, 68, 20), "RAS", 10, "float32", (3, 3, 6), 0),
    "brain.mgz": ((256, 256, 256), "LIA", 1, "uint8", (1, 1, 1), 0),
    "infinite_mtr.nii.gz": ((40, 40, 5), "LAS", 1, "float32", (0.84375, 0.84375, 17), 633),
    "oblique_adc.mha": ((116, 114, 31), "LPS", 1, "uint16", (1.75, 1.75, 3.3), 0),
    "shear.nii.gz": ((306, 422, 54), "RAS", 1, "float32", (0.482, 0.482, 2.37), 0),
    "signed_overshoot_epi.nii.gz": ((64, 64, 36), "RAS", 1, "float32", (3, 3, 3.6), 0),
    "slab1_T1.nii.gz": ((217, 18, 182), "PSR", 1, "float32", (1, 1, 1), 0),
    "thick17mm_mt0.nii.gz": ((40, 40, 5), "LAS", 1, "int16", (0.84375, 0.84375, 17), 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_odd_files(data_dir: Path, name: str) -> None:
    shape, axes, channels, dtype, spacing, masked = REAL[name]
    image = io.read(data_dir / "robustness" / name)
    assert (image.grid.shape, image.grid.axcodes, image.channels) == (shape, axes, channels)
    assert image.dtype == np.dtype(dtype)
    np.testing.assert_allclose(image.grid.spacing, spacing, rtol=0.02)
    assert int((~image.valid).sum()) == masked
    check_registrable(image.frame(0))


def test_the_real_sheared_file_keeps_its_shear(data_dir: Path) -> None:
    path = data_dir / "robustness" / "shear.nii.gz"
    image = io.read(path)
    np.testing.assert_allclose(image.grid.affine, nib.load(path).affine, atol=1e-4)
    assert image.grid.shear_deg == pytest.approx(18.5, abs=0.5)
    assert image.notes == ("sform and qform differ by up to 35.8 mm; the sform was used",)


def test_real_axis_orders_hold_one_volume(data_dir: Path) -> None:
    """Six storage orders of one volume: the same world point holds the same value."""
    images = [io.read(p) for p in sorted((data_dir / "robustness").glob("orient_*.nii.gz"))]
    assert len({image.grid.axcodes for image in images}) == len(images) == 6
    points = images[0].grid.center + np.random.default_rng(0).uniform(-40, 40, (200, 3))
    values = []
    for image in images:
        i, j, k = np.rint(image.grid.to_voxel(points)).astype(int).T
        values.append(image.data[0].numpy()[i, j, k])
    for other in values[1:]:
        assert np.corrcoef(values[0], other)[0, 1] > 0.95


def test_real_labels_stored_as_floats(data_dir: Path) -> None:
    labels = io.read_labels(data_dir / "robustness" / "slab1_labels.nii.gz")
    assert labels.dtype == np.float32
    assert not labels.data.is_floating_point()
    assert len(labels.ids) > 3


def test_long_free_text_in_a_nrrd_header_is_read(tmp_path: Path) -> None:
    """Only of fields that mean something must the lines be short."""
    image, path = Image.from_array(np.ones((3, 4, 5), np.float32), Grid((3, 4, 5), np.eye(4))), tmp_path / "a.nrrd"
    io.write(image, path)
    magic, rest = path.read_bytes().split(b"\n", 1)
    text = b"word " * 400
    lines = [magic, b"# " + text, b"content: " + text, b"Segment0_Terminology:=" + text, rest]
    path.write_bytes(b"\n".join(lines))
    assert torch.equal(io.read(path).data, image.data)
    path.write_bytes(b"\n".join([magic, b"old min: " + text, rest]))
    with pytest.raises(InputError, match="too long for a field"):
        io.read(path)
