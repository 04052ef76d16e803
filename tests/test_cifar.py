"""CIFAR: a small archive in the real layout is downloaded, read, and refused where it is not what it should be."""

from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest
from conftest import cifar_pixels, refused

from lwm.images import datasets
from lwm.images.datasets import Place, open_source

CIFAR_NAMES = {"cifar100": ["apple", "aquarium_fish", "baby", "bear", "worm"], "cifar10": ["airplane", "cat", "truck"]}


@pytest.mark.parametrize("kind", CIFAR_NAMES)
def test_cifar_is_downloaded_and_read(tmp_path, serve_cifar, kind):
    names = CIFAR_NAMES[kind]
    archive = serve_cifar(kind, names, train=4, test=2)
    place = Place(kind, str(tmp_path / "data"))
    source = open_source(place, 32)
    assert (tmp_path / "data" / archive.name).is_file()
    outputs = [names[2], names[0]]
    for split, per_class in (("train", 4), ("test", 2)):
        images = getattr(source, split)(outputs, outputs)
        pixels, labels = cifar_pixels(kind, split, names, per_class)
        assert images.labels.tolist() == [0] * per_class + [1] * per_class
        expected = [pixels[i] for name in outputs for i, label in enumerate(labels) if names[label] == name]
        np.testing.assert_array_equal(images.pixels.numpy().transpose(0, 2, 3, 1), np.stack(expected))
    assert repr(names[0]) in refused(source.train, [names[0][:-1]], [names[0][:-1]])
    # The second time it is there: no network is needed.
    archive.unlink()
    assert len(open_source(place, 16).test([names[0]], [names[0]]).labels) == 2
    assert open_source(place, 16).test([names[0]], [names[0]]).pixels.shape == (2, 3, 16, 16)


def test_of_several_processes_one_downloads_while_the_others_wait(tmp_path, serve_cifar, monkeypatch):
    names = CIFAR_NAMES["cifar100"]
    archive = serve_cifar("cifar100", names)
    asked = []

    @contextlib.contextmanager
    def held(path, what, wait=False):
        asked.append(wait)
        assert not (tmp_path / "data" / archive.name).exists()
        yield
        assert (tmp_path / "data" / archive.name).exists()

    monkeypatch.setattr(datasets, "held", held)
    for _ in range(2):  # once it is there nobody waits
        open_source(Place("cifar100", str(tmp_path / "data")), 32).train(names[:1], names)
    assert asked[0] is True
    assert len(asked) == 1


@pytest.mark.parametrize("kind", CIFAR_NAMES)
def test_a_failed_download_is_one_line(tmp_path, serve_cifar, kind):
    archive = serve_cifar(kind, CIFAR_NAMES[kind])
    archive.unlink()
    text = refused(open_source, Place(kind, str(tmp_path / "data")), 32)
    assert kind in text
    assert archive.name in text
    assert str(tmp_path / "data") in text
    assert not (tmp_path / "data").exists()


def test_a_download_of_something_else_is_one_line(tmp_path, serve_cifar):
    archive = serve_cifar("cifar100", CIFAR_NAMES["cifar100"])
    archive.write_bytes(b"<html>a login page</html>")
    assert "cifar100" in refused(open_source, Place("cifar100", str(tmp_path / "data")), 32)


def test_a_data_folder_that_cannot_be_made_is_one_line(tmp_path, serve_cifar):
    serve_cifar("cifar100", CIFAR_NAMES["cifar100"])
    (tmp_path / "file").write_text("no folder")
    assert "cifar100" in refused(open_source, Place("cifar100", str(tmp_path / "file" / "data")), 32)


@pytest.mark.parametrize("kind", CIFAR_NAMES)
@pytest.mark.parametrize("here_first", [False, True])
def test_nothing_is_downloaded_to_a_place_that_only_a_checkpoint_names(tmp_path, serve_cifar, kind, here_first):
    names = CIFAR_NAMES[kind]
    archive = serve_cifar(kind, names)
    theirs, mine = tmp_path / "theirs", Place(kind, str(tmp_path / "mine"))
    steps = [{"classes": names, "dataset": kind, "data_dir": str(theirs), "hold_back": 0.0}]

    def found(here: Place) -> list[str]:
        return datasets.find_test_images(datasets.test_places(steps, here, here_first), 32, False)[1]

    assert found(Place("folder", str(tmp_path / "nowhere"))) == names
    assert not theirs.exists()
    assert found(mine) == []
    assert not theirs.exists()
    assert (tmp_path / "mine" / archive.name).is_file()
    # What lies there already is read.
    shutil.move(tmp_path / "mine", theirs)
    archive.unlink()
    assert found(Place("folder", str(tmp_path / "nowhere"))) == []
