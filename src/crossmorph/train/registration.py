"""Training of a registration network: samples by number, batches, validation by Dice, TRE and folding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crossmorph.errors import InputError
from crossmorph.evaluate.overlap import label_overlap, mean_dice
from crossmorph.evaluate.regularity import non_diffeomorphic_volume
from crossmorph.networks.voxelmorph import MULTIPLE
from crossmorph.optimise.terms import displaced, lengths
from crossmorph.plan import available_bytes
from crossmorph.resample import sample
from crossmorph.systems import gradient_guidance, lumir, macjnet
from crossmorph.systems.learned import NETWORKS
from crossmorph.train.augment import augmented, synthetic
from crossmorph.train.loop import Task, Turn, fit
from crossmorph.train.pairs import Data, Report
from crossmorph.train.sample import Batch, Sample
from crossmorph.train.settings import MacJNetTraining, Training, rate_at

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Loss = Callable[[dict[str, torch.Tensor], Batch, Any], torch.Tensor]

LOSSES: dict[str, Loss] = {
    "gradient-guidance": gradient_guidance.loss,
    "lumir": lumir.loss,
    "macjnet": macjnet.loss,
}
"""By system: the loss of a network's outputs on a batch under a training's settings."""

TURNS: dict[str, Callable[[Any, Any, macjnet.Seen], tuple[Turn, ...]]] = {"macjnet": macjnet.turns}
"""By system, for those whose parts learn in alternation: what each does in a step, of the network, the settings
and the batches (of a step; with True of pairs that have labels). The others have one turn: to lower their loss."""

METRICS = ("loss", "dice", "fixed_dice", "moving_dice", "tre_mm", "ndv_percent")
"""What a validation finds, as far as labels or landmarks are there; ``fixed_dice`` and ``moving_dice`` of
segmentations."""


def train_registration(
    system: str,
    settings: Training,
    data: Data,
    folder: Path,
    fabric: Fabric,
    about: dict[str, Any] | None = None,
    resume: bool = False,
    save_seconds: float = 240.0,
    progress: Report = lambda stage, share, numbers: None,
) -> dict[str, float]:
    """Train a system's network; see ``train.loop`` for what the folder holds.

    Args:
        system: a key of ``systems.learned.NETWORKS``.
        settings: those of the system.
        data: of ``load_data`` or ``generated``.
        folder: to write to; exists.
        fabric: of ``start_fabric``.
        about: more for the JSON file of the weights: data, licence.
        resume: go on from what the folder holds.
        save_seconds: at most about this long between saves.
        progress: told the stage, its share and the newest numbers.

    Returns:
        The numbers of the best validation: ``error`` (1 - Dice, the mean of all there are; without labels the TRE;
        without landmarks the loss) and ``METRICS``.

    Raises:
        InputError: bad settings, a folder with another training, or a loss that is not finite.
    """
    settings.check()
    if isinstance(settings, MacJNetTraining):
        settings = macjnet.with_labels(settings, data.ids)
        macjnet.check_memory(settings, data.shape, free_bytes(fabric.device))
    if system in TURNS and fabric.world_size > 1:
        raise InputError(f"{system} is trained by one process; leave out --devices")
    if settings.batch % fabric.world_size:
        raise InputError(f"a batch of {settings.batch} pairs cannot be shared by {fabric.world_size} processes")
    torch.manual_seed(settings.seed)
    network = NETWORKS[system](settings)
    loss = LOSSES[system]
    known = tuple(n for n, (fixed, moving) in enumerate(data.ids) if set(fixed) & set(moving))

    @lru_cache(maxsize=2)  # turns of a step look at the same pairs
    def batch_at(step: int, labelled: bool) -> Batch:
        among = known if labelled else range(len(data.names))
        numbers = _numbers(step, settings, fabric)
        samples = [_at(number, settings, data, among, fabric.device) for number in numbers]
        return Batch.of(samples, fabric.device)

    def batch_loss(model: torch.nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        batch = batch_at(step, False)
        return loss(model(batch.fixed, batch.moving), batch, settings)

    if system in TURNS:
        turns = TURNS[system](network, settings, batch_at)
    else:
        adam = torch.optim.Adam(network.parameters(), lr=settings.rate, amsgrad=settings.amsgrad)
        turns = (Turn(adam, lambda step: rate_at(step, settings), batch_loss),)
    validate, pictures = _checks(network, loss, settings, data, fabric)
    task = Task(
        network=network,
        turns=turns,
        validate=validate,
        architecture=system,
        configuration={"settings": asdict(settings), "train": data.names, "validation": data.validation_names},
        about={"preprocessing": _preprocessing(settings), **(about or {})},
        clip=settings.clip,
        average=settings.average,
        names=lambda step: ", ".join(
            data.names[_index(n, settings, range(len(data.names)))] for n in _numbers(step, settings, fabric)
        ),
        pictures=pictures,
    )
    epoch = max(1, len(data.names) // settings.batch)
    return fit(
        task,
        folder,
        settings.steps,
        settings.seed,
        resume,
        validate_every=settings.validate_every or epoch,
        write_every=min(10, epoch),
        save_seconds=save_seconds,
        progress=lambda step, numbers: progress("training", step / settings.steps, numbers),
        fabric=fabric,
    )


def _checks(
    network: torch.nn.Module, loss: Loss, settings: Training, data: Data, fabric: Fabric
) -> tuple[Callable[[], dict[str, float]], Callable[[], dict[str, torch.Tensor]]]:
    """What a validation measures, and the pictures that it shows."""

    @torch.no_grad()
    def seen(pair: Sample) -> tuple[Batch, dict[str, torch.Tensor]]:
        network.eval()
        batch = Batch.of([pair], fabric.device)
        return batch, network(batch.fixed, batch.moving)

    def validate() -> dict[str, float]:
        rows = torch.full((len(data.validation), len(METRICS)), math.nan, dtype=torch.float64)
        for n in range(fabric.global_rank, len(rows), fabric.world_size):
            pair = data.validation[n]()
            batch, outputs = seen(pair)
            found = measured(pair, outputs["displacement"][0].cpu())
            if isinstance(settings, MacJNetTraining):
                found |= segmented_dice(pair, outputs, settings.labels)
            found["loss"] = float(loss(outputs, batch, settings))
            rows[n] = torch.tensor([found.get(name, math.nan) for name in METRICS], dtype=torch.float64)
        return _summary(rows, fabric)

    def pictures() -> dict[str, torch.Tensor]:
        pair = data.validation[0]()
        return {"fixed, moving, warped, grid": picture(pair, seen(pair)[1]["displacement"][0].cpu())}

    return validate, pictures


def free_bytes(device: torch.device) -> float:
    """Memory of a device that may still be taken."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()


