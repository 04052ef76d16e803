"""Checkpoints: a plain dict of tensors, numbers, strings and lists, and the whole hand-over between steps.

format, version      what this file is
architecture, image_size, mean, std, loss_form     how to build the network and feed it
class_names          in the order of the outputs, which is the order in which they were taught
steps                one dict a step: its classes, where their images were, method, settings, accuracies
model                the network's state_dict
statistics           means and covariances of the classes' features (readout.py); may be empty
readouts             for each read-out its accuracies on the test images; may be empty
finished             False for a save in the middle of a run
training             what --resume needs: optimiser, schedule, random states, log, the position inside an epoch, and
                     what tells one run from another; may be empty in a finished one

A file is read as data (torchfile.py), and then all of it is checked against what a checkpoint is.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lwm import models
from lwm.runtime import torchfile
from lwm.runtime.errors import InputError
from lwm.runtime.setting_types import UNPRINTABLE
from lwm.runtime.torchfile import Refused

FORMAT = "learning-without-memorizing checkpoint"
VERSION = 3  # 1 had no position inside an epoch, nor what the training images were; 2 had no statistics
# Of a covariance, times its channels and its mean variance: twice what single precision can have lost.
ROUNDING = 2**-23
KINDS = {
    "architecture": str,
    "image_size": int,
    "mean": list,
    "std": list,
    "loss_form": str,
    "class_names": list,
    "steps": list,
    "model": dict,
    "statistics": dict,
    "readouts": dict,
    "finished": bool,
    "training": dict,
}
STEP_KINDS = {"classes": list, "dataset": str, "data_dir": str, "hold_back": float, "epochs": int}
STEP_KINDS |= {"group_accuracy": list, "method": str}
TRAINING_KINDS = {"epochs": int, "teacher": str, "optimizer": dict, "schedule": dict, "generator": Tensor}
TRAINING_KINDS |= {"torch_rng": Tensor, "log": list}
LAST_OF_TEACHER = {"epoch", "loss", "test_accuracy"}  # what the scripts say of the last epoch
LAST_OF_STUDENT = LAST_OF_TEACHER | {
    f"test_{name}_{group}" for name in ("accuracy", "task_aware") for group in ("old", "new")
}
ADDED_IN_2: dict[str, Any] = {"position": None, "images": None, "machine": {}}
ADDED: dict[str, Any] = {"device_rng": None}  # since, to the training state
ADDED_IN_3: dict[str, Any] = {"statistics": {}, "readouts": {}}

MOST_STEPS = 10**8  # of the optimiser; no number of its state is larger


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
    touched. The folder must be there. Raises InputError where it cannot be written, or where something else than a file
    would make way for it: a folder, a device.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is there and is no file; take another name")
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
    checkpoint = {"format": FORMAT, "version": VERSION, **ADDED_IN_3, **checkpoint}
    torchfile.plain(checkpoint, math.inf)  # what could not be loaded again is not to be saved
    write_torch(path, checkpoint)


def write_torch(path: Path, content: Any) -> None:
    """``content`` as torch saves it, whole or not at all."""
    buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


# Reading ----------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU, as data alone, and check all of it.

    Raises InputError, in one line that says what it is instead, for every file that is not one.
    """
    path = Path(path)
    with _one_line(path):
        return _upgraded(torchfile.read(path))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A state_dict that another program wrote: alone, or as "state_dict" or "model" of a dict; without the prefix of
    DataParallel. Raises InputError for a file that holds none.
    """
    path = Path(path)
    with _one_line(path):
        found = torchfile.read(path)
        for key in ("state_dict", "model"):
            found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
        pairs = found.items() if isinstance(found, dict) else ()
        if not pairs or not all(type(name) is str and isinstance(value, Tensor) for name, value in pairs):
            raise Refused("holds no state_dict: names and tensors, alone or under 'state_dict' or 'model'")
    prefix = "module."
    if all(name.startswith(prefix) for name in found):
        found = {name[len(prefix) :]: tensor for name, tensor in found.items()}
    return found


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Raises InputError for whatever may be wrong with a file of torch."""
    try:
        yield
    except Refused as error:
        _refuse(path, str(error), error)
    except OSError as error:
        _refuse(path, f"cannot be read ({error.strerror or error})", error)
    except Exception as error:  # torch raises many kinds for an archive that it cannot make sense of
        reason = (str(error) or type(error).__name__).splitlines()[0]
        _refuse(path, f"not a checkpoint of this project, or damaged ({reason[:120]})", error)


def _refuse(path: Path, what: str, error: Exception) -> NoReturn:
    """One line of bearable length, whatever the file's author put into a name: it goes to a terminal."""
    what = what if len(what) <= 300 else f"{what[:300]} ..."
    raise InputError(f"{path}: {''.join(c if c.isprintable() else ' ' for c in what)}") from error


