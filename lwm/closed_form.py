"""The closed form: new outputs for a network that knows its old classes, without an epoch."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from lwm.classifiers import ClassStatistics, Linear, from_checkpoint, lda, measure
from lwm.runtime.checkpoint import WIDEST

FAVOURS = ("old", "balanced", "new")


def _parts(head: Linear, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias = head
    K = int(labels.max()) + 1
    means = torch.stack([features[labels == k].mean(0) for k in range(K)])
    dev = features - means[labels]
    C = features.shape[1]
    S = dev.T @ dev / max(1, len(features) - K)
    s = float(ledoit_wolf_shrinkage(dev.numpy(), assume_centered=True)) if len(features) > K + 2 else 1.0
    mean = float(S.trace()) / C if float(S.trace()) > 0 else 1.0
    S = 4.0 * ((1 - s) * S + (s + 3) * mean * torch.eye(C, dtype=S.dtype))
    return means.mean(0), S, means, (bias + weight @ means.mean(0) + ((weight @ S) * weight).sum(1) / 2).mean()


def new_rows(head: Linear, features: Tensor, labels: Tensor, favour: str = "balanced") -> Linear:
    g, S, means, const = _parts(head, features, labels)
    weight = torch.linalg.solve(S, (means - g).T).T
    bias = const - weight @ g - ((weight @ S) * weight).sum(1) / 2
    return weight, bias


def derived_statistics(head: Linear, features: Tensor, labels: Tensor) -> ClassStatistics:
    g, S, _, _ = _parts(head, features, labels)
    classes, channels = head[0].shape
    scatters = S.new_zeros(1 if channels > WIDEST else classes, channels, channels)
    return ClassStatistics(S.new_zeros(classes), g + head[0] @ S, scatters, S.new_zeros(classes))


def extended(head: Linear, features: Tensor, labels: Tensor, favour: str = "balanced") -> Linear:
    """The head's rows as they are, bit for bit, and ``new_rows`` below them."""
    weight, bias = new_rows(head, features, labels, favour)
    return torch.cat([head[0], weight]), torch.cat([head[1], bias])


def lda_over_all(known: ClassStatistics, features: Tensor, labels: Tensor) -> Linear:
    """What LDA would be on the features of the images of old and new classes at once."""
    return lda(known.joined(measure(features, labels, int(labels.max()) + 1)))


def becomes_lda(checkpoint: dict[str, Any]) -> bool:
    """Whether LDA over all classes takes the place of the teacher's own rows: images of every class were measured, and
    on those that were held back LDA was no worse. LDA cannot continue the rows of sigmoid outputs.
    """
    statistics, held = from_checkpoint(checkpoint), checkpoint["held_back"]
    if statistics is None or not statistics.measured:
        return False
    return checkpoint["loss_form"] == "binary" or held.get("lda", 0.0) >= held.get("head", 0.0)


def with_measured(head: Linear, features: Tensor, labels: Tensor) -> ClassStatistics:
    """Of all classes of a head: measured if there are features (n, C) with labels int64 (n,), else derived."""
    present, positions = labels.unique(return_inverse=True)
    seen, all_classes = measure(features, positions, len(present)), derived_statistics(head, features, positions)
    for name in ("counts", "means", "shrinkages"):
        getattr(all_classes, name)[present] = getattr(seen, name)
    if len(seen.scatters) == len(all_classes.scatters):
        return all_classes._replace(scatters=seen.scatters)
    all_classes.scatters[present] = seen.scatters
    return all_classes