def generated(settings: Training, validation: int = 4) -> Data:
    """Nothing but generated pairs, other ones each epoch; as validation a few that never change."""
    shape = [n + -n % MULTIPLE for n in settings.synthesis.shape]
    spacing = settings.preprocessing.spacing_mm

    def one(generator: torch.Generator) -> Sample:
        return synthetic(shape, spacing, settings.synthesis, generator)

    def held_out(number: int) -> Sample:
        return one(seeded(settings.seed, 2, number))

    return Data(
        ("generated",) * settings.synthesis.pairs,
        ("generated",) * validation,
        lambda index, generator: one(generator),
        tuple(partial(held_out, number) for number in range(validation)),
        tuple(shape),
        ((range(1, settings.synthesis.labels),) * 2,) * settings.synthesis.pairs,
    )


def seeded(*numbers: int) -> torch.Generator:
    """A generator for whole numbers such as the seed, a purpose and a count; others give unrelated ones."""
    word = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def _numbers(step: int, settings: Training, fabric: Fabric) -> range:
    """The samples of a step that this process sees; all samples of a training are numbered from 0."""
    first = step * settings.batch
    return range(first + fabric.global_rank, first + settings.batch, fabric.world_size)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    found: list[int] = torch.randperm(count, generator=seeded(seed, 0, epoch)).tolist()
    return found


def _index(number: int, settings: Training, among: Sequence[int]) -> int:
    """Which of some samples comes at a number: each once an epoch, in a random order."""
    epoch, place = divmod(number, len(among))
    return among[_order(settings.seed, epoch, len(among))[place]]


def _at(
    number: int, settings: Training, data: Data, among: Sequence[int], device: torch.device | str = "cpu"
) -> Sample:
    """The sample of a number: pair, partner and changes follow from the number and the seed alone."""
    generator = seeded(settings.seed, 1, number)
    if float(torch.rand(1, generator=generator)) < settings.synthesis.share:
        spacing = settings.preprocessing.spacing_mm
        return synthetic(data.shape, spacing, settings.synthesis, generator).to(device)
    pair = data.sample(_index(number, settings, among), generator)
    pair = augmented(pair.to(device), settings.augmentation, generator)
    return pair.padded(data.shape) if settings.batch > 1 else pair


