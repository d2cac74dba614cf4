"""The linear stage on one page: find a start, fit a rigid and an affine map, keep nothing that does harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from crossmorph.channels import Channel
from crossmorph.describe.mind import mind_ssc
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.kernels.linear import Matrix
from crossmorph.match.cost import expected_cost
from crossmorph.match.pose import FEWEST, POOL, cells, step
from crossmorph.match.start import (
    MIN_OVERLAP,
    Start,
    Translations,
    moment_starts,
    random_starts,
    simple_starts,
    turned_starts,
)
from crossmorph.match.view import COARSE_VOXELS, FINE_VOXELS, View, views
from crossmorph.optimise.landmarks import Landmarks
from crossmorph.optimise.linear import Model, fit
from crossmorph.optimise.objectives import OBJECTIVES
from crossmorph.optimise.similarity import normalised_information
from crossmorph.record import Journal
from crossmorph.settings import Linear
from crossmorph.space import map_points

CONVINCING = 0.75
"""Agreement of the search forth and back from which a pose is taken without looking further."""

CHEAPER = 1.25
"""Turned starts are tried where they cost less than this many times the cheapest pose so far: steps will help."""

CHEAP = 0.45
"""Cost of a pose, as a share of that of unrelated images, below which no other orientation is tried."""

STEPS = 6
"""Coarse steps from a start, at most."""

HOPELESS = 0.75
"""After two steps, a start with less than this share of the best agreement so far is left."""

LEFT_OUT = 6
"""Landmarks that are left out in turn, at most."""

STILL = 0.25
"""A coarse pose stands still when no corner of the body's box moves by more than this many voxels."""

FEATURELESS = 1e-6
"""Mean squared distance of two descriptors of one image below which it shows nothing."""

LARGEST_SCALE = 4.0
"""A fit that changes volumes by more than this factor is no registration."""

REFINED = 4
"""Starts of one kind from which coarse steps are made: those with the smallest cost."""


@dataclass(frozen=True)
class Candidate:
    """A start after its coarse steps.

    Attributes:
        start: where it began.
        matrix: (4, 4) where it ended.
        cost: mean squared difference of descriptors there, as a share of that of unrelated images.
        agreement: see ``match.pose.Step``.
        information: normalised mutual information there.
        overlap: share of the smaller body that both images see there.
    """

    start: Start
    matrix: Matrix
    cost: float
    agreement: float
    information: float
    overlap: float

    def record(self) -> dict[str, Any]:
        """Plain values."""
        names = ("cost", "agreement", "information", "overlap")
        numbers = {name: round(getattr(self, name), 4) for name in names}
        return {"start": self.start.name, **numbers, "matrix": self.matrix.round(5).tolist()}


def align(
    fixed: Image,
    moving: Image,
    settings: Linear,
    journal: Journal,
    initial: Matrix | None = None,
    seed: int = 0,
    landmarks: Landmarks | None = None,
    others: Sequence[Channel] = (),
) -> Matrix:
    """The linear map (4, 4) from fixed to moving points.

    Each stage is judged by a score that it did not optimise, where the poses before and after both see the images:
    the start by mutual information (it was found by MIND-SSC), later ones by MIND-SSC where they were fitted by
    mutual information and by mutual information else. A stage that does not improve it is dropped.

    Args:
        fixed, moving: one channel each.
        settings: see ``Linear``.
        journal: takes stages, all candidate starts, and what was kept and dropped.
        initial: pose to start from in place of the headers' world coordinates.
        seed: for random starts.
        landmarks: the start is where they fit best, and every fit keeps them near their matches. The journal gets
            the error at each one when it is left out.
        others: further pairs, of one channel each. The start is found by the first pair alone; every fit and its
            judgement take the weighted sum over all.

    Raises:
        InputError: no start brings the images together, or there is no structure to rank starts by.
    """
    header = np.eye(4) if initial is None else initial
    if settings.model == "none":
        return header
    with journal.stage("start"):
        coarse = views(fixed, moving, COARSE_VOXELS)
        if landmarks is None:
            pose = _start(*coarse, header, settings, journal, seed, (fixed.name, moving.name))
        else:
            pose = landmarks.pose(header, settings.model != "translation")
            journal.note("start", {"from": "landmarks"})
    pairs = [Channel(fixed, moving), *others]
    coarse_pairs, fine_pairs = (_seen(pairs, voxels) for voxels in (COARSE_VOXELS, FINE_VOXELS))
    models: tuple[Model, ...] = ("rigid", "affine") if settings.model == "affine" else (settings.model,)
    for model in models:
        with journal.stage(model):
            pose = _fitted(coarse_pairs, fine_pairs, pose, model, settings, journal, landmarks)
    if landmarks is not None:
        kept = [model for model in models if journal.notes[_note(model)]["kept"]]
        with journal.stage("leave one out"):
            journal.note("landmarks left out", _left_out(fine_pairs, kept[-1:], header, settings, landmarks))
    return pose


