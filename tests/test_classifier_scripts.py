"""The classifiers in the scripts: what is kept, compensated for drift, answered with and refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import image_folder

import config
import demo
import export
import gradcam
import incremental_learning_system as incremental
import predict
import train_teacher_model as trainer
from lwm import classifiers, evaluation, exporting
from lwm.images import datasets
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")

SMALL = ["--model", "resnet32", "--image-size", "8", "--epochs", "2", "--calibration", "0"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Teacher, student, and the student of a second task, of a folder's classes."""
    root = tmp_path_factory.mktemp("classifiers")
    images = image_folder(root / "images", dict.fromkeys("abcdef", 8), dict.fromkeys("abcdef", 3))
    flags = [*SMALL, "--dataset", "folder", "--data-dir", str(images), "--cache-dir", str(root / "cache")]
    assert trainer.main([*flags, "--old-classes", "a,b", "--output-dir", str(root / "0")]) == 0
    teacher = root / "0" / "teacher_model.pth"
    for number, new in enumerate(("c,d", "e,f"), 1):
        asked = ["--teacher", str(teacher), "--new-classes", new, "--output-dir", str(root / str(number))]
        assert incremental.main([*flags, *asked]) == 0
        teacher = root / str(number) / "student_model.pth"
    return root, flags


def test_every_task_keeps_and_compensates_the_statistics_of_all_classes(tasks):
    root, flags = tasks
    names = ("0/teacher", "1/student", "2/student")
    first, teacher, student = (checkpoint.load(root / f"{name}_model.pth") for name in names)
    for number, saved in enumerate((first, teacher, student), 1):
        assert saved["statistics"]["means"].shape == (2 * number, 64)
        assert saved["statistics"]["counts"].tolist() == [8] * (2 * number)
        assert tuple(saved["classifiers"])[:4] == classifiers.NAMES
        assert saved["classifiers"]["head"]["accuracy"] == pytest.approx(saved["training"]["log"][-1]["test_accuracy"])
    model = checkpoint.restore_model(student)
    place = datasets.Place("folder", flags[flags.index("--data-dir") + 1])
    images = datasets.open_source(place, 8).test("abcdef", "abcdef")
    metrics = evaluation.of_statistics(model, teacher, student, images, 8)
    untrained = student["classifiers"].pop("untrained")
    assert metrics["classifiers"] == student["classifiers"]
    before, new = checkpoint.restore_model(teacher), datasets.open_source(place, 8).train("ef", "abcdef")
    seen, now = (
        classifiers.features_of(before, each.pixels, teacher["mean"], teacher["std"], 8) for each in (images, new)
    )
    added = classifiers.measure(now, new.labels - 4, 2)
    joined = classifiers.from_checkpoint(teacher).with_images(added, torch.tensor([4, 5]))
    weight, bias = classifiers.lda(joined)
    assert untrained == pytest.approx(evaluation.accuracies(seen @ weight.T + bias, images.labels, 4))
    assert [len(values) for values in metrics["means_off"].values()] == [4, 4]
    assert sum(metrics["means_off"]["compensated"]) < sum(metrics["means_off"]["uncompensated"])
    features, old = classifiers.features_of(model, images.pixels, student["mean"], student["std"], 8), images.labels < 4
    for name, saved in (("compensated", student), ("uncompensated", teacher)):
        _, off = evaluation.statistics_off(classifiers.from_checkpoint(saved), features[old], images.labels[old])
        assert metrics["covariances_off"][name] == off[:4]


def test_what_answers_unasked(tasks, tmp_path, capsys, monkeypatch):
    """LDA; but the head for a network of one task, which is biased towards no class, and without statistics."""
    root, flags = tasks
    teacher, student = root / "0" / "teacher_model.pth", root / "1" / "student_model.pth"
    one, two = checkpoint.load(teacher), checkpoint.load(student)
    bare = one | {"statistics": {}, "classifiers": {}}
    chosen = [classifiers.choose("auto", saved) for saved in (one, two, two | {"statistics": {}})]
    assert chosen == ["head", "lda", "head"]
    assert classifiers.choose("ncm", two) == "ncm"
    checkpoint.save(tmp_path / "bare.pth", bare)
    both = ["--teacher", str(tmp_path / "bare.pth"), "--student", str(student), "--output-dir", str(tmp_path)]
    assert demo.main([*flags, *both, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["teacher_classifier"], said["classifier"]) == ("head", "lda")
    assert demo.main([*flags, *both, "--classifier", "ncm"]) == 2
    assert "--teacher: the checkpoint has no statistics" in capsys.readouterr().err.splitlines()[-1]
    image = str(root / "images" / "test" / "c" / "000.png")
    for name in ("auto", "head"):
        monkeypatch.setattr(config, "CLASSIFIER", name)
        assert predict.main([image, "--checkpoint", str(student), "--json", "--top", "4"]) == 0
        (answer,) = json.loads(capsys.readouterr().out)
        assert sum(each["probability"] for each in answer["classes"]) == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr(config, "CLASSIFIER", "heads")
    assert predict.main([image, "--checkpoint", str(student)]) == 2
    assert "'heads'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", [None, "head", "ncm"])
