"""One trunk as a function of world points.

Each structure is a level function in mm, negative inside, painted over those before it. World coordinates are RAS+
mm; (0, 0, 0) lies in front of the spine at the height of the kidneys' upper ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from crossmorph.phantom.waves import Array, Waves

Piece = tuple[str, NDArray[np.intp], Array]  # a tissue, the indices of the points near it, its level in mm there


class Tissue(NamedTuple):
    """How a tissue looks: label (0: none), CT value in HU, MR value (any unit), and their texture strengths."""

    label: int
    ct: float
    ct_texture: float
    mr: float
    mr_texture: float


TISSUES = {
    "air": Tissue(0, -1000, 0, 5, 0),
    "skin": Tissue(0, 25, 8, 250, 20),
    "fat": Tissue(0, -102, 9, 400, 24),
    "muscle": Tissue(0, 58, 8, 150, 18),
    "liver": Tissue(1, 108, 10, 235, 22),
    "right kidney": Tissue(2, 172, 12, 560, 25),
    "left kidney": Tissue(3, 172, 12, 560, 25),
    "spleen": Tissue(4, 122, 8, 500, 30),
    "stomach": Tissue(5, 22, 14, 850, 50),
    "aorta": Tissue(6, 178, 4, 55, 8),
    "vena cava": Tissue(7, 150, 4, 80, 8),
    "portal vein": Tissue(8, 165, 4, 70, 8),
    "vertebrae": Tissue(9, 245, 60, 310, 40),
    "ribs": Tissue(10, 420, 60, 130, 30),
    "lungs": Tissue(11, -830, 35, 40, 18),
    "bowel": Tissue(12, 38, 22, 540, 70),
    "kidney medulla": Tissue(-1, 128, 8, 760, 30),  # -1: keeps the label of the organ around it
    "stomach gas": Tissue(5, -960, 0, 8, 0),
    "bowel gas": Tissue(12, -940, 0, 8, 0),
    "disc": Tissue(0, 82, 8, 560, 30),
    "spinal canal": Tissue(0, 32, 4, 850, 30),
}
ORGANS = {t.label: name for name, t in TISSUES.items() if t.label > 0 and not name.endswith("gas")}


class Anatomy:
    """One trunk as a function of world points; shapes, textures and vessels vary with the generator's state."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.unevenness = Waves.random(rng, (55, 160), 3, 32)
        self.coarse = Waves.random(rng, (22, 60), 1, 24)
        self.fine = Waves.random(rng, (9, 22), 1, 48)
        self.jitter = rng.normal(size=(24, 3))
        self.portal = list(_branches(rng, np.array([26.0, -2.0, 8.0]), np.array([0.75, 0.2, 0.6]), 30.0, 5.5, 4))
        self.loops = [
            (rng.uniform((-62, 4, -112), (62, 52, -38)), rng.uniform(10, 17), rng.random() < 0.3)
            for _ in range(34)
        ]

    def sample(self, world: Array) -> tuple[Array, Array, NDArray[np.int16]]:
        """(N, 3) RAS mm -> CT and MR signal and label, (N,) each; single precision, good to 1e-4 mm.

        A structure fades into what is around it over about 2 mm, as the point spread of a scanner would have it.
        """
        ct = np.full(len(world), TISSUES["air"].ct, np.float64)
        mr = np.full(len(world), TISSUES["air"].mr, np.float64)
        labels = np.zeros(len(world), np.int16)
        near = np.flatnonzero(_trunk(world) < 25)
        points = np.asfortranarray(self._relaxed(world[near].astype(np.float32)))
        texture = 0.6 * self.coarse(points)[:, 0] + 0.8 * self.fine(points)[:, 0]
        for name, index, level in self._structures(points):
            tissue, grain, index = TISSUES[name], texture[index], near[index]
            share = 1 / (1 + np.exp(np.clip(level / 0.6, -30, 30)))
            ct[index] += share * (tissue.ct + tissue.ct_texture * grain - ct[index])
            mr[index] += share * (tissue.mr + tissue.mr_texture * grain - mr[index])
            if tissue.label >= 0:
                labels[index[level < 0]] = tissue.label
        return ct, mr, labels

    def skin_level(self, world: Array) -> Array:
        """(N, 3) RAS mm -> (N,): about the distance to the skin in mm, negative inside."""
        return _trunk(self._relaxed(world))

    def _relaxed(self, world: Array) -> Array:
        """Where the simple shapes below have the points: their surfaces become uneven by some mm."""
        return world + 3.0 * self.unevenness(world)

    def _structures(self, points: Array) -> Iterator[Piece]:
        """The structures from the outside in."""
        skin = _trunk(points)
        body = np.flatnonzero(skin < 4)
        points, depth = points[body], skin[body]
        for name, thickness in (("skin", 0.0), ("fat", 2.5), ("muscle", 15.0), ("fat", 25.0)):
            yield name, body, depth + thickness
        for organs in (self._organs, self._vessels, self._bones):
            for name, index, level in organs(points, depth):
                yield name, body[index], level

    def _organs(self, points: Array, depth: Array) -> Iterator[Piece]:
        jitter = iter(self.jitter)

        def blob(name: str, center: ArrayLike, radii: ArrayLike, turn_deg: float = 0.0) -> Piece:
            """An ellipsoid, moved a little, that ends where the wall of the trunk begins."""
            shift = next(jitter)
            index, level = _ellipsoid(points, np.asarray(center) + 2.5 * shift, radii, turn_deg + 4 * shift[0])
            return name, index, np.maximum(level, depth[index] + 21)

        for side in (1, -1):
            yield "muscle", *_ellipsoid(points, (side * 27, -76, 0), (21, 15, 400))
            yield "muscle", *_ellipsoid(points, (side * 31, -50, -80), (14, 15, 85), side * 8)
            yield blob("lungs", (side * 63, -2, 104), (52, 68, 72))
        yield blob("muscle", (-14, 22, 104), (42, 38, 44), -25)  # the heart
        yield blob("liver", (56, 4, 32), (62, 60, 48), 12)
        yield blob("liver", (-2, 32, 42), (52, 30, 26), -10)
        yield blob("spleen", (-84, -26, 40), (25, 36, 36), -20)
        yield blob("stomach", (-48, 28, 30), (30, 32, 42), 25)
        yield blob("stomach", (-16, 38, -8), (32, 20, 17), -20)
        yield blob("stomach gas", (-46, 48, 36), (17, 8, 19))
        for side, kidney in ((1, "right kidney"), (-1, "left kidney")):
            center = np.array([side * 58, -40, -34 + 5 * (side < 0)])
            yield blob(kidney, center, (24, 22, 46), side * 12)
            for height in (-26, -9, 9, 26):
                yield blob("kidney medulla", center + np.array([-side, 2, height]), (8, 10, 6.5))
            yield "fat", *_ellipsoid(points, center - (side * 22, -6, 0), (13, 13, 18))
        for loop, radius, gas in self.loops:
            yield "bowel", *_ellipsoid(points, loop, (radius * 1.3, radius, radius), 10 * loop[0])
            if gas:
                yield (
                    "bowel gas",
                    *_ellipsoid(points, loop + np.array([0, radius * 0.45, 0]), (radius * 0.6, 4, 5)),
                )
        for side in (1, -1):
            colon = [(side * 84, -8, -160), (side * 88, -4, -46), (side * 80, 16, -30)]
            yield from _tube("bowel", points, colon, 15)
            yield from _tube("bowel gas", points, [(side * 87, 3, -84), (side * 86, 6, -52)], 6)

    def _vessels(self, points: Array, depth: Array) -> Iterator[Piece]:
        yield from _tube("aorta", points, [(-14, -34, 160), (-11, -32, 20), (-6, -33, -160)], 10.5)
        yield from _tube("aorta", points, [(-8, -33, -26), (-40, -38, -32)], 4)  # left renal artery
        yield from _tube("vena cava", points, [(24, -2, 86), (24, -22, 44), (19, -32, 0), (15, -34, -160)], 10.5)
        yield from _tube("vena cava", points, [(15, -33, -26), (40, -38, -32)], 4)  # right renal vein
        yield from _tube("vena cava", points, [(-8, 26, 58), (24, -12, 62), (58, 18, 56)], 4.5)  # hepatic veins
        yield from _tube("portal vein", points, [(2, -8, -30), (10, -6, -12), (26, -2, 8)], 7)
        yield from _tube("portal vein", points, [(4, -10, -14), (-34, -22, 8), (-62, -26, 30)], 4.5)  # splenic
        for start, end, radius in self.portal:
            yield from _tube("portal vein", points, (start, end), radius)

    def _bones(self, points: Array, depth: Array) -> Iterator[Piece]:
        from_disc = np.abs((points[:, 2] + 8) % 34 - 17)  # mm along the spine; discs are 34 mm apart
        index, column = _ellipsoid(points, (0, -62, 0), (23, 17, 1e6))
        yield "disc", index, column + 1
        yield "vertebrae", index, np.maximum(column, 4 - from_disc[index])
        for center, radii, gap in (
            ((22, -78, 0), (17, 6, 1e6), 10),
            ((-22, -78, 0), (17, 6, 1e6), 10),
            ((0, -87, 0), (6, 14, 1e6), 7),
        ):
            index, process = _ellipsoid(points, center, radii)
            yield "vertebrae", index, np.maximum(process, gap - from_disc[index])
        yield from _tube("spinal canal", points, [(0, -84, 200), (0, -84, -200)], 8)
        # A rib leaves the spine, runs inside the wall of the trunk and sinks by some 55 mm on its way forward.
        sideways = np.arctan2(np.abs(points[:, 0]), -points[:, 1] - 20)
        along = points[:, 2] + 55 * (1 - np.cos(0.9 * sideways))
        rib = np.hypot(depth + 20, np.abs(along % 30 - 15) * 0.85) - 4.5
        index = np.flatnonzero((rib < 4) & (along > 8) & (sideways < 2.3) & (np.abs(points[:, 0]) > 20))
        yield "ribs", index, rib[index]


