"""The whole flow of a registration on one page: check, align, deform, score."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from crossmorph.channels import Channel, checked, fixed_images
from crossmorph.device import chosen_device
from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.optimise.field import resize
from crossmorph.optimise.landmarks import Landmarks, OnGrid
from crossmorph.optimise.terms import lengths
from crossmorph.plan import Plan, fitted, out_of_memory, smaller, unlimited
from crossmorph.points import Points
from crossmorph.preprocess import foreground, normalised, onto
from crossmorph.record import Journal, Progress
from crossmorph.result import Result
from crossmorph.settings import Learned, Mcbo, Settings, check, load_settings, system_of
from crossmorph.space import Grid, gap_mm
from crossmorph.systems.blocks import Economy
from crossmorph.systems.learned import Trained, displacement, load_trained
from crossmorph.systems.linear import align
from crossmorph.systems.mcbo import difference, grid_of, information, mcbo
from crossmorph.systems.segment import segmented
from crossmorph.systems.volume import Pair, Volume
from crossmorph.transform import Affine, Chain, DisplacementField, Transform

log = logging.getLogger("crossmorph")

NEEDED = 0.25
"""Tolerances by which the mean excess of landmarks must fall for a deformation that the images speak against."""

MISLED = 0.7
"""Descriptors have misled where a deformation leaves less than this share of the mutual information above 1."""

MAX_FIELD_VOXELS = 1_200_000
"""Displacements are kept on a grid of at most this many voxels, so that files stay below 30 MB."""


def register(
    fixed: Image,
    moving: Image | Sequence[Image],
    *,
    channels: Sequence[Channel] = (),
    settings: Settings | None = None,
    initial: Transform | None = None,
    deformable: bool = True,
    fixed_mask: Image | Labels | None = None,
    moving_mask: Image | Labels | None = None,
    landmarks: tuple[Points, Points] | None = None,
    landmark_tolerance_mm: float = 2.0,
    landmark_folds: int = 0,
    frame: int | str = 0,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Align moving to fixed.

    Args:
        fixed: the image whose space the result is in.
        moving: one image, or several modalities of one body in one space, which share the displacement. Of a 4-D
            image one frame is registered and all are warped.
        channels: further pairs of images of the same two bodies, each with a fixed image of its own, a weight and
            descriptors; see ``Channel``.
        settings: of the system; None is MCBO's ``default`` preset. Those of a trained network name its weights.
        initial: linear transform (fixed to moving points) that the linear stage starts from; None trusts the world
            coordinates of both files first. With ``settings.linear.model = "none"`` it is taken as it is.
        deformable: whether the linear stage is followed by the deformable one.
        fixed_mask, moving_mask: only voxels above zero count; any grid of the image's own world.
        landmarks: matching points of the fixed and the moving space (by name, else by order). They give the start,
            and both stages keep each within about ``landmark_tolerance_mm`` of its match where the images do not
            speak against it; inside the tolerance the images decide. A trained network does not look at them.
        landmark_tolerance_mm: how well landmarks were placed.
        landmark_folds: register so many times more, each time without a share of the landmarks, and note the error
            of each in the run that did not know it. As many as there are landmarks leave out one at a time.
        frame: of a 4-D moving image, a number or ``"mean"``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        seed: of every random choice.
        progress: called with (stage, share done).

    Returns:
        The transform from fixed to moving points with everything needed to judge and save it.

    Raises:
        InputError: an image or mask cannot be registered, the fields of view do not overlap from any start, or
            the run cannot keep to ``settings.memory_gib``.
    """
    journal = Journal(progress)
    settings = check(settings if settings is not None else load_settings())
    where = chosen_device(device)
    trained = load_trained(system_of(settings), settings.weights, where) if isinstance(settings, Learned) else None
    movings = [moving] if isinstance(moving, Image) else list(moving)
    if not movings:
        raise InputError("give at least one moving image")
    given = [*(Channel(fixed, image) for image in movings), *channels]
    if trained is not None and len(given) != 1:
        raise InputError(f"{len(given)} pairs of images were given; {system_of(settings)} registers one to one")
    with journal.stage("prepare"):
        given = checked(given, fixed_mask, moving_mask)
        fixed, movings = given[0].fixed, [channel.moving for channel in given]
        pairs = _frames(given, frame, journal)
        begin = _linear(initial)
        places = None if landmarks is None else _paired(*landmarks, landmark_tolerance_mm, fixed, movings[0])
        _check_folds(landmark_folds, places)
        plan = None
        if isinstance(settings, Mcbo):
            plan = _planned(given, settings, deformable, where, journal)
    task = _Task(pairs, settings, plan, trained, begin, deformable, seed, where)
    linear, dense, settings = task.solved(places, journal)
    reproduces = isinstance(settings, Mcbo) and settings.reproduce
    if reproduces and (fixed_mask is not None or moving_mask is not None):
        journal.note("masks", "in the scores only: the published system takes none")
    parts = (linear,) if dense is None else (dense, linear)
    transform = Chain(parts, fixed_grid=fixed.grid, moving_grid=movings[0].grid)
    if places is not None:
        journal.note("landmarks", _errors(places, {"before": begin, "linear": linear, "after": transform}))
        if landmark_folds:
            with journal.stage("landmark folds"):
                journal.note("landmarks held out", task.held_out(places, landmark_folds))
    labels = _segmentations(pairs[0], trained, journal, where)
    result = Result(tuple(given), tuple(pairs), transform, begin, settings, journal, seed, str(where), labels)
    with journal.stage("judge"):
        result.verdict  # noqa: B018  # computed here so that its time is counted
    return result


