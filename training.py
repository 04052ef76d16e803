"""The one training loop, and what surrounds it: device, seeds, progress, log, saves, going on from a save."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import checkpoint as checkpoints
from data import Images, augment, batches, to_input
from errors import InputError, RunError
from models import Output

Row = dict[str, Any]
# Recorded for each step, and compared when a run goes on.
STEP_SETTINGS = ("method", "loss_form", "beta", "gamma", "temperature", "attention_class", "batch_norm")
STEP_SETTINGS += ("batch_size", "momentum", "weight_decay", "flip", "precision", "hold_back", "seed")


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, else Apple's MPS, else the CPU. Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: there is none on this machine; use cpu or auto")
    return device


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Channels-last memory: the layout in which convolutions are fastest on CPUs and GPUs alike."""
    return model.to(device, memory_format=torch.channels_last)


def forward(model: nn.Module, inputs: Tensor, precision: str) -> Output:
    """The network in ``precision``; logits and features leave it in fp32, so that maps and losses are exact."""
    if precision == "fp32":
        return model(inputs)
    with torch.autocast(inputs.device.type, torch.bfloat16):
        output = model(inputs)
    return Output(output.logits.float(), output.features.float())


# The outputs of a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Where a run writes (``model``, ``log``) and the checkpoint that it goes on from, if any."""

    model: Path
    log: Path
    resumed: dict[str, Any] | None


def open_run(settings, kind: str) -> Run:
    """The run of a script, ``kind`` being "teacher" or "student". Nothing is written yet.

    Raises InputError where the output would be the run's own teacher or would replace a model unasked.
    """
    folder = Path(settings.output_dir)
    own = folder / f"{kind}_model.pth"
    if settings.teacher and own.exists() and own.resolve() == Path(settings.teacher).resolve():
        raise InputError(f"{own} is the --teacher itself and would be replaced; choose another --output-dir")
    if settings.student and not settings.resume:
        raise InputError("--student names a run to go on from, and that needs --resume (or RESUME in config.py)")
    resumed = None
    source = Path(settings.student) if settings.student else own
    if settings.resume:
        if settings.student or own.exists():
            resumed = checkpoints.load(source)
        else:
            print(f"nothing to resume from at {own}: a fresh start")
    replaces = own.exists() and not (resumed and source.resolve() == own.resolve())
    if replaces and not settings.overwrite:
        raise InputError(
            f"{own} exists; --overwrite replaces it, --resume goes on from it, --output-dir writes elsewhere"
        )
    return Run(own, folder / f"{kind}_log.csv", resumed)


def describe_step(settings, classes: Sequence[str], learning_rate: float) -> dict[str, Any]:
    """What the checkpoint says of a step: its classes, where their images were, and how it was trained."""
    return {
        "classes": list(classes),
        "dataset": settings.dataset,
        "data_dir": str(Path(settings.data_dir).resolve()),
        **{name: getattr(settings, name) for name in STEP_SETTINGS},
        "learning_rate": learning_rate,
        "epochs": settings.epochs,
        "group_accuracy": [],
    }


def check_resumed(run: Run, head: dict[str, Any], teacher: str) -> None:
    """Raises InputError where the run to go on from was another run: other classes, teacher or settings."""
    if run.resumed is None:
        return
    was = run.resumed
    pairs = [(key, was[key], head[key]) for key in ("architecture", "image_size", "class_names")]
    pairs += [("teacher (hash of its weights)", was["training"]["teacher"], teacher)]
    pairs += [
        (key, was["steps"][-1][key], head["steps"][-1][key]) for key in ("dataset", *STEP_SETTINGS, "learning_rate")
    ]
    for key, before, now in pairs:
        if before != now:
            raise InputError(f"cannot resume: {key} was {before} and is now {now}")
    planned = was["training"]["epochs"]
    if head["steps"][-1]["epochs"] != planned and not was["finished"]:
        raise InputError(f"cannot resume: the run was planned with --epochs {planned}; finish it with that first")
    if head["steps"][-1]["epochs"] < planned:
        raise InputError(f"cannot resume: the run already has {planned} epochs; give --epochs {planned} or more")


