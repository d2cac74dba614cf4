"""Triangle surfaces: STL, PLY and VTK by meshio, GIFTI by nibabel.

GIFTI is RAS. The others say it in their head, as 3D Slicer writes it (``SPACE=LPS``), or not at all; then RAS is
assumed, unless the caller knows better. Written files are RAS and say so. meshio does not read VTK's POLYDATA, the
usual surface; it is rewritten as the UNSTRUCTURED_GRID that meshio reads and writes.

Normals are left out, as they do not fit a moved surface; programs work them out again.
"""

from __future__ import annotations

import base64
import io
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.io.itk import LPS
from crossmorph.io.limits import deflated_size
from crossmorph.io.volume import reading
from crossmorph.points import Mesh, Points

System = Literal["ras", "lps"]
HEAD = 4096
NORMALS = {"nx", "ny", "nz", "normals", "facet_normals"}
TRIANGLE = 5
"""VTK's number for the cell type."""

VTK_BYTES = {b"float": 4, b"double": 8, b"int": 4, b"long": 8, b"vtktypeint32": 4, b"vtktypeint64": 8}

MESHIO = {".stl": "stl", ".ply": "ply", ".vtk": "vtk"}
"""Ending and module of meshio."""

ENDINGS = (*MESHIO, ".gii")


def read_mesh(path: Path, system: System | None = None) -> Mesh:
    """Read a triangle surface with its point and cell data.

    Args:
        path: .stl, .ply, .vtk or .gii.
        system: of the coordinates, where the file does not say.

    Raises:
        InputError: the file is damaged, holds other cells than triangles, or says another system.
    """
    with reading(path, "a surface"):
        if path.suffix.lower() == ".gii":
            if system == "lps":
                raise InputError("GIFTI is RAS by definition")
            return _read_gifti(path)
        head = path.read_bytes()[:HEAD]
        _check_counts(head, path.stat().st_size)
        said = re.search(rb"SPACE=(LPS|RAS)", head)
        told = said[1].decode().lower() if said else None
        if told and system and told != system:
            raise InputError(f"the file says that it is {told.upper()}, not {system.upper()}")
        with _readable(path, head) as whole, np.errstate(over="ignore"):
            mesh = _module(path).read(whole)
        lps = (told or system) == "lps"
        return _from_meshio(mesh, np.diag(LPS)[:3] if lps else np.ones(3))


def write_mesh(mesh: Mesh, path: Path) -> None:
    """Write a surface in RAS mm with its data.

    Raises:
        InputError: the format cannot hold the data.
    """
    suffix = path.suffix.lower()
    kept = {".stl": (), ".vtk": ("point", "cell")}.get(suffix, ("point",))
    for where, data in (("point", mesh.point_data), ("cell", mesh.cell_data)):
        if data and where not in kept:
            raise InputError(f"{suffix} holds no {where} data ({', '.join(data)}), which would be lost; use .vtk")
    xyz, faces = mesh.points.xyz.cpu().numpy(), mesh.faces.cpu().numpy()
    if suffix == ".gii":
        _write_gifti(xyz, faces, mesh.point_data, path)
        return
    import meshio

    cells = {name: [values] for name, values in mesh.cell_data.items()}
    whole = meshio.Mesh(xyz, [("triangle", faces)], point_data=dict(mesh.point_data), cell_data=cells)
    _module(path).write(path, whole, **({} if suffix == ".vtk" else {"binary": True}))
    _say_ras(path)


def _module(path: Path) -> Any:
    try:
        import meshio
    except ImportError:
        raise InputError(f"{path.suffix} files need meshio; install crossmorph[mesh]") from None
    return getattr(meshio, MESHIO[path.suffix.lower()])


def _check_counts(head: bytes, size: int) -> None:
    """Refuse counts that the file is too small for, before memory is asked for them, and a PLY without an end of
    its head, for which meshio would look forever."""
    if head.startswith(b"ply") and b"\nend_header" not in head:
        raise ValueError("its head has no end")
    words = rb"(?:POINTS|POLYGONS|CELLS|CELL_TYPES|POINT_DATA|CELL_DATA|element\s+\w+)\s+(\d+)"
    for count in re.findall(words, head):
        if int(count) > size:
            raise InputError(f"it claims {int(count)} points or faces, but has {size} bytes")


