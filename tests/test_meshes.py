"""Surfaces and Slicer's markups: other programs' files, their coordinate systems, and what is kept."""

import json
from pathlib import Path
from typing import Any

import meshio
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nibabel.gifti import gifti

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.points import Mesh, Points
from crossmorph.transform import Affine

XYZ = np.array([[0, 0, 0], [10, 0, 0], [0, 20, 0], [0, 0, 30.5]])
FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
LPS = np.array([-1.0, -1.0, 1.0])
POINT_DATA = {"thickness": np.array([1.5, 2.5, 3.5, 4.5])}
CELL_DATA = {"region": np.array([7, 8, 9, 7], np.int32)}


def mesh(**data: Any) -> Mesh:
    return Mesh(Points(torch.from_numpy(XYZ)), torch.from_numpy(FACES), **data)


def triangles(xyz: np.ndarray, faces: np.ndarray) -> set[tuple[float, ...]]:
    """Corner by corner, beginning anywhere."""
    corners = [np.roll(xyz[face], -min(range(3), key=lambda n: tuple(xyz[face][n])), 0) for face in faces]
    return {tuple(np.round(c, 4).ravel().tolist()) for c in corners}


def assert_same(read: Mesh) -> None:
    assert triangles(read.points.xyz.numpy(), read.faces.numpy()) == triangles(XYZ, FACES)


@pytest.mark.parametrize("suffix", [".stl", ".ply", ".vtk", ".gii"])
def test_surfaces_come_back(tmp_path: Path, suffix: str) -> None:
    kept: dict[str, Any] = {".stl": {}, ".vtk": {"point_data": POINT_DATA, "cell_data": CELL_DATA}}.get(
        suffix, {"point_data": POINT_DATA}
    )
    io.write(mesh(**kept), tmp_path / f"a{suffix}")
    back = io.read_mesh(tmp_path / f"a{suffix}")
    assert_same(back)
    for name in ("point_data", "cell_data"):
        found, expected = getattr(back, name), kept.get(name, {})
        assert set(found) == set(expected)
        for key, values in expected.items():
            np.testing.assert_allclose(found[key], values)


