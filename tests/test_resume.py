"""A run that stopped goes on to the same bits, and only as the run that was saved."""

from __future__ import annotations

import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import image_folder
from killing import SAVES, TINY, differences, kill_and_resume, left_behind
from tinyruns import RUN, SMALL, STEPS, at_step, first, interrupt, one_line, said_where

import config
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import training
from lwm.losses import METHODS
from lwm.reporting import plots
from lwm.runtime import checkpoint, hardware
from lwm.runtime.run_folder import TASK_SETTINGS, open_run_folder
from lwm.runtime.settings import read_settings

draw_curves = plots.curves

pytestmark = pytest.mark.usefixtures("small_and_heeding_ctrl_c")


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def resaved(source: Path, target: Path, change: Callable[[dict], object]) -> None:
    """Write a checkpoint with changes."""
    saved = checkpoint.load(source)
    change(saved)
    checkpoint.save(target, saved)


@pytest.fixture
def stopped(run, monkeypatch, capsys) -> Callable[..., None]:
    """``stopped(role, folder, step, *flags)`` runs a script that a SIGTERM stops in its ``step``-th step."""

    def start(role: str, folder: Path, step: int, *flags: str) -> None:
        with monkeypatch.context() as patch:
            at_step(patch, step, interrupt)
            assert run(role, folder, *flags) == 128 + signal.SIGTERM
        said_where(role, folder, capsys)

    return start


# The same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "step"), [("teacher", 1), ("teacher", STEPS), ("student", STEPS + 2)])
def test_a_run_that_stops_once_ends_with_the_same_bits(tmp_path, whole, run, stopped, role, step):
    stopped(role, tmp_path, step)
    assert run(role, tmp_path, "--resume") == 0
    assert differences(role, whole, tmp_path) == {}


def test_a_run_that_stops_after_every_step_ends_with_the_same_bits(tmp_path, whole, run, monkeypatch, capsys):
    at_step(monkeypatch, None, interrupt)
    for _ in range(2 * STEPS - 1):
        assert run("student", tmp_path, "--resume") == 143
        said_where("student", tmp_path, capsys)
    assert run("student", tmp_path, "--resume") == 0  # the signal in its last step comes too late to stop anything
    assert differences("student", whole, tmp_path) == {}


def test_the_random_state_of_a_device_is_saved_and_gone_on_from(tmp_path, run, stopped, monkeypatch):
    state, put_back = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(training, "random_state", lambda device: state)
    monkeypatch.setattr(training, "set_random_state", lambda device, saved: put_back.append(saved))
    stopped("student", tmp_path, 2)
    assert put_back == []
    assert run("student", tmp_path, "--resume") == 0
    assert [saved.tolist() for saved in put_back] == [state.tolist()]


@pytest.mark.parametrize(("step", "position"), [(STEPS, 4), (STEPS + 1, 4), (9, 2)])
def test_what_a_killed_run_had_not_saved_is_done_again(tmp_path, whole, run, monkeypatch, step, position):
    """An exception stands for the kill. In the second case the log has a row more than the checkpoint."""

    def die(terms):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, step, die)
        run("student", tmp_path, "--save-interval-steps", "2")
    assert checkpoint.load(tmp_path / "student_model.pth")["training"]["position"]["batches"] == position
    assert run("student", tmp_path, "--resume") == 0
    assert differences("student", whole, tmp_path) == {}


def test_a_run_with_more_epochs_goes_on_to_the_same_bits_too(tmp_path, whole, run, stopped):
    more = ["--resume", "--epochs", "4"]
    one, other = tmp_path / "left alone", tmp_path / "stopped"
    for folder in (one, other):
        folder.mkdir()
        shutil.copy(whole / "student_model.pth", folder)
    assert run("student", one, *more) == 0
    stopped("student", other, 3, *more)
    assert run("student", other, *more) == 0
    assert differences("student", one, other) == {}
    rates = [row["lr"] for row in checkpoint.load(other / "student_model.pth")["training"]["log"]]
    assert rates[2:] == rates[:2]  # the cosine begins anew


