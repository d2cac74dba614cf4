"""DICOM series written by pydicom: geometry against ITK's reader, and every fault in words."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    generate_uid,
)

from crossmorph import io
from crossmorph.errors import InputError

ROW, COLUMN = np.array([0.8, 0.48, 0.36]), np.array([-0.6, 0.64, 0.48])
NORMAL = np.cross(ROW, COLUMN)
ORIGIN = np.array([12.0, -30.0, 55.5])
COUNT, ROWS, COLUMNS = 6, 5, 4
SERIES = generate_uid()
VALUES = np.random.default_rng(0).integers(0, 2000, (COUNT, ROWS, COLUMNS)).astype(np.uint16)


def write(path: Path, n: int, **changes: Any) -> Dataset:
    """Slice n of an oblique CT with anisotropic voxels of 0.7 x 1.5 x 4 mm, with some elements changed."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    elements: dict[str, Any] = {
        "SOPInstanceUID": generate_uid(),
        "SeriesInstanceUID": SERIES,
        "SeriesDescription": "thorax",
        "Modality": "CT",
        "InstanceNumber": COUNT - n,
        "ImageOrientationPatient": [*ROW, *COLUMN],
        "ImagePositionPatient": (ORIGIN + 4.0 * n * NORMAL).round(6).tolist(),
        "PixelSpacing": [1.5, 0.7],
        "Rows": ROWS, "Columns": COLUMNS, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0,
        "RescaleSlope": 1, "RescaleIntercept": -1024,
        "PixelData": VALUES[n % COUNT].tobytes(),
    }  # fmt: skip
    for name, value in (elements | changes).items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names in another order than the slices, and a file that is no DICOM."""
    (tmp_path / "ct").mkdir()
    for n in range(COUNT):
        write(tmp_path / "ct" / f"IM{(n * 5) % 7}.dcm", n)
    (tmp_path / "ct" / "readme.txt").write_text("hello")
    return tmp_path / "ct"


def test_voxels_lie_where_itk_puts_them(folder: Path) -> None:
    image = io.read(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    theirs = reader.Execute()
    assert image.grid.shape == theirs.GetSize() == (COLUMNS, ROWS, COUNT)
    for index in [(0, 0, 0), (3, 0, 0), (0, 4, 0), (3, 4, 5)]:
        point = np.array(theirs.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose(image.grid.to_world(np.array(index, float)), point, atol=1e-3)
        assert image.data[0][index] == theirs[index]
    assert image.dtype == np.int16
    assert image.notes == ()
    assert image.name == "ct"


def test_a_file_stands_for_its_series(folder: Path) -> None:
    other = generate_uid()
    for n in range(3):
        write(folder / f"other{n}.dcm", n, SeriesInstanceUID=other, SeriesDescription="scout")
    assert io.read(folder / "IM0.dcm").grid.shape == (COLUMNS, ROWS, COUNT)
    assert io.read(folder / "other0.dcm").grid.shape == (COLUMNS, ROWS, 3)
    shutil.copy(folder / "other0.dcm", folder / "noending")
    assert io.read(folder / "noending").grid.shape == (COLUMNS, ROWS, 3)


def test_a_tilted_gantry_becomes_shear(folder: Path) -> None:
    for n, file in enumerate(sorted(folder.glob("*.dcm"), key=lambda f: -pydicom.dcmread(f).InstanceNumber)):
        write(file, n, ImagePositionPatient=(ORIGIN + n * (4.0 * NORMAL + 0.7 * COLUMN)).round(6).tolist())
    image = io.read(folder)
    assert image.grid.shear_deg == pytest.approx(np.degrees(np.arctan(0.7 / 4)), abs=0.01)
    assert "gantry was tilted by 9.9 degrees" in image.notes[0]
    last = (ORIGIN + 5 * (4.0 * NORMAL + 0.7 * COLUMN)) * [-1, -1, 1]
    np.testing.assert_allclose(image.grid.to_world(np.array([0.0, 0, 5])), last, atol=1e-3)


def test_repeated_files_are_left_out(folder: Path) -> None:
    shutil.copy(folder / "IM0.dcm", folder / "copy.dcm")
    image = io.read(folder)
    assert image.grid.shape == (COLUMNS, ROWS, COUNT)
    assert image.notes == ("1 files are there twice and were left out",)


def test_files_without_an_image_are_told(folder: Path) -> None:
    write(folder / "report.dcm", 0, Rows=None, Columns=None, PixelData=None)
    assert io.read(folder).notes == ("1 DICOM files without an image, such as report.dcm, were left out",)


def test_frames_at_every_place(folder: Path) -> None:
    for n in range(COUNT):
        write(folder / f"late{n}.dcm", n, InstanceNumber=100 + n, PixelData=(VALUES[n] + 1).tobytes())
    image = io.read(folder)
    assert image.channels == 2
    assert image.notes[0].startswith("2 slices at every place")
    assert float((image.data[1] - image.data[0]).unique()) == 1


def test_small_irregularities_are_told(folder: Path) -> None:
    places = (ORIGIN + (4.0 * 2 + 0.1) * NORMAL).round(6).tolist()
    write(folder / "IM3.dcm", 2, ImagePositionPatient=places)
    assert io.read(folder).notes == (
        "slices are up to 0.100 mm from their places in a regular stack; taken as regular",
    )


def test_dark_is_bright_and_slopes(folder: Path) -> None:
    for file in folder.glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.PhotometricInterpretation, dataset.RescaleSlope = "MONOCHROME1", 0.5
        dataset.save_as(file)
    image = io.read(folder)
    np.testing.assert_allclose(image.data[0].numpy(), (4095 - VALUES.transpose(2, 1, 0)) * 0.5 - 1024)
    assert image.dtype == np.float32


def gap(folder: Path) -> None:
    (folder / "IM3.dcm").unlink()


def mixed(folder: Path) -> None:
    write(folder / "other.dcm", 0, SeriesInstanceUID=generate_uid(), SeriesDescription="scout", Modality="MR")


def localiser(folder: Path) -> None:
    write(folder / "loc.dcm", 8, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


def sizes(folder: Path) -> None:
    write(folder / "big.dcm", 6, Rows=10, PixelData=bytes(10 * COLUMNS * 2))


def spacings(folder: Path) -> None:
    write(folder / "fine.dcm", 6, PixelSpacing=[1.0, 0.7])


def duplicate(folder: Path) -> None:
    write(folder / "again.dcm", 3)


def irregular(folder: Path) -> None:
    write(folder / "IM3.dcm", 2, ImagePositionPatient=(ORIGIN + 9.2 * NORMAL).round(6).tolist())


def placeless(folder: Path) -> None:
    write(folder / "IM3.dcm", 2, ImagePositionPatient=None)


def colours(folder: Path) -> None:
    write(
        folder / "c.dcm",
        6,
        PhotometricInterpretation="RGB",
        SamplesPerPixel=3,
        PixelData=bytes(ROWS * COLUMNS * 6),
    )


def multiframe(folder: Path) -> None:
    write(folder / "m.dcm", 6, NumberOfFrames=4, PixelData=bytes(ROWS * COLUMNS * 8))


def truncated(folder: Path) -> None:
    raw = (folder / "IM3.dcm").read_bytes()
    (folder / "IM3.dcm").write_bytes(raw[:-20])


def cut_head(folder: Path) -> None:
    raw = (folder / "IM3.dcm").read_bytes()
    (folder / "IM3.dcm").write_bytes(raw[:200])


def huge(folder: Path) -> None:
    for file in folder.glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.Rows = dataset.Columns = 65535
        dataset.save_as(file)


def compressed(folder: Path) -> None:
    dataset = pydicom.dcmread(folder / "IM3.dcm")
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\x00" * 40])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(folder / "IM3.dcm")


def none(folder: Path) -> None:
    for file in folder.glob("*.dcm"):
        file.unlink()


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (gap, r"about 1 slices are missing: IM\d.dcm and IM\d.dcm are 8.00 mm apart, others 4.00 mm"),
    (mixed, r"holds 2 series: thorax \(CT, 6 files, .*; scout \(MR, 1 files, such as other.dcm\)"),
    (localiser, "1 of its 7 slices are turned against the others, such as loc.dcm"),
    (sizes, r"several sizes: \(4, 5\) \(6 slices\), \(4, 10\) \(1 slices\)"),
    (spacings, r"several pixel sizes: \(1.5, 0.7\) \(6 slices\)"),
    (duplicate, r"do not have the same number of slices: .*again.dcm"),
    (irregular, r"no regular stack: IM3.dcm is 1.20 mm from its place"),
    (placeless, "IM3.dcm has no ImagePositionPatient"),
    (colours, r"its pixels are MONOCHROME2 \(6 slices\), RGB \(1 slices\)"),
    (multiframe, "m.dcm holds 4 frames but does not say where each lies"),
    (truncated, "cannot be read as a DICOM series"),
    (cut_head, "about 1 slices are missing"),
    (huge, r"it claims \(1, 65535, 65535, 6\) values"),
    (compressed, r"IM3.dcm is compressed \(JPEG 2000"),
    (none, "a folder without DICOM images"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[spoil.__name__ for spoil, _ in FAULTS])
def test_faults_are_said_in_words(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        io.read(folder)
    assert str(folder) in str(caught.value)


# -- enhanced files ----------------------------------------------------------------------------------------------


def group(**sequences: dict[str, Any]) -> Dataset:
    """Functional groups: the name of each (without Sequence) to its elements."""
    item = Dataset()
    for name, elements in sequences.items():
        inner = Dataset()
        for keyword, value in elements.items():
            setattr(inner, keyword, value)
        setattr(item, f"{name}Sequence", [inner])
    return item


def enhanced(path: Path, order: list[int], **changes: Any) -> None:
    """One file whose frames are the slices of ``write`` in some order, each with a slope of its own."""
    shared = group(
        PlaneOrientation={"ImageOrientationPatient": [*ROW, *COLUMN]},
        PixelMeasures={"PixelSpacing": [1.5, 0.7], "SliceThickness": 4.0},
    )
    frames = [
        group(
            PlanePosition={"ImagePositionPatient": (ORIGIN + 4.0 * n * NORMAL).round(6).tolist()},
            PixelValueTransformation={"RescaleSlope": 1 + n, "RescaleIntercept": -10 * n},
        )
        for n in order
    ]
    elements = {
        "NumberOfFrames": len(order),
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": frames,
        "PixelData": VALUES[order].tobytes(),
        "SOPClassUID": EnhancedCTImageStorage,
        **dict.fromkeys(("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "RescaleSlope")),
    }
    write(path, 0, **(elements | changes))


def test_frames_of_an_enhanced_file_are_slices(folder: Path, tmp_path: Path) -> None:
    series = io.read(folder)
    enhanced(tmp_path / "one.dcm", [3, 0, 5, 1, 4, 2])
    image = io.read(tmp_path / "one.dcm")
    assert image.grid.same_as(series.grid)
    slope = np.arange(1, COUNT + 1)
    np.testing.assert_array_equal(image.data[0].numpy(), VALUES.transpose(2, 1, 0) * slope - 10 * (slope - 1))


def test_an_enhanced_file_may_hold_several_frames_at_a_place(tmp_path: Path) -> None:
    enhanced(tmp_path / "two.dcm", [0, 1, 2, 0, 1, 2])
    image = io.read(tmp_path / "two.dcm")
    assert image.data.shape == (2, COLUMNS, ROWS, 3)
    assert image.notes[0].startswith("2 slices at every place")


def test_a_series_of_enhanced_files_is_one_volume(tmp_path: Path) -> None:
    enhanced(tmp_path / "low.dcm", [0, 1, 2])
    enhanced(tmp_path / "high.dcm", [3, 4, 5])
    assert io.read(tmp_path).grid.shape == (COLUMNS, ROWS, COUNT)


def turned(frames: list[Dataset]) -> None:
    frames[1].PlaneOrientationSequence = group(
        PlaneOrientation={"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
    ).PlaneOrientationSequence


def unplaced(frames: list[Dataset]) -> None:
    del frames[2].PlanePositionSequence


def missing(frames: list[Dataset]) -> None:
    del frames[-1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (turned, "1 of its 4 slices are turned against the others, such as frame 2 of e.dcm; a localiser"),
        (unplaced, "frame 3 of e.dcm has no ImagePositionPatient"),
        (missing, "e.dcm holds 4 frames but does not say where each lies"),
    ],
)
def test_faults_of_enhanced_files(spoil: Callable[[list[Dataset]], None], message: str, tmp_path: Path) -> None:
    enhanced(tmp_path / "e.dcm", [0, 1, 2, 3])
    dataset = pydicom.dcmread(tmp_path / "e.dcm")
    spoil(dataset.PerFrameFunctionalGroupsSequence)
    dataset.save_as(tmp_path / "e.dcm")
    with pytest.raises(InputError, match=message):
        io.read(tmp_path / "e.dcm")


def test_a_gap_in_an_enhanced_file_names_its_frames(tmp_path: Path) -> None:
    enhanced(tmp_path / "e.dcm", [0, 1, 2, 4, 5])
    with pytest.raises(InputError, match=r"frame 3 of e.dcm and frame 4 of e.dcm are 8.00 mm apart"):
        io.read(tmp_path / "e.dcm")


def test_a_truncated_enhanced_file_is_refused(tmp_path: Path) -> None:
    enhanced(tmp_path / "e.dcm", list(range(COUNT)))
    raw = (tmp_path / "e.dcm").read_bytes()
    (tmp_path / "e.dcm").write_bytes(raw[:-50])
    with pytest.raises(InputError, match="cannot be read as a DICOM series"):
        io.read(tmp_path / "e.dcm")
