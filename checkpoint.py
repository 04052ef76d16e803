"""Checkpoints: a plain dict of tensors, numbers, strings and lists, and the whole hand-over between steps.

format, version      what this file is
architecture, image_size, mean, std, loss_form     how to build the network and feed it
class_names          in the order of the outputs, which is the order in which they were taught
steps                one dict a step: its classes, where their images were, method, settings, accuracies
model                the network's state_dict
finished             False for a save in the middle of a run
training             what --resume needs: optimiser, schedule, random states, log, the position inside an epoch, and
                     what tells one run from another; may be empty in a finished one

A file is read as data: no code of it runs, and nothing is allocated that the file itself does not hold.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import math
import os
import pickletools
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from errors import InputError

FORMAT = "learning-without-memorizing checkpoint"
VERSION = 2  # 1 had no position inside an epoch, nor what the training images were
KINDS = {
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
STEP_KINDS = {"classes": list, "dataset": str, "data_dir": str, "hold_back": float, "epochs": int}
STEP_KINDS |= {"group_accuracy": list}
TRAINING_KINDS = {"epochs": int, "teacher": str, "optimizer": dict, "schedule": dict, "generator": Tensor}
TRAINING_KINDS |= {"torch_rng": Tensor, "log": list}
ADDED_IN_2 = {"position": None, "images": None, "machine": {}}

MOST_STRUCTURE = 16 * 2**20  # bytes of the archive's pickle: everything but the tensors' numbers
MOST_VALUES = 10**6
MOST_DEPTH = 12
ALLOWED_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch Size"}
ALLOWED_GLOBALS |= {f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte")}
CODE_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


# Writing ----------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Raises InputError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or used as a folder ({error.strerror})") from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside ``path`` and move it there once it is whole and on the disk.

    Whatever happens, ``path`` is either what it was or the whole new file; one that holds ``content`` already is not
    touched. The folder must be there. Raises InputError where it cannot be written.
    """
    temporary = None
    try:
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        raise


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint; the last one at ``path`` stays whole until the new one is."""
    checkpoint = {"format": FORMAT, "version": VERSION, **checkpoint}
    _check_plain(checkpoint, math.inf)  # what could not be loaded again is not to be saved
    buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


# Reading ----------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU, as data alone, and check all of it.

    Raises InputError, in one line that says what it is instead, for every file that is not one.
    """
    path = Path(path)
    try:
        size = _check_archive(path)
        # Mapped, the tensors are views of the file: their sizes can be checked before anything is allocated.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_plain(checkpoint, size)
        return _in_memory(_upgraded(checkpoint))
    except _Refused as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # torch raises many kinds for an archive that it cannot make sense of
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a checkpoint of this project, or damaged ({reason[:120]})") from error


class _Refused(ValueError):
    """What the file is instead of a checkpoint."""


def _check_archive(path: Path) -> int:
    """The size of the file, which is a zip archive as torch writes it: whole, uncompressed, and naming no code."""
    if not path.exists():
        raise _Refused("no such file")
    if path.is_dir():
        raise _Refused("is a folder, a checkpoint file is needed")
    if not path.is_file():
        raise _Refused("is a device or a pipe, a checkpoint file is needed")
    with path.open("rb") as file:
        head = file.read(4096)
        if not head.startswith(b"PK\3\4"):
            raise _Refused(_what_else(head))
        size = os.fstat(file.fileno()).st_size
        try:
            archive = zipfile.ZipFile(file)
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise _Refused("is a compressed archive, which could fill the memory; torch writes none")
            if sum(member.file_size for member in members) > size:
                raise _Refused(f"damaged, or made to fill the memory: says that it holds more than its {size} bytes")
            structure = [member for member in members if member.filename.endswith("/data.pkl")]
            if len(structure) != 1 or len({member.filename for member in members}) < len(members):
                raise _Refused("is a zip archive, but not of torch")
            if structure[0].file_size > MOST_STRUCTURE:
                raise _Refused(f"its structure alone takes {structure[0].file_size} bytes; no checkpoint of ours does")
            broken = archive.testzip()
            if broken:
                raise _Refused(f"damaged: {broken!r} in it is not what was written")
            pickled = archive.read(structure[0])
        except _Refused:
            raise
        except Exception as error:  # zipfile has many kinds for an archive that was cut off or written over
            raise _Refused("damaged or cut off: it begins as a torch file but is not a whole one") from error
    _check_names_no_code(pickled)
    return size


def _what_else(head: bytes) -> str:
    if not head:
        return "is empty"
    if head[:1] == b"\x80":
        return "is a bare pickle, which can run code when it is read, so it was not read"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "is not a torch file"
    return "is not a torch file" if b"\0" in head else "is a text file, not a checkpoint"


