"""``crossmorph tune``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from crossmorph.errors import InputError

if TYPE_CHECKING:
    from crossmorph.evaluate.cases import CaseFiles
    from crossmorph.evaluate.tables import Cell
    from crossmorph.image import Image
    from crossmorph.transform import Transform
    from crossmorph.tune import Tuning


@dataclass(frozen=True)
class Tune:
    """Search the settings of a system on pairs with labels or landmarks, and write a preset for images like them.

    Settings are ranked by Dice or TRE, HD95 and SDlogJ together, and the winner is never less accurate on these
    pairs than the preset it started from. The folder gets preset.toml (for register --settings), trials.csv and
    sensitivity.png. Started again with the same output it goes on where it stopped.
    """

    pairs: Positional[Path]
    """CSV with the columns id, fixed, moving, and either fixed_labels and moving_labels (labels names the ids to
    score), or points, or all of them; mask if wanted. Paths are relative to the table."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for the search and its results."""

    system: str = "mcbo"
    """System to tune."""

    preset: str = "default"
    """Settings to start from: a preset's name or a TOML file."""

    trials: int = 60
    """How many settings to try, the start and those of an earlier call among them."""

    only: str = ""
    """Regular expression: tune on the pairs whose id it finds."""

    unseen: str = ""
    """Regular expression: keep these pairs out of the search, and compare start and winner on them in the end."""

    seed: int = 0
    """Of the search and the registrations."""

    def run(self) -> int:
        """Search, write, print and return the exit code."""
        from crossmorph.evaluate.tables import markdown, write_rows
        from crossmorph.files import atomic_path
        from crossmorph.report.sensitivity import sensitivity
        from crossmorph.settings import load_settings
        from crossmorph.tune import SPACES, means, score_pairs, to_toml, tune

        start = load_settings(self.system, self.preset)
        if self.system not in SPACES:
            raise InputError(f"{self.system} has nothing to tune; choose {', '.join(SPACES)}")
        seen, unseen = self._pairs()
        tuning = tune(
            lambda settings: means(score_pairs(seen, self._registration(settings))),
            start,
            SPACES[self.system],
            self.trials,
            self.output,
            seed=self.seed,
            about={"system": self.system, "pairs": sorted(seen)},
            progress=lambda line: print(line, file=sys.stderr),
        )
        write_rows(tuning.trials, self.output / "trials.csv")
        with atomic_path(self.output / "preset.toml") as temporary:
            temporary.write_text(f"{self._origin(tuning, seen)}\n{to_toml(tuning.best)}", encoding="utf-8")
        sensitivity(tuning, self.output / "sensitivity.png")
        rows: list[dict[str, Cell]] = [{"settings": "start, tuned on", **_scores(tuning, 0)}]
        rows.append({"settings": "best, tuned on", **_scores(tuning, tuning.place)})
        for name, settings in (("start", tuning.start), ("best", tuning.best)) if unseen else ():
            scored = score_pairs(unseen, self._registration(settings))
            write_rows(scored, self.output / f"unseen_{name}.csv")
            rows.append({"settings": f"{name}, unseen", **means(scored)})
        print(markdown(rows))
        print(f"{self.output / 'preset.toml'}: use it by crossmorph register --settings")
        return 0

    def _pairs(self) -> tuple[dict[str, CaseFiles], dict[str, CaseFiles]]:
        """The pairs to tune on and those to keep apart."""
        from crossmorph.evaluate.cases import read_cases

        pairs = {name: files for name, _, files in read_cases(self.pairs, ("id", "fixed", "moving"))}
        apart = _matching(pairs, self.unseen) if self.unseen else {}
        seen = {name: files for name, files in _matching(pairs, self.only).items() if name not in apart}
        if not seen:
            raise InputError(f"--unseen {self.unseen} keeps all pairs out of the search; leave some to tune on")
        blind = [
            name for name, f in {**seen, **apart}.items() if not ((f.fixed_labels and f.moving_labels) or f.points)
        ]
        if blind:
            raise InputError(
                f"{self.pairs}: {', '.join(blind)} has neither labels of both sides nor points, so nothing tells "
                "good settings from bad"
            )
        return seen, apart

    def _registration(self, settings: Any) -> Callable[[Image, Image], Transform]:
        from crossmorph.registration import register

        return lambda fixed, moving: register(fixed, moving, settings=settings, seed=self.seed).transform

    def _origin(self, tuning: Tuning[Any], seen: dict[str, CaseFiles]) -> str:
        return (
            f"# Found by crossmorph tune: {self.system}, from {Path(self.preset).name}, "
            f"{len(tuning.trials)} trials, {len(seen)} pairs, seed {self.seed}."
        )


def _matching(pairs: dict[str, CaseFiles], pattern: str) -> dict[str, CaseFiles]:
    try:
        found = {name: files for name, files in pairs.items() if re.search(pattern, name)}
    except re.error as error:
        raise InputError(f"{pattern} is no regular expression: {error}") from error
    if not found:
        raise InputError(f"no pair has an id with {pattern}; the ids are {', '.join(list(pairs)[:10])}")
    return found


def _scores(tuning: Tuning[Any], place: int) -> dict[str, Cell]:
    from crossmorph.tune import METRICS

    return {name: value for name, value in tuning.trials[place].items() if name in METRICS}
