"""A thousand damaged or hostile checkpoints: each is read as a valid one or refused in one line, and runs no code."""

from __future__ import annotations

import io
import math
import os
import pickle
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpointfiles
import pytest
import torch
from checkpointfiles import refused, write
from torch import nn

from lwm import models
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError
from lwm.runtime.weights import load_weights

COUNT = 1000


class Trap:
    """Unpickling it makes the folder ``sprung`` where the program runs."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("sprung",)


TRAP = b"cposix\nmkdir\nX\x06\0\0\0sprung\x85R"  # the same as opcodes, to be put anywhere
VALUES = [None, True, -1, 0, 10**9, 2**63, 10**400, -0.5, 1e308, math.nan, math.inf, "", "x", "\x1b[2J\n", "9" * 5000]
VALUES += [[], {}, (), ["a", "b"], {"a": 1}, {1: 2}, {(1, 2): 3}, b"bytes", {1}, 1j, ..., Trap()]
VALUES += [torch.ones(3), torch.ones(2, 2).to_sparse(), torch.tensor(math.nan), nn.Parameter(torch.ones(1))]


class Tiny(models.Network):
    """A network of a few numbers, with which a thousand files take seconds."""

    closed_form = True

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, classes)


@pytest.fixture
def base(monkeypatch) -> Iterator[dict[str, Any]]:
    """A whole checkpoint; what it names resnet32 is Tiny."""
    build = models.build

    def build_tiny(architecture: str, classes: int, image_size: int, stem: str = "") -> models.Network:
        return Tiny(classes) if architecture == "resnet32" else build(architecture, classes, image_size, stem)

    monkeypatch.setattr(models, "build", build_tiny)
    models.empty_state.cache_clear()
    content = checkpointfiles.unfinished(Tiny(2))
    yield {"format": checkpoint.FORMAT, "version": checkpoint.VERSION} | content
    models.empty_state.cache_clear()


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def places_in(content: Any, way: tuple = ()) -> list[tuple]:
    """Where something can be changed; of the many tensors only some, or nothing else would be."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    inner = [place for _, (key, item) in zip(range(15), items, strict=False) for place in places_in(item, (*way, key))]
    return [way, *inner] if way else inner


def changed(content: Any, way: tuple, change: Callable[[Any], Any]) -> Any:
    if not way:
        return change(content)
    copy = list(content) if isinstance(content, list) else dict(content)
    copy[way[0]] = changed(copy[way[0]], way[1:], change)
    if copy[way[0]] is ...:
        del copy[way[0]]
    return copy


def value_changed(base: dict, whole: bytes, rng: random.Random) -> bytes:
    value, wrap = rng.choice(VALUES), rng.choice((None, None, list, dict))
    wrapped = {list: lambda old: [old], dict: lambda old: {"a": old, 5: 0}}
    return saved(changed(base, rng.choice(places_in(base)), wrapped.get(wrap, lambda old: value)))


def tensor_changed(base: dict, whole: bytes, rng: random.Random) -> bytes:
    """Of another type or shape, with a number that is none, or with one number for all its elements."""

    def spoiled(old: torch.Tensor) -> torch.Tensor:
        flat = old.clone().flatten()
        flat[rng.randrange(len(flat))] = rng.choice((math.nan, math.inf, -1.0, 3e38)) if flat.is_floating_point() else 1
        return flat.view(old.shape)

    ways = [spoiled, spoiled, torch.Tensor.double, torch.Tensor.half, torch.Tensor.flatten, lambda old: old[None]]
    ways += [lambda old: old.new_zeros(()).expand(old.shape), lambda old: old.new_zeros(1).expand(10**9)]
    ways += [lambda old: old.transpose(0, -1) if old.dim() else old, lambda old: old.to("meta")]
    tensors = [(part, name) for part in ("model", "statistics") for name in base[part]]
    tensors += [("training", "optimizer", "state", 0, "momentum_buffer")]
    tensors += [("training", "generator"), ("training", "position", "order")]
    return saved(changed(base, rng.choice(tensors), rng.choice(ways)))


