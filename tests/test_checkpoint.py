"""Checkpoints: whole or not at all, read as data, and one line for everything that is not one."""

from __future__ import annotations

import copy
import csv
import functools
import gzip
import io
import json
import math
import operator
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, picture, training_of
from PIL import Image
from torch import nn

import checkpoint
import incremental_learning_system as incremental
import models
import torchfile
import train_teacher_model as trainer
from errors import InputError, RunError
from run import Run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def example():
    torch.manual_seed(0)
    return checkpoint_of(models.build("resnet32", 2, 32), "resnet32", ["b", "a"])


@pytest.fixture(scope="module")
def unfinished():
    """A run that was stopped inside an epoch. Not to be changed: ``put`` makes a copy."""
    model = models.build("resnet32", 2, 32)
    return checkpoint_of(model, "resnet32", ["b", "a"], finished=False, training=training_of(model))


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
    for path in (tmp_path / "file" / "model.pth", tmp_path / "folder"):
        with pytest.raises(InputError, match=str(path)):
            checkpoint.write_atomically(path, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert not list((tmp_path / "folder").iterdir())


# What is refused --------------------------------------------------------------------------------------------------


def put(content: dict, changes: dict) -> dict:
    """A copy with other values in it, at places like "steps/0/epochs"; ``...`` takes one out, a function changes it."""
    content = copy.deepcopy(content)
    for place, value in changes.items():
        *before, last = (int(key) if key.isdigit() else key for key in place.split("/"))
        inner = functools.reduce(operator.getitem, before, content)
        if value is ...:
            del inner[last]
        else:
            inner[last] = value(inner[last]) if callable(value) else value
    return content


def write(path: Path, content: dict, changes: dict | None = None) -> None:
    """As ``checkpoint.save`` would, without its checks."""
    head = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION}
    torch.save(put(head | content, changes) if changes else head | content, path)


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, members: dict[str, bytes], deflated: str = "", claims: dict[str, int] | None = None) -> None:
    """A zip archive; one member may be compressed, and some may say another size than they have."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name == deflated else zipfile.ZIP_STORED)
        for name, size in (claims or {}).items():
            archive.getinfo(name).file_size = size


def pack_pickle(path: Path, content: Path, pickled: bytes) -> None:
    """The archive ``content`` with another structure."""
    pack(path, members_of(content) | {"archive/data.pkl": pickled})


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_what_is_no_file_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "none.pth")
    assert "folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in refused(tmp_path / "pipe")  # opening it would wait for a writer for ever
    assert "device" in refused(Path("/dev/zero"))
    (tmp_path / "file").touch()
    assert "no such file" in refused(tmp_path / "file" / "model.pth")


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path, example):
    checkpoint.save(tmp_path / "model.pth", example)
    (tmp_path / "model.pth").chmod(0)
    assert "Permission denied" in refused(tmp_path / "model.pth")


def png(path):
    Image.fromarray(picture(0)).save(path, "PNG")


def other_zip(path):
    pack(path, {"a.txt": b"hello", "folder/b.txt": b"more"}, deflated="a.txt")


OTHER_FILES = {  # what it is: how it is made, what is said of it
    "empty": (lambda path: path.touch(), "is empty"),
    "text": (lambda path: path.write_text("hello\nworld\n"), "is a text file"),
    "text in Greek, cut inside a letter": (lambda path: path.write_bytes("λ".encode() * 2048 + b"\xce"), "a text file"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "is not a torch file"),
    "random bytes": (lambda path: path.write_bytes(b"\xd7" + random.Random(0).randbytes(5000)), "is not a torch file"),
    "image": (png, "is an image"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "is a bare pickle"),
    "old torch file": (lambda path: torch.save([1], path, _use_new_zipfile_serialization=False), "is a bare pickle"),
    "beginning of a zip": (lambda path: path.write_bytes(b"PK\3\4 no zip"), "damaged or cut off"),
    "zip": (other_zip, "is a zip archive, but not of torch"),
    "state_dict": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "is a bare state_dict"),
    "network": (lambda path: torch.save(nn.Linear(2, 2), path), "run code when it is read (torch.nn.modules.linear"),
    "parameter": (lambda path: torch.save({"a": nn.Parameter(torch.ones(1))}, path), "_rebuild_parameter"),
    "numpy array": (lambda path: torch.save({"a": np.ones(3)}, path), "numpy"),
    "other program's": (lambda path: torch.save({"epoch": 3, "best": 0.5}, path), "another program's torch file"),
    "empty dict": (lambda path: torch.save({}, path), "another program's torch file"),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "another program's torch file"),
    "list": (lambda path: torch.save([1, 2], path), "another program's torch file"),
    "TorchScript": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path)), "a compressed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_file_of_another_kind_is_refused_with_the_word_for_it(tmp_path, capfd, kind):
    make, words = OTHER_FILES[kind]
    make(tmp_path / "model.pth")
    assert words in refused(tmp_path / "model.pth")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_no_code_of_a_file_is_run(tmp_path, example, writer, wrapped):
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "model.pth"
    content = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION} | example | {"training": {"x": trap}}
    content = content if wrapped else trap
    with path.open("wb") as file:
        torch.save(content, file) if writer == "torch" else pickle.dump(content, file)
    said = refused(path)
    assert (
        "run code when it is read (posix.mkdir)" if writer == "torch" else "bare pickle, which can run code"
    ) in said
    assert not (tmp_path / "sprung").exists()
    # The trap is a real one: reading the file as code springs it.
    if writer == "torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert (tmp_path / "sprung").is_dir()


def test_torch_is_told_to_run_no_code_either(tmp_path, example, monkeypatch):
    monkeypatch.setattr(torchfile, "_check_opcodes", lambda pickled: None)
    write(tmp_path / "model.pth", example, {"training": {"x": Trap(tmp_path / "sprung")}})
    assert "not a checkpoint" in refused(tmp_path / "model.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_is_found_in_every_kind_of_pickle(tmp_path, example, protocol):
    checkpoint.save(tmp_path / "whole.pth", example)
    pack_pickle(tmp_path / "model.pth", tmp_path / "whole.pth", pickle.dumps(Trap(tmp_path / "sprung"), protocol))
    assert "run code" in refused(tmp_path / "model.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_torch_reads_no_other_structure_than_the_one_that_was_checked(tmp_path, example):
    """zipfile finds the table of contents by the end of the file, torch by the place that is noted there."""
    path, parts = tmp_path / "model.pth", []
    for size in (32, 48):
        write(path, example, {"image_size": size})
        members = members_of(path)
        pack(path, {name.replace("model/", "archive/"): content for name, content in members.items()})
        parts.append(path.read_bytes())
    path.write_bytes(parts[0][:-22] + parts[1])
    assert torch.load(path, weights_only=True)["image_size"] == 32
    assert members_of(path)["archive/data.pkl"] == members["model/data.pkl"]  # where it is 48
    assert "damaged or cut off" in refused(path)
    for other in ("archive/DATA.PKL", "archive/data.pkl\0x"):
        pack(path, {"archive/" + name.split("/", 1)[1]: content for name, content in members.items()} | {other: b""})
        refused(path)


@pytest.mark.parametrize("message", ["first line\nsecond line\nthird", "", "x" * 5000, "\x1b[2Jcleared\a"])
def test_whatever_torch_says_becomes_one_line_of_bearable_length(tmp_path, example, monkeypatch, message):
    path = tmp_path / "model.pth"
    checkpoint.save(path, example)

    def load(*arguments, **named):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "load", load)
    text = refused(path)
    assert "second" not in text
    assert len(text) < 300 + len(str(path))
    assert "()" not in text
    assert text.isprintable()


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path, unfinished):
    path = tmp_path / "model.pth"
    checkpoint.save(path, unfinished)
    whole = path.read_bytes()
    generator = random.Random(0)
    for length in [*range(1, 200, 7), *range(len(whole) - 120, len(whole)), *generator.sample(range(len(whole)), 40)]:
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)
    path.write_bytes(whole)
    assert checkpoint.load(path)["training"]["position"]["batches"] == 3


def test_a_changed_byte_is_found_wherever_it_is_read(tmp_path, unfinished):
    path = tmp_path / "model.pth"
    checkpoint.save(path, unfinished)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = [member.header_offset + 200 for member in archive.infolist() if member.file_size > 1000]
    for place in places[::10]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "is not what was written" in refused(path)


@pytest.mark.parametrize("version", [0, 4, -1, None, "1", True, 1.0, [1], 10**30])
def test_another_version_is_refused(tmp_path, example, version):
    write(tmp_path / "model.pth", example, {"version": version})
    said = refused(tmp_path / "model.pth")
    assert ("absurd" if version == 10**30 else f"is version {version!r} of the checkpoint") in said


@pytest.mark.parametrize("key", list(checkpoint.KINDS))
def test_a_checkpoint_that_lacks_a_key_is_refused(tmp_path, example, key):
    path = tmp_path / "model.pth"
    for value in (..., 3.5, None):
        write(path, example, {key: value})
        assert repr(key) in refused(path)


# Files made to fill the memory or to take for ever -----------------------------------------------------------------


class Made:
    """Pickled as the call of a function that a checkpoint may name."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def claim(shape: tuple[int, ...], strides: tuple[int, ...]) -> Made:
    """A tensor of four bytes that says it has another shape."""
    storage = torch.ones(1)._typed_storage()
    return Made(torch._utils._rebuild_tensor_v2, storage, 0, shape, strides, False, OrderedDict())