class _Seen(NamedTuple):
    """Both views of a pair, and what the pair weighs."""

    fixed: View
    moving: View
    weight: float


def _seen(pairs: Sequence[Channel], voxels: int) -> list[_Seen]:
    return [_Seen(*views(pair.fixed, pair.moving, voxels), pair.weight) for pair in pairs]


def _fit(
    pairs: Sequence[_Seen], objective: str, pose: Matrix, model: Model, landmarks: Landmarks | None
) -> Matrix:
    """The pose after a fit to all pairs."""
    problems = [
        replace(OBJECTIVES[objective](pair.fixed, pair.moving, pose), weight=pair.weight) for pair in pairs
    ]
    pull = None if landmarks is None else partial(landmarks.pull, pose)
    return pose @ fit(problems, model, pull=pull).matrix


def _left_out(
    pairs: Sequence[_Seen], models: list[Model], header: Matrix, settings: Linear, landmarks: Landmarks
) -> dict[str, float]:
    """Name of a landmark to its error in mm after a start and a fit that did not know it; of some where many."""
    chosen = np.unique(np.linspace(0, len(landmarks.names) - 1, LEFT_OUT).astype(int))
    found = {}
    for n in chosen if len(landmarks.names) > 1 else ():
        others = landmarks.chosen(np.arange(len(landmarks.names)) != n)
        pose = others.pose(header, settings.model != "translation")
        for model in models:
            pose = _fit(pairs, settings.similarity, pose, model, others)
        error = np.linalg.norm(map_points(pose, landmarks.fixed[n]) - landmarks.moving[n])
        found[landmarks.names[n]] = round(float(error), 3)
    return found


def _start(
    fixed: View,
    moving: View,
    header: Matrix,
    settings: Linear,
    journal: Journal,
    seed: int,
    names: tuple[str, str],
) -> Matrix:
    search = _Search(fixed, moving, names)
    convinced = search.walk([Start("header", header)])
    if settings.search != "header":
        near = search.placed(simple_starts(fixed, moving, header) + moment_starts(fixed, moving))
        settled = convinced and settings.search == "auto"
        convinced = (
            search.walk(search.cheaper(near, 1.0) if settled else [start for _, start in near]) or convinced
        )
        if settings.search == "global" or (settings.search == "auto" and not convinced):
            search.walk(search.cheaper(search.placed(turned_starts(fixed, moving, header)), CHEAPER))
    if settings.random_starts:
        spread = (settings.random_starts, settings.random_deg, settings.random_mm)
        search.walk(search.ranked(random_starts(fixed, header, *spread, seed)))
    journal.note("starts", [candidate.record() for candidate in search.tried])
    able = [candidate for candidate in search.tried if candidate.overlap >= MIN_OVERLAP]
    if not able:
        advice = "let --search find a start" if settings.search == "header" else "check masks and headers"
        raise InputError(f"{names[1]} and {names[0]} do not overlap from any start that was tried; {advice}")
    best = max(able, key=lambda candidate: candidate.information)
    scores = _compared(_information, fixed, moving, header, best.matrix)
    about = {"from": best.start.name, "agreement": round(best.agreement, 4)}
    journal.note("start", {**about, **_judged("mutual information", scores)})
    return best.matrix if _gains(scores) else header


