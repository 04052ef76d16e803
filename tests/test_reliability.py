"""Whatever stops a run, what was saved is whole, the run goes on to the same bits, and a line says what to do."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_folder
from PIL import Image

import checkpoint
import config
import data
import hardware
import incremental_learning_system as incremental
import losses
import plots
import train_teacher_model as trainer
import training
from run import STEP_SETTINGS, Run
from settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "resnet32", "--image-size", "8"]
STEPS = 5  # of an epoch
RUN = ["--epochs", "2", "--save-interval", "2"]  # so the first epoch's end is saved only where the run stops there


def load_harness():
    path = ROOT / "benchmarks" / "kill_and_resume.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HARNESS = load_harness()
differences = HARNESS.differences
draw_curves = plots.curves


@pytest.fixture(autouse=True)
def small_and_heeding_ctrl_c(monkeypatch):
    """One thread, as the children of these tests have; no figures; and no SIGINT that a background shell ignores."""
    monkeypatch.setattr(plots, "curves", lambda *arguments: None)
    threads, handler = torch.get_num_threads(), signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished teacher in ``first``, and a teacher and a student that were left alone, both of ``RUN``."""
    folder, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)
    assert trainer.main([*TINY, "--epochs", "1", "--output-dir", str(folder / "first")]) == 0
    assert trainer.main([*TINY, *RUN, "--output-dir", str(folder)]) == 0
    assert incremental.main(["--teacher", str(first(folder)), *RUN, "--output-dir", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


def first(whole: Path) -> Path:
    return whole / "first" / "teacher_model.pth"


@pytest.fixture
def run(whole) -> Callable[..., int]:
    """``run(kind, folder, *flags)`` is the script's exit code."""

    def start(kind: str, folder: Path, *flags: str) -> int:
        if kind == "teacher":
            return trainer.main([*TINY, *RUN, "--output-dir", str(folder), *flags])
        return incremental.main(["--teacher", str(first(whole)), *RUN, "--output-dir", str(folder), *flags])

    return start


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def resaved(source: Path, target: Path, change: Callable[[dict], object]) -> None:
    """Write a checkpoint with changes."""
    saved = checkpoint.load(source)
    change(saved)
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(target, saved)


def at_step(monkeypatch, step: int | None, act: Callable[[dict], object]) -> None:
    """Call ``act(terms)`` on the loss terms of the ``step``-th step from now, or of every one; it may return others."""
    count = itertools.count(1)

    def patched(loss):
        def acting(*arguments):
            terms = loss(*arguments)
            return (act(terms) or terms) if next(count) == step or step is None else terms

        return acting

    monkeypatch.setattr(losses, "first_step", patched(losses.first_step))
    monkeypatch.setitem(losses.METHODS, "lwm", patched(losses.METHODS["lwm"]))


def interrupt(*arguments: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def said_where(kind: str, folder: Path, capsys) -> str:
    """The command that the last line gives; where it says that the run stopped is where the checkpoint is."""
    saved = checkpoint.load(folder / f"{kind}_model.pth")
    done, position = len(saved["training"]["log"]), saved["training"]["position"]
    where = f"stopped after epoch {done}"
    if position:
        where = f"stopped in epoch {done + 1}/{saved['training']['epochs']} after step {position['batches']} of {STEPS}"
    line = one_line(capsys)
    assert line.startswith(where)
    assert not saved["finished"]
    return line.split("go on with: ")[1]


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


# Signals ----------------------------------------------------------------------------------------------------------


def start(line: list[str] | str, **options) -> subprocess.Popen:
    def heed_ctrl_c():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    options = {"env": HARNESS.ENVIRONMENT, "stdout": subprocess.DEVNULL} | options
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c, **options)


def wait_until(there: Callable[[], object], child: subprocess.Popen) -> None:
    while not there():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.005)


def test_signals_save_and_the_printed_commands_go_on_as_they_stand(tmp_path, whole, capsys):
    """SIGTERM, then SIGINT to the command that was printed, in a shell; and the one that this prints, to the end."""
    left_alone, folder = tmp_path / "left alone", tmp_path / "stop ped"
    flags = [*HARNESS.TINY, *HARNESS.SAVES, "--epochs", "6", "--teacher", str(first(whole))]
    assert incremental.main([*flags, "--output-dir", str(left_alone)]) == 0
    model = folder / "student_model.pth"
    command = shlex.join([sys.executable, "incremental_learning_system.py", *flags, "--output-dir", str(folder)])
    for signum in (signal.SIGTERM, signal.SIGINT):
        before = model.stat().st_ino if model.exists() else None
        child = start(f"exec {command}", shell=True, cwd=ROOT)
        wait_until(lambda before=before: model.exists() and model.stat().st_ino != before, child)
        child.send_signal(signum)
        _, said = child.communicate()
        assert child.returncode == 128 + signum
        stopping, last = said.strip().splitlines()
        assert stopping == "stopping: saving after this step; once more stops at once"
        again = last.split("go on with: ")[1]
        assert again == command.removesuffix(" --resume") + " --resume"
        command = again
    capsys.readouterr()
    assert incremental.main(shlex.split(command)[2:]) == 0
    assert f"going on from {model}" in capsys.readouterr().out
    assert differences("student", left_alone, folder) == {}
    assert HARNESS.left_behind(folder) == []


def test_a_second_run_is_refused_and_a_second_signal_stops_the_first_at_once(tmp_path, whole, run, monkeypatch, capsys):
    folder, stepping = tmp_path / "out", tmp_path / "stepping"
    with monkeypatch.context() as patch:
        at_step(patch, 3, interrupt)
        assert run("student", folder) == 143
    before = (folder / "student_model.pth").read_bytes()
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import incremental_learning_system, losses
def slow(*arguments):
    open({str(stepping)!r}, "w")
    time.sleep(60)
losses.METHODS["lwm"] = slow
incremental_learning_system.main()
"""
    flags = ["--teacher", str(first(whole)), *RUN, "--output-dir", str(folder), "--resume"]
    child = start([sys.executable, "-c", code, *flags])
    wait_until(stepping.exists, child)
    capsys.readouterr()
    assert run("student", folder, "--resume") == 2
    assert f"--output-dir {folder} is in use by process {child.pid} (" in one_line(capsys)
    assert run("teacher", folder) == 2
    assert f"process {child.pid} (" in one_line(capsys)
    child.send_signal(signal.SIGINT)
    assert "stopping" in child.stderr.readline() + child.stderr.readline()
    child.send_signal(signal.SIGINT)
    child.communicate()
    assert child.returncode == -signal.SIGINT
    assert (folder / "student_model.pth").read_bytes() == before
    assert (folder / ".lock").exists()  # it could not be taken away, and holds up nobody
    assert run("student", folder, "--resume") == 0
    assert differences("student", whole, folder) == {}
    assert HARNESS.left_behind(folder) == []


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    line = [sys.executable, "-u", str(ROOT / "train_teacher_model.py"), "--output-dir", str(tmp_path / "out")]
    child = start(line, stdout=subprocess.PIPE)
    assert "recommended" in child.stdout.readline()  # printed just before
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert (child.returncode, said) == (130, "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_images_are_read_is_one_line(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(data.Source, "train", lambda *arguments: signal.raise_signal(signal.SIGINT))
    assert run("student", tmp_path / "out") == 130
    assert one_line(capsys) == "interrupted"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("owner", "name", "where"),
    [
        (training._Loop, "_check_terms", (0, 3)),  # a look waits for the device: long after the loop asked
        (Run, "save", (0, 3)),
        (Run, "write_log", (1, 1)),
    ],
)
def test_a_signal_that_comes_at_a_bad_moment_stops_the_run_after_the_next_step(
    tmp_path, whole, run, monkeypatch, capsys, owner, name, where
):
    """What the last line says is saved, is."""
    usual, flags = getattr(owner, name), ["--save-interval-steps", "2"] if owner is Run else []

    def interrupted_once(*arguments):
        result = usual(*arguments)
        monkeypatch.setattr(owner, name, usual)
        interrupt()
        return result

    monkeypatch.setattr(training, "CHECK_INTERVAL", 2)
    monkeypatch.setattr(owner, name, interrupted_once)
    assert run("student", tmp_path, *flags) == 143
    said_where("student", tmp_path, capsys)
    saved = checkpoint.load(tmp_path / "student_model.pth")["training"]
    assert (len(saved["log"]), saved["position"]["batches"]) == where
    assert run("student", tmp_path, "--resume") == 0
    assert differences("student", whole, tmp_path) == {}


def test_ctrl_c_saves_where_it_has_ended_the_reader_of_a_pipe_too(tmp_path, whole, run, monkeypatch):
    """As in ``python3 train_teacher_model.py 2>&1 | tee log``."""
    reader, writer = os.pipe()
    os.close(reader)
    write = os.write

    def write_there(descriptor, content):
        return write(writer if descriptor == 2 else descriptor, content)

    with monkeypatch.context() as patch, open(writer, "w", buffering=1) as errors, open(os.dup(writer), "w") as output:
        patch.setattr(os, "write", write_there)
        patch.setattr(sys, "stderr", errors)
        patch.setattr(sys, "stdout", output)
        at_step(patch, 2, lambda terms: signal.raise_signal(signal.SIGINT))
        assert run("student", tmp_path) == 130
        output.flush()  # as the interpreter does at its end
    assert run("student", tmp_path, "--resume") == 0
    assert differences("student", whole, tmp_path) == {}


def test_signals_are_as_they_were_after_a_run(tmp_path, run):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert run("student", tmp_path) == 0
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored(tmp_path, whole, run, monkeypatch):
    """As under nohup, or in the background of a shell that has no job control."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda terms: signal.raise_signal(signal.SIGINT))
    assert run("student", tmp_path) == 0
    assert differences("student", whole, tmp_path) == {}


# The folder -------------------------------------------------------------------------------------------------------


def test_a_run_that_another_one_overtook_is_refused(tmp_path, whole, run, monkeypatch, capsys):
    """The folder was free when this run was opened, and another one saved while this one read its images."""
    train = data.Source.train

    def while_another_saves(*arguments):
        shutil.copy(whole / "student_model.pth", tmp_path)
        return train(*arguments)

    monkeypatch.setattr(data.Source, "train", while_another_saves)
    assert run("student", tmp_path) == 2
    assert "written by another run in the meantime" in one_line(capsys)
    assert (tmp_path / "student_model.pth").read_bytes() == (whole / "student_model.pth").read_bytes()


def test_what_a_killed_run_left_half_written_is_cleared_away_and_nothing_else(tmp_path, run):
    for name in (".student_model.pth.abc.tmp", ".student_log.csv.abc.tmp", ".teacher_curves.png.abc.tmp", ".lock"):
        (tmp_path / name).touch()
    (tmp_path / ".mine.tmp").touch()
    assert run("student", tmp_path) == 0
    assert HARNESS.left_behind(tmp_path) == [".mine.tmp"]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(line, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no disk of a chosen size can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"no disk of a chosen size can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(tmp_path, whole, run, capsys):
    folder = tmp_path / "disk"
    with small_disk(folder, 6):  # a checkpoint takes 3.8 MB: there is no room for a second one beside it
        assert run("student", folder, "--save-interval-steps", "3") == 1
        said = one_line(capsys)
        assert "No space left on device" in said
        assert f"the last checkpoint, {folder / 'student_model.pth'}, is whole" in said
        assert checkpoint.load(folder / "student_model.pth")["training"]["position"]["batches"] == 3
        assert {path.name for path in folder.iterdir()} == {"student_model.pth", "student_log.csv"}
        subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
        assert run("student", folder, "--resume") == 0
        assert differences("student", whole, folder) == {}


def test_a_full_disk_is_said_before_the_training(tmp_path, run, capsys):
    folder = tmp_path / "disk"
    with small_disk(folder, 1):
        with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert run("student", folder) == 2
        assert "cannot be written to (No space left on device)" in one_line(capsys)
        assert [path.name for path in folder.iterdir()] == ["filler"]


@contextlib.contextmanager
def limited(kind: int, most: int):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_limit_on_the_size_of_files_is_like_a_full_disk(tmp_path, whole, run, capsys):
    """Where none can be mounted, and for a run that has a checkpoint in another folder alone."""
    with limited(resource.RLIMIT_FSIZE, 10**6):
        assert run("student", tmp_path) == 1
    said = one_line(capsys)
    assert "student_model.pth: cannot be written (File too large); there is no checkpoint to go on from" in said
    assert [path.name for path in tmp_path.iterdir()] == ["student_log.csv"]
    other = whole / "student_model.pth"
    with limited(resource.RLIMIT_FSIZE, 10**6):
        assert run("student", tmp_path, "--resume", "--student", str(other), "--epochs", "3") == 1
    assert f"the last checkpoint, {other}, is whole" in one_line(capsys)


def test_a_folder_that_cannot_be_written_is_said_before_the_training(tmp_path, run, capsys):
    folder = tmp_path / "disk"
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:  # who may write where permissions say that nobody may
            stack.enter_context(small_disk(folder, 1))
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        else:
            folder.mkdir(0o555)
        for output in (folder, folder / "new"):
            assert run("student", output) == 2
            assert "cannot be written" in one_line(capsys)
        assert list(folder.iterdir()) == []


def test_a_folder_that_vanishes_is_said_and_not_made_again(tmp_path, run, monkeypatch, capsys):
    at_step(monkeypatch, 3, lambda terms: shutil.rmtree(tmp_path / "out"))
    assert run("student", tmp_path / "out", "--save-interval-steps", "2") == 1
    said = one_line(capsys)
    assert "student_model.pth: cannot be written (No such file or directory)" in said
    assert "there is no checkpoint to go on from" in said
    assert not (tmp_path / "out").exists()


# What breaks inside -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "value", "interval"),
    [("classification", math.nan, "2"), ("distillation", math.inf, "1"), ("attention", math.nan, "1")],
)
def test_a_term_that_is_not_finite_is_named_with_its_step(
    tmp_path, whole, run, monkeypatch, capsys, term, value, interval
):
    """At the third step of the second epoch, even where the loop looks only after the fourth."""

    def spoil(terms):
        broken = terms[term] * value
        return terms | {term: broken, "total": terms["total"] + broken}

    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 3, spoil)
        assert run("student", tmp_path, "--save-interval-steps", interval) == 1
    said = one_line(capsys)
    assert f"epoch 2/2, step 3 of 5: the loss term {term!r} is {value}" in said
    assert f"the last checkpoint, {tmp_path / 'student_model.pth'}, is whole" in said
    assert checkpoint.load(tmp_path / "student_model.pth")["training"]["position"]["batches"] == 2
    assert run("student", tmp_path, "--resume") == 0
    assert differences("student", whole, tmp_path) == {}


