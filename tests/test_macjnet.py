"""The losses of macJNet against slow references, and which of its networks learns when."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from crossmorph.errors import InputError
from crossmorph.networks.lapirn import LapIRN
from crossmorph.networks.warp import warp
from crossmorph.systems import macjnet
from crossmorph.systems.macjnet import JointNetwork, dissimilarity, level_at, network, registration_loss, turns
from crossmorph.train.losses import BINS, BLOCK, dice_loss, indicators, local_information, mind_difference
from crossmorph.train.sample import Batch
from crossmorph.train.settings import MacJNetTraining

SMALL = MacJNetTraining(
    channels=4, features=2, stages=3, labels=(1, 2), pretrain=8, freeze=1, steps=16, rate=1e-3, segment_rate=1e-3
)
SHAPE = (16, 24, 16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def batch(labelled: bool = True, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Batch:
    """Two smooth volumes, and labels by their values: 0, 1 and 2."""
    images = [F.avg_pool3d(noise(1, 1, *(n + 4 for n in shape), seed=seed + s), 5, 1) for s in (0, 1)]
    images = [(image - image.min()) / (image.max() - image.min()) for image in images]
    ids = [(3 * image[:, 0]).clamp_max(2.9).int() for image in images]
    everywhere = torch.ones_like(images[0], dtype=torch.bool)
    labels = ids if labelled else [None, None]
    return Batch(("a pair",), images[0], images[1], everywhere, everywhere, labels[0], labels[1], None)


# -- losses ------------------------------------------------------------------------------------------------------


def test_dice_is_that_of_each_class() -> None:
    a, b = noise(2, 3, 4, 4, 4).softmax(1), noise(2, 3, 4, 4, 4, seed=1).softmax(1)
    where = noise(2, 1, 4, 4, 4, seed=2) > 0.4
    present = torch.tensor([[True, False], [True, True]])
    terms = []
    for n, c in ((0, 1), (1, 1), (1, 2)):
        x, y = a[n, c][where[n, 0]], b[n, c][where[n, 0]]
        terms.append(1 - (2 * (x * y).sum() + 1) / (x.sum() + y.sum() + 1))
    torch.testing.assert_close(dice_loss(a, b, where, present), torch.stack(terms).mean())
    assert float(dice_loss(a, b, where, torch.zeros_like(present))) == 0


def test_dice_of_equal_labels_and_of_none_is_zero() -> None:
    labels = (3 * noise(1, 5, 5, 5)).int()
    where = torch.ones(1, 1, 5, 5, 5, dtype=torch.bool)
    both = indicators(labels, (1, 2))
    assert both.sum(1).eq(1).all()
    assert torch.equal(both.argmax(1), labels)
    assert float(dice_loss(both, both, where)) == pytest.approx(0, abs=1e-6)
    assert float(dice_loss(0 * both, 0 * both, where)) == 0


def test_the_information_of_two_halves_is_one_bit() -> None:
    volume = torch.zeros(1, 1, BLOCK, BLOCK, 2 * BLOCK)
    volume[..., ::2] = 1
    where = torch.ones_like(volume, dtype=torch.bool)
    where[..., 8] = where[..., 9] = False  # 8 of 9 planes in each block: one more of one value than of the other
    where[..., 0] = where[..., 10] = False
    counts = [(int(where[..., s][volume[..., s] == v].sum())) for s in (slice(0, 9), slice(9, 18)) for v in (0, 1)]
    expected = 0.0
    for zero, one in (counts[:2], counts[2:]):
        shares = np.array([zero, one]) / (zero + one)
        expected -= (zero + one) / sum(counts) * float((shares * np.log(shares)).sum())
    assert float(local_information(volume, 1 - volume, where)) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(math.log(2), rel=0.02)


def test_local_information_is_that_of_a_slow_histogram() -> None:
    shape = (BLOCK, BLOCK + 3, BLOCK)
    a, b = noise(1, 1, *shape), noise(1, 1, *shape, seed=1)
    where = noise(1, 1, *shape, seed=2) > 0.5
    total, count = 0.0, 0
    for part in (slice(0, BLOCK), slice(BLOCK, None)):
        x, y = (v[0, 0, :, part][where[0, 0, :, part]].double().numpy() * (BINS - 1) for v in (a, b))
        joint = np.zeros((BINS, BINS))
        for p, q in zip(x, y, strict=True):
            i, j = int(p), int(q)
            for di, dj in product((0, 1), (0, 1)):
                joint[i + di, j + dj] += (1 - abs(p - i - di)) * (1 - abs(q - j - dj))
        joint /= len(x)
        apart = joint.sum(1, keepdims=True) * joint.sum(0)
        total += len(x) * float((joint[joint > 0] * np.log(joint[joint > 0] / apart[joint > 0])).sum())
        count += len(x)
    assert float(local_information(a, b, where)) == pytest.approx(total / count, rel=1e-4)
    assert float(local_information(a, 1 - b, where)) == pytest.approx(total / count, rel=1e-4)


def test_squares_of_mind_are_the_mean_of_squares() -> None:
    from crossmorph.describe.mind import mind

    pair = batch()
    where = pair.fixed_valid
    expected = (mind(pair.fixed[0, 0]) - mind(pair.moving[0, 0])).square().mean()
    torch.testing.assert_close(mind_difference(pair.moving, pair.fixed, where, squared=True), expected)


@pytest.mark.parametrize("kind", ["macmind", "mind", "ssc", "mi"])
def test_similarities_do_not_mind_inversion(kind: str) -> None:
    """Of the fixed volume; and an image agrees with its own negative as much as with itself."""
    pair = batch()
    where = pair.fixed_valid

    def of(fixed: torch.Tensor, moving: torch.Tensor) -> float:
        return float(dissimilarity(fixed, moving, where, kind))  # type: ignore[arg-type]

    assert of(1 - pair.fixed, pair.moving) == pytest.approx(of(pair.fixed, pair.moving), rel=1e-3)
    assert of(pair.fixed, 1 - pair.fixed) == pytest.approx(of(pair.fixed, pair.fixed), rel=1e-3, abs=1e-6)
    assert of(pair.fixed, pair.fixed) < of(pair.fixed, pair.moving)


def test_the_loss_of_the_registration_has_three_terms() -> None:
    """Equal images: the smoothness of a slope of 0.1 is 0.1^2 / 9, and labels count 2 (1 - Dice)."""
    pair = batch()
    field = torch.zeros(1, 3, *SHAPE)
    pair = replace(pair, moving=pair.fixed)
    outputs = {
        "displacement": field,
        "velocity": 0.1
        * torch.arange(16.0)[:, None, None]
        * (torch.arange(3) == 0)[None, :, None, None, None]
        * torch.ones(1, 3, *SHAPE),
    }
    smooth = 0.5 * 0.01 / 9
    assert float(registration_loss(outputs, pair, SMALL, None)) == pytest.approx(smooth, rel=1e-3)
    labels = [indicators(ids, (1, 2)) for ids in (pair.fixed_labels, pair.moving_labels)]
    total = registration_loss(outputs, pair, SMALL, (labels[0], labels[1], None))
    expected = smooth + 2 * float(dice_loss(labels[0], labels[1], pair.fixed_valid))
    assert float(total) == pytest.approx(expected, rel=1e-3)
    half = replace(SMALL, label_weight=1.0, smoothness=0.0)
    total = registration_loss(outputs, pair, half, (labels[0], labels[1], None))
    assert float(total) == pytest.approx((expected - smooth) / 2, rel=1e-3)


def test_voxels_that_one_side_does_not_see_have_no_say() -> None:
    pair = batch()
    valid = torch.ones_like(pair.fixed_valid)
    valid[:, :, :8] = False
    spoilt = pair.fixed.clone()
    spoilt[:, :, :2] = noise(1, 1, 2, *SHAPE[1:])
    found = []
    for fixed in (pair.fixed, spoilt):
        changed = replace(pair, fixed=fixed, fixed_valid=valid)
        outputs = {"displacement": torch.zeros(1, 3, *SHAPE)}
        found.append(float(registration_loss(outputs, changed, replace(SMALL, similarity="mi"), None)))
    assert found[0] == found[1]


# -- who learns when ---------------------------------------------------------------------------------------------


def test_checkpoints_change_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        made, pair = network(replace(SMALL, checkpointing=checkpointing)), batch()
        outputs = made(pair.fixed, pair.moving)
        sum((value * noise(*value.shape)).sum() for value in outputs.values()).backward()
        found.append({name: p.grad for name, p in made.named_parameters()})
    assert all(grad is not None for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-5, rtol=1e-4)


def test_levels_join_by_quarters_and_the_others_rest() -> None:
    settings = replace(SMALL, pretrain=40, freeze=3)
    found = [level_at(step, settings) for step in (0, 9, 10, 12, 13, 19, 20, 22, 23, 39, 40, 500)]
    first, second, third = [(1, False)] * 2, [(2, True)] * 2 + [(2, False)] * 2, [(3, True)] * 2
    assert found == first + second + third + [(3, False)] * 4
    assert level_at(0, replace(SMALL, pretrain=0)) == (3, False)


def test_a_turn_leaves_the_other_networks_untouched() -> None:
    for labelled in (True, False):
        made = network(SMALL)
        names = {"registration": made.registration, "segmentation": made.segmenters}
        for turn in turns(made, SMALL, lambda step, known, given=labelled: batch(given or known)):
            before = {name: [p.clone() for p in part.parameters()] for name, part in names.items()}
            turn.optimizer.zero_grad()
            turn.loss(made, torch.Generator(), SMALL.pretrain).backward()
            turn.optimizer.step()
            for name, part in names.items():
                same = [torch.equal(a, b) for a, b in zip(before[name], part.parameters(), strict=True)]
                assert all(same) != (name == turn.name)


def test_segmenters_follow_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels alone, then their own guesses too; together the registration in place of these, alone never."""
    made, called = network(SMALL), []
    for name in ("supervised_loss", "pseudo_loss", "consistency_loss"):
        monkeypatch.setattr(macjnet, name, lambda *given, name=name: called.append(name) or torch.zeros(()))
    for joint, expected in ((True, "consistency_loss"), (False, "pseudo_loss")):
        settings = replace(SMALL, joint=joint)
        turn = turns(made, settings, lambda step, known: batch(known))[1]
        for step, second in ((0, None), (4, "pseudo_loss"), (8, expected)):
            called.clear()
            turn.loss(made, torch.Generator(), step)
            assert called == ["supervised_loss", *([second] if second else [])]
    called.clear()
    turns(made, SMALL, lambda step, known: batch())[1].loss(made, torch.Generator(), 12)
    assert called == ["supervised_loss"]


