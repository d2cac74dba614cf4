"""Settings: frozen dataclasses that are the Python argument, the command line, the TOML preset and the record."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from crossmorph.errors import InputError

PRESETS = Path(__file__).parent / "presets"

LinearModel = Literal["none", "translation", "rigid", "similarity", "affine"]
LinearSearch = Literal["auto", "header", "local", "global"]
DescriptorName = Literal["mind", "msssc", "macmind", "disa"]

S = TypeVar("S")


@dataclass(frozen=True)
class Refinement:
    """One continuous refinement by Adam; several follow each other from coarse to fine."""

    level: int = 2
    """Descriptors are average-pooled by this many working voxels."""

    control: int = 1
    """Distance of the control points in pooled cells; wide ones fit smooth motion and ignore noise."""

    iterations: int = 40
    """Adam steps; where the smoothness is chosen, half for each candidate and half in the end."""

    smoothness: float = 1.25
    """Weight of the squared gradient of the displacement; 0 chooses it from the images."""

    anchored: bool = False
    """Charge only for the change this refinement makes, not for the displacement it starts from."""

    similarity: Literal["mind", "lncc", "mi", "auto"] = "mind"
    """MIND-SSC, local correlation or mutual information of the images; auto takes local correlation where it shows
    detail, else MIND-SSC."""

    learning_rate: float = 0.3
    """Adam's, in control cells."""

    fold_weight: float = 50.0
    """Weight of the penalty on local volumes below 0.3; 0 for none."""


@dataclass(frozen=True)
class Linear:
    """The linear stage before the deformable one."""

    model: LinearModel = "affine"
    """What is fitted: affine after rigid, one model alone, or none: the start is taken as it is."""

    search: LinearSearch = "auto"
    """Where to start from: header, the world coordinates of the files; local, these and the centres and principal
    axes of the bodies; global, all orientations too; auto, each only where the one before does not convince."""

    similarity: Literal["mi", "mind", "msssc", "disa", "lc2", "ncc"] = "mi"
    """What the fine fit makes large: mutual information, MIND-SSC, msSSC (of macMIND), DISA or LC2 (slow), or
    squared correlation."""

    random_starts: int = 0
    """Random poses that are tried as well; the published search of DISA takes 500."""

    random_deg: float = 40.0
    """Largest angle about each axis of a random pose."""

    random_mm: float = 150.0
    """Largest shift along each axis of a random pose."""


@dataclass(frozen=True)
class Descriptor:
    """One of the descriptors that the deformable stage compares; several are weighted in one objective."""

    name: DescriptorName | Callable[..., Any] = "mind"
    """MIND-SSC, macMIND or its first step msSSC, compared by squared difference, or DISA, by dot product: weight
    (1 - f . m). In Python also a function (``describe.own.OwnDescriptor``), compared by squared difference."""

    weight: float = 1.0
    """Factor of its cost. MIND-SSC, msSSC, macMIND and functions from 0 to 1 cost 0 to 12, DISA 0 to 1."""

    stride: int = 2
    """DISA: working voxels from one descriptor to the next: 4, 2 or 1; linear between them."""


@dataclass(frozen=True)
class Mcbo:
    """Training-free registration by multilevel correlation balanced optimisation (MCBO)."""

    linear: Linear = Linear()
    """The stage before."""

    spacing_mm: float = 0.0
    """Working voxel size. 0: the finest spacing that both images have, within 1.5 and 8 million voxels."""

    memory_gib: float = 0.0
    """Memory that the process may use, in GiB; settings that need more are changed, and the record says how.
    0: cost volumes are cut so that the machine's free memory suffices; nothing else is changed."""

    describe: tuple[Descriptor, ...] = (Descriptor(),)
    """What is compared."""

    mind_radius: int = 1
    """Patch radius of MIND-SSC in working voxels."""

    mind_dilation: int = 2
    """Distance of the compared neighbours in working voxels."""

    levels: tuple[int, ...] = (6,)
    """Discrete levels: the descriptors are average-pooled by these many working voxels. Empty: no search."""

    half_width: int = 4
    """Reach of the discrete search in cells of a level."""

    weights: tuple[float, ...] = ()
    """Weights of the levels in a weighted sum (published). Empty: each level refines the one before."""

    balanced: bool = True
    """Average the six iterates of the coupled convex optimisation (MCBO) instead of taking the last."""

    fusion: Literal["cost", "magnitude", "signed"] = "cost"
    """How several pairs of images are searched: with their costs added, or each alone, after which the longer
    vector or (published) the largest signed component is taken."""

    consistency_iterations: int = 15
    """Steps that make the forward and backward fields of a level each other's inverse; 0 for none."""

    refine: tuple[Refinement, ...] = (Refinement(),)
    """Continuous refinements after the discrete levels (of the finest level alone where weights are given)."""

    otherwise: tuple[Refinement, ...] = ()
    """Refinements of the linear map itself by mutual information, tried where it falls so far under the
    deformation that the descriptors must have misled, and judged by these. Empty: none."""

    smoothing: int = 0
    """Width in voxels of three means over the refined field; 0 for none."""

    reproduce: bool = False
    """Do as the released code does, at the borders above all, on the voxels of the fixed image."""


