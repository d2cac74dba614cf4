"""Several pairs of images in one objective: what one cannot tell the other does, on grids of their own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scene import GRID, QUICK, WARP, bright, errors, inverted, pair, places, seen, tissue
from truth import Warp, tilted_grid, volume

import crossmorph as cm
from crossmorph import io
from crossmorph.cli import main
from crossmorph.commands.register import parsed_channel
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.match.convex import Matched, coupled_convex, coupled_convex_of_sum
from crossmorph.registration import register
from crossmorph.space import Grid

LEFT, RIGHT = places()[:, 0] < -6, places()[:, 0] > 6
OTHER = tilted_grid((34, 40, 28), (2.4, 2.0, 3.0), center=(1, -2, 3))
FINE = Grid.from_spacing((60, 54, 48), 4 / 3)
GRIDS = {"one grid": ((GRID, GRID), (GRID, GRID)), "own grids": ((GRID, OTHER), (OTHER, FINE))}


def half(side: float, grid: Grid, warp: Warp | None, name: str) -> Image:
    """The scene with its tissue in the left (-1) or the right (1) half of the body only."""

    def values(points: torch.Tensor) -> torch.Tensor:
        at = points if warp is None else warp.inverse(points)
        return (100 * tissue(at) * torch.sigmoid(side * at[..., 0] / 1.5))[None]

    return volume(grid, values, name=name)


def halves(left: tuple[Grid, Grid], right: tuple[Grid, Grid]) -> list[cm.Channel]:
    """A channel of each half, on grids for its fixed and its moving image."""
    return [
        cm.Channel(half(side, grids[0], None, f"fixed_{name}"), half(side, grids[1], WARP, f"moving_{name}"))
        for side, grids, name in ((-1, left, "left"), (1, right, "right"))
    ]


def far() -> Image:
    """Another body half a metre away."""
    fixed = seen()
    matrix = fixed.grid.affine.copy()
    matrix[0, 3] += 500
    return replace(fixed, grid=Grid(fixed.grid.shape, matrix), name="far")


def found(channels: list[cm.Channel], **keywords: object) -> torch.Tensor:
    """(N,) mm off the truth at ``places``."""
    first, *others = channels
    result = register(first.fixed, first.moving, channels=others, settings=QUICK, **keywords)  # type: ignore[arg-type]
    return errors(result.transform)


@pytest.mark.parametrize(("left", "right"), GRIDS.values(), ids=GRIDS)
def test_each_channel_tells_what_the_other_cannot(left: tuple[Grid, Grid], right: tuple[Grid, Grid]) -> None:
    channels = halves(left, right)
    for side, own, other in zip(channels, (LEFT, RIGHT), (RIGHT, LEFT), strict=True):
        alone = found([side])
        assert float(alone[own].mean()) < 2.0
        assert float(alone[other].mean()) > 2.5
    both = found(channels)
    assert float(both[LEFT].mean()) < 2.0
    assert float(both[RIGHT].mean()) < 2.0


def test_a_channel_that_hardly_weighs_changes_hardly_anything() -> None:
    fixed, moving = pair()
    misleading = cm.Channel(seen(name="other"), seen(contrast=bright, name="still"), weight=1e-6)
    alone = register(fixed, moving, settings=QUICK)
    both = register(fixed, moving, channels=[misleading], settings=QUICK)
    assert float((alone.transform(places()) - both.transform(places())).norm(dim=1).max()) < 0.02


def test_the_same_channel_twice_is_the_same_as_once() -> None:
    fixed, moving = pair()
    once = register(fixed, moving, settings=QUICK)
    twice = register(fixed, moving, channels=[cm.Channel(fixed, moving, 3.0)], settings=QUICK)
    assert float((once.transform(places()) - twice.transform(places())).norm(dim=1).max()) < 0.02


def test_the_heavier_of_two_channels_that_disagree_wins() -> None:
    """One shows a motion, the other none."""
    fixed, moving = pair(bright)
    still = seen(name="still")
    for weight, nearer in ((0.1, True), (10.0, False)):
        result = register(fixed, moving, channels=[cm.Channel(seen(name="other"), still, weight)], settings=QUICK)
        error = float(errors(result.transform).mean())
        motion = float((result.transform(places()) - places()).norm(dim=1).mean())
        assert (error < motion) is nearer


def test_costs_of_pairs_are_added() -> None:
    """Two pairs at half the cost each are the pair; descriptors of two pairs at once are their sum."""
    generator = torch.Generator().manual_seed(0)
    first, second, third, fourth = torch.rand(4, 3, 9, 8, 7, generator=generator)
    valid = tuple(torch.rand(2, 9, 8, 7, generator=generator) > 0.1)
    one = coupled_convex(first, second, 2, valid)
    part = Matched(first * 0.5**0.5, second * 0.5**0.5, valid)
    torch.testing.assert_close(coupled_convex_of_sum([part, part], 2), one)
    everywhere = torch.ones(2, 9, 8, 7, dtype=torch.bool)
    joined = coupled_convex(
        torch.cat((first, third)), torch.cat((second, fourth)), 2, tuple(everywhere), unknown=3.0
    )
    parts = [Matched(first, second, tuple(everywhere), 1.0), Matched(third, fourth, tuple(everywhere), 2.0)]
    torch.testing.assert_close(coupled_convex_of_sum(parts, 2), joined)
    torch.testing.assert_close(coupled_convex_of_sum(parts, 2, memory_bytes=0), joined)


def test_the_record_and_the_scores_know_every_pair() -> None:
    fixed, moving = pair()
    noise = replace(seen(OTHER, name="fixed"), data=torch.rand(1, *OTHER.shape, generator=torch.manual_seed(0)))
    channel = cm.Channel(noise, moving, 0.001, (cm.Descriptor("macmind"),))
    result = register(fixed, moving, channels=[channel], settings=QUICK)
    names = ["1_moving", "2_moving"]
    assert [image.name for image in result.movings] == names
    for score in ("nmi", "confirmed", "mirrored_cost_ratio"):
        assert list(result.scores[score]) == names
    first, second = (result.scores["nmi"][name]["after"] for name in names)
    assert second < 1.05 < 1.2 < first  # each is compared with its own fixed image, and the second one shows noise
    (entry,) = result.record["inputs"]["channels"]
    assert entry["moving"] == "2_moving"
    assert entry["fixed"]["shape"] == list(OTHER.shape)
    assert (entry["weight"], entry["describe"][0]["name"]) == (0.001, "macmind")
    assert result.confidence.grid.same_as(fixed.grid)
    json.dumps(result.record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0.0}, "weight of 2_fixed and 2_moving must be above 0"),
        ({"weight": float("nan")}, "must be above 0 and finite, not nan"),
        ({"describe": (cm.Descriptor("mind", weight=-1.0),)}, "weight must be above 0"),
        ({"fixed": far()}, "far lies 4.. mm away from fixed"),
    ],
)
def test_what_makes_no_channel(change: dict[str, object], message: str) -> None:
    fixed, moving = pair()
    channel = replace(cm.Channel(seen(name="fixed"), moving), **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        register(fixed, moving, channels=[channel], settings=QUICK)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("channels")
    fixed, moving = pair()
    io.write(fixed, path / "t1.nii.gz")
    io.write(moving, path / "t2.nii.gz")
    io.write(seen(OTHER, contrast=inverted), path / "flair.nii.gz")
    return path


def test_channels_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: str(folder / f"{name}.nii.gz") for name in ("t1", "t2", "flair")}
    out, settings = folder / "out", folder / "quick.toml"
    settings.write_text("levels = [4]\n[linear]\nmodel = 'none'\n[[refine]]\niterations = 4\n")
    words = ["register", files["t1"], files["t2"], "-o", str(out), "--settings", str(settings)]
    words += ["--channel", files["flair"], files["t2"], "0.5", "macmind", "--channel", files["flair"], files["t2"]]
    assert main(words) in (0, 3)
    record = json.loads((out / "record.json").read_text())
    assert [entry["weight"] for entry in record["inputs"]["channels"]] == [0.5, 1.0]
    command = record["choices"]["command"]
    assert "--channel CHANNEL_1_FIXED CHANNEL_1_MOVING 0.5 macmind --channel CHANNEL_2_FIXED" in command["line"]
    assert command["files"]["CHANNEL_1_FIXED"] == files["flair"]
    page = (out / "report.html").read_text()
    assert "weight 0.5" in page
    assert "flair" not in page
    assert main(["report", str(out)]) == 0
    capsys.readouterr()


def test_words_of_a_channel(folder: Path) -> None:
    files = str(folder / "t1.nii.gz"), str(folder / "t2.nii.gz")
    assert parsed_channel(files).weight == 1.0
    both = [parsed_channel((*files, *rest)) for rest in (("0.3", "disa"), ("disa", "0.3"))]
    assert all((c.weight, c.describe) == (0.3, (cm.Descriptor("disa"),)) for c in both)
    with pytest.raises(InputError, match="'best' is neither a number nor one of mind, msssc, macmind, disa"):
        parsed_channel((*files, "best"))
    with pytest.raises(InputError, match="--channel takes FIXED MOVING"):
        parsed_channel(files[:1])
