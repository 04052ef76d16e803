"""Images by class name: labels, splits, what is set apart, and what is refused."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, contents, digits, folder_source, image_folder, refused, write_images
from PIL import Image
from sklearn.datasets import load_digits

from lwm.images import datasets
from lwm.images.datasets import Place, open_source
from lwm.runtime.errors import start_log

NAMES = [str(digit) for digit in range(10)]


def files_of(*paths: Path) -> np.ndarray:
    """The images of folders as their files have them, uint8 (n, H, W, 3), by name."""
    return np.stack([np.asarray(Image.open(file)) for path in paths for file in sorted(path.iterdir())])


def rows_of(images: datasets.Images) -> np.ndarray:
    return images.pixels.numpy().transpose(0, 2, 3, 1)


def test_digits_are_grey_labelled_by_position_and_tested_on_other_writers():
    bunch, source = load_digits(), open_source(DIGITS, 8)  # at 8 px the pixels are scikit-learn's own
    outputs = random.Random(0).sample(NAMES, 10)
    parts = [split(outputs[3:], outputs) for split in (source.train, source.test)]
    assert all((part.pixels.dtype, part.labels.dtype) == (torch.uint8, torch.int64) for part in parts)
    for label, name in enumerate(outputs[3:], 3):
        found = [rows_of(part)[part.labels == label] for part in parts]
        expected = (bunch.images[bunch.target == int(name)] * (255 / 16)).round()
        assert len(found[1]) == round(len(expected) / 4)  # the end of the file
        np.testing.assert_array_equal(np.concatenate(found), np.stack([expected] * 3, 3))
    large = digits().train(outputs[3:], outputs)
    assert abs(large.pixels.float().mean() - parts[0].pixels.float().mean()) < 1


def test_labels_of_a_folder_follow_the_order_of_teaching_not_the_alphabet(tmp_path):
    outputs = ["cat", "zebra", "ant"]
    root = image_folder(tmp_path, {"ant": 2, "cat": 3, "zebra": 4}, {"ant": 1, "cat": 2, "zebra": 3})
    source = folder_source(root)
    for split, images in (("train", source.train(outputs, outputs)), ("test", source.test(outputs, outputs))):
        counts = [len(list((root / split / name).iterdir())) for name in outputs]
        assert images.labels.tolist() == np.repeat([0, 1, 2], counts).tolist()
        np.testing.assert_array_equal(rows_of(images), files_of(*(root / split / name for name in outputs)))


def test_training_images_of_a_sealed_class_are_refused_whatever_they_are_asked_with():
    source = open_source(DIGITS._replace(hold_back=0.2), 8)
    source.seal(["0", "1"])
    source.seal(["5"])
    for name in ("0", "1", "5"):
        assert repr(name) in refused(source.train, ["2", name], NAMES)
    assert len(source.train(["2"], NAMES).labels)
    assert len(source.test(["0", "1", "5"], NAMES).labels)  # those to judge by are there


def test_what_is_not_there_is_named_and_a_class_with_the_nearest(tmp_path):
    assert "'mnist'" in refused(open_source, Place("mnist", ""), 32)
    assert str(tmp_path) in refused(folder_source, tmp_path)  # without a folder train
    text = refused(folder_source(image_folder(tmp_path, {"ant": 2, "cat": 2})).train, ["ant", "catt"], [])
    assert "'catt'" in text
    assert "'cat'" in text


def spoil(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(b"no image")


# What is wrong with class dog of a folder that has 3 images of it for training and 1 for testing.
WRONG: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "empty": (lambda train, test: [path.rename(path.with_suffix(".txt")) for path in train.iterdir()], "train"),
    "one image": (lambda train, test: [(train / name).unlink() for name in ("000.png", "001.png")], "train"),
    "one is good": (lambda train, test: spoil(train / "000.png", train / "001.png"), "train"),
    "none is good": (lambda train, test: spoil(*train.iterdir()), "train"),
    "empty test": (lambda train, test: (test / "000.png").unlink(), "test"),
    "no test": (lambda train, test: test.rename(test.with_name("other")), "test"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_class_with_too_few_images_is_named(tmp_path, wrong):
    change, split = WRONG[wrong]
    root = image_folder(tmp_path, {"cat": 2, "dog": 3}, {"cat": 1, "dog": 1})
    change(root / "train" / "dog", root / "test" / "dog")
    source = folder_source(root, skip_bad_images=True)
    assert "'dog'" in refused(getattr(source, split), ["cat", "dog"], ["cat", "dog"])
    assert source.has_test("dog") == (split == "train")
    assert len(source.train(["cat"], ["cat"]).labels) == 2  # the others can be used


def test_images_that_cannot_be_read_are_named_or_when_asked_skipped_and_counted(tmp_path, capsys):
    start_log()
    root = image_folder(tmp_path, {"cat": 5, "dog": 3}, {"cat": 1})
    spoil(*(root / "train" / name for name in (".DS_Store", "cat/.DS_Store", "cat/._000.png")))
    good = contents(folder_source(root, skip_bad_images=True).train(["cat", "dog"], ["cat", "dog"]))
    assert len(good) == 8
    assert capsys.readouterr().err == ""
    cats = root / "train" / "cat"
    spoil(cats / "001.png", cats / "003.png")
    assert str(cats / "001.png") in refused(folder_source(root).train, ["cat"], ["cat"])
    (cats / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")  # photographs of kinds that are not read do not vanish
    Image.new("RGB", (16, 12)).save(cats / "photo.DNG", "TIFF")  # though this one has a preview that can be read
    images = folder_source(root, skip_bad_images=True).train(["cat", "dog"], ["cat", "dog"])
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert contents(images) == [good[i] for i in (0, 2, 4, 5, 6, 7)]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "'cat'" in warning
    assert "4 of 7" in warning


# Splits -------------------------------------------------------------------------------------------------------------


def touched(folder: Path, names: list[str], class_name: str = "cat") -> tuple[set[str], set[str]]:
    """The names of the training and the test images of a class whose files are made in this order."""
    (folder / "train" / class_name).mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / "train" / class_name / name).touch()
    source = folder_source(folder)
    parts = source.parts(class_name)
    return {path.name for path in parts.train}, {path.name for path in parts.test}


@pytest.mark.parametrize(("class_name", "count"), [("owl", 2), ("zebra", 2), ("cat", 2000)])
def test_without_test_images_about_a_fifth_is_set_apart_and_neither_part_is_empty(tmp_path, class_name, count):
    names = [*(f"{index}.png" for index in range(count - 1)), os.fsdecode(b"caf\xe9.jpg")]  # a name that is no text
    train, test = touched(tmp_path, names, class_name)
    assert sorted(train | test) == sorted(names)
    assert not train & test
    assert train
    assert test
    assert count < 2000 or 0.17 < len(test) / count < 0.23  # three standard deviations
    assert touched(tmp_path / "one", names[:1]) == ({names[0]}, set())


def test_the_split_of_a_folder_is_the_same_everywhere_and_new_files_do_not_move_it(tmp_path):
    names = [f"{index:03}.png" for index in range(40)]
    train, test = touched(tmp_path / "a", names)
    # Written down, so that a change of the hash does not go unseen: it would move test images into training.
    assert sorted(test) == ["018.png", "023.png", "026.png"]
    assert touched(tmp_path / "b", random.Random(0).sample(names, 40)) == (train, test)
    assert touched(tmp_path / "a", names, "dog")[1] != test
    more, tests = touched(tmp_path / "a", [f"{index}.png" for index in range(100, 200)])
    assert train < more
    assert test < tests


@pytest.mark.parametrize("hold_back", [0.005, 0.2, 0.5])
def test_images_held_back_come_from_those_for_training_in_the_share_that_was_asked_for(hold_back):
    everything = contents(digits().train(["7"], ["7"]))
    train, judged = (contents(split(["7"], ["7"])) for split in (digits(hold_back).train, digits(hold_back).test))
    assert sorted(train + judged) == sorted(everything)
    assert judged
    assert abs(len(judged) - hold_back * len(everything)) < 1


FOR_CALIBRATION = {  # what there is beside 40, 4 and 5 images in train -> images of the classes that are held back
    "neither": (2, 0, 0),  # of the five one is set apart to judge by
    "test": (2, 0, 1),
    "val": (2, 0, 1),
    "test val": (3, 2, 2),
}


@pytest.mark.parametrize("splits", FOR_CALIBRATION)
def test_images_to_calibrate_by_neither_train_nor_judge(tmp_path, splits):
    """A tenth of the training images, but none of a class with few; or those of val if test judges."""
    root, classes = image_folder(tmp_path, {"cat": 40, "few": 4, "five": 5}), ["cat", "few", "five"]
    for split in {"test", "val"} & set(splits.split()):
        for name, count in {"cat": 3, "few": 2, "five": 2}.items():
            write_images(root / split / name, count, seed=len(split))
    plain, source = (open_source(Place("folder", str(root), calibration=share), 8) for share in (0.0, 0.1))
    for name in classes:
        (train, test, held_back), before = source.parts(name), plain.parts(name)
        assert not {*train} & {*test, *held_back}
        assert not {*test} & {*held_back}
        assert test == before.test
        if splits == "test val":
            assert {path.parent.parent.name for path in held_back} == {"val"}
        else:
            assert sorted([*train, *held_back]) == before.train
            assert before.held_back == []
    counts = FOR_CALIBRATION[splits]
    images = source.held_back(classes[::-1], classes)
    assert tuple(images.labels.bincount(minlength=3).tolist()) == counts
    assert images.pixels.shape == (sum(counts), 3, 8, 8)
    alone = source.held_back(["cat"], ["cat"])  # another class moves nothing
    assert sorted(contents(alone)) == sorted(contents(images)[-counts[0] :])
    assert source.held_back([], classes).pixels.shape == (0, 3, 8, 8)


def test_of_digits_too_some_are_held_back_to_calibrate_by():
    source, plain = open_source(DIGITS._replace(calibration=0.1), 8), open_source(DIGITS, 8)
    images = source.held_back(["7", "5"], ["5", "7"])
    for label, name in enumerate("57"):
        own, before = contents(source.train([name], [name])), contents(plain.train([name], [name]))
        held = [image.numpy().tobytes() for image in images.pixels[images.labels == label]]
        assert sorted(own + held) == sorted(before)
        assert 0.03 < len(held) / len(before) < 0.2
    assert len(plain.held_back(["5"], ["5"]).labels) == 0


def test_images_of_val_that_are_held_back_judge_and_do_not_calibrate(tmp_path):
    root = image_folder(tmp_path, {"cat": 20}, {"cat": 2})
    write_images(root / "val" / "cat", 4, seed=9)
    place = Place("folder", str(root), 0.2, calibration=0.25)
    splits = [{path.parent.parent.name for path in part} for part in open_source(place, 8).parts("cat")]
    assert splits == [{"train"}, {"val"}, {"train"}]
    shutil.rmtree(root / "test")  # then val is what test was
    train, test, held_back = open_source(place, 8).parts("cat")
    assert len(test) == 4
    assert {path.parent.parent.name for path in [*train, *test, *held_back]} == {"train"}
    assert len({*train, *test, *held_back}) == 20


def test_the_side_of_images_is_the_median_of_their_shorter_ones(tmp_path):
    assert open_source(DIGITS, 32).side(["0"]) == 8
    image_folder(tmp_path, {"cat": 3, "dog": 2}, {"cat": 1})
    Image.new("L", (90, 40)).save(tmp_path / "train" / "dog" / "000.png")
    source = folder_source(tmp_path, size=8)
    assert (source.side(["cat"]), source.side(["dog"]), source.side(["cat", "dog"])) == (16, 28, 16)
    assert source.side(["owl"]) is None
