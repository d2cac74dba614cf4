"""LUMIR's pyramid against what its paper compares it with, and its variants against each other, on real brains.

python benchmarks/lumir.py OUT [--steps 20000] [--voxelmorph-steps 20000] [--variant-steps 2000] [--compared 10]

Subjects, split and space are those of ``ixi.py``: all methods begin from the same affine maps and see one box.
Networks see larger voxels than the 2 mm of SyN and MCBO; every method is judged on the labels of the subjects' own
grids. OUT keeps what is prepared, trainings and results; started again, it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import tyro
from ixi import Brains, folding, scores
from learned import HERE, append_rows, by_peer, read_rows, through, timed, train
from tables import update_section
from tyro.conf import Positional

from crossmorph import io, register
from crossmorph.settings import Linear, load_settings
from crossmorph.systems.learned import load_trained
from crossmorph.transform import Affine, Transform

CONFIG = """steps = {steps}
validate_every = {every}
seed = {seed}
rate = {rate}
smoothness = {smoothness}
window = {window}
precision = "bf16"
{network}

[preprocessing]
spacing_mm = {spacing_mm}
crop = false
linear = {{model = "none"}}
"""

VARIANTS = {
    "backbone": 'cascade = "add"',
    "+BF": 'cascade = "add"\nbilateral = "fixed"',
    "+CA": 'cascade = "add"\nattention = true',
    "+CA+BF": 'cascade = "add"\nattention = true\nbilateral = "fixed"',
    "+LK": 'cascade = "add"\nlarge_kernel = 5\nchannels = {lk}',
    "LC-1": 'cascade = "add"\nchannels = {wide}',
    "LC-2": 'cascade = "compose"\nchannels = {wide}',
}
"""The rows of the paper's table 2; in the paper N = 32, 36 with LK and 64 with LC."""

Run = Callable[[], tuple[Transform, float]]
"""A method on a pair: its transform in the common space, and its processor seconds."""

COLUMNS = {
    "dice": ("Dice %", 2),
    "hd95_mm": ("HD95 mm", 2),
    "ndv_percent": ("NDV %", 4),
    "tre_mm": ("TRE mm", 2),
    "seconds": ("seconds", 1),
}
"""What is measured: its heading and digits."""


