"""Checkpoints with a value that no run saves are refused, when they are read or when their run is resumed."""

from __future__ import annotations

import math
import os
import random

import checkpointfiles
import pytest
import torch
from checkpointfiles import put, refused, write

from lwm import models
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError
from lwm.training import WarmUpThenCosine

FIRST, TASK, TRAIN, ROW, PART = "model/conv1.weight", "tasks/0/", "training/", "training/log/0/", "training/position/"


def with_infinity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor([0]), -math.inf)


WRONG = [  # changes of a whole checkpoint, and what the line names
    ({"format": "other"}, "another program"),
    *(({key: value}, key) for key in checkpoint.CHECKPOINT for value in (..., 3.5, None)),
    ({"version": 3}, "version 3"),
    ({"version": 10**30}, "int"),
    ({"class_names": [], "tasks": []}, "class_names"),
    ({"class_names": ["a", "a"], TASK + "classes": ["a", "a"]}, "class_names"),
    ({TASK + "classes": ["", "a"]}, "classes"),
    ({TASK + "classes": ["\x1b[2J", "a"]}, "classes"),
    ({TASK + "classes": ["a", "b"]}, "class_names"),
    ({"tasks": lambda tasks: [*tasks, {**tasks[0], "classes": []}]}, "class_names"),
    ({"tasks": [1]}, "tasks/0"),
    ({TASK + "again": ["a"]}, "more images"),  # of a class that the task itself brings
    ({TASK + "method": "\x1b[2J"}, "method"),
    ({TASK + "answers": {"accuracy": None, "kept": None, "groups": []}}, "answers"),
    ({TASK + "answers": {"classifier": "\x1b[2J", "accuracy": None, "kept": None, "groups": []}}, "classifier"),
    ({TASK + "answers": {"classifier": "head", "accuracy": 101.0, "kept": None, "groups": []}}, "accuracy"),
    ({TASK + "seed": torch.ones(2)}, "task"),
    ({TASK + "beta": ...}, "beta"),
    ({TASK + "hold_back": math.nan}, "hold_back"),
    ({TASK + "judged": ...}, "judged"),
    ({TASK + "judged/split": "train"}, "split"),
    ({TASK + "judged/data_dir": ["photos"]}, "data_dir"),
    ({TASK + "apart": ["0" * 31]}, "apart"),
    ({TASK + "apart": [["0"] * 32]}, "apart"),
    ({TASK + "epochs": -1}, "epochs"),
    ({TASK + "group_accuracy": [101.0]}, "group_accuracy"),
    ({TASK + "group_accuracy": [1.0, 2.0]}, "group_accuracy"),
    ({"image_size": 10**9}, "image_size"),
    ({"loss_form": ["binary"]}, "loss_form"),
    ({"mean": [0.5, 0.5]}, "mean"),
    ({"std": [0.5, 0.5, 0.0]}, "std"),
    ({"architecture": "resnet110"}, "resnet110"),
    ({"architecture": "x\n" * 5000}, "architecture"),
    ({"class_names": list("abc"), TASK + "classes": list("abc")}, "fc.weight"),
    ({FIRST: ...}, "conv1.weight"),
    ({FIRST: [1.0]}, "conv1.weight"),
    ({FIRST: torch.Tensor.double}, "conv1.weight"),
    ({FIRST: with_infinity}, "conv1.weight"),
    ({"model/bn1.running_var": torch.Tensor.neg}, "bn1.running_var"),
    ({FIRST: torch.Tensor.to_sparse}, "Tensor"),
    ({FIRST: lambda t: torch.zeros(1).expand(t.shape)}, "Tensor"),
    ({"more": {(1, 2): 3}}, "key"),
    ({"statistics/counts": torch.zeros_like}, "statistics"),
    ({"statistics/counts": [3.0, 4.0]}, "statistics"),
    ({"statistics/shrinkages": lambda amounts: amounts + 1}, "statistics"),
    ({"statistics/means": torch.Tensor.double}, "statistics"),
    ({"statistics/scatters": with_infinity}, "statistics"),
    ({"statistics/scatters": lambda scatters: scatters[:1]}, "statistics"),  # as of wider features
    ({"classifiers/head": {"accuracy": -1}}, "classifiers"),
    *(({"temperatures/head": value}, "temperatures") for value in (0.0, -1.0, math.nan, 1, "2")),
    *(({"unknown/head": value}, "unknown") for value in ([], [1.0] * 100, [math.nan] * 101, [1] * 101, 2.0)),
    ({"training": {}}, "training"),
    ({TRAIN + "position": ...}, "position"),
    ({TRAIN + "epochs": 0}, "epochs"),
    ({TRAIN + "log": lambda log: log * 3}, "log"),
    ({"finished": True}, "log"),
    ({TRAIN + "generator": lambda t: t[:100].clone()}, "state"),
    ({TRAIN + "torch_rng": torch.zeros_like}, "state"),
    ({TRAIN + "device_rng": torch.zeros(16)}, "device_rng"),
    ({TRAIN + "log": ["epoch 1"]}, "log"),
    ({ROW + "loss": "0.5"}, "log"),
    ({ROW + "epoch": 2}, "log"),
    ({"finished": True, TRAIN + "epochs": 1, ROW + "test_accuracy": ...}, "last epoch"),
    ({TRAIN + "optimizer": ...}, "optimizer"),
    ({TASK + "batch_size": 0}, "batch_size"),
    ({PART + "sums": ...}, "sums"),
    ({PART + "seconds": math.inf}, "seconds"),
    ({PART + "sums/total": "7"}, "sums"),
]


