"""The scripts as a user runs them: what they write, what they refuse, and that old images stay unread."""

import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_folder, write_images

import demo
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm.evaluation import accuracies, predict, task_aware
from lwm.images.datasets import Place, open_source
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "resnet32", "--image-size", "8"]


def run(script: str, *flags: str) -> object:
    """The exit code of a script's command line, in this process, since another one takes seconds to import torch."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return ended.value.code


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """Teacher and student of 2 + 2 digits, by the command lines."""
    folder = tmp_path_factory.mktemp("quick")
    output = ["--output-dir", str(folder), "--epochs", "2"]
    assert run("train_teacher_model.py", *SMALL, *output) == 0
    assert run("incremental_learning_system.py", "--teacher", str(folder / "teacher_model.pth"), *output) == 0
    return folder


@pytest.fixture
def teacher(quick) -> str:
    return str(quick / "teacher_model.pth")


@pytest.fixture
def student(quick) -> str:
    return str(quick / "student_model.pth")


# What they write --------------------------------------------------------------------------------------------------


def test_training_writes_logs_and_a_checkpoint_that_is_the_whole_hand_over(quick):
    first, second = rows(quick / "teacher_log.csv"), rows(quick / "student_log.csv")
    assert [row["epoch"] for row in first] == [row["epoch"] for row in second] == ["1", "2"]
    assert {"loss", "accuracy", "lr", "images_per_second"} <= first[0].keys()
    terms = {"classification", "distillation", "attention", "zero_maps", "test_accuracy_old", "test_accuracy_new"}
    assert terms <= second[0].keys()
    saved = checkpoint.load(quick / "student_model.pth")
    assert [task["classes"] for task in saved["tasks"]] == [["0", "1"], ["2", "3"]]
    assert saved["class_names"] == ["0", "1", "2", "3"]
    assert (saved["architecture"], saved["image_size"], saved["loss_form"]) == ("resnet32", 8, "binary")
    assert saved["finished"] is True


def test_demo_by_its_command_line(tmp_path, quick, teacher, student):
    flags = ["--teacher", teacher, "--student", student, "--output-dir", str(tmp_path), "--classifier", "head"]
    assert run("demo.py", *flags) == 0
    metrics = metrics_of(tmp_path)
    assert metrics["teacher"]["accuracy_new"] is None
    last = rows(quick / "student_log.csv")[-1]
    assert metrics["student"] == pytest.approx({name: float(last[f"test_{name}"]) for name in metrics["student"]})
    assert np.sum(metrics["confusion"]) == 180
    group = metrics["tasks"][0]
    assert group["forgetting"] == pytest.approx(metrics["teacher"]["accuracy_old"] - group["accuracy"])
    assert {"demo.png", "demo_report.html"} <= {path.name for path in tmp_path.iterdir()}


def test_demo_judges_own_images_and_shows_those_without_classes(tmp_path, teacher, student, capsys):
    for name in ("1", "3"):
        write_images(tmp_path / "own" / name, 3)
    models = ["--teacher", teacher, "--student", student, "--output-dir"]
    assert demo.main([*models, str(tmp_path / "out"), "--images", str(tmp_path / "own")]) == 0
    assert [value is None for value in metrics_of(tmp_path / "out")["classes"]["student"]] == [True, False, True, False]
    capsys.readouterr()
    assert demo.main([*models, str(tmp_path / "flat"), "--images", str(tmp_path / "own" / "1")]) == 0
    said = capsys.readouterr().out
    assert all(f"{seed:03}.png: " in said for seed in range(3))
    assert (tmp_path / "flat" / "demo.png").exists()
    assert not (tmp_path / "flat" / "metrics.json").exists()
    other = tmp_path / "other.pth"  # the same classes, trained for larger images
    checkpoint.save(other, checkpoint.load(teacher) | {"image_size": 32})
    assert demo.main(["--teacher", str(other), *models[2:], str(tmp_path / "new")]) == 2
    assert "image_size" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_every_method_replaces_a_student_when_asked_and_mixed_forms_are_warned_of(tmp_path, teacher, capsys):
    agreeing = ["--old-classes", "0,1", "--model", "resnet32", "--image-size", "8"]  # with the teacher
    flags = ["--teacher", teacher, *agreeing, "--epochs", "1", "--output-dir", str(tmp_path), "--overwrite"]
    before = {}
    for method, mixed in (("finetune", True), ("lwf", True), ("lwf-mc", False), ("frozen", False)):
        capsys.readouterr()
        assert incremental.main([*flags, "--method", method]) == 0
        assert ("different scales" in capsys.readouterr().err) == mixed
        assert not same(before, before := weights(tmp_path / "student_model.pth"))
    old = weights(Path(teacher))
    assert all(torch.equal(value, before[name]) for name, value in old.items() if not name.startswith("fc"))
    assert torch.equal(before["fc.weight"][:2], old["fc.weight"])  # the last one's backbone and old rows are frozen


# Which images are read --------------------------------------------------------------------------------------------


def test_the_old_training_images_are_never_read(tmp_path):
    """The student of a folder is the same to the last bit when the old classes' images, train and test, are gone."""
    counts = dict.fromkeys(("zebra", "ant", "mole", "bee"), 8)
    data = image_folder(tmp_path / "data", counts, dict.fromkeys(counts, 3))
    common = ["--dataset", "folder", "--data-dir", str(data), "--epochs", "2", "--batch-size", "8", "--output-dir"]
    assert trainer.main([*SMALL, "--old-classes", "zebra,mole", *common, str(tmp_path / "first")]) == 0
    teacher = ["--teacher", str(tmp_path / "first" / "teacher_model.pth")]
    task = [*teacher, "--new-classes", "bee,ant", *common]
    assert incremental.main([*task, str(tmp_path / "all")]) == 0
    for name in ("zebra", "mole"):
        (data / "train" / name / "000.png").write_bytes(b"whoever reads this fails")
    assert incremental.main([*task, str(tmp_path / "spoilt")]) == 0
    for name in ("zebra", "mole"):
        shutil.rmtree(data / "train" / name)
        shutil.rmtree(data / "test" / name)
    gone = tmp_path / "gone"
    assert incremental.main([*task, str(gone)]) == 0
    assert demo.main([*teacher, "--student", str(gone / "student_model.pth"), "--output-dir", str(gone)]) == 0
    first, *others = (weights(tmp_path / name / "student_model.pth") for name in ("all", "spoilt", "gone"))
    assert all(same(first, other) for other in others)
    row, judged = rows(gone / "student_log.csv")[-1], metrics_of(gone)["student"]
    assert row["test_accuracy_old"] == "" != row["test_accuracy_new"]
    assert judged["accuracy_old"] is judged["told_old"] is None is not judged["accuracy_new"]


