"""What is fuzzed: a reader, the file that it is given, and small valid files to start from.

Whatever a file holds, reading it ends in a thing or in an ``InputError``: nothing else is raised, little memory is
asked for, no program is started, nothing is connected to, nothing is unpickled, and no file is written.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.evaluate.learn2reg import read_dataset
from crossmorph.image import Image, Labels
from crossmorph.points import Points
from crossmorph.settings import load_settings
from crossmorph.space import Grid
from crossmorph.systems import lumir
from crossmorph.systems.learned import load_trained
from crossmorph.train.checkpoint import load_about, load_weights
from crossmorph.train.settings import LumirTraining
from crossmorph.transform import Affine, Chain, DisplacementField

CORPUS = Path(__file__).resolve().parent / "corpus"
"""Files that were found to break a reader, one folder a target."""

GRID = Grid((3, 4, 5), np.array([[-2.0, 0.1, 0, 9], [0.1, 2, 0, -4], [0, 0, 3, 7], [0, 0, 0, 1]]))
IMAGE = Image.from_array(np.arange(60, dtype=np.int16).reshape(3, 4, 5), GRID)
LABELS = Labels.from_array(np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 4, GRID)
FIELD = DisplacementField(torch.ones(3, 2, 2, 2), Grid((2, 2, 2), np.diag([4.0, 4, 4, 1])))
AFFINE = Affine.from_parts((1, 2, 3), (4, 5, 6))
POINTS = Points(torch.tensor([[0.0, 0, 0], [4.5, 0, 1e3]]), ("a", "b"))


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Args:
        file: name that the bytes get, whose ending picks the reader.
        read: what is called with the path.
        seeds: makes valid files.
        pack: from the bytes that are mutated to those of the file, where a layer such as gzip would let none pass.
        beside: other files that must be there.
        starts: whether the reader may start a process.
    """

    file: str
    read: Callable[[Path], Any]
    seeds: Callable[[], Sequence[bytes]]
    pack: Callable[[bytes], bytes] = bytes
    beside: Callable[[bytes], dict[str, bytes]] = lambda raw: {}
    starts: bool = False


# -- seeds -------------------------------------------------------------------------------------------------------


