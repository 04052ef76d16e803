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
from torch.nn import functional as F

from lwm.images.batches import Images
from lwm.images.cache import decoded
from lwm.images.files import decode_all
from lwm.images.folders import SPLITS, Folder, one_form, typical_side
from lwm.runtime.errors import InputError, listed, log

FOLDER_TEST_SHARE = 0.2  # of a folder that has no test images of its own
CALIBRATION_LEAST = 5  # training images of a class of which some can be set apart to calibrate by
DIGITS_TEST_SHARE = 0.25


class Place(NamedTuple):
    """Where images are: the name of a data set and the folder it lies in.

    ``hold_back`` is the share of the training images that stands in for the test images, so that settings can be
    chosen without looking at the test images. ``download`` is for the user's own settings: a place that a checkpoint
    records was named by the file's author, who is not to choose where something is written. ``calibration`` is the
    share of the training images that ``Source.held_back`` hands out.
    """

    dataset: str
    data_dir: str
    hold_back: float = 0.0
    download: bool = True
    calibration: float = 0.0


class Parts(NamedTuple):
    """What each image of a class is for; no image is for two things."""

    train: list[Any]
    test: list[Any]
    held_back: list[Any]


@dataclass
class Source:
    """The images of one place.

    ``listing(split, class)`` names the images of a class without reading them; ``decode(names)`` reads those it is
    given as uint8 (n, 3, H, W), and says by index what is wrong with each that cannot be read and is left out;
    ``key(name)`` is a text by which an image is set apart or not.
    """

    place: Place
    image_size: int
    classes: dict[str, list[str]]  # split -> class names; train is always there
    listing: Callable[[str, str], Sequence[Any]]
    decode: Callable[[Sequence[Any]], tuple[np.ndarray, dict[int, str]]]
    key: Callable[[Any], str] = str
    folder: Folder | None = None
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
        known = self.classes["train"]
        for name in wanted:
            if name in self.sealed:
                raise InputError(f"class {name!r} is an old class: its training images are not to be read")
            if one_form(name) not in known:
                self._say_left_out(wanted)
                near = [each for each in known if each.casefold() == name.casefold()]
                near += difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {listed(known) or 'none to train on'}"
                raise InputError(f"{_say(self.place)} has no class {name!r}{hint}")

    def test(self, wanted: Sequence[str], outputs: Sequence[str]) -> Images:
        """The test images (or those held back) of the classes ``wanted``. Raises InputError if one has none."""
        self.require_test(wanted)
        return self._read("test", wanted, outputs)

    def require_test(self, wanted: Sequence[str]) -> None:
        """Raises InputError for the first of these classes that has no test images. Logs what judges if not test."""
        for name in wanted:
            if not self.has_test(name):
                self._say_left_out(wanted)
                way_out = f"; add some, or take the folder {self.split} away" if self.split in SPLITS else ""
                raise InputError(f"{_say(self.place)} has no test images of class {name!r}{way_out}")
        if self.split == "val":
            log.info(f"{_say(self.place)}: there is no folder test, so the images of val judge")
        elif self.split == "apart":
            log.info(f"{_say(self.place)}: there is no folder test, so a fifth of the images is set apart to judge by")

    def has_test(self, name: str) -> bool:
        return bool(self.parts(name).test)

    def held_back(self, wanted: Sequence[str], outputs: Sequence[str]) -> Images:
        """Images that neither train nor judge, to calibrate by; perhaps none, of all or of some of the classes.

        Those of a folder's val if its test judges, else a share of the training images.
        """
        if self._has_val_to_hold_back and (without := [name for name in wanted if not self.parts(name).held_back]):
            log.info(f"{_say(self.place)} has no images in val of {listed(without)}")
        return self._read("held back", wanted, outputs)

    @property
    def split(self) -> str:
        """What judges: "test", "val", "apart" (a fifth of train), or "held back"."""
        if self.place.hold_back:
            return "held back"
        return next((split for split in ("test", "val") if split in self.classes), "apart")

    @property
    def judges_by_train(self) -> bool:
        """Whether the images that judge are set apart out of those for training."""
        return self.split == "apart" or (self.split == "held back" and not {"test", "val"} <= self.classes.keys())

    @property
    def _has_val_to_hold_back(self) -> bool:
        return {"test", "val"} <= self.classes.keys() and not self.place.hold_back

    def record(self, test: Images, first_label: int = 0) -> dict[str, Any]:
        """For a task's dict: what judged its classes, those from ``first_label`` on in ``test``.

        ``apart`` has the hashes of the images if only these tell them from a folder's training images.
        """
        by_hash = self.folder is not None and self.judges_by_train
        own = test.pixels[test.labels >= first_label] if by_hash else ()
        judged = {"dataset": self.place.dataset, "data_dir": str(Path(self.place.data_dir).resolve())}
        return {"judged": judged | {"split": self.split}, "apart": [pixel_hash(image.numpy()) for image in own]}

    def side(self, wanted: Sequence[str]) -> int | None:
        """The shorter side in px that the training images of these classes have as a rule, before they are scaled."""
        if self.folder is None:
            return 8 if self.place.dataset == "digits" else 32
        return typical_side([path for name in wanted for path in self.parts(name).train])

    def parts(self, name: str) -> Parts:
        """The images of a class, by what they are for; empty lists for a class that is not there."""
        name = one_form(name)
        there = [split if name in self.classes.get(split, ()) else None for split in SPLITS]
        train, val, test = ([*self.listing(split, name)] if split else [] for split in there)
        if not {"test", "val"} & self.classes.keys():
            test, train = self._set_apart(train, FOLDER_TEST_SHARE, "", least=1, most=len(train) - 1)
        elif "test" not in self.classes:
            test, val = val, []
        if self.place.hold_back:
            if not self.judges_by_train:
                test, val = val, []
            else:
                held_before = [math.ceil(index * self.place.hold_back) for index in range(len(train) + 1)]
                held = [after > before for before, after in itertools.pairwise(held_before)]
                test, train = (
                    [item for item, is_held in zip(train, held, strict=True) if is_held == wanted]
                    for wanted in (True, False)
                )
        if self._has_val_to_hold_back:
            return Parts(train, test, val)
        few = len(train) < CALIBRATION_LEAST or not self.place.calibration
        most = 0 if few else len(train) // 2
        held_back, train = self._set_apart(train, self.place.calibration, "calibration/", least=1, most=most)
        return Parts(train, test, held_back)

    def _set_apart(self, items: list[Any], share: float, prefix: str, least: int, most: int) -> tuple[list, list]:
        """The same split for every seed, machine and order; new images do not move it, save in a tiny class."""

        def drawn(item: Any) -> float:
            written = f"{prefix}{self.key(item)}".encode(errors="surrogateescape")  # a name need not be text
            return int.from_bytes(hashlib.sha256(written).digest()[:8], "big") / 2**64

        ranked = sorted((drawn(item), index) for index, item in enumerate(items))
        count = max(0, min(max(sum(number < share for number, _ in ranked), least), most))
        chosen = {items[index] for _, index in ranked[:count]}
        return [item for item in items if item in chosen], [item for item in items if item not in chosen]

    def _read(self, purpose: str, wanted: Sequence[str], outputs: Sequence[str]) -> Images:
        self._say_left_out(wanted)
        names = [getattr(self.parts(name), purpose.replace(" ", "_")) for name in wanted]
        self._require_enough(purpose, wanted, list(map(len, names)))
        everything = list(itertools.chain.from_iterable(names))
        if not everything:
            return none_of(self.image_size)
        pixels, bad = self.decode(everything)  # at once: one file of a cache
        starts = list(itertools.accumulate(map(len, names), initial=0))
        skipped = [sum(start <= index < end for index in bad) for start, end in itertools.pairwise(starts)]
        kept = [len(listed) - lost for listed, lost in zip(names, skipped, strict=True)]
        self._require_enough(purpose, wanted, kept)
        for name, count, lost in zip(wanted, kept, skipped, strict=True):
            if lost:
                about = f"{lost} of {count + lost} images ({purpose}) cannot be read and are skipped"
                log.warning(f"class {name!r} in {_say(self.place)}: {about}")
        labels = torch.tensor([list(outputs).index(name) for name in wanted])
        return Images(torch.from_numpy(pixels), labels.repeat_interleave(torch.tensor(kept)))

    def _require_enough(self, purpose: str, wanted: Sequence[str], counts: Sequence[int]) -> None:
        for name, count in zip(wanted, counts, strict=True):
            if count < {"train": 2, "test": 1, "held back": 0}[purpose]:
                about = f"class {name!r} in {_say(self.place)} has {count} images that can be read ({purpose})"
                raise InputError(f"{about}; two to train on and one to judge by are the least that works")

    def _say_left_out(self, wanted: Sequence[str]) -> None:
        if self.folder:
            for split, name in itertools.product(self.classes, wanted):
                self.folder.files(split, name)
            self.folder.say_left_out(wanted)


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
    """``Source.side`` of a folder, before an image size is chosen; None if it has no such images."""
    try:
        return open_source(place, 8).side(wanted) if place.dataset == "folder" else None
    except InputError:
        return None


