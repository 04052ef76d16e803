"""Checkpoints: whole or not at all, read by every later version, and known by their weights."""

from __future__ import annotations

import csv
import gzip
import io
import os
import stat
from pathlib import Path

import pytest
import torch
from conftest import checkpoint_of, training_of
from torch import nn

import train_teacher_model as trainer
from lwm import models
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


# Round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path, example):
    path = tmp_path / "model.pth"
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1, momentum=0.9)
    state = torch.Generator().get_state()
    example["training"] = training_of(
        nn.Linear(2, 2), 1, optimizer=optimizer.state_dict(), generator=state, torch_rng=state, position=None
    )
    checkpoint.save(path, example)
    loaded = checkpoint.load(path)
    assert loaded.pop("format") == checkpoint.FORMAT
    assert loaded.pop("version") == checkpoint.VERSION
    weights = loaded.pop("model")
    for key in ("generator", "torch_rng"):
        assert torch.equal(loaded["training"].pop(key), state)
        del example["training"][key]
    assert list(weights) == list(example["model"])
    assert all(torch.equal(weights[name], tensor) for name, tensor in example["model"].items())
    assert loaded == {key: value for key, value in example.items() if key != "model"}
    assert checkpoint.load(str(path))["class_names"] == ["b", "a"]


def test_restored_network_answers_as_the_saved_one(tmp_path):
    model = models.build("resnet18", 3, 32).eval()
    checkpoint.save(tmp_path / "m.pth", checkpoint_of(model, "resnet18", ["x", "y", "z"]))
    again = checkpoint.restore_model(checkpoint.load(tmp_path / "m.pth")).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits, rtol=0, atol=0)


# Atomic writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_beside_it(
    tmp_path, monkeypatch, error, existed, broken
):
    path = tmp_path / "model.pth"
    if existed:
        path.write_bytes(b"the old one")

    def fail(*arguments):
        assert not existed or path.read_bytes() == b"the old one"
        raise error

    class Broken(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            fail()

    if broken == "write":
        monkeypatch.setattr(os, "fdopen", lambda handle, mode: Broken(handle, mode))
    else:
        monkeypatch.setattr(os, broken, fail)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        checkpoint.write_atomically(path, b"the new one")
    if expected is InputError:
        assert "No space left" in str(caught.value)
        assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == (["model.pth"] if existed else [])
    assert not existed or path.read_bytes() == b"the old one"


def test_a_write_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """The file is synced before the rename, and the folder after it: so a power cut leaves one or the other."""
    done = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def replace(source, target):
        done.append("rename")
        assert not source.endswith(".pth")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    checkpoint.write_atomically(tmp_path / "model.pth", b"new")
    assert done == ["file", "rename", "folder"]


def test_a_file_that_has_the_content_already_is_not_touched(tmp_path):
    path = tmp_path / "log.csv"
    checkpoint.write_atomically(path, b"abc")
    before = path.stat()
    checkpoint.write_atomically(path, b"abc")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    checkpoint.write_atomically(path, b"abd")
    assert path.read_bytes() == b"abd"


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, example):
    path = tmp_path / "model.pth"
    checkpoint.save(path, example)
    with pytest.raises(ValueError, match="function"):
        checkpoint.save(path, example | {"training": {"not data": lambda: None}})
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
    assert checkpoint.load(path)["class_names"] == ["b", "a"]


