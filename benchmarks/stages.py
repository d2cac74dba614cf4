"""Where the time goes: seconds of every stage, from the record.json of crossmorph results.

python benchmarks/stages.py OUT/runs/*/crossmorph-default/out
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from tables import Row, update_section
from tyro.conf import Positional


@dataclass(frozen=True)
class Stages:
    """Print a table of the stages, one column a result."""

    results: Positional[tuple[Path, ...]]
    """Folders that crossmorph register wrote."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace by the table."""

    def run(self) -> None:
        """Read the records and print."""
        from crossmorph.evaluate.tables import markdown

        text = markdown(table({name_of(folder): read_stages(folder) for folder in self.results}))
        print(text)
        if self.update_readme:
            update_section(Path(__file__).with_name("README.md"), self.update_readme, text)


def read_stages(folder: Path) -> dict[str, float]:
    """Stage to seconds."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return {entry["stage"]: entry["seconds"] for entry in record["stages"]}


def name_of(folder: Path) -> str:
    """The case, where the folder is one of benchmarks/peers.py (runs/CASE/TOOL/out); else the folder's name."""
    return folder.parent.parent.name if folder.name == "out" else folder.name


def table(results: dict[str, dict[str, float]]) -> list[Row]:
    """One row a stage in order of first appearance, seconds to two digits, and the sum."""
    stages = dict.fromkeys(stage for seconds in results.values() for stage in seconds)
    rows: list[Row] = [
        {
            "stage": stage,
            **{name: f"{seconds[stage]:.2f}" for name, seconds in results.items() if stage in seconds},
        }
        for stage in stages
    ]
    return [*rows, {"stage": "sum", **{name: f"{sum(seconds.values()):.2f}" for name, seconds in results.items()}}]


if __name__ == "__main__":
    tyro.cli(Stages, description=__doc__).run()
