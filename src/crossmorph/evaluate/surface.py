"""Distances between label surfaces in mm, weighted by surface area, on any affine grid.

A surface runs between the voxels: every 2x2x2 neighbourhood that holds voxels of both kinds is a surface element.
Its place is the centre of the neighbourhood and its area that of the polygons which cut the neighbourhood's edges
half way (marching cubes). This is the definition of the "surface-distance" program (Nikolov et al. 2018,
arXiv:1809.04430, and its public code), here for affine grids, sheared ones too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossmorph.errors import InputError
from crossmorph.evaluate.overlap import as_labels, number_labels

Floats = NDArray[np.float64]
CORNERS = np.array(list(product((0, 1), repeat=3)))
Polygon = list[frozenset[int]]


# -- the area of a 2x2x2 neighbourhood ---------------------------------------------------------------------------


def _face_cycles() -> list[list[int]]:
    """The six faces of the unit cube, each as its four corners (indices into CORNERS) in order around it."""
    cycles = []
    for axis, side in product(range(3), (0, 1)):
        around = [np.insert(corner, axis, side) for corner in ((0, 0), (0, 1), (1, 1), (1, 0))]
        cycles.append([int(4 * c[0] + 2 * c[1] + c[2]) for c in around])
    return cycles


def _polygons(inside: Sequence[bool]) -> list[Polygon]:
    """Closed polygons of cut edges that part the corners inside from those outside.

    Where a face is cut four times, the kind of corner that is rarer in the cube is cut off corner by corner.
    """
    rarer = sum(inside) <= 4
    neighbours: dict[frozenset[int], list[frozenset[int]]] = {}

    def join(a: frozenset[int], b: frozenset[int]) -> None:
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)

    for cycle in _face_cycles():
        edges = [frozenset((cycle[k], cycle[(k + 1) % 4])) for k in range(4)]
        cut = [edge for edge in edges if sum(inside[c] for c in edge) == 1]
        if len(cut) == 2:
            join(cut[0], cut[1])
        elif len(cut) == 4:
            for k in range(4):
                if inside[cycle[k]] == rarer:
                    join(edges[k - 1], edges[k])
    polygons = []
    todo = set(neighbours)
    while todo:
        start = min(todo, key=sorted)
        polygon, previous, current = [start], start, neighbours[start][0]
        while current != start:
            polygon.append(current)
            one, other = neighbours[current]
            previous, current = current, (other if one == previous else one)
        polygons.append(polygon)
        todo -= set(polygon)
    return polygons


def _fan(vertices: Floats) -> Floats:
    """Cross products (T, 3) of the triangles at the first vertex; half their length is the triangle's area."""
    spokes = vertices[1:] - vertices[0]
    return np.cross(spokes[:-1], spokes[1:])


@cache
def neighbourhood_triangles() -> tuple[tuple[Floats, ...], ...]:
    """For each of the 256 neighbourhood codes the cross products (T, 3) of its triangles on the unit cube.

    Bit ``7 - c`` of the code is corner ``c = 4 i + 2 j + k``. Polygons with more than three corners are not flat;
    of the fans that cut them into triangles the one with the largest area on the unit cube is taken.
    """
    table = []
    for code in range(256):
        inside = [bool(code >> (7 - corner) & 1) for corner in range(8)]
        fans = []
        for polygon in _polygons(inside):
            vertices = np.array([CORNERS[sorted(edge)].mean(0) for edge in polygon])
            turned = [_fan(np.roll(vertices, -k, axis=0)) for k in range(len(vertices))]
            areas = [np.linalg.norm(fan, axis=1).sum().round(9) for fan in turned]
            fans.append(turned[int(np.argmax(areas))])
        table.append(tuple(fans))
    return tuple(table)


def neighbourhood_areas(axes_mm: ArrayLike) -> Floats:
    """(256,): surface area in mm^2 of every neighbourhood code, for voxels with these (3, 3) axes as columns."""
    axes = np.asarray(axes_mm, np.float64)
    # A cross product follows a linear map by its cofactors: (A a) x (A b) = det(A) A^-T (a x b).
    cofactors = np.linalg.det(axes) * np.linalg.inv(axes)
    return np.array(
        [
            sum(float(np.linalg.norm(fan @ cofactors, axis=1).sum()) / 2 for fan in fans)
            for fans in neighbourhood_triangles()
        ]
    )


