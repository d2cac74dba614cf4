import numpy as np
import pytest
import torch

from crossmorph.errors import InputError
from crossmorph.phantom import ORGANS, PhantomPair, make_pair

IDS = {name: label for label, name in ORGANS.items()}


@pytest.fixture(scope="module")
def pair() -> PhantomPair:
    return make_pair((48, 40, 36), 6.0, seed=3)


def test_one_seed_gives_one_pair() -> None:
    first, again, other = (make_pair((16, 14, 12), 18.0, seed=seed) for seed in (5, 5, 6))
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        a, b = getattr(first, name), getattr(again, name)
        assert torch.equal(a.data, b.data)
        assert np.array_equal(a.grid.affine, b.grid.affine)
    assert torch.equal(first.moving_points.xyz, again.moving_points.xyz)
    assert not torch.equal(first.fixed.data, other.fixed.data)
    assert not torch.equal(first.fixed_labels.data, other.fixed_labels.data)


def test_scans_lie_on_different_grids(pair: PhantomPair) -> None:
    assert pair.fixed.grid.axcodes == "RAS"
    assert pair.fixed.grid.obliquity_deg < 1e-6
    assert pair.moving.grid.axcodes == "LPS"
    assert pair.moving.grid.obliquity_deg > 3
    assert pair.moving.grid.spacing == pytest.approx([5.4, 5.4, 9.6])
    assert pair.fixed_labels.grid is pair.fixed.grid
    assert (pair.fixed.space, pair.moving.space) == ("fixed", "moving")


def test_anatomy_does_not_depend_on_the_grid(pair: PhantomPair) -> None:
    coarse = make_pair((16, 14, 12), 18.0, seed=3)  # its voxel centres are every third of the finer grid
    same = coarse.fixed_labels.data == pair.fixed_labels.data[1::3, ::3, 1::3]
    assert same.float().mean() > 0.999  # rounding may differ for a voxel that touches a surface


def test_motion_is_its_inverse(pair: PhantomPair) -> None:
    points = pair.fixed.grid.to_world(np.random.default_rng(0).uniform(-0.5, 36, (500, 3)))
    assert np.abs(pair.motion.to_fixed(pair.motion.to_moving(points)) - points).max() < 1e-5
    assert np.abs(pair.motion.to_moving(pair.motion.to_fixed(points)) - points).max() < 1e-5


def test_motion_does_not_fold_and_keeps_its_bound(pair: PhantomPair) -> None:
    points = pair.fixed.grid.to_world(np.indices(pair.fixed.grid.shape, float).reshape(3, -1).T[::7])
    step = 0.01
    columns = [
        (pair.motion.to_fixed(points + shift) - pair.motion.to_fixed(points - shift)) / (2 * step)
        for shift in step * np.eye(3)
    ]
    assert np.linalg.det(np.stack(columns, -1)).min() > 0.1
    bend = np.linalg.norm(pair.motion.bend(points[np.abs(points).max(1) < 90]), axis=1).max()
    assert 5 < bend <= 12.5


def test_landmarks_are_the_same_anatomy(pair: PhantomPair) -> None:
    fixed, moving = pair.fixed_points, pair.moving_points
    assert fixed.names == moving.names
    assert len(set(fixed.names)) == len(fixed) > 300
    assert set(ORGANS.values()) <= {name.rsplit(" ", 1)[0] for name in fixed.names}
    assert np.abs(pair.motion.to_moving(fixed.xyz.numpy()) - moving.xyz.numpy()).max() < 1e-5
    assert (fixed.xyz - moving.xyz).norm(dim=1).mean() > 4
    assert pair.fixed.grid.contains(fixed.xyz.numpy()).all()
    assert pair.moving.grid.contains(moving.xyz.numpy()).all()


def test_organs_of_both_scans_meet_through_the_truth_and_not_without() -> None:
    pair = make_pair((72, 60, 54), 4.0, seed=1)
    big = [IDS[name] for name in ("liver", "spleen", "lungs", "stomach", "left kidney", "right kidney")]
    ids = pair.fixed_labels.data.numpy()
    inner = np.argwhere(np.isin(ids, big))
    inner = inner[((inner > 0) & (inner < np.array(ids.shape) - 1)).all(1)]
    steps = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3), -1).reshape(-1, 3)
    around = ids[tuple((inner[:, None] + steps).transpose(2, 0, 1))]
    inner = inner[(around == around[:, :1]).all(1)]
    world = pair.fixed.grid.to_world(inner.astype(float))

    def agreement(points: np.ndarray) -> float:
        seen = pair.moving.grid.contains(points)
        voxels = np.clip(
            np.round(pair.moving.grid.to_voxel(points[seen])), 0, np.array(pair.moving.grid.shape) - 1
        )
        found = pair.moving_labels.data.numpy()[tuple(voxels.astype(int).T)]
        return float((found == ids[tuple(inner[seen].T)]).mean())

    truth = agreement(pair.motion.to_moving(world))
    assert truth > 0.995
    assert agreement(world) < truth - 0.02
    assert agreement(pair.motion.to_fixed(world)) < truth - 0.08


def test_contrasts_are_of_two_kinds(pair: PhantomPair) -> None:
    def mean(image: torch.Tensor, labels: torch.Tensor, name: str) -> float:
        return float(image[0][labels == IDS[name]].mean())

    ct = {name: mean(pair.fixed.data, pair.fixed_labels.data, name) for name in IDS}
    mr = {name: mean(pair.moving.data, pair.moving_labels.data, name) for name in IDS}
    assert ct["aorta"] > ct["liver"]
    assert mr["aorta"] < mr["liver"]
    assert ct["left kidney"] > ct["spleen"] > ct["stomach"]
    assert mr["stomach"] > mr["left kidney"] > mr["liver"]
    ranks = [np.argsort(np.argsort(list(means.values()))) for means in (ct, mr)]
    assert abs(np.corrcoef(ranks)[0, 1]) < 0.7
    assert ct["lungs"] < -500
    liver = pair.fixed.data[0][pair.fixed_labels.data == IDS["liver"]]
    assert liver.std() > 16  # texture on top of the noise of 14 HU


def test_the_patient_lies_in_ras(pair: PhantomPair) -> None:
    def middle(name: str) -> np.ndarray:
        voxels = torch.argwhere(pair.fixed_labels.data == IDS[name]).double().mean(0).numpy()
        return pair.fixed.grid.to_world(voxels)

    assert middle("liver")[0] > 20
    assert middle("spleen")[0] < -20
    assert middle("right kidney")[0] > 20
    assert middle("vertebrae")[1] < -40
    assert middle("lungs")[2] > middle("liver")[2] > middle("left kidney")[2]


@pytest.mark.parametrize("max_mm", [-1.0, 300.0, float("nan")])
def test_a_motion_that_could_fold_is_refused(max_mm: float) -> None:
    with pytest.raises(InputError, match="max_mm"):
        make_pair((8, 8, 8), 30.0, max_mm=max_mm)


def test_without_bending_the_motion_is_rigid() -> None:
    pair = make_pair((16, 14, 12), 18.0, max_mm=0.0, seed=2)
    a, b = pair.fixed_points.xyz, pair.moving_points.xyz
    assert torch.allclose(torch.cdist(a, a), torch.cdist(b, b), atol=1e-4)
    assert (a - b).norm(dim=1).max() > 1
