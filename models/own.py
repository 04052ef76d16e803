"""A network of the user's own, named by the code that builds it: ``--model path/to/file.py:build``.

``build(classes)`` returns an ``nn.Module`` with three methods:

    features(images)    the last feature map (B, C, h, w) of images (B, 3, H, W), already normalised
    pooled(features)    a row (B, D) of it, which the last layer sees
    head()              that layer: an ``nn.Linear`` with a bias and ``classes`` outputs

Answers and maps come from these three, and ``forward`` is not asked. A checkpoint names no code: it says that the
network is the user's own, and whoever loads it names the code again.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lwm.runtime.errors import InputError

Build = Callable[[int], nn.Module]
OWN = "own"  # what a checkpoint calls such a network


def names_code(model: str | None) -> bool:
    """Whether ``model`` is of the form path/to/file.py:build."""
    return bool(model) and ".py:" in str(model)


def builder(model: str | None) -> Build | None:
    """The function that ``model`` names as path/to/file.py:build, None if it names an architecture. Runs the file.

    Raises InputError for a file that cannot be run, or that has no such function.
    """
    if not names_code(model):
        return None
    path, _, function = str(model).rpartition(":")
    spec = importlib.util.spec_from_file_location(f"own_{Path(path).stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the code is the user's: anything can stand there
        raise InputError(_told(path, error)) from error
    build = getattr(module, function, None)
    if not callable(build):
        raise InputError(f"{path} has no function {function!r}")

    def named(classes: int) -> nn.Module:
        network: nn.Module = build(classes)
        return network

    named.__qualname__ = str(model)
    return named


def own_network(build: Build, classes: int) -> tuple[nn.Module, Any, str]:
    """What ``build`` makes, its last layer, and how an error names it. Raises InputError if a method lacks or fails."""
    name = getattr(build, "__qualname__", "build")
    try:
        network = build(classes)
        missing = [each for each in ("features", "pooled", "head") if not callable(getattr(network, each, None))]
        if not isinstance(network, nn.Module) or missing:
            what = f"no {' and no '.join(missing)}" if missing else type(network).__name__
            raise InputError(f"{name}: an nn.Module with features, pooled and head() is needed, and this has {what}")
        methods: Any = network
        head = methods.head()
    except InputError:
        raise
    except Exception as error:
        raise InputError(_told(name, error)) from error
    outputs = getattr(head, "out_features", classes)
    if outputs != classes:
        raise InputError(f"{name}: the last layer has {outputs} outputs, and {classes} were asked for")
    return network, head, name


def _told(what: str, error: BaseException) -> str:
    """One line on an error in the user's code, with the line where it was raised."""
    code = Path(what.partition(".py")[0] + ".py").resolve()
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if Path(each.filename).resolve() == code]
    where = f", line {lines[-1]}" if lines else ""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return f"{what}{where}: {str(reason).splitlines()[0][:200]}"