def written(thing: Any, name: str) -> Callable[[], list[bytes]]:
    """The file that the package writes."""

    def seeds() -> list[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            io.write(thing, path)
            return [path.read_bytes()]

    return seeds


def unpacked(name: str, vectors: bool = False) -> Callable[[], list[bytes]]:
    """A SimpleITK image without compression, so that its values can be changed."""

    def seeds() -> list[bytes]:
        values = np.ones((2, 2, 2, 3), np.float32) if vectors else np.arange(60, dtype=np.int16).reshape(5, 4, 3)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            sitk.WriteImage(sitk.GetImageFromArray(values, isVector=vectors), str(path))
            return [path.read_bytes()]

    return seeds


def pairs_csv() -> list[bytes]:
    return [b"fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z\n1,2,3,4,5,6\n-1.5,2e3,.3,4,5,6\n"]


def dataset_json() -> list[bytes]:
    old = {
        "name": "T",
        "tensorImageShape": {"0": [3, 4, 5]},
        "training": [{"image": "./imagesTr/T_0001_0000.nii.gz", "label": "./labelsTr/T_0001_0000.nii.gz"}],
        "registration_val": [{"fixed": "imagesTr/T_0001_0000.nii.gz", "moving": "imagesTr/T_0002_0000.nii.gz"}],
    }
    new = {"test": [{"0": "a_0001_0000.nii.gz", "1": "a_0002_0000.nii.gz"}, "imagesTs/T_0003_0000.nii.gz"]}
    return [json.dumps(content, indent=1).encode() for content in (old, new)]


def settings_toml() -> list[bytes]:
    return [b'levels = [6]\nspacing_mm = 2.0\n[linear]\nmodel = "rigid"\n[[refine]]\nlevel = 2\niterations = 4\n']


# -- weights: the length of the header, and the sha256 in the JSON beside, follow the bytes ----------------------


def network() -> torch.nn.Module:
    return torch.nn.Linear(2, 3)


def safetensors_parts() -> list[bytes]:
    """Header and values of the network's weights, a line each."""
    from safetensors.torch import save

    raw = save(network().state_dict())
    size = struct.unpack("<Q", raw[:8])[0]
    return [raw[8 : 8 + size].strip() + b"\n" + raw[8 + size :]]


def safetensors(parts: bytes) -> bytes:
    head, _, values = parts.partition(b"\n")
    return struct.pack("<Q", len(head)) + head + values


def described(raw: bytes) -> dict[str, bytes]:
    about = {"architecture": "linear", "sha256": hashlib.sha256(raw).hexdigest()}
    return {"w.json": json.dumps(about).encode()}


def training_about() -> list[bytes]:
    """What the header of a training's state tells beside the tensors, as JSON."""
    return [json.dumps({"step": 3, "best": 0.5, "settings": {"rate": 1e-3}}).encode()]


def training_state(about: bytes) -> bytes:
    """The file, its header valid and its text as given."""
    from safetensors.torch import save

    return save(
        {"w": torch.ones(2)},
        {"about": about.decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()},
    )


@cache
def pyramid() -> bytes:
    """Weights of a small LUMIR network."""
    from safetensors.torch import save

    return save(lumir.network(LumirTraining(channels=2)).state_dict())


def weights_json() -> list[bytes]:
    about = {
        "architecture": "lumir",
        "sha256": hashlib.sha256(pyramid()).hexdigest(),
        "training": {"settings": {"channels": 2, "large_kernel": 0, "preprocessing": {"spacing_mm": 2.0}}},
    }
    return [json.dumps(about).encode()]


def load_json(path: Path) -> Any:
    return load_trained("lumir", path.with_suffix(".safetensors"))


TARGETS: dict[str, Target] = {
    "nii": Target("a.nii", io.read, written(IMAGE, "a.nii")),
    "nii-in-gz": Target("a.nii.gz", io.read, written(IMAGE, "a.nii"), lambda raw: gzip.compress(raw, 1)),
    "nii.gz": Target("a.nii.gz", io.read, written(IMAGE, "a.nii.gz")),
    "nii-labels": Target("a.nii", io.read_labels, written(LABELS, "a.nii")),
    "nii-field": Target("a.nii", io.read_transform, written(FIELD, "a.nii")),
    "mha": Target("a.mha", io.read, unpacked("a.mha")),
    "mha-field": Target("a.mha", io.read_transform, unpacked("a.mha", vectors=True)),
    "nrrd": Target("a.nrrd", io.read, unpacked("a.nrrd")),
    "h5": Target("a.h5", io.read_transform, written(Chain((FIELD, AFFINE)), "a.h5"), starts=True),
    "tfm": Target("a.tfm", io.read_transform, written(Chain((FIELD, AFFINE)), "a.tfm")),
    "mat": Target("a.mat", io.read_transform, written(AFFINE, "a.mat")),
    "mrk.json": Target("a.mrk.json", io.read_points, written(POINTS, "a.mrk.json")),
    "fcsv": Target("a.fcsv", io.read_points, written(POINTS, "a.fcsv")),
    "csv": Target("a.csv", io.read_points, written(POINTS, "a.csv")),
    "csv-pairs": Target("a.csv", io.read_point_pairs, pairs_csv),
    "weights": Target(
        "w.safetensors",
        lambda path: load_weights(network, path, "linear"),
        safetensors_parts,
        safetensors,
        described,
    ),
    "training-state": Target("s.safetensors", load_about, training_about, training_state),
    "weights-json": Target("w.json", load_json, weights_json, beside=lambda raw: {"w.safetensors": pyramid()}),
    "dataset.json": Target("dataset.json", read_dataset, dataset_json),
    "toml": Target("a.toml", lambda path: load_settings("mcbo", path), settings_toml),
}
"""Every reader by name."""


# -- one input ---------------------------------------------------------------------------------------------------

PROCESS = "subprocess.Popen"
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", PROCESS)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def allowed(path: str) -> bool:
    """Whether a file may be written: nowhere, or Python's own bytecode of what a reader is the first to import."""
    return path == os.devnull or "__pycache__" in path


class FindError(AssertionError):
    """Reading did something that it must not."""


class Watch:
    """Notes what Python does while a file is read; exceptions would not do, since readers translate them."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.armed and event in FORBIDDEN:
            self.seen.append(event)
        elif self.armed and event == "open" and (arguments[2] or 0) & WRITES and not allowed(str(arguments[0])):
            self.seen.append(f"{event} {arguments[0]}")


@cache
def watch() -> Watch:
    """One for the process: audit hooks stay for ever."""
    return Watch()


def attempt(target: Target, parts: bytes, folder: Path) -> bool:
    """Read one file; whether it was read.

    Raises:
        FindError: memory ran out, or something was started, connected to, unpickled or written.
    """
    raw = target.pack(parts)
    files = {target.file: raw, **target.beside(raw)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    spy = watch()
    spy.seen.clear()
    spy.armed = True
    try:
        target.read(folder / target.file)
        good = True
    except InputError as error:
        good = False
        if isinstance(error.__cause__, MemoryError) or "alloc" in str(error.__cause__):
            raise FindError(f"memory ran out: {error}") from error
    finally:
        spy.armed = False
    done = [event for event in spy.seen if not (target.starts and event == PROCESS)]
    if done:
        raise FindError(f"it did {done}")
    left = {path.name for path in folder.iterdir()} - set(files)
    if left:
        raise FindError(f"it left {left}")
    return good
