"""Full disks, vanished folders, NaN and a lack of memory lose nothing that was saved."""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import image_folder
from killing import differences, left_behind
from tinyruns import SMALL, STEPS, at_step, one_line

import demo
import incremental_learning_system as incremental
import predict
import train_teacher_model as trainer
from lwm import classifiers, evaluation, models
from lwm.images import datasets
from lwm.reporting import report
from lwm.runtime import checkpoint
from lwm.runtime.errors import one_line_errors

pytestmark = pytest.mark.usefixtures("small_and_heeding_ctrl_c")


def batches_done(folder: Path) -> int:
    return checkpoint.load(folder / "student_model.pth")["training"]["position"]["batches"]


def failing_with(error: BaseException):
    def fail(*arguments, **named):
        raise error

    return fail


def test_a_run_that_another_one_overtook_is_refused(tmp_path, whole, run, monkeypatch, capsys):
    """The folder was free when this run was opened, and another one saved while this one read its images."""
    train = datasets.Source.train

    def while_another_saves(*arguments):
        shutil.copy(whole / "student_model.pth", tmp_path)
        return train(*arguments)

    monkeypatch.setattr(datasets.Source, "train", while_another_saves)
    assert run("student", tmp_path) == 2
    assert "another run" in one_line(capsys)
    assert (tmp_path / "student_model.pth").read_bytes() == (whole / "student_model.pth").read_bytes()


def test_what_a_killed_run_left_half_written_is_cleared_away_and_nothing_else(tmp_path, run):
    for name in (".student_model.pth.abc.tmp", ".student_log.csv.abc.tmp", ".lock", ".mine.tmp"):
        (tmp_path / name).touch()
    assert run("student", tmp_path) == 0
    assert left_behind(tmp_path) == [".mine.tmp"]


@contextlib.contextmanager
def disk(folder: Path, options: str):
    folder.mkdir()
    try:
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        subprocess.run(line, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(tmp_path, whole, run, capsys):
    folder = tmp_path / "disk"
    with disk(folder, "size=6m"):  # a checkpoint takes 3.8 MB: there is no room for a second one beside it
        assert run("student", folder, "--save-interval-steps", "3") == 1
        assert f"the last checkpoint, {folder / 'student_model.pth'}, is whole" in one_line(capsys)
        assert batches_done(folder) == 3
        assert {path.name for path in folder.iterdir()} == {"student_model.pth", "student_log.csv"}
        subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
        assert run("student", folder, "--resume") == 0
        assert differences("student", whole, folder) == {}


def test_a_folder_that_cannot_be_written_is_said_before_the_training(tmp_path, run, capsys):
    with disk(tmp_path / "disk", "ro"):
        for folder in (tmp_path / "disk", tmp_path / "disk" / "new"):
            assert run("student", folder) == 2
            assert "cannot be written" in one_line(capsys)


def test_a_folder_that_vanishes_is_said_and_not_made_again(tmp_path, run, monkeypatch, capsys):
    at_step(monkeypatch, 3, lambda terms: shutil.rmtree(tmp_path / "out"))
    assert run("student", tmp_path / "out", "--save-interval-steps", "2") == 1
    assert "there is no checkpoint" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_term_that_is_not_finite_is_named_with_its_step(tmp_path, whole, run, monkeypatch, capsys):
    """At the third step of the second epoch, though the loop looks only after the fourth."""

    def spoil(terms):
        broken = terms["classification"] * math.nan
        return terms | {"classification": broken, "total": terms["total"] + broken}

    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 3, spoil)
        assert run("student", tmp_path, "--save-interval-steps", "2") == 1
    said = one_line(capsys)
    assert "epoch 2/2, step 3 of 5: the loss term 'classification' is nan" in said
    assert f"the last checkpoint, {tmp_path / 'student_model.pth'}, is whole" in said
    assert batches_done(tmp_path) == 2
    assert run("student", tmp_path, "--resume") == 0
    assert differences("student", whole, tmp_path) == {}


