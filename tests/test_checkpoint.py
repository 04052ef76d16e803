"""Checkpoints: whole or not at all, read as data, and one line for everything that is not one."""

from __future__ import annotations

import io
import os
import pickle
import stat

import pytest
import torch
from conftest import checkpoint_of
from torch import nn

import checkpoint
import models
from errors import InputError


@pytest.fixture
def example():
    torch.manual_seed(0)
    return checkpoint_of(models.build("resnet32", 2, 32), "resnet32", ["b", "a"])


def refused(path) -> str:
    """The text with which ``load`` refuses a file; one line that names it."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert str(path) in text
    return text


# Round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path, example):
    path = tmp_path / "model.pth"
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1, momentum=0.9)
    state = torch.Generator().get_state()
    example["training"] = {
        "epochs": 2,
        "teacher": "",
        "images": "8, abc",
        "machine": {"device": "cpu"},
        "optimizer": optimizer.state_dict(),
        "schedule": {"last_epoch": 3},
        "generator": state,
        "torch_rng": state,
        "log": [{"epoch": 1, "loss": 0.5, "test_accuracy": None}],
        "position": None,
    }
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
    for path in (tmp_path / "file" / "model.pth", tmp_path / "folder"):
        with pytest.raises(InputError, match=str(path)):
            checkpoint.write_atomically(path, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert not list((tmp_path / "folder").iterdir())


# What is refused --------------------------------------------------------------------------------------------------


def test_load_refuses_what_is_no_file(tmp_path):
    assert "no such file" in refused(tmp_path / "none.pth")
    assert "folder" in refused(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"hello\nworld\n", b"\x00" * 100, b"PK\x03\x04 no zip", pickle.dumps([1, 2]), b"\x80\x05"]
)
def test_load_refuses_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert "not a checkpoint of this project" in refused(path)


def test_load_refuses_half_a_file(tmp_path, example):
    path = tmp_path / "model.pth"
    checkpoint.save(path, example)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a checkpoint of this project" in refused(path)


@pytest.mark.parametrize("message", ["first line\nsecond line\nthird", "", "x" * 5000])
def test_load_says_whatever_torch_says_in_one_line_of_bearable_length(tmp_path, monkeypatch, message):
    path = tmp_path / "model.pth"
    path.touch()

    def load(*arguments, **named):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "load", load)
    text = refused(path)
    assert "second" not in text
    assert len(text) < 300 + len(str(path))
    assert "()" not in text


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_load_runs_no_code_of_a_file(tmp_path, example, writer, wrapped):
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "model.pth"
    content = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION} | example | {"training": {"x": trap}}
    content = content if wrapped else trap
    with path.open("wb") as file:
        torch.save(content, file) if writer == "torch" else pickle.dump(content, file)
    assert "not a checkpoint of this project" in refused(path)
    assert not (tmp_path / "sprung").exists()
    # The trap is a real one: reading the file as code springs it.
    if writer == "torch":
        torch.load(path, weights_only=False)
        assert (tmp_path / "sprung").is_dir()


def test_load_refuses_a_bare_state_dict_and_a_whole_network(tmp_path):
    model, path = models.build("resnet32", 2, 32), tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    assert "not a checkpoint of this project" in refused(path)
    torch.save(model, path)
    assert "not a checkpoint of this project" in refused(path)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_load_refuses_another_version(tmp_path, example, version):
    path = tmp_path / "model.pth"
    torch.save({"format": checkpoint.FORMAT, **example, "version": version}, path)
    assert f"version {version}" in refused(path)


@pytest.mark.parametrize("key", list(checkpoint.KINDS))
def test_load_refuses_a_checkpoint_that_lacks_a_key(tmp_path, example, key):
    path = tmp_path / "model.pth"
    checkpoint.save(path, {name: value for name, value in example.items() if name != key})
    assert repr(key) in refused(path)
    checkpoint.save(path, example | {key: 3.5})
    assert repr(key) in refused(path)


@pytest.mark.parametrize("other", ["classes", "architecture", "missing", "unknown"])
def test_restore_model_refuses_weights_that_do_not_fit(example, other):
    if other == "classes":
        example["class_names"] = ["a", "b", "c"]
    elif other == "architecture":
        example["architecture"] = "resnet110"
    elif other == "unknown":
        example["architecture"] = "resnet99"
    else:
        example["model"] = {name: t for name, t in example["model"].items() if name != "conv1.weight"}
    with pytest.raises(InputError) as caught:
        checkpoint.restore_model(example)
    assert len(str(caught.value).splitlines()) == 1
    assert example["architecture"] in str(caught.value)


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
