"""A descriptor that is a function of the caller: like a built-in one, recorded, refused where it is wrong."""

import json
from dataclasses import replace

import pytest
import torch
from scene import QUICK, errors, pair

from crossmorph.describe.macmind import msssc
from crossmorph.describe.own import own_features
from crossmorph.errors import InputError
from crossmorph.record import Journal
from crossmorph.registration import register
from crossmorph.settings import Descriptor, Mcbo, check
from crossmorph.systems.mcbo import mcbo
from crossmorph.systems.volume import Pair, Volume

SETTINGS = Mcbo(levels=(4,), half_width=2, refine=())


def contrast(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return msssc(values)


def volume(seed: int) -> Volume:
    values = torch.nn.functional.avg_pool3d(
        torch.rand((1, 30, 30, 30), generator=torch.Generator().manual_seed(seed)), 7, stride=1
    )[0]
    everywhere = torch.ones(values.shape, dtype=torch.bool)
    return Volume(values, everywhere, everywhere)


def test_a_function_does_what_the_name_does() -> None:
    """msSSC is pooled inside its kernel, a function's features after it: equal within rounding."""
    fields = [
        mcbo([Pair(volume(0), volume(1))], replace(SETTINGS, describe=(descriptor,)), Journal(None))
        for descriptor in (Descriptor("msssc"), Descriptor(contrast), Descriptor("mind"))
    ]
    assert torch.allclose(fields[0], fields[1], atol=1e-3)
    assert not torch.allclose(fields[0], fields[2], atol=1e-2)


def test_it_sees_values_and_validity_and_may_change_its_mind_about_types() -> None:
    given = volume(0)

    def seen(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        assert torch.equal(values, given.values)
        assert torch.equal(valid, given.valid)
        return valid[None]

    assert own_features(seen, given.values, given.valid).dtype == torch.float32


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda values: values, r"returned \(24, 24, 24\) for an image of \(24, 24, 24\) voxels"),
        (lambda values: values[None, ::2], r"returns \(features, I, J, K\) on the grid"),
        (lambda values: values[None] / 0, "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(made, message: str) -> None:  # type: ignore[no-untyped-def]
    def mine(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = made(values)
        return result

    with pytest.raises(InputError, match=message) as error:
        own_features(mine, volume(0).values, volume(0).valid)
    assert str(error.value).startswith("mine returned")


@pytest.mark.slow
def test_a_pair_of_two_contrasts_is_registered_and_the_record_names_the_function() -> None:
    result = register(*pair(), settings=replace(QUICK, describe=(Descriptor(contrast),)))
    assert errors(result.transform).mean() < 0.35 * errors(lambda points: points).mean()
    assert json.loads(json.dumps(result.record))["settings"]["describe"][0]["name"] == "contrast"


def test_a_name_that_is_none_is_refused_before_the_run() -> None:
    with pytest.raises(InputError, match=r"describe: name must be one of mind, .*, disa, or a function"):
        check(Mcbo(describe=(Descriptor("mnid"),)))  # type: ignore[arg-type]
