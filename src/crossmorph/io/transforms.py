"""Which program a transform file belongs to, and who reads and writes it.

The ending tells the program: ITK (ANTs, elastix, 3D Slicer, SimpleITK), but .lta FreeSurfer and .npz PyTorch. FSL
and Learn2Reg use endings of ITK, so that their ``kind`` has to be named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, get_args

from crossmorph.errors import InputError
from crossmorph.io import freesurfer, fsl, itk_transforms, torch_grid
from crossmorph.io.paths import existing, suffix_of, writing
from crossmorph.io.volume import reading
from crossmorph.space import Grid
from crossmorph.transform import DisplacementField, Transform

Kind = Literal["itk", "fsl", "freesurfer", "torch", "learn2reg"]
Reader = Callable[[Path, Grid | None, Grid | None], Transform]
Writer = Callable[[Transform, Path], None]
T = TypeVar("T")


def _read_learn2reg(path: Path, fixed: Grid | None, moving: Grid | None) -> DisplacementField:
    from crossmorph.evaluate.learn2reg import read_displacement

    if fixed is None:
        raise InputError(f"{path}: a Learn2Reg displacement means something only with the fixed image; name it")
    with reading(path, "a Learn2Reg displacement"):
        return read_displacement(path, fixed, moving)


def _write_learn2reg(transform: Transform, path: Path) -> None:
    from crossmorph.evaluate.learn2reg import write_displacement

    if transform.fixed_grid is None:
        raise InputError("a Learn2Reg displacement means something only with the fixed image; name it")
    write_displacement(transform, path, transform.fixed_grid, transform.moving_grid)


_ITK = dict.fromkeys((".h5", ".hdf5", ".tfm", ".txt", ".mat"), (itk_transforms.read_itk, itk_transforms.write_itk))
_NIFTI = (".nii", ".nii.gz")

READERS: dict[Kind, dict[str, Reader]] = {
    "itk": {
        **{ending: read for ending, (read, _) in _ITK.items()},
        **dict.fromkeys(_NIFTI, itk_transforms.read_nifti_field),
        **dict.fromkeys((".mha", ".mhd", ".nrrd", ".nhdr"), itk_transforms.read_field),
    },
    "fsl": {".mat": fsl.read_affine, ".txt": fsl.read_affine, **dict.fromkeys(_NIFTI, fsl.read_warp)},
    "freesurfer": {".lta": freesurfer.read_lta},
    "torch": {".npz": torch_grid.read_grid},
    "learn2reg": dict.fromkeys((*_NIFTI, ".npz"), _read_learn2reg),
}

WRITERS: dict[Kind, dict[str, Writer]] = {
    "itk": {
        **{ending: write for ending, (_, write) in _ITK.items()},
        **dict.fromkeys(_NIFTI, itk_transforms.write_nifti_field),
        **dict.fromkeys((".mha", ".nrrd"), itk_transforms.write_field),
    },
    "fsl": {".mat": fsl.write_affine, ".txt": fsl.write_affine, **dict.fromkeys(_NIFTI, fsl.write_warp)},
    "freesurfer": {".lta": freesurfer.write_lta},
    "torch": {".npz": torch_grid.write_grid},
    "learn2reg": dict.fromkeys((*_NIFTI, ".npz"), _write_learn2reg),
}

OWN_ENDINGS: dict[str, Kind] = {".lta": "freesurfer", ".npz": "torch"}


def read_transform(
    path: str | Path, kind: Kind | None = None, *, fixed: Grid | None = None, moving: Grid | None = None
) -> Transform:
    """Read a transform of ITK, ANTs, 3D Slicer, FSL, FreeSurfer, PyTorch or Learn2Reg (docs/formats.md).

    Args:
        path: the file.
        kind: whose file it is; None goes by the ending.
        fixed, moving: grids of the images. FSL needs both, Learn2Reg the fixed one; the transform remembers them.

    Raises:
        InputError: the file is missing, damaged, or of another kind, or a grid is missing.
    """
    path = existing(path)
    transform = _chosen(READERS, path, kind, "read a transform from")(path, fixed, moving)
    grids = (fixed or transform.fixed_grid, moving or transform.moving_grid)
    return replace(transform, fixed_grid=grids[0], moving_grid=grids[1])


def write_transform(transform: Transform, path: str | Path, kind: Kind | None = None) -> None:
    """Write a transform for ITK, ANTs, 3D Slicer, FSL, FreeSurfer, PyTorch or Learn2Reg (docs/formats.md).

    Where a format needs the images' grids, ``transform.fixed_grid`` and ``transform.moving_grid`` are taken.

    Raises:
        InputError: the ending names no transform format, or one that cannot hold this transform, a grid is
            missing, or writing fails.
    """
    path = Path(path)
    write = _chosen(WRITERS, path, kind, "write a transform to")
    with writing(path) as temporary:
        write(transform, temporary)


def _chosen(table: dict[Kind, dict[str, T]], path: Path, kind: Kind | None, task: str) -> T:
    suffix = suffix_of(path)
    if kind is not None and kind not in get_args(Kind):
        raise InputError(
            f"there are no transforms of the kind {kind!r}; it must be one of {', '.join(get_args(Kind))}"
        )
    endings = table[kind or OWN_ENDINGS.get(suffix, "itk")]
    if suffix not in endings:
        known = [*endings, *([] if kind else OWN_ENDINGS)]
        raise InputError(f"cannot {task} {path}: the ending must be one of {', '.join(known)}, not {suffix!r}")
    return endings[suffix]
