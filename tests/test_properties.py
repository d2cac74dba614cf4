"""What must not change a registration, or only as far as said: swapping, scaling, padding, air, masks, spacing.

Storage orders, threads and duplicated modalities are in test_registration. Distances are in mm, at ``places``; the
working voxels are 2 mm, and the refinement's cells 4 mm.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scene import GRID, QUICK, WARP, bright, errors, inverted, pair, places, seen

from crossmorph.image import Image, Labels
from crossmorph.registration import register
from crossmorph.result import Result
from crossmorph.settings import Linear
from crossmorph.space import Grid
from crossmorph.transform import Affine

START_MM = 4.04
"""Mean error of doing nothing."""


@pytest.fixture(scope="module")
def plain() -> Result:
    return quick(*pair())


def quick(fixed: Image, moving: Image, **keywords: object) -> Result:
    return register(fixed, moving, settings=QUICK, **keywords)  # type: ignore[arg-type]


def apart(a: Result, b: Result) -> torch.Tensor:
    """(N,) mm between two results."""
    return (a.transform(places()) - b.transform(places())).norm(dim=1)


def padded(image: Image, width: int, valid: bool, value: float) -> Image:
    """The image with more voxels on all sides."""
    more = (width,) * 6
    i, j, k = (n + 2 * width for n in image.grid.shape)
    grid = Grid((i, j, k), image.grid.affine @ Affine.translation((-width,) * 3).matrix)
    data = torch.nn.functional.pad(image.data, more, value=value)
    return Image(data, grid, torch.nn.functional.pad(image.valid, more, value=valid), name=image.name)


# -- exactly the same --------------------------------------------------------------------------------------------


def test_masks_of_everything_are_no_masks(plain: Result) -> None:
    everything = Labels(torch.ones(GRID.shape, dtype=torch.int32), GRID)
    result = quick(*pair(), fixed_mask=everything, moving_mask=everything)
    assert torch.equal(result.displacement.field, plain.displacement.field)


@pytest.mark.parametrize("factor", [0.25, 64.0])
def test_units_of_intensity_do_not_matter(plain: Result, factor: float) -> None:
    """Powers of two scale without rounding; all that tells is what keeps variances from being zero."""
    fixed, moving = pair()
    result = quick(fixed, replace(moving, data=factor * moving.data))
    assert float(apart(result, plain).max()) < 0.01


def test_the_name_and_the_stored_type_do_not_matter(plain: Result) -> None:
    fixed, moving = (replace(image, name="x", dtype=np.dtype(np.int16)) for image in pair())
    assert torch.equal(quick(fixed, moving).displacement.field, plain.displacement.field)


# -- nearly the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_padding_by_invalid_voxels_has_no_say(plain: Result, side: str) -> None:
    """Whatever it holds, exactly. The blocks of the search lie elsewhere, so the same within a part of a cell."""
    fixed, moving = pair()
    results = []
    for value in (0.0, 1e5):
        images = {"fixed": fixed, "moving": moving}
        images[side] = padded(images[side], 4, valid=False, value=value)
        results.append(quick(**images))
    assert torch.equal(results[0].displacement.field, results[1].displacement.field)
    assert float(apart(results[0], plain).mean()) < 0.5
    assert abs(float(errors(results[0].transform).mean()) - float(errors(plain.transform).mean())) < 0.3


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_more_air_around_does_not_matter(plain: Result, side: str) -> None:
    """12 mm of it: the search's cells of 8 mm then begin elsewhere, which tells by a part of a voxel."""
    fixed, moving = pair()
    images = {"fixed": fixed, "moving": moving}
    images[side] = padded(images[side], 6, valid=True, value=0.0)
    result = quick(**images)
    assert float(apart(result, plain).mean()) < 1.0
    assert abs(float(errors(result.transform).mean()) - float(errors(plain.transform).mean())) < 0.3


