"""Draw the SVG pictures of docs/ and README.md; run by `make drawings`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

HERE = Path(__file__).resolve().parent
FIXED, MOVING, INK, PALE = "#00734d", "#b5179e", "#222222", "#e9ecef"

matplotlib.rcParams.update(
    {"svg.fonttype": "none", "svg.hashsalt": "crossmorph", "font.family": "sans-serif", "font.size": 10}
)


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A white sheet with one unit an inch, (0, 0) in the lower left corner."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.set_axis_off()
    return figure, axis


def arrow(axis: Any, start: Sequence[float], end: Sequence[float], color: str = INK, **options: Any) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0} | options
    axis.add_patch(FancyArrowPatch(tuple(start), tuple(end), color=color, **style))


def text(axis: Any, x: float, y: float, words: str, color: str = INK, **options: Any) -> None:
    axis.text(x, y, words, color=color, **({"ha": "center", "va": "center"} | options))


def box(axis: Any, x: float, y: float, width: float, height: float, words: str, **options: Any) -> None:
    style = {"facecolor": PALE, "edgecolor": INK, "linewidth": 1.1} | options
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", **style))
    text(axis, x + width / 2, y + height / 2, words)


def lattice(axis: Any, corners: np.ndarray, counts: tuple[int, int], color: str, fill: str = "none") -> None:
    """A grid of cells spanned by corner, first and second edge (3, 2)."""
    corner, first, second = corners
    axis.add_patch(
        Polygon(
            [corner, corner + first, corner + first + second, corner + second], facecolor=fill, edgecolor=color
        )
    )
    for edge, other, count in ((first, second, counts[0]), (second, first, counts[1])):
        for step in range(1, count):
            line = np.array([corner + edge * step / count, corner + edge * step / count + other])
            axis.plot(*line.T, color=color, linewidth=0.6)


def world() -> Figure:
    figure, axis = canvas(8.2, 3.5)
    x, y = 2.1, 1.55  # a patient who looks at the reader
    style = {"facecolor": PALE, "edgecolor": INK}
    axis.add_patch(Circle((x, y + 1.1), 0.33, **style))
    axis.add_patch(
        FancyBboxPatch((x - 0.5, y - 0.9), 1.0, 1.6, boxstyle="round,rounding_size=0.25,pad=0", **style)
    )
    axis.add_patch(Circle((x + 0.23, y + 0.4), 0.1, facecolor="#d1495b", edgecolor="none"))
    text(axis, x + 0.23, y + 0.18, "heart", fontsize=8)
    arrow(axis, (x - 0.6, y), (x - 1.55, y))
    text(axis, x - 1.15, y - 0.32, "+x: to the\npatient's Right", fontsize=9)
    arrow(axis, (x, y + 1.5), (x, y + 1.9))
    text(axis, x + 0.1, y + 1.75, "+z: Superior, to the head", ha="left", fontsize=9)
    axis.add_patch(Circle((x, y - 0.35), 0.09, facecolor="white", edgecolor=INK))
    axis.add_patch(Circle((x, y - 0.35), 0.03, facecolor=INK))
    text(axis, x + 0.62, y - 0.35, "+y: Anterior, towards you", ha="left", fontsize=9)
    text(axis, x, 0.25, "the world: RAS+ millimetres", weight="bold")

    x, y = 6.3, 1.75  # how an axial plane is drawn
    axis.add_patch(Rectangle((x - 1.3, y - 1.05), 2.6, 2.1, facecolor="black"))
    turns = np.linspace(0, 2 * np.pi, 80)
    axis.add_patch(Polygon(np.c_[x + 1.02 * np.cos(turns), y + 0.72 * np.sin(turns)], facecolor="#777777"))
    axis.add_patch(Circle((x, y - 0.42), 0.17, facecolor="white"))
    text(axis, x, y - 0.42, "spine", fontsize=7)
    axis.add_patch(Circle((x + 0.3, y + 0.2), 0.2, facecolor="#d1495b"))
    text(axis, x + 0.3, y + 0.2, "heart", fontsize=7, color="white")
    for place, letter in (((-1.18, 0), "R"), ((1.18, 0), "L"), ((0, 0.92), "A"), ((0, -0.92), "P")):
        text(axis, x + place[0], y + place[1], letter, color="white", weight="bold")
    text(axis, x, 3.05, "seen from the feet", fontsize=9)
    text(axis, x, 0.25, "pictures: the patient's right on the left", weight="bold")
    return figure


def voxels() -> Figure:
    figure, axis = canvas(8.2, 3.9)
    left, bottom, size = 2.2, 1.5, 0.8
    axis.add_patch(Rectangle((0.6, bottom - 0.35), 7.0, 2.3, facecolor="#f6f6f6"))
    axis.add_patch(Rectangle((left, bottom), 5 * size, 2 * size, facecolor="#cfe8dd"))
    axis.add_patch(Rectangle((left + size / 2, bottom + size / 2), 4 * size, size, facecolor="#8cc9ae"))
    lattice(axis, np.array([[left, bottom], [5 * size, 0], [0, 2 * size]]), (5, 2), FIXED)
    for i in range(5):
        for j in range(2):
            axis.plot(left + (i + 0.5) * size, bottom + (j + 0.5) * size, "o", color=INK, markersize=4)
        text(axis, left + (i + 0.5) * size, bottom - 0.2, f"{i}", weight="bold")
    for step in range(6):
        text(axis, left + step * size, bottom + 2 * size + 0.18, f"{step - 0.5:g}", fontsize=8)
    text(axis, 1.4, bottom + size, "outside: fill value,\nnot valid", fontsize=9)
    text(axis, 6.9, bottom + size, "outside: fill value,\nnot valid", fontsize=9)
    text(axis, left + 2.5 * size, 0.88, "whole numbers: voxel centres; halves: voxel faces", fontsize=9)
    text(axis, left + 2.5 * size, 0.6, "dark: interpolated between centres", fontsize=9, color=FIXED)
    text(
        axis,
        left + 2.5 * size,
        0.35,
        "light: the border value holds up to the outer face",
        fontsize=9,
        color=FIXED,
    )
    text(axis, left + 2.5 * size, 3.68, "voxel coordinate i; world = affine @ (i, j, k, 1)", weight="bold")
    return figure


def two_images(axis: Any) -> tuple[np.ndarray, np.ndarray]:
    """Fixed and moving grid with the same bean in both; returns one place in each."""
    lattice(axis, np.array([[0.7, 0.9], [2.4, 0.0], [0.0, 2.0]]), (8, 6), FIXED, "#eef7f3")
    lattice(axis, np.array([[5.6, 0.75], [2.1, 0.45], [-0.4, 1.95]]), (6, 9), MOVING, "#fbf0f9")
    turns = np.linspace(0, 2 * np.pi, 80)
    bean = np.c_[np.cos(turns) * (0.75 + 0.12 * np.cos(2 * turns)), 0.5 * np.sin(turns) + 0.1 * np.cos(2 * turns)]
    turned = np.array([[0.88, -0.48], [0.55, 0.9]])
    axis.add_patch(Polygon(bean + np.array([1.9, 1.9]), facecolor=FIXED, alpha=0.3))
    axis.add_patch(Polygon(bean @ turned.T + np.array([6.45, 1.95]), facecolor=MOVING, alpha=0.3))
    text(axis, 1.9, 0.6, "fixed space", FIXED, weight="bold")
    text(axis, 6.5, 0.4, "moving space", MOVING, weight="bold")
    place = np.array([0.45, 0.1])
    return place + np.array([1.9, 1.9]), turned @ place + np.array([6.45, 1.95])


def direction() -> Figure:
    figure, axis = canvas(8.2, 3.7)
    here, there = two_images(axis)
    below = np.array([0, 0.1])
    arrow(axis, here, there, INK, connectionstyle="arc3,rad=-0.25")
    arrow(axis, there - below, here - below, MOVING, connectionstyle="arc3,rad=-0.3", linestyle="--")
    axis.plot(*here, "o", color=INK)
    axis.plot(*there, "o", color=INK)
    text(axis, 4.15, 3.35, "the transform T: points go from fixed to moving,  y = T(x)", weight="bold")
    text(axis, 4.25, 0.95, "images and labels go\nthe other way:\nwarped(x) = moving(T(x))", MOVING)
    text(axis, here[0] - 0.18, here[1] + 0.12, "x", style="italic")
    text(axis, there[0] + 0.2, there[1] + 0.1, "y", style="italic")
    return figure


def chain() -> Figure:
    figure, axis = canvas(8.2, 2.6)
    for x, width, words, color in (
        (0.3, 1.2, "fixed\npoint x", "#d9eee5"),
        (2.3, 1.4, "a\ndeformation", PALE),
        (4.5, 1.4, "b\nrigid or affine", PALE),
        (6.7, 1.2, "moving\npoint y", "#f5dcf1"),
    ):
        box(axis, x, 1.35, width, 0.7, words, facecolor=color)
    for start, end in ((1.5, 2.3), (3.7, 4.5), (5.9, 6.7)):
        arrow(axis, (start, 1.8), (end, 1.8))
        arrow(axis, (end, 1.55), (start, 1.55), "#999999", linestyle="--")
    text(axis, 4.1, 2.35, "Chain((a, b))(x) = b(a(x)): read it from left to right", weight="bold")
    text(
        axis,
        4.1,
        1.05,
        "back: Chain((a, b)).inverse() is Chain((b.inverse(), a.inverse()))",
        "#666666",
        fontsize=9,
    )
    text(
        axis, 4.1, 0.65, "The images are sampled once, at the end: nothing is resampled between links.", fontsize=9
    )
    text(
        axis,
        4.1,
        0.35,
        "An ITK composite file lists its links the other way round; only the io folder knows.",
        fontsize=9,
    )
    return figure


def field() -> Figure:
    figure, axis = canvas(8.2, 3.7)
    lattice(axis, np.array([[1.6, 1.1], [3.2, 0.0], [0.0, 1.8]]), (16, 9), "#9bc9b5", "#eef7f3")
    lattice(axis, np.array([[1.0, 0.7], [4.4, 0.0], [0.0, 2.6]]), (6, 4), INK)
    for i in range(6):
        for j in range(4):
            x, y = 1.0 + 4.4 * (i + 0.5) / 6, 0.7 + 2.6 * (j + 0.5) / 4
            dx = 0.34 * np.exp(-(((i - 3.2) / 2) ** 2 + ((j - 1.2) / 1.4) ** 2))
            axis.plot(x, y, "o", color=INK, markersize=3)
            if dx > 0.04:
                arrow(axis, (x, y), (x + dx, y + 0.7 * dx), MOVING, mutation_scale=8, linewidth=1.4)
    text(axis, 3.2, 3.5, "T(x) = x + u(x), u in mm along R, A, S", weight="bold")
    text(axis, 5.75, 2.7, "black: the field's own grid,\noften coarser and larger", ha="left", fontsize=9)
    text(axis, 5.75, 2.0, "green: the fixed image", FIXED, ha="left", fontsize=9)
    text(
        axis, 5.75, 1.45, "between centres: linear;\nbeyond the grid's faces: u = 0", MOVING, ha="left", fontsize=9
    )
    text(axis, 3.2, 0.35, "array (3, I, J, K): three numbers a voxel of the black grid", fontsize=9)
    return figure


def validity() -> Figure:
    figure, axis = canvas(8.6, 3.6)
    fixed = Rectangle((0.8, 0.7), 3.4, 2.4, facecolor="#eef7f3", edgecolor=FIXED, linewidth=1.6)
    seen = Polygon([(1.9, 0.45), (5.0, 0.95), (4.6, 3.35), (1.5, 2.85)], facecolor="none", edgecolor=MOVING)
    both = Polygon(
        [(1.9, 0.7), (1.86, 0.7), (1.5, 2.85), (3.05, 3.1), (4.2, 3.1), (4.2, 0.82), (3.45, 0.7)],
        facecolor="#8cc9ae",
    )
    for patch in (fixed, both, seen):
        axis.add_patch(patch)
    axis.add_patch(Circle((2.6, 1.3), 0.33, facecolor="#eef7f3", edgecolor=INK, hatch="///", linewidth=1))
    text(axis, 1.1, 2.0, "fixed", FIXED, rotation=90)
    text(axis, 4.52, 2.0, "moving, as T sees it", MOVING, rotation=-81)
    text(axis, 3.0, 2.2, "valid", weight="bold")
    lines = (
        "An image is valid inside its field of view, inside",
        "the user's mask, and where its values are finite",
        "(hatched: a hole in the moving image).",
        "",
        "After warping, a voxel is valid where the moving",
        "image supports it: validity.nii.gz.",
        "",
        "Descriptors, costs, scores and figures look at",
        "valid voxels only.",
    )
    for n, line in enumerate(lines):
        text(axis, 5.25, 2.9 - 0.26 * n, line, ha="left", fontsize=9)
    return figure


def flow() -> Figure:
    figure, axis = canvas(9.2, 2.5)
    steps = (
        ("read", "any grid, any\norientation"),
        ("describe", "MIND-SSC: alike in\nall modalities"),
        ("match", "cost volumes,\ncoupled convex"),
        ("optimise", "field refined\nby gradients"),
        ("judge", "scores, folding,\ninverse, verdict"),
        ("write", "warped image,\ntransforms, record"),
    )
    for n, (name, words) in enumerate(steps):
        x = 0.15 + 1.51 * n
        box(axis, x, 0.85, 1.28, 1.0, "")
        text(axis, x + 0.64, 1.6, name, weight="bold", fontsize=11)
        text(axis, x + 0.64, 1.17, words, fontsize=8)
        if n:
            arrow(axis, (x - 0.23, 1.35), (x, 1.35))
    text(axis, 0.79, 2.2, "two scans", FIXED, weight="bold")
    arrow(axis, (0.79, 2.08), (0.79, 1.85), FIXED)
    text(axis, 8.34, 2.2, "one folder", MOVING, weight="bold")
    arrow(axis, (8.34, 1.85), (8.34, 2.08), MOVING)
    text(
        axis,
        4.6,
        0.45,
        "everything in RAS millimetres; where an image says nothing, nothing is learnt",
        fontsize=9,
    )
    return figure


def gradient_guidance() -> Figure:
    figure, axis = canvas(9.2, 3.3)
    for y, color, name, inputs in (
        (2.2, FIXED, "images", "fixed, moving"),
        (0.5, MOVING, "gradient maps", "|grad fixed|,\n|grad moving|"),
    ):
        box(axis, 0.15, y, 1.5, 0.8, inputs, edgecolor=color)
        box(axis, 2.3, y, 1.7, 0.8, "U-Net\n301,411 parameters")
        box(axis, 4.5, y, 1.6, 0.8, f"displacement\nof the {name}", edgecolor=color)
        arrow(axis, (1.65, y + 0.4), (2.3, y + 0.4))
        arrow(axis, (4.0, y + 0.4), (4.5, y + 0.4))
        arrow(axis, (6.1, y + 0.4), (6.65, 1.75 + 0.2 * (1 if y > 1 else -1)))
    arrow(axis, (0.9, 2.2), (0.9, 1.3), linestyle="--")
    text(axis, 1.0, 1.75, "equation 1", ha="left", fontsize=9)
    box(axis, 6.65, 1.3, 1.0, 0.9, "gates\n999")
    arrow(axis, (7.65, 1.75), (8.0, 1.75))
    box(axis, 8.0, 1.3, 1.05, 0.9, "fused\ndisplacement", facecolor="white")
    text(axis, 8.5, 2.55, "aligns the images", FIXED, fontsize=9)
    arrow(axis, (8.5, 2.25), (8.5, 2.42), FIXED, mutation_scale=8)
    text(axis, 5.35, 0.2, "has to align the gradient maps by itself", MOVING, fontsize=9)
    return figure


def lumir() -> Figure:
    figure, axis = canvas(9.2, 4.2)
    heights = (0.45, 1.2, 1.95, 2.7, 3.45)
    for n, y in enumerate(heights):
        width = 1.9 / 1.45**n
        for center, color in ((1.25, FIXED), (3.35, MOVING)):
            axis.add_patch(
                Rectangle((center - width / 2, y), width, 0.36, facecolor=PALE, edgecolor=color, linewidth=1.4)
            )
            if n:
                arrow(axis, (center, heights[n - 1] + 0.36), (center, y), mutation_scale=9)
        box(axis, 5.1, y - 0.02, 1.3, 0.4, "estimator: v")
        arrow(axis, (4.4, y + 0.18), (5.1, y + 0.18))
        box(axis, 6.75, y - 0.02, 0.9, 0.4, "d = exp v")
        arrow(axis, (6.4, y + 0.18), (6.75, y + 0.18), mutation_scale=9)
        box(
            axis, 8.0, y - 0.02, 1.05, 0.4, "U = d" if n == len(heights) - 1 else "d + U(x + d)", facecolor="white"
        )
        arrow(axis, (7.65, y + 0.18), (8.0, y + 0.18), mutation_scale=9)
        if n:
            arrow(axis, (8.5, y - 0.02), (8.5, heights[n - 1] + 0.38), MOVING, mutation_scale=9)
            text(axis, 8.58, y - 0.19, "U", MOVING, ha="left", fontsize=9)
    text(axis, 1.25, 0.2, "fixed", FIXED)
    text(axis, 3.35, 0.2, "moving, warped by U", MOVING)
    text(axis, 5.75, 0.2, "sum and difference of features", fontsize=8)
    text(axis, 2.3, 4.03, "one encoder for both, four halvings", fontsize=9)
    text(axis, 7.4, 4.03, "coarse to fine: the last U is the displacement", fontsize=9)
    return figure


DRAWINGS: tuple[Callable[[], Figure], ...] = (
    world,
    voxels,
    direction,
    chain,
    field,
    validity,
    flow,
    gradient_guidance,
    lumir,
)

if __name__ == "__main__":
    for draw in DRAWINGS:
        draw().savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None, "Creator": None})
