"""How fast this machine is, and from that how long a registration will take.

A small generated pair is registered once a machine, and again when the package or the number of threads changes.
The seconds of each of its stages over the work done in it are the rates; a plan's seconds are its work times them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from crossmorph.channels import Channel, fixed_images
from crossmorph.errors import InputError
from crossmorph.files import atomic_path
from crossmorph.image import Image
from crossmorph.plan import SCORED, Plan, computed_cells
from crossmorph.settings import Linear, Mcbo, Refinement

ROUNDS = 3

SHAPE = (96, 80, 72)
"""Of the generated pair, voxels of 3 mm."""

PROBE = Mcbo(
    Linear(search="auto"),
    spacing_mm=3.0,
    levels=(4,),
    refine=(
        Refinement(iterations=40, control=8, smoothness=1.0),
        Refinement(iterations=40, smoothness=1.0),
        Refinement(iterations=20, smoothness=1.0, similarity="lncc"),
    ),
)
"""What is run: each kind of work once."""

CANDIDATES = {"mind": (0.0, 2.0), "lncc": (2.0, 0.0), "auto": (2.0, 1.0)}
"""Where smoothness is chosen: fits of local correlation and of descriptors, in multiples of ``iterations``; how
many there will be is up to the images."""


@dataclass(frozen=True)
class Rates:
    """Seconds of a unit of work.

    Attributes:
        start: of loading the program.
        read, write: of a voxel.
        linear: of the linear stage, whose views are as large for small images as for large ones.
        draw: of a working voxel of one image.
        describe, disa: of the descriptors of a working voxel.
        search: of a displacement of a cell, both directions.
        descriptors, correlation, regular: of an iteration at a cell of a refinement, at a control point the last.
        judge: of a point.
        warp: of a voxel.
    """

    start: float
    read: float
    write: float
    linear: float
    draw: float
    describe: float
    disa: float
    search: float
    descriptors: float
    correlation: float
    regular: float
    judge: float
    warp: float


def stage_seconds(plan: Plan, pairs: Sequence[Channel], rates: Rates, deformable: bool = True) -> dict[str, float]:
    """Seconds of each part of a run, in order."""
    settings, fixed, movings = plan.settings, pairs[0].fixed, [pair.moving for pair in pairs]
    images = [*fixed_images(pairs), *movings]
    stored, voxels = sum(image.data.numel() for image in images), math.prod(plan.grid.shape)
    seconds = {"read": rates.start + rates.read * stored}
    if settings.linear.model != "none":
        seconds["linear"] = rates.linear * len(pairs) + rates.draw * stored
    if deformable:
        seconds["draw"] = rates.draw * len(images) * voxels
        seconds["descriptors"] = _describe_seconds(pairs, settings, rates) * voxels
        displacements = (2 * settings.half_width + 1) ** 3
        for level, cells in computed_cells(plan).items():
            seconds[f"search level {level}"] = rates.search * cells * displacements * len(movings)
        for number, stage in enumerate(settings.refine, start=1):
            seconds[f"refine {number}"] = _refine_seconds(stage, voxels, rates) * len(movings)
    seconds["judge"] = rates.judge * min(math.prod(fixed.grid.shape), SCORED)
    out = sum(moving.channels for moving in movings) * math.prod(fixed.grid.shape)
    seconds["write"] = (rates.warp + rates.write) * out
    return seconds


def _describe_seconds(pairs: Sequence[Channel], settings: Mcbo, rates: Rates) -> float:
    """A working voxel, of all images."""
    each = [
        sum(rates.describe if descriptor.name == "mind" else rates.disa for descriptor in describe)
        for describe in (pair.describe or settings.describe for pair in pairs)
    ]
    targets = {(id(pair.fixed), pair.describe): seconds for pair, seconds in zip(pairs, each, strict=True)}
    return sum(each) + sum(targets.values())


def _refine_seconds(stage: Refinement, voxels: int, rates: Rates) -> float:
    correlation, descriptors = CANDIDATES[stage.similarity] if stage.smoothness == 0 else (0.0, 1.0)
    if stage.smoothness > 0 and stage.similarity == "lncc":
        correlation, descriptors = 1.0, 0.0
    each = correlation * rates.correlation + descriptors * rates.descriptors
    each += (correlation + descriptors) * rates.regular / stage.control**3
    return stage.iterations * each * voxels / stage.level**3


# -- measuring ---------------------------------------------------------------------------------------------------


def known_rates() -> Rates | None:
    """The rates measured on this machine with this package and number of threads; None where there are none."""
    try:
        rates = Rates(**json.loads(_cache().read_text())[_key()])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rates


def measured_rates() -> Rates:
    """Measure, and keep the result for the next time where a cache folder can be written.

    The fastest of a few rounds counts, so that other programs disturb little.
    """
    from crossmorph.phantom import make_pair
    from crossmorph.registration import register

    pair = make_pair(SHAPE, 3.0)
    register(pair.fixed, pair.moving, settings=PROBE)  # compiles and loads what is not yet
    runs = [register(pair.fixed, pair.moving, settings=PROBE) for _ in range(ROUNDS)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for run in runs:
            run.save(out, overwrite=True)
        read = min(_timed_read(out / "warped.nii.gz") for _ in range(ROUNDS))
    every = [{entry["stage"]: entry["seconds"] for entry in run.journal.stages} for run in runs]
    seconds = {name: min(each[name] for each in every) for name in every[0]}
    rates = _rates(seconds, pair.fixed, read)
    rates = replace(rates, disa=_timed_disa(pair.fixed), start=_timed_start())
    _keep(rates)
    return rates


def _rates(seconds: dict[str, float], fixed: Image, read: float) -> Rates:
    """Rates from the stages of the probe; what the probe does not tell is 0."""
    voxels = math.prod(fixed.grid.shape)
    cells = voxels / PROBE.levels[0] ** 3
    wide, narrow, correlation = (
        seconds[f"refine {number}"] * stage.level**3 / (stage.iterations * voxels)
        for number, stage in enumerate(PROBE.refine, start=1)
    )
    return Rates(
        start=0.0,
        read=read / voxels,
        write=seconds["write"] / voxels,
        linear=seconds["start"] + seconds["rigid"] + seconds["affine"],
        draw=seconds["draw"] / (2 * voxels),
        describe=seconds["descriptors"] / (2 * voxels),
        disa=0.0,
        search=seconds[f"search level {PROBE.levels[0]}"] / (cells * (2 * PROBE.half_width + 1) ** 3),
        descriptors=wide,
        correlation=max(correlation - (narrow - wide), 0.0),
        regular=max(narrow - wide, 0.0),
        judge=(seconds["judge"] + seconds["transform"]) / voxels,
        warp=seconds["warp"] / voxels,
    )


def _timed_read(path: Path) -> float:
    from crossmorph import io

    begin = time.perf_counter()
    io.read(path)
    return time.perf_counter() - begin


def _timed_disa(image: Image) -> float:
    """Seconds a voxel, from the middle of a volume."""
    from crossmorph.describe.disa import disa_volume

    part = image.data[0, 24:72, 16:64, 12:60].contiguous()
    begin = time.process_time()
    disa_volume(part)
    return (time.process_time() - begin) / torch.get_num_threads() / part.numel()


def _timed_start() -> float:
    """Seconds of loading what every run loads."""
    begin = os.times()
    subprocess.run([sys.executable, "-c", "import crossmorph.registration, SimpleITK"], check=True)
    end = os.times()
    return end.children_user + end.children_system - begin.children_user - begin.children_system


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossmorph" / "speed.json"


def _key() -> str:
    """Machine, threads and package: what rates hold for."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    machine = (platform.node(), platform.machine(), os.cpu_count(), torch.get_num_threads(), torch.__version__)
    return hashlib.sha256(f"{machine} {digest.hexdigest()}".encode()).hexdigest()[:16]


def _keep(rates: Rates) -> None:
    file = _cache()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps({_key(): asdict(rates)}) + "\n")
    except (OSError, InputError):
        return  # measured again next time
