"""The linear stage as a whole, on a phantom moved by known maps."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scene import inverted, places, seen, tissue
from scipy.spatial.transform import Rotation
from truth import Order, reordered, signed_permutations, volume

from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.phantom import make_pair
from crossmorph.phantom.pair import PhantomPair
from crossmorph.record import Journal
from crossmorph.registration import register
from crossmorph.resample import resample
from crossmorph.settings import Linear, Mcbo, Refinement
from crossmorph.space import Grid
from crossmorph.systems import linear as stage
from crossmorph.systems.linear import align
from crossmorph.transform import Affine

VOXEL_MM = 4.5


@cache
def phantom() -> PhantomPair:
    """CT and MR, the MR deformed by a few mm; 288 x 243 x 216 mm."""
    return make_pair((64, 54, 48), VOXEL_MM)


@pytest.fixture
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views with fewer voxels: a third of the time, and right to about two voxels."""
    monkeypatch.setattr(stage, "COARSE_VOXELS", 16_000)
    monkeypatch.setattr(stage, "FINE_VOXELS", 60_000)


def moved(image: Image, truth: Affine) -> Image:
    """The same volume in another world: what lies at x lies at truth(x)."""
    return replace(image, grid=Grid(image.grid.shape, truth.matrix @ image.grid.affine), name="moving")


def error_mm(matrix: np.ndarray, truth: Affine) -> float:
    """Mean distance at the phantom's landmarks."""
    points = phantom().fixed_points.xyz
    return float((Affine(matrix)(points) - truth(points)).norm(dim=1).mean())


def aligned(fixed: Image, moving: Image, **keywords: object) -> tuple[np.ndarray, Journal]:
    journal = Journal()
    return align(fixed, moving, Linear(**keywords), journal), journal  # type: ignore[arg-type]


def ball_of_noise(seed: int) -> Image:
    """A ball of 60 mm, its values without any relation to the seeds of others."""
    grid = Grid.from_spacing((36, 36, 36), 4.0)
    places = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1).astype(float))
    inside = torch.from_numpy(np.linalg.norm(places, axis=-1) < 60)
    values = 50 + 50 * torch.rand(grid.shape, generator=torch.manual_seed(seed))
    return Image((values * inside)[None], grid, torch.ones_like(inside), name=f"noise {seed}")


# -- known maps --------------------------------------------------------------------------------------------------

FAR = {
    "40 degrees": Affine.from_parts((20, -15, 10), (10, -15, 38)),
    "40 degrees and a shift of its own size": Affine.from_parts((290, -240, 200), (10, -15, 38)),
    "120 degrees": Affine.from_parts((20, 0, -30), (10, 118, 15)),
}


@pytest.mark.slow
@pytest.mark.parametrize("truth", FAR.values(), ids=FAR)
def test_a_rigid_map_is_found_from_any_header(truth: Affine) -> None:
    fixed = phantom().fixed
    matrix, journal = aligned(fixed, moved(fixed, truth))
    assert error_mm(matrix, truth) < 0.1 * VOXEL_MM
    assert journal.notes["start"]["kept"]
    assert all(candidate["overlap"] <= 1.01 for candidate in journal.notes["starts"])


@pytest.mark.slow
@pytest.mark.parametrize("truth", FAR.values(), ids=FAR)
def test_two_modalities_end_where_they_end_from_a_good_header(truth: Affine) -> None:
    """Between them lies a deformation, so that no linear map is right; but it is the same wherever they start."""
    fixed, moving = phantom().fixed, phantom().moving
    near, _ = aligned(fixed, moving)
    far, _ = aligned(fixed, moved(moving, truth))
    assert error_mm(np.linalg.inv(truth.matrix) @ far @ np.linalg.inv(near), Affine.identity()) < 0.5 * VOXEL_MM
    points, truths = phantom().fixed_points.xyz, truth(phantom().moving_points.xyz)
    assert float((Affine(far)(points) - truths).norm(dim=1).mean()) < 7.5


