"""What the systems do to a generated pair: linear, mcbo, macmind, gradients (.png); run by `make drawings`.

The pair is `crossmorph.phantom.make_pair`; errors are distances from its known motion, on the body.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import crossmorph as cm
from crossmorph.describe.macmind import bins as log_polar
from crossmorph.describe.macmind import msssc
from crossmorph.describe.mind import mind_ssc
from crossmorph.match.convex import cost_volume
from crossmorph.phantom import PhantomPair, make_pair
from crossmorph.preprocess import foreground, normalised, onto
from crossmorph.report.figures import GREEN, MAGENTA, planes, scaled, window
from crossmorph.settings import Linear
from crossmorph.systems.gradient_guidance import gradient_map
from crossmorph.transform import Affine, Transform

HERE = Path(__file__).resolve().parent
CORONAL = 1


def sheet(columns: int, rows: int = 1, width: float = 11.0, height: float | None = None) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height or rows * width / columns), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def show(axis: Any, picture: np.ndarray, title: str, **colours: Any) -> Any:
    drawn = axis.imshow(picture, origin="lower", **({"cmap": "gray"} | colours))
    axis.set_title(title, fontsize=10)
    axis.set(xticks=[], yticks=[], xlim=(picture.shape[1] - 0.5, -0.5))
    return drawn


def coronal(image: cm.Image, fixed: cm.Image) -> np.ndarray:
    return scaled(*planes(fixed)[CORONAL].show(image), window(image))


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.png", dpi=90)


def error_mm(transform: Transform, pair: PhantomPair) -> float:
    off = transform(pair.fixed_points.xyz) - pair.moving_points.xyz
    return float(off.norm(dim=1).mean())


def linear(pair: PhantomPair) -> None:
    """A far MR: where its header puts it, the start that was found, and after each fit."""
    away = Affine(Affine.translation((150, -60, 40)).matrix @ Affine.rotation((0, 0, 50)).matrix)
    grid = cm.Grid(pair.moving.grid.shape, away.matrix @ pair.moving.grid.affine)
    far = replace(pair, moving=replace(pair.moving, grid=grid))
    far = replace(far, moving_points=replace(pair.moving_points, xyz=away(pair.moving_points.xyz)))
    runs = {
        model: cm.register(far.fixed, far.moving, settings=cm.Mcbo(linear=Linear(model)), deformable=False)
        for model in ("rigid", "affine")
    }
    choices = runs["rigid"].record["choices"]
    start = next(entry for entry in choices["starts"] if entry["start"] == choices["start"]["from"])
    poses = {
        "header": Affine.identity(),
        f"start: {start['start']}": Affine(np.array(start["matrix"])),
        "rigid": runs["rigid"].linear,
        "affine": runs["affine"].linear,
    }
    figure, axes = sheet(len(poses), height=3.3)
    green = coronal(far.fixed, far.fixed)[..., None] * GREEN
    for axis, (name, pose) in zip(axes[0], poses.items(), strict=True):
        magenta = coronal(pose.apply(far.moving, like=far.fixed), far.fixed)[..., None] * MAGENTA
        show(axis, green + magenta, f"{name}\n{error_mm(pose, far):.1f} mm")
    save(figure, "linear")


def mcbo(pair: PhantomPair) -> None:
    """Descriptors, the cost of one block, and the error that every step leaves."""
    settings = cm.load_settings()
    affine = cm.register(pair.fixed, pair.moving, deformable=False).linear
    given = replace(settings, linear=Linear("none"))
    steps: dict[str, Transform] = {"linear stage": affine}
    for count, name in enumerate(("search, refine 1", "refine 2", "refine 3"), start=1):
        stages = settings.refine[:count]
        result = cm.register(pair.fixed, pair.moving, initial=affine, settings=replace(given, refine=stages))
        steps[name] = result.transform
    figure, axes = sheet(5, 2, height=4.6)
    described(axes[0], pair, affine)
    plane = planes(pair.fixed)[CORONAL]
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in plane.grid.shape), indexing="ij"), -1)
    places = plane.grid.to_world(voxels.astype(float)).reshape(-1, 3)
    truth = pair.motion.to_moving(places)
    body = plane.show(replace(pair.fixed, data=foreground(pair.fixed)[None].float()))[0] > 0.5
    axes[1, -1].set_axis_off()
    for axis, (name, transform) in zip(axes[1], steps.items(), strict=False):
        off = np.linalg.norm(transform(places) - truth, axis=1).reshape(plane.grid.shape)
        picture = np.where(body, plane.flat(torch.from_numpy(off)), np.nan)
        title = f"{name}\n{error_mm(transform, pair):.2f} mm"
        drawn = show(axis, picture, title, cmap="cividis", vmin=0, vmax=8)
    figure.colorbar(drawn, ax=axes[1, -1], label="error, mm", location="left", fraction=0.1)
    save(figure, "mcbo")


def described(axes: Any, pair: PhantomPair, affine: Affine) -> None:
    """Both images and three of their MIND-SSC channels as colours; the costs of one block."""
    grid = pair.fixed.grid.respaced(2.0)
    images = [onto(pair.fixed, grid), onto(pair.moving, grid, affine)]
    features = [mind_ssc(normalised(image.data[0], image.valid)) for image in images]
    row = grid.shape[1] // 2
    for axis, image, name in zip(axes, images, ("CT", "MR, linear"), strict=False):
        show(axis, scaled(image.data[0][:, row].T.numpy(), np.True_, window(image)), name)
    for axis, found, name in zip(axes[2:], features, ("MIND-SSC of the CT", "of the MR"), strict=False):
        show(axis, found[[0, 4, 8], :, row].permute(2, 1, 0).numpy(), name)
    level = 6
    pooled = [torch.nn.functional.avg_pool3d(found[None], level)[0] for found in features]
    everywhere = torch.ones(pooled[0].shape[1:], dtype=torch.bool)
    cost = cost_volume(pooled[0], pooled[1], 4, (everywhere, everywhere), 0.0)
    block = [int(n) for n in grid.to_voxel(np.array([50.0, 0.0, 0.0])) / level]
    cube = cost[tuple(block)].reshape(9, 9, 9)
    show(axes[4], cube[:, 4].T.numpy(), "cost of 9 x 9 displacements", cmap="cividis_r")


def macmind(pair: PhantomPair) -> None:
    """Channels of msSSC in both modalities, and the log-polar bins around a voxel."""
    grid = pair.fixed.grid.respaced(2.0)
    images = [onto(pair.fixed, grid), onto(pair.moving, grid, Affine(true_affine(pair)))]
    figure, axes = sheet(5, 1, height=2.6)
    row = grid.shape[1] // 2
    for n, (image, name) in enumerate(zip(images, ("CT", "MR"), strict=True)):
        found = msssc(normalised(image.data[0], image.valid))
        show(axes[0, 2 * n], scaled(image.data[0][:, row].T.numpy(), np.True_, window(image)), name)
        show(axes[0, 2 * n + 1], found[[0, 6, 12], :, row].permute(2, 1, 0).numpy(), f"msSSC of the {name}")
    bins(axes[0, 4])
    save(figure, "macmind")


def true_affine(pair: PhantomPair) -> np.ndarray:
    """The affine map next to the known motion."""
    places = pair.fixed_points.xyz.numpy()
    fit = np.linalg.lstsq(np.c_[places, np.ones(len(places))], pair.moving_points.xyz.numpy(), rcond=None)[0]
    return np.vstack((fit.T, (0, 0, 0, 1)))


def bins(axis: Any) -> None:
    """Which voxels of the plane belong to which of the 16 bins; the middle one belongs to all inner ones."""
    weights = log_polar()
    number = weights.argmax(0).astype(float)
    number[weights.shape[1] // 2, weights.shape[2] // 2] = np.nan
    show(axis, number, "16 log-polar bins", cmap="tab20")


def gradients(pair: PhantomPair) -> None:
    """What the second branch of gradient guidance sees."""
    grid = pair.fixed.grid.respaced(2.0)
    images = [onto(pair.fixed, grid), onto(pair.moving, grid, Affine(true_affine(pair)))]
    figure, axes = sheet(4, 1, height=2.9)
    row = grid.shape[1] // 2
    for n, (image, name) in enumerate(zip(images, ("CT", "MR"), strict=True)):
        values = normalised(image.data[0], image.valid)
        show(axes[0, 2 * n], scaled(image.data[0][:, row].T.numpy(), np.True_, window(image)), name)
        edges = gradient_map(values[None, None])[0, 0, :, row].T.numpy()
        show(axes[0, 2 * n + 1], edges, f"gradient map of the {name}")
    save(figure, "gradients")


if __name__ == "__main__":
    pair = make_pair(shape=(64, 56, 48), spacing_mm=4.5)
    for draw in (gradients, macmind, linear, mcbo):
        draw(pair)