def bytes_changed(base: dict, whole: bytes, rng: random.Random) -> bytes:
    """Anywhere, or where the archive says what it holds: at its beginning and at its end."""
    content, table = bytearray(whole), whole.index(b"PK\1\2")
    for _ in range(rng.choice((1, 1, 2, 8))):
        least, most = rng.choice(((0, len(content)), (0, 60), (table, len(content)), (len(content) - 98, len(content))))
        content[rng.randrange(least, most)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(content)


def cut_or_doubled(base: dict, whole: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
    return rng.choice((whole[:first], whole[first:], whole[:first] + whole[last:], whole * 2, whole[:last] + whole))


def packed(members: dict[str, bytes]) -> bytes:
    """A zip archive with the right checksums: it comes as far as torch, or as the schema."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def members_of(whole: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def member_changed(base: dict, whole: bytes, rng: random.Random) -> bytes:
    """Renamed, emptied, cut, swapped with another, or of other content."""
    members = members_of(whole)
    one, other = rng.sample(sorted(members), 2)
    content = members.pop(one)
    new = rng.choice((one, one, one.upper(), other, "../" + one, "archive/constants.pkl"))
    return packed(members | {new: rng.choice((content, b"", content[: len(content) // 2], content * 2, b"big"))})


def structure_changed(base: dict, whole: bytes, rng: random.Random) -> bytes:
    """Some bytes of the archive's pickle, or a trap somewhere in it."""
    members = members_of(whole)
    name = next(name for name in members if name.endswith("/data.pkl"))
    content = bytearray(members[name])
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
        place = rng.randrange(2, len(content))
        content[place:place] = TRAP
    return packed(members | {name: bytes(content)})


WAYS = [value_changed] * 4 + [tensor_changed] * 2
WAYS += [bytes_changed] * 2 + [cut_or_doubled, member_changed, structure_changed, structure_changed]


def judged(path: Path) -> str:
    """ "loaded", "refused", or what is wrong."""
    try:
        content = checkpoint.load(path)
    except InputError as error:
        good = str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 500
        return "refused" if good else f"refused as {error!r}"
    weights = checkpoint.restore_model(content).state_dict()
    return "loaded" if all(bool(tensor.isfinite().all()) for tensor in weights.values()) else "loaded, not finite"


def test_a_thousand_damaged_or_hostile_checkpoints_are_valid_or_refused(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    path, whole, counts, wrong = tmp_path / "model.pth", saved(base), Counter[str](), []
    path.write_bytes(whole)
    assert judged(path) == "loaded"
    for number in range(COUNT):
        rng, way = random.Random(number), WAYS[number % len(WAYS)]
        path.write_bytes(way(base, whole, rng))
        said = judged(path)
        counts[said] += 1
        if said not in ("loaded", "refused"):
            wrong.append(f"{way.__name__} {number}: {said}")
    assert wrong == []
    assert not (tmp_path / "sprung").exists()
    # Neither is the reader one that refuses everything, nor are the files such as anything would be refused.
    assert counts["loaded"] > COUNT / 20
    assert counts["refused"] > COUNT / 2


@pytest.mark.parametrize("write_file", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("reader", [checkpoint.load, load_weights])
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, write_file, reader):
    monkeypatch.chdir(tmp_path)
    write_file({"format": checkpoint.FORMAT, "model": Trap()}, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"model\.pth"):
        reader(tmp_path / "model.pth")
    assert not (tmp_path / "sprung").exists()
    if write_file is torch.save:  # the trap is a real one
        torch.load(tmp_path / "model.pth", weights_only=False)
        assert (tmp_path / "sprung").is_dir()


def test_methods_that_the_file_puts_into_a_dict_are_not_asked_for(tmp_path, base):
    """Pickle can set attributes of an OrderedDict: one named items would hide what is in it from every check."""

    class Hiding(dict):
        def __reduce__(self) -> tuple:
            hidden = dict.fromkeys(("items", "keys", "values", "get"), nn.Module().state_dict().__class__)
            return nn.Module().state_dict().__class__, (), hidden, None, iter(self.items())

    path = tmp_path / "model.pth"
    write(path, base | {"model": Hiding(base["model"] | {"conv1.weight": torch.ones(1)})})
    assert not torch.load(path, weights_only=True)["model"].items()
    assert "'conv1.weight'" in refused(path)


def test_a_changed_number_is_found_by_its_checksum(tmp_path, base):
    path = tmp_path / "model.pth"
    whole = bytearray(saved(base))
    place = whole.index(base["model"]["conv1.weight"].numpy().tobytes())
    whole[place] ^= 1
    path.write_bytes(whole)
    assert torch.load(path, weights_only=True)["architecture"] == "resnet32"  # torch does not look
    assert "data" in refused(path)
