"""Checkpoints with other values in them, written without the checks of checkpoint.py."""

from __future__ import annotations

import copy
import functools
import operator
from pathlib import Path

import conftest
import torch

from lwm.runtime import checkpoint


def refused(path: Path) -> str:
    """The one line with which ``load`` refuses a file; it names it."""
    text = conftest.refused(checkpoint.load, path)
    assert str(path) in text
    return text


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