def test_a_write_replaces_the_file_and_honours_the_umask(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    checkpoint.make_folder(path.parent)
    umask = os.umask(0o027)
    try:
        checkpoint.write_atomically(path, b"one")
        assert path.stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027  # it is as it was
    finally:
        os.umask(umask)
    checkpoint.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as /dev/null is no file either, which a file in its place would take from everybody
    for path in (tmp_path / "file" / "model.pth", tmp_path / "folder", tmp_path / "pipe"):
        with pytest.raises(InputError, match=str(path)):
            checkpoint.write_atomically(path, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()
    assert not list((tmp_path / "folder").iterdir())


# Version 1 ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_version_2_has_no_statistics(tmp_path, example):
    old = {name: value for name, value in example.items() if name not in ("statistics", "readouts")}
    torch.save({"format": checkpoint.FORMAT, "version": 2, **old}, tmp_path / "model.pth")
    loaded = checkpoint.load(tmp_path / "model.pth")
    assert loaded["statistics"] == loaded["readouts"] == {}
    torch.save({"format": checkpoint.FORMAT, "version": 3, **old}, tmp_path / "model.pth")
    with pytest.raises(InputError, match="'statistics' is missing"):
        checkpoint.load(tmp_path / "model.pth")


def test_a_checkpoint_of_version_1_is_read_and_its_run_goes_on(tmp_path, capsys):
    """data/version1.pth.gz was written by the last code that wrote version 1 (commit a9b4b1f).

    It was a teacher of the digits 0 and 1 (resnet32, 8 px), stopped when the first of its two epochs was saved. The
    numbers of its weights, statistics and momenta were then replaced by ones that can be compressed, -5/128 to 5/128
    in turn (around 1 for the batch-norms' weights and variances; -5/4096 to 5/4096 for the momenta), its data_dir by
    "data", and it was saved again by that code. What is expected here was computed by that code.
    """
    path = tmp_path / "teacher_model.pth"
    path.write_bytes(gzip.decompress((ROOT / "tests" / "data" / "version1.pth.gz").read_bytes()))
    assert torch.load(path, weights_only=True)["version"] == 1
    loaded = checkpoint.load(path)
    assert (loaded["architecture"], loaded["image_size"], loaded["loss_form"]) == ("resnet32", 8, "binary")
    assert (loaded["class_names"], loaded["finished"]) == (["0", "1"], False)
    assert loaded["mean"] == [0.30863562091503266] * 3
    assert loaded["std"] == [0.37958789032920764] * 3
    step = {"classes": ["0", "1"], "dataset": "digits", "data_dir": "data", "seed": 0, "learning_rate": 0.03}
    assert len(loaded["steps"]) == 1
    assert step.items() <= loaded["steps"][0].items()
    training = loaded["training"]
    assert (training["epochs"], training["teacher"], len(training["log"])) == (2, "", 1)
    assert (training["position"], training["images"], training["machine"]) == (None, None, {})
    assert training["schedule"]["last_epoch"] == 5
    assert training["optimizer"]["state"][0]["momentum_buffer"].flatten()[:3].tolist() == [
        -5 / 4096,
        -4 / 4096,
        -3 / 4096,
    ]

    images = torch.arange(2 * 3 * 8 * 8).remainder(13).sub(6).div(6).view(2, 3, 8, 8)
    with torch.no_grad():
        logits = checkpoint.restore_model(loaded).eval()(images).logits
    expected = torch.tensor([[-0.049828434, -0.026292772], [-0.056705686, -0.120892580]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)

    flags = "--dataset digits --old-classes 0,1 --model resnet32 --image-size 8 --method lwm --loss-form binary "
    flags += "--epochs 2 --batch-size 64 --lr 0.03 --momentum 0.9 --weight-decay 0 --no-flip --precision fp32 "
    flags += "--hold-back 0 --seed 0 --device cpu --save-interval 1 --resume"
    assert trainer.main([*flags.split(), "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    with (tmp_path / "teacher_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["loss"]) == pytest.approx(1.4108, rel=0.01)
    assert torch.load(path, weights_only=True)["version"] == 3
    assert checkpoint.load(path)["finished"] is True


# Fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_weights_alone(example):
    first = checkpoint.fingerprint(example)
    assert len(first) == 64
    assert checkpoint.fingerprint(example | {"class_names": ["x", "y"], "finished": False}) == first
    shuffled = dict(reversed(example["model"].items()))
    assert checkpoint.fingerprint({"model": shuffled}) == first


def test_fingerprint_does_not_depend_on_the_memory_layout(example):
    model = models.build("resnet32", 2, 32)
    model.load_state_dict(example["model"])
    model = model.to(memory_format=torch.channels_last)
    assert any(not t.is_contiguous() for t in model.state_dict().values())
    assert checkpoint.fingerprint({"model": model.state_dict()}) == checkpoint.fingerprint(example)


@pytest.mark.parametrize("name", ["conv1.weight", "fc.bias", "bn1.running_var", "bn1.num_batches_tracked"])
def test_fingerprint_sees_one_changed_number(example, name):
    before = checkpoint.fingerprint(example)
    changed = {key: tensor.clone() for key, tensor in example["model"].items()}
    flat = changed[name].view(-1)
    flat[0] = flat[0] + 1 if flat.dtype == torch.int64 else torch.nextafter(flat[0], flat[0] + 1)
    assert checkpoint.fingerprint({"model": changed}) != before
    assert checkpoint.fingerprint(example) == before
