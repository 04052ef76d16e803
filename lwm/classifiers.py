"""Classifiers: linear layers that take the place of the head, made from what a checkpoint keeps of each class.

A head that was trained task by task is biased towards the newest classes; the features often still tell the old ones
apart. After each task a checkpoint gets, for each new class, the number of its images and the mean and the scatter of
their features (what the last linear layer sees). Those of the old classes are compensated for the drift of the
features: a map from the old network's features to the new one's is fitted on the new images, and old means and scatters
go through it (after SDC, CVPR 2020; learnable drift compensation, ECCV 2024; AdaGauss, NeurIPS 2024). From them follow

    ncm        nearest class mean, by cosine
    lda        linear discriminant analysis with one covariance for all classes
    aligned    classifier alignment: a softmax regression on features drawn from the Gaussians of all classes

Each is a linear layer over the features, so that the result is a plain network again: exported and explained like one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor
from torch.nn import functional as F

from lwm.images.batches import Images, to_input
from lwm.models import WIDEST, Network, replace_head
from lwm.runtime import progress
from lwm.runtime.errors import InputError, RunError, log

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5
DRAWN, MOST_DRAWN = 200, 20_000  # features of each class, and of all together
SMALLEST = 1e-6  # variance that any direction has, of the mean one
ROUNDING = 2**-23  # of a covariance, times its channels and its mean variance: twice what single precision can lose
MOST_STEPS = 500  # of the optimiser of ``aligned``
DECAY = 1.0  # of its weights, on whitened features

Linear = tuple[Tensor, Tensor]  # weight (N, C), bias (N)


class ClassStatistics(NamedTuple):
    """Of the features of N classes: sums, which add, so that those of two tasks are those of both taken at once.

    ``scatters`` are sums of outer products of deviations from a class's mean, for each class (N, C, C), or above
    ``WIDEST`` channels for all together (1, C, C). ``shrinkages`` (N,) say how far the images of each class want their
    covariance to be shrunk, from 0 to 1 (Ledoit and Wolf, 2004); it is done when a classifier is made.

    Those of a class of which no image was seen are derived from the head (closed_form.py).
    """

    counts: Tensor  # (N,), images
    means: Tensor  # (N, C)
    scatters: Tensor
    shrinkages: Tensor
    derived: Tensor  # (N,), 1 for a class that is derived, and 0 for one that was measured

    @property
    def measured(self) -> bool:
        """Whether images of every class were seen."""
        return not self.derived.any()

    def only(self, positions: Sequence[int]) -> ClassStatistics:
        """Those of some classes, in this order; of a scatter that all share, their images' part."""
        chosen = list(positions)
        rest = ClassStatistics(*(part if len(part) < len(self.counts) else part[chosen] for part in self))
        if self.means.shape[1] > WIDEST:
            rest = rest._replace(scatters=self.scatters * rest.counts.sum() / self.counts.sum())
        return rest

    def with_images(self, more: ClassStatistics, positions: Tensor) -> ClassStatistics:
        """With images of class ``positions[i]`` int64 (k,), measured as class i of ``more``; from N on it is a new one.

        Counts, means and scatters are those of all images of a class at once (Chan, Golub and LeVeque, 1979). What was
        derived of a class gives way to what was measured.
        """
        old, wide = len(self.means), self.means.shape[1] > WIDEST
        total = old + int((positions >= old).sum())
        counts, means, shrinkages, derived = (
            torch.cat([part, part.new_zeros(total - old, *part.shape[1:])])
            for part in (self.counts, self.means, self.shrinkages, self.derived)
        )
        gone = counts[positions] * derived[positions]
        before = counts[positions] - gone
        share = (before / (before + more.counts)).unsqueeze(1)
        apart = more.means - means[positions]
        weighted = (share[:, 0] * more.counts).unsqueeze(1) * apart
        if wide:  # all classes have one scatter: what was derived of some is their part of it
            scatters = self.scatters * (1 - gone.sum() / self.counts.sum()) + more.scatters + weighted.T @ apart
        else:
            scatters = torch.cat([self.scatters, self.scatters.new_zeros(total - old, *self.scatters.shape[1:])])
            kept = (1 - derived[positions]).view(-1, 1, 1) * scatters[positions]
            scatters[positions] = kept + more.scatters + weighted.unsqueeze(2) * apart.unsqueeze(1)
        counts[positions], means[positions] = before + more.counts, more.means - share * apart
        # Of each part by its images, which is a little more than all images together would ask for.
        shrinkages[positions] = share[:, 0] * shrinkages[positions] + (1 - share[:, 0]) * more.shrinkages
        derived[positions] = 0.0
        return ClassStatistics(counts, means, scatters, shrinkages, derived)


