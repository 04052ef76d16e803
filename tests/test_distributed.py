"""Several processes on one machine: the same gradients as one, every test image judged once, one writer, one end.

torchrun starts this file itself as the processes of the cases, and the scripts by their command lines.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import evaluation, losses, models, training
from lwm.images import datasets
from lwm.images.datasets import Images
from lwm.runtime import checkpoint, distributed
from lwm.runtime.errors import InputError
from lwm.runtime.lock import held
from lwm.runtime.run_folder import Run

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TINY = ["--model", "resnet32", "--image-size", "8"]
OLD, NEW = 3, 2
JUDGED = (1, 2, 7)  # test images; of one image a process of two has none


# The cases that torchrun starts -----------------------------------------------------------------------------------


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A float64 teacher and its student."""
    torch.manual_seed(0)
    teacher = models.build("resnet32", OLD, 16).double()
    for _ in range(60):  # until the running statistics are those of the data
        teacher(torch.randn(8, 3, 16, 16, dtype=torch.float64))
    student = copy.deepcopy(teacher)
    models.widen_head(student, NEW)
    return teacher.eval().requires_grad_(False), student


def photos(count: int) -> Images:
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Images(pixels, OLD + torch.arange(count) % NEW)


def train(folder: Path) -> dict:
    """Two epochs of three steps on 19 images: batches of 7, 6 and 6, that two processes share as 4 + 3 and 3 + 3.

    Crops and mirror images too are those of one process: they are drawn for the whole batch.
    """
    teacher, student = pair()
    values = {"method": "lwm", "loss_form": "binary", "beta": 1.0, "gamma": 1.0, "temperature": 2.0, "seed": 0}
    values |= {
        "attention": "grad-cam",
        "attention_class": "student",
        "batch_norm": "frozen",
        "batch_size": 7,
        "momentum": 0.9,
        "flip": True,
    }
    values |= {"weight_decay": 1e-3, "precision": "fp32", "save_interval": 2, "save_interval_steps": 0}
    values |= {"balanced": False, "backbone_lr": None}
    head = {"mean": [0.5] * 3, "std": [0.25] * 3, "class_names": list("abcde")}
    head["steps"] = [{}, {"epochs": 2, "learning_rate": 2e-3, "group_accuracy": []}]
    shares = []

    def doubled(pixels: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        shares.append(len(pixels))
        return datasets.to_input(pixels, *statistics).double()

    def judge(model: torch.nn.Module) -> tuple[dict, list]:
        logits = [evaluation.predict(model, photos(count).pixels, [0.5] * 3, [0.25] * 3, 2) for count in JUDGED]
        judged.extend(logits)
        return {}, []

    def written(path: Path, content: bytes) -> None:
        files.append(path.name)
        whole(path, content)

    judged: list[torch.Tensor] = []
    files: list[str] = []
    whole = checkpoint.write_atomically
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", written)
        patch.setattr(training, "to_input", doubled)
        patch.setattr(evaluation, "to_input", doubled)
        run = Run("student", folder, folder / "student_model.pth", None)
        settings = types.SimpleNamespace(**values)
        log = training.fit(run, student, photos(19), losses.lwm, settings, head, judge, teacher)
    del log[0]["images_per_second"], log[1]["images_per_second"]
    return {"weights": student.state_dict(), "log": log, "judged": judged, "shares": shares, "files": files}


def told(folder: Path) -> list:
    """Largest number, sum and buffers on each process, and the refusal where the second has read other images."""
    own = torch.nn.BatchNorm2d(1)
    own.running_mean.fill_(distributed.rank() + 5)
    distributed.same_buffers(own)
    numbers = torch.tensor([1.0, distributed.rank()])
    found = [distributed.largest(3 - distributed.rank()), distributed.summed(numbers), numbers, own.running_mean]
    try:
        distributed.require_same(teacher="x", images=f"{distributed.rank()} images")
    except InputError as error:
        return [*found, str(error)]
    return [*found, ""]


def process_of_the_cases(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    # In this order, since a training ends in leave().
    torch.save({"told": told(folder), "train": train(folder)}, folder / f"{distributed.rank()}.pt")
    distributed.leave()


def torchrun(*command: str | Path, processes: int = 2) -> subprocess.CompletedProcess:
    several = [*TORCHRUN[:-1], f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*several, *map(str, command)], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> tuple[list[dict], Path]:
    """What the cases return on each of two processes, and the folder in which they were."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(__file__, folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], folder


# Arithmetic -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(on_two, tmp_path_factory) -> tuple[dict, list[dict], Path]:
    """What one process, and each of two, made of the same training; and the folder of the two."""
    processes, together = on_two
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = train(tmp_path_factory.mktemp("alone"))
    torch.set_num_threads(threads)
    return one, [process["train"] for process in processes], together


def test_two_processes_train_as_one_to_the_precision_of_float64(trained):
    one, both, _ = trained
    start = pair()[1].state_dict()
    for name, expected in one["weights"].items():
        for other in both:
            torch.testing.assert_close(other["weights"][name], expected, rtol=1e-9, atol=1e-12)
    moved = [name for name in start if not torch.allclose(start[name], one["weights"][name], atol=1e-4)]
    assert len(moved) > 30  # it was a training


def test_unequal_shares_count_by_their_size_in_the_log_too(trained):
    one, both, _ = trained
    assert one["shares"][:3] == [7, 6, 6]
    assert both[0]["shares"][:3] == [4, 3, 3]
    assert both[1]["shares"][:3] == [3, 3, 3]
    for row, expected in zip(both[0]["log"], one["log"], strict=True):
        assert row == pytest.approx(expected, rel=1e-6)  # the share of right answers is fp32
    assert both[0]["log"] == both[1]["log"]


def test_every_test_image_is_judged_once(trained):
    one, both, _ = trained
    judged = [sum(process["shares"][6:]) for process in both]
    assert judged == [1 + 1 + 4, 0 + 1 + 3]
    for process in both:
        for logits, expected in zip(process["judged"], one["judged"], strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)  # fp32


def test_the_first_process_alone_writes(trained):
    _, both, folder = trained
    assert sorted(set(both[0]["files"])) == ["student_log.csv", "student_model.pth"]
    assert both[1]["files"] == []
    assert len((folder / "student_log.csv").read_text().splitlines()) == 3


def test_a_process_that_is_not_the_first_leaves_no_file_asks_for_no_lock_and_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")  # so that it waits for nobody
    with held(tmp_path / ".lock", "the folder"):
        assert trainer.main([*TINY, "--epochs", "1", "--output-dir", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_what_the_processes_tell_each_other(on_two):
    for largest, summed, numbers, buffer, refusal in (process["told"] for process in on_two[0]):
        assert largest == 3
        assert summed.tolist() == [2, 1]
        assert numbers[0] == 1
        assert buffer.tolist() == [5]
        assert refusal.startswith("images: process 1 has 1 images and process 0 has 0 images; every machine needs")


def test_alone_nothing_is_asked_of_others():
    rows = torch.arange(6)
    assert distributed.size() == 1
    assert distributed.share(rows) is rows
    assert distributed.summed(rows) is rows
    assert distributed.gathered(rows, 6) is rows
    assert distributed.largest(4) == 4
    assert distributed.replicated(model := torch.nn.Linear(1, 1)) is model
    assert distributed.join(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "there", "message"),
    [
        ("cuda:1", 8, "cuda:1: 2 processes would share it"),
        ("cuda", 1, "2 processes need as many CUDA devices; there are 1"),
        ("mps", 0, "mps: several processes train on cpu or cuda"),
    ],
)
def test_a_device_that_cannot_be_shared_out_is_said(monkeypatch, name, there, message):
    for variable, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(InputError, match=message):
        distributed.join(torch.device(name))


def test_half_of_what_torchrun_sets_is_said(monkeypatch):
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="start with torchrun or unset it"):
        distributed.join(torch.device("cpu"))


# The scripts ------------------------------------------------------------------------------------------------------


def teacher_of(folder: Path, *flags: str) -> list[str]:
    return ["train_teacher_model.py", *TINY, "--output-dir", str(folder), *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A folder with a teacher and its student, of two processes each, and what the student's run printed."""
    folder = tmp_path_factory.mktemp("finished")
    done = torchrun(*teacher_of(folder, "--epochs", "2"))
    assert done.returncode == 0, done.stderr
    done = torchrun(*student_of(folder, folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def student_of(finished: Path, folder: Path, *flags: str) -> list[str]:
    model = finished / "teacher_model.pth"
    return ["incremental_learning_system.py", "--teacher", str(model), "--output-dir", str(folder), *STUDENT, *flags]


STUDENT = ["--epochs", "2", "--save-interval", "2"]


def test_the_scripts_run_on_two_processes_and_speak_once(finished):
    folder, printed = finished
    saved = checkpoint.load(folder / "student_model.pth")
    assert saved["finished"]
    assert saved["training"]["machine"]["processes"] == 2
    assert saved["class_names"] == ["0", "1", "2", "3"]
    assert printed.count("the student is in") == 1
    assert printed.count("BETA = 1.0") == 1
    assert {"student_model.pth", "student_log.csv", "student_curves.png"} < {path.name for path in folder.iterdir()}
    assert not list(folder.glob(".*"))


def test_a_step_stopped_by_a_signal_goes_on_to_the_same_bits_and_with_one_process_too(finished, tmp_path, capsys):
    whole = finished[0]
    stops = ["--save-interval-steps", "3"]
    process = started(*student_of(whole, tmp_path, *stops))
    wait_for(tmp_path / "student_model.pth")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    again = re.search(r"stopped .*; go on with: torchrun --standalone --nproc_per_node=2 (.*)", said)
    assert again, said
    assert again[1].split()[0] == "incremental_learning_system.py"
    assert again[1].split()[-1] == "--resume"
    stopped = (tmp_path / "student_model.pth").read_bytes()
    assert not checkpoint.load(tmp_path / "student_model.pth")["finished"]

    done = torchrun(*again[1].split())
    assert done.returncode == 0, done.stderr
    one, other = (checkpoint.load(folder / "student_model.pth") for folder in (whole, tmp_path))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for row, expected in zip(other["training"]["log"], one["training"]["log"], strict=True):
        # The processes' sums are added in another order.
        assert row == pytest.approx(expected | {"images_per_second": row["images_per_second"]}, rel=1e-5)

    (tmp_path / "student_model.pth").write_bytes(stopped)
    assert incremental.main(again[1].split()[1:]) == 0
    assert (
        "processes was 2 and is now 1: the result is as good, but not the same to the last bit"
        in capsys.readouterr().out
    )
    assert checkpoint.load(tmp_path / "student_model.pth")["finished"]


def started(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*TORCHRUN, *command], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def processes_of(folder: Path) -> dict[int, int]:
    """The living processes that name ``folder`` on their command line: number in the job -> process id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = dict(pair.split(b"=", 1) for pair in (entry / "environ").read_bytes().split(b"\0") if pair)
        except (OSError, ValueError):
            continue
        if str(folder).encode() in words and b"LOCAL_RANK" in environment:
            found[int(environment[b"RANK"])] = int(entry.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by Linux's /proc")
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_job_with_a_line_and_no_orphan(finished, tmp_path, number):
    process = started(*student_of(finished[0], tmp_path, "--save-interval-steps", "2", "--epochs", "1000"))
    wait_for(tmp_path / "student_model.pth")
    before = processes_of(tmp_path)
    assert set(before) == {0, 1}
    os.kill(before[number], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    prefix = "process 1: error: " if number == 0 else "error: "
    lines = [line for line in said.splitlines() if line.startswith(prefix)]
    assert lines == [
        f"{prefix}another process of this run has ended; the last checkpoint, {tmp_path}/student_model.pth, is whole"
    ]
    assert processes_of(tmp_path) == {}
    assert not checkpoint.load(tmp_path / "student_model.pth")["finished"]


def test_bad_input_is_said_once(tmp_path):
    done = torchrun(*teacher_of(tmp_path / "out", "--lr", "-1"))
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error: " in line and "--lr" in line] == [
        "error: --lr is -1.0: a number above 0 is needed"
    ]
    assert not (tmp_path / "out").exists()


def test_a_batch_that_cannot_be_shared_out_is_said(tmp_path):
    done = torchrun(*teacher_of(tmp_path, "--batch-size", "3", "--epochs", "1"))
    assert "exitcode  : 2" in done.stderr
    assert "terminate called" not in done.stderr  # the others' connections end in an abort where they are not left
    assert "a batch of 3 images is too small for 2 processes; raise --batch-size or take fewer" in done.stderr
    assert not (tmp_path / "teacher_model.pth").exists()


if __name__ == "__main__":
    process_of_the_cases(Path(sys.argv[1]))
