"""Reading and writing. Formats, LPS and header codes are known here and nowhere else; outside is RAS mm.

What a suffix means stands in the dicts below. Files appear complete or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from crossmorph.errors import InputError
from crossmorph.files import atomic_path
from crossmorph.image import Image, Labels
from crossmorph.io import itk, itk_transforms, nifti, tables
from crossmorph.io.volume import Volume, reading, reason
from crossmorph.points import Points
from crossmorph.transform import Transform

T = TypeVar("T")

__all__ = [
    "read",
    "read_labels",
    "read_point_pairs",
    "read_points",
    "read_transform",
    "write",
    "write_transform",
]

IMAGE_READERS = dict.fromkeys((".nii", ".nii.gz", ".mgh", ".mgz"), nifti.read_volume)
"""Any other suffix goes to SimpleITK, which knows .mha, .mhd, .nrrd, .nhdr and more."""

IMAGE_WRITERS = {
    ".nii": nifti.write_volume,
    ".nii.gz": nifti.write_volume,
    ".mha": itk.write_volume,
    ".nrrd": itk.write_volume,
}

TRANSFORM_READERS = {
    **dict.fromkeys((".h5", ".hdf5", ".tfm", ".txt", ".mat"), itk_transforms.read_itk),
    **dict.fromkeys((".nii", ".nii.gz"), itk_transforms.read_nifti_field),
    **dict.fromkeys((".mha", ".mhd", ".nrrd", ".nhdr"), itk_transforms.read_field),
}

TRANSFORM_WRITERS = {
    **dict.fromkeys((".h5", ".hdf5", ".tfm", ".txt", ".mat"), itk_transforms.write_itk),
    **dict.fromkeys((".nii", ".nii.gz"), itk_transforms.write_nifti_field),
    **dict.fromkeys((".mha", ".nrrd"), itk_transforms.write_field),
}


def suffix_of(path: Path) -> str:
    """The ending in small letters; two-part for compressed files (.nii.gz)."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def stem_of(path: Path) -> str:
    """The file name without its ending (see ``suffix_of``)."""
    return path.name[: len(path.name) - len(suffix_of(path))] or path.name


def read(path: str | Path, *, frame: int | None = None) -> Image:
    """Read a volume of any format (NIfTI, MGH, MetaImage, NRRD and what else SimpleITK reads).

    Values that are not finite are masked and counted in ``notes``, as is every decision about the geometry.

    Args:
        path: the file.
        frame: which frame of a 4-D file, from 0; None keeps all of them as channels.

    Raises:
        InputError: the file is missing, damaged, no volume with three axes, has a spacing that is not positive
            or a singular affine, or has no such frame.
    """
    path = _existing(path)
    volume = _read_volume(path)
    count = len(volume.values)
    values = volume.values
    if frame is not None:
        if not 0 <= frame < count:
            raise InputError(f"{path} has {count} frames; frame must be from 0 to {count - 1}, not {frame}")
        values = values[frame : frame + 1]
    with reading(path), np.errstate(over="ignore"):
        image = Image.from_array(
            values, volume.affine, name=stem_of(path), dtype=volume.dtype, source=path, notes=volume.notes
        )
    lost = int((~image.valid).sum())
    if lost:
        image = replace(image, notes=(*image.notes, f"{lost} voxels are NaN or infinite and were masked"))
    return image


def read_labels(path: str | Path) -> Labels:
    """Read a label map; whole numbers stored as floats are taken.

    Raises:
        InputError: as for ``read``, or the values are not whole numbers, or there are several frames.
    """
    path = _existing(path)
    volume = _read_volume(path)
    with reading(path, "a label map"):
        if len(volume.values) > 1:
            raise InputError(f"a label map has one frame; this file has {len(volume.values)}")
        return Labels.from_array(
            volume.values[0],
            volume.affine,
            name=stem_of(path),
            dtype=volume.dtype,
            source=path,
            notes=volume.notes,
        )


def read_points(path: str | Path) -> Points:
    """Read landmarks from a CSV with the columns x, y, z (RAS mm) and, if there, name.

    Raises:
        InputError: the file or a column is missing, or a value is not a number.
    """
    return tables.read_points(_existing(path))


def read_point_pairs(path: str | Path) -> tuple[Points, Points]:
    """Read matching landmarks (fixed, moving) from a CSV with fixed_x, ..., moving_z (RAS mm).

    Raises:
        InputError: the file or a column is missing, or a value is not a number.
    """
    return tables.read_point_pairs(_existing(path))


def read_transform(path: str | Path) -> Transform:
    """Read a transform: ITK's .h5, .tfm, .txt, .mat, or ITK displacements as an image (.nii.gz, .mha, .nrrd).

    Raises:
        InputError: the file is missing, damaged, or of another kind.
    """
    path = _existing(path)
    return _by_suffix(TRANSFORM_READERS, path, "read a transform from")(path)


def write(thing: Image | Labels | Points | Transform, path: str | Path) -> None:
    """Write an image or labels (.nii, .nii.gz, .mha, .nrrd), points (.csv) or a transform.

    Images keep their ``dtype``: whole numbers are rounded and clipped, bool becomes uint8.

    Raises:
        InputError: the ending names no format for this thing, or writing fails; nothing half-written remains.
    """
    path = Path(path)
    if isinstance(thing, Transform):
        write_transform(thing, path)
    elif isinstance(thing, Points):
        write_to = _by_suffix({".csv": tables.write_points}, path, "write points to")
        with _writing(path) as temporary:
            write_to(thing, temporary)
    else:
        values = thing.data.detach().cpu().numpy()
        write_volume = _by_suffix(IMAGE_WRITERS, path, "write an image to")
        with _writing(path) as temporary:
            write_volume(values.reshape(-1, *thing.grid.shape), thing.grid, thing.dtype, temporary)


def write_transform(transform: Transform, path: str | Path) -> None:
    """Write a transform as ITK composite (.h5, .tfm, .txt), or a field as vector image (.nii.gz, .mha, .nrrd).

    Raises:
        InputError: the ending names no transform format, or one that cannot hold this transform, or writing fails.
    """
    path = Path(path)
    write_to = _by_suffix(TRANSFORM_WRITERS, path, "write a transform to")
    with _writing(path) as temporary:
        write_to(transform, temporary)


# -- helpers -----------------------------------------------------------------------------------------------------


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise InputError(
            f"{path} is a folder; give a file (convert a DICOM series first, with dcm2niix for example)"
        )
    if not path.exists():
        raise InputError(f"{path} does not exist; check the spelling and the folder ({path.absolute().parent})")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}; check its permissions") from error
    return path


def _read_volume(path: Path) -> Volume:
    return IMAGE_READERS.get(suffix_of(path), itk.read_volume)(path)


def _by_suffix(table: Mapping[str, T], path: Path, task: str) -> T:
    suffix = suffix_of(path)
    if suffix not in table:
        raise InputError(f"cannot {task} {path}: the ending must be one of {', '.join(table)}, not {suffix!r}")
    return table[suffix]


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; what formats refuse and where ITK fails is told of the path asked for."""
    with atomic_path(path) as temporary:
        try:
            yield temporary
        except InputError as error:
            raise InputError(f"cannot write {path}: {error}") from None
        except RuntimeError as error:
            why = reason(error).replace(temporary.name, path.name)
            raise InputError(
                f"cannot write {path}: {why}; nothing half-written remains. "
                "Check the free space and that you may write there"
            ) from error