@pytest.mark.usefixtures("_coarse")
@pytest.mark.parametrize("degrees", [40, 120])
def test_a_turn_is_found_in_coarse_views(degrees: float) -> None:
    truth = Affine.from_parts((60, -45, 30), (0, 0, degrees))
    matrix, _ = aligned(phantom().fixed, moved(phantom().fixed, truth), model="rigid")
    assert error_mm(matrix, truth) < 0.5 * VOXEL_MM


@pytest.mark.slow
@pytest.mark.parametrize("search", ["auto", "global"])
def test_a_turned_ball_of_blobs(search: str) -> None:
    truth = Affine.from_parts((0, 0, 0), (0, 0, 120))
    grid = Grid.from_spacing((42, 42, 42), 2.0)
    moving = volume(grid, lambda points: inverted(tissue(truth.inverse()(points)))[None])
    matrix, _ = aligned(seen(grid), moving, model="rigid", search=search)
    assert float((Affine(matrix)(places()) - truth(places())).norm(dim=1).mean()) < 1


@pytest.mark.slow
def test_half_a_field_of_view() -> None:
    truth = Affine.from_parts((60, -45, 30), (0, 0, 20))
    whole = phantom().fixed
    half = Image(whole.data[..., :24], Grid((64, 54, 24), whole.grid.affine), whole.valid[..., :24], name="half")
    matrix, _ = aligned(whole, moved(half, truth))
    assert error_mm(matrix, truth) < 0.5 * VOXEL_MM
    matrix, _ = aligned(half, moved(whole, truth))
    assert error_mm(matrix, truth) < 0.5 * VOXEL_MM


@pytest.mark.usefixtures("_coarse")
def test_what_is_in_place_stays_in_place() -> None:
    fixed = phantom().fixed
    same, journal = aligned(fixed, moved(fixed, Affine.identity()))
    assert error_mm(same, Affine.identity()) < 0.02 * VOXEL_MM
    assert [candidate["start"] for candidate in journal.notes["starts"]] == ["header"]


@pytest.mark.slow
def test_two_modalities_in_place_get_no_farther_apart() -> None:
    known = phantom()
    matrix, _ = aligned(known.fixed, known.moving)
    before = (known.fixed_points.xyz - known.moving_points.xyz).norm(dim=1).mean()
    after = (Affine(matrix)(known.fixed_points.xyz) - known.moving_points.xyz).norm(dim=1).mean()
    assert float(after) < float(before)


MODELS = {
    "translation": Affine.translation((9, -6, 12)),
    "rigid": Affine.from_parts((9, -6, 12), (5, -4, 6)),
    "similarity": Affine(Affine.from_parts((9, -6, 12), (5, -4, 6)).matrix @ np.diag([1.08, 1.08, 1.08, 1])),
    "affine": Affine(
        Affine.from_parts((9, -6, 12), (5, -4, 6)).matrix
        @ np.array([[1.08, 0.04, 0, 0], [0, 0.95, 0.05, 0], [-0.03, 0, 1.04, 0], [0, 0, 0, 1]])
    ),
}


@pytest.mark.usefixtures("_coarse")
@pytest.mark.parametrize("model", MODELS)
def test_each_model_finds_a_map_of_its_kind(model: str) -> None:
    truth = MODELS[model]
    matrix, journal = aligned(phantom().fixed, moved(phantom().fixed, truth), model=model)
    assert error_mm(matrix, truth) < 0.5 * VOXEL_MM
    own = {"affine": {"rigid", "affine"}, "similarity": {"similarity map"}}.get(model, {model})
    assert set(journal.notes) == {"starts", "start"} | own
    if model in ("translation", "rigid", "similarity"):
        shape = matrix[:3, :3].T @ matrix[:3, :3]
        np.testing.assert_allclose(shape, shape[0, 0] * np.eye(3), atol=1e-6)
        assert shape[0, 0] == pytest.approx(1.08**2 if model == "similarity" else 1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["mi", "mind", "msssc", "ncc", "disa"])
def test_each_similarity_finds_the_map(similarity: str) -> None:
    truth = Affine.from_parts((9, -6, 12), (5, -4, 6))
    matrix, _ = aligned(phantom().fixed, moved(phantom().fixed, truth), model="rigid", similarity=similarity)
    assert error_mm(matrix, truth) < 0.3 * VOXEL_MM