@pytest.fixture(scope="module")
def unfinished() -> dict:
    return checkpointfiles.unfinished()


@pytest.mark.parametrize(("changes", "culprit"), WRONG, ids=lambda value: " ".join(value)[:60])
def test_a_checkpoint_with_a_value_that_no_run_saves_is_refused(tmp_path, unfinished, changes, culprit):
    write(tmp_path / "model.pth", unfinished, changes)
    assert culprit in refused(tmp_path / "model.pth").replace(str(tmp_path), "")


@pytest.mark.parametrize(
    "changes",
    [
        {TRAIN + "epochs": 1, TRAIN + "position": None, ROW + "test_accuracy": ...},  # the last epoch is not judged yet
        {"finished": True, TRAIN + "epochs": 1, **{TRAIN + key: ... for key in ("optimizer", "schedule", "position")}},
        {
            FIRST: lambda tensor: tensor.to(memory_format=torch.channels_last),
            TRAIN + "device_rng": torch.zeros(9).byte(),
        },
        {"finished": True, "training": {}, "statistics": {}, "classifiers": {}, TASK + "beta": ..., TASK + "epochs": 0},
    ],
)
def test_what_a_run_may_save_is_read(tmp_path, unfinished, changes):
    write(tmp_path / "model.pth", unfinished, changes)
    assert torch.equal(
        checkpoint.load(tmp_path / "model.pth")["model"]["conv1.weight"], unfinished["model"]["conv1.weight"]
    )


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for ever
    (tmp_path / "file").touch()
    for path in (
        tmp_path / "none",
        tmp_path,
        tmp_path / "pipe",
        tmp_path / "file" / "model.pth",
        tmp_path / ("x" * 300),
    ):
        refused(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.touch(),
        lambda path: path.write_text("hello\nworld\n"),
        lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
        lambda path: path.write_bytes(b"PK\3\4 no zip"),
        lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path)),
    ],
)
def test_a_file_of_another_kind_is_refused_and_nothing_else_is_said(tmp_path, capfd, make):
    make(tmp_path / "model.pth")
    refused(tmp_path / "model.pth")
    assert capfd.readouterr().err == ""


# Refused when a run resumes ----------------------------------------------------------------------------------------

STATE, GROUP, SCHEDULE = TRAIN + "optimizer/state/", TRAIN + "optimizer/param_groups/0/", TRAIN + "schedule/"


@pytest.mark.parametrize(
    "changes",
    [
        {STATE + "3/momentum_buffer": torch.ones(5)},
        {STATE + "3/momentum_buffer": lambda t: t * math.nan},
        {STATE + "3/momentum_buffer": torch.Tensor.double},
        {TRAIN + "optimizer/state": lambda state: state | {500: state[0]}},
        {TRAIN + "optimizer/param_groups": ...},
        {TRAIN + "optimizer/param_groups": lambda groups: groups * 2},
        {GROUP + "params": lambda parameters: parameters[1:]},
        {GROUP + "lr": math.nan},
        {SCHEDULE + "base_lrs": ["0.1"]},
        {SCHEDULE + "last_epoch": -3},
        {SCHEDULE + "_step_count": 0},
    ],
    ids=lambda changes: "".join(changes)[9:],
)
def test_a_damaged_state_of_the_optimiser_is_refused(unfinished, changes):
    optimizer = torch.optim.SGD(models.build("resnet32", 2, 32).parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmUpThenCosine(10, 0.1))

    def check(training: dict) -> None:
        checkpoint.checked_optimizer(training["optimizer"], optimizer)
        checkpoint.checked_state(training["schedule"], schedule.state_dict(), "schedule")

    check(unfinished["training"])
    with pytest.raises(InputError, match=r"cannot resume: .*(optimiser|schedule)"):
        check(put(unfinished, changes)["training"])


def test_what_the_settings_say_of_the_optimiser_is_not_taken_from_the_file(unfinished):
    optimizer = torch.optim.SGD(models.build("resnet32", 2, 32).parameters(), 0.1, momentum=0.9)
    odd = {GROUP + "params": lambda own: [0, *reversed(own[1:])], GROUP + "maximize": True, GROUP + "momentum": 0.5}
    groups = checkpoint.checked_optimizer(put(unfinished, odd)["training"]["optimizer"], optimizer)["param_groups"]
    lr = unfinished["training"]["optimizer"]["param_groups"][0]["lr"]
    assert groups == [optimizer.state_dict()["param_groups"][0] | {"lr": lr}]
