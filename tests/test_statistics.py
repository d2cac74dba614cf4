"""Tests, intervals, effect sizes and tables against golden values, closed forms and scipy."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmorph.errors import InputError
from crossmorph.evaluate.statistics import (
    cluster_bootstrap,
    cohen_dz,
    compare,
    holm,
    rank_biserial,
    ranking_table,
    subject_means,
    wilcoxon_p,
)
from crossmorph.evaluate.tables import higher_is_better, latex, markdown, read_rows, summarise, write_rows

SYSTEMS = {
    "new": {
        f"c{n}": {"dice_mean": 0.70 + 0.01 * n, "tre_mean_mm": 2.0, "subject": f"s{n // 2}"} for n in range(8)
    },
    "old": {f"c{n}": {"dice_mean": 0.66 + 0.01 * n, "tre_mean_mm": 1.0 + n % 3} for n in range(8)},
}


def test_holm_of_a_worked_example() -> None:
    """0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 is raised to the one before it."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.02, np.nan, 0.9]), [0.04, np.nan, 0.9])
    assert holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all()
    assert (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-12).all()


def test_wilcoxon_of_six_positive_differences_is_two_in_sixty_four() -> None:
    assert wilcoxon_p([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 2**6)
    assert wilcoxon_p([0, 0]) == 1
    assert math.isnan(wilcoxon_p([]))


def test_effect_sizes_of_known_differences() -> None:
    assert rank_biserial([1, 2, 3]) == 1
    assert rank_biserial([1, -2, 3, 0]) == pytest.approx((1 - 2 + 3) / 6)
    assert math.isnan(rank_biserial([0, 0]))
    assert cohen_dz([1, 2, 3]) == pytest.approx(2.0)
    assert math.isnan(cohen_dz([1, 1]))


def test_subject_means_keep_the_order_of_appearance() -> None:
    assert subject_means([1, 5, 3, 8], ["b", "a", "b", "c"]).tolist() == [2, 5, 8]


def test_subjects_are_drawn_whole() -> None:
    """Ten copies of each subject's value add nothing: the interval is that of the subjects alone."""
    values = np.random.default_rng(0).normal(size=12)
    names = [f"s{n}" for n in range(12)]
    alone = cluster_bootstrap(values, names)
    repeated = cluster_bootstrap(np.repeat(values, 10), np.repeat(names, 10).tolist())
    assert repeated == pytest.approx(alone)
    naive = cluster_bootstrap(np.repeat(values, 10), [str(n) for n in range(120)])
    assert naive[1] - naive[0] < 0.5 * (alone[1] - alone[0])
    assert all(math.isnan(v) for v in cluster_bootstrap([1, 2], ["a", "a"]))


def test_interval_width_of_many_subjects_is_that_of_the_normal() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = cluster_bootstrap(values, [str(n) for n in range(400)])
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_comparison_counts_directions_and_units() -> None:
    dice, tre = compare(SYSTEMS, ["dice_mean", "tre_mean_mm"])
    assert (dice.cases, dice.subjects, dice.wins, dice.losses) == (8, 4, 8, 0)
    assert dice.difference == pytest.approx(0.04)
    assert dice.p == pytest.approx(2 / 2**4)
    assert (tre.wins, tre.ties, tre.losses) == (2, 3, 3)
    assert dice.p_holm >= dice.p


def test_subjects_can_come_from_the_ids() -> None:
    (row,) = compare(SYSTEMS, ["dice_mean"], subject_of=lambda case: "one" if case < "c4" else "two")
    assert row.subjects == 2


def test_cases_without_a_partner_or_value_are_counted() -> None:
    new = {**SYSTEMS["new"], "c0": {"dice_mean": math.inf}, "extra": {"dice_mean": 0.1}}
    (row,) = compare({"new": new, "old": SYSTEMS["old"]}, ["dice_mean"])
    assert (row.cases, row.left_out) == (7, 2)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="at least two"):
        compare({"a": {}}, ["dice_mean"])
    with pytest.raises(InputError, match="no column ndv"):
        compare(SYSTEMS, ["ndv"])
    with pytest.raises(InputError, match="share no case"):
        compare({"new": SYSTEMS["new"], "old": {"other": {"dice_mean": 1}}}, ["dice_mean"])
    with pytest.raises(InputError, match="upwards or downwards"):
        higher_is_better("banana")
    assert higher_is_better("banana:higher")
    assert higher_is_better("tre_under_2_mm_percent")
    assert not higher_is_better("tre_mean_mm")


def test_best_is_bold_second_is_underlined() -> None:
    third = {case: {"dice_mean": 0.1, "tre_mean_mm": 9.0} for case in SYSTEMS["new"]}
    rows = ranking_table({**SYSTEMS, "third": third}, ["dice_mean", "tre_mean_mm"])
    text = markdown(rows)
    assert "| new | **0.735 ± 0.023** | <u>2 ± 0</u> |" in text
    assert "| old | <u>0.695 ± 0.023</u> | **1.875 ± 0.78** |" in text
    assert "| third | 0.1 ± " in text
    tex = latex(ranking_table(SYSTEMS, ["dice_mean"], style="latex"))
    assert r"new & \textbf{0.735 $\pm$ 0.023} \\" in tex
    assert r"dice\_mean" in tex


def test_summary_of_known_columns() -> None:
    rows = [{"id": str(n), "tre_mean_mm": float(n), "lost": math.inf if n == 3 else 1.0} for n in range(11)]
    tre, lost = summarise(rows)
    assert tre["metric"] == "tre_mean_mm"
    assert (tre["mean"], tre["p50"], tre["p30"], tre["max"]) == (5, 5, 3, 10)
    assert tre["std"] == pytest.approx(math.sqrt(10))
    assert (lost["n"], lost["undefined"]) == (10, 1)


def test_tables_round_trip_and_name_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_rows([{"id": "a", "x": 0.1}, {"id": "b", "y": 1 / 3}], path)
    assert [*csv.reader(path.open())] == [["id", "x", "y"], ["a", "0.1", ""], ["b", "", str(1 / 3)]]
    assert read_rows(path, ["id"])[1]["y"] == str(1 / 3)
    with pytest.raises(InputError, match="column points is missing; the columns are id, x, y"):
        read_rows(path, ["points"])
    with pytest.raises(InputError, match="cannot read"):
        read_rows(tmp_path / "none.csv")
    assert markdown([{"id": "a|b", "x": math.nan}]) == "| id | x |\n| --- | ---: |\n| a\\|b | - |\n"