def measured(pair: Sample, field: torch.Tensor) -> dict[str, float]:
    """Dice, TRE and folding of a displacement (3, I, J, K) in voxels, as far as the pair allows."""
    found = {"ndv_percent": non_diffeomorphic_volume(field.numpy(), pair.fixed_valid.numpy())[1]}
    if pair.fixed_labels is not None and pair.moving_labels is not None:
        warped = sample(pair.moving_labels[None], displaced(field), "nearest")[0]
        found["dice"] = mean_dice(label_overlap(pair.fixed_labels, warped, pair.moving_labels))
    if pair.fixed_points is not None and pair.moving_points is not None:
        places = pair.grid.to_voxel(pair.fixed_points)
        moved = pair.grid.to_world(places + sample(field, places).T.double())
        ended = moved @ torch.from_numpy(pair.linear[:3, :3]).T + torch.from_numpy(pair.linear[:3, 3])
        found["tre_mm"] = float((ended - pair.moving_points).norm(dim=1).mean())
    elif pair.truth is not None:
        axes = torch.from_numpy(np.array(pair.grid.affine[:3, :3])).float()
        found["tre_mm"] = float(lengths(torch.einsum("ab,bijk->aijk", axes, field - pair.truth)).mean())
    return found


def segmented_dice(pair: Sample, outputs: dict[str, torch.Tensor], ids: Sequence[int]) -> dict[str, float]:
    """Dice of the segmentations of both sides, as far as there are labels."""
    found = {}
    for side, truth in (("fixed", pair.fixed_labels), ("moving", pair.moving_labels)):
        if truth is not None and ids:
            classes = outputs[f"{side}_scores"][0].argmax(0).cpu()
            given = torch.tensor((0, *ids), dtype=truth.dtype)[classes]
            found[f"{side}_dice"] = mean_dice(label_overlap(truth, given, ids=ids))
    return found


def _summary(rows: torch.Tensor, fabric: Fabric) -> dict[str, float]:
    """Means over the pairs of all processes, and the error that the best network is chosen by."""
    there = rows.isfinite()
    sums = torch.stack([rows.nan_to_num(0, 0, 0).sum(0), there.double().sum(0)])
    total, count = fabric.all_reduce(sums, reduce_op="sum").cpu()  # type: ignore[union-attr]  # a tensor stays one
    found = {name: float(t / c) for name, t, c in zip(METRICS, total, count, strict=True) if c}
    dices = [found[name] for name in ("dice", "fixed_dice", "moving_dice") if name in found]
    error = 1 - sum(dices) / len(dices) if dices else found.get("tre_mm", found.get("loss", math.inf))
    return {"error": error, **found}


def picture(pair: Sample, field: torch.Tensor) -> torch.Tensor:
    """(3, H, W) in [0, 1]: fixed, moving and warped on the middle axial slice, and the grid that the moving one is
    warped by; the patient's front is up, the right side on the left."""
    places, middle = displaced(field), pair.fixed.shape[2] // 2
    lines = ((torch.stack(torch.meshgrid(*map(torch.arange, field.shape[1:]), indexing="ij")) % 8) == 0)[:2].any(0)
    warped = sample(torch.stack([pair.moving, lines.float()]), places)
    panels = [volume[:, :, middle].flip(0, 1).T for volume in (pair.fixed, pair.moving, *warped)]
    return torch.cat(panels, 1)[None].expand(3, -1, -1).clamp(0, 1)


def _preprocessing(settings: Training) -> dict[str, Any]:
    """In words and numbers what is done to images, for people who read the JSON file."""
    return {
        **asdict(settings.preprocessing),
        "axes": "those of the fixed image, in the order and direction nearest to R, A, S",
        "values": "cut to the window, or to the 1st and 99th percentile of the valid voxels, scaled to 0 and 1",
        "padding": f"to multiples of {MULTIPLE} voxels on both sides, repeating what is nearest",
    }


def validation_words(numbers: dict[str, float], names: Sequence[str] = METRICS) -> str:
    """The numbers of a validation in one line."""
    return ", ".join(f"{name} {numbers[name]:.4g}" for name in names if name in numbers)
