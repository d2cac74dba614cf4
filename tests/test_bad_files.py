"""Every format cut short, under a wrong ending, with sizes it cannot hold, names that lead away, or bombs.

Whatever a file holds, it is read as it was written or refused in one message with its path: no other exception
comes out, little memory is asked for, and nothing is run.
"""

import base64
import gzip
import io as bytes_io
import json
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from truth import Warp, tilted_grid

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.evaluate.learn2reg import read_array, read_dataset
from crossmorph.image import Image
from crossmorph.points import Mesh, Points
from crossmorph.transform import Affine

GRID = tilted_grid((5, 6, 7))
IMAGE = Image.from_array(np.random.default_rng(0).integers(0, 3000, GRID.shape).astype(np.int16), GRID)
XYZ = torch.tensor([[0.0, 0, 0], [4, 0, 0], [0, 5, 0], [0, 0, 6]])
MESH = Mesh(Points(XYZ), torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]))
AFFINE = Affine.from_parts((1, 2, 3), (4, 5, 6), fixed_grid=GRID, moving_grid=GRID)
FIELD = Warp().field(GRID, fixed_grid=GRID, moving_grid=GRID)

Read = Callable[[Path], Any]


def fsl(path: Path) -> Any:
    return io.read_transform(path, "fsl", fixed=GRID, moving=GRID)


FORMATS: dict[str, tuple[Any, Read]] = {
    "image.nii": (IMAGE, io.read),
    "image.nii.gz": (IMAGE, io.read),
    "image.mha": (IMAGE, io.read),
    "image.nrrd": (IMAGE, io.read),
    "field.nii.gz": (FIELD, io.read_transform),
    "field.nrrd": (FIELD, io.read_transform),
    "field.h5": (FIELD, io.read_transform),
    "affine.tfm": (AFFINE, io.read_transform),
    "affine.mat": (AFFINE, io.read_transform),
    "affine.lta": (AFFINE, io.read_transform),
    "grid.npz": (FIELD, io.read_transform),
    "points.csv": (Points(XYZ, ("a", "b", "c", "d")), io.read_points),
    "points.mrk.json": (Points(XYZ, ("a", "b", "c", "d")), io.read_points),
    "points.fcsv": (Points(XYZ, ("a", "b", "c", "d")), io.read_points),
    "mesh.stl": (MESH, io.read_mesh),
    "mesh.ply": (MESH, io.read_mesh),
    "mesh.vtk": (MESH, io.read_mesh),
    "mesh.gii": (MESH, io.read_mesh),
}
every = pytest.mark.parametrize("name", FORMATS)

TEXT = {"points.csv", "points.fcsv"}
"""Formats of one line a thing: cut after a line, they are shorter and whole."""


def numbers(thing: Any) -> np.ndarray:
    """What a thing is made of."""
    if isinstance(thing, Mesh):
        return np.sort(thing.points.xyz.numpy(), 0)
    if isinstance(thing, Points):
        return thing.xyz.numpy()
    if isinstance(thing, Image):
        return thing.data.numpy()
    return np.asarray(thing(GRID.corners()))


def outcome(read: Read, path: Path) -> tuple[Any, str]:
    """What was read, and the message where nothing was."""
    try:
        return read(path), ""
    except InputError as error:
        return None, str(error)


def assert_same_numbers(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.sort(found.ravel()), np.sort(expected.ravel()), atol=1e-3)


@every
def test_files_that_are_cut_short(tmp_path: Path, name: str) -> None:
    thing, read = FORMATS[name]
    path = tmp_path / name
    io.write(thing, path)
    whole, expected = path.read_bytes(), numbers(thing)
    refused = 0
    for share in (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        path.write_bytes(whole[: int(len(whole) * share)])
        found, refusal = outcome(read, path)
        refused += bool(refusal)
        assert not refusal or str(path) in refusal
        if not refusal and name not in TEXT:
            np.testing.assert_allclose(numbers(found), expected, atol=1e-3)
    assert refused >= (3 if name in TEXT else 6)


@every
@pytest.mark.parametrize("other", FORMATS)
def test_files_under_a_wrong_ending(tmp_path: Path, name: str, other: str) -> None:
    thing, _ = FORMATS[name]
    if Path(name).suffixes == Path(other).suffixes:
        return  # a field is an image of three channels, too
    io.write(thing, tmp_path / name)
    path = tmp_path / f"wrong-{other}"
    path.write_bytes((tmp_path / name).read_bytes())
    found, refusal = outcome(FORMATS[other][1], path)
    assert not refusal or str(path) in refusal
    if not refusal:
        assert_same_numbers(numbers(found), numbers(thing))


@every
@pytest.mark.parametrize(
    "junk", [b"\xff\xfe\x00\x01" * 300, b"\x00" * 1000, "gr\u00fc\u00dfe,x".encode("latin-1") * 99]
)
def test_bytes_that_mean_nothing(tmp_path: Path, name: str, junk: bytes) -> None:
    (tmp_path / name).write_bytes(junk)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        FORMATS[name][1](tmp_path / name)


@pytest.mark.parametrize("junk", [b"", b"\xff" * 99, b"1 0 0 0\n0 1 0 0\n0 0 1 0\n", b"0 0 0 0\n" * 4, b"x " * 16])
def test_flirt_matrices_that_are_none(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "a.mat").write_bytes(junk)
    with pytest.raises(InputError, match=r"a\.mat"):
        fsl(tmp_path / "a.mat")


def test_fsl_warps_that_are_none(tmp_path: Path) -> None:
    io.write(IMAGE, tmp_path / "image.nii.gz")
    with pytest.raises(InputError, match=r"axes \(I, J, K, 3\), but its axes are \(5, 6, 7\)"):
        fsl(tmp_path / "image.nii.gz")
    for code, message in ((2007, "spline coefficients"), (0, "its grid, .* is not that of the fixed image")):
        image = nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.float32), np.eye(4))
        image.header.set_intent(code, allow_unknown=True)
        nib.save(image, tmp_path / "warp.nii.gz")
        with pytest.raises(InputError, match=message):
            fsl(tmp_path / "warp.nii.gz")


