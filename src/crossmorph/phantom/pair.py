"""The two scans, the motion between them, and what is known about both.

The fixed scan evaluates the anatomy at its voxel centres; the moving scan evaluates it at its own voxel centres
sent back through the closed-form map ``moving -> fixed``. Neither scan is interpolated, so the truth is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.spatial.transform import Rotation

from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.phantom.anatomy import ORGANS, Anatomy
from crossmorph.phantom.waves import Array, Waves
from crossmorph.points import Points
from crossmorph.space import Grid


@dataclass(frozen=True, eq=False)
class Motion:
    """The known map between the scans: a rotation and a translation after a smooth deformation.

    ``to_fixed`` is closed-form: z + bend(z) with z = rotation^-1 (y - translation). ``to_moving`` inverts it.
    """

    rotation: Array
    translation_mm: Array
    bend: Waves

    def to_fixed(self, points: Array) -> Array:
        """Moving points (N, 3) RAS mm to the same anatomy in the fixed scan."""
        rigid = (np.asarray(points, np.float64) - self.translation_mm) @ self.rotation
        return rigid + self.bend(rigid)

    def to_moving(self, points: Array, tolerance_mm: float = 1e-6) -> Array:
        """Fixed points (N, 3) RAS mm to the same anatomy in the moving scan, by fixed-point iteration.

        ``make_pair`` keeps the slope of the bend below 0.8, so that the iteration contracts everywhere.
        """
        points = np.asarray(points, np.float64)
        rigid = points - self.bend(points)
        for _ in range(100):
            step = points - rigid - self.bend(rigid)
            rigid = rigid + step
            if np.abs(step).max(initial=0) < tolerance_mm:
                break
        return rigid @ self.rotation.T + self.translation_mm


@dataclass(frozen=True, eq=False)
class PhantomPair:
    """A CT-like and an MR-like scan of one anatomy, on different grids, with everything known about them.

    Args:
        fixed, moving: the CT-like (HU) and the MR-like scan, each valid everywhere.
        fixed_labels, moving_labels: the organs named in ``ORGANS``, on the grids of the scans.
        fixed_points, moving_points: the same anatomical points in both scans, exact to 1e-6 mm.
        motion: the map between the two worlds.
    """

    fixed: Image
    moving: Image
    fixed_labels: Labels
    moving_labels: Labels
    fixed_points: Points
    moving_points: Points
    motion: Motion


def make_pair(
    shape: tuple[int, int, int] = (96, 80, 72), spacing_mm: ArrayLike = 3.0, max_mm: float = 12.0, seed: int = 0
) -> PhantomPair:
    """Generate the pair.

    Args:
        shape, spacing_mm: of the fixed, axis-aligned RAS grid. The anatomy keeps its size in mm (a trunk 265 mm
            wide and 192 mm deep), whatever the field of view. The moving scan has slices 1.6 times as thick, other
            axes (LPS) and is oblique.
        max_mm: largest length of the smooth part of the motion in the body; a few degrees and mm of rotation and
            translation come on top.
        seed: one number, one pair.

    Raises:
        InputError: ``max_mm`` is so large that the deformation could fold.
    """
    rng = np.random.default_rng(seed)
    anatomy = Anatomy(rng)
    motion = _random_motion(rng, max_mm)
    fixed_grid = Grid.from_spacing(shape, spacing_mm)
    moving_grid = _moving_grid(rng, fixed_grid)

    ct, _, labels = anatomy.sample(_centers(fixed_grid))
    fixed, fixed_labels = _volumes("ct", "fixed", fixed_grid, _scan_ct(rng, ct), labels)
    centers = _centers(moving_grid)
    _, mr, labels = anatomy.sample(motion.to_fixed(centers))
    moving, moving_labels = _volumes("mr", "moving", moving_grid, _scan_mr(rng, mr, centers), labels)

    points, names = _landmarks(rng, anatomy, fixed_labels)
    elsewhere = motion.to_moving(points)
    both = moving_grid.contains(elsewhere)
    kept = tuple(name for name, inside in zip(names, both, strict=True) if inside)
    return PhantomPair(
        fixed,
        moving,
        fixed_labels,
        moving_labels,
        Points(torch.from_numpy(points[both]), kept, "fixed"),
        Points(torch.from_numpy(elsewhere[both]), kept, "moving"),
        motion,
    )


# -- scanners, motion, landmarks ---------------------------------------------------------------------------------


def _centers(grid: Grid) -> Array:
    """World positions of all voxel centres, (N, 3) RAS mm."""
    return grid.to_world(np.indices(grid.shape, np.float64).reshape(3, -1).T)


def _volumes(name: str, space: str, grid: Grid, values: Array, labels: NDArray[np.int16]) -> tuple[Image, Labels]:
    return (
        Image.from_array(values.reshape(grid.shape).astype(np.int16), grid, name=name, space=space),
        Labels.from_array(labels.reshape(grid.shape), grid, name=f"{name}_labels", space=space),
    )


def _scan_ct(rng: np.random.Generator, signal: Array) -> Array:
    return np.clip(np.round(signal + rng.normal(0, 14, len(signal))), -1024, 3071)


def _scan_mr(rng: np.random.Generator, signal: Array, world: Array) -> Array:
    """Coil shading, and the noise of a magnitude image (Rician)."""
    shading = np.exp(0.22 * Waves.random(rng, (350, 700), 1, 12)(world)[:, 0])
    noise = rng.normal(0, 16, (2, len(signal)))
    magnitude: Array = np.round(np.hypot(signal * shading + noise[0], noise[1]))
    return magnitude


def _moving_grid(rng: np.random.Generator, fixed: Grid) -> Grid:
    """LPS, oblique, 0.9 times the voxel size in plane, slices 1.6 times as thick, about the same field of view."""
    angles = rng.uniform(4, 8, 3) * rng.choice([-1, 1], 3)
    spacing = fixed.spacing * (0.9, 0.9, 1.6)
    shape = [int(n) for n in np.ceil(fixed.extent_mm / spacing)]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("zyx", angles, degrees=True).as_matrix() * (-1, -1, 1) * spacing
    affine[:3, 3] = fixed.center + np.array([8, -6, 5]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid((shape[0], shape[1], shape[2]), affine)


def _random_motion(rng: np.random.Generator, max_mm: float) -> Motion:
    bend = Waves.random(rng, (110, 240), 3, 14)
    around = np.stack(np.meshgrid(*[np.linspace(-r, r, 20) for r in (170, 150, 150)]), -1).reshape(-1, 3)
    body = around[(np.abs(around) < (132, 96, 110)).all(1)]
    unit = Waves(bend.vectors, bend.phases, bend.weights / np.linalg.norm(bend(body), axis=1).max())
    steepest = np.linalg.norm(unit.jacobian(around), ord=2, axis=(1, 2)).max()
    limit = 0.8 / steepest
    if not 0 <= max_mm <= limit:
        raise InputError(f"max_mm {max_mm:g} could fold the phantom of this seed; take 0 to {limit:.1f} mm")
    bend = Waves(unit.vectors, unit.phases, unit.weights * max_mm)
    rotation = Rotation.from_euler("zyx", rng.uniform(-4, 4, 3), degrees=True).as_matrix()
    return Motion(rotation, rng.uniform(-6, 6, 3), bend)


def _landmarks(rng: np.random.Generator, anatomy: Anatomy, labels: Labels) -> tuple[Array, list[str]]:
    """A lattice of about 20 mm in the body, and up to 12 points on each organ's surface; (N, 3) mm and names."""
    grid, ids = labels.grid, labels.data.numpy()
    steps = np.maximum(np.round(20 / grid.spacing).astype(int), 1)
    lattice = np.stack(np.meshgrid(*[np.arange(s // 2, n, s) for s, n in zip(steps, grid.shape, strict=True)]), -1)
    places = grid.to_world(lattice.reshape(-1, 3).astype(float))
    places = places[anatomy.skin_level(places) < -6]
    names = [f"body {i + 1}" for i in range(len(places))]
    edge = (maximum_filter(ids, 3) != minimum_filter(ids, 3)) & (ids > 0)
    points = [places]
    for label, organ in ORGANS.items():
        surface = np.argwhere(edge & (ids == label))
        chosen = surface[rng.choice(len(surface), min(12, len(surface)), replace=False)]
        points.append(grid.to_world(chosen.astype(float)))
        names += [f"{organ} {i + 1}" for i in range(len(chosen))]
    return np.concatenate(points), names
