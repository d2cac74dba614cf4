"""What the deformable stage gains from each descriptor: MCBO's default with one in place of the other.

python benchmarks/descriptors.py -o OUT

Cases are those of benchmarks/cases.py, both of pairs and of truth. Every run is a process of its own on one thread
and begins with the linear stage; accuracy comes from the data folder's score.py. CPU seconds, unlike wall time,
hardly depend on what else the machine does.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import tyro
from cases import TRUTH_CACHE, Case, data_folder, pairs, truth
from peers import crossmorph_tool, machine, register, score, tiny_case
from tables import START, Row, append_result, read_results, update_section
from tyro.conf import arg

from crossmorph.settings import DescriptorName

FIGURES = (
    ("tre_mean", "TRE mm", 3),
    ("tre_p95", "TRE p95 mm", 3),
    ("dice_mean", "Dice", 4),
    ("fold_percent", "folds %", 3),
    ("sdlogj", "SDlogJ", 3),
    ("cpu_seconds", "CPU s", 1),
    ("peak_mib", "peak MiB", 0),
)
"""Columns: name in results.csv, header, decimal places."""


@dataclass(frozen=True)
class Descriptors:
    """Compare descriptors."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for results.csv and the runs."""

    only: str = "ms07_t1_flair_thick|mni_t1_ct|nichart_FL2_to_T1of1"
    """Regular expression: only the cases whose id it finds."""

    descriptors: tuple[DescriptorName, ...] = ("mind", "msssc", "macmind")
    """What to compare."""

    truth_cache: Path = TRUTH_CACHE
    """Where cases with known truth are kept."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace by the table."""

    def run(self) -> None:
        """Measure what results.csv does not hold yet, and print the table."""
        from crossmorph.evaluate.tables import markdown

        data = data_folder()
        everything = [*truth(data, self.truth_cache), *pairs(data, self.truth_cache)]
        cases = [case for case in everything if re.search(self.only, case.id)]
        if not cases:
            sys.exit(f"no case matches {self.only}")
        self.output.mkdir(parents=True, exist_ok=True)
        results = self.output / "results.csv"
        done = {(row["case"], row["tool"]) for row in read_results(results)}
        wanted = [pair for pair in product(cases, self.descriptors) if (pair[0].id, pair[1]) not in done]
        for name in dict.fromkeys(name for _, name in wanted):  # kernels are compiled before anything counts
            folder = self.output / "warm-up"
            folder.mkdir(exist_ok=True)
            measured(tiny_case(folder), name, folder)
        for case, name in wanted:
            if (case.id, START) not in done:
                append_result(results, {"case": case.id, "tool": START, **score(data / "score.py", case)})
                done.add((case.id, START))
            row = measured(case, name, self.output / "runs")
            if not row.get("error"):
                row |= score(data / "score.py", case, self.output / "runs" / name / "out" / "forward.h5")
            append_result(results, row)
            print(row, flush=True)
        text = markdown(table(read_results(results)))
        print(text)
        if self.update_readme:
            command = f"`python benchmarks/descriptors.py`, {time.strftime('%Y-%m-%d')}; {machine()}; one thread"
            update_section(Path(__file__).with_name("README.md"), self.update_readme, f"{command}\n\n{text}")


def measured(case: Case, name: DescriptorName, folder: Path) -> Row:
    """One run: CPU seconds, peak memory, and an error where it left no transform."""
    tool = replace(crossmorph_tool("default", ("--descriptor", name)), name=name)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = register(tool, case, folder / name, 1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return row | {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def table(rows: list[Row]) -> list[Row]:
    """One row a run, and one for each case without registration."""
    lines = []
    for row in rows:
        numbers = {header: f"{row[name]:.{digits}f}" if name in row else "" for name, header, digits in FIGURES}
        lines.append({"case": row["case"], "descriptor": row["tool"], **numbers})
    return lines


if __name__ == "__main__":
    tyro.cli(Descriptors, description=__doc__).run()
