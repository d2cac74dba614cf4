"""The second look at a transform, right and wrong."""

from __future__ import annotations

import numpy as np
import pytest
from scene import inverted, seen

from crossmorph.match.recheck import recheck
from crossmorph.transform import Affine
from crossmorph.verdict import MIN_CONFIRMED

MIRROR = Affine(np.diag([-1.0, 1.0, 1.0, 1.0]))


def test_a_right_transform_is_confirmed() -> None:
    look = recheck(seen(), seen(contrast=inverted), Affine.identity())
    assert look.confirmed > 0.9
    assert look.mirrored_cost > 1.3 * look.cost


@pytest.mark.parametrize(
    "wrong",
    [Affine.translation((0, 20, 0)), Affine.rotation((0, 0, 90)), MIRROR, Affine.rotation((150, 0, 0))],
    ids=["20 mm", "90 degrees", "mirrored", "150 degrees"],
)
def test_a_wrong_one_is_not(wrong: Affine) -> None:
    assert recheck(seen(), seen(contrast=inverted), wrong).confirmed < MIN_CONFIRMED


def test_a_mirrored_one_fits_better_mirrored() -> None:
    look = recheck(seen(), seen(contrast=inverted), MIRROR)
    assert look.mirrored_cost < 0.8 * look.cost


def test_nothing_is_confirmed_where_nothing_is_seen() -> None:
    look = recheck(seen(), seen(contrast=inverted), Affine.translation((500, 0, 0)))
    assert (look.confirmed, look.cost, look.mirrored_cost) == (0.0, 1.0, 1.0)
