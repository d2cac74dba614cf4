"""What a report is made of, from a finished registration or from the folder that it left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.files import RECORD
from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.record import file_hash
from crossmorph.space import Grid
from crossmorph.transform import Affine, Chain, DisplacementField, Transform

if TYPE_CHECKING:
    from crossmorph.result import Result

CONFIDENCE = "confidence.nii.gz"
"""The map of expected errors in a result folder."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """A registration and what is known about it.

    Attributes:
        fixed, movings: the single-channel images that were compared.
        transform, inverse: between fixed and moving points; the transform is a displacement where there is one,
            then a linear map.
        record: see docs/record.md.
        confidence: expected error in mm, on any grid of the fixed space.
        labels: of the fixed and of the moving space, with common ids.
        points: matching landmarks of the fixed and of the moving space.
    """

    fixed: Image
    movings: tuple[Image, ...]
    transform: Chain
    inverse: Transform
    record: dict[str, Any]
    confidence: Image | None = None
    labels: tuple[Labels, Labels] | None = None
    points: tuple[Points, Points] | None = None

    @property
    def displacement(self) -> DisplacementField | None:
        """The deformable part of the transform, in the fixed space."""
        first = self.transform.transforms[0]
        return first if isinstance(first, DisplacementField) else None

    @property
    def linear(self) -> Affine:
        """The linear part, which acts after the displacement."""
        last = self.transform.transforms[-1]
        return last if isinstance(last, Affine) else Affine.identity()

    @property
    def initial(self) -> Affine:
        """Where the registration started."""
        return Affine(self.record["initial"])


def evidence_of(
    result: Result,
    record: dict[str, Any] | None = None,
    labels: tuple[Labels, Labels] | None = None,
    points: tuple[Points, Points] | None = None,
) -> Evidence:
    """The evidence of a result in memory; ``record`` spares making it again."""
    return Evidence(
        result.fixed_frame,
        result.moving_frames,
        result.transform,
        result.inverse,
        result.record if record is None else record,
        result.confidence,
        labels,
        points,
    )


def read_evidence(
    out: str | Path,
    fixed: str | Path | None = None,
    movings: tuple[str | Path, ...] = (),
    labels: tuple[Labels, Labels] | None = None,
    points: tuple[Points, Points] | None = None,
) -> Evidence:
    """The evidence in a result folder.

    Args:
        out: folder that ``Result.save`` or ``crossmorph register`` wrote.
        fixed, movings: where the inputs are now; by default the record tells.
        labels, points: see ``Evidence``.

    Raises:
        InputError: this is no result folder, or an input is missing or not the file that was registered.
    """
    out = Path(out)
    record = _record(out)
    entries = [record["inputs"]["fixed"], *record["inputs"]["moving"]]
    if movings and len(movings) != len(entries) - 1:
        raise InputError(f"{out} was made from {len(entries) - 1} moving images, but {len(movings)} were given")
    given = [fixed, *(movings or [None] * (len(entries) - 1))]
    images = [_input(entry, path, out) for entry, path in zip(entries, given, strict=True)]
    frames = [_frame(image, entry["name"], record) for image, entry in zip(images, entries, strict=True)]
    map_ = out / CONFIDENCE
    return Evidence(
        frames[0],
        tuple(frames[1:]),
        Chain((io.read_transform(out / "forward.h5"),)),
        io.read_transform(out / "inverse.h5"),
        record,
        io.read(map_) if map_.is_file() else None,
        labels,
        points,
    )


def _record(out: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_text())
        for image in (record["inputs"]["fixed"], *record["inputs"]["moving"]):
            image["name"], image["file"], image["sha256"]
        record["verdict"]["status"], record["scores"], record["choices"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{out} is no folder of a result: no {RECORD} there can be read ({error})") from None
    return record


def _input(entry: dict[str, Any], given: str | Path | None, out: Path) -> Image:
    path = given or entry["file"]
    advice = "say where it is now with --fixed and --moving"
    if path is None:
        raise InputError(f"{entry['name']} of {out} came from memory, not from a file; {advice}")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}, from which {out} was made, is not there any more; {advice}")
    if path.is_file() and entry["sha256"] not in (None, file_hash(path)):
        raise InputError(f"{path} is not the file that {out} was made from: its SHA-256 differs; {advice}")
    told = Grid(entry["shape"], entry["affine"]).spacing.tolist() if io.suffix_of(path) in io.MICROSCOPY else None
    return io.read(path, spacing_mm=told)


def _frame(image: Image, name: str, record: dict[str, Any]) -> Image:
    if image.channels == 1:
        return image
    frame = record["choices"].get(f"frame of {name}", 0)
    return image.mean_frame() if frame == "mean" else image.frame(int(frame))
