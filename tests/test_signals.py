"""Ctrl-C and SIGTERM: saved, one line, and the command to go on with."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import SAVES, TINY, differences, left_behind
from tinyruns import ROOT, RUN, at_step, first, forked, interrupt, one_line, said_where, wait_until

import incremental_learning_system as incremental
from lwm import losses, training
from lwm.images import datasets
from lwm.runtime import checkpoint
from lwm.runtime.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("small_and_heeding_ctrl_c")


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_signals_save_and_the_printed_commands_go_on_as_they_stand(tmp_path, whole):
    """SIGTERM, then SIGINT to the command that was printed, in a shell; and the one that this prints, to the end."""
    left_alone, folder = tmp_path / "left alone", tmp_path / "stop ped"
    flags = [*TINY, *SAVES, "--epochs", "3", "--teacher", str(first(whole))]
    assert incremental.main([*flags, "--output-dir", str(left_alone)]) == 0
    model = folder / "student_model.pth"
    command = shlex.join([sys.executable, "incremental_learning_system.py", *flags, "--output-dir", str(folder)])
    for signum in (signal.SIGTERM, signal.SIGINT):
        before = model.stat().st_ino if model.exists() else None
        pipes = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        child = subprocess.Popen(f"exec {command}", shell=True, cwd=ROOT, text=True, preexec_fn=heed_ctrl_c, **pipes)
        wait_until(lambda before=before: model.exists() and model.stat().st_ino != before, child.poll)
        child.send_signal(signum)
        _, said = child.communicate()
        assert child.returncode == 128 + signum
        again = said.strip().splitlines()[-1].split("go on with: ")[1]
        assert again == command.removesuffix(" --resume") + " --resume"
        command = again
    assert incremental.main(shlex.split(command)[2:]) == 0
    assert differences("student", left_alone, folder) == {}
    assert left_behind(folder) == []


def run_slowly(stepping: Path, flags: list[str]) -> int:
    """A run whose first step takes a minute, and makes a file ``stepping``."""

    def slow(*arguments):
        stepping.touch()
        time.sleep(60)

    losses.METHODS["lwm"] = dataclasses.replace(losses.METHODS["lwm"], loss=slow)
    return incremental.main(flags)


def test_a_second_run_is_refused_and_a_second_signal_stops_the_first_at_once(tmp_path, whole, run, monkeypatch, capsys):
    folder, stepping = tmp_path / "out", tmp_path / "stepping"
    with monkeypatch.context() as patch:
        at_step(patch, 3, interrupt)
        assert run("student", folder) == 143
    before = (folder / "student_model.pth").read_bytes()
    flags = ["--teacher", str(first(whole)), *RUN, "--output-dir", str(folder), "--resume"]
    child = forked(run_slowly, stepping, flags, said=tmp_path / "said")
    wait_until(stepping.exists, lambda: child.exitcode)
    for role in ("student", "teacher"):
        capsys.readouterr()
        assert run(role, folder, "--resume") == 2
        assert f"--output-dir {folder} is in use" in one_line(capsys)
    os.kill(child.pid, signal.SIGINT)
    wait_until(lambda: "stopping" in (tmp_path / "said").read_text(), lambda: child.exitcode)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode == -signal.SIGINT
    assert (folder / "student_model.pth").read_bytes() == before
    assert run("student", folder, "--resume") == 0  # a lock that is left holds up nobody
    assert differences("student", whole, folder) == {}
    assert left_behind(folder) == []


def test_ctrl_c_while_images_are_read_is_one_line(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(datasets.Source, "train", lambda *arguments: signal.raise_signal(signal.SIGINT))
    assert run("student", tmp_path / "out") == 130
    assert one_line(capsys) == "interrupted"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("owner", "name", "where"),
    [
        (training.ResumableBatches, "_check_terms", (0, 3)),  # a look waits for the device: long after the loop asked
        (RunFolder, "save", (0, 3)),
        (RunFolder, "write_log", (1, 1)),
    ],
)
def test_a_signal_at_a_bad_moment_stops_the_run_too(tmp_path, whole, run, monkeypatch, capsys, owner, name, where):
    """What the last line says is saved, is."""
    usual, flags = getattr(owner, name), ["--save-interval-steps", "2"] if owner is RunFolder else []

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


def test_ctrl_c_saves_even_if_it_has_ended_the_reader_of_a_pipe_too(tmp_path, whole, run, monkeypatch):
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


def test_an_ignored_signal_stays_ignored_and_the_others_are_as_they_were(tmp_path, whole, run, monkeypatch):
    """As under nohup, or in the background of a shell that has no job control."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 2, lambda terms: signal.raise_signal(signal.SIGINT))
    assert run("student", tmp_path) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (signal.SIG_IGN, before)
    assert differences("student", whole, tmp_path) == {}
