"""Pictures of a registration: two images over each other before and after, and what the transform does to space.

All panels are planes of the world, not of the array: axial, coronal and sagittal in RAS mm, one mm across as long
as one mm up. They are shown as radiologists read them, with the patient's right on the left of the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from crossmorph.errors import InputError
from crossmorph.files import atomic_path
from crossmorph.image import Image
from crossmorph.optimise.terms import lengths
from crossmorph.resample import guess_fill, resample
from crossmorph.space import Grid
from crossmorph.transform import Transform, displacement_determinant

Array = NDArray[np.floating[Any]]
CT_WINDOW = (-160.0, 240.0)
GREEN, MAGENTA = np.array([0.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.0])  # add up to white; safe for colour blindness
MAGENTA_LINE = "#ff3df2"
PIXELS = 400  # along the longest side of a panel
EDGE_BLUR = 3  # pixels


class Plane(NamedTuple):
    """A plane of the world: which RAS axis runs across and which up, and its pixels as a grid one voxel thick.

    The axis across is drawn backwards (right or anterior on the left of the picture), the axis up is not.
    """

    name: str
    across: int
    up: int
    grid: Grid

    def flat(self, volume: torch.Tensor) -> Array:
        """(I, J, K) on the grid of the plane -> (up, across)."""
        pixels: Array = volume.squeeze(3 - self.across - self.up).cpu().numpy().T
        return pixels

    def extent(self) -> tuple[float, float, float, float]:
        """Outer edges in RAS mm: low and high across, low and high up."""
        low, high = self.grid.corners().min(0), self.grid.corners().max(0)
        return low[self.across], high[self.across], low[self.up], high[self.up]

    def show(self, image: Image) -> tuple[Array, NDArray[np.bool_]]:
        """The first channel of an image in this plane, and where it is valid; (up, across) both."""
        seen = resample(image.frame(0), self.grid, fill=0.0)
        return self.flat(seen.data[0]), self.flat(seen.valid) > 0


def planes(fixed: Image, center_mm: ArrayLike | None = None) -> list[Plane]:
    """Axial, coronal and sagittal plane through a point (RAS mm), as large as the world box of the field of view.

    Without a point, through the middle of what is brighter than the mean.
    """
    low, high = fixed.grid.corners().min(0), fixed.grid.corners().max(0)
    pixel = float((high - low).max()) / PIXELS
    center = middle(fixed) if center_mm is None else np.asarray(center_mm, float)
    found = []
    for name, across, up in (("axial", 0, 1), ("coronal", 0, 2), ("sagittal", 1, 2)):
        through = 3 - across - up
        shape = np.maximum(np.round((high - low) / pixel).astype(int), 1)
        place = (low + high) / 2
        shape[through], place[through] = 1, center[through]
        found.append(Plane(name, across, up, Grid.from_spacing(shape.tolist(), pixel, place)))
    return found


def before_after(
    fixed: Image, moving: Image, warped: Image, path: str | Path, *, center_mm: ArrayLike | None = None
) -> Path:
    """Fixed and moving image over each other, as they were and as registered, in three planes.

    Rows: a blend (fixed green, moving magenta: grey where they are equally bright), a checkerboard, and the edges
    of the moving image on the fixed one. Where the moving image says nothing the fixed one is dimmed.

    Args:
        fixed: on any grid.
        moving: as it lies in the world before registration, on any grid.
        warped: the moving image in the fixed space, on any grid.
        path: file to write; the ending chooses the format (.png, .svg, .pdf).
        center_mm: RAS point that the planes go through.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    shown = planes(fixed, center_mm)
    figure, axes = _panels(3, [plane for plane in shown for _ in range(2)])
    windows = window(fixed), window(moving)
    for column, plane in enumerate(shown):
        background = scaled(*plane.show(fixed), windows[0])
        for side, (when, image) in enumerate((("before", moving), ("after", warped))):
            pixels, valid = plane.show(image)
            front = scaled(pixels, valid, windows[1])
            cells = axes[:, 2 * column + side]
            cells[0].set_title(f"{plane.name}, {when}", fontsize=11)
            chosen = np.where(_checkerboard(plane), front, background)
            _draw(cells[0], plane, _blend(background, front, valid))
            _draw(cells[1], plane, np.where(valid, chosen, 0.45 * background))
            _draw(cells[2], plane, np.where(valid, 1.0, 0.45) * background)
            _draw_edges(cells[2], plane, front, valid, MAGENTA_LINE)
    for row, name in enumerate(("fixed green, moving magenta", "checkerboard", "moving edges on fixed")):
        axes[row, 0].set_ylabel(name, fontsize=11)
    return _save(figure, path)