def none_of(image_size: int) -> Images:
    return Images(torch.empty(0, 3, image_size, image_size, dtype=torch.uint8), torch.empty(0).long())


def pixel_hash(image: np.ndarray) -> str:
    """Of uint8 (3, H, W), 32 hexadecimal digits."""
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).hexdigest()


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

    both = {"train": names, "test": names}
    return Source(place, image_size, both, listing, lambda chosen: (pixels[chosen], {}))


def _cifar(place: Place, image_size: int) -> Source:
    """CIFAR-10 or -100 from torchvision's archive, or from a folder {train,test}/<class>/ that holds the same images.

    A class's images stand in the order of a hash of their pixels, so that both give equal batches.
    """
    names, of_class = (_cifar_folder if (Path(place.data_dir) / "train").is_dir() else _cifar_archive)(place)

    @functools.cache
    def in_order(split: str, name: str) -> np.ndarray:
        images = of_class(split, name)
        return images[sorted(range(len(images)), key=lambda row: pixel_hash(images[row]))]

    def listing(split: str, name: str) -> list[tuple[str, str, int]]:
        return [(split, name, row) for row in range(len(in_order(split, name)))]

    def decode(chosen: Sequence[tuple[str, str, int]]) -> tuple[np.ndarray, dict[int, str]]:
        return _resize(np.stack([in_order(split, name)[row] for split, name, row in chosen]), image_size), {}

    return Source(place, image_size, {"train": names, "test": names}, listing, decode)


