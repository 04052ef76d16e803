"""What the accuracies of a model say, in a sentence: how much is lost, how sure that is, and what to look at first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest

UNTRAINED = "untrained"  # among a checkpoint's classifiers: LDA on the teacher's features, where nothing is trained
NOTABLE = 20  # classes of very many that are shown first
STAYS = 50  # percent of the new images: a student that agrees with its teacher on fewer has left it
SURE = 1.96  # standard deviations to both sides hold 95 % of a normal distribution


def interval(percent: float, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval in percent, for ``percent`` right of so many images, at least one."""
    found = binomtest(round(percent * images / 100), images).proportion_ci(method="wilson")
    return 100 * found.low, 100 * found.high


def lost(once: int, now: int, images: int) -> dict[str, float]:
    """Points that are lost between two answers to the same images, with a 95 % interval.

    ``once`` were right before alone, ``now`` are right now alone. The interval of the paired difference is Wald's with
    half an image added to each cell of the two-by-two table (Agresti and Min, 2005), so that few images make it wide.
    """
    n, difference = images + 2, once - now
    spread = SURE * math.sqrt(once + now + 1 - difference**2 / n) / n
    return {
        "points": 100 * difference / images,
        "low": 100 * (difference / n - spread),
        "high": 100 * (difference / n + spread),
        "images": images,
    }


def of_teacher(accuracy: float | None, counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """``counts`` are those of evaluation.confusion."""
    if accuracy is None:
        return "No test image judges it."
    images = sum(map(sum, counts))
    sure = "{:.0f} to {:.0f}".format(*interval(accuracy, images))
    said = [f"It gets {accuracy:.0f} % of the test images right (95 % interval {sure}, {images} images)"]
    return "; ".join([*said, *_taken_for(counts, names, range(len(names)))]) + "."


def of_student(metrics: dict[str, Any], classifiers: dict[str, dict[str, float | None]]) -> str:
    """``metrics`` are those of evaluation.compare, ``classifiers`` the accuracies of each on the same images."""
    student, names, change = metrics["student"], metrics["classes"]["names"], metrics["lost"]
    if student["accuracy"] is None:
        return "No test image judges it."
    said = []
    if change is None:
        said.append("No test image is of an old class, so how these fare is not known")
    else:
        word = "lost" if change["points"] >= 0 else "gained"
        low, high = sorted((change["low"], change["high"]) if word == "lost" else (-change["low"], -change["high"]))
        sure = f"95 % interval {low:.0f} to {high:.0f}, {change['images']} images"
        chance = ", which may be chance" if low <= 0 <= high else ""
        said.append(f"Old classes {word} {abs(change['points']):.0f} points ({sure}){chance}")
        said += _taken_for(metrics["confusion"], names, range(len(metrics["classes"]["teacher"])))
    said.append(f"it gets {student['accuracy']:.0f} % of all images right")
    if (untrained := classifiers.get(UNTRAINED, {}).get("accuracy")) is not None:
        said.append(f"without training {untrained:.0f} %")
    return "; ".join(said) + "."


def _taken_for(counts: Sequence[Sequence[int]], names: Sequence[str], of: Sequence[int]) -> list[str]:
    """What the images of the classes ``of`` that are not recognised are taken for most often, or nothing."""
    wrong = [sum(counts[true][answer] for true in of if true != answer) for answer in range(len(names))]
    if not any(wrong):
        return []
    worst = max(range(len(names)), key=wrong.__getitem__)
    most = "most wrong answers are" if 2 * wrong[worst] > sum(wrong) else "the most frequent wrong answer is"
    return [f"{most} {names[worst]} ({wrong[worst]} of {sum(wrong)})"]


def notable(teacher: Sequence[float | None], student: Sequence[float | None]) -> list[int]:
    """The positions of at most ``NOTABLE`` classes: those that lost most since the teacher, then the worst of the rest.

    Accuracies in percent of each class; the teacher's are of the first ones alone. Without a teacher the worst.
    """
    both = [
        (before - now, label)
        for label, (before, now) in enumerate(zip(teacher, student, strict=False))
        if before is not None and now is not None and before > now
    ]
    most_lost = [label for _, label in sorted(both, key=lambda pair: -pair[0])[: NOTABLE // 2]]
    judged = [(now, label) for label, now in enumerate(student) if now is not None and label not in most_lost]
    return most_lost + [label for _, label in sorted(judged)[: NOTABLE - len(most_lost)]]


def what_failed(log: Sequence[dict[str, Any]], classes: int) -> str | None:
    """What to say of a training of so many ``classes`` that has learned too little; None if it has learned.

    That is a training accuracy that ends nearer to chance than to 100 %.
    """
    accuracies = [row["accuracy"] for row in log]
    chance, last = 100 / classes, accuracies[-1]
    if classes == 1 or last >= (chance + 100) / 2:
        return None
    fifth = max(1, len(log) // 5)
    rises = last > max(accuracies[:-fifth], default=chance) + 2
    end = "still rises; try more --epochs"
    if not rises:
        end = "rises no more; try a lower learning rate, larger images, or --weights of a trained network"
    return f"training failed: accuracy on its own images ends at {last:.0f} % (chance: {chance:.0f} %) and {end}"


def has_left(log: Sequence[dict[str, Any]]) -> str | None:
    """What to say after the first epoch in which a student sees the new images otherwise than its teacher; else None.

    "agreement" is the percentage of which both name the same old class first.
    """
    *before, last = (row.get("agreement", 100.0) for row in log)
    if last >= STAYS or min(before, default=100.0) < STAYS:
        return None
    return (
        f"epoch {len(log)}: the student leaves its teacher: of {last:.0f} % of the new images alone both name the same "
        "old class first, and the old classes will suffer; try a lower learning rate, or --batch-norm frozen"
    )
