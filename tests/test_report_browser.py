"""The page of a registration in a real browser: it works, it is linked, it fetches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Page, chromium
from scene import GRID, WARP, inverted, places, seen

from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.report.evidence import Evidence
from crossmorph.report.page import write_report
from crossmorph.transform import Affine, Chain, DisplacementField

SHIFT = Affine.translation((6, 0, 0))

HELPERS = """
const $ = id => document.getElementById(id);
const until = test => new Promise(done => {
  const look = () => test() ? done(true) : setTimeout(look, 20);
  look();
});
const frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))));
const put = (id, value, event) => { $(id).value = value; $(id).dispatchEvent(new Event(event)); };
const box = id => (b => [b.left, b.top, b.width, b.height])($(id).getBoundingClientRect());
const told = () => Object.fromEntries([...document.querySelectorAll("#readout div")].map(
  row => [row.children[0].textContent, row.children[1].textContent]));
const drawn = () => ["axial", "coronal", "sagittal"].map(id => $(id).toDataURL());
const pixel = (id, x, y) => {
  const one = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  one.drawImage($(id), -Math.round(x * $(id).width), -Math.round(y * $(id).height));
  return one.getImageData(0, 0, 1, 1).data[0];
};
const pressed = () => $("flicker").getAttribute("aria-pressed") === "true";
const before = () => document.querySelector("input[value=before]").checked;
const inputs = "#viewer input, #viewer select, #viewer button, #viewer canvas[role]";
const controls = () => [...document.querySelectorAll(inputs)].map(e => [
  e.id || e.value, e.tabIndex, e.labels?.[0]?.textContent || e.getAttribute("aria-label") || e.textContent]);
true
"""


def record(status: str = "ok") -> dict[str, Any]:
    """A made-up one, as full as a real one."""
    same = np.eye(4).tolist()
    spread = {"median": 1.0, "p95": 2.0, "max": 3.0}
    numbers = {"cost": 0.5, "agreement": 0.8, "information": 1.1, "overlap": 0.9}
    kept = {"from": "header", "kept": True, "judge": "mutual information", "before": 1.1, "after": 1.2}
    entry = {"name": "a", "sha256": None, "shape": [40, 36, 32], "affine": GRID.affine.tolist(), "axes": "RAS"}
    lengths = dict.fromkeys(("inverse_residual_mm", "displacement_mm", "moved_mm"), spread)
    ratios = {"overlap": 0.9, "folded": 0.0, "jacobian": [0.5, 1.5], "agreement": 0.8}
    looks = {"confirmed": {"a": 0.9}, "mirrored_cost_ratio": {"a": 1.3}, "worst_place_mm": [1.0, 2.0, 3.0]}
    return {
        "verdict": {"status": status, "reasons": ["a: mutual information 1.1 -> 1.2"]},
        "scores": {"nmi": {"a": {"before": 1.1, "after": 1.2}}, **looks, **ratios, **lengths},
        "choices": {"starts": [{"start": "header", **numbers, "matrix": same}], "start": kept},
        "settings": {"system": "mcbo"},
        "seed": 0,
        "device": "cpu",
        "inputs": {"fixed": {**entry, "notes": []}, "moving": [{**entry, "notes": ["a note"]}]},
        "box_overlap": [1.0],
        "initial": same,
        "linear": SHIFT.matrix.tolist(),
        "stages": [{"stage": "start", "seconds": 1.5, "peak_mib": 100}],
        "versions": {"python": "3"},
        "machine": {"cpus": 2, "threads": 1},
    }


def evidence() -> Evidence:
    """The scene, moved by a displacement of a constant 4 mm to the front and then by 6 mm to the right."""
    field = torch.zeros(3, *GRID.shape)
    field[1] = 4.0
    transform = Chain((DisplacementField(field, GRID), SHIFT))
    halves = (torch.arange(40)[:, None, None].expand(GRID.shape) >= 20).int() + 1
    labels = Labels(halves, GRID)
    confidence = Image(torch.full((1, *GRID.shape), 1.5), GRID, torch.ones(GRID.shape, dtype=torch.bool))
    fixed = Points(places(20.0), space="fixed")
    points = fixed, Points(transform(fixed.xyz), space="moving")
    moving = seen(warp=WARP, contrast=inverted)
    return Evidence(
        seen(), (moving,), transform, transform.inverse(), record(), confidence, (labels, labels), points
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(evidence(), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def browser(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        page.open(path)
        page.evaluate(HELPERS)
        page.evaluate("until(() => document.querySelector('#readout dd'))")
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """The page, back where it started, without a complaint before and after."""
    browser.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
    yield browser
    assert browser.complaints() == []


def told(page: Page, name: str) -> str:
    page.evaluate("frame()")
    text: str = page.evaluate("told()")[name]
    return text


def numbers(text: str) -> list[float]:
    """Those after the letters R, A and S."""
    words = text.split()
    return [float(words[words.index(axis) + 1]) for axis in "RAS"]


def drawn(page: Page) -> list[str]:
    """What the three planes show, as text that differs where a pixel does."""
    page.evaluate("frame()")
    found: list[str] = page.evaluate("drawn()")
    return found


def click_at(page: Page, plane: str, across: float, up: float) -> None:
    """At shares 0 to 1 of the width, from the left, and of the height, from the top."""
    left, top, width, height = page.evaluate(f"box('{plane}')")
    page.click(left + across * width, top + up * height)


def choose(page: Page, select: str, value: str) -> None:
    page.evaluate(f"put('{select}', '{value}', 'change')")


def test_nothing_is_fetched_and_nothing_complained_about(browser: Page, path: Path) -> None:
    asked = [address for address in browser.requests() if not address.startswith("data:")]
    assert asked == [path.as_uri()]
    assert browser.complaints() == []
    assert browser.evaluate("$('viewer').hidden") is False
    assert browser.evaluate("$('trouble').hidden") is True


def test_a_click_moves_the_crosshair_of_the_other_planes(page: Page) -> None:
    """A quarter from the left is the patient's right, a quarter from the top the front."""
    before = drawn(page)
    click_at(page, "axial", 0.25, 0.25)
    assert numbers(told(page, "fixed, mm"))[:2] == pytest.approx([20, 18], abs=1.1)
    after = drawn(page)
    assert all(a != b for a, b in zip(before, after, strict=True))
    level = numbers(told(page, "fixed, mm"))[2]
    click_at(page, "coronal", 0.75, 0.25)
    assert numbers(told(page, "fixed, mm")) == pytest.approx([-20, 18, 16], abs=1.1)
    assert level != pytest.approx(16, abs=1.1)
    assert "S 1" in page.evaluate("$('axial').getAttribute('aria-label')")


