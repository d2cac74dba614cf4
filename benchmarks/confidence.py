"""Whether the map of expected errors tells where a registration is off, on cases with known truth.

python benchmarks/confidence.py -o FOLDER

Takes the registrations that benchmarks/verdict.py left in FOLDER (and makes those that are missing), compares the
expected error at every known point with the true one, and draws the mean true error of each tenth of the points,
ordered by expected error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from cases import TRUTH_CACHE, data_folder, truth
from tables import Row, update_section
from tyro.conf import arg
from verdict import made, phantom_files

from crossmorph import io
from crossmorph.confidence import expected_error
from crossmorph.evaluate.tables import markdown
from crossmorph.phantom import make_pair
from crossmorph.points import Points
from crossmorph.report.evidence import Evidence
from crossmorph.resample import sample

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "drawings" / "confidence.png"
TENTHS = 10


@dataclass(frozen=True)
class Confidence:
    """Compare expected with true errors."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder of the registrations."""

    truth_cache: Path = TRUTH_CACHE
    """Where cases with known truth are kept."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace by the table."""

    def run(self) -> None:
        """Compare, draw and print."""
        from scipy.stats import spearmanr

        rows: list[Row] = []
        curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        points: list[tuple[np.ndarray, np.ndarray]] = []
        for case, evidence, (fixed, moving) in self._cases():
            true, expected = errors(evidence, fixed, moving)
            points.append((true, expected))
            curves[case] = tenths(expected, expected), tenths(expected, true)
            rises = int((np.diff(curves[case][1]) > 0).sum())
            row: Row = {"case": case, "points": len(true), "true_mm": round(float(true.mean()), 2)}
            row |= {"expected_mm": round(float(expected.mean()), 2), "rises_of_9": rises}
            row |= {"rank_correlation": round(float(spearmanr(expected, true)[0]), 2)}
            row |= {"true_mm_by_tenths": " ".join(f"{value:.2f}" for value in curves[case][1])}
            rows.append(row)
            print(*row.values(), flush=True)
        rows.append(together(curves))
        curves["all together"], row = pooled(points)
        rows.append(row)
        draw(curves, FIGURE)
        table = markdown(rows)
        print(table)
        if self.update_readme:
            page = Path(__file__).with_name("README.md")
            update_section(page, self.update_readme, f"`python benchmarks/confidence.py -o FOLDER`\n\n{table}")

    def _cases(self) -> Any:
        for case in truth(data_folder(), self.truth_cache):
            evidence = made(self.output, case.id, case.fixed, case.moving)
            yield case.id, evidence, io.read_point_pairs(case.fixed.with_name("points.csv"))
        for seed in range(3):
            evidence = made(self.output, f"phantom{seed}", *phantom_files(self.output, seed))
            pair = make_pair(seed=seed)
            yield f"phantom{seed}", evidence, (pair.fixed_points, pair.moving_points)


def errors(evidence: Evidence, fixed: Points, moving: Points) -> tuple[np.ndarray, np.ndarray]:
    """True and expected error in mm at the points whose expected error is known."""
    map_ = expected_error(evidence.fixed, evidence.movings[0], evidence.transform)
    values = torch.where(map_.valid, map_.data[0], torch.nan)[None]
    expected = sample(values, map_.grid.to_voxel(fixed.xyz), fill=float("nan"))[0].numpy()
    true = (evidence.transform(fixed.xyz) - moving.xyz).norm(dim=1).numpy()
    known = np.isfinite(expected)
    return true[known], expected[known]


def tenths(order: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean value of each tenth of the points, ordered by something."""
    return np.array([part.mean() for part in np.array_split(values[np.argsort(order)], TENTHS)])


def together(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Row:
    """Mean over the cases, each divided by its own mean error."""
    mean = np.mean([true / true.mean() for _, true in curves.values()], axis=0)
    rises = int((np.diff(mean) > 0).sum())
    shares = " ".join(f"{value:.2f}" for value in mean)
    return {"case": "mean of all, relative", "rises_of_9": rises, "true_mm_by_tenths": shares}


def pooled(cases: list[tuple[np.ndarray, np.ndarray]]) -> tuple[tuple[np.ndarray, np.ndarray], Row]:
    """Curve and row of all cases' points in one order, as many of each case, in mm."""
    count = min(len(true) for true, _ in cases)
    rng = np.random.default_rng(0)
    chosen = [rng.choice(len(true), count, replace=False) for true, _ in cases]
    true, expected = (
        np.concatenate([case[side][places] for case, places in zip(cases, chosen, strict=True)]) for side in (0, 1)
    )
    curve = tenths(expected, expected), tenths(expected, true)
    row: Row = {"case": "points of all, in mm", "points": len(true), "true_mm": round(float(true.mean()), 2)}
    row |= {"expected_mm": round(float(expected.mean()), 2), "rises_of_9": int((np.diff(curve[1]) > 0).sum())}
    return curve, row | {"true_mm_by_tenths": " ".join(f"{value:.2f}" for value in curve[1])}


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """True against expected error, a line a case."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for case, (expected, true) in curves.items():
        wide = case == "all together"
        style = {"color": "black", "linewidth": 3, "zorder": 3} if wide else {"linewidth": 1}
        axis.loglog(expected, true, marker="o", markersize=3, label=case, **style)
    ends = [0.15, 15]
    axis.loglog(ends, ends, color="#777777", linestyle="--", linewidth=1, label="equal")
    axis.set_xlabel("expected error, mm: mean of each tenth of the points")
    axis.set_ylabel("true error, mm: mean of the same points")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    tyro.cli(Confidence).run()
