"""Weights on disk: tensors in a safetensors file, everything else in a JSON file beside it. Nothing is unpickled.

``disa.safetensors`` has ``disa.json`` beside it, which tells what the weights are for, what was done to the images
before, what they were trained on, under which licence they are, what they reached, and the tensors' sha256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crossmorph.errors import InputError
from crossmorph.files import atomic_path


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what is known about them; the sha256 of the tensors is added.

    The tensors appear first. A reader that comes between the two files finds a wrong sha256, never a mixture.

    Raises:
        InputError: the folder is missing or not writable, or the disk is full.
    """
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    text = json.dumps({**about, "sha256": hashlib.sha256(data).hexdigest()}, indent=2)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_tensors(path: Path, architecture: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``save_tensors`` wrote.

    Args:
        path: the .safetensors file; the .json file lies beside it.
        architecture: the network they must belong to, as the JSON file names it.

    Returns:
        The tensors by name, and the JSON file's content.

    Raises:
        InputError: a file is missing or damaged, the sha256 differs, or the weights belong to another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    side = path.with_suffix(".json")
    for file in (path, side):
        if not file.is_file():
            raise InputError(
                f"{file} is missing; weights are a .safetensors file with a .json file of the same name beside it"
            )
    try:
        about = json.loads(side.read_text(encoding="utf-8"))
        name, expected = about["architecture"], about["sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{side} does not describe weights: it needs architecture and sha256 ({error})"
        ) from error
    if name != architecture:
        raise InputError(f"{path} holds weights of {name!r}; those of {architecture!r} are needed")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise InputError(
            f"{path} is not the file that {side.name} describes: its sha256 is {found[:12]}..., not "
            f"{str(expected)[:12]}...; copy both files again"
        )
    try:
        return load(data), about
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}") from error


def load_weights(network: torch.nn.Module, path: Path, architecture: str) -> dict[str, Any]:
    """Put weights into a network and return what the JSON file says about them.

    Raises:
        InputError: as ``load_tensors``, and where names or shapes of the tensors do not fit the network.
    """
    tensors, about = load_tensors(path, architecture)
    needed = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if needed != found:
        wrong = sorted(name for name in needed.keys() | found.keys() if needed.get(name) != found.get(name))
        raise InputError(
            f"{path} does not fit the network {architecture!r}: {len(wrong)} tensors differ, the first is "
            f"{wrong[0]} ({found.get(wrong[0], 'missing')}, needed {needed.get(wrong[0], 'nothing')})"
        )
    network.load_state_dict(tensors)
    return about


def flattened(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of an optimiser as tensors by name; its settings belong to the training's configuration."""
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what ``flattened`` gave."""
    content = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**content, "state": state})
