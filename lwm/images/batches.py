"""Images in memory: their order in batches, augmentation and normalisation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Images(NamedTuple):
    """``pixels`` uint8 (n, 3, H, W) and ``labels`` int64 (n,), positions in the network's outputs."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels, as hexadecimal: the same images in the same order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels.numpy()).data)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()


def batch_order(
    labels: Tensor, batch_size: int, generator: torch.Generator, balanced: bool = False
) -> tuple[Tensor, ...]:
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
    # Indexed as (B, H, W, 3): seen as (B, 3, H, W) that is the channels-last layout, which convolutions like.
    return padded[which, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 (n, 3, H, W), in units of 0..1."""
    mean, std = [], []
    for channel in range(3):
        parts = [torch.bincount(part[:, channel].flatten(), minlength=256) for part in pixels.split(1000)]
        values = torch.stack(parts).sum(0).double()  # in parts, since the images may be more than fits into memory
        levels = torch.arange(256, dtype=torch.float64) / 255
        centre = (values * levels).sum() / values.sum()
        spread = ((values * (levels - centre).square()).sum() / values.sum()).sqrt()
        mean.append(float(centre))
        std.append(float(spread.clamp(min=1e-3)))
    return mean, std


def to_input(pixels: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 of the same shape, (pixel / 255 - mean) / std for each channel."""
    centre = torch.as_tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    spread = torch.as_tensor(std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - centre) / spread
