"""Which images judge a class: those of test and val, those a task set apart itself, and never one it was trained on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DIGITS, contents, image_folder, refused, task_of, write_images
from PIL import Image

from lwm.images.datasets import Place, open_source
from lwm.images.judging import find_test_images, read_own_images
from lwm.runtime.errors import start_log

CLASSES = ["b", "a"]


def rows_of(images: Any) -> np.ndarray:
    return images.pixels.numpy().transpose(0, 2, 3, 1)


def files_of(*paths: Path) -> np.ndarray:
    """The images of folders as their files have them, uint8 (n, H, W, 3), by name."""
    return np.stack([np.asarray(Image.open(file)) for path in paths for file in sorted(path.iterdir())])


def spoil(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(b"no image")


def trained(place: Place, names: list[str] = CLASSES) -> tuple[dict[str, Any], list[bytes], list[bytes]]:
    """What a task records of itself that is trained and judged at this place, and its images of both kinds."""
    source = open_source(place, 16)
    train, test = source.train(names, names), source.test(names, names)
    task = task_of(names, hold_back=place.hold_back, **source.record(test))
    return task, contents(train), contents(test)


def folder(root: Path, **changes: Any) -> Place:
    return Place("folder", str(root), **changes)


def judges(*tasks: dict[str, Any], here: Path | None = None, **more: Any) -> list[bytes]:
    return contents(find_test_images(tasks, 16, here=here and folder(here), **more))


# What a task has recorded -------------------------------------------------------------------------------------------


def test_test_images_come_from_the_first_place_that_still_has_them(tmp_path):
    counts = dict.fromkeys("abx", 2)
    first = image_folder(tmp_path / "first", counts, {"a": 1, "b": 1, "x": 1})
    second = image_folder(tmp_path / "second", {**counts, "c": 2}, {"a": 3, "b": 2, "c": 4})
    tasks = [trained(folder(second), ["c"])[0], trained(folder(first), ["a", "x"])[0], trained(folder(first), ["b"])[0]]
    for gone in ("b/000.png", "x/000.png"):
        (first / "test" / gone).unlink()  # its folder is still there
    images = find_test_images(tasks, 16, here=folder(second))
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 3, 3]
    np.testing.assert_array_equal(rows_of(images), files_of(second / "test/c", first / "test/a", second / "test/b"))
    asked = find_test_images(tasks, 16, here=folder(second), here_first=True)
    assert asked.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 3, 3]
    spoil(second / "test/b/000.png")  # which does not count as gone
    assert "000.png" in refused(find_test_images, tasks, 16, here=folder(second))
    images = find_test_images(tasks[2:], 24)
    assert (images.pixels.shape, images.pixels.dtype) == ((0, 3, 24, 24), torch.uint8)


def test_a_task_that_had_a_folder_test_is_never_judged_on_what_else_there_is(tmp_path, capsys):
    start_log()
    root = image_folder(tmp_path / "data", dict.fromkeys("ab", 10), dict.fromkeys("ab", 3))
    write_images(root / "val" / "a", 2, seed=7)
    task, _, test = trained(folder(root))
    assert (task["judged"]["split"], task["apart"]) == ("test", [])
    assert judges(task) == test
    moved = shutil.move(root, tmp_path / "moved")
    assert judges(task) == []
    assert judges(task, here=moved) == test
    shutil.move(moved / "test", tmp_path / "archive")
    capsys.readouterr()
    assert judges(task, here=moved) == []  # neither train nor val
    assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "only").mkdir()
    shutil.move(tmp_path / "archive", tmp_path / "only" / "test")
    assert judges(task, here=tmp_path / "only") == test


def test_val_judges_where_there_is_no_test_and_is_taken_at_its_word_later(tmp_path):
    root = image_folder(tmp_path, dict.fromkeys("ab", 10), dict.fromkeys("ab", 3))
    (root / "test").rename(root / "val")
    task, train, test = trained(folder(root))
    assert (task["judged"]["split"], task["apart"], len(train), len(test)) == ("val", [], 20, 6)
    assert judges(task) == test
    shutil.rmtree(root / "val" / "a")
    assert judges(task) == test[:3]
    shutil.rmtree(root / "val")
    assert judges(task) == []


@pytest.mark.parametrize("hold_back", [0.0, 0.25])
def test_images_that_a_task_set_apart_are_known_by_their_pixels_wherever_they_lie(tmp_path, hold_back):
    root = image_folder(tmp_path / "data", dict.fromkeys("ab", 30))
    task, _, test = trained(folder(root, hold_back=hold_back))
    assert len(task["apart"]) == len(set(task["apart"])) == len(test) > 4
    assert judges(task) == test
    # Renamed, so that the split by name would choose others; among more; below a folder test that has others too.
    for path in sorted(root.rglob("*.png")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    write_images(root / "train" / "a", 5, seed=50)
    assert sorted(judges(task)) == sorted(test)
    write_images(root / "test" / "b", 2, seed=51)
    shutil.move(root / "train" / "a", root / "test" / "a")
    assert sorted(judges(task)) == sorted(test)
    # Elsewhere, some gone, one that cannot be read: what is left judges, and not one image that was trained on.
    moved = shutil.move(root, tmp_path / "moved")
    assert judges(task) == []
    files = sorted(moved.rglob("*.png"))
    mine = [path for path in files if np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() in test]
    mine[0].unlink()
    spoil(mine[1])
    left = judges(task, here=moved, skip_bad_images=True)
    assert len(left) == len(test) - 2
    assert {*left} < {*test}
    shutil.rmtree(moved / "test")
    for path in mine[2:]:
        path.unlink(missing_ok=True)
    assert judges(task, here=moved, skip_bad_images=True) == []


def test_while_all_lies_as_it_lay_no_training_image_is_read_again(tmp_path):
    root = image_folder(tmp_path, dict.fromkeys("ab", 20))
    task, _, test = trained(folder(root))
    for name in CLASSES:
        spoil(*open_source(folder(root), 16).parts(name).train)
    assert judges(task) == test


def test_images_held_back_from_a_folder_val_are_taken_at_their_word(tmp_path):
    root = image_folder(tmp_path, dict.fromkeys("ab", 10), dict.fromkeys("ab", 3))
    shutil.copytree(root / "test", root / "val")
    write_images(root / "val" / "a", 1, seed=8)
    task, train, test = trained(folder(root, hold_back=0.2))
    assert (task["judged"]["split"], task["apart"], len(train)) == ("held back", [], 20)
    assert judges(task) == test
    shutil.rmtree(root / "val")
    assert judges(task) == []


def test_of_digits_the_official_split_judges_and_what_was_held_back_stays_so():
    for share in (0.0, 0.2):
        task, _, test = trained(DIGITS._replace(hold_back=share), ["3", "8"])
        assert task["apart"] == []
        assert judges(task) == test


# Whose images are not known -----------------------------------------------------------------------------------------


def test_a_network_that_was_taken_as_it_is_is_judged_by_folders_alone(tmp_path):
    """Its classes are named like the digits, on which nobody said that it was trained."""
    root = image_folder(tmp_path / "svhn", dict.fromkeys("0123", 4), dict.fromkeys("0123", 2))
    taken = task_of(["0", "1"], dataset="", data_dir="", judged=None)
    expected = contents(open_source(folder(root), 16).test(["0", "1"], ["0", "1"]))
    assert len(find_test_images([taken], 16, here=DIGITS).labels) == 0
    assert judges(taken, here=root) == expected
    # The folder of a later task has them too; a data set has not, nor has train.
    later = trained(folder(root), ["2", "3"])[0]
    assert judges(taken, later)[:4] == expected
    digits = trained(DIGITS, ["2", "3"])[0]
    assert find_test_images([taken, digits], 16, here=DIGITS).labels.unique().tolist() == [2, 3]
    shutil.rmtree(root / "test")
    assert judges(taken, here=root) == []


def test_classes_of_a_folder_are_not_judged_on_a_data_set_that_has_such_names(tmp_path):
    root = image_folder(tmp_path / "svhn", dict.fromkeys("01", 4), dict.fromkeys("01", 2))
    task = trained(folder(root), ["0", "1"])[0]
    shutil.rmtree(root)
    assert len(find_test_images([task], 16, here=DIGITS).labels) == 0


def test_a_thousand_classes_without_images_are_one_short_line(capsys):
    start_log()
    task = task_of([f"class {number}" for number in range(1000)], judged=None)
    assert len(find_test_images([task], 16).labels) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "990 more" in line
    assert len(line) < 250


# A user's own images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["", "test", "val", "train"])
def test_own_images_by_class(tmp_path, capsys, split):
    start_log()
    for seed, (name, count) in enumerate({"dog": 2, "cat/deep": 3, "wasp": 1}.items()):
        write_images(tmp_path / split / name, count, seed=seed)
    (tmp_path / "notes.txt").touch()
    if split in ("test", "val"):
        write_images(tmp_path / "train" / "dog", 5, seed=9)
    images, captions = read_own_images(tmp_path, ["zebra", "dog", "cat"], 16, False)
    assert images.labels.tolist() == [1, 1, 2, 2, 2]
    assert captions == ["true: dog"] * 2 + ["true: cat"] * 3
    place = tmp_path / split
    np.testing.assert_array_equal(rows_of(images), files_of(place / "dog", place / "cat" / "deep"))
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "wasp" in line and ": 1" in line]
    assert [line for line in said if "zebra" in line]
    assert len(said) == (3 if split else 2)  # of several splits, or train alone, the one that judges is said
    for root in (tmp_path, tmp_path / "none"):
        assert str(root) in refused(read_own_images, root, ["zebra"], 16, False)


def test_own_images_flat(tmp_path, capsys):
    start_log()
    write_images(tmp_path, 3, suffix=".bmp")
    images, captions = read_own_images(tmp_path, ["dog", "cat"], 16, False)
    assert images.labels.tolist() == [-1, -1, -1]
    np.testing.assert_array_equal(rows_of(images), files_of(tmp_path))
    assert captions == ["000.bmp", "001.bmp", "002.bmp"]
    assert capsys.readouterr().err == ""
    write_images(tmp_path / "wasp", 1)
    read_own_images(tmp_path, ["dog", "cat"], 16, False)
    assert "wasp" in capsys.readouterr().err
    spoil(tmp_path / "001.bmp")
    assert "001.bmp" in refused(read_own_images, tmp_path, ["dog"], 24, False)
    os.rename(tmp_path / "000.bmp", os.fsencode(tmp_path) + b"/\xe9.bmp")  # a name that is no text
    assert read_own_images(tmp_path, ["dog"], 24, True)[1] == ["002.bmp", "?.bmp"]
