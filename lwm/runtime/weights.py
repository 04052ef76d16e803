"""The weights in another program's file, as data: no code of the file runs."""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwm.runtime.checkpoint import one_line, read_torch
from lwm.runtime.errors import InputError, log

AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged)(?:[._]|$)", re.IGNORECASE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
MOST_NAMED = 6
DEEPEST = 4  # dicts in dicts


def load_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """A state_dict that another program wrote, on the CPU, without what all of its names begin with, as "module.".

    Of several in the file it is the one under ``key`` (a name, or names with dots between them), else the largest, and
    of equally large ones the averaged. The log says what is taken and what is left. Raises InputError for a file that
    has none; its line says how one is written.
    """
    path = Path(path)
    with one_line(path):
        if not path.is_file():  # a pipe would wait for its writer
            raise InputError("is no file" if path.exists() else "no such file")
    content = _read(path)
    found = dict(_state_dicts(content, "", {}))
    names = [way for way in found if key is None or way == key or way.startswith(f"{key}.")]
    if not names and found:
        raise InputError(f"{path}: has no state_dict {key!r} for --weights-key; there are {_listed(found)}")
    if not names:
        raise _without(path, "has no tensors under names such as 'conv1.weight'")
    way = max(names, key=lambda name: (_size(found[name]), AVERAGED.search(name) is not None))
    state, prefix = found[way], ""
    while len({name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        first = next(iter(state)).partition(".")[0] + "."
        state, prefix = {name.removeprefix(first): tensor for name, tensor in state.items()}, prefix + first
    taken = f"{path}: takes {len(state)} tensors" + (f" of {way!r}" if way else "")
    taken += f", without {prefix!r} before their names" if prefix else ""
    log.info(f"{taken}; leaves {_listed(_left(content, found, way)) or 'nothing'}")
    return {name: tensor.detach() for name, tensor in state.items()}


def _read(path: Path) -> Any:
    """What the file holds. Raises InputError, with the way out, for what is not data alone."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise InputError(f"{path}: a safetensors file needs: pip install safetensors") from error
        with one_line(path):
            return load_file(path)
    try:
        with one_line(path):
            return read_torch(path)
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        if _is_torchscript(path):
            raise _without(path, "is TorchScript", f"torch.jit.load({path.name!r})") from error
        raise _without(path, str(error).removeprefix(f"{path}: ")[:120]) from error


def _without(path: Path, reason: str, model: str = "model") -> InputError:
    program = "a program with torch" if model != "model" else "the program that has the PyTorch model"
    command = f'torch.save({model}.state_dict(), "weights.pth")'
    return InputError(f"{path}: {reason}; a state_dict is needed, which {program} writes: {command}")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Of a dict or list; what methods the file gives an OrderedDict is not asked for."""
    if type(value) in (dict, OrderedDict):
        return list(dict.items(value))
    return list(enumerate(value)) if type(value) in (list, tuple) else []


def _state_dicts(value: Any, way: str, seen: dict[int, Any]) -> list[tuple[str, dict[str, Tensor]]]:
    """Each dict of tensors of which one has a name such as conv1.weight, with its way in the file.

    So the state of an optimiser, whose tensors are "exp_avg" or the like, is none. What is there several times is
    looked into once.
    """
    if id(value) in seen:
        return [(way, seen[id(value)])] if seen[id(value)] else []
    items = _items(value)
    seen[id(value)] = own = {name: part for name, part in items if type(name) is str and _is_weight(name, part)}
    found = [(way, own)] if any("." in name for name in own) else []
    if not found:
        own.clear()
    for name, part in items if way.count(".") < DEEPEST else ():
        if _items(part):
            found += _state_dicts(part, f"{way}.{name}" if way else str(name), seen)
    return found


def _is_weight(name: str, value: Any) -> bool:
    """Not so what torch.optim.swa_utils.AveragedModel counts."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_meta
    return plain and value.dtype in DTYPES and name != "n_averaged"


def _size(state: dict[str, Tensor]) -> int:
    """Numbers in it; counts of batches, which an average may lack, aside."""
    return sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())


def _left(content: Any, found: dict[str, dict[str, Tensor]], way: str) -> list[str]:
    """The other state_dicts, and the entries of the file that lead to none."""
    entries = [str(name) for name, _ in _items(content) if name not in found.get("", {})]
    return [name for name in found if name != way] + [
        name for name in entries if not any(other == name or other.startswith(f"{name}.") for other in found)
    ]


def _listed(names: Any) -> str:
    names = [repr(name[:60]) for name in names]
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")
