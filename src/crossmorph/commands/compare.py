"""``crossmorph compare``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crossmorph.errors import InputError


@dataclass(frozen=True)
class Compare:
    """Compare systems on the same cases: paired tests, intervals, effect sizes, and tables for a paper.

    Every table has one row a case with the column id; cases are matched by it. The subject is the unit of all
    statistics: cases of one subject (column subject, or --subject-pattern) are averaged for the Wilcoxon
    signed-rank test and drawn together for the bootstrap interval. p values are adjusted by Holm's method for all
    tests of the call.
    """

    tables: Positional[tuple[Path, ...]]
    """CSV files, or folders that crossmorph evaluate wrote. The first names the cases' subjects."""

    metric: tuple[str, ...] = ()
    """Columns to compare; write name:higher or name:lower where the name does not tell which is better.
    Default: Dice, TRE and HD95 where all tables have them."""

    names: tuple[str, ...] = ()
    """Names of the systems. Default: the files' or folders' names."""

    subject_pattern: str | None = None
    """Regular expression that finds the subject in an id; its first group if it has one."""

    confidence: float = 0.95
    """Level of the intervals."""

    seed: int = 0
    """Of the bootstrap."""

    output: Annotated[Path | None, arg(aliases=("-o",))] = None
    """Folder for comparisons.csv, ranking.md, ranking.tex and record.json."""

    overwrite: bool = False
    """Replace an earlier comparison in --output."""

    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Compare, print, write and return the exit code."""
        from crossmorph.evaluate.cases import to_json
        from crossmorph.evaluate.statistics import compare, ranking_table
        from crossmorph.evaluate.tables import latex, markdown, write_rows
        from crossmorph.files import RECORD, atomic_directory

        results = self._results()
        metrics = self.metric or self._shared(results)
        if not 0 < self.confidence < 1:
            raise InputError(f"--confidence must lie between 0 and 1, not {self.confidence}")
        found = compare(results, metrics, self._subject(), self.confidence, self.seed)
        rows = [asdict(row) for row in found]
        ranking = markdown(ranking_table(results, metrics))
        if self.output:
            with atomic_directory(self.output, self.overwrite) as out:
                write_rows(rows, out / "comparisons.csv")
                (out / "ranking.md").write_text(ranking, encoding="utf-8")
                (out / "ranking.tex").write_text(latex(ranking_table(results, metrics, "latex")), encoding="utf-8")
                (out / RECORD).write_text(to_json({"comparisons": rows}), encoding="utf-8")
        print(to_json({"comparisons": rows}) if self.json else f"{ranking}\n{markdown(rows)}", end="")
        return 0

    def _results(self) -> dict[str, dict[str, dict[str, str]]]:
        from crossmorph.evaluate.tables import read_rows

        if len(self.tables) < 2:
            raise InputError("a comparison needs at least two tables")
        files = [path / "cases.csv" if path.is_dir() else path for path in self.tables]
        names = self.names or tuple(f.parent.name if f.name == "cases.csv" else f.stem for f in files)
        if len(names) != len(files) or len(set(names)) != len(files):
            raise InputError(f"{len(files)} tables need {len(files)} different names, not {', '.join(names)}")
        return {
            name: {row["id"]: row for row in read_rows(file, ("id",))}
            for name, file in zip(names, files, strict=True)
        }

    def _shared(self, results: dict[str, dict[str, dict[str, str]]]) -> tuple[str, ...]:
        usual = ("dice", "tre_mean_mm", "hd95_mm", "tre", "hd95")
        shared = tuple(
            name
            for name in usual
            if all(any(row.get(name) for row in table.values()) for table in results.values())
        )
        if not shared:
            raise InputError(f"the tables share none of {', '.join(usual)}; name columns with --metric")
        return shared

    def _subject(self) -> Callable[[str], str] | None:
        if self.subject_pattern is None:
            return None
        try:
            pattern = re.compile(self.subject_pattern)
        except re.error as error:
            raise InputError(f"--subject-pattern is no regular expression: {error}") from error

        def subject(case: str) -> str:
            found = pattern.search(case)
            if found is None:
                raise InputError(f"--subject-pattern {self.subject_pattern} finds nothing in the id {case}")
            return found[1] if pattern.groups else found[0]

        return subject