def test_the_places_of_a_point_in_both_images_are_told(page: Page) -> None:
    click_at(page, "axial", 0.5, 0.5)
    here, there = numbers(told(page, "fixed, mm")), numbers(told(page, "moving, mm"))
    assert np.subtract(there, here).tolist() == pytest.approx([6, 4, 0], abs=0.11)
    assert numbers(told(page, "displacement, mm")) == pytest.approx([0, 4, 0], abs=0.06)
    assert told(page, "displacement, mm").endswith("(4.0)")
    assert told(page, "Jacobian") == "1.00"
    assert float(told(page, "expected error, mm")) == pytest.approx(1.5, abs=0.01)


def test_keys_walk_through_the_planes(page: Page) -> None:
    click_at(page, "axial", 0.5, 0.5)
    x, y, z = numbers(told(page, "fixed, mm"))
    for name, change in (("ArrowLeft", (2, 0, 0)), ("ArrowUp", (0, 2, 0)), ("PageUp", (0, 0, 2))):
        page.key(name)
        moved = numbers(told(page, "fixed, mm"))
        assert np.subtract(moved, (x, y, z)).tolist() == pytest.approx(change, abs=0.11), name
        x, y, z = moved


def test_the_slider_blends_from_fixed_to_moving(page: Page) -> None:
    page.evaluate("$('blend').focus()")
    pictures = set()
    for _ in range(3):
        pictures.add(drawn(page)[0])
        page.key("ArrowRight")
    assert page.evaluate("$('blend').value") == "53"
    assert len(pictures) == 3
    click_at(page, "axial", 0.3, 0.3)  # so that the middle pixel is not under the crosshair
    values = []
    for share in (0, 100):
        page.evaluate(f"put('blend', {share}, 'input')")
        page.evaluate("frame()")
        values.append(page.evaluate("pixel('axial', 0.55, 0.55)"))
    assert abs(values[0] - values[1]) > 20


def test_before_and_after_differ_and_flicker_alternates(page: Page) -> None:
    choose(page, "mode", "colours")
    after = drawn(page)
    page.key("b", "b")
    assert drawn(page) != after
    page.key("b", "b")
    assert drawn(page) == after
    page.evaluate("$('flicker').click()")
    page.evaluate("until(before)")
    assert page.evaluate("pressed()")
    page.key("f", "f")
    assert not page.evaluate("pressed() || before()")
    assert drawn(page) == after
    choose(page, "mode", "blend")


@pytest.mark.parametrize("mode", ["colours", "checkerboard"])
def test_every_way_to_show_both_looks_different(page: Page, mode: str) -> None:
    plain = drawn(page)
    choose(page, "mode", mode)
    assert all(a != b for a, b in zip(drawn(page), plain, strict=True))
    choose(page, "mode", "blend")
    assert drawn(page) == plain


@pytest.mark.parametrize("overlay", ["jacobian", "displacement", "confidence"])
def test_overlays_are_drawn_with_a_scale(page: Page, overlay: str) -> None:
    plain = drawn(page)
    choose(page, "overlay", overlay)
    assert all(a != b for a, b in zip(drawn(page), plain, strict=True))
    assert page.evaluate("$('legend').hidden") is False
    choose(page, "overlay", "none")
    assert drawn(page) == plain


@pytest.mark.parametrize("what", ["lines", "contours", "marks"])
def test_grid_contours_and_landmarks_are_drawn(page: Page, what: str) -> None:
    plain = drawn(page)
    page.evaluate(f"$('{what}').click()")
    assert drawn(page) != plain
    page.evaluate(f"$('{what}').click()")
    assert drawn(page) == plain


def test_every_control_can_be_reached_with_the_keyboard_and_has_a_name(page: Page) -> None:
    controls = page.evaluate("controls()")
    assert len(controls) >= 12
    assert all(index >= 0 and name.strip() for _, index, name in controls), controls


def test_without_scripts_still_pictures_remain(path: Path, tmp_path: Path) -> None:
    with chromium(tmp_path) as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.open(path)
        assert page.evaluate("document.querySelector('#viewer').hidden") is True
        assert page.evaluate("document.querySelector('#stills').open") is True
        widths = page.evaluate(
            "[...document.querySelectorAll('#stills img')].map(e => e.complete && e.naturalWidth * e.offsetWidth)"
        )
        assert len(widths) >= 5
        assert all(widths)
        assert page.complaints() == []
