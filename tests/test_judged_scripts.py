"""The scripts on folders: what they judge on, what they record of it, what they say of the rest, and which classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import image_folder, write_images
from tinyruns import SMALL

import demo
import incremental_learning_system as incremental
import predict
import train_teacher_model as trainer
from lwm import models
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")
TRAINED = ["--epochs", "1", "--batch-size", "8", "--calibration", "0"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def taught(*flags: str, folder: str = "data", old: str = "0,1") -> dict[str, Any]:
    """The checkpoint of a teacher, in out/teacher_model.pth."""
    place = ["--dataset", "folder", "--data-dir", folder, "--old-classes", old]
    assert trainer.main([*SMALL, *TRAINED, *place, "--output-dir", "out", "--overwrite", *flags]) == 0
    return checkpoint.load("out/teacher_model.pth")


def learned(*flags: str, folder: str = "data", new: str = "2,3") -> dict[str, Any]:
    """The checkpoint of a student, in out/student_model.pth."""
    place = ["--dataset", "folder", "--data-dir", folder, *(["--new-classes", new] if new else [])]
    teacher = ["--teacher", "out/teacher_model.pth", "--output-dir", "out", "--overwrite"]
    assert incremental.main([*teacher, *TRAINED, *place, *flags]) == 0
    return checkpoint.load("out/student_model.pth")


def shown(*flags: str) -> list[int]:
    """How many images of each class demo.py has judged."""
    both = ["--teacher", "out/teacher_model.pth", "--student", "out/student_model.pth", "--output-dir", "shown"]
    assert demo.main([*both, "--classifier", "head", *flags]) == 0
    return np.sum(json.loads(Path("shown/metrics.json").read_text())["confusion"], axis=1).tolist()


def data(root: str = "data", train: int = 6, test: int = 2) -> Path:
    return image_folder(Path(root), dict.fromkeys("0123", train), dict.fromkeys("0123", test) if test else None)


def test_a_network_taken_as_it_is_is_judged_on_the_users_images_and_on_no_data_set(capsys):
    """Its classes are named 0 to 9, as those of config.py's data set are."""
    torch.save(models.build("resnet32", 2, 8).state_dict(), "own.pth")
    own = [*SMALL, "--weights", "own.pth", "--old-classes", "0,1", "--epochs", "0", "--output-dir", "out"]
    assert trainer.main(own) == 0
    (task,) = checkpoint.load("out/teacher_model.pth")["tasks"]
    assert (task["judged"], task["dataset"], task["group_accuracy"], task["apart"]) == (None, "", [None], [])
    assert task["learning_rate"] is task["flip"] is None  # the page shows no data set's
    data()
    student = learned()
    assert student["tasks"][0]["group_accuracy"] == [None]
    old, new = student["tasks"][1]["group_accuracy"]
    assert old is not None is not new
    place = {"dataset": "folder", "data_dir": str(Path("data").resolve())}
    assert student["tasks"][1]["judged"] == {**place, "split": "test"}
    assert shown() == [2, 2, 2, 2]  # the images that the student's run has used
    shutil.rmtree("data/test/0")
    assert shown() == [0, 2, 2, 2]
    assert trainer.main([*own, "--data-dir", "data", "--overwrite"]) == 0
    (task,) = checkpoint.load("out/teacher_model.pth")["tasks"]
    assert task["judged"] is None is not task["group_accuracy"][0]
    capsys.readouterr()
    shutil.rmtree("data/test/1")
    assert trainer.main([*own, "--data-dir", "data", "--overwrite"]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "no test images of 0, 1" in line]


def test_test_images_that_are_gone_are_not_replaced_by_training_images():
    data()
    teacher = taught()
    assert teacher["tasks"][0]["judged"]["split"] == "test"
    shutil.move("data/test", "archive")
    image_folder(Path("new"), dict.fromkeys("23", 6), dict.fromkeys("23", 2))
    student = learned(folder="new")
    old, new = student["tasks"][1]["group_accuracy"]
    assert old is None is not new
    assert shown() == shown("--data-dir", "data") == [0, 0, 2, 2]
    Path("moved").mkdir()
    shutil.move("archive", "moved/test")
    assert shown("--data-dir", "moved") == [2, 2, 2, 2]


def test_images_that_a_task_sets_apart_judge_it_wherever_they_lie_and_no_others_do():
    data(train=12, test=0)
    teacher = taught()
    counts = [len([*Path("data/train", name).iterdir()]) for name in "0123"]
    apart = len(teacher["tasks"][0]["apart"])
    assert teacher["tasks"][0]["judged"]["split"] == "apart"
    assert f"{sum(counts[:2]) - apart}, " in teacher["training"]["images"]
    student = learned()
    assert [len(task["apart"]) > 1 for task in student["tasks"]] == [True, True]
    judged = shown()
    assert (sum(judged[:2]), sum(judged)) == (apart, sum(len(task["apart"]) for task in student["tasks"]))
    for path in Path("data").rglob("*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    shutil.move("data", "moved")
    assert shown("--data-dir", "moved") == judged
    shutil.rmtree("moved/train/0")
    assert shown("--data-dir", "moved") == [0, *judged[1:]]


def test_val_is_used_and_images_below_subfolders_are_too(capsys):
    data()
    Path("data/test").rename("data/val")
    for name in "01":
        write_images(Path("data/train", name, "more", "still more"), 5, seed=ord(name))
    Path("data/train/0/more/notes.txt").touch()
    teacher = taught()
    assert teacher["training"]["images"].startswith("22, ")
    assert teacher["tasks"][0]["judged"]["split"] == "val"
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "4 test images" in line]
    assert len([line for line in said if " val " in line]) == 1
    assert len([line for line in said if "left out" in line and "(.txt): 1" in line]) == 1
    shutil.move("data/train", "plain")  # the classes alone
    capsys.readouterr()
    assert taught(folder="plain")["tasks"][0]["judged"]["split"] == "apart"
    assert len([line for line in capsys.readouterr().err.splitlines() if "fifth" in line]) == 1
    assert predict.main(["--checkpoint", "out/teacher_model.pth", "--json", "plain"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2 * 11 + 2 * 6


def test_every_new_class_is_learned_or_those_of_a_file(capsys):
    data()
    image_folder(Path("data"), {"zebra": 6, "b": 6, "empty": 0}, {"zebra": 1, "b": 1})
    Path("data/train/empty").mkdir(exist_ok=True)
    taught(old="3,0")
    capsys.readouterr()
    assert learned(new="all")["class_names"] == ["3", "0", "1", "2", "b", "zebra"]
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "1, 2, b, zebra" in line and "empty" in line]) == 1
    Path("new.txt").write_text("zebra\n\n2\n")
    assert learned("--new-classes-file", "new.txt", new="")["class_names"] == ["3", "0", "zebra", "2"]
    teacher = ["--teacher", "out/teacher_model.pth", "--output-dir", "x", "--dataset", "folder", "--data-dir", "data"]
    assert incremental.main([*teacher, "--new-classes-file", "new.txt", "--new-classes", "2"]) == 2
    for name in ("1", "2", "b", "zebra"):
        shutil.rmtree(Path("data/train", name))
    assert incremental.main([*teacher, "--new-classes", "all"]) == 2
    assert "--new-classes" in capsys.readouterr().err.splitlines()[-1]
