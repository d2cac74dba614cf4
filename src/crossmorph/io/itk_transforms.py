"""Transforms in files: ITK's .h5, .tfm, .txt and .mat, and displacement fields as vector images.

A transform file holds the map from fixed to moving points in LPS mm. An ITK composite applies the transform that
was added last first, so a chain is written back to front.

Sizes: ITK stores displacements as float64 without compression, 24 bytes a voxel. A field of 80 x 96 x 112 voxels
(2 mm for a 1 mm brain) takes 20.7 MB.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossmorph.errors import InputError
from crossmorph.io import itk, nifti
from crossmorph.io.volume import reading
from crossmorph.space import Array, Grid
from crossmorph.transform import Affine, Chain, DisplacementField, Transform, compose

FLIP = np.diag(itk.LPS)[:3]
MAT_BYTES = 4096
"""An ITK .mat holds one linear map: some 300 bytes."""

DENSE = ("DisplacementFieldTransform", "BSplineTransform")
"""ITK's transforms of three parameters a node, whose fixed parameters begin with the size of the lattice."""

TRIAL = """
import importlib.util, sys, SimpleITK
if importlib.util.find_spec("resource"):
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]),) * 2)
SimpleITK.ReadTransform(sys.argv[1])
"""
"""Reads a file within some processor seconds, also where whoever started it is no longer there to end it."""

TRIAL_SECONDS = 60

BSPLINE_SAMPLES = 8
"""Displacements sampled in each cell of a B-spline's control grid."""


# -- ITK transform files -----------------------------------------------------------------------------------------


def read_itk(path: Path, fixed: Grid | None = None, moving: Grid | None = None) -> Transform:
    """Read a .h5, .hdf5, .tfm, .txt or .mat file of ITK. B-splines become displacement fields.

    World coordinates say everything, so the grids of the images are not looked at, here and in the other readers.

    Raises:
        InputError: it is no such file, not 3-D, or holds a kind of transform that is not understood.
    """
    import SimpleITK as sitk

    with reading(path, "a transform"):
        CHECKS[path.suffix.lower()](path)
        return _from_itk(sitk.ReadTransform(str(path)))


def _check_text(path: Path) -> None:
    """Refuse a text file that ends within its last line, which ITK takes as it is, or one of a dense transform
    whose sizes are not those of its parameters, for which ITK takes memory."""
    kind, count, line = "", 0, b""
    with path.open("rb") as stream:
        for line in stream:
            name, _, values = line.partition(b":")
            if name == b"Transform":
                kind = values.strip().decode("latin-1")
            elif name == b"Parameters":
                count = len(values.split())
            elif name == b"FixedParameters" and kind.startswith(DENSE):
                size = [float(value) for value in values.split()[:3]]
                if len(size) < 3 or min(size) < 1 or 3 * math.prod(size) != count:
                    raise ValueError(f"its {kind[:40]} has {count} parameters and sizes of {size}")
    if not re.fullmatch(rb"FixedParameters:[-+.\deE \t\r]*\n", line):
        raise ValueError("it does not end with a whole line FixedParameters")


def _check_mat(path: Path) -> None:
    """Refuse a .mat of FSL, which is text, and one of MATLAB that is not two short columns of real numbers."""
    raw = path.read_bytes()[:MAT_BYTES]
    words = raw.split()
    if len(words) == 16 and all(re.fullmatch(rb"[-+.\deE]+", word) for word in words):
        raise InputError("it is a matrix of FSL's flirt; say so (--kind fsl, and both images)")
    at = 0
    for _ in range(2):  # parameters and fixed parameters: type, rows, columns, imaginary, length of name
        kind, rows, columns, imaginary, name = np.frombuffer(raw[at : at + 20].ljust(20, b"\0"), "<i4").tolist()
        end = at + 20 + name + rows * (4 if kind == 10 else 8)
        if kind not in (0, 10) or columns != 1 or imaginary or rows < 0 or not 0 < name < 100 or end > len(raw):
            break
        at = end
    if at == 0 or at != len(raw):
        raise ValueError("it is no MATLAB file of one linear map")


def _check_hdf5(path: Path) -> None:
    """Refuse a file on which the HDF5 library crashes or hangs: a process of its own reads it first."""
    seconds = math.ceil(TRIAL_SECONDS + path.stat().st_size / 2**20)
    command = [sys.executable, "-P", "-c", TRIAL, str(path), str(seconds)]
    try:
        code = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
        ).returncode
    except subprocess.TimeoutExpired:
        code = None
    if code not in (0, 1):  # what is refused with 1 the reader explains
        raise ValueError("the HDF5 library does not get through it")


CHECKS = {
    **dict.fromkeys((".h5", ".hdf5"), _check_hdf5),
    **dict.fromkeys((".tfm", ".txt"), _check_text),
    ".mat": _check_mat,
}
"""What has to hold before ITK, which believes its files, is given one."""


def write_itk(transform: Transform, path: Path) -> None:
    """Write any transform as an ITK composite (.h5, .tfm, .txt); .mat takes affine maps only."""
    import SimpleITK as sitk

    suffix = path.suffix.lower()
    if suffix == ".mat" and not isinstance(transform, Affine):
        raise InputError(".mat files hold one affine map only; use .h5")
    links = transform.transforms if isinstance(transform, Chain) else (transform,)
    written = [_to_itk(link) for link in reversed(links)]
    whole = written[0] if suffix == ".mat" else sitk.CompositeTransform(written)
    sitk.WriteTransform(whole, str(path))
    if suffix not in (".h5", ".hdf5"):  # ITK's other writers do not notice a full disk
        back = sitk.ReadTransform(str(path))
        if (
            back.GetParameters() != whole.GetParameters()
            or back.GetFixedParameters() != whole.GetFixedParameters()
        ):
            raise RuntimeError("the file is not complete")