def _from_meshio(mesh: Any, signs: NDArray[Any]) -> Mesh:
    kinds = {block.type for block in mesh.cells}
    if kinds != {"triangle"}:
        raise InputError(
            f"a surface of triangles is needed; this one has {', '.join(sorted(kinds)) or 'no faces'}"
        )
    faces = np.concatenate([block.data for block in mesh.cells]).astype(np.int64)
    xyz = np.asarray(mesh.points, np.float64) * signs
    cells = {name: np.concatenate(parts) for name, parts in mesh.cell_data.items()}
    return _mesh(xyz, faces, _kept(mesh.point_data), _kept(cells))


def _kept(data: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """All but normals; one value an entry as one axis."""
    whole = {name: np.asarray(values) for name, values in data.items() if name.lower() not in NORMALS}
    return {name: values[:, 0] if values.shape[1:] == (1,) else values for name, values in whole.items()}


def _mesh(xyz: NDArray[Any], faces: NDArray[Any], points: dict[str, Any], cells: dict[str, Any]) -> Mesh:
    if xyz.ndim != 2 or xyz.shape[1] != 3 or not np.isfinite(xyz).all():
        raise InputError("its points must be finite and have three coordinates")
    return Mesh(Points(torch.from_numpy(xyz)), torch.from_numpy(faces), points, cells)


# -- VTK ---------------------------------------------------------------------------------------------------------


@contextmanager
def _readable(path: Path, head: bytes) -> Iterator[Path]:
    """What meshio reads: the file, or for POLYDATA the same surface as UNSTRUCTURED_GRID."""
    if path.suffix.lower() != ".vtk" or not re.search(rb"^DATASET\s+POLYDATA", head, re.MULTILINE):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        rewritten = Path(folder) / "surface.vtk"
        rewritten.write_bytes(_unstructured(path.read_bytes()))
        yield rewritten


def _unstructured(raw: bytes) -> bytes:
    """A legacy VTK file of POLYDATA whose polygons are triangles, as UNSTRUCTURED_GRID."""
    binary = bool(re.search(rb"^BINARY\s*$", raw[:HEAD], re.MULTILINE))
    (_, count, kind), start = _line(raw, raw.index(b"POINTS"))
    after = start + int(count) * 3 * VTK_BYTES[kind.lower()] if binary else start
    polygons = raw.index(b"POLYGONS", after)
    if re.search(rb"VERTICES|LINES|TRIANGLE_STRIPS", raw[after:polygons]):
        raise InputError("it holds vertices, lines or strips beside triangles; save the triangles alone")
    (_, first, second), start = _line(raw, polygons)
    offsets = bool(re.match(rb"\s*OFFSETS", raw[start:]))  # since version 5.1
    triangles = int(first) - offsets
    if int(second) != triangles * (3 if offsets else 4):
        raise InputError("a surface of triangles is needed; this one has other polygons")
    if not binary:
        rest = re.search(rb"^(?:POINT_DATA|CELL_DATA|METADATA|LINES|VERTICES)", raw[start:], re.MULTILINE)
        end = start + rest.start() if rest else len(raw)
    elif offsets:
        end = start
        for numbers in (first, second):
            (_, kind), start = _line(raw, end)
            end = start + int(numbers) * VTK_BYTES[kind.lower()] + 1
    else:
        end = start + int(second) * 4
    kinds = np.full(triangles, TRIANGLE, ">i4").tobytes() if binary else b"5\n" * triangles
    cells = b"CELLS" + raw[polygons + len(b"POLYGONS") : end]
    head = raw[:polygons].replace(b"POLYDATA", b"UNSTRUCTURED_GRID", 1)
    data = _renamed(raw[end:]) if offsets else raw[end:]
    return head + cells + b"\nCELL_TYPES %d\n" % triangles + kinds + b"\n" + data


def _renamed(data: bytes) -> bytes:
    """Types of C by the names of version 5.1, where meshio takes int for 64 bits and does not know the others."""

    def renamed(found: re.Match[bytes]) -> bytes:
        bits = {b"char": b"8", b"short": b"16", b"int": b"32"}[found[3]]
        return found[1] + b"vtktype" + (b"u" if found[2] else b"") + b"int" + bits

    return re.sub(rb"(?m)^((?:SCALARS|VECTORS|\S+ \d+) \S+ )(unsigned_)?(char|short|int)\b", renamed, data)


def _line(raw: bytes, at: int) -> tuple[list[bytes], int]:
    """Words of the line that begins at a place, and where the next one begins."""
    end = raw.index(b"\n", at)
    return raw[at:end].split(), end + 1


def _say_ras(path: Path) -> None:
    """Put SPACE=RAS into the head of a file that meshio wrote."""
    raw = path.read_bytes()
    if path.suffix.lower() == ".stl":
        raw = b"crossmorph SPACE=RAS".ljust(80) + raw[80:]
    elif path.suffix.lower() == ".ply":
        first, rest = raw.split(b"\n", 1)
        form, rest = rest.split(b"\n", 1)
        raw = b"\n".join((first, form, b"comment SPACE=RAS", rest))
    else:
        version, _, rest = raw.split(b"\n", 2)
        raw = b"\n".join((version, b"crossmorph SPACE=RAS", rest))
    path.write_bytes(raw)


# -- GIFTI -------------------------------------------------------------------------------------------------------


def _read_gifti(path: Path) -> Mesh:
    import nibabel as nib
    from nibabel.gifti import gifti

    _check_gifti(path.read_bytes())
    image = nib.load(path)
    if not isinstance(image, gifti.GiftiImage):
        raise InputError("it is no GIFTI surface")
    arrays: dict[str, list[Any]] = {"points": [], "faces": []}
    data: dict[str, Any] = {}
    codes = {nib.nifti1.intent_codes["pointset"]: "points", nib.nifti1.intent_codes["triangle"]: "faces"}
    for n, array in enumerate(image.darrays):
        if array.intent in codes:
            arrays[codes[array.intent]].append(array.data)
        else:
            data[str(array.meta.get("Name") or f"data_{n}")] = np.asarray(array.data)
    if [len(found) for found in arrays.values()] != [1, 1]:
        raise InputError("a GIFTI surface has one array of points and one of triangles; this file has not")
    xyz, faces = arrays["points"][0].astype(np.float64), arrays["faces"][0].astype(np.int64)
    return _mesh(xyz, faces, data, {})


def _check_gifti(raw: bytes) -> None:
    """Refuse arrays that unpack to more than they claim to be."""
    for head, packed in re.findall(rb"<DataArray([^>]*)>.*?<Data>(.*?)</Data>", raw, re.DOTALL):
        if b"GZipBase64" in head:
            sizes = [int(n) for n in re.findall(rb'Dim\d="(\d+)"', head)]
            most = 8 * math.prod(sizes)
            if deflated_size(io.BytesIO(base64.b64decode(packed)), most) > most:
                raise InputError(f"an array of it unpacks to more than the {sizes} numbers that it claims")


def _write_gifti(xyz: NDArray[Any], faces: NDArray[Any], data: Any, path: Path) -> None:
    import nibabel as nib
    from nibabel.gifti import gifti

    array: Any = gifti.GiftiDataArray
    system: Any = gifti.GiftiCoordSystem
    scanner = system("NIFTI_XFORM_SCANNER_ANAT", "NIFTI_XFORM_SCANNER_ANAT", np.eye(4))
    arrays = [
        array(xyz.astype(np.float32), "pointset", "NIFTI_TYPE_FLOAT32", coordsys=scanner),
        array(faces.astype(np.int32), "triangle", "NIFTI_TYPE_INT32"),
    ]
    for name, values in data.items():
        kind = (np.int32, "NIFTI_TYPE_INT32") if values.dtype.kind in "iub" else (np.float32, "NIFTI_TYPE_FLOAT32")
        arrays.append(array(values.astype(kind[0]), "none", kind[1], meta={"Name": name}))
    nib.save(gifti.GiftiImage(darrays=arrays), path)
