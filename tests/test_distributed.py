"""Several processes on one machine: the same training as one, one writer, one voice, one end.

torchrun starts the scripts by their command lines, and this file for what the processes tell each other.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch

import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm.runtime import checkpoint, distributed
from lwm.runtime.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = ["--model", "resnet32", "--image-size", "8"]
# Unequal shares; crops and mirror images, which are drawn for the whole batch; steps so small that rounding stays so.
STUDENT = ["--epochs", "2", "--batch-size", "63", "--batch-norm", "frozen", "--flip", "--incremental-lr", "0.001"]


def started(*command: str | Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*TORCHRUN, *map(str, command)], env=ENVIRONMENT, cwd=ROOT, text=True, **pipes)


def torchrun(*command: str | Path) -> tuple[int, str, str]:
    """The exit code, and what all processes wrote to stdout and stderr."""
    process = started(*command)
    said = process.communicate(timeout=300)
    return process.returncode, *said


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def student_of(teacher: str, folder: Path) -> list[str]:
    return ["incremental_learning_system.py", "--teacher", teacher, "--output-dir", str(folder), *STUDENT]


# What they tell each other ----------------------------------------------------------------------------------------


def process_of_the_cases(teacher: str, folder: Path) -> None:
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
    incremental.main(student_of(teacher, folder / "whole")[1:])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("first")
    assert trainer.main([*SMALL, "--epochs", "1", "--output-dir", str(folder)]) == 0
    return str(folder / "teacher_model.pth")


@pytest.fixture(scope="module")
def cases(teacher, tmp_path_factory) -> tuple[Path, str]:
    """The folder that two processes of the cases have written to, and what they printed."""
    folder = tmp_path_factory.mktemp("cases")
    code, printed, said = torchrun(__file__, teacher, folder)
    assert code == 0, said
    return folder, printed


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
        torch.testing.assert_close(other["model"][name], expected, rtol=1e-5, atol=1e-6)
    for row, expected in zip(other["training"]["log"], one["training"]["log"], strict=True):
        assert row == pytest.approx(expected | {"images_per_second": row["images_per_second"]}, rel=1e-5)


def test_two_processes_train_as_one_and_speak_and_write_once(cases, teacher, tmp_path):
    folder, printed = cases[0] / "whole", cases[1]
    assert incremental.main(student_of(teacher, tmp_path)[1:]) == 0
    assert_close(saved_in(tmp_path), saved_in(folder))
    start, end = checkpoint.load(teacher)["model"], saved_in(folder)["model"]
    moved = [name for name in start if name[:2] != "fc" and not torch.allclose(start[name], end[name], atol=1e-4)]
    assert len(moved) > 30  # it was a training
    assert saved_in(folder)["training"]["machine"]["processes"] == 2
    assert printed.count("student_model.pth") == 1
    assert {path.name for path in folder.iterdir()} == {path.name for path in tmp_path.iterdir()}


def test_a_job_that_a_signal_stops_goes_on_to_the_same_bits_and_with_one_process_too(cases, teacher, tmp_path):
    process = started(*student_of(teacher, tmp_path), "--save-interval-steps", "3")
    wait_for(tmp_path / "student_model.pth")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    again = re.search(r"go on with: torchrun --standalone --nproc_per_node=2 (.*)", said)
    assert again, said
    stopped = (tmp_path / "student_model.pth").read_bytes()
    assert not saved_in(tmp_path)["finished"]
    code, _, said = torchrun(*again[1].split())
    assert code == 0, said
    one, other = saved_in(cases[0] / "whole"), saved_in(tmp_path)
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    (tmp_path / "student_model.pth").write_bytes(stopped)
    assert incremental.main(again[1].split()[1:]) == 0
    assert_close(one, saved_in(tmp_path))


@pytest.mark.skipif(not Path("/proc").exists(), reason="a process's children are found by Linux's /proc")
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_job_with_a_line_and_no_orphan(teacher, tmp_path, number):
    process = started(*student_of(teacher, tmp_path), "--save-interval-steps", "2", "--epochs", "1000")
    wait_for(tmp_path / "student_model.pth")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[number]), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = (line for line in said.splitlines() if re.match("(process 1: )?error: ", line))
    assert line.startswith("process 1: ") == (number == 0)
    assert f"{tmp_path}/student_model.pth" in line
    assert not any(Path("/proc", child).exists() for child in children)
    assert not saved_in(tmp_path)["finished"]


def test_bad_input_is_said_once(tmp_path):
    code, _, said = torchrun("train_teacher_model.py", *SMALL, "--output-dir", tmp_path / "out", "--batch-size", "3")
    assert code != 0
    (line,) = (line for line in said.splitlines() if "error: " in line and "--batch-size" in line)
    assert line.startswith("error: ")
    assert "terminate called" not in said  # connections that are not left end in an abort
    assert not (tmp_path / "out" / "teacher_model.pth").exists()


if __name__ == "__main__":
    process_of_the_cases(sys.argv[1], Path(sys.argv[2]))
