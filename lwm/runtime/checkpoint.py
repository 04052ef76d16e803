"""Checkpoints: a plain dict of tensors, numbers, strings and lists, and the whole hand-over between tasks.

format, version      what this file is
architecture, stem, image_size, mean, std, loss_form     how to build the network and feed it; "own" is a network whose
                     code whoever loads it names (models/own.py)
class_names          in the order of the outputs, which is the order in which they were taught
tasks                one dict a task: its classes, "again": old ones of which it had more images, where the images were,
                     method, settings, accuracies of the head; "judged": the data set, folder and split that judged it;
                     "apart": hashes of test images that it set apart; "images", "seconds": what it was trained on, and
                     for how long; "answers": how well the task's model answers (evaluation.answers)
model                the network's state_dict
statistics           counts, means, scatters and shrinkages of the classes' features (classifiers.py); may be empty
classifiers          for each classifier its accuracies on the test images; may be empty
temperatures         for each classifier what its logits are divided by (calibration.py); may be empty
calibrated_on        number of held-back images behind the temperatures
held_back            accuracy of each classifier on the first task's images that were held back; may be empty
unknown              for each classifier the quantiles of its score on images of classes it knows; may be empty
finished             False for a save in the middle of a run
training             what --resume needs: random states, log, what tells one run from another, and before the run is
                     finished optimiser, schedule and the position inside an epoch; may be empty in a finished one

A file is read as data: torch's ``weights_only`` runs no code of it. Then it is checked against what a checkpoint is.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwm import models
from lwm.runtime.errors import InputError
from lwm.runtime.files import write_atomically
from lwm.runtime.setting_types import UNPRINTABLE

FORMAT = "learning-without-memorizing checkpoint"
VERSION = 7
OPTIONAL = ("statistics", "classifiers", "temperatures", "unknown", "held_back")  # may be empty
AT_A_TIME = 64  # images that a network judges where no run says how many fit
MOST_STEPS = 10**8  # of the optimiser; no number of its state is larger


def whole(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """With format and version, and with what may be empty."""
    empty: dict[str, Any] = {key: {} for key in OPTIONAL} | {"calibrated_on": 0}
    return {"format": FORMAT, "version": VERSION, **empty, **checkpoint}


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint; the last one at ``path`` stays whole until the new one is."""
    checkpoint = whole(checkpoint)
    _plain(checkpoint)  # what could not be loaded again is not to be saved
    buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU, as data alone, and check all of it.

    Raises InputError, in one line that says what it is instead, for every file that is not one.
    """
    with one_line(path):
        checkpoint = _plain(read_torch(Path(path)))
        _check_whole(checkpoint)
    return checkpoint


def restore_model(checkpoint: dict[str, Any], build: models.Build | None = None) -> models.Network:
    """The network of a loaded checkpoint, on the CPU; of a user's own one ``build`` is the code (models/own.py).

    Raises InputError if that is missing, or builds another network.
    """
    classes, size = len(checkpoint["class_names"]), checkpoint["image_size"]
    if checkpoint["architecture"] != models.OWN or build is None:
        model = models.build(checkpoint["architecture"], classes, size, checkpoint["stem"])
    else:
        model = models.build_own(build, classes, size)
        _check_tensors(checkpoint["model"], model.state_dict(), "the network that --model builds", classes)
    model.load_state_dict(checkpoint["model"])
    return model


def batch_size_of(checkpoint: dict[str, Any]) -> int:
    """How many images at a time its network can take: as many as its last task took, and no more than ``AT_A_TIME``."""
    return min(AT_A_TIME, checkpoint["tasks"][-1]["batch_size"] or AT_A_TIME)


def fingerprint(checkpoint: dict[str, Any]) -> str:
    """SHA-256 of the weights, as hexadecimal: two files with one fingerprint hold the same network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint["model"].items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


# Reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_line(path: str | Path) -> Iterator[None]:
    """Raises InputError for whatever may be wrong with a file of torch."""
    try:
        yield
    except Exception as error:  # torch raises many kinds for a file that it cannot make sense of
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError):
            reason = f"cannot be read ({error.strerror or error})"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "is not a file of tensors, numbers and texts alone; code in it is not run"
        elif not isinstance(error, InputError):
            reason = f"is damaged, or no torch file ({reason})"
        # Of bearable length, whatever the file's author put into a name: it goes to a terminal.
        text = "".join(character if character.isprintable() else " " for character in reason[:300])
        raise InputError(f"{path}: {text}") from error


