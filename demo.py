"""Judge teacher and student side by side on test images that no task has trained on, and show what they look at.

    python3 demo.py --teacher runs/first/teacher_model.pth --student runs/first/student_model.pth

Writes metrics.json, demo.png (old-class images, answers, Grad-CAM maps on one scale), demo_confusion.png, and
demo_report.html where the page of the student's run shows other images or another classifier.
``--images folder/`` judges your own images instead. With one subfolder per class you get accuracies; with a flat
folder, predictions and maps. ``--serve`` opens a page to drop pictures on.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwm import Classifier, classifiers, evaluation, models, verdict
from lwm.images.batches import Images
from lwm.images.datasets import Place, open_source
from lwm.images.judging import find_test_images, read_own_images
from lwm.probabilities import is_unknown, likeliest, share_of
from lwm.reporting import plots, report
from lwm.reporting.serve import serve
from lwm.runtime import hardware, progress
from lwm.runtime.checkpoint import batch_size_of, load, restore_model
from lwm.runtime.errors import InputError, listed, log, one_line_errors
from lwm.runtime.files import make_folder, require_folder, write_atomically
from lwm.runtime.settings import Settings, read_settings

SHOWN = 8  # images in demo.png


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    settings = read_settings("demo", argv, classifier=classifiers.NAMES)
    output = Path(settings.output_dir)
    require_folder(settings.where("output_dir"), output)
    with settings.naming("device"):
        device = hardware.pick_device(settings.device)
    with settings.naming("model"):
        own = models.builder(settings.model)
    with settings.naming("teacher"):
        teacher_checkpoint = load(settings.teacher)
    with settings.naming("student"):
        student_checkpoint = load(settings.student)
    require_student_of(teacher_checkpoint, student_checkpoint, settings)
    if settings.serve:
        sides = {}
        for role, saved in (("teacher", teacher_checkpoint), ("student", student_checkpoint)):
            with settings.naming(role):
                sides[role] = Classifier(saved, settings.classifier, own)
        return serve(settings.serve, sides, share_of(settings.unknown or "0.05"))
    with settings.naming("teacher"):
        teacher = hardware.to_device(restore_model(teacher_checkpoint, own), device)
    with settings.naming("student"):
        student = hardware.to_device(restore_model(student_checkpoint, own), device)
    names, old = student_checkpoint["class_names"], len(teacher_checkpoint["class_names"])
    images, captions = images_to_judge(settings, student_checkpoint)
    if not len(images.pixels):
        raise InputError("no test images of any class are left; name some with --data-dir or --images")
    judged, batch_size = images.labels >= 0, batch_size_of(student_checkpoint)

    answering = classifiers.choose(settings.classifier, student_checkpoint)
    if settings.classifier == "auto":
        log.info(f"CLASSIFIER = {answering} (auto, of this student)")
    labelled = Images(images.pixels[judged], images.labels[judged])
    with settings.naming("student"):
        of_statistics = evaluation.of_statistics(student, teacher_checkpoint, student_checkpoint, labelled, batch_size)
    heads = teacher, student
    with settings.naming("teacher"):
        teacher, teacher_checkpoint = classifiers.answer_with(teacher, teacher_checkpoint, settings.classifier)
    with settings.naming("student"):
        student, student_checkpoint = classifiers.answer_with(student, student_checkpoint, answering)
    comparison = evaluation.compare(
        teacher,
        student,
        teacher_checkpoint,
        student_checkpoint,
        images,
        batch_size,
        history=not settings.images,
        heads=heads,
    )
    answers_with = {"classifier": answering, "teacher_classifier": teacher_checkpoint["classifier"]}
    metrics = answers_with | comparison.metrics | of_statistics
    teacher_logits, student_logits = (side.logits for side in comparison.sides)

    # One class for both maps: the true one, or for an image without a label the teacher's answer.
    chosen = pick_images(images.labels, old)
    pixels, labels = images.pixels[chosen], images.labels[chosen]
    wanted = torch.where((labels >= 0) & (labels < old), labels, teacher_logits[chosen].argmax(1))
    maps = [
        evaluation.maps(model, pixels, wanted, checkpoint["mean"], checkpoint["std"], batch_size)
        for model, checkpoint in zip(heads, (teacher_checkpoint, student_checkpoint), strict=True)
    ]
    teacher_says, student_says = answers(teacher_logits, names), answers(student_logits, names)
    if settings.unknown:
        quantiles = student_checkpoint["unknown"].get(answering, [])
        unknown = is_unknown(student_logits.numpy(), quantiles, share_of(settings.unknown))
        student_says = ["unknown" if odd else said for odd, said in zip(unknown, student_says, strict=True)]
    rows = [
        (f"{captions[i]}\nmap of {names[label]}", f"teacher: {teacher_says[i]}", f"student: {student_says[i]}")
        for i, label in zip(chosen, wanted, strict=True)
    ]

    zero = sum(not heat.any() for side in maps for heat in side)
    if zero:
        log.info(f"{zero} of the {2 * len(chosen)} maps in demo.png are zero everywhere")
    make_folder(output)
    title = "What the teacher and the student answer, and where they look"
    plots.side_by_side(pixels.numpy(), rows, torch.stack(maps, dim=1).numpy(), title, output / "demo.png")
    say, shown, written, page = progress.results(settings), ["classifier"], "", ""
    if judged.any():
        write_atomically(output / "metrics.json", json.dumps(metrics, indent=1).encode())
        plots.confusion(np.array(metrics["confusion"]), names, output / "demo_confusion.png")
        student_checkpoint["classifiers"] = metrics["classifiers"]
        say(verdict.of_student(metrics, metrics["classifiers"]))
        say(accuracy_table(metrics))
        shown = ["classifier", "teacher_classifier", "lost", "teacher", "student"]
        page = write_page(settings, output / "demo_report.html", images, comparison)
        written = " and metrics.json"
    else:
        for caption, answer in zip(captions, student_says, strict=True):
            say(f"{caption}: {answer}")
    say(f"the pictures{written} are in {output}{page}")
    progress.print_json(settings, {name: metrics[name] for name in shown})


def write_page(settings: Settings, page: Path, images: Images, comparison: evaluation.Comparison) -> str:
    """Writes the page, unless that of the student's own run shows the same answers. Returns where it is."""
    runs = Path(settings.student).with_name("student_report.html")
    if report.shows(runs, report.identity(images, *comparison.sides)):
        page.unlink(missing_ok=True)  # of other images or another classifier
        return f"; their page is that of the student's run, {runs}"
    report.of_student(page, images, comparison)
    return f"; their page is {page}"


