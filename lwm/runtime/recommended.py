"""Values for the settings that are None: some hang on the data set alone, others follow its images."""

from __future__ import annotations

import dataclasses
from typing import Any

from lwm.runtime.errors import log

# Rates are for a batch of BATCH images. Chosen on other classes than those reported: docs/settings-search.md says how.
_PHOTOS: dict[str, Any] = {"model": "resnet32", "image_size": 32, "beta": 1.0, "gamma": 0.1, "weight_decay": 5e-4}
_PHOTOS |= {"flip": True, "warm_up": 0.1, "lr": 0.1, "incremental_lr": 0.1}
_DIGITS = _PHOTOS | {"model": "resnet18", "epochs": 10, "batch_size": 64, "lr": 0.06, "incremental_lr": 0.025}
_DIGITS |= {"weight_decay": 0.0, "flip": False, "warm_up": 0.0}
OF_DATASET: dict[str, dict[str, Any]] = {
    "digits": _DIGITS,
    "cifar10": _PHOTOS,
    "cifar100": _PHOTOS,
    "folder": _PHOTOS | {"model": "resnet18", "image_size": None, "incremental_lr": 0.03},
}
RATES = ("lr", "incremental_lr")
FOLLOWING = ("image_size", "batch_size", "epochs", *RATES)  # the images, if the data set has no value of its own
BATCH = 128
SMALLEST_BATCH = 16
BATCHES = 40  # of an epoch, about: of few images a batch is smaller, which makes more steps of the same work
FEWEST_EPOCHS, FEWEST_STEPS = 20, 800
FEW = 100  # images of a class in a folder, below which LwM gains nothing over no training: docs/closed-form.md
SIDES = (32, 64, 96)  # px: the largest that is no larger than the images
PRETRAINED_SIDE = 224  # px, that of torchvision's weights
PRETRAINED = 0.1  # of the rate: a larger one destroys what the weights know
NEAR_EPOCHS, NEAR_STEPS = 4, 120  # likewise at least, of a student that stays near its pretrained teacher


def method(settings: Any, pretrained: bool, images: int) -> Any:
    """The settings with a ``method``, by whether the teacher began with pretrained weights, and by how many training
    images a new class has. Epochs that are asked for are a training.
    """
    if settings.method is not None:
        return settings
    name, about = "lwm", "a teacher trained here"
    if settings.epochs:
        about = f"EPOCHS = {settings.epochs}"
    elif pretrained:
        name, about = "closed-form", "pretrained weights"
    elif settings.dataset == "folder" and images < FEW:
        name, about = "closed-form", f"{images} images of a new class"
    log.info(f"METHOD = {name} (recommended for {about})")
    return dataclasses.replace(settings, method=name)


def image_size(settings: Any, side: int | None) -> Any:
    """The settings with an ``image_size``, by the images' typical shorter ``side`` in px, None if it is not known."""
    if settings.image_size is not None:
        return settings
    if settings.weights:
        size, about = PRETRAINED_SIDE, "pretrained weights"
    else:
        size = max((each for each in SIDES if each <= (side or SIDES[-1])), default=SIDES[0])
        about = f"images of {side} px"
    log.info(f"IMAGE_SIZE = {size} (recommended for {about})")
    return dataclasses.replace(settings, image_size=size)


def by_images(settings: Any, images: int, rate: str, pretrained: bool, measured: bool = False) -> Any:
    """The settings with what follows the number of training images: batch size, epochs and ``rate``, which is "lr" or
    "incremental_lr".

    The rate is linear in the batch size (Goyal et al., 2017, section 2.1). The student of a ``pretrained`` teacher
    computes as the teacher does (batch-norm, dropout) and makes few steps. If it is held to its teacher, its new rows
    begin in closed form, and its rate stays None, to be ``measured`` as sharpness.py does.
    """
    for name in settings.recommended:
        log.info(f"{name.upper()} = {getattr(settings, name)} (recommended for {settings.dataset})")
    values = _following(settings, images, rate, pretrained, measured)
    about = f"{images} images" + (" and pretrained weights" if pretrained else "")
    for name, value in values.items():
        log.info(f"{name.upper()} = {value} (recommended for {about})")
    return dataclasses.replace(settings, **values)


def minutes(settings: Any, images: int, pretrained: bool, seconds: float) -> float:
    """What a student's training takes, if a network answers an image in so many ``seconds``.

    A step is three such passes of the student, there and back, and one of the teacher.
    """
    settings = dataclasses.replace(settings, epochs=None)
    epochs = _following(settings, images, "incremental_lr", pretrained)["epochs"]
    return epochs * images * 4 * seconds / 60


def _following(settings: Any, images: int, rate: str, pretrained: bool, measured: bool = False) -> dict[str, Any]:
    values: dict[str, Any] = {}
    near = pretrained and rate == "incremental_lr"
    batch = settings.batch_size
    if batch is None:
        batch = SMALLEST_BATCH
        while batch < BATCH and batch * BATCHES < images:
            batch *= 2
        values["batch_size"] = batch
    if settings.epochs is None:
        epochs, steps = (NEAR_EPOCHS, NEAR_STEPS) if near else (FEWEST_EPOCHS, FEWEST_STEPS)
        values["epochs"] = max(epochs, -(-steps // -(-images // batch)))
    if getattr(settings, rate) is None and not (near and measured):
        factor = min(batch, images) / BATCH * (PRETRAINED if pretrained else 1)
        values[rate] = float(f"{OF_DATASET[settings.dataset][rate] * factor:.3g}")
    if settings.batch_norm is None and rate == "incremental_lr":
        values["batch_norm"] = "frozen" if pretrained else "train"
    if settings.new_rows is None and near:
        values["new_rows"] = "closed-form"
    return values
