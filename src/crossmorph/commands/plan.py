"""``crossmorph plan``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from crossmorph.commands.register import chosen_settings, parsed_channel
from crossmorph.errors import InputError
from crossmorph.settings import LinearModel, Mcbo

if TYPE_CHECKING:
    from rich.table import Table

    from crossmorph.plan import Plan as RunPlan


@dataclass(frozen=True)
class Plan:
    """Say how much memory and time a registration will take on this machine's processor, without running it.

    The first time, the speed of the machine is measured: about a minute.
    """

    fixed: Positional[Annotated[Path, arg(metavar="FIXED")]]
    """The image whose space the result would be in."""

    moving: Positional[Annotated[tuple[Path, ...], arg(metavar="MOVING [MOVING ...]")]]
    """The image to align, or several modalities of one body that share a space."""

    channel: UseAppendAction[
        tuple[Annotated[tuple[str, ...], arg(metavar="FIXED MOVING [WEIGHT] [DESCRIPTOR]")], ...]
    ] = ()
    """A further pair of images, as in crossmorph register."""

    system: str = "mcbo"
    """Registration system."""

    preset: str = "default"
    """Name of a preset of the system."""

    settings: Path | None = None
    """TOML file with settings, in place of a preset."""

    linear: LinearModel | None = None
    """Linear stage: affine (after rigid), one model alone, or none; by default what the preset says."""

    deformable: bool = True
    """Follow the linear stage by the deformable one."""

    memory: Annotated[str, arg(metavar="SIZE")] = ""
    """Memory that the run may use, such as 4GiB; the plan says what has to be changed for it."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Print and return the exit code."""
        from rich.console import Console

        from crossmorph import io
        from crossmorph.channels import Channel, checked
        from crossmorph.plan import fitted
        from crossmorph.speed import known_rates, measured_rates, stage_seconds

        if not self.moving:
            raise InputError("give at least one moving image")
        settings = chosen_settings(self.system, self.preset, self.settings, self.linear, None, self.memory)
        if not isinstance(settings, Mcbo):
            raise InputError(f"plan knows the training-free systems; {self.system} is a trained network")
        fixed = io.read(self.fixed)
        pairs = [Channel(fixed, io.read(path)) for path in self.moving]
        pairs = checked([*pairs, *(parsed_channel(words) for words in self.channel)], None, None)
        plan = fitted(pairs, settings, self.deformable)
        rates = known_rates()
        if rates is None:
            Console(stderr=True).print("measuring the speed of this machine, once ...")
            rates = measured_rates()
        seconds = stage_seconds(plan, pairs, rates, self.deformable)
        report = _report(plan, seconds)
        if self.json:
            print(json.dumps(report, indent=2))
        else:
            console = Console(highlight=False, soft_wrap=True, markup=False)
            console.print(_table(report))
            for change in report["changes"]:
                console.print(f"to fit into memory: {change}")
            console.print(f"about {report['memory_gib']:.2f} GiB at the most, and {report['seconds']:.0f} s")
        return 0


def _report(plan: RunPlan, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "memory_gib": round(plan.peak_bytes / 2**30, 3),
        "seconds": round(sum(seconds.values()), 1),
        "changes": list(plan.changes),
        "working_shape": list(plan.grid.shape),
        "working_spacing_mm": [round(float(mm), 4) for mm in plan.grid.spacing],
        "stages": [
            {
                "stage": name,
                "peak_mib": round(plan.stages[name] / 2**20) if name in plan.stages else None,
                "seconds": round(seconds[name], 2) if name in seconds else None,
            }
            for name in [*plan.stages, *(name for name in seconds if name not in plan.stages)]
        ],
    }


def _table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("stage", "peak MiB", "seconds")
    for row in report["stages"]:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table
