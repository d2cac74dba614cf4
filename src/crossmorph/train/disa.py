"""Training of the DISA network: the dot product of two descriptors learns the LC2 of their patches.

The defaults of ``DisaTraining`` are those of the paper (Ronchetti et al., MICCAI 2023) and its released code, with
two slips of the code mended: patches are sampled at unit pitch and centred on their voxel, and noise is drawn for
every voxel. ``CPU`` is a reduced schedule for one processor core, ``GPU`` one for some minutes of a GPU: instead
of one pair of descriptors from each pair of patches they compare many places of all patches of a batch with each
other, at no cost for the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crossmorph.describe.disa import ARCHITECTURE
from crossmorph.describe.lc2 import gradient_length, lc2_pairs
from crossmorph.errors import InputError
from crossmorph.networks.disa import Conv, DisaNet, clipped
from crossmorph.train.checkpoint import load_tensors, save_tensors
from crossmorph.train.loop import Task, Turn, fit, start_fabric
from crossmorph.train.patches import WINDOW, Pool, Volume, cut_turned, draw_pool, random_turn

POOL = {True: "pairs.safetensors", False: "pairs_unseen.safetensors"}


@dataclass(frozen=True)
class DisaTraining:
    """Settings of a training. Intensities are z-scored, so their units are standard deviations."""

    spacing_mm: float = 2.0
    """Voxel size that volumes are resampled to."""

    pairs: int = 5000
    """Pairs of patches drawn from each ordered pair of volumes."""

    candidates: int = 0
    """Places of the other volume to choose from; 0: all of them."""

    patch: int = 33
    """Edge of a patch in voxels: 8 n + 1, so that its centre has a descriptor."""

    batch: int = 256
    """Pairs of patches a step."""

    places: int = 1
    """Descriptors used of each patch. 1: the centre, compared with that of the other patch of its pair. More: also
    others at random, all compared with all, weighted so that every similarity counts alike."""

    paired: float = 0.1
    """Share of the loss that the pairs' centres have where all places are compared."""

    finish: int = 0
    """Last steps, over which that share is a half. Few pairs are a noisy guide, so they come in when steps are
    small."""

    steps: int = 69_700
    """Optimiser steps; the paper's 35 epochs of 510,000 pairs."""

    rate: float = 1e-3
    """Highest learning rate of AdamW."""

    decay: float = 1e-3
    """Weight decay."""

    schedule: str = "halving"
    """halving: warm-up of 200 steps, then halved every 8000; cosine: warm-up of 200 steps, then down to 0."""

    sign: float = 0.3
    """Probability that a patch changes its sign."""

    shift: float = 0.2
    """Deviation of a value added to a patch."""

    scale: tuple[float, float] = (0.7, 1.3)
    """Range of a factor of a patch."""

    noise: float = 0.01
    """Deviation of noise at each voxel."""

    remap: float = 0.0
    """Probability that the values of a patch go through a random curve, which makes another modality of it."""

    copies: int = 0
    """Copies of each patch, augmented on their own, that join the batch: the same place in other modalities."""

    lively: bool = False
    """Start from weights that keep the variance of what passes through (He et al. 2015), residual branches damped.
    Descriptors then begin with a length near 1; from PyTorch's own weights they begin near 0.1, and nothing is
    learnt for some 300 steps."""

    half: bool = False
    """Compute the network in bfloat16."""

    unseen_pairs: int = 1000
    """Pairs that a validation looks at."""

    seed: int = 42
    """Of every random choice."""

    def check(self) -> DisaTraining:
        """The settings, if they can be used.

        Raises:
            InputError: a value outside its range.
        """
        rules = {
            "patch must be 8 n + 1 and at least 17": self.patch % 8 == 1 and self.patch > 2 * WINDOW,
            "spacing_mm must be above 0": self.spacing_mm > 0,
            "schedule must be halving or cosine": self.schedule in ("halving", "cosine"),
            "scale must be (low, high) above 0": 0 < self.scale[0] <= self.scale[1],
            "pairs, batch, places, steps and unseen_pairs must be at least 1": min(
                self.pairs, self.batch, self.places, self.steps, self.unseen_pairs
            )
            >= 1,
            "paired must lie between 0 and 1": 0 <= self.paired <= 1,
            "candidates and copies must not be negative": min(self.candidates, self.copies) >= 0,
            "copies need places above 1, which compare all with all": self.copies == 0 or self.places > 1,
        }
        for rule, kept in rules.items():
            if not kept:
                raise InputError(f"DISA training: {rule}; given {self}")
        return self


