"""Memory and seconds of a registration before it runs, and how it is made to fit.

The model is one formula a stage: bytes of what is alive at its peak, from the sizes of the images, of the working
grid and of the levels; docs/memory.md tells it in words. Seconds are units of work times what one unit takes on
this machine (``crossmorph.speed``).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from crossmorph.channels import Channel, fixed_images
from crossmorph.errors import InputError
from crossmorph.settings import Descriptor, Mcbo, Refinement
from crossmorph.space import Grid
from crossmorph.systems.blocks import Economy, divided
from crossmorph.systems.mcbo import grid_of, used_levels

GIB = 2.0**30

CHANNELS = {"mind": 12, "msssc": 18, "macmind": 288, "disa": 18}
"""Numbers a voxel of a descriptor; the two that make DISA's dot product a difference are counted."""

OWN = 16
"""The same of a function that the caller brings along, which tells its number only when it is called."""

LANES = 16
"""Refinements pad the numbers of a descriptor to a multiple of this."""

DISA = 208
"""Bytes a working voxel while DISA's descriptors are made."""

PROGRAM = 440e6
"""Bytes of Python with the packages that a run imports; what the system reports once they are loaded counts."""

CODE = {"linear": 170e6, "descriptors": 60e6, "refine": 10e6, "report": 80e6}
"""Bytes of compiled kernels, and of what the allocator keeps, from a stage on."""

POINT = 620
"""Bytes a point while transforms are inverted and judged, ``BLOCK`` points at a time."""

BLOCK = 2**18

SCORED = 1_000_000
"""Voxels at which a result is judged, at most."""

COARSEST = 2.0
"""The working spacing is widened by at most this factor to fit into memory."""

STEP = 1.05
"""Factor between two working spacings that are tried."""

BLOCK_STEP = 1.15
"""Factor between two sizes of blocks that are tried."""

SAFE = 0.93
"""Share of a limit that a plan may fill: the model is not exact."""

LEAST_BLOCK = 2.0**24
"""Blocks of cost volumes are made no smaller than this many bytes."""

HALVED = "descriptors of single voxels in half precision"


@dataclass(frozen=True)
class Plan:
    """How a registration will run.

    Attributes:
        settings: of the system, the working spacing changed where that was needed.
        economy: how memory is saved.
        grid: working grid.
        stages: bytes that the process has at the peak of each stage.
        changes: what was changed to fit, in words; none where nothing was.
    """

    settings: Mcbo
    economy: Economy
    grid: Grid
    stages: dict[str, float]
    changes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> float:
        """Largest memory of the process."""
        return max(self.stages.values())

    @property
    def peak_stage(self) -> str:
        """The stage that needs it."""
        return max(self.stages, key=self.stages.__getitem__)

    def record(self) -> dict[str, object]:
        """Plain values for the record of a run."""
        limit = {"limit_gib": self.settings.memory_gib} if self.settings.memory_gib else {}
        return {**limit, "planned_gib": round(self.peak_bytes / GIB, 3), "changes": list(self.changes)}


# -- what a run needs --------------------------------------------------------------------------------------------


