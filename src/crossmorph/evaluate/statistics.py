"""Which of several systems is better, and how sure that is: paired tests with the subject as the unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossmorph.errors import InputError
from crossmorph.evaluate.tables import Cell, Row, higher_is_better, number

Floats = NDArray[np.float64]
Style = Literal["markdown", "latex"]


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment of p values for their number (Holm 1979); NaN stays and is not counted."""
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else []
    return adjusted


def subject_means(values: ArrayLike, subjects: Sequence[str]) -> Floats:
    """(S,): the mean over the cases of each subject, subjects in order of first appearance."""
    _, place = np.unique(np.asarray(subjects, str), return_inverse=True)
    sums = np.bincount(place, weights=np.asarray(values, np.float64))
    means: Floats = (sums / np.bincount(place))[list(dict.fromkeys(place.tolist()))]
    return means


def cluster_bootstrap(
    values: ArrayLike, subjects: Sequence[str], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over cases, drawing whole subjects with replacement.

    Cases of one subject are alike; drawing single cases would make the interval too narrow. Source: Davison and
    Hinkley 1997, section 3.8. NaN with fewer than two subjects.

    Args:
        values: (N,) one value a case.
        subjects: (N,) whose case it is.
        confidence: 0 to 1.
        resamples: number of draws.
        seed: same seed, same interval.
    """
    x = np.asarray(values, np.float64)
    _, place = np.unique(np.asarray(subjects, str), return_inverse=True)
    sums, counts = np.bincount(place, weights=x), np.bincount(place)
    if len(sums) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation, -1 to 1: (R+ - R-) / (R+ + R-) of the ranks of |differences|.

    Zero differences are left out, as in the test. Source: Kerby 2014. NaN where all are zero.
    """
    from scipy.stats import rankdata

    d = np.asarray(differences, np.float64)
    d = d[d != 0]
    if not len(d):
        return float("nan")
    ranks = rankdata(np.abs(d))
    return float((ranks * np.sign(d)).sum() / ranks.sum())


def cohen_dz(differences: ArrayLike) -> float:
    """Cohen's dz: mean difference over the standard deviation (n - 1) of the differences; NaN where it is 0."""
    d = np.asarray(differences, np.float64)
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    return float(d.mean() / spread) if spread > 0 else float("nan")


def wilcoxon_p(differences: ArrayLike) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; zeros are left out, p is 1 where all are zero."""
    from scipy.stats import wilcoxon

    d = np.asarray(differences, np.float64)
    if not len(d):
        return float("nan")
    return float(wilcoxon(d).pvalue) if np.any(d != 0) else 1.0


@dataclass(frozen=True)
class Comparison:
    """System ``a`` against ``b`` on one metric; differences are a - b.

    ``p``, the effect sizes and the interval treat the subject as the unit: the test and the effect sizes take each
    subject's mean difference, the interval draws whole subjects. Wins are counted by case in the metric's better
    direction. ``left_out`` counts cases that one of the systems lacks or whose value is not finite.
    """

    metric: str
    a: str
    b: str
    cases: int
    subjects: int
    left_out: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    rank_biserial: float
    cohen_dz: float
    wins: int
    ties: int
    losses: int


Results = Mapping[str, Mapping[str, Row]]
"""Name of a system to its rows by case id."""


def compare(
    results: Results,
    metrics: Sequence[str],
    subject_of: Callable[[str], str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Every pair of systems on every metric; p values are adjusted for all tests of the call (Holm).

    Args:
        results: two or more systems with rows that share case ids.
        metrics: columns; ``name:higher`` or ``name:lower`` says which way one improves where its name does not.
        subject_of: subject of a case id; by default the row's ``subject`` column, else the id itself.
        confidence: of the intervals.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than two systems, a metric that a system lacks, or no case in common.
    """
    if len(results) < 2:
        raise InputError("a comparison needs at least two tables")
    found: list[dict[str, Any]] = []
    for metric in metrics:
        for a, b in combinations(results, 2):
            found.append(_compare_two(results, a, b, metric, subject_of, confidence, seed))
    adjusted = holm([row["p"] for row in found])
    return [Comparison(**row, p_holm=float(p)) for row, p in zip(found, adjusted, strict=True)]


def _compare_two(
    results: Results,
    a: str,
    b: str,
    metric: str,
    subject_of: Callable[[str], str] | None,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    name = metric.partition(":")[0]
    for system in (a, b):
        if not any(name in row for row in results[system].values()):
            raise InputError(f"{system} has no column {name}")
    ids = [case for case in results[a] if case in results[b]]
    values = np.array([[number(results[s][case].get(name, "")) for s in (a, b)] for case in ids]).reshape(-1, 2)
    usable = np.isfinite(values).all(1)
    if not usable.any():
        raise InputError(f"{a} and {b} share no case with a finite {name}; the column id must name the same cases")
    kept = [case for case, ok in zip(ids, usable, strict=True) if ok]
    subjects = [_subject(results[a][case], case, subject_of) for case in kept]
    values = values[usable]
    difference = values[:, 0] - values[:, 1]
    by_subject = subject_means(difference, subjects)
    low, high = cluster_bootstrap(difference, subjects, confidence, seed=seed)
    better = difference if higher_is_better(metric) else -difference
    everything = len(set(results[a]) | set(results[b]))
    return {
        "metric": name, "a": a, "b": b, "cases": len(kept), "subjects": len(by_subject),
        "left_out": everything - len(kept),
        "mean_a": float(values[:, 0].mean()), "mean_b": float(values[:, 1].mean()),
        "difference": float(difference.mean()), "low": low, "high": high,
        "p": wilcoxon_p(by_subject), "rank_biserial": rank_biserial(by_subject), "cohen_dz": cohen_dz(by_subject),
        "wins": int((better > 0).sum()), "ties": int((better == 0).sum()), "losses": int((better < 0).sum()),
    }  # fmt: skip


def _subject(row: Row, case: str, subject_of: Callable[[str], str] | None) -> str:
    return subject_of(case) if subject_of else str(row.get("subject") or case)


def ranking_table(results: Results, metrics: Sequence[str], style: Style = "markdown") -> list[dict[str, Cell]]:
    """One row a system, mean ± standard deviation a metric, the best bold and the second underlined.

    Means are over the cases that all systems have with a finite value, so that they compare; ``cases`` says how
    many. Marks follow the unrounded means; equal means share a mark.
    """
    marks = {"markdown": ("**{}**", "<u>{}</u>"), "latex": (r"\textbf{{{}}}", r"\underline{{{}}}")}[style]
    plus = "±" if style == "markdown" else r"$\pm$"
    rows: dict[str, dict[str, Cell]] = {system: {"system": system} for system in results}
    shared = [case for case in next(iter(results.values())) if all(case in table for table in results.values())]
    for metric in metrics:
        name = metric.partition(":")[0]
        values = np.array([[number(table[c].get(name, "")) for c in shared] for table in results.values()])
        values = values[:, np.isfinite(values).all(0)]
        if not values.size:
            raise InputError(f"no case has a finite {name} in every table")
        means = values.mean(1)
        ladder = sorted(set(means.tolist()), reverse=higher_is_better(metric))
        for system, mean, spread in zip(results, means.tolist(), values.std(1).tolist(), strict=True):
            text = f"{mean:.4g} {plus} {spread:.2g}"
            place = ladder.index(mean)
            rows[system][f"{name} ({values.shape[1]} cases)"] = marks[place].format(text) if place < 2 else text
    return list(rows.values())
