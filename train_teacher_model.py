"""Step 0: train a network on OLD_CLASSES and save it, with all that a later step needs, as teacher_model.pth.

    python3 train_teacher_model.py

A network that you have already becomes a teacher as it is, or with more training:

    python3 train_teacher_model.py --model resnet18 --weights model.pth --old-classes-file classes.txt --epochs 0
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.settings import Settings, read_settings

if TYPE_CHECKING:
    from lwm.models import Network

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and standard deviation that torchvision trained with


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    settings = read_settings("train_teacher_model", argv)
    if len(settings.old_classes) < 2:
        given = ",".join(settings.old_classes)
        raise InputError(f"{settings.where('old_classes')} is {given}: a teacher needs two classes at least")

    import torch

    from lwm import classifiers, evaluation, models, training
    from lwm.images.datasets import Place, channel_statistics, find_test_images, open_source
    from lwm.losses import first_step
    from lwm.reporting import plots, report
    from lwm.runtime import checkpoint, distributed, hardware, progress
    from lwm.runtime.run_folder import Row, describe_step, open_run

    settings, device = hardware.prepare(settings)
    run = open_run(settings, "teacher")
    if run.resumed and not settings.epochs:
        raise InputError(f"{settings.where('epochs')} is 0: there is no training to resume; take --no-resume")
    place = Place(settings.dataset, settings.data_dir, settings.hold_back)
    cache, classes = Path(settings.cache_dir), list(settings.old_classes)
    if settings.epochs:
        with settings.naming("data_dir"):
            source = open_source(place, settings.image_size, settings.skip_bad_images, cache)
        with settings.naming("old_classes"):
            source.require_known(classes)
        train, test = source.train(classes, classes), source.test(classes, classes)
        print(f"{len(train.labels)} training and {len(test.labels)} test images of {len(classes)} classes, on {device}")
    else:  # the old images may be gone
        places = {name: [place] for name in classes}
        test, _ = find_test_images(places, settings.image_size, settings.skip_bad_images, cache)

    torch.manual_seed(settings.seed)
    with settings.naming("model"):
        model = models.build(settings.model, len(classes), settings.image_size)
    if settings.loss_form == "binary":
        models.start_at_prior(model, first=0)
    if settings.weights:
        begin_with(model, settings)
    with settings.naming("freeze"):
        models.freeze(model, settings.freeze)
    model = hardware.to_device(model, device)
    mean, std = IMAGENET if settings.weights else channel_statistics(train.pixels)
    mean, std = list(settings.mean or mean), list(settings.std or std)
    head = {
        "architecture": settings.model,
        "class_names": classes,
        "image_size": settings.image_size,
        "mean": mean,
        "std": std,
        "loss_form": settings.loss_form,
        "steps": [describe_step(settings, classes, settings.lr, first=True)],
    }

    def judge(model: models.Network) -> tuple[Row, list[float | None]]:
        logits = evaluation.predict(model, test.pixels, mean, std, settings.batch_size)
        accuracy = evaluation.group_accuracies(logits, test.labels, [len(classes)])
        return {"test_accuracy": accuracy[0]}, accuracy

    def last(model: models.Network) -> dict[str, Any]:
        if not settings.statistics:
            return {}
        known = classifiers.after_first_step(model, head, train)
        features = classifiers.features_of(model, test.pixels, mean, std)
        found = evaluation.by_readout(model, known, features, test.labels, len(classes))
        return {"statistics": classifiers.packed(known), "readouts": found}

    if settings.epochs:
        watch = progress.Watch(settings, run.folder, run.kind)
        log = training.fit(run, model, train, first_step, settings, head, judge, watch=watch, last=last)
    else:
        head["steps"][0]["group_accuracy"] = judge(model)[1] if len(test.labels) else [None]
        with run.writing():
            run.save({**head, "model": model.state_dict(), "finished": True, "training": {}})
        distributed.leave()
    if distributed.rank():  # of several processes the first one reports
        return
    saved = checkpoint.load(run.model)
    explained = evaluation.explained(model, test, mean, std, settings.batch_size)
    report.of_teacher(run.report, saved, test, explained)
    if settings.epochs:
        plots.curves(log, "Teacher", run.curves)
        watch.maps(test.pixels, explained[1].unsqueeze(1))
    (accuracy,) = saved["steps"][0]["group_accuracy"]
    shown = "no test images" if accuracy is None else f"test accuracy {accuracy:.1f} %"
    print(f"{shown} over {len(classes)} classes; the model is in {run.model}, what there is to see in {run.report}")
    progress.last_line(settings, {"model": str(run.model), "test_accuracy": accuracy})


def begin_with(model: Network, settings: Settings) -> None:
    """Load --weights into the model. Raises InputError where they do not fit."""
    import torchvision

    from lwm import models
    from lwm.runtime.checkpoint import load_weights

    with settings.naming("weights"):
        if settings.weights == "imagenet":
            try:
                weights = torchvision.models.get_model_weights(settings.model).DEFAULT.get_state_dict(check_hash=True)
            except ValueError as error:
                raise InputError(f"torchvision has no weights for {settings.model}") from error
            except OSError as error:
                raise InputError(
                    f"torchvision's weights for {settings.model} cannot be downloaded ({error})"
                ) from error
        else:
            weights = load_weights(settings.weights)
        outputs, wanted = models.load_torchvision(model, weights), len(settings.old_classes)
    if outputs != wanted:
        if not settings.epochs:
            raise InputError(
                f"{settings.where('old_classes')}: {wanted} classes are named, and the weights have {outputs} outputs; "
                "name them all in their order, or train a new head with --epochs"
            )
        print(f"the weights have {outputs} outputs: a new head for {wanted} classes takes their place")


if __name__ == "__main__":
    sys.exit(main())
