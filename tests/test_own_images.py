"""The study of README's own commands on photographs: what it runs, on which images, and what it writes."""

import json
import types

import pandas as pd
import pytest
from conftest import image_folder, refused

from lwm.experiments import own_images, tables

CLASSES = "abcdefghij"


@pytest.fixture
def data(tmp_path):
    return image_folder(tmp_path / "photos", dict.fromkeys(CLASSES, 3), dict.fromkeys(CLASSES, 2))


def test_a_split_begins_later_in_the_order_of_names_and_leaves_two_classes_out(data):
    assert own_images.classes_of(data, 3) == (list("defghija"), list("bc"))
    for name in "defghija":
        for split in ("train", "test"):
            for image in (data / split / name).iterdir():
                image.unlink()
            (data / split / name).rmdir()
    assert "8 classes" in refused(own_images.classes_of, data, 0)


def test_links_are_to_so_many_training_images_and_to_all_test_images(data, tmp_path):
    folder = own_images.linked(data, ["a", "j"], tmp_path / "links", images=2)
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert found == [
        f"{split}/{name}/{index:03}.png" for split in ("test", "train") for name in "aj" for index in (0, 1)
    ]
    assert (folder / "train/j/000.png").read_bytes() == (data / "train/j/000.png").read_bytes()


def test_the_commands_are_those_of_readme_with_its_classes_exchanged(data, tmp_path, monkeypatch):
    ran = []

    def run(command, cwd, stdout, stderr):
        ran.append(command[1:])
        student = {"accuracy": 50.0, "accuracy_old": 40.0, "accuracy_new": 60.0}
        metrics = {"teacher": {"accuracy": 70.0}, "student": student, "classifiers": {"head": {"accuracy": 30.0}}}
        for folder in (tmp_path / "work").glob("*/[0-2]"):
            (folder / "metrics.json").write_text(json.dumps(metrics))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(own_images.subprocess, "run", run)
    monkeypatch.setattr(own_images.subprocess, "check_output", lambda *arguments, **named: "abc1234\n")
    code, results = tables.ROOT, tmp_path / "project"
    monkeypatch.setattr(tables, "ROOT", results)
    flags = ["--data-dir", str(data), "--code", str(code), "--size", "48", "--flags=--stem cifar"]
    assert own_images.main([*flags, "--work-dir", str(tmp_path / "work")]) == 0
    assert [words[0] for words in ran] == [*own_images.SCRIPTS] * 3
    first = ran[0]
    assert first[first.index("--old-classes") + 1] == "a,b,c,d,e"
    assert first[-5:] == ["--image-size", "48", "--stem", "cifar", "--overwrite"]
    second = ran[4]
    assert second[second.index("--new-classes") + 1] == "i,j,a"
    rows = pd.read_csv(results / "results/own-images/accuracy.csv")
    assert rows["accuracy"].tolist() == [50.0] * 3
    assert set(rows["method"]) == {"abc1234, 48 px --stem cifar"}
    ran.clear()
    assert own_images.main([*flags, "--work-dir", str(tmp_path / "work")]) == 0
    assert ran == []  # what is done is not run again
