"""The closed form: rows for new classes below a head that was trained, and what such a head says of its old classes.

A head that answers by w_c'x + b_c is that of linear discriminant analysis if features are Gaussian in each class, with
one covariance S and the classes' centre g: w_c = S^-1 (m_c - g). So the new classes' rows follow from the means of
their images, and read backwards the head has a mean for every old class, m_c = g + S w_c, without an old image.

Two things keep the trade between old and new in bounds, and neither asks for an old image. The covariance of the new
images is scaled until new and old classes are equally far from the centre, since a trained head may be steeper or
flatter than theirs. And one shift of all new biases is found by cross-validation: see ``_shift``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwm.classifiers import ClassStatistics, Linear, from_checkpoint, measure, places, regular
from lwm.models import WIDEST
from lwm.runtime.errors import InputError

SHRINKAGE = 3.0  # times its mean variance that S has more in all directions
FOLDS = 5
SURE = 100  # old classes: from rows of fewer new ones took many images in trials, of 1,000 few (docs/closed-form.md)
SPREAD = 2**0.5  # of what is no new class about the centre, in deviations of a new image from its class


class Favour(NamedTuple):
    """How far the new biases may be raised."""

    risked: float  # the share of images of other things that new classes may take
    needed: float  # the share of new images that are to be found; no shift goes further


FAVOURS = {"old": Favour(0.03, 0.90), "balanced": Favour(0.10, 0.95), "new": Favour(0.30, 0.99)}


class _Gaussians(NamedTuple):
    """Of the new classes: ``means`` (K, C), the ``centre`` of all classes (C,), and a Cholesky ``root`` (C, C) of S."""

    means: Tensor
    centre: Tensor
    root: Tensor

    def rows(self) -> Linear:
        """x'w - (m + g)'w / 2 with w = S^-1 (m - g): how much likelier x is in a class than about the centre, a log."""
        weight = torch.cholesky_solve((self.means - self.centre).T, self.root).T
        return weight, -(weight * (self.means + self.centre)).sum(1) / 2


def new_rows(
    head: Linear, features: Tensor, labels: Tensor, favour: str = "balanced", means: Tensor | None = None
) -> Linear:
    """Weight (K, C) and bias (K,) of K new classes, to stand beside the rows of ``head``, which stay as they are.

    ``head`` is the teacher's, weight (N, C) and bias (N,); ``features`` (n, C) are what it sees of the new classes'
    training images, ``labels`` int64 (n,) from 0 to K - 1; all in float64. ``favour`` is one of ``FAVOURS``. ``means``
    (K, C) stand for those of the images, of which some were seen earlier. Raises InputError for a class with fewer than
    two images, of which none could be held back.
    """
    if (fewest := int(torch.bincount(labels).min())) < 2:
        raise InputError(f"the closed form needs two images of each new class, and there is one with {fewest}")
    shift = _shift(head, features, labels, FAVOURS[favour])
    gaussians = _gaussians(_steepness(head), features, labels)
    weight, bias = gaussians._replace(means=gaussians.means if means is None else means).rows()
    return weight, bias + shift


def derived_statistics(head: Linear, features: Tensor, labels: Tensor) -> ClassStatistics:
    """Of the head's N old classes, as if each had as many images as a new class has in the mean.

    Means are m_c = g + S w_c, and the covariance is that of the new images. The arguments are those of ``new_rows``.
    """
    _, centre, root = _gaussians(_steepness(head), features, labels)
    (weight, bias), covariance = head, root @ root.T
    old, count = len(bias), len(labels) / len(labels.unique())
    means = centre + weight @ covariance
    scatters = count * covariance.expand(old, -1, -1) if weight.shape[1] <= WIDEST else old * count * covariance[None]
    zeros = means.new_zeros(old)
    return ClassStatistics(zeros + count, means, scatters, shrinkages=zeros, derived=zeros + 1)


def becomes_lda(checkpoint: dict[str, Any], again: int = 0) -> bool:
    """Whether LDA over all classes takes the place of the teacher's own rows: images of every class were measured, and
    on those that were held back LDA was no worse. It always does if new rows cannot stand beside the teacher's: beside
    those of sigmoid outputs, and of fewer than ``SURE`` classes. And it does if none of these stays, since there are
    images of all old classes ``again``.
    """
    if again == len(checkpoint["class_names"]):
        return True
    statistics, held = from_checkpoint(checkpoint), checkpoint["held_back"]
    if statistics is None or not statistics.measured:
        return False
    if checkpoint["loss_form"] == "binary" or len(checkpoint["class_names"]) < SURE:
        return True
    return held.get("lda", 0.0) >= held.get("head", 0.0)


def form_after(checkpoint: dict[str, Any], again: int = 0) -> str:
    """Of the outputs that a student in closed form has: sigmoids stay if rows are only put beside them."""
    return "binary" if checkpoint["loss_form"] == "binary" and not becomes_lda(checkpoint, again) else "softmax"


def with_measured(head: Linear, features: Tensor, labels: Tensor) -> ClassStatistics:
    """Of all classes of a head: measured if there are features (n, C) with labels int64 (n,), else derived."""
    present, positions = labels.unique(return_inverse=True)
    derived = derived_statistics(head, features, positions)
    return derived.with_images(measure(features, positions, len(present)), present)


# How it is found ---------------------------------------------------------------------------------------------------


def _shift(head: Linear, features: Tensor, labels: Tensor, favour: Favour) -> Tensor:
    """What to add to the new biases: as much as is needed to find new images, unless that risks too many others."""
    found, taken = _gaps(head, features, labels)
    limit, found = taken.quantile(favour.risked), found[found.isfinite()]
    return torch.minimum(limit, found.quantile(favour.needed)) if len(found) else limit


def _gaps(head: Linear, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """From new images that each were held back once, two shifts of the new biases for each image (n,).

    With the first or more it is found as one of its class: its new logit passes every old one; infinite if another new
    class has a higher logit. With the second or more, an image that is of no new class is taken for one. Such an image
    is drawn about the centre: by the deviations of the same images from their classes, ``SPREAD`` times as large,
    because classes differ about as widely as their images do. The old logits that it must not pass are those of the new
    image itself. An old image's would be higher, so that less is lost there than is risked here.
    """
    highest, steepness = _logits(head, features).max(1).values, _steepness(head)
    found, taken = torch.empty_like(highest), torch.empty_like(highest)
    fold = places(labels) % min(FOLDS, int(torch.bincount(labels).min()))
    for number in fold.unique():
        held = fold == number
        gaussians = _gaussians(steepness, features[~held], labels[~held])
        rows, own = gaussians.rows(), labels[held]
        logits = _logits(rows, features[held])
        found[held] = (highest[held] - logits.max(1).values).where(logits.argmax(1) == own, torch.inf)
        drawn = gaussians.centre + SPREAD * (features[held] - gaussians.means[own])
        taken[held] = highest[held] - _logits(rows, drawn).max(1).values
    return found, taken


def _steepness(head: Linear) -> Tensor:
    """The mean of w_c w_c' over the rows of a head (C, C)."""
    return head[0].T @ head[0] / len(head[0])