def read_torch(path: Path) -> Any:
    """What the file holds, on the CPU. Runs no code of it."""
    if not path.is_file():  # a pipe would wait for its writer
        raise InputError("is no file" if path.exists() else "no such file")
    with warnings.catch_warnings(action="ignore"):  # what torch wonders at is no concern of the user
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
                broken = archive.testzip()
            if broken:
                raise InputError(f"is damaged: {broken!r} in it is not what was written")
        return torch.load(path, map_location="cpu", weights_only=True)


def _plain(value: Any) -> Any:
    """The same in dicts and lists. Raises InputError for what no checkpoint holds.

    An OrderedDict's methods are not asked for: the file can put others in their place.
    """
    if type(value) in (dict, OrderedDict):
        if not all(type(key) in (str, int) for key in dict.keys(value)):
            raise InputError("is damaged: a key in it is neither text nor number")
        return {key: _plain(item) for key, item in dict.items(value)}
    if type(value) in (list, tuple):
        return [_plain(item) for item in value]
    if type(value) is Tensor:
        # Neither sparse, nor without numbers, nor with one number for many elements.
        whole = value.layout == torch.strided and not value.is_meta
        good = whole and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    else:
        good = _scalar(value) and (type(value) is not int or abs(value) < 2**64)  # Python prints no huge one
    if not good:
        raise InputError(f"is damaged: holds a {type(value).__name__} as no checkpoint does")
    return value


# The schema -------------------------------------------------------------------------------------------------------
# A dict names the keys that are required, a list what every item is, a type its instances, a function what is valid.


