"""DICOM series, by pydicom.

A series is all files of a folder with one SeriesInstanceUID; a file stands for its series in its folder. An
enhanced file holds many slices (frames), each with its own place and scale in the functional groups. Slices are
sorted by where they lie, and whatever is wrong with them is said: missing slices, irregular distances, several
series or orientations are refused, a tilted gantry becomes shear, repeated files are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.io.itk import LPS
from crossmorph.io.limits import check_size
from crossmorph.io.volume import Volume, reading
from crossmorph.space import Array

LARGEST_ELEMENT = 2**26
"""Bytes of an element that is read with the head; larger ones are passed over."""

IRREGULAR = 0.01
"""Distance of a slice from its place in a regular stack, in slice distances, from which it is told."""

TOO_IRREGULAR = 0.1
"""The same, from which it is refused."""

TURNED = 1e-3
"""Difference of direction cosines of slices that do not belong together."""


IN_FILE = (
    "Rows", "Columns", "PhotometricInterpretation", "BitsStored", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept",
)  # fmt: skip
"""What all frames of an enhanced file have in common, if it is there."""

IN_GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
"""What functional groups say of a frame."""


def read_series(path: Path) -> Volume:
    """Read a folder of DICOM files, or the series in it that a file belongs to.

    Raises:
        InputError: pydicom is missing; there is no image, or there are several series; slices are missing or do
            not form a stack; a file is damaged or compressed in a way that no installed decoder knows.
    """
    with reading(path, "a DICOM series"):
        notes: list[str] = []
        datasets = _datasets(path, notes)
        files = _without_repeats(_one_series(datasets, path), notes)
        slices = _sorted([part for dataset in files for part in _slices(dataset)])
        _check_alike(slices)
        frames = _frames(slices, notes)
        affine = _affine([stack[0] for stack in frames], notes)
        values, dtype = _values(frames)
        return Volume(values, affine, dtype, tuple(notes))


def is_dicom(path: Path) -> bool:
    """True for a file with DICOM's mark."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


# -- files -------------------------------------------------------------------------------------------------------


def _datasets(path: Path, notes: list[str]) -> list[Any]:
    """Heads of all images in a folder, or beside a file."""
    try:
        import pydicom
    except ImportError:
        raise InputError("DICOM needs pydicom; install crossmorph[dicom]") from None
    folder = path if path.is_dir() else path.parent
    found: list[Any] = []
    others: list[Any] = []
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        if is_dicom(file):
            with reading(file, "a DICOM file"):
                dataset = pydicom.dcmread(file, stop_before_pixels=True, defer_size=LARGEST_ELEMENT)
            (found if "Rows" in dataset and "Columns" in dataset else others).append(dataset)
    if others:
        names = ", ".join(Path(dataset.filename).name for dataset in others[:3])
        notes.append(f"{len(others)} DICOM files without an image, such as {names}, were left out")
    if not found:
        raise InputError("it is a folder without DICOM images; give the folder that holds the files themselves")
    return found


def _one_series(datasets: list[Any], path: Path) -> list[Any]:
    chosen = [d.get("SeriesInstanceUID") for d in datasets if path.is_file() and Path(d.filename) == path]
    if chosen:
        return [d for d in datasets if d.get("SeriesInstanceUID") == chosen[0]]
    counts = Counter(d.get("SeriesInstanceUID") for d in datasets)
    if len(counts) > 1:
        first = {d.get("SeriesInstanceUID"): d for d in reversed(datasets)}
        told = "; ".join(
            f"{first[uid].get('SeriesDescription', 'no name')!s} ({first[uid].get('Modality', '?')}, {n} files, "
            f"such as {Path(first[uid].filename).name})"
            for uid, n in list(counts.items())[:10]
        )
        raise InputError(f"it holds {len(counts)} series: {told}. Give one file of the series that is meant")
    return datasets


def _without_repeats(datasets: list[Any], notes: list[str]) -> list[Any]:
    """Each SOPInstanceUID once."""
    unique = {d.get("SOPInstanceUID", n): d for n, d in reversed(list(enumerate(datasets)))}
    if len(unique) < len(datasets):
        notes.append(f"{len(datasets) - len(unique)} files are there twice and were left out")
    return list(unique.values())


# -- geometry ----------------------------------------------------------------------------------------------------


def _axes(dataset: Any) -> Array:
    """(2, 3): directions in which columns and rows are counted, LPS."""
    return np.asarray(dataset.ImageOrientationPatient, np.float64).reshape(2, 3)


