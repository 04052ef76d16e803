"""Images by class name: labels, what is refused, folders with something missing or broken, a user's own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, contents, digits, folder_source, image_folder, picture, refused, write_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from lwm.images import datasets
from lwm.images.datasets import Place, open_source


def digit_of() -> dict[bytes, set[str]]:
    """Which digits each image of the data set is a picture of, found without datasets.py's labels."""
    bunch = load_digits()
    grey = (bunch.images * (255 / 16)).round().astype(np.uint8)
    found: dict[bytes, set[str]] = {}
    for image, target in zip(grey, bunch.target, strict=True):
        found.setdefault(image.tobytes(), set()).add(str(target))
    return found


# Labels -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("0123456789"), min_size=1, max_size=10, unique=True), st.data())
def test_labels_are_positions_in_the_outputs_in_any_order(outputs, draw):
    wanted = draw.draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))
    truth = digit_of()
    source = open_source(DIGITS, 8)  # at 8 px the pixels are scikit-learn's own
    for images in (source.train(wanted, outputs), source.test(wanted, outputs)):
        assert images.pixels.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert len(images.pixels) == len(images.labels)
        assert set(images.labels.tolist()) == {outputs.index(name) for name in wanted}
        for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
            assert outputs[label] in truth[pixels[0].numpy().tobytes()]


@pytest.mark.parametrize("outputs", [["zebra", "cat", "ant"], ["ant", "cat", "zebra"], ["cat", "zebra", "ant"]])
def test_labels_of_a_folder_follow_the_order_of_teaching_not_the_alphabet(tmp_path, outputs):
    counts = {"ant": 2, "cat": 3, "zebra": 4}
    root = image_folder(tmp_path, counts, {"ant": 1, "cat": 2, "zebra": 3})
    for split, extra in (("train", 0), ("test", -1)):
        images = getattr(folder_source(root), split)(outputs, outputs)
        expected = [i for i, name in enumerate(outputs) for _ in range(counts[name] + extra)]
        assert images.labels.tolist() == expected
        files = [path for name in outputs for path in sorted((root / split / name).iterdir())]
        for pixels, path in zip(images.pixels, files, strict=True):
            np.testing.assert_array_equal(pixels.numpy().transpose(1, 2, 0), np.asarray(Image.open(path)))


def test_classes_of_one_step_are_labelled_among_all_outputs():
    outputs = ["9", "3", "5", "0"]
    images = digits().train(["5", "0"], outputs)
    assert sorted(set(images.labels.tolist())) == [2, 3]


def test_digits_are_grey_and_keep_their_brightness():
    small, large = open_source(DIGITS, 8).train(["3"], ["3"]).pixels, digits().train(["3"], ["3"]).pixels
    for pixels in (small, large):
        assert torch.equal(pixels[:, 0], pixels[:, 1])
        assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert small.max() == 255
    assert abs(small.float().mean() - large.float().mean()) < 1


# What is refused ----------------------------------------------------------------------------------------------------


def test_training_images_of_a_sealed_class_are_refused_whatever_they_are_asked_with():
    source = open_source(DIGITS, 32)
    source.seal(["0", "1"])
    source.seal(["5"])
    outputs = [str(d) for d in range(10)]
    for wanted, named in ((["0"], "'0'"), (["2", "1"], "'1'"), (["5"], "'5'")):
        text = refused(source.train, wanted, outputs)
        assert named in text
        assert "old class" in text
    assert len(source.train(["2"], outputs).labels)
    assert len(source.test(["0", "1", "5"], outputs).labels)  # the test images are there


def test_a_sealed_class_of_a_folder_is_not_even_looked_at(tmp_path):
    root = image_folder(tmp_path, {"new": 3}, {"new": 1, "old": 1})
    source = folder_source(root)
    source.seal(["old"])
    assert "old class" in refused(source.train, ["old"], ["old", "new"])
    assert source.train(["new"], ["old", "new"]).labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("wrong", "nearest"), [("catt", "'cat'"), ("Zebra", "'zebra'"), ("xyz", "ant, cat, zebra")])