@dataclass(frozen=True)
class _Task:
    """All that a registration depends on but its landmarks."""

    pairs: list[Channel]
    settings: Settings
    plan: Plan | None
    trained: Trained | None
    begin: Affine
    deformable: bool
    seed: int
    device: torch.device

    def solved(
        self, landmarks: Landmarks | None, journal: Journal
    ) -> tuple[Affine, DisplacementField | None, Settings]:
        """The linear map, the displacement before it, and the settings it was found with."""
        (first, *others), settings = self.pairs, self.settings
        matrix = align(
            first.fixed, first.moving, settings.linear, journal, self.begin.matrix, self.seed, landmarks, others
        )
        linear = Affine(matrix)
        dense: DisplacementField | None = None
        if self.deformable and self.plan is not None:
            dense, settings = _deformed(self.pairs, linear, self.plan, journal, self.device, landmarks)
        elif self.deformable and self.trained is not None and isinstance(settings, Learned):
            dense = _learned(first, linear, self.trained, settings, journal, self.device)
        return linear, dense, settings

    def held_out(self, landmarks: Landmarks, folds: int) -> dict[str, Any]:
        """Errors in mm of all landmarks, each after a registration that did not know it nor its fold."""
        fold = np.arange(len(landmarks.names)) % folds
        errors = np.zeros(len(fold))
        for number in range(folds):
            linear, dense, _ = self.solved(landmarks.chosen(fold != number), Journal())
            parts: tuple[Transform, ...] = (linear,) if dense is None else (dense, linear)
            errors[fold == number] = landmarks.chosen(fold == number).errors_mm(Chain(parts))
        return {"folds": folds, "errors_mm": errors.round(3).tolist()}


def _check_folds(folds: int, landmarks: Landmarks | None) -> None:
    if folds == 0:
        return
    count = 0 if landmarks is None else len(landmarks.names)
    if not 2 <= folds <= count:
        raise InputError(
            f"{folds} folds were asked for, and there are {count} landmarks; give 2 to as many folds as landmarks"
        )