def test_no_model_takes_the_start_as_it_is() -> None:
    truth = FAR["40 degrees"]
    journal = Journal()
    fixed = phantom().fixed
    assert align(fixed, fixed, Linear(model="none"), journal, truth.matrix) is truth.matrix
    np.testing.assert_array_equal(align(fixed, fixed, Linear(model="none"), journal), np.eye(4))
    assert journal.notes == {}


@pytest.mark.usefixtures("_coarse")
def test_an_initial_pose_is_where_the_search_begins() -> None:
    truth = FAR["40 degrees and a shift of its own size"]
    journal = Journal()
    near = Affine.from_parts((8, -5, 4), (4, 3, -2)).matrix
    moving = moved(phantom().fixed, truth)
    matrix = align(phantom().fixed, moving, Linear(search="header"), journal, truth.matrix @ near)
    assert error_mm(matrix, truth) < 0.5 * VOXEL_MM
    assert [candidate["start"] for candidate in journal.notes["starts"]] == ["header"]


@pytest.mark.slow
def test_random_starts_find_what_the_header_does_not() -> None:
    truth = Affine.from_parts((30, 20, -10), (0, 0, 55))
    moving = moved(phantom().fixed, truth)
    search = {"search": "header", "random_starts": 100, "random_deg": 70.0, "random_mm": 60.0}
    matrix, journal = aligned(phantom().fixed, moving, **search)
    assert error_mm(matrix, truth) < 0.5 * VOXEL_MM
    assert any(candidate["start"].startswith("random") for candidate in journal.notes["starts"])


# -- how the volumes are stored, and on how many threads ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("order", signed_permutations()[3::11])
def test_storage_order_does_not_change_the_pose(order: Order) -> None:
    truth = Affine.from_parts((9, -6, 12), (5, -4, 6))
    moving = moved(phantom().moving, truth)
    expected, _ = aligned(phantom().fixed, moving, model="rigid")
    found, _ = aligned(phantom().fixed, reordered(moving, order), model="rigid")
    assert error_mm(found, Affine(expected)) < 0.1 * VOXEL_MM
    found, _ = aligned(reordered(phantom().fixed, order), moving, model="rigid")
    assert error_mm(found, Affine(expected)) < 0.3 * VOXEL_MM


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_coarse", "_threads")
@pytest.mark.parametrize("search", ["header", "global"])
def test_the_result_does_not_depend_on_the_number_of_threads(search: str) -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        matrix, journal = aligned(phantom().fixed, phantom().moving, search=search)
        found.append((matrix, journal.notes))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# -- nothing to find, and no harm --------------------------------------------------------------------------------


@pytest.mark.usefixtures("_coarse")
def test_unrelated_images_do_not_fly_apart() -> None:
    """Nothing is right here, but what is given back is a sound map that keeps the bodies on each other."""
    matrix, journal = aligned(ball_of_noise(1), ball_of_noise(2))
    assert 0.25 < np.linalg.det(matrix[:3, :3]) < 4
    assert np.linalg.norm(matrix[:3, 3]) < 60
    for note in ("start", "rigid", "affine"):
        scores = journal.notes[note]
        assert scores["kept"] == ("before" not in scores or scores["after"] > scores["before"])


@pytest.mark.usefixtures("_coarse")
def test_a_header_without_overlap_is_refused_where_it_is_all_that_may_be_tried() -> None:
    moving = moved(phantom().fixed, Affine.translation((2000, 0, 0)))
    with pytest.raises(
        InputError, match=r"moving and .* do not overlap from any start.*let --search find a start"
    ):
        aligned(phantom().fixed, moving, search="header")


def test_an_image_without_structure_is_refused() -> None:
    fixed = phantom().fixed
    flat = torch.full_like(fixed.data, 3.0)
    with pytest.raises(InputError, match=r"flat shows no structure.*--linear none"):
        aligned(fixed, replace(fixed, data=flat, name="flat"))


