"""Overlap and surface distances against brute force, closed forms, MONAI and surface-distance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crossmorph.errors import InputError
from crossmorph.evaluate.overlap import label_overlap, mean_dice
from crossmorph.evaluate.surface import label_surface_distances, neighbourhood_areas, surface_distances

MAPS = hnp.arrays(np.int16, (4, 5, 3), elements=st.sampled_from([0, 1, 2, -3, 4000]))


def blobs(seed: int, shape: tuple[int, ...] = (20, 24, 18)) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.5)
    return np.digitize(noise, np.quantile(noise, [0.6, 0.8])).astype(np.int32)


@given(MAPS, MAPS)
def test_every_score_equals_its_definition_on_voxel_sets(fixed: np.ndarray, warped: np.ndarray) -> None:
    for row in label_overlap(fixed, warped, warped):
        f, w = fixed == row.id, warped == row.id
        if row.status != "scored":
            assert not (f.any() and w.any())
            assert math.isnan(row.dice)
            continue
        both, either = (f & w).sum(), (f | w).sum()
        assert row.dice == pytest.approx(2 * both / (f.sum() + w.sum()))
        assert row.recall == pytest.approx(both / f.sum())
        assert row.precision == pytest.approx(both / w.sum())
        assert row.voe == pytest.approx(1 - both / either)
        assert row.rvd == pytest.approx(abs(w.sum() / f.sum() - 1))


def test_missing_labels_are_named_and_never_dropped() -> None:
    fixed = np.array([1, 1, 2, 3, 0, 0, 0, 0]).reshape(2, 2, 2)
    moving = np.array([1, 2, 2, 4, 0, 0, 0, 0]).reshape(2, 2, 2)
    warped = np.array([1, 1, 0, 0, 0, 0, 0, 0]).reshape(2, 2, 2)
    rows = {row.id: row for row in label_overlap(fixed, warped, moving, ids=[1, 2, 3, 4, 9])}
    assert {i: row.status for i, row in rows.items()} == {
        1: "scored", 2: "lost", 3: "absent in moving", 4: "absent in fixed", 9: "absent in both",
    }  # fmt: skip
    assert rows[2].dice == 0
    assert rows[1].volume_change == pytest.approx(1.0)
    assert rows[2].volume_change == -1
    assert mean_dice(list(rows.values())) == pytest.approx(0.5)


def test_without_the_moving_map_a_missing_label_counts_as_lost() -> None:
    fixed, warped = np.ones((2, 2, 2), int), np.zeros((2, 2, 2), int)
    (row,) = label_overlap(fixed, warped)
    assert row.status == "lost"
    assert math.isnan(mean_dice([]))


def test_background_is_scored_when_asked_for_and_volumes_are_in_mm3() -> None:
    fixed, warped = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    fixed[0], warped[0, 0] = 1, 1
    background, organ = label_overlap(fixed, warped, ids=[0, 1], voxel_mm3=2.0)
    assert background.dice == pytest.approx(2 * 48 / (48 + 60))
    assert (organ.fixed_mm3, organ.warped_mm3) == (32.0, 8.0)


def test_fractions_and_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="whole numbers"):
        label_overlap(np.full((2, 2, 2), 0.5), np.zeros((2, 2, 2)))
    with pytest.raises(InputError, match=r"\(2, 2, 2\).*\(3, 2, 2\)"):
        label_overlap(np.zeros((2, 2, 2), int), np.zeros((3, 2, 2), int))


def test_dice_agrees_with_monai() -> None:
    monai = pytest.importorskip("monai.metrics")
    fixed, warped = blobs(1), blobs(2)
    rows = label_overlap(fixed, warped)
    one_hot = [torch.stack([torch.from_numpy(v == i) for i in (0, 1, 2)])[None] for v in (warped, fixed)]
    expected = monai.compute_dice(*one_hot, include_background=False)[0]
    assert [row.dice for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)


# -- surfaces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 2, 3), (0.5, 0.5, 3.0)])
def test_areas_of_all_neighbourhoods_equal_surface_distance(spacing: tuple[float, ...]) -> None:
    tables = pytest.importorskip("surface_distance.lookup_tables")
    ours = neighbourhood_areas(np.diag(spacing))
    np.testing.assert_allclose(ours, tables.create_table_neighbour_code_to_surface_area(spacing), atol=1e-9)


def test_areas_follow_rotation_and_mirroring_of_the_axes() -> None:
    from scipy.spatial.transform import Rotation

    axes = np.diag([1.0, 2.0, 3.0])
    turned = Rotation.from_rotvec([0.3, -0.5, 0.9]).as_matrix() @ axes @ np.diag([1, -1, 1])
    np.testing.assert_allclose(neighbourhood_areas(turned), neighbourhood_areas(axes), atol=1e-12)


def test_a_sheared_plane_has_the_area_of_its_parallelogram() -> None:
    axes = np.array([[1.0, 0.4, 0.2], [0, 1.5, 0.3], [0, 0, 2.0]])
    half_in_k = sum(1 << (7 - corner) for corner in range(8) if corner % 2 == 0)
    expected = np.linalg.norm(np.cross(axes[:, 0], axes[:, 1]))
    assert neighbourhood_areas(axes)[half_in_k] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 1.5, 3.0)])
def test_distances_equal_surface_distance(spacing: tuple[float, ...]) -> None:
    oracle = pytest.importorskip("surface_distance")
    a, b = blobs(3) == 1, blobs(4) == 1
    theirs = oracle.compute_surface_distances(a, b, spacing)
    ours = surface_distances(a, b, spacing)
    assert ours.hausdorff() == pytest.approx(oracle.compute_robust_hausdorff(theirs, 95))
    assert ours.hausdorff(100) == pytest.approx(oracle.compute_robust_hausdorff(theirs, 100))
    assert ours.average() == pytest.approx(np.mean(oracle.compute_average_surface_distance(theirs)))


def test_each_label_in_its_box_equals_the_whole_volume() -> None:
    fixed, warped = blobs(5), blobs(6)
    axes = np.array([[0, 1.2, 0.1], [-1, 0, 0], [0, 0.2, 2]])
    for label, boxed in label_surface_distances(fixed, warped, [1, 2], axes).items():
        whole = surface_distances(fixed == label, warped == label, axes)
        assert boxed.hausdorff() == pytest.approx(whole.hausdorff())
        assert boxed.average() == pytest.approx(whole.average())


def test_parallel_slabs_are_as_far_apart_as_they_were_moved() -> None:
    fixed, warped = np.zeros((30, 3, 3), int), np.zeros((30, 3, 3), int)
    fixed[4:10], warped[7:13] = 1, 1
    far = label_surface_distances(fixed, warped, [1], (2.0, 1.0, 1.0))[1]
    assert far.hausdorff(100) == pytest.approx(6.0)
    assert surface_distances(fixed, fixed).average() == 0


def test_empty_sides_are_infinite_and_two_empty_sides_undefined() -> None:
    empty, full = np.zeros((3, 3, 3), int), np.ones((3, 3, 3), int)
    assert surface_distances(full, empty).hausdorff() == math.inf
    assert surface_distances(empty, full).average() == math.inf
    assert math.isnan(surface_distances(empty, empty).hausdorff())
    assert label_surface_distances(full, empty, [1, 5])[1].hausdorff() == math.inf
    assert math.isnan(label_surface_distances(full, empty, [1, 5])[5].average())
