"""A registration from files to a folder: what ``register``, a row of a cohort and a record to rerun share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from crossmorph import io
from crossmorph.channels import Channel
from crossmorph.errors import InputError
from crossmorph.io.paths import existing
from crossmorph.plan import out_of_memory
from crossmorph.points import Points
from crossmorph.record import Progress, content_hash, versions
from crossmorph.registration import register
from crossmorph.result import Result
from crossmorph.settings import (
    SYSTEMS,
    Descriptor,
    DescriptorName,
    Learned,
    Settings,
    from_dict,
    system_of,
    to_dict,
)
from crossmorph.systems.learned import weights_file

FILES = ("fixed", "moving", "initial", "fixed_mask", "moving_mask", "landmarks")
"""Fields of a job that are files."""

Spacing = tuple[float, float, float] | None


@dataclass(frozen=True)
class ChannelFiles:
    """A ``Channel`` as files, with one descriptor or none."""

    fixed: Path
    moving: Path
    weight: float = 1.0
    descriptor: DescriptorName | None = None

    def read(self, fixed_spacing_mm: Spacing = None, moving_spacing_mm: Spacing = None) -> Channel:
        """The channel itself."""
        images = (
            io.read(self.fixed, spacing_mm=fixed_spacing_mm),
            io.read(self.moving, spacing_mm=moving_spacing_mm),
        )
        return Channel(*images, self.weight, (Descriptor(self.descriptor),) if self.descriptor else ())


@dataclass(frozen=True)
class Job:
    """What to register, and how. Every field means what it does in ``registration.register``.

    Attributes:
        fixed, moving: images; several moving ones are modalities of one body.
        settings: of the system.
        channels: further pairs of images.
        initial: linear transform from fixed to moving points.
        fixed_mask, moving_mask: volumes, above zero where voxels count.
        landmarks: one file of matching points (fixed_x to moving_z), or one of each space; none if empty.
        fixed_spacing_mm, moving_spacing_mm: voxel size of microscopy that does not tell it.
    """

    fixed: Path
    moving: tuple[Path, ...]
    settings: Settings
    channels: tuple[ChannelFiles, ...] = ()
    initial: Path | None = None
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    landmarks: tuple[Path, ...] = ()
    deformable: bool = True
    landmark_tolerance_mm: float = 2.0
    landmark_folds: int = 0
    fixed_spacing_mm: Spacing = None
    moving_spacing_mm: Spacing = None
    frame: int | str = 0
    device: str = "auto"
    seed: int = 0

    def save(
        self,
        out: Path,
        overwrite: bool = False,
        progress: Progress | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Result:
        """Read, register and write the folder of a result, all of it or nothing.

        Args:
            out: see ``Result.save``.
            overwrite: replace an earlier result.
            progress: called with (stage, share done).
            notes: more for the record's ``choices``.

        Raises:
            InputError: see ``register`` and ``Result.save``; also where memory ran out.
        """
        try:
            asked = self.request()
            result = self._registered(progress)
            for key, value in {**(notes or {}), "request": asked}.items():
                result.journal.note(key, value)
            result.save(out, overwrite)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"memory ran out ({error or 'no more to be had'}), and nothing was written; close other programs, "
                "or give a limit such as --memory 4GiB; crossmorph plan says what a run needs"
            ) from error
        return result

    def _registered(self, progress: Progress | None) -> Result:
        masks = [io.read_labels(path) if path else None for path in (self.fixed_mask, self.moving_mask)]
        return register(
            io.read(self.fixed, spacing_mm=self.fixed_spacing_mm),
            [io.read(path, spacing_mm=self.moving_spacing_mm) for path in self.moving],
            channels=[files.read(self.fixed_spacing_mm, self.moving_spacing_mm) for files in self.channels],
            settings=self.settings,
            initial=io.read_transform(self.initial) if self.initial else None,
            deformable=self.deformable,
            fixed_mask=masks[0],
            moving_mask=masks[1],
            landmarks=self._points(),
            landmark_tolerance_mm=self.landmark_tolerance_mm,
            landmark_folds=self.landmark_folds,
            frame=self.frame,
            device=self.device,
            seed=self.seed,
            progress=progress,
        )

    def _points(self) -> tuple[Points, Points] | None:
        if len(self.landmarks) == 1:
            return io.read_point_pairs(self.landmarks[0])
        return (io.read_points(self.landmarks[0]), io.read_points(self.landmarks[1])) if self.landmarks else None

    def files(self) -> dict[str, list[Path]]:
        """Every file that the result depends on, by field; ``weights`` are those of a trained network."""
        found = {name: getattr(self, name) for name in FILES}
        found["channels"] = [path for channel in self.channels for path in (channel.fixed, channel.moving)]
        if isinstance(self.settings, Learned) and self.settings.weights:
            weights = weights_file(self.settings.weights)
            found["weights"] = tuple(file for file in (weights, weights.with_suffix(".json")) if file.is_file())
        listed = {name: [some] if isinstance(some, Path) else list(some or ()) for name, some in found.items()}
        return {name: paths for name, paths in listed.items() if paths}

    def request(self) -> dict[str, Any]:
        """The job as plain values, every file with its path and hash; ``from_request`` reads them.

        Raises:
            InputError: a file cannot be read.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*FILES, "settings")}
        values["channels"] = [[channel.weight, channel.descriptor] for channel in self.channels]
        files = {
            name: [{"file": str(path.absolute()), "sha256": _hash(path)} for path in paths]
            for name, paths in self.files().items()
        }
        return {
            "settings": {"system": system_of(self.settings), **to_dict(self.settings)},
            **values,
            "files": files,
        }