PAPER = DisaTraining()

CPU = replace(
    PAPER,
    pairs=800,
    candidates=16384,
    patch=41,
    batch=3,
    places=56,
    copies=1,
    steps=4500,
    finish=2000,
    rate=1.5e-3,
    schedule="cosine",
    remap=0.5,
    lively=True,
    half=True,
    unseen_pairs=500,
)
"""About an hour on one core."""

GPU = replace(CPU, batch=16, steps=2600, rate=2e-3)
"""The same on three times as many pairs of patches: some minutes of a GPU."""

SCHEDULES = {"paper": PAPER, "gpu": GPU, "cpu": CPU}


def train_disa(
    volumes: Sequence[Volume],
    unseen: Sequence[Volume],
    folder: Path,
    settings: DisaTraining = PAPER,
    about: dict[str, Any] | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[str, float, dict[str, float]], None] = lambda stage, share, numbers: None,
) -> dict[str, float]:
    """Train, and leave ``weights.safetensors`` with its JSON file in the folder (see ``train.loop``).

    Args:
        volumes, unseen: from ``patches.prepared``; of the subjects to learn from, and of those to validate on.
        folder: to write to; exists.
        settings: see ``DisaTraining``.
        about: more for the JSON file of the weights: data, licence.
        resume: go on from what the folder holds.
        device: where to train. Pairs of patches are drawn on the CPU, as are all random numbers.
        progress: told the stage, its share and the newest numbers.

    Returns:
        The numbers of the best validation: ``error`` (mean squared), ``error_of_mean`` (of the mean as a guess).

    Raises:
        InputError: bad settings, a folder with another training, or one that cannot be written.
    """
    settings.check()
    configuration = {
        **asdict(settings),
        "volumes": sorted(f"{v.subject}: {Path(v.name).name}" for v in volumes),
        "unseen": sorted(f"{v.subject}: {Path(v.name).name}" for v in unseen),
    }
    pool = _pool(volumes, folder, configuration, settings, True, progress)
    held = _pool(unseen, folder, configuration, settings, False, progress)
    volumes, unseen = ([replace(v, values=v.values.to(device)) for v in side] for side in (volumes, unseen))
    network = started(settings).to(device)
    turn = Turn(
        torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=settings.decay),
        lambda step: rate_at(step, settings),
        lambda model, generator, step: batch_loss(model, volumes, pool, settings, generator, step),
    )
    task = Task(
        network=network,
        turns=(turn,),
        validate=lambda: summary(*predictions(network, unseen, held, settings)),
        architecture=ARCHITECTURE,
        configuration=configuration,
        about=about or {},
    )
    return fit(
        task,
        folder,
        settings.steps,
        settings.seed,
        resume,
        validate_every=min(500, settings.steps),
        progress=lambda step, numbers: progress("training", step / settings.steps, numbers),
        fabric=start_fabric(torch.device(device).type),
    )


def started(settings: DisaTraining) -> DisaNet:
    """The network before its first step, from the seed."""
    torch.manual_seed(settings.seed)
    network = DisaNet()
    if settings.lively:
        for module in network.modules():
            if isinstance(module, Conv):
                torch.nn.init.kaiming_normal_(module.weight, a=0.01)
                assert module.bias is not None
                torch.nn.init.zeros_(module.bias)
        for block in (network.fine, network.middle, network.coarse):
            block.second.weight.data.mul_(0.3)
        torch.nn.init.normal_(network.leave.weight, std=0.18)
    laid_out: DisaNet = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # typed 2-D
    return laid_out


