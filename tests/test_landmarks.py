"""Landmarks in the objective: slopes by differences, peace inside the tolerance, registrations that need them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scene import GRID, QUICK, WARP, bright, pair, places, seen
from truth import random_affine, tilted_grid

from crossmorph import io
from crossmorph.cli import main
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.optimise.landmarks import Landmarks, OnGrid
from crossmorph.points import Points
from crossmorph.registration import register
from crossmorph.report.words import fitted_landmarks
from crossmorph.settings import Linear
from crossmorph.transform import Affine

RNG = np.random.default_rng(3)


def scattered(count: int = 7, tolerance_mm: float = 2.0) -> Landmarks:
    rng = np.random.default_rng(count)
    fixed, moving = rng.uniform(-30, 30, (2, count, 3))
    return Landmarks(fixed, moving, tolerance_mm, tuple(map(str, range(count))))


# -- matching ----------------------------------------------------------------------------------------------------


def test_pairs_match_by_name_else_by_order() -> None:
    xyz = torch.arange(9.0).reshape(3, 3)
    named = Landmarks.paired(Points(xyz, ("a", "b", "c")), Points(xyz.flip(0), ("c", "b", "a")), 1)
    np.testing.assert_array_equal(named.moving, xyz.numpy())
    ordered = Landmarks.paired(Points(xyz), Points(xyz.flip(0), ("c", "b", "a")), 1)
    np.testing.assert_array_equal(ordered.moving, xyz.flip(0).numpy())
    assert ordered.names == ("c", "b", "a")


@pytest.mark.parametrize(
    ("fixed", "moving", "tolerance", "message"),
    [
        (Points(torch.zeros(3, 3)), Points(torch.zeros(2, 3)), 1, "3 fixed and 2 moving landmarks"),
        (Points(torch.zeros(2, 3), ("a", "b")), Points(torch.zeros(2, 3), ("a", "c")), 1, "without a match: b, c"),
        (Points(torch.zeros(0, 3)), Points(torch.zeros(0, 3)), 1, "there are no landmarks"),
        (Points(torch.zeros(1, 3)), Points(torch.zeros(1, 3)), 0, "must be above 0 mm, not 0"),
    ],
)
def test_what_does_not_match(fixed: Points, moving: Points, tolerance: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Landmarks.paired(fixed, moving, tolerance)


# -- the linear part ---------------------------------------------------------------------------------------------


def test_the_pose_of_a_rigid_map_is_found_exactly() -> None:
    truth = Affine.from_parts((30, -20, 10), (100, 40, -60))
    for points in (scattered(9).fixed, scattered(3).fixed):
        found = Landmarks(points, truth(points), 1, ()).pose(np.eye(4))
        np.testing.assert_allclose(found, truth.matrix, atol=1e-9)
        assert np.linalg.det(found[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_landmarks_and_those_on_a_line_only_shift(count: int) -> None:
    line = np.outer(np.arange(count), [1.0, 2.0, 3.0])
    header = random_affine(np.random.default_rng(0)).matrix
    found = Landmarks(line, Affine(header)(line) + np.array([4.0, 5.0, 6.0]), 1, ()).pose(header)
    np.testing.assert_allclose(found, Affine.translation((4, 5, 6)).matrix @ header, atol=1e-9)


def test_a_mirrored_match_does_not_mirror_the_pose() -> None:
    points = scattered(9).fixed
    found = Landmarks(points, points * [-1, 1, 1], 1, ()).pose(np.eye(4))
    assert np.linalg.det(found[:3, :3]) == pytest.approx(1)


def test_slope_of_the_linear_term() -> None:
    landmarks, start = scattered(), random_affine(RNG).matrix
    matrix = random_affine(RNG, 0.3).matrix
    value, slope = landmarks.pull(start, matrix)
    assert value > 0
    for row, column in np.ndindex(3, 4):
        step = np.zeros((4, 4))
        step[row, column] = 1e-5
        ends = [landmarks.pull(start, matrix + sign * step)[0] for sign in (1, -1)]
        assert slope[row, column] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7)


def test_inside_the_tolerance_landmarks_are_content() -> None:
    points = scattered().fixed
    value, slope = Landmarks(points, points + np.array([0.0, 1.9, 0.0]), 2.0, ()).pull(np.eye(4), np.eye(4))
    assert value == 0
    assert not slope.any()


# -- the deformable part -----------------------------------------------------------------------------------------


def on_grid() -> OnGrid:
    grid = tilted_grid((9, 8, 7), (3.0, 2.0, 4.0), center=(0, 0, 0))
    linear = random_affine(np.random.default_rng(5), 0.4)
    inside = grid.to_world(np.random.default_rng(6).uniform(0, 6, (5, 3)))
    return Landmarks(inside, linear(inside) + np.array([6.0, -3.0, 2.0]), 1.0, tuple("abcde")).on(
        grid, linear.matrix
    )


def test_a_field_that_puts_landmarks_right_costs_nothing() -> None:
    places = on_grid()
    shift = torch.from_numpy((places.there - places.here)[0])[:, None, None, None]
    zero = lambda field: (0.0, torch.zeros_like(field))  # noqa: E731
    term = places.added_to(zero, 0.5)
    assert term(shift.expand(3, *places.shape).contiguous())[0] < 0.3  # all want nearly the same
    one = replace(places, here=places.here[:1], there=places.there[:1])
    value, slope = one.added_to(zero, 0.5)(shift.expand(3, *places.shape).contiguous())
    assert value == 0
    assert not slope.any()


def test_slope_of_the_deformable_term() -> None:
    places, generator = on_grid(), torch.Generator().manual_seed(0)
    field = torch.randn(3, *places.shape, generator=generator, dtype=torch.float64)
    own = torch.randn(field.shape, generator=generator, dtype=torch.float64)
    term = places.added_to(lambda u: (float((u * own).sum()), own), 0.3)
    slope = term(field)[1]
    for index in [*np.argwhere((slope - own).abs().numpy() > 1e-9)[::5], (0, 0, 0, 0)]:
        step = torch.zeros_like(field)
        step[tuple(index)] = 1e-5
        difference = (term(field + step)[0] - term(field - step)[0]) / 2e-5
        assert float(slope[tuple(index)]) == pytest.approx(difference, rel=1e-4, abs=1e-6)


def test_the_start_moves_landmarks_to_their_tolerance() -> None:
    places = on_grid()
    field = places.moved(torch.zeros(3, *places.shape))
    left = places._apart(field).norm(dim=1)
    assert float(left.max()) < places.tolerance_mm + 0.3
    assert torch.equal(places.moved(field * 0 + field).isfinite(), torch.ones(3, *places.shape, dtype=torch.bool))


def test_the_same_landmarks_on_a_coarser_grid() -> None:
    places = on_grid()
    half = places.resized((18, 16, 14))
    there = half.there @ half.to_mm.T - half.here @ half.to_mm.T
    np.testing.assert_allclose(there, (places.there - places.here) @ places.to_mm.T, atol=1e-9)


# -- registrations -----------------------------------------------------------------------------------------------


def known(count: int = 8, noise_mm: float = 0.0) -> tuple[Points, Points]:
    chosen = places()[:: len(places()) // count][:count]
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, noise_mm, (len(chosen), 3)))
    return Points(chosen), Points(WARP(chosen) + noise)


def featureless() -> tuple[Image, Image]:
    """Two balls of even brightness: nothing inside tells where a point went."""
    fixed, moving = pair(bright)
    flat = [replace(image, data=50.0 * (image.data > 20).float()) for image in (fixed, moving)]
    return flat[0], flat[1]


def test_landmarks_lead_where_images_say_nothing() -> None:
    landmarks = known(12)
    fixed, moving = featureless()
    alone = register(fixed, moving, settings=QUICK)
    led = register(fixed, moving, settings=QUICK, landmarks=landmarks, landmark_tolerance_mm=0.5)
    before, after = ((t.transform(landmarks[0].xyz) - landmarks[1].xyz).norm(dim=1) for t in (alone, led))
    assert float(before.max()) > 2
    assert float(after.max()) < 1.2
    assert led.scores["folded"] == 0
    told = led.record["choices"]["landmarks"]
    assert told["tolerance_mm"] == 0.5
    assert max(told["after_mm"]) == pytest.approx(float(after.max()), abs=2e-3)
    assert np.mean(told["before_mm"]) > 2


def test_a_sum_of_levels_is_moved_towards_landmarks() -> None:
    landmarks = known(6)
    settings = replace(QUICK, levels=(4, 2), weights=(0.5, 0.5), refine=())
    led = register(*featureless(), settings=settings, landmarks=landmarks, landmark_tolerance_mm=1.0)
    assert float((led.transform(landmarks[0].xyz) - landmarks[1].xyz).norm(dim=1).max()) < 1.6


def test_landmarks_within_their_tolerance_leave_the_images_alone() -> None:
    """Scattered by 1.5 mm and told to be good to 6 mm, they take nothing from the accuracy."""
    fixed, moving = pair(bright)
    alone = register(fixed, moving, settings=QUICK)
    led = register(fixed, moving, settings=QUICK, landmarks=known(noise_mm=1.5), landmark_tolerance_mm=6.0)
    torch.testing.assert_close(led.transform(places()), alone.transform(places()), atol=0.05, rtol=0)


def test_landmarks_give_the_start_and_are_left_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmorph.systems.linear.COARSE_VOXELS", 8_000)
    monkeypatch.setattr("crossmorph.systems.linear.FINE_VOXELS", 16_000)
    monkeypatch.setattr("crossmorph.systems.linear.LEFT_OUT", 3)
    truth = Affine.from_parts((200, -150, 80), (20, 150, -30))
    fixed, still = seen(name="fixed"), seen(name="moving")
    moving = replace(still, grid=replace(still.grid, affine=truth.matrix @ still.grid.affine))
    chosen = places()[::60]
    points = Points(chosen), Points(truth(chosen))
    settings = replace(QUICK, linear=Linear(model="rigid"))
    result = register(fixed, moving, settings=settings, deformable=False, landmarks=points)
    assert float((result.transform(places()) - truth(places())).norm(dim=1).max()) < 1
    assert result.record["choices"]["start"] == {"from": "landmarks"}
    left_out = result.record["choices"]["landmarks left out"]
    assert len(left_out) == 3
    assert max(left_out.values()) < 1


def test_a_wrong_landmark_is_found_by_the_runs_that_do_not_know_it() -> None:
    """The fit obeys it, so only a registration without it tells that it is 10 mm off."""
    fixed, moving = known(9)
    moving.xyz[4] += torch.tensor([0.0, 0.0, 10.0])
    result = register(
        *pair(bright), settings=QUICK, landmarks=(fixed, moving), landmark_tolerance_mm=1.0, landmark_folds=3
    )
    told = result.record["choices"]
    assert told["landmarks held out"]["folds"] == 3
    errors = np.array(told["landmarks held out"]["errors_mm"])
    assert np.argmax(errors) == 4
    assert errors[4] > 7
    assert np.delete(errors, 4).max() < 4
    assert told["landmarks"]["after_mm"][4] < errors[4] - 3
    rows = fitted_landmarks(result.record)
    assert rows is not None
    assert [row["held_out"] for row in rows["rows"]] == errors.tolist()


@pytest.mark.parametrize("folds", [1, 10, -2])
def test_folds_that_make_no_sense(folds: int) -> None:
    with pytest.raises(InputError, match=f"{folds} folds were asked for, and there are 9 landmarks"):
        register(*pair(bright), settings=QUICK, landmarks=known(9), landmark_folds=folds)


def test_images_pull_as_far_as_the_tolerance_and_a_little_more() -> None:
    """Landmarks that contradict two equal images by 8 mm, and are told to be good to 2 mm."""
    points = Points(places()[::100])
    settings = replace(QUICK, linear=Linear(model="translation"))
    off = Points(points.xyz + torch.tensor([8.0, 0, 0], dtype=torch.float64))
    result = register(seen(), seen(), settings=settings, deformable=False, landmarks=(points, off))
    error = (result.transform(points.xyz) - off.xyz).norm(dim=1)
    assert 1.5 < float(error.mean()) < 4


def test_landmarks_outside_of_both_images_are_refused() -> None:
    fixed, moving = pair(bright)
    far = Points(torch.full((3, 3), 500.0))
    with pytest.raises(InputError, match=r"no landmark lies in fixed: .* given in the other order, or as LPS"):
        register(fixed, moving, settings=QUICK, landmarks=(far, far))


def test_the_command_takes_slicer_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, image in zip(("fixed", "moving"), pair(bright), strict=True):
        io.write(image, tmp_path / f"{name}.nii.gz")
    landmarks = known(4)
    for name, points in zip(("f.mrk.json", "m.fcsv"), landmarks, strict=True):
        io.write(points, tmp_path / name)
    words = ["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--linear", "none", "--no-deformable"]
    words += ["--landmarks", "f.mrk.json", "m.fcsv", "--landmark-tolerance-mm", "1.5", "--json"]
    paths = [
        str(tmp_path / word) if ("." in word and not word[0].isdigit()) or word == "out" else word
        for word in words
    ]
    assert main(paths) in (0, 3)
    told = capsys.readouterr().out
    assert '"names": ["P-1", "P-2", "P-3", "P-4"]' in told
    assert '"tolerance_mm": 1.5' in told
    assert GRID.shape == io.read(tmp_path / "fixed.nii.gz").grid.shape
