"""Linear interpolation and the vote of labels, point by point; the torch versions are in ``resample``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from crossmorph.kernels.parallel import over_planes
from crossmorph.resample import TIE
from crossmorph.space import FACE

Numbers = NDArray[Any]


def linear(data: torch.Tensor, voxels: torch.Tensor, fill: float) -> torch.Tensor:
    """(C, I, J, K) floats at (n, 3) voxel coordinates -> (C, n); ``fill`` outside the outer faces."""
    out = torch.empty(data.shape[0], len(voxels), dtype=data.dtype)
    volume, points = data.contiguous().numpy(), voxels.double().contiguous().numpy()
    if len(voxels):
        over_planes(_linear, len(voxels), volume, points, float(fill), out.numpy())
    return out


def vote(labels: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """(I, J, K) labels at (n, 3) voxel coordinates -> (n,) the label with the largest linear weight; 0 outside."""
    out = torch.empty(len(voxels), dtype=labels.dtype)
    volume, points = labels.contiguous().numpy(), voxels.double().contiguous().numpy()
    over_planes(_vote, len(voxels), volume, points, out.numpy())
    return out


@njit(cache=True, nogil=True, error_model="numpy")
def _place(x: float, n: int) -> tuple[int, int, float]:
    """The two voxels around a coordinate and the weight of the second; ends continued."""
    x = min(max(x, 0.0), n - 1.0)
    low = int(x)
    return low, min(low + 1, n - 1), x - low


@njit(cache=True, nogil=True, error_model="numpy")
def _within(x: float, n: int) -> bool:
    return x >= -0.5 - FACE and x <= n - 0.5 + FACE


@njit(cache=True, nogil=True, error_model="numpy")
def _linear(start: int, stop: int, data: Numbers, voxels: Numbers, fill: float, out: Numbers) -> None:
    channels, ni, nj, nk = data.shape
    for p in range(start, stop):
        x, y, z = voxels[p]
        if not (_within(x, ni) and _within(y, nj) and _within(z, nk)):
            out[:, p] = fill
            continue
        i, i1, fx = _place(x, ni)
        j, j1, fy = _place(y, nj)
        k, k1, fz = _place(z, nk)
        for c in range(channels):
            block = data[c]
            near = (block[i, j, k] * (1 - fz) + block[i, j, k1] * fz) * (1 - fy)
            near += (block[i, j1, k] * (1 - fz) + block[i, j1, k1] * fz) * fy
            far = (block[i1, j, k] * (1 - fz) + block[i1, j, k1] * fz) * (1 - fy)
            far += (block[i1, j1, k] * (1 - fz) + block[i1, j1, k1] * fz) * fy
            out[c, p] = near * (1 - fx) + far * fx


@njit(cache=True, nogil=True, error_model="numpy")
def _vote(start: int, stop: int, labels: Numbers, voxels: Numbers, out: Numbers) -> None:
    ni, nj, nk = labels.shape
    ids = np.empty(8, labels.dtype)
    weights = np.empty(8)
    for p in range(start, stop):
        x, y, z = voxels[p]
        if not (_within(x, ni) and _within(y, nj) and _within(z, nk)):
            out[p] = 0
            continue
        i, i1, fx = _place(x, ni)
        j, j1, fy = _place(y, nj)
        k, k1, fz = _place(z, nk)
        for corner in range(8):
            far_x, far_y, far_z = corner & 4, corner & 2, corner & 1
            ids[corner] = labels[i1 if far_x else i, j1 if far_y else j, k1 if far_z else k]
            weights[corner] = (fx if far_x else 1 - fx) * (fy if far_y else 1 - fy) * (fz if far_z else 1 - fz)
        out[p] = ids[0]
        if (ids == ids[0]).all():
            continue
        most = 0.0
        for own in ids:
            votes = 0.0
            for corner in range(8):
                if ids[corner] == own:
                    votes += weights[corner]
            if votes > most + TIE or (votes > most - TIE and own < out[p]):
                out[p] = own
                most = votes