def test_each_class_is_judged_on_what_its_own_task_held_back(tmp_path, teacher):
    """The teacher held nothing back, so its classes are judged on test images; the student's on those held back."""
    shares = ["--hold-back", "0.2", "--calibration", "0"]
    flags = ["--teacher", teacher, "--epochs", "1", *shares, "--output-dir", str(tmp_path)]
    assert incremental.main(flags) == 0
    models = ["--teacher", teacher, "--student", str(tmp_path / "student_model.pth")]
    assert demo.main([*models, "--classifier", "head", "--output-dir", str(tmp_path)]) == 0
    source = open_source(Place("digits", ""), 8)
    tests = [len(source.test([name], [name]).labels) for name in "01"]
    counts = [len(source.train([name], [name]).labels) for name in "23"]
    held = [-(-count // 5) for count in counts]
    assert np.sum(metrics_of(tmp_path)["confusion"], axis=1).tolist() == tests + held
    images = checkpoint.load(tmp_path / "student_model.pth")["training"]["images"]
    assert images.startswith(f"{sum(counts) - sum(held)}, ")  # the rest is trained on


# Classes and tasks ------------------------------------------------------------------------------------------------


def test_classes_in_any_order_keep_their_labels(tmp_path):
    """Old classes that come last in the alphabet, judged against labels made here."""
    size = ["--model", "resnet32", "--image-size", "16"]
    assert trainer.main([*size, "--epochs", "6", "--old-classes", "1,0", "--output-dir", str(tmp_path)]) == 0
    saved = checkpoint.load(tmp_path / "teacher_model.pth")
    source, model = open_source(Place("digits", ""), 16), checkpoint.restore_model(saved)
    right = []
    for label, name in enumerate("10"):
        pixels = source.test([name], [name]).pixels
        right += (predict(model, pixels, saved["mean"], saved["std"], 8).argmax(1) == label).tolist()
    expected = float(rows(tmp_path / "teacher_log.csv")[-1]["test_accuracy"])
    assert 100 * np.mean(right) == pytest.approx(expected)
    assert expected > 70  # labels that were mixed up would give the other answer


def test_three_tasks_from_the_student_alone_and_one_single_class(tmp_path, student):
    before = student
    for name, new in (("second", "9"), ("third", "5,4")):
        flags = ["--teacher", before, "--new-classes", new, "--epochs", "2", "--output-dir", str(tmp_path / name)]
        assert incremental.main(flags) == 0
        second, before = before, str(tmp_path / name / "student_model.pth")
    third, saved = tmp_path / "third", checkpoint.load(before)
    assert saved["class_names"] == ["0", "1", "2", "3", "9", "5", "4"]
    assert [len(task["group_accuracy"]) for task in saved["tasks"]] == [1, 2, 3, 4]
    tests = open_source(Place("digits", ""), 8).test(saved["class_names"], saved["class_names"])
    logits = predict(checkpoint.restore_model(saved), tests.pixels, saved["mean"], saved["std"], 8)
    expected = accuracies(logits, tests.labels, 5) | {"task_aware": task_aware(logits, tests.labels, [2, 2, 1, 2])}
    last = rows(third / "student_log.csv")[-1]
    assert {name: float(last[f"test_{name}"]) for name in expected} == pytest.approx(expected)
    flags = ["--student", before, "--output-dir", str(third)]
    assert demo.main(["--teacher", second, "--classifier", "head", *flags]) == 0
    tasks = metrics_of(third)["tasks"]
    assert [task["classes"] for task in tasks] == [["0", "1"], ["2", "3"], ["9"], ["5", "4"]]
    best = max(task["group_accuracy"][0] for task in saved["tasks"][:-1])
    assert tasks[0]["forgetting"] == pytest.approx(best - tasks[0]["accuracy"])
    assert tasks[3]["forgetting"] is None
    assert demo.main(["--teacher", student, *flags]) == 0  # a teacher of two tasks before
    assert [len(metrics_of(third)["classes"][who]) for who in ("teacher", "student")] == [4, 7]


def test_two_and_two_classes_of_cifar100_are_downloaded_once(tmp_path, serve_cifar):
    taught = ["apple", "aquarium_fish", "baby", "bear"]
    archive = serve_cifar("cifar100", ["worm", *reversed(taught)], train=6, test=2)
    place = ["--dataset", "cifar100", "--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path)]
    teacher = ["--teacher", str(tmp_path / "teacher_model.pth"), *place]
    assert trainer.main([*place, "--epochs", "1", "--old-classes", "apple,aquarium_fish"]) == 0
    archive.unlink()
    assert incremental.main([*teacher, "--epochs", "1", "--new-classes", "baby,bear"]) == 0
    assert demo.main([*teacher, "--student", str(tmp_path / "student_model.pth")]) == 0
    assert metrics_of(tmp_path)["classes"]["names"] == taught
    assert np.sum(metrics_of(tmp_path)["confusion"], axis=1).tolist() == [2, 2, 2, 2]