def _check_names_no_code(pickled: bytes) -> None:
    """``weights_only`` allows more than a checkpoint needs, such as an array of any size made from one number."""
    for opcode, argument, _ in pickletools.genops(pickled):
        named = argument if opcode.name == "GLOBAL" else opcode.name if opcode.name in CODE_OPCODES else None
        if named and named not in ALLOWED_GLOBALS:
            raise _Refused(
                f"wants to run code when it is read ({str(named).replace(' ', '.')[:80]}); a checkpoint of this "
                "project is data alone, so it was not read"
            )


def _check_plain(checkpoint: Any, size: float) -> None:
    """Nothing but the plain kinds, not deep and not many, and no more tensor than the file has bytes."""
    values, tensor_bytes = 0, 0

    def visit(value: Any, depth: int) -> None:
        nonlocal values, tensor_bytes
        values += 1
        if values > MOST_VALUES or depth > MOST_DEPTH:
            raise _Refused("its structure is deeper or larger than that of any checkpoint")
        if isinstance(value, dict):
            for key, item in value.items():
                if type(key) not in (str, int):
                    raise _Refused("damaged: a key in it is neither text nor number")
                visit(item, depth + 1)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item, depth + 1)
        elif type(value) is Tensor:
            if value.layout != torch.strided:
                raise _Refused("damaged: a tensor in it is not of a plain kind")
            # A view can repeat its numbers, and many tensors can share them: what counts is what a copy takes.
            tensor_bytes += value.numel() * value.element_size()
            if tensor_bytes > size:
                raise _Refused(f"made to fill the memory: its tensors are larger than its {size} bytes")
        elif not (value is None or type(value) in (bool, int, float, str)):
            raise _Refused(f"damaged: holds a {type(value).__name__}, which no checkpoint does")

    visit(checkpoint, 0)