def spoilt(monkeypatch: pytest.MonkeyPatch, harm: Affine) -> None:
    """Every fit ends in a map that was not asked for."""
    from crossmorph.optimise.linear import Fit

    monkeypatch.setattr(stage, "fit", lambda problems, model, pull=None: Fit(harm.matrix, 0.0, 1.0, 1))
    monkeypatch.setattr(stage, "step", lambda *arguments: None)


@pytest.mark.usefixtures("_coarse")
@pytest.mark.parametrize("similarity", ["mi", "mind"])
def test_a_fit_that_does_harm_is_dropped(monkeypatch: pytest.MonkeyPatch, similarity: str) -> None:
    fixed = phantom().fixed
    start = np.eye(4)
    monkeypatch.setattr(stage, "_start", lambda *arguments: start)
    spoilt(monkeypatch, Affine.from_parts((12, 0, 0), (0, 0, 5)))
    matrix, journal = aligned(fixed, moved(fixed, Affine.identity()), similarity=similarity)
    np.testing.assert_array_equal(matrix, np.eye(4))
    for model in ("rigid", "affine"):
        note = journal.notes[model]
        assert note["kept"] is False
        assert note["judge"] == ("MIND-SSC" if similarity == "mi" else "mutual information")
        assert note["after"] < note["before"]


@pytest.mark.usefixtures("_coarse")
def test_a_fit_that_shrinks_everything_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_start", lambda *arguments: np.eye(4))
    spoilt(monkeypatch, Affine(np.diag([0.6, 0.6, 0.6, 1.0])))
    matrix, journal = aligned(phantom().fixed, phantom().moving)
    np.testing.assert_array_equal(matrix, np.eye(4))
    assert journal.notes["affine"] == {"kept": False, "why": "volume changed 0.0467 times"}


@pytest.mark.usefixtures("_coarse")
def test_a_start_that_does_harm_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = phantom().fixed
    wrong = Affine.from_parts((10, 0, 0), (0, 0, 8)).matrix
    monkeypatch.setattr(stage._Search, "_walked", _walked_to(wrong))
    spoilt(monkeypatch, Affine.identity())
    matrix, journal = aligned(fixed, moved(fixed, Affine.identity()), search="header")
    np.testing.assert_array_equal(matrix, np.eye(4))
    assert journal.notes["start"]["kept"] is False
    assert journal.notes["start"]["after"] < journal.notes["start"]["before"]


def _walked_to(matrix: np.ndarray) -> object:
    return lambda self, start: stage.Candidate(start, matrix, 0.1, 1.0, 1.5, 0.9)


# -- in a registration -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_coarse")
def test_register_aligns_and_then_deforms() -> None:
    """The linear map acts after the displacement, and scores count from where the images were given."""
    known, truth = phantom(), Affine.from_parts((60, -45, 30), (0, 0, 30))
    moving = moved(known.moving, truth)
    quick = Mcbo(levels=(4,), half_width=3, refine=(Refinement(control=2, iterations=20, smoothness=0.3),))
    result = register(known.fixed, moving, settings=quick)
    points = known.fixed_points.xyz
    after = (result.transform(points) - truth(known.moving_points.xyz)).norm(dim=1).mean()
    alone = (result.linear(points) - truth(known.moving_points.xyz)).norm(dim=1).mean()
    assert float(after) < float(alone) < 9
    assert result.displacement is not None
    torch.testing.assert_close(result.transform(points), result.linear(result.displacement(points)))
    np.testing.assert_array_equal(result.initial.matrix, np.eye(4))
    np.testing.assert_allclose(result.record["linear"], result.linear.matrix)
    (nmi,) = result.scores["nmi"].values()
    assert nmi["before"] < nmi["after"]
    assert result.scores["moved_mm"]["median"] > 50 > result.scores["displacement_mm"]["p95"]
    assert result.verdict.status == "ok"
    json.dumps(result.record, allow_nan=False)
    again = resample(moving, known.fixed.grid, result.transform)
    torch.testing.assert_close(again.data, result.warped.data)


def test_rotations_of_the_tests_are_right() -> None:
    """``Affine.from_parts`` turns by degrees about the world's axes."""
    turn = FAR["120 degrees"].matrix[:3, :3]
    assert np.degrees(Rotation.from_matrix(turn).magnitude()) > 110
