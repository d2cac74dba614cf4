"""Where a registration may start: candidate poses, and the best translation of each by Fourier transform."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import fft
from scipy.spatial.transform import Rotation

from crossmorph.kernels.linear import Matrix
from crossmorph.match.cost import expected_cost
from crossmorph.match.pose import Cells, cells
from crossmorph.match.view import View
from crossmorph.space import Array, Grid

MIN_OVERLAP = 0.2
"""Share of the smaller body that must be seen in both images."""


@dataclass(frozen=True)
class Start:
    """A candidate pose: where it comes from, and its (4, 4) from fixed to moving points."""

    name: str
    matrix: Matrix


def about(rotation: Array, center_fixed: Array, center_moving: Array) -> Matrix:
    """x -> center_moving + rotation (x - center_fixed)."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, center_moving - rotation @ center_fixed
    return matrix


def simple_starts(fixed: View, moving: View, header: Matrix) -> list[Start]:
    """The header's pose; then, keeping the header's orientation, centres of the bodies and of the grids."""
    turn = header[:3, :3]
    middle = [view.grid.to_world((np.asarray(view.grid.shape) - 1) / 2) for view in (fixed, moving)]
    bodies = [view.points().mean(0) for view in (fixed, moving)]
    return [
        Start("header", header),
        Start("centre of mass", about(turn, bodies[0], bodies[1])),
        Start("centre of the body's box", about(turn, middle[0], middle[1])),
    ]


def moment_starts(fixed: View, moving: View) -> list[Start]:
    """Principal axes of the bodies on each other: the four ways that are no mirror image."""
    axes, middles = [], []
    for view in (fixed, moving):
        points = view.points()
        middles.append(points.mean(0))
        vectors = np.linalg.eigh(np.cov((points - middles[-1]).T))[1]
        axes.append(vectors * np.sign(np.linalg.det(vectors)))
    starts = []
    for signs in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        turn = axes[1] @ np.diag(signs) @ axes[0].T
        starts.append(Start(f"moments {signs}", about(turn, *middles)))
    return starts


@cache
def rotations() -> Array:
    """(60, 3, 3): the rotations of an icosahedron; every rotation is within 44.5 degrees of one of them."""
    turns: Array = Rotation.create_group("I").as_matrix()
    return turns


def turned_starts(fixed: View, moving: View, header: Matrix) -> list[Start]:
    """The header's orientation turned by each of ``rotations``, centre of mass on centre of mass."""
    middles = [view.points().mean(0) for view in (fixed, moving)]
    return [Start(f"rotation {n}", about(header[:3, :3] @ turn, *middles)) for n, turn in enumerate(rotations())]


def random_starts(
    fixed: View, header: Matrix, count: int, degrees: float, translation_mm: float, seed: int
) -> list[Start]:
    """``count`` poses around the header's: angles and shifts uniform within limits (DISA, Sec. 4.2)."""
    draw = np.random.default_rng(seed)
    middle = fixed.points().mean(0)
    turns = Rotation.from_euler("xyz", draw.uniform(-degrees, degrees, (count, 3)), degrees=True).as_matrix()
    shifts = draw.uniform(-translation_mm, translation_mm, (count, 3))
    return [
        Start(f"random {n}", header @ about(turn, middle, middle + shift))
        for n, (turn, shift) in enumerate(zip(turns, shifts, strict=True))
    ]


class Translations:
    """Ranks rotations by the best of all translations: squared difference of pooled descriptors, by FFT.

    For a translation s the fixed body's cells cost |f(x) - m(x + s)|^2, or ``expected_cost`` where the moving
    image does not reach. All s at once are three sums of correlations (masked as in Padfield, IEEE TIP 2012).

    Args:
        fixed, target: the fixed view and its cells.
        moving: the moving view on its own grid.
    """

    def __init__(self, fixed: View, target: Cells, moving: View) -> None:
        self.fixed, self.moving, self.target = fixed, moving, target
        points = moving.points()
        self.centre = points.mean(0)
        radius = float(np.linalg.norm(points - self.centre, axis=1).max())
        self.side = 2 * (int(radius / fixed.grid.spacing[0]) // 2 * 2 + 2)
        self.size = tuple(fft.next_fast_len(n + self.side // 2, real=True) for n in target.valid.shape)
        weight = (target.body & target.valid).numpy().astype(np.float32)
        values = target.features.numpy() * weight
        self.weight = self._forward(weight)
        self.values = [self._forward(channel) for channel in values]
        self.square = self._forward((values * target.features.numpy()).sum(0))
        self.total = float(weight.sum())

    def _forward(self, values: Array) -> Array:
        transformed: Array = fft.rfftn(values, self.size)
        return transformed

    def best(self, start: Start) -> tuple[float, Start]:
        """The smallest mean cost over all translations, relative to ``expected_cost``, and the start there."""
        grid = self._around(start.matrix)
        source = cells(self.moving.seen(grid, start.matrix))
        known = source.valid.numpy().astype(np.float32)
        features = source.features.numpy() * known
        cross = sum(np.conj(f) * self._forward(m) for f, m in zip(self.values, features, strict=True))
        mask = self._forward(known)
        squares = np.conj(self.square) * mask + np.conj(self.weight) * self._forward((features**2).sum(0))
        overlap = fft.irfftn(np.conj(self.weight) * mask, self.size)
        difference = fft.irfftn(squares - 2 * cross, self.size)
        unknown = expected_cost(self.target.features, source.features, self.target.valid, source.valid)
        cost = (difference + unknown * (self.total - overlap)) / (unknown * self.total)
        cost[overlap < MIN_OVERLAP * min(self.total, float(source.body.sum()))] = np.inf
        place = np.unravel_index(int(np.argmin(cost)), cost.shape)
        shift = [p if p < self.side // 2 else p - n for p, n in zip(place, self.size, strict=True)]
        # fixed cell x meets cell x + shift of the drawn grid: a translation of fixed points
        drawn, here = (g.resized([n // 2 for n in g.shape]) for g in (grid, self.fixed.grid))
        move = np.eye(4)
        move[:3, 3] = drawn.to_world(np.asarray(shift, float)) - here.to_world(np.zeros(3))
        return float(cost[place]), Start(start.name, start.matrix @ move)

    def _around(self, matrix: Matrix) -> Grid:
        """A cube with the fixed grid's axes around the moving body, in the fixed world."""
        middle = np.linalg.inv(matrix) @ np.append(self.centre, 1)
        affine = self.fixed.grid.affine.copy()
        affine[:3, 3] = middle[:3] - affine[:3, :3] @ np.full(3, (self.side - 1) / 2)
        return Grid((self.side,) * 3, affine)