# -- sizes that a file cannot hold -------------------------------------------------------------------------------


@contextmanager
def memory(gib: float) -> Iterator[None]:
    """As much more address space as this, so that a larger wish fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gib * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def huge_nifti(path: Path) -> Path:
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
    nib.save(image, path)
    opened = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    raw = opened[:42] + struct.pack("<3h", 32000, 32000, 3200) + opened[48:]
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def huge_mha(path: Path) -> Path:
    path.write_bytes(
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nElementSpacing = 1 1 1\n"
        b"DimSize = 30000 30000 3000\nElementType = MET_SHORT\nElementDataFile = LOCAL\n" + bytes(64)
    )
    return path


def huge_nrrd(path: Path) -> Path:
    head = b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 30000 30000 3000\n"
    rest = b"space directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: gzip\nspace origin: (0,0,0)\n\n"
    path.write_bytes(head + rest + gzip.compress(bytes(64)))
    return path


def huge_npz(path: Path) -> Path:
    stream = bytes_io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f4", "fortran_order": False, "shape": (20000, 20000, 2000, 3)}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("grid.npy", stream.getvalue() + bytes(1000))
    return path


def bomb_npz(path: Path) -> Path:
    """A gigabyte of zeros in a megabyte, claimed honestly, beside a small grid."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("more.npy", "w") as stream:
            np.lib.format.write_array_header_1_0(
                stream, {"descr": "<f4", "fortran_order": False, "shape": (2**28,)}
            )
            for _ in range(64):
                stream.write(bytes(2**24))
        with archive.open("grid.npy", "w") as stream:
            np.save(stream, np.zeros((3, 3, 3)))
    return path


def huge_vtk(path: Path) -> Path:
    path.write_bytes(
        b"# vtk DataFile Version 4.2\nhuge\nBINARY\nDATASET UNSTRUCTURED_GRID\nPOINTS 4000000000 double\n"
        + bytes(99)
    )
    return path


def huge_ply(path: Path) -> Path:
    head = (
        b"ply\nformat binary_little_endian 1.0\nelement vertex 4000000000\nproperty double x\nproperty double y\n"
    )
    rest = b"property double z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    path.write_bytes(head + rest + bytes(99))
    return path


def bomb_gii(path: Path) -> Path:
    io.write(MESH, path)
    text = path.read_text()
    start = text.index("<Data>") + len("<Data>")
    bomb = base64.b64encode(gzip.compress(bytes(2**28), 9)).decode()
    path.write_text(text[:start] + bomb + text[text.index("</Data>") :])
    return path


def laughs_gii(path: Path) -> Path:
    io.write(MESH, path)
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 20}">' for n in range(1, 9))
    text = path.read_text().split("\n", 1)
    declared = f'<!DOCTYPE GIFTI [<!ENTITY a0 "ha">{entities}]>'
    body = text[1][text[1].index("<GIFTI") :].replace("<MetaData", "&a8;<MetaData", 1)
    path.write_text(f"{text[0]}\n{declared}\n{body}")
    return path


def huge_mat(path: Path) -> Path:
    path.write_bytes(struct.pack("<5i", 0, 2**20, 2**11, 0, 10) + b"AffineTra\0" + bytes(99))
    return path


