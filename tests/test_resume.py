"""A run that stopped goes on to the same bits, and only where it is the run that was saved."""

from __future__ import annotations

import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_folder
from PIL import Image
from tinyruns import (
    HARNESS,
    RUN,
    SMALL,
    STEPS,
    at_step,
    differences,
    first,
    interrupt,
    one_line,
    said_where,
)

import config
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import training
from lwm.reporting import plots
from lwm.runtime import checkpoint, hardware
from lwm.runtime.errors import RunError
from lwm.runtime.run_folder import OF_STUDENTS, STEP_SETTINGS

draw_curves = plots.curves

pytestmark = pytest.mark.usefixtures("small_and_heeding_ctrl_c")


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def resaved(source: Path, target: Path, change: Callable[[dict], object]) -> None:
    """Write a checkpoint with changes."""
    saved = checkpoint.load(source)
    change(saved)
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(target, saved)


# The same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_run_that_stops_after_any_one_step_ends_with_the_same_bits(tmp_path, whole, run, monkeypatch, capsys, kind):
    for step in range(1, 2 * STEPS):
        folder, signum = tmp_path / str(step), (signal.SIGINT, signal.SIGTERM)[step % 2]
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda terms, signum=signum: signal.raise_signal(signum))
            assert run(kind, folder) == 128 + signum
        said_where(kind, folder, capsys)
        assert run(kind, folder, "--resume") == 0
        assert differences(kind, whole, folder) == {}, step


def test_a_run_that_stops_after_every_step_ends_with_the_same_bits(tmp_path, whole, run, monkeypatch, capsys):
    at_step(monkeypatch, None, interrupt)
    for _ in range(2 * STEPS - 1):
        assert run("student", tmp_path, "--resume") == 143
        said_where("student", tmp_path, capsys)
    assert run("student", tmp_path, "--resume") == 0  # the signal in its last step comes too late to stop anything
    assert differences("student", whole, tmp_path) == {}


def test_the_random_state_of_a_device_is_saved_and_gone_on_from(tmp_path, run, monkeypatch):
    state, put_back = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(training, "random_state", lambda device: state)
    monkeypatch.setattr(training, "set_random_state", lambda device, saved: put_back.append(saved))
    at_step(monkeypatch, 2, interrupt)
    assert run("student", tmp_path) == 143
    assert put_back == []
    assert run("student", tmp_path, "--resume") == 0
    (saved,) = put_back
    assert torch.equal(saved, state)


@pytest.mark.parametrize(("step", "position"), [(5, 4), (6, 4), (9, 2)])
def test_what_a_killed_run_had_not_saved_is_done_again(tmp_path, whole, run, monkeypatch, step, position):
    """An exception stands for the kill. At step 6 the log has a row more than the checkpoint."""

    def die(terms):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, step, die)
        run("student", tmp_path, "--save-interval-steps", "2")
    assert checkpoint.load(tmp_path / "student_model.pth")["training"]["position"]["batches"] == position
    assert run("student", tmp_path, "--resume") == 0
    assert differences("student", whole, tmp_path) == {}


@pytest.mark.parametrize("step", [3, STEPS])
def test_a_second_stretch_goes_on_to_the_same_bits_too(tmp_path, whole, run, monkeypatch, capsys, step):
    more = ["--resume", "--epochs", "4"]
    for name in ("left alone", "stopped"):
        (tmp_path / name).mkdir()
        shutil.copy(whole / "student_model.pth", tmp_path / name)
    assert run("student", tmp_path / "left alone", *more) == 0
    assert "2 epochs are done, 2 more with a new cosine schedule" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        at_step(patch, step, interrupt)
        assert run("student", tmp_path / "stopped", *more) == 143
    said_where("student", tmp_path / "stopped", capsys)
    assert run("student", tmp_path / "stopped", *more) == 0
    assert differences("student", tmp_path / "left alone", tmp_path / "stopped") == {}
    rates = [row["lr"] for row in checkpoint.load(tmp_path / "stopped" / "student_model.pth")["training"]["log"]]
    assert rates[2:] == rates[:2]  # the cosine begins anew