def rate_at(step: int, settings: DisaTraining) -> float:
    """The learning rate of a step, counted from 0."""
    if settings.schedule == "cosine":
        warm = min(1.0, (step + 1) / 200)
        return settings.rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    if 0 < step < 200:
        return settings.rate * (math.exp(step / 200) - 1) / (math.e - 1)
    return settings.rate * 0.5 ** (step // 8000)


def batch_loss(
    network: torch.nn.Module,
    volumes: Sequence[Volume],
    pool: Pool,
    settings: DisaTraining,
    generator: torch.Generator,
    step: int = 0,
) -> torch.Tensor:
    """The squared error of one random batch: of the pairs' centres in both directions, and of all places."""
    drawn = torch.randint(0, len(pool.scores), (settings.batch,), generator=generator)
    patches = []
    for index in drawn.tolist():
        turn = random_turn(generator)
        for which, centre in zip(pool.volumes[index].tolist(), pool.centres[index], strict=True):
            patch = cut_turned(volumes[which], centre, turn, settings.patch)
            patches += [augmented(patch, settings, generator) for _ in range(1 + settings.copies)]
    x = torch.stack(patches)
    places = chosen_places(len(x), settings, generator).to(x.device)
    features = described(network, x, places, settings)
    target = similarities(x, places)
    error: torch.Tensor = (features @ features.T - target) ** 2
    of_centres = error[:: settings.places, :: settings.places]
    loss = of_centres[of_two_volumes(len(x), settings.copies).to(x.device)].mean()
    if settings.places == 1:
        return loss
    share = 0.5 if step >= settings.steps - settings.finish else settings.paired
    return share * loss + (1 - share) * (evening_weights(target) * error).sum()


def of_two_volumes(count: int, copies: int) -> torch.Tensor:
    """(count, count) bool: which patches of a batch are of one pair, but not of one volume."""
    index = torch.arange(count)
    pair, volume = index // (2 + 2 * copies), index // (1 + copies)
    return (pair[:, None] == pair) & (volume[:, None] != volume)


def augmented(patch: torch.Tensor, settings: DisaTraining, generator: torch.Generator) -> torch.Tensor:
    """A patch of another contrast: random curve, sign, factor, shift and noise."""
    sign, remap, factor = torch.rand(3, generator=generator).tolist()
    shift = settings.shift * float(torch.randn(1, generator=generator))
    if remap < settings.remap:
        patch = remapped(patch, generator)
    low, high = settings.scale
    scaled: torch.Tensor = patch * (low + (high - low) * factor) * (-1 if sign < settings.sign else 1) + shift
    return scaled + settings.noise * noise(patch, generator)


def noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers of deviation 1, drawn where ``like`` lies; on the processor they take longer than a step."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    own = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=own, device=like.device)


def remapped(patch: torch.Tensor, generator: torch.Generator, knots: int = 7) -> torch.Tensor:
    """Values through a random broken line from -3 to 3, brought back to the deviation they had."""
    heights = 1.5 * torch.randn(knots, generator=generator).to(patch.device, non_blocking=True)
    place = ((patch.clamp(-2.999, 2.999) + 3) / 6) * (knots - 1)
    below = place.floor().long()
    curve = torch.lerp(heights[below], heights[below + 1], place - below)
    before, after = patch.std(), curve.std()
    return torch.where(after < 1e-3, curve, (curve - curve.mean()) * (before / after))


def chosen_places(count: int, settings: DisaTraining, generator: torch.Generator) -> torch.Tensor:
    """(count, places, 3) indices of descriptors: the centre, and others whose LC2 windows lie in the patch."""
    side = (settings.patch - 1) // 4 + 1
    margin = (WINDOW + 4) // 4
    others = torch.randint(margin, side - margin, (count, settings.places - 1, 3), generator=generator)
    return torch.cat([torch.full((count, 1, 3), side // 2), others], 1)


def described(
    network: torch.nn.Module, x: torch.Tensor, places: torch.Tensor, settings: DisaTraining
) -> torch.Tensor:
    """(N, S, S, S) patches and (N, P, 3) places -> (N P, 16) clipped descriptors."""
    batch = x[:, None].contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.half):
        found = network(batch)
    i, j, k = places.unbind(-1)
    rows = torch.arange(len(x), device=x.device)[:, None].expand_as(i)
    return clipped(found[rows, :, i, j, k].float().flatten(0, 1))


def similarities(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(N P, N P): LC2 of every place explained by every other."""
    length = gradient_length(x)
    windows = []
    for values in (x, length):
        cubes = values.unfold(1, 2 * WINDOW + 1, 1).unfold(2, 2 * WINDOW + 1, 1).unfold(3, 2 * WINDOW + 1, 1)
        i, j, k = (4 * places - WINDOW).unbind(-1)
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(i)
        windows.append(cubes[rows, i, j, k].flatten(0, 1))
    return lc2_pairs(windows[0], windows[0], windows[1])


def evening_weights(target: torch.Tensor, bins: int = 10) -> torch.Tensor:
    """Weights of sum 1 by which every tenth of [0, 1] counts alike; one with hardly any pairs counts less."""
    which = (target * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(which.reshape(-1), minlength=bins)
    weight = (1 / counts.clamp_min(target.numel() // 2000))[which]
    return weight / weight.sum()


def predictions(
    network: DisaNet, volumes: Sequence[Volume], pool: Pool, settings: DisaTraining
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dot products and LC2 of the centres of each pair, without augmentation; (N,) each."""
    dots, targets = [], []
    upright = torch.eye(3)
    network.eval()
    with torch.no_grad():
        for start in range(0, min(len(pool.scores), settings.unseen_pairs), 16):
            some = slice(start, min(start + 16, settings.unseen_pairs))
            x = torch.stack(
                [
                    cut_turned(volumes[which], centre, upright, settings.patch)
                    for pair, centres in zip(pool.volumes[some].tolist(), pool.centres[some], strict=True)
                    for which, centre in zip(pair, centres, strict=True)
                ]
            )
            places = torch.full((len(x), 1, 3), settings.patch // 8, device=x.device)
            features = described(network, x, places, settings)
            dots.append((features[0::2] * features[1::2]).sum(1))
            targets.append(similarities(x, places)[0::2, 1::2].diagonal())
    return torch.cat(dots).cpu(), torch.cat(targets).cpu()


def summary(dots: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Mean squared error, that of guessing the mean, and the correlation."""
    correlation = torch.corrcoef(torch.stack([dots, targets]))[0, 1] if len(dots) > 2 else torch.tensor(torch.nan)
    return {
        "error": float(((dots - targets) ** 2).mean()),
        "error_of_mean": float(targets.var(correction=0)),
        "correlation": float(correlation),
    }


def _pool(
    volumes: Sequence[Volume],
    folder: Path,
    configuration: dict[str, Any],
    settings: DisaTraining,
    learning: bool,
    progress: Callable[[str, float, dict[str, float]], None],
) -> Pool:
    """The pairs of patches, from the folder if it has those of these volumes and settings; in random order."""
    path = folder / POOL[learning]
    keys = ("spacing_mm", "pairs", "candidates", "seed", "volumes" if learning else "unseen")
    drawn_from = {key: configuration[key] for key in keys}
    if path.exists():
        tensors, about = load_tensors(path)
        if about["drawn_from"] == drawn_from:
            return Pool(tensors["volumes"], tensors["centres"], tensors["scores"])
    generator = torch.Generator().manual_seed(settings.seed + (0 if learning else 1))
    name = "pairs of patches" if learning else "unseen pairs"
    pool = draw_pool(
        volumes, settings.pairs, settings.candidates, generator, lambda share: progress(name, share, {})
    )
    order = torch.randperm(len(pool.scores), generator=generator)
    pool = Pool(pool.volumes[order], pool.centres[order], pool.scores[order])
    save_tensors(path, pool.tensors(), {"drawn_from": drawn_from})
    return pool
