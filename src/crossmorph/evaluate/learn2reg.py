"""The Learn2Reg challenge's files: dataset.json, image names, displacement fields.

A displacement field of the challenge maps voxel p of the fixed array to voxel p + u(p) of the moving array. It is
stored in voxels, components in the order of the array axes, without the identity. Four layouts circulate:

* (X, Y, Z, 3): the present one, .nii.gz (or .npz);
* (3, X, Y, Z): channels first, taken by the LUMIR evaluation as well;
* (3, X/2, Y/2, Z/2) float16 .npz: 2020 and 2021. The lattice has half the resolution and its end points are
  those of the full one; the values are voxels of the full resolution and are not scaled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from crossmorph.errors import InputError
from crossmorph.files import atomic_path
from crossmorph.io.arrays import declared, read_arrays
from crossmorph.io.limits import check_size
from crossmorph.io.volume import reading
from crossmorph.space import Grid
from crossmorph.transform import DisplacementField, Transform

Floats = NDArray[np.floating[Any]]
Layout = Literal["channels-last", "channels-first", "half-resolution"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
KINDS = {"label": "labels", "seg": "labels", "mask": "masks", "keypoints": "keypoints", "landmarks": "landmarks"}
"""Key of an entry in dataset.json to the word that takes the place of "images" in its folder."""

SPLITS = {
    "training": ("registration_train", "training_paired_images", "training"),
    "validation": ("registration_val", "validation_paired_images", "registration_validation", "validation", "val"),
    "test": ("registration_test", "test_paired_images", "test"),
}


# -- dataset.json ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two images to register."""

    fixed: Path
    moving: Path

    @property
    def id(self) -> str:
        """``SSSS_MMMM_SSSS_MMMM``: subject and modality of fixed and moving, as in the displacement's name."""
        return "_".join((*subject_and_modality(self.fixed), *subject_and_modality(self.moving)))


@dataclass(frozen=True)
class Dataset:
    """What a dataset.json says.

    Attributes:
        name: name of the task.
        folder: where dataset.json lies; all paths start there.
        shape: of the images, where given.
        images: every image that is listed alone, split to paths.
        pairs: split ("training", "validation", "test") to the pairs listed for it.
        companions: image to kind ("labels", "masks", "keypoints", "landmarks") to path, where listed.
    """

    name: str
    folder: Path
    shape: tuple[int, ...] | None
    images: Mapping[str, tuple[Path, ...]]
    pairs: Mapping[str, tuple[Pair, ...]]
    companions: Mapping[Path, Mapping[str, Path]]

    def companion(self, image: Path, kind: str) -> Path | None:
        """The labels, mask, keypoints or landmarks of an image: as listed, else where the challenge keeps them.

        That is the same path with ``kind`` in place of "images", with the image's name or as .csv; files of
        validation images are also looked for in the training folder. None where there is no such file.
        """
        listed = self.companions.get(image, {}).get(kind)
        if listed is not None and listed.is_file():
            return listed
        stem = image.name.removesuffix(".gz").removesuffix(".nii")
        folder = image.parent.name
        for place in dict.fromkeys((folder.replace("images", kind), f"{kind}Tr")):
            for name in (image.name, f"{stem}.csv"):
                path = image.parent.parent / place / name
                if place != folder and path.is_file():
                    return path
        return None


def read_dataset(path: str | Path) -> Dataset:
    """Read a dataset.json of any circulating variant.

    Pairs are found under ``registration_val``, ``validation``, ``test`` and their like, whichever holds
    dictionaries of ``fixed`` and ``moving``; images under the same keys as text or ``{image, label, ...}``. Paths
    may start with "./" or "/" or neither.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        InputError: the file is missing or is no such JSON.
    """
    path = Path(path)
    path = path / "dataset.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}; give the dataset.json of a Learn2Reg task") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__}, not the dictionary of a Learn2Reg dataset.json"
        )
    folder = path.parent
    images: dict[str, tuple[Path, ...]] = {}
    pairs: dict[str, tuple[Pair, ...]] = {}
    companions: dict[Path, dict[str, Path]] = {}
    for split, keys in SPLITS.items():
        entries = [entry for key in keys for entry in _entries(content.get(key))]
        alone = [entry for entry in entries if "image" in entry]
        both = [entry for entry in entries if "fixed" in entry and "moving" in entry]
        images[split] = tuple(_inside(folder, entry["image"]) for entry in alone)
        found = [Pair(_inside(folder, entry["fixed"]), _inside(folder, entry["moving"])) for entry in both]
        pairs[split] = tuple(dict.fromkeys(found))
        for image, entry in zip(images[split], alone, strict=True):
            companions[image] = {KINDS[k]: _inside(folder, v) for k, v in entry.items() if k in KINDS and v}
    shapes = content.get("tensorImageShape")
    shape = next(iter(shapes.values()), None) if isinstance(shapes, dict) else shapes
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(size) is int for size in shape):
        shape = None
    name = str(content.get("name") or folder.name)
    return Dataset(name, folder, tuple(shape) if shape else None, images, pairs, companions)


