"""Classes of a checkpoint renamed, merged and removed, without an image: head, statistics and history follow."""

from __future__ import annotations

import difflib
from typing import Any

from lwm.classifiers import ClassStatistics, Linear, from_checkpoint, made, to_checkpoint
from lwm.models import WIDEST
from lwm.runtime.errors import InputError, listed


def rename(checkpoint: dict[str, Any], name: str, to: str) -> dict[str, Any]:
    """The checkpoint with another name for a class. Raises InputError for one that is not there, or not free."""
    _positions(checkpoint, [name])
    _require_free(checkpoint, to, [name])

    def renamed(names: list[str]) -> list[str]:
        return [to if each == name else each for each in names]

    tasks = [
        task | {"classes": renamed(task["classes"]), "again": renamed(task["again"])} for task in checkpoint["tasks"]
    ]
    return checkpoint | {"tasks": tasks, "class_names": renamed(checkpoint["class_names"]), "training": {}}


def remove(checkpoint: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The checkpoint without the outputs of these classes. Raises InputError if one is not there, or none is left.

    The weights below the head, and a covariance that classes share, still hold what was learned from their images.
    """
    gone = _positions(checkpoint, names)
    kept = [position for position in range(len(checkpoint["class_names"])) if position not in gone]
    if not kept:
        raise InputError("every class would be removed: at least one has to stay")
    return _with_outputs(checkpoint, kept, dict.fromkeys(names))


def merge(checkpoint: dict[str, Any], names: list[str], to: str) -> dict[str, Any]:
    """The checkpoint with one class in place of several, at the first one's position.

    Raises InputError for a class that is not there, a name that is not free, and without statistics.
    """
    positions = _positions(checkpoint, names)
    _require_free(checkpoint, to, names)
    statistics = from_checkpoint(checkpoint)
    if len(positions) < 2:
        raise InputError(f"{listed(names)}: two classes or more can be merged")
    if statistics is None:
        raise InputError(
            f"{listed(names)} cannot be merged: the checkpoint has no statistics of its classes; it gets them with its "
            "first new class, or if the network is taken with --measure-old"
        )
    first, kept = positions[0], [p for p in range(len(checkpoint["class_names"])) if p not in positions[1:]]
    head = checkpoint["model"]["fc.weight"].double(), checkpoint["model"]["fc.bias"].double()
    merged = merged_statistics(statistics, positions)
    if _is_lda(head, statistics):
        weight, bias = made("lda", merged.only(kept))
    else:
        weight, bias = (part.clone() for part in head)
        weight[first], bias[first] = merged_row(head, statistics, positions)
        weight, bias = weight[kept], bias[kept]
    former = checkpoint["class_names"][first]
    checkpoint = _with_outputs(checkpoint | {"statistics": to_checkpoint(merged)}, kept, dict.fromkeys(names, former))
    kind = checkpoint["model"]["fc.weight"].dtype
    checkpoint["model"] |= {"fc.weight": weight.to(kind), "fc.bias": bias.to(kind)}
    checkpoint["unknown"] = {}  # the scores of images move with the rows
    return checkpoint if to == former else rename(checkpoint, former, to)


def merged_row(head: Linear, statistics: ClassStatistics, positions: list[int]) -> Linear:
    """The row weight (C,) and bias () of one class in place of several, each of which counts alike.

    The mean of their rows, and on the bias half of what that is short of each class's own row at the class's mean. Of a
    head that is that of LDA it is LDA's row of the mean of the means, with the covariance as it was.
    """
    weight, bias = (part[positions] for part in head)
    logits = statistics.means[positions] @ weight.T + bias  # of each class's mean, by each row
    short = (logits.diagonal() - logits.mean(1)).mean()
    return weight.mean(0), bias.mean() + short / 2


def merged_statistics(statistics: ClassStatistics, positions: list[int]) -> ClassStatistics:
    """With the first class's place taken by all images of these classes; the others stay, without images.

    If some were measured and some derived, what was derived goes.
    """
    counts, means, scatters, shrinkages, derived = (part.clone() for part in statistics)
    first, used = positions[0], [p for p in positions if not derived[p]] or positions
    own = counts[used]
    share, gone = own / own.sum(), counts[positions].sum() - own.sum()
    mean = share @ means[used]
    apart = means[used] - mean
    between = (own.unsqueeze(1) * apart).T @ apart
    if means.shape[1] > WIDEST:
        scatters = scatters * (1 - gone / counts.sum()) + between
    else:
        scatters[first] = scatters[used].sum(0) + between
    means[first], shrinkages[first], derived[first] = mean, share @ shrinkages[used], derived[used].max()
    counts[positions] = 0
    counts[first] = own.sum()
    return ClassStatistics(counts, means, scatters, shrinkages, derived)


def _is_lda(head: Linear, statistics: ClassStatistics) -> bool:
    """Whether a head is that of LDA over these classes, up to what single precision loses."""
    weight = made("lda", statistics)[0]
    return statistics.measured and bool((weight - head[0]).norm() < 0.01 * weight.norm())


def _with_outputs(checkpoint: dict[str, Any], kept: list[int], instead: dict[str, str | None]) -> dict[str, Any]:
    """The outputs ``kept`` alone; ``instead`` names what the others' images belong to now, None if to nothing.

    What was measured of other outputs is left out: accuracies, and but for the head's the scores of familiar images.
    """
    names = [checkpoint["class_names"][position] for position in kept]
    tasks = []
    for task in checkpoint["tasks"]:
        classes = [name for name in task["classes"] if name in names]
        images_of = dict.fromkeys(instead.get(name, name) for name in task["again"] + task["classes"])
        again = [name for name in images_of if name and name not in classes]
        if classes or again:
            lists = {"classes": classes, "again": again}
            tasks.append(task | lists | {"group_accuracy": [], "answers": {}})
    tasks[0]["pretrained"] = any(task["pretrained"] for task in checkpoint["tasks"])
    statistics = from_checkpoint(checkpoint)
    if statistics is not None:
        checkpoint = checkpoint | {"statistics": to_checkpoint(statistics.only(kept))}
    model = {k: v[kept] if k in ("fc.weight", "fc.bias") else v for k, v in checkpoint["model"].items()}
    unknown = {name: scores for name, scores in checkpoint["unknown"].items() if name == "head"}
    edited = {"class_names": names, "tasks": tasks, "model": model, "classifiers": {}, "unknown": unknown}
    return checkpoint | edited | {"training": {}}


def _positions(checkpoint: dict[str, Any], names: list[str]) -> list[int]:
    known = checkpoint["class_names"]
    if missing := [name for name in names if name not in known]:
        near = difflib.get_close_matches(missing[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the classes are {listed(known)}"
        raise InputError(f"there is no class {missing[0]!r}; {hint}")
    return sorted({known.index(name) for name in names})


def _require_free(checkpoint: dict[str, Any], name: str, instead_of: list[str]) -> None:
    if name in checkpoint["class_names"] and name not in instead_of:
        raise InputError(f"there is a class {name!r} already: to make one of two, take --merge")
