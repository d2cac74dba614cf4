"""Seconds of each stage of the published convexAdam on two volumes of one grid, as JSON.

python stages_convexadam.py FIXED MOVING THREADS
"""

import json
import sys
import time
from collections import defaultdict
from typing import Any

import convexAdam.convex_adam_MIND as released
import SimpleITK as sitk
import torch

STAGES = {
    "extract_features": "descriptors",
    "correlate": "cost volumes",
    "coupled_convex": "coupled convex",
    "inverse_consistency": "inverse consistency",
}

if __name__ == "__main__":
    fixed, moving = (sitk.GetArrayFromImage(sitk.ReadImage(f, sitk.sitkFloat32)).T.copy() for f in sys.argv[1:3])
    torch.set_num_threads(int(sys.argv[3]))
    seconds: dict[str, float] = defaultdict(float)

    def timed(function: Any, stage: str) -> Any:
        """The function, adding what it takes to its stage."""

        def call(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **options)
            seconds[stage] += time.perf_counter() - begin
            return result

        return call

    for name, stage in STAGES.items():
        setattr(released, name, timed(getattr(released, name), stage))
    begin = time.perf_counter()
    released.convex_adam_pt(fixed, moving, device=torch.device("cpu"), dtype=torch.float32)
    seconds["whole"] = time.perf_counter() - begin
    seconds["Adam, 80 steps"] = 2 * seconds["whole"] - sum(seconds.values())  # and the pooling before it
    print(json.dumps(seconds))
