"""The page of a run: one HTML file that needs nothing from the network. report.html.jinja is its template.

Whatever is in it, class names and file names too, may come from a stranger: it is escaped, and the page allows itself
no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lwm import estimate, verdict
from lwm.evaluation import LONGER, Comparison, Side, View, accuracies, class_accuracies, confusion
from lwm.images.batches import Images
from lwm.probabilities import likeliest
from lwm.reporting import plots
from lwm.runtime.errors import listed
from lwm.runtime.files import write_atomically

CONFUSED = 12  # rows of what is confused most
DRAWN = 100  # classes of which a confusion matrix can still be read
# Of a task's settings: shown elsewhere, or somebody's own paths.
HIDDEN = ("classes", "again", "group_accuracy", "answers", "data_dir", "judged", "apart")


def of_teacher(path: Path, images: Images, side: Side, views: dict[int, list[View]]) -> None:
    """The page of task 0: a network's answers to its test images, and the maps of evaluation.explain."""
    names, labels = side.checkpoint["class_names"], images.labels
    of_classes = class_accuracies(side.logits, labels)
    student = accuracies(side.logits, labels, len(names))
    counts = confusion(side.logits, labels).numpy()
    _write(
        path,
        side.checkpoint,
        counts,
        title=f"Teacher of {len(names)} classes",
        verdict=verdict.of_teacher(student["accuracy"], counts.tolist(), names),
        identity=identity(images, side),
        teacher=None,
        estimated="",
        student=student,
        classes=_classes(side.checkpoint, counts.sum(1).tolist(), [], of_classes, [], []),
        cards=_cards(images, [side], views, {}),
        groups=[{"accuracy": student["accuracy"], "forgetting": None}],
    )


def of_student(path: Path, images: Images, comparison: Comparison) -> None:
    """The page of a later task, of its run or of demo.py: a teacher and its student on the same images."""
    teacher, student = (side.checkpoint for side in comparison.sides)
    names, metrics, old = student["class_names"], comparison.metrics, len(teacher["class_names"])
    notes = {}
    for index, distance, overlap in zip(comparison.shown, comparison.distance, comparison.overlap, strict=True):
        moved = f"moved by {distance:.2f}, {overlap:.0f} % of the strongest fifth in common"
        notes[int(index)] = "one of the two maps of the true class is zero" if distance.isnan() else moved
    of_classes, attention = metrics["classes"], metrics["attention"].values()
    answers = student["tasks"][-1]["answers"]  # none if classes were edited since
    columns = of_classes["images"], of_classes["teacher"], of_classes["student"], *attention
    _write(
        path,
        student,
        np.array(metrics["confusion"]),
        title=f"Student of {len(names)} classes, {old} old and {len(names) - old} new"
        + (f", with more images of {listed(again)}" if (again := student["tasks"][-1]["again"]) else ""),
        verdict=verdict.of_student(metrics, student["classifiers"]),
        identity=identity(images, *comparison.sides),
        teacher=metrics["teacher"] | {"classifier": teacher.get("classifier", "head")},
        student=metrics["student"],
        estimated=estimate.said(answers["kept"]) if answers else "",
        classes=_classes(student, *columns),
        cards=_cards(images, comparison.sides, comparison.views, notes),
        old=old,
        groups=metrics["tasks"],
    )


def identity(images: Images, *sides: Side) -> str:
    """A hash of what a page shows: the images, and of each side the classifier and the answers."""
    shown = [(side.checkpoint.get("classifier", "head"), side.logits.argmax(1).tolist()) for side in sides]
    return hashlib.sha256(json.dumps([images.fingerprint(), shown]).encode()).hexdigest()


def shows(path: Path, identity: str) -> bool:
    """Whether there is a page that shows what ``identity`` is of."""
    return path.is_file() and f'content="{identity}"' in path.read_text(errors="replace")