def _planned(
    pairs: list[Channel], settings: Mcbo, deformable: bool, device: torch.device, journal: Journal
) -> Plan:
    """How the run keeps to its memory limit; the journal says what was changed for it."""
    if device.type != "cpu":
        if settings.memory_gib:
            raise InputError("memory_gib is kept to on the processor only; add --device cpu, or leave it at 0")
        return unlimited(pairs, settings)
    plan = fitted(pairs, settings, deformable)
    journal.note("memory", plan.record())
    return plan


def _deformed(
    pairs: list[Channel],
    linear: Affine,
    plan: Plan,
    journal: Journal,
    device: torch.device,
    landmarks: Landmarks | None,
) -> tuple[DisplacementField | None, Mcbo]:
    """``_deformation`` and the settings it was made with; after running out of memory once more, smaller."""
    try:
        return _deformation(pairs, linear, plan, journal, device, landmarks), plan.settings
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    plan = smaller(plan, pairs)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    journal.note("memory", {**plan.record(), "ran_out": True})
    log.warning("memory ran out; trying again: %s", "; ".join(plan.changes))
    return _deformation(pairs, linear, plan, journal, device, landmarks), plan.settings


def _deformation(
    pairs: list[Channel],
    linear: Affine,
    plan: Plan,
    journal: Journal,
    device: torch.device,
    landmarks: Landmarks | None = None,
) -> DisplacementField | None:
    """The displacement that follows the linear map, or None where it does harm."""
    settings = plan.settings
    with journal.stage("draw"):
        _check_overlap(pairs, linear)
        grid, volumes = _volumes(pairs, linear, settings, device)

    places = None if landmarks is None else landmarks.on(grid, linear.matrix)
    field = mcbo(volumes, settings, journal, places, plan.economy)
    with journal.stage("transform"):
        dense = faded_field(field.cpu(), grid)
        needed = landmarks is not None and _pulls(landmarks, linear, dense)
        if settings.reproduce or _helps(volumes, field, journal, needed):
            return dense
    misled = journal.notes["deformable"]["after"] - 1 < MISLED * (journal.notes["deformable"]["before"] - 1)
    if not misled or not settings.otherwise:
        return None
    return _otherwise(volumes, grid, settings, journal, places, plan.economy)


def _otherwise(
    volumes: list[Pair],
    grid: Grid,
    settings: Mcbo,
    journal: Journal,
    places: OnGrid | None,
    economy: Economy,
) -> DisplacementField | None:
    """The displacement that mutual information alone finds from the linear map, or None where it does harm.

    Where the local structure of two modalities differs, as in MR and light microscopy, descriptors of it mislead.
    """
    alone = replace(settings, levels=(), refine=settings.otherwise, otherwise=())
    field = mcbo(volumes, alone, journal, places, economy)
    before, after = (-cost for cost in difference(volumes, settings, torch.zeros_like(field), field))
    kept = after > before
    journal.note("otherwise", {"kept": kept, "judge": "descriptors", "before": before, "after": after})
    return faded_field(field.cpu(), grid) if kept else None


def _learned(
    pair: Channel,
    linear: Affine,
    trained: Trained,
    settings: Learned,
    journal: Journal,
    device: torch.device,
) -> DisplacementField | None:
    """The displacement that a trained network gives after the linear map, or None where it does harm."""
    _check_overlap([pair], linear)
    grid, volumes, field = displacement(trained, pair.fixed, pair.moving, linear, settings, journal, device)
    with journal.stage("transform"):
        return faded_field(field.cpu(), grid) if _helps([volumes], field, journal) else None


def _segmentations(
    pair: Channel, trained: Trained | None, journal: Journal, device: torch.device
) -> dict[str, Labels]:
    """Labels of both images, each on its own grid, where the trained network has segmenters."""
    if trained is None or not trained.segmenters:
        return {}
    with journal.stage("segment"):
        return {
            "fixed": segmented(trained, pair.fixed, "fixed", device),
            "moving": segmented(trained, pair.moving, "moving", device),
        }


