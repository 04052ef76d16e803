"""Images by class name: labels, splits, what is refused, every kind of bad data, batches and augmentation."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cifar_pixels, image_folder, picture, write_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features
from sklearn.datasets import load_digits

import batches
import data
import imagefiles
from data import Place, open_source
from errors import InputError

DIGITS = Place("digits", "")


@functools.cache
def digits(hold_back: float = 0.0):
    return open_source(DIGITS._replace(hold_back=hold_back), 32)


def folder_source(root: Path, size: int = 16, hold_back: float = 0.0, skip_bad_images: bool = False):
    return open_source(Place("folder", str(root), hold_back), size, skip_bad_images)


def refused(call, *arguments, **named) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **named)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def contents(images: data.Images) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.pixels]


def digit_of() -> dict[bytes, set[str]]:
    """Which digits each image of the data set is a picture of, found without data.py's labels."""
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


# Digits -------------------------------------------------------------------------------------------------------------


def test_the_split_of_the_digits_is_disjoint_complete_and_fixed():
    names = [str(d) for d in range(10)]
    source = digits()
    rows = {split: [set(source.listing(split, name)) for name in names] for split in ("train", "test")}
    for train, test in zip(rows["train"], rows["test"], strict=True):
        assert not train & test
        assert max(train) < min(test)  # the end of the file: other writers
    everything = set().union(*rows["train"], *rows["test"])
    assert everything == set(range(1797))
    assert [len(r) for r in rows["test"]] == [44, 46, 44, 46, 45, 46, 45, 45, 44, 45]
    again = open_source(DIGITS, 32)
    assert torch.equal(again.test(names, names).pixels, source.test(names, names).pixels)
    assert source.test(names, names).pixels.shape == (450, 3, 32, 32)


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


# The split of a folder without test ---------------------------------------------------------------------------------


def split_names(root: Path, name: str = "cat", **options) -> tuple[set[str], set[str]]:
    source = folder_source(root, **options)
    return tuple({path.name for path in source.listing(split, name)} for split in ("train", "test"))


@given(count=st.integers(2, 30), class_name=st.sampled_from(["cat", "a b", "é"]))
def test_hash_split_is_disjoint_complete_and_neither_part_is_empty(tmp_path_factory, count, class_name):
    root = tmp_path_factory.mktemp("split")
    (root / "train" / class_name).mkdir(parents=True)
    names = {f"{i:03}.png" for i in range(count)}
    for name in names:
        (root / "train" / class_name / name).touch()
    train, test = split_names(root, class_name)
    assert train
    assert test
    assert not train & test
    assert train | test == names


def test_hash_split_is_the_same_in_any_order_and_on_any_machine(tmp_path):
    names = [f"{i:03}.png" for i in range(40)]
    results = []
    for folder, order in (("a", names), ("b", names[::-1])):
        (tmp_path / folder / "train" / "cat").mkdir(parents=True)
        for name in order:
            (tmp_path / folder / "train" / "cat" / name).touch()
        results.append(split_names(tmp_path / folder))
    assert results[0] == results[1]
    paths = [tmp_path / "a" / "train" / "cat" / name for name in names]
    expected = data._hash_split(paths, "cat", tmp_path / "a")
    for shift in range(1, 40, 7):
        assert data._hash_split(paths[shift:] + paths[:shift], "cat", tmp_path / "a") == expected
    # Written down, so that a change of the hash does not go unseen: it would move test images into training.
    assert sorted(results[0][1]) == ["018.png", "023.png", "026.png"]


def test_hash_split_keeps_about_a_fifth_for_testing(tmp_path):
    paths = [tmp_path / f"{index}.jpg" for index in range(2000)]
    for name in ("cat", "dog"):
        parts = data._hash_split(paths, name, tmp_path)
        assert 0.17 < len(parts["test"]) / 2000 < 0.23  # three standard deviations
        assert len(parts["train"]) + len(parts["test"]) == 2000


@given(extra=st.lists(st.integers(100, 999), min_size=1, max_size=30, unique=True))
def test_hash_split_is_unaffected_by_files_that_are_added(tmp_path_factory, extra):
    root = tmp_path_factory.mktemp("split")
    (root / "train" / "cat").mkdir(parents=True)
    for index in range(40):
        (root / "train" / "cat" / f"{index:03}.png").touch()
    before = split_names(root)
    for index in extra:
        (root / "train" / "cat" / f"{index}.png").touch()
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "000.png").touch()
    after = split_names(root)
    assert before[0] <= after[0]
    assert before[1] <= after[1]


