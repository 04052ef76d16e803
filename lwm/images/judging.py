"""Which images may judge a class: never any that it was trained on.

The folders ``test`` and ``val`` are taken at their word. Images that a task set apart itself, out of a folder's
training images, are known by the hashes of their pixels, wherever they lie now.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lwm.images.batches import Images
from lwm.images.datasets import Place, Source, none_of, open_source, pixel_hash
from lwm.images.files import decode_all, decode_files, printable
from lwm.images.folders import SPLITS, Folder
from lwm.runtime.errors import InputError, listed, log

CHUNK = 250  # images in memory at a time while some are looked for


def find_test_images(
    tasks: Sequence[dict[str, Any]],
    image_size: int,
    skip_bad_images: bool = False,
    cache_dir: Path | None = None,
    here: Place | None = None,
    here_first: bool = False,
    source: Source | None = None,
    new: Sequence[str] = (),
) -> Images:
    """Images that may judge the classes of a checkpoint's ``tasks``, and those of ``source`` for its ``new`` classes.

    They come from where each task was judged, or from ``here``, the user's own place. Labels are positions in all
    these classes. Logs the names of those that no image may judge.
    """
    outputs = [name for task in tasks for name in task["classes"]] + list(new)
    opened = _Opened(image_size, skip_bad_images, cache_dir, source)
    asked: dict[int, tuple[Source, list[str]]] = {}  # read together: a mapped file is then not copied into memory
    parts: list[Images] = []
    for task in tasks:
        places = _places_of(task, tasks, here)
        sources = [each for place in (places[::-1] if here_first else places) if (each := opened.at(place))]
        if task["apart"]:
            parts.append(_recognised(sources, task, outputs, image_size))
            continue
        for name in task["classes"]:
            judge = next((each for each in sources if _may_judge(each, task) and each.has_test(name)), None)
            if judge:
                asked.setdefault(id(judge), (judge, []))[1].append(name)
    if source:
        asked.setdefault(id(source), (source, []))[1].extend(new)
    parts += [each.test(names, outputs) for each, names in asked.values()]
    parts = [part for part in parts if len(part.labels)]
    present = set(torch.cat([part.labels for part in parts]).tolist()) if parts else set()
    gone = [name for label, name in enumerate(outputs) if label not in present]
    if gone:
        log.info(f"no test images of {listed(gone)} are left: their accuracy is left empty")
    if len(parts) < 2:
        return parts[0] if parts else none_of(image_size)
    labels = torch.cat([part.labels for part in parts])
    order = labels.argsort(stable=True)
    return Images(torch.cat([part.pixels for part in parts])[order], labels[order])


class _Opened:
    """Sources that are there, each opened once."""

    def __init__(self, image_size: int, skip_bad_images: bool, cache_dir: Path | None, source: Source | None) -> None:
        self.how, self.sources = (image_size, skip_bad_images, cache_dir), dict[tuple, Source]()
        if source:
            self.sources[self._key(source.place)] = source

    def at(self, place: Place) -> Source | None:
        key = self._key(place)
        if key not in self.sources:
            same = next((each for each_key, each in self.sources.items() if each_key[:2] == key[:2]), None)
            try:
                self.sources[key] = dataclasses.replace(same, place=place) if same else open_source(place, *self.how)
            except InputError:
                return None
        return self.sources[key]

    @staticmethod
    def _key(place: Place) -> tuple[str, Path, float]:
        return place.dataset, Path(place.data_dir).resolve(), place.hold_back


def _places_of(task: dict[str, Any], tasks: Sequence[dict[str, Any]], here: Place | None) -> list[Place]:
    """Where images may lie that judge a task, the recorded places first.

    Of a network that was taken as it is nothing is recorded: any folder may have images of its classes, never a data
    set that happens to have classes of such names.
    """
    judged = [task["judged"]] if task["judged"] else [each["judged"] for each in tasks if each["judged"]]
    places = [Place(each["dataset"], each["data_dir"], task["hold_back"], download=False) for each in judged]
    if here and here.dataset in ("folder", task["judged"] and task["judged"]["dataset"]):
        places.append(here._replace(hold_back=task["hold_back"]))
    return [place for place in places if task["judged"] or place.dataset == "folder"]


def _may_judge(source: Source, task: dict[str, Any]) -> bool:
    """Whether the source's own test images are none that the task may have trained on."""
    if source.folder is None:
        return True
    had_test = task["judged"] and task["judged"]["split"] == "test"
    return not source.judges_by_train and (source.split == "test" or not had_test)


