"""Microscopy: TIFF and OME-TIFF by tifffile, OME-Zarr by zarr.

Voxel sizes are taken from the file where it tells them with a unit (OME, ImageJ), and asked for where it does not;
none is ever guessed. These formats know no patient: x, y and z of the file are taken as left, back and up, as ITK
takes them, so that transforms fit in programs built on ITK.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.io.itk import LPS
from crossmorph.io.limits import check_size
from crossmorph.io.volume import Volume, reading
from crossmorph.io.zarr_safe import check_array
from crossmorph.space import Array

MM = {
    "nm": 1e-6, "nanometer": 1e-6, "angstrom": 1e-7, "Å": 1e-7,
    "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "\\u00B5m": 1e-3,
    "mm": 1.0, "millimeter": 1.0, "cm": 10.0, "centimeter": 10.0, "m": 1000.0, "meter": 1000.0, "inch": 25.4,
}  # fmt: skip
"""Millimetres in a unit."""

MOST_VOXELS = 2**27
"""Voxels of the level of a pyramid that is read by default, at most: 512 along each axis."""

Spacing = tuple[float | None, float | None, float | None]
"""Along x, y and z in mm, where the file tells it."""


def volume_of(
    values: NDArray[Any], axes: str, found: Spacing, given: Sequence[float] | None, notes: Sequence[str] = ()
) -> Volume:
    """A volume from an array with named axes.

    Args:
        values: one axis a letter of ``axes``.
        axes: x, y, z, and if there c (channels), s (samples of colours), t (time).
        found: voxel size in mm as the file tells.
        given: as the caller says; it wins.
        notes: what reading had to decide.

    Raises:
        InputError: axes are missing or unknown, or no voxel size is known.
    """
    axes = axes.lower()
    keep = [n for n, name in enumerate(axes) if not (values.shape[n] == 1 and name not in "xyz")]
    values, axes = values.reshape([values.shape[n] for n in keep]), "".join(axes[n] for n in keep)
    if not set("xyz") <= set(axes) or not set(axes) <= set("xyzcst") or len(set(axes)) != len(axes):
        raise InputError(
            f"its axes are {axes!r} {values.shape}; a volume needs x, y and z, and may have channels and time"
        )
    spare = [name for name in axes if name not in "xyz"]
    ordered = values.transpose([axes.index(name) for name in (*spare, *"xyz")])
    channels = ordered.reshape(-1, *ordered.shape[-3:])
    spacing, said = _spacing(found, given)
    affine = LPS @ np.diag([*spacing, 1.0])
    if len(channels) > 1:
        said = (*said, f"{len(channels)} frames or channels")
    place = "the file's x, y, z are taken as left, back, up"
    return Volume(channels, affine, values.dtype.newbyteorder("="), (*notes, *said, place))


def _spacing(found: Spacing, given: Sequence[float] | None) -> tuple[Array, tuple[str, ...]]:
    if given is not None:
        spacing = np.asarray(given, np.float64)
        if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
            raise InputError(f"the voxel size must be three positive numbers in mm (x, y, z), not {given}")
        told = [v for v in found if v is not None]
        differs = len(told) == 3 and not np.allclose(told, spacing, rtol=1e-3)
        return spacing, (f"the voxel size given was used; the file says {told} mm",) if differs else ()
    missing = [name for name, value in zip("xyz", found, strict=True) if value is None or not value > 0]
    if missing:
        raise InputError(
            f"it does not tell the voxel size along {', '.join(missing)} with a unit; say it in mm "
            "(register --fixed-spacing-mm, --moving-spacing-mm; spacing_mm= in Python)"
        )
    return np.array(found, np.float64), ()


# -- TIFF --------------------------------------------------------------------------------------------------------


def read_tiff(path: Path, spacing_mm: Sequence[float] | None = None) -> Volume:
    """Read the first series of a TIFF, OME-TIFF or ImageJ stack.

    Raises:
        InputError: tifffile is missing, the file is damaged or no stack, or its voxel size is not known.
    """
    try:
        import tifffile
    except ImportError:
        raise InputError(f"{path}: TIFF needs tifffile; install crossmorph[micro]") from None
    with reading(path, "a TIFF stack"), tifffile.TiffFile(path, _multifile=False) as file:
        series = file.series[0]
        check_size(series.shape, series.dtype.itemsize, path.stat().st_size)
        if any(page is None for page in series.pages):
            raise InputError("its OME description names other files; join them to one file first")
        axes = series.axes
        if not file.ome_metadata and "Z" not in axes:
            axes = re.sub("[IQ]", "Z", axes, count=1)  # pages without a meaning are slices
        found = _ome_spacing(file.ome_metadata) if file.ome_metadata else _imagej_spacing(file)
        notes = (f"the first of {len(file.series)} series was read",) if len(file.series) > 1 else ()
        return volume_of(series.asarray(), axes, found, spacing_mm, notes)


def _ome_spacing(xml: str) -> Spacing:
    """From PhysicalSizeX and so on, whose unit is um where none is named."""
    if "<!ENTITY" in xml or "<!DOCTYPE" in xml:
        raise InputError("its OME description declares entities, which no microscope writes")
    pixels = next((node for node in ElementTree.fromstring(xml).iter() if node.tag.endswith("}Pixels")), None)
    if pixels is None:
        return (None, None, None)

    def size(axis: str) -> float | None:
        value, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        return float(value) * MM[unit] if value and unit in MM else None

    return size("X"), size("Y"), size("Z")


def _imagej_spacing(file: Any) -> Spacing:
    """From ImageJ's description (spacing along z, unit) and the resolution tags (pixels a unit)."""
    told = file.imagej_metadata or {}
    unit = MM.get(str(told.get("unit", "")))
    if unit is None:
        return (None, None, None)
    tags = file.pages[0].tags

    def size(name: str) -> float | None:
        if name not in tags:
            return None
        count, units = tags[name].value
        return unit * units / count if count else None

    depth = told.get("spacing")
    return size("XResolution"), size("YResolution"), float(depth) * unit if depth else None


