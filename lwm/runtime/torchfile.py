"""Read a torch file that may come from a stranger as plain data: numbers, texts, lists, dicts and tensors.

No code of the file runs, nothing is allocated that the file itself does not hold, and no time is spent that its size
does not account for.
"""

from __future__ import annotations

import codecs
import os
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_STRUCTURE = 8 * 2**20  # bytes of the archive's pickle (everything but the tensors' numbers) and of its contents
MOST_OPCODES = 10**6  # of the pickle; reading them takes seconds
MOST_TUPLES = 10**4  # of the pickle; a tensor takes four
MOST_VALUES = 400_000  # a log of ten thousand epochs with twenty columns; a value takes at most two opcodes
MOST_DEPTH = 12
MOST_NUMBER = 2**64  # Python does not print one of thousands of digits, and can make dicts slow with such
ALLOWED_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
ALLOWED_GLOBALS |= {f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte")}
CODE_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
TENSOR_OPCODES = re.compile(r"[)t\x85-\x87]\x89[chj]\)Rt")  # strides, no gradient, OrderedDict(), the end of the tuple


class Refused(ValueError):
    """What the file is instead of what was looked for."""


def read(path: Path) -> Any:
    """What the file holds, on the CPU. Raises Refused, OSError, or what torch raises for a file it cannot read."""
    with warnings.catch_warnings(action="ignore"):  # what torch and zipfile wonder at is no concern of the user
        size = _check_archive(path)
        # Mapped, the tensors are views of the file: their sizes can be checked before anything is allocated.
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return _in_memory(plain(value, size))


def _check_archive(path: Path) -> int:
    """The size of the file, which is a zip archive as torch writes it: whole, uncompressed, and naming no code."""
    if not path.exists():
        raise Refused("no such file")
    if path.is_dir():
        raise Refused("is a folder, a checkpoint file is needed")
    if not path.is_file():
        raise Refused("is a device or a pipe, a checkpoint file is needed")
    with path.open("rb") as file:
        head = file.read(4096)
        if not head.startswith(b"PK\3\4"):
            raise Refused(_what_else(head))
        size = file.seek(0, os.SEEK_END)
        try:
            file.seek(max(0, size - 98))
            _check_table(file.read(), size)
            archive = zipfile.ZipFile(file)
            members = archive.infolist()
            # torch does not tell capitals from small letters, and zipfile ends a name at its first zero.
            if len({member.orig_filename.lower() for member in members}) < len(members):
                raise Refused("damaged: two things in it have one name")
            structure = [member for member in members if member.filename.lower().endswith("/data.pkl")]
            if len(structure) != 1:
                raise Refused("is a zip archive, but not of torch")
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise Refused("is a compressed archive, which could fill the memory; no checkpoint is one")
            if sum(member.file_size for member in members) > size:
                raise Refused(f"damaged, or made to fill the memory: says that it holds more than its {size} bytes")
            if structure[0].file_size > MOST_STRUCTURE:
                raise Refused(f"its structure alone takes {structure[0].file_size} bytes; no checkpoint of ours does")
            broken = archive.testzip()
            if broken:
                raise Refused(f"damaged: {broken!r} in it is not what was written")
            # torch would turn the bytes of each tensor round, however many share them.
            if any(
                archive.read(m) != sys.byteorder.encode() for m in members if m.filename.lower().endswith("/byteorder")
            ):
                raise Refused("was written by a machine with another order of bytes")
            pickled = archive.read(structure[0])
        except Refused:
            raise
        except Exception as error:  # zipfile has many kinds for an archive that was cut off or written over
            raise Refused("damaged or cut off: it begins as a torch file but is not a whole one") from error
    _check_opcodes(pickled)
    return size


def _check_table(tail: bytes, size: int) -> None:
    """The table of contents is where the archive's end says, and there is one end.

    zipfile and torch look for it in different ways: else what the one checks need not be what the other reads.
    """
    wide = tail[-42:-38] == b"PK\6\7"
    length, start = struct.unpack("<QQ", tail[-58:-42]) if wide else struct.unpack("<LL", tail[-10:-2])
    good = tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0" and start + length == size - (98 if wide else 22)
    good = good and (not wide or struct.unpack("<Q", tail[-34:-26])[0] == size - 98)
    if not good or length > MOST_STRUCTURE:
        raise Refused("damaged or cut off: it begins as a torch file but does not end as one")


def _what_else(head: bytes) -> str:
    if not head:
        return "is empty"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")):
        return "is an image, a checkpoint file is needed"
    if head[:1] == b"\x80":
        return "is a bare pickle, which can run code when it is read, so it was not read"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "is not a torch file"
    return "is not a torch file" if b"\0" in head else "is a text file, not a checkpoint"


def _check_opcodes(pickled: bytes) -> None:
    """``weights_only`` runs no code, but it allows more than a checkpoint needs.

    Such as an array of any size made from one number, a dict made from a large list again and again, a tensor of a
    million dimensions, or keys that were chosen to have one hash.
    """
    last, marks, tuples, built = "", [], 0, False  # last: opcodes, without those that put something into the memo
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        name, good = opcode.name, count < MOST_OPCODES and tuples < MOST_TUPLES
        if name == "GLOBAL" or name in CODE_OPCODES:
            named = str(argument) if name == "GLOBAL" else name
            if named not in ALLOWED_GLOBALS:
                raise Refused(
                    f"wants to run code when it is read ({named.replace(' ', '.')[:80]}); a checkpoint of this "
                    "project is data alone, so it was not read"
                )
        elif name == "MARK":
            marks.append(count)
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            first = marks.pop() if marks else count
            good = good and (name != "TUPLE" or count - first < 50)
        elif name == "REDUCE":  # nothing but OrderedDict() and a tensor is made
            good = good and (last[-1:] == ")" or bool(TENSOR_OPCODES.fullmatch(last)))
        elif name == "BUILD":  # one: the attributes of the state_dict
            good, built = good and not built, True
        elif name == "LONG1" and abs(int(argument or 0)) >= MOST_NUMBER:
            raise Refused("damaged: holds a number of absurd size")
        if not good:
            raise Refused("its structure is larger than that of any checkpoint, or another one")
        tuples += name.startswith("TUPLE")
        if name not in ("BINPUT", "LONG_BINPUT"):
            last = last[-5:] + opcode.code


def plain(value: Any, size: float) -> Any:
    """The same in dicts and lists, holding nothing but plain kinds: not deep, not many, no more tensor than ``size``.

    The file can name objects of its own in an OrderedDict's attributes: its methods are not asked for.
    """
    values, tensor_bytes = 0, 0

    def visit(value: Any, depth: int) -> Any:
        nonlocal values, tensor_bytes
        values += 1
        if values > MOST_VALUES or depth > MOST_DEPTH:
            raise Refused("its structure is deeper or larger than that of any checkpoint")
        if type(value) in (dict, OrderedDict):
            if not all(type(key) in (str, int) for key in dict.keys(value)):
                raise Refused("damaged: a key in it is neither text nor number")
            return {visit(key, depth + 1): visit(item, depth + 1) for key, item in dict.items(value)}
        if type(value) in (list, tuple):
            return [visit(item, depth + 1) for item in value]
        if type(value) is Tensor:
            if value.layout != torch.strided:
                raise Refused("damaged: a tensor in it is not of a plain kind")
            # A view can repeat its numbers, and many tensors can share them: what counts is what a copy takes.
            tensor_bytes += value.numel() * value.element_size()
            if tensor_bytes > size:
                raise Refused(f"made to fill the memory: its tensors are larger than its {size} bytes")
        elif not (
            value is None or type(value) in (bool, float, str) or (type(value) is int and abs(value) < MOST_NUMBER)
        ):
            raise Refused(f"damaged: holds a {type(value).__name__}, which no checkpoint does")
        return value

    return visit(value, 0)


def _in_memory(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_memory(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_memory(item) for item in value]
    return value.detach().clone() if isinstance(value, Tensor) else value