def _entries(value: Any) -> Iterable[dict[str, Any]]:
    """The entries of a list in dataset.json; text becomes ``{image: text}``, ``{"0":, "1":}`` fixed and moving."""
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, str):
            yield {"image": entry}
        elif isinstance(entry, dict) and "0" in entry and "1" in entry:
            yield {"fixed": entry["0"], "moving": entry["1"]}
        elif isinstance(entry, dict):
            yield entry


def _inside(folder: Path, path: Any) -> Path:
    """A path of dataset.json; text, and not above the folder."""
    if not isinstance(path, str) or "\0" in path or ".." in re.split(r"[/\\]", path):
        raise InputError(f"{folder} / dataset.json: {path!r} is no path below the data set's folder")
    return folder / re.sub(r"^(\.?/)+", "", path)


# -- names -------------------------------------------------------------------------------------------------------


def subject_and_modality(image: str | Path) -> tuple[str, str]:
    """``("0006", "0001")`` of ``AbdomenMRCT_0006_0001.nii.gz``.

    Raises:
        InputError: the name does not end with two groups of four digits.
    """
    found = re.search(r"_(\d{4})_(\d{4})\.nii(\.gz)?$", Path(image).name)
    if not found:
        raise InputError(f"{Path(image).name} is not named as in Learn2Reg: TASK_SSSS_MMMM.nii.gz")
    return found[1], found[2]


def displacement_name(pair: Pair, lumir: bool = False) -> str:
    """The name to submit: ``disp_FIXED_FMOD_MOVING_MMOD.nii.gz``; for LUMIR ``disp_FIXED_MOVING.nii.gz``.

    The LUMIR program looks for nothing but the short name where both modalities are the same.
    """
    if not lumir:
        return f"disp_{pair.id}.nii.gz"
    return f"disp_{subject_and_modality(pair.fixed)[0]}_{subject_and_modality(pair.moving)[0]}.nii.gz"


def find_displacement(folder: str | Path, pair: Pair, lumir: bool = False) -> Path:
    """The file of a pair in a submission, looked for as the evaluations do.

    The short name ``disp_FIXED_MOVING`` counts where the modalities are 0000 and 0001; for LUMIR also where they
    are the same. The general evaluation takes .npz before .nii.gz, LUMIR's .nii.gz only.

    Raises:
        InputError: no file has one of these names.
    """
    modalities = subject_and_modality(pair.fixed)[1], subject_and_modality(pair.moving)[1]
    names = [displacement_name(pair)]
    if modalities == ("0000", "0001") or (lumir and modalities[0] == modalities[1]):
        names.insert(0, displacement_name(pair, lumir=True))
    if not lumir:
        names = [name.replace(".nii.gz", ".npz") for name in names] + names
    for name in names:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise InputError(f"{folder} has no displacement field for {pair.id}; it must be called {' or '.join(names)}")


# -- displacement fields -----------------------------------------------------------------------------------------


def read_array(path: str | Path, shape: tuple[int, ...], layout: Layout | None = None) -> Floats:
    """Read a displacement file as (3, X, Y, Z) in voxels, float32.

    Args:
        path: .nii.gz, .nii, .npz (one array, whatever its key) or .npy.
        shape: (X, Y, Z) of the fixed image.
        layout: see the module; None finds it from the array's shape.

    Raises:
        InputError: the file cannot be read or its shape fits no layout, or more than one.
    """
    path = Path(path)
    values = _load(path)
    if values.ndim == 5:  # NIfTI keeps vectors on a fifth axis
        values = values.squeeze(3)
    half = tuple(round(n / 2) for n in shape)
    expected: dict[Layout, tuple[int, ...]] = {
        "channels-last": (*shape, 3), "channels-first": (3, *shape), "half-resolution": (3, *half),
    }  # fmt: skip
    fitting = [name for name, size in expected.items() if values.shape == size and layout in (None, name)]
    if len(fitting) != 1:
        wanted = expected if layout is None else {layout: expected[layout]}
        sizes = ", ".join(f"{size} ({name})" for name, size in wanted.items())
        what = "fits more than one layout; name it" if fitting else f"fits none of {sizes}"
        raise InputError(f"{path}: a displacement of shape {values.shape} {what}")
    u = np.moveaxis(values, -1, 0) if fitting[0] == "channels-last" else values
    u = np.asarray(u, np.float32)
    if fitting[0] == "half-resolution":
        u = _zoom(u, shape)
    if not np.isfinite(u).all():
        raise InputError(f"{path}: the displacement holds NaN or infinity")
    return np.ascontiguousarray(u)


