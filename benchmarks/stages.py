"""Where the time goes: every stage of the training-free pipeline at convexAdam's settings, convexAdam, the floor.

python benchmarks/stages.py FIXED MOVING --threads 2 [--device cuda]

Both volumes lie on one grid. The floor of a stage is the larger of what it must read and write over the measured
memory bandwidth, and of its operations over the measured rate of those in a matrix product.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from peers import HERE
from tables import Row, update_section
from tyro.conf import Positional

GRID, FINE, HALF_WIDTH, STEPS, CHANNELS = 6, 2, 4, 80, 12
"""convexAdam's released settings: pooling of the search and of Adam, reach of the search, Adam steps."""


@dataclass(frozen=True)
class Stages:
    """Time all stages, one after the other, and print a table."""

    fixed: Positional[Path]
    """Fixed image."""

    moving: Positional[Path]
    """Moving image, on the same grid."""

    threads: int = 2
    """Threads of both programs."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where both compute."""

    rounds: int = 3
    """The shortest of this many runs counts (convexAdam runs once)."""

    peers_python: Path = HERE / ".venv-peers" / "bin" / "python"
    """Python that has convexAdam."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace."""

    def run(self) -> None:
        """Measure and print."""
        import torch

        from crossmorph import io
        from crossmorph.evaluate.tables import markdown

        torch.set_num_threads(self.threads)
        fixed, moving = (io.read(path) for path in (self.fixed, self.moving))
        ours, work = measure(fixed, moving, self.rounds, self.device)
        command = [self.peers_python, HERE / "peers/stages_convexadam.py", self.fixed, self.moving]
        answer = subprocess.run(
            [*map(str, command), str(self.threads), self.device], capture_output=True, check=True, text=True
        )
        least = floors(work, *machine(self.device))
        text = markdown(table(ours, json.loads(answer.stdout.splitlines()[-1]), least))
        print(text)
        if self.update_readme:
            options = f"--threads {self.threads}" + (" --device cuda" if self.device == "cuda" else "")
            told = f"`python benchmarks/stages.py FIXED MOVING {options}`, {time.strftime('%Y-%m-%d')}"
            shape = " x ".join(map(str, fixed.grid.shape))
            update_section(HERE / "README.md", self.update_readme, f"{told}, {shape} voxels\n\n{text}")


def measure(
    fixed: Any, moving: Any, rounds: int, device: str
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Seconds of each stage of crossmorph, and what each has to do: (bytes, operations)."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from crossmorph import io
    from crossmorph.describe.mind import mind_ssc
    from crossmorph.kernels.convex import cost_slab
    from crossmorph.match.consistency import inverse_consistent
    from crossmorph.match.convex import couple
    from crossmorph.match.cost import cost_volume_reference
    from crossmorph.optimise.field import refine, resize
    from crossmorph.optimise.terms import DescriptorSSD
    from crossmorph.transform import DisplacementField

    volumes = [image.data[0].to(device) for image in (fixed, moving)]
    seconds: dict[str, float] = {}

    def stage(name: str, call: Callable[[], Any]) -> Any:
        call()  # compiled, and in the caches
        for _ in range(rounds):
            finished(device)
            begin = time.perf_counter()
            result = call()
            finished(device)
            seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - begin)
        return result

    fine = stage("descriptors", lambda: [mind_ssc(volume, 1, 2, FINE) for volume in volumes])
    coarse = [F.avg_pool3d(f[None], GRID // FINE)[0] for f in fine]
    seen = torch.ones(coarse[0].shape[1:], dtype=torch.bool).numpy()

    def cost(fixed: Any, moving: Any) -> Any:
        if device == "cuda":
            return cost_volume_reference(fixed, moving, HALF_WIDTH, counted=True)
        lines = [f.permute(1, 2, 0, 3).contiguous().numpy() for f in (fixed, moving)]
        return torch.from_numpy(cost_slab(*lines, seen, seen, HALF_WIDTH, -1.0, True, 0, len(seen)))

    costs = stage("cost volumes", lambda: [cost(*pair) for pair in (coarse, coarse[::-1])])
    found = stage("coupled convex", lambda: [couple(cost, HALF_WIDTH, True)[-1] for cost in costs])
    field = stage("inverse consistency", lambda: inverse_consistent(*found, 15, True)[0])
    shape = fine[0].shape[1:]
    everywhere = torch.ones(shape, dtype=torch.bool, device=device)
    start = resize(field, shape)
    data = DescriptorSSD(*fine, everywhere, everywhere, reproduce=True)
    adam = f"Adam, {STEPS} steps"
    fitted = stage(adam, lambda: refine(data, start, shape, STEPS, 1.25, 0.0, 1.0, reproduce=True))
    seconds["whole"] = sum(seconds.values())
    transform = DisplacementField(fitted.cpu() * 0 + fixed.grid.spacing.min().item(), fixed.grid.resized(shape))
    stage("resampling", lambda: transform.apply(moving, like=fixed))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "volume.nii.gz"
        stage("writing and reading", lambda: (io.write(moving, file), io.read(file)))

    voxels, pooled, cells = volumes[0].numel(), fine[0][0].numel(), coarse[0][0].numel()
    places = (2 * HALF_WIDTH + 1) ** 3
    work = {
        "descriptors": (2 * 4.0 * (voxels + CHANNELS * pooled), 2.0 * voxels * (6 * 2 + CHANNELS * (6 + 3 + 12))),
        "cost volumes": (2 * 4.0 * cells * (2 * CHANNELS + places), 2.0 * cells * places * (3 * CHANNELS + 12)),
        "coupled convex": (2 * 4.0 * 7 * cells * places, 2.0 * 7 * cells * places * 2),
        "inverse consistency": (15 * 4.0 * 4 * 3 * cells, 15.0 * 2 * 3 * cells * 24),
        adam: (STEPS * 4.0 * pooled * (2 * CHANNELS + 3 * 8), STEPS * 1.0 * pooled * (CHANNELS * 30 + 3 * 60)),
        "resampling": (2 * 4.0 * voxels, 60.0 * voxels),
    }
    return seconds, work


def machine(device: str) -> tuple[float, float]:
    """Bytes a second of a copy in memory, operations a second of a matrix product."""
    import torch

    a, b = torch.zeros(40_000_000, device=device), torch.ones(40_000_000, device=device)
    square = torch.rand(2048, 2048, device=device)

    def shortest(call: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(5):
            finished(device)
            begin = time.perf_counter()
            call()
            finished(device)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    return 8 * a.numel() / shortest(lambda: a.copy_(b)), 2 * 2048**3 / shortest(lambda: square @ square)


def finished(device: str) -> None:
    """Wait until everything on a device is done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def floors(work: dict[str, tuple[float, float]], bandwidth: float, rate: float) -> dict[str, float]:
    """Seconds that a stage takes at least."""
    return {stage: max(moved / bandwidth, operations / rate) for stage, (moved, operations) in work.items()}


def table(ours: dict[str, float], theirs: dict[str, float], least: dict[str, float]) -> list[Row]:
    """A row a stage: seconds of both programs, their ratio, and the floor."""
    return [
        {
            "stage": stage,
            "crossmorph s": f"{seconds:.3f}",
            "convexAdam s": f"{theirs[stage]:.2f}" if stage in theirs else "",
            "ratio": f"{theirs[stage] / seconds:.1f}" if stage in theirs else "",
            "floor s": f"{least[stage]:.3f}" if stage in least else "",
        }
        for stage, seconds in ours.items()
    ]


if __name__ == "__main__":
    tyro.cli(Stages, description=__doc__).run()
