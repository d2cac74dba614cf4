"""The command line: every command is a dataclass in ``commands`` with a ``run`` method."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from crossmorph.commands.apply import Apply
from crossmorph.commands.cohort import Cohort
from crossmorph.commands.compare import Compare
from crossmorph.commands.compose import Compose
from crossmorph.commands.convert import Convert
from crossmorph.commands.demo import Demo
from crossmorph.commands.evaluate import Evaluate
from crossmorph.commands.info import Info
from crossmorph.commands.invert import Invert
from crossmorph.commands.learn2reg import Learn2Reg
from crossmorph.commands.plan import Plan
from crossmorph.commands.register import Register
from crossmorph.commands.report import Report
from crossmorph.commands.rerun import Rerun
from crossmorph.commands.segment import Segment
from crossmorph.commands.train import Train
from crossmorph.commands.tune import Tune
from crossmorph.errors import InputError

Command = (
    Annotated[Register, subcommand("register")]
    | Annotated[Cohort, subcommand("cohort")]
    | Annotated[Rerun, subcommand("rerun")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Apply, subcommand("apply")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Invert, subcommand("invert")]
    | Annotated[Compose, subcommand("compose")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Learn2Reg, subcommand("learn2reg")]
    | Annotated[Tune, subcommand("tune")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Segment, subcommand("segment")]
    | Annotated[Demo, subcommand("demo")]
)

DESCRIPTION = """Align 3-D medical images of different modalities, and of the same one.

Transforms map points of the fixed space to points of the moving space; world coordinates are RAS+ millimetres.
Exit codes: 0 done, 1 a bug, 2 bad input, 3 done but the verdict is failed."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; bad input becomes one line on stderr and exit code 2."""
    try:
        command: Any = tyro.cli(Command, prog="crossmorph", description=DESCRIPTION, args=arguments)
        code: int = command.run()
        sys.stdout.flush()
    except InputError as error:
        print("crossmorph:", *str(error).splitlines(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("crossmorph: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has gone, such as ``head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return 141
    return code