@dataclass(frozen=True)
class Disa(Mcbo):
    """DISA (Ronchetti et al. 2023): its descriptors in the linear stage and in MCBO's deformable solver."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a pair before a network sees it; weights carry it."""

    spacing_mm: float = 2.0
    """Voxel size. Axes are those of the fixed image, in the order and direction nearest to R, A, S."""

    crop: bool = True
    """Keep only the box of what both images see and the fixed image shows as body; else all of the fixed image."""

    fixed_window: tuple[float, ...] = ()
    """Values of the fixed image that become 0 and 1; others are cut. Empty: its 1st and 99th percentile."""

    moving_window: tuple[float, ...] = ()
    """The same for the moving image."""

    linear: Linear = Linear()
    """The linear stage before."""


@dataclass(frozen=True)
class Learned:
    """A trained network, which sees the pair as its weights say, after the linear stage."""

    weights: str = ""
    """Folder of a training, or a .safetensors file with its .json file beside it."""

    linear: Linear = Linear()
    """The linear stage before."""

    refine: int = 0
    """Adam steps on the pair itself after the network, as in MCBO: by MIND-SSC, for LUMIR by local correlation; 0
    for none."""


@dataclass(frozen=True)
class GradientGuidance(Learned):
    """Two U-Nets, of the images and of their gradient maps, fused by gates (Xu et al. 2021)."""


@dataclass(frozen=True)
class Lumir(Learned):
    """The encoder-only pyramid and its cascade, for pairs of one modality (Zhang et al. 2024)."""


@dataclass(frozen=True)
class MacJNet(Learned):
    """LapIRN trained jointly with two segmenters, which segment both images too (Zhou et al. 2023)."""


Settings = Mcbo | Learned
"""What a registration can be told."""

SYSTEMS: dict[str, type[Mcbo] | type[Learned]] = {
    "mcbo": Mcbo,
    "disa": Disa,
    "gradient-guidance": GradientGuidance,
    "lumir": Lumir,
    "macjnet": MacJNet,
}


def system_of(settings: Settings) -> str:
    """The name of the system that settings belong to."""
    return next(name for name, kind in SYSTEMS.items() if type(settings) is kind)


def presets(system: str = "mcbo") -> list[str]:
    """Names of the presets of a system."""
    return sorted(path.stem for path in (PRESETS / system).glob("*.toml"))


def load_settings(system: str = "mcbo", preset: str | Path = "default") -> Settings:
    """Settings of a system from a preset's name or a TOML file.

    Raises:
        InputError: unknown system, preset, key or value; the message gives the nearest name.
    """
    kind = SYSTEMS.get(system)
    if kind is None:
        raise InputError(f"there is no system {system!r}{_nearest(system, list(SYSTEMS))}")
    return read_settings(kind, system, preset)


def read_settings(kind: type[S], group: str, preset: str | Path) -> S:
    """A settings dataclass from a preset's name, looked up in a folder of ``presets/``, or from a TOML file.

    Raises:
        InputError: unknown preset, key or value.
    """
    path = Path(preset)
    if path.suffix != ".toml":
        path = PRESETS / group / f"{preset}.toml"
        if not path.is_file():
            raise InputError(f"{group} has no preset {str(preset)!r}{_nearest(str(preset), presets(group))}")
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"there is no settings file {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"cannot read settings from {path}: {error}") from None
    return from_dict(kind, content, str(path))


def from_dict(kind: type[S], content: dict[str, Any], source: str) -> S:
    """A settings dataclass from plain values, every key and type checked."""
    hints = typing.get_type_hints(kind)
    for key in content:
        if key not in hints:
            raise InputError(f"{source}: unknown key {key!r}{_nearest(key, list(hints))}")
    settings = kind(**{key: _converted(value, hints[key], f"{source}: {key}") for key, value in content.items()})
    return check(settings, source)