def _upgraded(checkpoint: Any) -> dict[str, Any]:
    """The checkpoint in the form of this version, its schema checked."""
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        values = list(checkpoint.values()) if isinstance(checkpoint, dict) else []
        if values and all(isinstance(value, Tensor) for value in values):
            raise Refused(
                "is a bare state_dict, without architecture and class names, and not a checkpoint of this project"
            )
        raise Refused("is another program's torch file; train_teacher_model.py makes a checkpoint of this project")
    version = checkpoint.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise Refused(f"is version {version!r} of the checkpoint; this program reads versions 1 to {VERSION}")
    training = checkpoint.get("training")
    if isinstance(training, dict) and training:
        checkpoint = checkpoint | {"training": (ADDED_IN_2 if version == 1 else {}) | ADDED | training}
    if version < 3:
        checkpoint = checkpoint | ADDED_IN_3
    _check_schema(checkpoint)
    return checkpoint


def _require(good: bool, what: str) -> None:
    if not good:
        raise Refused(f"damaged: {what}")


def _number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _check_kinds(values: dict, kinds: dict[str, type], where: str) -> None:
    for key, kind in kinds.items():
        value = values.get(key)
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        _require(fits, f"{key!r}{where} is missing or not a {kind.__name__}")


def _check_schema(checkpoint: dict[str, Any]) -> None:
    _check_kinds(checkpoint, KINDS, "")
    names, steps, training = checkpoint["class_names"], checkpoint["steps"], checkpoint["training"]
    _require(
        all(type(name) is str and name and not UNPRINTABLE.search(name) for name in names), "a class name is no text"
    )
    _require(len(set(names)) == len(names) > 0, "the class names are not unique, or there are none")
    _require(8 <= checkpoint["image_size"] <= 1024, "the image size is out of range")
    _require(checkpoint["loss_form"] in ("binary", "softmax", "softmax-all"), "the loss form is unknown")
    for key, least in (("mean", -1e3), ("std", 1e-6)):
        numbers = checkpoint[key]
        fit = len(numbers) == 3 and all(type(x) is float and least <= x <= 1e3 for x in numbers)
        _require(fit, f"{key!r} is not three numbers to normalise with")
    taught = []
    for step in steps:
        _require(isinstance(step, dict), "a step is not a dict")
        _check_kinds(step, STEP_KINDS, " of a step")
        lists = [key for key, value in step.items() if isinstance(value, list | dict | Tensor)]
        _require(set(lists) == {"classes", "group_accuracy"}, "a setting of a step is none")
        taken_as_it_was = step is steps[0] and not (training and len(steps) == 1)
        fits = _number(step["hold_back"], 0, 0.5) and step["epochs"] >= (0 if taken_as_it_was else 1)
        _require(fits, "a setting of a step is out of range")
        accuracies = step["group_accuracy"]
        _require(all(x is None or _number(x, 0, 100) for x in accuracies), "a step's accuracy is not one in percent")
        _require(len(accuracies) <= len(steps), "a step has accuracies of groups that do not exist")
        taught += step["classes"]
    _require(taught == names and all(step["classes"] for step in steps), "the steps' classes are not the class names")
    _check_weights(checkpoint)
    _check_statistics(checkpoint["statistics"], checkpoint["model"]["fc.weight"])
    for name, accuracies in checkpoint["readouts"].items():
        _require(type(name) is str and isinstance(accuracies, dict), "a read-out has no accuracies")
        fits = all(type(key) is str and (x is None or _number(x, 0, 100)) for key, x in accuracies.items())
        _require(fits, "an accuracy of a read-out is not one in percent")
    if training or not checkpoint["finished"]:
        _check_training(training, checkpoint["finished"], len(steps))


def _check_weights(checkpoint: dict[str, Any]) -> None:
    """Names, shapes and kinds as the architecture has them, which is built without memory; every number finite."""
    try:
        expected = models.empty_state(
            checkpoint["architecture"], len(checkpoint["class_names"]), checkpoint["image_size"]
        )
    except InputError as error:
        raise Refused(str(error)) from error
    found = checkpoint["model"]
    odd = sorted(map(str, expected.keys() ^ found.keys()))
    _require(not odd, f"the weights do not fit {checkpoint['architecture']} ({odd[:1]})")
    for name, like in expected.items():
        tensor = found[name]
        _require(isinstance(tensor, Tensor), f"the weights {name!r} are not a tensor")
        _require(
            tensor.shape == like.shape and tensor.dtype == like.dtype,
            f"the weights do not fit {checkpoint['architecture']} with {len(checkpoint['class_names'])} classes "
            f"({name!r} is {list(tensor.shape)} {tensor.dtype}, {list(like.shape)} {like.dtype} is needed)",
        )
        _require(bool(tensor.isfinite().all()), f"the weights {name!r} are not finite")
        negative = name.endswith((".running_var", ".num_batches_tracked")) and bool((tensor < 0).any())
        _require(not negative, f"the statistics {name!r} are negative")