def test_kills_change_no_bit(tmp_path, whole):
    """The short form of benchmarks/kill_and_resume.py: real processes, SIGKILL, two of four inside a save."""
    left_alone, killed = tmp_path / "left alone", tmp_path / "killed"
    alone, line = (HARNESS.command("student", folder, 6, first(whole).parent) for folder in (left_alone, killed))
    started = time.perf_counter()
    assert incremental.main(alone[2:]) == 0
    # Within half of the time that it takes: it is not to end before.
    seconds = (time.perf_counter() - started) / 2
    counts = HARNESS.kill_and_resume(line, "student", killed, 4, seconds, random.Random(0))
    assert counts["kills"] == 4
    assert counts["inside a save"] >= 1
    assert incremental.main([*line[2:], "--resume"]) == 0
    assert differences("student", left_alone, killed) == {}
    assert HARNESS.left_behind(killed) == []


def test_the_comparison_sees_a_single_bit(tmp_path, whole):
    def flip(saved):
        saved["model"]["fc.bias"].view(torch.int32)[1] ^= 1
        saved["training"]["optimizer"]["state"][0]["momentum_buffer"].view(torch.int32)[1, 2, 0, 1] ^= 4
        saved["training"]["generator"][99] ^= 3

    resaved(whole / "student_model.pth", tmp_path / "student_model.pth", flip)
    (tmp_path / "student_log.csv").write_text((whole / "student_log.csv").read_text())
    assert list(differences("student", whole, tmp_path).values()) == [1, 1, 2]
    shutil.copy(whole / "student_model.pth", tmp_path)
    assert differences("student", whole, tmp_path) == {}
    (tmp_path / "student_log.csv").write_text((whole / "student_log.csv").read_text().replace("\n2,", "\n3,"))
    assert differences("student", whole, tmp_path) == {"log.csv/1/epoch str": 1}


def test_a_finished_run_that_is_resumed_changes_no_file(tmp_path, whole, run, monkeypatch, capsys):
    monkeypatch.setattr(plots, "curves", draw_curves)
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    before = contents(folder)
    assert len(before) == 8  # checkpoint, log, curves and report of each
    for kind in ("teacher", "student"):
        assert run(kind, folder, "--resume") == 0
        assert "2 epochs are done, all of them: nothing is left to do" in capsys.readouterr().out
    assert contents(folder) == before


def test_what_a_kill_after_the_last_save_left_undone_is_made_up_for(tmp_path, whole, run, monkeypatch):
    monkeypatch.setattr(plots, "curves", draw_curves)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    log, figure = tmp_path / "student_log.csv", tmp_path / "student_curves.png"
    before = log.read_text(), figure.read_bytes()
    log.write_text("".join(before[0].splitlines(keepends=True)[:2]))
    figure.unlink()
    assert run("student", tmp_path, "--resume") == 0
    assert (log.read_text(), figure.read_bytes()) == before


# What is gone on from ---------------------------------------------------------------------------------------------


def test_resume_with_nothing_there_is_a_fresh_start_and_says_so(tmp_path, whole, run, monkeypatch, capsys):
    monkeypatch.setattr(config, "RESUME", True)
    assert run("student", tmp_path) == 0
    assert "a fresh start" in capsys.readouterr().out
    assert differences("student", whole, tmp_path) == {}


def test_a_missing_student_is_never_a_fresh_start(tmp_path, run, capsys):
    missing = tmp_path / "missing.pth"
    assert run("student", tmp_path / "out", "--resume", "--student", str(missing)) == 2
    assert f"{missing}: no such file" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_finished_student_of_another_folder_is_taken_over_as_it_is(tmp_path, whole, run, capsys):
    other = ["--resume", "--student", str(whole / "student_model.pth")]
    before = contents(whole)
    assert run("student", tmp_path, *other) == 0
    assert differences("student", whole, tmp_path) == {}
    assert checkpoint.load(tmp_path / "student_model.pth")["steps"][-1]["group_accuracy"] != []
    assert run("student", tmp_path, *other) == 2
    assert "--resume goes on from it" in one_line(capsys)
    assert run("student", tmp_path, "--overwrite", "--seed", "9") == 0
    assert run("student", tmp_path, "--overwrite", *other) == 0
    assert differences("student", whole, tmp_path) == {}
    assert contents(whole) == before


