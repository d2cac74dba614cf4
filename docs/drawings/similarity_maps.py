"""Where LC2, DISA and MIND-SSC find a point of one volume in another: docs/drawings/similarity_maps.png.

    .venv/bin/python docs/drawings/similarity_maps.py

After Fig. 1 of Ronchetti et al., MICCAI 2023. Both volumes of a pair lie in one world, so the right place is
known: the cross. Each map is computed over the whole target volume at 2 mm and shown in the axial slice of the
point. Prints the seconds, and where the maximum of each map lies.
"""

from __future__ import annotations

import io as memory
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image as Picture

from crossmorph import io
from crossmorph.describe.disa import SPACING_MM, disa_features
from crossmorph.describe.lc2 import lc2_map, zscored
from crossmorph.describe.mind import mind_ssc
from crossmorph.image import Image
from crossmorph.preprocess import onto

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("CROSSMORPH_DATA") or HERE.parents[2] / "shared" / "data")

PAIRS = (
    # source, target, files, and points: eye socket, petrous bone, inner skull; ventricle, insula, tentorium
    (
        ("CT", "ct_mr/mni_ct.nii.gz"),
        ("T1", "ct_mr/mni_T1.nii.gz"),
        ((34.0, 44.0, -32.0), (-34.0, -28.0, -36.0), (22.0, -94.0, 20.0)),
    ),
    (
        ("T1", "ms_mni/p07_T1.nii.gz"),
        ("FLAIR", "ms_mni/p07_FLAIR.nii.gz"),
        ((14.0, 20.0, 12.0), (-38.0, 8.0, 0.0), (22.0, -62.0, -32.0)),
    ),
)
METHODS = ("LC2", "DISA", "MIND-SSC")


def main() -> None:
    rows = []
    for (source_name, source_file), (target_name, target_file), points in PAIRS:
        source = io.read(DATA / source_file)
        grid = source.grid.respaced(SPACING_MM)
        source, target = onto(source, grid), onto(io.read(DATA / target_file), grid)
        describe_seconds, maps = methods(source, target)
        for point in points:
            place = [int(n) for n in np.round(grid.to_voxel(np.array(point)))]
            found = {}
            for name in METHODS:
                start = time.perf_counter()
                found[name] = maps[name](place)
                seconds = time.perf_counter() - start
                best = np.array(np.unravel_index(int(found[name].argmax()), grid.shape))
                off = SPACING_MM * float(np.linalg.norm(best - place))
                print(
                    f"{source_name}-{target_name} {point}: {name} {describe_seconds[name]:.2f} s to describe, "
                    f"{seconds:.3f} s for the map, maximum {off:.0f} mm off"
                )
            rows.append((f"{source_name} to {target_name}", source, target, place, found))
    draw(rows)


def methods(
    source: Image, target: Image
) -> tuple[dict[str, float], dict[str, Callable[[list[int]], torch.Tensor]]]:
    """Seconds to describe both volumes, and a function from a voxel of the source to its map over the target."""
    a, b = (zscored(image.data[0]) for image in (source, target))
    padded = torch.nn.functional.pad(a, (7,) * 6)

    def lc2_at(place: list[int]) -> torch.Tensor:
        i, j, k = place
        return lc2_map(padded[i : i + 15, j : j + 15, k : k + 15], b)

    seconds, features = {"LC2": 0.0}, {}
    describe: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "DISA": lambda v: disa_features(v, stride=1),
        "MIND-SSC": mind_ssc,
    }
    for name, call in describe.items():
        call(a[30:54, 40:64, 30:54])  # what is loaded or compiled once does not count
        start = time.perf_counter()
        features[name] = [call(a), call(b)]
        seconds[name] = time.perf_counter() - start

    def disa_at(place: list[int]) -> torch.Tensor:
        one, all_of = features["DISA"]
        return torch.einsum("c,cijk->ijk", one[(slice(None), *place)], all_of)

    def mind_at(place: list[int]) -> torch.Tensor:
        one, all_of = features["MIND-SSC"]
        return -((all_of - one[(slice(None), *place)][:, None, None, None]) ** 2).mean(0)

    return seconds, {"LC2": lc2_at, "DISA": disa_at, "MIND-SSC": mind_at}


def draw(rows: list[tuple[str, Image, Image, list[int], dict[str, torch.Tensor]]]) -> None:
    figure = Figure(figsize=(7.6, 1.62 * len(rows)), facecolor="white", layout="constrained")
    axes = figure.subplots(len(rows), 2 + len(METHODS))
    for line, (title, source, target, (i, j, k), found) in zip(axes, rows, strict=True):
        shown = [source.data[0], target.data[0], *found.values()]
        for axis, values, name in zip(line, shown, ("source", "target", *METHODS), strict=True):
            image = values[:, :, k].T.numpy()
            low, high = (float(v) for v in np.quantile(values.numpy(), (0.01, 0.999)))
            scan = name in ("source", "target")
            axis.imshow(
                np.fliplr(image) if source.grid.axcodes[0] == "R" else image,
                cmap="gray" if scan else "inferno",
                origin="lower",
                vmin=low,
                vmax=high if scan else float(values.max()),
            )
            across = image.shape[1] - 1 - i if source.grid.axcodes[0] == "R" else i
            axis.plot(across, j, "+", color="#00d78f" if scan else "white", markersize=7, markeredgewidth=1.2)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, fontsize=10)
    for axis, name in zip(axes[0], ("source", "target", *METHODS), strict=True):
        axis.set_title(name, fontsize=10)
    sheet = memory.BytesIO()
    figure.savefig(sheet, dpi=90)
    Picture.open(sheet).convert("RGB").quantize(160).save(HERE / "similarity_maps.png", optimize=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
