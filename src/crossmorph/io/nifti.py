"""NIfTI and MGH volumes, by nibabel.

The affine is the sform where it is coded, else the qform, else nibabel's base affine (x to the left, middle of
the volume at the origin); shear is kept. Sizes in metres or microns become millimetres.

Stored integers with a scale factor get the smallest of their own type, int16 and int32 that holds every value
they can take, if slope and intercept are whole numbers; otherwise float32.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.io.limits import check_size
from crossmorph.io.volume import Volume, reading, to_dtype
from crossmorph.space import Array, Grid

log = logging.getLogger("crossmorph")

MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI codes: metre, millimetre, micron
VECTOR_INTENTS = (1006, 1007)  # NIFTI_INTENT_DISPVECT, NIFTI_INTENT_VECTOR
ALIGNED = 2  # NIFTI_XFORM_ALIGNED_ANAT: the coordinates of another file

LARGEST_EXTENSION = 2**26
"""Bytes of an extension of a NIfTI header."""


def read_volume(path: Path) -> Volume:
    """Read a .nii, .nii.gz, .mgh or .mgz file.

    Raises:
        InputError: the file is not such an image, is cut short, has fewer than three axes, holds displacements or
            complex numbers, or its spacing is not positive.
    """
    with reading(path):
        image = _load(path)
        _check_kind(image)
        affine, notes = _affine(image, path)
        values, dtype = _values(image)
        values, note = _channels_first(values)
        return Volume(values, affine, dtype, notes + note)


def _load(path: Path) -> Any:
    import nibabel as nib

    _check_spacing(path)
    image: Any = nib.load(path)
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise InputError("it holds no volume")
    check_size(image.shape, image.get_data_dtype().itemsize, path.stat().st_size, path.suffix.lower() != ".nii")
    return image


def is_displacement(image: Any) -> bool:
    """Five axes, one frame, three components and a vector intent: how ITK and ANTs store displacements."""
    shape = image.shape
    vector = "intent_code" in image.header and int(image.header["intent_code"]) in VECTOR_INTENTS
    return vector and len(shape) == 5 and shape[3:] == (1, 3)


def _check_kind(image: Any) -> None:
    if is_displacement(image):
        raise InputError(
            "this file holds vectors of three components, such as a displacement field; give it where a transform "
            "is asked for, or store its components as frames (I, J, K, 3) if it is an image"
        )
    if np.dtype(image.get_data_dtype()).kind == "c":
        raise InputError("this image holds complex numbers; save its magnitude first")
    if len(image.shape) < 3:
        raise InputError(f"this image is 2-D {image.shape}; crossmorph works on volumes with three axes")


# -- geometry ----------------------------------------------------------------------------------------------------


def _affine(image: Any, path: Path) -> tuple[Array, tuple[str, ...]]:
    """Voxels to RAS mm, and what had to be decided."""
    header = image.header
    if "sform_code" not in header:
        return np.asarray(image.affine, np.float64), ()
    sform, qform = header.get_sform(coded=True)[0], _qform(header)
    scale, notes = _mm_per_unit(header)
    affine = sform if sform is not None else qform
    if affine is None:
        affine = header.get_base_affine()
        notes += (
            "neither sform nor qform gives the axes: voxel sizes are known, position and orientation are guessed "
            "(x to the left, middle of the volume at the origin)",
        )
    to_mm = np.diag([scale, scale, scale, 1.0])
    if sform is not None and qform is not None:
        notes += _disagreement(image.shape[:3], to_mm @ sform, to_mm @ qform, path)
    return to_mm @ affine, notes


def _qform(header: Any) -> Array | None:
    """The coded qform; None where there is none or its quaternion is no rotation."""
    try:
        qform: Array | None = header.get_qform(coded=True)[0]
    except ValueError:
        return None
    return qform


def _check_spacing(path: Path) -> None:
    """Look at pixdim as stored, before nibabel repairs it.

    Zero is refused, and a minus sign where no sform gives the axes (tools disagree on what it means there).
    """
    from nibabel import Nifti1Image, Nifti2Image
    from nibabel.openers import ImageOpener

    kinds = [kind for kind in (Nifti1Image, Nifti2Image) if kind.path_maybe_image(path)[0]]
    if not kinds:
        return
    kind: Any = kinds[0].header_class
    with ImageOpener(str(path)) as stream:
        header = kind(stream.read(kind.template_dtype.itemsize), check=False)
        _check_extensions(stream, header)
    spacing = header["pixdim"][1 : 1 + min(3, int(header["dim"][0]))]
    positive = np.abs(spacing) > 0 if header["sform_code"] > 0 else spacing > 0
    if not (positive & np.isfinite(spacing)).all():
        raise InputError(
            f"the voxel size (pixdim) is {spacing.tolist()}; it must be positive on each axis. Repair the header"
        )


def _check_extensions(stream: Any, header: Any) -> None:
    """Refuse an extension of the header that claims more than ``LARGEST_EXTENSION``, for which memory is taken."""
    status = stream.read(4)
    left = float(header["vox_offset"]) - stream.tell()
    while status[:1] > b"\0" and not 0 <= left < 16 and len(head := stream.read(8)) == 8:
        size = int(np.frombuffer(head, f"{header.endianness}i4")[0])
        if not 8 <= size <= LARGEST_EXTENSION:
            raise ValueError(f"its header announces an extension of {size} bytes")
        stream.read(size - 8)
        left -= size


def _mm_per_unit(header: Any) -> tuple[float, tuple[str, ...]]:
    scale = MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    if scale == 1.0:
        return scale, ()
    unit = "metres" if scale > 1 else "microns"
    return scale, (f"sizes are stored in {unit} and were converted to mm",)


def _disagreement(shape: tuple[int, int, int], sform: Array, qform: Array, path: Path) -> tuple[str, ...]:
    distance = np.linalg.norm(Grid(shape, sform).corners() - Grid(shape, qform).corners(), axis=1).max()
    if distance <= 0.1:
        return ()
    note = f"sform and qform differ by up to {distance:.1f} mm; the sform was used"
    log.warning("%s: %s", path, note)
    return (note,)


# -- values ------------------------------------------------------------------------------------------------------


def _values(image: Any) -> tuple[NDArray[Any], np.dtype[Any]]:
    """Values with scale factors applied (in float32), and the type to write them in again."""
    proxy = image.dataobj
    stored = np.dtype(image.get_data_dtype())
    if stored.fields:  # colours: one byte a component
        colours = np.asarray(proxy.get_unscaled())
        return np.stack([colours[name] for name in stored.fields], -1), np.dtype(np.uint8)
    slope, inter = float(proxy.slope), float(proxy.inter)
    if (slope, inter) == (1.0, 0.0):
        return np.asanyarray(proxy), stored.newbyteorder("=")
    return np.asarray(proxy, dtype=np.float32), _scaled_dtype(stored, slope, inter)


def _scaled_dtype(stored: np.dtype[Any], slope: float, inter: float) -> np.dtype[Any]:
    if stored.kind in "iu" and slope.is_integer() and inter.is_integer():
        limits = np.iinfo(stored)
        ends = sorted((limits.min * slope + inter, limits.max * slope + inter))
        for candidate in (stored.newbyteorder("="), np.dtype(np.int16), np.dtype(np.int32)):
            if np.iinfo(candidate).min <= ends[0] and ends[1] <= np.iinfo(candidate).max:
                return candidate
    return np.dtype(np.float32)


def _channels_first(values: NDArray[Any]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """(I, J, K[, T[, C]]) to (C, I, J, K)."""
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 3:
        return values[None], ()
    if values.ndim == 5 and values.shape[3] == 1:
        values = values[..., 0, :]
    if values.ndim > 4:
        raise InputError(f"an image with axes {values.shape} is not understood; give one with at most four axes")
    return np.moveaxis(values, -1, 0), (f"{values.shape[-1]} frames or channels",)


# -- writing -----------------------------------------------------------------------------------------------------


def write_volume(values: NDArray[Any], grid: Grid, dtype: np.dtype[Any], path: Path) -> None:
    """Write (C, I, J, K) as NIfTI-1; several channels become the fourth axis.

    The sform always holds the geometry. The qform holds it too unless there is shear, which it cannot express; it
    is then marked as unknown.
    """
    import nibabel as nib

    stored = to_dtype(values[0] if len(values) == 1 else np.moveaxis(values, 0, -1), dtype)
    image = nib.Nifti1Image(stored, grid.affine, dtype=stored.dtype)
    set_geometry(image, grid)
    nib.save(image, path)


def set_geometry(image: Any, grid: Grid) -> None:
    """Both forms, and millimetres, into a NIfTI header."""
    image.set_sform(grid.affine, ALIGNED)
    image.set_qform(grid.affine, ALIGNED, strip_shears=True)
    if not Grid(grid.shape, image.get_qform()).same_as(grid, tolerance_mm=0.01):
        image.set_qform(None, 0)
    image.header.set_xyzt_units("mm")


# -- displacement fields -----------------------------------------------------------------------------------------


def read_vectors(path: Path) -> tuple[NDArray[Any], Array]:
    """(3, I, J, K) components as stored and the affine of a NIfTI displacement field."""
    image = _load(path)
    if not is_displacement(image):
        raise InputError(
            "a NIfTI displacement field has axes (I, J, K, 1, 3) and a vector intent, as ANTs and ITK write it; "
            f"this file has axes {image.shape}"
        )
    affine, _ = _affine(image, path)
    return np.moveaxis(np.asanyarray(image.dataobj)[:, :, :, 0], -1, 0), affine


def write_vectors(vectors: NDArray[Any], grid: Grid, path: Path) -> None:
    """Write (3, I, J, K) components as NIfTI with a vector intent."""
    import nibabel as nib

    image = nib.Nifti1Image(np.moveaxis(vectors, 0, -1)[:, :, :, None], grid.affine)
    image.header.set_intent("vector")
    set_geometry(image, grid)
    nib.save(image, path)


def read_components(path: Path) -> tuple[NDArray[Any], Array, int]:
    """(3, I, J, K) frames, the affine and the intent code of a four-axis NIfTI of three frames."""
    image = _load(path)
    if len(image.shape) != 4 or image.shape[3] != 3 or "intent_code" not in image.header:
        raise InputError(f"it must be a NIfTI of axes (I, J, K, 3), but its axes are {image.shape}")
    affine, _ = _affine(image, path)
    return np.moveaxis(np.asanyarray(image.dataobj), -1, 0), affine, int(image.header["intent_code"])


def write_components(components: NDArray[Any], grid: Grid, intent: int, path: Path) -> None:
    """Write (I, J, K, 3) as four-axis NIfTI with an intent code."""
    import nibabel as nib

    image = nib.Nifti1Image(components, grid.affine)
    image.header.set_intent(intent, allow_unknown=True)
    set_geometry(image, grid)
    nib.save(image, path)
