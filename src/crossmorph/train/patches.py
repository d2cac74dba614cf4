"""Pairs of patches from volumes that nobody registered (Ronchetti et al., MICCAI 2023, section 3).

For a pair of volumes (M, F): draw a centre in M where the local deviation is high, compare its patch by LC2 with
those of F, draw t from U[0, 1], and keep the patch of F whose LC2 is closest to t. So the similarities are spread
evenly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from crossmorph.describe.lc2 import RADII, gradient_length, lc2_map, lc2_pairs, local_deviation, zscored
from crossmorph.errors import InputError
from crossmorph.image import Image
from crossmorph.preprocess import check_registrable
from crossmorph.resample import downsample, sample

WINDOW = max(RADII)
"""Radius in voxels of what LC2 sees."""

LOW = 0.1
"""Pairs at or below this LC2 ..."""

LOW_SHARE = 0.1
"""... make up at most this share of the pairs of two volumes."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A training volume: z-scored values (I, J, K), 0 where not valid, and who it is of."""

    values: torch.Tensor
    subject: str
    name: str


@dataclass(frozen=True, eq=False)
class Pool:
    """Pairs of patch centres.

    Args:
        volumes: (N, 2) indices of the volume of b, which is explained, and of x, which explains.
        centres: (N, 2, 3) voxels.
        scores: (N,) their LC2.
    """

    volumes: torch.Tensor
    centres: torch.Tensor
    scores: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """For writing."""
        return {"volumes": self.volumes, "centres": self.centres, "scores": self.scores}


def prepared(image: Image, subject: str, spacing_mm: float) -> Volume:
    """A volume at isotropic ``spacing_mm``, z-scored over its valid voxels.

    Raises:
        InputError: 2-D, constant, or hardly any valid voxel; several channels.
    """
    name = str(image.source or image.name)
    if image.channels != 1:
        raise InputError(f"{name} has {image.channels} frames; training takes volumes of one")
    check_registrable(image)
    drawn = downsample(image, image.grid.respaced(spacing_mm))
    check_registrable(drawn)
    return Volume(zscored(drawn.data[0], drawn.valid), subject, name)


def volume_pairs(volumes: Sequence[Volume]) -> list[tuple[int, int]]:
    """Ordered pairs of different volumes of one subject; a subject's only volume is paired with itself."""
    pairs = []
    for _, group in itertools.groupby(
        sorted(range(len(volumes)), key=lambda i: volumes[i].subject), key=lambda i: volumes[i].subject
    ):
        members = list(group)
        pairs += list(itertools.permutations(members, 2)) if len(members) > 1 else [(members[0], members[0])]
    return pairs


def draw_pool(
    volumes: Sequence[Volume],
    per_pair: int,
    candidates: int,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda share: None,
) -> Pool:
    """The paper's sampling for all pairs of volumes.

    Args:
        volumes: what to draw from.
        per_pair: pairs of patches from each ordered pair of volumes, before the low ones are thinned out.
        candidates: compare with this many random places of F, half of them where the deviation is high; 0 compares
            with all of F as the paper does, 20 to 50 times slower.
        generator: of every random choice.
        progress: told the share that is done.
    """
    weights = [local_deviation(v.values) for v in volumes]
    pairs = volume_pairs(volumes)
    parts = []
    for done, (m, f) in enumerate(pairs):
        progress(done / len(pairs))
        centres = _drawn(weights[m], per_pair, generator)
        wanted = torch.rand(per_pair, generator=generator)
        if candidates:
            places = _candidates(weights[f], candidates, generator)
            found, scores = _among_some(volumes[m].values, volumes[f], centres, wanted, places)
        else:
            found, scores = _among_all(volumes[m].values, volumes[f], centres, wanted)
        keep = _thinned(scores, generator)
        which = torch.tensor([m, f]).expand(len(keep), 2)
        parts.append((which, torch.stack([centres, found], 1)[keep], scores[keep]))
    which, centres, scores = (torch.cat(part) for part in zip(*parts, strict=True))
    return Pool(which.contiguous(), centres, scores)


