import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.report import figures
from crossmorph.report.figures import before_after, blends, deformation_grid, planes
from crossmorph.space import Grid
from crossmorph.transform import Affine, DisplacementField

RAS = Grid.from_spacing((40, 32, 24), (2.0, 2.5, 4.0), center_mm=(5.0, -10.0, 20.0))


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "PIXELS", 100)


def stored_as(flips: tuple[bool, bool, bool], order: tuple[int, int, int], turn_deg: float = 0.0) -> Image:
    """A patient with one bright block, right, anterior and superior, stored along other array axes."""
    values = np.zeros(RAS.shape)
    values[25:35, 20:28, 14:20] = 1.0
    turn = Affine.rotation((0, 0, turn_deg)).matrix if turn_deg else np.eye(4)
    affine = np.array(RAS.affine)
    for axis in np.flatnonzero(flips):
        values = np.flip(values, axis)
        affine[:3, 3] += affine[:3, axis] * (RAS.shape[axis] - 1)
        affine[:3, axis] *= -1
    affine = turn @ affine[:, [*order, 3]]
    return Image.from_array(values.transpose(order), affine)


@pytest.mark.parametrize(
    ("flips", "order"),
    [
        ((False, False, False), (0, 1, 2)),
        ((True, True, False), (0, 1, 2)),
        ((True, False, True), (2, 0, 1)),
        ((False, True, True), (1, 2, 0)),
    ],
)
def test_planes_do_not_depend_on_how_the_volume_is_stored(
    flips: tuple[bool, bool, bool], order: tuple[int, int, int]
) -> None:
    center = RAS.to_world(np.array([30.0, 24.0, 17.0]))
    plain, other = stored_as((False,) * 3, (0, 1, 2)), stored_as(flips, order)
    for a, b in zip(planes(plain, center), planes(other, center), strict=True):
        np.testing.assert_allclose(a.show(plain)[0], b.show(other)[0], atol=1e-4)


def test_the_right_of_the_patient_is_on_the_left_of_the_picture() -> None:
    image = stored_as((True, True, False), (2, 1, 0))
    for plane in planes(image):
        rows, columns = np.nonzero(plane.show(image)[0] > 0.5)
        left, right, low, high = plane.extent()
        height, width = (plane.grid.shape[axis] for axis in (plane.up, plane.across))
        drawn_from_left = 1 - (columns.mean() + 0.5) / width  # the axis across is drawn backwards
        assert drawn_from_left < 0.45
        assert (rows.mean() + 0.5) / height > 0.55
        assert (right - left) / width == pytest.approx((high - low) / height, rel=0.02)


def test_a_mark_is_found_in_the_written_picture(tmp_path: Path) -> None:
    """Only the moving image has a mark, right and anterior: magenta in the upper left of the first panel."""
    marked = stored_as((True, False, False), (1, 0, 2))
    plain = Image.from_array(np.where(np.indices(RAS.shape)[0] == 0, 1.0, 0.0), RAS)
    center = RAS.to_world(np.array([30.0, 24.0, 17.0]))
    pixels = imread(before_after(plain, marked, marked, tmp_path / "pair.png", center_mm=center))[..., :3]
    top = pixels[: len(pixels) // 3]
    magenta = (top[..., 0] > 0.9) & (top[..., 1] < 0.1) & (top[..., 2] > 0.9)
    dark = (top < 0.1).all(-1)
    panels = np.flatnonzero((dark | magenta).mean(0) > 0.5)
    first = panels[: np.argmax(np.diff(panels) > 1) + 1]
    rows, columns = np.nonzero(magenta[:, first[0] : first[-1] + 1])
    inside = np.flatnonzero((dark | magenta)[:, first[len(first) // 3]])
    assert len(rows) > 100
    assert columns.mean() < 0.45 * len(first)
    assert rows.mean() < inside.mean()


def test_nothing_is_shown_where_the_moving_image_is_not_valid(tmp_path: Path) -> None:
    bright = Image.from_array(np.ones(RAS.shape) + np.random.default_rng(0).random(RAS.shape), RAS)
    empty = bright.restricted(torch.zeros(RAS.shape, dtype=torch.bool))
    pixels = imread(before_after(bright, empty, empty, tmp_path / "empty.png"))[..., :3]
    coloured = pixels.max(-1) - pixels.min(-1) > 0.2
    assert not coloured.any()


def test_deformation_picture_of_an_oblique_volume_is_written(tmp_path: Path) -> None:
    image = stored_as((True, True, False), (0, 1, 2), turn_deg=15)
    coarse = image.grid.resized((5, 5, 5))
    field = torch.zeros(3, 5, 5, 5)
    field[0, 2, 2, 2] = 6.0
    path = deformation_grid(DisplacementField(field, coarse), image, tmp_path / "grid.png")
    assert imread(path).shape[0] > 300
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_folding_is_red_and_its_absence_is_not(tmp_path: Path) -> None:
    image = stored_as((False,) * 3, (0, 1, 2))

    def red_share(mm: float) -> float:
        field = torch.zeros(3, *image.grid.shape)
        field[0, 12:28, 8:24, 6:18] = mm
        field = torch.nn.functional.avg_pool3d(field[None], 5, 1, 2)[0]
        pixels = imread(deformation_grid(DisplacementField(field, image.grid), image, tmp_path / f"{mm}.png"))
        return float(((pixels[..., 0] > 0.9) & (pixels[..., 1:3].max(-1) < 0.1)).mean())

    assert red_share(1.0) == 0
    assert red_share(30.0) > 1e-3


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    image = stored_as((False,) * 3, (0, 1, 2))
    with pytest.raises(InputError, match=r"crossmorph\[report\]"):
        before_after(image, image, image, tmp_path / "x.png")


def test_a_blend_is_grey_where_both_are_bright_and_green_where_the_image_is_dark(tmp_path: Path) -> None:
    bright = stored_as((False, False, False), (0, 1, 2))
    dark = Image.from_array(np.zeros(RAS.shape), RAS)
    center = RAS.to_world(np.array([30.0, 24.0, 17.0]))
    picture = imread(blends(bright, {"same": bright, "dark": dark}, tmp_path / "blends.png", center_mm=center))
    white, green = ((np.abs(picture[..., :3] - colour) < 0.02).all(-1) for colour in ((1, 1, 1), (0, 1, 0)))
    half = len(picture) // 2
    assert green[half:].sum() > 500
    assert not green[:half].any()
    assert white[:half].sum() > white[half:].sum() + 500
