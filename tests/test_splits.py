"""Which images are for training and which for testing, of every data set and whatever was held back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, contents, digits, folder_source, image_folder, refused
from hypothesis import given
from hypothesis import strategies as st

from lwm.images import datasets
from lwm.images.datasets import Place, open_source

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
    expected = datasets._hash_split(paths, "cat", tmp_path / "a")
    for shift in range(1, 40, 7):
        assert datasets._hash_split(paths[shift:] + paths[:shift], "cat", tmp_path / "a") == expected
    # Written down, so that a change of the hash does not go unseen: it would move test images into training.
    assert sorted(results[0][1]) == ["018.png", "023.png", "026.png"]


def test_hash_split_takes_a_name_that_is_no_text(tmp_path):
    paths = [Path(os.fsdecode(b"caf\xe9%d.jpg" % number)) for number in range(20)]
    parts = datasets._hash_split(paths, "cat", tmp_path)
    assert sorted(parts["train"] + parts["test"]) == sorted(paths)
    assert parts["train"]
    assert parts["test"]


def test_hash_split_keeps_about_a_fifth_for_testing(tmp_path):
    paths = [tmp_path / f"{index}.jpg" for index in range(2000)]
    for name in ("cat", "dog"):
        parts = datasets._hash_split(paths, name, tmp_path)
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
    source = datasets.Source(
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


@pytest.mark.parametrize("here_first", [False, True])
def test_what_a_step_held_back_stays_held_back_where_its_images_lie_now(here_first):
    steps = [
        {"classes": ["a", "b"], "dataset": "folder", "data_dir": "old", "hold_back": 0.0},
        {"classes": ["c"], "dataset": "digits", "data_dir": "x", "hold_back": 0.2},
    ]
    places = datasets.test_places(steps, Place("folder", "now", 0.5), here_first)
    expected = {
        "a": [Place("folder", "old", 0.0, download=False), Place("folder", "now", 0.0)],
        "b": [Place("folder", "old", 0.0, download=False), Place("folder", "now", 0.0)],
        "c": [Place("digits", "x", 0.2, download=False), Place("folder", "now", 0.2)],
    }
    assert places == ({name: both[::-1] for name, both in expected.items()} if here_first else expected)
    assert list(places) == ["a", "b", "c"]
