"""What a report is made of: volumes in the right places, pictures, words, and nothing that names a patient."""

from __future__ import annotations

import base64
import gzip
import io as memory
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from scene import GRID, QUICK, WARP, inverted, pair, places, seen
from test_report_browser import evidence, record
from truth import reordered, signed_permutations

from crossmorph import io
from crossmorph.cli import main
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.registration import register
from crossmorph.report import boxes, colours, volumes, words
from crossmorph.report.evidence import Evidence, read_evidence
from crossmorph.report.page import render, write_report
from crossmorph.report.png import packed, picture, png, side_by_side
from crossmorph.report.stills import stills
from crossmorph.result import Result
from crossmorph.space import Grid
from crossmorph.transform import Affine, Chain, DisplacementField


@pytest.fixture(scope="module")
def page() -> str:
    return render(evidence())


@pytest.fixture(scope="module")
def found() -> Result:
    return register(*pair(), settings=QUICK)


def moved(transform: Any, fixed: Image | None = None, moving: Image | None = None) -> Evidence:
    links = (transform,) if isinstance(transform, Affine) else (transform, Affine.identity())
    chain = Chain(links)
    return Evidence(fixed or seen(), (moving or seen(),), chain, chain.inverse(), record())


def payload(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def unpacked(text: str, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    flat = np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype)
    return flat.reshape(shape, order="F")


# -- pictures ----------------------------------------------------------------------------------------------------


def test_png_is_read_by_another_program() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Pillow.open(memory.BytesIO(png(pixels)))), pixels)
    assert picture(pixels).startswith("data:image/png;base64,iVBOR")


def test_packed_volumes_run_along_the_first_axis() -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4) - 7
    np.testing.assert_array_equal(unpacked(packed(values), (2, 3, 4), np.dtype("<i2")), values)
    second = gzip.decompress(base64.b64decode(packed(values)))[2:4]
    assert second == int(values[1, 0, 0]).to_bytes(2, "little", signed=True)


def test_pictures_side_by_side_are_centred() -> None:
    joined = side_by_side([np.full((4, 2, 3), 9.0), np.full((2, 3, 3), 5.0)], gap=1)
    outer, inner = [9, 9, 0, 0, 0, 0], [9, 9, 0, 5, 5, 5]
    assert joined[..., 0].tolist() == [outer, inner, inner, outer]


def test_colour_tables_begin_and_end_with_their_stops() -> None:
    table = colours.table(("#000000", "#ff8000"), 3)
    assert table.tolist() == [[0, 0, 0], [128, 64, 0], [255, 128, 0]]
    brightness = colours.table(colours.LENGTH_STOPS) @ (0.21, 0.72, 0.07)
    assert (np.diff(brightness) > -0.6).all()  # readable without any colour
    assert brightness[-1] > brightness[0] + 150


# -- volumes -----------------------------------------------------------------------------------------------------


def test_a_right_transform_brings_the_moving_image_onto_the_fixed_one() -> None:
    shift = Affine.translation((8, -4, 2))
    shown = volumes.shown(moved(shift, moving=seen(Grid(GRID.shape, shift.matrix @ GRID.affine))))
    # the scene is not moved along, so that only the field of view is: compare where both see
    both = (shown.movings[0].after > 0) & (shown.fixed > 0)
    assert shown.grid.same_as(GRID)
    assert both.all()
    before = shown.movings[0].before
    assert (before[:4] == 0).all()  # 8 mm are four voxels that the moving image does not see
    assert (before[5:] > 0).any()
    np.testing.assert_array_less(np.abs(shown.fixed[5:, :-3, 2:].astype(int) - before[5:, :-3, 2:]), 3)


@pytest.mark.parametrize("order", signed_permutations()[3::11])
def test_the_order_of_storage_does_not_matter(order: tuple[tuple[int, int, int], tuple[bool, bool, bool]]) -> None:
    moving = seen(warp=WARP, contrast=inverted)
    plain = volumes.shown(moved(Affine.identity(), moving=moving))
    turned = volumes.shown(moved(Affine.identity(), reordered(seen(), order), reordered(moving, order)))
    for one, other in ((plain.fixed, turned.fixed), (plain.movings[0].after, turned.movings[0].after)):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_what_is_not_valid_is_zero_and_nothing_else_is() -> None:
    half = (torch.arange(40)[:, None, None] < 20).expand(GRID.shape)
    shown = volumes.shown(moved(Affine.identity(), seen().restricted(half), seen().restricted(~half)))
    np.testing.assert_array_equal(shown.fixed > 0, half.numpy())
    assert (shown.movings[0].after[:19] == 0).all()
    assert (shown.movings[0].after[21:] > 0).all()


