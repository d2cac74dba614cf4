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


@dataclass(frozen=True)
class Verdict:
    """``failed``: do not use. ``check``: look before use. ``ok``: nothing speaks against it."""

    status: Literal["ok", "check", "failed"]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.status} ({'; '.join(self.reasons)})"


def judge(scores: dict[str, Any], spacing_mm: Sequence[float]) -> Verdict:
    """The verdict on a result's scores.

    failed: the images agree less than at the start, less than a tenth of the fixed image is covered, or more
    than 2 % of it is folded. check: no gain that can be told from noise, more than 0.1 % folded, an inverse that
    misses by more than a voxel in more than one place in twenty, a start that does not convince, or images that
    tell nothing about each other. Where hardly anything moved (95 % of the voxels by less than half the smallest
    edge) agreement is not judged: the start was right, and interpolation alone changes the numbers.

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
    overlap, folded = scores["overlap"], scores["folded"]
    if overlap < MIN_OVERLAP:
        failed.append(f"only {100 * overlap:.0f} % of the fixed image is covered by moving data")
    if folded > MAX_FOLDED:
        (failed if folded > BAD_FOLDED else check).append(f"{100 * folded:.2f} % of the voxels are folded")
    agreement = scores["agreement"]
    if agreement is not None and agreement < MIN_AGREEMENT:
        check.append(f"no start convinces: searching forth and back agrees in {100 * agreement:.0f} % of the body")
    miss = scores["inverse_residual_mm"]["p95"]
    if miss > max(spacing_mm):
        check.append(f"the inverse misses by more than {miss:.1f} mm in one place in twenty")
    if failed:
        return Verdict("failed", tuple(failed + check))
    return Verdict("check", tuple(check)) if check else Verdict("ok", tuple(good))