def opcodes(*parts: bytes, repeat: int) -> bytes:
    """A pickle of a list: ``parts``, the last of them many times."""
    return b"\x80\x02](" + b"".join(parts[:-1]) + parts[-1] * repeat + b"e."


LIST = b"](" + b"K\0" * 100_000 + b"e\x85q\0"  # the tuple ([0, 0, ...],), kept under 0
ORDERED = b"ccollections\nOrderedDict\nq\1"
TEN_TO_THE_TENTH = functools.reduce(lambda inner, _: [inner] * 10, range(9), [0] * 10)
BOMBS = {  # the key whose value it is, or "" for the whole structure as it is pickled; what is said of it
    "shape": ("training", lambda: claim((10**9,), (1,)), "not resizable"),
    "shape by stride 0": ("training", lambda: claim((10**9,), (0,)), "its tensors are larger than its"),
    "shape without end": ("training", lambda: claim((2**31, 2**31, 2**31), (0, 0, 0)), "or damaged"),
    "shape below zero": ("training", lambda: claim((-5,), (1,)), "or damaged"),
    "shared storage": ("training", lambda: list(torch.zeros(2000, 1).expand(-1, 10**4)), "tensors are larger than its"),
    "dimensions": ("training", lambda: claim((1,) * 10**5, (1,) * 10**5), "larger than that"),
    "depth": ("", lambda: b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".", "structure is deeper"),
    "width": ("training", lambda: TEN_TO_THE_TENTH, "structure is deeper or larger"),
    "itself": ("", lambda: b"\x80\x02]q\0h\0a.", "structure is deeper"),
    "length": ("", lambda: opcodes(b"N", repeat=2**23 - 6), "or another one"),
    "length of dicts": ("", lambda: opcodes(b"}", repeat=2**23 - 6), "or another one"),
    "length in bytes": ("training", lambda: "x" * (2**23 + 1), "its structure alone takes"),
    "a million class names": ("class_names", lambda: [f"{i:x}" for i in range(10**6)], "its structure alone takes"),
    "one class name a million times": ("class_names", lambda: ["a"] * 10**6, "or another one"),
    "200,000 class names": ("class_names", lambda: [f"{i:x}" for i in range(2 * 10**5)], "the steps' classes are not"),
    "pairs": ("training", lambda: [(i, i) for i in range(10**5)], "larger than that"),
    "digits": ("training", lambda: [2**2000 - i for i in range(1000)], "absurd size"),
    "keys of one hash": ("training", lambda: {(2**61 - 1) * i: 0 for i in range(20_000)}, "absurd size"),
    "a list made into many dicts": ("", lambda: opcodes(LIST, ORDERED, b"h\1h\0R", repeat=10**4), "larger than that"),
    "many attributes": ("", lambda: opcodes(b"}q\0", ORDERED, b"h\1)Rh\0b", repeat=2), "larger than that"),
    "a list made into a shape": ("training", lambda: torch.Size([1] * 1000), "run code when it is read (torch.Size)"),
    "an array from a number": ("training", lambda: Made(bytearray, 10**12), "(__builtin__.bytearray)"),
}  # fmt: skip


