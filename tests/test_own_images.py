"""The study of README's own commands on photographs: what it runs, on which images, and what it writes."""

import json
import types

import pandas as pd
import pytest
from conftest import image_folder, refused

from lwm.experiments import against_frozen, own_images, tables

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


def test_lwm_and_the_closed_form_learn_three_and_then_two_classes_from_one_teacher(data, tmp_path, monkeypatch):
    ran = []

    def run_script(script, folder, flags, threads):
        ran.append((script, folder, dict(zip(flags[::2], flags[1::2], strict=True))))
        return folder / "model.pth"

    saved = {"classifiers": {"lda": {"accuracy": 50.0, "accuracy_old": 40.0, "accuracy_new": 60.0}}}
    monkeypatch.setattr(against_frozen.cells, "run_script", run_script)
    monkeypatch.setattr(against_frozen, "load", lambda path: saved)
    monkeypatch.setattr(against_frozen, "choose", lambda wanted, checkpoint: "lda")
    monkeypatch.setattr(tables, "ROOT", tmp_path / "project")
    flags = ["--data-dir", str(data), "--images", "2,3", "--work-dir", str(tmp_path / "work")]
    assert against_frozen.main([*flags, "--flags=--model resnet32"]) == 0
    assert len(ran) == 3 * 2 * 5
    (_, teacher, own), (_, first, lwm), (_, _, second), (_, _, closed) = ran[5:9]  # of 3 images
    assert (own["--old-classes"], own["--model"]) == ("a,b,c,d,e", "resnet32")
    assert len([*(tmp_path / "work/photos-3/0/photos/train/a").iterdir()]) == 3
    assert lwm["--teacher"] == closed["--teacher"] == str(teacher / "model.pth")
    assert second["--teacher"] == str(first / "model.pth")
    assert [each["--new-classes"] for each in (lwm, second, closed)] == ["f,g,h", "i,j", "f,g,h"]
    assert [each["--method"] for each in (lwm, second, closed)] == ["lwm", "lwm", "closed-form"]
    table = (tmp_path / "project/results/against-frozen/table.md").read_text()
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        [f"| photos, {images} images", str(classes)] for images in (2, 3) for classes in (8, 10)
    ]
