"""Registration as a whole, against known motion of a small scene."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scene import GRID, NONE, QUICK, WARP, bright, errors, inverted, pair, places, seen, tissue
from truth import Order, Warp, reordered, signed_permutations, tilted_grid, volume, waves, world

import crossmorph as cm
from crossmorph import registration
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.phantom import make_pair
from crossmorph.registration import MAX_FIELD_VOXELS, faded_field, register
from crossmorph.result import Result
from crossmorph.settings import Linear, Mcbo, Refinement
from crossmorph.space import Grid
from crossmorph.systems.mcbo import mcbo
from crossmorph.systems.volume import Pair
from crossmorph.transform import Affine, DisplacementField, jacobian_determinant

START_MM = 4.04
"""Mean length of WARP at ``places``: the error of doing nothing."""


def quick(fixed: Image, moving: Image | list[Image], **keywords: object) -> Result:
    return register(fixed, moving, settings=QUICK, **keywords)  # type: ignore[arg-type]


def difference(a: Result, b: Result) -> torch.Tensor:
    """(N,) mm between two results at ``places``."""
    return (a.transform(places()) - b.transform(places())).norm(dim=1)


def test_the_start_is_what_it_is_said_to_be() -> None:
    assert float(errors(lambda points: points).mean()) == pytest.approx(START_MM, abs=0.01)


# -- known motion, in millimetres --------------------------------------------------------------------------------

MOVING_GRIDS = {
    "the same": GRID,
    "oblique and anisotropic": tilted_grid((34, 40, 28), (2.4, 2.0, 3.0), center=(1, -2, 3)),
    "sheared": tilted_grid((40, 40, 40), (2.2, 2.0, 2.2), shear=0.2, center=(0, 0, 0)),
    "mirrored": Grid(GRID.shape, GRID.affine @ np.diag([-1, 1, 1, 1]) @ Affine.translation((-39, 0, 0)).matrix),
    "thick slices": Grid.from_spacing((44, 44, 14), (2.0, 2.0, 6.0)),
}


@pytest.mark.parametrize("grid", MOVING_GRIDS.values(), ids=MOVING_GRIDS)
def test_known_motion_between_two_contrasts(grid: Grid) -> None:
    """Right in the world, whatever grid the moving image is stored on; voxels are 2 mm."""
    result = quick(*pair(inverted, grid))
    error = errors(result.transform)
    assert float(error.mean()) < (1.6 if grid.spacing.max() < 4 else 2.2)
    assert float(error.quantile(0.95)) < 3.5
    assert result.scores["folded"] == 0


def test_the_default_on_one_contrast_finds_detail_by_intensities() -> None:
    waves = Warp(a=4.0, b=3.0, k=0.14, s=200.0)
    settings = replace(cm.load_settings(), linear=NONE)
    result = register(seen(name="fixed"), seen(GRID, waves, name="moving"), settings=settings)
    assert result.journal.notes["similarity"] == "lncc"
    assert result.journal.notes["smoothness, lncc"]["chosen"] < 30
    assert float(errors(result.transform, waves).mean()) < 0.5 * float(errors(lambda points: points, waves).mean())
    assert result.verdict.status == "ok"


def test_the_default_on_one_contrast_takes_no_more_detail_than_smooth_motion_has() -> None:
    result = register(*pair(bright))
    assert result.journal.notes["smoothness, lncc"]["chosen"] >= 3
    assert float(errors(result.transform).mean()) < 0.18 * START_MM
    assert result.verdict.status == "ok"


def test_the_default_on_two_contrasts_compares_structure() -> None:
    result = register(*pair())
    assert result.journal.notes["similarity"] == "mind"
    assert float(errors(result.transform).mean()) < 0.45 * START_MM


@pytest.mark.parametrize("shift", [(6.0, 0.0, 0.0), (0.0, -8.0, 4.0)])
def test_a_shift_is_found_along_the_right_axes(shift: tuple[float, float, float]) -> None:
    moving = volume(GRID, lambda points: inverted(tissue(points - torch.tensor(shift)))[None])
    found = quick(seen(), moving).transform(places(20)) - places(20)
    np.testing.assert_allclose(found.mean(0).numpy(), shift, atol=1.0)


def test_a_finer_working_spacing_is_a_setting_in_mm() -> None:
    coarse = register(*pair(), settings=replace(QUICK, spacing_mm=4.0))
    assert coarse.displacement.grid.spacing.min() > 2 * quick(*pair()).displacement.grid.spacing.min() * 0.9
    assert float(errors(coarse.transform).mean()) < 0.75 * START_MM


@pytest.mark.parametrize("preset", ["convexadam", "remind2reg", "comulis3dclem"])
def test_published_settings_recover_the_motion(preset: str) -> None:
    """``reproduce`` works on the fixed voxels and damps the field at the faces; inside it must still be right."""
    result = register(*pair(), settings=cm.load_settings("mcbo", preset))
    assert float(errors(result.transform).mean()) < 0.7 * START_MM
    np.testing.assert_allclose(result.displacement.grid.spacing, GRID.spacing)


# -- storage orders ----------------------------------------------------------------------------------------------

ORDERS = signed_permutations()
FEW = ORDERS[5::9]
ALL = [*FEW, *(pytest.param(order, marks=pytest.mark.slow) for order in ORDERS if order not in FEW)]
STEADY = replace(QUICK, spacing_mm=2.0, refine=(Refinement(iterations=20),))
"""No padding of the working grid, whose blocks then are the same in every order; and no wide control cells, in
which Adam's first steps are long and depend on rounding."""
OBLIQUE = MOVING_GRIDS["oblique and anisotropic"]


