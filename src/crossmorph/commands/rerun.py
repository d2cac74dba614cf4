"""``crossmorph rerun``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crossmorph.commands.register import progress_bar


@dataclass(frozen=True)
class Rerun:
    """Make a result again from its record, and say whether it is the same to the last bit, or what differs.

    Inputs are looked for where they were. Exit code 0: every volume and transform is the same; 3: some are not.
    """

    record: Positional[Annotated[Path, arg(metavar="RECORD.json")]]
    """The record.json of a result."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for the new result."""

    overwrite: bool = False
    """Replace an earlier result in the output folder."""

    quiet: bool = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Register again, compare and return the exit code."""
        from crossmorph import files
        from crossmorph.rerun import rerun

        files.check_output(self.output, self.overwrite)
        with progress_bar(self.quiet) as progress:
            found = rerun(self.record, self.output, self.overwrite, progress)
        if not self.quiet:
            if found.differ:
                print(f"{self.output}: differs in {', '.join(found.differ)}")
            else:
                print(f"{self.output}: the same to the last bit ({', '.join(found.same)})")
            for line in (*found.causes, *found.effects):
                print(f"  {line}")
        return 3 if found.differ else 0
