"""The verdict from scores made by hand."""

from typing import Any

import pytest

from crossmorph.verdict import Verdict, judge

SPACING = (1.0, 1.0, 3.0)


def scores(before: float | None = 1.1, after: float | None = 1.2, **changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "nmi": {"mr": {"before": before, "after": after}},
        "overlap": 0.8,
        "folded": 0.0,
        "inverse_residual_mm": {"median": 0.001, "p95": 0.01, "max": 5.0},
        "moved_mm": {"median": 2.0, "p95": 6.0, "max": 9.0},
        "agreement": 0.9,
        "confirmed": {"mr": 0.9},
        "mirrored_cost_ratio": {"mr": 1.2},
        "worst_place_mm": [10.0, -20.0, 30.0],
        "displacement_mm": {"median": 1.0, "p95": 3.0, "max": 9.0},
        "size_mm": 200.0,
    }
    return good | changes


def test_a_gain_without_anything_against_it_is_ok() -> None:
    verdict = judge(scores(), SPACING)
    assert verdict.status == "ok"
    assert str(verdict) == "ok (mr: mutual information 1.100 -> 1.200)"


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        (scores(1.2, 1.1), "failed", "mr: mutual information 1.200 -> 1.100"),
        (scores(1.1, 1.1005), "check", "mr: mutual information 1.100 -> 1.101"),
        (scores(1.1, 1.0995), "check", "mr: mutual information 1.100 -> 1.099"),
        (scores(None, None), "check", "too little of it is seen"),
        (scores(1.1, None), "check", "too little of it is seen"),
        (scores(1.0, 1.0004), "check", "mr: tells nothing about the fixed image"),
        (scores(None, 1.0), "check", "mr: tells nothing about the fixed image"),
        (scores(1.0, 1.0, moved_mm={"p95": 0.0}), "check", "mr: tells nothing about the fixed image"),
        (
            scores(agreement=0.38),
            "check",
            "no start convinces: searching forth and back agrees in 38 % of the body",
        ),
        (scores(agreement=None), "ok", "mutual information"),
        (scores(overlap=0.09), "failed", "only 9 % of the fixed image is covered"),
        (scores(folded=0.002), "check", "0.20 % of the voxels are folded, worst at R 10, A -20, S 30 mm"),
        (scores(confirmed={"mr": 0.5}), "check", "mr: a new search leaves only 50 % of the body in place"),
        (scores(confirmed={"mr": 0.1}), "failed", "mr: a new search leaves only 10 % of the body in place"),
        (scores(mirrored_cost_ratio={"mr": 0.9}), "check", "mr: fits better with left and right exchanged"),
        (scores(displacement_mm={"p95": 31.0}), "check", "one place in twenty is displaced by more than 31 mm"),
        (scores(folded=0.03), "failed", "3.00 % of the voxels are folded"),
        (scores(inverse_residual_mm={"p95": 3.5}), "check", "the inverse misses by more than 3.5 mm"),
    ],
)
def test_what_speaks_against_a_result_is_said(given: dict[str, Any], status: str, reason: str) -> None:
    verdict = judge(given, SPACING)
    assert verdict.status == status
    assert any(reason in text for text in verdict.reasons)


def test_harmless_numbers_are_not_held_against_a_result() -> None:
    given = scores(overlap=0.11, folded=0.0009, inverse_residual_mm={"p95": 2.9}, confirmed={"mr": 0.61})
    assert judge(given, SPACING).status == "ok"
    given = scores(mirrored_cost_ratio={"mr": 0.98}, displacement_mm={"p95": 29.0})
    assert judge(given, SPACING).status == "ok"


def test_the_worst_decides_and_everything_is_told() -> None:
    verdict = judge(scores(1.2, 1.1, folded=0.002, overlap=0.01), SPACING)
    assert verdict.status == "failed"
    assert len(verdict.reasons) == 3


def test_one_modality_that_got_worse_fails_them_all() -> None:
    pair = {"t1": {"before": 1.1, "after": 1.2}, "t2": {"before": 1.2, "after": 1.1}}
    verdict = judge(scores(nmi=pair), SPACING)
    assert verdict == Verdict("failed", ("t2: mutual information 1.200 -> 1.100",))


@pytest.mark.parametrize(("p95", "status"), [(0.49, "ok"), (0.51, "failed")])
def test_what_hardly_moved_is_not_judged_by_its_interpolation(p95: float, status: str) -> None:
    """Half of the smallest voxel edge, 1 mm, is the limit."""
    given = scores(2.0, 1.8, moved_mm={"median": 0.1, "p95": p95, "max": 3.0})
    assert judge(given, SPACING).status == status


def test_standing_still_does_not_excuse_folds_or_a_missing_overlap() -> None:
    still = {"median": 0.0, "p95": 0.0, "max": 3.0}
    assert judge(scores(2.0, 1.8, moved_mm=still, folded=0.03), SPACING).status == "failed"
    assert judge(scores(2.0, 1.8, moved_mm=still, overlap=0.0), SPACING).status == "failed"