@pytest.mark.parametrize(
    ("scale", "code"), [(1.0, 128), (2 ** (1 / 3), 254), (0.5 ** (1 / 3), 2), (3.0, 254), (-1.0, volumes.FOLDED)]
)
def test_jacobian_codes(scale: float, code: int) -> None:
    shown = volumes.shown(moved(Affine(np.diag([scale, *(abs(scale),) * 2, 1.0]))))
    assert np.unique(shown.jacobian).tolist() == [code]


def test_labels_are_numbered_in_the_order_of_their_ids() -> None:
    ids = torch.zeros(GRID.shape, dtype=torch.int32)
    ids[:10], ids[10:20], ids[20:30] = 300, 7, 5
    fixed, moving = Labels(ids, GRID), Labels(torch.where(ids == 5, 9, ids), GRID)
    shown = volumes.shown(replace(moved(Affine.identity()), labels=(fixed, moving)))
    assert shown.label_ids == (7, 300)
    assert shown.labels is not None
    assert [[int(map_[n, 5, 5]) for n in (5, 15, 25, 35)] for map_ in shown.labels] == [[2, 1, 0, 0]] * 3


def test_displacement_and_confidence_keep_their_unit(page: str) -> None:
    data = payload(page)
    steps = unpacked(data["displacement"], (*data["fieldShape"], 3), np.dtype("<i2")) * data["stepMm"]
    inner = steps[1:-1, 1:-1, 1:-1].reshape(-1, 3)
    np.testing.assert_allclose(inner, np.broadcast_to([0, 4, 0], inner.shape), atol=0.01)
    levels = unpacked(data["confidence"], tuple(data["fieldShape"]))
    assert (levels[levels > 0] - 1).max() / 254 * data["confidenceMaxMm"] == pytest.approx(1.5, abs=0.01)


def test_a_large_oblique_volume_is_shown_within_the_limits() -> None:
    matrix = np.eye(4)
    matrix[:3, :3] = Affine.rotation((20, 10, 30)).matrix[:3, :3] * 0.4
    grid = volumes.display_grid(Grid((512, 512, 300), matrix), volumes.MAX_VOXELS)
    assert np.prod(grid.shape) < 1.05 * volumes.MAX_VOXELS
    corners = Grid((512, 512, 300), matrix).corners()
    assert grid.contains(corners * 0.995 + corners.mean(0) * 0.005).all()


@pytest.mark.slow
def test_noise_of_three_modalities_stays_below_fifteen_megabytes() -> None:
    grid = Grid.from_spacing((160, 160, 160), 1.0)
    noise = Image.from_array(np.random.default_rng(0).random(grid.shape, np.float32), grid)
    field = torch.randn(3, *grid.shape)
    labels = Labels(torch.randint(0, 200, grid.shape, dtype=torch.int32), grid)
    points = Points(torch.randn(30_000, 3) * 50)
    chain = Chain((DisplacementField(field, grid), Affine.identity()))
    entry = record()["inputs"]["moving"][0]
    told = {**record(), "inputs": {"fixed": entry, "moving": [entry] * 3}, "box_overlap": [1.0] * 3}
    whole = Evidence(
        noise, (noise,) * 3, chain, Affine.identity(), told, noise, (labels, labels), (points, points)
    )
    assert len(render(whole).encode()) < 15e6


# -- words -------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_record_says(page: str) -> None:
    for text in ("moving image: mutual information 1.1", "Agreement at the start", "80 %", "1.00 mm"):
        assert text in page
    assert "begun at" in page
    assert "← chosen" in page
    assert "Registered from Python" in page


@pytest.mark.parametrize("status", ["ok", "check", "failed"])
def test_the_verdict_is_a_word_and_a_sign_not_only_a_colour(status: str) -> None:
    page = render(replace(evidence(), record=record(status)))
    assert re.search(
        rf'class="verdict {status}".*?{re.escape(words.SIGN[status])}</span> {status}<', page, re.DOTALL
    )
    assert words.MEANING[status] in page