class _Search:
    """Ranks starts, and makes coarse steps from the best of them."""

    def __init__(self, fixed: View, moving: View, names: tuple[str, str]) -> None:
        self.fixed, self.moving = fixed, moving
        self.target = cells(fixed)
        for view, name in zip((fixed, moving), names, strict=True):
            found = cells(view)
            if not expected_cost(found.features, found.features, found.valid, found.valid) > FEATURELESS:
                raise InputError(
                    f"{name} shows no structure, so no start can be ranked; look at the image, or trust the "
                    "header with --linear none"
                )
        self.corners = fixed.grid.to_world(np.array(list(product(*((0.0, n - 1.0) for n in fixed.grid.shape)))))
        self.tried: list[Candidate] = []

    def placed(self, starts: list[Start]) -> list[tuple[float, Start]]:
        """Each start at its cheapest translation, cheapest first, without those that come to the same."""
        translations = Translations(self.fixed, self.target, self.moving)
        ranked = sorted((translations.best(start) for start in starts), key=lambda pair: pair[0])
        distinct: list[tuple[float, Start]] = []
        for cost, start in ranked:
            if np.isfinite(cost) and all(self._apart(start.matrix, s.matrix) > 2 * POOL for _, s in distinct):
                distinct.append((cost, start))
        return distinct

    def ranked(self, starts: list[Start]) -> list[Start]:
        """The starts where they are, those with the largest mutual information first."""
        scored = [(_information(self.fixed, self._seen(start.matrix)), start) for start in starts]
        scored.sort(key=lambda pair: -pair[0])
        return [start for _, start in scored]

    def walk(self, starts: list[Start]) -> bool:
        """Coarse steps from the first ``REFINED`` starts, which join ``tried``; true once one convinces."""
        for start in starts[:REFINED]:
            if any(self._apart(start.matrix, other.matrix) < 2 * POOL for other in self.tried):
                continue  # one of those tried came here
            candidate = self._walked(start)
            if candidate is not None:
                self.tried.append(candidate)
                sure = candidate.agreement >= CONVINCING or candidate.cost < CHEAP
                if sure and candidate.overlap >= MIN_OVERLAP:
                    return True
        return False

    def cheaper(self, starts: list[tuple[float, Start]], factor: float) -> list[Start]:
        """Those that cost less than ``factor`` times the cheapest pose where a walk ended."""
        least = min((candidate.cost for candidate in self.tried), default=np.inf)
        return [start for cost, start in starts if cost < factor * least]

    def _walked(self, start: Start) -> Candidate | None:
        matrix, agreement = start.matrix, 0.0
        for number in range(STEPS):
            found = step(self.fixed, self.target, self.moving, matrix)
            if found is None:
                return None
            moved = self._apart(found.matrix, matrix)
            matrix, agreement = found.matrix, found.agreement
            if moved < STILL or (number and agreement < HOPELESS * self._best_agreement()):
                break
        seen = self._seen(matrix)
        shared = int((self.fixed.weight & seen.weight).sum())
        overlap = shared / max(1, min(int(self.fixed.weight.sum()), int(self.moving.weight.sum())))
        return Candidate(start, matrix, self._cost(seen), agreement, _information(self.fixed, seen), overlap)

    def _cost(self, seen: View) -> float:
        """Mean squared difference over the fixed body, as a share of that of unrelated images."""
        target, source = self.target, cells(seen)
        unknown = expected_cost(target.features, source.features, target.valid, source.valid)
        body = target.body & target.valid
        known = (body & source.valid).numpy()
        apart = (target.features - source.features).square().sum(0).numpy()[known]
        costs = float(apart.sum(dtype=np.float64)) + unknown * float(body.sum() - known.sum())
        return costs / max(unknown * float(body.sum()), 1e-12)

    def _best_agreement(self) -> float:
        return max((candidate.agreement for candidate in self.tried), default=0.0)

    def _seen(self, matrix: Matrix) -> View:
        return self.moving.seen(self.fixed.grid, matrix)

    def _apart(self, one: Matrix, other: Matrix) -> float:
        """Largest distance in voxels between where two poses put the corners of the fixed box."""
        difference = (one - other)[:3]
        lengths = np.linalg.norm(self.corners @ difference[:, :3].T + difference[:, 3], axis=1)
        return float(lengths.max() / self.fixed.grid.spacing[0])


