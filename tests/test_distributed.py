"""Several processes on one machine: the same training as one, one writer, one voice, one end.

torchrun starts the scripts by their command lines; where it adds nothing, processes are forked with what it sets.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
import torch
from tinyruns import FP32, ROOT, SMALL, forked, wait_until

import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm.runtime import checkpoint, distributed
from lwm.runtime.errors import InputError

# Batches are shared as 8 + 7, and crops and mirror images are drawn for the whole batch. Steps are small: rounding
# stays below 1e-6, unless it changes which old class is likeliest (seed 0); a wrong weight of the shares makes 4e-4.
SHARED = ["--hold-back", "0.5", "--batch-size", "15", "--flip", "--batch-norm", "frozen"]
STUDENT = [*FP32, "--seed", "1", "--calibration", "0", "--epochs", "2", "--incremental-lr", "0.001", *SHARED]


def together(folder: Path, act: Callable, *arguments: object) -> tuple[list[int], str]:
    """The exit codes of two processes of a job that call ``act``, and what both print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    job |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    said = folder / "said"
    both = [forked(act, *arguments, said=said, RANK=str(rank), LOCAL_RANK=str(rank), **job) for rank in range(2)]
    for child in both:
        child.join(120)
    return [child.exitcode for child in both], said.read_text()


def torchrun(*command: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True, **pipes)


def student_of(teacher: str, folder: Path) -> list[str]:
    return ["incremental_learning_system.py", "--teacher", teacher, "--output-dir", str(folder), *STUDENT]


# What they tell each other ----------------------------------------------------------------------------------------


def process_of_the_cases(teacher: str, folder: Path) -> int:
    """A student in ``folder / "whole"``, and in a file of each process what the others have told it in the end."""
    leave = distributed.leave

    def tell_and_leave() -> None:
        rank = distributed.rank()
        own, numbers = torch.nn.BatchNorm2d(1), torch.tensor([1.0, rank])
        own.running_mean.fill_(rank + 5)
        distributed.same_buffers(own)
        told = [distributed.largest(3 - rank), distributed.summed(numbers), numbers, own.running_mean]
        told += [distributed.gathered(2 * distributed.share(torch.arange(count)), count) for count in (1, 7)]
        try:
            distributed.require_same(teacher="x", images=f"{rank} images")
        except InputError as error:
            told.append(str(error))
        torch.save(told, folder / f"{rank}.pt")
        leave()

    distributed.leave = tell_and_leave
    return incremental.main(student_of(teacher, folder / "whole")[1:])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("first")
    assert trainer.main([*SMALL, "--epochs", "1", "--output-dir", str(folder)]) == 0
    return str(folder / "teacher_model.pth")


@pytest.fixture(scope="module")
def cases(teacher, tmp_path_factory) -> tuple[Path, str]:
    """The folder that two processes of the cases have written to, and what they printed."""
    folder = tmp_path_factory.mktemp("cases")
    codes, said = together(folder, process_of_the_cases, teacher, folder)
    assert codes == [0, 0], said
    return folder, said


def test_what_the_processes_tell_each_other(cases):
    for rank in range(2):
        told = torch.load(cases[0] / f"{rank}.pt", weights_only=True)
        largest, summed, numbers, buffer, one, seven, refusal = told
        assert (largest, summed.tolist(), numbers.tolist(), buffer.tolist()) == (3, [2, 1], [1, rank], [5])
        assert (one.tolist(), seven.tolist()) == ([0], list(range(0, 14, 2)))
        assert "1 images" in refusal


@pytest.mark.parametrize(("name", "culprit"), [("cuda:1", "cuda:1"), ("cuda", "there are 1"), ("mps", "mps")])
def test_a_device_that_cannot_be_shared_out_is_refused(monkeypatch, name, culprit):
    for variable, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=culprit):
        distributed.join(torch.device(name))