def _position(dataset: Any) -> Array:
    return np.asarray(dataset.ImagePositionPatient, np.float64)


def _name(dataset: Any) -> str:
    """Of a slice, for messages."""
    file, frame = Path(dataset.filename).name, getattr(dataset, "frame", None)
    return file if frame is None else f"frame {frame + 1} of {file}"


def _slices(dataset: Any) -> list[Any]:
    """Heads of the slices in a file: itself, or one a frame, with what the functional groups say of it.

    Per-frame functional groups go before shared ones (DICOM PS3.3, C.7.6.16).
    """
    count = int(dataset.get("NumberOfFrames", 1) or 1)
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    if frames is None and count == 1:
        return [dataset]
    if frames is None or len(frames) != count:
        raise InputError(
            f"{_name(dataset)} holds {count} frames but does not say where each lies (no functional groups for "
            "them); convert it first, with dcm2niix say"
        )
    shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
    return [_frame(dataset, number, (shared[0], own)) for number, own in enumerate(frames)]


def _frame(dataset: Any, number: int, groups: Sequence[Any]) -> Any:
    from pydicom.dataset import Dataset

    head = Dataset()
    for keyword in IN_FILE:
        if keyword in dataset:
            setattr(head, keyword, dataset[keyword].value)
    for group in groups:
        for sequence, keywords in IN_GROUPS.items():
            told = (group.get(sequence) or [{}])[0]
            for keyword in keywords:
                if told.get(keyword) is not None:
                    setattr(head, keyword, told[keyword].value)
    head.InstanceNumber = number
    head.filename, head.file_meta, head.frame = dataset.filename, dataset.file_meta, number
    return head


def _sorted(datasets: list[Any]) -> list[Any]:
    for dataset in datasets:
        for needed in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            if not dataset.get(needed):
                raise InputError(
                    f"{_name(dataset)} has no {needed}, so that its place in the patient is not known"
                )
    normal = np.cross(*_axes(datasets[0]))
    return sorted(
        datasets, key=lambda d: (round(float(_position(d) @ normal), 3), int(d.get("InstanceNumber") or 0))
    )


def _check_alike(slices: Sequence[Any]) -> None:
    sizes = Counter((int(d.Columns), int(d.Rows)) for d in slices)
    if len(sizes) > 1:
        raise InputError(f"its slices have several sizes: {_counted(sizes)}; they are no single volume")
    usual = np.median([_axes(d) for d in slices], axis=0)
    turned = [d for d in slices if np.abs(_axes(d) - usual).max() > TURNED]
    if turned:
        raise InputError(
            f"{len(turned)} of its {len(slices)} slices are turned against the others, such as "
            f"{_name(turned[0])}; a localiser? A volume has slices of one direction: leave the others out"
        )
    spacings = Counter(tuple(round(float(v), 4) for v in d.PixelSpacing) for d in slices)
    if len(spacings) > 1:
        raise InputError(
            f"its slices have several pixel sizes: {_counted(spacings)} mm; they are no single volume"
        )
    colours = Counter(str(d.get("PhotometricInterpretation", "")) for d in slices)
    if not set(colours) <= {"MONOCHROME1", "MONOCHROME2"}:
        raise InputError(f"its pixels are {_counted(colours)}; grey values are needed")


def _counted(things: Counter[Any]) -> str:
    return ", ".join(f"{thing} ({n} slices)" for thing, n in things.most_common(5))


def _frames(slices: list[Any], notes: list[str]) -> list[list[Any]]:
    """Slices by place: (place, frame). Every place must have the same number of them."""
    normal = np.cross(*_axes(slices[0]))
    places: list[list[Any]] = []
    for dataset in slices:
        if places and abs(float((_position(dataset) - _position(places[-1][0])) @ normal)) < 1e-3:
            places[-1].append(dataset)
        else:
            places.append([dataset])
    counts = Counter(len(place) for place in places)
    if len(counts) > 1:
        odd = next(place for place in places if len(place) != counts.most_common(1)[0][0])
        names = ", ".join(map(_name, odd[:4]))
        raise InputError(
            f"its places do not have the same number of slices: {names} lie at one place where others have "
            f"{counts.most_common(1)[0][0]}; remove duplicates"
        )
    if len(places[0]) > 1:
        notes.append(f"{len(places[0])} slices at every place: read as frames, in the order of InstanceNumber")
    return places