def test_hash_split_of_two_classes_differs(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(40):
            (tmp_path / "train" / name / f"{index:03}.png").touch()
    assert split_names(tmp_path, "cat") != split_names(tmp_path, "dog")


def test_a_folder_without_test_gives_both_parts(tmp_path):
    source = folder_source(image_folder(tmp_path, {"cat": 12, "dog": 12}))
    train, test = (split(["dog", "cat"], ["dog", "cat"]) for split in (source.train, source.test))
    assert len(train.labels) + len(test.labels) == 24
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == {0, 1}
    assert not set(contents(train)) & set(contents(test))


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


@functools.cache
def encoded(image_format: str) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(1, 24, 20)).save(
        file, image_format, **({} if image_format in ("BMP", "GIF", "DDS") else {"exif": exif})
    )
    return file.getvalue()


@given(
    image_format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_gives_an_image_or_the_one_error(tmp_path_factory, image_format, cut, changes):
    content = bytearray(encoded(image_format))
    for where, value in changes:
        content[int(where * len(content))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(content[: round(cut * len(content))])
    image_or_the_one_error(path)


def odd_exif() -> bytes:
    """A JPEG that says it lies on its side, and gives its width as a text: Pillow cannot write that back."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x"
    file = io.BytesIO()
    Image.fromarray(picture(1)).save(file, "JPEG", exif=exif)
    return file.getvalue().replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")


def broken_avif() -> bytes:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    return encoded("AVIF")[:-60] + bytes(60)


def unknown_dds() -> bytes:
    content = bytearray(encoded("DDS"))
    content[80:84] = bytes(4)  # the flags of the pixel format
    return bytes(content)


def enormous_hdr() -> bytes:
    return b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 2000000 +X 2000000\n"


@pytest.mark.parametrize("make", [odd_exif, broken_avif, unknown_dds, enormous_hdr])
def test_files_for_which_a_decoder_raises_an_error_of_its_own_kind(tmp_path, make):
    """struct.error, RuntimeError, NotImplementedError and cv2.error: the user sees the file's name all the same."""
    path = tmp_path / "damaged.png"
    path.write_bytes(make())
    pixels = image_or_the_one_error(path)
    if make is odd_exif and pixels is not None:  # its pixels are whole
        close(pixels.transpose(1, 2, 0).astype(int), np.rot90(picture(1), -1), 20)


# Kinds of images ----------------------------------------------------------------------------------------------------


def image_or_the_one_error(path: Path) -> np.ndarray | None:
    """A damaged file's pixels, or None where it was refused with its name."""
    try:
        pixels = imagefiles.decode_image(path, 16)
    except InputError as error:
        assert str(path) in str(error)
        return None
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    return pixels


def decoded(path: Path, size: int = 16) -> np.ndarray:
    """decode_image, checked for its kind, as (size, size, 3)."""
    pixels = imagefiles.decode_image(path, size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, size, size)
    return pixels.transpose(1, 2, 0).astype(int)


def close(one: np.ndarray, other: np.ndarray, by: float) -> None:
    assert np.abs(one - np.asarray(other, dtype=int)).max() <= by


@pytest.mark.parametrize(("suffix", "by"), [(".png", 0), (".bmp", 0), (".tiff", 0), (".webp", 16), (".jpg", 16)])
def test_formats(tmp_path, suffix, by):
    image = picture(3)
    Image.fromarray(image).save(tmp_path / f"x{suffix}", **({"quality": 98} if by else {}))
    close(decoded(tmp_path / f"x{suffix}"), image, by)
    shutil.copy(tmp_path / f"x{suffix}", tmp_path / f"Y{suffix.upper()}")
    assert [path.name for path in imagefiles.image_files(tmp_path)] == [f"Y{suffix.upper()}", f"x{suffix}"]


@pytest.mark.parametrize("suffix", [".hdr", ".pic"])
def test_a_format_that_only_opencv_reads(tmp_path, suffix):
    cv2 = pytest.importorskip("cv2")
    image = picture(3)
    path = tmp_path / "train" / "cat" / f"x{suffix}"
    path.parent.mkdir(parents=True)
    assert cv2.imwrite(str(path), image[:, :, ::-1].astype(np.float32) / 255)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(path)
    close(decoded(path), image, 3)
    shutil.copy(path, path.with_name(f"y{suffix}"))
    (tmp_path / "test").mkdir()
    assert len(folder_source(tmp_path).train(["cat"], ["cat"]).labels) == 2


def test_grey(tmp_path):
    grey = picture(4)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "x.png")
    close(decoded(tmp_path / "x.png"), np.stack([grey] * 3, 2), 0)


def test_one_bit(tmp_path):
    bits = picture(4)[:, :, 0] > 128
    Image.fromarray(bits).save(tmp_path / "x.png")
    close(decoded(tmp_path / "x.png"), np.stack([bits * 255] * 3, 2), 0)


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palette(tmp_path, suffix):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], dtype=np.uint8)
    indices = np.random.default_rng(0).integers(0, 4, (16, 16)).astype(np.uint8)
    image = Image.frombytes("P", (16, 16), indices.tobytes())
    image.putpalette(colours.tobytes())
    image.save(tmp_path / f"x{suffix}")
    assert Image.open(tmp_path / f"x{suffix}").mode == "P"
    close(decoded(tmp_path / f"x{suffix}"), colours[indices], 0)