def _helps(pairs: list[Pair], field: torch.Tensor, journal: Journal, needed: bool = False) -> bool:
    """Whether mutual information, which no deformable stage fits, grows where the images are seen all along.

    ``needed``: landmarks ask for the deformation, whatever the images say.
    """
    coarse = [pair.pooled(2) for pair in pairs]
    before, after = information(coarse, None, resize(field, coarse[0].fixed.values.shape))
    kept = needed or not after <= before
    journal.note("deformable", {"kept": kept, "judge": "mutual information", "before": before, "after": after})
    return kept


def _paired(fixed: Points, moving: Points, tolerance_mm: float, *images: Image) -> Landmarks:
    """The landmarks, if they lie in the images' world."""
    pairs = Landmarks.paired(fixed, moving, tolerance_mm)
    for xyz, image in zip((pairs.fixed, pairs.moving), images, strict=True):
        if not image.grid.contains(xyz).any():
            low, high = (ends.round(1).tolist() for ends in (xyz.min(0), xyz.max(0)))
            raise InputError(
                f"no landmark lies in {image.name}: they reach from {low} to {high} mm RAS, its middle is at "
                f"{image.grid.center.round(1).tolist()}. Were they given in the other order, or as LPS?"
            )
    return pairs


def _pulls(landmarks: Landmarks, linear: Affine, dense: DisplacementField) -> bool:
    """Whether the deformation brings landmarks nearer that the linear map leaves well beyond the tolerance."""
    tolerance = landmarks.tolerance_mm
    before, after = (
        np.maximum(landmarks.errors_mm(transform) - tolerance, 0).mean()
        for transform in (linear, Chain((dense, linear)))
    )
    return bool(before - after > NEEDED * tolerance)


def _errors(landmarks: Landmarks, stages: dict[str, Transform]) -> dict[str, Any]:
    """Errors in mm of every landmark at each stage, by name."""
    errors = {f"{name}_mm": landmarks.errors_mm(stage).round(3).tolist() for name, stage in stages.items()}
    return {"tolerance_mm": landmarks.tolerance_mm, "names": list(landmarks.names), **errors}


def _frames(channels: list[Channel], frame: int | str, journal: Journal) -> list[Channel]:
    """The channels with one frame of every image; of fixed images it is the first."""
    targets = {id(image): _one_frame(image, 0, journal) for image in fixed_images(channels)}
    return [
        replace(channel, fixed=targets[id(channel.fixed)], moving=_one_frame(channel.moving, frame, journal))
        for channel in channels
    ]


def _one_frame(image: Image, frame: int | str, journal: Journal) -> Image:
    if frame != "mean" and (not isinstance(frame, int) or not 0 <= frame < image.channels):
        frames = f"frames 0 to {image.channels - 1}" if image.channels > 1 else "the one frame 0"
        raise InputError(f"{image.name} has {frames}; frame must be a number of these or 'mean', not {frame!r}")
    if image.channels == 1:
        return image
    journal.note(f"frame of {image.name}", frame)
    return image.mean_frame() if frame == "mean" else image.frame(int(frame))


def _linear(initial: Transform | None) -> Affine:
    if initial is None:
        return Affine.identity()
    if not isinstance(initial, Affine):
        raise InputError(f"the initial transform must be linear, but a {type(initial).__name__} was given")
    return initial


def _check_overlap(pairs: list[Channel], start: Affine) -> None:
    back = np.linalg.inv(start.matrix)
    for pair in pairs:
        fixed, moving = pair.fixed, pair.moving
        moved = Grid(moving.grid.shape, back @ moving.grid.affine)
        gap = gap_mm(fixed.grid, moved)
        if gap > 0:
            raise InputError(
                f"{moving.name} lies {gap:.0f} mm away from {fixed.name}: their boxes do not meet under this "
                "start. Let the linear stage find one, or give a transform file with --initial"
            )


