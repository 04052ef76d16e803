"""Images by class name, as uint8 tensors, and their splits.

A ``Source`` is one place of images: the embedded digits, CIFAR-10 or -100, or a folder. It hands out the training
or the test images of the classes it is asked for, labelled by their position in the network's outputs. Classes
whose training images are gone by the rules of the game are sealed: a request for them is an error.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lwm.images.batches import Images
from lwm.images.cache import decoded
from lwm.images.files import decode_all, decode_files, image_files, printable
from lwm.runtime.errors import InputError, listed, log

FOLDER_TEST_SHARE = 0.2  # of a folder that has no test images of its own
DIGITS_TEST_SHARE = 0.25


class Place(NamedTuple):
    """Where images are: the name of a data set and the folder it lies in.

    ``hold_back`` is the share of the training images that stands in for the test images, so that settings can be
    chosen without looking at the test images. ``download`` is for the user's own settings: a place that a checkpoint
    records was named by the file's author, who is not to choose where something is written.
    """

    dataset: str
    data_dir: str
    hold_back: float = 0.0
    download: bool = True


@dataclass
class Source:
    """The images of one place.

    ``listing(split, class)`` names the images of a class without reading them; ``decode(names)`` reads those it is
    given as uint8 (n, 3, H, W), and says by index what is wrong with each that cannot be read and is left out.
    """

    place: Place
    classes: dict[str, list[str]]  # split -> class names
    listing: Callable[[str, str], Sequence[Any]]
    decode: Callable[[Sequence[Any]], tuple[np.ndarray, dict[int, str]]]
    sealed: set[str] = field(default_factory=set)

    def seal(self, class_names: Sequence[str]) -> None:
        """From now on the training images of these classes do not exist."""
        self.sealed.update(class_names)

    def train(self, wanted: Sequence[str], outputs: Sequence[str]) -> Images:
        """The training images of the classes ``wanted``, labelled by position in ``outputs``.

        Raises InputError for a sealed or unknown class, and for one with fewer than two training images.
        """
        self.require_classes(wanted)
        return self._read("train", wanted, outputs)

    def require_classes(self, wanted: Sequence[str]) -> None:
        """Raises InputError for the first of these classes that is sealed, or that has no training images."""
        for name in wanted:
            if name in self.sealed:
                raise InputError(f"class {name!r} is an old class: its training images are not to be read")
            if name not in self.classes["train"]:
                near = difflib.get_close_matches(name, self.classes["train"], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {listed(sorted(self.classes['train']))}"
                raise InputError(f"{_say(self.place)} has no class {name!r}{hint}")

    def test(self, wanted: Sequence[str], outputs: Sequence[str]) -> Images:
        """The test images (or those held back) of the classes ``wanted``. Raises InputError if one has none."""
        self.require_test(wanted)
        return self._read("test", wanted, outputs)

    def require_test(self, wanted: Sequence[str]) -> None:
        """Raises InputError for the first of these classes that has no test images."""
        for name in wanted:
            if not self.has_test(name):
                way_out = "add some, or remove the folder test, and a fifth of the training images is set apart"
                raise InputError(f"{_say(self.place)} has no test images of class {name!r}: {way_out}")

    def has_test(self, name: str) -> bool:
        return name in self.classes["train" if self.place.hold_back else "test"] and bool(self._chosen("test", name))

    def _read(self, split: str, wanted: Sequence[str], outputs: Sequence[str]) -> Images:
        names = [self._chosen(split, name) for name in wanted]
        self._require_enough(split, wanted, list(map(len, names)))
        pixels, bad = self.decode(list(itertools.chain.from_iterable(names)))  # at once: one file of a cache
        starts = list(itertools.accumulate(map(len, names), initial=0))
        skipped = [sum(start <= index < end for index in bad) for start, end in itertools.pairwise(starts)]
        kept = [len(listed) - lost for listed, lost in zip(names, skipped, strict=True)]
        self._require_enough(split, wanted, kept)
        for name, count, lost in zip(wanted, kept, skipped, strict=True):
            if lost:
                about = f"{lost} of {count + lost} images ({split}) cannot be read and are skipped"
                log.warning(f"class {name!r} in {_say(self.place)}: {about}")
        labels = torch.tensor([list(outputs).index(name) for name in wanted])
        return Images(torch.from_numpy(pixels), labels.repeat_interleave(torch.tensor(kept)))

    def _require_enough(self, split: str, wanted: Sequence[str], counts: Sequence[int]) -> None:
        for name, count in zip(wanted, counts, strict=True):
            if count < (2 if split == "train" else 1):
                about = f"class {name!r} in {_say(self.place)} has {count} images that can be read ({split})"
                raise InputError(f"{about}; two to train on and one to judge by are the least that works")

    def _chosen(self, split: str, name: str) -> Sequence:
        if not self.place.hold_back:
            return self.listing(split, name)
        names = self.listing("train", name)
        held_before = [math.ceil(index * self.place.hold_back) for index in range(len(names) + 1)]
        held = [after > before for before, after in itertools.pairwise(held_before)]
        return [item for item, is_held in zip(names, held, strict=True) if is_held == (split == "test")]


def open_source(place: Place, image_size: int, skip_bad_images: bool = False, cache_dir: Path | None = None) -> Source:
    """The images of a place at ``image_size`` px, square. Raises InputError if there are none.

    With ``cache_dir`` a folder's images are decoded once into a file there and mapped; otherwise into memory.
    """
    if place.dataset == "digits":
        return _digits(place, image_size)
    if place.dataset in ("cifar10", "cifar100"):
        return _cifar(place, image_size)
    if place.dataset == "folder":
        return _folder(place, image_size, skip_bad_images, cache_dir)
    raise InputError(f"no data set {place.dataset!r}: digits, cifar10, cifar100 and folder are known")


def side_of(place: Place, wanted: Sequence[str]) -> int | None:
    """STUB"""
    from PIL import Image

    if place.dataset != "folder" or not Path(place.data_dir, "train").is_dir():
        return None
    files = [p for name in wanted for p in Path(place.data_dir, "train", name).iterdir()]
    sides = sorted(min(Image.open(p).size) for p in files[:: max(1, len(files) // 50)])
    return sides[len(sides) // 2]


def test_places(tasks: Sequence[dict], here: Place, here_first: bool = False) -> dict[str, list[Place]]:
    """Where each class of a checkpoint's ``tasks`` may have test images: as recorded, to be read alone, and ``here``.

    What each task held back of its training images stays held back, wherever they lie now.
    """
    places: dict[str, list[Place]] = {}
    for task in tasks:
        recorded = Place(task["dataset"], task["data_dir"], task["hold_back"], download=False)
        candidates = [recorded, here._replace(hold_back=task["hold_back"])]
        places |= dict.fromkeys(task["classes"], candidates[::-1] if here_first else candidates)
    return places


def find_test_images(
    places: dict[str, list[Place]], image_size: int, skip_bad_images: bool, cache_dir: Path | None = None
) -> tuple[Images, list[str]]:
    """Test images of each class of ``places`` from the first of its places that still has them.

    Labels are positions in ``places``. Returns the images and the names of the classes that have none left.
    """
    opened: dict[Place, Source | None] = {}
    chosen: dict[Place, tuple[Source, list[str]]] = {}
    gone: list[str] = []
    for name, candidates in places.items():
        for place in candidates:
            if place not in opened:
                try:
                    opened[place] = open_source(place, image_size, skip_bad_images, cache_dir)
                except InputError:
                    opened[place] = None
            source = opened[place]
            if source is not None and source.has_test(name):
                chosen.setdefault(place, (source, []))[1].append(name)
                break
        else:
            gone.append(name)
    parts = [source.test(names, list(places)) for source, names in chosen.values()]
    if not parts:
        return Images(torch.empty(0, 3, image_size, image_size, dtype=torch.uint8), torch.empty(0).long()), gone
    if len(parts) == 1:  # perhaps a mapped file: not to be copied into memory
        return parts[0], gone
    labels = torch.cat([part.labels for part in parts])
    order = labels.argsort(stable=True)
    return Images(torch.cat([part.pixels for part in parts])[order], labels[order]), gone


def read_own_images(
    folder: Path, class_names: Sequence[str], image_size: int, skip_bad_images: bool
) -> tuple[Images, list[str], list[str]]:
    """A user's own images: ``folder/<class>/*`` labelled by class, or ``folder/*`` with the label -1.

    Returns the images, a caption for each, and the classes that have no image. Raises InputError if there are no
    images, or if no subfolder is named like a class.
    """
    flat = image_files(folder) if folder.is_dir() else []
    if flat:
        kept, pixels = decode_files(flat, image_size, skip_bad_images)
        captions = [printable(path.name) for path in kept]
        return Images(torch.from_numpy(pixels), torch.full((len(kept),), -1)), captions, list(class_names)
    parts: dict[int, Tensor] = {}
    for label, name in enumerate(class_names):
        files = image_files(folder / name) if (folder / name).is_dir() else []
        if files:
            parts[label] = torch.from_numpy(decode_files(files, image_size, skip_bad_images)[1])
    if not parts:
        raise InputError(
            f"--images {folder}: no folder with images, nor with a subfolder of images of a class that the student "
            f"knows ({listed(sorted(class_names))})"
        )
    labels = [label for label, part in parts.items() for _ in part]
    gone = [name for label, name in enumerate(class_names) if label not in parts]
    return (
        Images(torch.cat(list(parts.values())), torch.tensor(labels)),
        [f"true: {class_names[i]}" for i in labels],
        gone,
    )


def _say(place: Place) -> str:
    return place.dataset if place.dataset == "digits" else f"{place.dataset} in {place.data_dir}"


# The data sets ----------------------------------------------------------------------------------------------------


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    if pixels.shape[-1] == size:
        return pixels
    grown = F.interpolate(torch.from_numpy(pixels).float(), size=(size, size), mode="bilinear", antialias=True)
    return grown.round().clamp(0, 255).to(torch.uint8).numpy()


def _digits(place: Place, image_size: int) -> Source:
    """scikit-learn's digits: 1,797 images of 8x8, the last quarter of each class for testing.

    The file goes writer by writer (scikit-learn's user guide, "Recognizing hand-written digits" and its notes on
    cross-validation), so its end holds mostly other hands than its beginning: harder, and more honest, than a
    shuffled split.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)
    pixels = _resize(np.repeat(grey[:, None], 3, axis=1), image_size)
    names = [str(digit) for digit in range(10)]

    def listing(split: str, name: str) -> list[int]:
        rows = np.flatnonzero(digits.target == names.index(name))
        first_test = len(rows) - round(len(rows) * DIGITS_TEST_SHARE)
        return (rows[:first_test] if split == "train" else rows[first_test:]).tolist()

    return Source(place, {"train": names, "test": names}, listing, lambda chosen: (pixels[chosen], {}))