# -- shapes ------------------------------------------------------------------------------------------------------


def _trunk(points: Array) -> Array:
    x, y, z = points.T
    width = 1 - 0.05 * (z / 100) ** 2 + 0.03 * z / 100
    radius = (np.abs(x / 132) ** 2.4 + np.abs((y + 4) / 96) ** 2.4) ** (1 / 2.4)
    level: Array = (radius - width) * 105
    return level


def _within(points: Array, low: Array, high: Array) -> NDArray[np.intp]:
    """Indices of the points in a box."""
    index = np.flatnonzero((points[:, 2] > low[2]) & (points[:, 2] < high[2]))
    for axis in (0, 1):
        values = points[index, axis]
        index = index[(values > low[axis]) & (values < high[axis])]
    return index


def _ellipsoid(
    points: Array, center: ArrayLike, radii: ArrayLike, turn_deg: float = 0.0
) -> tuple[NDArray[np.intp], Array]:
    """An ellipsoid turned in the coronal plane."""
    center, radii = np.asarray(center, float), np.asarray(radii, float)
    turn = Rotation.from_euler("y", turn_deg, degrees=True).as_matrix()
    reach = np.abs(turn) @ (radii + 4)
    index = _within(points, center - reach, center + reach)
    scaled = (points[index] - center) @ turn / radii
    distance = np.linalg.norm(scaled, axis=1)
    slope = np.linalg.norm(scaled / radii, axis=1) / np.maximum(distance, 1e-9)
    return index, (distance - 1) / np.maximum(slope, 1e-9)


def _tube(name: str, points: Array, path: ArrayLike, radius: float) -> Iterator[Piece]:
    """Tubes with round ends from corner to corner of a path (M, 3) mm."""
    corners = np.asarray(path, float)
    for start, end in pairwise(corners):
        index = _within(points, np.minimum(start, end) - radius - 4, np.maximum(start, end) + radius + 4)
        axis, offset = end - start, points[index] - start
        along = np.clip(offset @ axis / (axis @ axis), 0, 1)
        yield name, index, np.linalg.norm(offset - along[:, None] * axis, axis=1) - radius


def _branches(
    rng: np.random.Generator, start: Array, direction: Array, length: float, radius: float, depth: int
) -> Iterator[tuple[Array, Array, float]]:
    """A vessel tree: segments (start, end, radius), two daughters each, in planes that turn at random."""
    end = start + direction / np.linalg.norm(direction) * length
    yield start, end, radius
    if depth > 1:
        across = np.cross(direction, rng.normal(size=3))
        across /= np.linalg.norm(across)
        for side in (1, -1):
            turned = direction / np.linalg.norm(direction) + side * rng.uniform(0.5, 0.9) * across
            yield from _branches(rng, end, turned, length * 0.75, radius * 0.72, depth - 1)
