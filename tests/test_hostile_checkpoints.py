"""A thousand damaged or hostile checkpoints: each is read as a valid one or refused in one line."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickletools
import random
import subprocess
import sys
import time
import traceback
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import checkpoint_of, training_of

from lwm import models
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

COUNT = 1000
MOMENTA = 10  # of the base; with all of them a thousand files take a minute
MEMORY = 2**29  # bytes above what the reader takes before its first file


class Trap:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


TRAP = b"cposix\nmkdir\nX\x06\0\0\0sprung\x85R"
SPELLED = (b"(X\x06\0\0\0sprungiposix\nmkdir\n", b"(cposix\nmkdir\nX\x06\0\0\0sprungo")  # the same in other opcodes


class Claim:
    """A tensor of four numbers that says it has another shape."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self):
        storage = torch.ones(4)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.arguments, False, OrderedDict())


# Ways to spoil a file ---------------------------------------------------------------------------------------------


class Base:
    """A whole checkpoint: its bytes, its members, its structure as opcodes, and its content."""

    def __init__(self, path: Path) -> None:
        self.whole = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            self.members = {name: archive.read(name) for name in archive.namelist()}
        self.pickle = next(name for name in self.members if name.endswith("/data.pkl"))
        places = [*(place for _, _, place in pickletools.genops(self.members[self.pickle])), None]
        self.opcodes = [self.members[self.pickle][a:b] for a, b in itertools.pairwise(places)]
        self.content = torch.load(path, weights_only=True)

    def packed(self, members: dict[str, bytes]) -> bytes:
        file = BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return file.getvalue()

    def with_opcodes(self, opcodes: list[bytes]) -> bytes:
        """With another structure, and its checksum made right: it comes as far as torch, or as the schema."""
        return self.packed(self.members | {self.pickle: b"".join(opcodes)})


def bytes_flipped(base: Base, rng: random.Random) -> bytes:
    content = bytearray(base.whole)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def bytes_of_the_frame_changed(base: Base, rng: random.Random) -> bytes:
    """Where the archive says what it holds: at its beginning, in its table of contents and at its end."""
    content, table = bytearray(base.whole), base.whole.index(b"PK\1\2")
    for _ in range(rng.choice((1, 1, 2, 4))):
        least, most = rng.choice(((0, 60), (table, len(content)), (len(content) - 98, len(content))))
        content[rng.randrange(least, most)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(content)


def cut(base: Base, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(base.whole) + 1) for _ in range(2))
    return rng.choice((base.whole[:first], base.whole[first:], base.whole[:first] + base.whole[last:]))


def doubled(base: Base, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(base.whole) + 1) for _ in range(2))
    return rng.choice((base.whole * 2, base.whole[:last] + base.whole[first:], base.whole[:-22] + base.whole))


def members_swapped(base: Base, rng: random.Random) -> bytes:
    members = dict(base.members)
    for _ in range(rng.choice((1, 2, 20))):
        one, other = rng.sample(sorted(members), 2)
        members[one], members[other] = members[other], members[one]
    return base.packed(members)


def members_removed(base: Base, rng: random.Random) -> bytes:
    gone = set(rng.sample(sorted(base.members), rng.choice((1, 1, 5, 200))))
    return base.packed({name: content for name, content in base.members.items() if name not in gone})


