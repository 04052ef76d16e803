"""How good a model is: accuracies in percent, confusion, forgetting, and how far its attention has moved.

*Class-incremental* accuracy lets the model answer with any class it knows. Two easier questions stand beside it: *told*
whether the class is old or new, and *task-aware*, told with which task it came.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwm import verdict
from lwm.attention import attention_distances, last_map
from lwm.classifiers import ClassStatistics, Linear, covariances, features_of, from_checkpoint, linear_layer, names_for
from lwm.images.batches import Images, to_input
from lwm.models import Network
from lwm.runtime import distributed

TOP = 0.2  # share of the pixels of a map
LONGER = {verdict.UNTRAINED: "teacher's features, no training"}  # names of classifiers as a table has them
SHOWN = 60  # images of a page: with their maps at 224 px they take some 3 MB


@torch.inference_mode()
def predict(model: Network, pixels: Tensor, mean: Sequence[float], std: Sequence[float], batch_size: int) -> Tensor:
    """Logits (n, classes) on the CPU for uint8 (n, 3, H, W); the model is left in eval mode.

    Of several processes each answers its share, and all have the whole.
    """
    model.eval()
    distributed.same_buffers(model)
    device = next(model.parameters()).device
    own = distributed.share(pixels).split(batch_size)
    logits = torch.cat([model(to_input(part.to(device), mean, std)).logits.cpu() for part in own]).float()
    return distributed.gathered(logits, len(pixels))


@torch.no_grad()
def maps(
    model: Network, pixels: Tensor, classes: Tensor, mean: Sequence[float], std: Sequence[float], batch_size: int
) -> Tensor:
    """Grad-CAM (n, h, w) at the last feature map, on the CPU, of ``classes`` int64 (n,) in uint8 (n, 3, H, W)."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for images, wanted in zip(pixels.split(batch_size), classes.split(batch_size), strict=True):
        output = model(to_input(images.to(device), mean, std))
        parts.append(last_map(output, wanted.to(device)).cpu())
    return torch.cat(parts)


class View(NamedTuple):
    """A map (h, w) of an image: whose, and of which class."""

    role: str
    label: int
    heat: Tensor


@dataclass(frozen=True)
class Side:
    """A network as it answers: ``logits`` (n, classes) are its answers, and ``network`` has the head of its maps.

    It looks at ``batch_size`` images at a time.
    """

    role: str
    network: Network
    checkpoint: dict[str, Any]
    logits: Tensor
    batch_size: int

    def maps(self, pixels: Tensor, classes: Tensor) -> Tensor:
        return maps(self.network, pixels, classes, self.checkpoint["mean"], self.checkpoint["std"], self.batch_size)


