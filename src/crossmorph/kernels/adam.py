"""One step of Adam on the CPU, in one pass over the parameters and its moments."""

from __future__ import annotations

import numpy as np

from crossmorph.kernels.parallel import Floats, Number, compiled, over_planes


@compiled
def _adam(
    first: int,
    last: int,
    values: Floats,
    gradient: Floats,
    mean: Floats,
    square: Floats,
    memory: tuple[Number, Number],
    rate: Number,
    scale: Number,
    floor: Number,
) -> None:
    one = np.float32(1)
    for c in range(values.shape[0]):
        for i in range(first, last):
            value, slope = values[c, i].reshape(-1), gradient[c, i].reshape(-1)
            m, s = mean[c, i].reshape(-1), square[c, i].reshape(-1)
            for n in range(value.size):
                m[n] += (one - memory[0]) * (slope[n] - m[n])
                s[n] += (one - memory[1]) * (slope[n] * slope[n] - s[n])
                value[n] -= rate * m[n] / (scale * np.sqrt(s[n]) + floor)


def adam(
    values: Floats,
    gradient: Floats,
    mean: Floats,
    square: Floats,
    memory: tuple[float, float],
    rate: float,
    scale: float,
    floor: float,
) -> None:
    """See ``optimise.field.Adam``; arrays (3, I, J, K), of which all but the gradient change."""
    single = tuple(map(np.float32, memory))
    arrays = (values, gradient, mean, square)
    over_planes(_adam, values.shape[1], *arrays, single, *map(np.float32, (rate, scale, floor)))
