"""Seconds of one evaluation, value and gradient, of the rigid objective: DISA's dot product and LC2 itself.

python benchmarks/one_evaluation.py

A cube of a head (T1 and T2 of ms_mni p07) with voxels of 0.4 mm, as in the paper's ultrasound experiment. LC2
takes all windows of radius 3, 5 and 7 voxels there, DISA the descriptors every four voxels, 1.6 mm. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from cases import data_folder
from tables import update_section


@dataclass(frozen=True)
class OneEvaluation:
    """Time both objectives."""

    edge_mm: float = 64.0
    """Edge of the cube."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace."""

    def run(self) -> None:
        """Measure and print."""
        import torch

        from crossmorph import io
        from crossmorph.evaluate.tables import markdown
        from crossmorph.kernels.linear import pulled, seen
        from crossmorph.match.view import View
        from crossmorph.optimise.objectives import disa, lc2
        from crossmorph.preprocess import normalised, onto
        from crossmorph.space import Grid

        torch.set_num_threads(1)
        views = []
        for contrast in ("T1", "T2"):
            image = io.read(data_folder() / f"ms_mni/p07_{contrast}.nii.gz")
            middle = image.grid.to_world(np.asarray(image.grid.shape) / 2)
            shape = (round(self.edge_mm / 0.4),) * 3
            affine = np.diag([0.4, 0.4, 0.4, 1.0])
            affine[:3, 3] = middle - self.edge_mm / 2
            drawn = onto(image, Grid(shape, affine))
            views.append(View(normalised(drawn.data[0], drawn.valid), drawn.valid, drawn.valid, drawn.grid))
        rows = []
        for name, objective, rounds in (("DISA, 1.6 mm", disa, 20), ("LC2, 0.4 mm", lc2, 2)):
            problem = objective(views[0], views[1], np.eye(4))
            voxels = (problem.to_voxels @ problem.from_voxels)[:3]

            def evaluate() -> None:
                values, inside = seen(problem.features, problem.known, voxels, problem.mask)  # noqa: B023
                _, slope = problem.similarity(values, inside)  # noqa: B023
                pulled(problem.features, voxels, inside, slope)  # noqa: B023

            rows.append({"objective": name, "points": problem.mask.numel(), "seconds": timed(evaluate, rounds)})
        text = markdown(rows) + f"\nLC2 / DISA: {rows[1]['seconds'] / rows[0]['seconds']:.0f}"
        print(text)
        if self.update_readme:
            command = f"`python benchmarks/one_evaluation.py`, {time.strftime('%Y-%m-%d')}, one thread"
            update_section(Path(__file__).with_name("README.md"), self.update_readme, f"{command}\n\n{text}")


def timed(call: Callable[[], None], rounds: int) -> float:
    """Median seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


if __name__ == "__main__":
    tyro.cli(OneEvaluation, description=__doc__).run()
