"""What the pages promise must be there."""

import ast
import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import crossmorph
from crossmorph import cli
from crossmorph.evaluate import evaluate
from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.transform import Affine

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
TUTORIALS = sorted(ROOT.glob("docs/tutorials/*.md"))
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page: Path) -> list[tuple[str, str]]:
    """(path or nothing, anchor or nothing) of every link that stays in the repository."""
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", FENCED.sub("", page.read_text()))
    return [(path, anchor) for path, anchor in links if "://" not in path]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links_of(page):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    """The lists of docs/index.md become the site's navigation (docs/conf.py)."""
    index = ROOT / "docs" / "index.md"
    listed = [
        (index.parent / path).resolve() for path in re.findall(r"^- \[.*?\]\((.*?)\)", index.read_text(), re.M)
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == {*PAGES} - {index}


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_parse_and_can_fail(page: Path) -> None:
    """`make docs` runs them; here, that their cells are Python and measure against something."""
    text = page.read_text()
    assert text.startswith("---\nfile_format: mystnb\n")
    cells = re.findall(r"^```\{code-cell\} python\n((?::[^\n]*\n)*)(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(cells) == text.count("{code-cell}")
    trees = [ast.parse(code) for _, code in cells]
    assert any(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))
    assert "## Next" in text


def test_every_public_name_is_on_the_python_page() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    shown = set(re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)$", page, re.MULTILINE))
    assert shown == set(crossmorph.__all__)


def test_every_command_is_on_its_page() -> None:
    named = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    commands = {path.stem for path in (ROOT / "src/crossmorph/commands").glob("[a-z]*.py")}
    assert set(re.findall(r"`(\w+)`", " ".join(named))) == commands


def test_every_preset_is_on_its_page() -> None:
    linked = {path for path, _ in links_of(ROOT / "docs" / "settings.md") if path.endswith(".toml")}
    presets = (ROOT / "src/crossmorph/presets").glob("*/*.toml")
    assert linked == {f"../{path.relative_to(ROOT)}" for path in presets}


def test_drawings_are_pictures() -> None:
    drawings = sorted(ROOT.glob("docs/drawings/*.svg"))
    assert drawings
    for drawing in drawings:
        assert ElementTree.parse(drawing).getroot().tag.endswith("svg")


def options_of(kind: type) -> set[str]:
    """Of a command, those of its subcommands included."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        found.add(name.replace("_", "-"))
        for inner in typing.get_args(hint):
            found |= options_of(inner) if dataclasses.is_dataclass(inner) else set()
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_only_commands_and_options_that_exist(page: Path) -> None:
    choices = [typing.get_args(choice)[:2] for choice in typing.get_args(cli.Command)]
    commands = {told.name: kind for kind, told in choices}
    text = page.read_text().replace("\\\n", " ")
    code = [*FENCED.findall(text), *re.findall(r"^ {4}.*", text, re.MULTILINE), *re.findall(r"`[^`\n]+`", text)]
    for command, words in re.findall(r"^[ `]*crossmorph ([a-z0-9]+)([^`\n#]*)", "\n".join(code), re.MULTILINE):
        assert command in commands, f"crossmorph {command}{words}"
        options = {
            word.removeprefix("no-") for word in re.findall(r" --([a-z][a-z-]*)", re.sub('"[^"]*"', "", words))
        }
        assert options <= options_of(commands[command]) | {"help"}, f"crossmorph {command}{words}"


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
