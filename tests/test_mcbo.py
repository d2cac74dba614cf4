"""The parts of MCBO that put fields together: blocks and the fusion of modalities."""

import pytest
import torch

from crossmorph.match.consistency import inverse_consistent
from crossmorph.match.convex import coupled_convex
from crossmorph.settings import Mcbo
from crossmorph.systems import blocks
from crossmorph.systems.blocks import Economy, divided, pieces
from crossmorph.systems.mcbo import fuse, search
from crossmorph.systems.volume import Pair, Volume


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 10, 6), (7, 9, 5), (1, 2, 3)])
@pytest.mark.parametrize("halo", [0, 2, 50])
@pytest.mark.parametrize("parts", [(2, 2, 2), (1, 3, 4)])
def test_pieces_cover_every_voxel_once(
    shape: tuple[int, int, int], halo: int, parts: tuple[int, int, int]
) -> None:
    index = torch.arange(torch.tensor(shape).prod()).reshape(shape)
    stitched, visits = torch.full(shape, -1), torch.zeros(shape)
    for whole, inner, outer in pieces(shape, parts, halo):
        stitched[whole] = index[outer][inner]
        visits[whole] += 1
        for side, box, n in zip(whole, outer, shape, strict=True):
            assert box.start == max(side.start - halo, 0)
            assert box.stop == min(side.stop + halo, n)
    assert torch.equal(stitched, index)
    assert (visits == 1).all()


def some_volumes(*shape: int) -> tuple[Volume, Volume]:
    first, second = (
        Volume(noise(*shape), noise(*shape, seed=n) > 0.1, noise(*shape) > 0, noise(3, *shape, seed=n))
        for n in (0, 1)
    )
    return first, second


@pytest.mark.parametrize("shape", [(10, 50, 44), (9, 47, 45)])
@pytest.mark.parametrize("reproduce", [False, True])
def test_a_search_in_blocks_equals_that_of_the_undivided_volume(
    shape: tuple[int, int, int], reproduce: bool
) -> None:
    a, b = some_volumes(*shape)
    settings = Mcbo(levels=(2,), half_width=1, reproduce=reproduce)
    halved = divided(shape, 1, 1.3e6)
    assert max(halved.parts) > 1
    small = search([Pair(a, b)], 2, settings, economy=Economy(1.3e6))
    assert torch.equal(small, search([Pair(a, b)], 2, settings))
    if not reproduce:
        assert a.features is not None
        assert b.features is not None
        forward = coupled_convex(a.features, b.features, 1, (a.valid, b.valid))
        backward = coupled_convex(b.features, a.features, 1, (b.valid, a.valid))
        torch.testing.assert_close(small, inverse_consistent(forward, backward)[0])


def test_a_small_halo_is_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = some_volumes(10, 50, 44)
    settings = Mcbo(levels=(2,), half_width=1)
    monkeypatch.setattr(blocks, "WINDOWS", 2)
    small = search([Pair(a, b)], 2, settings, economy=Economy(1.3e6))
    assert not torch.equal(small, search([Pair(a, b)], 2, settings))


@pytest.mark.parametrize("shape", [(64, 64, 64), (128, 128, 128), (40, 90, 20)])
def test_a_division_keeps_to_its_bytes_and_grows_thriftier(shape: tuple[int, int, int]) -> None:
    voxels = shape[0] * shape[1] * shape[2]
    whole = divided(shape, 4, 1e12)
    assert (whole.parts, whole.cells, whole.bytes) == ((1, 1, 1), voxels, 4 * 729 * voxels)
    limits = [whole.bytes * share for share in (0.8, 0.5, 0.3)]
    found = [divided(shape, 4, limit) for limit in limits]
    assert all(division.bytes <= limit for division, limit in zip(found, limits, strict=True) if limit > 1e8)
    assert [d.cells for d in found] == sorted(d.cells for d in found)
    least = divided(shape, 4, 0)
    assert least.bytes == min(divided(shape, 4, share * whole.bytes).bytes for share in (0, 1e-6, 1e-3))


def test_one_modality_stays_as_it_is() -> None:
    field = noise(3, 4, 5, 6) - 0.5
    for mode in ("magnitude", "signed"):
        assert torch.equal(fuse([field], mode), field)


def test_fusion_by_example() -> None:
    """Vectors (-3, 0, 1) and (1, -1, 0) at every voxel."""
    first = torch.tensor([-3.0, 0.0, 1.0])[:, None, None, None].expand(3, 2, 2, 2)
    second = torch.tensor([1.0, -1.0, 0.0])[:, None, None, None].expand(3, 2, 2, 2)
    results = {mode: fuse([first, second], mode)[:, 0, 1, 0].tolist() for mode in ("magnitude", "signed")}
    assert results == {"magnitude": [-3.0, 0.0, 1.0], "signed": [1.0, 0.0, 1.0]}


def test_the_longest_of_three_is_found_voxel_by_voxel() -> None:
    fields = [noise(3, 4, 5, 6, seed=seed) - 0.5 for seed in range(3)]
    fused = fuse(fields, "magnitude")
    for place in ((0, 0, 0), (3, 4, 5), (1, 2, 3)):
        vectors = [field[(slice(None), *place)] for field in fields]
        assert torch.equal(fused[(slice(None), *place)], max(vectors, key=lambda v: float(v.norm())))


@pytest.mark.parametrize(("mode", "same"), [("magnitude", True), ("signed", False)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_only_the_published_fusion_depends_on_how_the_array_is_stored(mode: str, same: bool, axis: int) -> None:
    """Storing the volume the other way round flips the field and the sign of its component."""

    def flipped(field: torch.Tensor) -> torch.Tensor:
        turned = field.flip(1 + axis).clone()
        turned[axis] *= -1
        return turned

    fields = [noise(3, 4, 5, 6, seed=seed) - 0.5 for seed in range(2)]
    assert torch.equal(fuse([flipped(f) for f in fields], mode), flipped(fuse(fields, mode))) is same