HUGE: dict[str, tuple[Callable[[Path], Path], str, Read]] = {
    "nifti": (huge_nifti, "a.nii", io.read),
    "nifti, packed": (huge_nifti, "a.nii.gz", io.read),
    "metaimage": (huge_mha, "a.mha", io.read),
    "metaimage as a field": (huge_mha, "a.mha", io.read_transform),
    "nrrd": (huge_nrrd, "a.nrrd", io.read),
    "npz": (huge_npz, "a.npz", lambda p: io.read_transform(p, fixed=GRID, moving=GRID)),
    "npz of learn2reg": (huge_npz, "a.npz", lambda p: read_array(p, GRID.shape)),
    "vtk": (huge_vtk, "a.vtk", io.read_mesh),
    "ply": (huge_ply, "a.ply", io.read_mesh),
    "gifti bomb": (bomb_gii, "a.gii", io.read_mesh),
    "gifti entities": (laughs_gii, "a.gii", io.read_mesh),
    "mat": (huge_mat, "a.mat", io.read_transform),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("case", HUGE)
def test_sizes_that_a_file_cannot_hold(tmp_path: Path, case: str) -> None:
    make, name, read = HUGE[case]
    path = make(tmp_path / name)
    assert path.stat().st_size < 2**20
    with memory(1.0), pytest.raises(InputError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "MemoryError" not in repr(caught.value.__cause__)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_arrays_that_are_not_asked_for_stay_packed(tmp_path: Path) -> None:
    path = bomb_npz(tmp_path / "a.npz")
    with (
        memory(0.7),
        pytest.raises(InputError, match=r"a sampling grid is \(I, J, K, 3\); this one is \(3, 3, 3\)"),
    ):
        io.read_transform(path, fixed=GRID, moving=GRID)


# -- names that lead away, and content that would be run ---------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret.raw", "/etc/passwd", "a/../../secret.raw", "b ../../secret.raw", "..\\secret.raw", "C:\\x.raw"],
)
@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_headers_that_name_files_elsewhere(tmp_path: Path, name: str, suffix: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(bytes(range(64)))
    if suffix == ".mhd":
        text = "NDims = 3\nElementSpacing = 1 1 1\nDimSize = 4 4 4\nElementType = MET_UCHAR\n"
        text += f"ElementDataFile = {name}\n"
    else:
        text = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: {name}\n"
    (folder / f"a{suffix}").write_text(text)
    with pytest.raises(
        InputError, match=rf"a\{suffix}: its values are said to be in .* must be beside the header"
    ):
        io.read(folder / f"a{suffix}")


def test_headers_with_values_beside_them_are_read(tmp_path: Path) -> None:
    for name in ("a.mhd", "a.nhdr"):
        sitk.WriteImage(
            sitk.GetImageFromArray(np.arange(60, dtype=np.uint8).reshape(3, 4, 5)), str(tmp_path / name)
        )
        assert io.read(tmp_path / name).data.flatten().sum() == sum(range(60))
    slices = (
        "NDims = 3\nElementSpacing = 1 1 1\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LIST 2\n"
    )
    (tmp_path / "list.mhd").write_text(slices + "one.raw\ntwo.raw\n")
    for name in ("one.raw", "two.raw"):
        (tmp_path / name).write_bytes(b"\1\2\3\4")
    assert io.read(tmp_path / "list.mhd").data.sum() == 20
    (tmp_path / "list.mhd").write_text(slices + "one.raw\n../two.raw\n")
    with pytest.raises(InputError, match="must be beside the header"):
        io.read(tmp_path / "list.mhd")


@pytest.mark.parametrize("path", ["../../etc/passwd", "imagesTr/../../x.nii.gz", 7, ["a"], "a\0b"])
def test_data_sets_that_name_files_elsewhere(tmp_path: Path, path: Any) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [{"image": path}]}))
    with pytest.raises(InputError, match="is no path below the data set's folder"):
        read_dataset(tmp_path)


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", grid=np.array([Trap()], object))
    np.save(tmp_path / "a.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.npz: 'grid.npy' holds object, not plain numbers"):
        io.read_transform(tmp_path / "a.npz", fixed=GRID, moving=GRID)
    for name in ("a.npz", "a.npy"):
        with pytest.raises(InputError, match=name):
            read_array(tmp_path / name, GRID.shape)


@pytest.mark.parametrize("name", ["../../evil.npy", "/evil.npy", "evil.txt"])
def test_archives_are_never_unpacked_to_disk(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr(name, b"x" * 200)
    with pytest.raises(InputError, match=r"a\.npz"):
        io.read_transform(folder / "a.npz", fixed=GRID, moving=GRID)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.npz", "in"]


def test_nested_json(tmp_path: Path) -> None:
    (tmp_path / "a.mrk.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match=r"a\.mrk\.json"):
        io.read_points(tmp_path / "a.mrk.json")


def test_names_that_the_system_refuses(tmp_path: Path) -> None:
    for name in ("a\0b.nii.gz", "x" * 5000 + ".nii.gz"):
        with pytest.raises(InputError, match=r"cannot be opened|does not exist"):
            io.read(tmp_path / name)


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    for thing, name in ((FIELD, "t.lta"), (Affine.identity(), "t.nii.gz"), (MESH, "t.csv")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError):
            io.write(thing, tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3
