"""``crossmorph report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crossmorph.errors import InputError


@dataclass(frozen=True)
class Report:
    """Write report.html anew in the folder of a registration, with labels and landmarks if they are given.

    The page shows the verdict, both images in three linked planes, what the transform does, and every number of
    the run. It is one file that needs no network and holds no name, path or other free text of the inputs.
    """

    outputs: Positional[Annotated[tuple[Path, ...], arg(metavar="OUT [OUT ...]")]]
    """Folders that `crossmorph register` wrote."""

    fixed: Path | None = None
    """Where the fixed image is now, if it was moved since."""

    moving: tuple[Path, ...] = ()
    """Where the moving images are now, if they were moved since."""

    labels: Annotated[tuple[Path, Path] | None, arg(metavar="FIXED MOVING")] = None
    """Label maps of both spaces: contours, and the overlap of every label."""

    landmarks: Annotated[tuple[Path, ...], arg(metavar="FIXED MOVING")] = ()
    """Matching landmarks of both spaces, in the same order, or one file with fixed_x to moving_z: their errors."""

    def run(self) -> int:
        """Read, draw, write and return the exit code."""
        from crossmorph import io
        from crossmorph.report.evidence import read_evidence
        from crossmorph.report.page import REPORT, write_report

        if len(self.outputs) > 1 and (self.fixed or self.moving or self.labels or self.landmarks):
            raise InputError("--fixed, --moving, --labels and --landmarks belong to one result; give one folder")
        if len(self.landmarks) > 2:
            raise InputError(f"--landmarks takes one or two files, not {len(self.landmarks)}")
        labels = points = None
        if self.labels:
            labels = io.read_labels(self.labels[0]), io.read_labels(self.labels[1])
        if len(self.landmarks) == 1:
            points = io.read_point_pairs(self.landmarks[0])
        elif self.landmarks:
            first, second = self.landmarks  # more than two are refused before
            points = io.read_points(first), io.read_points(second)
        for out in self.outputs:
            evidence = read_evidence(out, self.fixed, self.moving, labels, points)
            print(write_report(evidence, out / REPORT))
        return 0
