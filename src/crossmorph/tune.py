"""Settings for one's own images: a search over a system's settings on pairs with labels or points."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.evaluate.cases import CaseFiles
from crossmorph.evaluate.tables import Cell, higher_is_better, number
from crossmorph.files import atomic_path
from crossmorph.image import Image
from crossmorph.settings import from_dict, to_dict
from crossmorph.transform import Transform

S = TypeVar("S")
Kind = Literal["int", "even", "float", "log"]
Limits = tuple[float, float, Kind]
Space = Mapping[str, Limits]
"""Path of a setting to its lowest and highest value and how to draw between; ``*`` is every item of a list.

A setting that starts outside its limits, such as 0 for automatic, is left as it is.
"""

SPACES: dict[str, Space] = {
    "mcbo": {
        "mind_radius": (1, 3, "int"),
        "mind_dilation": (1, 3, "int"),
        "half_width": (2, 6, "int"),
        "levels.*": (2, 8, "even"),
        "refine.*.control": (1, 6, "int"),
        "refine.*.smoothness": (0.005, 10.0, "log"),
        "refine.*.learning_rate": (0.05, 1.0, "log"),
    },
}

ACCURACY = ("dice", "tre_mean_mm")
METRICS = (*ACCURACY, "hd95_mm", "sdlogj")
STUDY = "crossmorph"


@dataclass(frozen=True)
class Tuning(Generic[S]):
    """What a search found.

    Attributes:
        start: the settings it began with.
        best: the winner, see ``tune``.
        space: what was searched, every ``*`` replaced.
        trials: a row a trial, the start first: ``trial``, the searched settings, the metrics, ``rank`` (0 to 1,
            the higher the better), ``seconds``, ``error`` where it failed.
        place: the winner's row; 0 where nothing beat the start.
    """

    start: S
    best: S
    space: Space
    trials: list[dict[str, Cell]]
    place: int


def tune(
    score: Callable[[S], Mapping[str, float]],
    start: S,
    space: Space,
    trials: int,
    out: str | Path,
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Tuning[S]:
    """Search settings by a multi-objective tree-structured Parzen estimator.

    The start is the first trial. The winner has the best mean rank over all metrics (``mean_ranks``) among the
    trials that are as accurate as the start, in Dice and TRE, or more: accuracy is not traded for smoothness.
    Every trial is kept in ``out``; called again with the same arguments (``trials`` may grow) the search goes on
    and finds what it would have found without the interruption.

    Args:
        score: settings to metrics, lower or higher better by their names; ``METRICS`` among them are used. What it
            raises as ``InputError`` makes a failed trial.
        start: a settings dataclass.
        space: what to search, see ``Space``.
        trials: how many in all, the start and those of earlier calls among them.
        out: folder; made if missing.
        seed: of the search.
        about: what else must not change between calls, such as the names of the pairs.
        progress: called with one line a trial.

    Raises:
        InputError: the start fails, ``out`` holds another search, or optuna is not installed.
    """
    optuna = _optuna()
    space = expand(space, start)
    distributions = {name: _distribution(optuna, *limits) for name, limits in space.items()}
    run = _plain({"start": to_dict(start), "space": space, "seed": seed, "about": about or {}})
    study = _open_study(optuna, Path(out), run, distributions, lambda: _timed(score, start))
    metrics = study.user_attrs["metrics"]
    while (done := len(_finished(study))) < trials:
        study.sampler = optuna.samplers.TPESampler(seed=seed + done)  # so that an interruption changes nothing
        trial = study.ask(distributions)
        try:
            scores = _timed(score, with_values(start, trial.params))
            if lost := [name for name in metrics if not np.isfinite(scores.get(name, np.nan))]:
                raise InputError(f"no finite {', '.join(lost)}")
        except InputError as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            progress(f"{done + 1}/{trials}: failed: {error}")
            continue
        trial.set_user_attr("seconds", scores["seconds"])
        study.tell(trial, [scores[name] for name in metrics])
        progress(f"{done + 1}/{trials}: {_line(scores)}")
    return _tuning(study, start, space)


def mean_ranks(scores: Sequence[Mapping[str, Cell]], metrics: Sequence[str]) -> NDArray[np.float64]:
    """(N,), 0 to 1: geometric mean over the metrics of each row's normalised rank, the best 1, the worst 1 / N.

    Equal values share the mean of their ranks. This is how the self-configuring ConvexAdam (Siebert et al., IEEE
    Transactions on Medical Imaging 2025) and Learn2Reg combine accuracy and smoothness.
    """
    from scipy.stats import rankdata

    logs = []
    for name in metrics:
        values = np.array([number(row[name]) for row in scores])
        logs.append(np.log(rankdata(values if higher_is_better(name) else -values) / len(values)))
    ranks: NDArray[np.float64] = np.exp(np.mean(logs, axis=0))
    return ranks


# -- pairs -------------------------------------------------------------------------------------------------------


def score_pairs(
    pairs: Mapping[str, CaseFiles], register: Callable[[Image, Image], Transform]
) -> list[dict[str, Cell]]:
    """Register and score every pair: a row each with ``id`` and the metrics of ``METRICS`` that its truth allows.

    Raises:
        InputError: a file of a pair, or what ``register`` raises; the message names the pair.
    """
    rows: list[dict[str, Cell]] = []
    for name, files in pairs.items():
        try:
            transform = register(io.read(files.fixed), io.read(files.moving))
            scores = replace(files, moving="").score(transform=transform).scores  # similarity is not asked for
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        rows.append({"id": name, **{metric: scores[metric] for metric in METRICS if metric in scores}})
    return rows


def means(rows: Sequence[Mapping[str, Cell]]) -> dict[str, float]:
    """The mean of every metric over the pairs that have it, and have it finite."""
    result = {}
    for metric in METRICS:
        values = np.array([number(row[metric]) for row in rows if metric in row])
        if np.isfinite(values).any():
            result[metric] = float(values[np.isfinite(values)].mean())
    return result


# -- settings as paths -------------------------------------------------------------------------------------------


def expand(space: Space, settings: Any) -> Space:
    """The space for these settings: ``*`` becomes the places of its list, and what is left alone drops out."""
    content = _plain(to_dict(settings))
    result: dict[str, Limits] = {}
    for pattern, limits in space.items():
        before, star, after = pattern.partition(".*")
        for path in [f"{before}.{k}{after}" for k in range(len(content[before]))] if star else [pattern]:
            node, key = _place(content, path)
            if _allows(limits, node[key]):
                result[path] = limits
    return result


def _allows(limits: Limits, value: float) -> bool:
    low, high, kind = limits
    return low <= value <= high and not (kind == "even" and value % 2)


def with_values(settings: S, values: Mapping[str, Any]) -> S:
    """The settings with other values at some paths.

    Raises:
        InputError: a value that the settings refuse.
    """
    content = _plain(to_dict(settings))
    for path, value in values.items():
        node, key = _place(content, path)
        node[key] = value
    changed: S = from_dict(type(settings), content, "tuned settings")
    return changed


def to_toml(settings: Any) -> str:
    """The text of a preset file that holds all settings."""
    content = _plain(to_dict(settings))
    lines, tables = [], []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                tables += ["", f"[[{key}]]", *_lines(item)]
        elif isinstance(value, dict):
            tables += ["", f"[{key}]", *_lines(value)]
        else:
            lines += _lines({key: value})
    return "\n".join([*lines, *tables]) + "\n"


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} = {json.dumps(value)}" for name, value in table.items()
    ]  # JSON's scalars and lists are TOML's


def _place(content: Any, path: str) -> tuple[Any, str | int]:
    """The table or list that holds the value at a path such as ``refine.0.iterations``, and its key there."""
    node, keys = content, path.split(".")
    for key in keys[:-1]:
        node = node[int(key) if isinstance(node, list) else key]
    return node, int(keys[-1]) if isinstance(node, list) else keys[-1]


def _plain(content: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(content))


# -- the study ---------------------------------------------------------------------------------------------------


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError("tuning needs optuna: pip install 'crossmorph[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: Any, low: float, high: float, kind: Kind) -> Any:
    if kind in ("int", "even"):
        return optuna.distributions.IntDistribution(int(low), int(high), step=2 if kind == "even" else 1)
    return optuna.distributions.FloatDistribution(low, high, log=kind == "log")


def _timed(score: Callable[[S], Mapping[str, float]], settings: S) -> dict[str, float]:
    begin = time.perf_counter()
    scores = dict(score(settings))
    return {**scores, "seconds": time.perf_counter() - begin}


def _line(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def _open_study(
    optuna: Any,
    out: Path,
    run: dict[str, Any],
    distributions: Mapping[str, Any],
    score_start: Callable[[], dict[str, float]],
) -> Any:
    """The study of an earlier call, or a new one whose first trial is the start. run.json is written last."""
    log, record = out / "trials.log", out / "run.json"
    if record.is_file():
        study = optuna.load_study(study_name=STUDY, storage=_storage(optuna, log))
        earlier = json.loads(record.read_text(encoding="utf-8"))
        if changed := [key for key in run if earlier.get(key) != run[key]]:
            raise InputError(f"{out} holds a search with another {' and '.join(changed)}; choose another output")
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # it was interrupted
        return study
    scores = score_start()
    metrics = [name for name in METRICS if np.isfinite(scores.get(name, np.nan))]
    if not any(name in metrics for name in ACCURACY):
        raise InputError(f"tuning needs a Dice or a TRE; the pairs give {_line(scores)}")
    out.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    ways = ["maximize" if higher_is_better(name) else "minimize" for name in metrics]
    study = optuna.create_study(study_name=STUDY, storage=_storage(optuna, log), directions=ways)
    study.set_user_attr("metrics", metrics)
    study.add_trial(
        optuna.trial.create_trial(
            values=[scores[name] for name in metrics],
            params={path: node[key] for path in distributions for node, key in [_place(run["start"], path)]},
            distributions=distributions,
            user_attrs={"seconds": scores["seconds"]},
        )
    )
    with atomic_path(record) as temporary:
        temporary.write_text(json.dumps(run, indent=2), encoding="utf-8")
    return study


def _storage(optuna: Any, log: Path) -> Any:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(log)))


def _finished(study: Any) -> list[Any]:
    """Trials with scores or an error, not those that were interrupted."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.values or "error" in trial.user_attrs]


def _tuning(study: Any, start: S, space: Space) -> Tuning[S]:
    names, finished = study.user_attrs["metrics"], _finished(study)
    rows: list[dict[str, Cell]] = []
    for place, trial in enumerate(finished):
        values = dict(zip(names, trial.values or (), strict=False))
        rows.append({"trial": place, **trial.params, **values, **trial.user_attrs})
    good = [row for row in rows if "error" not in row]
    for row, rank in zip(good, mean_ranks(good, names), strict=True):
        row["rank"] = float(rank)
    best = max((row for row in good if _as_accurate(row, rows[0])), key=lambda row: number(row["rank"]))
    place = rows.index(best)
    return Tuning(start, with_values(start, finished[place].params), space, rows, place)


def _as_accurate(row: Mapping[str, Cell], start: Mapping[str, Cell]) -> bool:
    """Whether no measure of accuracy is worse than the start's."""
    return all(
        number(row[name]) >= number(start[name])
        if higher_is_better(name)
        else number(row[name]) <= number(start[name])
        for name in ACCURACY
        if name in start
    )