def _gaussians(steepness: Tensor, features: Tensor, labels: Tensor) -> _Gaussians:
    """The new classes', with the covariance in the scale of the head of this ``steepness``."""
    classes = int(labels.max()) + 1
    means = torch.stack([features[labels == label].mean(0) for label in range(classes)])
    deviations, freedom = features - means[labels], len(labels) - classes
    covariance = torch.eye(features.shape[1], dtype=features.dtype)  # of one image a class nothing better is known
    if freedom:
        covariance = regular(deviations.T @ deviations / freedom, SHRINKAGE)
    centre = _centre(means, float(covariance.trace()) if freedom else torch.inf)
    root = torch.linalg.cholesky(covariance)
    new = (torch.cholesky_solve((means - centre).T, root).T * (means - centre)).sum(1).mean()
    old = (steepness * covariance).sum()
    # With t S for S both are the mean squared distance of classes from the centre: new / t, and w_c'S w_c * t.
    return _Gaussians(means, centre, root * (new.clamp(min=1e-9) / old.clamp(min=1e-9)).sqrt().sqrt())


def _centre(means: Tensor, within: float) -> Tensor:
    """Where images of anything lie in the mean, by the means of few classes (K, C): shrunk as James and Stein do.

    They are shrunk to what is the same in all channels, as far as the classes' spread says that K of them may miss the
    centre. One class has no spread: ``within``, the variance of its images, stands for it.
    """
    centre, classes = means.mean(0), len(means)
    spread = float((means - centre).square().sum()) / (classes - 1) if classes > 1 else within
    flat = centre.mean().expand_as(centre)
    away = float((centre - flat).square().sum())
    return flat + max(0.0, 1 - spread / classes / max(away, 1e-12)) * (centre - flat)


def _logits(layer: Linear, features: Tensor) -> Tensor:
    return features @ layer[0].T + layer[1]