def _from_itk(transform: Any) -> Transform:
    import SimpleITK as sitk

    if transform.GetDimension() != 3:
        raise InputError(f"this transform is {transform.GetDimension()}-D; crossmorph needs 3-D")
    if transform.IsLinear():
        return Affine(_matrix_of(transform))
    transform = transform.Downcast()
    if isinstance(transform, sitk.CompositeTransform):
        count = transform.GetNumberOfTransforms()
        return compose(*(_from_itk(transform.GetNthTransform(n)) for n in reversed(range(count))))
    if isinstance(transform, sitk.DisplacementFieldTransform):
        return _field_of(transform.GetDisplacementField())
    if isinstance(transform, sitk.BSplineTransform):
        return _sampled_bspline(transform)
    raise InputError(f"transforms of the kind {transform.GetName()} are not understood")


def _matrix_of(transform: Any) -> Array:
    """The RAS matrix of any linear ITK transform, read off from where it sends four points."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([transform.TransformPoint(e.tolist()) for e in np.eye(3)], 1) - origin[:, None]
    matrix[:3, 3] = origin
    return itk.LPS @ matrix @ itk.LPS


def _field_of(image: Any) -> DisplacementField:
    """A SimpleITK vector image of LPS displacements as a field."""
    import SimpleITK as sitk

    size, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    if len(size) != 3 or components != 3:
        raise InputError(
            f"a displacement field needs three axes and vectors of three components; this image has size {size} "
            f"and {components} components"
        )
    vectors = sitk.GetArrayFromImage(image).transpose(3, 2, 1, 0)
    return _field(vectors, Grid(size, itk.affine_of(image)))


def _field(lps: np.ndarray[Any, Any], grid: Grid) -> DisplacementField:
    ras = np.ascontiguousarray(lps * FLIP[:, None, None, None], np.float32)
    return DisplacementField(torch.from_numpy(ras), grid)


def _lps_vectors(transform: DisplacementField, dtype: type[np.floating[Any]]) -> np.ndarray[Any, Any]:
    """(3, I, J, K) displacements along L, P, S."""
    return transform.field.detach().cpu().numpy().astype(dtype) * FLIP[:, None, None, None].astype(dtype)


def _sampled_bspline(transform: Any) -> DisplacementField:
    import SimpleITK as sitk

    cells = np.array(transform.GetTransformDomainMeshSize())
    size = (cells * BSPLINE_SAMPLES + 1).tolist()
    extent = np.array(transform.GetTransformDomainPhysicalDimensions())
    spacing = (extent / (np.array(size) - 1)).tolist()
    origin, direction = transform.GetTransformDomainOrigin(), transform.GetTransformDomainDirection()
    return _field_of(
        sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, size, origin, spacing, direction)
    )


def _to_itk(transform: Transform) -> Any:
    import SimpleITK as sitk

    if isinstance(transform, Affine):
        matrix = itk.LPS @ transform.matrix @ itk.LPS
        return sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
    if isinstance(transform, DisplacementField):
        return sitk.DisplacementFieldTransform(_vector_image(transform, np.float64))
    raise InputError(f"a {type(transform).__name__} cannot be written; collapse it to a displacement field first")


def _vector_image(transform: DisplacementField, dtype: type[np.floating[Any]]) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(_lps_vectors(transform, dtype).transpose(3, 2, 1, 0), isVector=True)
    itk.set_geometry(image, transform.grid)
    return image


# -- displacement fields as images -------------------------------------------------------------------------------


def read_field(path: Path, fixed: Grid | None = None, moving: Grid | None = None) -> DisplacementField:
    """Read a displacement field from .mha, .mhd, .nrrd or .nhdr: three LPS components a voxel.

    Raises:
        InputError: it is no such image.
    """
    import SimpleITK as sitk

    with reading(path, "a displacement field"):
        return _field_of(itk.read_image(path, sitk.sitkVectorFloat64))


def write_field(transform: Transform, path: Path) -> None:
    """Write a displacement field as .mha or .nrrd, float32, compressed; 3D Slicer's grid transform."""
    import SimpleITK as sitk

    image = _vector_image(_as_field(transform), np.float32)
    sitk.WriteImage(image, str(path), useCompression=True)


def read_nifti_field(path: Path, fixed: Grid | None = None, moving: Grid | None = None) -> DisplacementField:
    """Read a displacement field as ANTs and ITK write it: NIfTI (I, J, K, 1, 3) with a vector intent, LPS mm.

    Raises:
        InputError: it is no such image.
    """
    with reading(path, "a displacement field"):
        vectors, affine = nifti.read_vectors(path)
        return _field(vectors, Grid(vectors.shape[1:], affine))


def write_nifti_field(transform: Transform, path: Path) -> None:
    """Write a displacement field as ANTs and ITK do. ITK straightens sheared NIfTI axes, so these are refused."""
    transform = _as_field(transform)
    if transform.grid.shear_deg > 0.01:
        raise InputError(
            f"ITK misreads NIfTI fields on sheared axes ({transform.grid}); use .h5, .mha or "
            ".nrrd, which keep them"
        )
    nifti.write_vectors(_lps_vectors(transform, np.float32), transform.grid, path)


def _as_field(transform: Transform) -> DisplacementField:
    """The transform as one field; anything else is sampled on the grid of the fixed image."""
    if isinstance(transform, DisplacementField):
        return transform
    if transform.fixed_grid is None:
        raise InputError(
            f"an image holds a displacement field, not a {type(transform).__name__}; use .h5, or tell the grid of "
            "the fixed image, on which it is then sampled (--fixed)"
        )
    return DisplacementField(transform.displacements(transform.fixed_grid), transform.fixed_grid)
