"""Everything ITK: LPS geometry, and MetaImage, NRRD and other volumes by SimpleITK.

ITK's world is LPS mm, its index order (i, j, k) is ours, and its arrays come as (k, j, i). RAS and LPS differ by
the sign of x and y, here and nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.io.volume import Volume, reading, to_dtype
from crossmorph.space import Array, Grid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def affine_of(image: Any) -> Array:
    """Voxels to RAS mm of a SimpleITK image (of its first three axes)."""
    size = image.GetDimension()
    direction = np.reshape(image.GetDirection(), (size, size))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return LPS @ affine


def set_geometry(image: Any, grid: Grid) -> None:
    """Give a SimpleITK image the place of a grid. Shear and left-handed axes are kept."""
    lps = LPS @ grid.affine
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetSpacing(grid.spacing.tolist())
    image.SetDirection((lps[:3, :3] / grid.spacing).ravel().tolist())


def read_volume(path: Path) -> Volume:
    """Read .mha, .mhd, .nrrd, .nhdr and what else SimpleITK knows; vector pixels and a fourth axis are channels.

    Raises:
        InputError: SimpleITK cannot read it, it has fewer than three axes, or its spacing is not positive.
    """
    import SimpleITK as sitk

    with reading(path):
        _check_spacing(path)
        image = sitk.ReadImage(str(path))
        values = sitk.GetArrayFromImage(image)
        axes, components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
        if np.iscomplexobj(values):
            raise InputError("this image holds complex numbers; save its magnitude first")
        if axes < 3:
            raise InputError(
                f"this image is {axes}-D {image.GetSize()}; crossmorph works on volumes with three axes"
            )
        if axes > 4 or (axes == 4 and components > 1):
            raise InputError(f"an image of {axes} axes and {components} components is not understood")
        channels = np.moveaxis(values, -1, 0) if components > 1 else values.reshape(-1, *values.shape[-3:])
        notes = (f"{len(channels)} frames or channels",) if len(channels) > 1 else ()
        return Volume(channels.transpose(0, 3, 2, 1), affine_of(image), values.dtype, notes)


def _check_spacing(path: Path) -> None:
    """Refuse a text header with a negative spacing, which ITK would take as a flip; zero it refuses by itself."""
    with path.open("rb") as stream:
        head = stream.read(4096).decode("latin-1")
    line = re.search(r"^(?:ElementSpacing\s*=|spacings:)(.*)$", head, re.MULTILINE)
    if line and re.search(r"(?:^|\s)-", line[1]):
        raise InputError(
            f"the voxel size is {line[1].strip()}; it must be positive on each axis. Repair the header"
        )


def write_volume(values: NDArray[Any], grid: Grid, dtype: np.dtype[Any], path: Path) -> None:
    """Write (C, I, J, K) as .mha or .nrrd, compressed; several channels become vector pixels."""
    import SimpleITK as sitk

    stored = to_dtype(values, dtype)
    vector = len(stored) > 1
    image = sitk.GetImageFromArray(stored.transpose(3, 2, 1, 0) if vector else stored[0].T, isVector=vector)
    set_geometry(image, grid)
    sitk.WriteImage(image, str(path), useCompression=True)