def blends(
    fixed: Image, images: Mapping[str, Image], path: str | Path, *, center_mm: ArrayLike | None = None
) -> Path:
    """Some images over a fixed one, a row each, in three planes: fixed green, image magenta.

    Grey is where both are equally bright. Where an image says nothing the fixed one is dimmed.

    Args:
        fixed: on any grid.
        images: by the name of their row, as they lie in the fixed world, on any grid.
        path: file to write; the ending chooses the format.
        center_mm: RAS point that the planes go through.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    shown = planes(fixed, center_mm)
    figure, axes = _panels(len(images), shown)
    for axis, plane in zip(axes[0], shown, strict=True):
        axis.set_title(plane.name, fontsize=11)
    for row, (name, image) in zip(axes, images.items(), strict=True):
        limits = window(image)
        row[0].set_ylabel(name, fontsize=11)
        for axis, plane in zip(row, shown, strict=True):
            pixels, valid = plane.show(image)
            background = scaled(*plane.show(fixed), window(fixed))
            _draw(axis, plane, _blend(background, scaled(pixels, valid, limits), valid))
    return _save(figure, path)


def deformation_grid(
    transform: Transform, fixed: Image, path: str | Path, *, center_mm: ArrayLike | None = None
) -> Path:
    """What a transform does to space, in three planes of the fixed image.

    Rows: straight lines of the fixed space after the transform, its best affine part taken off; the Jacobian
    determinant (above 1 the tissue is larger in the moving image, folded places red); the length of the whole
    displacement in mm.

    Args:
        transform: maps fixed points to moving points.
        fixed: image drawn underneath; nothing is shown outside its field of view.
        path: file to write; the ending chooses the format.
        center_mm: RAS point that the planes go through.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    shown = planes(fixed, center_mm)
    figure, axes = _panels(3, shown, colour_bars=True)
    affine, limits = _affine_part(transform, fixed.grid), window(fixed)
    line_mm = round_number(max(high - low for low, high, _, _ in (plane.extent() for plane in shown)) / 20)
    maps = [_jacobian_and_length(transform, plane, fixed.grid) for plane in shown]
    longest = max(float(np.nanmax(length, initial=1e-3)) for _, length in maps)
    for column, (plane, (jacobian, length)) in enumerate(zip(shown, maps, strict=True)):
        pixels, valid = plane.show(fixed)
        background = scaled(pixels, valid, limits)
        lines, growth, distance = axes[:, column]
        lines.set_title(plane.name, fontsize=11)
        _draw(lines, plane, 1 - 0.35 * background)
        _draw_lines(lines, plane, transform, affine, line_mm)
        growth_map = _draw(growth, plane, np.log2(np.clip(jacobian, 1e-6, None)), cmap="PuOr", vmin=-1, vmax=1)
        _draw(growth, plane, np.where(jacobian <= 0, 1.0, np.nan), cmap="autumn", vmin=1, vmax=2)
        _draw_edges(growth, plane, background, valid, "#777777")
        length_map = _draw(distance, plane, length, cmap="cividis", vmin=0, vmax=longest)
        _draw_edges(distance, plane, background, valid, "#dddddd")
    _scale_bar(axes[0, 0], shown[0])
    bar = figure.colorbar(growth_map, cax=axes[1, -1], ticks=[-1, -0.5, 0, 0.5, 1])
    bar.ax.set_yticklabels(["0.5", "0.7", "1", "1.4", "2"])
    figure.colorbar(length_map, cax=axes[2, -1])
    names = f"lines {line_mm:g} mm apart, affine part off", "Jacobian determinant", "length of displacement, mm"
    for row, name in enumerate(names):
        axes[row, 0].set_ylabel(name, fontsize=11)
    return _save(figure, path)