def stage_bytes(
    pairs: Sequence[Channel], settings: Mcbo, economy: Economy, deformable: bool = True, elsewhere: bool = False
) -> dict[str, float]:
    """Peak bytes of the process in each stage on a CPU, in the order of the run.

    Args:
        pairs: images as read.
        settings, economy: of the run.
        deformable: whether the deformable stage runs.
        elsewhere: it runs in a process of its own, so what this one holds does not count.
    """
    fixed, movings = pairs[0].fixed, [pair.moving for pair in pairs]
    images = [*fixed_images(pairs), *movings]
    held = PROGRAM + sum((4.0 * image.channels + 1) * _voxels(image.grid) for image in images)
    if not elsewhere:
        held = max(held, resident_bytes())  # what the system says, where it says more
    largest = max(_voxels(image.grid) for image in images)
    last = images[-1]
    stages: dict[str, float] = {"read": held + (last.dtype.itemsize + 1) * last.channels * _voxels(last.grid)}
    if settings.linear.model != "none":
        held += CODE["linear"]
        stages["linear"] = held + 28 * largest
    if deformable:
        stages |= {name: held + need for name, need in _deformable(pairs, settings, economy).items()}
        held += CODE["descriptors"] + CODE["refine"]
    fixed_voxels = _voxels(fixed.grid)
    points = min(BLOCK, max(min(_voxels(movings[0].grid), SCORED), min(fixed_voxels, SCORED)))
    stages["judge"] = held + POINT * points + 40 * min(fixed_voxels, SCORED) + 16 * largest
    warped = (4 * sum(moving.channels for moving in movings) + 6) * fixed_voxels
    stages["write"] = held + CODE["report"] + warped + 40 * fixed_voxels
    return stages


def _deformable(pairs: Sequence[Channel], settings: Mcbo, economy: Economy) -> dict[str, float]:
    """Bytes on top of images and program in the stages of ``mcbo``."""
    grid = _grid(pairs, settings)
    voxels, images = _voxels(grid), [*fixed_images(pairs), *(pair.moving for pair in pairs)]
    each = [_bytes_of(pair.describe or settings.describe) for pair in pairs]
    targets = {(id(pair.fixed), pair.describe): features for pair, features in zip(pairs, each, strict=True)}
    drawn = len(images) * voxels * (3 if settings.reproduce else 10)
    largest = max(_voxels(image.grid) for image in images)
    stages: dict[str, float] = {"draw": drawn + (0 if settings.reproduce else 16 * max(largest, voxels))}
    levels = used_levels(settings)
    kept = sum(voxels / level**3 / (2 if economy.half and level == 1 else 1) for level in levels)
    held = drawn + CODE["descriptors"] + (sum(each) + sum(targets.values())) * kept
    base = max(each) * voxels / math.gcd(*levels) ** 3
    names = {descriptor.name for pair in pairs for descriptor in pair.describe or settings.describe}
    network = DISA * voxels if "disa" in names else 0
    stages["descriptors"] = held + base + max(network - max(each) * kept, 6 * voxels)
    field = 12 * voxels
    for level in settings.levels:
        need = _search_bytes(grid.shape, level, settings, economy, sum(each))
        if settings.weights:
            total = 0 if level == settings.levels[0] else field
            need = total + max(need, 2 * field)
        stages[f"search level {level}"] = held + need
    held += CODE["refine"]
    for number, stage in enumerate(settings.refine, start=1):
        summed = (4 if settings.smoothing else 2) * field if settings.weights else 0
        stages[f"refine {number}"] = held + max(_refine_bytes(voxels, stage, each), summed)
    return stages


