"""Checkpoints with other values in them, written without the checks of checkpoint.py."""

from __future__ import annotations

import copy
import functools
import operator
import zipfile
from pathlib import Path

import conftest
import torch

import checkpoint


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