@pytest.mark.parametrize("step", [STEPS - 1, 2 * STEPS])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, whole, run, monkeypatch, capsys, step):
    """Every term is finite, and its gradient is not; inside an epoch and at the end of the run."""

    def spoil(terms):
        nothing = terms["total"] - terms["total"].detach()
        return terms | {"total": terms["total"] + nothing.abs().sqrt()}

    with monkeypatch.context() as patch:
        at_step(patch, step, spoil)
        assert run("student", tmp_path, "--save-interval-steps", "1") == 1
    assert f"epoch {math.ceil(step / STEPS)}: the weights are no longer finite" in one_line(capsys)
    saved = checkpoint.load(tmp_path / "student_model.pth")
    assert saved["training"]["position"]["batches"] == (step - 1) % STEPS
    assert run("student", tmp_path, "--resume") == 0
    assert differences("student", whole, tmp_path) == {}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_names_the_batch_size(tmp_path, run, monkeypatch, capsys, error):
    def fail(terms):
        raise error

    at_step(monkeypatch, 3, fail)
    assert run("student", tmp_path, "--save-interval-steps", "2") == 1
    said = one_line(capsys)
    assert "out of memory on cpu with --batch-size 64: lower --batch-size" in said
    assert f"the last checkpoint, {tmp_path / 'student_model.pth'}, is whole" in said
    assert checkpoint.load(tmp_path / "student_model.pth")["training"]["position"]["batches"] == 2