def test_a_missing_class_is_named_with_the_nearest(tmp_path, wrong, nearest):
    source = folder_source(image_folder(tmp_path, {"ant": 2, "cat": 2, "zebra": 2}))
    text = refused(source.train, ["ant", wrong], ["ant", wrong])
    assert repr(wrong) in text
    assert nearest in text
    assert str(tmp_path) in text


def test_a_missing_digit_is_named():
    assert "'10'" in refused(digits().train, ["10"], ["10"])


def test_an_unknown_data_set_is_refused():
    assert "'mnist'" in refused(open_source, Place("mnist", ""), 32)


# Folders with something missing -------------------------------------------------------------------------------------


def test_no_train_folder(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        text = refused(folder_source, root)
        assert str(root) in text
        assert "train" in text


@pytest.mark.parametrize("with_test", [True, False])
def test_an_empty_class(tmp_path, with_test):
    root = image_folder(tmp_path, {"cat": 3}, {"cat": 1, "dog": 1} if with_test else None)
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "notes.txt").write_text("not an image")
    text = refused(folder_source(root).train, ["cat", "dog"], ["cat", "dog"])
    assert "'dog'" in text
    assert str(root / "train" / "dog") in text
    assert "no image" in text


@pytest.mark.parametrize("with_test", [True, False])
def test_one_image_in_a_class(tmp_path, with_test):
    root = image_folder(tmp_path, {"cat": 3, "dog": 1}, {"cat": 1, "dog": 1} if with_test else None)
    text = refused(folder_source(root).train, ["cat", "dog"], ["cat", "dog"])
    assert "'dog'" in text
    assert "one image" in text
    assert len(folder_source(root).train(["cat"], ["cat"]).labels) >= 2  # the others can be used


def test_one_image_is_left_when_the_bad_ones_are_skipped(tmp_path):
    root = image_folder(tmp_path, {"cat": 2}, {"cat": 1})
    (root / "train" / "cat" / "bad.png").write_bytes(b"nothing")
    (root / "train" / "cat" / "001.png").write_bytes(b"nothing")
    text = refused(folder_source(root, skip_bad_images=True).train, ["cat"], ["cat"])
    assert "'cat'" in text
    assert "one image" in text


def test_a_class_of_train_that_is_missing_in_test(tmp_path):
    root = image_folder(tmp_path, {"cat": 2, "dog": 2}, {"cat": 1})
    source = folder_source(root)
    assert source.has_test("cat")
    assert not source.has_test("dog")
    text = refused(source.test, ["cat", "dog"], ["cat", "dog"])
    assert "'dog'" in text
    assert "test" in text


def test_an_empty_class_in_test(tmp_path):
    root = image_folder(tmp_path, {"cat": 2}, {"cat": 1})
    for path in (root / "test" / "cat").iterdir():
        path.unlink()
    assert "'cat'" in refused(folder_source(root).test, ["cat"], ["cat"])


def test_other_files_and_hidden_files_are_no_images(tmp_path):
    root = image_folder(tmp_path, {"cat": 3}, {"cat": 1})
    for name in ("notes.txt", ".DS_Store", "._000.png", "Thumbs.db", "labels.csv"):
        (root / "train" / "cat" / name).write_bytes(b"not an image")
    (root / "train" / "README.md").write_text("no class")
    assert len(folder_source(root).train(["cat"], ["cat"]).labels) == 3
    assert folder_source(root).classes["train"] == ["cat"]


# Images that cannot be read -----------------------------------------------------------------------------------------


