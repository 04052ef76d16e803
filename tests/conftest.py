"""What the tests share: images, folders of them, a protocol, a CIFAR archive, settings without a command line."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import pickle
import signal
import tarfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tinyruns import RUN, SMALL, first

import config
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import models
from lwm.experiments.protocols import METHODS, Protocol
from lwm.images import datasets
from lwm.reporting import plots
from lwm.runtime.errors import InputError

hypothesis.settings.register_profile("project", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("project")
DIGITS = datasets.Place("digits", "")


def loss_settings(**changes: Any) -> types.SimpleNamespace:
    """The settings that a loss reads."""
    values = {
        "loss_form": "binary",
        "beta": 1.0,
        "gamma": 1.0,
        "temperature": 2.0,
        "attention": "grad-cam",
        "attention_class": "student",
    }
    return types.SimpleNamespace(**(values | changes))


def page(**changes: Any) -> types.SimpleNamespace:
    """A copy of config.py's constants, with changes; a value of ``...`` takes the constant out."""
    values = {name: value for name, value in vars(config).items() if name.isupper()} | changes
    return types.SimpleNamespace(**{name: value for name, value in values.items() if value is not ...})


def picture(seed: int, width: int = 16, height: int = 16) -> np.ndarray:
    """A smooth uint8 (height, width, 3) image, different in every corner, so that lossy formats keep it."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))


def write_images(folder: Path, count: int, seed: int = 0, size: int = 16, suffix: str = ".png") -> list[Path]:
    """``count`` images 000, 001, ... in a folder that is made for them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03}{suffix}" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(picture(1000 * seed + index, size, size)).save(path)
    return paths


def image_folder(root: Path, train: dict[str, int], test: dict[str, int] | None = None) -> Path:
    """The ``folder`` layout, with so many images of each class."""
    for number, (split, counts) in enumerate((("train", train), ("test", test or {}))):
        for index, (name, count) in enumerate(counts.items()):
            write_images(root / split / name, count, seed=100 * number + index)
    return root


@functools.cache
def digits(hold_back: float = 0.0) -> datasets.Source:
    return datasets.open_source(DIGITS._replace(hold_back=hold_back), 32)


def folder_source(root: Path, size: int = 16, hold_back: float = 0.0, skip_bad_images: bool = False) -> datasets.Source:
    return datasets.open_source(datasets.Place("folder", str(root), hold_back), size, skip_bad_images)


def refused(call: Callable, *arguments: Any, **named: Any) -> str:
    """The one line with which ``call`` refuses its arguments."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **named)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def contents(images: datasets.Images) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.pixels]


def step_of(names: Sequence[str], **changes: Any) -> dict[str, Any]:
    """What a checkpoint says of a step, as far as a reader needs it."""
    values = {"dataset": "digits", "data_dir": "data", "hold_back": 0.0, "epochs": 1, "group_accuracy": [50.0]}
    return {"classes": list(names), "method": "lwm"} | values | changes


def checkpoint_of(model: torch.nn.Module, architecture: str, names: Sequence[str], image_size: int = 32, **changes):
    """A whole checkpoint of a network, without ``format`` and ``version``: ``checkpoint.save`` writes those."""
    return {
        "architecture": architecture,
        "image_size": image_size,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "loss_form": "binary",
        "class_names": list(names),
        "steps": [step_of(names)],
        "model": model.state_dict(),
        "statistics": {},
        "readouts": {},
        "finished": True,
        "training": {},
    } | changes


def training_of(model: torch.nn.Module, epochs: int = 2, **changes: Any) -> dict[str, Any]:
    """The training state of a run that was stopped in its second epoch; the network makes one step for it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * epochs)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    schedule.step()
    random = torch.Generator().manual_seed(0).get_state()
    return {
        "epochs": epochs,
        "teacher": "",
        "images": "8, abc",
        "machine": {"device": "cpu", "threads": 2},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "generator": random,
        "torch_rng": random,
        "device_rng": None,
        "log": [{"epoch": 1, "loss": 0.5, "accuracy": 60.0, "lr": 0.1, "test_accuracy": 55.5}],
        "position": {"batches": 3, "order": random, "learning_rate": 0.05, "seconds": 1.5, "sums": {"total": 7.0}},
    } | changes


@pytest.fixture
def example() -> dict[str, Any]:
    """A whole checkpoint of two classes."""
    torch.manual_seed(0)
    return checkpoint_of(models.build("resnet32", 2, 32), "resnet32", ["b", "a"])


@pytest.fixture(scope="module")
def unfinished() -> dict[str, Any]:
    """That of a run that was stopped inside an epoch. Not to be changed: ``checkpointfiles.put`` makes a copy."""
    model = models.build("resnet32", 2, 32)
    return checkpoint_of(model, "resnet32", ["b", "a"], finished=False, training=training_of(model))


def randomised(architecture: str, classes: int, image_size: int, seed: int = 0) -> torch.nn.Module:
    """A float64 network whose batch-norms and head are no longer at their plain initial values."""
    torch.manual_seed(seed)
    model = models.build(architecture, classes, image_size).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.7, 1.3)
                module.bias.uniform_(-0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.8, 1.2)
    return model


# Protocols of the digits ------------------------------------------------------------------------------------------

FIVE = Protocol("about", "digits", slice(0, 10), (2,) * 5, "--epochs 1", METHODS, order=None, shuffle=True)
TINY = Protocol(
    about="digits in three steps",
    dataset="digits",
    order=None,
    pool=slice(0, 6),
    groups=(2, 2, 2),
    flags="--model resnet32 --image-size 8 --epochs 1",
    methods={"lwf": "--method lwf", "lwm": "--method lwm"},
)
TINY_FORMS = {"lwf": "softmax", "lwm": "binary"}


