"""Images and label maps."""

import numpy as np
import pytest
import torch

from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.space import Grid


def test_image_from_array_takes_three_or_four_axes() -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = Image.from_array(array, np.eye(4), name="scan")
    assert image.data.shape == (1, 2, 3, 4)
    assert image.data.dtype == torch.float32
    assert image.dtype == np.int16
    assert image.valid.all()
    assert image.grid.shape == (2, 3, 4)
    assert "scan" in repr(image)
    frames = Image.from_array(np.stack((array, array + 2)), image.grid)
    assert frames.channels == 2
    assert "2 channels" in repr(frames)
    np.testing.assert_array_equal(frames.frame(1).data[0], array + 2)
    np.testing.assert_array_equal(frames.mean_frame().data[0], array + 1)


def test_values_that_are_not_finite_are_not_valid() -> None:
    array = np.full((2, 2, 2, 2), 5.0)
    array[0, 0, 0, 0] = np.nan
    array[1, 1, 1, 1] = -np.inf
    array[0, 0, 1, 0] = -3
    image = Image.from_array(array, np.eye(4))
    assert image.valid.sum() == 6
    assert not image.valid[0, 0, 0]
    assert not image.valid[1, 1, 1]
    assert image.data.isfinite().all()
    assert image.data[0, 0, 0, 0] == -3
    empty = Image.from_array(np.full((2, 2, 2), np.nan), np.eye(4))
    assert not empty.valid.any()
    assert (empty.data == 0).all()


def test_restriction_narrows_validity_only() -> None:
    image = Image.from_array(np.ones((2, 2, 2)), np.eye(4))
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[0] = True
    assert image.restricted(mask).valid.sum() == 4
    assert image.restricted(mask).restricted(~mask).valid.sum() == 0
    assert image.valid.all()


def test_shapes_must_fit() -> None:
    grid = Grid((2, 3, 4), np.eye(4))
    whole = torch.ones(grid.shape, dtype=torch.bool)
    with pytest.raises(InputError, match="does not fit a grid"):
        Image(torch.zeros(2, 3, 4), grid, whole)
    with pytest.raises(InputError, match="validity"):
        Image(torch.zeros(1, 2, 3, 4), grid, whole[0])
    with pytest.raises(InputError, match="3 axes"):
        Image.from_array(np.zeros((2, 3)), np.eye(4))
    with pytest.raises(InputError, match="do not fit"):
        Labels(torch.zeros(4, 3, 2, dtype=torch.int32), grid)


def test_labels_are_whole_numbers() -> None:
    labels = Labels.from_array(np.array([[[0.0, 2.0, 7.0, 7.0]]]), np.eye(4))
    assert labels.ids == [2, 7]
    assert labels.data.dtype == torch.int32
    assert labels.dtype == np.float64
    assert "2 labels" in repr(labels)
    with pytest.raises(InputError, match="fractions"):
        Labels.from_array(np.full((1, 1, 2), 0.5), np.eye(4))
    with pytest.raises(InputError, match="fractions"):
        Labels.from_array(np.full((1, 1, 2), np.nan), np.eye(4))
    with pytest.raises(InputError, match="3 axes"):
        Labels.from_array(np.zeros((1, 2), int), np.eye(4))
    with pytest.raises(InputError, match="whole numbers"):
        Labels(torch.zeros(1, 1, 4), labels.grid)


def test_large_labels_survive() -> None:
    large = 2**40 + 3
    labels = Labels.from_array(np.array([[[0, large, -5]]]), np.eye(4))
    assert labels.data.dtype == torch.int64
    assert labels.ids == [-5, large]
    assert labels.to("cpu").ids == [-5, large]