def test_inverted_intensities_are_as_good(plain: Result) -> None:
    """MIND-SSC compares distances between patches, which do not know the sign; -x is then the same exactly."""
    fixed, moving = pair()
    negative = replace(moving, data=moving.data.max() - moving.data)
    assert float(apart(quick(fixed, negative), plain).mean()) < 0.25


@pytest.mark.parametrize("contrast", [bright, inverted])
def test_the_other_way_round_is_the_inverse(contrast: object) -> None:
    """Each is off by its own error, so that they may differ by both together, but not by more."""
    fixed, moving = pair(contrast)  # type: ignore[arg-type]
    there, back = quick(fixed, moving), quick(moving, fixed)
    loop = (back.transform(there.transform(places())) - places()).norm(dim=1)
    wrong = errors(there.transform).mean() + (back.transform(WARP(places())) - places()).norm(dim=1).mean()
    assert float(loop.mean()) < float(wrong)
    assert float(loop.mean()) < 0.4 * START_MM


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.5), (1.6, 1.6, 1.6), (2.0, 3.0, 2.0)])
def test_the_spacing_of_the_fixed_image_does_not_matter(
    plain: Result, spacing: tuple[float, float, float]
) -> None:
    """The same field of view in other voxels is computed differently, with the same answer to a voxel."""
    shape = tuple(round(n * 2.0 / mm) for n, mm in zip(GRID.shape, spacing, strict=True))
    other = quick(seen(GRID.resized(shape), name="fixed"), pair()[1])
    assert abs(float(errors(other.transform).mean()) - float(errors(plain.transform).mean())) < 0.5
    assert float(apart(other, plain).mean()) < 1.0


# -- with the linear stage ---------------------------------------------------------------------------------------

POSE = Affine.from_parts((12, -8, 6), (5, -4, 8))


def posed(moving: Image, pose: Affine) -> Image:
    """The moving image with its world moved."""
    return replace(moving, grid=Grid(moving.grid.shape, pose.matrix @ moving.grid.affine))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["rigid", "affine"])
def test_a_moved_world_moves_the_result(model: str) -> None:
    """T' = P T: a rigid motion of the moving world may not enter in any other way."""
    settings = replace(QUICK, linear=Linear(model=model, search="local"))  # type: ignore[arg-type]
    fixed, moving = pair()
    still = register(fixed, moving, settings=settings)
    moved = register(fixed, posed(moving, POSE), settings=settings)
    difference = (moved.transform(places()) - POSE(still.transform(places()))).norm(dim=1)
    assert float(difference.mean()) < 1.0
    wrong = (moved.transform(places()) - POSE(WARP(places()))).norm(dim=1)
    assert float(wrong.mean()) < 0.5 * START_MM


@pytest.mark.slow
def test_the_linear_stage_the_other_way_round_is_the_inverse() -> None:
    """One contrast: both fits end within a tenth of a voxel of the pose, 27 mm from the centre as well.

    Of two contrasts MIND-SSC may drop the fine fit, and what remains is the start, good to a voxel.
    """
    fixed = seen(name="fixed")
    moving = posed(seen(GRID, None, bright, name="moving"), POSE)
    settings = replace(QUICK, linear=Linear(model="rigid", search="local"))
    there = register(fixed, moving, settings=settings, deformable=False)
    back = register(moving, fixed, settings=settings, deformable=False)
    assert float((there.transform(places()) - POSE(places())).norm(dim=1).max()) < 0.2
    assert float((back.transform(there.transform(places())) - places()).norm(dim=1).max()) < 0.2


def test_nothing_to_align_stays_at_rest_on_any_grid() -> None:
    """A volume and its own samples on a rotated grid: the truth is the identity."""
    turned = Grid(GRID.shape, Affine.from_parts((0, 0, 0), (10, 0, 15)).matrix @ GRID.affine)
    result = quick(seen(name="fixed"), seen(turned, name="moving"))
    assert float((result.transform(places(22)) - places(22)).norm(dim=1).mean()) < 0.4
