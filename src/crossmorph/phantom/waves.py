"""Smooth random functions of world points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
CHUNK = 1 << 14  # points at a time, so that the cosines stay in the cache


@dataclass(frozen=True, eq=False)
class Waves:
    """A smooth random function R^3 -> R^C: a sum of cosines of ``vectors`` (K, 3) rad/mm, ``weights`` (K, C)."""

    vectors: Array
    phases: Array
    weights: Array

    @classmethod
    def random(
        cls, rng: np.random.Generator, wavelengths_mm: tuple[float, float], channels: int, count: int
    ) -> Waves:
        """Directions all around, wavelengths evenly in the range; each channel has a standard deviation near 1."""
        directions = rng.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        vectors = directions * (2 * np.pi / rng.uniform(*wavelengths_mm, size=(count, 1)))
        return cls(
            vectors, rng.uniform(0, 2 * np.pi, count), rng.normal(size=(count, channels)) * np.sqrt(2 / count)
        )

    def __call__(self, points: Array) -> Array:
        """(N, 3) mm -> (N, C), computed in the type of the points."""
        vectors, phases, weights = (a.astype(points.dtype) for a in (self.vectors.T, self.phases, self.weights))
        pieces = np.array_split(points, 1 + len(points) // CHUNK)
        return np.concatenate([np.cos(piece @ vectors + phases) @ weights for piece in pieces])

    def jacobian(self, points: Array) -> Array:
        """(N, 3) mm -> (N, C, 3): derivative of each channel along R, A, S, per mm."""
        slopes = -np.sin(points @ self.vectors.T + self.phases)
        derivative: Array = np.einsum("nk,kc,kd->ncd", slopes, self.weights, self.vectors, optimize=True)
        return derivative