def _cifar(place: Place, image_size: int) -> Source:
    from torchvision import datasets

    kind = datasets.CIFAR100 if place.dataset == "cifar100" else datasets.CIFAR10
    made = place.download and not Path(place.data_dir).exists()
    where = hashlib.sha256(str(Path(place.data_dir).resolve()).encode()).hexdigest()[:16]
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"{place.dataset}-{where}.lock")

    @functools.cache
    def split_of(split: str) -> datasets.CIFAR10:
        with contextlib.suppress(OSError, RuntimeError):  # the usual case: it is there
            return kind(place.data_dir, train=split == "train")
        try:
            # Of several processes of a machine one downloads, and the others wait.
            with lock if place.download else contextlib.nullcontext():
                return kind(place.data_dir, train=split == "train", download=place.download)
        except (OSError, RuntimeError) as error:
            if made:
                with contextlib.suppress(OSError):  # it stays if something was downloaded to it
                    Path(place.data_dir).rmdir()
            about = f"{place.dataset}: not in {place.data_dir}, and not downloaded to there ({error})"
            raise InputError(f"{about}; put {kind.filename} there and run again") from error

    names = split_of("train").classes

    def listing(split: str, name: str) -> list[tuple[str, int]]:
        targets = np.asarray(split_of(split).targets)
        return [(split, row) for row in np.flatnonzero(targets == names.index(name)).tolist()]

    def decode(chosen: Sequence[tuple[str, int]]) -> tuple[np.ndarray, dict[int, str]]:
        pixels = np.stack([split_of(split).data[row] for split, row in chosen])
        return np.ascontiguousarray(_resize(pixels.transpose(0, 3, 1, 2), image_size)), {}

    return Source(place, {"train": names, "test": names}, listing, decode)


