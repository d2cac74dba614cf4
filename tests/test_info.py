"""The facts about volumes, from known geometry."""

import json
from pathlib import Path

import numpy as np
import pytest

from crossmorph import io
from crossmorph.commands.info import Info
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.info import describe, tables
from crossmorph.space import Grid


def image(center: tuple[float, float, float] = (0, 0, 0), **kwargs: object) -> Image:
    """10 x 20 x 30 voxels of 2 x 1 x 3 mm: a box of 20 x 20 x 90 mm; values 0 to 5999, two of them not finite."""
    values = np.arange(6000, dtype=np.float32).reshape(10, 20, 30)
    values[0, 0, :2] = np.nan
    return Image.from_array(values, Grid.from_spacing((10, 20, 30), (2, 1, 3), center), **kwargs)


def test_one_image() -> None:
    report = describe([image((1, 2, 3), name="a", notes=("odd",))])
    (one,) = report["images"]
    assert report["pairs"] == []
    assert (one["shape"], one["frames"], one["dtype"], one["axes"]) == ([10, 20, 30], 1, "float32", "RAS")
    assert one["spacing_mm"] == [2, 1, 3]
    assert one["extent_mm"] == [20, 20, 90]
    assert one["center_mm"] == [1, 2, 3]
    assert (one["box_low_mm"], one["box_high_mm"]) == ([-9, -8, -42], [11, 12, 48])
    assert (one["oblique_deg"], one["shear_deg"], one["left_handed"]) == (0, 0, False)
    assert one["valid_share"] == pytest.approx(5998 / 6000, abs=1e-6)
    assert (one["values"]["min"], one["values"]["max"], one["values"]["mean"]) == (2, 5999, 3000.5)
    assert one["values"]["percentiles"]["50"] == 3000.5
    assert one["registrable"] == "yes"
    assert one["notes"] == ["odd"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_pairs_tell_overlap_and_gap() -> None:
    pairs = describe([image(), image((10, 0, 0)), image((23, 0, 94))])["pairs"]
    assert [(p["overlap_of_first"], p["gap_mm"]) for p in pairs] == [(0.5, 0), (0, 5), (0, 4)]
    assert pairs[0]["center_distance_mm"] == 10
    assert not any(p["same_grid"] for p in pairs)
    assert describe([image(), image()])["pairs"][0]["same_grid"]


def test_an_image_without_values_is_described_and_the_reason_told() -> None:
    empty = Image.from_array(np.full((4, 4, 4), np.nan, np.float32), np.diag([-1.0, 1, 1, 1]))
    (one,) = describe([empty])["images"]
    assert one["values"] is None
    assert one["left_handed"]
    assert "no valid voxel" in one["registrable"]
    json.dumps(one, allow_nan=False)
    assert tables(describe([empty, image()]))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = (tmp_path / "a.nii.gz", tmp_path / "b.mha")
    for path, center in zip(paths, [(0, 0, 0), (24, 0, 0)], strict=True):
        io.write(image(center), path)
    assert Info(paths, json=True).run() == 0
    report = json.loads(capsys.readouterr().out)
    assert [i["path"] for i in report["images"]] == [str(p) for p in paths]
    assert report["pairs"][0]["gap_mm"] == 4
    assert Info(paths).run() == 0
    out = capsys.readouterr().out
    assert "10 x 20 x 30" in out
    assert "2 x 1 x 3 mm" in out
    assert "4.0 mm" in out
    with pytest.raises(InputError, match="no file"):
        Info(()).run()