@pytest.fixture(scope="module")
def oblique() -> Result:
    return register(*pair(inverted, OBLIQUE), settings=STEADY)


@pytest.mark.parametrize("order", ALL)
def test_storage_order_does_not_change_the_physical_result(order: Order, oblique: Result) -> None:
    fixed, moving = pair(inverted, OBLIQUE)
    assert float(difference(register(fixed, reordered(moving, order), settings=STEADY), oblique).max()) < 1e-3
    other = register(reordered(fixed, order), moving, settings=STEADY)
    assert float(difference(other, oblique).max()) < 0.1
    assert other.warped.grid.same_as(reordered(fixed, order).grid)


@pytest.mark.slow
@pytest.mark.parametrize("order", FEW)
def test_the_default_is_as_right_in_every_storage_order(order: Order) -> None:
    fixed, moving = pair(inverted, OBLIQUE)
    result = register(reordered(fixed, order), reordered(moving, order))
    assert float(errors(result.transform).mean()) < 0.4 * START_MM


# -- masks and validity ------------------------------------------------------------------------------------------


def half_space(grid: Grid, keep: Callable[[torch.Tensor], torch.Tensor]) -> Labels:
    return Labels(keep(world(grid)).int(), grid)


def test_voxels_outside_the_masks_have_no_influence() -> None:
    fixed, moving = pair()
    masks = {
        "fixed_mask": half_space(GRID, lambda points: points[..., 0] < 10),
        "moving_mask": half_space(GRID, lambda points: points[..., 0] < 14),
    }
    clean = quick(fixed, moving, **masks)
    spoilt = [
        replace(image, data=torch.where(mask.data[None] > 0, image.data, 1e5 * torch.rand(image.data.shape)))
        for image, mask in zip((fixed, moving), masks.values(), strict=True)
    ]
    assert torch.equal(quick(*spoilt, **masks).displacement.field, clean.displacement.field)
    assert float(difference(quick(fixed, moving), clean).max()) > 0.1
    left = places()[:, 0] < 2
    assert float(errors(clean.transform)[left].mean()) < 0.5 * START_MM


def test_values_that_are_not_finite_do_not_spread() -> None:
    fixed, moving = pair()
    values = moving.data[0].numpy().copy()
    values[10, 10, 10], values[30, 20, 20], values[20, 20, :3] = np.nan, -np.inf, np.inf
    holed = Image.from_array(values, GRID)
    result = quick(fixed, holed)
    assert int((~holed.valid).sum()) == 5
    assert torch.isfinite(result.displacement.field).all()
    assert float(difference(result, quick(fixed, moving)).mean()) < 0.2


def test_half_of_the_moving_image_out_of_view() -> None:
    fixed, moving = pair()
    cut = Grid((20, 36, 32), GRID.affine)
    part = replace(moving, data=moving.data[:, :20], valid=moving.valid[:20], grid=cut)
    result = quick(fixed, part)
    seen_part = WARP(places())[:, 0] < -4
    assert float(errors(result.transform)[seen_part].mean()) < 0.5 * START_MM
    assert 0.35 < result.scores["overlap"] < 0.6
    assert not result.warped.valid[30:].any()