def break_file(path: Path, kind: str) -> Path:
    if kind == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(500))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated png":
        Image.fromarray(picture(0, 64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "header alone":
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path = path.rename(path.with_suffix(".jpg"))
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


KINDS = ["random bytes", "empty", "truncated png", "truncated jpeg", "header alone", "text", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_image_is_named(tmp_path, kind):
    root = image_folder(tmp_path, {"cat": 4}, {"cat": 1})
    bad = break_file(root / "train" / "cat" / "002.png", kind)
    text = refused(folder_source(root).train, ["cat"], ["cat"])
    assert str(bad) in text
    assert "remove" in text


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_images_are_skipped_and_counted_when_asked(tmp_path, capsys, kind):
    root = image_folder(tmp_path, {"cat": 5, "dog": 3}, {"cat": 1})
    good = contents(folder_source(root).train(["cat", "dog"], ["cat", "dog"]))
    for name in ("001.png", "003.png"):
        break_file(root / "train" / "cat" / name, kind)
    capsys.readouterr()
    images = folder_source(root, skip_bad_images=True).train(["cat", "dog"], ["cat", "dog"])
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert contents(images) == [good[i] for i in (0, 2, 4, 5, 6, 7)]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "2 of 5" in warnings[0]
    assert f"class 'cat' in folder in {root}" in warnings[0]


@pytest.mark.parametrize("suffix", [".heic", ".DNG"])
def test_photographs_of_a_kind_that_is_not_read_do_not_vanish(tmp_path, capsys, suffix):
    root = image_folder(tmp_path, {"cat": 3}, {"cat": 1})
    photo = root / "train" / "cat" / f"photo{suffix}"
    if suffix == ".heic":
        photo.write_bytes(b"\0\0\0\x18ftypheic")
    else:  # with a preview that can be read
        Image.new("RGB", (16, 12)).save(photo, "TIFF")
    text = refused(folder_source(root).train, ["cat"], ["cat"])
    assert photo.name in text
    assert "convert" in text
    assert len(folder_source(root, skip_bad_images=True).train(["cat"], ["cat"]).labels) == 3
    assert "1 of 4" in capsys.readouterr().err


def test_nothing_is_said_where_nothing_is_skipped(tmp_path, capsys):
    folder_source(image_folder(tmp_path, {"cat": 3}, {"cat": 1}), skip_bad_images=True).train(["cat"], ["cat"])
    assert capsys.readouterr().err == ""


def test_a_class_of_corrupt_images_alone_is_named_even_when_they_are_skipped(tmp_path):
    root = image_folder(tmp_path, {"cat": 3}, {"cat": 1})
    for path in (root / "train" / "cat").iterdir():
        path.write_bytes(b"nothing")
    text = refused(folder_source(root, skip_bad_images=True).train, ["cat"], ["cat"])
    assert f"class 'cat' in folder in {root}" in text


# Test images of several places, and a user's own --------------------------------------------------------------------


def test_find_test_images_takes_the_second_place_and_says_which_classes_are_gone(tmp_path):
    first = Place("folder", str(image_folder(tmp_path / "first", {"a": 2}, {"a": 1})))
    second = Place("folder", str(image_folder(tmp_path / "second", {"a": 2, "b": 2, "c": 2}, {"a": 3, "b": 2, "c": 4})))
    nowhere = Place("folder", str(tmp_path / "nowhere"))
    places = {"c": [nowhere, second], "a": [first, second], "x": [first, second], "b": [first, second], "y": [nowhere]}
    images, gone = datasets.find_test_images(places, 16, False)
    assert gone == ["x", "y"]
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 3, 3]
    expected = []
    for root, name in (("second", "c"), ("first", "a"), ("second", "b")):
        expected += [np.asarray(Image.open(p)) for p in sorted((tmp_path / root / "test" / name).iterdir())]
    np.testing.assert_array_equal(images.pixels.numpy().transpose(0, 2, 3, 1), np.stack(expected))


def test_find_test_images_where_everything_is_gone(tmp_path):
    places = {"a": [Place("folder", str(tmp_path / "nowhere"))], "b": []}
    images, gone = datasets.find_test_images(places, 24, False)
    assert gone == ["a", "b"]
    assert images.pixels.shape == (0, 3, 24, 24)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.shape == (0,)
    assert images.labels.dtype == torch.int64


def test_a_class_whose_test_images_were_deleted_counts_as_gone(tmp_path):
    """The folder is still there, its images are not: as gone as a folder that is gone."""
    root = image_folder(tmp_path / "first", {"a": 2, "b": 2}, {"a": 1, "b": 1})
    (root / "test" / "b" / "000.png").unlink()
    first, second = (
        Place("folder", str(root)),
        Place("folder", str(image_folder(tmp_path / "second", {"b": 2}, {"b": 3}))),
    )
    images, gone = datasets.find_test_images({"a": [first], "b": [first]}, 16, False)
    assert gone == ["b"]
    assert images.labels.tolist() == [0]
    images, gone = datasets.find_test_images({"a": [first], "b": [first, second]}, 16, False)
    assert gone == []
    assert images.labels.tolist() == [0, 1, 1, 1]


def test_a_corrupt_test_image_is_not_taken_for_a_class_that_is_gone(tmp_path, capsys):
    root = image_folder(tmp_path, {"a": 2}, {"a": 3})
    bad = root / "test" / "a" / "001.png"
    bad.write_bytes(b"nothing")
    places = {"a": [Place("folder", str(root))]}
    assert str(bad) in refused(datasets.find_test_images, places, 16, False)
    assert datasets.find_test_images(places, 16, True)[0].labels.tolist() == [0, 0]
    assert "1 of 3" in capsys.readouterr().err


def test_own_images_by_class(tmp_path):
    write_images(tmp_path / "dog", 2, seed=1)
    write_images(tmp_path / "cat", 3, seed=2, size=20)
    write_images(tmp_path / "unknown", 1, seed=3)
    images, captions, gone = datasets.read_own_images(tmp_path, ["zebra", "dog", "cat"], 16, False)
    assert images.labels.tolist() == [1, 1, 2, 2, 2]
    assert images.labels.dtype == torch.int64
    assert images.pixels.shape == (5, 3, 16, 16)
    assert images.pixels.dtype == torch.uint8
    assert captions == ["true: dog"] * 2 + ["true: cat"] * 3
    assert gone == ["zebra"]
    np.testing.assert_array_equal(
        images.pixels[1].numpy().transpose(1, 2, 0), np.asarray(Image.open(tmp_path / "dog" / "001.png"))
    )


def test_own_images_flat(tmp_path, capsys):
    write_images(tmp_path, 3, suffix=".bmp")
    images, captions, gone = datasets.read_own_images(tmp_path, ["dog", "cat"], 24, False)
    assert images.labels.tolist() == [-1, -1, -1]
    assert images.pixels.shape == (3, 3, 24, 24)
    assert captions == ["000.bmp", "001.bmp", "002.bmp"]
    assert gone == ["dog", "cat"]
    (tmp_path / "001.bmp").write_bytes(b"nothing")
    assert str(tmp_path / "001.bmp") in refused(datasets.read_own_images, tmp_path, ["dog"], 24, False)
    images, captions, _ = datasets.read_own_images(tmp_path, ["dog"], 24, True)
    assert captions == ["000.bmp", "002.bmp"]
    os.rename(tmp_path / "000.bmp", os.fsencode(tmp_path) + b"/\xe9.bmp")  # a name that is no text
    assert datasets.read_own_images(tmp_path, ["dog"], 24, True)[1] == ["002.bmp", "?.bmp"]
    assert len(images.pixels) == len(images.labels) == 2
    assert "1 of 3" in capsys.readouterr().err


def test_own_images_of_which_none_can_be_read(tmp_path):
    (tmp_path / "0.png").write_bytes(b"nothing")
    assert "none of its 1 images can be read" in refused(datasets.read_own_images, tmp_path, ["dog"], 24, True)


def test_own_images_that_are_not_there(tmp_path):
    assert str(tmp_path / "none") in refused(datasets.read_own_images, tmp_path / "none", ["dog"], 16, False)
    assert "dog" in refused(datasets.read_own_images, tmp_path, ["dog"], 16, False)
    write_images(tmp_path / "bird", 1)
    (tmp_path / "dog").mkdir()
    assert "dog" in refused(datasets.read_own_images, tmp_path, ["dog"], 16, False)


# Numbers ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 999))
def test_channel_statistics_against_numpy(count, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    mean, std = datasets.channel_statistics(torch.from_numpy(pixels))
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, np.maximum((pixels / 255).std((0, 2, 3)), 1e-3), rtol=1e-9)
    assert all(type(value) is float for value in mean + std)  # they go into the checkpoint


def test_statistics_of_a_plain_image_can_be_divided_by():
    mean, std = datasets.channel_statistics(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8))
    assert mean == pytest.approx([0.2] * 3)
    assert std == [1e-3] * 3


def test_to_input_against_numpy():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 1.5]
    inputs = datasets.to_input(torch.from_numpy(pixels), mean, std)
    assert inputs.dtype == torch.float32
    expected = (pixels / 255 - np.array(mean).reshape(3, 1, 1)) / np.array(std).reshape(3, 1, 1)
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)
