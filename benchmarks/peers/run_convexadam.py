"""Register with the published convexAdam (MIND features) at its defaults, after elastix's linear stages if asked.

python run_convexadam.py FIXED MOVING OUTPUT.h5 [--start own|header]
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from arguments import parse
from convexAdam.convex_adam_MIND import convex_adam_pt

ISOTROPIC_FROM = 1.5
"""Voxels are made isotropic where their edges differ by more than this factor: the method thinks in voxels."""


def working_grid(fixed: Any) -> Any:
    """The fixed image, resampled to cubic voxels of the finest edge where they are far from that."""
    spacing = np.array(fixed.GetSpacing())
    if spacing.max() <= ISOTROPIC_FROM * spacing.min():
        return fixed
    edge = float(spacing.min())
    size = np.maximum(np.round(np.array(fixed.GetSize()) * spacing / edge), 1).astype(int).tolist()
    corner = fixed.TransformContinuousIndexToPhysicalPoint((-0.5,) * 3)
    first = np.array(fixed.GetDirection()).reshape(3, 3) @ np.full(3, edge / 2)
    grid = sitk.Resample(
        fixed,
        size,
        sitk.Transform(),
        sitk.sitkLinear,
        (first + corner).tolist(),
        (edge,) * 3,
        fixed.GetDirection(),
    )
    return grid


def background(image: Any) -> float:
    """Median of the six faces."""
    data = sitk.GetArrayViewFromImage(image)
    return float(np.median(np.concatenate([data.take(k, axis).ravel() for axis in range(3) for k in (0, -1)])))


def linear_stage(fixed: Path, moving: Path) -> Any:
    """Rigid and affine by elastix, as a SimpleITK transform."""
    from run_elastix import AFFINE, RIGID, register

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "linear.h5"
        register(fixed, moving, file, [RIGID, AFFINE], levels=4)
        return sitk.ReadTransform(str(file))


def deformable_stage(fixed: Any, moving: Any) -> Any:
    """convexAdam on two volumes of one grid; its displacement (voxels along the array axes) in LPS mm."""
    arrays = (np.ascontiguousarray(sitk.GetArrayFromImage(image).T) for image in (fixed, moving))
    voxels = convex_adam_pt(*arrays, device=torch.device("cpu"), dtype=torch.float32)
    axes = np.array(fixed.GetDirection()).reshape(3, 3) * fixed.GetSpacing()
    field = sitk.GetImageFromArray((voxels @ axes.T).transpose(2, 1, 0, 3), isVector=True)
    field.CopyInformation(fixed)
    return sitk.DisplacementFieldTransform(field)


if __name__ == "__main__":
    given = parse(__doc__)
    fixed_image, moving_image = (sitk.ReadImage(str(p), sitk.sitkFloat32) for p in (given.fixed, given.moving))
    linear = linear_stage(given.fixed, given.moving) if given.start == "own" else sitk.Transform()
    target = working_grid(fixed_image)
    resampled = sitk.Resample(moving_image, target, linear, sitk.sitkLinear, background(moving_image))
    displacement = deformable_stage(target, resampled)
    whole = sitk.CompositeTransform([linear, displacement])  # ITK applies the last one first
    whole.FlattenTransform()  # composites within composites cannot be written
    sitk.WriteTransform(whole, str(given.output))
