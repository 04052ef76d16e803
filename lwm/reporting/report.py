"""The page of a run: one HTML file that needs nothing from the network. report.html.jinja is its template.

Whatever is in it, class names and file names too, may come from a stranger: it is escaped, and the page allows itself
no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from torch import Tensor

from lwm.evaluation import Comparison, class_accuracies, confusion
from lwm.images.batches import Images
from lwm.probabilities import form_of, likeliest, probabilities_of
from lwm.reporting import plots
from lwm.runtime.files import write_atomically

SHOWN = 60  # images in the gallery: with their maps at 224 px they take some 3 MB
CONFUSED = 12  # rows of what is confused most
HIDDEN = ("classes", "group_accuracy", "data_dir")  # of a task's settings: shown elsewhere, or somebody's own paths


def of_teacher(path: Path, checkpoint: dict[str, Any], images: Images, explained: tuple[Tensor, Tensor]) -> None:
    """The page of task 0: its test images, their logits (n, N) and the maps (n, h, w) of the true classes."""
    (logits, maps), names, form = explained, checkpoint["class_names"], form_of(checkpoint["loss_form"])
    sure = probabilities_of(logits.numpy(), form)[np.arange(len(logits)), images.labels]
    shown = in_turn(images.labels, -sure)
    peak = float(maps[shown].max()) if shown else 0.0
    gallery = []
    for index in shown:
        note = f"{100 * sure[index]:.0f} % for {names[images.labels[index]]}"
        gallery.append(_card(images, index, names, peak, [("", maps[index], logits, form)], note))
    _write(
        path,
        checkpoint,
        confusion(logits, images.labels).numpy(),
        title=f"Teacher of {len(names)} classes",
        teacher=None,
        student={"accuracy": checkpoint["tasks"][-1]["group_accuracy"][0]},
        classes=_classes(checkpoint, [], class_accuracies(logits, images.labels), [], []),
        gallery=gallery,
        sorted_by="least sure of the true class first",
    )


def of_student(
    path: Path,
    teacher_checkpoint: dict[str, Any],
    student_checkpoint: dict[str, Any],
    images: Images,
    comparison: Comparison,
) -> None:
    """The page of a later task, of its run or of demo.py: a teacher and its student on the same images.

    The checkpoints are as classifiers.answer_with gives them.
    """
    names, metrics, old = student_checkpoint["class_names"], comparison.metrics, len(teacher_checkpoint["class_names"])
    rows = in_turn(images.labels[comparison.shown], comparison.distance.nan_to_num(-1))
    peak = float(comparison.maps[rows].max()) if rows else 0.0
    logits = comparison.teacher_logits, comparison.student_logits
    forms = [form_of(each["loss_form"]) for each in (teacher_checkpoint, student_checkpoint)]
    gallery = []
    for row in rows:
        distance, overlap = comparison.distance[row], comparison.overlap[row]
        moved = f"moved by {distance:.2f}, {overlap:.0f} % of the strongest fifth in common"
        note = "one of the maps is all zero" if distance.isnan() else moved
        sides = zip(("teacher", "student"), comparison.maps[row], logits, forms, strict=True)
        gallery.append(_card(images, int(comparison.shown[row]), names, peak, sides, note))
    of_classes, attention = metrics["classes"], metrics["attention"].values()
    _write(
        path,
        student_checkpoint,
        np.array(metrics["confusion"]),
        title=f"Student of {len(names)} classes, {old} old and {len(names) - old} new",
        teacher=metrics["teacher"],
        student=metrics["student"],
        classes=_classes(student_checkpoint, of_classes["teacher"], of_classes["student"], *attention),
        gallery=gallery,
        sorted_by="those whose map moved most first",
    )


def in_turn(labels: Tensor, urgency: Any) -> list[int]:
    """At most ``SHOWN`` indices, the most urgent first: of each class in turn its most urgent, so that all are there.

    labels int64 (n,), urgency (n,).
    """

    def urgent(index: int) -> float:
        return -float(urgency[index])

    order = sorted(range(len(labels)), key=urgent)
    so_far: Counter[int] = Counter()
    turns = {}
    for index in order:
        turns[index] = so_far[label := int(labels[index])]
        so_far[label] += 1
    return sorted(sorted(order, key=lambda index: turns[index])[:SHOWN], key=urgent)


def _card(
    images: Images, index: int, names: Sequence[str], peak: float, sides: Iterable[tuple[Any, ...]], note: str
) -> dict[str, Any]:
    """An image of the gallery; of each side the role, the map (h, w), all images' logits, and the form of answers."""
    pixels, label = images.pixels[index].numpy(), int(images.labels[index])
    maps = []
    for role, heat, logits, form in sides:
        answer, probability = likeliest(logits[index].numpy(), form, names)[0]
        picture = _uri(plots.encode(plots.overlay(pixels, heat.numpy(), peak)))
        right = answer == names[label]
        maps.append({"role": role, "image": picture, "answer": answer, "probability": probability, "right": right})
    picture = _uri(plots.encode(pixels.transpose(1, 2, 0)))
    return {"label": label, "name": names[label], "image": picture, "maps": maps, "note": note}


def _classes(checkpoint: dict[str, Any], *columns: Sequence[float | None]) -> list[dict[str, Any]]:
    """A row for each class: the task it came with, accuracies, what the student has lost of it, how its maps moved.

    ``columns`` are the teacher's and the student's accuracies, distance and overlap; all but the student's have the
    old classes alone.
    """
    came = [number for number, task in enumerate(checkpoint["tasks"]) for _ in task["classes"]]
    names = ("name", "task", "teacher", "student", "distance", "overlap")
    cells = itertools.zip_longest(checkpoint["class_names"], came, *columns)
    rows = [dict(zip(names, row, strict=True)) for row in cells]
    for row in rows:
        row["lost"] = None if None in (row["teacher"], row["student"]) else row["teacher"] - row["student"]
    return rows


def _confused(counts: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """(true class, answer, how often, of how many), the largest share first."""
    totals = counts.sum(1)
    wrong = [(true, answer) for true, answer in zip(*np.nonzero(counts), strict=True) if true != answer]
    wrong.sort(key=lambda pair: -counts[pair] / totals[pair[0]])
    return [(names[true], names[answer], counts[true, answer], totals[true]) for true, answer in wrong[:CONFUSED]]


def _uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml" if b"<svg" in picture[:400] else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _write(path: Path, checkpoint: dict[str, Any], counts: np.ndarray, **content: Any) -> None:
    names, training = checkpoint["class_names"], checkpoint["training"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["source_hash"] = _hash
    page = environment.get_template("report.html.jinja").render(
        **content,
        checkpoint=checkpoint,
        answering=checkpoint.get("classifier", "head"),  # a teacher's page is of its head
        several=len(checkpoint["tasks"]) > 1,
        curves=_uri(plots.svg(plots.curves, training["log"], "This task")) if "log" in training else None,
        confusion=_uri(plots.svg(plots.confusion, counts, names)) if counts.any() else None,
        confused=_confused(counts, names),
        settings={name: value for name, value in checkpoint["tasks"][-1].items() if name not in HIDDEN},
    )
    write_atomically(path, page.encode())