@pytest.mark.parametrize("suffix", [".stl", ".ply", ".vtk"])
def test_the_system_is_told_or_taken_from_the_head(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    io.write(mesh(), path)
    raw = path.read_bytes()
    assert b"SPACE=RAS" in raw[:200]
    path.write_bytes(raw.replace(b"SPACE=RAS", b"SPACE=LPS"))
    lps = io.read_mesh(path)
    assert triangles(lps.points.xyz.numpy() * LPS, lps.faces.numpy()) == triangles(XYZ, FACES)
    with pytest.raises(InputError, match="says that it is LPS, not RAS"):
        io.read_mesh(path, "ras")
    path.write_bytes(raw.replace(b"SPACE=RAS", b"         "))
    assert_same(io.read_mesh(path))
    untold = io.read_mesh(path, "lps")
    assert triangles(untold.points.xyz.numpy() * LPS, untold.faces.numpy()) == triangles(XYZ, FACES)


def polydata(path: Path, binary: bool, offsets: bool) -> Path:
    """What VTK 8 (or, with offsets, VTK 9) writes for a surface."""

    def block(values: np.ndarray, kind: str) -> bytes:
        if binary:
            return values.astype(kind).tobytes() + b"\n"
        return " ".join(map(str, values.ravel().tolist())).encode() + b"\n"

    text = [f"# vtk DataFile Version {'5.1' if offsets else '4.2'}\nvtk output SPACE=LPS\n"]
    text += ["BINARY" if binary else "ASCII", "\nDATASET POLYDATA\nPOINTS 4 float\n"]
    parts = ["".join(text).encode(), block(XYZ, ">f4")]
    if offsets:
        parts += [b"METADATA\nINFORMATION 0\n\n", b"POLYGONS 5 12\nOFFSETS vtktypeint64\n"]
        parts += [block(np.arange(5) * 3, ">i8"), b"CONNECTIVITY vtktypeint64\n", block(FACES, ">i8")]
    else:
        parts += [b"POLYGONS 4 16\n", block(np.column_stack((np.full(4, 3), FACES)), ">i4")]
    parts += [b"\nCELL_DATA 4\nSCALARS region int 1\nLOOKUP_TABLE default\n", block(CELL_DATA["region"], ">i4")]
    parts += [b"POINT_DATA 4\nSCALARS thickness double 1\nLOOKUP_TABLE default\n"]
    path.write_bytes(b"".join([*parts, block(POINT_DATA["thickness"], ">f8")]))
    return path


@pytest.mark.parametrize("binary", [False, True], ids=["ascii", "binary"])
@pytest.mark.parametrize("offsets", [False, True], ids=["4.2", "5.1"])
def test_polydata(tmp_path: Path, binary: bool, offsets: bool) -> None:
    read = io.read_mesh(polydata(tmp_path / "a.vtk", binary, offsets))
    assert triangles(read.points.xyz.numpy() * LPS, read.faces.numpy()) == triangles(XYZ, FACES)
    np.testing.assert_array_equal(read.cell_data["region"], CELL_DATA["region"])
    np.testing.assert_array_equal(read.point_data["thickness"], POINT_DATA["thickness"])


def test_polydata_of_other_polygons(tmp_path: Path) -> None:
    raw = polydata(tmp_path / "a.vtk", False, False).read_bytes()
    (tmp_path / "a.vtk").write_bytes(raw.replace(b"POLYGONS 4 16\n3 0 2 1", b"POLYGONS 4 17\n4 0 2 1 3"))
    with pytest.raises(InputError, match=r"a\.vtk: a surface of triangles is needed; this one has other polygons"):
        io.read_mesh(tmp_path / "a.vtk")


def test_surfaces_that_others_wrote(tmp_path: Path) -> None:
    whole = meshio.Mesh(XYZ, [("triangle", FACES)])
    for name in ("a.ply", "a.stl", "a.vtk"):
        whole.write(tmp_path / name)
        assert_same(io.read_mesh(tmp_path / name))
    arrays = [
        gifti.GiftiDataArray(XYZ.astype(np.float32), "pointset", "NIFTI_TYPE_FLOAT32"),
        gifti.GiftiDataArray(FACES.astype(np.int32), "triangle", "NIFTI_TYPE_INT32"),
    ]
    nib.save(gifti.GiftiImage(darrays=arrays), tmp_path / "a.surf.gii")
    assert_same(io.read_mesh(tmp_path / "a.surf.gii"))


def test_nothing_is_lost_silently(tmp_path: Path) -> None:
    for name, data in {"a.stl": "point", "a.gii": "cell"}.items():
        with pytest.raises(InputError, match=rf"cannot write .*{name}: .* holds no {data} data .* would be lost"):
            io.write(mesh(point_data=POINT_DATA, cell_data=CELL_DATA), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="has 4 entries; it needs 3"):
        Mesh(Points(torch.zeros(3, 3)), torch.zeros(0, 3).long(), POINT_DATA)


def test_other_cells_than_triangles(tmp_path: Path) -> None:
    meshio.Mesh(XYZ, [("tetra", [[0, 1, 2, 3]])]).write(tmp_path / "a.vtk")
    with pytest.raises(InputError, match="this one has tetra"):
        io.read_mesh(tmp_path / "a.vtk")


# -- markups -----------------------------------------------------------------------------------------------------


def markup(path: Path, system: str | None, points: list[Any], **other: Any) -> Path:
    control = [{"id": str(n), "label": f"L{n}", "position": p, **other} for n, p in enumerate(points)]
    one = {"type": "Fiducial", "coordinateUnits": "mm", "controlPoints": control}
    path.write_text(json.dumps({"markups": [one | ({"coordinateSystem": system} if system else {})]}))
    return path


@pytest.mark.parametrize(("system", "signs"), [("LPS", LPS), ("RAS", 1), ("1", LPS), ("0", 1)])
def test_markups_and_fiducials_say_their_system(tmp_path: Path, system: str, signs: Any) -> None:
    path = markup(tmp_path / "a.mrk.json", system, XYZ.tolist())
    np.testing.assert_allclose(io.read_points(path).xyz.numpy(), XYZ * signs)
    assert io.read_points(path).names == ("L0", "L1", "L2", "L3")
    rows = "".join(f"n{n},{','.join(map(str, p))},0,0,0,1,1,1,0,L{n},,\n" for n, p in enumerate(XYZ.tolist()))
    head = f"# Markups fiducial file version = 4.10\n# CoordinateSystem = {system}\n"
    columns = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    (tmp_path / "a.fcsv").write_text(head + columns + rows)
    read = io.read_points(tmp_path / "a.fcsv")
    np.testing.assert_allclose(read.xyz.numpy(), XYZ * signs)
    assert read.names == ("L0", "L1", "L2", "L3")


@pytest.mark.parametrize("suffix", [".mrk.json", ".fcsv", ".csv"])
def test_points_come_back_and_slicer_finds_lps(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    points = Points(torch.from_numpy(XYZ), ("a", "b, c", "ü", ""))
    io.write(points, path)
    back = io.read_points(path)
    np.testing.assert_allclose(back.xyz.numpy(), XYZ)
    assert back.names == points.names
    if suffix == ".mrk.json":
        one = json.loads(path.read_text())["markups"][0]
        assert one["coordinateSystem"] == "LPS"
        np.testing.assert_allclose(one["controlPoints"][1]["position"], XYZ[1] * LPS)
    if suffix == ".fcsv":
        assert "CoordinateSystem = LPS" in path.read_text()
        assert ",-10.000000," in path.read_text()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: markup(p, None, [[1, 2, 3]]), "must be LPS or RAS, but the file says None"),
        (lambda p: markup(p, "IJK", [[1, 2, 3]]), "must be LPS or RAS, but the file says 'IJK'"),
        (lambda p: markup(p, "RAS", []), "no point is placed"),
        (lambda p: markup(p, "RAS", [[1, 2, 3]], positionStatus="undefined"), "no point is placed"),
        (lambda p: markup(p, "RAS", [[1, 2, float("nan")]]), "NaN or infinite"),
        (lambda p: markup(p, "RAS", [[1, 2]]), "cannot be read as markups"),
        (lambda p: p.write_text("[]") and p, "no list of markups"),
        (lambda p: p.write_bytes(b'{"markups": "\xff"}') and p, "cannot be read as markups"),
    ],
)
def test_bad_markups(tmp_path: Path, write: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        io.read_points(write(tmp_path / "a.mrk.json"))


def test_fiducials_without_a_system(tmp_path: Path) -> None:
    (tmp_path / "a.fcsv").write_text("# columns = id,x,y,z\n1,2,3,4\n")
    with pytest.raises(InputError, match="must be LPS or RAS, but the file says None"):
        io.read_points(tmp_path / "a.fcsv")


def test_a_point_moves_as_itk_moves_it(tmp_path: Path) -> None:
    turn = Affine.rotation((10, 20, 30), center_mm=(4, 5, 6))
    io.write_transform(turn, tmp_path / "t.tfm")
    path = markup(tmp_path / "a.mrk.json", "LPS", XYZ.tolist())
    theirs = sitk.ReadTransform(str(tmp_path / "t.tfm"))
    expected = np.array([theirs.TransformPoint(p) for p in XYZ.tolist()])
    points = io.read_points(path)
    io.write(points.moved_to(turn(points.xyz), None), path)
    positions = [p["position"] for p in json.loads(path.read_text())["markups"][0]["controlPoints"]]
    np.testing.assert_allclose(positions, expected, atol=1e-6)