def _fitted(
    coarse: Sequence[_Seen],
    fine: Sequence[_Seen],
    pose: Matrix,
    model: Model,
    settings: Linear,
    journal: Journal,
    landmarks: Landmarks | None = None,
) -> Matrix:
    """The pose after a fit of one model, or the same pose where the fit did not help."""
    found = pose
    if model == "affine":
        first = coarse[0]
        agreed = step(first.fixed, cells(first.fixed), first.moving, pose, "affine")
        found = pose if agreed is None else agreed.matrix
    for pairs, objective in ((coarse, "mind"), (fine, settings.similarity)):
        found = _fit(pairs, objective, found, model, landmarks)
    judge, name = (_likeness, "MIND-SSC") if settings.similarity == "mi" else (_information, "mutual information")
    scores = _compared_all(judge, fine, pose, found)
    size = float(np.linalg.det(found[:3, :3]) / np.linalg.det(pose[:3, :3]))
    sound = 1 / LARGEST_SCALE < size < LARGEST_SCALE
    journal.note(
        _note(model),
        _judged(name, scores) if sound else {"kept": False, "why": f"volume changed {size:.3g} times"},
    )
    return found if sound and _gains(scores) else pose


def _note(model: Model) -> str:
    """Key of a model in the record; ``similarity`` is that of the deformable stage."""
    return f"{model} map" if model == "similarity" else model


Judge = Callable[..., float]


def _compared_all(
    judge: Judge, pairs: Sequence[_Seen], before: Matrix, after: Matrix
) -> tuple[float, float] | None:
    """Weighted means of the scores of all pairs that can be compared; None where none can."""
    scores = [(pair.weight, _compared(judge, pair.fixed, pair.moving, before, after)) for pair in pairs]
    told = [(weight, pair) for weight, pair in scores if pair is not None]
    if not told:
        return None
    weights = [weight for weight, _ in told]
    first, second = (float(np.average(side, weights=weights)) for side in zip(*(p for _, p in told), strict=True))
    return first, second


def _compared(
    judge: Judge, fixed: View, moving: View, before: Matrix, after: Matrix
) -> tuple[float, float] | None:
    """Scores of two poses in the region that both see; None where that is too small to tell."""
    seen = [moving.seen(fixed.grid, pose) for pose in (before, after)]
    common = fixed.valid & seen[0].valid & seen[1].valid & (fixed.body | seen[0].body | seen[1].body)
    smaller = min(int(fixed.weight.sum()), int(moving.weight.sum()))
    shared = min(int((fixed.weight & view.weight & common).sum()) for view in seen)
    if shared < MIN_OVERLAP * smaller:
        return None
    return judge(fixed, seen[0], common), judge(fixed, seen[1], common)


def _gains(scores: tuple[float, float] | None) -> bool:
    """Whether the second is better, or nothing can be compared with the first."""
    return scores is None or scores[1] > scores[0]


def _judged(judge: str, scores: tuple[float, float] | None) -> dict[str, Any]:
    if scores is None:
        return {"kept": True, "why": "the pose before sees too little of both images to be compared"}
    before, after = (round(score, 5) for score in scores)
    return {"kept": _gains(scores), "judge": judge, "before": before, "after": after}


def _information(fixed: View, seen: View, region: torch.Tensor | None = None) -> float:
    """Normalised mutual information of two views on one grid, where both are valid and one shows body."""
    where = fixed.valid & seen.valid & (fixed.body | seen.body) if region is None else region
    if int(where.sum()) < FEWEST:
        return 1.0
    return normalised_information(fixed.values, seen.values, where)


def _likeness(fixed: View, seen: View, region: torch.Tensor) -> float:
    """Minus the mean squared difference of MIND-SSC in a region."""
    first, second = (mind_ssc(view.values, 1, 2)[:, region] for view in (fixed, seen))
    return -float((first - second).square().mean(dtype=torch.float64))
