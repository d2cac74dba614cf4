"""``crossmorph train``: DISA's descriptors, and registration networks."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import OmitSubcommandPrefixes, Positional, arg, subcommand

from crossmorph.errors import InputError

if TYPE_CHECKING:
    from crossmorph.train.patches import Volume
    from crossmorph.train.settings import Training

    Report = Callable[[str, float, dict[str, float]], None]


@dataclass(frozen=True)
class TrainDisa:
    """Train DISA: descriptors whose dot product is the LC2 similarity of two patches, for any pair of modalities.

    Volumes need no registration and no labels; several modalities of a subject are best. Patches are compared
    between the volumes of one subject, and whole subjects are kept out for validation. The folder gets
    weights.safetensors and weights.json (the best so far), metrics.csv and, where tensorboard is installed, its
    files. Stopped with Ctrl-C or killed, it goes on with --resume from its last save, a few minutes ago at most.
    """

    volumes: Positional[Annotated[tuple[Path, ...], arg(metavar="VOLUME [VOLUME ...]")]]
    """Volumes of at least two subjects."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for the training and its weights."""

    subject_pattern: str | None = None
    """Regular expression that finds the subject in a volume's path; its first group if it has one. Default: the
    folder that the volume lies in."""

    unseen: str | None = None
    """Regular expression: keep these subjects for validation. Default: the last tenth by name, at least one."""

    schedule: Literal["paper", "gpu", "cpu"] = "paper"
    """paper: as published, for hours of a GPU. Reduced schedules: gpu, some minutes of one; cpu, about an hour
    on one core."""

    steps: int | None = None
    """Optimiser steps in place of the schedule's."""

    seed: int | None = None
    """Seed of every random choice, in place of the schedule's."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""

    licence: str = ""
    """Licence of the weights and credits of the data, for weights.json."""

    resume: bool = False
    """Go on with the training in the output folder."""

    quiet: bool = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Read, train and return the exit code."""
        from crossmorph.describe.disa import SPACING_MM
        from crossmorph.device import chosen_device
        from crossmorph.train.disa import SCHEDULES, train_disa

        chosen = {name: value for name in ("steps", "seed") if (value := getattr(self, name)) is not None}
        settings = replace(SCHEDULES[self.schedule], **chosen).check()
        seen, unseen = self._split()
        device = str(chosen_device(self.device))
        _make_folder(self.output, self.resume)
        about = {
            "schedule": self.schedule + (f" with {chosen}" if chosen else ""),
            "preprocessing": {"spacing_mm": SPACING_MM, "values": "z-scored over valid voxels, 0 elsewhere"},
            "licence": self.licence or "not stated",
        }
        with _shown(self.quiet) as progress:
            volumes = self._read(seen, settings.spacing_mm, progress)
            held = self._read(unseen, settings.spacing_mm, progress)
            best = train_disa(volumes, held, self.output, settings, about, self.resume, device, progress)
        if not self.quiet:
            print(
                f"{self.output / 'weights.safetensors'}: squared error {best['error']:.4f} on unseen subjects "
                f"(guessing the mean: {best['error_of_mean']:.4f})"
            )
        return 0

    def _split(self) -> tuple[dict[Path, str], dict[Path, str]]:
        """Volumes with their subjects: to learn from, and to validate on."""
        if len(self.volumes) < 2:
            raise InputError(
                f"training needs at least two volumes of different subjects; {len(self.volumes)} given"
            )
        subjects = {path: self._subject(path) for path in self.volumes}
        names = sorted(set(subjects.values()))
        if self.unseen is None:
            kept = set(names[-max(1, len(names) // 10) :])
        else:
            kept = {name for name in names if _compiled(self.unseen, "--unseen").search(name)}
        if not kept or len(kept) == len(names):
            raise InputError(
                f"some subjects are needed to learn from and some to validate on; all {len(names)} "
                f"({', '.join(names[:5])}) are on one side. Say with --subject-pattern what a subject is, and "
                "with --unseen which to keep apart"
            )
        sides = [{p: s for p, s in subjects.items() if (s in kept) == side} for side in (False, True)]
        return sides[0], sides[1]

    def _subject(self, path: Path) -> str:
        if self.subject_pattern is None:
            return path.absolute().parent.name
        pattern = _compiled(self.subject_pattern, "--subject-pattern")
        found = pattern.search(path.as_posix())
        if found is None:
            raise InputError(f"--subject-pattern {self.subject_pattern} finds nothing in {path}")
        return found[1] if pattern.groups else found[0]

    def _read(self, subjects: dict[Path, str], spacing_mm: float, progress: Report) -> list[Volume]:
        from crossmorph import io
        from crossmorph.train.patches import prepared

        volumes = []
        for done, (path, subject) in enumerate(subjects.items()):
            progress("reading", done / len(subjects), {})
            volumes.append(prepared(io.read(path), subject, spacing_mm))
        return volumes


@dataclass(frozen=True)
class TrainPairs:
    """Train a registration network on pairs of volumes, or on volumes that are paired on the fly."""

    system: ClassVar[str]

    pairs: Positional[Annotated[Path, arg(metavar="PAIRS.csv|synthetic")]]
    """Table with the columns fixed and moving (fixed_labels, moving_labels, fixed_mask, moving_mask, points,
    initial and split if wanted), or image (labels, mask, split); paths are relative to it. The word synthetic:
    generated pairs alone."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for the training and its weights."""

    preset: str = "default"
    """Name of a preset of the training."""

    config: Path | None = None
    """TOML file with settings, in place of a preset."""

    steps: int | None = None
    """Optimiser steps in place of the settings'."""

    seed: int | None = None
    """Seed of every random choice, in place of the settings'."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""

    devices: int = 1
    """Processes that share each batch: GPUs, or processes on the CPU. Under torchrun those that it started."""

    cache: Path | None = None
    """Folder for prepared volumes; default: OUTPUT/cache. Trainings with equal preprocessing can share one."""

    save_seconds: float = 240.0
    """A state to go on from is saved at least this often."""

    licence: str = ""
    """Licence of the weights and credits of the data, for weights.json."""

    resume: bool = False
    """Go on with the training in the output folder."""

    quiet: bool = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Prepare, train and return the exit code."""
        from crossmorph.device import chosen_device
        from crossmorph.train.loop import WEIGHTS, start_fabric
        from crossmorph.train.pairs import load_data
        from crossmorph.train.registration import generated, train_registration, validation_words

        settings = self._settings()
        fabric = start_fabric(chosen_device(self.device).type, self.devices, settings.precision)
        if fabric.is_global_zero:
            _make_folder(self.output, self.resume)
        fabric.barrier()
        with _shown(self.quiet or not fabric.is_global_zero) as progress:
            if str(self.pairs) == "synthetic":
                data = generated(settings)
            else:
                cache = self.cache or self.output / "cache"
                with fabric.rank_zero_first():
                    data = load_data(self.pairs, settings.preprocessing, cache, progress)
            about: dict[str, Any] = {"licence": self.licence or "not stated"}
            best = train_registration(
                self.system, settings, data, self.output, fabric, about, self.resume, self.save_seconds, progress
            )
        if fabric.is_global_zero and not self.quiet:
            print(f"{self.output / WEIGHTS}: {validation_words(best)} at step {best['step']}")
        return 0

    def _settings(self) -> Training:
        from crossmorph.settings import read_settings
        from crossmorph.train.settings import TRAININGS

        if self.config and self.preset != "default":
            raise InputError("give --preset or --config, not both; a settings file replaces a preset")
        found = read_settings(TRAININGS[self.system], f"{self.system}-training", self.config or self.preset)
        chosen = {name: value for name in ("steps", "seed") if (value := getattr(self, name)) is not None}
        return replace(found, **chosen)


@dataclass(frozen=True)
class TrainGradientGuidance(TrainPairs):
    """Train the dual branch with gated fusion (Xu et al. 2021), or what the paper compares it with.

    The folder gets weights.safetensors and weights.json (the best so far by Dice, landmarks or loss), last.* (of
    the last validation), metrics.csv and, where tensorboard is installed, its files. Stopped with Ctrl-C or
    killed, it goes on with --resume from its last save.
    """

    system: ClassVar[str] = "gradient-guidance"


@dataclass(frozen=True)
class TrainLumir(TrainPairs):
    """Train the encoder-only pyramid (Zhang et al. 2024) on pairs of one modality; presets name its variants.

    The folder gets what that of gradient-guidance gets, and goes on with --resume like it.
    """

    system: ClassVar[str] = "lumir"


@dataclass(frozen=True)
class TrainMacJNet(TrainPairs):
    """Train a registration network and two segmenters that learn from each other (Zhou et al. 2023).

    The table needs pairs of two modalities; some of them with labels on both sides, or the registration is trained
    alone. The folder gets what that of gradient-guidance gets, and goes on with --resume like it.
    """

    system: ClassVar[str] = "macjnet"


@dataclass(frozen=True)
class Train:
    """Train a network on your own volumes."""

    what: OmitSubcommandPrefixes[
        Annotated[TrainDisa, subcommand("disa")]
        | Annotated[TrainGradientGuidance, subcommand("gradient-guidance")]
        | Annotated[TrainLumir, subcommand("lumir")]
        | Annotated[TrainMacJNet, subcommand("macjnet")]
    ]
    """What to train."""

    def run(self) -> int:
        """Train and return the exit code."""
        return self.what.run()


def _make_folder(output: Path, resume: bool) -> None:
    from crossmorph.train.loop import STATE

    if not resume and (output / STATE).exists():
        raise InputError(f"{output} holds a training already; add --resume to go on, or give another folder")
    if resume and not output.is_dir():
        raise InputError(f"there is no training to go on with: {output} is not a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}; give another folder") from error


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{option} {pattern!r} is no regular expression: {error}") from error


@contextmanager
def _shown(quiet: bool) -> Iterator[Report]:
    """A bar with the newest numbers on a terminal; elsewhere a line on stderr for each validation."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda stage, share, numbers: None
    elif not console.is_terminal:
        last: list[float | None] = [None]

        def line(stage: str, share: float, numbers: dict[str, float]) -> None:
            if "error" in numbers and math.isfinite(numbers["error"]) and numbers["error"] != last[0]:
                last[0] = numbers["error"]
                print(f"{stage} {share:.1%}: {_words(numbers)}", file=sys.stderr, flush=True)

        yield line
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task("reading", total=1.0)
            yield lambda stage, share, numbers: bars.update(
                task, description=f"{stage} {_words(numbers)}", completed=min(share, 0.999)
            )


SHOWN = ("loss", "registration_loss", "segmentation_loss", "error", "dice", "tre_mm")


def _words(numbers: dict[str, float]) -> str:
    return " ".join(f"{name} {numbers[name]:.4f}" for name in SHOWN if name in numbers)
