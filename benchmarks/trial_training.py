"""How the trials of trials.py train: as training.fit does it, on a CPU, with what a trial changes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

import losses
import models
from batches import augment, batches, draw_augmentation
from data import to_input
from hardware import to_device
from training import optimisation_step

if TYPE_CHECKING:
    from trials import Trial


def trained(networks: list[Any], train: Any, channels: Any, settings: Any, trial: Trial) -> Any:
    """The network of the step after those of ``networks``, begun as the scripts begin it."""
    torch.manual_seed(settings.seed)
    teacher, classes = networks[-1] if networks else None, len(train.labels.unique())
    if teacher is None:
        model = models.build(settings.model, 4 * classes if trial.rotations else classes, settings.image_size)
        first, rate, loss = 0, settings.lr, losses.first_step
    else:
        rate, loss = settings.incremental_lr, losses.METHODS[settings.method]
        model = copy.deepcopy(teacher)
        first = model.fc.out_features
        for _ in range(2):  # as the script, which builds both from the checkpoint before: the new rows are its own
            models.build(settings.model, first, settings.image_size)
        models.widen_head(model, classes)
    if settings.loss_form == "binary":
        models.start_at_prior(model, first)
    if trial.cosine:
        model.fc.__class__ = Cosine
    model = to_device(model, torch.device("cpu"))
    train_model(model, teacher, train, channels, loss, settings, trial, rate)
    if trial.rotations and teacher is None:
        models.replace_head(model, model.fc.weight.detach()[::4], model.fc.bias.detach()[::4])
    return model


def train_model(
    model: Any, teacher: Any, images: Any, channels: Any, loss: Any, settings: Any, trial: Trial, rate: float
) -> None:
    """As training.fit does it, with what the trial changes."""
    model.requires_grad_(True)
    teacher = to_device(models.fold_batch_norm(teacher), torch.device("cpu")) if teacher is not None else None
    rotates = trial.rotations and teacher is None
    projection = nn.Linear(model.fc.in_features, model.fc.in_features)
    nn.init.eye_(projection.weight)
    nn.init.zeros_(projection.bias)
    beside = torch.optim.Adam(projection.parameters(), 1e-2)  # a step has but some 300 batches

    def total(student: Any, known: Any, labels: Any, heads: Any, settings: Any) -> dict[str, Any]:
        terms = loss(student, known, labels, heads, settings)
        pooled = model.pooled(student.features)
        if trial.projection and teacher is not None:
            missed = unexplained(projection(pooled), model.pooled(known.features))
            terms["total"] = terms["total"] + trial.projection * missed
        if trial.anti_collapse:
            terms["total"] = terms["total"] + trial.anti_collapse * anti_collapse(pooled)
        return terms

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1)

    optimizer = torch.optim.SGD(model.parameters(), rate, settings.momentum, weight_decay=settings.weight_decay)
    if trial.anti_collapse:  # as AdaGauss's code
        optimizer.register_step_pre_hook(clip)
    count = -(-len(images.labels) // settings.batch_size)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, settings.epochs * count) for each in (optimizer, beside)
    ]
    averaged = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(trial.ema))
        if trial.ema and teacher is not None  # of a first step it would keep some of the random start
        else None
    )
    strong = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    generator = torch.Generator().manual_seed(settings.seed)

    def drawn(index: Any) -> Any:
        edge = images.pixels.shape[-1]
        pixels = augment(images.pixels[index], draw_augmentation(len(index), edge, settings.flip, generator))
        if trial.strong:
            pixels = torch.stack([strong(each) for each in pixels])
        if rotates:
            pixels = torch.cat([pixels.rot90(turns, (2, 3)) for turns in range(4)])
        return to_input(pixels, *channels).contiguous(memory_format=torch.channels_last)

    warm_up = trial.warm_up if teacher is not None else 0
    for epoch in range(-warm_up, settings.epochs):
        model.train(epoch >= 0)
        for index in batches(images.labels, settings.batch_size, generator):
            inputs, labels = drawn(index), images.labels[index]
            if rotates:
                labels = torch.cat([4 * labels + turns for turns in range(4)])
            before = [each.detach().clone() for each in model.parameters()] if epoch < 0 else []
            optimisation_step(model, teacher, inputs, labels, total, settings, optimizer)
            if epoch < 0:
                put_back(model, before, teacher.fc.out_features)
                beside.zero_grad()
                continue
            beside.step()
            beside.zero_grad()
            for schedule in schedules:
                schedule.step()
            if averaged:
                averaged.update_parameters(model)
        if epoch == -1:
            optimizer.state.clear()
    if averaged:  # an average of batch-norm's statistics would not be the statistics of averaged weights
        update_bn((drawn(index) for index in batches(images.labels, settings.batch_size, generator)), averaged.module)
        model.load_state_dict(averaged.module.state_dict())


def unexplained(guess: Tensor, features: Tensor) -> Tensor:
    """The share of the variance of ``features`` (B, C) that ``guess`` (B, C) misses."""
    return (guess - features).square().sum() / (features - features.mean(0)).square().sum()


def anti_collapse(features: Tensor) -> Tensor:
    """L_AC of AdaGauss (Rypesc et al., NeurIPS 2024) of features (B, C): it is low where no direction is flat.

    Minus the mean of the diagonal of the Cholesky factor of their covariance, of which each counts up to 1.
    """
    spread = features.T.cov() + 1e-4 * torch.eye(features.shape[1], dtype=features.dtype)  # fewer than C have no factor
    return -torch.linalg.cholesky(spread).diagonal().clamp(max=1).mean()


def put_back(model: Any, before: list[Any], old: int) -> None:
    """All but the new rows of the head as they were."""
    head = {id(model.fc.weight), id(model.fc.bias)}
    with torch.no_grad():
        for parameter, was in zip(model.parameters(), before, strict=True):
            if id(parameter) in head:
                parameter[:old] = was[:old]
            else:
                parameter.copy_(was)


class Cosine(nn.Linear):
    """A head that sees unit length, and has it, times 10."""

    def forward(self, features: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(features), F.normalize(self.weight)) + self.bias