@dataclass(frozen=True)
class Benchmark:
    """Train, test and tabulate."""

    output: Positional[Path]
    """Folder for what is prepared, trainings and results."""

    steps: int = 20_000
    """Optimiser steps of the pyramid with N = 32; 0 leaves the first table out."""

    voxelmorph_steps: int = 20_000
    """Those of VoxelMorph, whose steps cost less."""

    variant_steps: int = 2_000
    """Those of each variant; 0 leaves the second table out."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Rows of the second table."""

    channels: int = 16
    """N of the variants; LK has an eighth more and LC twice as many, as in the paper."""

    seeds: int = 2
    """Trainings of each variant."""

    spacing_mm: float = 3.0
    """Voxels that the networks of the first table see."""

    variant_spacing_mm: float = 4.5
    """Those of the second table."""

    rate: float = 1e-3
    """Learning rate at the first step."""

    smoothness: float = 1.0
    """Weight of the regulariser."""

    window: int = 5
    """Width in voxels of the windows of the correlation."""

    learnt: int = 50
    """Subjects to learn from, those that weights are chosen by among them."""

    pairs: int = 90
    """Test pairs, of 90."""

    compared: int = 10
    """Those of them that SyN and MCBO register too, and that LUMIR is refined on."""

    refine: int = 40
    """Steps on the pair itself of the row that is refined."""

    update_readme: bool = False
    """Write the tables into README.md beside this script."""

    def run(self) -> None:
        """All of it."""
        torch.set_num_threads(1)
        self.brains.prepare(self.pairs)
        parts = [self._first()] if self.steps else []
        parts += [self._second()] if self.variant_steps else []
        text = "\n\n".join([self._command(), *parts])
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", "lumir", text)

    @cached_property
    def brains(self) -> Brains:
        """The subjects."""
        return Brains(self.output / "volumes", self.learnt)

    def config(self, steps: int, network: str, spacing_mm: float, seed: int = 0) -> str:
        """Settings of a training: what all have, and the lines that make the network."""
        return CONFIG.format(
            steps=steps,
            every=max(1, steps // 4),
            seed=seed,
            rate=self.rate,
            smoothness=self.smoothness,
            window=self.window,
            network=network,
            spacing_mm=spacing_mm,
        )

    def variant(self, name: str) -> str:
        """The lines of ``config`` that make a row of the second table."""
        lines = VARIANTS[name].format(lk=self.channels * 9 // 8, wide=2 * self.channels)
        return lines if "channels" in lines else f"channels = {self.channels}\n{lines}"

    def _train(self, name: str, config: str) -> Path:
        train("lumir", self.brains.table(), self.output / name, config, self.output / "cache")
        return self.output / name

    # -- the first table: against other methods --------------------------------------------------------------

    def _first(self) -> str:
        trained = {
            "VoxelMorph": self._train(
                "voxelmorph", self.config(self.voxelmorph_steps, 'network = "voxelmorph"', self.spacing_mm)
            ),
            "LUMIR N = 32": self._train("lumir", self.config(self.steps, "channels = 32", self.spacing_mm)),
        }
        results = self.output / "results.csv"
        for n, pair in enumerate(self.brains.pairs[: self.pairs]):
            runs: dict[str, Run] = dict.fromkeys(("before", "affine"), lambda: (Affine.identity(), 0.0))
            if n < self.compared:
                runs |= {"SyN": partial(self._syn, pair), "MCBO default": partial(self._mcbo, pair)}
                runs["LUMIR, refined"] = partial(self._network, trained["LUMIR N = 32"], pair, self.refine)
            runs |= {name: partial(self._network, weights, pair) for name, weights in trained.items()}
            self._measure(results, pair, runs)
        rows = read_rows(results)
        compared = {(row["fixed"], row["moving"]) for row in rows if row["method"] == "SyN"}
        parts = [table([row for row in rows if row["method"] not in ("SyN", "MCBO default", "LUMIR, refined")])]
        if compared:
            some = [row for row in rows if (row["fixed"], row["moving"]) in compared]
            parts += [f"The {len(compared)} pairs that SyN and MCBO registered too:", table(some)]
        return "\n\n".join(parts)

    def _syn(self, pair: tuple[str, str]) -> tuple[Transform, float]:
        output = self.output / f"syn-{'-'.join(pair)}.h5"
        files = map(self.brains.image, pair)
        return by_peer("run_ants.py", *files, output, ["--kind", "mono", "--start", "header"])

    def _mcbo(self, pair: tuple[str, str]) -> tuple[Transform, float]:
        fixed, moving = (io.read(self.brains.image(subject)) for subject in pair)
        settings = replace(load_settings(), linear=Linear(model="none"))
        return timed(lambda: register(fixed, moving, settings=settings).transform)

    def _network(self, weights: Path, pair: tuple[str, str], refine: int = 0) -> tuple[Transform, float]:
        fixed, moving = (io.read(self.brains.image(subject)) for subject in pair)
        trained = load_trained("lumir", weights)
        return timed(lambda: through(trained, fixed, moving, Affine.identity(), refine))

    # -- the second table: the variants ----------------------------------------------------------------------

    def _second(self) -> str:
        results = self.output / "variants.csv"
        for name in self.variants:
            for seed in range(self.seeds):
                config = self.config(self.variant_steps, self.variant(name), self.variant_spacing_mm, seed)
                weights = self._train(f"variant-{name}-{seed}", config)
                for pair in self.brains.pairs[: self.pairs]:
                    self._measure(results, pair, {f"{name}, seed {seed}": partial(self._network, weights, pair)})
        return f"Variants, N = {self.channels}, {self.variant_steps} steps each:\n\n{table(read_rows(results))}"

    # -- rows ------------------------------------------------------------------------------------------------

    def _measure(self, results: Path, pair: tuple[str, str], runs: dict[str, Run]) -> None:
        """Append the rows of a pair that are not there yet."""
        done = {row["method"] for row in read_rows(results) if (row["fixed"], row["moving"]) == pair}
        for method, run in runs.items():
            if method in done:
                continue
            fixed, moving = (self.brains.own_labels(subject) for subject in pair)
            field, seconds = run()
            whole = field if method == "before" else self.brains.between(*pair, field)
            found = scores(whole, fixed, moving) | {"ndv_percent": folding(field), "seconds": seconds}
            numbers = {name: round(found[name], 5) for name in COLUMNS}
            append_rows(results, [{"fixed": pair[0], "moving": pair[1], "method": method, **numbers}])

    def _command(self) -> str:
        changed = [
            f"--{field.name.replace('_', '-')} {_words(getattr(self, field.name))}"
            for field in fields(self)
            if field.name not in ("output", "update_readme") and getattr(self, field.name) != field.default
        ]
        return f"`python benchmarks/lumir.py OUT {' '.join(changed)}`, {time.strftime('%Y-%m-%d')}, one thread"


def _words(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def table(rows: list[dict[str, str]]) -> str:
    """Means over the pairs, a row a method, with the deviation of Dice."""
    heads = " | ".join(head for head, _ in COLUMNS.values())
    lines = [f"| method | pairs | {heads} |", "| --- |" + " ---: |" * (len(COLUMNS) + 1)]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [str(len(mine))]
        for name, (_, digits) in COLUMNS.items():
            values = [float(row[name]) for row in mine]
            spread = f" ± {np.std(values):.{digits}f}" if name == "dice" else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
