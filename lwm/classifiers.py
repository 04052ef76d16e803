"""Read-outs: other linear heads for the same features, made from what a checkpoint keeps of each class.

A head that was trained step by step leans to the newest classes; the features often still tell the old ones apart.
After each step a checkpoint gets, for each new class, the mean and the covariance of its features (what the last linear
layer sees), and carries those of the old classes along: the map from the old network's features to the new one's is
fitted on the new images alone, where both are known, and old means and covariances go through it (after SDC, CVPR 2020;
learnable drift compensation, ECCV 2024; AdaGauss, NeurIPS 2024). From them follow

    prototypes     the class whose mean is nearest by cosine
    discriminant   linear discriminant analysis with one covariance for all classes
    rebalanced     a softmax regression on features drawn from the Gaussians of all classes

Each is a linear layer over the features, so that the result is a plain network again: exported and explained like one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lwm.images.datasets import Images, to_input
from lwm.models import Network, replace_head
from lwm.runtime.checkpoint import ROUNDING
from lwm.runtime.errors import InputError, RunError, warn

WIDEST = 128  # channels; above it a step has one covariance for all its classes: 512 x 512 numbers are 1 MB
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5
DRAWN, MOST_DRAWN = 200, 20_000  # features of each class, and of all together, that the rebalanced head is trained on
SMALLEST = 1e-6  # variance that any direction has, of the mean one
# What discriminant and rebalanced head add of it above WIDEST channels: a map between so many, from few images, carries
# covariances badly. The searches chose 3 at 512 channels and none at 64 (docs/results-settings.md).
SHRINKAGE = 3.0
MOST_STEPS = 500  # of the rebalanced head's optimiser
DECAY = 1.0  # of the rebalanced head's weights, on whitened features

Linear = tuple[Tensor, Tensor]  # weight (N, C), bias (N)


class Statistics(NamedTuple):
    """Of the features of N classes: ``means`` (N, C), ``covariances`` (M, C, C), and which of them is each class's."""

    means: Tensor
    covariances: Tensor
    of: list[int]

    def joined(self, more: Statistics) -> Statistics:
        """Those of ``more`` classes behind these."""
        return Statistics(
            torch.cat([self.means, more.means]),
            torch.cat([self.covariances, more.covariances]),
            self.of + [len(self.covariances) + index for index in more.of],
        )


class Transport(NamedTuple):
    """weight x + bias takes a feature of the old network to the new one, up to noise of covariance ``residual``."""

    weight: Tensor
    bias: Tensor
    residual: Tensor
    penalty: float  # of the ridge regression that found it


