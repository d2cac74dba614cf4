"""Segmentation of one image by a segmenter that was trained with macJNet."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from crossmorph.errors import InputError
from crossmorph.image import Image, Labels
from crossmorph.preprocess import check_registrable, foreground, onto
from crossmorph.resample import resample
from crossmorph.systems.learned import Trained, boxed, on_lattice, shown

Side = Literal["fixed", "moving"]


def segmented(trained: Trained, image: Image, side: Side, device: torch.device | str = "cpu") -> Labels:
    """The labels of an image, as the segmenter of the fixed or of the moving images sees them.

    The image is prepared as pairs are: drawn at the spacing of the training, cut to the body, scaled to 0 and 1.
    The probabilities are drawn back on its own grid, where the largest wins.

    Args:
        trained: of ``load_trained("macjnet", ...)``.
        image: of one channel.
        side: which segmenter.
        device: where to compute; the network is there already.

    Returns:
        Labels with the ids of the training on the image's grid; 0 outside its valid voxels.

    Raises:
        InputError: the training had no labels, or the image is no volume of one channel.
    """
    if not trained.segmenters:
        raise InputError("these weights have no segmenters: the training had no pair with labels on both sides")
    if image.channels != 1:
        raise InputError(f"{image.source or image.name} has {image.channels} frames; give a volume of one")
    check_registrable(image)
    settings = trained.preprocessing
    lattice = on_lattice(image, settings)
    grid = boxed(lattice.grid, foreground(lattice) & lattice.valid if settings.crop else None)
    window = settings.fixed_window if side == "fixed" else settings.moving_window
    volume = shown(onto(lattice, grid), window).values.to(device)
    with trained.inference(volume.device):
        shares = trained.segmenters[side](volume[None, None])[0].float().softmax(0).cpu()
    everywhere = torch.ones(grid.shape, dtype=torch.bool)
    best = torch.full(image.grid.shape, -1.0)
    data = torch.zeros(image.grid.shape, dtype=torch.int32)
    ids = (0, *trained.about["training"]["settings"]["labels"])
    for label, share in zip(ids, shares, strict=True):
        drawn = resample(Image(share[None], grid, everywhere), image.grid, fill=float(label == 0)).data[0]
        larger = drawn > best
        data[larger], best[larger] = label, drawn[larger]
    data[~image.valid] = 0
    kind = np.dtype(np.uint8 if max(ids) < 256 else np.int32)
    return Labels(data, image.grid, image.name, image.space, kind)
