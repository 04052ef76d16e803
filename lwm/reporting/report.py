"""The page of a run: one HTML file that needs nothing from the network. report.html.jinja is its template.

Whatever is in it, class names and file names too, may come from a stranger: it is escaped, and the page allows itself
no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
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
    right = probabilities_of(logits.numpy(), form)[np.arange(len(logits)), images.labels]
    chosen = in_turn(images.labels, -right)
    peak = float(maps[chosen].max()) if len(chosen) else 0.0
    gallery = [
        {
            **_picture(images, index, names),
            "maps": [_map("", images, index, maps[index], peak, logits[index], names, form)],
            "note": f"{100 * right[index]:.0f} % for {names[images.labels[index]]}",
        }
        for index in chosen
    ]
    accuracy = checkpoint["tasks"][-1]["group_accuracy"][0]
    summary = "There were no test images to judge it by."
    if accuracy is not None:
        summary = f"It gets {accuracy:.1f} % of the test images of its {len(names)} classes right."
    _write(
        path,
        title=f"Teacher of {len(names)} classes",
        summary=summary,
        accuracies=[] if accuracy is None else [("all classes", None, accuracy)],
        classes=_classes(checkpoint, [], class_accuracies(logits, images.labels)),
        gallery=gallery,
        sorted_by="least sure of the true class first",
        checkpoint=checkpoint,
        counts=confusion(logits, images.labels).numpy(),
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
    names, metrics, shown = student_checkpoint["class_names"], comparison.metrics, comparison.shown
    rows = in_turn(images.labels[shown], comparison.distance.nan_to_num(-1))
    peak = float(comparison.maps[rows].max()) if rows else 0.0
    both = (
        ("teacher", comparison.teacher_logits, form_of(teacher_checkpoint["loss_form"])),
        ("student", comparison.student_logits, form_of(student_checkpoint["loss_form"])),
    )
    gallery = []
    for row in rows:
        index, distance, overlap = int(shown[row]), comparison.distance[row], comparison.overlap[row]
        maps = [
            _map(role, images, index, heat, peak, logits[index], names, form)
            for heat, (role, logits, form) in zip(comparison.maps[row], both, strict=True)
        ]
        moved = f"moved by {distance:.2f}, {overlap:.0f} % of the strongest fifth in common"
        note = "one of the maps is all zero" if distance.isnan() else moved
        gallery.append({**_picture(images, index, names), "maps": maps, "note": note})
    teacher, student, old = metrics["teacher"], metrics["student"], len(teacher_checkpoint["class_names"])
    _write(
        path,
        title=f"Student of {len(names)} classes, {old} old and {len(names) - old} new",
        summary=_summary(teacher, student, student_checkpoint["classifier"]),
        accuracies=[
            ("all classes, no hint", teacher["accuracy"], student["accuracy"]),
            ("old classes, no hint", teacher["accuracy_old"], student["accuracy_old"]),
            ("new classes, no hint", teacher["accuracy_new"], student["accuracy_new"]),
            ("old classes, told that they are old (task-aware)", teacher["task_aware_old"], student["task_aware_old"]),
            ("new classes, told that they are new (task-aware)", teacher["task_aware_new"], student["task_aware_new"]),
        ],
        classes=_classes(
            student_checkpoint, metrics["classes"]["teacher"], metrics["classes"]["student"], **metrics["attention"]
        ),
        gallery=gallery,
        sorted_by="those whose map moved most first",
        checkpoint=student_checkpoint,
        counts=np.array(metrics["confusion"]),
    )


def in_turn(labels: Tensor, urgency: Any) -> list[int]:
    """At most ``SHOWN`` indices, the most urgent first: of each class in turn its most urgent, so that all are there.

    labels int64 (n,), urgency (n,).
    """
    order = sorted(range(len(labels)), key=lambda index: -float(urgency[index]))
    turns: dict[int, int] = {}
    rounds = []
    for index in order:
        label = int(labels[index])
        turns[label] = turns.get(label, -1) + 1
        rounds.append((turns[label], -float(urgency[index]), index))
    return sorted((index for _, _, index in sorted(rounds)[:SHOWN]), key=lambda index: -float(urgency[index]))


def _summary(teacher: dict[str, Any], student: dict[str, Any], answering: str) -> str:
    parts = []
    if student["accuracy_old"] is not None:
        parts.append(
            f"Asked over all classes, the student gets {student['accuracy_old']:.1f} % of the old classes' test images "
            f"right. The teacher, which knows no others, gets {teacher['accuracy_old']:.1f} % right."
        )
    if student["accuracy_new"] is not None:
        parts.append(f"Of the new classes' images the student gets {student['accuracy_new']:.1f} % right.")
    if parts:
        parts.append(f"Classifier of both: {answering}.")
    return " ".join(parts) or "There were no test images to judge it by."


def _classes(
    checkpoint: dict[str, Any],
    teacher: Sequence[float | None],
    student: Sequence[float | None],
    distance: Sequence[float | None] = (),
    overlap: Sequence[float | None] = (),
) -> list[dict[str, Any]]:
    """A row for each class: the task it came with, accuracies, what the student has lost of it, how its maps moved.

    All but ``student`` have the old classes alone.
    """
    came = [number for number, task in enumerate(checkpoint["tasks"]) for _ in task["classes"]]
    rows = []
    for index, name in enumerate(checkpoint["class_names"]):
        of_old = [values[index] if index < len(values) else None for values in (teacher, distance, overlap)]
        row: dict[str, Any] = dict(zip(("teacher", "distance", "overlap"), of_old, strict=True))
        row |= {"name": name, "task": came[index], "student": student[index]}
        row["lost"] = None if None in (row["teacher"], row["student"]) else row["teacher"] - row["student"]
        rows.append(row)
    return rows


def _confused(counts: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """(true class, answer, how often, of how many), the largest share first."""
    totals = counts.sum(1)
    pairs = [
        (counts[true, answer] / totals[true], names[true], names[answer], int(counts[true, answer]), int(totals[true]))
        for true, answer in zip(*np.nonzero(counts), strict=True)
        if true != answer
    ]
    return [pair[1:] for pair in sorted(pairs, key=lambda pair: -pair[0])[:CONFUSED]]


def _picture(images: Images, index: int, names: Sequence[str]) -> dict[str, Any]:
    label = int(images.labels[index])
    picture = plots.encode(images.pixels[index].numpy().transpose(1, 2, 0))
    return {"label": label, "name": names[label], "image": _uri(picture)}


def _map(
    role: str, images: Images, index: int, heat: Tensor, peak: float, logits: Tensor, names: Sequence[str], form: str
) -> dict[str, Any]:
    answer, probability = likeliest(logits.numpy(), form, names)[0]
    picture = plots.encode(plots.overlay(images.pixels[index].numpy(), heat.numpy(), peak))
    right = answer == names[int(images.labels[index])]
    return {"role": role, "image": _uri(picture), "answer": answer, "probability": probability, "right": right}


def _uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml" if b"<svg" in picture[:400] else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _write(path: Path, checkpoint: dict[str, Any], counts: np.ndarray, **content: Any) -> None:
    names, log = checkpoint["class_names"], checkpoint["training"].get("log", [])
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
        several=len(checkpoint["tasks"]) > 1,
        curves=_uri(plots.svg(plots.curves, log, "This task")) if log else None,
        confusion=_uri(plots.svg(plots.confusion, counts, names)) if counts.any() else None,
        confused=_confused(counts, names),
        tasks=checkpoint["tasks"],
        classifiers=checkpoint["classifiers"],
        answering=checkpoint.get("classifier", "head"),  # a teacher's page is of its head
        settings=[(name, value) for name, value in checkpoint["tasks"][-1].items() if name not in HIDDEN],
        network=[(name, checkpoint[name]) for name in ("architecture", "image_size", "mean", "std")],
        machine=list(checkpoint["training"].get("machine", {}).items()),
        crisp=checkpoint["image_size"] < 128,
    )
    write_atomically(path, page.encode())