def _number(least: float, most: float, *kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in (kinds or (int, float)) and least <= value <= most


def _optional(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


def _each(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A dict from texts to what is valid."""
    return lambda values: isinstance(values, dict) and all(type(k) is str and valid(x) for k, x in values.items())


def _scalar(value: Any) -> bool:
    return type(value) in (int, float, str, bool, type(None))


def _random_state(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(torch.Generator().set_state(value))  # which raises if it is none


def _printable(value: Any) -> bool:
    return type(value) is str and not UNPRINTABLE.search(value)


PERCENT = _optional(_number(0, 100))
JUDGED = {
    **dict.fromkeys(("dataset", "data_dir"), str),
    "split": lambda value: value in ("test", "val", "apart", "held back"),
}
ANSWERS = {
    "classifier": _printable,
    **dict.fromkeys(("accuracy", "kept"), PERCENT),
    "groups": [PERCENT],
}
TASK = {
    "classes": [lambda name: name and _printable(name)],
    "again": [str],
    **dict.fromkeys(("dataset", "data_dir"), str),
    "method": _printable,
    "judged": _optional(lambda value: _check(value, JUDGED, "judged")),
    "apart": [lambda value: type(value) is str and len(value) == 32],
    "hold_back": _number(0, 0.5),
    "epochs": _number(0, 10**6, int),
    "batch_size": _optional(_number(1, 10**9, int)),
    "pretrained": bool,
    "group_accuracy": [PERCENT],
    "images": _number(0, 10**9, int),
    "seconds": _number(0, 1e12),
    "answers": lambda value: value == {} or _check(value, ANSWERS, "answers"),
}
# Besides, of the task that a run may go on with.
SETTINGS = ["loss_form", "beta", "gamma", "temperature", "batch_norm", "warm_up", "momentum", "weight_decay", "flip"]
SETTINGS += ["precision", "calibration", "seed", "backbone_lr", "freeze", "balanced", "learning_rate"]
POSITION = {
    "batches": _number(1, 10**9, int),
    "order": _random_state,
    **dict.fromkeys(("learning_rate", "seconds"), _number(0, 1e12)),
    "sums": _each(lambda value: type(value) is float),
}
TRAINING = {
    "epochs": _number(1, 10**6, int),
    **dict.fromkeys(("teacher", "images"), str),
    "machine": _each(_scalar),
    **dict.fromkeys(("generator", "torch_rng"), _random_state),
    "device_rng": _optional(
        lambda value: isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1
    ),
    "log": [_each(_optional(_number(-math.inf, math.inf)))],
}
UNFINISHED = {  # besides, of a run that is in the middle of its epochs
    **dict.fromkeys(("optimizer", "schedule"), dict),
    "position": _optional(lambda value: _check(value, POSITION, "position")),
}
STATISTICS = dict.fromkeys(("counts", "means", "scatters", "shrinkages", "derived"), Tensor)
CHECKPOINT = {
    **dict.fromkeys(("architecture", "stem"), str),
    "image_size": _number(8, 1024, int),
    "mean": [_number(-1e3, 1e3, float)],
    "std": [_number(1e-6, 1e3, float)],
    "loss_form": lambda value: value in ("binary", "softmax", "softmax-all"),
    "class_names": list,
    "tasks": [TASK],
    **dict.fromkeys(("model", "statistics", "training"), dict),
    "classifiers": _each(_each(PERCENT)),
    "held_back": _each(PERCENT),
    "temperatures": _each(_number(1e-4, 1e4, float)),
    "calibrated_on": _number(0, 10**9, int),
    "unknown": _each(lambda values: _check(values, [_number(-1e300, 1e300, float)], "unknown") and len(values) == 101),
    "finished": bool,
}


def _require(good: Any, what: str) -> None:
    if not good:
        raise InputError(f"is damaged: {what}")


def _check(value: Any, schema: Any, where: str) -> bool:
    """True, or raises InputError that says where the value is not valid."""
    if isinstance(schema, dict):
        _require(isinstance(value, dict), f"{where} is no dict")
        for key, inner in schema.items():
            _require(key in value, f"{where} has no {key!r}")
            _check(value[key], inner, f"{where}/{key}")
    elif isinstance(schema, list):
        _require(isinstance(value, list), f"{where} is no list")
        for number, item in enumerate(value):
            _check(item, schema[0], f"{where}/{number}")
    else:
        _require(type(value) is schema if isinstance(schema, type) else schema(value), f"{where} is not valid")
    return True


def _check_whole(checkpoint: Any) -> None:
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError("is another program's torch file; train_teacher_model.py --weights makes a teacher of one")
    if checkpoint.get("version") != VERSION:
        raise InputError(f"is version {checkpoint.get('version')!r} of the checkpoint; this program reads {VERSION}")
    _check(checkpoint, CHECKPOINT, "checkpoint")
    names, tasks, training = checkpoint["class_names"], checkpoint["tasks"], checkpoint["training"]
    taught = [name for task in tasks for name in task["classes"]]
    _require(
        taught == names and all(task["classes"] or task["again"] for task in tasks),
        "class_names are not those of the tasks",
    )
    _require(len(set(names)) == len(names) > 0, "class_names are not unique, or there are none")
    _require(len(checkpoint["mean"]) == len(checkpoint["std"]) == 3, "mean and std are not of three channels")
    for number, task in enumerate(tasks):
        known = [name for earlier in tasks[:number] for name in earlier["classes"]]
        _require({*task["again"]} <= {*known}, "more images are of a class that was not known")
        others = (value for key, value in task.items() if type(value) is not list and key not in ("judged", "answers"))
        _require(all(map(_scalar, others)), "a setting of a task is not valid")
        _require(len(task["group_accuracy"]) <= len(tasks), "group_accuracy has more groups than there are tasks")
    _check_weights(checkpoint)
    if checkpoint["statistics"]:  # those of every class, as classifiers.ClassStatistics has them
        _check(checkpoint["statistics"], STATISTICS, "statistics")
        parts = [checkpoint["statistics"][name] for name in STATISTICS]
        (counts, means, scatters, *rest), (classes, width) = parts, checkpoint["model"]["fc.weight"].shape
        fits = (counts.shape, means.shape) == ((classes,), (classes, width))
        fits &= all(part.shape == (classes,) for part in rest)
        fits &= scatters.shape == (1 if width > models.WIDEST else classes, width, width)
        _require(fits, "the statistics do not fit the head")
        good = all(part.dtype == torch.float32 and part.isfinite().all() for part in parts)
        good = good and bool((counts >= 1).all()) and all(bool(((part >= 0) & (part <= 1)).all()) for part in rest)
        _require(good, "the statistics are not finite numbers of single precision, or none that images can have")
    if training or not checkpoint["finished"]:
        _check(training, TRAINING | ({} if checkpoint["finished"] else UNFINISHED), "training")
        _check(tasks[-1], dict.fromkeys(SETTINGS, _scalar), "the last task")
        _check_log(training["log"], training["epochs"], checkpoint["finished"], len(tasks) > 1)


def _check_log(log: list[dict[str, Any]], epochs: int, finished: bool, of_student: bool) -> None:
    _require(len(log) == epochs or (len(log) < epochs and not finished), "the log is not as long as the training")
    for number, row in enumerate(log, 1):
        # A row may lack the accuracies alone: not every epoch is judged, but the last one of a finished run is.
        required = {"loss", "accuracy"} | {key for key in log[0] if not key.startswith("test_")}
        _require(row.get("epoch") == number and row.keys() >= required, f"row {number} of the log is not valid")
    pairs = [f"test_{name}_{group}" for name in ("accuracy", "told") for group in ("old", "new")]
    last = {"test_accuracy", *(pairs if of_student else ())}
    _require(not finished or log[-1].keys() >= last, "the last epoch is not judged")


def _check_weights(checkpoint: dict[str, Any]) -> None:
    """Names, shapes and types as the architecture has them, which is built without memory; every number finite."""
    architecture, classes, weights = checkpoint["architecture"], len(checkpoint["class_names"]), checkpoint["model"]
    if architecture == models.OWN:  # restore_model, which has the code, looks at the rest
        good = all(type(name) is str and isinstance(tensor, Tensor) for name, tensor in weights.items())
        _require(good and {"fc.weight", "fc.bias"} <= weights.keys(), "the weights have no last layer")
        weight, bias = weights["fc.weight"], weights["fc.bias"]
        fits = weight.dim() == 2 and (len(weight), bias.shape) == (classes, (classes,))
        _require(fits and weight.is_floating_point(), f"the last layer is not of {classes} classes")
    else:
        expected = models.empty_state(architecture, classes, checkpoint["image_size"], checkpoint["stem"])
        _check_tensors(weights, expected, architecture, classes)
    for name, tensor in weights.items():
        _require(bool(tensor.isfinite().all()), f"the weights {name!r} are not finite")
        negative = name.endswith((".running_var", ".num_batches_tracked")) and bool((tensor < 0).any())
        _require(not negative, f"the statistics {name!r} are negative")


def _check_tensors(weights: dict[str, Any], expected: Mapping[str, Tensor], architecture: str, classes: int) -> None:
    odd = sorted(map(str, expected.keys() ^ weights.keys()))
    _require(not odd, f"the weights do not fit {architecture} ({odd[:1]})")
    for name, like in expected.items():
        tensor = weights[name]
        fits = isinstance(tensor, Tensor) and (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
        _require(fits, f"the weights {name!r} do not fit {architecture} with {classes} classes")


# The optimiser ----------------------------------------------------------------------------------------------------


def checked_state(saved: Any, fresh: Any, what: str) -> Any:
    """The part of a saved state that a ``fresh`` one has too (other versions of torch have more or fewer entries).

    Raises InputError if an entry is of another kind: loading it would make something else of the object. All
    numbers of SGD and of the cosine are positive, or zero from the start.
    """
    if isinstance(fresh, dict) and isinstance(saved, dict):
        return {key: checked_state(saved[key], value, what) for key, value in fresh.items() if key in saved}
    if isinstance(fresh, list) and isinstance(saved, list) and len(saved) == len(fresh):
        return [checked_state(item, other, what) for item, other in zip(saved, fresh, strict=True)]
    if type(fresh) in (int, float):
        kinds = (int, float) if type(fresh) is float else (int,)
        fits = _number(0, MOST_STEPS, *kinds)(saved) and (saved > 0 or fresh == 0)
    else:
        fits = type(saved) is type(fresh) and not isinstance(fresh, dict | list)
    if not fits:
        raise InputError(f"cannot resume: the saved state of the {what} is damaged")
    return saved


def checked_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The saved state of SGD for ``optimizer``, which is fresh. Raises InputError if it is not one for it."""
    fresh = optimizer.state_dict()["param_groups"]
    groups = checked_state(saved.get("param_groups"), fresh, "optimiser")
    # The schedule changes the learning rate; all else is as the settings and the order of the parameters make it.
    groups = [new | {"lr": old.get("lr", new["lr"])} for old, new in zip(groups, fresh, strict=True)]
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    try:
        for number, entry in saved["state"].items():
            like, momentum = parameters[number], entry["momentum_buffer"]
            fits = momentum is None or (momentum.shape, momentum.dtype) == (like.shape, like.dtype)
            if not fits or (momentum is not None and not momentum.isfinite().all()):
                raise ValueError
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError("cannot resume: the saved state of the optimiser is damaged") from error
    return {"state": saved["state"], "param_groups": groups}