def _search_bytes(shape: Sequence[int], level: int, settings: Mcbo, economy: Economy, features: float) -> float:
    """Of one discrete search beside the descriptors: fields of both directions, costs, copies of descriptors."""
    searched = _searched(shape, level, settings)
    cells, part = math.prod(n // level for n in shape), math.prod(searched)
    fields = 12 * cells + (24 * part if part < cells else 12 * cells)
    division = divided(searched, settings.half_width, economy.cost_bytes)
    piece = min(part, division.cells // math.prod(division.parts))
    copies = features * piece * (4 if economy.half and level == 1 else 2)
    return fields + max(division.bytes + copies, 48 * part)


def _searched(shape: Sequence[int], level: int, settings: Mcbo) -> tuple[int, ...]:
    """Cells that a level searches as one, before it is cut to save memory."""
    octants = 2 if settings.reproduce and level == 1 else 1
    return tuple(max(1, -(-(n // level) // octants)) for n in shape)


def _bytes_of(describe: Sequence[Descriptor]) -> float:
    """Of the descriptors of a voxel."""
    return 4.0 * sum(OWN if callable(d.name) else CHANNELS[d.name] for d in describe)


def _refine_bytes(voxels: float, stage: Refinement, each: Sequence[float]) -> float:
    """Descriptors of each pair channels last, field with Adam's two moments and its gradients, fine and coarse."""
    cells = voxels / stage.level**3
    control = cells / stage.control**3
    fine = 48 * cells if stage.control > 1 else 24 * cells
    correlation = 40 * cells if stage.similarity != "mind" else 0
    padded = sum(4 * LANES * math.ceil(features / 4 / LANES) for features in each)
    return 2 * padded * cells + fine + 180 * control + correlation


def resident_bytes() -> float:
    """Memory of this process now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def available_bytes() -> float:
    """Memory that this process may still take beside what it has; without end where the system does not tell."""
    try:
        free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return math.inf
    return float(free[1]) * 1024 if free else math.inf


def _grid(pairs: Sequence[Channel], settings: Mcbo) -> Grid:
    return grid_of([(pair.fixed.grid, pair.moving.grid) for pair in pairs], settings)


def _voxels(grid: Grid) -> int:
    return math.prod(grid.shape)


# -- making it fit -----------------------------------------------------------------------------------------------


def fitted(
    pairs: Sequence[Channel],
    settings: Mcbo,
    deformable: bool = True,
    limit_bytes: float | None = None,
) -> Plan:
    """How a run keeps to a memory limit, with the least that must be changed.

    In this order: cost volumes in smaller blocks (slower, the same result), descriptors of single voxels in half
    precision, a wider working spacing. Without a limit, cost volumes are cut so that the free memory of the
    machine suffices, and nothing else is changed.

    Args:
        pairs, settings, deformable: as for ``stage_bytes``.
        limit_bytes: in place of ``settings.memory_gib``.

    Raises:
        InputError: it cannot fit; the message says what needs how much, and which setting would help.
    """
    limit = SAFE * (limit_bytes or settings.memory_gib * GIB)
    if not limit:
        free = SAFE * (available_bytes() + resident_bytes())
        plan = _in_blocks(pairs, settings, deformable, free, False)
        return plan or unlimited(pairs, settings, deformable)
    halves = (False, True) if _can_halve(settings) else (False,)
    for spacing_mm in _spacings(pairs, settings):
        tried = settings if spacing_mm is None else replace(settings, spacing_mm=spacing_mm)
        for half in halves:
            plan = _in_blocks(pairs, tried, deformable, limit, half)
            if plan is not None:
                return plan if spacing_mm is None else _noted(plan, f"working spacing {spacing_mm:.3g} mm")
    raise InputError(_why_not(pairs, settings, deformable, limit / SAFE))


def unlimited(pairs: Sequence[Channel], settings: Mcbo, deformable: bool = True, elsewhere: bool = False) -> Plan:
    """A run that changes nothing to save memory; arguments as for ``stage_bytes``."""
    return _planned(pairs, settings, deformable, Economy(), elsewhere)


def smaller(plan: Plan, pairs: Sequence[Channel]) -> Plan:
    """What to try after a run by ``plan`` ran out of memory: blocks of a quarter, and half the working voxels.

    With ``reproduce`` the working grid stays, and descriptors of single voxels go to half precision instead.
    """
    settings, least = plan.settings, min(plan.economy.cost_bytes, _largest_block(plan)) / 4
    half = _can_halve(settings) and settings.reproduce
    changes = [f"cost volumes in blocks of at most {least / GIB:.2g} GiB"]
    if half:
        changes.append(HALVED)
    if not settings.reproduce:
        wider = float(plan.grid.spacing.min()) * 2 ** (1 / 3)
        settings = replace(settings, spacing_mm=wider)
        changes.append(f"working spacing {wider:.3g} mm")
    changed = _planned(pairs, settings, True, Economy(least, half))
    return replace(changed, changes=tuple(changes))


def computed_cells(plan: Plan) -> dict[int, float]:
    """Cells whose costs each level computes, halos of blocks counted each time, in the order of the levels."""
    settings, shape, found = plan.settings, plan.grid.shape, {}
    for level in settings.levels:
        searched = _searched(shape, level, settings)
        division = divided(searched, settings.half_width, plan.economy.cost_bytes)
        whole = math.prod(n // level for n in shape)
        found[level] = whole * division.cells / math.prod(searched)
    return found


def _largest_block(plan: Plan) -> float:
    """Bytes of the largest piece of a cost volume."""
    settings, shape = plan.settings, plan.grid.shape
    pieces = [_searched(shape, level, settings) for level in settings.levels]
    return max(divided(piece, settings.half_width, plan.economy.cost_bytes).bytes for piece in pieces)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the processor or of a GPU, has run out."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc")
    said = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return said or isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)


def _planned(
    pairs: Sequence[Channel], settings: Mcbo, deformable: bool, economy: Economy, elsewhere: bool = False
) -> Plan:
    needs = stage_bytes(pairs, settings, economy, deformable, elsewhere)
    return Plan(settings, economy, _grid(pairs, settings), needs)


def _in_blocks(
    pairs: Sequence[Channel], settings: Mcbo, deformable: bool, limit: float, half: bool
) -> Plan | None:
    """A plan within a limit by smaller blocks of the cost volumes alone; None where that is not enough."""
    cost_bytes = Economy().cost_bytes
    while True:
        plan = _planned(pairs, settings, deformable, Economy(cost_bytes, half))
        if plan.peak_bytes <= limit:
            break
        if not plan.peak_stage.startswith("search") or cost_bytes < LEAST_BLOCK:
            return None
        cost_bytes /= BLOCK_STEP
    if cost_bytes < Economy().cost_bytes:
        plan = _noted(plan, f"cost volumes in blocks of at most {cost_bytes / GIB:.2g} GiB")
    return _noted(plan, HALVED) if half else plan


def _noted(plan: Plan, change: str) -> Plan:
    return replace(plan, changes=(*plan.changes, change))


def _can_halve(settings: Mcbo) -> bool:
    """Whether there are descriptors of single voxels that only a search reads, block by block."""
    return 1 in settings.levels and all(stage.level > 1 for stage in settings.refine)


def _spacings(pairs: Sequence[Channel], settings: Mcbo) -> list[float | None]:
    """The working spacing as it is (None), then wider ones where it is free to be chosen."""
    if settings.reproduce or settings.spacing_mm:
        return [None]
    finest = float(_grid(pairs, settings).spacing.min())
    steps = int(math.log(COARSEST) / math.log(STEP))
    return [None, *(finest * STEP**n for n in range(1, steps + 1))]


def _why_not(pairs: Sequence[Channel], settings: Mcbo, deformable: bool, limit: float) -> str:
    least = Economy(0.0, _can_halve(settings))
    widest = _spacings(pairs, settings)[-1]
    tried = settings if widest is None else replace(settings, spacing_mm=widest)
    plan = _planned(pairs, tried, deformable, least)
    need = f"{plan.peak_bytes / SAFE / GIB:.2f} GiB, in the stage {plan.peak_stage!r}"
    said = f"{limit / GIB:.3g} GiB of memory are too little: at the least this run needs {need}"
    if plan.peak_stage in ("read", "linear", "judge", "write"):
        return f"{said}, for the images themselves; crop them, or store them with larger voxels"
    if settings.reproduce:
        advice = "reproduce = true works on the voxels of the fixed image; resample that, or take another preset"
    elif settings.spacing_mm:
        advice = f"spacing_mm = {settings.spacing_mm:g} cannot fit; make it wider, or leave it at 0"
    else:
        advice = f"even at a working spacing of {widest:.3g} mm; raise the limit"
    return f"{said}; {advice}"