def test_a_process_that_is_not_the_first_writes_nothing_asks_for_no_lock_and_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")  # so that it waits for nobody
    with filelock.FileLock(tmp_path / ".lock"):
        assert trainer.main([*SMALL, "--epochs", "1", "--output-dir", str(tmp_path)]) == 0
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert capsys.readouterr() == ("", "")


# The scripts ------------------------------------------------------------------------------------------------------


def saved_in(folder: Path) -> dict:
    return checkpoint.load(folder / "student_model.pth")


def assert_close(one: dict, other: dict) -> None:
    """The weights and logs of two runs that add their sums in another order."""
    for name, expected in one["model"].items():
        torch.testing.assert_close(other["model"][name], expected, rtol=0, atol=5e-6)
    for row, expected in zip(other["training"]["log"], one["training"]["log"], strict=True):
        assert row == pytest.approx(expected | {"images_per_second": row["images_per_second"]}, rel=1e-5)


def test_two_processes_train_as_one_and_speak_and_write_once(cases, teacher, tmp_path):
    folder, said = cases[0] / "whole", cases[1]
    assert incremental.main(student_of(teacher, tmp_path)[1:]) == 0
    assert_close(saved_in(tmp_path), saved_in(folder))
    start, end = checkpoint.load(teacher)["model"], saved_in(folder)["model"]
    moved = [name for name in start if name[:2] != "fc" and not torch.allclose(start[name], end[name], atol=1e-4)]
    assert len(moved) > 30  # it was a training
    assert saved_in(folder)["training"]["machine"]["processes"] == 2
    assert said.count("student_model.pth") == said.count("epoch 2/2") == 1
    assert {path.name for path in folder.iterdir()} == {path.name for path in tmp_path.iterdir()}


def test_a_job_that_a_signal_stops_goes_on_to_the_same_bits_and_with_one_process_too(cases, teacher, tmp_path):
    process = torchrun(*student_of(teacher, tmp_path), "--save-interval-steps", "3")
    wait_until((tmp_path / "student_model.pth").exists, process.poll)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    again = re.search(r"go on with: torchrun --standalone --nproc_per_node=2 (.*)", said)
    assert again, said
    stopped = (tmp_path / "student_model.pth").read_bytes()
    assert not saved_in(tmp_path)["finished"]
    script, *flags = again[1].split()
    assert script == "incremental_learning_system.py"
    codes, said = together(tmp_path, incremental.main, flags)
    assert codes == [0, 0], said
    one, other = saved_in(cases[0] / "whole"), saved_in(tmp_path)
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    (tmp_path / "student_model.pth").write_bytes(stopped)
    assert incremental.main(flags) == 0
    assert_close(one, saved_in(tmp_path))


@pytest.mark.skipif(not Path("/proc").exists(), reason="a process's children are found by Linux's /proc")
def test_a_killed_process_ends_the_job_with_a_line_and_no_orphan(teacher, tmp_path):
    process = torchrun(*student_of(teacher, tmp_path), "--save-interval-steps", "2", "--epochs", "1000")
    wait_until((tmp_path / "student_model.pth").exists, process.poll)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = (line for line in said.splitlines() if re.match("(process .: )?error: ", line))
    assert line.startswith("process 1: ")
    assert f"{tmp_path}/student_model.pth" in line
    assert not any(Path("/proc", child).exists() for child in children)
    assert not saved_in(tmp_path)["finished"]


@pytest.mark.parametrize(("flag", "value"), [("--lr", "-1"), ("--batch-size", "3")])  # before they have met, and after
def test_bad_input_is_said_once(tmp_path, flag, value):
    flags = [*SMALL, "--output-dir", str(tmp_path / "out"), flag, value]
    codes, said = together(tmp_path, trainer.main, flags)
    assert codes == [2, 2]  # a connection that is not left ends in an abort
    (line,) = (line for line in said.splitlines() if "error: " in line)
    assert line.startswith("error: ")
    assert flag in line
    assert not (tmp_path / "out" / "teacher_model.pth").exists()
