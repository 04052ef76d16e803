"""config.py and the command line made into one frozen, checked ``Settings``.

Each field below is a constant of config.py (in capitals) and a flag (with dashes); the flag wins. ``SCRIPTS`` says
which fields a script reads. A flag is checked by every script, so that one list of flags serves all, and a constant by
the scripts that read it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from lwm.runtime import progress, setting_types
from lwm.runtime.errors import InputError

READOUTS = ("head", "prototypes", "discriminant", "rebalanced")  # those of readout.py, which needs torch


@dataclass(frozen=True)
class Settings:
    dataset: str = setting_types.choice("the images", "digits", "cifar10", "cifar100", "folder")
    data_dir: str = setting_types.text("where the images lie, or are downloaded to")
    old_classes: tuple[str, ...] = setting_types.names("classes that the teacher learns")
    new_classes: tuple[str, ...] = setting_types.names("classes that the student learns on top")
    model: str = setting_types.text("architecture: resnet18, resnet32, resnet110, or a network of torchvision")
    image_size: int = setting_types.number("side of the square images, px", int, 8, 1024)
    mean: tuple[float, ...] | None = setting_types.channels("mean of the channels", -1000)
    std: tuple[float, ...] | None = setting_types.channels("standard deviation of the channels", 1e-3)
    method: str = setting_types.choice("method of the student", "finetune", "frozen", "lwf", "lwf-mc", "lwm")
    loss_form: str | None = setting_types.choice("form of L_C and L_D", "binary", "softmax", "softmax-all")
    beta: float = setting_types.number("weight of L_D", float, 0)
    gamma: float = setting_types.number("weight of L_AD", float, 0)
    temperature: float = setting_types.number("temperature of softmax distillation", float, 0, above=True)
    attention: str = setting_types.choice(
        "what L_AD compares", "grad-cam", "signed", "through-features", "through-head", "new-class", "features"
    )
    attention_class: str = setting_types.choice("whose top old class the maps explain", "student", "teacher")
    batch_norm: str = setting_types.choice("batch-norm statistics of the student", "train", "frozen")
    epochs: int = setting_types.number("epochs", int, 0, 10_000)
    batch_size: int = setting_types.number("images in a batch", int, 2, 10**9)
    lr: float = setting_types.number("learning rate of the teacher", float, 0, above=True)
    incremental_lr: float = setting_types.number("learning rate of the student", float, 0, above=True)
    backbone_lr: float | None = setting_types.number("learning rate of everything but the head", float, 0, above=True)
    freeze: int = setting_types.number("the first so many stages of the network are not trained", int, 0)
    balanced: bool = setting_types.switch("draw the classes equally often")
    momentum: float = setting_types.number("momentum of SGD", float, 0, 0.999)
    weight_decay: float = setting_types.number("weight decay", float, 0)
    flip: bool = setting_types.switch("mirror training images at random")
    precision: str = setting_types.choice("arithmetic of the networks", "auto", "fp32", "bf16")
    cache_dir: str = setting_types.text("where the decoded images of a folder are kept; can be deleted")
    skip_bad_images: bool = setting_types.switch("skip and count images that cannot be read")
    hold_back: float = setting_types.number(
        "share of training images to judge on instead of the test images", float, 0, 0.5
    )
    seed: int = setting_types.number("seed of every random choice", int, 0, 2**32 - 1)
    device: str = setting_types.device("auto, cpu, mps, cuda or cuda:N")
    deterministic: bool = setting_types.switch("deterministic algorithms on a GPU, somewhat slower")
    statistics: bool = setting_types.switch("keep mean and covariance of the classes' features, for read-outs")
    readout: str = setting_types.choice("what answers", "auto", *READOUTS)
    save_interval: int = setting_types.number("epochs between saves", int, 1)
    save_interval_steps: int = setting_types.number(
        "steps of the optimiser between saves inside an epoch, 0 for none", int, 0
    )
    resume: bool = setting_types.switch("go on from the checkpoint of an earlier run")
    overwrite: bool = setting_types.switch("replace the model of an earlier run")
    quiet: bool = setting_types.switch("print nothing but warnings and errors")
    json: bool = setting_types.switch("a last line on stdout with the accuracies as one JSON object")
    tensorboard: bool = setting_types.switch("scalars, settings and maps for TensorBoard")
    output_dir: str = setting_types.text("where the outputs go")
    given: frozenset[str] = frozenset()  # the fields that the command line named
    arguments: tuple[str, ...] = ()  # the command line as it was given
    # Files, of the command line alone: empty where it does not name them.
    weights: str = ""
    old_classes_file: str = ""
    teacher: str = ""
    student: str = ""
    checkpoint: str = ""
    images: str = ""
    image: str = ""
    class_name: str | None = None
    layer: str | None = None
    output: str = "gradcam.png"

    def where(self, name: str) -> str:
        """The flag or the constant that a value comes from, as an error names it."""
        return _where(name, self.given | FILE_FLAGS.keys())

    @contextlib.contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """An error over the value of ``name``, raised by a module that knows only the value, names where it is from."""
        try:
            yield
        except (InputError, OSError) as error:  # of the system's: a path that is too long, a folder that is closed
            raise InputError(f"{self.where(name)}: {error}") from error


FILE_FLAGS = {
    "weights": "a torchvision state_dict to begin with, or imagenet for torchvision's own",
    "old_classes_file": "a text file with the old classes' names in the order of the outputs, a line each",
    "teacher": "checkpoint of the model before the step: a teacher, or the student of an earlier step",
    "student": "checkpoint of the student",
    "checkpoint": "any checkpoint of this project",
    "images": "a folder of your own images to judge, flat or with a subfolder for each class",
    "image": "the image to explain",
    "class_name": "the class to explain (default: the network's answer)",
    "layer": "the layer to look at (default: the last feature map)",
    "output": "the PNG to write (default: gradcam.png)",
}
_TRAINING = (
    "dataset data_dir method loss_form epochs batch_size backbone_lr freeze balanced momentum weight_decay flip "
    "precision cache_dir skip_bad_images hold_back seed device deterministic statistics save_interval "
    "save_interval_steps resume overwrite quiet json tensorboard output_dir"
)
SCRIPTS: dict[str, tuple[str, str, str]] = {  # script: fields of config.py, required files, other files
    "train_teacher_model": (f"old_classes model image_size mean std lr {_TRAINING}", "", "weights old_classes_file"),
    "incremental_learning_system": (
        f"new_classes incremental_lr beta gamma temperature attention attention_class batch_norm readout {_TRAINING}",
        "teacher",
        "student",
    ),
    "demo": (
        "dataset data_dir cache_dir skip_bad_images device readout quiet json output_dir",
        "teacher student",
        "images",
    ),
    "gradcam": ("readout", "checkpoint image", "class_name layer output"),
}

_OPTIONAL = ("mean", "std", "backbone_lr", "loss_form")  # None has a meaning of its own
METHOD_FORMS = {"finetune": "softmax-all", "lwf": "softmax", "lwf-mc": "binary"}  # the others take any
_SMALL_PHOTOS = {
    "model": "resnet32",
    "image_size": 32,
    "epochs": 20,
    "batch_size": 128,
    "lr": 0.1,
    "incremental_lr": 0.1,
    "weight_decay": 5e-4,
    "beta": 1.0,
    "gamma": 0.1,
    "flip": True,
}
# Chosen on other classes than those reported: docs/results-settings.md says how.
RECOMMENDED: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "resnet18",
        "image_size": 32,
        "epochs": 10,
        "batch_size": 64,
        "lr": 0.03,
        "incremental_lr": 0.0125,
        "weight_decay": 0.0,
        "beta": 1.0,
        "gamma": 0.1,
        "flip": False,
    },
    "cifar10": _SMALL_PHOTOS,
    "cifar100": _SMALL_PHOTOS,
    "folder": {**_SMALL_PHOTOS, "model": "resnet18", "image_size": 64},
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


def read_settings(script: str, argv: Sequence[str] | None = None, page: ModuleType | None = None) -> Settings:
    """The settings of one script. Raises InputError for the first value that the script reads and cannot use."""
    page = page or load_page()
    read, required, optional = (words.split() for words in SCRIPTS[script])
    arguments = vars(_parser(script, read, required, optional, page).parse_args(argv))
    known = [f for f in fields(Settings) if f.metadata]
    _check_page(page, {f.name.upper() for f in known})
    values: dict[str, Any] = {name: arguments.pop(name, None) for name in required + optional}
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in values.items():
        _checked(_flag(name), setting_types.check_text, value)
    if "old_classes_file" in values:
        arguments["old_classes"] = _lines_of(values["old_classes_file"], "old_classes" in arguments)
    for f in known:
        value = arguments.get(f.name, getattr(page, f.name.upper(), None))
        if isinstance(value, str) and f.name in arguments:
            value = _parsed(f.metadata["parse"], value)
        if value is not None and (f.name in read or f.name in arguments):
            value = _checked(_where(f.name, arguments), f.metadata["check"], value)
        values[f.name] = value
    if "quiet" in read and values["quiet"]:
        progress.be_quiet()
    values["given"] = frozenset(arguments)
    values["arguments"] = tuple(sys.argv[1:] if argv is None else argv)
    _resolve(values, read)
    if "output_dir" in read:
        require_folder(_where("output_dir", arguments), values["output_dir"])
        if "tensorboard" in read and values["tensorboard"]:
            require_folder(_where("tensorboard", arguments), Path(values["output_dir"]) / "tensorboard")
    return Settings(**values)


def readout_of(flag: str | None) -> str:
    """What ``--readout`` says, or else config.py. Raises InputError where that is none."""
    check = next(f for f in fields(Settings) if f.name == "readout").metadata["check"]
    if flag is None:
        return _checked(_where("readout", ()), check, getattr(load_page(), "READOUT", None))
    return _checked(_flag("readout"), check, flag)


def _lines_of(path: str, named_too: bool) -> list[str]:
    if named_too:
        raise InputError("--old-classes and --old-classes-file both name the old classes; leave one out")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is no text in UTF-8"
        raise InputError(
            f"--old-classes-file {path}: {reason}; a text file with a class name a line is needed"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def require_folder(where: str, folder: str | Path) -> None:
    """Raises InputError where ``folder`` is not there and cannot be made, before a run spends its hours. Makes nothing.

    ``where`` is the flag or the constant that names it.
    """
    for path in (Path(folder), *Path(folder).parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InputError(f"{where} is {_shown(str(folder))}: {error.strerror}; take another folder") from error
        if not path.is_dir():
            raise InputError(f"{where} is {_shown(str(folder))}: {path} is no folder; take another folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{where} is {_shown(str(folder))}: {path} cannot be written; take another folder")
        return


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


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        return text  # the check says what is needed


def _parser(script: str, read: list[str], required: list[str], optional: list[str], page: ModuleType) -> OneLineParser:
    parser = OneLineParser(prog=f"{script}.py", allow_abbrev=False, description=_DESCRIPTIONS[script])
    for name in required + optional:
        parser.add_argument(_flag(name), help=FILE_FLAGS[name], required=name in required)
    for f in fields(Settings):
        if not f.metadata:
            continue
        default = getattr(page, f.name.upper(), None)
        shown = _shown(default, lambda value: ",".join(map(str, value)) if isinstance(value, list) else str(value))
        if default is None:
            shown = "none" if f.name in _OPTIONAL else "recommended for the data set"
        help = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        parser.add_argument(
            _flag(f.name),
            default=argparse.SUPPRESS,
            help=help if f.name in read else argparse.SUPPRESS,
            **(
                {"action": argparse.BooleanOptionalAction}
                if f.metadata["parse"] is bool
                else {"metavar": f.name.upper()}
            ),
        )
    return parser


def cifar100_classes() -> list[str]:
    """All of them, in the order of their names, as config.py has them in groups of ten."""
    page = load_page()
    groups = [getattr(page, f"select_classes_{first}_{first + 10}") for first in range(0, 100, 10)]
    return [name for group in groups for name in group]


def load_page() -> ModuleType:
    """config.py. Raises InputError with the line where it cannot be read."""
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


def _check_page(page: ModuleType, known: set[str]) -> None:
    for name in vars(page):
        if name.isupper() and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"config.py: {name} is not a setting{hint}")
    for name in sorted(known):
        if not hasattr(page, name):
            raise InputError(f"config.py: {name} is missing; None stands for the recommended value")


def _resolve(values: dict[str, Any], read: list[str]) -> None:
    """Fill in what depends on other values: recommended ones, and the form that belongs to the method."""
    checks = {f.name: f.metadata["check"] for f in fields(Settings) if f.metadata}
    if "dataset" in read:
        _checked("config.py: DATASET", checks["dataset"], values["dataset"])
        for name, value in RECOMMENDED.get(values["dataset"], {}).items():
            if name in read and values[name] is None:
                values[name] = value
                print(f"{name.upper()} = {value} (recommended for {values['dataset']})")
    if "method" in read:
        form = METHOD_FORMS.get(values["method"])
        if form and values["loss_form"] not in (None, form):
            raise InputError(
                f"{_where('loss_form', values['given'])} is {values['loss_form']!r}, but method {values['method']} "
                f"is {form}; leave the loss form out, or take --method lwm"
            )
        values["loss_form"] = form or values["loss_form"]
        if values["loss_form"] is None and "old_classes" in read:  # a student takes its teacher's
            values["loss_form"] = "softmax" if values.get("weights") else "binary"
    if "epochs" in read and values["epochs"] == 0 and not values.get("weights"):
        raise InputError(
            f"{_where('epochs', values['given'])} is 0: nothing would be learned; only --weights need none"
        )
    for name in set(read) - set(_OPTIONAL):
        if values[name] is None:  # there is no recommended value: the check says what is needed
            _checked(_where(name, ()), checks[name], None)


_DESCRIPTIONS = {
    "train_teacher_model": "Train a network on the old classes and save it as teacher_model.pth.",
    "incremental_learning_system": "Teach a model new classes from their images alone; saves student_model.pth.",
    "demo": "Judge teacher and student on test images and show what they look at.",
    "gradcam": "Draw where a network looks for a class in an image.",
}
