"""``crossmorph info``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Info:
    """Show what volumes are: geometry, values, and how their fields of view overlap in mm."""

    files: Positional[tuple[Path, ...]]
    """Volumes of any format."""

    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Print and return the exit code."""
        from rich.console import Console

        from crossmorph import io
        from crossmorph.errors import InputError
        from crossmorph.info import describe, tables

        if not self.files:
            raise InputError("no file was given; name at least one volume")
        report = describe([io.read(path) for path in self.files])
        if self.json:
            print(json.dumps(report, indent=2))
        else:
            Console().print(*tables(report))
        return 0
