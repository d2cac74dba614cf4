"""What a registration leaves in a folder, and whether other programs read the same from it."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scene import GRID, QUICK, WARP, inverted, pair, places, seen
from truth import tilted_grid

from crossmorph import io, result
from crossmorph.commands.apply import Apply
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.record import file_hash
from crossmorph.registration import register
from crossmorph.result import Result
from crossmorph.settings import Mcbo, from_dict
from crossmorph.transform import Affine

OBLIQUE = tilted_grid((34, 40, 28), (2.4, 2.0, 3.0), center=(1, -2, 3))
TURNED = Affine.from_parts((1, -2, 1), (0, 3, 5))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fixed.nii.gz and moving.nii.gz on an oblique grid, in a folder."""
    folder = tmp_path_factory.mktemp("inputs")
    fixed, moving = pair(inverted, OBLIQUE)
    io.write(fixed, folder / "fixed.nii.gz")
    io.write(replace(moving, dtype=np.dtype(np.int16)), folder / "moving.nii.gz")
    return folder


@pytest.fixture(scope="module")
def found(inputs: Path) -> Result:
    fixed, moving = io.read(inputs / "fixed.nii.gz"), io.read(inputs / "moving.nii.gz")
    return register(fixed, moving, settings=QUICK, initial=TURNED, seed=5)


