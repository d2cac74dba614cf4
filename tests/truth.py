"""Problems whose answers are known: volumes given by a formula in the world, warps with a closed-form inverse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from crossmorph.image import Image, Labels
from crossmorph.space import Grid
from crossmorph.transform import Affine, DisplacementField

Thing = TypeVar("Thing", Image, Labels, DisplacementField)

# -- grids -------------------------------------------------------------------------------------------------------


def tilted_grid(
    shape: tuple[int, int, int] = (11, 13, 9),
    spacing: tuple[float, float, float] = (2.0, 1.5, 3.0),
    rotation_deg: tuple[float, float, float] = (20.0, -15.0, 35.0),
    shear: float = 0.0,
    center: tuple[float, float, float] = (5.0, -8.0, 12.0),
) -> Grid:
    """Oblique, anisotropic, if wanted sheared grid around a centre."""
    axes = Rotation.from_rotvec(rotation_deg, degrees=True).as_matrix() @ np.array(
        [[1, shear, 0], [0, 1, shear], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = np.array(center) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def mirrored(grid: Grid) -> Grid:
    """The same box with its first axis the other way round."""
    turned = np.diag([-1.0, 1.0, 1.0, 1.0])
    turned[0, 3] = grid.shape[0] - 1
    return Grid(grid.shape, grid.affine @ turned)


@st.composite
def grids(draw: st.DrawFn, smallest: int = 1, largest: int = 9) -> Grid:
    """Any grid: sizes, spacings of 0.1 to 10 mm, rotation, shear, mirrored or not, far from the origin or not."""
    number = st.floats(-1, 1, allow_nan=False)
    shape = draw(st.tuples(*[st.integers(smallest, largest)] * 3))
    spacing = 10.0 ** np.array(draw(st.tuples(number, number, number)))
    turn = Rotation.from_rotvec(180 * np.array(draw(st.tuples(number, number, number))), degrees=True).as_matrix()
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = 0.5 * np.array(draw(st.tuples(number, number, number)))
    affine = np.eye(4)
    affine[:3, :3] = turn @ shear @ np.diag(spacing * [draw(st.sampled_from([-1, 1])), 1, 1])
    affine[:3, 3] = 500 * np.array(draw(st.tuples(number, number, number)))
    return Grid(shape, affine)


Order = tuple[tuple[int, int, int], tuple[bool, bool, bool]]


def signed_permutations() -> list[Order]:
    """The 48 ways to order and flip three array axes."""
    return list(product(permutations(range(3)), product((False, True), repeat=3)))


def reordered(thing: Thing, order: Order) -> Thing:
    """The same physical object stored with other array axes."""
    data = thing.field if isinstance(thing, DisplacementField) else thing.data
    turned: dict[str, Any] = {"grid": reordered_grid(thing.grid, order)}
    turned["field" if isinstance(thing, DisplacementField) else "data"] = reordered_tensor(data, order)
    if isinstance(thing, Image):
        turned["valid"] = reordered_tensor(thing.valid, order)
    return replace(thing, **turned)


def reordered_grid(grid: Grid, order: Order) -> Grid:
    """New axis a is old axis ``axes[a]``, reversed where ``flips[a]``."""
    axes, flips = order
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        to_old[old, new] = -1 if flip else 1
        to_old[old, 3] = grid.shape[old] - 1 if flip else 0
    i, j, k = (grid.shape[axis] for axis in axes)
    return Grid((i, j, k), grid.affine @ to_old)


def reordered_tensor(data: torch.Tensor, order: Order) -> torch.Tensor:
    """The last three axes in a new order, flipped where asked."""
    axes, flips = order
    lead = data.ndim - 3
    moved = data.permute(*range(lead), *(lead + axis for axis in axes))
    return moved.flip([lead + axis for axis, flip in enumerate(flips) if flip]).contiguous()


def world(grid: Grid) -> torch.Tensor:
    """(I, J, K, 3) float64 RAS mm of the voxel centres, straight from the affine."""
    index = np.stack(np.indices(grid.shape), -1)
    return torch.from_numpy(index @ grid.affine[:3, :3].T + grid.affine[:3, 3])


# -- volumes -----------------------------------------------------------------------------------------------------


def ramp(points: torch.Tensor) -> torch.Tensor:
    """(..., 3) -> (2, ...): two linear functions, which linear interpolation must hit exactly."""
    x, y, z = points.unbind(-1)
    return torch.stack((2 * x - y + 0.5 * z + 7, 0.3 * y - z))


def waves(points: torch.Tensor) -> torch.Tensor:
    """(..., 3) -> (1, ...): smooth, no symmetry, wavelengths of 30 to 60 mm."""
    x, y, z = points.unbind(-1)
    return (torch.sin(0.2 * x) * torch.cos(0.13 * y + 0.4) + torch.sin(0.1 * z + 0.05 * x))[None]


def volume(grid: Grid, function: Any = waves, **keywords: Any) -> Image:
    """A function of the world sampled on a grid."""
    data = function(world(grid)).float()
    return Image(data, grid, torch.ones(grid.shape, dtype=torch.bool), **keywords)


def blobs(grid: Grid, seed: int = 0, labels: tuple[int, ...] = (0, 3, 7, 8, 200)) -> Labels:
    """Label map of nearest of random seed points in the world."""
    rng = np.random.default_rng(seed)
    low, high = grid.corners().min(0), grid.corners().max(0)
    seeds = torch.from_numpy(rng.uniform(low, high, (24, 3)))
    owner = torch.from_numpy(rng.choice(labels, 24)).int()
    nearest = torch.cdist(world(grid).reshape(-1, 3), seeds).argmin(1)
    return Labels(owner[nearest].reshape(grid.shape), grid, dtype=np.dtype(np.uint8))


# -- maps --------------------------------------------------------------------------------------------------------


def random_affine(rng: np.random.Generator, size: float = 1.0) -> Affine:
    """A moderate affine map; ``size`` 1 means up to 5 mm, 10 degrees, 10 % scale and shear."""
    draw = lambda scale: rng.uniform(-scale, scale, 3) * size  # noqa: E731
    return Affine.from_parts(draw(5), draw(10), 1 + draw(0.1), draw(0.1), center_mm=rng.uniform(-10, 10, 3))


@dataclass(frozen=True)
class Warp:
    """A diffeomorphism in closed form, turned against the world's axes.

    In its own axes: z stays; y + b sin(k z); s sinh((x + a sin(k y)) / s).
    """

    a: float = 3.0
    b: float = 2.0
    k: float = 0.12
    s: float = 60.0
    rotation_deg: tuple[float, float, float] = (15.0, 25.0, -40.0)

    @property
    def _axes(self) -> torch.Tensor:
        return torch.from_numpy(Rotation.from_rotvec(self.rotation_deg, degrees=True).as_matrix())

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        x, y, z = (points @ self._axes).unbind(-1)
        x = self.s * torch.sinh((x + self.a * torch.sin(self.k * y)) / self.s)
        return torch.stack((x, y + self.b * torch.sin(self.k * z), z), -1) @ self._axes.T

    def inverse(self, points: torch.Tensor) -> torch.Tensor:
        """The point that the warp sends here."""
        x, y, z = (points @ self._axes).unbind(-1)
        y = y - self.b * torch.sin(self.k * z)
        x = self.s * torch.asinh(x / self.s) - self.a * torch.sin(self.k * y)
        return torch.stack((x, y, z), -1) @ self._axes.T

    def determinant(self, points: torch.Tensor) -> torch.Tensor:
        """Of the warp's derivative."""
        x, y, _ = (points @ self._axes).unbind(-1)
        return torch.cosh((x + self.a * torch.sin(self.k * y)) / self.s)

    def field(self, grid: Grid, **spaces: Any) -> DisplacementField:
        """Sampled on a grid."""
        points = world(grid)
        return DisplacementField((self(points) - points).movedim(-1, 0).float().contiguous(), grid, **spaces)