# -- values ------------------------------------------------------------------------------------------------------


def middle(image: Image) -> Array:
    """The middle of what is brighter than the mean, (3,) RAS mm."""
    data = image.data[0]
    mean = torch.where(image.valid, data, 0.0).sum(dtype=torch.float64) / image.valid.sum().clamp_min(1)
    bright = image.valid & (data > mean)
    if not bright.any():
        return image.grid.center
    counts = [bright.sum(tuple(a for a in range(3) if a != axis)).numpy() for axis in range(3)]
    return image.grid.to_world(np.array([np.average(np.arange(len(n)), weights=n) for n in counts]))


def window(image: Image) -> tuple[float, float]:
    """Soft tissue for CT, else nearly the whole range."""
    if guess_fill(image)[0] <= -900:
        return CT_WINDOW
    step = max(1, image.valid.numel() // 2_000_000)
    values = image.data[0].flatten()[::step][image.valid.flatten()[::step]]
    low, high = np.percentile(values.numpy(), (0.5, 99.5)) if len(values) else (0.0, 1.0)
    return float(low), float(high)


def scaled(pixels: Array, valid: NDArray[np.bool_], limits: tuple[float, float]) -> Array:
    """Brightness 0 to 1 between two values; 0 where not valid."""
    low, high = limits
    brightness: Array = np.clip((pixels - low) / max(high - low, 1e-12), 0, 1) * valid
    return brightness


def _blend(background: Array, front: Array, valid: NDArray[np.bool_]) -> Array:
    """(up, across, 3): background green, front magenta; the background dimmed where the front is not valid."""
    both = background[..., None] * GREEN + front[..., None] * MAGENTA
    return np.where(valid[..., None], both, 0.45 * background[..., None])


def _checkerboard(plane: Plane, fields: int = 8) -> NDArray[np.bool_]:
    height, width = (plane.grid.shape[axis] for axis in (plane.up, plane.across))
    size = max(1, round(max(height, width) / fields))
    board: NDArray[np.bool_] = (np.arange(height)[:, None] // size + np.arange(width) // size) % 2 == 1
    return board


def _centers(plane: Plane) -> Array:
    """World points of the pixels, (up, across, 3)."""
    voxels = np.moveaxis(np.indices(plane.grid.shape, np.float64), 0, -1)
    return plane.grid.to_world(voxels).squeeze(3 - plane.across - plane.up).swapaxes(0, 1)


def _jacobian_and_length(transform: Transform, plane: Plane, seen: Grid) -> tuple[Array, Array]:
    """Jacobian determinant and length of the displacement in mm, (up, across) both; NaN outside of ``seen``."""
    thick = [int(axis == 3 - plane.across - plane.up) for axis in range(3)]
    slab = plane.grid.padded(thick, thick)
    field = transform.displacements(slab)
    middle = tuple(slice(1, 2) if extra else slice(None) for extra in thick)
    determinant, length = displacement_determinant(field, slab)[middle], lengths(field)[middle]
    inside = seen.contains(_centers(plane))
    return np.where(inside, plane.flat(determinant), np.nan), np.where(inside, plane.flat(length), np.nan)


def round_number(limit: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above the limit."""
    power = 10.0 ** np.floor(np.log10(limit))
    return float(power * max(step for step in (1, 2, 5) if step * power <= limit * 1.0001))


def _affine_part(transform: Transform, grid: Grid) -> Array:
    """(4, 3): least-squares affine of the transform over the field of view, points as rows [x y z 1]."""
    lines = [np.linspace(0, n - 1, 9) for n in grid.shape]
    points = grid.to_world(np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3))
    fitted: Array = np.linalg.lstsq(np.c_[points, np.ones(len(points))], transform(points), rcond=None)[0]
    return fitted


# -- drawing -----------------------------------------------------------------------------------------------------


def _panels(rows: int, columns: list[Plane], colour_bars: bool = False) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), as wide as the planes are in mm; a narrow column for colour bars."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures need matplotlib; install it by pip install 'crossmorph[report]'") from None
    sizes = [plane.extent() for plane in columns]
    widths = [high - low for low, high, _, _ in sizes]
    height = max(high - low for _, _, low, high in sizes)
    inches = (12 if len(columns) == 3 else 16) / sum(widths)
    ratios = [*widths, 0.05 * sum(widths) / len(widths)] if colour_bars else widths
    figure: Any = Figure(figsize=(inches * sum(ratios) + 0.6, inches * height * rows + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    axes = figure.subplots(rows, len(ratios), width_ratios=ratios, squeeze=False)
    if colour_bars:
        axes[0, -1].set_axis_off()
    return figure, axes


def _draw(axis: Any, plane: Plane, pixels: Array, **colours: Any) -> Any:
    """Pixels (up, across) or (up, across, 3) in world coordinates, with the letters of the sides."""
    left, right, low, high = plane.extent()
    options = {"cmap": "gray", "vmin": 0, "vmax": 1} | colours
    drawn = axis.imshow(pixels, origin="lower", extent=(left, right, low, high), **options)
    axis.set(xlim=(right, left), ylim=(low, high), xticks=[], yticks=[], aspect="equal", anchor="N")
    box = {"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0}
    for x, y, letter, across, up in (
        (0.02, 0.5, "RAS"[plane.across], "left", "center"),
        (0.98, 0.5, "LPI"[plane.across], "right", "center"),
        (0.5, 0.98, "RAS"[plane.up], "center", "top"),
        (0.5, 0.02, "LPI"[plane.up], "center", "bottom"),
    ):
        axis.text(x, y, letter, ha=across, va=up, transform=axis.transAxes, fontsize=9, color="white", bbox=box)
    return drawn


def _draw_edges(axis: Any, plane: Plane, pixels: Array, valid: NDArray[np.bool_], color: str) -> None:
    """Edges after Marr and Hildreth 1980: zero crossings of the smoothed Laplacian where the slope is steep."""
    from scipy.ndimage import binary_erosion, gaussian_gradient_magnitude, gaussian_laplace

    slope = gaussian_gradient_magnitude(pixels, EDGE_BLUR)
    curvature = gaussian_laplace(pixels, EDGE_BLUR)
    inside = binary_erosion(valid, iterations=2 * EDGE_BLUR, border_value=1)
    steep = inside & (slope > 0.3 * np.quantile(slope[inside], 0.99) if inside.any() else False)
    if steep.any():
        points = _centers(plane)
        across, up = points[0, :, plane.across], points[:, 0, plane.up]
        edges = np.ma.array(curvature, mask=~steep)
        axis.contour(across, up, edges, levels=[0], colors=color, linewidths=0.9)


def _draw_lines(axis: Any, plane: Plane, transform: Transform, affine: Array, line_mm: float) -> None:
    left, right, low, high = plane.extent()
    level = plane.grid.origin[3 - plane.across - plane.up]
    for line in _lines((left, right), (low, high), line_mm):
        points = np.empty((len(line), 3))
        points[:, plane.across], points[:, plane.up], points[:, 3 - plane.across - plane.up] = *line.T, level
        back = (transform(points) - affine[3]) @ np.linalg.inv(affine[:3])
        axis.plot(back[:, plane.across], back[:, plane.up], color="#0b5394", linewidth=0.9)


def _lines(across: tuple[float, float], up: tuple[float, float], line_mm: float) -> Iterator[Array]:
    """Straight lines along both axes of a rectangle, (N, 2) points each."""
    for swap, (along, over) in enumerate(((across, up), (up, across))):
        steps = np.linspace(*along, 200)
        for place in np.arange(over[0] + line_mm / 2, over[1], line_mm):
            line = np.c_[steps, np.full_like(steps, place)]
            yield line[:, ::-1] if swap else line


def _scale_bar(axis: Any, plane: Plane) -> None:
    left, right, low, high = plane.extent()
    length = round_number((right - left) / 3)
    start, height = right - 0.05 * (right - left), low + 0.05 * (high - low)
    axis.plot([start, start - length], [height, height], color="black", linewidth=3, solid_capstyle="butt")
    axis.text(start - length / 2, height + 0.015 * (high - low), f"{length:g} mm", ha="center", fontsize=9)


def _save(figure: Any, path: str | Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return Path(path)
