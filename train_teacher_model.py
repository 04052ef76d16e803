"""Task 0: train a network on OLD_CLASSES and save it, with all that a later task needs, as teacher_model.pth.

    python3 train_teacher_model.py

A network that you have already becomes a teacher as it is, or with more training:

    python3 train_teacher_model.py --model resnet18 --weights model.pth --old-classes-file classes.txt --epochs 0

``--model`` names one of torchvision, of timm (timm/convnext_atto), or your own code (path/to/file.py:build).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision

from lwm import calibration, classifiers, closed_form, evaluation, models, verdict
from lwm.images.batches import channel_statistics
from lwm.images.datasets import Place, open_source, side_of
from lwm.images.judging import find_test_images
from lwm.losses import METHODS, classify, loss_form
from lwm.reporting import plots, report, tensorboard
from lwm.runtime import distributed, hardware, progress, recommended
from lwm.runtime.checkpoint import AT_A_TIME, load
from lwm.runtime.errors import InputError, log, one_line_errors
from lwm.runtime.run_folder import describe_task, open_run_folder
from lwm.runtime.settings import Settings, read_settings
from lwm.runtime.weights import load_weights
from lwm.training import Training

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and standard deviation that torchvision trained with


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    settings = read_settings("train_teacher_model", argv, method=METHODS, stem=models.STEMS)
    settings = dataclasses.replace(settings, method=settings.method or "lwm")  # whose form of the loss is read here
    classes = list(settings.old_classes)
    if len(classes) < 2:
        raise InputError(
            f"{settings.where('old_classes')} is {','.join(classes)}: a teacher needs two classes at least"
        )
    form = loss_form(settings, "softmax" if settings.weights else "binary")
    if settings.weights_key is not None and settings.weights in ("", "imagenet"):
        raise InputError("--weights-key names a state_dict in a file that --weights names; give both or leave it out")
    if settings.measure_old and settings.epochs:
        raise InputError("--measure-old is for a network that is taken as it is, with --weights and --epochs 0")
    settings, device = hardware.prepare(dataclasses.replace(settings, loss_form=form))
    run_folder = open_run_folder(settings, "teacher")
    if run_folder.resumed and settings.epochs == 0:
        raise InputError(f"{settings.where('epochs')} is 0: there is no training to resume; take --no-resume")

    place = Place(settings.dataset, settings.data_dir, settings.hold_back, calibration=settings.calibration)
    cache = Path(settings.cache_dir)
    with settings.naming("model"):
        own = models.builder(settings.model)
        if settings.weights and models.is_timm(settings.model):
            settings = as_timm_has_it(settings)
    settings = recommended.image_size(settings, side_of(place, classes))
    if settings.epochs != 0:
        with settings.naming("data_dir"):
            source = open_source(place, settings.image_size, settings.skip_bad_images, cache)
        with settings.naming("old_classes"):
            source.require_classes(classes)
        train, test = source.train(classes, classes), source.test(classes, classes)
        record, held = source.record(test), source.held_back(classes, classes)
        counts = f"{len(train.labels)} training and {len(test.labels)} test images"
        log.info(f"{counts} of {len(classes)} classes, on {device}")
        settings = recommended.by_images(settings, len(train.labels), "lr", pretrained=bool(settings.weights))
    else:  # the old images may be gone; what it was trained on is not known, so a folder alone may have test images
        record, named = None, settings.dataset == "folder" or "data_dir" in settings.given
        here = Place("folder", settings.data_dir) if named else None
        task = {"classes": classes, "judged": None, "apart": [], "hold_back": 0.0}
        test = find_test_images([task], settings.image_size, settings.skip_bad_images, cache, here)
        settings = dataclasses.replace(settings, batch_size=settings.batch_size or AT_A_TIME)

    weights = read_weights(settings) if settings.weights else {}
    torch.manual_seed(settings.seed)
    with settings.naming("model"):
        stem = settings.stem or models.stem_of(settings.model, weights)
        if own:
            model = models.build_own(own, len(classes), settings.image_size)
        else:
            model = models.build(settings.model, len(classes), settings.image_size, stem)
    if settings.loss_form == "binary":
        models.start_at_prior(model, first=0)
    if weights:
        begin_with_weights(model, weights, settings)
    with settings.naming("freeze"):
        models.freeze(model, settings.freeze)
    if (cells := models.cells(model, settings.image_size)) < models.FEWEST_CELLS:
        log.info(f"attention maps have {cells} x {cells} cells; a larger --image-size gives finer ones")
    model = hardware.to_device(model, device)
    count = len(train.labels) if settings.epochs else 0
    mean, std = IMAGENET if settings.weights else channel_statistics(train.pixels)
    checkpoint = {
        "architecture": models.OWN if own else settings.model,
        "stem": model.stem,
        "class_names": classes,
        "image_size": settings.image_size,
        "mean": list(settings.mean or mean),
        "std": list(settings.std or std),
        "loss_form": settings.loss_form,
        "tasks": [describe_task(settings, classes, settings.lr, record, first=True, images=count)],
    }
    task, channels = checkpoint["tasks"][0], (checkpoint["mean"], checkpoint["std"])
    board = tensorboard.Board(settings, run_folder.folder, "teacher")

    def evaluate() -> dict[str, Any]:
        """The log's column of the network as it is now, which the task keeps too."""
        logits = evaluation.predict(model, test.pixels, *channels, settings.batch_size)
        task["answers"] = evaluation.answers("head", logits, test.labels, [len(classes)])
        task["group_accuracy"] = task["answers"]["groups"]
        return {"test_accuracy": task["group_accuracy"][0]}

    if settings.epochs:
        with Training(run_folder, checkpoint, model, train, classify, settings) as training:
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
                statistics = None
                if settings.statistics:
                    statistics = classifiers.after_first_task(model, checkpoint, train, settings.batch_size)
                    features = classifiers.features_of(model, test.pixels, *channels, settings.batch_size)
                    checkpoint["statistics"] = classifiers.to_checkpoint(statistics)
                    checkpoint["classifiers"] = evaluation.by_classifier(
                        model, statistics, features, test.labels, len(classes)
                    )
                calibration.calibrate(model, checkpoint, statistics, held, settings.batch_size)
                task["seconds"] = round(training.seconds, 1)
                training.save(finished=True)
    else:
        evaluate()
        if settings.measure_old:
            measure_old(model, checkpoint, settings)
        with run_folder.writing():
            run_folder.save({**checkpoint, "model": model.state_dict(), "finished": True, "training": {}})
        distributed.leave()
    if distributed.rank():  # of several processes the first one reports
        return

    model, saved = classifiers.answer_with(model, load(run_folder.model), "head")
    logits = evaluation.predict(model, test.pixels, *channels, settings.batch_size)
    side = evaluation.Side("", model, saved, logits, settings.batch_size)
    views = evaluation.explain([side], test)
    report.of_teacher(run_folder.report, test, side, views)
    if settings.epochs:
        plots.curves(saved["training"]["log"], "Teacher", run_folder.curves)
        maps = torch.stack([own[0].heat for own in views.values()])
        board.maps(test.pixels[list(views)], maps.unsqueeze(1), settings.epochs)
    if settings.epochs and (failure := verdict.what_failed(saved["training"]["log"], len(classes))):
        log.warning(failure)
    (accuracy,) = saved["tasks"][0]["group_accuracy"]
    shown = "no test images" if accuracy is None else f"{accuracy:.1f} % of the test images right"
    say = progress.results(settings)
    say(f"{shown}, {len(classes)} classes; the model is in {run_folder.model}, the page in {run_folder.report}")
    progress.print_json(settings, {"model": str(run_folder.model), "test_accuracy": accuracy})


