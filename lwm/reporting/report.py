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

from lwm.evaluation import Comparison
from lwm.images.datasets import Images
from lwm.probabilities import form_of, likeliest, probabilities_of
from lwm.reporting import plots
from lwm.runtime.checkpoint import write_atomically

SHOWN = 60  # images in the gallery: with their maps at 224 px they take some 3 MB
CONFUSED = 12  # rows of what is confused most
HIDDEN = ("classes", "group_accuracy", "data_dir")  # of a step's settings: shown elsewhere, or somebody's own paths


def of_teacher(path: Path, saved: dict[str, Any], images: Images, explained: tuple[Tensor, Tensor]) -> None:
    """The page of a first step: its test images, their logits (n, N) and the maps (n, h, w) of the true classes."""
    (logits, maps), names, form = explained, saved["class_names"], form_of(saved["loss_form"])
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
    accuracy = saved["steps"][-1]["group_accuracy"][0]
    said = "There were no test images to judge it by." if accuracy is None else ""
    counts = _counts(logits, images.labels, len(names))
    _write(
        path,
        title=f"Teacher of {len(names)} classes",
        summary=said or f"It answers {accuracy:.1f} % of the test images of its {len(names)} classes.",
        accuracies=[] if accuracy is None else [("all classes", None, accuracy)],
        classes=_classes(names, saved["steps"], None, _shares(counts)),
        gallery=gallery,
        sorted_by="least sure of the true class first",
        saved=saved,
        counts=counts,
    )


def of_student(path: Path, before: dict[str, Any], after: dict[str, Any], images: Images, found: Comparison) -> None:
    """The page of a later step, of its run or of demo.py: a teacher and its student on the same images.

    The checkpoints are as readout.use gives them.
    """
    names, metrics = after["class_names"], found.metrics
    position = {int(index): row for row, index in enumerate(found.shown)}
    chosen = [int(found.shown[row]) for row in in_turn(images.labels[found.shown], found.distance.nan_to_num(-1))]
    rows = [position[index] for index in chosen]
    peak = float(found.maps[rows].max()) if rows else 0.0
    gallery = []
    for index, row in zip(chosen, rows, strict=True):
        both = [
            _map(who, images, index, found.maps[row, side], peak, logits[index], names, form_of(saved["loss_form"]))
            for side, (who, logits, saved) in enumerate(
                (("teacher", found.teacher_logits, before), ("student", found.student_logits, after))
            )
        ]
        moved = f"moved by {found.distance[row]:.2f}, {found.overlap[row]:.0f} % of the strongest fifth in common"
        silent = "one of the maps is all zero"
        note = moved if found.distance[row] == found.distance[row] else silent
        gallery.append({**_picture(images, index, names), "maps": both, "note": note})
    teacher, student, old = metrics["teacher"], metrics["student"], len(before["class_names"])
    _write(
        path,
        title=f"Student of {len(names)} classes, {old} old and {len(names) - old} new",
        summary=_sentence(teacher, student, after["readout"]),
        accuracies=[
            ("all classes, no hint", teacher["accuracy"], student["accuracy"]),
            ("old classes, no hint", teacher["accuracy_old"], student["accuracy_old"]),
            ("new classes, no hint", teacher["accuracy_new"], student["accuracy_new"]),
            ("old classes, told that they are old (task-aware)", teacher["task_aware_old"], student["task_aware_old"]),
            ("new classes, told that they are new (task-aware)", teacher["task_aware_new"], student["task_aware_new"]),
        ],
        classes=_classes(names, after["steps"], metrics["classes"]["teacher"], metrics["classes"]["student"], metrics),
        gallery=gallery,
        sorted_by="those whose map moved most first",
        saved=after,
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


def _sentence(teacher: dict[str, Any], student: dict[str, Any], answering: str) -> str:
    parts = []
    if student["accuracy_old"] is not None:
        parts.append(
            f"Asked over all classes, the student answers {student['accuracy_old']:.1f} % of the old classes' test "
            f"images, where the teacher, which knows no others, answers {teacher['accuracy_old']:.1f} %."
        )
    if student["accuracy_new"] is not None:
        parts.append(f"Of the new classes' images it answers {student['accuracy_new']:.1f} %.")
    if parts:
        parts.append(f"Read-out of both: {answering}.")
    return " ".join(parts) or "There were no test images to judge it by."


def _classes(
    names: Sequence[str],
    steps: Sequence[dict[str, Any]],
    teacher: Sequence[float | None] | None,
    student: Sequence[float | None],
    metrics: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A row for each class: the step it came with, accuracies, what the student has lost of it, how its maps moved."""
    came = [number for number, step in enumerate(steps) for _ in step["classes"]]
    rows = []
    for index, name in enumerate(names):
        known, now = teacher[index] if teacher and index < len(teacher) else None, student[index]
        row: dict[str, Any] = {"name": name, "step": came[index], "teacher": known, "student": now}
        row["lost"] = None if known is None or now is None else known - now
        for column in ("distance", "overlap"):
            values = metrics["attention"][column] if metrics else []
            row[column] = values[index] if index < len(values) else None
        rows.append(row)
    return rows


def _shares(counts: np.ndarray) -> list[float | None]:
    totals = counts.sum(1)
    return [100 * counts[i, i] / total if total else None for i, total in enumerate(totals)]


def _counts(logits: Tensor, labels: Tensor, classes: int) -> np.ndarray:
    from lwm.evaluation import confusion

    return confusion(logits, labels).numpy() if len(labels) else np.zeros((classes, classes), int)


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
    pixels = plots.overlay(images.pixels[index].numpy(), None, 0.0)
    return {"label": label, "name": names[label], "image": _uri(pixels)}


def _map(
    who: str, images: Images, index: int, heat: Tensor, peak: float, logits: Tensor, names: Sequence[str], form: str
) -> dict:
    answer, probability = likeliest(logits.numpy(), form, names)[0]
    picture = plots.overlay(images.pixels[index].numpy(), heat.numpy(), peak)
    right = answer == names[int(images.labels[index])]
    return {"who": who, "image": _uri(picture), "answer": answer, "probability": probability, "right": right}


def _uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml" if b"<svg" in picture[:400] else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _write(path: Path, saved: dict[str, Any], counts: np.ndarray, classes: list[dict], **content: Any) -> None:
    names, log = saved["class_names"], saved["training"].get("log", [])
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
        classes=classes,
        several=len(saved["steps"]) > 1,
        curves=_uri(plots.svg(plots.curves, log, "This step")) if log else None,
        confusion=_uri(plots.svg(plots.confusion, counts, names)) if counts.any() else None,
        confused=_confused(counts, names),
        steps=saved["steps"],
        readouts=saved["readouts"],
        answering=saved.get("readout", "head"),  # a teacher's page is of its head
        settings=[(name, value) for name, value in saved["steps"][-1].items() if name not in HIDDEN],
        network=[(name, saved[name]) for name in ("architecture", "image_size", "mean", "std")],
        machine=list(saved["training"].get("machine", {}).items()),
        crisp=saved["image_size"] < 128,
    )
    write_atomically(path, page.encode())
