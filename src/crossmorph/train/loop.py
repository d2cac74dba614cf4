"""A plain training loop that can be stopped at any time and goes on as if it had not been.

After every save the folder holds

    training.safetensors          network, optimiser, random state, step and configuration, to go on from
    weights.safetensors, .json    the network with the lowest validation error so far
    metrics.csv                   a row each time losses are written or the network is validated
    tensorboard/                  the same for TensorBoard, where it is installed
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from crossmorph.errors import InputError
from crossmorph.train.checkpoint import flattened, load_tensors, restore, save_tensors, save_weights

STATE, WEIGHTS, METRICS = "training.safetensors", "weights.safetensors", "metrics.csv"


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained, and how.

    Args:
        network: its parameters are optimised in place.
        optimizer: over these parameters, on the network's device.
        rate: learning rate as a function of the step, from 0.
        loss: one scalar to minimise, drawn with the generator, at a step from 0.
        validate: numbers by name; the network with the lowest ``"error"`` is kept.
        architecture: name that the weights carry.
        configuration: everything that decides the result, as JSON; a training goes on only with the same.
        about: more for the JSON file of the weights.
    """

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    loss: Callable[[torch.Generator, int], torch.Tensor]
    validate: Callable[[], dict[str, float]]
    architecture: str
    configuration: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)


def fit(
    task: Task,
    folder: Path,
    steps: int,
    seed: int,
    resume: bool = False,
    validate_every: int = 1000,
    write_every: int = 50,
    save_seconds: float = 240.0,
    progress: Callable[[int, dict[str, float]], None] = lambda step, numbers: None,
) -> dict[str, float]:
    """Train to ``steps`` and return the numbers of the best validation.

    Args:
        task: see ``Task``.
        folder: exists; with ``resume`` it holds an earlier state of the same configuration.
        steps: optimiser steps in total, those before a resumption among them.
        seed: of the generator that ``task.loss`` draws with.
        resume: go on from the state in the folder; without one there, start.
        validate_every: steps between validations; the last step is always validated.
        write_every: steps between rows of losses.
        save_seconds: at most about this long between saves.
        progress: told the step and the newest numbers after each step.

    Raises:
        InputError: a state of another configuration, a loss that is not finite, or a folder not to be written to.
    """
    generator = torch.Generator().manual_seed(seed)
    step, best = 0, {"error": math.inf}
    if resume and (folder / STATE).exists():
        step, best = _resumed(task, folder / STATE, generator)
    saved, losses, numbers = time.monotonic(), [], dict(best)
    with ExitStack() as stack:
        write = _writer(folder, step, stack)
        while step < steps:
            losses.append(_step(task, generator, step))
            step += 1
            if step % write_every == 0:
                numbers["loss"] = sum(losses) / len(losses)
                write(step, {"loss": numbers["loss"], "rate": task.rate(step - 1)})
                losses = []
            progress(step, numbers)
            last = step == steps
            if step % validate_every == 0 or last:
                found = task.validate()
                write(step, found)
                numbers |= found
                if found["error"] < best["error"]:
                    best = {**found, "step": step}
                    _save_weights(task, folder, best)
            if last or step % validate_every == 0 or time.monotonic() - saved > save_seconds:
                _save_state(task, folder, generator, step, best)
                saved = time.monotonic()
    return best


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, one line an entry."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {_short(old.get(key))} before, {_short(new.get(key))} now" for key in keys]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def _step(task: Task, generator: torch.Generator, step: int) -> float:
    for group in task.optimizer.param_groups:
        group["lr"] = task.rate(step)
    task.network.train()
    task.optimizer.zero_grad(set_to_none=True)
    loss = task.loss(generator, step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(f"the loss became {value} at step {step + 1}; lower the learning rate, or check the data")
    torch.autograd.backward(loss)
    task.optimizer.step()
    return value


def _save_state(
    task: Task, folder: Path, generator: torch.Generator, step: int, best: Mapping[str, float]
) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in task.network.state_dict().items()}
    tensors |= flattened(task.optimizer)
    tensors["generator"] = generator.get_state()
    about = {"configuration": _identity(task), "step": step, "best": best}
    save_tensors(folder / STATE, tensors, about)


def _save_weights(task: Task, folder: Path, metrics: Mapping[str, float]) -> None:
    about = {**task.about, "training": task.configuration, "metrics": metrics}
    save_weights(folder / WEIGHTS, task.network, task.architecture, about)


def _identity(task: Task) -> dict[str, Any]:
    """What must be the same for a training to go on, as it comes back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps({"network": task.architecture, **task.configuration}))
    return found


def _resumed(task: Task, path: Path, generator: torch.Generator) -> tuple[int, dict[str, float]]:
    tensors, about = load_tensors(path)
    changed = differences(about["configuration"], _identity(task))
    if changed:
        raise InputError(
            f"{path.parent} holds a training with other settings, so it cannot go on: {'; '.join(changed)}. "
            "Give the same settings and volumes, or another folder"
        )
    prefix = "network."
    network = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    task.network.load_state_dict(network)
    restore(task.optimizer, tensors)
    generator.set_state(tensors["generator"])
    return int(about["step"]), dict(about["best"])


def _writer(folder: Path, step: int, stack: ExitStack) -> Callable[[int, Mapping[str, float]], None]:
    """A function that appends numbers to metrics.csv and, where it is installed, to TensorBoard."""
    rows = _rows_until(folder / METRICS, step)
    try:
        file = stack.enter_context((folder / METRICS).open("w", newline="", encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot write {folder / METRICS}: {error.strerror}; choose another folder") from error
    table = csv.writer(file)
    table.writerows([("step", "name", "value"), *rows])
    board: Any = None
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        stack.callback(board.close)
    except ImportError:
        pass

    def write(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            table.writerow((step, name, f"{value:.6g}"))
            if board is not None:
                board.add_scalar(name, value, step)
        file.flush()

    return write


def _rows_until(path: Path, step: int) -> list[tuple[str, ...]]:
    """The rows of an earlier metrics.csv that the state to go on from knows of."""
    if step == 0 or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [tuple(row) for row in rows if row and int(row[0]) <= step]
