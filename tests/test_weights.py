"""--weights: what torch reads as data, and safetensors, under any key and prefix; for the rest the way out is named."""

from __future__ import annotations

import copy
import json
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from torch import nn

from lwm.runtime.errors import log
from lwm.runtime.weights import load_weights


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


NET, OTHER = network(), network(1)
STATE, AVERAGE = NET.state_dict(), OTHER.state_dict()


def same(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def named(prefix: str, state: dict = STATE) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def with_adam() -> dict:
    """Of a network of which one layer's two moments are larger than all of its weights."""
    net = copy.deepcopy(NET)
    optimizer = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "state_dict": net.state_dict(), "epoch": 7, "betas": (0.9, 0.999)}


@pytest.fixture
def said(caplog, monkeypatch) -> Callable[[], str]:
    """The one line of the log since the last call."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", "lwm")

    def last() -> str:
        (record,) = caplog.records
        caplog.clear()
        return record.message

    return last


# What is taken ----------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "bare": STATE,
    "of DataParallel": nn.DataParallel(copy.deepcopy(NET)).state_dict(),
    "with Adam": with_adam(),
    "kept by reference": {"best": {"epoch": 3, "weights": STATE}, "model": STATE},
    "nested": {"a": {"b": [{"c": STATE}]}, "loss": [0.5]},
    "in a pair": (3, STATE),
    "an average, which counts itself": {"model_ema": torch.optim.swa_utils.AveragedModel(NET).state_dict()},
    "several prefixes": named("module._orig_mod.model.backbone."),
    **{f"under {key}": {key: STATE} for key in ("model_state_dict", "state_dict", "model", "net", "network")},
    **{f"after {key}": named(key) for key in ("module.", "_orig_mod.", "model.", "backbone.", "model._orig_mod.")},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_zip", [True, False])  # False is the format before torch 1.6
def test_a_file_of_any_kind_gives_the_same_weights(tmp_path, kind, as_zip):
    torch.save(KINDS[kind], tmp_path / "m.pth", _use_new_zipfile_serialization=as_zip)
    assert same(load_weights(tmp_path / "m.pth"), STATE)


def test_parameters_and_tensors_that_share_memory_are_taken(tmp_path):
    torch.save(dict(NET.named_parameters()), tmp_path / "m.pth")
    taken = load_weights(str(tmp_path / "m.pth"))
    assert same(taken, dict(NET.named_parameters()))
    assert not any(tensor.requires_grad for tensor in taken.values())
    flat = torch.arange(12.0)
    torch.save(
        {"a.weight": flat[:4], "b.weight": flat[2:8].view(2, 3).T, "c.weight": flat[3:4].expand(5)}, tmp_path / "m"
    )
    taken = load_weights(tmp_path / "m")
    assert {name: tensor.tolist() for name, tensor in taken.items()} == {
        "a.weight": [0, 1, 2, 3],
        "b.weight": [[2, 5], [3, 6], [4, 7]],
        "c.weight": [3] * 5,
    }


def test_a_prefix_that_some_names_lack_stays(tmp_path):
    state = named("module.") | {"criterion.weight": torch.ones(2)}
    torch.save(state, tmp_path / "m.pth")
    assert same(load_weights(tmp_path / "m.pth"), state)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "EMA.model", "swa_model"])
@pytest.mark.parametrize("first", [True, False])
def test_of_two_equally_large_the_averaged_is_taken_unless_one_is_named(tmp_path, said, name, first):
    ema: Any = {name.split(".")[0]: {"model": AVERAGE} if "." in name else AVERAGE}
    both = {"epoch": 3, **(ema if first else {}), "model": STATE, **({} if first else ema)}
    torch.save(both, tmp_path / "m.pth")
    assert same(load_weights(tmp_path / "m.pth"), AVERAGE)
    line = said()
    assert (
        line.index(repr(name))
        < line.index("leaves")
        < min(line.index("'model'", line.index("leaves")), line.index("'epoch'"))
    )
    assert same(load_weights(tmp_path / "m.pth", "model"), STATE)
    assert "'model'" in said().split("leaves")[0]
    assert same(load_weights(tmp_path / "m.pth", name.split(".")[0]), AVERAGE)
    line = refused(load_weights, tmp_path / "m.pth", "module")
    assert all(each in line for each in ("'module'", "'model'", repr(name), "--weights-key"))


def test_the_largest_is_taken_even_beside_an_average(tmp_path):
    small = {"head.weight": torch.ones(2, 2)}
    torch.save({"projection_ema": small, "net": STATE, "scores": {"a.b": 1.0}}, tmp_path / "m.pth")
    assert same(load_weights(tmp_path / "m.pth"), STATE)


def test_an_average_that_counts_no_batches_is_as_large(tmp_path):
    average = {name: tensor for name, tensor in AVERAGE.items() if "num_batches" not in name}
    torch.save({"model": STATE, "model_ema": average}, tmp_path / "m.pth")
    assert same(load_weights(tmp_path / "m.pth"), average)


# What is not ------------------------------------------------------------------------------------------------------


def keras(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


REFUSED: dict[str, Callable[[Path], object]] = {
    "a whole model": lambda path: torch.save(NET, path),
    "a whole model before 1.6": lambda path: torch.save(NET, path, _use_new_zipfile_serialization=False),
    "TorchScript": lambda path: torch.jit.save(torch.jit.script(NET), str(path)),
    "Keras": keras,
    "HDF5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "text": lambda path: path.write_text("hello"),
    "an empty file": lambda path: path.touch(),
    "an optimiser": lambda path: torch.save(with_adam()["optimizer"], path),
    "one tensor": lambda path: torch.save(torch.ones(3), path),
    "no real tensors": lambda path: torch.save(
        {"a.b": torch.ones(2).to_sparse(), "a.c": torch.ones(2, device="meta"), "a.d": torch.ones(2) * 1j}, path
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", REFUSED)
def test_for_the_rest_the_way_to_a_state_dict_is_named(tmp_path, capfd, kind):
    path = tmp_path / "m.pth"
    REFUSED[kind](path)
    line = refused(load_weights, path)
    assert line.startswith(f"{path}: ")
    assert line.endswith('.state_dict(), "weights.pth")')
    assert ("torch.jit.load('m.pth')" in line) == (kind == "TorchScript")
    assert len(line) < 320 + len(str(path))
    assert capfd.readouterr().err == ""


def test_the_command_for_torchscript_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(NET), "m.pth")
    exec("torch.save" + refused(load_weights, "m.pth").split("torch.save")[1], {"torch": torch})
    assert same(load_weights("weights.pth"), STATE)


def test_what_is_no_file_is_said_alone(tmp_path):
    for path in (tmp_path, tmp_path / "none.pth", tmp_path / "none.safetensors"):
        assert "torch.save" not in refused(load_weights, path)


def test_many_references_to_one_dict_and_a_deep_file_take_no_time(tmp_path):
    deep: Any = STATE
    for _ in range(60):
        deep = {"a": deep, "b": deep, "c": [deep] * 100}
    torch.save({"model": STATE, "deep": deep}, tmp_path / "m.pth")
    assert same(load_weights(tmp_path / "m.pth"), STATE)


# Safetensors ------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    """By the format's description: the length of the header, the header, the numbers."""
    header, data = {}, b""
    for name, tensor in state.items():
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        place = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": place}
        data += tensor.numpy().tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_safetensors_are_read(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "m.safetensors"
    write_safetensors(path, dict(sorted(named("model.").items(), key=lambda each: each[1].dtype != torch.int64)))
    taken = load_weights(path)
    assert same({name: taken[name] for name in STATE}, STATE)
    path.write_bytes(path.read_bytes()[:-3])
    assert "m.safetensors" in refused(load_weights, path)


def test_without_safetensors_the_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    write_safetensors(tmp_path / "m.safetensors", STATE)
    assert "pip install safetensors" in refused(load_weights, tmp_path / "m.safetensors")
