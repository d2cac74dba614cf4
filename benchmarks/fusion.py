"""What a second channel brings: T1 and FLAIR onto T2, together and alone, and FLAIR onto the T1 beside the T2.

python benchmarks/fusion.py -o fusion.csv

Both moving volumes of a case carry one and the same known deformation (one seed of make_truth.py gives one
transform whatever the moving contrast is), as two sequences of one session do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import tyro
from cases import TRUTH_CACHE, Case, data_folder, deformed
from tables import Row, update_section
from tyro.conf import arg

from crossmorph.settings import Mcbo, load_settings

MODES: tuple[Literal["signed", "magnitude", "cost"], ...] = ("signed", "magnitude", "cost")


@dataclass(frozen=True)
class Fusion:
    """Compare the fusion modes with each moving image alone."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """CSV to write."""

    preset: str = "default"
    """Settings of MCBO that all runs start from."""

    spacing_mm: float = 0.0
    """Working voxels; 0 leaves them to the preset."""

    patients: tuple[str, ...] = ("p07", "p26")
    """Of ms_mni."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the deformation."""

    only: str = ""
    """Run the ways whose name this regular expression finds."""

    truth_cache: Path = TRUTH_CACHE
    """Where cases with known truth are kept."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace by the table."""

    def run(self) -> None:
        """Register, write the CSV and print the table of means."""
        from crossmorph.evaluate.tables import markdown, write_rows

        settings = load_settings("mcbo", self.preset)
        assert isinstance(settings, Mcbo)
        linear = replace(settings.linear, model="none")
        settings = replace(settings, linear=linear, spacing_mm=self.spacing_mm or settings.spacing_mm)
        data = data_folder()
        rows: list[Row] = []
        for patient, seed in product(self.patients, self.seeds):
            t1, flair = (
                deformed(data, self.truth_cache, patient, "T2", moving, seed) for moving in ("T1", "FLAIR")
            )
            beside = data / "ms_mni" / f"{patient}_T1.nii.gz"
            for row in compare(f"{patient}_s{seed}", t1, flair, beside, settings, self.only):
                rows.append(row)
                print(row, flush=True)
        write_rows(rows, self.output)
        text = markdown(means(rows))
        print(text)
        if self.update_readme:
            options = f"--preset {self.preset} --spacing-mm {self.spacing_mm:g}"
            command = f"`python benchmarks/fusion.py {options}`, {time.strftime('%Y-%m-%d')}"
            update_section(Path(__file__).with_name("README.md"), self.update_readme, f"{command}\n\n{text}")


def compare(name: str, t1: Case, flair: Case, beside: Path, settings: Mcbo, only: str) -> Iterator[Row]:
    """One row a way to use the two moving images of one case; ``beside`` is another fixed image."""
    from crossmorph import Channel, io, register
    from crossmorph.evaluate import evaluate

    fixed, first, second = io.read(t1.fixed), io.read(t1.moving), io.read(flair.moving)
    points = io.read_point_pairs(t1.fixed.with_name("points.csv"))
    mask = io.read_labels(t1.fixed.with_name("fixed_mask.nii.gz"))
    pairs = {"T1-T2": Channel(fixed, first), "FLAIR-T2": Channel(fixed, second)}
    pairs["FLAIR-T1"] = Channel(io.read(beside), second)
    ways = {way: ([pair], settings) for way, pair in pairs.items()}
    both = [pairs["T1-T2"], pairs["FLAIR-T2"]]
    ways |= {f"T1-T2 and FLAIR-T2, {mode}": (both, replace(settings, fusion=mode)) for mode in MODES}
    ways["T1-T2 and FLAIR-T1"] = ([pairs["T1-T2"], pairs["FLAIR-T1"]], settings)
    for way, ((main, *channels), chosen) in ways.items():
        if not re.search(only, way):
            continue
        begin = time.perf_counter()
        result = register(main.fixed, main.moving, channels=channels, settings=chosen)
        seconds = time.perf_counter() - begin
        scores = evaluate(result.transform, points=points, fixed=fixed, mask=mask).scores
        columns = ("tre_before_mm", "tre_mean_mm", "tre_p95_mm", "folding_percent", "sdlogj")
        yield {"case": name, "moving": way, **{column: scores[column] for column in columns}, "seconds": seconds}


def means(rows: list[Row]) -> list[Row]:
    """One row a way, the mean over the cases of every number."""
    table = []
    for way in dict.fromkeys(row["moving"] for row in rows):
        mine = [row for row in rows if row["moving"] == way]
        numbers = {
            name: sum(row[name] for row in mine) / len(mine) for name in mine[0] if name not in ("case", "moving")
        }
        table.append({"moving": way, "cases": len(mine), **numbers})
    return table


if __name__ == "__main__":
    tyro.cli(Fusion, description=__doc__).run()