def _load(path: Path) -> Floats:
    import nibabel

    with reading(path, "a displacement field"):
        if path.suffix == ".npy":
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        if path.suffix == ".npz":
            names = list(declared(path))
            if len(names) != 1:
                raise InputError(f"it holds the arrays {', '.join(names)[:200]}; it must hold one")
            return read_arrays(path, names)[names[0]]
        image: Any = nibabel.loadsave.load(path)
        if not isinstance(image, nibabel.spatialimages.SpatialImage):
            raise InputError("it holds no volume; a displacement field is one, with three components")
        check_size(image.shape, image.get_data_dtype().itemsize, path.stat().st_size)
        return np.asarray(image.dataobj)


def _zoom(u: Floats, shape: tuple[int, ...]) -> Floats:
    """(3, ...) on another lattice with the same end points, by quadratic splines as in the challenge's code.

    Its default mode loses the last face to rounding for some sizes; mirroring gives the same values elsewhere.
    """
    from scipy.ndimage import zoom

    factors = [1.0, *(n / m for n, m in zip(shape, u.shape[1:], strict=True))]
    zoomed: Floats = zoom(u.astype(np.float32), factors, order=2, mode="mirror")
    return zoomed


def to_transform(displacement: Floats, fixed: Grid, moving: Grid | None = None) -> DisplacementField:
    """A challenge displacement (3, X, Y, Z) in voxels as a transform in RAS mm.

    Voxel p of the fixed grid goes to voxel p + u(p) of the moving grid (the fixed grid if not given), each at its
    place in the world by its own affine.
    """
    voxels = np.moveaxis(np.asarray(displacement, np.float64), 0, -1)
    p = np.stack(np.meshgrid(*map(np.arange, fixed.shape), indexing="ij"), -1).astype(np.float64)
    there = (moving or fixed).to_world(p + voxels)
    mm = np.moveaxis(there - fixed.to_world(p), -1, 0)
    field = torch.from_numpy(np.ascontiguousarray(mm, np.float32))
    return DisplacementField(field, fixed, fixed_grid=fixed, moving_grid=moving)


def from_transform(transform: Transform, fixed: Grid, moving: Grid | None = None) -> Floats:
    """A transform as a challenge displacement (3, X, Y, Z) in voxels, float32; the reverse of ``to_transform``."""
    p = np.stack(np.meshgrid(*map(np.arange, fixed.shape), indexing="ij"), -1).astype(np.float64)
    mm = np.moveaxis(transform.displacements(fixed).cpu().numpy(), 0, -1)
    voxels = (moving or fixed).to_voxel(fixed.to_world(p) + mm) - p
    return np.ascontiguousarray(np.moveaxis(voxels, -1, 0), np.float32)


def read_displacement(
    path: str | Path, fixed: Grid, moving: Grid | None = None, layout: Layout | None = None
) -> DisplacementField:
    """Read a challenge displacement file as a transform in RAS mm; see ``read_array`` and ``to_transform``."""
    return to_transform(read_array(path, fixed.shape, layout), fixed, moving)


def write_displacement(
    transform: Transform,
    path: str | Path,
    fixed: Grid,
    moving: Grid | None = None,
    layout: Layout = "channels-last",
) -> None:
    """Write a transform as a challenge displacement.

    Args:
        transform: maps fixed points to moving points.
        path: .nii.gz (the present rule; float32, with the fixed affine) or .npz (key ``arr_0``).
        fixed: grid of the fixed image.
        moving: grid of the moving image; the fixed grid by default.
        layout: "channels-last" is what the evaluations take today. "half-resolution" is float16 and loses up to
            about 0.03 voxels beyond 32 voxels, on top of what the coarse lattice cannot hold.

    Raises:
        InputError: the ending is another one, or the file cannot be written.
    """
    import nibabel

    path = Path(path)
    u = from_transform(transform, fixed, moving)
    if layout == "half-resolution":
        u = _zoom(u, tuple(round(n / 2) for n in fixed.shape)).astype(np.float16)
    elif layout == "channels-last":
        u = np.moveaxis(u, 0, -1)
    with atomic_path(path) as temporary:
        if path.suffix == ".npz":
            np.savez_compressed(temporary, u)
        elif path.name.endswith((".nii.gz", ".nii")):
            nibabel.save(nibabel.Nifti1Image(u.astype(np.float32), fixed.affine), temporary)
        else:
            raise InputError(f"a Learn2Reg displacement is written as .nii.gz or .npz, not {path.name}")