def test_palette_with_a_transparent_colour_lies_on_white(tmp_path):
    indices = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.uint8)
    image = Image.frombytes("P", (16, 16), indices.tobytes())
    image.putpalette([200, 0, 0, 0, 0, 100])
    image.save(tmp_path / "x.png", transparency=0)
    close(decoded(tmp_path / "x.png"), np.array([[255, 255, 255], [0, 0, 100]])[indices], 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(tmp_path, mode):
    colour = picture(5) if mode == "RGBA" else np.repeat(picture(5)[:, :, :1], 3, axis=2)
    alpha = picture(6)[:, :, :1]
    alpha = np.where(np.arange(16)[:, None, None] < 4, 0, alpha).astype(np.uint8)
    channels = np.concatenate([colour if mode == "RGBA" else colour[:, :, :1], alpha], axis=2)
    Image.frombytes(mode, (16, 16), channels.tobytes()).save(tmp_path / "x.png")
    expected = colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0)
    close(decoded(tmp_path / "x.png"), expected.round(), 1)
    assert (decoded(tmp_path / "x.png")[:4] == 255).all()


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("brightest", [65535, 20000, 200])
def test_sixteen_bits(tmp_path, suffix, brightest):
    """A dark image of 16 bits stays dark: what counts is the depth of the file, not its brightest pixel."""
    values = np.linspace(0, brightest, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    assert Image.open(tmp_path / f"x{suffix}").mode.startswith("I;16")
    close(decoded(tmp_path / f"x{suffix}"), np.stack([values / 257.0] * 3, 2).round(), 1)


def test_cmyk(tmp_path):
    Image.fromarray(picture(7)).convert("CMYK").save(tmp_path / "x.jpg", quality=98)
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    close(decoded(tmp_path / "x.jpg"), picture(7), 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_rotated_by_exif_becomes_upright(tmp_path, orientation, suffix):
    upright = picture(8)
    # What a camera stores when the scene is upright, by the definition of the EXIF tag Orientation.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright[::-1], 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"x{suffix}", exif=exif, quality=98)
    close(decoded(tmp_path / f"x{suffix}"), upright, 12 if suffix == ".jpg" else 0)


def test_mixed_sizes_are_resized(tmp_path):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    (tmp_path / "test").mkdir()
    for index, (width, height) in enumerate([(16, 16), (100, 40), (7, 90), (1, 1), (640, 480)]):
        Image.new("RGB", (width, height), (10 * index, 50, 100)).save(folder / f"{index}.png")
    for size in (16, 33):
        images = folder_source(tmp_path, size).train(["cat"], ["cat"])
        assert images.pixels.shape == (5, 3, size, size)
        expected = torch.tensor([[10 * index, 50, 100] for index in range(5)])
        assert (images.pixels.flatten(2).float().mean(2) - expected).abs().max() < 0.5


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_of_an_oblong_image_is_kept_in_its_proportions(tmp_path, wide):
    """Red, green, blue stripes, each half as thick as the image is high: the middle shows one square of all three."""
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, :32, 0] = 255  # cut away
    stripes[:, 32:96, 1] = 255
    stripes[:, 96:, 2] = 255  # cut away
    image = stripes if wide else stripes.transpose(1, 0, 2)
    Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "x.png")
    close(decoded(tmp_path / "x.png")[1:-1, 1:-1], np.array([0, 255, 0]), 12)


