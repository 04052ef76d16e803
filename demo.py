"""Judge teacher and student side by side on test images that no step has trained on, and show what they look at.

    python3 demo.py --teacher runs/first/teacher_model.pth --student runs/first/student_model.pth

Writes demo_report.html, metrics.json, demo.png (old-class images, answers, Grad-CAM maps on one scale) and
demo_confusion.png.
``--images folder/`` judges your own images instead: with a subfolder for each class they count as test images,
flat they get answers and maps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.settings import Settings, read_settings

if TYPE_CHECKING:
    from torch import Tensor

    from lwm.images.datasets import Images

SHOWN = 8  # images in demo.png


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    settings = read_settings("demo", argv)

    import numpy as np
    import torch

    from lwm import classifiers, evaluation
    from lwm.images.datasets import Images
    from lwm.reporting import plots, report
    from lwm.runtime import hardware, progress
    from lwm.runtime.checkpoint import load, make_folder, restore_model, write_atomically

    with settings.naming("device"):
        device = hardware.pick_device(settings.device)
    with settings.naming("teacher"):
        before = load(settings.teacher)
        teacher = hardware.to_device(restore_model(before), device)
    with settings.naming("student"):
        after = load(settings.student)
        student = hardware.to_device(restore_model(after), device)
    names, old = after["class_names"], len(before["class_names"])
    no_student = f"--student {settings.student} is no student of --teacher {settings.teacher}"
    if names[:old] != before["class_names"] or len(names) == old:
        raise InputError(f"{no_student}: it does not continue its classes")
    for name in ("architecture", "image_size"):  # the maps of both would differ in size
        if before[name] != after[name]:
            raise InputError(f"{no_student}: {name} is {after[name]} there and {before[name]} here")
    images, captions, gone = images_to_judge(settings, after)
    if not len(images.pixels):
        raise InputError("no test images of any class are left; name some with --data-dir or --images")
    judged = images.labels >= 0
    labelled = Images(images.pixels[judged], images.labels[judged])
    statistics = evaluation.of_statistics(student, before, after, labelled)
    heads = teacher, student
    answering = classifiers.chosen(settings.readout, after, before)
    if settings.readout == "auto":
        print(f"READOUT = {answering} (auto, of this student)")
    with settings.naming("teacher"):
        teacher, before = classifiers.use(teacher, before, answering)
    with settings.naming("student"):
        student, after = classifiers.use(student, after, answering)
    found = evaluation.compare(teacher, student, before, after, images, history=not settings.images, heads=heads)
    output = Path(settings.output_dir)
    make_folder(output)
    metrics = {"readout": answering} | found.metrics | statistics

    if judged.any():
        if gone:
            print(f"no test images of {', '.join(gone)}: their accuracy is left empty")
        print_table(metrics, before["class_names"])
        progress.print_readouts(metrics["readouts"], answering)
        print_off(metrics)
        write_atomically(output / "metrics.json", json.dumps(metrics, indent=1).encode())
        plots.confusion(np.array(metrics["confusion"]), names, output / "demo_confusion.png")
    else:
        for caption, logits in zip(captions, found.student_logits, strict=True):
            print(f"{caption}: {say(logits, names, after['loss_form'])}")

    chosen = pick_images(images.labels, old)
    pixels = images.pixels[chosen]
    # One class for both maps: the true one, or for an image without a label the teacher's answer.
    labels = images.labels[chosen]
    explained = torch.where((labels >= 0) & (labels < old), labels, found.teacher_logits[chosen].argmax(1))
    both = [
        evaluation.maps(model, pixels, explained, saved["mean"], saved["std"])
        for model, saved in zip(heads, (before, after), strict=True)
    ]
    rows = [
        (
            f"{captions[index]}\nmap of {names[explained[row]]}",
            f"teacher: {say(found.teacher_logits[index], names, before['loss_form'])}",
            f"student: {say(found.student_logits[index], names, after['loss_form'])}",
        )
        for row, index in enumerate(chosen)
    ]
    if judged.any():
        report.of_student(output / "demo_report.html", before, after | {"readouts": metrics["readouts"]}, images, found)
    title = "What the teacher and the student answer, and where they look"
    plots.side_by_side(pixels.numpy(), rows, torch.stack(both, dim=1).numpy(), title, output / "demo.png")
    print(f"the pictures{', metrics.json and demo_report.html' if judged.any() else ''} are in {output}")
    shown = ("readout", "teacher", "student") if judged.any() else ("readout",)
    progress.last_line(settings, {name: metrics[name] for name in shown})


def images_to_judge(settings: Settings, after: dict) -> tuple[Images, list[str], list[str]]:
    """The images, a caption for each, and the classes that have none; label -1 where the true class is unknown."""
    from lwm.images.datasets import Place, find_test_images, open_source, read_own_images, test_places

    if settings.images:
        # "--images" is in what it raises already.
        return read_own_images(
            Path(settings.images), after["class_names"], after["image_size"], settings.skip_bad_images
        )
    here, cache = Place(settings.dataset, settings.data_dir), Path(settings.cache_dir)
    asked = bool(settings.given & {"dataset", "data_dir"})
    if asked:  # the search below goes on to the recorded places, which would hide that these images are not there
        with settings.naming("data_dir"):
            open_source(here, after["image_size"], settings.skip_bad_images, cache)
    places = test_places(after["steps"], here, here_first=asked)
    images, gone = find_test_images(places, after["image_size"], settings.skip_bad_images, cache)
    return images, [f"true: {after['class_names'][label]}" for label in images.labels], gone


def say(logits: Tensor, names: list[str], form: str) -> str:
    """The answer and its probability, by the form of its network's answers."""
    from lwm.probabilities import form_of, likeliest

    ((answer, probability),) = likeliest(logits.numpy(), form_of(form), names)
    return f"{answer} {100 * probability:.0f} %"


