"""config.py and the command line made into one frozen, checked ``Settings``.

Each field below that is no file is a constant of config.py (in capitals) and a flag (with dashes); the flag wins.
``SCRIPTS`` says which fields a script reads. A flag is checked by every script, so that one list of flags serves all,
and named if it is not read; a constant is checked by the scripts that read it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
import traceback
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from lwm.runtime import recommended, setting_types
from lwm.runtime.errors import InputError, be_quiet, log


@dataclass(frozen=True)
class Settings:
    dataset: str = setting_types.choice("the images", "digits", "cifar10", "cifar100", "folder")
    data_dir: str = setting_types.folder("where the images lie, or are downloaded to")
    old_classes: tuple[str, ...] = setting_types.names("classes that the teacher learns")
    new_classes: tuple[str, ...] = setting_types.names("classes that the student learns on top; all: every new one")
    model: str = setting_types.text("architecture: resnet18, resnet32, of torchvision, timm/<name>, or file.py:build")
    image_size: int = setting_types.number("side of the square images, px", int, 8, 1024)
    stem: str | None = setting_types.choice("how a ResNet-18 and its like begin", open=True)
    mean: tuple[float, ...] | None = setting_types.channels("mean of the channels", -1000)
    std: tuple[float, ...] | None = setting_types.channels("standard deviation of the channels", 1e-3)
    method: str = setting_types.choice("method of the student", open=True)
    favour: str = setting_types.choice("what new outputs in closed form favour", "old", "balanced", "new")
    new_rows: str | None = setting_types.choice("how a training's new outputs begin", "random", "closed-form")
    loss_form: str | None = setting_types.choice("form of L_C and L_D", "binary", "softmax")
    beta: float = setting_types.number("weight of L_D", float, 0)
    gamma: float = setting_types.number("weight of L_AD", float, 0)
    temperature: float = setting_types.number("temperature of softmax distillation", float, 0, above=True)
    batch_norm: str | None = setting_types.choice("batch-norm and dropout of the student", "train", "frozen")
    epochs: int = setting_types.number("epochs", int, 0, 10_000)
    batch_size: int = setting_types.number("images in a batch", int, 2, 10**9)
    lr: float = setting_types.number("learning rate of the teacher", float, 0, above=True)
    warm_up: float = setting_types.number("share of the steps in which the rate rises to its peak", float, 0, 0.9)
    incremental_lr: float = setting_types.number("learning rate of the student", float, 0, above=True)
    backbone_lr: float | None = setting_types.number("learning rate of everything but the head", float, 0, above=True)
    freeze: int = setting_types.number("the first so many stages of the network are not trained", int, 0)
    balanced: bool = setting_types.switch("draw the classes equally often")
    momentum: float = setting_types.number("momentum of SGD", float, 0, 0.999)
    weight_decay: float = setting_types.number("weight decay", float, 0)
    flip: bool = setting_types.switch("mirror training images at random")
    precision: str = setting_types.choice("arithmetic of the networks", "auto", "fp32", "bf16")
    cache_dir: str = setting_types.folder("where the decoded images of a folder are kept; can be deleted")
    skip_bad_images: bool = setting_types.switch("skip and count images that cannot be read")
    hold_back: float = setting_types.number("share of training images to judge on, not the test images", float, 0, 0.5)
    calibration: float = setting_types.number(
        "share of training images set apart to calibrate probabilities; 0: none", float, 0, 0.5
    )
    seed: int = setting_types.number("seed of every random choice", int, 0, 2**32 - 1)
    device: str = setting_types.device("auto, cpu, mps, cuda or cuda:N")
    deterministic: bool = setting_types.switch("deterministic algorithms on a GPU, somewhat slower")
    statistics: bool = setting_types.switch("keep mean and covariance of the classes' features, for the classifiers")
    classifier: str = setting_types.choice("what predicts", "auto", open=True)
    save_interval: int = setting_types.number("epochs between saves", int, 1)
    save_interval_steps: int = setting_types.number("optimiser steps between saves in an epoch, 0 for none", int, 0)
    resume: bool = setting_types.switch("go on from the checkpoint of an earlier run")
    overwrite: bool = setting_types.switch("replace the model of an earlier run")
    quiet: bool = setting_types.switch("print results, warnings and errors alone")
    json: bool = setting_types.switch("stdout has the accuracies as one JSON object alone")
    tensorboard: bool = setting_types.switch("scalars, settings and maps for TensorBoard")
    output_dir: str = setting_types.folder("where the outputs go")
    given: frozenset[str] = frozenset()  # the fields that the command line named
    arguments: tuple[str, ...] = ()  # the command line as it was given
    recommended: tuple[str, ...] = ()  # the fields that the data set's recommended values filled
    weights: str = setting_types.file("a state_dict to begin with, or imagenet for torchvision's or timm's own")
    measure_old: str = setting_types.file("a folder of images of old classes, to measure statistics of them")
    weights_key: str | None = setting_types.part("which of several state_dicts in --weights (default: the largest)")
    old_classes_file: str = setting_types.file("the old classes' names in the order of the outputs, a line each")
    new_classes_file: str = setting_types.file("the new classes' names, a line each")
    teacher: str = setting_types.file("checkpoint of the model that learns the new classes, a teacher or a student")
    student: str = setting_types.file("checkpoint of the student")
    checkpoint: str = setting_types.file("any checkpoint of this project")
    images: str = setting_types.file("a folder of your own images to judge, flat or with a subfolder for each class")
    unknown: str = setting_types.file("answer unknown if less like any class than this share of their images: 0.05")
    serve: str | None = setting_types.part("a page to drop pictures on, at this port or host:port (8000)", "8000")
    image: str = setting_types.file("the image to explain")
    class_name: str | None = setting_types.part("the class to explain (default: the network's answer)")
    layer: str | None = setting_types.part("the layer to look at (default: the last feature map)")
    output: str = setting_types.file("the PNG to write (default: gradcam.png)", "gradcam.png")

    def where(self, name: str) -> str:
        """The flag or the constant that a value comes from, as an error names it."""
        return _where(name, self.given | FILES.keys())

    @contextlib.contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """An error over the value of ``name``, raised by a module that knows only the value, names where it is from."""
        try:
            yield
        except (InputError, OSError) as error:  # of the system's: a path that is too long, a folder that is closed
            raise InputError(f"{self.where(name)}: {error}") from error


CONSTANTS = {f.name: f.metadata for f in fields(Settings) if "check" in f.metadata}
FILES = {f.name: f.metadata for f in fields(Settings) if "file" in f.metadata}  # of the command line alone
# None has a meaning of its own
OPTIONAL = ("mean", "std", "backbone_lr", "loss_form", "stem", "batch_norm", "method", "new_rows")
_TRAINING = (
    "dataset data_dir method loss_form epochs batch_size warm_up backbone_lr freeze balanced momentum weight_decay "
    "flip precision cache_dir skip_bad_images hold_back calibration seed device deterministic statistics save_interval "
    "save_interval_steps resume overwrite quiet json tensorboard output_dir"
)
SCRIPTS: dict[str, tuple[str, str, str]] = {  # script: constants that it reads, files that it needs, other files
    "train_teacher_model": (
        f"old_classes model image_size stem mean std lr {_TRAINING}",
        "",
        "weights weights_key old_classes_file measure_old",
    ),
    "incremental_learning_system": (
        f"new_classes incremental_lr beta gamma temperature batch_norm classifier favour new_rows {_TRAINING}",
        "teacher",
        "student new_classes_file",
    ),
    "demo": (
        "dataset data_dir cache_dir skip_bad_images device classifier quiet json output_dir",
        "teacher student",
        "images unknown serve",
    ),
    "gradcam": ("classifier", "checkpoint image", "class_name layer output"),
}
_DESCRIPTIONS = {
    "train_teacher_model": "Train a network on the old classes and save it as teacher_model.pth.",
    "incremental_learning_system": "Teach a model new classes from their images alone; saves student_model.pth.",
    "demo": "Judge teacher and student on test images and show what they look at.",
    "gradcam": "Draw where a network looks for a class in an image.",
}


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are one line, with the nearest flag for one that is unknown."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            wrong = (message.split(": ", 1)[1].split() or [""])[0]  # "$FLAGS" of a shell that has none
            near = difflib.get_close_matches(wrong.split("=")[0], self._option_string_actions, n=1)
            message = f"unknown flag {wrong}" + (f"; did you mean {near[0]}?" if near else "; see --help")
            if not wrong.startswith("-"):
                message = f"{wrong!r} belongs to no flag; write a list without spaces, as in --old-classes apple,baby"
        raise InputError(message)


def read_settings(
    script: str, argv: Sequence[str] | None = None, page: ModuleType | None = None, **choices: Iterable[str]
) -> Settings:
    """The settings of one script. Raises InputError for the first value that the script reads and cannot use.

    ``choices`` are the names that an open choice may have, as in method=METHODS; without them any text will do.
    """
    page = page or load_page()
    own_choices = {name: (*CONSTANTS[name]["choices"], *more) for name, more in choices.items()}
    checks = {name: metadata["check"] for name, metadata in CONSTANTS.items()}
    checks |= {name: setting_types.one_of(names) for name, names in own_choices.items()}
    read, required, optional = (words.split() for words in SCRIPTS[script])
    arguments = vars(_parser(script, page, own_choices).parse_args(argv))
    _check_page(page)
    values: dict[str, Any] = {name: arguments.pop(name) for name in required + optional if name in arguments}
    for name, value in values.items():
        values[name] = _checked(_flag(name), FILES[name]["file"], value)
    for name in ("old_classes", "new_classes"):
        if path := values.get(f"{name}_file"):
            flag = _flag(name)
            if name in arguments:
                raise InputError(f"{flag} and {flag}-file both name the {name[:3]} classes; leave one out")
            arguments[name] = lines_of(f"{flag}-file", path)
    for name, metadata in CONSTANTS.items():
        value = arguments.get(name, getattr(page, name.upper(), None))
        if isinstance(value, str) and name in arguments:
            with contextlib.suppress(ValueError):  # the check says what is needed
                value = metadata["parse"](value)
        if value is not None and (name in read or name in arguments):
            value = _checked(_where(name, arguments), checks[name], value)
        values[name] = value
    if "quiet" in read and values["quiet"]:
        be_quiet()
    values["given"] = frozenset(arguments)
    values["arguments"] = tuple(sys.argv[1:] if argv is None else argv)
    if "dataset" in read:
        dataset = _checked(_where("dataset", arguments), checks["dataset"], values["dataset"])
        for name, value in recommended.OF_DATASET[dataset].items():
            follows = name in recommended.RATES or value is None or (name == "image_size" and "weights" in values)
            if name in read and values[name] is None and not follows:
                values[name] = value
                values["recommended"] = (*values.get("recommended", ()), name)
    for name in read:
        if values[name] is None and name not in (
            *OPTIONAL,
            *recommended.FOLLOWING,
        ):  # no value is recommended: the check says what is needed
            _checked(_where(name, ()), checks[name], None)
    if "epochs" in read and values["epochs"] == 0 and not values.get("weights"):
        raise InputError(f"{_where('epochs', arguments)} is 0: nothing would be learned; only --weights need none")
    # A checkpoint names no code, so that every script reads the code of a user's own network.
    own = "model" if ".py:" in str(values["model"]) else None
    if unread := [_flag(name) for name in arguments if name not in read and name != own]:
        log.info(f"{', '.join(unread)}: not read by {script}.py")
    return Settings(**values)


def read_constant(name: str) -> Any:
    """A value of config.py, for a script without ``Settings``. Raises InputError for one that cannot be used."""
    return _checked(_where(name, ()), CONSTANTS[name]["check"], getattr(load_page(), name.upper(), None))


def load_page() -> ModuleType:
    """config.py. Raises InputError with the line if it cannot be read."""
    try:
        import config
    except (Exception, SystemExit) as error:  # the page is the user's to edit: anything can stand there
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == "config.py"]
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError):
            lines += [error.lineno] if Path(error.filename or "").name == "config.py" else []
            reason = error.msg
        raise InputError(f"config.py{f', line {lines[-1]}' if lines else ''}: {reason}") from error
    return config


def cifar100_classes() -> list[str]:
    """All of them, in the order of their names, as config.py has them in groups of ten."""
    page = load_page()
    return [name for first in range(0, 100, 10) for name in getattr(page, f"select_classes_{first}_{first + 10}")]


def _parser(script: str, page: ModuleType, own_choices: dict[str, tuple[str, ...]]) -> OneLineParser:
    read, required, optional = (words.split() for words in SCRIPTS[script])
    parser = OneLineParser(
        f"{script}.py", description=_DESCRIPTIONS[script], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for name in required + optional:
        optional_value = {"nargs": "?", "const": alone} if (alone := FILES[name].get("alone")) else {}
        parser.add_argument(_flag(name), help=FILES[name]["help"], required=name in required, **optional_value)
    for name, metadata in CONSTANTS.items():
        default = getattr(page, name.upper(), None)
        if default is None:
            default = "none" if name in OPTIONAL else "recommended for the data set"
        shown = _shown(default, lambda value: ",".join(map(str, value)) if isinstance(value, list) else str(value))
        names = own_choices.get(name, metadata.get("choices", ()))
        help = ": ".join([metadata["help"], *([", ".join(names)] if names else [])]) + f" (default: {shown})"
        options: dict[str, Any] = {"metavar": name.upper()}
        if metadata["parse"] is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(_flag(name), help=help.replace("%", "%%") if name in read else argparse.SUPPRESS, **options)
    return parser


def _check_page(page: ModuleType) -> None:
    constants, there = [name.upper() for name in CONSTANTS], [name for name in vars(page) if name.isupper()]
    for name in there:
        if name not in constants:
            near = difflib.get_close_matches(name, constants, n=1)
            raise InputError(f"config.py: {name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
    for name in constants:
        if name not in there:
            raise InputError(f"config.py: {name} is missing; None stands for the recommended value")


def lines_of(flag: str, path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is no text in UTF-8"
        raise InputError(f"{flag} {path}: {reason}; a text file, a class name a line, is needed") from error
    return [unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _where(name: str, given: Collection[str]) -> str:
    return _flag(name) if name in given else f"config.py: {name.upper()}"


def _checked(where: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise InputError(f"{where} is {_shown(value)}: {error}") from error


def _shown(value: Any, write: Callable[[Any], str] = repr) -> str:
    """The value as text, cut short."""
    try:
        text = write(value)
    except Exception:  # anything can stand in config.py: Python writes no number of 5000 digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