def write_log(path: Path, rows: list[Row]) -> None:
    """The CSV of the epochs; a column for everything that any row has, empty where it has none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoints.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


# The loop ---------------------------------------------------------------------------------------------------------


def fit(
    run: Run,
    model: nn.Module,
    train: Images,
    loss: Callable[..., dict[str, Tensor]],
    settings,
    head: dict[str, Any],
    judge: Callable[[nn.Module], tuple[Row, list[float | None]]],
    teacher: nn.Module | None = None,
    teacher_hash: str = "",
) -> list[Row]:
    """Train ``model`` in place and save it; returns the log, a row an epoch.

    ``head`` is the checkpoint without weights and training state; the learning rate and the number of epochs are
    those of its last step. ``judge(model)`` returns columns for the log and the accuracy of each group of classes;
    it is asked at every save. The model that is saved last is that of the last epoch: nothing is chosen by accuracy.
    Raises RunError where a loss term is no longer finite.
    """
    step = head["steps"][-1]
    batches_an_epoch = len(batches(len(train.labels), settings.batch_size, torch.Generator()))
    optimizer = torch.optim.SGD(
        model.parameters(), step["learning_rate"], settings.momentum, weight_decay=settings.weight_decay
    )
    generator = torch.Generator().manual_seed(settings.seed)
    rows: list[Row] = []
    if run.resumed:
        state = run.resumed["training"]
        rows = list(state["log"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        model.load_state_dict(run.resumed["model"])
    schedule = CosineAnnealingLR(optimizer, (step["epochs"] - len(rows)) * batches_an_epoch)
    if run.resumed and not run.resumed["finished"]:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    elif rows:
        more = step["epochs"] - len(rows)
        print(f"{len(rows)} epochs are done, " + (f"{more} more with a new cosine schedule" if more else "all of them"))

    for epoch in range(len(rows) + 1, step["epochs"] + 1):
        row = _epoch(epoch, model, teacher, train, loss, settings, head, optimizer, schedule, generator)
        finished = epoch == step["epochs"]
        saved = finished or epoch % settings.save_interval == 0
        if saved:
            columns, step["group_accuracy"] = judge(model)
            row.update(columns)
        rows.append(row)
        if saved:
            training = {
                "epochs": step["epochs"],
                "teacher": teacher_hash,
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
                "torch_rng": torch.get_rng_state(),
                "log": rows,
            }
            checkpoints.save(
                run.model, {**head, "model": model.state_dict(), "finished": finished, "training": training}
            )
        write_log(run.log, rows)
    return rows


def _epoch(epoch, model, teacher, train, loss, settings, head, optimizer, schedule, generator) -> Row:
    """One pass over the training images; the terms are summed on the device and read once."""
    model.train()
    if settings.batch_norm == "frozen" and teacher is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    device = train.pixels.device
    heads = (model.fc.weight, teacher.fc.weight if teacher is not None else None)
    sums: dict[str, Tensor] = {}
    learning_rate = schedule.get_last_lr()[0]
    started = time.perf_counter()
    bar = tqdm(
        batches(len(train.labels), settings.batch_size, generator),
        desc=f"epoch {epoch}/{head['steps'][-1]['epochs']}",
        disable=None,
        leave=False,
        unit="batch",
    )
    for number, index in enumerate(bar):
        index = index.to(device)
        labels = train.labels[index]
        inputs = to_input(augment(train.pixels[index], settings.flip, generator), head["mean"], head["std"])
        student_output = forward(model, inputs, settings.precision)
        teacher_output = None
        if teacher is not None:
            with torch.no_grad():
                teacher_output = forward(teacher, inputs, settings.precision)
        terms = loss(student_output, teacher_output, labels, heads, settings)
        optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        optimizer.step()
        schedule.step()
        terms["correct"] = 100 * (student_output.logits.argmax(1) == labels).float().mean()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach() * len(labels)
        if not bar.disable and number % 20 == 0:
            shown = {name: f"{term.item():.3g}" for name, term in terms.items()}
            bar.set_postfix(shown | {"images/s": f"{len(labels) * (number + 1) / (time.perf_counter() - started):.0f}"})
    means = {name: (total / len(train.labels)).item() for name, total in sums.items()}
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        term = min(broken, key=lambda name: name == "total")  # the term that broke it, rather than the sum
        raise RunError(
            f"epoch {epoch}: the loss term {term!r} is {means[term]}; a lower learning rate may help. "
            "The last checkpoint that was saved is whole"
        )
    return {
        "epoch": epoch,
        "loss": means.pop("total"),
        "accuracy": means.pop("correct"),
        **means,
        "lr": learning_rate,
        "images_per_second": round(len(train.labels) / (time.perf_counter() - started), 1),
    }
