"""Where to compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them it is slower than 32 bits."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch cannot tell
        return False
    has = torch.cpu.get_capabilities()
    return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def constants(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A few numbers, in the type and where another tensor lies. They are kept, so do not change them in place.

    Copied anew each time, they would make the processor wait until a GPU has done all that it was told before.
    """
    return _kept(tuple(values), dtype or like.dtype, like.device)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a tensor of inference could not take part in a training later
        return torch.tensor(values, dtype=dtype, device=device)
