"""Jacobians, folding, SDlogJ and NDV against closed forms, golden values and slow transcriptions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmorph.errors import InputError
from crossmorph.evaluate.regularity import (
    folding_percent,
    inverse_consistency,
    jacobian_determinant,
    learn2reg_sd_log_jacobian,
    non_diffeomorphic_tetrahedra_percent,
    non_diffeomorphic_volume,
    sd_log_jacobian,
)


def linear(matrix: np.ndarray, shape: tuple[int, int, int] = (6, 7, 5)) -> np.ndarray:
    """Displacement in voxels of x -> matrix x."""
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return np.einsum("ij,j...->i...", matrix - np.eye(3), points)


def random_field(seed: int, shape: tuple[int, int, int], size: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=size, size=(3, *shape))


def slow_volume(u: np.ndarray, mask: np.ndarray) -> tuple[float, int]:
    """The specification of NDV, voxel by voxel: volume, and number of determinants at or below 0."""
    e = np.eye(3, dtype=int)
    position = u + np.stack(np.meshgrid(*map(np.arange, u.shape[1:]), indexing="ij"))

    def at(p: np.ndarray) -> np.ndarray:
        return position[(slice(None), *p)]

    volume, bad = 0.0, 0
    for p in itertools.product(*(range(1, n - 1) for n in u.shape[1:])):
        if not mask[p]:
            continue
        p = np.array(p)
        tetrahedra = [
            [at(p + e[k]) - at(p) if s[k] else at(p) - at(p - e[k]) for k in range(3)]
            for s in itertools.product((True, False), repeat=3)
        ]
        tetrahedra.append([at(p - e[0] - e[1]) - at(p), at(p - e[0] - e[2]) - at(p), at(p - e[1] - e[2]) - at(p)])
        tetrahedra.append([at(p + e[0] + e[1]) - at(p), at(p + e[1] + e[2]) - at(p), at(p + e[0] + e[2]) - at(p)])
        for rows in tetrahedra:
            j = np.linalg.det(np.array(rows))
            volume += -0.5 * min(j, 0) / 6
            bad += j <= 0
    return volume, bad


@given(st.lists(st.floats(-0.4, 0.4), min_size=9, max_size=9))
def test_jacobian_of_a_linear_map_is_its_determinant(entries: list[float]) -> None:
    matrix = np.eye(3) + np.array(entries).reshape(3, 3)
    np.testing.assert_allclose(jacobian_determinant(linear(matrix)), np.linalg.det(matrix), atol=1e-10)


def test_jacobian_in_slabs_is_the_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    u = random_field(0, (9, 6, 7), 0.2)
    whole, volume = jacobian_determinant(u), non_diffeomorphic_volume(3 * u)
    monkeypatch.setattr("crossmorph.evaluate.regularity.SLAB_VOXELS", 50)
    np.testing.assert_allclose(jacobian_determinant(u), whole, atol=1e-12)
    assert non_diffeomorphic_volume(3 * u) == pytest.approx(volume)


def test_sdlogj_of_stretched_slabs() -> None:
    jacobian = np.ones((6, 6, 6))
    jacobian[:3] = 2.0
    assert sd_log_jacobian(jacobian) == pytest.approx(math.log(2) / 2)
    assert sd_log_jacobian(jacobian, offset=3) == pytest.approx(math.log(5 / 4) / 2)
    assert sd_log_jacobian(jacobian, mask=jacobian > 1) == 0
    assert math.isnan(sd_log_jacobian(jacobian, mask=jacobian > 9))


def test_learn2reg_sdlogj_by_the_formula_of_the_evaluation() -> None:
    u = random_field(1, (9, 10, 11), 0.3)
    mask = np.random.default_rng(2).random((9, 10, 11)) > 0.5
    rows = [(u[:, 2:, 1:-1, 1:-1] - u[:, :-2, 1:-1, 1:-1]) / 2, (u[:, 1:-1, 2:, 1:-1] - u[:, 1:-1, :-2, 1:-1]) / 2]
    rows.append((u[:, 1:-1, 1:-1, 2:] - u[:, 1:-1, 1:-1, :-2]) / 2)
    gradient = np.moveaxis(np.stack(rows), (0, 1), (-2, -1)) + np.eye(3)
    determinant = np.linalg.det(gradient)[1:-1, 1:-1, 1:-1]
    expected = np.log(np.clip(determinant + 3, 1e-9, 1e9))[mask[2:-2, 2:-2, 2:-2]].std()
    assert learn2reg_sd_log_jacobian(u, mask) == pytest.approx(expected)
    assert learn2reg_sd_log_jacobian(np.zeros((3, 8, 8, 8))) == 0


def test_a_mirrored_map_folds_everywhere_and_loses_its_whole_volume() -> None:
    u = linear(np.diag([-1.0, 1, 1]))
    assert folding_percent(jacobian_determinant(u)) == 100
    assert non_diffeomorphic_volume(u)[1] == pytest.approx(100)
    assert non_diffeomorphic_tetrahedra_percent(u) == 100


@pytest.mark.parametrize(("shift", "volume"), [(1.5, 1 / 3), (3.0, 5 / 3)])
def test_golden_volume_of_one_moved_voxel(shift: float, volume: float) -> None:
    """Values worked out by hand from the ten determinants for one voxel of a 7^3 identity moved along axis 0."""
    u = np.zeros((3, 7, 7, 7))
    u[0, 3, 3, 3] = shift
    voxels, percent = non_diffeomorphic_volume(u, np.ones((7, 7, 7)))
    assert voxels == pytest.approx(volume)
    assert percent == pytest.approx(100 * volume / 5**3)


def test_volume_equals_the_slow_transcription() -> None:
    u = random_field(3, (6, 5, 7), 0.6)
    mask = np.random.default_rng(4).random((6, 5, 7)) > 0.4
    volume, bad = slow_volume(u, mask)
    assert volume > 1
    assert non_diffeomorphic_volume(u, mask)[0] == pytest.approx(volume)
    inside = mask[1:-1, 1:-1, 1:-1].sum()
    assert non_diffeomorphic_tetrahedra_percent(u, mask) == pytest.approx(100 * bad / (10 * inside))


def test_a_checkerboard_of_folds_passes_central_differences_but_not_the_volume() -> None:
    i, j, k = np.meshgrid(*map(np.arange, (8, 8, 8)), indexing="ij")
    u = np.zeros((3, 8, 8, 8))
    u[0] = 0.9 * (-1.0) ** (i + j + k)
    assert folding_percent(jacobian_determinant(u)[1:-1, 1:-1, 1:-1]) == 0
    assert non_diffeomorphic_volume(u)[1] > 10


def test_float32_far_from_the_origin_shows_no_false_folds() -> None:
    u = np.full((3, 5, 5, 5), 200.3, np.float32)
    assert non_diffeomorphic_volume(u)[0] == 0
    assert sd_log_jacobian(jacobian_determinant(u)) < 1e-7


def test_bad_shapes_say_what_was_given() -> None:
    with pytest.raises(InputError, match=r"\(3, I, J, K\).*\(5, 5, 5, 3\)"):
        jacobian_determinant(np.zeros((5, 5, 5, 3)))
    with pytest.raises(InputError, match="three voxels"):
        non_diffeomorphic_volume(np.zeros((3, 5, 5, 2)))
    with pytest.raises(InputError, match="one grid"):
        non_diffeomorphic_volume(np.zeros((3, 5, 5, 5)), np.ones((4, 5, 5)))


def test_inverse_consistency_of_a_shift_and_a_wrong_inverse() -> None:
    points = np.random.default_rng(5).normal(size=(10, 3))
    assert inverse_consistency(lambda p: p + 3, lambda p: p - 3, points).max() < 1e-12
    np.testing.assert_allclose(inverse_consistency(lambda p: p + 3, lambda p: p, points), 3 * 3**0.5)