# Images held back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold_back", [0.1, 0.2, 0.25, 0.5])
def test_held_back_digits_are_disjoint_complete_and_all_from_train(hold_back):
    names = [str(d) for d in range(10)]
    plain, held = digits(), digits(hold_back)
    for name in names:
        everything = set(plain.listing("train", name))
        trained, judged = (set(map(int, held._chosen(split, name))) for split in ("train", "test"))
        assert not trained & judged
        assert trained | judged == everything
        assert not (trained | judged) & set(plain.listing("test", name))
        assert abs(len(judged) - hold_back * len(everything)) <= 1
    assert len(held.train(names, names).labels) + len(held.test(names, names).labels) == 1347
    assert not set(contents(held.test(["7"], ["7"]))) & set(contents(held.train(["7"], ["7"])))


@given(count=st.integers(4, 60), hold_back=st.floats(0.02, 0.5))
def test_the_share_held_back_is_the_share_that_was_asked_for(count, hold_back):
    listing = {"train": list(range(count)), "test": [-1, -2]}
    source = data.Source(
        Place("test", "", hold_back),
        {"train": ["x"], "test": ["x"]},
        lambda split, name: listing[split],
        lambda names: (np.array(names, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 1), {}),
    )
    trained, judged = (
        images.pixels[:, 0, 0, 0].tolist() for images in (source.train(["x"], ["x"]), source.test(["x"], ["x"]))
    )
    assert sorted(trained + judged) == listing["train"]
    assert judged
    assert abs(len(judged) - hold_back * count) <= 1


def test_held_back_images_of_a_folder_leave_the_test_images_alone(tmp_path):
    root = image_folder(tmp_path, {"cat": 10}, {"cat": 4})
    plain, held = folder_source(root), folder_source(root, hold_back=0.2)
    trained, judged, tests = (
        contents(i) for i in (held.train(["cat"], ["cat"]), held.test(["cat"], ["cat"]), plain.test(["cat"], ["cat"]))
    )
    assert sorted(trained + judged) == sorted(contents(plain.train(["cat"], ["cat"])))
    assert len(judged) == 2
    assert not set(trained + judged) & set(tests)


def test_sealed_images_can_be_held_back_for_judging_but_not_trained_on():
    source = open_source(DIGITS, 32, 0.2)
    source.seal(["0"])
    assert "old class" in refused(source.train, ["0"], ["0"])
    assert len(source.test(["0"], ["0"]).labels)


# CIFAR --------------------------------------------------------------------------------------------------------------

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

    monkeypatch.setattr(data, "held", held)
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


# Test images of several places, and a user's own --------------------------------------------------------------------


def test_find_test_images_takes_the_second_place_and_says_which_classes_are_gone(tmp_path):
    first = Place("folder", str(image_folder(tmp_path / "first", {"a": 2}, {"a": 1})))
    second = Place("folder", str(image_folder(tmp_path / "second", {"a": 2, "b": 2, "c": 2}, {"a": 3, "b": 2, "c": 4})))
    nowhere = Place("folder", str(tmp_path / "nowhere"))
    places = {"c": [nowhere, second], "a": [first, second], "x": [first, second], "b": [first, second], "y": [nowhere]}
    images, gone = data.find_test_images(places, 16, False)
    assert gone == ["x", "y"]
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 3, 3]
    expected = []
    for root, name in (("second", "c"), ("first", "a"), ("second", "b")):
        expected += [np.asarray(Image.open(p)) for p in sorted((tmp_path / root / "test" / name).iterdir())]
    np.testing.assert_array_equal(images.pixels.numpy().transpose(0, 2, 3, 1), np.stack(expected))


def test_find_test_images_where_everything_is_gone(tmp_path):
    places = {"a": [Place("folder", str(tmp_path / "nowhere"))], "b": []}
    images, gone = data.find_test_images(places, 24, False)
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
    images, gone = data.find_test_images({"a": [first], "b": [first]}, 16, False)
    assert gone == ["b"]
    assert images.labels.tolist() == [0]
    images, gone = data.find_test_images({"a": [first], "b": [first, second]}, 16, False)
    assert gone == []
    assert images.labels.tolist() == [0, 1, 1, 1]