@pytest.fixture(scope="module")
def saved(found: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return found.save(tmp_path_factory.mktemp("results") / "out")


def record_of(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record: dict[str, Any] = json.loads((folder / "record.json").read_text(), parse_constant=refuse)
    return record


# -- files -------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_is_promised(saved: Path) -> None:
    transforms, told = {"forward.h5", "inverse.h5"}, {"record.json", "report.html"}
    names = {"warped.nii.gz", "validity.nii.gz", "confidence.nii.gz"} | transforms | told
    assert {path.name for path in saved.iterdir()} == names
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_warped_and_validity_lie_on_the_fixed_grid(saved: Path, found: Result) -> None:
    warped, validity = io.read(saved / "warped.nii.gz"), io.read_labels(saved / "validity.nii.gz")
    for thing in (warped, validity):
        assert thing.grid.same_as(found.fixed.grid)
    assert warped.dtype == np.int16
    assert validity.dtype == np.uint8
    assert torch.equal(validity.data > 0, found.fixed.valid & found.warped.valid)
    assert 0.5 < float(validity.data.float().mean()) < 1
    torch.testing.assert_close(warped.data, found.warped.data.round(), atol=1.01, rtol=0)


def test_simpleitk_draws_the_same_warped_image(saved: Path, inputs: Path) -> None:
    """The promise of the README; in real numbers, since SimpleITK cuts off where we round."""
    fixed, moving = (
        sitk.ReadImage(str(inputs / f"{name}.nii.gz"), sitk.sitkFloat32) for name in ("fixed", "moving")
    )
    drawn = sitk.Resample(moving, fixed, sitk.ReadTransform(str(saved / "forward.h5")))
    theirs = sitk.GetArrayFromImage(drawn).T
    ours = io.read(saved / "warped.nii.gz").data[0].numpy()
    inside = io.read_labels(saved / "validity.nii.gz").data.numpy() > 0
    assert np.abs(theirs - ours)[inside].max() < 0.51


def test_simpleitk_sends_points_where_we_do(saved: Path, found: Result) -> None:
    """Both directions, within 1e-3 mm, far outside the field of view as well."""
    points = torch.cat((places(34), places(34) * 4)).numpy()
    lps = points * (-1, -1, 1)
    for name, ours in (("forward", found.transform), ("inverse", found.inverse)):
        transform = sitk.ReadTransform(str(saved / f"{name}.h5"))
        theirs = np.array([transform.TransformPoint(point.tolist()) for point in lps]) * (-1, -1, 1)
        assert np.abs(theirs - ours(points)).max() < 1e-3


def test_our_own_reader_finds_the_same_transform(saved: Path, found: Result) -> None:
    for name, ours in (("forward", found.transform), ("inverse", found.inverse)):
        read = io.read_transform(saved / f"{name}.h5")
        torch.testing.assert_close(read(places()), ours(places()), atol=1e-4, rtol=0)


def test_apply_needs_nothing_but_the_folder(saved: Path, inputs: Path, found: Result, tmp_path: Path) -> None:
    """The record tells the grids of both directions."""
    Apply(saved / "forward.h5", inputs / "moving.nii.gz", tmp_path / "there.nii.gz").run()
    torch.testing.assert_close(io.read(tmp_path / "there.nii.gz").data, io.read(saved / "warped.nii.gz").data)
    Apply(saved / "inverse.h5", inputs / "fixed.nii.gz", tmp_path / "back.nii.gz").run()
    assert io.read(tmp_path / "back.nii.gz").grid.same_as(found.movings[0].grid)


def test_several_moving_images_get_a_file_each(tmp_path: Path) -> None:
    fixed, moving = pair()
    t1, t2 = replace(moving, name="T1"), replace(seen(GRID, WARP), name="T2")
    register(fixed, [t1, t2], settings=QUICK).save(tmp_path / "two")
    assert {"warped_T1.nii.gz", "warped_T2.nii.gz"} <= {path.name for path in (tmp_path / "two").iterdir()}
    assert [entry["name"] for entry in record_of(tmp_path / "two")["inputs"]["moving"]] == ["T1", "T2"]
    register(fixed, [t1, t1], settings=QUICK).save(tmp_path / "same")
    assert {"warped_1_T1.nii.gz", "warped_2_T1.nii.gz"} <= {path.name for path in (tmp_path / "same").iterdir()}


def test_a_result_appears_whole_or_not_at_all(
    found: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(io, "write_transform", full)
        with pytest.raises(InputError, match=r"cannot write .*out: No space left on device; nothing half-written"):
            found.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    found.save(tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        found.save(tmp_path / "out")
    (tmp_path / "out" / "warped.nii.gz").unlink()
    found.save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "warped.nii.gz").is_file()


# -- the record --------------------------------------------------------------------------------------------------


def test_the_record_tells_everything(saved: Path, inputs: Path, found: Result) -> None:
    record = record_of(saved)
    assert record["verdict"] == {"status": found.verdict.status, "reasons": list(found.verdict.reasons)}
    assert record["scores"] == found.scores
    settings = dict(record["settings"])
    assert settings.pop("system") == "mcbo"
    assert from_dict(Mcbo, settings, "record") == QUICK
    assert (record["seed"], record["device"]) == (5, found.device)
    np.testing.assert_allclose(record["initial"], TURNED.matrix)
    np.testing.assert_allclose(record["linear"], TURNED.matrix)
    fixed, moving = record["inputs"]["fixed"], record["inputs"]["moving"][0]
    assert fixed["sha256"] == file_hash(inputs / "fixed.nii.gz")
    assert moving["file"] == str(inputs / "moving.nii.gz")
    assert moving["shape"] == [34, 40, 28]
    np.testing.assert_allclose(moving["affine"], OBLIQUE.affine, atol=1e-4)
    assert [stage["stage"] for stage in record["stages"]][-4:] == ["warp", "confidence", "write", "report"]
    assert all(stage["seconds"] >= 0 and stage["peak_mib"] > 0 for stage in record["stages"])
    assert {"python", "crossmorph", "torch", "SimpleITK"} <= set(record["versions"])


def test_every_key_of_the_record_is_documented(saved: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "record.md").read_text()
    record = record_of(saved)
    keys = [*record, *record["scores"], *record["inputs"]["fixed"], *record["stages"][0], *record["machine"]]
    missing = [key for key in keys if f"`{key}`" not in page]
    assert not missing


def test_images_from_memory_have_no_hash(found: Result) -> None:
    record = register(*pair(), settings=QUICK).record
    assert record["inputs"]["fixed"]["sha256"] is None
    assert record["inputs"]["fixed"]["file"] is None
    json.dumps(record, allow_nan=False)


# -- scores ------------------------------------------------------------------------------------------------------


def test_scores_mean_what_they_say(found: Result) -> None:
    scores = found.scores
    (nmi,) = scores["nmi"].values()
    assert 1 < nmi["before"] < nmi["after"] < 2
    assert scores["folded"] == 0
    low, high = scores["jacobian"]
    assert 0 < low < 1 < high < 4
    lengths = (found.displacement(places()) - places()).norm(dim=1)
    assert scores["displacement_mm"]["max"] > float(lengths.median())
    assert (
        scores["displacement_mm"]["median"] < scores["displacement_mm"]["p95"] < scores["displacement_mm"]["max"]
    )


def test_overlap_is_the_share_that_sees_moving_data() -> None:
    fixed, moving = pair()
    half = moving.restricted(torch.arange(40)[:, None, None].expand(GRID.shape) < 20)
    overlap = register(fixed, half, settings=QUICK).scores["overlap"]
    assert overlap == pytest.approx(0.5, abs=0.12)


@pytest.fixture
def few_score_voxels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(result, "SCORE_VOXELS", 4000)
    return


@pytest.mark.usefixtures("few_score_voxels")
def test_large_images_are_scored_on_a_coarser_grid() -> None:
    found = register(*pair(), settings=QUICK)
    assert found.verdict.status == "ok"
    assert found.scores["overlap"] > 0.7


@pytest.mark.usefixtures("few_score_voxels")
def test_a_mask_too_thin_for_the_coarser_grid_is_scored_all_the_same() -> None:
    line = torch.zeros(GRID.shape, dtype=torch.int32)
    line[:, 17, 15:17] = 1
    found = register(*pair(), settings=QUICK, fixed_mask=Labels(line, GRID))
    assert int(found.fixed.valid.sum()) == 80
    assert all(math.isfinite(value) for value in found.scores["jacobian"])
    json.dumps(found.record, allow_nan=False)


def test_scores_are_known_to_be_unknown_where_nothing_is_shared() -> None:
    """A constant corner is all that both see: mutual information has no value there."""
    fixed, moving = pair()
    values = torch.where(torch.arange(40)[:, None, None] < 20, 7.0, fixed.data)
    corner = replace(fixed, data=values)
    part = replace(moving, data=torch.where(torch.arange(40)[:, None, None] < 20, 3.0, moving.data))
    cut = Image(part.data[:, :18], replace(part.grid, shape=(18, 36, 32)), part.valid[:18], name="cut")
    cut = replace(cut, data=cut.data + (torch.arange(18)[:, None, None] < 1))
    found = register(corner, cut, settings=QUICK)
    json.dumps(found.record, allow_nan=False)
    assert found.verdict.status in ("check", "failed")
