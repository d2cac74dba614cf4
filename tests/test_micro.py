"""TIFF, OME-TIFF and OME-Zarr: axes, voxel sizes that are told or asked for, and files that want harm."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
import zarr

from crossmorph import io
from crossmorph.errors import InputError

VALUES = np.random.default_rng(0).integers(0, 60000, (4, 5, 6)).astype(np.uint16)  # z, y, x
UM = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.6, "PhysicalSizeZ": 2.0}
UNITS = {f"PhysicalSize{axis}Unit": "µm" for axis in "XYZ"}


def ome(path: Path, values: np.ndarray = VALUES, axes: str = "ZYX", **metadata: Any) -> Path:
    tifffile.imwrite(path, values, ome=True, metadata={"axes": axes, **metadata})
    return path


# -- TIFF --------------------------------------------------------------------------------------------------------


def test_ome_tiff(tmp_path: Path) -> None:
    image = io.read(ome(tmp_path / "a.ome.tif", **UM, **UNITS))
    np.testing.assert_allclose(image.grid.spacing, [0.0005, 0.0006, 0.002])
    np.testing.assert_array_equal(image.data[0].numpy(), VALUES.transpose(2, 1, 0))
    assert image.dtype == np.uint16
    assert image.notes == ("the file's x, y, z are taken as left, back, up",)


def test_voxels_lie_where_itk_puts_them(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", VALUES, photometric="minisblack")
    theirs = sitk.ReadImage(str(tmp_path / "a.tif"))
    theirs.SetSpacing((0.5, 0.6, 2.0))
    image = io.read(tmp_path / "a.tif", spacing_mm=(0.5, 0.6, 2.0))
    for index in [(0, 0, 0), (5, 0, 0), (5, 4, 3)]:
        point = np.array(theirs.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose(image.grid.to_world(np.array(index, float)), point)
        assert image.data[0][index] == theirs[index]


def test_imagej_stacks_tell_their_spacing(tmp_path: Path) -> None:
    told = {"spacing": 2.0, "unit": "um", "axes": "ZYX"}
    tifffile.imwrite(tmp_path / "a.tif", VALUES, imagej=True, resolution=(1 / 0.5, 1 / 0.6), metadata=told)
    np.testing.assert_allclose(io.read(tmp_path / "a.tif").grid.spacing, [0.0005, 0.0006, 0.002], rtol=1e-5)


@pytest.mark.parametrize(
    ("axes", "shape"), [("CZYX", (2, 4, 5, 6)), ("ZCYX", (4, 2, 5, 6)), ("TZCYX", (3, 4, 2, 5, 6))]
)
def test_channels_and_time(tmp_path: Path, axes: str, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    image = io.read(ome(tmp_path / "a.ome.tif", values, axes, **UM, **UNITS))
    spare = [n for n, name in enumerate(axes) if name in "TC"]
    expected = values.transpose([*spare, axes.index("X"), axes.index("Y"), axes.index("Z")]).reshape(-1, 6, 5, 4)
    np.testing.assert_array_equal(image.data.numpy(), expected)


def test_the_spacing_is_asked_for_and_never_guessed(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", VALUES, photometric="minisblack", resolution=(300, 300))
    with pytest.raises(
        InputError, match=r"a\.tif: it does not tell the voxel size along x, y, z with a unit; say it"
    ):
        io.read(tmp_path / "a.tif")
    ome(tmp_path / "b.ome.tif", **{k: UM[k] for k in ("PhysicalSizeX", "PhysicalSizeY")})
    with pytest.raises(InputError, match="does not tell the voxel size along z"):
        io.read(tmp_path / "b.ome.tif")
    ome(tmp_path / "c.ome.tif", **UM, **UNITS)
    image = io.read(tmp_path / "c.ome.tif", spacing_mm=(1, 2, 3))
    np.testing.assert_allclose(image.grid.spacing, [1, 2, 3])
    assert image.notes[0].startswith("the voxel size given was used; the file says [0.0005")
    for bad in ((1, 2), (1, 0, 2), (1, 2, float("nan"))):
        with pytest.raises(InputError, match="must be three positive numbers"):
            io.read(tmp_path / "c.ome.tif", spacing_mm=bad)
    io.write(image, tmp_path / "d.nii.gz")
    with pytest.raises(InputError, match="tells its voxel size itself"):
        io.read(tmp_path / "d.nii.gz", spacing_mm=(1, 2, 3))


def test_bad_tiffs(tmp_path: Path) -> None:
    whole = ome(tmp_path / "a.ome.tif", **UM, **UNITS).read_bytes()
    for name, raw, message in (
        ("empty.tif", b"", "cannot be read as a TIFF stack"),
        ("text.tif", b"hello", "cannot be read as a TIFF stack"),
        ("cut.ome.tif", whole[: len(whole) // 2], r"cut\.ome\.tif"),
        ("bomb.ome.tif", whole.replace(b"<Image", b"<!ENTITY a 'b'>", 1), r"bomb\.ome\.tif"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InputError, match=message):
            io.read(tmp_path / name)
    tifffile.imwrite(tmp_path / "flat.tif", VALUES[0])
    with pytest.raises(InputError, match=r"its axes are 'yx' \(5, 6\); a volume needs x, y and z"):
        io.read(tmp_path / "flat.tif", spacing_mm=(1, 1, 1))


def test_a_tiff_that_claims_too_much(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES[0], metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[name].overwrite(2**31 // 1000)
    with pytest.raises(InputError, match="it claims"):
        io.read(path, spacing_mm=(1, 1, 1))


# -- OME-Zarr ----------------------------------------------------------------------------------------------------


def ome_zarr(path: Path, version: str = "0.4", unit: str | None = "micrometer", **array: Any) -> Path:
    """Two levels of an image of one channel, the second half as fine in the plane."""
    form = 2 if version == "0.4" else 3
    root = zarr.open_group(path, mode="w", zarr_format=form)
    levels = [VALUES[None], VALUES[None, :, ::2, ::2]]
    for n, values in enumerate(levels):
        made = root.create_array(str(n), shape=values.shape, chunks=(1, 2, 3, 3), dtype=values.dtype, **array)
        made[...] = values
    axes: list[dict[str, Any]] = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space"} | ({"unit": unit} if unit else {}) for name in "zyx"]
    steps = [
        [
            {"type": "scale", "scale": [1, 2.0, 0.6 * f, 0.5 * f]},
            {"type": "translation", "translation": [0, 10, 20, 30]},
        ]
        for f in (1, 2)
    ]
    datasets = [{"path": str(n), "coordinateTransformations": step} for n, step in enumerate(steps)]
    told = [{"version": version, "axes": axes, "datasets": datasets}]
    root.attrs.update({"multiscales": told} if form == 2 else {"ome": {"version": version, "multiscales": told}})
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(tmp_path: Path, version: str) -> None:
    image = io.read(ome_zarr(tmp_path / "a.zarr", version))
    np.testing.assert_array_equal(image.data[0].numpy(), VALUES.transpose(2, 1, 0))
    np.testing.assert_allclose(image.grid.spacing, [0.0005, 0.0006, 0.002])
    np.testing.assert_allclose(image.grid.origin, [-0.03, -0.02, 0.01])
    assert image.notes[0] == "level 0 of a pyramid of 2 was read"


def test_large_pyramids_are_read_at_a_coarser_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmorph.io.micro.MOST_VOXELS", 40)
    image = io.read(ome_zarr(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(image.data[0].numpy(), VALUES[:, ::2, ::2].transpose(2, 1, 0))
    np.testing.assert_allclose(image.grid.spacing, [0.001, 0.0012, 0.002])
    assert image.notes[0] == "level 1 of a pyramid of 2 was read"


def test_zarr_without_a_unit(tmp_path: Path) -> None:
    path = ome_zarr(tmp_path / "a.zarr", unit=None)
    with pytest.raises(InputError, match="does not tell the voxel size along x, y, z"):
        io.read(path)
    image = io.read(path, spacing_mm=(1, 2, 3))
    np.testing.assert_allclose(image.grid.affine, np.diag([-1, -2, 3, 1]))


def changed(path: Path, level: str, **values: Any) -> None:
    head = path / level / ".zarray"
    head.write_text(json.dumps(json.loads(head.read_text()) | values))


@pytest.mark.parametrize("name", ["../other.zarr/0", "/etc", "..", "0/../../other.zarr/0"])
def test_levels_outside_of_the_image(tmp_path: Path, name: str) -> None:
    path = ome_zarr(tmp_path / "a.zarr")
    ome_zarr(tmp_path / "other.zarr")
    told = json.loads((path / ".zattrs").read_text())
    told["multiscales"][0]["datasets"][0]["path"] = name
    (path / ".zattrs").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"a\.zarr: the level .* leads out of the image"):
        io.read(path)


def test_a_link_out_of_the_image(tmp_path: Path) -> None:
    path, other = ome_zarr(tmp_path / "a.zarr"), ome_zarr(tmp_path / "other.zarr")
    (path / "0").rename(path / "old")
    (path / "0").symlink_to(other / "0")
    with pytest.raises(InputError, match="leads out of the image"):
        io.read(path)


def test_codecs_that_run_what_a_file_says(tmp_path: Path) -> None:
    path = ome_zarr(tmp_path / "a.zarr", compressors=None)
    changed(path, "0", filters=[{"id": "pickle", "protocol": 5}])
    with pytest.raises(InputError, match=r"packed by pickle|pickle"):
        io.read(path)


@pytest.mark.parametrize("codec", ["gzip", "blosc", "zstd", "lz4"])
def test_chunks_that_unpack_to_more_than_a_chunk(tmp_path: Path, codec: str) -> None:
    import numcodecs

    packers = {
        "gzip": numcodecs.GZip(1),
        "blosc": numcodecs.Blosc(),
        "zstd": numcodecs.Zstd(),
        "lz4": numcodecs.LZ4(),
    }
    path = ome_zarr(tmp_path / "a.zarr", compressors=packers[codec])
    np.testing.assert_array_equal(io.read(path).data[0].numpy(), VALUES.transpose(2, 1, 0))
    chunk = next(file for file in (path / "0").rglob("*") if file.is_file() and not file.name.startswith("."))
    bomb = bytes(50_000_000)
    chunk.write_bytes(gzip.compress(bomb, 9) if codec == "gzip" else packers[codec].encode(bomb))
    assert chunk.stat().st_size < 1_000_000
    with pytest.raises(InputError, match="unpacks to more than the 36 bytes of a chunk"):
        io.read(path)


def test_bad_zarrs(tmp_path: Path) -> None:
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(InputError, match="no multiscales attribute"):
        io.read(tmp_path / "empty.zarr")
    (tmp_path / "file.zarr").write_text("hello")
    with pytest.raises(InputError, match=r"file\.zarr"):
        io.read(tmp_path / "file.zarr")
    path = ome_zarr(tmp_path / "a.zarr")
    changed(path, "0", shape=[1, 2**20, 2**20, 2**20])
    assert tuple(io.read(path).grid.shape) == (3, 3, 4)  # the finest level that can be
    (path / ".zattrs").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="cannot be read as an OME-Zarr image"):
        io.read(path)


def test_a_volume_made_of_a_few_bytes(tmp_path: Path) -> None:
    """Chunks that are not stored are zero; a level of 64 GiB of them is not read."""
    path = ome_zarr(tmp_path / "a.zarr")
    for level in ("0", "1"):
        changed(path, level, shape=[1, 2**20, 2**20, 2**20])
    with pytest.raises(InputError, match="levels above 64 GiB are not read"):
        io.read(path)
    assert isinstance(io.read(ome_zarr(tmp_path / "b.zarr")).data, torch.Tensor)