def test_rates_of_both_parts_before_and_after() -> None:
    settings = replace(SMALL, rate=2e-5, segment_rate=1e-5, pretrain_rate=1e-4)
    rates = [
        [turn.rate(step) for step in (7, 8)] for turn in turns(network(SMALL), settings, lambda s, k: batch())
    ]
    assert rates == [[1e-4, 2e-5], [1e-4, 1e-5]]


def test_without_labels_what_the_segmenters_say_guides_without_a_gradient() -> None:
    made, pair = network(SMALL), batch(labelled=False)
    fixed, moving, present = macjnet.anatomy(made, pair, SMALL)
    torch.testing.assert_close(fixed, made.segmenters["fixed"](pair.fixed).softmax(1))
    assert not moving.requires_grad
    assert present is None
    known = batch()
    shown = macjnet.anatomy(made, replace(known, moving_labels=known.moving_labels.clamp_max(1)), SMALL)[2]
    assert shown.tolist() == [[True, False]]


def test_consistency_is_the_dice_of_fixed_and_warped() -> None:
    torch.manual_seed(0)
    made, pair = network(SMALL), batch(labelled=False)
    field = made.registration(pair.fixed, pair.moving)["displacement"].detach()
    fixed, moving = (
        made.segmenters[side](v).softmax(1) for side, v in (("fixed", pair.fixed), ("moving", pair.moving))
    )
    expected = dice_loss(fixed, warp(moving, field), pair.fixed_valid)
    found = macjnet.consistency_loss(made, pair)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)  # all voxels but those that leave the view
    found.backward()
    assert all(p.grad is None for p in made.registration.parameters())


