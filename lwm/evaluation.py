"""How good a model is: accuracies in percent, confusion, forgetting, and how far its attention has moved.

*Class-incremental* accuracy lets the model answer with any class it knows; *task-aware* accuracy tells it which
group (old or new) the image belongs to, a far easier question. The two are reported side by side, never one for the
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lwm.attention import last_map
from lwm.classifiers import HEADS, Statistics, features_of, made, unpacked
from lwm.images.datasets import Images, to_input
from lwm.losses import attention_distances
from lwm.models import Network, head_weight
from lwm.runtime import distributed

TOP = 0.2  # share of the pixels of a map
ACCURACIES = ("accuracy", "accuracy_old", "accuracy_new", "task_aware_old", "task_aware_new")


@torch.inference_mode()
def predict(
    model: Network, pixels: Tensor, mean: Sequence[float], std: Sequence[float], batch_size: int = 500
) -> Tensor:
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
    model: Network,
    pixels: Tensor,
    classes: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 500,
) -> Tensor:
    """Grad-CAM (n, h, w) at the last feature map, on the CPU, of ``classes`` int64 (n,) in uint8 (n, 3, H, W)."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for some, explained in zip(pixels.split(batch_size), classes.split(batch_size), strict=True):
        output = model(to_input(some.to(device), mean, std))
        parts.append(last_map(output, head_weight(model), explained.to(device)).cpu())
    return torch.cat(parts)