def _in_memory(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_memory(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_memory(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


def _upgraded(checkpoint: Any) -> dict[str, Any]:
    """The checkpoint in the form of this version, its schema checked."""
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        values = list(checkpoint.values()) if isinstance(checkpoint, dict) else []
        if values and all(isinstance(value, Tensor) for value in values):
            raise _Refused(
                "is a bare state_dict, without architecture and class names, and not a checkpoint of this project"
            )
        raise _Refused("is another program's torch file; train_teacher_model.py makes a checkpoint of this project")
    version = checkpoint.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise _Refused(f"is version {version!r} of the checkpoint; this program reads versions 1 to {VERSION}")
    if version == 1 and isinstance(checkpoint.get("training"), dict) and checkpoint["training"]:
        checkpoint = checkpoint | {"training": ADDED_IN_2 | checkpoint["training"]}
    _check_schema(checkpoint)
    return checkpoint


def _require(good: bool, what: str) -> None:
    if not good:
        raise _Refused(f"damaged: {what}")


def _check_kinds(values: dict, kinds: dict[str, type], where: str) -> None:
    for key, kind in kinds.items():
        value = values.get(key)
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        if kind is dict:
            fits = isinstance(value, dict)
        _require(fits, f"{key!r}{where} is missing or not a {kind.__name__}")


def _check_schema(checkpoint: dict[str, Any]) -> None:
    _check_kinds(checkpoint, KINDS, "")
    names, steps, training = checkpoint["class_names"], checkpoint["steps"], checkpoint["training"]
    _require(all(type(name) is str and name for name in names), "a class name is not a text")
    _require(len(set(names)) == len(names) > 0, "the class names are not unique, or there are none")
    _require(8 <= checkpoint["image_size"] <= 1024, "the image size is out of range")
    _require(checkpoint["loss_form"] in ("binary", "softmax", "softmax-all"), "the loss form is unknown")
    for key in ("mean", "std"):
        numbers = checkpoint[key]
        finite = len(numbers) == 3 and all(type(x) is float and math.isfinite(x) for x in numbers)
        _require(finite and (key == "mean" or min(numbers) > 0), f"{key!r} is not three numbers to normalise with")
    taught = []
    for step in steps:
        _require(isinstance(step, dict), "a step is not a dict")
        _check_kinds(step, STEP_KINDS, " of a step")
        accuracies = step["group_accuracy"]
        _require(all(x is None or type(x) is float for x in accuracies), "a step's accuracy is not a number")
        _require(len(accuracies) <= len(steps), "a step has accuracies of groups that do not exist")
        taught += step["classes"]
    _require(taught == names, "the steps' classes are not the class names")
    _check_weights(checkpoint)
    if training or not checkpoint["finished"]:
        _check_training(training)


def _check_weights(checkpoint: dict[str, Any]) -> None:
    """Names, shapes and kinds as the architecture has them, which is built without memory; every number finite."""
    try:
        with torch.device("meta"):
            model = models.build(checkpoint["architecture"], len(checkpoint["class_names"]), checkpoint["image_size"])
    except ValueError as error:
        raise _Refused(str(error)) from error
    expected, found = model.state_dict(), checkpoint["model"]
    odd = sorted(map(str, expected.keys() ^ found.keys()))
    _require(not odd, f"the weights do not fit {checkpoint['architecture']} ({odd[0] if odd else ''})")
    for name, like in expected.items():
        tensor = found[name]
        _require(isinstance(tensor, Tensor), f"the weights {name!r} are not a tensor")
        _require(
            tensor.shape == like.shape and tensor.dtype == like.dtype,
            f"the weights do not fit {checkpoint['architecture']} with {len(checkpoint['class_names'])} classes "
            f"({name!r} is {list(tensor.shape)} {tensor.dtype}, {list(like.shape)} {like.dtype} is needed)",
        )
        _require(bool(tensor.isfinite().all()), f"the weights {name!r} are not finite")


def _check_training(training: dict[str, Any]) -> None:
    _check_kinds(training, TRAINING_KINDS, " of the training state")
    _require(training.keys() >= ADDED_IN_2.keys(), "the training state is not whole")
    for key in ("generator", "torch_rng"):
        _check_random_state(training[key])
    for row in training["log"]:
        fits = isinstance(row, dict) and all(type(key) is str for key in row)
        _require(fits and all(x is None or type(x) in (int, float) for x in row.values()), "a row of the log")
    _require(training["images"] is None or type(training["images"]) is str, "the hash of the images is not a text")
    _require(isinstance(training["machine"], dict), "what it was trained on is not a dict")
    position = training["position"]
    if position is not None:
        _require(isinstance(position, dict), "the position inside the epoch is not a dict")
        kinds = {"batches": int, "order": Tensor, "learning_rate": float, "seconds": float, "sums": dict}
        _check_kinds(position, kinds, " of the position")
        _check_random_state(position["order"])
        _require(all(type(x) is float for x in position["sums"].values()), "the sums of the loss terms")


def _check_random_state(state: Tensor) -> None:
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise _Refused("damaged: a random state is none") from error


def checked_state(saved: Any, fresh: Any, what: str) -> Any:
    """The part of a saved state that a ``fresh`` one has too (other versions of torch have more or fewer entries).

    Raises InputError where an entry is of another kind: loading it would make something else of the object.
    """
    fits = type(saved) is type(fresh)
    if isinstance(fresh, float):
        fits = type(saved) in (int, float)
    if isinstance(fresh, list) and fits:
        fits = len(saved) == len(fresh)
    if not fits:
        raise InputError(f"cannot resume: the saved state of the {what} is damaged")
    if isinstance(fresh, dict):
        return {key: checked_state(saved[key], value, what) for key, value in fresh.items() if key in saved}
    if isinstance(fresh, list):
        return [checked_state(item, other, what) for item, other in zip(saved, fresh, strict=True)]
    return saved


def checked_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The saved state of SGD for ``optimizer``, which is fresh. Raises InputError where it is not one for it."""
    groups = checked_state(saved.get("param_groups"), optimizer.state_dict()["param_groups"], "optimiser")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = saved.get("state")
    good = isinstance(state, dict)
    for key, entry in state.items() if good else ():
        momentum = entry.get("momentum_buffer") if isinstance(entry, dict) else ()
        good = good and type(key) is int and 0 <= key < len(parameters)
        if good and momentum is not None:
            good = isinstance(momentum, Tensor) and momentum.shape == parameters[key].shape
            good = good and momentum.dtype == parameters[key].dtype and bool(momentum.isfinite().all())
    if not good:
        raise InputError("cannot resume: the saved state of the optimiser is damaged")
    return {"state": state, "param_groups": groups}


# The network ------------------------------------------------------------------------------------------------------


def restore_model(checkpoint: dict[str, Any]) -> nn.Module:
    """The network of a loaded checkpoint, on the CPU."""
    model = models.build(checkpoint["architecture"], len(checkpoint["class_names"]), checkpoint["image_size"])
    model.load_state_dict(checkpoint["model"])
    return model


def fingerprint(checkpoint: dict[str, Any]) -> str:
    """SHA-256 of the weights, as hexadecimal: two files with one fingerprint hold the same network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint["model"].items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()