def test_the_printed_command_goes_on_in_the_folder_of_a_run_that_began_in_another(
    tmp_path, whole, run, monkeypatch, capsys
):
    """RESUME and OVERWRITE as flags, --student in both of its forms, a folder with a blank in its name."""
    other, folder = tmp_path / "other", tmp_path / "a folder"
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert run("student", other) == 143
    capsys.readouterr()
    before = contents(other)
    flags = ["--teacher", str(first(whole)), *RUN, "--output-dir", str(folder), "--overwrite", "--resume"]

    def script(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["incremental_learning_system.py", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", *sys.argv])
        return incremental.main()

    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert script(*flags, "--student", str(other / "student_model.pth")) == 143
    command = shlex.split(said_where("student", folder, capsys))
    assert command == ["python3", "-u", "incremental_learning_system.py", *flags[:-2], "--resume"]
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        at_step(patch, 3, interrupt)
        assert script(f"--student={other / 'student_model.pth'}", *flags) == 143
    assert shlex.split(said_where("student", folder, capsys)) == command
    assert script(*command[3:]) == 0
    assert differences("student", whole, folder) == {}
    assert contents(other) == before


def test_an_unfinished_teacher_is_refused(tmp_path, run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert run("teacher", tmp_path) == 143
    capsys.readouterr()
    assert incremental.main(["--teacher", str(tmp_path / "teacher_model.pth"), "--output-dir", str(tmp_path)]) == 2
    assert "its training is not finished" in one_line(capsys)


# Another run than the one that was saved --------------------------------------------------------------------------

OTHER = {  # setting of the student: another value
    "method": "lwf-mc",
    "loss_form": "softmax",
    "beta": 2.0,
    "gamma": 2.0,
    "temperature": 3.0,
    "attention": "features",
    "attention_class": "teacher",
    "batch_norm": "frozen",
    "batch_size": 32,
    "momentum": 0.5,
    "weight_decay": 0.1,
    "flip": True,
    "precision": "bf16",
    "hold_back": 0.1,
    "seed": 9,
    "balanced": True,
    "freeze": 1,
    "backbone_lr": 0.001,
}


def test_every_recorded_setting_has_another_value_here():
    assert OTHER.keys() == set(STEP_SETTINGS)


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_is_refused_with_both_values(whole, run, monkeypatch, capsys, name):
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)  # no warning
    before = contents(whole)
    was = checkpoint.load(whole / "student_model.pth")["steps"][-1][name]
    flag = f"--{name.replace('_', '-')}"
    given = [flag] if OTHER[name] is True else [flag, str(OTHER[name])]
    assert run("student", whole, "--resume", *given) == 2
    assert f"cannot resume: {name} was {was} and is now {OTHER[name]};" in one_line(capsys)
    assert contents(whole) == before


def test_a_setting_that_came_later_is_what_it_was_before(tmp_path, whole, run, capsys):
    model = tmp_path / "student_model.pth"
    resaved(whole / "student_model.pth", model, lambda saved: saved["steps"][-1].pop("attention"))
    assert run("student", tmp_path, "--resume", "--attention", "signed") == 2
    assert "attention was grad-cam and is now signed" in one_line(capsys)
    assert run("student", tmp_path, "--resume") == 0


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("student", ["--incremental-lr", "0.5"], "learning_rate was 0.0125 and is now 0.5"),
        ("student", ["--new-classes", "2,4"], "class_names was ['0', '1', '2', '3'] and is now ['0', '1', '2', '4']"),
        ("teacher", ["--lr", "0.5"], "learning_rate was 0.03 and is now 0.5"),
        ("teacher", ["--image-size", "16"], "image_size was 8 and is now 16"),
        ("teacher", ["--model", "resnet110"], "architecture was resnet32 and is now resnet110"),
        ("teacher", ["--std", "0.5,0.5,0.5"], "and is now [0.5, 0.5, 0.5]"),
        ("teacher", ["--old-classes", "1,0"], "class_names was ['0', '1'] and is now ['1', '0']"),
        ("student", ["--epochs", "1"], "the run already has 2 epochs; give --epochs 2 or more"),
    ],
)
def test_another_task_is_refused_with_both_values(whole, run, capsys, kind, flags, words):
    before = contents(whole)
    assert run(kind, whole, "--resume", *flags) == 2
    assert words in one_line(capsys)
    assert contents(whole) == before