def test_masks_that_do_not_meet_are_refused() -> None:
    fixed, moving = pair()
    low, high = (half_space(GRID, rule) for rule in (lambda p: p[..., 0] < -10, lambda p: p[..., 0] > 10))
    with pytest.raises(InputError, match="no valid voxel in common"):
        quick(fixed, moving, fixed_mask=low, moving_mask=high)


# -- several moving modalities, frames ---------------------------------------------------------------------------


def test_two_modalities_share_one_displacement() -> None:
    fixed, second = pair()
    first = seen(GRID, WARP, lambda v: 50 * torch.sin(2 * v), name="moving")
    result = quick(fixed, [first, second])
    assert float(errors(result.transform).mean()) < 0.4 * START_MM
    assert [image.name for image in result.movings] == ["1_moving", "2_moving"]
    assert list(result.scores["nmi"]) == ["1_moving", "2_moving"]
    assert torch.equal(result.warp(result.movings[0]).data, result.warped.data)
    same = quick(fixed, [second, second])
    assert float(difference(same, quick(fixed, second)).max()) < 0.05


@pytest.mark.parametrize("fusion", ["cost", "magnitude", "signed"])
def test_fusion_modes_run(fusion: str) -> None:
    fixed, moving = pair()
    settings = replace(QUICK, fusion=fusion)
    result = register(fixed, [moving, replace(moving, name="other")], settings=settings)
    assert float(errors(result.transform).mean()) < 0.5 * START_MM


def test_one_frame_is_registered_and_all_are_warped() -> None:
    fixed, moving = pair()
    junk = torch.rand(moving.data.shape, generator=torch.manual_seed(0)) * 100
    frames = replace(moving, data=torch.cat((junk, moving.data, 2 * moving.data)))
    plain = quick(fixed, moving)
    one = quick(fixed, frames, frame=1)
    assert torch.equal(one.displacement.field, plain.displacement.field)
    assert one.warped.channels == 3
    torch.testing.assert_close(one.warped.data[1], plain.warped.data[0])
    assert one.journal.notes["frame of moving"] == 1
    mean = quick(fixed, replace(moving, data=torch.cat((moving.data, 3 * moving.data))), frame="mean")
    assert float(difference(mean, plain).max()) < 0.01
    for wrong in (3, -1, "first"):
        with pytest.raises(InputError, match="has frames 0 to 2; frame must be"):
            quick(fixed, frames, frame=wrong)
    with pytest.raises(InputError, match="has the one frame 0; frame must be"):
        quick(fixed, moving, frame=1)


# -- starts ------------------------------------------------------------------------------------------------------

FAR = Affine.from_parts((150, -90, 60), (0, 0, 8))


def far_moving() -> Image:
    """The moving image of ``pair``, its world moved far away."""
    moving = pair()[1]
    return replace(moving, grid=Grid(moving.grid.shape, FAR.matrix @ moving.grid.affine))


def test_boxes_that_do_not_meet_are_refused_with_their_distance() -> None:
    """The boxes are 80, 72 and 64 mm wide; shifted by 150, -90 and 60 mm the gap is about 74 mm, less the turn."""
    with pytest.raises(InputError, match=r"moving lies 6\d mm away from fixed.*linear stage.*--initial"):
        quick(pair()[0], far_moving())


@pytest.mark.slow
def test_the_linear_stage_brings_far_images_together() -> None:
    result = register(pair()[0], far_moving(), settings=replace(QUICK, linear=Linear()))
    assert result.journal.notes["start"]["kept"]
    error = (result.transform(places()) - FAR(WARP(places()))).norm(dim=1)
    assert float(error.mean()) < 0.4 * START_MM
    assert float(np.linalg.norm(result.linear.matrix[:3, 3] - FAR.matrix[:3, 3])) < 5


def test_a_linear_transform_is_taken_as_the_start() -> None:
    result = quick(pair()[0], far_moving(), initial=FAR)
    assert result.initial is FAR
    assert torch.equal(result.linear(places()), FAR(places()))
    error = (result.transform(places()) - FAR(WARP(places()))).norm(dim=1)
    assert float(error.mean()) < 0.4 * START_MM
    assert result.scores["displacement_mm"]["max"] < 15


def test_starts_that_cannot_be() -> None:
    fixed, moving = pair()
    with pytest.raises(InputError, match="must be linear"):
        quick(fixed, moving, initial=DisplacementField(torch.zeros(3, *GRID.shape), GRID))