def explained(
    model: Network, images: Images, mean: Sequence[float], std: Sequence[float], batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and maps of the true classes (n, h, w) for ``images``, of which n may be 0."""
    if not len(images.labels):
        return torch.zeros(0, model.fc.out_features), torch.zeros(0, 1, 1)
    logits = predict(model, images.pixels, mean, std, batch_size)
    return logits, maps(model, images.pixels, images.labels, mean, std, batch_size)


def attention_drift(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """How far two models' maps (n, h, w) of the same images are apart, NaN where one of the two is all zero.

    The distance (n,) is that of L_AD, 0 for the same map. The overlap (n,) is the share in percent of the strongest
    fifth of the pixels of one map that are among those of the other; where fewer are above zero, others fill it up.
    """
    distance, alive = attention_distances(after, before)
    rows = [each.flatten(1) for each in (before, after)]
    count = math.ceil(TOP * rows[0].shape[1])
    chosen = [torch.zeros_like(row).scatter(1, row.topk(count).indices, 1.0) for row in rows]
    overlap = 100 * (chosen[0] * chosen[1]).sum(1) / count
    return distance.where(alive, torch.nan), overlap.where(alive, torch.nan)


def _percent(correct: Tensor) -> float | None:
    return 100 * correct.double().mean().item() if len(correct) else None


def accuracies(logits: Tensor, labels: Tensor, old: int) -> dict[str, float | None]:
    """The five accuracies of ``ACCURACIES``, in percent, None where there is no image to judge by.

    logits (n, N+K), labels int64 (n,); the first ``old`` = N outputs are the old classes'. ``accuracy*`` is
    class-incremental: the answer is the largest of all logits.
    """
    correct = logits.argmax(1) == labels
    is_old = labels < old
    result = {
        "accuracy": _percent(correct),
        "accuracy_old": _percent(correct[is_old]),
        "accuracy_new": _percent(correct[~is_old]),
        "task_aware_old": _percent(logits[is_old, :old].argmax(1) == labels[is_old]) if is_old.any() else None,
        "task_aware_new": None,
    }
    if not is_old.all():
        result["task_aware_new"] = _percent(logits[~is_old, old:].argmax(1) == labels[~is_old] - old)
    return result


def class_accuracies(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Class-incremental accuracy of each class, in percent, in the order of the outputs."""
    correct = logits.argmax(1) == labels
    return [_percent(correct[labels == index]) for index in range(logits.shape[1])]


def group_accuracies(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> list[float | None]:
    """Class-incremental accuracy of each step's classes; ``sizes`` is the number of classes of each step."""
    correct = logits.argmax(1) == labels
    result, first = [], 0
    for size in sizes:
        result.append(_percent(correct[(labels >= first) & (labels < first + size)]))
        first += size
    return result


def task_aware(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> float | None:
    """Accuracy in percent where the model is told which step each image's class came with; ``sizes`` as above."""
    correct, first = [], 0
    for size in sizes:
        own = (labels >= first) & (labels < first + size)
        correct.append(logits[own, first : first + size].argmax(1) == labels[own] - first)
        first += size
    return _percent(torch.cat(correct))


def forgetting(earlier: Sequence[Sequence[float | None]], now: Sequence[float | None]) -> list[float | None]:
    """For each group of classes, its best earlier accuracy minus its accuracy now, in points.

    ``earlier`` holds, for each earlier step, the group accuracies after it (Chaudhry et al., ECCV 2018, section 3.2).
    """
    result: list[float | None] = []
    for group, accuracy in enumerate(now):
        known = [step[group] for step in earlier if group < len(step)]
        before = [accuracy for accuracy in known if accuracy is not None]
        result.append(None if accuracy is None or not before else max(before) - accuracy)
    return result


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 (classes, classes): a row for each true class, a column for each answer."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def by_readout(
    model: Network, statistics: Statistics, features: Tensor, labels: Tensor, last: int
) -> dict[str, dict[str, float | None]]:
    """For each read-out its accuracies in percent on images with ``features`` (n, C) and labels int64 (n,).

    ``last`` is the number of classes of the last step, which are the new ones.
    """
    head = model.fc.weight.detach().cpu().double(), model.fc.bias.detach().cpu().double()
    found = {}
    for name, (weight, bias) in {"head": head, **{name: made(name, statistics) for name in HEADS}}.items():
        found[name] = accuracies(features @ weight.T + bias, labels, len(weight) - last)
    return found


def means_off(statistics: Statistics, features: Tensor, labels: Tensor) -> list[float | None]:
    """How far each class's mean is from that of its ``features`` (n, C), labels int64 (n,).

    In units of the class's spread, the root of the trace of its covariance; of n images that alone makes about
    1 / sqrt(n). None where nothing varies: of no image, of one, or of one several times.
    """

    def off(label: int, own: Tensor) -> tuple[Tensor, Tensor]:
        return (own.mean(0) - statistics.means[label]).norm(), own.var(0, correction=0).sum().sqrt()

    return _of_each_class(off, len(statistics.of), features, labels)


def covariances_off(statistics: Statistics, features: Tensor, labels: Tensor) -> list[float | None]:
    """Likewise of each class's covariance: the Frobenius norm of the difference, relative to that of its images."""

    def off(label: int, own: Tensor) -> tuple[Tensor, Tensor]:
        seen = own.T.cov(correction=0)
        return (statistics.covariances[statistics.of[label]] - seen).norm(), seen.norm()

    return _of_each_class(off, len(statistics.of), features, labels)


def _of_each_class(
    measure: Callable[[int, Tensor], tuple[Tensor, Tensor]], classes: int, features: Tensor, labels: Tensor
) -> list[float | None]:
    found = []
    for label in range(classes):
        own = features[labels == label]
        distance, unit = measure(label, own) if len(own) > 1 else (0.0, 0.0)
        found.append(float(distance / unit) if unit > 1e-12 else None)
    return found


def of_statistics(
    student: Network, before: dict[str, Any], after: dict[str, Any], images: Images
) -> dict[str, dict[str, Any]]:
    """What the checkpoint ``after`` of a student can do with its statistics, on ``images`` of known classes.

    "readouts" as ``by_readout``; "means_off" and "covariances_off" of the old classes as the student "carried" them,
    and as they were "left" in ``before``, its teacher's checkpoint. All are empty without statistics or images.
    """
    known, earlier, old = unpacked(after), unpacked(before), len(before["class_names"])
    if known is None or earlier is None or not len(images.labels):
        return {"readouts": {}, "means_off": {}, "covariances_off": {}}
    features, is_old = features_of(student, images.pixels, after["mean"], after["std"]), images.labels < old
    both = {"carried": Statistics(known.means[:old], known.covariances, known.of[:old]), "left": earlier}
    return {
        "readouts": by_readout(student, known, features, images.labels, len(known.means) - old),
        **{
            measure.__name__: {
                name: measure(each, features[is_old], images.labels[is_old]) for name, each in both.items()
            }
            for measure in (means_off, covariances_off)
        },
    }


# Teacher and student side by side ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What a teacher and its student answer on the same n images, and where they look.

    ``metrics`` is what metrics.json holds. Logits are (n, N) and (n, N+K). The rows of ``maps`` (m, 2, h, w), teacher's
    and student's, are those of the true class for the images ``shown`` int64 (m,), whose class is old; ``distance`` and
    ``overlap`` (m,) are those of ``attention_drift``.
    """

    metrics: dict[str, Any]
    teacher_logits: Tensor
    student_logits: Tensor
    shown: Tensor
    maps: Tensor
    distance: Tensor
    overlap: Tensor


def compare(
    teacher: Network,
    student: Network,
    before: dict[str, Any],
    after: dict[str, Any],
    images: Images,
    history: bool = True,
    batch_size: int = 500,
    heads: tuple[Network, Network] | None = None,
) -> Comparison:
    """Both networks with their checkpoints on ``images``, of which label -1 is of no known class.

    With ``history`` the forgetting counts what the tests of earlier steps recorded, as fits the same test images and
    the head that was trained. Where the two answer by another read-out, ``heads`` are they with their heads: the maps
    are always those of the heads, which L_AD compares, and a read-out changes with the classes that it tells apart.
    """
    history = history and after.get("readout", "head") == "head"
    names, old = after["class_names"], len(before["class_names"])
    teacher_logits, student_logits = (
        predict(model, images.pixels, saved["mean"], saved["std"], batch_size)
        for model, saved in ((teacher, before), (student, after))
    )
    judged, is_old = images.labels >= 0, (images.labels >= 0) & (images.labels < old)
    shown = is_old.nonzero().squeeze(1)
    labels = images.labels[shown]
    maps_of_both = [
        maps(model, images.pixels[shown], labels, saved["mean"], saved["std"], batch_size)
        for model, saved in zip(heads or (teacher, student), (before, after), strict=True)
        if len(shown)
    ]
    both = torch.stack(maps_of_both, dim=1) if len(shown) else torch.zeros(0, 2, 1, 1)
    distance, overlap = attention_drift(both[:, 0], both[:, 1])
    metrics = {
        "teacher": accuracies(teacher_logits[is_old], labels, old),
        "student": accuracies(student_logits[judged], images.labels[judged], old),
        "steps": _by_step(
            after["steps"], teacher_logits[judged], student_logits[judged], images.labels[judged], history
        ),
        "classes": {
            "names": names,
            "teacher": class_accuracies(teacher_logits[is_old], labels),
            "student": class_accuracies(student_logits[judged], images.labels[judged]),
        },
        "attention": {
            name: [_mean_of_known(values[labels == index]) for index in range(old)]
            for name, values in (("distance", distance), ("overlap", overlap))
        },
        "confusion": confusion(student_logits[judged], images.labels[judged]).tolist(),
    }
    return Comparison(metrics, teacher_logits, student_logits, shown, both, distance, overlap)


def _mean_of_known(values: Tensor) -> float | None:
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean


def _by_step(
    steps: list[dict[str, Any]], teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, history: bool
) -> list[dict[str, Any]]:
    """For each step's classes: the accuracy now, and what is lost of the best before, or of the teacher's."""
    sizes = [len(step["classes"]) for step in steps]
    now = group_accuracies(student_logits, labels, sizes)
    known = sum(sum(sizes[: number + 1]) <= teacher_logits.shape[1] for number in range(len(sizes)))
    earlier = [group_accuracies(teacher_logits, labels, sizes[:known])]
    if history:
        earlier += [step["group_accuracy"] for step in steps[:-1]]
    return [
        {"classes": step["classes"], "accuracy": accuracy, "forgetting": lost}
        for step, accuracy, lost in zip(steps, now, forgetting(earlier, now), strict=True)
    ]