def test_what_a_teacher_is_not_trained_with_is_not_recorded_and_makes_no_other_run(tmp_path, whole, run, monkeypatch):
    monkeypatch.setattr(config, "GAMMA", (0.3,))  # a stray comma, which no checkpoint could be read with
    assert run("teacher", tmp_path) == 0
    (step,) = checkpoint.load(tmp_path / "teacher_model.pth")["steps"]
    assert {step[name] for name in OF_STUDENTS} == {None}
    resaved(first(whole), tmp_path / "teacher_model.pth", lambda saved: saved["steps"][0].update(gamma=1.0))  # as once
    assert run("teacher", tmp_path, "--resume", "--epochs", "3", "--batch-norm", "frozen") == 0
    trained = checkpoint.load(tmp_path / "teacher_model.pth")["model"]
    assert trained["bn1.num_batches_tracked"] == 3 * STEPS  # it is of a student's training alone


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_the_seed_decides_the_new_weights_and_the_order(tmp_path, run, monkeypatch, kind):
    drawn = []

    def stopped(loop, *arguments):
        drawn.append((loop.model.fc.weight[-1].detach().clone(), loop.generator.get_state()))
        raise RunError("stopped")

    monkeypatch.setattr(training._Loop, "epoch", stopped)
    for seed in ("0", "0", "1"):
        assert run(kind, tmp_path, "--seed", seed) == 1
    for one, same, other in zip(*drawn, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_another_data_set_is_refused(tmp_path, whole, run, capsys):
    folder = image_folder(tmp_path / "data", {"2": 4, "3": 4}, {"2": 1, "3": 1})
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--cache-dir", str(tmp_path / "cache")]
    assert run("student", whole, "--resume", *flags) == 2
    assert "dataset was digits and is now folder" in one_line(capsys)


@pytest.mark.parametrize("epochs", ["1", "3"])
def test_the_epochs_of_an_unfinished_run_stay(tmp_path, run, monkeypatch, capsys, epochs):
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert run("student", tmp_path) == 143
    capsys.readouterr()
    before = contents(tmp_path)
    assert run("student", tmp_path, "--resume", "--epochs", epochs) == 2
    assert f"planned with --epochs 2 and is now to have {epochs}; finish it with --epochs 2" in one_line(capsys)
    assert contents(tmp_path) == before


def test_images_are_known_by_their_pixels_and_not_by_their_place(tmp_path, capsys):
    source, moved, output = tmp_path / "data", tmp_path / "moved", tmp_path / "out"
    image_folder(source, {"a": 4, "b": 4}, {"a": 1, "b": 1})
    flags = [*SMALL, "--epochs", "1", "--dataset", "folder", "--old-classes", "a,b", "--output-dir", str(output)]
    assert trainer.main([*flags, "--data-dir", str(source), "--cache-dir", str(tmp_path / "cache")]) == 0
    shutil.copytree(source, moved)
    flags += ["--data-dir", str(moved), "--cache-dir", str(tmp_path / "cache of moved"), "--resume"]
    assert trainer.main(flags) == 0
    path = moved / "train" / "b" / "002.png"
    pixels = np.array(Image.open(path))
    pixels[3, 3] ^= 255
    Image.fromarray(pixels).save(path)
    capsys.readouterr()
    assert trainer.main(flags) == 2
    assert "training images (number, hash of their pixels) was 8, " in one_line(capsys)


def test_another_teacher_is_refused(tmp_path, whole, capsys):
    def nudge(saved):
        saved["model"]["fc.bias"][0] += 1e-3

    resaved(first(whole), tmp_path / "other.pth", nudge)
    flags = ["--teacher", str(tmp_path / "other.pth"), *RUN, "--output-dir", str(whole), "--resume"]
    assert incremental.main(flags) == 2
    hashes = [checkpoint.fingerprint(checkpoint.load(path)) for path in (first(whole), tmp_path / "other.pth")]
    assert f"teacher (hash of its weights) was {hashes[0]} and is now {hashes[1]}" in one_line(capsys)


def test_another_machine_is_said_and_accepted(tmp_path, whole, run, capsys):
    other = {"device": "cuda:0", "threads": 99, "torch": "1.0"}
    model = tmp_path / "student_model.pth"
    resaved(whole / "student_model.pth", model, lambda saved: saved["training"]["machine"].update(other))
    assert run("student", tmp_path, "--resume", "--epochs", "3") == 0
    said = capsys.readouterr().out
    now = checkpoint.load(model)["training"]["machine"]
    for name, before in other.items():
        assert f"{name} was {before} and is now {now[name]}: the result is as good, but not the same" in said


def test_a_network_without_a_run_cannot_be_resumed(tmp_path, whole, run, capsys):
    model = tmp_path / "student_model.pth"
    resaved(whole / "student_model.pth", model, lambda saved: saved["training"].clear())
    assert run("student", tmp_path, "--resume") == 2
    assert "without the state of a run" in one_line(capsys)