def require_student_of(
    teacher_checkpoint: dict[str, Any], student_checkpoint: dict[str, Any], settings: Settings
) -> None:
    """Raises InputError if the two checkpoints cannot be compared."""
    no_student = f"--student {settings.student} is no student of --teacher {settings.teacher}"
    old, names = teacher_checkpoint["class_names"], student_checkpoint["class_names"]
    tasks = [len(checkpoint["tasks"]) for checkpoint in (teacher_checkpoint, student_checkpoint)]
    if names[: len(old)] != old or tasks[0] >= tasks[1]:
        raise InputError(f"{no_student}: it does not continue its classes")
    for name in ("architecture", "image_size"):  # the maps of both would differ in size
        one, other = student_checkpoint[name], teacher_checkpoint[name]
        if one != other:
            raise InputError(f"{no_student}: {name} is {one} there and {other} here")


def images_to_judge(settings: Settings, checkpoint: dict[str, Any]) -> tuple[Images, list[str]]:
    """The images and a caption for each; label -1 if the true class is unknown."""
    names, size = checkpoint["class_names"], checkpoint["image_size"]
    if settings.images:  # the errors below name --images already
        return read_own_images(Path(settings.images), names, size, settings.skip_bad_images)
    cache, asked = Path(settings.cache_dir), bool(settings.given & {"dataset", "data_dir"})
    # Another folder alone has images of the kind that the student was trained on, whatever config.py says.
    moved = asked and "dataset" not in settings.given
    here = Place(checkpoint["tasks"][-1]["dataset"] if moved else settings.dataset, settings.data_dir)
    if asked:  # the search below goes on to the recorded places, which would hide that these images are not there
        with settings.naming("data_dir"):
            open_source(here, size, settings.skip_bad_images, cache)
    images = find_test_images(checkpoint["tasks"], size, settings.skip_bad_images, cache, here, here_first=asked)
    return images, [f"true: {names[label]}" for label in images.labels]


def answers(logits: Tensor, names: list[str]) -> list[str]:
    """For each row of logits (n, classes) the answer and its probability."""
    best = [likeliest(row, names)[0] for row in logits.numpy()]
    return [f"{name} {100 * probability:.0f} %" for name, probability in best]


def pick_images(labels: Tensor, old: int) -> list[int]:
    """Indices of images to show, old classes first and in turn; without any such label, the first ones."""
    by_class = [(labels == label).nonzero().flatten().tolist() for label in range(old)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_class))
    return ([index for index in turns if index is not None] or list(range(len(labels))))[:SHOWN]


def accuracy_table(metrics: dict[str, Any]) -> str:
    """The accuracies as text: among all classes, told old or new, by task, by class and by classifier."""

    def cell(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.1f}"

    lines = ["accuracy, %            teacher  student"]
    for label, key in (
        ("all classes", "accuracy"),
        ("  old classes", "accuracy_old"),
        ("  new classes", "accuracy_new"),
        ("told old, old classes", "told_old"),
        ("told new, new classes", "told_new"),
    ):
        lines.append(f"{label:<22}  {cell(metrics['teacher'][key])}   {cell(metrics['student'][key])}")
    since = "forgotten" if metrics["classifier"] == "head" else "lost since the teacher"
    for number, task in enumerate(metrics["tasks"]):
        lost = f"{since} {cell(task['forgetting'])} points"
        lines.append(f"task {number} ({listed(task['classes'], 6)}): {cell(task['accuracy'])}, {lost}")
    lines.append("class by class         teacher  student  attention of the heads: distance, overlap %")
    classes, attention = metrics["classes"], metrics["attention"]
    columns = classes["names"], classes["teacher"], classes["student"], attention["distance"], attention["overlap"]
    rows = list(itertools.zip_longest(*columns))
    several = len(rows) > verdict.NOTABLE
    for position in verdict.notable(classes["teacher"], classes["student"]) if several else range(len(rows)):
        class_name, teacher, student, distance, overlap = rows[position]
        moved = "" if distance is None else f"{distance:20.2f}  {cell(overlap)}"
        lines.append(f"  {class_name:<20}  {cell(teacher)}   {cell(student)}{moved}")
    if several:
        lines.append("  the others lost less or have no images (metrics.json has all)")
    if metrics["classifiers"]:
        lines.append(evaluation.classifier_table(metrics["classifiers"], metrics["classifier"]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