@torch.no_grad()
def features_of(
    model: Network, pixels: Tensor, mean: Sequence[float], std: Sequence[float], batch_size: int = 500
) -> Tensor:
    """What the head sees of uint8 (n, 3, H, W), in eval mode: float64 (n, C), on the CPU.

    Raises RunError where that is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = [model.pooled(model(to_input(part.to(device), mean, std)).features) for part in pixels.split(batch_size)]
    features = torch.cat([part.cpu().double() for part in parts])
    if not features.isfinite().all():
        raise RunError("the network's features are not finite, so that there are no statistics of them")
    return features


def measured(features: Tensor, labels: Tensor, classes: int) -> Statistics:
    """Of features (n, C) with labels int64 (n,), 0 to ``classes`` - 1; computed in the precision of the features.

    The covariances are shrunk to a multiple of the identity as Ledoit and Wolf (2004) have it, which matters where a
    class has few images. That of two images, which vary along one line, and in which their estimate sees no error, is
    shrunk to nothing else.
    """
    from sklearn.covariance import ledoit_wolf, shrunk_covariance

    channels, wide = features.shape[1], features.shape[1] > WIDEST
    means, of = features.new_empty(classes, channels), [0] * classes if wide else list(range(classes))
    covariances = features.new_zeros(1 if wide else classes, channels, channels)
    for label in range(classes):
        own = features[labels == label]
        means[label] = own.mean(0)
        shrunk, _ = ledoit_wolf((own - means[label]).numpy(), assume_centered=True)
        if len(own) < 3:
            shrunk = shrunk_covariance(shrunk, shrinkage=1.0)
        covariances[of[label]] += torch.from_numpy(shrunk) / (classes if wide else 1)
    return Statistics(means, covariances, of)


def fitted(before: Tensor, after: Tensor) -> Transport:
    """The map from ``before`` to ``after``, both (n, C), features of the same images in the old and the new network.

    Ridge regression of the difference: where the images say nothing the map leaves a feature as it is. Its penalty is
    the one of ``PENALTIES`` (in units of the features' mean variance) that predicts best by cross-validation, and the
    residual is what it then misses: that on the images it was fitted on would be too small where they are few.
    """
    fold = torch.arange(len(before)) % FOLDS

    def missed(penalty: float) -> Tensor:
        parts = []
        for number in range(FOLDS):
            weight, bias = _ridge(before[fold != number], after[fold != number], penalty)
            parts.append(after[fold == number] - before[fold == number] @ weight.T - bias)
        return torch.cat(parts)

    tried = ((penalty, missed(penalty)) for penalty in PENALTIES)
    penalty, rest = min(tried, key=lambda one: float(one[1].square().sum()))
    weight, bias = _ridge(before, after, penalty)
    return Transport(weight, bias, rest.T @ rest / len(rest), penalty)


def _ridge(before: Tensor, after: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    centre, target = before.mean(0), after.mean(0)
    x, moved = before - centre, after - before - (target - centre)
    gram = x.T @ x / len(x)
    one = torch.eye(len(gram), dtype=gram.dtype)
    scale = gram.trace().clamp(min=1e-9) / len(gram)
    weight = one + torch.linalg.solve(gram + penalty * scale * one, x.T @ moved / len(x)).T
    return weight, target - weight @ centre


def transported(statistics: Statistics, by: Transport) -> Statistics:
    """The statistics of the same classes in the new network."""
    return Statistics(
        statistics.means @ by.weight.T + by.bias,
        by.weight @ statistics.covariances @ by.weight.T + by.residual,
        statistics.of,
    )


def carried(known: Statistics | None, before: Tensor, after: Tensor, labels: Tensor) -> Statistics:
    """``known`` of the old classes, if there are any, in the new network, and those of the new classes behind them.

    ``before`` and ``after`` (n, C) are the new images' features in the old and the new network, labels int64 (n,) their
    positions in the output.
    """
    first, last = int(labels.min()), int(labels.max())
    new = measured(after, labels - first, last - first + 1)
    return new if known is None else transported(known, fitted(before, after)).joined(new)


# The heads --------------------------------------------------------------------------------------------------------


def prototypes(statistics: Statistics) -> Linear:
    """cos(x, m_c) times the length of x, which is the same for all classes: the order of the answers is that of cos."""
    means = statistics.means
    return F.normalize(means, dim=1), means.new_zeros(len(means))


def discriminant(statistics: Statistics, shrinkage: float | None = None) -> Linear:
    """With S the mean of the classes' covariances: x' S^-1 m_c - m_c' S^-1 m_c / 2, all classes equally likely.

    In all directions S has ``shrinkage`` times its mean variance more; None is ``SHRINKAGE`` for wide features. What
    all classes have in common is taken off, so that a class's Grad-CAM map shows what speaks for it and not for others.
    """
    means = statistics.means
    root = _root(shared_covariance(statistics), shrinkage)
    weight = torch.cholesky_solve(means.T, root).T
    return weight - weight.mean(0), -(weight * means).sum(1) / 2


def rebalanced(statistics: Statistics, shrinkage: float | None = None, seed: int = 0) -> Linear:
    """Softmax regression on as many features of each class, drawn from its Gaussian, shrunk as in ``discriminant``."""
    means = statistics.means
    count = max(2, min(DRAWN, MOST_DRAWN // len(means)))
    generator = torch.Generator().manual_seed(seed)
    roots = _root(statistics.covariances, shrinkage)
    noise = torch.randn(len(means), count, means.shape[1], generator=generator, dtype=means.dtype)
    drawn = means.unsqueeze(1) + torch.stack([n @ roots[k].T for n, k in zip(noise, statistics.of, strict=True)])
    labels = torch.arange(len(means)).repeat_interleave(count)
    # Whitened, and from zero, so that the regression converges in some 40 steps; from the discriminant, whose biases
    # are large where classes lie far apart, it takes hundreds.
    centre, whiten = means.mean(0), torch.linalg.inv(_root(shared_covariance(statistics), shrinkage))
    inputs = (drawn.flatten(0, 1) - centre) @ whiten.T
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


def shared_covariance(statistics: Statistics) -> Tensor:
    """The mean over the classes of their covariances (C, C)."""
    counts = torch.bincount(torch.tensor(statistics.of), minlength=len(statistics.covariances))
    return torch.einsum("m,mij->ij", counts.to(statistics.covariances), statistics.covariances) / len(statistics.of)


def _root(covariances: Tensor, shrinkage: float | None) -> Tensor:
    """Cholesky factors of ``covariances`` (..., C, C), shrunk; all that checkpoint.py lets pass have some."""
    channels = covariances.shape[-1]
    if shrinkage is None:
        shrinkage = SHRINKAGE if channels > WIDEST else 0.0
    shrunk = regular(covariances, SMALLEST + shrinkage)
    roots, failed = torch.linalg.cholesky_ex(shrunk)
    return torch.linalg.cholesky(regular(shrunk, ROUNDING * channels)) if failed.any() else roots


def regular(covariances: Tensor, more: float = SMALLEST) -> Tensor:
    """(..., C, C) with ``more`` of the mean variance in each direction.

    The default only makes them safe to be inverted where features do not vary at all.
    """
    scale = covariances.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-9)
    return covariances + more * scale[..., None, None] * torch.eye(covariances.shape[-1], dtype=covariances.dtype)


# Each makes a linear layer over the features, in float64: every read-out but "head".
HEADS: dict[str, Callable[[Statistics], Linear]] = {
    "prototypes": prototypes,
    "discriminant": discriminant,
    "rebalanced": rebalanced,
}


def made(name: str, statistics: Statistics) -> Linear:
    """The head of ``HEADS`` by that name, in float64. Raises InputError where the statistics make none."""
    try:
        return HEADS[name](statistics)
    except torch.linalg.LinAlgError as error:
        raise InputError("the checkpoint's statistics are damaged: a covariance is none") from error


# In a checkpoint --------------------------------------------------------------------------------------------------


def packed(statistics: Statistics | None) -> dict[str, Any]:
    """As a checkpoint keeps them, in fp32; nothing for None."""
    if statistics is None:
        return {}
    return {"means": statistics.means.float(), "covariances": statistics.covariances.float(), "of": statistics.of}


def unpacked(saved: dict[str, Any]) -> Statistics | None:
    """Those of a checkpoint, in float64; None where it has none."""
    kept = saved["statistics"]
    return Statistics(kept["means"].double(), kept["covariances"].double(), kept["of"]) if kept else None


def after_first_step(model: Network, saved: dict[str, Any], images: Images) -> Statistics:
    """Of all classes of a first step, on its training images."""
    features = features_of(model, images.pixels, saved["mean"], saved["std"])
    return measured(features, images.labels, len(saved["class_names"]))


def after_step(teacher: Network, student: Network, before: dict[str, Any], images: Images) -> Statistics | None:
    """Those of ``before``, the teacher's checkpoint, carried along, and those of the new classes behind them.

    ``images`` are the new classes' training images. None where the teacher has none.
    """
    known = unpacked(before)
    if known is None:
        return None
    old, new = (features_of(model, images.pixels, before["mean"], before["std"]) for model in (teacher, student))
    return carried(known, old, new, images.labels)


def chosen(name: str, saved: dict[str, Any], *others: dict[str, Any]) -> str:
    """The read-out that ``name`` means for the network of a checkpoint; only "auto" depends on it.

    The discriminant, which the searches on other classes support (docs/results-settings.md), where the classes came in
    several steps and this checkpoint and ``others``, which it is compared with, have statistics; the head elsewhere:
    trained on all classes at once, it leans to none.
    """
    if name != "auto":
        return name
    if len(saved["steps"]) == 1:
        return "head"
    if all(each["statistics"] for each in (saved, *others)):
        return "discriminant"
    warn("a checkpoint has no statistics of its classes: the head answers, which leans to the newest of them")
    return "head"


def use(model: Network, saved: dict[str, Any], name: str) -> tuple[Network, dict[str, Any]]:
    """The network with the read-out ``name``, and its checkpoint with that as "readout" and the form of its answers.

    ``name`` is as for ``chosen``. A copy, but for "head". Raises InputError where there are no statistics, or none that
    make a head.
    """
    name = chosen(name, saved)
    if name == "head":
        return model, saved | {"readout": name}
    statistics = unpacked(saved)
    if statistics is None:
        raise InputError(
            f"the checkpoint has no statistics of its classes, which the read-out {name} needs: it, or a model before "
            "it, came from elsewhere or was trained with --no-statistics or by an earlier release; take --readout head"
        )
    weight, bias = (part.float() for part in made(name, statistics))
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise InputError("the checkpoint's statistics are damaged: the head made of them is not finite")
    answering = copy.deepcopy(model)
    replace_head(answering, weight, bias)
    return answering, saved | {"readout": name, "loss_form": "softmax"}