def test_a_batch_of_one_image_is_named_where_batch_norm_cannot_take_it(tmp_path, capsys):
    folder = image_folder(tmp_path / "data", {"a": 3, "b": 2}, {"a": 1, "b": 1})
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--cache-dir", str(tmp_path / "cache")]
    flags += ["--old-classes", "a,b", "--model", "resnet18", "--image-size", "8", "--batch-size", "2"]
    assert trainer.main([*flags, "--output-dir", str(tmp_path / "out")]) == 1
    assert "a batch of one image is too small for batch-norm" in one_line(capsys)


def test_a_real_lack_of_memory_is_one_line(tmp_path, capsys):
    """The first layer alone makes 2 GiB of eight images of this size."""
    folder = image_folder(tmp_path / "data", {"a": 4, "b": 4}, {"a": 1, "b": 1})
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--cache-dir", str(tmp_path / "cache")]
    flags += ["--old-classes", "a,b", "--model", "resnet18", "--image-size", "1024", "--batch-size", "8"]
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, taken + 2**29):
        assert trainer.main([*flags, "--output-dir", str(tmp_path / "out")]) == 1
    assert "out of memory on cpu with --batch-size 8: lower --batch-size" in one_line(capsys)


def test_a_lack_of_memory_outside_the_training_is_one_line_too(tmp_path, run, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 99 bytes\nand so on")

    monkeypatch.setattr(data.Source, "train", fail)
    assert run("student", tmp_path / "out") == 1
    assert one_line(capsys).startswith("error: out of memory; fewer or smaller images take less (DefaultCPUAllocator")


def test_an_error_of_another_kind_is_not_hidden(tmp_path, run, monkeypatch):
    def fail(terms):
        raise RuntimeError("a mistake in a loss")

    at_step(monkeypatch, 1, fail)
    with pytest.raises(RuntimeError, match="a mistake in a loss"):
        run("student", tmp_path)


def test_what_the_device_lacks_is_said(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run("teacher", tmp_path / "out", "--device", "cuda:9") == 2
    assert "cuda:9: this machine has 1 CUDA devices" in one_line(capsys)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An old GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert run("teacher", tmp_path / "out", "--device", "cuda:0", "--precision", "bf16") == 2
    assert "--precision: bf16: An old GPU has no bf16; use fp32" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_deterministic_is_asked_of_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    hardware.prepare(read_settings("train_teacher_model", ["--device", "cpu"]))
    assert asked == []
    hardware.prepare(read_settings("train_teacher_model", ["--device", "cpu", "--deterministic"]))
    assert asked == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


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
        ("teacher", ["--old-classes", "1,0"], "class_names was ['0', '1'] and is now ['1', '0']"),
        ("student", ["--epochs", "1"], "the run already has 2 epochs; give --epochs 2 or more"),
    ],
)
def test_another_task_is_refused_with_both_values(whole, run, capsys, kind, flags, words):
    before = contents(whole)
    assert run(kind, whole, "--resume", *flags) == 2
    assert words in one_line(capsys)
    assert contents(whole) == before


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
    flags = [*TINY, "--epochs", "1", "--dataset", "folder", "--old-classes", "a,b", "--output-dir", str(output)]
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
