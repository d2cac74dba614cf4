"""The same registrations on the processor and on a GPU: seconds by stage after a first run, and overlap of labels.

python benchmarks/devices.py FIXED MOVING FIXED_LABELS MOVING_LABELS [--presets convexadam default]

Reading, writing and reports are left out; the linear stage computes on the processor in either case.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from peers import HERE
from tables import Row, update_section
from tyro.conf import Positional

from crossmorph import io, register
from crossmorph.evaluate import label_overlap, mean_dice, warp_labels
from crossmorph.evaluate.tables import markdown
from crossmorph.settings import load_settings


@dataclass(frozen=True)
class Devices:
    """Register twice on each device and tabulate the second runs."""

    files: Positional[tuple[Path, Path, Path, Path]]
    """Fixed and moving image, fixed and moving label map."""

    presets: tuple[str, ...] = ("convexadam", "default")
    """Of the training-free system."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where to compute."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace."""

    def run(self) -> None:
        """Measure and print."""
        rows = [self._row(preset, device) for preset in self.presets for device in self.devices]
        text = markdown(rows)
        print(text)
        if self.update_readme:
            gpu = torch.cuda.get_device_name() if "cuda" in self.devices else "no GPU"
            command = (
                f"`python benchmarks/devices.py FIXED MOVING LABELS LABELS`, {time.strftime('%Y-%m-%d')}, {gpu}"
            )
            update_section(HERE / "README.md", self.update_readme, f"{command}\n\n{text}")

    def _row(self, preset: str, device: str) -> Row:
        fixed, moving = (io.read(path) for path in self.files[:2])
        labels = [io.read_labels(path) for path in self.files[2:]]
        settings = load_settings(preset=preset)
        for _ in range(2):
            begin = time.perf_counter()
            result = register(fixed, moving, settings=settings, device=device)
            seconds = time.perf_counter() - begin
        stages = {entry["stage"]: entry["seconds"] for entry in result.journal.stages}
        deformable = sum(
            spent for name, spent in stages.items() if name.startswith(("descriptors", "search", "refine"))
        )
        warped = warp_labels(labels[1], labels[0].grid, result.transform)
        return {
            "preset": preset,
            "device": device,
            "whole s": f"{seconds:.2f}",
            "deformable s": f"{deformable:.2f}",
            "stages s": ", ".join(f"{name} {spent:.2f}" for name, spent in stages.items() if spent >= 0.005),
            "Dice": f"{mean_dice(label_overlap(labels[0], warped, labels[1])):.4f}",
        }


if __name__ == "__main__":
    tyro.cli(Devices, description=__doc__).run()
