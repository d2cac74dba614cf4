"""DISA descriptors: features of a small network whose dot products approximate LC2.

Ronchetti et al., "DISA: Differentiable Similarity Approximation for Universal Multimodal Registration", MICCAI
2023.
The similarity of place p in one volume and q in another is the dot product of their 16 features, about LC2 of the
patches there (``describe.lc2``), in one product instead of three least-squares fits.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path

import numpy as np
import torch

from crossmorph.describe.lc2 import zscored
from crossmorph.errors import InputError
from crossmorph.networks.disa import CHANNELS, REACH, STRIDES, DisaNet, clipped
from crossmorph.space import Grid
from crossmorph.train.checkpoint import load_weights

SPACING_MM = 2.0
"""The voxel size that the network was trained at; resample to it first."""

ARCHITECTURE = "disa"


def load_network(path: Path | None = None) -> DisaNet:
    """The network with the weights of the package, or with those of a file that ``crossmorph train disa`` wrote.

    Raises:
        InputError: the file or its JSON file is missing, of another network, or has a wrong sha256.
    """
    if path is None:
        return _packaged()
    return load_weights(DisaNet, path, ARCHITECTURE).eval()


@lru_cache(maxsize=1)
def _packaged() -> DisaNet:
    with as_file(files("crossmorph") / "weights") as folder:
        return load_network(Path(folder) / "disa.safetensors")


def disa_features(
    values: torch.Tensor,
    valid: torch.Tensor | None = None,
    stride: int = 4,
    tile: int = 128,
    network: DisaNet | None = None,
) -> torch.Tensor:
    """Descriptors of a whole volume, in tiles, so that memory is bounded.

    The values are z-scored over the valid voxels, the others set to 0 (the mean). A descriptor depends on 24
    voxels around it on every side; near the edge of what is valid it sees the edge. It is valid where its own
    voxel is: ``valid[::stride, ::stride, ::stride]``. The result lies on ``feature_grid(grid, stride)``.

    Args:
        values: (I, J, K), any intensity scale, voxels of about ``SPACING_MM``.
        valid: (I, J, K) bool; everywhere by default.
        stride: 4, 2 or 1 voxels from one descriptor to the next.
        tile: edge in voxels of what is computed at once, a multiple of 4. The result does not depend on it.
        network: by default that of the package.

    Returns:
        (16, ceil(I / stride), ceil(J / stride), ceil(K / stride)) float32, no longer than 1. Output index k lies
        on input index ``stride`` k.

    Raises:
        InputError: another stride or tile, not three axes or fewer than two voxels along one, NaN, a constant
            volume, nothing valid, or weights that cannot be used.
    """
    if stride not in STRIDES:
        raise InputError(f"DISA descriptors have a stride of 4, 2 or 1 voxels, not {stride}")
    if tile < 4 or tile % 4:
        raise InputError(f"the tile edge must be a multiple of 4 voxels, not {tile}")
    if values.ndim != 3 or min(values.shape) < 2:
        raise InputError(
            f"DISA describes volumes, with at least two voxels along each axis, not {tuple(values.shape)}"
        )
    network = (load_network() if network is None else network).to(values.device)
    scaled = zscored(values, valid)
    shape = [-(-n // stride) for n in scaled.shape]
    features = torch.empty((CHANNELS, *shape), device=values.device)
    with torch.inference_mode():
        for corner in product(*(range(0, n, tile) for n in scaled.shape)):
            near = [max(c - REACH, 0) for c in corner]
            part = scaled[tuple(slice(a, c + tile + REACH) for a, c in zip(near, corner, strict=True))]
            found = clipped(network(part[None, None].contiguous(memory_format=torch.channels_last_3d), stride))[0]
            into = tuple(
                slice(c // stride, min((c + tile) // stride, n)) for c, n in zip(corner, shape, strict=True)
            )
            taken = tuple(
                slice((c - a) // stride, (c - a) // stride + i.stop - i.start)
                for c, a, i in zip(corner, near, into, strict=True)
            )
            features[(slice(None), *into)] = found[(slice(None), *taken)]
    return features


def disa_volume(values: torch.Tensor, valid: torch.Tensor | None = None, stride: int = 2) -> torch.Tensor:
    """(16, I, J, K): ``disa_features`` at every voxel, linear between those of a stride above 1."""
    features = disa_features(values, valid, stride)
    if stride == 1:
        return features
    for axis, size in enumerate(values.shape, start=1):
        place = torch.arange(size, device=values.device) / stride
        low = place.long()
        high = (low + 1).clamp(max=features.shape[axis] - 1)
        share = (place - low).reshape([-1 if a == axis else 1 for a in range(4)])
        features = features.index_select(axis, low) * (1 - share) + features.index_select(axis, high) * share
    return features


def feature_grid(grid: Grid, stride: int = 4) -> Grid:
    """Where the descriptors of a volume on ``grid`` lie: the first on voxel 0, then every ``stride``-th."""
    i, j, k = (-(-n // stride) for n in grid.shape)
    return Grid((i, j, k), grid.affine @ np.diag([stride, stride, stride, 1.0]))


def quantised(features: torch.Tensor) -> torch.Tensor:
    """Descriptors in eight bits, round(127 f) as int8: a quarter of the memory.

    A dot product of two is that of the integers divided by 127^2; on random unit descriptors it is wrong by 0.003
    on average.
    """
    return (127 * features).round().clamp(-127, 127).to(torch.int8)


def dequantised(codes: torch.Tensor) -> torch.Tensor:
    """What ``quantised`` stands for, as float32."""
    return codes.float() / 127