OfClass = Callable[[str, str], np.ndarray]  # (split, class name) -> its images, uint8 (n, 3, 32, 32)


def _cifar_folder(place: Place) -> tuple[list[str], OfClass]:
    folder = Folder(Path(place.data_dir))

    def of_class(split: str, name: str) -> np.ndarray:
        return decode_all(folder.files(split, name), 32, skip_bad_images=False)[0]

    return folder.classes["train"], of_class


def _cifar_archive(place: Place) -> tuple[list[str], OfClass]:
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

    def of_class(split: str, name: str) -> np.ndarray:
        own = np.asarray(split_of(split).targets) == names.index(name)
        return np.ascontiguousarray(split_of(split).data[own].transpose(0, 3, 1, 2))

    return names, of_class


def _folder(place: Place, image_size: int, skip_bad_images: bool, cache_dir: Path | None) -> Source:
    """A folder in any layout that Folder reads; what judges, and what is set apart, by the hash of class and file."""
    folder = Folder(Path(place.data_dir))
    if not any(folder.classes.values()):
        root = folder.root
        raise InputError(f"{root}: no class in it; images belong in {root}/train/<class>/ or {root}/<class>/")

    def decode(paths: Sequence[Path]) -> tuple[np.ndarray, dict[int, str]]:
        if cache_dir:
            return decoded(paths, image_size, cache_dir, skip_bad_images)
        return decode_all(paths, image_size, skip_bad_images)

    def key(path: Path) -> str:
        return one_form(path.relative_to(folder.at["train"]).as_posix())

    classes = {"train": [], **folder.classes}
    return Source(place, image_size, classes, folder.files, decode, key, folder)
