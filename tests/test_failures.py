"""Full disks, vanished folders, NaN and a lack of memory lose nothing that was saved."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import image_folder
from tinyruns import HARNESS, STEPS, at_step, differences, one_line

import train_teacher_model as trainer
from lwm.images import datasets
from lwm.runtime import checkpoint, hardware
from lwm.runtime.settings import read_settings

pytestmark = pytest.mark.usefixtures("small_and_heeding_ctrl_c")


# The folder -------------------------------------------------------------------------------------------------------


def test_a_run_that_another_one_overtook_is_refused(tmp_path, whole, run, monkeypatch, capsys):
    """The folder was free when this run was opened, and another one saved while this one read its images."""
    train = datasets.Source.train

    def while_another_saves(*arguments):
        shutil.copy(whole / "student_model.pth", tmp_path)
        return train(*arguments)

    monkeypatch.setattr(datasets.Source, "train", while_another_saves)
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

    monkeypatch.setattr(datasets.Source, "train", fail)
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