def pick_images(labels: Tensor, old: int) -> list[int]:
    """Indices of images to show, old classes first and in turn; where no label is known, the first ones."""
    by_class = [[i for i, label in enumerate(labels.tolist()) if label == name] for name in range(old)]
    by_class = [indices for indices in by_class if indices]
    chosen = [indices[turn] for turn in range(SHOWN) for indices in by_class if turn < len(indices)]
    return (chosen or list(range(len(labels))))[:SHOWN]


def print_table(metrics: dict, old_names: list[str]) -> None:
    """The accuracies as a table: without a hint first, task-aware beside it."""

    def cell(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.1f}"

    print("accuracy, %            teacher  student")
    for label, key in (
        ("all classes, no hint", "accuracy"),
        ("  old classes", "accuracy_old"),
        ("  new classes", "accuracy_new"),
        ("task-aware, old", "task_aware_old"),
        ("task-aware, new", "task_aware_new"),
    ):
        print(f"{label:<22}  {cell(metrics['teacher'][key])}   {cell(metrics['student'][key])}")
    since = "forgotten" if metrics["readout"] == "head" else "lost since the teacher"
    for number, step in enumerate(metrics["steps"]):
        print(f"step {number} ({', '.join(step['classes'][:6])}{', ...' if len(step['classes']) > 6 else ''}):", end="")
        print(f" {cell(step['accuracy'])}, {since} {cell(step['forgetting'])} points")
    print("class by class         teacher  student  attention of the heads: distance, overlap %")
    classes, attention = metrics["classes"], metrics["attention"]
    for index, name in enumerate(classes["names"]):
        known, moved = None, ""
        if index < len(old_names):
            known = classes["teacher"][index]
            distance, overlap = attention["distance"][index], attention["overlap"][index]
            moved = "" if distance is None else f"{distance:20.2f}  {cell(overlap)}"
        print(f"  {name:<20}  {cell(known)}   {cell(classes['student'][index])}{moved}")


def print_off(metrics: dict) -> None:
    """How far the student's statistics of the old classes are from those of their test images, mean over classes."""
    for name, unit in (("means", "of a class's spread"), ("covariances", "of their norm")):
        both = metrics[f"{name}_off"].items()
        off = {when: [value for value in values if value is not None] for when, values in both}
        if off and all(off.values()):
            carried, left = mean(off["carried"]), mean(off["left"])
            print(f"{name} of old classes are off by {carried:.2f} {unit}; left as they were it would be {left:.2f}")


if __name__ == "__main__":
    sys.exit(main())