def test_landmark_errors_and_overlaps_are_right() -> None:
    shift = Affine.translation((3, 0, 0))
    fixed = Points(places(20.0))
    moving = Points(fixed.xyz + torch.tensor([3.0, 0, 0]))
    moving.xyz[4] += torch.tensor([0, 4.0, 0])
    table = words.landmarks(replace(moved(shift), points=(fixed, moving)))
    assert table is not None
    before, after = table["summary"]
    assert before["median"] == pytest.approx(3)
    assert (after["median"], after["max"]) == pytest.approx((0, 4))
    assert (table["rows"][0]["number"], table["rows"][0]["after"]) == (5, pytest.approx(4))

    ids = torch.zeros(GRID.shape, dtype=torch.int32)
    ids[10:20] = 1
    pair_ = Labels(ids, GRID), Labels(ids.roll(5, 0), GRID)
    dice = words.overlaps(replace(moved(Affine.translation((10, 0, 0))), labels=pair_))
    assert dice == [{"id": 1, "before": 0.5, "after": 1.0}]


def test_landmarks_of_the_fit_are_told_by_number_with_what_leaving_them_out_shows() -> None:
    told = record()
    errors = {"before_mm": [9.0, 8.0], "linear_mm": [2.0, 1.5], "after_mm": [0.5, 0.25]}
    told["choices"] |= {"landmarks": {"tolerance_mm": 1.0, "names": ["Mustermann 1", "b"], **errors}}
    told["choices"] |= {"landmarks left out": {"b": 3.25}}
    fitted = words.fitted_landmarks(told)
    assert fitted is not None
    first, second = fitted["rows"]
    assert first == {"number": 1, "before": 9.0, "linear": 2.0, "after": 0.5}
    assert second == {"number": 2, "before": 8.0, "linear": 1.5, "after": 0.25, "left_out": 3.25}
    page = render(replace(evidence(), record=told))
    assert "Landmarks that took part" in page
    assert "3.25" in page
    assert "Mustermann" not in page


def test_several_moving_images_are_numbered() -> None:
    names = words.moving_names(2)
    entries = [{"name": "a"}, {"name": "b"}]
    told = {"inputs": {"moving": entries}}
    assert words.renamed("b: mutual information 1 -> 2", told) == f"{names[1]}: mutual information 1 -> 2"
    assert words.renamed("only 3 % is covered", told) == "only 3 % is covered"


def test_boxes_lie_where_the_images_do() -> None:
    """A moving box shifted by 20 mm to the right lies further left in the drawing by that much."""
    shift = Affine.translation((-20, 0, 0))
    axial = boxes.drawings(moved(shift))[0]
    lefts = [min(float(point.split(",")[0]) for point in polygon.split()) for polygon in axial["polygons"]]
    scale = (boxes.SIZE - 20) / 100  # 80 mm and 20 mm more
    assert lefts[0] == pytest.approx(lefts[1])
    assert lefts[0] - lefts[2] == pytest.approx(20 * scale, abs=0.2)
    assert (axial["left"], axial["top"]) == ("R", "A")


def test_stills_show_what_there_is() -> None:
    assert len(stills(volumes.shown(evidence()))) == 6
    assert len(stills(volumes.shown(moved(Affine.identity())))) == 3


# -- from a folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def patient(tmp_path: Path, found: Result) -> Path:
    """A folder of a patient, with his name in every place where one can hide, and a result in it."""
    home = tmp_path / "MUSTERMANN^E"
    home.mkdir()
    for name, image in zip(("MUSTERMANN_ct", "MUSTERMANN_mr"), pair(), strict=True):
        volume = nibabel.Nifti1Image(image.data[0].numpy(), image.grid.affine)
        volume.header["descrip"], volume.header["aux_file"] = b"MUSTERMANN^E", b"MUSTERMANN^E"
        volume.header["intent_name"], volume.header["db_name"] = b"MUSTERMANN^E", b"MUSTERMANN^E"
        nibabel.save(volume, home / f"{name}.nii.gz")
    settings = home / "MUSTERMANN.toml"
    settings.write_text(
        'levels = [4]\nhalf_width = 3\n[linear]\nmodel = "none"\n[[refine]]\ncontrol = 2\niterations = 5\n'
    )
    files = [str(home / f"MUSTERMANN_{name}.nii.gz") for name in ("ct", "mr")]
    mask = str(home / "MUSTERMANN_mask.nii.gz")
    io.write(Image(torch.ones(1, *GRID.shape), GRID, torch.ones(GRID.shape, dtype=torch.bool)), mask)
    options = ["--settings", str(settings), "--fixed-mask", mask, "--device", "cpu", "--quiet"]
    assert main(["register", *files, "-o", str(home / "MUSTERMANN_out"), *options]) in (0, 3)
    return home


