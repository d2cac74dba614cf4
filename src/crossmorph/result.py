"""What a registration gives back. Costly parts are made when first asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossmorph.channels import Channel
from crossmorph.confidence import expected_error
from crossmorph.evaluate.similarity import normalised_mutual_information
from crossmorph.files import RECORD, atomic_directory
from crossmorph.image import Image, Labels
from crossmorph.match.recheck import recheck
from crossmorph.optimise.terms import lengths
from crossmorph.preprocess import MIN_VOXELS
from crossmorph.record import Journal, file_hash, machine, versions
from crossmorph.resample import blurred_like, downsample, resample, world_blocks
from crossmorph.settings import Settings, system_of, to_dict
from crossmorph.space import Grid, overlap_fraction
from crossmorph.transform import Affine, Chain, DisplacementField, Transform, folding, jacobian_determinant
from crossmorph.verdict import Verdict, judge

SCORE_VOXELS = 1_000_000
"""Scores are taken on the fixed grid, made coarser where it has more voxels than this."""


@dataclass(frozen=True, eq=False)
class Result:
    """A finished registration.

    Attributes:
        channels: the images that were compared, restricted to their masks; the first fixed one gives the space.
        frames: the same with the one frame of each image that was looked at.
        transform: from fixed to moving points; a displacement where there is one, then the linear part.
        initial: where the linear stage was told to start.
        settings: as used, nothing left to defaults.
        journal: seconds and memory a stage, and what was chosen automatically.
        seed, device: of the run.
        segmentations: labels of the ``"fixed"`` and the ``"moving"`` image, from a system that finds them.
    """

    channels: tuple[Channel, ...]
    frames: tuple[Channel, ...]
    transform: Chain
    initial: Affine
    settings: Settings
    journal: Journal
    seed: int
    device: str
    segmentations: Mapping[str, Labels] = field(default_factory=dict)

    @property
    def fixed(self) -> Image:
        """The (first) fixed image."""
        return self.channels[0].fixed

    @property
    def movings(self) -> tuple[Image, ...]:
        """The moving images of all channels."""
        return tuple(channel.moving for channel in self.channels)

    @property
    def fixed_frame(self) -> Image:
        """The frame of the (first) fixed image that was looked at."""
        return self.frames[0].fixed

    @property
    def moving_frames(self) -> tuple[Image, ...]:
        """Those of the moving images."""
        return tuple(frame.moving for frame in self.frames)

    @property
    def displacement(self) -> DisplacementField | None:
        """The deformable part of the transform, in the fixed space; None where there is none."""
        first = self.transform.transforms[0]
        return first if isinstance(first, DisplacementField) else None

    @property
    def linear(self) -> Affine:
        """The linear part, which acts after the displacement."""
        last = self.transform.transforms[-1]
        assert isinstance(last, Affine)
        return last

    @cached_property
    def inverse(self) -> Transform:
        """From moving to fixed points."""
        return self.transform.inverse()

    @cached_property
    def warped(self) -> Image:
        """The (first) moving image on the fixed grid, all frames."""
        return self.warp(self.movings[0])

    def warp(self, moving: Image) -> Image:
        """An image of the moving space on the fixed grid."""
        return self.transform.apply(moving, like=self.fixed)

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Agreement before and after, and how regular the transform is.

        ``nmi``: normalised mutual information (H(a) + H(b)) / H(a, b) of each moving image with its fixed one,
        where both are valid before (at the initial pose) and after. ``overlap``: share of the fixed valid voxels
        that see valid moving data. ``folded``: share of them with a Jacobian of at most zero. ``jacobian``:
        smallest and largest.
        ``worst_place_mm``: where it is smallest, RAS. ``size_mm``: longest edge of the fixed field of view.
        ``confirmed``, ``mirrored_cost_ratio``: of each moving image, from a second look (``match.recheck``): the
        share of the body that a new search leaves in place, and the cost with left and right exchanged over that
        without.
        ``agreement``: of the search forth and back at the start (``match.pose.Step``); None without linear stage.
        ``inverse_residual_mm``: |T(T^-1(y)) - y| at the moving voxels y that T^-1 sends into the fixed field of
        view, ``displacement_mm``: lengths of the deformable part on the fixed valid voxels, and ``moved_mm``: how
        far these came from where the initial pose puts them; median, 95th percentile and largest.
        """
        fixed = _at_most(self.fixed_frame, SCORE_VOXELS)
        coarse = fixed.grid
        seen = [
            (
                fixed if pair.fixed is self.fixed_frame else downsample(pair.fixed, coarse),
                resample(blurred_like(pair.moving, coarse), coarse, self.initial),
                resample(blurred_like(pair.moving, coarse), coarse, self.transform),
            )
            for pair in self.frames
        ]
        determinant = jacobian_determinant(self.transform, coarse)
        dense = self.displacement
        worst = (determinant.masked_fill(~fixed.valid, torch.inf) == determinant[fixed.valid].min()).nonzero()[0]
        looks = {
            pair.moving.name: recheck(_at_most(pair.fixed, SCORE_VOXELS), pair.moving, self.transform)
            for pair in self.frames
        }
        length = lengths(dense.displacements(coarse))[fixed.valid] if dense else torch.zeros(1)
        return {
            "nmi": {
                after.name: dict(zip(("before", "after"), _nmi(target, before, after), strict=True))
                for target, before, after in seen
            },
            "overlap": float((fixed.valid & seen[0][2].valid).sum() / fixed.valid.sum()),
            "folded": folding(determinant, fixed.valid),
            "jacobian": [float(determinant[fixed.valid].min()), float(determinant[fixed.valid].max())],
            "worst_place_mm": coarse.to_world(worst.double()).round(decimals=1).tolist(),
            "size_mm": round(float(self.fixed.grid.extent_mm.max()), 1),
            "confirmed": {name: round(look.confirmed, 4) for name, look in looks.items()},
            "mirrored_cost_ratio": {
                name: round(look.mirrored_cost / max(look.cost, 1e-9), 4) for name, look in looks.items()
            },
            "inverse_residual_mm": _spread(self._inverse_residuals()),
            "displacement_mm": _spread(length),
            "agreement": self.journal.notes.get("start", {}).get("agreement"),
            "moved_mm": _spread(self._motion(coarse)[fixed.valid.flatten()]),
        }

    def _motion(self, grid: Grid) -> torch.Tensor:
        """(N,) mm between where the initial pose and the transform put the voxel centres of a grid."""
        parts = [(self.transform(p) - self.initial(p)).norm(dim=1) for _, p in world_blocks(grid, "cpu")]
        return torch.cat(parts)

    def _inverse_residuals(self) -> torch.Tensor:
        """(N,) mm at the voxel centres of the moving grid, or of a coarser one."""
        grid = _coarsened(self.movings[0].grid, SCORE_VOXELS)
        parts = []
        for _, there in world_blocks(grid, "cpu"):
            here = self.inverse(there)
            seen = torch.from_numpy(self.fixed.grid.contains(here.numpy()))
            parts.append((self.transform(here[seen]) - there[seen]).norm(dim=1))
        return torch.cat(parts)

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the result can be trusted, with reasons."""
        return judge(self.scores, self.fixed.grid.spacing.tolist())

    @cached_property
    def confidence(self) -> Image:
        """Expected error of the transform in mm, on the fixed grid; see ``confidence.expected_error``.

        Of several channels the one that tells most counts, place by place.
        """
        maps = [
            resample(expected_error(pair.fixed, pair.moving, self.transform), self.fixed.grid, fill=0.0)
            for pair in self.frames
        ]
        known = torch.stack([map_.valid for map_ in maps])
        errors = torch.stack([map_.data for map_ in maps]).masked_fill(~known[:, None], torch.inf).amin(0)
        valid = known.any(0)
        return replace(maps[0], data=errors.masked_fill(~valid, 0.0), valid=valid)

    @property
    def record(self) -> dict[str, Any]:
        """Everything about the run as plain values; see docs/record.md."""
        settings = {"system": system_of(self.settings), **to_dict(self.settings)}
        return {
            "verdict": {"status": self.verdict.status, "reasons": list(self.verdict.reasons)},
            "scores": self.scores,
            "choices": self.journal.notes,
            "settings": settings,
            "seed": self.seed,
            "device": self.device,
            "inputs": {
                "fixed": _described(self.fixed),
                "moving": [_described(image) for image in self.movings],
                "channels": [
                    {"fixed": _described(channel.fixed), "moving": channel.moving.name, **channel.record()}
                    for channel in self.channels
                    if channel.fixed is not self.fixed
                ],
            },
            "box_overlap": [overlap_fraction(self.fixed.grid, image.grid) for image in self.movings],
            "initial": self.initial.matrix.tolist(),
            "linear": self.linear.matrix.tolist(),
            "segmentations": {
                side: {"file": labels_file(side), "volumes_mm3": labels.volumes_mm3}
                for side, labels in self.segmentations.items()
            },
            "outputs": self.journal.outputs,
            "stages": self.journal.stages,
            "versions": versions(),
            "machine": machine(),
        }

    def save(self, out: str | Path, overwrite: bool = False) -> Path:
        """Write the folder of a result, all of it or nothing.

        ``warped.nii.gz`` (or one ``warped_<name>.nii.gz`` a moving image), ``validity.nii.gz``, ``forward.h5`` and
        ``inverse.h5`` (ITK composite transforms), ``record.json``, and ``report.html`` (see docs/report.md);
        ``fixed_labels.nii.gz`` and ``moving_labels.nii.gz`` where the system segments.

        Raises:
            InputError: ``out`` exists and ``overwrite`` is not set, or it cannot be written.
        """
        from crossmorph import io
        from crossmorph.report.evidence import CONFIDENCE, evidence_of
        from crossmorph.report.page import REPORT, write_report

        with self.journal.stage("warp"):
            warped = [self.warped if n == 0 else self.warp(image) for n, image in enumerate(self.movings)]
            supported = self.fixed.valid & warped[0].valid
            whole = torch.ones_like(supported)
            validity = Image(supported[None].float(), self.fixed.grid, whole, dtype=np.dtype(np.uint8))
            inverse = self.inverse
        with self.journal.stage("confidence"):
            confidence = self.confidence
        with atomic_directory(out, overwrite) as folder:
            with self.journal.stage("write"):
                for image in warped:
                    name = "warped" if len(warped) == 1 else f"warped_{image.name}"
                    io.write(image, folder / f"{name}.nii.gz")
                for side, labels in self.segmentations.items():
                    io.write(labels, folder / labels_file(side))
                io.write(validity, folder / "validity.nii.gz")
                io.write(_hundredths(confidence), folder / CONFIDENCE)
                io.write_transform(self.transform, folder / "forward.h5")
                io.write_transform(inverse, folder / "inverse.h5")
            hashes = {file.name: file_hash(file) for file in sorted(folder.glob("*.nii.gz"))}
            transforms = {"forward.h5": values_hash(self.transform), "inverse.h5": values_hash(inverse)}
            self.journal.outputs = {**hashes, **transforms}
            record = self.record
            with self.journal.stage("report"):
                write_report(evidence_of(self, record), folder / REPORT)
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        return Path(out)

    def __repr__(self) -> str:
        return f"Result({self.fixed.name} <- {', '.join(m.name for m in self.movings)}: {self.verdict})"

    def _repr_html_(self) -> str:
        """Three slices and the scores, in a notebook."""
        from crossmorph.report.notebook import result_html

        return result_html(self)


def labels_file(side: str) -> str:
    """Name in a result folder of the segmentation of the ``"fixed"`` or the ``"moving"`` image."""
    return f"{side}_labels.nii.gz"


def values_hash(transform: Transform) -> str:
    """SHA-256 of what a transform holds; that of its HDF5 file would change with the time of writing."""
    digest = hashlib.sha256()
    for link in transform.transforms if isinstance(transform, Chain) else (transform,):
        if isinstance(link, DisplacementField):
            digest.update(link.field.contiguous().numpy().tobytes() + link.grid.affine.tobytes())
        else:
            assert isinstance(link, Affine)
            digest.update(link.matrix.tobytes())
    return digest.hexdigest()


def _hundredths(errors: Image) -> Image:
    """Whole hundredths of a mm, which files pack well; NaN where nothing is known."""
    rounded = (errors.data * 100).round() / 100
    return replace(errors, data=torch.where(errors.valid, rounded, torch.nan))


def _at_most(image: Image, voxels: int) -> Image:
    """The image, made coarser where it has more voxels, unless its mask is too thin for that."""
    grid = _coarsened(image.grid, voxels)
    if grid is image.grid:
        return image
    coarse = downsample(image, grid)
    return coarse if coarse.valid.any() else image


def _coarsened(grid: Grid, voxels: int) -> Grid:
    """The same field of view in about ``voxels`` voxels where it has more."""
    shrink = (np.prod(grid.shape) / voxels) ** (1 / 3)
    return grid if shrink <= 1 else grid.resized([max(2, round(n / shrink)) for n in grid.shape])


def _nmi(fixed: Image, before: Image, after: Image) -> list[float | None]:
    """Before and after, where both are seen; None where too little is, or an image is constant there."""
    common = fixed.valid & before.valid & after.valid
    if int(common.sum()) >= MIN_VOXELS:
        return [_information(fixed, moved, common) for moved in (before, after)]
    return [None, _information(fixed, after, fixed.valid & after.valid)]


def _information(fixed: Image, moved: Image, where: torch.Tensor) -> float | None:
    if int(where.sum()) < MIN_VOXELS:
        return None
    value = normalised_mutual_information(fixed, moved, where.numpy(), bins=32)
    return None if math.isnan(value) else round(value, 4)


def _spread(lengths: torch.Tensor) -> dict[str, float]:
    if not lengths.numel():
        return {"median": 0.0, "p95": 0.0, "max": 0.0}
    median, p95, largest = np.percentile(lengths.numpy(), (50, 95, 100))
    return {"median": round(float(median), 4), "p95": round(float(p95), 4), "max": round(float(largest), 4)}


def _described(image: Image) -> dict[str, Any]:
    source = image.source
    return {
        "name": image.name,
        "file": str(source) if source else None,
        "sha256": file_hash(source) if source and source.is_file() else None,
        "shape": list(image.grid.shape),
        "channels": image.channels,
        "affine": image.grid.affine.tolist(),
        "axes": image.grid.axcodes,
        "valid_voxels": int(image.valid.sum()),
        "notes": list(image.notes),
    }