def test_the_linear_stage_alone() -> None:
    result = quick(pair()[0], far_moving(), initial=FAR, deformable=False)
    assert result.displacement is None
    assert result.scores["displacement_mm"]["max"] == result.scores["moved_mm"]["max"] == 0
    assert torch.equal(result.transform(places()), FAR(places()))
    np.testing.assert_allclose(result.inverse(FAR(places())), places(), atol=1e-9)
    assert [entry["stage"] for entry in result.journal.stages] == ["prepare", "judge"]


def test_a_deformation_that_does_harm_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def wild(*arguments: object) -> torch.Tensor:
        return 4 * torch.randn((3, 10, 9, 8), generator=torch.manual_seed(0))

    kept = quick(*pair())
    assert kept.journal.notes["deformable"]["kept"]
    assert kept.journal.notes["deformable"]["after"] > kept.journal.notes["deformable"]["before"]
    monkeypatch.setattr(registration, "mcbo", wild)
    result = quick(*pair())
    note = result.journal.notes["deformable"]
    assert (note["kept"], note["judge"]) == (False, "mutual information")
    assert note["after"] < note["before"]
    assert result.displacement is None
    assert torch.equal(result.transform(places()), places())


# -- the same every time -----------------------------------------------------------------------------------------


def test_one_seed_one_result_whatever_the_threads() -> None:
    fixed, moving = pair()
    settings = Mcbo(NONE, levels=(4,), half_width=3, refine=(Refinement(iterations=6, smoothness=0.0),))
    before = torch.get_num_threads()
    fields = []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            fields.append(register(fixed, moving, settings=settings, seed=3).displacement.field)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(fields[0], fields[1])
    assert torch.equal(fields[0], fields[2])


def test_the_images_are_left_as_they_were() -> None:
    fixed, moving = pair()
    copies = [image.data.clone() for image in (fixed, moving)]
    quick(fixed, moving)
    assert torch.equal(fixed.data, copies[0])
    assert torch.equal(moving.data, copies[1])


def test_progress_and_stages_are_told() -> None:
    told: list[tuple[str, float]] = []
    result = quick(*pair(), progress=lambda stage, share: told.append((stage, share)))
    names = [entry["stage"] for entry in result.journal.stages]
    assert list(dict.fromkeys(stage for stage, _ in told)) == names
    assert names == ["prepare", "draw", "descriptors", "search level 4", "refine 1", "transform", "judge"]
    assert all(0 <= share <= 1 for _, share in told)
    assert all(entry["seconds"] >= 0 for entry in result.journal.stages)


# -- the transform -----------------------------------------------------------------------------------------------


def test_the_displacement_fades_to_nothing_outside() -> None:
    result = quick(*pair())
    low, high = result.displacement.grid.corners().min(0), result.displacement.grid.corners().max(0)
    assert (low < GRID.corners().min(0)).all()
    assert (high > GRID.corners().max(0)).all()
    outside = torch.from_numpy(high + 1.0)[None]
    assert torch.equal(result.transform(outside), outside)
    lengths = result.displacement.field.norm(dim=0)
    edge = torch.cat([lengths.movedim(axis, 0)[[0, -1]].flatten() for axis in range(3)])
    assert float(edge.max()) < 0.25 * float(lengths.max())
    assert float(jacobian_determinant(result.transform, result.displacement.grid).min()) > 0


def test_there_and_back_is_the_identity() -> None:
    """The inverse is exact at the centres of its cells of 8 mm, and linear between them."""
    result = quick(*pair(inverted, OBLIQUE))
    there = result.transform(places())
    back = (result.inverse(there) - places()).norm(dim=1)
    assert float(back.mean()) < 0.3
    assert float(back.max()) < 1.5
    residual = (result.transform(result.inverse(places())) - places()).norm(dim=1)
    told = result.scores["inverse_residual_mm"]
    assert float(residual.median()) == pytest.approx(told["median"], abs=0.5 * told["p95"])
    assert float(residual.max()) < 1.5 * told["max"]
    assert result.inverse.fixed == "moving"


def test_cells_become_millimetres_in_the_world() -> None:
    """One cell along each axis of a coarse field over an oblique grid is the length of that cell, turned."""
    grid = tilted_grid((12, 12, 12), (2.0, 2.0, 2.0), shear=0.0)
    cells = torch.zeros(3, 4, 4, 4)
    cells[1] = 1.0
    field = faded_field(cells, grid)
    np.testing.assert_allclose(field(grid.center[None]) - grid.center, 6.0 * grid.direction[:, 1][None], atol=1e-4)