# -- distances ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Distances between two surfaces, both ways.

    Attributes:
        to_b: (N,) mm, from each element of surface A to the nearest of B; infinite where B is empty.
        area_a: (N,) mm^2 of those elements.
        to_a: (M,) mm, from each element of B to the nearest of A.
        area_b: (M,) mm^2.
    """

    to_b: Floats
    area_a: Floats
    to_a: Floats
    area_b: Floats

    def hausdorff(self, percent: float = 95) -> float:
        """Robust Hausdorff distance in mm: the larger of the two directed area-weighted percentiles.

        A directed percentile is the smallest distance within which at least that share of the area lies. MedPy and
        MONAI count surface voxels without areas (MONAI takes the larger of two unweighted percentiles, MedPy the
        percentile of both directions pooled), which gives other numbers on anisotropic voxels. Infinite where one
        surface is missing, NaN where both are.
        """
        if not len(self.to_b) and not len(self.to_a):
            return float("nan")
        if not len(self.to_b) or not len(self.to_a):
            return float("inf")
        return max(_percentile(self.to_b, self.area_a, percent), _percentile(self.to_a, self.area_b, percent))

    def average(self) -> float:
        """Average surface distance in mm: the mean of the two directed area-weighted means (ASD or ASSD).

        Pooling both surfaces before averaging (as some programs do for the ASSD) weights the larger one more.
        Infinite where one surface is missing, NaN where both are.
        """
        if not len(self.to_b) and not len(self.to_a):
            return float("nan")
        if not len(self.to_b) or not len(self.to_a):
            return float("inf")
        one_way = np.average(self.to_b, weights=self.area_a), np.average(self.to_a, weights=self.area_b)
        return float(np.mean(one_way))


def _percentile(distances: Floats, areas: Floats, percent: float) -> float:
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(areas[order]) / areas.sum()
    place = int(np.searchsorted(share, percent / 100))
    return float(distances[order][min(place, len(distances) - 1)])


def _neighbourhood_codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(I + 1, J + 1, K + 1) codes of the 2x2x2 neighbourhoods; outside the array nothing is inside."""
    padded = np.pad(mask, 1).view(np.uint8)
    i, j, k = (n + 1 for n in mask.shape)
    codes = np.zeros((i, j, k), np.uint8)
    for bit, (a, b, c) in enumerate(CORNERS):
        codes |= padded[a : a + i, b : b + j, c : c + k] << np.uint8(7 - bit)
    return codes


def _surface(mask: NDArray[np.bool_], axes: Floats, areas: Floats) -> tuple[Floats, Floats]:
    """Places (N, 3) in mm, relative to the array's corner, and areas (N,) of the surface elements of a mask."""
    codes = _neighbourhood_codes(mask)
    places = np.argwhere((codes != 0) & (codes != 255))
    return places @ axes.T, areas[codes[tuple(places.T)]]


def _nearest(places: Floats, targets: Floats) -> Floats:
    from scipy.spatial import KDTree

    if not len(places) or not len(targets):
        return np.full(len(places), np.inf)
    tree = KDTree(targets, balanced_tree=False, compact_nodes=False)
    distances: Floats = tree.query(places)[0]
    return distances


def _voxel_axes(voxel: ArrayLike) -> Floats:
    """(3, 3) voxel axes in mm from a number, three spacings, (3, 3) axes or a (4, 4) affine."""
    voxel = np.asarray(voxel, np.float64)
    if voxel.ndim < 2:
        return np.diag(np.broadcast_to(voxel, 3)).astype(np.float64)
    return voxel[:3, :3]


def surface_distances(a: Any, b: Any, voxel: ArrayLike = 1.0) -> SurfaceDistances:
    """Distances between the surfaces of two masks.

    Args:
        a, b: (I, J, K) masks on the same voxels (anything but 0 is inside). Faces of the array count as surface.
        voxel: voxel size in mm as one number, three numbers along i, j, k, or the grid's affine (4, 4). The
            Learn2Reg evaluations use 1, so that their "mm" are voxels.

    Raises:
        InputError: the masks differ in shape.
    """
    mask_a, mask_b = as_labels(a) != 0, as_labels(b) != 0
    if mask_a.shape != mask_b.shape:
        raise InputError(
            f"the masks have shapes {mask_a.shape} and {mask_b.shape}; both must lie on the same voxels"
        )
    axes = _voxel_axes(voxel)
    return _distances(mask_a, mask_b, axes, neighbourhood_areas(axes))


def _distances(a: NDArray[np.bool_], b: NDArray[np.bool_], axes: Floats, areas: Floats) -> SurfaceDistances:
    (at_a, area_a), (at_b, area_b) = _surface(a, axes, areas), _surface(b, axes, areas)
    return SurfaceDistances(_nearest(at_a, at_b), area_a, _nearest(at_b, at_a), area_b)


def label_surface_distances(
    fixed: Any, warped: Any, ids: Sequence[int], voxel: ArrayLike = 1.0
) -> dict[int, SurfaceDistances]:
    """Surface distances of every label; each label is looked at only within the box that holds it.

    Args:
        fixed, warped: label maps on the same voxels; ``Labels``, torch or numpy, (I, J, K).
        ids: labels to measure. A label on neither side gives empty distances, on one side infinite ones.
        voxel: as for ``surface_distances``.
    """
    from scipy.ndimage import find_objects

    axes = _voxel_axes(voxel)
    areas = neighbourhood_areas(axes)
    numbered = [number_labels(as_labels(labels), ids) for labels in (fixed, warped)]
    boxes = [find_objects(labels, max_label=len(ids)) for labels in numbered]
    result = {}
    for k, label in enumerate(ids):
        found = [side[k] for side in boxes if side[k] is not None]
        box = (
            tuple(
                slice(min(s.start for s in along), max(s.stop for s in along))
                for along in zip(*found, strict=True)
            )
            or (slice(0),) * 3
        )
        in_fixed, in_warped = (labels[box] == k + 1 for labels in numbered)
        result[label] = _distances(in_fixed, in_warped, axes, areas)
    return result