def _recognised(sources: Sequence[Source], task: dict[str, Any], outputs: Sequence[str], image_size: int) -> Images:
    """The images of a task's classes whose hashes it has kept. First those are read that would be set apart today."""
    left, pixels, labels = Counter(task["apart"]), [np.empty((0, 3, image_size, image_size), np.uint8)], []
    for files, decode in itertools.chain.from_iterable(_searches(source, task["classes"]) for source in sources):
        if not left:
            break
        read, bad = decode([path for path, _ in files])
        names = [name for index, (_, name) in enumerate(files) if index not in bad]
        known = []
        for index, image in enumerate(read):
            if left[key := pixel_hash(image)]:
                left -= Counter([key])
                known.append(index)
        pixels.append(read if len(known) == len(read) else read[known])
        labels += [outputs.index(names[index]) for index in known]
    if labels and left:
        about = f"{len(labels)} of the {len(task['apart'])} images that were set apart"
        log.info(f"{about} are left to judge {listed(task['classes'])}")
    whole = [part for part in pixels if len(part)] or pixels
    return Images(torch.from_numpy(whole[0] if len(whole) == 1 else np.concatenate(whole)), torch.tensor(labels).long())


def _searches(source: Source, classes: Sequence[str]) -> Iterator[tuple[list[tuple[Path, str]], Any]]:
    """Files with their classes, and what reads them; all other files of the classes only if these were not enough."""
    if source.folder is None:
        return
    likely = [(path, name) for name in classes for path in source.parts(name).test]
    if likely:
        yield likely, source.decode
    seen = {path for path, _ in likely}
    others = [(path, name) for name in classes for split in SPLITS for path in source.folder.files(split, name)]
    others = [each for each in others if each[0] not in seen]
    for first in range(0, len(others), CHUNK):
        yield others[first : first + CHUNK], lambda paths: decode_all(paths, source.image_size, skip_bad_images=True)


def read_own_images(
    root: Path, class_names: Sequence[str], image_size: int, skip_bad_images: bool
) -> tuple[Images, list[str]]:
    """A user's own images, in any layout of a folder, labelled by class; or flat, with the label -1.

    Returns the images and a caption for each. Raises InputError if there are no images of a class, nor flat ones.
    """
    try:
        folder = Folder(root)
    except InputError as error:
        raise InputError(f"--images {error}") from error
    split = next(split for split in ("test", "val", "train") if split in folder.at)
    files = {label: found for label, name in enumerate(class_names) if (found := folder.files(split, name))}
    flat = [] if files else folder.flat()
    folder.say_left_out(class_names, unknown=True)
    if len(folder.at) > 1:
        others = ", ".join(each for each in folder.at if each != split)
        log.info(f"{root}: the images of {split} are judged, not those of {others}")
    if folder.at[split] != root and split == "train":
        log.warning(f"{root}: the images of train are judged; accuracies on images that trained a network say little")
    if flat:
        kept, pixels = decode_files(flat, image_size, skip_bad_images)
        return Images(torch.from_numpy(pixels), torch.full((len(kept),), -1)), [printable(path.name) for path in kept]
    if not files:
        raise InputError(
            f"--images {root}: no folder with images, nor with a subfolder of images of a class that the student "
            f"knows ({listed(class_names)})"
        )
    gone = [name for label, name in enumerate(class_names) if label not in files]
    if gone:
        log.info(f"{root} has no images of {listed(gone)}: their accuracy is left empty")
    parts = [torch.from_numpy(decode_files(found, image_size, skip_bad_images)[1]) for found in files.values()]
    labels = torch.tensor([label for label, part in zip(files, parts, strict=True) for _ in part])
    return Images(torch.cat(parts), labels), [f"true: {class_names[label]}" for label in labels]
