"""What each setting did in a search: a picture of all trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossmorph.errors import InputError
from crossmorph.evaluate.tables import number
from crossmorph.files import atomic_path
from crossmorph.tune import Tuning

COLUMNS = 3


def sensitivity(tuning: Tuning[Any], path: str | Path) -> Path:
    """One panel a searched setting: its value across, the mean rank of the trial up.

    A slope or a hump shows a setting that matters; a flat cloud shows one that does not. The start is a square,
    the winner a star, every other trial a dot.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the plot needs matplotlib; install it by pip install 'crossmorph[report]'") from None
    path = Path(path)
    rows = -(-len(tuning.space) // COLUMNS)
    figure: Any = Figure(figsize=(4 * COLUMNS, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, tuning.space, strict=False):
        _panel(axis, name, tuning)
    for axis in axes.flat[len(tuning.space) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("mean rank")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def _panel(axis: Any, name: str, tuning: Tuning[Any]) -> None:
    special = {tuning.place: ("*", "tab:red", 12), 0: ("s", "black", 5)}
    for place, row in enumerate(tuning.trials):
        if name in row and "rank" in row:
            marker, colour, size = special.get(place, ("o", "tab:blue", 4))
            looks = {"color": colour, "markersize": size, "alpha": 0.7, "clip_on": False}
            axis.plot(number(row[name]), number(row["rank"]), marker, **looks)
    low, high, kind = tuning.space[name]
    if kind == "log":
        axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_title(name, fontsize=10)
    axis.set_ylim(0, 1.05)
    axis.grid(alpha=0.3)
