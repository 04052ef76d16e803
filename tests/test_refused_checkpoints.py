"""Files that are no checkpoint of ours, run code or would fill the memory: one line for each."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointfiles import refused, write
from conftest import picture
from PIL import Image
from torch import nn

from lwm.runtime import checkpoint, torchfile

ROOT = Path(__file__).resolve().parent.parent


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
from lwm.runtime import checkpoint
from lwm.runtime import errors

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