class Blind(torch.nn.Module):
    """Finds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([9.0, -9.0, -9.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias[:, None, None, None].expand(len(x), 3, *x.shape[2:])


def test_a_segmenter_that_finds_nothing_ends_the_training() -> None:
    made = JointNetwork(LapIRN(2), {"fixed": Blind(), "moving": Blind()})
    turn = turns(made, SMALL, lambda step, known: batch())[1]
    turn.loss(made, torch.Generator(), 0)  # at the start it may
    with pytest.raises(
        InputError, match=r"segmentation of the fixed images has collapsed: it finds 0.0% .* in a pair"
    ):
        turn.loss(made, torch.Generator(), SMALL.pretrain)


@pytest.mark.parametrize("name", ["lapirn", "vm", "gated", "pyramid"])
def test_any_network_can_take_either_place(name: str) -> None:
    made = network(replace(SMALL, registration=name, labels=()))  # type: ignore[arg-type]
    assert not made.segmenters
    made = JointNetwork(made.registration, {"fixed": Blind(), "moving": Blind()})
    pair = batch(shape=(16, 16, 16))
    settings = replace(SMALL, registration=name, similarity="mind")  # type: ignore[arg-type]
    for turn in turns(made, settings, lambda step, known: pair):
        turn.loss(made, torch.Generator(), 0).backward()
    assert any(p.grad is not None for p in made.registration.parameters())
    assert made.segmenters["fixed"].bias.grad is not None


def test_a_window_too_large_for_the_memory_says_what_to_set() -> None:
    settings, shape = replace(SMALL, features=32), (128, 128, 96)
    macjnet.check_memory(settings, shape, 20 * 2**30)
    with pytest.raises(
        InputError, match=r"128 x 128 x 96 voxels takes about 18.8 GiB; 16.0 GiB are free. Set check"
    ):
        macjnet.check_memory(settings, shape, 16 * 2**30)
    macjnet.check_memory(replace(settings, checkpointing=True), shape, 16 * 2**30)
    macjnet.check_memory(replace(settings, labels=()), shape, 0)


def test_labels_are_those_of_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    plain = replace(SMALL, labels=())
    assert macjnet.with_labels(plain, [((1, 2), (2, 1)), ((), ())]).labels == (1, 2)
    assert not caplog.records
    assert macjnet.with_labels(plain, [((1, 2, 5), (2, 7))]).labels == (2,)
    assert "labels [1, 5, 7] are in the maps of one side only" in caplog.text
    assert macjnet.with_labels(plain, [((), ())]).labels == ()
    assert "the registration is trained alone" in caplog.text
    with pytest.raises(InputError, match=r"labels \[3\] are in no training pair on both sides"):
        macjnet.with_labels(replace(SMALL, labels=(1, 3)), [((1, 3), (1, 2))])