def _affine(slices: Sequence[Any], notes: list[str]) -> Array:
    """Voxels (column, row, slice) to RAS mm."""
    first = slices[0]
    axes, (row_mm, column_mm) = _axes(first), (float(v) for v in first.PixelSpacing)
    normal = np.cross(*axes)
    if len(slices) == 1:
        thickness = float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 0)
        if thickness <= 0:
            raise InputError("it has one slice without a thickness, which is no volume")
        step = normal * thickness
    else:
        step = (_position(slices[-1]) - _position(first)) / (len(slices) - 1)
        _check_stack(slices, step, normal, notes)
    affine = np.eye(4)
    affine[:3, :3] = np.stack((axes[0] * column_mm, axes[1] * row_mm, step), 1)
    affine[:3, 3] = _position(first)
    return LPS @ affine


def _check_stack(slices: Sequence[Any], step: Array, normal: Array, notes: list[str]) -> None:
    """Say what is irregular about the places of slices; refuse what a grid cannot hold."""
    places = np.array([float(_position(d) @ normal) for d in slices])
    distances = np.diff(places)
    usual = float(np.median(distances))
    gaps = np.flatnonzero(distances > 1.5 * usual)
    if len(gaps):
        at = int(gaps[0])
        missing = sum(round(d / usual) - 1 for d in distances[gaps])
        raise InputError(
            f"about {missing} slices are missing: {_name(slices[at])} and "
            f"{_name(slices[at + 1])} are {distances[at]:.2f} mm apart, others {usual:.2f} mm. "
            "Fetch the whole series, or resample what there is"
        )
    regular = _position(slices[0]) + np.arange(len(slices))[:, None] * step
    off = np.linalg.norm(np.array([_position(d) for d in slices]) - regular, axis=1)
    if off.max() > TOO_IRREGULAR * usual:
        raise InputError(
            f"its slices are no regular stack: {_name(slices[int(off.argmax())])} is {off.max():.2f} "
            f"mm from its place (distances of {distances.min():.2f} to {distances.max():.2f} mm)"
        )
    if off.max() > IRREGULAR * usual:
        notes.append(f"slices are up to {off.max():.3f} mm from their places in a regular stack; taken as regular")
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > 0.05:
        notes.append(f"the gantry was tilted by {tilt:.1f} degrees; kept as shear of the grid")


# -- values ------------------------------------------------------------------------------------------------------


def _values(frames: list[list[Any]]) -> tuple[NDArray[Any], np.dtype[Any]]:
    """(C, I, J, K) rescaled values, and the type to write them in."""
    first = frames[0][0]
    shape = (len(frames[0]), int(first.Columns), int(first.Rows), len(frames))
    files = {Path(dataset.filename) for place in frames for dataset in place}
    check_size(shape, 4, sum(file.stat().st_size for file in files))
    values = np.empty(shape, np.float32)
    whole = True
    for k, place in enumerate(frames):
        for c, dataset in enumerate(place):
            pixels, slope, intercept = _pixels(Path(dataset.filename), dataset)
            values[c, :, :, k] = pixels.T * np.float32(slope) + np.float32(intercept)
            whole &= slope.is_integer() and intercept.is_integer()
    small = whole and values.min() >= -(2**15) and values.max() < 2**15
    return values, np.dtype(np.int16 if small else np.float32)


def _pixels(file: Path, head: Any) -> tuple[NDArray[Any], float, float]:
    """(rows, columns) as stored, with slope and intercept; MONOCHROME1 is turned into MONOCHROME2."""
    from pydicom.pixels.utils import pixel_array

    try:
        pixels = np.asarray(pixel_array(file, index=getattr(head, "frame", None)), np.float32)
    except RuntimeError as error:  # what pydicom raises, itself or its NotImplementedError, without a decoder
        syntax = getattr(head.file_meta.get("TransferSyntaxUID"), "name", "unknown")
        raise InputError(
            f"{file.name} is compressed ({syntax}) and no decoder is installed; pip install pylibjpeg[all], or "
            "convert the series with dcm2niix"
        ) from error
    if pixels.shape != (int(head.Rows), int(head.Columns)):
        raise InputError(f"{_name(head)} has {pixels.shape} pixels, not {(int(head.Rows), int(head.Columns))}")
    if head.PhotometricInterpretation == "MONOCHROME1":
        pixels = (2.0 ** int(head.BitsStored) - 1) - pixels
    return pixels, float(head.get("RescaleSlope", 1) or 1), float(head.get("RescaleIntercept", 0) or 0)