def archive_bombs(folder: Path, whole: Path) -> dict[Path, str]:
    """Archives that are small and would not be when they are unpacked, and what is said of each."""
    members = members_of(whole)
    data = next(name for name in members if "/data/" in name)
    structure = next(name for name in members if name.endswith("/data.pkl"))
    pack(folder / "deflated", members | {data: bytes(10**8)}, deflated=data)
    pack(folder / "deflated structure", members | {structure: b"N" * 10**8}, deflated=structure)
    pack(folder / "claims", members, claims={data: 2**31})
    pack(folder / "claims together", members, claims=dict.fromkeys((n for n in members if "/data/" in n), 50_000))
    order = next(name for name in members if name.endswith("/byteorder"))
    pack(folder / "byte order", members | {order: b"big"})
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 9, 1, *[0] * 6) + b"x"
    table = entry * 200_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(table), 30, 0)
    (folder / "contents").write_bytes(b"PK\3\4" + bytes(26) + table + end)
    said = (
        ["a compressed archive"] * 2 + ["says that it holds more than"] * 2 + ["order of bytes", "does not end as one"]
    )
    names = ("deflated", "deflated structure", "claims", "claims together", "byte order", "contents")
    return {folder / name: words for name, words in zip(names, said, strict=True)}


READER = """
import json, resource, sys, time
import checkpoint, errors

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

limit = kilobytes("VmSize:") * 1024 + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before, said = kilobytes("VmHWM:"), {}
for path in sys.argv[1:]:
    start = time.perf_counter()
    try:
        checkpoint.load(path)
        text = "loaded"
    except errors.InputError as error:
        text = str(error)
    said[path] = text, time.perf_counter() - start
print(json.dumps([said, (kilobytes("VmHWM:") - before) / 1024]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory is limited and measured as Linux has it")
def test_a_file_made_to_fill_the_memory_or_to_take_for_ever_does_neither(tmp_path, example):
    whole, files = tmp_path / "whole.pth", {}
    write(whole, example)
    for kind, (key, make, words) in BOMBS.items():
        path = tmp_path / kind
        if key:
            write(path, example, {key: {"x": make()} if key == "training" else make()})
        else:
            pack(path, members_of(whole) | {"whole/data.pkl": make()})
        files[path] = words
    files |= archive_bombs(tmp_path, whole)
    read = [sys.executable, "-c", READER, str(whole), *map(str, files)]
    done = subprocess.run(read, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    said, megabytes = json.loads(done.stdout)
    print(said, megabytes)
    assert said.pop(str(whole))[0] == "loaded"
    for path, words in files.items():
        text, seconds = said[str(path)]
        assert words in text, path.name
        assert text.startswith(f"{path}: ")
        assert len(text.splitlines()) == 1
        assert seconds < 10, path.name
    assert megabytes < 400


# Values that no run saves ------------------------------------------------------------------------------------------

FIRST, STEP, TRAIN, ROW, PART = "model/conv1.weight", "steps/0/", "training/", "training/log/0/", "training/position/"
WRONG = {  # changes of a whole checkpoint with a training state, and what is said of it
    "no class": ({"class_names": [], "steps": []}, "not unique, or there are none"),
    "one class twice": ({"class_names": ["a", "a"], STEP + "classes": ["a", "a"]}, "not unique"),
    "a class without a name": ({"class_names": ["", "a"], STEP + "classes": ["", "a"]}, "a class name"),
    "a class that is a number": ({"class_names": [1, 2], STEP + "classes": [1, 2]}, "a class name"),
    "a class that clears the screen": ({"class_names": ["\x1b[2J", "a"]}, "a class name"),
    "a class of half a letter": ({"class_names": ["\ud800", "a"]}, "a class name"),
    "a class that no step taught": ({STEP + "classes": ["b"]}, "the steps' classes are not"),
    "classes in another order": ({STEP + "classes": ["a", "b"]}, "the steps' classes are not"),
    "no step": ({"steps": []}, "the steps' classes are not"),
    "a step without classes": ({"steps": lambda steps: [*steps, {**steps[0], "classes": []}]}, "the steps' classes"),
    "a step that is a number": ({"steps": [1]}, "a step is not a dict"),
    "a step without a folder": ({STEP + "data_dir": ...}, "'data_dir' of a step"),
    "a setting that is a tensor": ({STEP + "seed": torch.ones(2)}, "a setting of a step"),
    "a setting that is a list": ({STEP + "seed": [1]}, "a setting of a step"),
    "a setting of thousands of digits": ({STEP + "seed": 10**500}, "absurd"),
    "more than all held back": ({STEP + "hold_back": 1.5}, "out of range"),
    "less than none held back": ({STEP + "hold_back": -0.1}, "out of range"),
    "nothing that is a number held back": ({STEP + "hold_back": math.nan}, "out of range"),
    "no epochs": ({STEP + "epochs": 0}, "out of range"),
    "an accuracy above all": ({STEP + "group_accuracy": [101.0]}, "accuracy"),
    "an accuracy that is none": ({STEP + "group_accuracy": [math.nan]}, "accuracy"),
    "an accuracy that is a text": ({STEP + "group_accuracy": ["50"]}, "accuracy"),
    "accuracies of no group": ({STEP + "group_accuracy": [1.0, 2.0]}, "groups that do not exist"),
    "image size 7": ({"image_size": 7}, "image size"),
    "image size 10**9": ({"image_size": 10**9}, "image size"),
    "image size -32": ({"image_size": -32}, "image size"),
    "image size True": ({"image_size": True}, "'image_size' is missing or not a int"),
    "loss form": ({"loss_form": "other"}, "the loss form"),
    "mean of two": ({"mean": [0.5, 0.5]}, "'mean'"),
    "mean of texts": ({"mean": ["0.5"] * 3}, "'mean'"),
    "mean without bound": ({"mean": [0.5, 0.5, -math.inf]}, "'mean'"),
    "mean far off": ({"mean": [0.5, 0.5, 1e30]}, "'mean'"),
    "std 0": ({"std": [0.5, 0.5, 0.0]}, "'std'"),
    "std below 0": ({"std": [0.5, 0.5, -0.5]}, "'std'"),
    "std that float32 has not": ({"std": [0.5, 0.5, 1e-300]}, "'std'"),
    "std that is no number": ({"std": [0.5, 0.5, math.nan]}, "'std'"),
    "another network": ({"architecture": "resnet110"}, "the weights do not fit resnet110"),
    "a network that there is not": ({"architecture": "resnet99"}, "no architecture 'resnet99'"),
    "a network with a long name": ({"architecture": "x\n" * 5000}, "no architecture"),
    "weights of three classes": (
        {"class_names": list("abc"), STEP + "classes": list("abc")},
        "with 3 classes ('fc.weight' is [2, 64] torch.float32, [3, 64] torch.float32 is needed)",
    ),
    "no weights": ({"model": {}}, "the weights do not fit resnet32"),
    "weights that are missing": ({FIRST: ...}, "['conv1.weight']"),
    "weights too many": ({"model/more": torch.ones(1)}, "['more']"),
    "weights under a number": ({"model": lambda model: model | {5: torch.ones(1)}}, "['5']"),
    "weights that are a list": ({FIRST: [1.0]}, "not a tensor"),
    "weights in double": ({FIRST: torch.Tensor.double}, "torch.float64"),
    "weights in half": ({FIRST: torch.Tensor.half}, "torch.float16"),
    "weights of another shape": ({FIRST: lambda t: t.view(-1)}, "[432]"),
    "weights that are no numbers": ({FIRST: lambda t: t.index_fill(0, torch.tensor([5]), math.nan)}, "not finite"),
    "weights without bound": ({FIRST: lambda t: t.index_fill(0, torch.tensor([5]), -math.inf)}, "not finite"),
    "a variance below zero": ({"model/bn1.running_var": torch.Tensor.neg}, "negative"),
    "a count below zero": ({"model/bn1.num_batches_tracked": torch.tensor(-1)}, "negative"),
    "a sparse tensor": ({FIRST: torch.Tensor.to_sparse}, "run code when it is read (torch._utils._rebuild_sparse"),
    "a tensor on no device": ({FIRST: lambda t: t.to("meta")}, "run code when it is read"),
    "a set": ({"more": {1, 2}}, "run code when it is read (__builtin__.set)"),
    "bytes": ({"more": b"1"}, "run code when it is read (_codecs.encode)"),
    "a key that is a pair": ({"more": {(1, 2): 3}}, "a key in it"),
    "a key that is nothing": ({"more": {None: 3}}, "a key in it"),
    "training without state": ({"training": {}}, "'epochs' of the training state"),
    "training without a log": ({TRAIN + "log": ...}, "'log' of the training state"),
    "training without a position": ({TRAIN + "position": ...}, "not whole"),
    "training of no epochs": ({TRAIN + "epochs": 0}, "as long as the training"),
    "training that is over": ({TRAIN + "epochs": 1, TRAIN + "log": lambda log: log * 2}, "as long as the training"),
    "training that is said to be over": ({"finished": True}, "as long as the training"),
    "random state cut off": ({TRAIN + "generator": lambda t: t[:100].clone()}, "a random state"),
    "random state of floats": ({TRAIN + "torch_rng": torch.Tensor.float}, "a random state"),
    "random state of zeros": ({TRAIN + "torch_rng": torch.zeros_like}, "a random state"),
    "random state in a list": ({TRAIN + "torch_rng": torch.Tensor.tolist}, "'torch_rng'"),
    "log of texts": ({TRAIN + "log": ["epoch 1"]}, "a row of the log"),
    "row of texts": ({ROW + "loss": "0.5"}, "a row of the log"),
    "row of tensors": ({ROW + "loss": torch.ones(1)}, "a row of the log"),
    "row under a number": ({TRAIN + "log": [{1: 0.5}]}, "a row of the log"),
    "row of another epoch": ({ROW + "epoch": 2}, "a row of the log"),
    "rows with other columns": (
        {TRAIN + "epochs": 3, TRAIN + "log": lambda log: [*log, {"epoch": 2, "loss": 0.5}]},
        "a row of the log",
    ),
    "last epoch not judged": (
        {TRAIN + "epochs": 1, ROW + "test_accuracy": ...},
        "the last epoch",
    ),
    "last epoch judged by nothing": (
        {"finished": True, TRAIN + "epochs": 1, TRAIN + "position": None, ROW + "test_accuracy": None},
        "the last epoch",
    ),
    "images": ({TRAIN + "images": 8}, "the images"),
    "machine": ({TRAIN + "machine": "cpu"}, "trained on"),
    "machine in a tensor": ({TRAIN + "machine/threads": torch.ones(2)}, "trained on"),
    "position": ({TRAIN + "position": 3}, "position"),
    "position without sums": ({PART + "sums": ...}, "'sums' of the position"),
    "position of a batch that is no number": ({PART + "batches": "3"}, "'batches' of the position"),
    "position below zero": ({PART + "batches": -3}, "a number of the position"),
    "position for ever": ({PART + "seconds": math.inf}, "a number of the position"),
    "position at no learning rate": ({PART + "learning_rate": math.nan}, "a number of the position"),
    "position in no order": ({PART + "order": lambda t: t[1:].clone()}, "a random state"),
    "sums of texts": ({PART + "sums/total": "7"}, "the sums"),
    "device's random state": ({TRAIN + "device_rng": torch.zeros(16)}, "random state of the device"),
    "optimiser": ({TRAIN + "optimizer": [1]}, "'optimizer'"),
    "schedule": ({TRAIN + "schedule": ...}, "'schedule'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_checkpoint_with_a_value_that_no_run_saves_is_refused(tmp_path, unfinished, kind):
    changes, words = WRONG[kind]
    write(tmp_path / "model.pth", unfinished, changes)
    said = refused(tmp_path / "model.pth")
    assert words in said
    assert len(said) < 400 + len(str(tmp_path))


def test_a_checkpoint_may_share_its_tensors_or_have_other_strides(tmp_path, unfinished):
    """What is refused is more than is in the file; each tensor has its own memory then."""
    path = tmp_path / "model.pth"
    changes = {FIRST: lambda t: t.to(memory_format=torch.channels_last), "model/fc.bias": torch.zeros(1).expand(2)}
    changes |= {TRAIN + "torch_rng": unfinished["training"]["generator"], TRAIN + "machine": {}}
    write(path, unfinished, changes)
    loaded = checkpoint.load(path)
    loaded["model"]["fc.bias"][0] = 1
    assert loaded["model"]["fc.bias"].tolist() == [1, 0]
    assert torch.equal(loaded["model"]["conv1.weight"], unfinished["model"]["conv1.weight"])
    path.write_bytes(b"written over")  # nothing of it is still a view of the file
    assert torch.equal(loaded["model"]["conv1.weight"], unfinished["model"]["conv1.weight"])


def test_a_tensor_that_wants_a_gradient_or_is_negated_is_read_as_plain_numbers(tmp_path, example):
    path = tmp_path / "model.pth"
    write(path, example, {FIRST: lambda t: t.clone().requires_grad_()})
    refused(path)
    write(path, example, {FIRST: lambda t: torch._neg_view(t)})
    refused(path)


def test_methods_that_the_file_puts_into_a_dict_are_not_asked_for(tmp_path, example):
    """Pickle can set attributes of an OrderedDict: one named items would hide what is in it from every check."""
    path = tmp_path / "model.pth"

    class Hiding(dict):
        def __reduce__(self):
            return (
                OrderedDict,
                (),
                dict.fromkeys(("items", "keys", "values", "get"), OrderedDict),
                None,
                iter(self.items()),
            )

    write(path, example | {"model": Hiding(example["model"] | {"conv1.weight": torch.ones(1)})})
    assert not torch.load(path, weights_only=True)["model"].items()
    assert "'conv1.weight' is [1]" in refused(path)


# Refused when a run resumes ----------------------------------------------------------------------------------------

STATE, GROUP, COSINE = "training/optimizer/state/", "training/optimizer/param_groups/0/", "training/schedule/"
BROKEN_STATES = {
    "momentum of another shape": {STATE + "3/momentum_buffer": torch.ones(5)},
    "momentum that is no number": {STATE + "3/momentum_buffer": lambda t: t * math.nan},
    "momentum in double": {STATE + "3/momentum_buffer": torch.Tensor.double},
    "momentum that is a text": {STATE + "3/momentum_buffer": "0"},
    "momentum of no parameter": {"training/optimizer/state": lambda state: state | {500: state[0]}},
    "momentum under a name": {"training/optimizer/state": lambda state: state | {"a": state[0]}},
    "a state that is a list": {"training/optimizer/state": []},
    "an entry that is a number": {STATE + "3": 1},
    "no groups": {"training/optimizer/param_groups": ...},
    "too many groups": {"training/optimizer/param_groups": lambda groups: groups * 2},
    "parameters too few": {GROUP + "params": lambda parameters: parameters[1:]},
    "a learning rate that is a text": {GROUP + "lr": "0.1"},
    "a learning rate below zero": {GROUP + "lr": -0.1},
    "a learning rate that is no number": {GROUP + "lr": math.nan},
    "a base that is a text": {COSINE + "base_lrs": ["0.1"]},
    "two bases": {COSINE + "base_lrs": [0.1, 0.1]},
    "a step that is a text": {COSINE + "last_epoch": "5"},
    "a step below zero": {COSINE + "last_epoch": -3},
    "a cosine of no steps": {COSINE + "T_max": 0},
    "a cosine of too many steps": {COSINE + "T_max": 10**12},
    "a cosine of half a step": {COSINE + "T_max": 0.5},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The flags of a student that was stopped inside its first epoch, and its checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    teacher = checkpoint_of(models.build("resnet32", 2, 8), "resnet32", ["0", "1"], 8)
    checkpoint.save(folder / "teacher.pth", teacher)
    flags = ["--teacher", str(folder / "teacher.pth"), "--dataset", "digits", "--new-classes", "2,3", "--epochs", "2"]
    flags += ["--output-dir", str(folder), "--save-interval-steps", "2", "--device", "cpu"]
    save = Run.save

    def save_and_stop(run, content):
        save(run, content)
        raise RunError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save_and_stop)
        assert incremental.main(flags) == 1
    return [*flags, "--resume"], folder / "student_model.pth", checkpoint.load(folder / "student_model.pth")


@pytest.mark.parametrize("kind", BROKEN_STATES)
def test_a_damaged_state_of_the_optimiser_is_refused(unfinished, kind):
    optimizer = torch.optim.SGD(models.build("resnet32", 2, 32).parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def check(training):
        checkpoint.checked_optimizer(training["optimizer"], optimizer)
        checkpoint.checked_state(training["schedule"], schedule.state_dict(), "schedule")

    check(unfinished["training"])
    with pytest.raises(InputError, match=r"cannot resume: the saved state of the (optimiser|schedule) is damaged"):
        check(put(unfinished, BROKEN_STATES[kind])["training"])


@pytest.mark.parametrize(
    "changes",
    [
        BROKEN_STATES["momentum of another shape"],
        BROKEN_STATES["a base that is a text"],
        {PART + "batches": 1000},
        {PART + "sums": {"other": 1.0}},
    ],
)
def test_a_run_is_not_resumed_from_a_damaged_state(stopped, capsys, changes):
    flags, path, content = stopped
    write(path, content, changes)
    before = path.read_bytes()
    assert incremental.main(flags) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("error: cannot resume: ")
    assert path.read_bytes() == before


def test_what_the_settings_say_of_the_optimiser_is_not_taken_from_the_file(stopped, capsys):
    flags, path, content = stopped
    odd = {
        GROUP + "params": lambda parameters: [0, *reversed(parameters[1:])],
        GROUP + "maximize": True,
        GROUP + "momentum": 0.5,
    }
    logs = []
    for changes in (odd, {}):
        write(path, content, changes)
        assert incremental.main(flags) == 0
        logs.append([row["loss"] for row in checkpoint.load(path)["training"]["log"]])
    assert logs[0] == logs[1]


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
