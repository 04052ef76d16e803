"""Calibration: what a classifier's probabilities are worth, and which images are of no class that was taught.

Both are found on images of the new classes that neither train nor judge: they are held back. For the old classes stand
features drawn from their Gaussians in the student, if these were measured. Those are too easy: what held-back images of
the new classes need more than features drawn of the same classes, the old classes are taken to need too. Each class
counts alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from lwm.classifiers import ClassStatistics, draw, features_of, linear_layer, names_for
from lwm.images.batches import Images
from lwm.models import Network
from lwm.probabilities import familiarity
from lwm.runtime.errors import log

SHARES = np.linspace(0, 1, 101)  # of which a checkpoint keeps the quantiles of the score
SEED = 1  # of the drawn features; ``aligned`` was trained on others
WARMEST = 1e3  # temperature; the coldest is its inverse
PRIOR = 2.0  # a head is hardly colder than 1 by this factor: few images that are all right would let it fall to 0
MOST_RATIO = 4.0  # of two temperatures: if classes lie far apart, drawn features hardly fix one


class Examples(NamedTuple):
    """Logits (m, N), or scores (m,) in their place, and labels int64 (m,)."""

    values: Tensor
    labels: Tensor

    @property
    def weights(self) -> Tensor:
        """(m,), the same for every class, of sum 1."""
        weights = 1 / torch.bincount(self.labels)[self.labels].double()
        return weights / weights.sum()

    def only(self, chosen: Tensor) -> Examples:
        return Examples(self.values[chosen], self.labels[chosen])

    def of_classes(self, other: Examples) -> Tensor:
        """Which of these examples are of a class that ``other`` has, bool (m,)."""
        return torch.isin(self.labels, other.labels)

    def scored(self, temperature: float) -> Examples:
        return Examples(torch.from_numpy(familiarity((self.values / temperature).numpy())), self.labels)


def calibrate(
    model: Network,
    checkpoint: dict[str, Any],
    statistics: ClassStatistics | None,
    held: Images,
    batch_size: int,
    before: dict[str, Any] | None = None,
) -> None:
    """Put "temperatures" and "unknown" into ``checkpoint``, by classifier, and "calibrated_on", a number of images.

    Of a first task "held_back" gets the accuracy of each classifier on them, in percent.

    ``held`` are images held back of the task's classes; ``statistics`` are those of all classes, if there are any. A
    few images hardly fix a temperature: that of the checkpoint ``before``, the teacher's, has as many votes as the
    images that it was fitted on. Without images nothing is put in, and a line says so.
    """
    if not len(held.labels):
        log.info("no images are held back (--calibration), so probabilities are not calibrated")
        return
    features = features_of(model, held.pixels, checkpoint["mean"], checkpoint["std"], batch_size)
    count, earlier = len(held.labels), before["calibrated_on"] if before else 0
    checkpoint["temperatures"], checkpoint["unknown"], checkpoint["calibrated_on"] = {}, {}, count + earlier
    if before is None:
        checkpoint["held_back"] = {}
    for name in names_for(len(statistics.means)) if statistics else ("head",):
        weight, bias = linear_layer(name, statistics, model)
        seen, drawn = Examples(features @ weight.T + bias, held.labels), None
        if statistics is not None and statistics.measured and len(held.labels.unique()) < len(statistics.means):
            inputs, labels = draw(statistics, SEED)
            drawn = Examples(inputs @ weight.T + bias, labels)
        if before is None:
            checkpoint["held_back"][name] = 100 * float((seen.values.argmax(1) == seen.labels).double().mean())
        temperature = temperature_of(seen, drawn, np.log(PRIOR) if name == "head" else np.inf)
        if before and name in before["temperatures"]:
            votes = count * np.log(temperature) + earlier * np.log(before["temperatures"][name])
            temperature = float(np.exp(votes / (count + earlier)))
        checkpoint["temperatures"][name] = temperature
        checkpoint["unknown"][name] = quantiles_of(seen.scored(temperature), drawn and drawn.scored(temperature))


def temperature_of(held: Examples, drawn: Examples | None, prior: float = np.inf) -> float:
    """What to divide logits by: the best for ``held``, times the ratio of the best for all drawn and for the same ones.

    The same are the features drawn of the classes that ``held`` has images of.
    """
    if drawn is None:
        return best_temperature(held, prior)
    ratio = best_temperature(drawn) / best_temperature(drawn.only(drawn.of_classes(held)))
    return best_temperature(held, prior) * float(np.clip(ratio, 1 / MOST_RATIO, MOST_RATIO))


def best_temperature(examples: Examples, prior: float = np.inf) -> float:
    """The number by which logits are to be divided so that their log-loss is least.

    Below 1 its logarithm has a normal prior about 0 with the deviation ``prior``. A trained head is seldom too unsure;
    logits of NCM or LDA have no scale of their own.
    """
    count = len(examples.labels)

    def loss(exponent: float) -> float:
        each = F.cross_entropy(examples.values * np.exp(-exponent), examples.labels, reduction="none")
        return float((examples.weights * each).sum()) + min(exponent, 0) ** 2 / (2 * prior**2 * count)

    most = float(np.log(WARMEST))
    return float(np.exp(minimize_scalar(loss, bounds=(-most, most), method="bounded").x))


def quantiles_of(held: Examples, drawn: Examples | None) -> list[float]:
    """Those of the scores, at ``SHARES``: of held-back images, and of the other classes' features, moved.

    Median and lower spread are moved as those of held-back images lie to those of drawn features of the same classes.
    """
    scores, labels, weights = held.values, held.labels, held.weights
    if drawn is not None:
        own = drawn.of_classes(held)
        same, other = drawn.only(own).values, drawn.only(~own)
        spread = float(lower_spread(scores) / lower_spread(same).clamp(min=1e-9)) if len(scores) > 2 else 1.0
        moved = scores.median() + spread * (other.values - same.median())
        both = Examples(torch.cat([moved, scores]), torch.cat([other.labels, labels]))
        scores, weights = both.values, both.weights
    order = scores.argsort()
    below = weights[order].cumsum(0) - weights[order] / 2
    return np.interp(SHARES, below.numpy(), scores[order].numpy()).tolist()


def lower_spread(scores: Tensor) -> Tensor:
    """Of the scores (m,) up to their median, around it: what is above says nothing of what is unfamiliar."""
    below = scores[scores <= scores.median()]
    return (below - scores.median()).square().mean().sqrt()
