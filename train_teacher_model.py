"""Step 0: train a network on OLD_CLASSES and save it, with all that a later step needs, as teacher_model.pth.

python3 train_teacher_model.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from errors import InputError, one_line_errors
from settings import read_settings


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    settings = read_settings("train_teacher_model", argv)
    if len(settings.old_classes) < 2:
        given = ",".join(settings.old_classes)
        raise InputError(f"{settings.where('old_classes')} is {given}: a teacher needs two classes at least")

    import torch

    import distributed
    import evaluation
    import hardware
    import models
    import plots
    import training
    from data import Place, channel_statistics, open_source
    from losses import first_step
    from run import describe_step, open_run

    settings, device = hardware.prepare(settings)
    run = open_run(settings, "teacher")
    place = Place(settings.dataset, settings.data_dir, settings.hold_back)
    with settings.naming("data_dir"):
        source = open_source(place, settings.image_size, settings.skip_bad_images, Path(settings.cache_dir))
    classes = list(settings.old_classes)
    with settings.naming("old_classes"):
        source.require_known(classes)
    train, test = source.train(classes, classes), source.test(classes, classes)
    mean, std = channel_statistics(train.pixels)
    print(f"{len(train.labels)} training and {len(test.labels)} test images of {len(classes)} classes, on {device}")

    torch.manual_seed(settings.seed)
    model = models.build(settings.model, len(classes), settings.image_size)
    if settings.loss_form == "binary":
        models.start_at_prior(model, first=0)
    model = hardware.to_device(model, device)
    head = {
        "architecture": settings.model,
        "class_names": classes,
        "image_size": settings.image_size,
        "mean": mean,
        "std": std,
        "loss_form": settings.loss_form,
        "steps": [describe_step(settings, classes, settings.lr)],
    }

    def judge(model):
        logits = evaluation.predict(model, test.pixels, mean, std, settings.batch_size)
        accuracy = evaluation.group_accuracies(logits, test.labels, [len(classes)])
        return {"test_accuracy": accuracy[0]}, accuracy

    log = training.fit(run, model, train, first_step, settings, head, judge)
    if distributed.rank():  # of several processes the first one reports
        return
    plots.curves(log, run.curves, "Teacher")
    print(f"test accuracy {log[-1]['test_accuracy']:.1f} % over {len(classes)} classes; the model is in {run.model}")


if __name__ == "__main__":
    sys.exit(main())