def _cards(
    images: Images, sides: Sequence[Side], views: dict[int, list[View]], notes: dict[int, str]
) -> list[dict[str, Any]]:
    """The images of the gallery: each with its maps, on a scale of their own, and what each side answers."""
    names = sides[-1].checkpoint["class_names"]
    largest = max((float(view.heat.max()) for each in views.values() for view in each), default=0.0)
    cards = []
    for index, own in views.items():
        pixels, label = images.pixels[index].numpy(), int(images.labels[index])
        maps = []
        for role, shown, heat in own:
            peak = float(heat.max())
            picture = uri(plots.encode(plots.overlay(pixels, heat.numpy(), peak)))
            strength = 100 * peak / largest if peak else None
            maps.append({"role": role, "image": picture, "of": names[shown], "strength": strength})
        answers = []
        for side in sides:
            if label >= side.logits.shape[1]:  # a teacher has no word for it
                continue
            answer, probability = likeliest(side.logits[index].numpy(), names)[0]
            answers.append((side.role, answer, 100 * probability, answer == names[label]))
        card = {"label": label, "name": names[label], "image": uri(plots.encode(pixels.transpose(1, 2, 0)))}
        cards.append(card | {"maps": maps, "answers": answers, "note": notes.get(index, "")})
    return cards


def _classes(checkpoint: dict[str, Any], *columns: Sequence[float | None]) -> list[dict[str, Any]]:
    """A row for each class: the task it came with, how many images judge it, accuracies with the last one's interval,
    what the student has lost of it, how its maps moved.

    ``columns`` are the images, the teacher's and the student's accuracies, distance and overlap; the teacher's and the
    last two have the old classes alone.
    """
    came = [number for number, task in enumerate(checkpoint["tasks"]) for _ in task["classes"]]
    names = ("name", "task", "images", "teacher", "student", "distance", "overlap")
    cells = itertools.zip_longest(checkpoint["class_names"], came, *columns)
    rows = [dict(zip(names, row, strict=True)) for row in cells]
    for row in rows:
        row["lost"] = None if None in (row["teacher"], row["student"]) else row["teacher"] - row["student"]
    return rows


def _between(percent: float | None, images: int) -> str:
    return "" if percent is None else "{:.0f} to {:.0f}".format(*verdict.interval(percent, images))


def _confused(counts: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """(true class, answer, how often, of how many), the largest share first."""
    totals = counts.sum(1)
    wrong = [(true, answer) for true, answer in zip(*np.nonzero(counts), strict=True) if true != answer]
    wrong.sort(key=lambda pair: -counts[pair] / totals[pair[0]])
    return [(names[true], names[answer], counts[true, answer], totals[true]) for true, answer in wrong[:CONFUSED]]


def environment() -> jinja2.Environment:
    """Of the templates beside this module; a text of a stranger is escaped in them."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"source_hash": _hash, "listed": listed}
    templates.globals |= {"between": _between, "longer": LONGER}
    return templates


def uri(picture: bytes) -> str:
    """A picture in an HTML page."""
    kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml" if b"<svg" in picture[:400] else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _write(path: Path, checkpoint: dict[str, Any], counts: np.ndarray, **content: Any) -> None:
    names, training, rows = checkpoint["class_names"], checkpoint["training"], content["classes"]
    first = list(range(len(rows)))
    if len(rows) > verdict.NOTABLE:
        first = verdict.notable(*([row[side] for row in rows] for side in ("teacher", "student")))
    drawn = counts.any() and len(names) <= DRAWN
    template = environment().get_template("report.html.jinja")
    page = template.render(
        **content,
        checkpoint=checkpoint,
        images=counts.sum(1),
        answering=checkpoint.get("classifier", "head"),
        several=content["teacher"] is not None,
        first=[rows[label] for label in first],
        curves=uri(plots.svg(plots.curves, training["log"], "This task")) if "log" in training else None,
        confusion=uri(plots.svg(plots.confusion, counts, names)) if drawn else None,
        confused=_confused(counts, names),
        settings={name: value for name, value in checkpoint["tasks"][-1].items() if name not in HIDDEN},
    )
    write_atomically(path, page.encode())