def test_demo_predict_gradcam_and_export_answer_with_it(tasks, tmp_path, capsys, monkeypatch, name):
    root, flags = tasks
    student, asked = str(root / "2" / "student_model.pth"), ["--classifier", name] if name else []
    both = ["--teacher", str(root / "1" / "student_model.pth"), "--student", student]
    name = name or "lda"
    assert demo.main([*flags, *both, *asked, "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.endswith("<- answers")] == [name]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["classifier"] == name
    # What was recorded by the head after earlier tasks is no yardstick for another classifier.
    best = [[sum(metrics["classes"]["teacher"][first : first + 2]) / 2] for first in (0, 2)]
    if name == "head":
        for task in checkpoint.load(student)["tasks"][:-1]:
            for group, accuracy in enumerate(task["group_accuracy"]):
                best[group].append(accuracy)
    lost = [max(before) - task["accuracy"] for before, task in zip(best, metrics["tasks"], strict=False)]
    assert [task["forgetting"] for task in metrics["tasks"]] == [*map(pytest.approx, lost), None]
    assert metrics["student"]["accuracy"] == pytest.approx(metrics["classifiers"][name]["accuracy"])
    recorded = checkpoint.load(student)["classifiers"]
    assert metrics["classifiers"] == {key: recorded[key] for key in classifiers.NAMES}
    # The page is that of the student's own run if that answers alike.
    assert (tmp_path / "demo_report.html").exists() == (name != "lda")
    image = str(root / "images" / "test" / "e" / "000.png")
    assert predict.main([image, "--checkpoint", student, *asked, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    shown = ["--checkpoint", student, "--image", image, *asked, "--output", str(tmp_path / "map.png")]
    assert gradcam.main(shown) == 0
    assert f"answer ({name}): {answer['classes'][0]['name']};" in capsys.readouterr().out
    exported: list = []
    monkeypatch.setattr(exporting, "onnx_file", lambda *arguments: exported.extend(arguments) or b"")
    monkeypatch.setattr(exporting, "largest_difference", lambda *arguments: 0.0)
    monkeypatch.setattr(exporting, "needs", lambda content: "")
    assert export.main(["--checkpoint", student, "--output", str(tmp_path / "a.onnx"), *asked]) == 0
    saved = checkpoint.load(student)
    answering, _ = classifiers.answer_with(checkpoint.restore_model(saved), saved, name)
    assert torch.equal(exported[0].network.fc.weight, answering.fc.weight)


def test_statistics_that_were_left_out_are_added_when_a_run_is_resumed(tasks, tmp_path, capsys):
    root, flags = tasks
    shutil.copytree(root / "1", tmp_path / "again")
    path = tmp_path / "again" / "student_model.pth"
    flags = [*flags, "--teacher", str(root / "0" / "teacher_model.pth"), "--new-classes", "c,d", "--resume"]
    flags += ["--output-dir", str(path.parent)]
    whole = checkpoint.load(path)
    checkpoint.save(path, whole | {"statistics": {}, "classifiers": {}})
    for more, name in (("--no-statistics", None), ("--statistics", "lda"), ("--classifier=head", "head")):
        capsys.readouterr()
        assert incremental.main([*flags, more]) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in said if line.endswith("<- answers")] == ([name] if name else [])
        saved = checkpoint.load(path)
        assert saved["classifiers"] == (whole["classifiers"] if name else {})
    assert torch.equal(saved["statistics"]["means"], whole["statistics"]["means"])


def test_one_number_for_one_thing(tasks, tmp_path, capsys):
    """A network's accuracy is the same in its run, in the page of its student, and in demo.py, by what answers."""
    root, flags = tasks
    paths = [root / "0" / "teacher_model.pth", root / "1" / "student_model.pth"]
    one, two = map(checkpoint.load, paths)
    both = ["--teacher", str(paths[0]), "--student", str(paths[1])]
    assert demo.main([*flags, *both, "--output-dir", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["teacher_classifier"], metrics["classifier"]) == ("head", "lda")
    assert [metrics["teacher"]["accuracy"]] == [pytest.approx(each) for each in one["tasks"][0]["group_accuracy"]]
    teachers, students = ((path.parent / f"{path.stem[:7]}_report.html").read_text() for path in paths)
    assert f"<td>{metrics['teacher']['accuracy']:.1f}</td>" in teachers
    by_lda = two["classifiers"]["lda"]
    for shown in (metrics["teacher"]["accuracy_old"], *(by_lda[f"accuracy{group}"] for group in ("", "_old", "_new"))):
        assert f"<td>{shown:.1f}</td>" in students
    capsys.readouterr()
    resumed = [*flags, *both, "--new-classes", "c,d", "--resume", "--json", "--output-dir", str(tmp_path)]
    assert incremental.main(resumed) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["classifier"] == "lda"
    for name in ("accuracy", "accuracy_old", "told_new"):
        assert said[f"test_{name}"] == pytest.approx(by_lda[name])
    assert said["lost"] == metrics["lost"]


def test_the_page_of_demo_is_written_for_other_images(tasks, tmp_path):
    root, flags = tasks
    both = ["--teacher", str(root / "0" / "teacher_model.pth"), "--student", str(root / "1" / "student_model.pth")]
    page = tmp_path / "demo_report.html"
    page.write_text("of another day")
    assert demo.main([*flags, *both, "--output-dir", str(tmp_path)]) == 0
    assert not page.exists()
    assert demo.main([*both, "--images", str(root / "images" / "train"), "--output-dir", str(tmp_path)]) == 0
    assert "Student of 4 classes" in page.read_text()
