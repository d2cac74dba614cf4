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
from crossmorph.io.limits import check_size
from crossmorph.io.volume import Volume, reading, to_dtype
from crossmorph.space import Array, Grid

HEAD = 2**20
"""Bytes in which a text header is looked for; one of a sequence of ultrasound has a line or two a frame."""

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

LONGEST_LINE = 2**12
"""Bytes of a line of a MetaImage header."""

LONGEST_FIELD = 512
"""Characters of a field of a NRRD header. Where ITK does not understand one it puts it into a message of its own,
which overflows at a thousand; comments, the free text of ``content:`` and ``key:=value`` are not put there."""

WHOLE = ("NDims", "DimSize", "ElementNumberOfChannels")
"""Fields of MetaImage that are whole numbers from 1."""

NUMBERS = {
    **dict.fromkeys(("NDims", "ElementNumberOfChannels", "HeaderSize", "CompressedDataSize"), 0),
    **dict.fromkeys(("DimSize", "ElementSpacing", "ElementSize", "Offset", "Position", "Origin"), 1),
    "CenterOfRotation": 1,
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), 2),
}
"""Fields of MetaImage that are numbers: one, one an axis, or a matrix."""


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
        image = read_image(path)
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


def read_image(path: Path, kind: int | None = None) -> Any:
    """A SimpleITK image, after a look at its header: sizes that the file can hold, data files beside it.

    Args:
        path: the file.
        kind: SimpleITK's pixel type to read as; None as stored.
    """
    import SimpleITK as sitk

    with path.open("rb") as stream:
        start = stream.read(HEAD).decode("latin-1")
    head = start.partition("\0")[0]
    _check_spacing(head)
    if path.suffix.lower() in (".mha", ".mhd"):
        _check_metaimage(head)
    elif path.suffix.lower() in (".nrrd", ".nhdr"):
        _check_nrrd(start)
    data = _data_files(path, head)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    bits = re.search(r"(\d+)-bit", sitk.GetPixelIDValueAsString(reader.GetPixelID()))
    shape = (*reader.GetSize(), reader.GetNumberOfComponents())
    check_size(shape, int(bits[1]) // 8 if bits else 1, sum(file.stat().st_size for file in data))
    if kind is not None:
        reader.SetOutputPixelType(kind)
    return reader.Execute()


def _data_files(path: Path, head: str) -> list[Path]:
    """The file, and those beside it that a text header names for its values; names elsewhere are refused."""
    if path.suffix.lower() not in (".mhd", ".mha", ".nhdr", ".nrrd"):
        return [path]
    _, _, told = head.partition("ElementDataFile") if "ElementDataFile" in head else _after_data_file(head)
    first, *more = [line.strip() for line in told.lstrip(" \t=").splitlines()] or [""]
    if first.upper() in ("", "LOCAL"):
        return [path]
    names = [line for line in more if line] if first.upper().startswith("LIST") else [first]
    for name in names:
        if name.startswith(("/", "\\", "~")) or ":" in name or ".." in re.split(r"[/\\]", name):
            raise InputError(
                f"its values are said to be in {name[:80]!r}; they must be beside the header. Move them there"
            )
    if "%" in first:  # a numbered series
        return [file for file in path.parent.iterdir() if file.is_file()]
    return [path, *(path.parent / name for name in names if (path.parent / name).is_file())]


def _after_data_file(head: str) -> tuple[str, str, str]:
    """What stands after ``data file:`` (or ``datafile:``) of a NRRD header, as ``str.partition`` gives it."""
    found = re.search(r"^data ?file:", head, re.MULTILINE | re.IGNORECASE)
    return (head[: found.start()], found[0], head[found.end() :]) if found else (head, "", "")


def _check_metaimage(head: str) -> None:
    """Refuse a header that is not line by line what MetaImage says: ITK's reader crashes on some of them."""
    text, found, rest = head.partition("ElementDataFile")
    if not found or "\n" not in rest:
        raise ValueError("its header does not end with a line ElementDataFile = ...")
    fields: dict[str, list[str]] = {}
    for line in filter(str.strip, text.splitlines()):
        told = re.fullmatch(r"\s*([^\s=:][^=:]*?)\s*[=:]\s*([^\x00-\x08\x0e-\x1f]*)", line)
        if told is None or len(line) > LONGEST_LINE or told[1] in fields:
            raise ValueError(f"its header has the line {line[:80]!r}, which is no field of its own with a value")
        fields[told[1]] = told[2].split()
    axes = fields.get("NDims", ["none"])[0]
    if not re.fullmatch(r"[1-9]", axes):
        raise ValueError(f"its header says NDims = {axes[:20]}; it must be from 1 to 9")
    for name in fields.keys() & NUMBERS.keys():
        values, needed = fields[name], int(axes) ** NUMBERS[name]
        pattern = (
            r"0*[1-9]\d{0,8}" if name in WHOLE else r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?|[-+]?(nan|inf)"
        )
        if len(values) != needed or not all(re.fullmatch(pattern, value) for value in values):
            kind = "whole numbers from 1" if name in WHOLE else "numbers"
            raise ValueError(f"its header says {name} = {' '.join(values)[:80]}; it must be {needed} {kind}")


def _check_nrrd(head: str) -> None:
    """Refuse fields that ITK dies of, and sizes that are not whole numbers of 31 bits: it takes memory for all."""
    head = re.split(r"\r?\n\r?\n", head, maxsplit=1)[0]
    if head.startswith("NRRD") and "\0" in head:
        raise ValueError("its header is not text: it holds a zero before the empty line that ends it")
    for line in head.split("\n"):
        if len(line) > LONGEST_FIELD and not re.match(r"#|content: |[^:]{1,80}:=", line):
            raise ValueError(f"its header has the line {line[:80]!r}..., which is too long for a field")
    for line in re.findall(r"^sizes:(.*)$", head, re.MULTILINE | re.IGNORECASE):
        if not all(re.fullmatch(r"\d{1,10}", size) and 0 < int(size) < 2**31 for size in line.split()):
            raise ValueError(f"its header says sizes: {line.strip()[:80]}; they must be whole numbers from 1")


def _check_spacing(head: str) -> None:
    """Refuse a text header with a negative spacing, which ITK would take as a flip; zero it refuses by itself."""
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
