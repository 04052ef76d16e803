"""Classes of a checkpoint renamed, merged and removed, without an image: head, statistics and history follow."""

from __future__ import annotations

import difflib
from typing import Any

from lwm.classifiers import ClassStatistics, Linear, from_checkpoint, to_checkpoint
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
    model = dict(checkpoint["model"])
    head = model["fc.weight"].double(), model["fc.bias"].double()
    for key, row in zip(("fc.weight", "fc.bias"), merged_row(head, statistics, positions), strict=True):
        model[key] = model[key].clone()
        model[key][first] = row.to(model[key].dtype)
    merged = to_checkpoint(merged_statistics(statistics, positions))
    former = checkpoint["class_names"][first]
    checkpoint = _with_outputs(checkpoint | {"model": model, "statistics": merged}, kept, dict.fromkeys(names, former))
    return checkpoint if to == former else rename(checkpoint, former, to)


def merged_row(head: Linear, statistics: ClassStatistics, positions: list[int]) -> Linear:
    """The row weight (C,) and bias () of one class in place of several, each of which counts alike.

    The mean of their rows, and on the bias half of what that is short of each class's own row at the class's mean. If
    the head is that of LDA, so is the row: of the mean of the means, with the covariance that all classes share.
    """
    weight, bias = (part[positions] for part in head)
    logits = statistics.means[positions] @ weight.T + bias  # of each class's mean, by each row
    short = (logits.diagonal() - logits.mean(1)).mean()
    return weight.mean(0), bias.mean() + short / 2


def merged_statistics(statistics: ClassStatistics, positions: list[int]) -> ClassStatistics:
    """With the first class's place taken by all the images of all these classes; the others stay, to be left out."""
    counts, means, scatters, shrinkages, derived = (part.clone() for part in statistics)
    first, own = positions[0], counts[positions]
    share = own / own.sum()
    means[first] = share @ statistics.means[positions]
    apart = statistics.means[positions] - means[first]
    between = (own.unsqueeze(1) * apart).T @ apart
    if means.shape[1] > WIDEST:
        scatters[0] += between
    else:
        scatters[first] = scatters[positions].sum(0) + between
    counts[first], shrinkages[first] = own.sum(), share @ shrinkages[positions]
    derived[first] = derived[positions].max()
    counts[positions[1:]] = 0
    return ClassStatistics(counts, means, scatters, shrinkages, derived)


def _with_outputs(checkpoint: dict[str, Any], kept: list[int], instead: dict[str, str | None]) -> dict[str, Any]:
    """The outputs ``kept`` alone; ``instead`` names what the others' images belong to now, None if to nothing.

    Accuracies that were measured among other classes are left out.
    """
    names = [checkpoint["class_names"][position] for position in kept]
    tasks = []
    for task in checkpoint["tasks"]:
        again = dict.fromkeys(instead.get(name, name) for name in task["again"])
        lists = {"classes": [n for n in task["classes"] if n in names], "again": [n for n in again if n]}
        if any(lists.values()):
            tasks.append(task | lists | {"group_accuracy": [], "answers": {}})
    statistics = from_checkpoint(checkpoint)
    if statistics is not None:
        checkpoint = checkpoint | {"statistics": to_checkpoint(statistics.only(kept))}
    model = {k: v[kept] if k in ("fc.weight", "fc.bias") else v for k, v in checkpoint["model"].items()}
    return checkpoint | {"class_names": names, "tasks": tasks, "model": model, "classifiers": {}, "training": {}}


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
