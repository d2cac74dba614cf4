"""Whether a result can be trusted: ok, check or failed, with reasons in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

MIN_OVERLAP = 0.1
MAX_FOLDED = 0.001
BAD_FOLDED = 0.02
NMI_NOISE = 0.001
MIN_AGREEMENT = 0.45
MIN_CONFIRMED = 0.6
BAD_CONFIRMED = 0.15
MIRRORED = 0.97
FAR = 0.15


@dataclass(frozen=True)
class Verdict:
    """``failed``: do not use. ``check``: look before use. ``ok``: nothing speaks against it."""

    status: Literal["ok", "check", "failed"]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.status} ({'; '.join(self.reasons)})"


def judge(scores: dict[str, Any], spacing_mm: Sequence[float]) -> Verdict:
    """The verdict on a result's scores.

    failed: the images agree less than at the start, less than a tenth of the fixed image is covered, more than 2 %
    of it is folded, or a new search leaves less than 15 % of the body in place. check: no gain that can be told
    from noise, more than 0.1 % folded, an inverse that misses by more than a voxel in more than one place in
    twenty, a displacement longer than 15 % of the field of view in as many, a start that does not convince, a new
    search that leaves less than 60 % in place, images that tell nothing about each other, or that fit better with
    left and right exchanged. Where hardly anything moved (95 % of the voxels by less than half the smallest edge)
    mutual information is not judged: the start was right, and interpolation alone changes the numbers.

    The limits are calibrated on registrations that are right and that are wrong on purpose: docs/verdict.md.

    Args:
        scores: see ``Result.scores``.
        spacing_mm: voxel size of the fixed image.
    """
    failed: list[str] = []
    check: list[str] = []
    good: list[str] = []
    moved = scores["moved_mm"]["p95"]
    still = moved < 0.5 * min(spacing_mm)
    for name, pair in scores["nmi"].items():
        if pair["after"] is None:
            check.append(f"{name}: too little of it is seen in the fixed image")
            continue
        if pair["after"] - 1 < NMI_NOISE:
            check.append(f"{name}: tells nothing about the fixed image; mutual information {pair['after']:.3f}")
            continue
        if pair["before"] is None:
            good.append(f"{name}: brought into view; mutual information {pair['after']:.3f}")
            continue
        gain = pair["after"] - pair["before"]
        words = f"{name}: mutual information {pair['before']:.3f} -> {pair['after']:.3f}"
        if still:
            good.append(f"{name}: in place from the start, moved by less than {moved:.2g} mm nearly everywhere")
        else:
            (failed if gain < -NMI_NOISE else check if gain < NMI_NOISE else good).append(words)
    _second_look(scores, failed, check)
    overlap, folded = scores["overlap"], scores["folded"]
    if overlap < MIN_OVERLAP:
        failed.append(f"only {100 * overlap:.0f} % of the fixed image is covered by moving data")
    if folded > MAX_FOLDED:
        place = ", ".join(f"{axis} {x:.0f}" for axis, x in zip("RAS", scores["worst_place_mm"], strict=True))
        words = f"{100 * folded:.2f} % of the voxels are folded, worst at {place} mm"
        (failed if folded > BAD_FOLDED else check).append(words)
    far = scores["displacement_mm"]["p95"]
    if far > FAR * scores["size_mm"]:
        check.append(f"one place in twenty is displaced by more than {far:.0f} mm")
    agreement = scores["agreement"]
    if agreement is not None and agreement < MIN_AGREEMENT:
        check.append(f"no start convinces: searching forth and back agrees in {100 * agreement:.0f} % of the body")
    miss = scores["inverse_residual_mm"]["p95"]
    if miss > max(spacing_mm):
        check.append(f"the inverse misses by more than {miss:.1f} mm in one place in twenty")
    if failed:
        return Verdict("failed", tuple(failed + check))
    return Verdict("check", tuple(check)) if check else Verdict("ok", tuple(good))


def _second_look(scores: dict[str, Any], failed: list[str], check: list[str]) -> None:
    for name, share in scores["confirmed"].items():
        if share < MIN_CONFIRMED:
            words = f"{name}: a new search leaves only {100 * share:.0f} % of the body in place"
            (failed if share < BAD_CONFIRMED else check).append(words)
    for name, ratio in scores["mirrored_cost_ratio"].items():
        if ratio < MIRRORED:
            less = 100 * (1 - ratio)
            check.append(
                f"{name}: fits better with left and right exchanged, its descriptors differ by {less:.0f} % less"
            )
