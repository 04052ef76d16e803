"""How much of what its teacher knows of the old classes a student in closed form keeps, without an old image.

Features are drawn from the old classes' Gaussians, and teacher and student answer them, the student with its new
classes too. The ratio of right answers is the estimate: what Gaussians make too easy or too hard they make so for both.

The Gaussians of images that a network was trained on are too narrow, so that too few would be taken for a new class.
But where the head is LDA over all classes, errors are alike in both directions. So new images that are held back in
turn show how many are taken for an old class, and as many old ones are taken for a new class, those that the teacher
gets right like the others. The lower of the two estimates counts.

Nothing is said of a student whose backbone was trained. Its Gaussians are moved by drift compensation, and if that
misses where old images have gone, features drawn of them do not show it: docs/life.md has by how much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwm.classifiers import ClassStatistics, Linear, draw, lda, measure, places

SEED = 2  # of the drawn features; others calibrate and train ``aligned``
MOST = 5000  # of them
FOLDS = 5


def kept(before: Linear, after: Linear, statistics: ClassStatistics) -> float:
    """Percent of the teacher's right answers on old classes that the student gives too.

    ``before`` and ``after`` are the layers that answer; ``statistics`` are those of the old classes, the first outputs.
    """
    features, labels = draw(statistics, SEED, most=MOST)
    teachers = right(before, features, labels)
    return min(100.0, 100 * right(after, features, labels) / teachers) if teachers else 100.0


def taken(known: ClassStatistics, features: Tensor, labels: Tensor) -> float:
    """The share of old images that LDA takes for a new class, as it takes new ones for old, of old ``known`` classes.

    ``features`` (n, C) are those of new images, labels int64 (n,) from 0 to K - 1. Each is held back once, and counts
    if it is told apart among the new classes alone. Between two classes errors are as many in both directions.
    """
    old, new, lost = len(known.counts), int(labels.max()) + 1, 0
    fold = places(labels) % FOLDS
    fold[labels.bincount()[labels] == 1] = FOLDS  # the only image of a class is never held back
    for number in range(FOLDS):
        held, positions = fold == number, old + torch.arange(new)
        weight, bias = lda(known.with_images(measure(features[~held], labels[~held], new), positions))
        logits = features[held] @ weight.T + bias
        told = logits[:, old:].argmax(1) == labels[held]
        lost += int((told & (logits.argmax(1) < old)).sum())
    return lost / len(labels) * new / old


def right(layer: Linear, features: Tensor, labels: Tensor) -> float:
    """The share of features (n, C) with labels int64 (n,) that get the right answer."""
    weight, bias = layer
    return float(((features @ weight.T + bias).argmax(1) == labels).double().mean())


def said(kept: float | None) -> str:
    """The estimate in a line."""
    if kept is None:
        return "How much of the old classes is kept is not known: without statistics, or once a backbone was trained."
    return f"Estimated without old images: {kept:.0f} % of what the teacher gets right of the old classes is kept."
