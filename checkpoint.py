"""Checkpoints: a plain dict of tensors, numbers, strings and lists, and the whole hand-over between steps.

format, version      what this file is
architecture, image_size, mean, std, loss_form     how to build the network and feed it
class_names          in the order of the outputs, which is the order in which they were taught
steps                one dict a step: its classes, where their images were, method, settings, accuracies
model                the network's state_dict
finished             False for a save in the middle of a run
training             optimiser, schedule, random states, log: what --resume needs
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from errors import InputError

FORMAT = "learning-without-memorizing checkpoint"
VERSION = 1
KEYS = {
    "format": str,
    "version": int,
    "architecture": str,
    "image_size": int,
    "mean": list,
    "std": list,
    "loss_form": str,
    "class_names": list,
    "steps": list,
    "model": dict,
    "finished": bool,
    "training": dict,
}


def write_atomically(path: Path, write) -> None:
    """Call ``write(file)`` on a new file beside ``path`` and move it there once it is whole and on the disk.

    Whatever happens, ``path`` is either what it was or the whole new file. Raises InputError where the folder
    cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot write it ({error.strerror})") from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint; the last one at ``path`` stays whole until the new one is."""
    checkpoint = {"format": FORMAT, "version": VERSION, **checkpoint}
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU, as data alone (``weights_only``: no code of the file runs).

    Raises InputError, in one line, for every file that is not one.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a checkpoint file is needed")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise InputError(f"{path}: not a checkpoint of this project ({reason[:120]})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project; train_teacher_model.py makes one")
    if checkpoint.get("version") != VERSION:
        raise InputError(f"{path}: is version {checkpoint.get('version')}; this program reads version {VERSION}")
    for key, kind in KEYS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise InputError(f"{path}: damaged, {key!r} is missing or not a {kind.__name__}")
    return checkpoint


def restore_model(checkpoint: dict[str, Any]) -> nn.Module:
    """The network of a loaded checkpoint, on the CPU. Raises InputError where the weights do not fit it."""
    try:
        model = models.build(checkpoint["architecture"], len(checkpoint["class_names"]), checkpoint["image_size"])
        model.load_state_dict(checkpoint["model"])
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"checkpoint of {checkpoint['architecture']}: the weights do not fit ({reason})") from error
    return model


def fingerprint(checkpoint: dict[str, Any]) -> str:
    """SHA-256 of the weights, as hexadecimal: two files with one fingerprint hold the same network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint["model"].items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()
