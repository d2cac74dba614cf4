"""Jacobians, folding, SDlogJ and NDV against closed forms, golden values and slow transcriptions."""

import itertools

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from crossmorph.errors import InputError
from crossmorph.evaluate.regularity import (
    inverse_consistency,
    learn2reg_sdlogj,
    non_diffeomorphic_tetrahedra_percent,
    non_diffeomorphic_volume,
    voxel_determinant,
    voxel_displacement,
)
from crossmorph.space import Grid
from crossmorph.transform import Affine
from crossmorph.transform.jacobian import folding


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


def test_volume_in_slabs_is_the_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    u = random_field(0, (9, 6, 7), 0.6)
    volume = non_diffeomorphic_volume(u)
    monkeypatch.setattr("crossmorph.evaluate.regularity.SLAB_VOXELS", 50)
    assert non_diffeomorphic_volume(u) == pytest.approx(volume)


def test_learn2reg_sdlogj_by_the_formula_of_the_evaluation() -> None:
    u = random_field(1, (9, 10, 11), 0.3)
    mask = np.random.default_rng(2).random((9, 10, 11)) > 0.5
    rows = [(u[:, 2:, 1:-1, 1:-1] - u[:, :-2, 1:-1, 1:-1]) / 2, (u[:, 1:-1, 2:, 1:-1] - u[:, 1:-1, :-2, 1:-1]) / 2]
    rows.append((u[:, 1:-1, 1:-1, 2:] - u[:, 1:-1, 1:-1, :-2]) / 2)
    gradient = np.moveaxis(np.stack(rows), (0, 1), (-2, -1)) + np.eye(3)
    determinant = np.linalg.det(gradient)[1:-1, 1:-1, 1:-1]
    expected = np.log(np.clip(determinant + 3, 1e-9, 1e9))[mask[2:-2, 2:-2, 2:-2]].std()
    assert learn2reg_sdlogj(voxel_determinant(u), mask) == pytest.approx(expected)
    assert learn2reg_sdlogj(voxel_determinant(np.zeros((3, 8, 8, 8)))) == pytest.approx(0, abs=1e-12)


def test_a_mirrored_map_folds_everywhere_and_loses_its_whole_volume() -> None:
    u = linear(np.diag([-1.0, 1, 1]))
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
    assert folding(voxel_determinant(u)[1:-1, 1:-1, 1:-1]) == 0
    assert non_diffeomorphic_volume(u)[1] > 10


def test_float32_far_from_the_origin_shows_no_false_folds() -> None:
    u = np.full((3, 5, 5, 5), 200.3, np.float32)
    assert non_diffeomorphic_volume(u)[0] == 0


def test_bad_shapes_say_what_was_given() -> None:
    with pytest.raises(InputError, match=r"\(3, I, J, K\).*\(5, 5, 5, 3\)"):
        voxel_determinant(np.zeros((5, 5, 5, 3)))
    with pytest.raises(InputError, match="three voxels"):
        non_diffeomorphic_volume(np.zeros((3, 5, 5, 2)))
    with pytest.raises(InputError, match="one grid"):
        non_diffeomorphic_volume(np.zeros((3, 5, 5, 5)), np.ones((4, 5, 5)))


def test_inverse_consistency_of_a_shift_and_a_wrong_inverse() -> None:
    points = np.random.default_rng(5).normal(size=(10, 3))
    assert inverse_consistency(lambda p: p + 3, lambda p: p - 3, points).max() < 1e-12
    np.testing.assert_allclose(inverse_consistency(lambda p: p + 3, lambda p: p, points), 3 * 3**0.5)


def test_displacement_in_voxels_of_a_turned_anisotropic_grid() -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec([0.2, 0.5, -0.3]).as_matrix() @ np.diag([1.0, -2, 4])
    grid = Grid((4, 5, 6), affine)
    moved = affine[:3, :3] @ [0.5, 2, -1]
    u = voxel_displacement(Affine.translation(moved), grid)
    assert u.shape == (3, 4, 5, 6)
    np.testing.assert_allclose(u, np.broadcast_to(np.reshape([0.5, 2, -1], (3, 1, 1, 1)), u.shape), atol=1e-5)
