"""Translation, rigid, similarity and affine maps fitted by BFGS with analytic gradients.

Parameters are lengths in mm: an angle, a scale or a shear counts by how far it moves a point at the radius of the
body, so that one step size fits all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, minimize
from scipy.spatial.transform import Rotation

from crossmorph.kernels.linear import Matrix, pulled, seen

Model = Literal["translation", "rigid", "similarity", "affine"]
Vector = NDArray[np.floating[Any]]

Similarity = Callable[[torch.Tensor, torch.Tensor], tuple[float, torch.Tensor]]
"""From moving features (I, J, K, F) on the fixed grid and where they are known (I, J, K), to a value to be made
small and its derivative by those features."""

Pull = Callable[[Matrix], tuple[float, Vector]]
"""From a map (4, 4) of fixed to fixed points to a value and its derivative by the first three rows."""

SMALL_MM = 20.0
"""Mean radius of a body under which it measures lengths, so that a mouse or a cell is fitted as a head is."""

LINE_SEARCH = 12
"""Evaluations after which a search along a line is given up.

Voxels that come into view make the similarity jump by a little, and close to the best map a search that never ends
would follow; most of those that get anywhere take two or three, and what longer ones gain is not worth their time.
"""

SIZES: dict[Model, int] = {"translation": 3, "rigid": 6, "similarity": 7, "affine": 12}


@dataclass(frozen=True)
class Frame:
    """Maps about a centre.

        x -> c + t + A (x - c),    A = I;  R(w / r);  exp(s / r) R(w / r);  I + L / r

    with parameters t, w, s, L in mm.

    Args:
        model: which of the four.
        center_mm: (3,) c, in the fixed space.
        radius_mm: r.
    """

    model: Model
    center_mm: Vector
    radius_mm: float

    def matrix(self, parameters: Vector) -> Matrix:
        """(4, 4) of the map."""
        return self._with_slopes(parameters)[0]

    def slopes(self, parameters: Vector) -> NDArray[np.floating[Any]]:
        """(parameters, 3, 4): derivative of the first three rows of ``matrix``."""
        return self._with_slopes(parameters)[1]

    def _with_slopes(self, parameters: Vector) -> tuple[Matrix, NDArray[np.floating[Any]]]:
        shift, rest = parameters[:3], parameters[3:] / self.radius_mm
        linear, derivatives = _linear_part(self.model, rest)
        matrix = np.eye(4)
        matrix[:3, :3] = linear
        matrix[:3, 3] = self.center_mm + shift - linear @ self.center_mm
        slopes = np.zeros((len(parameters), 3, 4))
        slopes[:3, :, 3] = np.eye(3)
        for slope, derivative in zip(slopes[3:], derivatives, strict=True):
            slope[:, :3] = derivative / self.radius_mm
            slope[:, 3] = -slope[:, :3] @ self.center_mm
        return matrix, slopes


def _linear_part(model: Model, rest: Vector) -> tuple[Matrix, list[Matrix]]:
    """A and its derivatives by the parameters after the translation, in radians and ratios."""
    if model == "translation":
        return np.eye(3), []
    if model == "affine":
        return np.eye(3) + rest.reshape(3, 3), list(np.eye(9).reshape(9, 3, 3))
    turn, turns = _rotation(rest[:3])
    if model == "rigid":
        return turn, turns
    size = np.exp(rest[3])
    return size * turn, [size * t for t in turns] + [size * turn]


def _cross(v: Vector) -> Matrix:
    return np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])


def _rotation(w: Vector) -> tuple[Matrix, list[Matrix]]:
    """Rotation of a rotation vector and its derivatives (Gallego and Yezzi, J Math Imaging Vis 2015, eq. 9)."""
    turn: Matrix = Rotation.from_rotvec(w).as_matrix()
    square = float(w @ w)
    if square < 1e-16:
        return turn, [_cross(axis) @ turn for axis in np.eye(3)]
    rest = np.eye(3) - turn
    return turn, [(w[n] * _cross(w) + _cross(np.cross(w, rest[:, n]))) @ turn / square for n in range(3)]


@dataclass(frozen=True)
class Fit:
    """What an optimisation gives back: the map, the value there and before, and how often it was evaluated."""

    matrix: Matrix
    value: float
    before: float
    evaluations: int


@dataclass(frozen=True)
class Problem:
    """What is made small, and where.

    Attributes:
        similarity: of what is seen of ``features`` on the fixed grid.
        features: (A, B, C, F) of the moving image, channels last.
        known: (A, B, C) bool, where these are valid.
        to_voxels: (4, 4) from fixed points in mm to voxels of ``features``, the start included.
        from_voxels: (4, 4) from voxels of ``mask`` to fixed points in mm.
        mask: (I, J, K) bool of the fixed grid: what is compared.
        weight: beside other problems.
    """

    similarity: Similarity
    features: torch.Tensor
    known: torch.Tensor
    to_voxels: Matrix
    from_voxels: Matrix
    mask: torch.Tensor
    weight: float = 1.0

    def __call__(self, matrix: Matrix) -> tuple[float, Vector]:
        """Weighted value of a map (4, 4) of fixed to fixed points, and its derivative by the first three rows."""
        voxels = (self.to_voxels @ matrix @ self.from_voxels)[:3]
        values, inside = seen(self.features, self.known, voxels, self.mask)
        value, by_value = self.similarity(values, inside)
        by_voxels = pulled(self.features, voxels, inside, by_value)
        slope: Vector = self.to_voxels[:3, :3].T @ by_voxels @ self.from_voxels.T
        return self.weight * value, self.weight * slope

    def points(self) -> Vector:
        """(N, 3) mm of the voxels that are compared."""
        points: Vector = self.mask.nonzero().numpy() @ self.from_voxels[:3, :3].T + self.from_voxels[:3, 3]
        return points


class _StuckError(Exception):
    """A search along a line gets nowhere."""


def fit(
    problems: Sequence[Problem],
    model: Model,
    iterations: int = 50,
    tolerance_mm: float = 0.005,
    pull: Pull | None = None,
) -> Fit:
    """The map of a model, near the identity, that makes the sum of some similarities smallest.

    Args:
        problems: what is made small.
        model: which maps are tried, about the middle of what is compared.
        iterations: of BFGS, at most.
        tolerance_mm: it ends when no parameter changes by more than this; of bodies smaller than ``SMALL_MM`` by
            as much less as they are smaller. It also ends with a search along a line that is given up.
        pull: another term, by the map's matrix, in units of the similarity's slope at the start times 1 mm.

    Returns:
        A map of fixed points to fixed points, to be applied before the start.
    """
    frame = _frame(problems, model)
    count = counted = 0
    reached = OptimizeResult(x=np.zeros(SIZES[frame.model]))

    def objective(parameters: Vector) -> tuple[float, Vector]:
        nonlocal count
        count += 1
        matrix = frame.matrix(parameters)
        terms = [problem(matrix) for problem in problems]
        total: Vector = np.sum([slope for _, slope in terms], axis=0)
        return sum(value for value, _ in terms), _chained(frame, parameters, total)

    def watch(intermediate_result: OptimizeResult) -> None:
        nonlocal reached, counted
        step = float(np.abs(intermediate_result.x - reached.x).max())
        reached, counted = intermediate_result, count
        if step < tolerance_mm:
            raise StopIteration

    unit = min(1.0, frame.radius_mm / SMALL_MM)
    before, slope = objective(reached.x)
    if not np.any(slope):
        return Fit(np.eye(4), before, before, count)
    size = float(np.linalg.norm(slope))

    def scaled(steps: Vector) -> tuple[float, Vector]:
        """With a slope of one at the start, the first step is about one ``unit`` long, whatever the similarity's
        range."""
        if count - counted >= LINE_SEARCH:
            raise _StuckError
        parameters = unit * steps
        value, by_parameters = objective(parameters)
        value, by_parameters = value / size, by_parameters / size
        if pull is not None:
            more, by_matrix = pull(frame.matrix(parameters))
            value, by_parameters = value + more, by_parameters + _chained(frame, parameters, by_matrix)
        return value / unit, by_parameters

    first = before if pull is None else before + size * pull(np.eye(4))[0]
    reached.fun = first / size / unit
    options = {"maxiter": iterations, "gtol": 1e-9}
    with suppress(_StuckError):
        minimize(scaled, reached.x, jac=True, method="BFGS", callback=watch, options=options)
    value = float(reached.fun) * size * unit
    if not value < first:
        return Fit(np.eye(4), first, first, count)
    return Fit(frame.matrix(unit * reached.x), value, first, count)


def _frame(problems: Sequence[Problem], model: Model) -> Frame:
    """Maps about the middle of all that is compared, lengths at its mean radius."""
    points = np.concatenate([problem.points() for problem in problems])
    middle = points.mean(0)
    return Frame(model, middle, float(np.sqrt(np.square(points - middle).sum(1).mean())))


def _chained(frame: Frame, parameters: Vector, by_matrix: Matrix) -> Vector:
    """A derivative by the matrix as one by the parameters."""
    by_parameters: Vector = np.einsum("pab,ab->p", frame.slopes(parameters), by_matrix)
    return by_parameters