def from_request(request: Mapping[str, Any]) -> Job:
    """The job that a record's ``choices.request`` tells of.

    Raises:
        InputError: its settings are not those of this version.
        LookupError, TypeError, ValueError: it is no such request.
    """
    values: dict[str, Any] = {key: _frozen(value) for key, value in request.items()}
    settings, files = dict(request["settings"]), request["files"]
    kind = SYSTEMS[settings.pop("system")]
    for name in FILES:
        paths = tuple(Path(entry["file"]) for entry in files.get(name, ()))
        if paths:
            values[name] = paths if name in ("moving", "landmarks") else paths[0]
    sides = [Path(entry["file"]) for entry in files.get("channels", ())]
    values["channels"] = tuple(
        ChannelFiles(sides[2 * n], sides[2 * n + 1], *terms) for n, terms in enumerate(request["channels"])
    )
    del values["files"]
    return Job(**{**values, "settings": from_dict(kind, settings, "the record")})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def same_work(request: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a record is of the same request: settings, contents of files and version; paths do not matter."""
    earlier = record.get("choices", {}).get("request")
    if earlier is None or record.get("versions", {}).get("crossmorph") != versions()["crossmorph"]:
        return False
    return _essence(request) == _essence(earlier)


def changed_files(request: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Fields whose files have other contents in two requests."""
    one, other = (_essence(asked)["files"] for asked in (request, earlier))
    return [name for name in one | other if one.get(name) != other.get(name)]


def _essence(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request without paths, in the types that JSON knows."""
    files = {name: [entry["sha256"] for entry in some] for name, some in request["files"].items()}
    settings = {
        key: value for key, value in request["settings"].items() if key != "weights" or "weights" not in files
    }
    essence: dict[str, Any] = json.loads(json.dumps({**request, "settings": settings, "files": files}))
    return essence


def _hash(path: Path) -> str:
    path = existing(path, folders=True)
    if path.is_dir():  # its time does not tell whether its files changed
        return content_hash(path)
    stat = path.stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, changed_ns: int) -> str:
    """A template is one of many pairs; it is read for its hash once."""
    return content_hash(path)
