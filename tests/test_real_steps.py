"""The study of a student step by step: what it says of the first step and of the last."""

from __future__ import annotations

import csv

import pandas as pd
import pytest
import torch
from conftest import image_folder

import train_teacher_model as trainer
from lwm import models, training
from lwm.experiments import real_steps

pytestmark = pytest.mark.usefixtures("unrendered")


def test_the_rows_begin_at_the_teacher_and_end_with_what_the_log_says(tmp_path, monkeypatch):
    photos = image_folder(tmp_path / "photos", dict.fromkeys("de", 12), dict.fromkeys("abcde", 4))
    torch.manual_seed(0)
    torch.save(models.build("resnet32", 3, 8).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    taken = ["--model", "resnet32", "--image-size", "8", "--weights", str(tmp_path / "weights.pth"), "--epochs", "0"]
    taken += ["--old-classes-file", str(tmp_path / "classes.txt"), "--output-dir", str(tmp_path)]
    assert trainer.main(taken) == 0
    monkeypatch.setattr(real_steps, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(real_steps, "EVERY", 2)
    loop = training.ResumableBatches
    flags = ["--teacher", str(tmp_path / "teacher_model.pth"), "--dataset", "folder", "--data-dir", str(photos)]
    flags += ["--new-classes", "d,e", "--method", "lwm", "--epochs", "2", "--batch-size", "8", "--calibration", "0"]
    flags += ["--incremental-lr", "0.01", "--batch-norm", "train", "--cache-dir", str(tmp_path / "cache")]
    call = ["trained", "--old-images", str(photos), "--", *flags, "--output-dir", str(tmp_path / "out")]
    assert real_steps.main(call) == 0
    assert training.ResumableBatches is loop
    rows = pd.read_csv(tmp_path / "results" / "steps.csv")
    assert rows["step"].tolist() == [0, 2, 4, 6]
    first, last = rows.iloc[0], rows.iloc[-1]
    assert first[["kl_old", "kl_new", "weights", "statistics"]].abs().max() < 1e-6
    assert last[["kl_old", "kl_new", "weights", "statistics"]].min() > 1e-4
    with (tmp_path / "out" / "student_log.csv").open() as file:
        judged = list(csv.DictReader(file))[-1]
    for name in ("old", "new"):
        assert last[name] == pytest.approx(float(judged[f"test_accuracy_{name}"]), abs=1e-3)
        assert last[f"{name}_told"] == pytest.approx(float(judged[f"test_told_{name}"]), abs=1e-3)
    assert str(tmp_path) not in " ".join(rows["flags"])


def test_divergence_is_that_of_torch():
    teacher, student = torch.randn(2, 5, 7)
    expected = torch.nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    assert real_steps.divergence(teacher, student) == pytest.approx(expected.item(), rel=1e-5)