class DriftMap(NamedTuple):
    """weight x + bias takes a feature of the old network to the new one, up to noise of covariance ``residual``."""

    weight: Tensor
    bias: Tensor
    residual: Tensor
    penalty: float  # of the ridge regression behind it


@torch.no_grad()
def features_of(model: Network, pixels: Tensor, mean: Sequence[float], std: Sequence[float], batch_size: int) -> Tensor:
    """What the head sees of uint8 (n, 3, H, W), in eval mode: float64 (n, C), on the CPU.

    Raises RunError if that is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = progress.bar(pixels.split(batch_size), desc="features", unit="batch")
    parts = [model(to_input(part.to(device), mean, std)).pooled for part in batches]
    features = torch.cat([part.cpu().double() for part in parts])
    if not features.isfinite().all():
        raise RunError("the network's features are not finite, so that there are no statistics of them")
    return features


def measure(features: Tensor, labels: Tensor, classes: int) -> ClassStatistics:
    """Of features (n, C) with labels int64 (n,), 0 to ``classes`` - 1; computed in the precision of the features.

    Two images vary along one line, and the estimate sees no error there: they want to be shrunk completely.
    """
    channels, wide = features.shape[1], features.shape[1] > WIDEST
    means, shrinkages = features.new_empty(classes, channels), features.new_ones(classes)
    scatters = features.new_zeros(1 if wide else classes, channels, channels)
    for label in range(classes):
        own = features[labels == label]
        means[label] = own.mean(0)
        own = own - means[label]
        scatters[0 if wide else label] += own.T @ own
        if len(own) > 2:
            shrinkages[label] = ledoit_wolf_shrinkage(own.numpy(), assume_centered=True)
    counts = torch.bincount(labels, minlength=classes).to(means)
    return ClassStatistics(counts, means, scatters, shrinkages, torch.zeros_like(counts))


def places(labels: Tensor) -> Tensor:
    """Of each image the number of those of its class before it."""
    places = torch.empty_like(labels)
    for label in labels.unique():
        places[labels == label] = torch.arange(int((labels == label).sum()))
    return places


# Drift compensation -----------------------------------------------------------------------------------------------


def fit_drift(old: Tensor, new: Tensor) -> DriftMap:
    """The map from ``old`` to ``new``, both (n, C), features of the same images in the old and the new network.

    Ridge regression of the difference: if the images say nothing, the map leaves a feature as it is. Cross-validation
    chooses the penalty from ``PENALTIES`` (in units of the features' mean variance). The residual is what the map then
    misses on images that it was not fitted on; on its own images it would be too small if they are few.
    """
    fold = torch.arange(len(old)) % FOLDS

    def missed(penalty: float) -> Tensor:
        parts = []
        for number in range(FOLDS):
            weight, bias = _ridge(old[fold != number], new[fold != number], penalty)
            parts.append(new[fold == number] - old[fold == number] @ weight.T - bias)
        return torch.cat(parts)

    tried = ((penalty, missed(penalty)) for penalty in PENALTIES)
    penalty, rest = min(tried, key=lambda one: float(one[1].square().sum()))
    weight, bias = _ridge(old, new, penalty)
    return DriftMap(weight, bias, rest.T @ rest / len(rest), penalty)


def _ridge(old: Tensor, new: Tensor, penalty: float) -> Linear:
    centre, target = old.mean(0), new.mean(0)
    x, moved = old - centre, new - old - (target - centre)
    gram = x.T @ x / len(x)
    one = torch.eye(len(gram), dtype=gram.dtype)
    scale = gram.trace().clamp(min=1e-9) / len(gram)
    weight = one + torch.linalg.solve(gram + penalty * scale * one, x.T @ moved / len(x)).T
    return weight, target - weight @ centre


def compensate(statistics: ClassStatistics, drift: DriftMap, unexplained: float) -> ClassStatistics:
    """The statistics of the same classes in the new network.

    A map that leaves the share ``unexplained`` of the features' variance says little of directions: that share of what
    was left of each covariance is to be shrunk too.
    """
    counts, means, scatters, shrinkages, derived = statistics
    images = counts.sum() if len(scatters) < len(counts) else counts
    return ClassStatistics(
        counts,
        means @ drift.weight.T + drift.bias,
        drift.weight @ scatters @ drift.weight.T + images.view(-1, 1, 1) * drift.residual,
        shrinkages + unexplained * (1 - shrinkages),
        derived,
    )


def update(statistics: ClassStatistics | None, old: Tensor, new: Tensor, labels: Tensor) -> ClassStatistics:
    """``statistics`` of the old classes, if there are any, compensated, and with the images of this task.

    ``old`` and ``new`` (n, C) are their features in the old and the new network, labels int64 (n,) their classes'
    positions in the output.
    """
    present, positions = labels.unique(return_inverse=True)
    added = measure(new, positions, len(present))
    if statistics is None:
        return added
    drift = fit_drift(old, new)
    within = float(added.scatters.sum(0).trace() / added.counts.sum())
    unexplained = float(drift.residual.trace()) / max(within, 1e-12)
    return compensate(statistics, drift, min(1.0, unexplained)).with_images(added, present)


# The classifiers --------------------------------------------------------------------------------------------------


def ncm(statistics: ClassStatistics) -> Linear:
    """cos(x, m_c) times the length of x, which is the same for all classes: the order of the answers is that of cos."""
    means = statistics.means
    return F.normalize(means, dim=1), means.new_zeros(len(means))


def lda(statistics: ClassStatistics, shrinkage: float = 0.0) -> Linear:
    """With S the shared covariance: x' S^-1 m_c - m_c' S^-1 m_c / 2, all classes equally likely.

    In all directions S has ``shrinkage`` times its mean variance more. What all classes have in common is taken off, so
    that a class's Grad-CAM map shows what speaks for it and not for others.
    """
    means = statistics.means
    root = _root(shared_covariance(statistics), shrinkage)
    weight = torch.cholesky_solve(means.T, root).T
    return weight - weight.mean(0), -(weight * means).sum(1) / 2


def aligned(statistics: ClassStatistics, shrinkage: float = 0.0, seed: int = 0) -> Linear:
    """Softmax regression on as many features of each class, drawn from its Gaussian, shrunk as in ``lda``."""
    means = statistics.means
    drawn, labels = draw(statistics, seed, shrinkage)
    # Whitened, and from zero, so that the regression converges in some 40 steps; from lda, whose biases are large if
    # classes lie far apart, it takes hundreds.
    centre, whiten = means.mean(0), torch.linalg.inv(_root(shared_covariance(statistics), shrinkage))
    inputs = (drawn - centre) @ whiten.T
    weight, bias = torch.zeros_like(means).requires_grad_(), means.new_zeros(len(means)).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MOST_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(inputs @ weight.T + bias, labels) + DECAY / 2 * weight.square().sum() / len(means)
        total.backward()
        return total

    optimizer.step(loss)
    plain = weight.detach() @ whiten
    return plain, bias.detach() - plain @ centre


def draw(
    statistics: ClassStatistics, seed: int = 0, shrinkage: float = 0.0, most: int = MOST_DRAWN
) -> tuple[Tensor, Tensor]:
    """Features of each class from its Gaussian (n, C), as many of each, class by class, and their labels int64 (n,).

    There are ``DRAWN`` of a class, and ``most`` of all, but two of each.
    """
    means = statistics.means
    count = max(2, min(DRAWN, most // len(means)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(means), count, means.shape[1], generator=generator, dtype=means.dtype)
    drawn = means.unsqueeze(1) + noise @ _root(covariances(statistics), shrinkage).mT
    return drawn.flatten(0, 1), torch.arange(len(means)).repeat_interleave(count)


def covariances(statistics: ClassStatistics) -> Tensor:
    """Of each class (N, C, C), or above ``WIDEST`` channels the one that all share (1, C, C): shrunk towards a multiple
    of the identity as far as the images asked for; what all share, as far as they did in the mean.
    """
    counts, shrinkages = statistics.counts, statistics.shrinkages
    if statistics.means.shape[1] > WIDEST:
        shrinkages, counts = ((counts * shrinkages).sum() / counts.sum())[None], counts.sum()[None]
    plain = statistics.scatters / counts.view(-1, 1, 1)
    target = plain.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1) * torch.eye(plain.shape[1], dtype=plain.dtype)
    return plain + shrinkages.view(-1, 1, 1) * (target - plain)


def shared_covariance(statistics: ClassStatistics) -> Tensor:
    """The mean over all images of the covariances of their classes (C, C)."""
    each, counts = covariances(statistics), statistics.counts
    return each[0] if len(each) == 1 else torch.einsum("n,nij->ij", counts / counts.sum(), each)


def _root(covariances: Tensor, shrinkage: float) -> Tensor:
    """Cholesky factors of ``covariances`` (..., C, C), with ``shrinkage`` as in ``lda``. Raises LinAlgError for what is
    no covariance.
    """
    shrunk = regular(covariances, SMALLEST + shrinkage)
    roots, failed = torch.linalg.cholesky_ex(shrunk)
    return torch.linalg.cholesky(regular(shrunk, ROUNDING * shrunk.shape[-1])) if failed.any() else roots


def regular(covariances: Tensor, more: float = SMALLEST) -> Tensor:
    """(..., C, C) with ``more`` of the mean variance in each direction.

    The default only makes them safe to be inverted if features do not vary at all.
    """
    scale = covariances.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-9)
    return covariances + more * scale[..., None, None] * torch.eye(covariances.shape[-1], dtype=covariances.dtype)


CLASSIFIERS: dict[str, Callable[[ClassStatistics], Linear]] = {"ncm": ncm, "lda": lda, "aligned": aligned}
NAMES = ("head", *CLASSIFIERS)
MOST_ALIGNED = 200  # classes: the regression of ``aligned`` takes minutes above


def names_for(classes: int) -> tuple[str, ...]:
    """The classifiers that are tried unasked for so many classes."""
    return NAMES if classes <= MOST_ALIGNED else tuple(name for name in NAMES if name != "aligned")


def linear_layer(name: str, statistics: ClassStatistics | None, model: Network) -> Linear:
    """The classifier of ``NAMES``, in float64 on the CPU; ``model`` has the head, ``statistics`` make the others.

    Raises InputError if they do not.
    """
    if name == "head":
        return model.fc.weight.detach().cpu().double(), model.fc.bias.detach().cpu().double()
    assert statistics is not None  # without them there is the head alone
    return made(name, statistics)


def made(name: str, statistics: ClassStatistics) -> Linear:
    """One of ``CLASSIFIERS``. Raises InputError if the statistics make none."""
    try:
        layer = CLASSIFIERS[name](statistics)
    except torch.linalg.LinAlgError as error:
        raise InputError("the checkpoint's statistics are damaged: a covariance is not positive definite") from error
    if not all(part.float().isfinite().all() for part in layer):
        raise InputError(f"the checkpoint's statistics are damaged: the classifier {name} made of them is not finite")
    return layer


# In a checkpoint --------------------------------------------------------------------------------------------------


def to_checkpoint(statistics: ClassStatistics) -> dict[str, Tensor]:
    """As a checkpoint keeps them, in fp32."""
    return {name: part.float() for name, part in statistics._asdict().items()}


def from_checkpoint(checkpoint: dict[str, Any]) -> ClassStatistics | None:
    """Those of a checkpoint, in float64; None if it has none."""
    kept = checkpoint["statistics"]
    return ClassStatistics(*(kept[name].double() for name in ClassStatistics._fields)) if kept else None


def after_first_task(model: Network, checkpoint: dict[str, Any], images: Images, batch_size: int) -> ClassStatistics:
    """Of all classes of a first task, on its training images."""
    features = features_of(model, images.pixels, checkpoint["mean"], checkpoint["std"], batch_size)
    return measure(features, images.labels, len(checkpoint["class_names"]))


def choose(name: str, checkpoint: dict[str, Any]) -> str:
    """The classifier that ``name`` means for the network of a checkpoint; only "auto" depends on it.

    lda, which the searches on other classes support (docs/settings-search.md), if the last task trained a network of
    several tasks whose classes were all measured. Else the head: trained on all classes at once, or made in closed
    form, it is biased towards none; and derived statistics know no more than it does.
    """
    if name != "auto":
        return name
    if len(checkpoint["tasks"]) == 1 or not checkpoint["tasks"][-1]["epochs"]:
        return "head"
    if checkpoint["statistics"]:
        return "head" if checkpoint["statistics"]["derived"].any() else "lda"
    log.warning("the checkpoint has no statistics of its classes: the head answers, which is biased towards the newest")
    return "head"


def answer_with(model: Network, checkpoint: dict[str, Any], name: str) -> tuple[Network, dict[str, Any]]:
    """The network with the classifier ``name``, and its checkpoint with that as "classifier".

    ``name`` is as for ``choose``. The temperature that calibration.py found for it divides weight and bias, so that the
    softmax of the logits are probabilities. A copy, but for a head that needs none. Raises InputError for an unknown
    name, and if there are no statistics, or none that make a classifier.
    """
    name = choose(name, checkpoint)
    if name not in NAMES:
        raise InputError(f"there is no classifier {name!r}; take auto, {', '.join(NAMES)}")
    temperature = checkpoint["temperatures"].get(name, 1.0)
    if name == "head" and temperature == 1:
        return model, checkpoint | {"classifier": name}
    statistics = from_checkpoint(checkpoint)
    if name != "head" and statistics is None:
        raise InputError(
            f"the checkpoint has no statistics of its classes, which the classifier {name} needs: it, or a model "
            "before it, came from elsewhere or was trained with --no-statistics; take --classifier head"
        )
    answering = copy.deepcopy(model)
    replace_head(answering, *((part / temperature).float() for part in linear_layer(name, statistics, model)))
    return answering, checkpoint | {"classifier": name}