def test_a_corrupt_test_image_is_not_taken_for_a_class_that_is_gone(tmp_path, capsys):
    root = image_folder(tmp_path, {"a": 2}, {"a": 3})
    bad = root / "test" / "a" / "001.png"
    bad.write_bytes(b"nothing")
    places = {"a": [Place("folder", str(root))]}
    assert str(bad) in refused(data.find_test_images, places, 16, False)
    assert data.find_test_images(places, 16, True)[0].labels.tolist() == [0, 0]
    assert "1 of 3" in capsys.readouterr().err


def test_own_images_by_class(tmp_path):
    write_images(tmp_path / "dog", 2, seed=1)
    write_images(tmp_path / "cat", 3, seed=2, size=20)
    write_images(tmp_path / "unknown", 1, seed=3)
    images, captions, gone = data.read_own_images(tmp_path, ["zebra", "dog", "cat"], 16, False)
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
    images, captions, gone = data.read_own_images(tmp_path, ["dog", "cat"], 24, False)
    assert images.labels.tolist() == [-1, -1, -1]
    assert images.pixels.shape == (3, 3, 24, 24)
    assert captions == ["000.bmp", "001.bmp", "002.bmp"]
    assert gone == ["dog", "cat"]
    (tmp_path / "001.bmp").write_bytes(b"nothing")
    assert str(tmp_path / "001.bmp") in refused(data.read_own_images, tmp_path, ["dog"], 24, False)
    images, captions, _ = data.read_own_images(tmp_path, ["dog"], 24, True)
    assert captions == ["000.bmp", "002.bmp"]
    assert len(images.pixels) == len(images.labels) == 2
    assert "1 of 3" in capsys.readouterr().err


def test_own_images_that_are_not_there(tmp_path):
    assert str(tmp_path / "none") in refused(data.read_own_images, tmp_path / "none", ["dog"], 16, False)
    assert "dog" in refused(data.read_own_images, tmp_path, ["dog"], 16, False)
    write_images(tmp_path / "bird", 1)
    (tmp_path / "dog").mkdir()
    assert "dog" in refused(data.read_own_images, tmp_path, ["dog"], 16, False)


# Numbers ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 999))
def test_channel_statistics_against_numpy(count, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    mean, std = data.channel_statistics(torch.from_numpy(pixels))
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, np.maximum((pixels / 255).std((0, 2, 3)), 1e-3), rtol=1e-9)
    assert all(type(value) is float for value in mean + std)  # they go into the checkpoint


def test_statistics_of_a_plain_image_can_be_divided_by():
    mean, std = data.channel_statistics(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8))
    assert mean == pytest.approx([0.2] * 3)
    assert std == [1e-3] * 3


def test_to_input_against_numpy():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 1.5]
    inputs = data.to_input(torch.from_numpy(pixels), mean, std)
    assert inputs.dtype == torch.float32
    expected = (pixels / 255 - np.array(mean).reshape(3, 1, 1)) / np.array(std).reshape(3, 1, 1)
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)


