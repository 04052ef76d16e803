"""Which images make up a batch, and how they are augmented."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def batches(labels: Tensor, batch_size: int, generator: torch.Generator, balanced: bool = False) -> tuple[Tensor, ...]:
    """A random order of the images with ``labels`` int64 (n,), in equal parts of at most ``batch_size``.

    Equal parts, so that no small rest of a large batch upsets the batch-norm statistics at the end of an epoch.
    ``balanced`` draws n images of which each class has the same number, or one more: of a small class each is drawn
    several times, of a large one some are left out until another epoch.
    """
    order = _balanced_order(labels, generator) if balanced else torch.randperm(len(labels), generator=generator)
    return order.tensor_split(-(-len(labels) // batch_size))


def _balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    classes = labels.unique()
    classes = classes[torch.randperm(len(classes), generator=generator)]  # which of them have one more
    drawn = []
    for number, label in enumerate(classes):
        own = (labels == label).nonzero().squeeze(1)
        wanted = len(range(number, len(labels), len(classes)))
        rounds = [own[torch.randperm(len(own), generator=generator)] for _ in range(-(-wanted // len(own)))]
        drawn.append(torch.cat(rounds)[:wanted])
    return torch.cat(drawn)[torch.randperm(len(labels), generator=generator)]


def draw_augmentation(count: int, width: int, flip: bool, generator: torch.Generator) -> Tensor:
    """For each of ``count`` images of ``width`` px: rows and columns to be shifted by, and whether it is mirrored.

    int64 (count, 3), shifts from 0 to twice an eighth of the width.
    """
    shifts = torch.randint(0, 2 * (width // 8) + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5 if flip else torch.zeros(count, 1)
    return torch.cat([shifts[0], shifts[1], mirrored.long()], dim=1)


def augment(pixels: Tensor, drawn: Tensor) -> Tensor:
    """Crops after padding by an eighth with black, and mirror images, as ``drawn``; uint8 (B, 3, H, W) to the same."""
    count, _, height, width = pixels.shape
    padding = width // 8
    rows = drawn[:, :1] + torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device)
    columns = drawn[:, 1:2] + torch.where(drawn[:, 2:] > 0, width - 1 - columns, columns)
    padded = F.pad(pixels, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    which = torch.arange(count, device=pixels.device).view(-1, 1, 1)
    # Read out as (B, H, W, 3): seen as (B, 3, H, W) that is the channels-last layout, which convolutions like.
    return padded[which, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
