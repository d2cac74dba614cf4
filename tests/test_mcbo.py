"""The parts of MCBO that put fields together: octants and the fusion of modalities."""

import pytest
import torch

from crossmorph.match.consistency import inverse_consistent
from crossmorph.match.convex import coupled_convex
from crossmorph.match.cost import expected_cost
from crossmorph.settings import Mcbo
from crossmorph.systems.mcbo import Volume, fuse, octants, search


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 10, 6), (7, 9, 5), (1, 2, 3)])
@pytest.mark.parametrize("halo", [0, 2, 50])
def test_octants_cover_every_voxel_once(shape: tuple[int, int, int], halo: int) -> None:
    index = torch.arange(torch.tensor(shape).prod()).reshape(shape)
    stitched, visits = torch.full(shape, -1), torch.zeros(shape)
    for whole, inner, outer in octants(shape, halo):
        stitched[whole] = index[outer][inner]
        visits[whole] += 1
        for side, box, n in zip(whole, outer, shape, strict=True):
            assert box.start == max(side.start - halo, 0)
            assert box.stop == min(side.stop + halo, n)
    assert torch.equal(stitched, index)
    assert (visits == 1).all()


@pytest.mark.parametrize("shape", [(26, 24, 28), (25, 23, 27)])
def test_octants_with_a_halo_equal_the_undivided_volume(shape: tuple[int, int, int]) -> None:
    fixed, moving = noise(3, *shape), noise(3, *shape, seed=1)
    valid = noise(*shape, seed=2) > 0.1, noise(*shape, seed=3) > 0.1
    unknown, every = expected_cost(fixed, moving, *valid), slice(None)
    expected = coupled_convex(fixed, moving, 1, valid)

    def stitched(halo: int) -> torch.Tensor:
        field = torch.empty_like(expected)
        for whole, inner, outer in octants(shape, halo):
            seen = valid[0][outer], valid[1][outer]
            part = coupled_convex(fixed[(every, *outer)], moving[(every, *outer)], 1, seen, unknown=unknown)
            field[(every, *whole)] = part[(every, *inner)]
        return field

    torch.testing.assert_close(stitched(1 + 9), expected)  # half_width + 9, as ``octants`` promises
    assert (stitched(0) - expected).abs().max() > 0.1


def test_level_1_equals_the_search_of_the_undivided_volume() -> None:
    shape = (25, 23, 27)
    a, b = (
        Volume(noise(*shape), noise(*shape, seed=n) > 0.1, noise(*shape) > 0, noise(3, *shape, seed=n))
        for n in (0, 1)
    )
    assert a.features is not None
    assert b.features is not None
    forward = coupled_convex(a.features, b.features, 1, (a.valid, b.valid))
    backward = coupled_convex(b.features, a.features, 1, (b.valid, a.valid))
    found = search(a, [b], 1, Mcbo(levels=(1,), half_width=1))
    torch.testing.assert_close(found, inverse_consistent(forward, backward)[0])


def test_one_modality_stays_as_it_is() -> None:
    field = noise(3, 4, 5, 6) - 0.5
    for mode in ("mean", "magnitude", "signed"):
        assert torch.equal(fuse([field], mode), field)


def test_fusion_by_example() -> None:
    """Vectors (-3, 0, 1) and (1, -1, 0) at every voxel."""
    first = torch.tensor([-3.0, 0.0, 1.0])[:, None, None, None].expand(3, 2, 2, 2)
    second = torch.tensor([1.0, -1.0, 0.0])[:, None, None, None].expand(3, 2, 2, 2)
    results = {mode: fuse([first, second], mode)[:, 0, 1, 0].tolist() for mode in ("mean", "magnitude", "signed")}
    assert results == {"mean": [-1.0, -0.5, 0.5], "magnitude": [-3.0, 0.0, 1.0], "signed": [1.0, 0.0, 1.0]}


def test_the_longest_of_three_is_found_voxel_by_voxel() -> None:
    fields = [noise(3, 4, 5, 6, seed=seed) - 0.5 for seed in range(3)]
    fused = fuse(fields, "magnitude")
    for place in ((0, 0, 0), (3, 4, 5), (1, 2, 3)):
        vectors = [field[(slice(None), *place)] for field in fields]
        assert torch.equal(fused[(slice(None), *place)], max(vectors, key=lambda v: float(v.norm())))


@pytest.mark.parametrize(("mode", "same"), [("mean", True), ("magnitude", True), ("signed", False)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_only_the_published_fusion_depends_on_how_the_array_is_stored(mode: str, same: bool, axis: int) -> None:
    """Storing the volume the other way round flips the field and the sign of its component."""

    def flipped(field: torch.Tensor) -> torch.Tensor:
        turned = field.flip(1 + axis).clone()
        turned[axis] *= -1
        return turned

    fields = [noise(3, 4, 5, 6, seed=seed) - 0.5 for seed in range(2)]
    assert torch.equal(fuse([flipped(f) for f in fields], mode), flipped(fuse(fields, mode))) is same