def members_changed(base: Base, rng: random.Random) -> bytes:
    """Renamed, added, emptied, cut, or of other content."""
    members, name = dict(base.members), rng.choice(sorted(base.members))
    content = members.pop(name)
    new = rng.choice((name, name, name.upper(), name + "\0", "../" + name, "archive/constants.pkl", "x" * 5000))
    contents = (content, b"", content[: len(content) // 2], content * 2, b"\xff" * len(content), b"big", b"10" * 500)
    return base.packed(members | {new: rng.choice(contents)})


def numbers_replaced(base: Base, rng: random.Random) -> bytes:
    opcodes = list(base.opcodes)
    places = [i for i, opcode in enumerate(opcodes) if opcode[:1] in b"KMJG\x8a"]
    whole = (b"K\0", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\0\0\0\x80", b"J\xff\xff\xff\xff")
    whole += (b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\xff" + b"\x7f" * 255)
    floats = (b"G\x7f\xf8" + bytes(6), b"G\xff\xf0" + bytes(6), b"G" + b"\x7f\xef" + b"\xff" * 6, b"G" + bytes(8))
    for place in rng.sample(places, rng.choice((1, 1, 3, 50))):
        opcodes[place] = rng.choice(
            whole + floats if rng.random() < 0.3 else floats if opcodes[place][:1] == b"G" else whole
        )
    return base.with_opcodes(opcodes)


def opcodes_changed(base: Base, rng: random.Random) -> bytes:
    opcodes = list(base.opcodes)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(opcodes))
        other = rng.randrange(len(opcodes))
        match rng.randrange(5):
            case 0:
                opcodes[place] = rng.choice(pickletools.opcodes).code.encode("latin-1") + opcodes[place][1:]
            case 1:
                del opcodes[place]
            case 2:
                opcodes[place], opcodes[other] = opcodes[other], opcodes[place]
            case 3:
                opcodes.insert(place, opcodes[other])
            case 4:
                opcodes[place:place] = opcodes[other : other + rng.randrange(50)]
    return base.with_opcodes(opcodes)


def opcodes_flipped(base: Base, rng: random.Random) -> bytes:
    content = bytearray(base.members[base.pickle])
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return base.with_opcodes([bytes(content)])


def trapped(base: Base, rng: random.Random) -> bytes:
    opcodes = list(base.opcodes)
    opcodes.insert(rng.randrange(1, len(opcodes)), rng.choice((TRAP, *SPELLED)) + rng.choice((b"", b"0")))
    return base.with_opcodes(opcodes)


def places_in(content: Any, way: tuple = ()) -> list[tuple]:
    """Where something can be changed; of the many tensors only some, or nothing else would be."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = [way] if way else []
    for number, (key, item) in enumerate(items):
        if number < 12:
            found += places_in(item, (*way, key))
    return found


def changed(content: Any, way: tuple, value: Callable[[Any], Any]) -> Any:
    if not way:
        return value(content)
    copy = list(content) if isinstance(content, list) else type(content)(content)
    there = isinstance(copy, list) or way[0] in copy
    copy[way[0]] = changed(copy[way[0]] if there else None, way[1:], value)
    if copy[way[0]] is ...:
        del copy[way[0]]
    return copy


def saved(content: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file)
    return file.getvalue()


def values_changed(base: Base, rng: random.Random) -> bytes:
    values = [
        None,
        True,
        -1,
        0,
        2,
        10**9,
        2**63,
        10**400,
        -0.5,
        1e308,
        math.nan,
        math.inf,
        "",
        "x",
        "\x1b[2J\n",
        "9" * 5000,
    ]
    values += [[], {}, (), [0] * 1000, ["a", "b"], {"a": 1}, {1: 2}, {(1, 2): 3}, b"bytes", {1}, 1j, ...]
    values += [
        torch.ones(3),
        torch.ones(2, 2).to_sparse(),
        torch.tensor(math.nan),
        torch.nn.Parameter(torch.ones(1)),
        Trap(),
    ]
    content = base.content
    for _ in range(rng.choice((1, 1, 1, 3))):
        wrap, value = rng.choice((None, None, list, dict)), rng.choice(values)

        def changed_to(old, wrap=wrap, value=value):
            return {list: [old], dict: {"a": old, 5: value}}.get(wrap, value)

        content = changed(content, rng.choice(places_in(content)), changed_to)
    return saved(content)


def tensors_changed(base: Base, rng: random.Random) -> bytes:
    """Of another kind or shape, with a number that is none, or of a shape that the file does not hold."""

    def huge(old):
        size = tuple(rng.choice((0, 1, 3, 10**6, 2**31, 2**62, -1)) for _ in range(rng.randrange(1, 6)))
        return Claim(rng.choice((0, 0, 1, 10**12, -1)), size, tuple(rng.choice((0, 1, -1, 2**40)) for _ in size))

    def spoiled(old):
        flat = old.clone().flatten()
        if flat.is_floating_point():
            flat[rng.randrange(len(flat))] = rng.choice((math.nan, math.inf, -1.0, 3e38))
        return flat.view(old.shape)

    ways = [
        huge,
        huge,
        spoiled,
        spoiled,
        lambda old: old.double(),
        lambda old: old.half(),
        lambda old: old.flatten(),
        lambda old: old[None],
        lambda old: old.transpose(0, -1) if old.dim() else old,
        lambda old: old.new_zeros(()).expand(old.shape),
        lambda old: old.clone().requires_grad_() if old.is_floating_point() else old,
    ]
    content = base.content
    tensors = [("model", key) for key in content["model"]]
    tensors += [("training", "optimizer", "state", key, "momentum_buffer") for key in range(MOMENTA)]
    tensors += [("training", key) for key in ("generator", "torch_rng")] + [("training", "position", "order")]
    for way in rng.sample(tensors, rng.choice((1, 1, 5))):
        content = changed(content, way, rng.choice(ways))
    return saved(content)


def nested(base: Base, rng: random.Random) -> bytes:
    """Deep, wide by references to one list, long, or within itself."""
    ten: Any = [0] * 10
    for _ in range(rng.randrange(1, 11)):
        ten = [ten] * rng.choice((1, 10, 100))
    inner = rng.choice(
        (
            ten,
            [rng.choice((0, 0.5, "x", None, [], {}))] * rng.choice((1000, 10**5, 10**6)),
            {str(number): number for number in range(rng.choice((1000, 10**5)))},
            [(number, number) for number in range(rng.choice((100, 10**4)))],
        )
    )
    return saved(
        changed(base.content, rng.choice((("more",), ("training", "more"), ("class_names",))), lambda old: inner)
    )


WAYS = {
    bytes_flipped: 10,
    bytes_of_the_frame_changed: 15,
    cut: 6,
    doubled: 4,
    members_swapped: 8,
    members_removed: 5,
    members_changed: 8,
    numbers_replaced: 10,
    opcodes_changed: 12,
    opcodes_flipped: 12,
    trapped: 6,
    values_changed: 20,
    tensors_changed: 10,
    nested: 2,
}


# The reader -------------------------------------------------------------------------------------------------------


def kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def judge(base: Base, path: Path) -> str:
    """``loaded``, ``refused``, or what is wrong."""
    try:
        found = checkpoint.load(path)
    except InputError as error:
        good = len(str(error).splitlines()) == 1 and str(error).startswith(f"{path}: ") and len(str(error)) < 500
        return "refused" if good else f"refused as {str(error)!r}"
    except BaseException:
        return traceback.format_exc()
    weights = checkpoint.restore_model(found).state_dict()
    if not found.keys() >= base.content.keys() or weights.keys() != base.content["model"].keys():
        return "loaded with other keys"
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        return "loaded with weights that are not finite"
    return "loaded"


def read_all() -> None:
    """In a process of its own: print what became of each spoiled copy of base.pth, as JSON."""
    import resource  # which Windows has not

    torch.set_num_threads(1)
    base, path = Base(Path("base.pth")), Path("spoiled.pth")
    wrong, counts, longest = [], Counter(), (0.0, "")
    ways = [way for way, share in WAYS.items() for _ in range(share)]
    assert judge(base, Path("base.pth")) == "loaded"
    limit = kilobytes("VmSize:") * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, highest, begun = kilobytes("VmRSS:"), 0, time.perf_counter()
    for number in range(COUNT):
        way = ways[number % len(ways)]
        path.write_bytes(way(base, random.Random(number)))
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory from here on
        start = time.perf_counter()
        said = judge(base, path)
        longest = max(longest, (time.perf_counter() - start, f"{way.__name__} {number}"))
        highest = max(highest, kilobytes("VmHWM:") - before)
        counts[f"{way.__name__} {said}" if said in ("loaded", "refused") else "wrong"] += 1
        if said not in ("loaded", "refused"):
            wrong.append(f"{way.__name__} {number}: {said}")
    result = {"wrong": wrong, "counts": counts, "longest": longest, "megabytes": highest / 1024}
    print(json.dumps(result | {"seconds": time.perf_counter() - begun}))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory is limited and measured as Linux has it")
def test_a_thousand_damaged_or_hostile_checkpoints_are_valid_or_refused(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet32", 2, 32)
    training = training_of(model)
    momenta = training["optimizer"]["state"]
    training["optimizer"]["state"] = {number: momenta[number] for number in range(MOMENTA)}
    content = checkpoint_of(model, "resnet32", ["a", "b"], finished=False, training=training)
    checkpoint.save(tmp_path / "base.pth", content)
    reader = [sys.executable, "-c", "import test_hostile_checkpoints as own; own.read_all()"]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(reader, capture_output=True, text=True, cwd=tmp_path, env=paths, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    print(json.dumps(said, indent=1))
    assert said["wrong"] == []
    assert not (tmp_path / "sprung").exists()
    assert sum(said["counts"].values()) == COUNT
    assert {line.split()[0] for line in said["counts"]} == {way.__name__ for way in WAYS}
    # Neither is the reader one that refuses everything, nor are the files such as anything would be refused.
    assert sum(count for line, count in said["counts"].items() if line.endswith(" loaded")) > COUNT / 20
    assert sum(count for line, count in said["counts"].items() if line.endswith(" refused")) > COUNT / 2
    assert said["longest"][0] < 10
    assert said["megabytes"] < 200
