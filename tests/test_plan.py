"""The plan says beforehand what a run takes, and a run keeps to its limit."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import typing
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from scene import GRID, NONE, QUICK, pair

import crossmorph as cm
from crossmorph import io, plan, registration, speed
from crossmorph.channels import Channel
from crossmorph.cli import main
from crossmorph.commands.register import parsed_gib
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.phantom import make_pair
from crossmorph.plan import SAFE, fitted, out_of_memory, smaller, stage_bytes, unlimited
from crossmorph.registration import register
from crossmorph.settings import Descriptor, DescriptorName, Mcbo, Refinement
from crossmorph.space import Grid
from crossmorph.speed import Rates, stage_seconds
from crossmorph.systems.blocks import Economy
from crossmorph.systems.mcbo import Volume, _described

PUBLISHED = cm.load_settings("mcbo", "remind2reg")
DEFAULT = replace(cm.load_settings(), linear=NONE)


def blank(*shape: int, spacing_mm: float = 1.0, channels: int = 1) -> Image:
    """An image of a size, whose voxels all share one number in memory."""
    data = torch.zeros(1).expand(channels, *shape)
    return Image(data, Grid.from_spacing(shape, spacing_mm), torch.ones(1, dtype=torch.bool).expand(*shape))


def of(fixed: Image, *movings: Image) -> list[Channel]:
    """Moving images that share a fixed one."""
    return [Channel(fixed, moving) for moving in movings]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of this file do not depend on what the process of the tests has loaded, or the machine has free."""
    monkeypatch.setattr(plan, "resident_bytes", lambda: 0.0)
    monkeypatch.setattr(plan, "available_bytes", lambda: math.inf)


# -- the model ---------------------------------------------------------------------------------------------------


def test_memory_grows_with_voxels_as_the_arrays_do() -> None:
    """Bytes a voxel: 10 of both images as read, 6 drawn, 48 / 2^3 of a base, 6 of masks, kept levels."""
    sizes = [of(blank(n, n, n), blank(n, n, n)) for n in (96, 192)]
    small, large = (stage_bytes(pairs, cm.load_settings("mcbo", "convexadam"), Economy()) for pairs in sizes)
    a_voxel = (large["descriptors"] - small["descriptors"]) / (192**3 - 96**3)
    assert a_voxel == pytest.approx(10 + 6 + 48 / 8 + 6 + 2 * 48 * (1 / 2**3 + 1 / 6**3), rel=0.01)


def test_each_moving_image_and_each_level_is_counted() -> None:
    one = blank(64, 64, 64)
    single = stage_bytes(of(one, one), DEFAULT, Economy())
    double = stage_bytes(of(one, one, one), DEFAULT, Economy())
    assert all(double[name] > single[name] for name in single)
    full = stage_bytes(of(one, one), replace(DEFAULT, levels=(6, 1)), Economy())
    assert full["search level 1"] - single["search level 6"] > (2 * 48 + 4 * 729) * 96**3
    halved = stage_bytes(of(one, one), replace(DEFAULT, levels=(6, 1)), Economy(half=True))
    assert full["refine 1"] - halved["refine 1"] == pytest.approx(2 * 24 * 96**3, rel=0.01)  # 1.5 times finer


def test_a_channel_is_counted_with_its_own_fixed_image_and_descriptors() -> None:
    one, other = blank(64, 64, 64), blank(64, 64, 64)
    wide = (Descriptor("macmind"),)
    plans = [
        of(one, one, one),
        [*of(one, one), Channel(other, one)],
        [*of(one, one), Channel(other, one, 1.0, wide)],
    ]
    shared, own, described = (stage_bytes(pairs, DEFAULT, Economy()) for pairs in plans)
    blocks = 96**3 * (1 / 2**3 + 1 / 4**3 + 1 / 6**3)  # cells of all levels; 1.5 times finer than the images
    assert own["refine 1"] - shared["refine 1"] == pytest.approx(5 * 64**3 + 10 * 96**3 + 48 * blocks, rel=0.01)
    assert described["descriptors"] - own["descriptors"] > 2 * 4 * (288 - 12) * blocks


def test_without_the_deformable_stage_only_images_are_held() -> None:
    pairs = of(blank(64, 64, 64), blank(64, 64, 64))
    assert set(stage_bytes(pairs, DEFAULT, Economy(), deformable=False)) == {"read", "judge", "write"}
    assert "linear" in stage_bytes(pairs, cm.load_settings(), Economy())


