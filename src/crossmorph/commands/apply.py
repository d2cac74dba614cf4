"""``crossmorph apply``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from crossmorph.commands._spaces import recorded_grids
from crossmorph.errors import InputError

if TYPE_CHECKING:
    from crossmorph.image import Image, Labels
    from crossmorph.points import Mesh, Points
    from crossmorph.space import Grid
    from crossmorph.transform import Transform

POINTS = (".csv", ".mrk.json", ".fcsv")
MESHES = (".stl", ".ply", ".vtk", ".gii")


@dataclass(frozen=True)
class Apply:
    """Move a volume, a label map, points or a surface through a transform.

    Give the folder that `crossmorph register` wrote, and the space that the input lives in (a volume on the grid
    of one of both images needs no --space). It lands in the other space.

    Or give a transform file. It sends points of one space to points of another: forward.h5 those of the fixed
    image to the moving image. Points and surfaces travel with it: with forward.h5 give those of the fixed image.
    A volume travels the other way: with forward.h5 give the moving image; it is drawn on the fixed grid. With
    --space the direction is chosen for you here, too.
    """

    transform: Positional[Path]
    """Folder of a result, or a transform: ITK (.h5, .tfm, .txt, .mat), displacements (.nii.gz, .mha, .nrrd),
    .lta, .npz."""

    input: Positional[Path]
    """Volume (every frame or channel of it), points (.csv in RAS mm, .mrk.json, .fcsv), or surface (.stl, .ply,
    .vtk, .gii)."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """File to write (.nii, .nii.gz, .mha, .nrrd; or one of points or surfaces). It is replaced if it exists."""

    like: Path | None = None
    """Volume whose grid the output gets. By default the record.json beside the transform tells."""

    labels: bool = False
    """The input is a label map: the label with the largest share wins, and no new ids appear."""

    mode: Literal["linear", "nearest", "cubic"] = "linear"
    """Interpolation of an image."""

    fill: float | None = None
    """Value outside the field of view of the input. By default it is guessed from the image and printed."""

    space: Literal["fixed", "moving"] | None = None
    """Space that the input lives in."""

    spacing_mm: tuple[float, float, float] | None = None
    """Voxel size along x, y, z of a TIFF or OME-Zarr that does not tell it."""

    coordinates: Literal["ras", "lps"] | None = None
    """Of a surface whose file does not say; by default ras."""

    def run(self) -> int:
        """Read, move, write and return the exit code."""
        from crossmorph import io

        kind = io.suffix_of(self.input)
        spatial = kind in POINTS or kind in MESHES
        if spatial and (self.like or self.labels):
            raise InputError(f"{self.input} holds points; --like and --labels are for volumes")
        transform = self._transform()
        if spatial:
            self._move(transform, io.read_points(self.input) if kind in POINTS else self._mesh())
        else:
            self._resample(transform)
        return 0

    def _mesh(self) -> Mesh:
        from crossmorph import io

        return io.read_mesh(self.input, self.coordinates)

    # -- which way -----------------------------------------------------------------------------------------------

    def _transform(self) -> Transform:
        """From its own spaces to each other: a file called inverse* goes from moving to fixed points."""
        from crossmorph import io

        path = self.transform / "forward.h5" if self.transform.is_dir() else self.transform
        first, second = recorded_grids(path)
        if self.transform.is_dir() and first is None:
            raise InputError(
                f"{self.transform} is no result of crossmorph: it has no record.json; name a transform"
            )
        backward = path.name.startswith("inverse")
        names = ("moving", "fixed") if backward else ("fixed", "moving")
        transform = io.read_transform(path, fixed=first, moving=second)
        return replace(transform, fixed=names[0], moving=names[1])

    def _towards(self, transform: Transform, space: str) -> Transform:
        """The transform whose points come from a space: this one, the one beside it, or the numerical inverse."""
        from crossmorph import io

        if transform.fixed == space:
            return transform
        folder = self.transform if self.transform.is_dir() else self.transform.parent
        beside = folder / ("inverse.h5" if space == "moving" else "forward.h5")
        if transform.fixed_grid is not None and beside.is_file():
            return replace(io.read_transform(beside), **transform.swapped_spaces)
        return transform.inverse()

    # -- points and surfaces -------------------------------------------------------------------------------------

    def _move(self, transform: Transform, thing: Points | Mesh) -> None:
        from crossmorph import io
        from crossmorph.points import Mesh

        points = thing.points if isinstance(thing, Mesh) else thing
        if self.space is None and self.transform.is_dir():
            raise InputError(f"in which space do the points of {self.input} live? Say --space fixed or moving")
        space = self.space or transform.fixed
        mapping = self._towards(transform, space)
        here, there = mapping.fixed_grid, mapping.moving_grid
        if here and there:
            xyz = points.xyz.numpy()
            if not here.contains(xyz).any() and there.contains(xyz).any():
                raise InputError(
                    f"no point of {self.input} lies in the {space} image ({_box(here)}), but some lie in the "
                    f"{mapping.moving} image ({_box(there)}); say --space {mapping.moving} if they live there"
                )
        moved = thing.moved_to(mapping(points.xyz), mapping.moving)
        io.write(moved, self.output)
        faces = f", {len(thing.faces)} faces" if isinstance(thing, Mesh) else ""
        print(
            f"{self.output}: {len(points)} points{faces} of the {space} space, now of the {mapping.moving} space"
        )

    # -- volumes -------------------------------------------------------------------------------------------------

    def _resample(self, transform: Transform) -> None:
        from crossmorph import io
        from crossmorph.image import Labels
        from crossmorph.resample import resample, resample_labels

        read = io.read_labels if self.labels else io.read
        given = read(self.input, spacing_mm=self.spacing_mm)
        space = self._space_of(given, transform)
        mapping = self._towards(transform, "fixed" if space == "moving" else "moving")
        grid = io.read(self.like).grid if self.like else mapping.fixed_grid
        if grid is None:
            record = self.transform.with_name("record.json")
            raise InputError(
                f"the grid of the output is not known: {record} does not tell it; give a volume with --like"
            )
        moved: Image | Labels
        if isinstance(given, Labels):
            moved = resample_labels(given, grid, mapping)
            empty = bool(given.data.any()) and not bool(moved.data.any())
        else:
            moved = resample(given, grid, mapping, self.mode, self.fill)
            empty = not bool(moved.valid.any())
        if empty:
            raise InputError(
                f"nothing of {self.input} reaches the output grid ({grid}) through {self.transform}; is the "
                "transform of the other direction meant, or another --like or --space?"
            )
        io.write(moved, self.output)
        print("; ".join([f"{self.output}: {moved.grid}", *moved.notes]))
        if isinstance(given, Labels) and isinstance(moved, Labels):
            _print_volumes(given, moved)

    def _space_of(self, given: Image | Labels, transform: Transform) -> str:
        """The space of a volume: as said, as its grid shows, or what the transform file draws."""
        fixed, moving = transform.fixed_grid, transform.moving_grid
        if self.space is not None or fixed is None or moving is None:
            return self.space or transform.moving
        is_fixed, is_moving = given.grid.same_as(fixed), given.grid.same_as(moving)
        if self.transform.is_dir() and is_fixed != is_moving:
            return "fixed" if is_fixed else "moving"
        if not self.transform.is_dir() and (is_moving or not is_fixed):
            return transform.moving
        what = "neither image" if not is_fixed else "both images" if is_moving else "the other image"
        raise InputError(
            f"{self.input} has the grid of {what} of {self.transform}: it is {given.grid.place}; the "
            f"{transform.fixed} image is {fixed.place}; the {transform.moving} image, {moving.place}. Say --space "
            "fixed or --space moving, or take the transform of the other direction"
        )


def _box(grid: Grid) -> str:
    low, high = grid.corners().min(0).round(1).tolist(), grid.corners().max(0).round(1).tolist()
    return f"{low} to {high} mm RAS"


def _print_volumes(before: Labels, after: Labels) -> None:
    """Volumes of every label in mm^3 before and after, and which labels got lost."""
    first, second = before.volumes_mm3, after.volumes_mm3
    for label, volume in first.items():
        print(f"label {label}: {volume:.1f} mm3 before, {second.get(label, 0.0):.1f} mm3 after")
    lost = [str(label) for label in first if label not in second]
    if lost:
        print(f"lost: {', '.join(lost)}; too small for the output grid, or outside its field of view")
