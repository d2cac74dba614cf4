"""What the pages promise must be there."""

import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from crossmorph.evaluate import evaluate
from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.transform import Affine

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_drawings_are_pictures() -> None:
    drawings = sorted(ROOT.glob("docs/drawings/*.svg"))
    assert drawings
    for drawing in drawings:
        assert ElementTree.parse(drawing).getroot().tag.endswith("svg")


def test_readme_names_only_commands_that_exist() -> None:
    fenced = "".join(re.findall(r"^```.*?^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    named = set(re.findall(r"^crossmorph ([a-z0-9]+)", fenced, re.MULTILINE))
    assert named
    for command in named:
        assert (ROOT / "src" / "crossmorph" / "commands" / f"{command}.py").is_file()


def test_pins_cover_what_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(line for group in project["optional-dependencies"].values() for line in group),
    ]
    names = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in asked} - {"crossmorph"}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.]+", pin) for pin in pins)  # exact, and no local build
    assert names <= {pin.split("==")[0] for pin in pins}


def test_metrics_page_explains_every_score() -> None:
    everything = ("points", "fixed_labels", "moving_labels", "fixed", "moving", "thresholds_mm")
    labels = Labels.from_array(np.pad(np.ones((4, 4, 4), np.int32), 3), np.eye(4))
    image = Image.from_array(np.random.default_rng(0).normal(size=(10, 10, 10)).astype(np.float32), np.eye(4))
    points = Points(torch.full((2, 3), 4.0))
    given = dict(zip(everything, ((points, points), labels, labels, image, image, (2.0,)), strict=True))
    page = (ROOT / "docs" / "metrics.md").read_text()
    counts = {
        "points",
        "labels",
        "dice_before",
        "tre_p25_mm",
        "tre_p75_mm",
    }  # explained as a group or by their name
    missing = [name for name in evaluate(Affine.identity(), **given).scores if f"`{name}`" not in page]
    assert set(missing) <= counts
