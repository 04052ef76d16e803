"""CIFAR: a small archive in the real layout is downloaded, read, and refused if it is not what it should be."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from conftest import cifar_pixels, refused, task_of
from PIL import Image

from lwm.images.datasets import Place, open_source
from lwm.images.judging import find_test_images

CIFAR_NAMES = {"cifar100": ["apple", "aquarium_fish", "baby", "bear", "worm"], "cifar10": ["airplane", "cat", "truck"]}


@pytest.mark.parametrize("kind", CIFAR_NAMES)
def test_cifar_is_downloaded_and_read(tmp_path, serve_cifar, kind):
    names = CIFAR_NAMES[kind]
    archive = serve_cifar(kind, names, train=4, test=2)
    place = Place(kind, str(tmp_path / "data"))
    source = open_source(place, 32)
    outputs = [names[2], names[0]]
    for split, per_class in (("train", 4), ("test", 2)):
        images = getattr(source, split)(outputs, outputs)
        pixels, labels = cifar_pixels(kind, split, names, per_class)
        assert images.labels.tolist() == [0] * per_class + [1] * per_class
        expected = [pixels[i] for name in outputs for i, label in enumerate(labels) if names[label] == name]
        read = images.pixels.numpy().transpose(0, 2, 3, 1)
        for first in (0, per_class):  # of a class the order is that of a hash
            own = slice(first, first + per_class)
            np.testing.assert_array_equal(sorted(read[own].tolist()), sorted(np.stack(expected[own]).tolist()))
    assert repr(names[0]) in refused(source.train, [names[0][:-1]], [names[0][:-1]])
    archive.unlink()  # the second time no network is needed
    assert open_source(place, 16).test([names[0]], [names[0]]).pixels.shape == (2, 3, 16, 16)


def test_archive_and_folder_give_the_same_images_in_the_same_order(tmp_path, serve_cifar):
    names = CIFAR_NAMES["cifar100"]
    serve_cifar("cifar100", names, train=6, test=2)
    generator = np.random.default_rng(0)
    for split, per_class in (("train", 6), ("test", 2)):
        pixels, labels = cifar_pixels("cifar100", split, names, per_class)
        for number in generator.permutation(len(labels)):  # files have an order of their own
            folder = tmp_path / "folder" / split / names[labels[number]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[number]).save(folder / f"{generator.integers(10**9):09}.png")
    for hold_back in (0.0, 0.3):
        place = Place("cifar100", str(tmp_path / "archive"), hold_back=hold_back, calibration=0.2)
        sources = [open_source(place._replace(data_dir=str(tmp_path / each)), 32) for each in ("archive", "folder")]
        for part in ("train", "test", "held_back"):
            archive, folder = (getattr(source, part)(names, names) for source in sources)
            assert torch.equal(archive.pixels, folder.pixels), part
            assert torch.equal(archive.labels, folder.labels)
    assert [len(sources[0].train(names[:1], names).pixels), len(sources[0].test(names, names).pixels)] == [4, 10]


def test_of_several_at_the_same_time_one_downloads_while_the_others_wait(tmp_path, serve_cifar, monkeypatch):
    serve_cifar("cifar100", CIFAR_NAMES["cifar100"])
    download, downloads = torchvision.datasets.utils.download_url, []

    def slowly(*arguments):
        downloads.append(arguments)
        time.sleep(0.2)
        download(*arguments)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", slowly)
    with ThreadPoolExecutor() as pool:
        opened = [pool.submit(open_source, Place("cifar100", str(tmp_path / "data")), 32) for _ in range(3)]
    assert [len(source.result().classes["train"]) for source in opened] == [5, 5, 5]
    assert len(downloads) == 1


def test_a_failed_download_is_one_line(tmp_path, serve_cifar):
    archive = serve_cifar("cifar100", CIFAR_NAMES["cifar100"])
    assert "no-folder" in refused(open_source, Place("cifar100", str(archive / "no-folder")), 32)
    archive.write_bytes(b"<html>a login page</html>")
    assert archive.name in refused(open_source, Place("cifar100", str(tmp_path / "data")), 32)
    archive.unlink()
    assert archive.name in refused(open_source, Place("cifar100", str(tmp_path / "fresh")), 32)
    assert not (tmp_path / "fresh").exists()


def test_nothing_is_downloaded_to_a_place_that_only_a_checkpoint_names(tmp_path, serve_cifar):
    names, theirs = CIFAR_NAMES["cifar100"], tmp_path / "theirs"
    serve_cifar("cifar100", names)
    judged = {"dataset": "cifar100", "data_dir": str(theirs), "split": "test"}
    tasks = [task_of(names, judged=judged)]

    def found(dataset: str, folder: str) -> list[int]:
        return find_test_images(tasks, 32, here=Place(dataset, str(tmp_path / folder))).labels.unique().tolist()

    assert found("folder", "nowhere") == []
    assert found("cifar100", "mine") == [0, 1, 2, 3, 4]
    assert not theirs.exists()
    shutil.move(tmp_path / "mine", theirs)  # what lies there already is read
    assert found("folder", "nowhere") == [0, 1, 2, 3, 4]
