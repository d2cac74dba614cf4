"""Whole registrations and trainings on a GPU give what they give on the processor, within its rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scene import QUICK, pair

from crossmorph.cli import main
from crossmorph.registration import register
from crossmorph.settings import load_settings

pytestmark = pytest.mark.gpu


def test_a_registration_ends_at_the_same_place() -> None:
    fixed, moving = pair()
    found = [register(fixed, moving, settings=QUICK, device=device).transform for device in ("cpu", "cuda")]
    points = fixed.grid.to_world(torch.rand(200, 3).double() * (torch.tensor(fixed.grid.shape) - 1))
    apart = (found[0](points) - found[1](points)).norm(dim=1)
    assert float(apart.mean()) < 0.1
    assert float(apart.max()) < 1.0


@pytest.mark.parametrize("preset", ["convexadam", "default"])
def test_every_stage_of_a_preset_runs(preset: str) -> None:
    result = register(*pair(), settings=load_settings(preset=preset), device="cuda")
    assert result.verdict.status in ("ok", "check", "failed")


CONFIG = """
steps = 3
precision = "bf16"
{network}
[synthesis]
shape = [32, 32, 32]
pairs = 2
"""


@pytest.mark.parametrize(
    ("system", "network"),
    [
        ("gradient-guidance", ""),
        ("lumir", "channels = 16\nattention = true\nlarge_kernel = 5\nbilateral = 'trained'"),
        ("lumir", "network = 'voxelmorph'"),
    ],
)
def test_a_network_learns(system: str, network: str, tmp_path: Path) -> None:
    config, out = tmp_path / "config.toml", tmp_path / "out"
    config.write_text(CONFIG.format(network=network))
    command = [
        "train",
        system,
        "synthetic",
        "-o",
        str(out),
        "--config",
        str(config),
        "--device",
        "cuda",
        "--quiet",
    ]
    assert main(command) == 0
    assert (out / "weights.safetensors").is_file()
