"""What a folder holds: the image files of each class and split, and what is left out. Needs no torch.

    root/{train,val,test}/<class>/...        root/<class>/...        images at any depth below a class

``train``, ``val`` and ``test`` are splits if they hold folders, and classes otherwise. Hidden files and folders do not
count. A class has one name, in whatever Unicode form a file system keeps it.
"""

from __future__ import annotations

import os
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lwm.images.files import is_image, printable, shorter_side
from lwm.runtime.errors import InputError, listed, log

SPLITS = ("train", "val", "test")
SIDES = 50  # files that are opened to learn how large a folder's images are


class Folder:
    """The images under ``root``; ``at`` has the folder of each split, where root/<class>/ alone counts as train.

    ``classes`` has the names of each split's classes. Raises InputError if the root is no folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: is no folder; name one with images in {root}/train/<class>/ or {root}/<class>/")
        folders, files = _entries(root)
        splits = {each.name: each for each in folders if each.name in SPLITS and _entries(each)[0]}
        self.root, self.at = root, splits or {"train": root}
        self._flat, self._left = [path for path in files if is_image(path.name)], _LeftOut(root)
        if splits:
            self._left.beside_splits = [each.name for each in folders if each.name not in splits]
            self._left.beside_classes = len(files)
        self._folders: dict[tuple[str, str], list[Path]] = {}
        self._files: dict[tuple[str, str], list[Path]] = {}
        for split, place in self.at.items():
            inner, files = _entries(place)
            self._left.beside_classes += len(files)
            for each in inner:
                self._folders.setdefault((split, one_form(each.name)), []).append(each)
        self.classes = {split: sorted(name for of, name in self._folders if of == split) for split in self.at}

    def files(self, split: str, name: str) -> list[Path]:
        """The image files of a class, in the order of their names; none if it has no folder."""
        key = (split, one_form(name))
        if key not in self._files:
            self._files[key] = sorted(path for top in self._folders.get(key, ()) for path in _below(top, self._left))
        return self._files[key]

    def flat(self) -> list[Path]:
        """The images that lie in the root itself, which are left out no longer."""
        self._left.beside_classes -= len(self._flat)
        return self._flat

    def say_left_out(self, wanted: Iterable[str], unknown: bool = False) -> None:
        """Log in one line what was left out since the last time; with ``unknown`` also classes beyond ``wanted``."""
        names = {one_form(name) for name in wanted}
        folded = {name.casefold() for name in names}
        others = sorted({name for _, name in self._folders} - names)
        self._left.case = [name for name in others if name.casefold() in folded]
        self._left.unknown = [name for name in others if name.casefold() not in folded] if unknown else []
        self._left.say()


class _LeftOut:
    """Counts and names of what is not used, and the line that says it."""

    def __init__(self, root: Path) -> None:
        self.root, self.no_images, self.twice, self.beside_classes = root, Counter[str](), 0, 0
        self.beside_splits, self.case, self.unknown = list[str](), list[str](), list[str]()
        self._said = set[str]()

    def say(self) -> None:
        kinds = ", ".join(suffix for suffix, _ in self.no_images.most_common(3))
        parts = [
            f"{what}: {count}"
            for what, count in (
                (f"files that are no images ({kinds})", self.no_images.total()),
                ("files beside the class folders", self.beside_classes),
                ("folders that a link leads to again", self.twice),
            )
            if count
        ]
        for what, names in (
            ("folders beside the splits", self.beside_splits),
            ("folders whose names differ in case from a class's", self.case),
            ("folders of unknown classes", self.unknown),
        ):
            new = [name for name in names if name not in self._said]
            self._said.update(new)
            parts += [f"{what}: {len(new)} ({listed(new)})"] if new else []
        if parts:
            log.info(printable(f"{self.root}: left out are {', '.join(parts)}"))
        self.no_images, self.twice, self.beside_classes = Counter(), 0, 0


def images_below(top: Path) -> list[Path]:
    """The image files at any depth of a folder, in the order of their names; logs what is left out."""
    left = _LeftOut(top)
    found = sorted(_below(top, left))
    left.say()
    return found


def typical_side(paths: Sequence[Path]) -> int | None:
    """The median shorter side in px of some of the files, spread evenly; None if none of them can be read."""
    sides = [side for path in paths[:: -(-len(paths) // SIDES) or 1] if (side := shorter_side(path))]
    return int(statistics.median(sides)) if sides else None


def one_form(name: str) -> str:
    """The name in Unicode's composed form: macOS may decompose what was typed."""
    return unicodedata.normalize("NFC", name)


def _below(top: Path, left: _LeftOut) -> list[Path]:
    """Links are followed, but to no folder twice, nor to one that contains ``top``: that would never end."""
    parent, open_folders, images = top.parent.resolve(), [top], list[Path]()
    seen = {*top.resolve().parents, parent, *parent.parents}
    while open_folders:
        folder = open_folders.pop()
        real = folder.resolve()
        if real in seen:
            left.twice += 1
            continue
        seen.add(real)
        folders, files = _entries(folder)
        open_folders += reversed(folders)
        images += [path for path in files if is_image(path.name)]
        left.no_images.update(path.suffix or "without suffix" for path in files if not is_image(path.name))
    return images


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders in a folder and all else, without hidden ones, by name.

    All else has pipes, devices and dead links too: of an image's name, they are named or counted as it is decoded.
    """
    folders, files = list[Path](), list[Path]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                (folders if is_folder else files).append(folder / entry.name)
    return sorted(folders), sorted(files)