def _volumes(pairs: list[Channel], start: Affine, settings: Mcbo, device: torch.device) -> tuple[Grid, list[Pair]]:
    """The working grid and all images drawn on it."""
    grid = grid_of([(pair.fixed.grid, pair.moving.grid) for pair in pairs], settings)
    targets = {id(pair.fixed): _drawn(pair.fixed, grid, Affine.identity(), settings) for pair in pairs}
    sources = [_drawn(pair.moving, grid, start, settings) for pair in pairs]
    for pair, source in zip(pairs, sources, strict=True):
        if not (source.valid & targets[id(pair.fixed)].valid).any():
            raise InputError(
                f"{pair.moving.name} and {pair.fixed.name} have no valid voxel in common under this start (masks "
                "included); let the linear stage find one, or check the masks"
            )
    seen = {key: _volume(drawn, settings, device) for key, drawn in targets.items()}
    return grid, [
        Pair(seen[id(pair.fixed)], _volume(source, settings, device), pair.weight, pair.describe)
        for pair, source in zip(pairs, sources, strict=True)
    ]


def _drawn(image: Image, grid: Grid, start: Affine, settings: Mcbo) -> Image:
    """An image on the working grid; one that the published system has there is left as it is."""
    at_rest = image.grid.same_as(grid) and np.allclose(start.matrix, np.eye(4))
    return image if settings.reproduce and at_rest else onto(image, grid, start)


def _volume(drawn: Image, settings: Mcbo, device: torch.device) -> Volume:
    if settings.reproduce:
        everywhere = torch.ones(drawn.grid.shape, dtype=torch.bool, device=device)
        return Volume(drawn.data[0].to(device), everywhere, everywhere)
    values = normalised(drawn.data[0], drawn.valid)
    return Volume(values.to(device), drawn.valid.to(device), foreground(drawn).to(device))


def faded_field(field: torch.Tensor, grid: Grid) -> DisplacementField:
    """Displacement in cells over the field of view of ``grid`` -> mm, on a grid widened so that it fades to zero.

    The margin is twice the largest displacement at the faces: fading over it, the transform stays invertible where
    the scan ends. Where the whole would have more than ``MAX_FIELD_VOXELS``, cells are made larger.
    """
    cells = grid.resized(field.shape[1:])
    to_mm = torch.from_numpy(cells.affine[:3, :3].copy()).float()
    millimetres = torch.einsum("ab,bijk->aijk", to_mm, field)
    long = lengths(millimetres)
    margin_mm = 2 * max(float(long.movedim(axis, 0)[[0, -1]].max()) for axis in range(3))
    wide = np.prod(np.asarray(cells.shape) + 2 * (margin_mm / cells.spacing + 1))
    if wide > MAX_FIELD_VOXELS:
        shape = np.maximum(np.floor(np.asarray(cells.shape) * (MAX_FIELD_VOXELS / wide) ** (1 / 3)), 1).astype(int)
        millimetres = resize(millimetres, shape.tolist(), scaled=False)
        cells = cells.resized(shape.tolist())
    margin = np.ceil(margin_mm / cells.spacing).astype(int).tolist()
    pad = [m for m in reversed(margin) for _ in range(2)]
    millimetres = torch.nn.functional.pad(millimetres[None], pad, mode="replicate")[0]
    for axis, (m, n) in enumerate(zip(margin, cells.shape, strict=True), start=1):
        place = torch.arange(n + 2 * m, dtype=torch.float32)
        beyond = torch.maximum(m - place, place - (n + m - 1)).clamp_min(0) / (m + 1)
        fade = 1 - beyond**2 * (3 - 2 * beyond)
        millimetres = millimetres * fade.reshape([-1 if a == axis else 1 for a in range(4)])
    return DisplacementField(millimetres.contiguous(), cells.padded(margin, margin))
