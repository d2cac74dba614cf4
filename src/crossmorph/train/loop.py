"""A plain training loop on Lightning Fabric that can be stopped at any time and goes on as if it had not been.

After every save the folder holds

    training.safetensors          network, optimisers, random state, step and configuration, to go on from
    weights.safetensors, .json    the network with the lowest validation error so far
    last.safetensors, .json       the network of the last validation
    metrics.csv                   a row each time losses are written or the network is validated
    tensorboard/                  the same for TensorBoard, where it is installed
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from crossmorph.errors import InputError
from crossmorph.train.checkpoint import flattened, load_tensors, restore, save_tensors, save_weights
from crossmorph.train.rows import silent, writer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

STATE, WEIGHTS, LAST, METRICS = (
    "training.safetensors",
    "weights.safetensors",
    "last.safetensors",
    "metrics.csv",
)

PRECISION: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
}

EXPLODED = 1e4
"""A loss this many times as large as the first one (plus 1) has exploded."""


@dataclass(frozen=True, eq=False)
class Turn:
    """What one optimiser does in a step.

    Args:
        optimizer: over parameters of the network; no other turn has them.
        rate: learning rate as a function of the step, from 0; the turn is left out of a step where it is 0.
        loss: one scalar to minimise, of the network (as Fabric wraps it), drawn with the generator, at a step from
            0. With several processes it is this process's share, and the mean over them is minimised.
        name: tells its losses and rates from those of other turns.
    """

    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    loss: Callable[[torch.nn.Module, torch.Generator, int], torch.Tensor]
    name: str = ""

    def labelled(self, word: str) -> str:
        """A name for one of its numbers."""
        return f"{self.name}_{word}" if self.name else word


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained, and how.

    Args:
        network: its parameters are optimised in place.
        turns: taken one after the other in every step; one for an ordinary training, several where parts of the
            network learn in alternation.
        validate: numbers by name, the same in every process; the network with the lowest ``"error"`` is kept.
        architecture: name that the weights carry.
        configuration: everything that decides the result, as JSON; a training goes on only with the same.
        about: more for the JSON file of the weights.
        clip: largest norm of the gradient; 0 for no limit.
        average: decay of a running mean of the weights, which is then what is validated and kept; 0 for none.
        names: what a step sees, for messages.
        pictures: (3, H, W) pictures by name in [0, 1], for TensorBoard.
    """

    network: torch.nn.Module
    turns: tuple[Turn, ...]
    validate: Callable[[], dict[str, float]]
    architecture: str
    configuration: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    clip: float = 0.0
    average: float = 0.0
    names: Callable[[int], str] = lambda step: ""
    pictures: Callable[[], Mapping[str, torch.Tensor]] = dict


def start_fabric(
    device: str = "cpu",
    devices: int = 1,
    precision: Literal["32", "bf16", "16"] = "32",
) -> Fabric:
    """Lightning Fabric on a device, its processes started; under torchrun those that torchrun started.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        devices: processes on this machine, on CUDA one a GPU; this program is run once more for each further one.
        precision: of the network's arithmetic, see ``Training``.

    Raises:
        InputError: Fabric is not installed, there are not so many devices, or 16 on a CPU.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise InputError("training needs Lightning Fabric: pip install 'crossmorph[train]'") from error
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it prints what it was told
    if devices < 1 or (device == "cuda" and devices > torch.cuda.device_count()):
        there = f"; there are {torch.cuda.device_count()} CUDA devices" if device == "cuda" else ""
        raise InputError(f"--devices must be at least 1, not {devices}{there}")
    if precision == "16" and device != "cuda":
        raise InputError("precision 16 needs a CUDA device; take bf16 or 32 on a CPU")
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", devices))  # as torchrun says
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    several = devices * nodes > 1
    fabric = Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=timedelta(hours=24)) if several else "auto",
        precision=PRECISION[precision],
    )
    fabric.launch()
    return fabric


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
    fabric: Fabric | None = None,
) -> dict[str, float]:
    """Train to ``steps`` and return the numbers of the best validation.

    Args:
        task: see ``Task``.
        folder: exists; with ``resume`` it holds an earlier state of the same configuration.
        steps: optimiser steps in total, those before a resumption among them.
        seed: of the generator that losses draw with, the same in every process.
        resume: go on from the state in the folder; without one there, start.
        validate_every: steps between validations; the last step is always validated.
        write_every: steps between rows of losses.
        save_seconds: at most about this long between saves.
        progress: told the step and the newest numbers after each step.
        fabric: from ``start_fabric``; by default one process on the CPU. The first process alone writes.

    Raises:
        InputError: a state of another configuration, a loss that is not finite or explodes, or a folder not to be
            written to.
    """
    fabric = fabric or start_fabric()
    state = _State(torch.Generator().manual_seed(seed), _copied(task) if task.average else {})
    # to the device, where a state is loaded then
    model, *optimizers = fabric.setup(task.network, *(turn.optimizer for turn in task.turns))
    if resume and (folder / STATE).exists():
        _resume(task, folder / STATE, state, fabric)
    state.mean = {name: tensor.to(fabric.device) for name, tensor in state.mean.items()}
    saved, numbers = time.monotonic(), dict(state.best)
    with ExitStack() as stack:
        write = writer(folder / METRICS, state.step, stack) if fabric.is_global_zero else silent
        while state.step < steps:
            _step(task, model, optimizers, state, folder, fabric)
            step = state.step
            if step % write_every == 0:
                means = {name: sum(values) / len(values) for name, values in state.losses.items()}
                rates = {turn.labelled("rate"): turn.rate(step - 1) for turn in task.turns}
                write(step, means | rates, {})
                numbers |= means
                state.losses = {}
            progress(step, numbers)
            checked = step == steps or step % validate_every == 0
            if checked:
                with _averaged(task, state):
                    found = task.validate()
                    write(step, found, task.pictures() if fabric.is_global_zero else {})
                    numbers |= found
                    better = found["error"] < state.best["error"]
                    state.best = {**found, "step": step} if better else state.best
                    if fabric.is_global_zero:
                        _check_finite(task, folder, state)
                        for name in (LAST, WEIGHTS) if better else (LAST,):
                            _save_weights(task, folder / name, {**found, "step": step})
            if checked or time.monotonic() - saved > save_seconds:
                if fabric.is_global_zero:
                    _save_state(task, folder, state, fabric)
                saved = time.monotonic()
    fabric.barrier()
    return state.best


@dataclass
class _State:
    """What changes while a training runs, apart from network and optimisers; ``losses`` await their row."""

    generator: torch.Generator
    mean: dict[str, torch.Tensor]
    step: int = 0
    saved: int = 0
    first: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=lambda: {"error": math.inf})


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configurations, one line an entry; tables in tables are gone through."""
    found = []
    for key in sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}: {_short(before)} before, {_short(now)} now")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def _step(task: Task, model: Any, optimizers: Sequence[Any], state: _State, folder: Path, fabric: Fabric) -> None:
    """One step of every optimiser whose turn it is."""
    model.train()
    for turn, optimizer in zip(task.turns, optimizers, strict=True):
        rate = turn.rate(state.step)
        if not rate:
            continue
        for group in turn.optimizer.param_groups:
            group["lr"] = rate
        turn.optimizer.zero_grad(set_to_none=True)
        loss = turn.loss(model, state.generator, state.step)
        _note(loss, turn.labelled("loss"), task, state, folder, fabric)
        fabric.backward(loss)
        if task.clip:
            fabric.clip_gradients(model, optimizer, max_norm=task.clip, error_if_nonfinite=False)
        optimizer.step()
    state.step += 1
    if task.average:
        decay = min(task.average, (1 + state.step) / (10 + state.step))
        for name, tensor in task.network.state_dict().items():
            state.mean[name].lerp_(tensor, 1 - decay)