# -- OME-Zarr ----------------------------------------------------------------------------------------------------


def read_zarr(path: Path, spacing_mm: Sequence[float] | None = None) -> Volume:
    """Read an OME-Zarr image (versions 0.4 and 0.5): the finest level of the pyramid with at most 512^3 voxels.

    Raises:
        InputError: zarr is missing; the folder is damaged, no OME-Zarr, or holds codecs that are not plain
            compression; or its voxel size is not known.
    """
    try:
        import zarr
    except ImportError:
        raise InputError(f"{path}: OME-Zarr needs zarr; install crossmorph[micro]") from None
    with reading(path, "an OME-Zarr image"):
        scales = _multiscales(path)
        axes = "".join(str(axis["name"]) for axis in scales["axes"])
        levels = [_inside(path, str(dataset["path"])) for dataset in scales["datasets"]]
        arrays = [zarr.open_array(level, mode="r") for level in levels]
        sizes = [int(np.prod([array.shape[axes.index(name)] for name in "xyz"])) for array in arrays]
        n = next((n for n, size in enumerate(sizes) if size <= MOST_VOXELS), len(sizes) - 1)
        check_array(levels[n], arrays[n])
        scale, offset = (_transformed(scales, n, kind, len(axes)) for kind in ("scale", "translation"))
        units = [MM.get(str(axis.get("unit"))) for axis in scales["axes"]]
        order = [axes.index(name) for name in "xyz"]
        found = [scale[a] * unit if (unit := units[a]) else None for a in order]
        notes = (f"level {n} of a pyramid of {len(levels)} was read",) if len(levels) > 1 else ()
        volume = volume_of(np.asarray(arrays[n][...]), axes, (found[0], found[1], found[2]), spacing_mm, notes)
        if spacing_mm is None:
            volume.affine[:3, 3] = np.diag(LPS)[:3] * [offset[a] * (units[a] or 0) for a in order]
        return volume


def _multiscales(path: Path) -> dict[str, Any]:
    """The first image of the group's attributes."""
    told: Any = {}
    for name in ("zarr.json", ".zattrs"):
        file = path / name
        if file.is_file():
            if file.stat().st_size > 2**24:
                raise InputError(f"{name} is larger than 16 MiB")
            told = json.loads(file.read_text(encoding="utf-8"))
            break
    told = told.get("attributes", told)
    told = told.get("ome", told)
    if not told.get("multiscales"):
        raise InputError("it has no multiscales attribute; give the folder of the image itself")
    found: dict[str, Any] = told["multiscales"][0]
    if not all(isinstance(axis, dict) for axis in found.get("axes", [None])):
        raise InputError("its axes are not named as in OME-Zarr 0.4 and later")
    return found


def _inside(path: Path, name: str) -> Path:
    """A level's folder; names that lead out of the image are refused."""
    parts = PurePosixPath(name).parts
    whole = path.joinpath(*parts)
    if name.startswith("/") or ".." in parts or "\\" in name or not whole.resolve().is_relative_to(path.resolve()):
        raise InputError(f"the level {name[:80]!r} leads out of the image")
    return whole


def _transformed(scales: dict[str, Any], level: int, kind: str, count: int) -> Array:
    """The scale (product) or translation (scaled sum) of a level: first its own, then that of all levels."""
    scale, offset = np.ones(count), np.zeros(count)
    for holder in (scales["datasets"][level], scales):
        for step in holder.get("coordinateTransformations", ()):
            if step.get("type") == "scale":
                scale, offset = scale * step["scale"], offset * step["scale"]
            elif step.get("type") == "translation":
                offset = offset + step["translation"]
    return scale if kind == "scale" else offset
