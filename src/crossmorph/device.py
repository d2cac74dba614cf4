"""Where to compute."""

from __future__ import annotations

import torch

from crossmorph.errors import InputError


def chosen_device(name: str) -> torch.device:
    """The device for ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.

    Raises:
        InputError: another name, or CUDA where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
