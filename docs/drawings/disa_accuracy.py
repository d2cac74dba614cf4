"""Predicted against true LC2 of pairs of patches that the DISA weights have not seen: disa_accuracy.png.

    .venv/bin/python benchmarks/disa_data.py FOLDER
    .venv/bin/python docs/drawings/disa_accuracy.py FOLDER [WEIGHTS.safetensors]

The pairs are drawn as in training (``crossmorph.train.patches``), from the subjects that training kept apart, and
compared without augmentation, in float32. Prints a table for docs/disa.md.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from crossmorph import io
from crossmorph.describe.disa import load_network
from crossmorph.train.disa import CPU, predictions, summary
from crossmorph.train.patches import draw_pool, prepared

HERE = Path(__file__).resolve().parent
GROUPS = {"brain of a patient not seen": ("ms07",), "trunks not seen": ("phantom110", "phantom111")}
SETTINGS = replace(CPU, half=False, unseen_pairs=200)


def main(data: Path, weights: Path | None) -> None:
    network = load_network(weights)
    figure = Figure(figsize=(7.2, 3.6), facecolor="white", layout="constrained")
    print("| pairs of patches from | mean squared error | of guessing the mean | correlation |")
    print("| --- | --- | --- | --- |")
    for axis, (name, subjects) in zip(figure.subplots(1, 2, sharey=True), GROUPS.items(), strict=True):
        volumes = [
            prepared(io.read(path), subject, SETTINGS.spacing_mm)
            for subject in subjects
            for path in sorted((data / subject).iterdir())
        ]
        pool = draw_pool(volumes, 60, SETTINGS.candidates, torch.Generator().manual_seed(7))
        order = torch.randperm(len(pool.scores), generator=torch.Generator().manual_seed(8))
        pool = replace(pool, volumes=pool.volumes[order], centres=pool.centres[order], scores=pool.scores[order])
        dots, targets = predictions(network, volumes, pool, SETTINGS)
        found = summary(dots, targets)
        print(f"| {name} | {found['error']:.4f} | {found['error_of_mean']:.4f} | {found['correlation']:.3f} |")
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1)
        axis.scatter(targets, dots, s=5, color="#00734d", alpha=0.5, linewidths=0)
        axis.set(xlim=(-0.05, 1.05), ylim=(-0.35, 1.05), xlabel="LC2", title=name)
        axis.text(0.03, 0.95, f"squared error {found['error']:.4f}", transform=axis.transAxes, va="top")
    figure.axes[0].set_ylabel("dot product of DISA descriptors")
    figure.savefig(HERE / "disa_accuracy.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
