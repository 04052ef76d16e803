"""How much of what its teacher knows of the old classes a student keeps: an estimate without an old image.

Features are drawn from the old classes' Gaussians, and teacher and student answer them, the student with its new
classes too. The ratio of right answers is the estimate: what Gaussians make too easy or too hard they make so for both.

Nothing is said of a student whose backbone was trained. Its Gaussians are moved by drift compensation, and if that
misses where old images have gone, features drawn of them do not show it: docs/life.md has by how much.
"""

from __future__ import annotations

from torch import Tensor

from lwm.classifiers import ClassStatistics, Linear, draw

SEED = 2  # of the drawn features; others calibrate and train ``aligned``
MOST = 5000  # of them


def kept(before: Linear, after: Linear, statistics: ClassStatistics) -> float:
    """Percent of the teacher's right answers on old classes that the student gives too.

    ``before`` and ``after`` are the layers that answer; ``statistics`` are those of the old classes, the first outputs.
    """
    features, labels = draw(statistics, SEED, most=MOST)
    teachers = right(before, features, labels)
    return min(100.0, 100 * right(after, features, labels) / teachers) if teachers else 100.0


def right(layer: Linear, features: Tensor, labels: Tensor) -> float:
    """The share of features (n, C) with labels int64 (n,) that get the right answer."""
    weight, bias = layer
    return float(((features @ weight.T + bias).argmax(1) == labels).double().mean())


def said(kept: float | None) -> str:
    """The estimate in a line."""
    if kept is None:
        return "How much of the old classes is kept is not known without images of them, once a backbone was trained."
    return f"Estimated without old images: {kept:.0f} % of what the teacher gets right of the old classes is kept."