def test_kills_change_no_bit(tmp_path, whole):
    """Real processes and SIGKILL, two of four inside a save."""
    left_alone, killed = tmp_path / "left alone", tmp_path / "killed"
    flags = [*TINY, *SAVES, "--epochs", "6", "--teacher", str(first(whole)), "--output-dir"]
    started = time.perf_counter()
    assert incremental.main([*flags, str(left_alone)]) == 0
    # Within half of the time that it takes: it is not to end before.
    seconds = (time.perf_counter() - started) / 2
    model, moments = killed / "student_model.pth", random.Random(0)
    counts = kill_and_resume(incremental.main, [*flags, str(killed)], model, 4, seconds, moments)
    assert counts["kills"] == 4
    assert counts["inside a save"] >= 1
    assert incremental.main([*flags, str(killed), "--resume"]) == 0
    assert differences("student", left_alone, killed) == {}
    assert left_behind(killed) == []


def test_a_finished_run_mends_what_a_kill_left_undone_and_nothing_else(tmp_path, whole, run, monkeypatch):
    monkeypatch.setattr(plots, "curves", draw_curves)
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    before = contents(folder)
    assert len(before) == 8  # checkpoint, log, curves and report of each
    for role in ("teacher", "student"):
        assert run(role, folder, "--resume") == 0
    assert contents(folder) == before
    (folder / "student_log.csv").write_text("epoch\n1\n")
    (folder / "student_curves.png").unlink()
    assert run("student", folder, "--resume") == 0
    assert all(path.read_bytes() == content for path, (content, _) in before.items())


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_finished_model_is_its_weights_and_statistics(whole, role):
    """Of an unfinished one half is momentum."""
    path = whole / f"{role}_model.pth"
    saved = checkpoint.load(path)
    tensors = [*saved["model"].values(), *saved["statistics"].values()]
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    assert size < path.stat().st_size < size + 150_000  # random states, and 300 bytes a tensor of the archive's own


# What is gone on from ---------------------------------------------------------------------------------------------


def test_resume_with_nothing_there_is_a_fresh_start(tmp_path, whole, run, monkeypatch):
    monkeypatch.setattr(config, "RESUME", True)
    assert run("student", tmp_path) == 0
    assert differences("student", whole, tmp_path) == {}


def test_a_student_of_another_folder_is_gone_on_from_and_left_as_it_is(tmp_path, whole, run, stopped, capsys):
    stopped("student", tmp_path / "other", 2)
    for source in (whole, tmp_path / "other"):
        before, folder = contents(source), tmp_path / f"from {source.name}"
        other = ["--resume", "--student", str(source / "student_model.pth")]
        assert run("student", folder, "--seed", "9") == 0
        assert run("student", folder, *other) == 2
        assert "--overwrite" in one_line(capsys)
        assert differences("student", whole, folder) != {}
        assert run("student", folder, "--overwrite", *other) == 0
        assert differences("student", whole, folder) == {}
        assert contents(source) == before


