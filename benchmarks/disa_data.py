"""Lay out the volumes that the package's DISA weights were trained on: a folder for each subject.

    .venv/bin/python benchmarks/disa_data.py FOLDER
    .venv/bin/crossmorph train disa FOLDER/*/* -o OUT --unseen 'ms07|phantom110|phantom111' --schedule cpu

Real volumes are links into ``$CROSSMORPH_DATA``, only those whose licence lets weights be given away; its README
names sources and licences. Twelve trunks are generated: those of even number as CT and MR, the others with random
values for every organ and a random curve of the CT or MR values between them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from cases import data_folder
from scipy.ndimage import gaussian_filter

from crossmorph import io
from crossmorph.image import Image, Labels
from crossmorph.phantom import make_pair

SUBJECTS = {
    "ms26": ("ms_mni/p26_T1.nii.gz", "ms_mni/p26_T2.nii.gz", "ms_mni/p26_FLAIR.nii.gz"),
    "ms07": ("ms_mni/p07_T1.nii.gz", "ms_mni/p07_T2.nii.gz", "ms_mni/p07_FLAIR.nii.gz"),
    "msl01": tuple(f"ms_longitudinal/p01/{n}.nii.gz" for n in ("study1_FLAIR", "study1_T1W", "study2_T2W")),
    "totalseg": ("ct_mr/totalseg_ct.nii.gz", "ct_mr/totalseg_mr.nii.gz"),
    "headct": ("ct_mr/mni_ct.nii.gz", "robustness/brain.mgz", "robustness/shear.nii.gz"),
    "infant": ("infant_t1t2/month0_T1.nii.gz", "infant_t1t2/month0_T2.nii.gz"),
    "spine": ("spinal_cord/t1w.nii.gz", "spinal_cord/t2.nii.gz"),
    "prostate": ("prostate/t2_tra.nii.gz", "prostate/t2_sag.nii.gz", "prostate/adc.nii.gz"),
}
PHANTOMS = range(100, 112)


def main(out: Path, data: Path) -> None:
    for subject, names in SUBJECTS.items():
        (out / subject).mkdir(parents=True, exist_ok=True)
        for name in names:
            link = out / subject / Path(name).name
            if not link.exists():
                link.symlink_to((data / name).resolve(strict=True))
    for seed in PHANTOMS:
        folder = out / f"phantom{seed}"
        folder.mkdir(exist_ok=True)
        pair = make_pair((140, 110, 100), 2.0, seed=seed)
        scans = [(pair.fixed, pair.fixed_labels), (pair.moving, pair.moving_labels)]
        draw = np.random.default_rng(seed)
        for name, (scan, labels) in zip("ab", scans, strict=True):
            io.write(scan if seed % 2 == 0 else recoloured(scan, labels, draw), folder / f"{name}.nii.gz")


def recoloured(scan: Image, labels: Labels, draw: np.random.Generator) -> Image:
    """The same anatomy as no scanner shows it: a random value for each organ, a random curve for the rest."""
    ids, values = labels.data.numpy(), scan.data[0].numpy()
    organs = np.zeros(ids.shape, np.float32)
    for index in np.unique(ids):
        organs[ids == index] = draw.normal()
    ranks = np.argsort(np.argsort(values.ravel())).reshape(values.shape) / values.size
    curve = np.interp(ranks, np.linspace(0, 1, 9), draw.normal(size=9))
    mixed = np.where(ids > 0, organs + 0.35 * curve, curve)
    mixed = gaussian_filter(mixed, draw.uniform(0.3, 0.8)) + draw.normal(0, 0.05, mixed.shape)
    return Image.from_array((100 * mixed).astype(np.float32), scan.grid)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), data_folder())
