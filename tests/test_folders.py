"""What a folder of images holds: layouts, names, links, and the one line about what is left out."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from conftest import folder_source, image_folder, refused, write_images
from PIL import Image

from lwm.images.folders import Folder, images_below, typical_side
from lwm.runtime.errors import start_log


def layout(root: Path, *files: str) -> Folder:
    """A folder with these files, empty, opened."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return Folder(root)


def left_out(capsys) -> dict[str, int]:
    """What the one line counts."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 2
    return {
        kind: int(count) for kind, count in re.findall(r"(?:are|,) ([a-z' ]+)(?: \([^)]*\))?: (\d+)", "".join(lines))
    }


LAYOUTS = {  # files -> the classes of each split
    ("cat/a.png", "dog/a.png"): {"train": ["cat", "dog"]},
    ("train/cat/a.png", "test/dog/a.png"): {"train": ["cat"], "test": ["dog"]},
    ("train/cat/a.png", "val/cat/a.png"): {"train": ["cat"], "val": ["cat"]},
    ("test/cat/a.png",): {"test": ["cat"]},
    ("train/a.png", "trout/a.png"): {"train": ["train", "trout"]},  # CIFAR-100 has a class train
    ("train/train/a.png", "train/test/a.png", "val/x.png"): {"train": ["test", "train"]},
}


@pytest.mark.parametrize("files", LAYOUTS, ids=" ".join)
def test_layouts(tmp_path, files):
    folder = layout(tmp_path, *files)
    assert folder.classes == LAYOUTS[files]
    for split, names in folder.classes.items():
        for name in names:
            assert [path.name for path in folder.files(split, name)] == ["a.png"]
        assert folder.files(split, "zebra") == []


def test_images_are_found_at_any_depth_and_through_links_that_may_lead_in_circles(tmp_path, capsys):
    start_log()
    files = ["train/cat/b.png", "train/cat/deep/er/a.png", "train/cat/deep/notes.txt", "train/dog/d.png"]
    layout(tmp_path / "x", *files)
    cat = tmp_path / "x/train/cat"
    layout(tmp_path / "elsewhere", "far/c.png")
    for link, to in {"deep/up": cat, "top": tmp_path, "twin": cat / "deep", "self": cat / "self"}.items():
        (cat / link).symlink_to(to)
    (cat / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x/train/linked").symlink_to(tmp_path / "elsewhere")
    folder = Folder(tmp_path / "x")
    assert [path.name for path in folder.files("train", "cat")] == ["b.png", "a.png", "c.png"]
    assert [path.name for path in folder.files("train", "linked")] == ["c.png"]
    folder.say_left_out(["cat"])
    # A link to itself is no folder.
    assert left_out(capsys) == {"files that are no images": 2, "folders that a link leads to again": 3}
    folder.say_left_out(["cat"])
    assert left_out(capsys) == {}


def test_what_is_left_out_is_counted_in_one_line(tmp_path, capsys):
    start_log()
    files = ["train/README.md", "train/cat/a.png", "train/cat/a.txt", "train/.DS_Store", "train/cat/.hidden/b.png"]
    files += [
        "raw/cat/c.png",
        "notes/x.txt",
        "labels.csv",
        "train/Cat/d.png",
        "test/cat/e.png",
        "test/z.png",
        "val/f.png",
    ]
    folder = layout(tmp_path, *files)
    source = folder_source(tmp_path)
    assert "'cat'" in refused(source.train, ["cat"], ["cat"])  # one is too few
    said = capsys.readouterr().err
    capsys.readouterr()
    assert all(name in said for name in ("notes, raw, val", "Cat", ".txt"))
    for split in ("train", "test"):
        folder.files(split, "cat")
    folder.say_left_out(["cat"])
    assert left_out(capsys) == {
        "files that are no images": 1,
        "files beside the class folders": 3,
        "folders beside the splits": 3,
        "folders whose names differ in case from a class's": 1,
    }
    folder.say_left_out(["cat", "dog"], unknown=True)
    assert left_out(capsys) == {}
    layout(tmp_path, "train/owl/a.png").say_left_out(["cat", "Cat"], unknown=True)
    assert left_out(capsys)["folders of unknown classes"] == 1


@pytest.mark.parametrize(("on_disk", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_class_is_the_same_in_another_unicode_form_and_split_alike(tmp_path, on_disk, asked):
    name, other = (unicodedata.normalize(form, "café") for form in (on_disk, asked))
    write_images(tmp_path / "one" / name, 30)
    write_images(tmp_path / "other" / "train" / other, 30)
    first, second = (folder_source(tmp_path / each).parts(other) for each in ("one", "other"))
    for one, another in zip(first[:2], second[:2], strict=True):
        assert [path.name for path in one] == [path.name for path in another] != []
    assert len(folder_source(tmp_path / "one").train([other], ["x", other]).labels) == len(first.train)


def test_a_name_in_another_case_is_another_class_and_offered(tmp_path):
    image_folder(tmp_path, {"CAT": 3, "dog": 3}, {"CAT": 1, "Dog": 1})
    source = folder_source(tmp_path)
    assert "'CAT'" in refused(source.train, ["cat"], ["cat"])
    assert "'dog'" in refused(source.test, ["dog"], ["dog"])


def test_a_folder_for_prediction_is_read_to_its_depth(tmp_path, capsys):
    start_log()
    layout(tmp_path, "b.png", "2024/may/a.JPG", "2024/notes.txt")
    os.rename(tmp_path / "b.png", os.fsencode(tmp_path) + b"/\xe9.png")  # a name that is no text
    assert len(images_below(tmp_path)) == 2
    assert left_out(capsys) == {"files that are no images": 1}


def test_the_typical_side_is_a_median_from_headers(tmp_path):
    paths = [*write_images(tmp_path, 3, size=24), tmp_path / "none.png"]
    Image.new("L", (300, 10)).save(tmp_path / "x.png")
    (tmp_path / "y.png").write_bytes((tmp_path / "x.png").read_bytes()[:60])  # the header alone
    assert typical_side([*paths, tmp_path / "x.png", tmp_path / "y.png"]) == 24
    assert typical_side([tmp_path / "y.png"] * 500) == 10
    assert typical_side(paths[3:]) is typical_side([]) is None
    shutil.rmtree(tmp_path)
    assert typical_side(paths) is None
