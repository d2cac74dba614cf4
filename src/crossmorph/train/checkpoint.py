"""Weights and training states on disk, as safetensors files. Nothing is ever unpickled.

Weights have a JSON file beside them (``disa.safetensors``, ``disa.json``), which tells the architecture, what is
done to images before, what the weights were trained on, under which licence they are, what they reached, and the
sha256 of the tensors' file. The state of a training is one file, so that it is never half new and half old.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from crossmorph.errors import InputError
from crossmorph.files import atomic_path

Network = TypeVar("Network", bound=torch.nn.Module)


def save_weights(path: Path, network: torch.nn.Module, architecture: str, about: Mapping[str, Any]) -> None:
    """Write the weights of a network and, beside them, what is known about them.

    Raises:
        InputError: the folder is missing or not writable, or the disk is full.
    """
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()})
    about = {"architecture": architecture, **about, "sha256": hashlib.sha256(data).hexdigest()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_weights(make: Callable[[], Network], path: Path, architecture: str) -> Network:
    """A network with the weights of a file.

    Args:
        make: makes the network; at first without memory for it, since what it is made by may be damaged.
        path: of the .safetensors file.
        architecture: what the JSON file beside it must say.

    Raises:
        InputError: a file is missing or damaged, the sha256 differs, the weights belong to another architecture,
            or names or shapes of the tensors do not fit the network.
    """
    about = described(path, architecture)
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != about["sha256"]:
        raise InputError(
            f"{path} is not the file that {path.with_suffix('.json').name} describes: its sha256 is "
            f"{found[:12]}..., not {str(about['sha256'])[:12]}...; copy both files again"
        )
    tensors, _ = _unpacked(data, path)
    try:
        with torch.device("meta"):
            planned = make().state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:
        raise InputError(
            f"{path.with_suffix('.json')} describes a network that cannot be ({error}); copy both files again"
        ) from error
    needed = {name: tuple(tensor.shape) for name, tensor in planned.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if needed != given:
        wrong = sorted(name for name in needed.keys() | given.keys() if needed.get(name) != given.get(name))
        raise InputError(
            f"{path} does not fit the network {architecture!r}: {len(wrong)} tensors differ, the first is "
            f"{wrong[0]} ({given.get(wrong[0], 'missing')}, needed {needed.get(wrong[0], 'nothing')})"
        )
    network = make()
    network.load_state_dict(tensors)
    return network


def described(path: Path, architecture: str) -> dict[str, Any]:
    """What the JSON file beside weights says.

    Raises:
        InputError: a file is missing or damaged, or the weights belong to another architecture.
    """
    side = path.with_suffix(".json")
    for file in (path, side):
        if not file.is_file():
            raise InputError(
                f"{file} is missing; weights are a .safetensors file with a .json file of the same name beside it"
            )
    try:
        about: dict[str, Any] = json.loads(side.read_text(encoding="utf-8"))
        name, _ = about["architecture"], about["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{side} does not describe weights: it needs architecture and sha256 ({error})"
        ) from error
    if name != architecture:
        raise InputError(f"{path} holds weights of {name!r}; those of {architecture!r} are needed")
    return about


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and JSON as one file, at once: what a training goes on from.

    Raises:
        InputError: the folder is missing or not writable, or the disk is full.
    """
    from safetensors.torch import save

    data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, {"about": json.dumps(about)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``save_tensors`` wrote.

    Raises:
        InputError: the file is damaged or another program's.
    """
    tensors, about = _unpacked(path.read_bytes(), path)
    if about is None:
        raise InputError(f"{path} was not written by a training; remove it, or give another folder")
    return tensors, about


def load_about(path: Path) -> dict[str, Any]:
    """The JSON of a file of ``save_tensors``, without its tensors.

    Raises:
        InputError: the file is damaged or another program's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["about"])
            return found
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path} was not written by a training; remove it ({error})") from error


def _unpacked(data: bytes, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Tensors, and the JSON in the header if there is some."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        about = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get("about")
        return tensors, None if about is None else json.loads(about)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no safetensors file: {error}") from error


def flattened(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """The state of an optimiser as tensors by name; its settings belong to the training's configuration."""
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what ``flattened`` gave, without the prefix."""
    content = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**content, "state": state})
