"""Register with elastix: rigid, affine and B-spline stages with Mattes mutual information.

python run_elastix.py FIXED MOVING OUTPUT.h5 [--kind multi|mono] [--start own|header] [--levels 4] [--points N]
"""

from pathlib import Path
from typing import Any

import itk
import numpy as np
from arguments import parse

COMMON = {
    "FixedInternalImagePixelType": ["float"],
    "MovingInternalImagePixelType": ["float"],
    "Registration": ["MultiResolutionRegistration"],
    "FixedImagePyramid": ["FixedSmoothingImagePyramid"],
    "MovingImagePyramid": ["MovingSmoothingImagePyramid"],
    "Metric": ["AdvancedMattesMutualInformation"],
    "NumberOfHistogramBins": ["32"],
    "ImageSampler": ["RandomCoordinate"],
    "NumberOfSpatialSamples": ["2000"],
    "NewSamplesEveryIteration": ["true"],
    "Interpolator": ["LinearInterpolator"],
    "Optimizer": ["AdaptiveStochasticGradientDescent"],
    "AutomaticParameterEstimation": ["true"],
    "AutomaticScalesEstimation": ["true"],
    "AutomaticTransformInitialization": ["false"],
    "HowToCombineTransforms": ["Compose"],
    "ResampleInterpolator": ["FinalBSplineInterpolator"],
    "Resampler": ["DefaultResampler"],
    "WriteResultImage": ["false"],
    "RandomSeed": ["1"],
}
RIGID = {
    **COMMON,
    "Transform": ["EulerTransform"],
    "MaximumNumberOfIterations": ["256"],
    "AutomaticTransformInitialization": ["true"],
    "AutomaticTransformInitializationMethod": ["CenterOfGravity"],
}
AFFINE = {**COMMON, "Transform": ["AffineTransform"], "MaximumNumberOfIterations": ["256"]}
CONTROL_POINTS = {"multi": 12, "mono": 24}
"""Control points per mean field of view, unless --points says how many."""


def bspline(image: Any, points: int) -> dict[str, list[str]]:
    """The deformable stage. No bending energy: with it the package crashes."""
    view_mm = np.multiply(itk.size(image), itk.spacing(image)).mean()
    return {
        **COMMON,
        "Transform": ["BSplineTransform"],
        "MaximumNumberOfIterations": ["500"],
        "FinalGridSpacingInPhysicalUnits": [f"{view_mm / points:.6f}"],
    }


def register(fixed: Path, moving: Path, output: Path, stages: list[dict[str, list[str]]], levels: int) -> None:
    """Run the stages, at so many resolutions each, one after the other and write the composite transform."""
    parameters = itk.ParameterObject.New()
    for stage in stages:
        parameters.AddParameterMap({**stage, "NumberOfResolutions": [str(levels)]})
    method = itk.ElastixRegistrationMethod.New(read(fixed), read(moving))
    method.SetParameterObject(parameters)
    method.SetLogToConsole(False)
    method.UpdateLargestPossibleRegion()
    itk.transformwrite([method.ConvertToItkTransform(method.GetCombinationTransform())], str(output))


def read(path: Path) -> Any:
    """A volume in float32."""
    return itk.imread(str(path), itk.F)


if __name__ == "__main__":
    given = parse(__doc__, levels=4, points=0)
    linear = [RIGID, AFFINE] if given.start == "own" else []
    grid = bspline(read(given.fixed), given.points or CONTROL_POINTS[given.kind])
    register(given.fixed, given.moving, given.output, [*linear, grid], given.levels)