# -- a limit -----------------------------------------------------------------------------------------------------


def test_a_limit_changes_no_more_than_it_must() -> None:
    pairs = of(blank(160, 160, 160), blank(160, 160, 160))
    free = unlimited(pairs, PUBLISHED)
    assert fitted(pairs, replace(PUBLISHED, memory_gib=32.0)).changes == ()
    cut = fitted(pairs, PUBLISHED, limit_bytes=0.7 * free.peak_bytes)
    assert cut.peak_bytes <= 0.7 * SAFE * free.peak_bytes
    assert [change.split(" in ")[0] for change in cut.changes] == ["cost volumes"]
    least = next(
        share for share in np.arange(0.6, 0.1, -0.02)
        if len(fitted(pairs, PUBLISHED, limit_bytes=share * free.peak_bytes).changes) > 1
    )  # fmt: skip
    halved = fitted(pairs, PUBLISHED, limit_bytes=least * free.peak_bytes)
    assert halved.economy.half
    assert halved.settings == PUBLISHED


def test_the_working_spacing_is_widened_last() -> None:
    pairs = of(blank(200, 200, 200), blank(200, 200, 200))
    fine = replace(DEFAULT, levels=(6, 1), refine=(Refinement(level=1),))
    free = unlimited(pairs, fine)
    found = fitted(pairs, fine, limit_bytes=0.3 * free.peak_bytes)
    assert found.settings.spacing_mm > free.grid.spacing[0]
    assert found.changes[-1] == f"working spacing {found.settings.spacing_mm:.3g} mm"
    assert found.peak_bytes <= 0.3 * SAFE * free.peak_bytes
    assert math.prod(found.grid.shape) < math.prod(free.grid.shape)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (PUBLISHED, "reproduce = true works on the voxels of the fixed image"),
        (replace(DEFAULT, spacing_mm=0.5), "spacing_mm = 0.5 cannot fit; make it wider"),
        (DEFAULT, "for the images themselves"),
    ],
)
def test_what_cannot_fit_is_named(settings: Mcbo, said: str) -> None:
    pairs = of(blank(200, 200, 200), blank(200, 200, 200))
    with pytest.raises(InputError, match=rf"0.6 GiB of memory are too little.* GiB, in the stage.*{said}"):
        fitted(pairs, replace(settings, memory_gib=0.6))


def test_without_a_limit_only_blocks_are_cut_to_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = of(blank(160, 160, 160), blank(160, 160, 160))
    free = unlimited(pairs, PUBLISHED)
    monkeypatch.setattr(plan, "available_bytes", lambda: 0.7 * free.peak_bytes)
    assert fitted(pairs, PUBLISHED).peak_bytes <= 0.7 * SAFE * free.peak_bytes
    monkeypatch.setattr(plan, "available_bytes", lambda: 1.0)
    assert fitted(pairs, PUBLISHED) == free


@pytest.mark.parametrize(
    ("text", "gib"),
    [("4GiB", 4), ("4", 4), ("3.5 g", 3.5), ("512MiB", 0.5), ("4GB", 4e9 / 2**30), ("900mb", 9e8 / 2**30)],
)
def test_sizes_in_words(text: str, gib: float) -> None:
    assert parsed_gib(text) == pytest.approx(gib)