def test_the_page_names_no_patient_and_no_path(patient: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = patient / "MUSTERMANN_out"
    pages = [(out / "report.html").read_text()]
    assert main(["report", str(out)]) == 0
    pages.append((out / "report.html").read_text())
    for page in pages:
        assert "MUSTERMANN" not in page.upper()  # long enough not to turn up by chance in packed volumes
        assert str(patient.parent) not in page
        assert (
            "register FIXED MOVING --output OUTPUT --settings SETTINGS --fixed-mask FIXED_MASK --device cpu"
            in page
        )
    files = json.loads((out / "record.json").read_text())["choices"]["command"]["files"]
    assert files["FIXED"] == str(patient / "MUSTERMANN_ct.nii.gz")
    assert files["FIXED_MASK"] == str(patient / "MUSTERMANN_mask.nii.gz")
    first, second = map(payload, pages)
    for key in ("fixed", "movings", "jacobian", "center", "linear", "displacement"):
        assert first[key] == second[key], key


def test_a_changed_or_missing_input_is_refused(patient: Path) -> None:
    out, moving = patient / "MUSTERMANN_out", patient / "MUSTERMANN_mr.nii.gz"
    elsewhere = moving.rename(patient / "moved.nii.gz")
    with pytest.raises(InputError, match="not there any more; say where it is now with --fixed and --moving"):
        read_evidence(out)
    assert read_evidence(out, movings=(elsewhere,)).movings[0].grid.same_as(GRID)
    io.write(seen(), moving)
    with pytest.raises(InputError, match=r"is not the file that .* was made from"):
        read_evidence(out)
    with pytest.raises(InputError, match="1 moving images, but 2 were given"):
        read_evidence(out, movings=(elsewhere, elsewhere))
    with pytest.raises(InputError, match="no folder of a result"):
        read_evidence(patient)


def test_a_result_in_memory_and_its_folder_show_the_same(found: Result, tmp_path: Path) -> None:
    out = found.save(tmp_path / "out")
    with pytest.raises(InputError, match="came from memory"):
        read_evidence(out)
    files = []
    for name, image in zip(("fixed", "moving"), pair(), strict=True):
        io.write(image, tmp_path / f"{name}.nii.gz")
        files.append(tmp_path / f"{name}.nii.gz")
    again = payload(render(read_evidence(out, files[0], (files[1],))))
    here = payload((out / "report.html").read_text())
    for key in ("fixed", "movings", "jacobian", "displacement"):
        assert again[key] == here[key], key
    assert again["confidenceMaxMm"] == pytest.approx(here["confidenceMaxMm"], abs=0.011)


def test_labels_and_landmarks_are_added_by_the_command(patient: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.zeros(GRID.shape, dtype=torch.int32)
    ids[10:20] = 4
    io.write(Labels(ids, GRID), patient / "labels.nii.gz")
    io.write(Points(places(10.0)), patient / "points.csv")
    labels, points = (str(patient / name) for name in ("labels.nii.gz", "points.csv"))
    out = str(patient / "MUSTERMANN_out")
    assert main(["report", out, "--labels", labels, labels, "--landmarks", points, points]) == 0
    page = (patient / "MUSTERMANN_out" / "report.html").read_text()
    assert "Dice overlap of each label" in page
    assert f"{len(places(10.0))} pairs, error in mm" in page
    capsys.readouterr()
    assert main(["report", out, out, "--labels", labels, labels]) == 2
    assert "belong to one result" in capsys.readouterr().err


# -- notebooks ---------------------------------------------------------------------------------------------------


def test_images_and_results_show_themselves(found: Result) -> None:
    image = replace(seen(name="a <b>"), notes=("a note",))
    html = image._repr_html_()
    assert html.count("data:image/png;base64,") == 1
    assert "40 x 36 x 32" in html
    assert "a note" in html
    assert "a &lt;b&gt;" in html
    assert "<b>" not in html
    html = found._repr_html_()
    assert html.count("data:image/png;base64,") == 1
    assert found.verdict.status in html
    assert "Displacement" in html


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        write_report(evidence(), tmp_path / "missing" / "report.html")
