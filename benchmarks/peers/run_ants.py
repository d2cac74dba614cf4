"""Register with ANTs: affine and SyN with Mattes mutual information (multi) or local correlation (mono).

python run_ants.py FIXED MOVING OUTPUT.h5 [--kind multi|mono] [--start own|header]
"""

import os
import shutil
import tempfile

os.environ["ANTS_RANDOM_SEED"] = "1"  # read by the library when it is loaded

import ants
from arguments import parse

METRIC = {
    "multi": {"syn_metric": "mattes", "syn_sampling": 32, "reg_iterations": (100, 70, 50, 0)},
    "mono": {"syn_metric": "CC", "syn_sampling": 2, "reg_iterations": (100, 70, 20, 0)},
}

if __name__ == "__main__":
    given = parse(__doc__)
    fixed, moving = (ants.image_read(str(path)) for path in (given.fixed, given.moving))
    with tempfile.TemporaryDirectory() as folder:
        result = ants.registration(
            fixed,
            moving,
            type_of_transform="SyN" if given.start == "own" else "SyNOnly",
            outprefix=f"{folder}/",
            aff_metric="mattes",
            aff_sampling=32,
            grad_step=0.2,
            flow_sigma=3,
            write_composite_transform=True,
            **METRIC[given.kind],
        )
        shutil.copyfile(result["fwdtransforms"], given.output)
