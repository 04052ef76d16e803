"""One task: a model that knows the old classes learns NEW_CLASSES from their images alone.

    python3 incremental_learning_system.py --teacher runs/first/teacher_model.pth

The teacher may be the student of an earlier task. Architecture, class names, normalisation and image size come from
its checkpoint. The old classes' training images are sealed: the data layer refuses to hand them out. NEW_CLASSES may
name old classes too if METHOD is set: these get more images.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from lwm import attention, calibration, classifiers, closed_form, estimate, evaluation, models, sharpness, verdict
from lwm.images.batches import to_input
from lwm.images.datasets import Place, open_source
from lwm.images.judging import find_test_images
from lwm.losses import METHODS, distil, loss_form, of_named
from lwm.reporting import plots, report, tensorboard
from lwm.runtime import distributed, hardware, progress, recommended
from lwm.runtime.checkpoint import AT_A_TIME, fingerprint, load, restore_model
from lwm.runtime.errors import InputError, log, one_line_errors
from lwm.runtime.run_folder import command_with, describe_task, open_run_folder
from lwm.runtime.settings import Settings, read_settings
from lwm.task import Task, new_classes, student_of
from lwm.training import Training


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    settings = read_settings("incremental_learning_system", argv, method=METHODS, classifier=classifiers.NAMES)
    settings, device = hardware.prepare(settings)
    with settings.naming("teacher"):
        teacher_checkpoint = load(settings.teacher)
    old = teacher_checkpoint["class_names"]
    pretrained = any(task["pretrained"] for task in teacher_checkpoint["tasks"])
    here = Place(settings.dataset, settings.data_dir, settings.hold_back, calibration=settings.calibration)
    if settings.new_classes == ("all",):
        with settings.naming("data_dir"):
            source = open_source(here, 8)
        with settings.naming("new_classes"):
            settings = dataclasses.replace(settings, new_classes=new_classes(source, old))
    named, cache = list(settings.new_classes), Path(settings.cache_dir)
    new, again = ([name for name in named if (name in old) is known] for known in (False, True))
    if again and settings.method is None:  # the same command twice is not to count its images twice
        raise InputError(
            f"{settings.where('new_classes')}: the teacher already knows {again[0]!r}; take it out, or give it more "
            "images with --method closed-form or lwm"
        )
    size, channels = teacher_checkpoint["image_size"], (teacher_checkpoint["mean"], teacher_checkpoint["std"])
    with settings.naming("data_dir"):
        source = open_source(here, size, settings.skip_bad_images, cache)
        images = [len(source.parts(name).train) for name in named]
    settings = recommended.method(settings, pretrained, sum(images) // len(images))
    method = METHODS[settings.method]
    teachers_form = "binary" if teacher_checkpoint["loss_form"] == "binary" else "softmax"
    if method.loss is None:
        teachers_form = closed_form.form_after(teacher_checkpoint, len(again))
    form = loss_form(settings, teachers_form)
    if method.loss and method.form is None and settings.loss_form is None:
        log.info(f"LOSS_FORM = {form} (the teacher's)")
    settings = dataclasses.replace(settings, loss_form=form, epochs=settings.epochs if method.loss else 0)
    check_against(teacher_checkpoint, settings)
    run_folder = open_run_folder(settings, "student")
    if run_folder.resumed and method.loss is None:
        raise InputError(f"--method {settings.method} has no training to resume; begin anew with --overwrite")

    source.seal([name for name in old if name not in again])
    with settings.naming("new_classes"):
        source.require_classes(named)
        if len(again) == len(old) and method.asks_teacher:
            raise InputError("every class of the teacher is named, so that none is left to distil; take closed-form")
    taught = teacher_checkpoint["tasks"]
    test = find_test_images(taught, size, settings.skip_bad_images, cache, here, source=source, new=new)
    train, held = source.train(named, old + new), source.held_back(named, old + new)
    counts = (
        f"{len(train.labels)} training images of {len(new)} new classes, {len(again) or 'none'} of {len(old)} old ones"
    )
    log.info(f"{counts}, on {device}")
    if method.loss:
        settings = recommended.by_images(
            settings, len(train.labels), "incremental_lr", pretrained, measured=method.asks_teacher
        )
    batch_size = settings.batch_size or AT_A_TIME

    with settings.naming("model"):
        own = models.builder(settings.model)
    with settings.naming("teacher"):
        teacher, student = (restore_model(teacher_checkpoint, own) for _ in range(2))
    teacher = models.fold_batch_norm(teacher) if method.trains_backbone else teacher
    teacher.requires_grad_(False)
    teacher, student = hardware.to_device(teacher, device), hardware.to_device(student, device)

    task = Task(teacher, student, teacher_checkpoint, train, test, method.trains_backbone, batch_size, settings.favour)
    begins_closed = method.loss is None or settings.new_rows == "closed-form"
    if begins_closed:
        task.warn(sigmoids=teachers_form == "binary")
    torch.manual_seed(settings.seed)  # just before the new rows are drawn: what was built before them does not count
    if method.loss is None:
        models.replace_head(student, *task.head())
    else:
        models.widen_head(student, len(new))
        if settings.loss_form == "binary":
            models.start_at_prior(student, first=len(old))
        if begins_closed and new:
            models.set_last_rows(student, *(rows[len(again) :] for rows in task.new_rows()))
    if not method.trains_backbone:
        models.freeze_backbone(student)
    with settings.naming("freeze"):
        models.freeze(student, settings.freeze)
    if method.loss and settings.incremental_lr is None:
        distilling = of_named(distil, task.again, len(old), len(old) + len(new))
        rate = sharpness.stable_rate(student, teacher, train, channels, len(old), settings, distilling)
        settings = dataclasses.replace(settings, incremental_lr=rate)
    if method.asks_teacher:
        attention.require_closed_form(teacher, to_input(train.pixels[: min(8, batch_size)], *channels))
    record = source.record(test, len(old))
    described = describe_task(settings, new, settings.incremental_lr, record, again=again, images=len(train.labels))
    checkpoint = student_of(teacher_checkpoint, described)
    sizes = [len(task["classes"]) for task in checkpoint["tasks"]]
    if run_folder.resumed is None and method.loss:
        warn_of_mixed_forms(teacher_checkpoint["loss_form"], settings.loss_form)
    board = tensorboard.Board(settings, run_folder.folder, "student")

    def evaluate(logits: torch.Tensor | None = None) -> dict[str, Any]:
        """Of the student as it is now: the log's columns, and the accuracy of each task's classes."""
        if logits is None:
            logits = evaluation.predict(student, test.pixels, *channels, batch_size)
        checkpoint["tasks"][-1]["group_accuracy"] = evaluation.group_accuracies(logits, test.labels, sizes)
        columns = evaluation.accuracies(logits, test.labels, len(old))
        columns["task_aware"] = evaluation.task_aware(logits, test.labels, sizes)
        return {f"test_{name}": value for name, value in columns.items()}

    def add_statistics() -> None:
        """Of all classes, and what each classifier makes of them."""
        statistics = task.statistics() if settings.statistics else None
        if statistics is not None:
            checkpoint["statistics"] = classifiers.to_checkpoint(statistics)
            checkpoint["classifiers"] = task.by_classifier(statistics)
        calibration.calibrate(student, checkpoint, statistics, held, batch_size, teacher_checkpoint)
        described["answers"] = task.answers(checkpoint)

    if method.loss is None:
        log_row = evaluate(task.logits("student"))
        add_statistics()
        described["seconds"] = round(task.seconds * len(train.labels), 1)
        with run_folder.writing():
            run_folder.save({**checkpoint, "model": student.state_dict(), "finished": True, "training": {}})
        distributed.leave()
    else:
        asked, teacher_hash = teacher if method.asks_teacher else None, fingerprint(teacher_checkpoint)
        loss = of_named(method.loss, task.again, len(old), len(old) + len(new))
        with Training(
            run_folder, checkpoint, student, train, loss, settings, asked, len(old), teacher_hash
        ) as training:
            for row in training.epochs():
                if training.is_due(row):
                    if row["epoch"] == settings.epochs:
                        training.save()  # whatever fails from now on, the training is done
                    row |= evaluate()
                    training.save()
                log.info(progress.line_of(row, settings.epochs, training.seconds_left))
                board.write(row)
            if not training.is_done:
                if "test_accuracy" not in training.log[-1]:  # it failed when the epoch was judged
                    training.log[-1] |= evaluate()
                    run_folder.write_log(training.log)
                add_statistics()
                described["seconds"] = round(training.seconds, 1)
                training.save(finished=True)
        log_row = training.log[-1]
    if distributed.rank():  # of several processes the first one reports
        return

    saved = load(run_folder.model)
    if saved["training"]:
        plots.curves(saved["training"]["log"], f"Student ({settings.method})", run_folder.curves)
    asked = settings.classifier if saved["statistics"] else "head"
    heads = teacher, student
    teacher, teacher_answering = classifiers.answer_with(teacher, teacher_checkpoint, asked)
    student, student_answering = classifiers.answer_with(student, saved, asked)
    answering = student_answering["classifier"]
    comparison = evaluation.compare(
        teacher,
        student,
        teacher_answering,
        student_answering,
        test,
        batch_size,
        heads=heads,
        features=(task.features("teacher", "test"), task.features("student", "test")),
    )
    report.of_student(run_folder.report, test, comparison)
    board.maps(test.pixels[comparison.shown], comparison.maps, settings.epochs)
    say = progress.results(settings)
    say(verdict.of_student(comparison.metrics, saved["classifiers"]))
    accuracies = comparison.metrics["student"]
    of_classes = comparison.metrics["classes"]
    for name in again:
        before, now = (of_classes[side][old.index(name)] for side in ("teacher", "student"))
        say(f"{name}: " + ("no images" if before is None else f"{before:.1f} % right before, {now:.1f} % now"))
    for name, hint in (("accuracy", ""), ("told", ", told that they are {}")):
        for group in ("old", "new") if new else ("old",):
            value = accuracies[f"{name}_{group}"]
            shown = "no images" if value is None else f"{value:.1f} % right"
            say(f"{group} classes{hint.format(group)}: {shown} ({answering})")
    kept = saved["tasks"][-1]["answers"]["kept"]
    say(estimate.said(kept))
    if saved["classifiers"]:
        say(evaluation.classifier_table(saved["classifiers"], answering))
    # A training takes new classes alone, and in one class a softmax has nothing to learn.
    if method.loss is None and not again and (len(new) > 1 or settings.loss_form == "binary"):
        minutes = recommended.minutes(settings, len(train.labels), pretrained, task.seconds)
        log.info(f"LwM trains on from here, in about {minutes:.0f} minutes: {lwm_command(settings)}")
    if method.loss and (failure := verdict.what_failed(saved["training"]["log"], len(named))):
        log.warning(failure)
    if log_row.get("zero_maps", 0) > 0.5:
        log.warning(f"{100 * log_row['zero_maps']:.0f} % of the attention maps were all zero: L_AD said little here")
    say(f"the student is in {run_folder.model}, the page in {run_folder.report}")
    judged = {f"test_{name}": value for name, value in accuracies.items()} | {"lost": comparison.metrics["lost"]}
    answers = {"classifier": answering, "classifiers": saved["classifiers"], "kept": kept}
    progress.print_json(settings, {"model": str(run_folder.model), **judged, **answers})


def lwm_command(settings: Settings) -> str:
    """That trains by LwM what a closed-form run has just done without."""
    folder = f"{settings.output_dir.rstrip('/')}-lwm"
    return command_with(
        settings.arguments, ("method", "output_dir", "overwrite"), "--method", "lwm", "--output-dir", folder
    )


def check_against(teacher_checkpoint: dict[str, Any], settings: Settings) -> None:
    """Raises InputError if the settings contradict the teacher's checkpoint, or each other."""
    if not settings.statistics and settings.classifier not in ("auto", "head"):
        raise InputError(
            f"{settings.where('classifier')} is {settings.classifier!r}, which needs the statistics that "
            f"{settings.where('statistics')} leaves out; keep them, or take head"
        )
    if not teacher_checkpoint["finished"]:
        raise InputError(f"--teacher {settings.teacher}: its training is not finished; go on with --resume first")
    taught = teacher_checkpoint["class_names"]
    own = {"old_classes": tuple(taught), "model": teacher_checkpoint["architecture"]}
    if own["model"] == models.OWN and models.names_code(settings.model):
        own["model"] = settings.model
    own["image_size"] = teacher_checkpoint["image_size"]
    for name, value in own.items():
        if name in settings.given and getattr(settings, name) != value:
            has, given = (",".join(v) if isinstance(v, tuple) else v for v in (value, getattr(settings, name)))
            flag = settings.where(name)
            raise InputError(f"{flag} contradicts the teacher, which has {has} and not {given}; leave the flag out")
    if settings.loss_form == "softmax" and len(settings.new_classes) == 1 and METHODS[settings.method].loss:
        raise InputError(
            f"{settings.where('new_classes')}: the softmax over one new class is always 1 and teaches nothing; "
            "take --method lwm with --loss-form binary"
        )


def warn_of_mixed_forms(teachers: str, students: str) -> None:
    if (teachers == "binary") != (students == "binary"):
        log.warning(
            f"the teacher was trained with the {teachers} form and this task uses {students}: "
            "old and new logits are on different scales; train both with one --loss-form"
        )


if __name__ == "__main__":
    sys.exit(main())