def _converted(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _converted(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} must be a list, not {value!r}")
        return tuple(_converted(item, args[0], where) for item in value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a table, not {value!r}")
        return from_dict(hint, value, where)  # type: ignore[arg-type]  # is_dataclass does not narrow to a class
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where} must be {hint.__name__}, not {value!r}")
    return value


def check(settings: S, source: str = "settings") -> S:
    """Refuse values that cannot work; returns the settings."""

    def need(good: bool, key: str, rule: str) -> None:
        if not good:
            raise InputError(f"{source}: {key} must be {rule}, not {getattr(settings, key)!r}")

    for key, value in vars(settings).items():
        need(not isinstance(value, float) or math.isfinite(value), key, "finite")
    if isinstance(settings, Refinement):
        need(settings.level >= 1, "level", "at least 1")
        need(settings.control >= 1, "control", "at least 1")
        need(settings.iterations >= 1, "iterations", "at least 1")
        need(settings.smoothness >= 0, "smoothness", "at least 0")
        need(
            settings.similarity != "auto" or settings.smoothness == 0,
            "smoothness",
            "0 (chosen) with auto similarity",
        )
        need(settings.similarity != "mi" or settings.smoothness > 0, "smoothness", "above 0 with mi similarity")
        need(settings.learning_rate > 0, "learning_rate", "above 0")
        need(settings.fold_weight >= 0, "fold_weight", "at least 0")
    elif isinstance(settings, Descriptor):
        names = typing.get_args(DescriptorName)
        need(
            callable(settings.name) or settings.name in names, "name", f"one of {', '.join(names)}, or a function"
        )
        need(settings.weight > 0, "weight", "above 0")
        need(settings.stride in (1, 2, 4), "stride", "1, 2 or 4")
    elif isinstance(settings, Linear):
        need(settings.random_starts >= 0, "random_starts", "at least 0")
        need(0 <= settings.random_deg <= 180, "random_deg", "0 to 180")
        need(settings.random_mm >= 0, "random_mm", "at least 0")
    elif isinstance(settings, Mcbo):
        check(settings.linear, f"{source}: linear")
        need(settings.spacing_mm >= 0, "spacing_mm", "at least 0")
        need(settings.memory_gib >= 0, "memory_gib", "at least 0")
        need(settings.mind_radius >= 0, "mind_radius", "at least 0")
        need(settings.mind_dilation >= 1, "mind_dilation", "at least 1")
        need(1 <= settings.half_width <= 8, "half_width", "1 to 8")
        need(len(settings.describe) > 0, "describe", "one or more descriptors")
        for descriptor in settings.describe:
            check(descriptor, f"{source}: describe")
        need(all(level >= 1 for level in settings.levels), "levels", "numbers from 1")
        need(len(settings.levels) + len(settings.refine) > 0, "levels", "one or more where nothing is refined")
        need(len(settings.weights) in (0, len(settings.levels)), "weights", "empty or one number a level")
        need(settings.consistency_iterations >= 0, "consistency_iterations", "at least 0")
        need(settings.smoothing == 0 or settings.smoothing % 2 == 1, "smoothing", "0 or an odd width")
        if settings.reproduce:
            need(len(settings.refine) == 1, "refine", "one refinement when reproducing")
        for stage in settings.refine:
            check(stage, f"{source}: refine")
        for stage in settings.otherwise:
            check(stage, f"{source}: otherwise")
            need(stage.similarity == "mi", "otherwise", "by mi similarity")
    elif isinstance(settings, Learned):
        check(settings.linear, f"{source}: linear")
        need(settings.refine >= 0, "refine", "at least 0")
    elif isinstance(settings, Preprocessing):
        check(settings.linear, f"{source}: linear")
        need(settings.spacing_mm > 0, "spacing_mm", "above 0")
        for side in ("fixed_window", "moving_window"):
            window = getattr(settings, side)
            need(not window or (len(window) == 2 and window[0] < window[1]), side, "empty or (low, high)")
    elif callable(own := getattr(settings, "check", None)):
        own()
    return settings


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain values of a settings dataclass, as a preset or a record holds them; ``from_dict`` reads them.

    Of a descriptor that is a function only the name is told.
    """
    return dataclasses.asdict(settings, dict_factory=lambda items: {key: _plain(value) for key, value in items})


def _plain(value: Any) -> Any:
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