def measure_old(model: models.Network, checkpoint: dict[str, Any], settings: Settings) -> None:
    """Add statistics and calibration to the checkpoint of a network that was taken as it is.

    Classes that have images in the folder are measured, the others derived from the head. Raises InputError.
    """
    classes, channels = checkpoint["class_names"], (checkpoint["mean"], checkpoint["std"])
    with settings.naming("measure_old"):
        place = Place("folder", settings.measure_old, calibration=settings.calibration)
        source = open_source(place, checkpoint["image_size"], settings.skip_bad_images, Path(settings.cache_dir))
        there = [name for name in classes if name in source.classes["train"]]
        if len(there) < 2:
            raise InputError(
                f"training images of two old classes at least are needed, and it has those of {len(there)}"
            )
        images, held = source.train(there, classes), source.held_back(there, classes)
    features = classifiers.features_of(model, images.pixels, *channels, settings.batch_size)
    head = classifiers.linear_layer("head", None, model)
    statistics = closed_form.with_measured(head, features, images.labels)
    log.info(f"statistics: {len(there)} classes measured, {len(classes) - len(there)} derived from the head")
    checkpoint["statistics"] = classifiers.to_checkpoint(statistics)
    calibration.calibrate(model, checkpoint, statistics, held, settings.batch_size)


def as_timm_has_it(settings: Settings) -> Settings:
    """The settings with the image size, mean and standard deviation of timm's weights, where none are given.

    A line says in what this project's way to read an image differs from timm's.
    """
    config = models.timm_config(settings.model)
    own = {"image_size": config.input_size[-1], "mean": tuple(config.mean), "std": tuple(config.std)}
    own = {name: value for name, value in own.items() if getattr(settings, name) is None}
    for name, value in own.items():
        log.info(f"{name.upper()} = {value} (as timm has it for {settings.model})")
    if config.crop_pct != 1 or config.interpolation != "bicubic":
        margin = f"the middle {100 * config.crop_pct:.0f} % of it alone" if config.crop_pct != 1 else "it"
        log.info(f"images: their middle square, scaled by bicubic; timm takes {margin}, by {config.interpolation}")
    return dataclasses.replace(settings, **own)


def read_weights(settings: Settings) -> dict[str, torch.Tensor]:
    """The state_dict that --weights names. Raises InputError."""
    with settings.naming("weights"):
        if settings.weights != "imagenet":
            return load_weights(settings.weights, settings.weights_key)
        if models.is_timm(settings.model):
            return models.timm_weights(settings.model, settings.image_size)
        try:
            return torchvision.models.get_model_weights(settings.model).DEFAULT.get_state_dict(check_hash=True)
        except ValueError as error:
            raise InputError(f"torchvision has no weights for {settings.model}") from error
        except OSError as error:
            raise InputError(f"torchvision's weights for {settings.model} cannot be downloaded ({error})") from error


def begin_with_weights(model: models.Network, weights: dict[str, torch.Tensor], settings: Settings) -> None:
    """Load ``weights`` into the model. Raises InputError if they do not fit."""
    with settings.naming("weights"):
        outputs, wanted = models.load_torchvision(model, weights), len(settings.old_classes)
    if outputs != wanted:
        if not settings.epochs:
            raise InputError(
                f"{settings.where('old_classes')}: {wanted} classes are named, and the weights have {outputs} outputs; "
                "name them all in their order, or train a new head with --epochs"
            )
        log.info(f"the weights have {outputs} outputs: a new head for {wanted} classes takes their place")


if __name__ == "__main__":
    sys.exit(main())
