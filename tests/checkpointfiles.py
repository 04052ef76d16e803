"""Whole checkpoints, and such with other values in them, written without the checks of checkpoint.py."""

from __future__ import annotations

import copy
import functools
import operator
from pathlib import Path
from typing import Any

import conftest
import torch

from lwm import models
from lwm.runtime import checkpoint
from lwm.training import WarmUpThenCosine


def training_of(model: torch.nn.Module, epochs: int = 2) -> dict[str, Any]:
    """The training state of a run that was stopped in its second epoch; the network makes one step for it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmUpThenCosine(10, 0.1))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    schedule.step()
    random = torch.Generator().manual_seed(0).get_state()
    return {
        "epochs": epochs,
        "teacher": "",
        "images": "8, abc",
        "machine": {"device": "cpu", "threads": 2},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "generator": random,
        "torch_rng": random,
        "device_rng": None,
        "log": [{"epoch": 1, "loss": 0.5, "accuracy": 60.0, "lr": 0.1, "test_accuracy": 55.5}],
        "position": {"batches": 3, "order": random, "learning_rate": 0.05, "seconds": 1.5, "sums": {"total": 7.0}},
    }


def unfinished(model: models.Network | None = None) -> dict[str, Any]:
    """The checkpoint of a run that was stopped inside an epoch, with all that a checkpoint can have."""
    torch.manual_seed(0)
    model = model or models.build("resnet32", 2, 32)
    width = model.fc.in_features
    statistics = {"counts": torch.tensor([3.0, 4.0]), "means": torch.rand(2, width), "shrinkages": torch.rand(2)}
    statistics |= {"scatters": torch.eye(width).repeat(2, 1, 1), "derived": torch.zeros(2)}
    calibrated = {
        "temperatures": {"head": 2.0},
        "calibrated_on": 9,
        "unknown": {"head": [float(step) for step in range(101)]},
    }
    changes = calibrated | {"statistics": statistics, "classifiers": {"head": {"accuracy": 50.0, "accuracy_old": None}}}
    tasks = [dict.fromkeys(checkpoint.SETTINGS) | conftest.task_of(["b", "a"])]
    changes |= {"tasks": tasks, "training": training_of(model), "finished": False}
    return conftest.checkpoint_of(model, "resnet32", ["b", "a"], **changes)


def refused(path: Path) -> str:
    """The one line with which ``load`` refuses a file; it names it and is of bearable length."""
    text = conftest.refused(checkpoint.load, path)
    assert str(path) in text
    assert text.isprintable()
    assert len(text) < 350 + len(str(path))
    return text


def put(content: dict, changes: dict) -> dict:
    """A copy with other values in it, at places like "tasks/0/epochs"; ``...`` takes one out, a function changes it."""
    content = copy.deepcopy(content)
    for place, value in changes.items():
        *before, last = (int(key) if key.isdigit() else key for key in place.split("/"))
        inner = functools.reduce(operator.getitem, before, content)
        if value is ...:
            del inner[last]
        else:
            inner[last] = value(inner[last]) if callable(value) else value
    return content


def write(path: Path, content: dict, changes: dict | None = None) -> None:
    """As ``checkpoint.save`` would, without its checks."""
    content = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION} | content
    torch.save(put(content, changes) if changes else content, path)