def _check_statistics(statistics: dict[str, Any], head: Tensor) -> None:
    """Empty, or of every class as readout.Statistics has them; ``head`` is the last layer's weight (N, C)."""
    if not statistics:
        return
    _check_kinds(statistics, {"means": Tensor, "covariances": Tensor, "of": list}, " of the statistics")
    (classes, width), covariances = head.shape, statistics["covariances"]
    shapes = (statistics["means"].shape, covariances.shape[1:]) == ((classes, width), (width, width))
    _require(shapes and statistics.keys() == {"means", "covariances", "of"}, "the statistics do not fit the head")
    of = [number for number in statistics["of"] if type(number) is int and 0 <= number < len(covariances)]
    _require(len(of) == len(statistics["of"]) == classes, "the statistics are not those of the classes")
    for name in ("means", "covariances"):
        good = statistics[name].dtype == torch.float32 and bool(statistics[name].isfinite().all())
        _require(good, f"the statistics' {name!r} are not finite numbers of single precision")
    for covariance in covariances:  # one by one: in double precision they may be many
        variances = covariance.diagonal().double()
        _require(bool((variances >= 0).all()), "a variance of the statistics is negative")
        slack = ROUNDING * width * variances.mean().clamp(min=1e-9)
        _, broken = torch.linalg.cholesky_ex(covariance.double() + slack * torch.eye(width, dtype=torch.float64))
        _require(not broken, "a covariance of the statistics is none")


def _check_training(training: dict[str, Any], finished: bool, steps: int) -> None:
    _check_kinds(training, TRAINING_KINDS, " of the training state")
    _require(training.keys() >= ADDED_IN_2.keys(), "the training state is not whole")
    for key in ("generator", "torch_rng"):
        _check_random_state(training[key])
    state = training["device_rng"]  # as long as the kind of device has it
    fits = state is None or (isinstance(state, Tensor) and state.dtype == torch.uint8 and state.dim() == 1)
    _require(fits, "the random state of the device is none")
    epochs, log = training["epochs"], training["log"]
    whole = len(log) == epochs
    _require(epochs > 0 and len(log) <= epochs and (whole or not finished), "the log is not as long as the training")
    for number, row in enumerate(log, 1):
        fits = isinstance(row, dict) and all(type(key) is str for key in row)
        fits = fits and all(x is None or type(x) in (int, float) for x in row.values())
        # A row may lack the accuracies alone: not every epoch is judged, but the last one is.
        fits = fits and row.get("epoch") == number and row.keys() >= {key for key in log[0] if key[:5] != "test_"}
        _require(fits, "a row of the log is none")
    if whole:
        judged = log[-1].keys() >= (LAST_OF_TEACHER if steps == 1 else LAST_OF_STUDENT)
        _require(judged and (steps > 1 or log[-1]["test_accuracy"] is not None), "the last epoch is not judged")
    _require(training["images"] is None or type(training["images"]) is str, "the hash of the images is not a text")
    machine = training["machine"]
    _require(isinstance(machine, dict), "what it was trained on is not a dict")
    _require(all(type(x) in (int, str) for x in machine.values()), "what it was trained on is neither text nor number")
    position = training["position"]
    if position is not None:
        _require(isinstance(position, dict), "the position inside the epoch is not a dict")
        kinds = {"batches": int, "order": Tensor, "learning_rate": float, "seconds": float, "sums": dict}
        _check_kinds(position, kinds, " of the position")
        _check_random_state(position["order"])
        fits = all(_number(position[key], 0, 1e12) for key in ("batches", "learning_rate", "seconds"))
        _require(fits, "a number of the position is out of range")
        fits = all(type(key) is str and type(x) is float for key, x in position["sums"].items())
        _require(fits, "the sums of the loss terms are none")


def _check_random_state(state: Tensor) -> None:
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise Refused("damaged: a random state is none") from error


def checked_state(saved: Any, fresh: Any, what: str) -> Any:
    """The part of a saved state that a ``fresh`` one has too (other versions of torch have more or fewer entries).

    Raises InputError where an entry is of another kind: loading it would make something else of the object. All
    numbers of SGD and of the cosine are positive, or zero from the start.
    """
    fits = type(saved) is type(fresh)
    if type(fresh) in (int, float):
        fits = (fits or type(fresh) is float) and _number(saved, 0, MOST_STEPS) and (saved > 0 or fresh == 0)
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
    fresh = optimizer.state_dict()["param_groups"]
    groups = checked_state(saved.get("param_groups"), fresh, "optimiser")
    # The schedule changes the learning rate; all else is as the settings and the order of the parameters make it.
    groups = [new | {"lr": old.get("lr", new["lr"])} for old, new in zip(groups, fresh, strict=True)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = saved.get("state")
    good = isinstance(state, dict)
    for key, entry in state.items() if isinstance(state, dict) else ():
        momentum: Any = entry.get("momentum_buffer") if isinstance(entry, dict) else ()
        good = good and type(key) is int and 0 <= key < len(parameters)
        if good and momentum is not None:
            good = isinstance(momentum, Tensor) and momentum.shape == parameters[key].shape
            good = good and momentum.dtype == parameters[key].dtype and bool(momentum.isfinite().all())
    if not good:
        raise InputError("cannot resume: the saved state of the optimiser is damaged")
    return {"state": state, "param_groups": groups}


# The network ------------------------------------------------------------------------------------------------------


def restore_model(checkpoint: dict[str, Any]) -> models.Network:
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