@pytest.mark.parametrize("text", ["", "four", "4TiBs", "-1", "0", "1 2"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="such as 4GiB"):
        parsed_gib(text)


# -- a run -------------------------------------------------------------------------------------------------------

LEVELS = replace(QUICK, levels=(4, 1), spacing_mm=4.0)


def test_economies_hardly_change_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving = pair()
    whole, blocks, halves = (
        replace(unlimited(of(fixed, moving), LEVELS), economy=economy)
        for economy in (Economy(), Economy(cost_bytes=2e6), Economy(half=True))
    )
    found = []
    for chosen in (whole, blocks, halves):
        monkeypatch.setattr(registration, "fitted", lambda *_: chosen)  # noqa: B023
        found.append(register(fixed, moving, settings=LEVELS).displacement.field)
    assert torch.equal(found[0], found[1])
    apart = (found[0] - found[2]).norm(dim=0)  # mm; cells of 4 mm
    assert 0 < float(apart.mean()) < 0.2


def failing(error: BaseException, times: int) -> object:
    """``mcbo`` that runs out of memory at first."""
    left = [error] * times
    true_mcbo = registration.mcbo

    def run(*arguments: object) -> torch.Tensor:
        if left:
            raise left.pop()
        return true_mcbo(*arguments)  # type: ignore[arg-type]

    return run


SHORT = [
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_after_running_out_of_memory_a_run_is_tried_once_more_smaller(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert out_of_memory(error)
    monkeypatch.setattr(registration, "mcbo", failing(error, 1))
    with caplog.at_level(logging.WARNING, "crossmorph"):
        result = register(*pair(), settings=QUICK)
    note = result.journal.notes["memory"]
    assert note["ran_out"]
    assert any("working spacing" in change for change in note["changes"])
    assert result.settings.spacing_mm > GRID.spacing[0] / 1.5
    assert "memory ran out; trying again" in caplog.text


def test_other_errors_are_not_taken_for_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "mcbo", failing(RuntimeError("shapes do not fit"), 1))
    with pytest.raises(RuntimeError, match="shapes"):
        register(*pair(), settings=QUICK)


def test_a_smaller_plan_is_smaller() -> None:
    pairs = of(blank(160, 160, 160), blank(160, 160, 160))
    for settings in (PUBLISHED, DEFAULT):
        first = unlimited(pairs, settings)
        second = smaller(first, pairs)
        deformable = [name for name in first.stages if name.startswith(("search", "descriptors"))]
        assert max(second.stages[n] for n in deformable) < max(first.stages[n] for n in deformable)


def test_a_second_shortage_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for image, name in zip(pair(), ("fixed", "moving"), strict=True):
        io.write(image, tmp_path / f"{name}.nii.gz")
    monkeypatch.setattr(registration, "mcbo", failing(MemoryError(), 2))
    out = tmp_path / "out"
    words = ["register", *(str(tmp_path / f"{n}.nii.gz") for n in ("fixed", "moving")), "-o", str(out)]
    assert main([*words, "--linear", "none"]) == 2
    said = capsys.readouterr().err
    assert "memory ran out" in said
    assert "--memory" in said
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed.nii.gz", "moving.nii.gz"]
    monkeypatch.setattr(registration, "mcbo", failing(MemoryError(), 1))
    assert main([*words, "--linear", "none"]) == 0
    assert "was run again, smaller" in capsys.readouterr().out
    assert json.loads((out / "record.json").read_text())["choices"]["memory"]["ran_out"]


# -- measured ----------------------------------------------------------------------------------------------------


PEAK = """
import json, sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from peers import run_measured
print(json.dumps(run_measured(sys.argv[1:], Path("/dev/null"), 1)))
"""
"""Measures from a small process: a peak counts what the process holds that starts the run."""


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "edge"), [("convexadam", 48), ("convexadam", 112), ("remind2reg", 72)])
def test_the_planned_peak_is_that_of_the_process(preset: str, edge: int, tmp_path: Path) -> None:
    """Within a fifth, of a run of its own as ``wait4`` tells it."""
    scans = make_pair((edge, edge, edge), 192 / edge)
    for image, name in ((scans.fixed, "fixed"), (scans.moving, "moving")):
        io.write(image, tmp_path / f"{name}.nii.gz")
    out = tmp_path / "out"
    files = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    command = [sys.executable, "-m", "crossmorph", "register", *files, "-o", str(out), "--preset", preset]
    measured = subprocess.run(
        [sys.executable, "-c", PEAK.format(benchmarks=str(Path(peers.__file__).parent)), *command, "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    code, _, peak_mib = json.loads(measured.stdout)
    assert code in (0, 3)
    planned = json.loads((out / "record.json").read_text())["choices"]["memory"]["planned_gib"]
    assert planned * 1024 == pytest.approx(peak_mib, rel=0.2)


SHORTAGE = """
import resource, sys
from dataclasses import asdict, fields, replace
sys.path.insert(0, {tests!r})
from scene import QUICK, pair
from crossmorph.registration import register
settings = replace(QUICK, levels=(2,), half_width=4, spacing_mm=2.0)
register(*pair(), settings=settings)  # loads everything
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {spare}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
result = register(*pair(), settings=replace(settings, spacing_mm=0.9))
print(result.journal.notes["memory"], result.settings.spacing_mm)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_a_real_shortage_is_survived() -> None:
    """87 x 80 x 72 working voxels at level 2 have a cost volume of 180 MB; a quarter of that fits.

    The allocator is told to give back what is freed: what the first run left behind would serve the second.
    """
    code = SHORTAGE.format(tests=str(Path(__file__).parent), spare=150 * 2**20)
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    threads = {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | allocator | threads
    )
    assert done.returncode == 0, done.stderr
    assert "'ran_out': True" in done.stdout


# -- seconds -----------------------------------------------------------------------------------------------------


def rates(**given: float) -> Rates:
    return Rates(**{field.name: given.get(field.name, 0.0) for field in fields(Rates)})


def test_seconds_are_work_times_rates() -> None:
    one = blank(120, 120, 120)
    planned = unlimited(of(one, one, one), DEFAULT)
    assert planned.grid.shape == (120, 120, 120)
    search = stage_seconds(planned, of(one, one, one), rates(search=1e-6))
    assert sum(search.values()) == pytest.approx(1e-6 * 20**3 * 729 * 2)
    fits = stage_seconds(planned, of(one, one), rates(descriptors=1e-6))
    assert fits["refine 1"] == pytest.approx(1e-6 * 40 * 30**3)
    describe = stage_seconds(planned, of(one, one), rates(describe=1e-6, start=3.0))
    assert describe["descriptors"] == pytest.approx(2e-6 * 120**3)
    assert describe["read"] == 3.0
    assert stage_seconds(planned, of(one, one), rates(describe=1.0), deformable=False)["judge"] == 0


def test_smaller_blocks_are_slower() -> None:
    one = blank(96, 96, 96)
    free = unlimited(of(one, one), PUBLISHED)
    cut = replace(free, economy=Economy(cost_bytes=2e8))
    slow, fast = (stage_seconds(p, of(one, one), rates(search=1.0))["search level 1"] for p in (cut, free))
    assert fast == pytest.approx(96**3 * 729)
    assert slow > 1.3 * fast


@pytest.mark.slow
def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert speed.known_rates() is None
    found = speed.measured_rates()
    assert all(value >= 0 for value in asdict(found).values())
    assert min(found.describe, found.search, found.linear, found.start, found.judge) > 0
    assert speed.known_rates() == found
    monkeypatch.setattr(speed, "_key", lambda: "another machine")
    assert speed.known_rates() is None


def test_the_command_shows_a_plan_and_what_a_limit_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "known_rates", lambda: rates(search=1e-6, start=1.0))
    for image, name in zip(pair(), ("fixed", "moving"), strict=True):
        io.write(image, tmp_path / f"{name}.nii.gz")
    (tmp_path / "fine.toml").write_text("levels = [4, 1]")
    words = ["plan", *(str(tmp_path / f"{n}.nii.gz") for n in ("fixed", "moving")), "--linear", "none"]
    words += ["--settings", str(tmp_path / "fine.toml")]
    assert main(words) == 0
    assert "GiB at the most" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    free = json.loads(capsys.readouterr().out)
    assert free["memory_gib"] * 1024 == pytest.approx(max(row["peak_mib"] or 0 for row in free["stages"]), abs=1)
    assert free["seconds"] == pytest.approx(sum(row["seconds"] or 0 for row in free["stages"]), abs=0.1)
    assert main([*words, "--memory", f"{0.8 * free['memory_gib']:.3f}GiB"]) == 0
    assert "to fit into memory" in capsys.readouterr().out
    assert main([*words, "--memory", "100MiB"]) == 2
    assert "too little" in capsys.readouterr().err
    assert main([*words, "--json", "--channel", *words[1:3], "0.5", "disa"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_gib"] > free["memory_gib"]


@pytest.mark.parametrize("name", typing.get_args(DescriptorName))
def test_every_descriptor_has_the_channels_that_are_planned(name: DescriptorName) -> None:
    values = torch.rand((12, 13, 14), generator=torch.Generator().manual_seed(0))
    seen = torch.ones(values.shape, dtype=torch.bool)
    settings = Mcbo(describe=(Descriptor(name),))
    described = _described(Volume(values, seen, seen), settings, 0)
    assert described.features is not None
    assert described.features.shape[0] == plan.CHANNELS[name]