def explain(sides: Sequence[Side], images: Images) -> dict[int, list[View]]:
    """For some of ``images``, by position, the maps of the true class, and of the answer if that is another class.

    A side makes them of the classes that it knows: a teacher has none of an image of a new class. The images are those
    of ``spread``, by how sure the last side is of the true class; labels of -1 are passed over.
    """
    sure = sides[-1].logits.softmax(1).gather(1, images.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    chosen = spread(images.labels, sure)
    views: dict[int, list[View]] = {index: [] for index in chosen}
    for side in sides:
        asked = [
            (index, label)
            for index in chosen
            if (true := int(images.labels[index])) < side.logits.shape[1]
            for label in dict.fromkeys((true, int(side.logits[index].argmax())))
        ]
        if asked:
            where, classes = torch.tensor(asked).T
            heats = side.maps(images.pixels[where], classes)
            for (index, label), heat in zip(asked, heats, strict=True):
                views[index].append(View(side.role, label, heat))
    return views


def spread(labels: Tensor, sure: Tensor) -> list[int]:
    """At most ``SHOWN`` positions, the least sure first: of each class equally many, from the least to the most sure.

    labels int64 (n,), of which those below 0 are passed over; sure (n,).
    """
    order = sure.argsort(stable=True)
    present = labels[labels >= 0].unique()
    chosen: list[int] = []
    for label in present:
        own = order[labels[order] == label]
        count = min(len(own), max(1, SHOWN // len(present)))
        chosen += own[torch.linspace(0, len(own) - 1, count).round().long()].tolist()
    return sorted(chosen, key=lambda index: float(sure[index]))[:SHOWN]


def attention_drift(teacher_maps: Tensor, student_maps: Tensor) -> tuple[Tensor, Tensor]:
    """How far two models' maps (n, h, w) of the same images are apart, NaN if one of the two is all zero.

    The distance (n,) is that of L_AD, 0 for the same map. The overlap (n,) is the share in percent of the strongest
    fifth of the pixels of one map that are among those of the other; if fewer are above zero, others fill it up.
    """
    distance, alive = attention_distances(student_maps, teacher_maps)
    rows = [each.flatten(1) for each in (teacher_maps, student_maps)]
    count = math.ceil(TOP * rows[0].shape[1])
    strongest = [torch.zeros_like(row).scatter(1, row.topk(count).indices, 1.0) for row in rows]
    overlap = 100 * (strongest[0] * strongest[1]).sum(1) / count
    return distance.where(alive, torch.nan), overlap.where(alive, torch.nan)


# Accuracies -------------------------------------------------------------------------------------------------------


def _right(logits: Tensor, labels: Tensor, sizes: Sequence[int], told: bool = False) -> list[Tensor]:
    """For each task's images, whether the best of all classes, or if ``told`` of the task's, is the true one."""
    right = []
    for first, end in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        own = (labels >= first) & (labels < end)
        best = logits[own, first:end].argmax(1) + first if told and own.any() else logits[own].argmax(1)
        right.append(best == labels[own])
    return right


def _percent(right: Tensor) -> float | None:
    return 100 * right.double().mean().item() if len(right) else None


def accuracies(logits: Tensor, labels: Tensor, old: int) -> dict[str, float | None]:
    """Five accuracies in percent, None if there is no image to judge by.

    logits (n, N+K), labels int64 (n,); the first ``old`` = N outputs are the old classes'. ``accuracy*`` is
    class-incremental: the answer is the largest of all logits. ``told_*`` is the largest of the old, or of the new.
    """
    sizes = (old, logits.shape[1] - old)
    right, told = _right(logits, labels, sizes), _right(logits, labels, sizes, told=True)
    return {
        "accuracy": _percent(torch.cat(right)),
        "accuracy_old": _percent(right[0]),
        "accuracy_new": _percent(right[1]),
        "told_old": _percent(told[0]),
        "told_new": _percent(told[1]),
    }


def class_accuracies(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Class-incremental accuracy of each class, in percent, in the order of the outputs."""
    return group_accuracies(logits, labels, [1] * logits.shape[1])


def group_accuracies(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> list[float | None]:
    """Class-incremental accuracy of each task's classes; ``sizes`` is the number of classes of each task."""
    return [_percent(right) for right in _right(logits, labels, sizes)]


def task_aware(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> float | None:
    """Accuracy in percent if the model is told with which task each image's class came; ``sizes`` as above."""
    return _percent(torch.cat(_right(logits, labels, sizes, told=True)))


def forgetting(earlier: Sequence[Sequence[float | None]], now: Sequence[float | None]) -> list[float | None]:
    """For each group of classes, its best earlier accuracy minus its accuracy now, in points.

    ``earlier`` holds, for each earlier task, the group accuracies after it (Chaudhry et al., ECCV 2018, section 3.2).
    """
    result: list[float | None] = []
    for group, accuracy in enumerate(now):
        past = [row[group] for row in earlier if group < len(row)]
        best = max((value for value in past if value is not None), default=None)
        result.append(None if accuracy is None or best is None else best - accuracy)
    return result


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 (classes, classes): a row for each true class, a column for each answer."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


# Classifiers ------------------------------------------------------------------------------------------------------


def by_classifier(
    model: Network, statistics: ClassStatistics, features: Tensor, labels: Tensor, new: int
) -> dict[str, dict[str, float | None]]:
    """For each classifier its accuracies in percent on images with ``features`` (n, C) and labels int64 (n,).

    ``new`` is the number of classes of the last task.
    """
    layers = {name: linear_layer(name, statistics, model) for name in names_for(len(statistics.means))}
    return {
        name: accuracies(linear_logits(layer, features), labels, len(layer[0]) - new) for name, layer in layers.items()
    }


def answers(
    classifier: str, logits: Tensor, labels: Tensor, sizes: Sequence[int], kept: float | None = None
) -> dict[str, Any]:
    """What a checkpoint keeps of how well a task's model answers, by its ``classifier``, in percent of test images.

    Of all classes ("accuracy") and of each task's ("groups"); "kept" is that of estimate.py.
    """
    right = _right(logits, labels, sizes)
    groups = [_percent(each) for each in right]
    return {"classifier": classifier, "accuracy": _percent(torch.cat(right)), "groups": groups, "kept": kept}


def linear_logits(layer: Linear, features: Tensor) -> Tensor:
    """float32 (n, N) of features float64 (n, C)."""
    weight, bias = layer
    return (features @ weight.T + bias).float()


def classifier_table(accuracies_by_classifier: dict[str, dict[str, float | None]], answering: str) -> str:
    """A line for each classifier with its accuracies in percent; the one named ``answering`` is marked."""
    columns = {"accuracy": "all", "accuracy_old": "old", "accuracy_new": "new"}
    width = max(20, *(len(LONGER.get(name, name)) for name in accuracies_by_classifier))
    lines = [f"{'classifier, no hint, %':<{width + 2}}{''.join(f'{shown:>8}' for shown in columns.values())}"]
    for name, row in accuracies_by_classifier.items():
        cells = ["-" if (value := row.get(key)) is None else f"{value:.1f}" for key in columns]
        mark = "  <- answers" if name == answering else ""
        lines.append(f"  {LONGER.get(name, name):<{width}}{''.join(f'{cell:>8}' for cell in cells)}{mark}")
    return "\n".join(lines)


def statistics_off(
    statistics: ClassStatistics, features: Tensor, labels: Tensor
) -> tuple[list[float | None], list[float | None]]:
    """How far each class's mean and covariance are from those of its ``features`` (n, C), labels int64 (n,).

    A mean in units of the class's spread, the root of the trace of its covariance; of n images that alone makes about
    1 / sqrt(n). A covariance by the Frobenius norm of the difference, relative to that of its images. None if nothing
    varies: of no image, of one, or of one several times.
    """
    off: tuple[list[float | None], list[float | None]] = [], []
    each = covariances(statistics).expand(len(statistics.means), -1, -1)
    for label, mean in enumerate(statistics.means):
        own = features[labels == label]
        if not len(own):
            own = torch.zeros_like(mean[None])  # varies as little
        seen = own.T.cov(correction=0)
        ratios = (
            ((own.mean(0) - mean).norm(), own.var(0, correction=0).sum().sqrt()),
            ((each[label] - seen).norm(), seen.norm()),
        )
        for values, (distance, unit) in zip(off, ratios, strict=True):
            values.append(float(distance / unit) if unit > 1e-12 else None)
    return off


def of_statistics(
    student: Network,
    teacher_checkpoint: dict[str, Any],
    student_checkpoint: dict[str, Any],
    images: Images,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """What a student can do with the statistics of its checkpoint, on labelled ``images`` of its classes.

    "classifiers" as ``by_classifier``; "means_off" and "covariances_off" of the old classes as the student has them
    "compensated", and "uncompensated" as in its teacher's checkpoint. All are empty without statistics or images.
    """
    metrics: dict[str, dict[str, Any]] = {"classifiers": {}, "means_off": {}, "covariances_off": {}}
    statistics, uncompensated = from_checkpoint(student_checkpoint), from_checkpoint(teacher_checkpoint)
    if statistics is None or uncompensated is None or not len(images.labels):
        return metrics
    old, labels = len(teacher_checkpoint["class_names"]), images.labels
    channels = student_checkpoint["mean"], student_checkpoint["std"]
    features = features_of(student, images.pixels, *channels, batch_size)
    metrics["classifiers"] = by_classifier(student, statistics, features, labels, len(statistics.means) - old)
    for name, each in (("compensated", statistics), ("uncompensated", uncompensated)):
        off = statistics_off(each, features[labels < old], labels[labels < old])
        metrics["means_off"][name], metrics["covariances_off"][name] = (values[:old] for values in off)
    return metrics


# Teacher and student side by side ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What a teacher and its student answer on the same n images, and where they look.

    ``metrics`` is what metrics.json holds. ``sides`` are the teacher and the student. The rows of ``maps``
    (m, 2, h, w), teacher's and student's, are those of the true class for the images ``shown`` int64 (m,), whose class
    is old; ``distance`` and ``overlap`` (m,) are those of ``attention_drift``. ``views`` are those of ``explain``.
    """

    metrics: dict[str, Any]
    sides: tuple[Side, Side]
    shown: Tensor
    maps: Tensor
    distance: Tensor
    overlap: Tensor
    views: dict[int, list[View]]


def compare(
    teacher: Network,
    student: Network,
    teacher_checkpoint: dict[str, Any],
    student_checkpoint: dict[str, Any],
    images: Images,
    batch_size: int,
    history: bool = True,
    heads: tuple[Network, Network] | None = None,
    features: tuple[Tensor, Tensor] | None = None,
) -> Comparison:
    """Both networks with their checkpoints, as answer_with gives them, on ``images``; label -1 is of an unknown class.

    With ``history`` the forgetting counts what the tests of earlier tasks recorded, which fits the same test images and
    the head alone. If the two answer by another classifier, ``heads`` are they with their heads: the maps are always
    those of the heads, which L_AD compares, and another classifier changes with the classes that it tells apart.
    ``features`` (n, C) are the images' in both networks, if they are known already.
    """
    old = len(teacher_checkpoint["class_names"])
    teacher_logits, student_logits = (
        predict(model, images.pixels, checkpoint["mean"], checkpoint["std"], batch_size)
        if features is None
        else linear_logits(linear_layer("head", None, model), features[side])
        for side, (model, checkpoint) in enumerate(((teacher, teacher_checkpoint), (student, student_checkpoint)))
    )
    one, other = heads or (teacher, student)
    sides = (
        Side("teacher", one, teacher_checkpoint, teacher_logits, batch_size),
        Side("student", other, student_checkpoint, student_logits, batch_size),
    )
    judged = images.labels >= 0
    shown = (judged & (images.labels < old)).nonzero().squeeze(1)
    old_labels, old_logits = images.labels[shown], teacher_logits[shown]
    labels, logits = images.labels[judged], student_logits[judged]
    both = torch.stack([side.maps(images.pixels[shown], old_labels) for side in sides], dim=1)
    distance, overlap = attention_drift(both[:, 0], both[:, 1])

    tasks = student_checkpoint["tasks"]
    sizes = [len(task["classes"]) for task in tasks]
    taught = [size for size, end in zip(sizes, itertools.accumulate(sizes), strict=True) if end <= old]
    now, earlier = group_accuracies(logits, labels, sizes), [group_accuracies(teacher_logits[judged], labels, taught)]
    if history and student_checkpoint.get("classifier", "head") == "head":
        earlier += [task["group_accuracy"] for task in tasks[:-1]]
    before, after = (each.argmax(1) == old_labels for each in (old_logits, student_logits[shown]))
    metrics = {
        "teacher": accuracies(old_logits, old_labels, old),
        "student": accuracies(logits, labels, old) | {"task_aware": task_aware(logits, labels, sizes)},
        "lost": verdict.lost(int((before & ~after).sum()), int((after & ~before).sum()), len(shown))
        if len(shown)
        else None,
        "tasks": [
            {"classes": task["classes"], "accuracy": accuracy, "forgetting": lost}
            for task, accuracy, lost in zip(tasks, now, forgetting(earlier, now), strict=True)
        ],
        "classes": {
            "names": student_checkpoint["class_names"],
            "images": labels.bincount(minlength=logits.shape[1]).tolist(),
            "teacher": class_accuracies(old_logits, old_labels),
            "student": class_accuracies(logits, labels),
        },
        "attention": {
            name: [
                None if (mean := values[old_labels == label].nanmean()).isnan() else mean.item() for label in range(old)
            ]
            for name, values in (("distance", distance), ("overlap", overlap))
        },
        "confusion": confusion(logits, labels).tolist(),
    }
    return Comparison(metrics, sides, shown, both, distance, overlap, explain(sides, images))
