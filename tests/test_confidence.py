"""The map of expected errors: it tells good places from bad ones, and says nothing about what is not seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scene import GRID, WARP, inverted, seen
from scipy.stats import spearmanr
from truth import reordered, signed_permutations, world

from crossmorph.confidence import expected_error
from crossmorph.image import Image
from crossmorph.transform import Affine, DisplacementField

BALL = world(GRID).norm(dim=-1) < 30


def pair() -> tuple[Image, Image]:
    return seen(name="fixed"), seen(name="moving", contrast=inverted)


def test_a_right_transform_has_less_to_expect_than_a_wrong_one() -> None:
    fixed, moving = pair()
    found = []
    for shift in (0.0, 3.0, 8.0):
        errors = expected_error(fixed, moving, Affine.translation((shift, 0, 0)))
        assert errors.grid.same_as(GRID)
        assert errors.space == "fixed"
        found.append(float(errors.data[0][errors.valid & BALL].median()))
    right, near, far = found
    assert right < 1.0
    assert right < near < far


def test_what_is_displaced_in_one_half_is_doubted_there() -> None:
    fixed, moving = pair()
    field = torch.zeros(3, *GRID.shape)
    field[1] = 5 * torch.sigmoid(world(GRID)[..., 0] / 4).float()
    errors = expected_error(fixed, moving, DisplacementField(field, GRID))
    known, x = errors.valid & BALL, world(GRID)[..., 0]
    left, right = (float(errors.data[0][known & half].mean()) for half in (x < -8, x > 8))
    assert right > 2 * left


def test_what_shows_nothing_is_doubted() -> None:
    """The middle of the ball, with and without structure there; both images have noise of their own."""
    distance = world(GRID).norm(dim=-1)
    core = []
    for flat in (distance < 20, distance < 0):
        noise = torch.Generator().manual_seed(3)
        fixed, moving = (
            replace(i, data=torch.where(flat, 60.0, i.data) + 2 * torch.randn(i.data.shape, generator=noise))
            for i in pair()
        )
        errors = expected_error(fixed, moving, Affine.identity())
        core.append(float(errors.data[0][distance < 8].mean()))
    assert core[0] > 2 * core[1]


def test_known_errors_rank_as_expected() -> None:
    """A transform that is off by an amount that grows from 0 to 8 mm along the body."""
    fixed, moving = pair()
    field = torch.zeros(3, *GRID.shape)
    off = ((world(GRID)[..., 2] + 30) / 60).clamp(0, 1) * 8
    field[0] = off.float()
    errors = expected_error(fixed, moving, DisplacementField(field, GRID))
    known = errors.valid & BALL
    assert spearmanr(errors.data[0][known], off[known])[0] > 0.6


def test_nothing_is_known_where_one_image_sees_nothing() -> None:
    fixed, moving = pair()
    half = (torch.arange(40)[:, None, None] < 20).expand(GRID.shape)
    errors = expected_error(fixed, moving.restricted(half), Affine.identity())
    assert not errors.valid[24:].any()
    assert errors.valid[8:16, 12:24, 12:20].all()
    masked = expected_error(fixed.restricted(half), moving, Affine.identity())
    assert not masked.valid[20:].any()


@pytest.mark.parametrize("order", signed_permutations()[5::17])
def test_the_order_of_storage_does_not_matter(order: tuple[tuple[int, int, int], tuple[bool, bool, bool]]) -> None:
    fixed, moving = seen(), seen(warp=WARP, contrast=inverted)
    plain = expected_error(fixed, moving, Affine.identity())
    turned = expected_error(reordered(fixed, order), moving, Affine.identity())
    back = reordered(plain, order)
    both = turned.valid & back.valid
    assert float(both.sum()) > 0.95 * float(back.valid.sum())
    torch.testing.assert_close(turned.data[0][both], back.data[0][both], atol=0.05, rtol=0.05)