def cut(values: torch.Tensor, centres: torch.Tensor, radius: int) -> torch.Tensor:
    """(N, S, S, S) cubes around voxels (N, 3), S = 2 radius + 1; 0 outside the volume."""
    padded = torch.nn.functional.pad(values, (radius,) * 6)
    side = 2 * radius + 1
    return torch.stack([padded[i : i + side, j : j + side, k : k + side] for i, j, k in centres.tolist()])


def cut_turned(volume: Volume, centre: torch.Tensor, turn: torch.Tensor, size: int) -> torch.Tensor:
    """(size, size, size) around a voxel, sampled at unit pitch on axes turned by a (3, 3) matrix; 0 outside."""
    values = volume.values[None]
    line = torch.arange(size, dtype=torch.float32, device=values.device) - size // 2
    steps = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    turn, centre = (numbers.to(steps, non_blocking=True) for numbers in (turn, centre))
    return sample(values, steps @ turn.T + centre)[0]


def random_turn(generator: torch.Generator) -> torch.Tensor:
    """(3, 3): a uniformly random rotation, mirrored along each axis with probability 1/2."""
    w, x, y, z = torch.nn.functional.normalize(torch.randn(4, generator=generator), dim=0).tolist()
    rotation = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    flips = 1 - 2 * torch.randint(0, 2, (3,), generator=generator).float()
    return rotation * flips


def _drawn(weight: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 3) voxels with a probability proportional to the weight."""
    running = weight.reshape(-1).double().cumsum(0)
    place = torch.rand(count, generator=generator, dtype=torch.float64) * running[-1]
    index = torch.searchsorted(running, place).clamp(max=weight.numel() - 1)
    return torch.stack(torch.unravel_index(index, weight.shape), 1)


def _candidates(weight: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 3) voxels, half of them anywhere, half by weight."""
    anywhere = torch.stack([torch.randint(0, n, (count // 2,), generator=generator) for n in weight.shape], 1)
    return torch.cat([_drawn(weight, count - count // 2, generator), anywhere])


def _among_all(
    values: torch.Tensor, other: Volume, centres: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each centre the voxel of the other volume whose LC2 is nearest to the wanted one, and that LC2."""
    places, scores = [], []
    for patch, t in zip(cut(values, centres, WINDOW), wanted, strict=True):
        dense = lc2_map(patch, other.values).reshape(-1)
        index = (dense - t).abs().argmin()
        places.append(torch.stack(torch.unravel_index(index, other.values.shape)))
        scores.append(dense[index])
    return torch.stack(places), torch.stack(scores)


def _among_some(
    values: torch.Tensor,
    other: Volume,
    centres: torch.Tensor,
    wanted: torch.Tensor,
    places: torch.Tensor,
    block: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``_among_all``, of the given places only."""
    patches = cut(values, centres, WINDOW)
    length = gradient_length(other.values)
    best = torch.full((len(centres),), torch.inf)
    found, scores = torch.zeros_like(centres), torch.zeros(len(centres))
    for some in torch.split(places, block):
        table = lc2_pairs(patches, cut(other.values, some, WINDOW), cut(length, some, WINDOW))
        distance, index = (table - wanted[:, None]).abs().min(1)
        closer = distance < best
        best = torch.where(closer, distance, best)
        found[closer] = some[index[closer]]
        scores[closer] = table.gather(1, index[:, None])[closer, 0]
    return found, scores


def _thinned(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Indices to keep, so that pairs of hardly any similarity are at most a tenth."""
    low = (scores <= LOW).nonzero()[:, 0]
    high = (scores > LOW).nonzero()[:, 0]
    most = int(LOW_SHARE / (1 - LOW_SHARE) * len(high))
    low = low[torch.randperm(len(low), generator=generator)[:most]]
    kept = torch.cat([high, low])
    return kept if len(kept) else torch.arange(len(scores))