def _note(loss: torch.Tensor, name: str, task: Task, state: _State, folder: Path, fabric: Fabric) -> None:
    """Keep a loss for its row, as the mean over all processes, so that they stop together if it has exploded."""
    value = float(fabric.all_reduce(loss.detach(), reduce_op="mean"))  # type: ignore[arg-type]  # a tensor stays one
    first = state.first.setdefault(name, value)
    if not math.isfinite(value) or abs(value) > EXPLODED * (1 + abs(first)):
        words = name.replace("_", " ")
        raise _broken(f"the {words} became {value:g} at step {state.step + 1}", task, folder, state)
    state.losses.setdefault(name, []).append(value)


def _broken(what: str, task: Task, folder: Path, state: _State) -> InputError:
    seen = task.names(state.step)
    good = f"the last good state is {folder / STATE} of step {state.saved}" if state.saved else "nothing was saved"
    return InputError(
        f"{what}{f', which saw {seen}' if seen else ''}; {good}. Lower the learning rate, or check the data"
    )


def _check_finite(task: Task, folder: Path, state: _State) -> None:
    """A good state is never overwritten by a bad one."""
    if not all(bool(torch.isfinite(p).all()) for p in task.network.parameters()):
        raise _broken(f"the weights are not finite after step {state.step}", task, folder, state)


def _copied(task: Task) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in task.network.state_dict().items()}


@contextmanager
def _averaged(task: Task, state: _State) -> Iterator[None]:
    """The running mean of the weights in the place of the weights, if there is one."""
    if not state.mean:
        yield
        return
    own = _copied(task)
    task.network.load_state_dict(state.mean)
    try:
        yield
    finally:
        task.network.load_state_dict(own)


def _save_state(task: Task, folder: Path, state: _State, fabric: Fabric) -> None:
    _check_finite(task, folder, state)
    tensors = {f"network.{name}": tensor for name, tensor in task.network.state_dict().items()}
    tensors |= {f"mean.{name}": tensor for name, tensor in state.mean.items()}
    for turn in task.turns:
        tensors |= flattened(turn.optimizer, turn.labelled("optimizer"))
    tensors["generator"] = state.generator.get_state()
    about = {
        "configuration": _identity(task),
        "step": state.step,
        "best": state.best,
        "first": state.first,
        "losses": state.losses,
        "scaler": fabric.strategy.precision.state_dict(),
    }
    save_tensors(folder / STATE, tensors, about)
    state.saved = state.step


def _save_weights(task: Task, path: Path, metrics: Mapping[str, float]) -> None:
    about = {**task.about, "training": task.configuration, "metrics": metrics}
    save_weights(path, task.network, task.architecture, about)


def _identity(task: Task) -> dict[str, Any]:
    """What must be the same for a training to go on, as it comes back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps({"network": task.architecture, **task.configuration}))
    return found


def _resume(task: Task, path: Path, state: _State, fabric: Fabric) -> None:
    tensors, about = load_tensors(path)
    changed = differences(about["configuration"], _identity(task))
    if changed:
        raise InputError(
            f"{path.parent} holds a training with other settings, so it cannot go on: {'; '.join(changed)}. "
            "Give the same settings and volumes, or another folder"
        )

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    task.network.load_state_dict(part("network."))
    for turn in task.turns:
        restore(turn.optimizer, part(f"{turn.labelled('optimizer')}."))
    fabric.strategy.precision.load_state_dict(about["scaler"])
    state.mean = part("mean.")
    state.generator.set_state(tensors["generator"])
    state.step = state.saved = int(about["step"])
    state.first, state.losses, state.best = about["first"], about["losses"], about["best"]
