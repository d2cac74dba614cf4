"""Reading and writing. Formats, LPS and header codes are known here and nowhere else; outside is RAS mm.

What a suffix means stands in the dicts below. Files appear complete or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.io import dicom, itk, markups, meshes, micro, nifti, tables
from crossmorph.io.paths import by_suffix, existing, stem_of, suffix_of, writing
from crossmorph.io.transforms import read_transform, write_transform
from crossmorph.io.volume import Volume, reading
from crossmorph.points import Mesh, Points
from crossmorph.transform import Transform

__all__ = [
    "read",
    "read_labels",
    "read_mesh",
    "read_point_pairs",
    "read_points",
    "read_transform",
    "suffix_of",
    "write",
    "write_transform",
]

IMAGE_READERS = dict.fromkeys((".nii", ".nii.gz", ".mgh", ".mgz"), nifti.read_volume)
"""Folders and DICOM files go to pydicom, any other suffix to SimpleITK: .mha, .mhd, .nrrd, .nhdr and more."""

MICROSCOPY = {**dict.fromkeys((".tif", ".tiff"), micro.read_tiff), ".zarr": micro.read_zarr}
"""Formats that may not tell the voxel size."""

IMAGE_WRITERS = {
    ".nii": nifti.write_volume,
    ".nii.gz": nifti.write_volume,
    ".mha": itk.write_volume,
    ".nrrd": itk.write_volume,
}


POINT_READERS = {".mrk.json": markups.read_mrk_json, ".fcsv": markups.read_fcsv}
"""Any other suffix is read as CSV."""

POINT_WRITERS = {
    ".csv": tables.write_points,
    ".mrk.json": markups.write_mrk_json,
    ".fcsv": markups.write_fcsv,
}


def read(path: str | Path, *, frame: int | None = None, spacing_mm: Sequence[float] | None = None) -> Image:
    """Read a volume of any format (docs/formats.md): NIfTI, MGH, MetaImage, NRRD, DICOM series, TIFF, OME-Zarr...

    Values that are not finite are masked and counted in ``notes``, as is every decision about the geometry.

    Args:
        path: the file; the folder of a DICOM series or of an OME-Zarr image.
        frame: which frame of a 4-D file, from 0; None keeps all of them as channels.
        spacing_mm: voxel size along x, y, z of a TIFF or OME-Zarr that does not tell it.

    Raises:
        InputError: the file is missing, damaged, no volume with three axes, has a spacing that is not positive
            or a singular affine, does not tell its voxel size, or has no such frame.
    """
    path = existing(path, folders=True)
    volume = _read_volume(path, spacing_mm)
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


def read_labels(path: str | Path, *, spacing_mm: Sequence[float] | None = None) -> Labels:
    """Read a label map; whole numbers stored as floats are taken. ``spacing_mm`` as for ``read``.

    Raises:
        InputError: as for ``read``, or the values are not whole numbers, or there are several frames.
    """
    path = existing(path, folders=True)
    volume = _read_volume(path, spacing_mm)
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
    """Read landmarks: a CSV with the columns x, y, z (RAS mm) and, if there, name; 3D Slicer's .mrk.json or .fcsv.

    Raises:
        InputError: the file or a column is missing, a value is not a number, or a file of Slicer does not say
            whether it is LPS or RAS.
    """
    path = existing(path)
    return POINT_READERS.get(suffix_of(path), tables.read_points)(path)


def read_mesh(path: str | Path, system: meshes.System | None = None) -> Mesh:
    """Read a triangle surface with its point and cell data: STL, PLY, VTK or GIFTI.

    Args:
        path: .stl, .ply, .vtk or .gii.
        system: ``"ras"`` or ``"lps"``, where the file does not say; RAS by default.

    Raises:
        InputError: the file is missing, damaged, or no surface of triangles, or it says another system.
    """
    path = existing(path)
    by_suffix(dict.fromkeys(meshes.ENDINGS, path), path, "read a surface from")
    return meshes.read_mesh(path, system)


def read_point_pairs(path: str | Path) -> tuple[Points, Points]:
    """Read matching landmarks (fixed, moving) from a CSV with fixed_x, ..., moving_z (RAS mm).

    Raises:
        InputError: the file or a column is missing, or a value is not a number.
    """
    return tables.read_point_pairs(existing(path))


def write(thing: Image | Labels | Points | Mesh | Transform, path: str | Path) -> None:
    """Write an image or labels (.nii, .nii.gz, .mha, .nrrd), points (.csv, .mrk.json, .fcsv), a mesh (.stl, .ply,
    .vtk, .gii) or a transform.

    Images keep their ``dtype``: whole numbers are rounded and clipped, bool becomes uint8.

    Raises:
        InputError: the ending names no format for this thing, or writing fails; nothing half-written remains.
    """
    path = Path(path)
    if isinstance(thing, Transform):
        write_transform(thing, path)
    elif isinstance(thing, Points):
        write_to = by_suffix(POINT_WRITERS, path, "write points to")
        with writing(path) as temporary:
            write_to(thing, temporary)
    elif isinstance(thing, Mesh):
        by_suffix(dict.fromkeys(meshes.ENDINGS, path), path, "write a surface to")
        with writing(path) as temporary:
            meshes.write_mesh(thing, temporary)
    else:
        values = thing.data.detach().cpu().numpy()
        write_volume = by_suffix(IMAGE_WRITERS, path, "write an image to")
        with writing(path) as temporary:
            write_volume(values.reshape(-1, *thing.grid.shape), thing.grid, thing.dtype, temporary)


def _read_volume(path: Path, spacing_mm: Sequence[float] | None = None) -> Volume:
    suffix = suffix_of(path)
    if suffix in MICROSCOPY:
        return MICROSCOPY[suffix](path, spacing_mm)
    if spacing_mm is not None:
        raise InputError(f"{path} tells its voxel size itself; spacing_mm is for {', '.join(MICROSCOPY)}")
    if path.is_dir() or (suffix not in IMAGE_READERS and dicom.is_dicom(path)):
        return dicom.read_series(path)
    return IMAGE_READERS.get(suffix, itk.read_volume)(path)
