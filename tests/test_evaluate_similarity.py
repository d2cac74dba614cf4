"""Image similarity and landmark errors against scikit-image, MONAI, scipy and closed forms."""

import math

import numpy as np
import pytest
import torch

from crossmorph.errors import InputError
from crossmorph.evaluate.landmarks import label_centroid_error, summarise_errors, target_registration_error
from crossmorph.evaluate.similarity import (
    lncc,
    lncc_map,
    mutual_information,
    ncc,
    normalised_mutual_information,
    ssim,
    ssim_map,
)
from crossmorph.image import Image
from crossmorph.points import Points
from crossmorph.space import Grid


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    first = gaussian_filter(rng.normal(size=(24, 22, 20)), 2)
    return first, 0.5 * first**2 + 0.7 * first + 0.02 * gaussian_filter(rng.normal(size=first.shape), 1)


def test_mutual_information_of_known_tables() -> None:
    x = np.repeat([0.0, 1.0], 4).reshape(2, 2, 2)
    assert mutual_information(x, 5 - 2 * x, bins=2) == pytest.approx(math.log(2))
    assert normalised_mutual_information(x, 5 - 2 * x, bins=2) == pytest.approx(2)
    y = np.tile([0.0, 1.0], 4).reshape(2, 2, 2)
    assert mutual_information(x, y, bins=2) == pytest.approx(0)
    assert normalised_mutual_information(x, y, bins=2) == pytest.approx(1)


def test_normalised_mutual_information_equals_scikit_image(images: tuple[np.ndarray, np.ndarray]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    expected = metrics.normalized_mutual_information(*images, bins=32)
    assert normalised_mutual_information(*images, bins=32) == pytest.approx(expected)


def test_ssim_equals_scikit_image(images: tuple[np.ndarray, np.ndarray]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    options = {"data_range": 2.0, "win_size": 7, "use_sample_covariance": False}
    expected = metrics.structural_similarity(*images, full=True, **options)[1]
    inner = (slice(3, -3),) * 3  # scikit-image continues the images over their faces, we leave the outside out
    np.testing.assert_allclose(ssim_map(*images, data_range=2.0)[inner], expected[inner], atol=1e-9)
    assert ssim(images[0], images[0]) == pytest.approx(1)


def test_local_correlation_equals_monai(images: tuple[np.ndarray, np.ndarray]) -> None:
    losses = pytest.importorskip("monai.losses")
    tensors = [torch.from_numpy(1000 * image)[None, None] for image in images]
    loss = losses.LocalNormalizedCrossCorrelationLoss(kernel_size=9, reduction="none")
    expected = -loss(*tensors)[0, 0].numpy()
    inner = (slice(4, -4),) * 3  # MONAI pads with zeros
    np.testing.assert_allclose(lncc_map(*images)[inner], expected[inner], atol=1e-5)


def test_local_correlation_sees_through_a_smooth_gain(images: tuple[np.ndarray, np.ndarray]) -> None:
    first = images[0]
    gain = np.where(np.arange(24) < 12, 1.0, -3.0)[:, None, None]
    assert abs(ncc(first, gain * first)) < 0.9
    assert lncc(first[:12], (gain * first)[:12] + 5) == pytest.approx(1)
    assert lncc(first, np.ones_like(first)) == 0


def test_ncc_is_pearson_and_ignores_gain(images: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = images
    assert ncc(first, second) == pytest.approx(np.corrcoef(first.ravel(), second.ravel())[0, 1])
    assert ncc(first, 7 - 3 * first) == pytest.approx(-1)
    assert math.isnan(ncc(first, np.ones_like(first)))


def test_only_valid_voxels_inside_the_mask_count(images: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = images
    mask = np.zeros(first.shape, bool)
    mask[5:15, 5:15, 5:15] = True
    spoilt = np.where(mask, second, 1e6 * np.random.default_rng(1).random(first.shape))
    for measure in (ncc, lncc, ssim, mutual_information, normalised_mutual_information):
        assert measure(first, spoilt, mask) == pytest.approx(measure(first, second, mask))
        image = Image.from_array(second, np.eye(4)).restricted(torch.from_numpy(mask))
        assert measure(first, image) == pytest.approx(measure(first, second, mask), abs=1e-4)


def test_errors_name_the_shapes(images: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(InputError, match="fixed grid"):
        ncc(images[0], images[1][1:])
    with pytest.raises(InputError, match="no voxel"):
        ncc(*images, np.zeros(images[0].shape))


# -- landmarks ---------------------------------------------------------------------------------------------------


def test_error_of_a_shift_is_its_length() -> None:
    points = np.random.default_rng(2).normal(scale=50, size=(30, 3))
    errors = target_registration_error(lambda p: p + np.array([0, 3, 4]), Points(torch.from_numpy(points)), points)
    np.testing.assert_allclose(errors, 5)


def test_summary_of_known_errors() -> None:
    summary = summarise_errors([*range(101), np.inf], thresholds_mm=(10,))
    assert summary["points"] == 102
    assert summary["undefined"] == 1
    assert (summary["mean"], summary["median"], summary["max"]) == (50, 50, 100)
    assert [summary[key] for key in ("p05", "p25", "p75", "p95")] == [5, 25, 75, 95]
    assert summary["rms"] == pytest.approx(math.sqrt(np.mean(np.arange(101) ** 2)))
    assert summary["under_10_mm"] == pytest.approx(1000 / 101)
    assert math.isnan(summarise_errors([])["mean"])


def test_unequal_numbers_of_landmarks_are_refused() -> None:
    with pytest.raises(InputError, match="4 fixed landmarks but 3"):
        target_registration_error(lambda p: p, np.zeros((4, 3)), np.zeros((3, 3)))


def test_centroids_in_mm_and_a_vanished_landmark() -> None:
    grid = Grid.from_spacing((8, 8, 8), (1, 2, 3))
    fixed, warped = np.zeros((8, 8, 8), int), np.zeros((8, 8, 8), int)
    fixed[1:4, 1:4, 1:4], fixed[6, 6, 6] = 1, 2
    warped[1:4, 1:4, 2:5] = 1
    errors = label_centroid_error(fixed, warped, grid)
    assert errors[1] == pytest.approx(3.0)
    assert math.isnan(errors[2])