def _folder(place: Place, image_size: int, skip_bad_images: bool, cache_dir: Path | None) -> Source:
    """``DATA_DIR/{train,test}/<class>/*``; without test, a fixed share of the training images by hash of the name."""
    root = Path(place.data_dir)
    if not (root / "train").is_dir():
        raise InputError(f"{root}: no folder train in it; images belong in {root / 'train'}/<class>/")
    has_test = (root / "test").is_dir()

    def class_names(split: str) -> list[str]:
        return sorted(entry.name for entry in (root / split).iterdir() if entry.is_dir())

    def listing(split: str, name: str) -> list[Path]:
        if has_test:
            return image_files(root / split / name)
        return _hash_split(image_files(root / "train" / name), name)[split]

    def decode(paths: Sequence[Path]) -> tuple[np.ndarray, dict[int, str]]:
        if cache_dir:
            return decoded(paths, image_size, cache_dir, skip_bad_images)
        return decode_all(paths, image_size, skip_bad_images)

    train = class_names("train")
    classes = {"train": train, "test": class_names("test") if has_test else train}
    return Source(place, classes, listing, decode)


def _hash_split(paths: list[Path], name: str) -> dict[str, list[Path]]:
    """The same split for every seed, machine and order of the files; new files do not move it, save in a tiny class."""

    def share(path: Path) -> float:
        written = f"{name}/{path.name}".encode(errors="surrogateescape")  # a name need not be text
        return int.from_bytes(hashlib.sha256(written).digest()[:8], "big") / 2**64

    ranked = sorted(paths, key=share)
    tests = sum(share(path) < FOLDER_TEST_SHARE for path in ranked)
    tests = min(max(tests, 1), len(ranked) - 1)
    return {"test": sorted(ranked[:tests]), "train": sorted(ranked[tests:])}
