"""Checkpoints: whole or not at all, and known by their weights."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import checkpointfiles
import filelock
import pytest
import torch
from conftest import refused, write_images

from lwm import models
from lwm.images.cache import decoded
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError, log
from lwm.runtime.files import make_folder, require_folder, write_atomically
from lwm.runtime.run_folder import RunFolder


@pytest.fixture(scope="module")
def example() -> dict:
    return checkpointfiles.unfinished()


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_checkpoint_is_read_as_it_was_saved(tmp_path, example):
    path = tmp_path / "model.pth"
    checkpoint.save(path, example)
    loaded = checkpoint.load(str(path))
    assert same({"format": checkpoint.FORMAT, "version": checkpoint.VERSION} | example, loaded)
    assert list(loaded["model"]) == list(example["model"])


def test_the_restored_network_answers_as_the_saved_one(tmp_path, example):
    model = models.build("resnet32", 2, 32).eval()
    checkpoint.save(tmp_path / "m.pth", example | {"model": model.state_dict()})
    again = checkpoint.restore_model(checkpoint.load(tmp_path / "m.pth")).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images).logits, model(images).logits)


def test_a_save_of_what_could_not_be_loaded_leaves_the_old_checkpoint_whole(tmp_path, example):
    path = tmp_path / "model.pth"
    checkpoint.save(path, example)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="function"):
        checkpoint.save(path, example | {"training": {"not data": lambda: None}})
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
    assert path.read_bytes() == before


# Atomic writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
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
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        write_atomically(path, b"the new one")
    assert isinstance(error, KeyboardInterrupt) or str(path) in str(caught.value)
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
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "model.pth", b"new")
    assert done == ["file", "rename", "folder"]


def failing(code: int, only: Callable[..., bool] = lambda *arguments: True, usual: Callable | None = None) -> Callable:
    def fail(*arguments, **named):
        if only(*arguments):
            raise OSError(code, os.strerror(code))
        return usual(*arguments, **named)

    return fail


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


ODD = {  # file systems on which a file can be written all the same
    "no chmod (CIFS, /mnt/c of WSL)": ("chmod", failing(errno.EPERM)),
    "folders cannot be synced": ("fsync", failing(errno.EINVAL, is_folder, os.fsync)),
    "a folder's sync fails": ("fsync", failing(errno.EIO, is_folder, os.fsync)),
    "folders cannot be opened (Windows)": (
        "open",
        failing(errno.EACCES, lambda path, *_: Path(path).is_dir(), os.open),
    ),
    "no fsync": ("fsync", failing(errno.ENOTSUP)),
}


@pytest.mark.parametrize("system", ODD)
@pytest.mark.parametrize("existed", [True, False])
def test_a_file_system_that_can_do_little_takes_a_file_all_the_same(tmp_path, monkeypatch, system, existed):
    path = tmp_path / "model.pth"
    if existed:
        path.write_bytes(b"the old one")
    monkeypatch.setattr(os, *ODD[system])
    write_atomically(path, b"the new one")
    monkeypatch.undo()
    assert path.read_bytes() == b"the new one"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize(
    "error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks"), OSError(errno.ENOTSUP, "")]
)
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(filelock.FileLock, "acquire", Mock(side_effect=error))
    monkeypatch.setattr(log, "propagate", True)
    paths = write_images(tmp_path / "images", 2)
    assert len(decoded(paths, 16, tmp_path / "cache")[0]) == 2
    with RunFolder("teacher", tmp_path / "out", tmp_path / "none", None).writing():
        write_atomically(tmp_path / "out" / "model.pth", b"new")
    said = [record.message for record in caplog.records]
    assert [text.split(" knows no locks")[0] for text in said] == [str(tmp_path / name) for name in ("cache", "out")]


def test_a_cache_on_a_system_without_fsync_is_made_and_one_that_fails_is_not(tmp_path, monkeypatch):
    paths = write_images(tmp_path / "images", 2)
    monkeypatch.setattr(os, "fsync", failing(errno.ENOTSUP))
    assert len(decoded(paths, 16, tmp_path / "cache")[0]) == 2
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))  # as a share says only now that it is full
    assert "--cache-dir" in refused(decoded, paths, 8, tmp_path / "cache")


def test_a_file_that_has_the_content_already_is_not_touched(tmp_path):
    path = tmp_path / "log.csv"
    write_atomically(path, b"abc")
    before = path.stat()
    write_atomically(path, b"abc")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_atomically(path, b"abd")
    assert path.read_bytes() == b"abd"


def test_an_old_file_that_cannot_be_read_makes_way(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    path.write_bytes(b"abc")
    monkeypatch.setattr(Path, "read_bytes", failing(errno.EIO))
    write_atomically(path, b"abd")
    assert path.read_text() == "abd"


def test_a_write_honours_the_umask(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    make_folder(path.parent)
    umask = os.umask(0o027)
    try:
        write_atomically(path, b"one")
        assert path.stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027  # it is as it was
    finally:
        os.umask(umask)
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_named_and_left(tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "file").chmod(0o755)  # what may be entered is not yet a folder
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as /dev/null is no file either, which a file in its place would take from everybody
    for path in (tmp_path / "file" / "model.pth", tmp_path / "folder", tmp_path / "pipe"):
        with pytest.raises(InputError, match=str(path)):
            write_atomically(path, b"new")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=f"--output-dir is .*{folder.name}"):
            require_folder("--output-dir", folder)
        with pytest.raises(InputError, match=folder.name):
            make_folder(folder)
    require_folder("--output-dir", tmp_path / "new" / "deep")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


# Fingerprint ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_weights_alone_in_any_layout(example):
    first = checkpoint.fingerprint(example)
    assert checkpoint.fingerprint(example | {"class_names": ["x", "y"], "finished": True}) == first
    model = checkpoint.restore_model(example).to(memory_format=torch.channels_last)
    assert any(not tensor.is_contiguous() for tensor in model.state_dict().values())
    assert checkpoint.fingerprint({"model": dict(reversed(model.state_dict().items()))}) == first


@pytest.mark.parametrize("name", ["conv1.weight", "fc.bias", "bn1.running_var", "bn1.num_batches_tracked"])
def test_the_fingerprint_sees_one_changed_number(example, name):
    changed = {key: tensor.clone() for key, tensor in example["model"].items()}
    flat = changed[name].view(-1)
    flat[0] = flat[0] + 1 if flat.dtype == torch.int64 else torch.nextafter(flat[0], flat[0] + 1)
    assert checkpoint.fingerprint({"model": changed}) != checkpoint.fingerprint(example)
