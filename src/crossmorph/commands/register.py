"""``crossmorph register``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from tyro.conf import Positional, UseAppendAction, arg

from crossmorph.errors import InputError
from crossmorph.settings import (
    Descriptor,
    DescriptorName,
    LinearModel,
    LinearSearch,
    Mcbo,
    Settings,
    load_settings,
)

if TYPE_CHECKING:
    from crossmorph.channels import Channel
    from crossmorph.record import Progress
    from crossmorph.result import Result


@dataclass(frozen=True)
class Register:
    """Align one or more moving images to a fixed image.

    Writes warped.nii.gz, forward.h5 and inverse.h5 (ITK transforms), validity.nii.gz, confidence.nii.gz (expected
    error in mm), record.json and report.html into the output folder, all of them or none. Exit code 0: done; 2:
    bad input; 3: done, but the verdict is failed.
    """

    fixed: Positional[Annotated[Path, arg(metavar="FIXED")]]
    """The image whose space the result is in."""

    moving: Positional[Annotated[tuple[Path, ...], arg(metavar="MOVING [MOVING ...]")]]
    """The image to align, or several modalities of one body that share a space."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for the result."""

    channel: UseAppendAction[
        tuple[Annotated[tuple[str, ...], arg(metavar="FIXED MOVING [WEIGHT] [DESCRIPTOR]")], ...]
    ] = ()
    """A further pair of images of the same two bodies, compared in the same objective; as often as wanted. Its
    weight is relative to that of the first images, 1; its descriptor is one of those of --descriptor."""

    system: str = "mcbo"
    """Registration system."""

    preset: str = "default"
    """Name of a preset of the system: default, or the published remind2reg, comulis3dclem, convexadam."""

    settings: Path | None = None
    """TOML file with settings, in place of a preset."""

    descriptor: DescriptorName | None = None
    """What the deformable stage compares, and nothing else: mind (MIND-SSC), macmind, msssc (its first step) or
    disa. By default what the preset says."""

    weights: Path | None = None
    """Folder of a training, or a .safetensors file, for a system that is a trained network."""

    refine: int | None = None
    """Adam steps on the pair itself after a trained network."""

    initial: Path | None = None
    """Linear transform file (fixed to moving points) to start from, in place of the world coordinates."""

    linear: LinearModel | None = None
    """Linear stage: affine (after rigid), one model alone, or none; by default what the preset says."""

    search: LinearSearch | None = None
    """Where the linear stage looks for a start: header (the world coordinates), local (centres and axes of the
    bodies too), global (all orientations too), or auto: each where the one before does not convince. By default
    what the preset says."""

    deformable: bool = True
    """Follow the linear stage by the deformable one."""

    fixed_mask: Path | None = None
    """Only voxels above zero in this volume count (any grid in the world of the fixed image)."""

    moving_mask: Path | None = None
    """The same for the moving images."""

    landmarks: tuple[Path, Path] | None = None
    """Matching landmarks in the fixed and the moving image (.mrk.json, .fcsv, or .csv in RAS mm): two files, in
    this order, matched by name, else by order."""

    landmark_tolerance_mm: float = 2.0
    """How well landmarks were placed: nearer to its match than this, a landmark leaves the rest to the images."""

    landmark_folds: int = 0
    """Register so many times more, each time without a share of the landmarks, for an honest error of each. As
    many folds as landmarks leave out one at a time."""

    fixed_spacing_mm: tuple[float, float, float] | None = None
    """Voxel size along x, y, z of a TIFF or OME-Zarr that does not tell it."""

    moving_spacing_mm: tuple[float, float, float] | None = None
    """The same for the moving images."""

    frame: str = "0"
    """Frame of a 4-D moving image to register, or mean. All frames are warped."""

    memory: Annotated[str, arg(metavar="SIZE")] = ""
    """Memory that the run may use, such as 4GiB; what has to be changed for it is said. See crossmorph plan."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    seed: int = 0
    """Seed of every random choice."""

    overwrite: bool = False
    """Replace an earlier result in the output folder."""

    json: bool = False
    """Print the record as JSON."""

    quiet: bool = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Read, register, write and return the exit code."""
        from crossmorph import files
        from crossmorph.plan import out_of_memory

        files.check_output(self.output, self.overwrite)
        settings = chosen_settings(self.system, self.preset, self.settings, self.linear, self.search, self.memory)
        settings = self._trained(settings)
        if self.descriptor:
            if not isinstance(settings, Mcbo):
                raise InputError(f"--descriptor is for training-free systems; {self.system} is a trained network")
            settings = replace(settings, describe=(Descriptor(self.descriptor),))
        try:
            result = self._result(settings)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"memory ran out ({error or 'no more to be had'}), and nothing was written; close other programs, "
                "or give a limit such as --memory 4GiB; crossmorph plan says what a run needs"
            ) from error
        self._report(result)
        return 3 if result.verdict.status == "failed" else 0

    def _result(self, settings: Settings) -> Result:
        """The registration, written."""
        from crossmorph import io
        from crossmorph.registration import register

        landmarks = (
            (io.read_points(self.landmarks[0]), io.read_points(self.landmarks[1])) if self.landmarks else None
        )
        masks = [io.read_labels(path) if path else None for path in (self.fixed_mask, self.moving_mask)]
        spacings = self.fixed_spacing_mm, self.moving_spacing_mm
        with progress_bar(self.quiet or self.json) as progress:
            result = register(
                io.read(self.fixed, spacing_mm=self.fixed_spacing_mm),
                [io.read(path, spacing_mm=self.moving_spacing_mm) for path in self.moving],
                channels=[parsed_channel(words, *spacings) for words in self.channel],
                settings=settings,
                initial=io.read_transform(self.initial) if self.initial else None,
                deformable=self.deformable,
                fixed_mask=masks[0],
                moving_mask=masks[1],
                landmarks=landmarks,
                landmark_tolerance_mm=self.landmark_tolerance_mm,
                landmark_folds=self.landmark_folds,
                frame=int(self.frame) if self.frame.isdigit() else self.frame,
                device=self.device,
                seed=self.seed,
                progress=progress,
            )
            result.journal.note("command", self._command())
            result.save(self.output, self.overwrite)
        return result

    def _command(self) -> dict[str, Any]:
        """The command line with a word in capitals for every file, and the files."""
        words, files = ["crossmorph", "register"], {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in ("channel", "json", "quiet", "overwrite"):
                continue
            positional = field.name in ("fixed", "moving")
            if not positional:
                words.append(("--no-" if value is False else "--") + field.name.replace("_", "-"))
            for number, item in enumerate(value if isinstance(value, tuple) else (value,), start=1):
                name = field.name.upper() + (f"_{number}" if isinstance(value, tuple) and len(value) > 1 else "")
                if isinstance(item, Path):
                    files[name] = str(item)
                if not isinstance(item, bool):
                    words.append(name if isinstance(item, Path) else str(item))
        for number, (fixed, moving, *rest) in enumerate(self.channel, start=1):
            names = [f"CHANNEL_{number}_{side}" for side in ("FIXED", "MOVING")]
            files |= dict(zip(names, (fixed, moving), strict=True))
            words += ["--channel", *names, *rest]
        return {"line": " ".join(words), "files": files}

    def _trained(self, settings: Settings) -> Settings:
        """The settings with what --weights and --refine say."""
        from crossmorph.settings import Learned

        if isinstance(settings, Learned):
            refine = settings.refine if self.refine is None else self.refine
            return replace(settings, weights=str(self.weights or settings.weights), refine=refine)
        if self.weights or self.refine is not None:
            option = "weights" if self.weights else "refine"
            raise InputError(f"--{option} is for trained networks; {self.system} is none")
        return settings

    def _report(self, result: Result) -> None:
        from rich.console import Console

        if self.json:
            print(json.dumps(result.record))
        elif not self.quiet:
            console = Console(highlight=False, soft_wrap=True, markup=False)
            for image in (result.fixed, *result.movings):
                for note in image.notes:
                    console.print(f"{image.name}: {note}")
            seconds = sum(entry["seconds"] for entry in result.journal.stages)
            memory = result.record["choices"].get("memory", {})
            if memory.get("ran_out"):
                console.print("memory ran out; the deformable stage was run again, smaller")
            for change in memory.get("changes", ()):
                console.print(f"to fit into memory: {change}")
            console.print(f"{self.output}: {result.verdict} in {seconds:.1f} s")


def parsed_channel(
    words: tuple[str, ...],
    fixed_spacing_mm: tuple[float, float, float] | None = None,
    moving_spacing_mm: tuple[float, float, float] | None = None,
) -> Channel:
    """What --channel says, read.

    Raises:
        InputError: it is not two files with perhaps a weight and a descriptor, or a file cannot be read.
    """
    from crossmorph import io
    from crossmorph.channels import Channel

    told = f"--channel takes FIXED MOVING [WEIGHT] [DESCRIPTOR], not {' '.join(words)!r}"
    if not 2 <= len(words) <= 4:
        raise InputError(told)
    known = {name: (Descriptor(name),) for name in get_args(DescriptorName)}
    weight: float = 1.0
    describe: tuple[Descriptor, ...] = ()
    for word in words[2:]:
        try:
            if word in known:
                describe = known[word]
            else:
                weight = float(word)
        except ValueError:
            raise InputError(f"{told}: {word!r} is neither a number nor one of {', '.join(known)}") from None
    fixed, moving = Path(words[0]), Path(words[1])
    return Channel(
        io.read(fixed, spacing_mm=fixed_spacing_mm),
        io.read(moving, spacing_mm=moving_spacing_mm),
        weight,
        describe,
    )


def chosen_settings(
    system: str,
    preset: str,
    file: Path | None,
    model: LinearModel | None,
    search: LinearSearch | None,
    memory: str,
) -> Settings:
    """Settings of a preset or a file, with what the command line says instead."""
    if file and preset != "default":
        raise InputError("give --preset or --settings, not both; a settings file replaces a preset")
    settings = load_settings(system, file or preset)
    linear = settings.linear
    linear = replace(linear, model=model or linear.model, search=search or linear.search)
    settings = replace(settings, linear=linear)
    if not memory:
        return settings
    if not isinstance(settings, Mcbo):
        raise InputError(f"--memory is kept to by training-free systems; {system} is a trained network")
    return replace(settings, memory_gib=parsed_gib(memory))


def parsed_gib(text: str) -> float:
    """A size in words, in GiB: 4GiB, 4G, 3500MiB, 4.2GB; a bare number is GiB.

    Raises:
        InputError: it is no such size.
    """
    units = {"": 1.0, "gib": 1.0, "g": 1.0, "mib": 2.0**-10, "m": 2.0**-10, "gb": 1e9 / 2**30, "mb": 1e6 / 2**30}
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in units or not float(found[1]) > 0:
        raise InputError(f"a memory size is a number above 0 with GiB, MiB, GB or MB, such as 4GiB; not {text!r}")
    return float(found[1]) * units[found[2]]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar with the running stage on a terminal; nothing elsewhere or when quiet."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("reading", total=1.0)
        # A full bar would stop the clock of the whole run, so no stage fills it.
        yield lambda stage, share: bars.update(task, description=stage, completed=min(share, 0.999))