@given(count=st.integers(1, 300), batch_size=st.integers(1, 70), seed=st.integers(0, 99))
def test_batches_cover_each_image_once_in_near_equal_parts(count, batch_size, seed):
    parts = batches.batches(torch.zeros(count), batch_size, torch.Generator().manual_seed(seed))
    sizes = [len(part) for part in parts]
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == int(np.ceil(count / batch_size))
    again = batches.batches(torch.zeros(count), batch_size, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_batches_are_shuffled_anew_each_time():
    generator = torch.Generator().manual_seed(0)
    orders = [torch.cat(batches.batches(torch.zeros(100), 32, generator)).tolist() for _ in range(2)]
    assert orders[0] != orders[1]
    assert list(range(100)) not in orders


# Augmentation -------------------------------------------------------------------------------------------------------


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Images without a black pixel and without two equal crops."""
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 256, (count, 3, height, width), dtype=np.uint8))


def crops(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Each crop of an image (3, H, W) padded with black by an eighth of its width, and each mirrored crop."""
    _, height, width = image.shape
    padding = width // 8
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            found[crop.tobytes()] = (top, left, False)
            found[np.ascontiguousarray(crop[:, :, ::-1]).tobytes()] = (top, left, True)
    return found


def augmented(pixels: torch.Tensor, flip: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return batches.augment(pixels, batches.draw_augmentation(len(pixels), pixels.shape[-1], flip, generator))


def moves(pixels: torch.Tensor, flip: bool, seed: int = 0) -> list[tuple[int, int, bool]]:
    """What augment did to each image; a KeyError where it did something else."""
    out = augmented(pixels, flip, seed)
    assert out.shape == pixels.shape
    assert out.dtype == torch.uint8
    return [
        crops(before.numpy())[after.contiguous().numpy().tobytes()] for before, after in zip(pixels, out, strict=True)
    ]


@given(
    count=st.integers(1, 6),
    height=st.integers(8, 20),
    width=st.integers(8, 20),
    flip=st.booleans(),
    seed=st.integers(0, 999),
)
def test_augment_only_shifts_and_mirrors(count, height, width, flip, seed):
    done = moves(noise(count, height, width, seed), flip, seed)
    assert flip or not any(mirrored for _, _, mirrored in done)


def test_augment_uses_every_shift_and_both_sides_about_equally_and_without_regard_to_each_other():
    done = moves(noise(1, 16, 16).expand(3000, -1, -1, -1), True)
    counts = {move: done.count(move) for move in set(done)}
    assert len(counts) == 5 * 5 * 2
    # 60 expected of each; six standard deviations are 46.
    assert all(14 < count < 106 for count in counts.values())


def test_augment_without_flip_never_mirrors():
    assert not any(mirrored for _, _, mirrored in moves(noise(1, 16, 16).expand(500, -1, -1, -1), False))


def test_each_image_of_a_batch_moves_for_itself():
    assert len(set(moves(noise(40, 32, 32), True))) > 20


def test_augment_is_fixed_by_its_generator_and_by_nothing_else():
    pixels = noise(8, 16, 16)
    outs = []
    for seed, state in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(state)
        outs.append(augmented(pixels, True, seed))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augment_gives_the_channels_last_layout_and_leaves_its_input(layout):
    pixels = noise(4, 16, 16).contiguous(memory_format=layout)
    before = pixels.clone()
    out = augmented(pixels, True, 0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert data.to_input(out, [0.5] * 3, [0.2] * 3).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("here_first", [False, True])
def test_what_a_step_held_back_stays_held_back_where_its_images_lie_now(here_first):
    steps = [
        {"classes": ["a", "b"], "dataset": "folder", "data_dir": "old", "hold_back": 0.0},
        {"classes": ["c"], "dataset": "digits", "data_dir": "x", "hold_back": 0.2},
    ]
    places = data.test_places(steps, Place("folder", "now", 0.5), here_first)
    expected = {
        "a": [Place("folder", "old", 0.0, download=False), Place("folder", "now", 0.0)],
        "b": [Place("folder", "old", 0.0, download=False), Place("folder", "now", 0.0)],
        "c": [Place("digits", "x", 0.2, download=False), Place("folder", "now", 0.2)],
    }
    assert places == ({name: both[::-1] for name, both in expected.items()} if here_first else expected)
    assert list(places) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", CIFAR_NAMES)
@pytest.mark.parametrize("here_first", [False, True])
def test_nothing_is_downloaded_to_a_place_that_only_a_checkpoint_names(tmp_path, serve_cifar, kind, here_first):
    names = CIFAR_NAMES[kind]
    archive = serve_cifar(kind, names)
    theirs, mine = tmp_path / "theirs", Place(kind, str(tmp_path / "mine"))
    steps = [{"classes": names, "dataset": kind, "data_dir": str(theirs), "hold_back": 0.0}]

    def found(here: Place) -> list[str]:
        return data.find_test_images(data.test_places(steps, here, here_first), 32, False)[1]

    assert found(Place("folder", str(tmp_path / "nowhere"))) == names
    assert not theirs.exists()
    assert found(mine) == []
    assert not theirs.exists()
    assert (tmp_path / "mine" / archive.name).is_file()
    # What lies there already is read.
    shutil.move(tmp_path / "mine", theirs)
    archive.unlink()
    assert found(Place("folder", str(tmp_path / "nowhere"))) == []