def test_a_large_field_is_kept_coarse_enough_for_a_small_file() -> None:
    grid = Grid.from_spacing((150, 150, 150), 1.0)
    points = world(grid.pooled(1)).movedim(-1, 0).float()
    field = faded_field(torch.sin(points / 20) * 5, grid)
    assert np.prod(field.grid.shape) <= MAX_FIELD_VOXELS * 1.05
    inside = torch.rand(500, 3, generator=torch.manual_seed(0)).double() * 120 - 60
    expected = 5 * torch.sin(inside / 20)
    assert float((field(inside) - inside - expected).norm(dim=1).max()) < 0.1


def test_images_that_are_alike_stay_where_they_are() -> None:
    fixed = seen()
    result = register(fixed, replace(fixed, name="copy"))
    assert float((result.transform(places()) - places()).norm(dim=1).max()) < 0.5
    assert result.verdict.status == "ok"
    assert "in place from the start" in str(result.verdict)


def test_smooth_volumes_without_structure_do_no_harm() -> None:
    """Two waves fields: hardly anything to hold on to, yet no fold and nothing infinite."""
    result = quick(volume(GRID, waves), volume(GRID, lambda points: -waves(points)))
    assert torch.isfinite(result.transform(places())).all()
    assert result.scores["folded"] == 0


# -- sizes -------------------------------------------------------------------------------------------------------


SHAPES = [(40, 36, 2), (40, 3, 33), (17, 23, 29)]


def check_thin_or_odd(shape: tuple[int, int, int], linear: Linear) -> None:
    grid = Grid.from_spacing(shape, tuple(72 / n for n in shape))
    settings = replace(cm.load_settings(), linear=linear)
    result = register(seen(grid), seen(grid, WARP, inverted), settings=settings)
    assert torch.isfinite(result.transform(places())).all()
    assert result.warped.grid.same_as(grid)
    assert result.scores["folded"] < 0.01
    assert float(errors(result.transform).mean()) < 1.15 * START_MM  # three slices of 24 mm tell little


@pytest.mark.parametrize("shape", SHAPES)
def test_thin_and_odd_volumes(shape: tuple[int, int, int]) -> None:
    check_thin_or_odd(shape, NONE)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_thin_and_odd_volumes_with_the_linear_stage(shape: tuple[int, int, int]) -> None:
    check_thin_or_odd(shape, Linear())


def test_micrometres_work_as_millimetres_do() -> None:
    """The same scene a thousand times smaller, and just as right (the body is looked for in larger blocks)."""
    small = np.diag([1e-3, 1e-3, 1e-3, 1])
    fixed, moving = (replace(i, grid=Grid(i.grid.shape, small @ i.grid.affine)) for i in pair())
    result = quick(fixed, moving)
    assert float(errors(lambda points: 1e3 * result.transform(points / 1e3)).mean()) < 0.4 * START_MM
    assert result.verdict.status == "ok"


@pytest.mark.slow
def test_the_phantom_is_registered_in_any_seed() -> None:
    for seed in (1, 2):
        known = make_pair(seed=seed)
        result = register(known.fixed, known.moving)
        before = (known.fixed_points.xyz - known.moving_points.xyz).norm(dim=1)
        after = (result.transform(known.fixed_points.xyz) - known.moving_points.xyz).norm(dim=1)
        assert float(after.mean()) < 0.4 * float(before.mean())
        assert result.verdict.status == "ok"


MI = Refinement(level=1, control=6, iterations=50, smoothness=0.03, learning_rate=0.1, similarity="mi")


def test_mutual_information_alone_deforms() -> None:
    """Nothing is searched and no descriptor is made."""
    settings = Mcbo(NONE, levels=(), refine=(MI,))
    result = register(*pair(), settings=settings)
    assert errors(result.transform).mean() < 0.35 * START_MM


def test_where_descriptors_mislead_mutual_information_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that is two cells off everywhere is dropped; without it the scene is found again."""

    def misled(pairs: list[Pair], settings: Mcbo, *rest: object) -> torch.Tensor:
        return mcbo(pairs, settings, *rest) if not settings.levels else torch.full((3, 10, 9, 8), 2.0)  # type: ignore[arg-type]

    monkeypatch.setattr(registration, "mcbo", misled)
    alone = register(*pair(), settings=QUICK)
    assert alone.displacement is None
    result = register(*pair(), settings=replace(QUICK, otherwise=(MI,)))
    assert result.journal.notes["deformable"]["kept"] is False
    assert result.journal.notes["otherwise"]["kept"] is True
    assert errors(result.transform).mean() < 0.35 * START_MM