def test_the_command_to_go_on_with_does_not_begin_in_another_folder_again(tmp_path, whole, monkeypatch):
    """--student in both of its forms, and a folder with a blank in its name."""
    flags = ["--teacher", str(first(whole)), "--output-dir", str(tmp_path / "a folder"), "--overwrite", "--resume"]
    model = str(whole / "student_model.pth")
    for words in ([*flags, "--student", model], [f"--student={model}", *flags]):
        monkeypatch.setattr(sys, "argv", ["incremental_learning_system.py", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", *sys.argv])
        run_folder = open_run_folder(read_settings("incremental_learning_system", method=METHODS), "student")
        assert shlex.split(run_folder.command) == [*sys.orig_argv[:3], *flags[:-2], "--resume"]


def test_an_unfinished_run_keeps_its_epochs(tmp_path, run, stopped, capsys):
    stopped("teacher", tmp_path, 2)
    before = contents(tmp_path)
    for epochs in ("1", "3"):
        assert run("teacher", tmp_path, "--resume", "--epochs", epochs) == 2
        assert "--epochs 2" in one_line(capsys)
    assert contents(tmp_path) == before


# Another run than the one that was saved --------------------------------------------------------------------------

ANOTHER = """
method=lwf-mc loss_form=softmax beta=2.0 gamma=2.0 temperature=3.0 batch_norm=frozen batch_size=32 momentum=0.5
weight_decay=0.1 warm_up=0.2 flip=True precision=bf16 hold_back=0.1 calibration=0.3 seed=9 balanced=True freeze=1
backbone_lr=0.001
"""  # settings of the student, with another value than the run has
OTHER = dict(pair.split("=") for pair in ANOTHER.split())
CHANGED = [  # script, flags, what is named with its old value and its new one
    *(("student", [f"--{name.replace('_', '-')}", value], f"{name} was ") for name, value in OTHER.items()),
    ("student", ["--incremental-lr", "0.5"], "learning_rate was 0.0125 and is now 0.5"),
    ("student", ["--new-classes", "2,4"], "class_names was "),
    ("student", ["--epochs", "1"], "--epochs 2"),
    ("teacher", ["--lr", "0.5"], "learning_rate was "),
    ("teacher", ["--image-size", "16"], "image_size was 8 and is now 16"),
    ("teacher", ["--model", "resnet110"], "architecture was "),
    ("teacher", ["--std", "0.5,0.5,0.5"], "std was "),
    ("teacher", ["--old-classes", "1,0"], "class_names was "),
]


def test_every_recorded_setting_has_another_value_here():
    assert OTHER.keys() == set(TASK_SETTINGS)


@pytest.mark.parametrize(("role", "flags", "culprit"), CHANGED, ids=[" ".join(flags) for _, flags, _ in CHANGED])
def test_a_changed_setting_is_refused(whole, run, monkeypatch, capsys, role, flags, culprit):
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)  # no warning
    before = contents(whole)
    assert run(role, whole, "--resume", *(flag for flag in flags if flag != "True")) == 2
    assert culprit in one_line(capsys)
    assert contents(whole) == before


def test_another_teacher_is_refused(tmp_path, whole, capsys):
    resaved(first(whole), tmp_path / "other.pth", lambda saved: saved["model"]["fc.bias"][0].add_(1e-3))
    flags = ["--teacher", str(tmp_path / "other.pth"), *RUN, "--output-dir", str(whole), "--resume"]
    assert incremental.main(flags) == 2
    said = one_line(capsys)
    assert all(checkpoint.fingerprint(checkpoint.load(path)) in said for path in (first(whole), tmp_path / "other.pth"))


def test_images_are_known_by_their_pixels_and_not_by_their_place(tmp_path, capsys):
    source, moved = tmp_path / "data", tmp_path / "moved"
    image_folder(source, {"a": 4, "b": 4}, {"a": 1, "b": 1})
    flags = [*SMALL, "--epochs", "1", "--dataset", "folder", "--old-classes", "a,b"]
    flags += ["--output-dir", str(tmp_path / "out"), "--cache-dir"]
    assert trainer.main([*flags, str(tmp_path / "cache"), "--data-dir", str(source)]) == 0
    shutil.copytree(source, moved)
    flags += [str(tmp_path / "cache of moved"), "--data-dir", str(moved), "--resume"]
    assert trainer.main(flags) == 0
    shutil.copy(moved / "train" / "b" / "001.png", moved / "train" / "b" / "002.png")
    capsys.readouterr()
    assert trainer.main(flags) == 2
    assert "images" in one_line(capsys)


def test_another_machine_is_said_and_accepted(tmp_path, whole, run, capsys):
    other = {"device": "cuda:0", "threads": 99, "torch": "1.0"}
    model = tmp_path / "student_model.pth"
    resaved(whole / "student_model.pth", model, lambda saved: saved["training"]["machine"].update(other))
    assert run("student", tmp_path, "--resume", "--epochs", "3") == 0
    said = capsys.readouterr().err
    now = checkpoint.load(model)["training"]["machine"]
    assert all(f"{name} was {before} and is now {now[name]}" in said for name, before in other.items())
