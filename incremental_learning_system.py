"""One incremental step: a model that knows the old classes learns NEW_CLASSES from their images alone.

    python3 incremental_learning_system.py --teacher runs/first/teacher_model.pth

The teacher may be the student of an earlier step. Architecture, class names, normalisation and image size come from
its checkpoint. The old classes' training images are sealed: the data layer refuses to hand them out.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from lwm.runtime.errors import InputError, one_line_errors, warn
from lwm.runtime.settings import Settings, read_settings


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    settings = read_settings("incremental_learning_system", argv)

    import torch

    from lwm import attention, classifiers, evaluation, losses, models, training
    from lwm.images import datasets
    from lwm.reporting import plots, report
    from lwm.runtime import checkpoint, distributed, hardware, progress
    from lwm.runtime.run_folder import Row, describe_step, open_run

    settings, device = hardware.prepare(settings)
    with settings.naming("teacher"):
        before = checkpoint.load(settings.teacher)
    old, new = before["class_names"], list(settings.new_classes)
    if settings.loss_form is None:
        form = "binary" if before["loss_form"] == "binary" else "softmax"
        print(f"LOSS_FORM = {form} (the teacher's)")
        settings = dataclasses.replace(settings, loss_form=form)
    check_against(before, settings)
    run = open_run(settings, "student")

    here, cache = datasets.Place(settings.dataset, settings.data_dir, settings.hold_back), Path(settings.cache_dir)
    with settings.naming("data_dir"):
        source = datasets.open_source(here, before["image_size"], settings.skip_bad_images, cache)
    source.seal(old)
    with settings.naming("new_classes"):
        source.require_known(new)
    train = source.train(new, old + new)
    source.require_test(new)
    places = datasets.test_places(before["steps"], here) | {name: [here] for name in new}
    test, gone = datasets.find_test_images(places, before["image_size"], settings.skip_bad_images, cache)
    if gone:
        print(f"no test images of {', '.join(gone)}: their accuracy is left empty")
    print(f"{len(train.labels)} training images of {len(new)} new classes, none of {len(old)} old ones, on {device}")

    torch.manual_seed(settings.seed)
    teacher = models.fold_batch_norm(checkpoint.restore_model(before)).requires_grad_(False)
    student = checkpoint.restore_model(before)
    models.widen_head(student, len(new))
    if settings.loss_form == "binary":
        models.start_at_prior(student, first=len(old))
    if settings.method == "frozen":
        models.freeze_backbone(student)
    with settings.naming("freeze"):
        models.freeze(student, settings.freeze)
    if settings.method == "lwm":
        if settings.attention in losses.CLOSED_FORM and not student.closed_form:
            raise InputError(
                f"{settings.where('attention')} is {settings.attention!r}: {before['architecture']} does not end in "
                "pooling and a linear layer, which that control needs; take grad-cam"
            )
        attention.require_closed_form(teacher, datasets.to_input(train.pixels[:8], before["mean"], before["std"]))
    teacher, student = hardware.to_device(teacher, device), hardware.to_device(student, device)
    head = {
        **{key: before[key] for key in ("architecture", "image_size", "mean", "std")},
        "class_names": old + new,
        "loss_form": settings.loss_form,
        "steps": [*before["steps"], describe_step(settings, new, settings.incremental_lr)],
    }
    if run.resumed is None:
        warn_of_mixed_forms(before["loss_form"], settings.loss_form)

    def judge(model: models.Network) -> tuple[Row, list[float | None]]:
        logits = evaluation.predict(model, test.pixels, head["mean"], head["std"], settings.batch_size)
        columns = evaluation.accuracies(logits, test.labels, len(old))
        sizes = [len(step["classes"]) for step in head["steps"]]
        columns["task_aware"] = evaluation.task_aware(logits, test.labels, sizes)
        groups = evaluation.group_accuracies(logits, test.labels, sizes)
        return {f"test_{name}": value for name, value in columns.items()}, groups

    def last(model: models.Network) -> dict[str, Any]:
        known = classifiers.after_step(teacher, model, before, train) if settings.statistics else None
        if known is None:
            return {}
        features = classifiers.features_of(model, test.pixels, head["mean"], head["std"])
        found = evaluation.by_readout(model, known, features, test.labels, len(new))
        return {"statistics": classifiers.packed(known), "readouts": found}

    watch = progress.Watch(settings, run.folder, run.kind)
    log = training.fit(
        run,
        student,
        train,
        losses.METHODS[settings.method],
        settings,
        head,
        judge,
        teacher if settings.method != "finetune" else None,
        checkpoint.fingerprint(before),
        watch,
        last,
    )
    if distributed.rank():  # of several processes the first one reports
        return
    plots.curves(log, f"Student ({settings.method})", run.curves)
    saved = checkpoint.load(run.model)
    answering = classifiers.chosen(settings.readout, saved, before) if saved["statistics"] else "head"
    heads = teacher, student
    teacher, before = classifiers.use(teacher, before, answering)
    student, after = classifiers.use(student, saved, answering)
    found = evaluation.compare(teacher, student, before, after, test, heads=heads)
    report.of_student(run.report, before, after, test, found)
    watch.maps(test.pixels[found.shown], found.maps)
    row = log[-1]
    for name, hint in (("accuracy", "without a hint"), ("task_aware", "told the group (task-aware)")):
        for group in ("old", "new"):
            value = row[f"test_{name}_{group}"]
            shown = "no images" if value is None else f"{value:.1f} %"
            print(f"by the head, {group} classes, {hint}: {shown}")
    progress.print_readouts(saved["readouts"], answering)
    if settings.statistics and not saved["statistics"]:
        print(
            "the teacher has no statistics of its classes: the head alone answers (--statistics from the first step on)"
        )
    if row.get("zero_maps", 0) > 0.5:
        warn(f"{100 * row['zero_maps']:.0f} % of the attention maps were all zero: L_AD said little in this run")
    print(f"the student is in {run.model}, what there is to see in {run.report}")
    accuracies = {name: value for name, value in row.items() if name.startswith("test_")}
    read = {"readout": answering, "readouts": saved["readouts"]}
    progress.last_line(settings, {"model": str(run.model), **accuracies, **read})


def check_against(before: dict, settings: Settings) -> None:
    """Raises InputError where the settings contradict the teacher's checkpoint, or each other."""
    if not settings.statistics and settings.readout not in ("auto", "head"):
        raise InputError(
            f"{settings.where('readout')} is {settings.readout!r}, which needs the statistics that "
            f"{settings.where('statistics')} leaves out; keep them, or take head"
        )
    if not before["finished"]:
        raise InputError(f"--teacher {settings.teacher}: its training is not finished; go on with --resume first")
    known = {"old_classes": tuple(before["class_names"]), "model": before["architecture"]}
    known["image_size"] = before["image_size"]
    for name, value in known.items():
        if name in settings.given and getattr(settings, name) != value:
            has, given = (",".join(v) if isinstance(v, tuple) else v for v in (value, getattr(settings, name)))
            flag = settings.where(name)
            raise InputError(f"{flag} contradicts the teacher, which has {has} and not {given}; leave the flag out")
    taught = sorted(set(before["class_names"]) & set(settings.new_classes))
    if taught:
        raise InputError(
            f"{settings.where('new_classes')}: new class {taught[0]!r} is one that the teacher already knows; "
            "take it out"
        )
    if settings.loss_form == "softmax" and len(settings.new_classes) == 1:
        raise InputError(
            f"{settings.where('new_classes')}: the softmax over one new class is always 1 and teaches nothing; "
            "take --method lwm with --loss-form binary"
        )


def warn_of_mixed_forms(before: str, now: str) -> None:
    softmax = {"softmax", "softmax-all"}
    if before != now and not {before, now} <= softmax:
        warn(
            f"the teacher was trained with the {before} form and this step uses {now}: "
            "old and new logits are on different scales; train both with one --loss-form"
        )


if __name__ == "__main__":
    sys.exit(main())
