"""``crossmorph evaluate``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from crossmorph.errors import InputError

if TYPE_CHECKING:
    from crossmorph.evaluate.cases import CaseFiles


@dataclass(frozen=True)
class Evaluate:
    """Score a registration, of this or any other program, with the truth that you have.

    Landmarks give TRE; two label maps give Dice, HD95, ASD and their relatives; the fixed image or labels give
    folding, SDlogJ and NDV of the transform; both images give MI, NMI, NCC, LNCC and SSIM. A table of cases
    (--cases) gives one row a case and a summary.
    """

    transform: Positional[str] = ""
    """Maps fixed to moving points: a transform file (.h5, .tfm, .nii.gz, .npz ...) or the word identity."""

    fixed: Path | None = None
    """Fixed image."""

    moving: Path | None = None
    """Moving image, for the similarity of the warped one."""

    fixed_labels: Path | None = None
    """Labels of the fixed image."""

    moving_labels: Path | None = None
    """Labels of the moving image, before warping, on any grid."""

    points: Path | None = None
    """CSV of landmarks in RAS mm: fixed_x, fixed_y, fixed_z, moving_x, moving_y, moving_z."""

    moving_points: Path | None = None
    """With this, --points holds the fixed landmarks alone (x, y, z) and this CSV their partners row by row."""

    mask: Path | None = None
    """Where regularity and similarity look, in the fixed world. Default: the foreground of the fixed labels."""

    labels: str = "all"
    """Ids to score, such as 1,2,3, or a text file of ids."""

    convention: Literal["itk", "learn2reg", "channels-last", "channels-first", "half-resolution"] = "itk"
    """How to read the transform: as ITK does, or as a Learn2Reg field in voxels (layout guessed or named)."""

    thresholds_mm: tuple[float, ...] = (2.0, 5.0)
    """Report the share of landmarks with an error below these."""

    voxel_distances: bool = False
    """HD95 and ASD in voxels, as Learn2Reg prints them, instead of mm."""

    cases: Path | None = None
    """CSV with the columns id, transform and any of the options above (underscores for dashes), and subject."""

    output: Annotated[Path | None, arg(aliases=("-o",))] = None
    """Folder for cases.csv, labels.csv, summary.csv, summary.md, summary.tex and record.json."""

    overwrite: bool = False
    """Replace an earlier evaluation in --output."""

    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Score, print, write and return the exit code; 2 where a case of a table failed."""
        from crossmorph.evaluate.cases import Report, score_cases, to_json
        from crossmorph.evaluate.tables import markdown
        from crossmorph.files import check_output

        if bool(self.transform) == bool(self.cases):
            raise InputError("give a transform (or the word identity) or a table with --cases, one of them")
        if self.output:
            check_output(self.output, self.overwrite)
        if self.cases:
            report = score_cases(
                self.cases, self.thresholds_mm, self.voxel_distances, lambda line: print(line, file=sys.stderr)
            )
        else:
            report = Report([], [])
            report.add(
                {"id": Path(self.transform).name}, self._single().score(self.thresholds_mm, self.voxel_distances)
            )
        if self.output:
            report.save(self.output, self.overwrite)
        if self.json:
            print(to_json({"cases": report.cases, "labels": report.labels, "summary": report.summary()}), end="")
        elif self.cases:
            columns = ("metric", "n", "undefined", "mean", "std", "p05", "p50", "p95")
            print(markdown([{name: row[name] for name in columns if name in row} for row in report.summary()]))
        else:
            print(markdown([{"metric": name, "value": value} for name, value in report.cases[0].items()]))
        return 2 if report.failed else 0

    def _single(self) -> CaseFiles:
        from crossmorph.evaluate.cases import CaseFiles

        names = ("fixed", "moving", "fixed_labels", "moving_labels", "points", "moving_points", "mask")
        paths = {name: str(getattr(self, name) or "") for name in names}
        return CaseFiles(self.transform, **paths, labels=self.labels, convention=self.convention)
