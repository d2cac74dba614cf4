"""Seconds of each stage of the published convexAdam on two volumes of one grid, as JSON.

python stages_convexadam.py FIXED MOVING THREADS DEVICE

On a GPU, where it computes in half precision by default, stages are timed in a second run after one that warms up.
"""

import json
import sys
import time
from collections import defaultdict
from typing import Any

import convexAdam.convex_adam_MIND as released
import nibabel
import torch

STAGES = {
    "extract_features": "descriptors",
    "correlate": "cost volumes",
    "coupled_convex": "coupled convex",
    "inverse_consistency": "inverse consistency",
}

if __name__ == "__main__":
    fixed, moving = (nibabel.load(f).get_fdata(dtype="float32") for f in sys.argv[1:3])
    torch.set_num_threads(int(sys.argv[3]))
    device = torch.device(sys.argv[4])
    finished = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, float] = defaultdict(float)

    def timed(function: Any, stage: str) -> Any:
        """The function, adding what it takes to its stage."""

        def call(*args: Any, **options: Any) -> Any:
            finished()
            begin = time.perf_counter()
            result = function(*args, **options)
            finished()
            seconds[stage] += time.perf_counter() - begin
            return result

        return call

    for name, stage in STAGES.items():
        setattr(released, name, timed(getattr(released, name), stage))
    precision = {} if device.type == "cuda" else {"dtype": torch.float32}
    if device.type == "cuda":
        released.convex_adam_pt(fixed, moving, device=device)
        seconds.clear()
    begin = time.perf_counter()
    released.convex_adam_pt(fixed, moving, device=device, **precision)
    seconds["whole"] = time.perf_counter() - begin
    seconds["Adam, 80 steps"] = 2 * seconds["whole"] - sum(seconds.values())  # and the pooling before it
    print(json.dumps(seconds))
