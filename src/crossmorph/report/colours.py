"""Colours that people with any kind of colour vision can tell apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROWTH_STOPS = ("#7f3b08", "#e08214", "#fee0b6", "#f7f7f7", "#d8daeb", "#8073ac", "#2d004b")
"""Orange to purple by way of white (ColorBrewer PuOr): smaller, same size, larger."""

LENGTH_STOPS = ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838")
"""Dark blue to yellow, evenly brighter (cividis: Nunez, Anderton and Renslow 2018)."""

FOLD = "#00e5ff"
"""Cyan: in neither scale."""

FIXED_LINE, MOVING_LINE = "#f0e442", "#56b4e9"
"""Yellow and sky blue (Okabe and Ito 2008): contours and landmarks."""


def rgb(colour: str) -> NDArray[np.float64]:
    """``#rrggbb`` as three numbers 0 to 255."""
    return np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)], float)


def table(stops: tuple[str, ...], size: int = 256) -> NDArray[np.uint8]:
    """(size, 3): colours between stops that are evenly spread."""
    knots = np.stack([rgb(stop) for stop in stops])
    places = np.linspace(0, len(stops) - 1, size)
    channels = [np.interp(places, np.arange(len(stops)), knots[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)
