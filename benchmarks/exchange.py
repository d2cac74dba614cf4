"""Apply exported transforms with ANTs itself, on an oblique, anisotropic, mirrored pair, and compare with ours.

python benchmarks/exchange.py --peers-python benchmarks/.venv-peers/bin/python

The tests ask oracles that install with them; ANTs does not, so it is asked here. Exit code 1 where a file differs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from truth import Warp, mirrored, tilted_grid, volume, world  # noqa: E402

from crossmorph import io  # noqa: E402
from crossmorph.resample import resample  # noqa: E402
from crossmorph.space import Grid  # noqa: E402
from crossmorph.transform import Affine, Chain, Transform  # noqa: E402

APPLY = """
import sys, ants
fixed, moving, out, *transforms = sys.argv[1:]
ants.apply_transforms(ants.image_read(fixed), ants.image_read(moving), transforms).to_file(out)
"""


LIST = "1Warp.nii.gz 0GenericAffine.mat"
"""Both links of a chain, named to ANTs in the order in which points go through them."""


@dataclass(frozen=True)
class Exchange:
    """Check files with ANTs."""

    peers_python: Path = HERE / ".venv-peers" / "bin" / "python"
    """Interpreter of the environment that `make bench-setup` makes."""

    def run(self) -> int:
        """Print the largest difference of each file, as a share of the image's range; 1 where one is too large."""
        fixed, moving = (
            tilted_grid((40, 44, 30), (2.0, 1.5, 3.0)),
            mirrored(tilted_grid((50, 40, 46), (1.7, 2.2, 2.4))),
        )
        worst = 0.0
        for fixed_grid, moving_grid in ((fixed, moving), (moving, fixed)):
            for name, transform in transforms(fixed_grid, moving_grid).items():
                with tempfile.TemporaryDirectory() as folder:
                    difference = self.difference(transform, name, Path(folder))
                print(f"{name:31} {fixed_grid.axcodes} <- {moving_grid.axcodes}: {difference:.2e}")
                worst = max(worst, difference)
        return int(worst > 1e-3)

    def difference(self, transform: Transform, name: str, folder: Path) -> float:
        """Largest difference of ANTs' warped image from ours, away from the border of the moving volume."""
        assert transform.fixed_grid is not None
        assert transform.moving_grid is not None
        image = volume(transform.moving_grid)
        io.write(volume(transform.fixed_grid), folder / "fixed.nii.gz")
        io.write(image, folder / "moving.nii.gz")
        links = transform.transforms if name == LIST and isinstance(transform, Chain) else [transform]
        files = name.split()
        for file, link in zip(files, links, strict=True):
            io.write_transform(link, folder / file)
        names = ("fixed.nii.gz", "moving.nii.gz", "out.nii.gz", *files)
        command = [str(self.peers_python), "-c", APPLY, *(str(folder / n) for n in names)]
        subprocess.run(command, check=True)
        theirs = io.read(folder / "out.nii.gz").data
        ours = resample(image, transform.fixed_grid, transform, fill=0).data
        voxels = image.grid.to_voxel(transform(world(transform.fixed_grid)).numpy())
        inner = ((voxels > 0.05) & (voxels < np.array(image.grid.shape) - 1.05)).all(-1)
        assert inner.mean() > 0.25
        return float((theirs - ours).abs()[0][inner].max() / np.ptp(image.data.numpy()))


def transforms(fixed: Grid, moving: Grid) -> dict[str, Transform]:
    """File name to transform."""
    spaces = {"fixed_grid": fixed, "moving_grid": moving}
    affine = Affine.from_parts(
        (3, -2, 1.5), (6, -9, 12), (1.05, 0.95, 1.1), (0.05, -0.02, 0.04), (1, -7, 13), **spaces
    )
    bent = Chain((Warp().field(fixed), affine), **spaces)
    return {"affine.mat": affine, "composite.h5": bent, "warp.nii.gz": bent, LIST: bent}


if __name__ == "__main__":
    sys.exit(tyro.cli(Exchange).run())
