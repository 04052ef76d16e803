"""Random numbers, and Grad-CAM and L_AD in NumPy, image by image: the other route of the tests of both."""

from __future__ import annotations

import numpy as np
import torch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numpy_map(features: np.ndarray, weight: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Grad-CAM at the last feature map, image by image."""
    maps = [np.maximum(np.tensordot(weight[c], a, 1), 0) for a, c in zip(features, classes, strict=True)]
    return np.stack(maps) / features[0, 0].size


def numpy_attention(student: np.ndarray, teacher: np.ndarray) -> float:
    """L_AD, image by image; an image without anything in one of its maps counts as 0."""
    total = 0.0
    for q, p in zip(student, teacher, strict=True):
        if q.any() and p.any():
            total += np.abs(p.ravel() / np.linalg.norm(p) - q.ravel() / np.linalg.norm(q)).sum()
    return total / len(student)