@pytest.mark.parametrize("step", [STEPS - 1, 2 * STEPS])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, run, monkeypatch, capsys, step):
    """Every term is finite, and its gradient is not; inside an epoch and at the end of the run."""

    def spoil(terms):
        nothing = terms["total"] - terms["total"].detach()
        return terms | {"total": terms["total"] + nothing.abs().sqrt()}

    at_step(monkeypatch, step, spoil)
    assert run("student", tmp_path, "--save-interval-steps", "1") == 1
    assert "no longer finite" in one_line(capsys)
    assert batches_done(tmp_path) == (step - 1) % STEPS


def test_a_batch_of_one_image_is_named_if_batch_norm_cannot_take_it(tmp_path, capsys):
    folder = image_folder(tmp_path / "data", {"a": 3, "b": 2}, {"a": 1, "b": 1})
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--cache-dir", str(tmp_path / "cache")]
    flags += ["--old-classes", "a,b", "--model", "resnet18", "--image-size", "8", "--batch-size", "2"]
    assert trainer.main([*flags, "--output-dir", str(tmp_path / "out")]) == 1
    assert "a batch of one image" in one_line(capsys)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("owner", "name", "finished"),
    [
        (evaluation, "predict", False),
        (classifiers, "features_of", False),
        (report, "_write", True),
    ],
)
def test_what_fails_after_the_last_epoch_costs_none(tmp_path, whole, run, monkeypatch, role, owner, name, finished):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_with(MemoryError()))
        assert run(role, tmp_path) == 1
    saved = checkpoint.load(tmp_path / f"{role}_model.pth")
    assert (len(saved["training"]["log"]), saved["finished"]) == (2, finished)
    at_step(monkeypatch, 1, failing_with(AssertionError("trained again")))
    assert run(role, tmp_path, "--resume") == 0
    assert differences(role, whole, tmp_path) == {}
    assert (tmp_path / f"{role}_report.html").exists()


def test_no_network_ever_sees_more_images_than_a_batch_of_its_run(tmp_path):
    seen: list[int] = []

    def count(module, inputs, output):
        if isinstance(module, models.Network):
            seen.append(len(inputs[0]))

    def largest(act: Callable[..., int], arguments: list[str]) -> int:
        seen.clear()
        assert act(arguments) == 0
        return max(seen)

    data = image_folder(tmp_path / "data", dict.fromkeys("abcd", 9), dict.fromkeys("abcd", 4))
    flags = ["--dataset", "folder", "--data-dir", str(data), "--cache-dir", str(tmp_path / "cache"), "--epochs", "1"]
    flags += ["--output-dir", str(tmp_path)]
    both = ["--teacher", str(tmp_path / "teacher_model.pth"), "--student", str(tmp_path / "student_model.pth")]
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        assert largest(trainer.main, [*SMALL, *flags, "--old-classes", "a,b", "--batch-size", "7"]) == 7
        assert largest(incremental.main, [*both[:2], *flags, "--new-classes", "c,d", "--batch-size", "6"]) == 6
        assert largest(demo.main, [*both, *flags]) == 6
        assert largest(predict.main, ["--checkpoint", both[3], str(data / "train" / "a")]) == 6
    finally:
        hook.remove()


def test_without_a_run_64_images_at_a_time_are_judged_at_most():
    assert [checkpoint.batch_size_of({"tasks": [{"batch_size": size}]}) for size in (2, 64, 2048, None)] == [
        2,
        64,
        64,
        64,
    ]


@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried", "can't allocate memory:\n9", "x_ALLOC_FAILED", "bad_alloc"]
)
def test_a_lack_of_memory_is_one_line(capsys, words):
    assert one_line_errors(failing_with(RuntimeError(words)))([]) == 1
    assert one_line(capsys).startswith("error: out of memory")


def test_a_lack_of_memory_in_training_names_the_batch_size_and_what_is_saved(tmp_path, run, monkeypatch, capsys):
    at_step(monkeypatch, 3, failing_with(MemoryError()))
    assert run("student", tmp_path, "--save-interval-steps", "2") == 1
    assert "out of memory on cpu with --batch-size 64" in one_line(capsys)
    assert batches_done(tmp_path) == 2
    at_step(monkeypatch, 1, failing_with(RuntimeError("a mistake in a loss")))  # which is not hidden
    with pytest.raises(RuntimeError, match="a mistake in a loss"):
        run("student", tmp_path, "--resume")
