"""Checkpoints with a value that no run saves are refused, when they are read or when their run is resumed."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from checkpointfiles import put, refused, write
from conftest import checkpoint_of

import incremental_learning_system as incremental
from lwm import models
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError, RunError
from lwm.runtime.run_folder import Run

FIRST, STEP, TRAIN, ROW, PART = "model/conv1.weight", "steps/0/", "training/", "training/log/0/", "training/position/"
WRONG = {  # changes of a whole checkpoint with a training state, and what is said of it
    "no class": ({"class_names": [], "steps": []}, "not unique, or there are none"),
    "one class twice": ({"class_names": ["a", "a"], STEP + "classes": ["a", "a"]}, "not unique"),
    "a class without a name": ({"class_names": ["", "a"], STEP + "classes": ["", "a"]}, "a class name"),
    "a class that is a number": ({"class_names": [1, 2], STEP + "classes": [1, 2]}, "a class name"),
    "a class that clears the screen": ({"class_names": ["\x1b[2J", "a"]}, "a class name"),
    "a class of half a letter": ({"class_names": ["\ud800", "a"]}, "a class name"),
    "a class that no step taught": ({STEP + "classes": ["b"]}, "the steps' classes are not"),
    "classes in another order": ({STEP + "classes": ["a", "b"]}, "the steps' classes are not"),
    "no step": ({"steps": []}, "the steps' classes are not"),
    "a step without classes": ({"steps": lambda steps: [*steps, {**steps[0], "classes": []}]}, "the steps' classes"),
    "a step that is a number": ({"steps": [1]}, "a step is not a dict"),
    "a step without a folder": ({STEP + "data_dir": ...}, "'data_dir' of a step"),
    "a setting that is a tensor": ({STEP + "seed": torch.ones(2)}, "a setting of a step"),
    "a setting that is a list": ({STEP + "seed": [1]}, "a setting of a step"),
    "a setting of thousands of digits": ({STEP + "seed": 10**500}, "absurd"),
    "more than all held back": ({STEP + "hold_back": 1.5}, "out of range"),
    "less than none held back": ({STEP + "hold_back": -0.1}, "out of range"),
    "nothing that is a number held back": ({STEP + "hold_back": math.nan}, "out of range"),
    "no epochs": ({STEP + "epochs": 0}, "out of range"),
    "a method that is none": ({STEP + "method": None}, "'method' of a step"),
    "an accuracy above all": ({STEP + "group_accuracy": [101.0]}, "accuracy"),
    "an accuracy that is none": ({STEP + "group_accuracy": [math.nan]}, "accuracy"),
    "an accuracy that is a text": ({STEP + "group_accuracy": ["50"]}, "accuracy"),
    "accuracies of no group": ({STEP + "group_accuracy": [1.0, 2.0]}, "groups that do not exist"),
    "image size 7": ({"image_size": 7}, "image size"),
    "image size 10**9": ({"image_size": 10**9}, "image size"),
    "image size -32": ({"image_size": -32}, "image size"),
    "image size True": ({"image_size": True}, "'image_size' is missing or not a int"),
    "loss form": ({"loss_form": "other"}, "the loss form"),
    "mean of two": ({"mean": [0.5, 0.5]}, "'mean'"),
    "mean of texts": ({"mean": ["0.5"] * 3}, "'mean'"),
    "mean without bound": ({"mean": [0.5, 0.5, -math.inf]}, "'mean'"),
    "mean far off": ({"mean": [0.5, 0.5, 1e30]}, "'mean'"),
    "std 0": ({"std": [0.5, 0.5, 0.0]}, "'std'"),
    "std below 0": ({"std": [0.5, 0.5, -0.5]}, "'std'"),
    "std that float32 has not": ({"std": [0.5, 0.5, 1e-300]}, "'std'"),
    "std that is no number": ({"std": [0.5, 0.5, math.nan]}, "'std'"),
    "another network": ({"architecture": "resnet110"}, "the weights do not fit resnet110"),
    "a network that there is not": ({"architecture": "resnet99"}, "no architecture 'resnet99'"),
    "a network with a long name": ({"architecture": "x\n" * 5000}, "no architecture"),
    "weights of three classes": (
        {"class_names": list("abc"), STEP + "classes": list("abc")},
        "with 3 classes ('fc.weight' is [2, 64] torch.float32, [3, 64] torch.float32 is needed)",
    ),
    "no weights": ({"model": {}}, "the weights do not fit resnet32"),
    "weights that are missing": ({FIRST: ...}, "['conv1.weight']"),
    "weights too many": ({"model/more": torch.ones(1)}, "['more']"),
    "weights under a number": ({"model": lambda model: model | {5: torch.ones(1)}}, "['5']"),
    "weights that are a list": ({FIRST: [1.0]}, "not a tensor"),
    "weights in double": ({FIRST: torch.Tensor.double}, "torch.float64"),
    "weights in half": ({FIRST: torch.Tensor.half}, "torch.float16"),
    "weights of another shape": ({FIRST: lambda t: t.view(-1)}, "[432]"),
    "weights that are no numbers": ({FIRST: lambda t: t.index_fill(0, torch.tensor([5]), math.nan)}, "not finite"),
    "weights without bound": ({FIRST: lambda t: t.index_fill(0, torch.tensor([5]), -math.inf)}, "not finite"),
    "a variance below zero": ({"model/bn1.running_var": torch.Tensor.neg}, "negative"),
    "a count below zero": ({"model/bn1.num_batches_tracked": torch.tensor(-1)}, "negative"),
    "a sparse tensor": ({FIRST: torch.Tensor.to_sparse}, "run code when it is read (torch._utils._rebuild_sparse"),
    "a tensor on no device": ({FIRST: lambda t: t.to("meta")}, "run code when it is read"),
    "a set": ({"more": {1, 2}}, "run code when it is read (__builtin__.set)"),
    "bytes": ({"more": b"1"}, "run code when it is read (_codecs.encode)"),
    "a key that is a pair": ({"more": {(1, 2): 3}}, "a key in it"),
    "a key that is nothing": ({"more": {None: 3}}, "a key in it"),
    "training without state": ({"training": {}}, "'epochs' of the training state"),
    "training without a log": ({TRAIN + "log": ...}, "'log' of the training state"),
    "training without a position": ({TRAIN + "position": ...}, "not whole"),
    "training of no epochs": ({TRAIN + "epochs": 0}, "as long as the training"),
    "training that is over": ({TRAIN + "epochs": 1, TRAIN + "log": lambda log: log * 2}, "as long as the training"),
    "training that is said to be over": ({"finished": True}, "as long as the training"),
    "random state cut off": ({TRAIN + "generator": lambda t: t[:100].clone()}, "a random state"),
    "random state of floats": ({TRAIN + "torch_rng": torch.Tensor.float}, "a random state"),
    "random state of zeros": ({TRAIN + "torch_rng": torch.zeros_like}, "a random state"),
    "random state in a list": ({TRAIN + "torch_rng": torch.Tensor.tolist}, "'torch_rng'"),
    "log of texts": ({TRAIN + "log": ["epoch 1"]}, "a row of the log"),
    "row of texts": ({ROW + "loss": "0.5"}, "a row of the log"),
    "row of tensors": ({ROW + "loss": torch.ones(1)}, "a row of the log"),
    "row under a number": ({TRAIN + "log": [{1: 0.5}]}, "a row of the log"),
    "row of another epoch": ({ROW + "epoch": 2}, "a row of the log"),
    "rows with other columns": (
        {TRAIN + "epochs": 3, TRAIN + "log": lambda log: [*log, {"epoch": 2, "loss": 0.5}]},
        "a row of the log",
    ),
    "last epoch not judged": (
        {TRAIN + "epochs": 1, ROW + "test_accuracy": ...},
        "the last epoch",
    ),
    "last epoch judged by nothing": (
        {"finished": True, TRAIN + "epochs": 1, TRAIN + "position": None, ROW + "test_accuracy": None},
        "the last epoch",
    ),
    "images": ({TRAIN + "images": 8}, "the images"),
    "machine": ({TRAIN + "machine": "cpu"}, "trained on"),
    "machine in a tensor": ({TRAIN + "machine/threads": torch.ones(2)}, "trained on"),
    "position": ({TRAIN + "position": 3}, "position"),
    "position without sums": ({PART + "sums": ...}, "'sums' of the position"),
    "position of a batch that is no number": ({PART + "batches": "3"}, "'batches' of the position"),
    "position below zero": ({PART + "batches": -3}, "a number of the position"),
    "position for ever": ({PART + "seconds": math.inf}, "a number of the position"),
    "position at no learning rate": ({PART + "learning_rate": math.nan}, "a number of the position"),
    "position in no order": ({PART + "order": lambda t: t[1:].clone()}, "a random state"),
    "sums of texts": ({PART + "sums/total": "7"}, "the sums"),
    "device's random state": ({TRAIN + "device_rng": torch.zeros(16)}, "random state of the device"),
    "optimiser": ({TRAIN + "optimizer": [1]}, "'optimizer'"),
    "schedule": ({TRAIN + "schedule": ...}, "'schedule'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_checkpoint_with_a_value_that_no_run_saves_is_refused(tmp_path, unfinished, kind):
    changes, words = WRONG[kind]
    write(tmp_path / "model.pth", unfinished, changes)
    said = refused(tmp_path / "model.pth")
    assert words in said
    assert len(said) < 400 + len(str(tmp_path))


def test_a_checkpoint_may_share_its_tensors_or_have_other_strides(tmp_path, unfinished):
    """What is refused is more than is in the file; each tensor has its own memory then."""
    path = tmp_path / "model.pth"
    changes = {FIRST: lambda t: t.to(memory_format=torch.channels_last), "model/fc.bias": torch.zeros(1).expand(2)}
    changes |= {TRAIN + "torch_rng": unfinished["training"]["generator"], TRAIN + "machine": {}}
    write(path, unfinished, changes)
    loaded = checkpoint.load(path)
    loaded["model"]["fc.bias"][0] = 1
    assert loaded["model"]["fc.bias"].tolist() == [1, 0]
    assert torch.equal(loaded["model"]["conv1.weight"], unfinished["model"]["conv1.weight"])
    path.write_bytes(b"written over")  # nothing of it is still a view of the file
    assert torch.equal(loaded["model"]["conv1.weight"], unfinished["model"]["conv1.weight"])


def test_a_tensor_that_wants_a_gradient_or_is_negated_is_read_as_plain_numbers(tmp_path, example):
    path = tmp_path / "model.pth"
    write(path, example, {FIRST: lambda t: t.clone().requires_grad_()})
    refused(path)
    write(path, example, {FIRST: lambda t: torch._neg_view(t)})
    refused(path)


def test_methods_that_the_file_puts_into_a_dict_are_not_asked_for(tmp_path, example):
    """Pickle can set attributes of an OrderedDict: one named items would hide what is in it from every check."""
    path = tmp_path / "model.pth"

    class Hiding(dict):
        def __reduce__(self):
            return (
                OrderedDict,
                (),
                dict.fromkeys(("items", "keys", "values", "get"), OrderedDict),
                None,
                iter(self.items()),
            )

    write(path, example | {"model": Hiding(example["model"] | {"conv1.weight": torch.ones(1)})})
    assert not torch.load(path, weights_only=True)["model"].items()
    assert "'conv1.weight' is [1]" in refused(path)


# Refused when a run resumes ----------------------------------------------------------------------------------------

STATE, GROUP, COSINE = "training/optimizer/state/", "training/optimizer/param_groups/0/", "training/schedule/"
BROKEN_STATES = {
    "momentum of another shape": {STATE + "3/momentum_buffer": torch.ones(5)},
    "momentum that is no number": {STATE + "3/momentum_buffer": lambda t: t * math.nan},
    "momentum in double": {STATE + "3/momentum_buffer": torch.Tensor.double},
    "momentum that is a text": {STATE + "3/momentum_buffer": "0"},
    "momentum of no parameter": {"training/optimizer/state": lambda state: state | {500: state[0]}},
    "momentum under a name": {"training/optimizer/state": lambda state: state | {"a": state[0]}},
    "a state that is a list": {"training/optimizer/state": []},
    "an entry that is a number": {STATE + "3": 1},
    "no groups": {"training/optimizer/param_groups": ...},
    "too many groups": {"training/optimizer/param_groups": lambda groups: groups * 2},
    "parameters too few": {GROUP + "params": lambda parameters: parameters[1:]},
    "a learning rate that is a text": {GROUP + "lr": "0.1"},
    "a learning rate below zero": {GROUP + "lr": -0.1},
    "a learning rate that is no number": {GROUP + "lr": math.nan},
    "a base that is a text": {COSINE + "base_lrs": ["0.1"]},
    "two bases": {COSINE + "base_lrs": [0.1, 0.1]},
    "a step that is a text": {COSINE + "last_epoch": "5"},
    "a step below zero": {COSINE + "last_epoch": -3},
    "a cosine of no steps": {COSINE + "T_max": 0},
    "a cosine of too many steps": {COSINE + "T_max": 10**12},
    "a cosine of half a step": {COSINE + "T_max": 0.5},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The flags of a student that was stopped inside its first epoch, and its checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    teacher = checkpoint_of(models.build("resnet32", 2, 8), "resnet32", ["0", "1"], 8)
    checkpoint.save(folder / "teacher.pth", teacher)
    flags = ["--teacher", str(folder / "teacher.pth"), "--dataset", "digits", "--new-classes", "2,3", "--epochs", "2"]
    flags += ["--output-dir", str(folder), "--save-interval-steps", "2", "--device", "cpu"]
    save = Run.save

    def save_and_stop(run, content):
        save(run, content)
        raise RunError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save_and_stop)
        assert incremental.main(flags) == 1
    return [*flags, "--resume"], folder / "student_model.pth", checkpoint.load(folder / "student_model.pth")


@pytest.mark.parametrize("kind", BROKEN_STATES)
def test_a_damaged_state_of_the_optimiser_is_refused(unfinished, kind):
    optimizer = torch.optim.SGD(models.build("resnet32", 2, 32).parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def check(training):
        checkpoint.checked_optimizer(training["optimizer"], optimizer)
        checkpoint.checked_state(training["schedule"], schedule.state_dict(), "schedule")

    check(unfinished["training"])
    with pytest.raises(InputError, match=r"cannot resume: the saved state of the (optimiser|schedule) is damaged"):
        check(put(unfinished, BROKEN_STATES[kind])["training"])


@pytest.mark.parametrize(
    "changes",
    [
        BROKEN_STATES["momentum of another shape"],
        BROKEN_STATES["a base that is a text"],
        {PART + "batches": 1000},
        {PART + "sums": {"other": 1.0}},
    ],
)
def test_a_run_is_not_resumed_from_a_damaged_state(stopped, capsys, changes):
    flags, path, content = stopped
    write(path, content, changes)
    before = path.read_bytes()
    assert incremental.main(flags) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("error: cannot resume: ")
    assert path.read_bytes() == before


def test_what_the_settings_say_of_the_optimiser_is_not_taken_from_the_file(stopped, capsys):
    flags, path, content = stopped
    odd = {
        GROUP + "params": lambda parameters: [0, *reversed(parameters[1:])],
        GROUP + "maximize": True,
        GROUP + "momentum": 0.5,
    }
    logs = []
    for changes in (odd, {}):
        write(path, content, changes)
        assert incremental.main(flags) == 0
        logs.append([row["loss"] for row in checkpoint.load(path)["training"]["log"]])
    assert logs[0] == logs[1]