def run_tiny(cells: Path, method: str) -> None:
    """Seed 0 of a method of TINY, in the folders in which reproduce.py leaves it."""
    flags = [*TINY.flags.split(), "--dataset", "digits", "--seed", "0"]
    form = TINY_FORMS[method]
    model = cells / f"first-{form}" / "teacher_model.pth"
    trainer.main([*flags, "--old-classes", "0,1", "--loss-form", form, "--output-dir", str(model.parent)])
    for number, new in ((1, "2,3"), (2, "4,5")):
        more = ["--method", method, "--teacher", str(model), "--new-classes", new]
        model = cells / method / str(number) / "student_model.pth"
        incremental.main([*flags, *more, "--output-dir", str(model.parent)])


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but an empty one is rendered in place of each, which is faster."""
    render = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *where, **how: render(Figure((1, 1)), *where, **how))


# Runs that are stopped and gone on with --------------------------------------------------------------------------


@pytest.fixture
def small_and_heeding_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as the children of these tests have; no figures; and no SIGINT that a background shell ignores."""
    monkeypatch.setattr(plots, "curves", lambda *arguments: None)
    threads, handler = torch.get_num_threads(), signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished teacher in ``first``, and a teacher and a student that were left alone, both of ``RUN``."""
    folder, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)
    assert trainer.main([*SMALL, "--epochs", "1", "--output-dir", str(folder / "first")]) == 0
    assert trainer.main([*SMALL, *RUN, "--output-dir", str(folder)]) == 0
    assert incremental.main(["--teacher", str(first(folder)), *RUN, "--output-dir", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def run(whole: Path) -> Callable[..., int]:
    """``run(kind, folder, *flags)`` is the script's exit code."""

    def start(kind: str, folder: Path, *flags: str) -> int:
        if kind == "teacher":
            return trainer.main([*SMALL, *RUN, "--output-dir", str(folder), *flags])
        return incremental.main(["--teacher", str(first(whole)), *RUN, "--output-dir", str(folder), *flags])

    return start


# A small archive in CIFAR's format --------------------------------------------------------------------------------


def _pickled(content: dict[str, Any]) -> bytes:
    return pickle.dumps(content, protocol=2)


def cifar_pixels(kind: str, split: str, names: Sequence[str], per_class: int) -> tuple[np.ndarray, list[int]]:
    """The archive's images uint8 (n, 32, 32, 3) and their labels, class by class in turn."""
    generator = np.random.default_rng([len(names), per_class, len(kind), split == "train"])
    labels = [index % len(names) for index in range(per_class * len(names))]
    return generator.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8), labels


def cifar_archive(folder: Path, kind: str, names: Sequence[str], train: int, test: int) -> dict[str, Any]:
    """Write the archive of ``kind`` (cifar10 or cifar100); returns all that torchvision's class says of it but its URL.

    ``train`` and ``test`` are images a class; the layout, the keys and the pickles are those of the real archives.
    """
    base = "cifar-100-python" if kind == "cifar100" else "cifar-10-batches-py"
    label_key, names_key = ("fine_labels", "fine_label_names") if kind == "cifar100" else ("labels", "label_names")
    files: dict[str, bytes] = {}
    lists: dict[str, list[list[str]]] = {"train": [], "test": []}
    for split, per_class in (("train", train), ("test", test)):
        pixels, labels = cifar_pixels(kind, split, names, per_class)
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)
        # CIFAR-10 comes in several training batches, CIFAR-100 in one.
        parts = [slice(None)]
        if kind == "cifar10" and split == "train":
            parts = [slice(0, len(labels) // 2), slice(len(labels) // 2, None)]
        for number, part in enumerate(parts):
            title = split
            if kind == "cifar10":
                title = f"data_batch_{number + 1}" if split == "train" else "test_batch"
            files[title] = _pickled({"data": rows[part], label_key: labels[part]})
            lists[split].append([title, hashlib.md5(files[title]).hexdigest()])
    meta = "meta" if kind == "cifar100" else "batches.meta"
    files[meta] = _pickled({names_key: list(names)})
    archive = folder / f"{kind}-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for title, content in files.items():
            member = tarfile.TarInfo(f"{base}/{title}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {
        "base_folder": base,
        "filename": archive.name,
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        "train_list": lists["train"],
        "test_list": lists["test"],
        "meta": {"filename": meta, "key": names_key, "md5": hashlib.md5(files[meta]).hexdigest()},
    }


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def serve_cifar(tmp_path, monkeypatch):
    """``serve_cifar(kind, names, train, test)`` makes a small archive, from which torchvision then downloads.

    Returns the path of the archive that is served; a test may spoil or remove it. (torchvision asks the response for
    its length, which that of a file: URL has not: so a server on this machine.)
    """
    from torchvision import datasets

    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def serve(kind: str, names: Sequence[str], train: int = 4, test: int = 2) -> Path:
        attributes = cifar_archive(folder, kind, names, train, test)
        attributes["url"] = f"http://127.0.0.1:{server.server_port}/{attributes['filename']}"
        for name, value in attributes.items():
            monkeypatch.setattr(datasets.CIFAR100 if kind == "cifar100" else datasets.CIFAR10, name, value)
        return folder / attributes["filename"]

    yield serve
    server.shutdown()
    server.server_close()
    thread.join()
