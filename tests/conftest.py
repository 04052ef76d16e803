"""What the tests share: images, folders of them, checkpoints, short runs, a CIFAR archive."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import shutil
import signal
import tarfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from tinyruns import RUN, SMALL, first

import config
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import models
from lwm.images import datasets
from lwm.images.batches import Images
from lwm.reporting import plots
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError

hypothesis.settings.register_profile("project", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("project")
DIGITS = datasets.Place("digits", "")


def loss_settings(**changes: Any) -> types.SimpleNamespace:
    """The settings that a loss reads."""
    return types.SimpleNamespace(**({"loss_form": "binary", "beta": 1.0, "gamma": 1.0, "temperature": 2.0} | changes))


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


def contents(images: Images) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.pixels]


# Networks and checkpoints -----------------------------------------------------------------------------------------


def randomised(architecture: str, classes: int, image_size: int, seed: int = 0) -> models.Network:
    """A float64 network whose batch-norms are no longer at their plain initial values."""
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


def task_of(names: Sequence[str], **changes: Any) -> dict[str, Any]:
    """What a checkpoint says of a task, as far as a finished one needs it."""
    values = {"dataset": "digits", "data_dir": "data", "hold_back": 0.0, "epochs": 1, "group_accuracy": [50.0]}
    judged = {"dataset": "digits", "data_dir": "data", "split": "test"}
    values |= {"pretrained": False, "batch_size": 8, "judged": judged, "apart": [], "again": []}
    values |= {"images": 8, "seconds": 1.0, "answers": {}}
    return {"classes": list(names), "method": "lwm"} | values | changes


def checkpoint_of(model: torch.nn.Module, architecture: str, names: Sequence[str], image_size: int = 32, **changes):
    """A whole checkpoint of a network, without ``format`` and ``version``: ``checkpoint.save`` writes those."""
    return {
        "architecture": architecture,
        "stem": getattr(model, "stem", ""),
        "image_size": image_size,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "loss_form": "binary",
        "class_names": list(names),
        "tasks": [task_of(names)],
        "model": model.state_dict(),
        **{key: {} for key in checkpoint.OPTIONAL},
        "finished": True,
        "training": {},
    } | changes


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but an empty one is rendered in place of each, which is faster."""
    render = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *where, **how: render(Figure((1, 1)), *where, **how))


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
    """``run(role, folder, *flags)`` is the script's exit code."""

    def start(role: str, folder: Path, *flags: str) -> int:
        if role == "teacher":
            return trainer.main([*SMALL, *RUN, "--output-dir", str(folder), *flags])
        return incremental.main(["--teacher", str(first(whole)), *RUN, "--output-dir", str(folder), *flags])

    return start


# A browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    driver = shutil.which("chromedriver")
    if not driver or not shutil.which("chromium"):
        pytest.skip("there is no chromium with its driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *quiet):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


# A small archive in CIFAR's format --------------------------------------------------------------------------------


def cifar_pixels(kind: str, split: str, names: Sequence[str], per_class: int) -> tuple[np.ndarray, list[int]]:
    """The archive's images uint8 (n, 32, 32, 3) and their labels, class by class in turn."""
    generator = np.random.default_rng([len(names), per_class, len(kind), split == "train"])
    labels = [index % len(names) for index in range(per_class * len(names))]
    return generator.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8), labels


def cifar_archive(folder: Path, kind: str, names: Sequence[str], train: int, test: int) -> dict[str, Any]:
    """Write the archive of ``kind`` (cifar10 or cifar100); returns what torchvision's class says of it.

    ``train`` and ``test`` are images a class; the layout, the keys and the pickles are those of the real archives.
    """
    base, meta, label_key, names_key = "cifar-100-python", "meta", "fine_labels", "fine_label_names"
    files = {"train": ["train"], "test": ["test"]}
    if kind == "cifar10":  # which comes in several training batches
        base, meta, label_key, names_key = "cifar-10-batches-py", "batches.meta", "labels", "label_names"
        files = {"train": ["data_batch_1", "data_batch_2"], "test": ["test_batch"]}
    written = {meta: pickle.dumps({names_key: list(names)}, protocol=2)}
    for split, per_class in (("train", train), ("test", test)):
        pixels, labels = cifar_pixels(kind, split, names, per_class)
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)
        for title, part in zip(files[split], np.array_split(np.arange(len(labels)), len(files[split])), strict=True):
            content = {"data": rows[part], label_key: [labels[index] for index in part]}
            written[title] = pickle.dumps(content, protocol=2)
    archive = folder / f"{kind}-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for title, content in written.items():
            member = tarfile.TarInfo(f"{base}/{title}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    hashes = {title: hashlib.md5(content).hexdigest() for title, content in written.items()}
    return {
        "base_folder": base,
        "filename": archive.name,
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        **{f"{split}_list": [[title, hashes[title]] for title in titles] for split, titles in files.items()},
        "meta": {"filename": meta, "key": names_key, "md5": hashes[meta]},
    }


@pytest.fixture
def serve_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``serve_cifar(kind, names, train, test)`` makes a small archive, which torchvision then "downloads".

    Returns the path of the archive that is served; a test may spoil or remove it.
    """
    folder = tmp_path / "served"
    folder.mkdir()

    def download(url: str, root: str, filename: str, md5: str) -> None:
        Path(root).mkdir(parents=True, exist_ok=True)
        copy = shutil.copy(folder / filename, root)
        if not torchvision.datasets.utils.check_integrity(copy, md5):
            raise RuntimeError("File not found or corrupted.")

    def serve(kind: str, names: Sequence[str], train: int = 4, test: int = 2) -> Path:
        own = torchvision.datasets.CIFAR100 if kind == "cifar100" else torchvision.datasets.CIFAR10
        for name, value in cifar_archive(folder, kind, names, train, test).items():
            monkeypatch.setattr(own, name, value)
        return folder / own.filename

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    return serve
