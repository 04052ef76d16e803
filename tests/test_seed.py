"""The seed alone decides what is drawn: networks that are built before and thrown away do not count."""

from __future__ import annotations

import pytest
import torch
from tinyruns import SMALL

import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import losses
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")


def nothing_learned(student, teacher, labels, old, settings):
    assert teacher is None  # what a method does not ask for is not run
    return {"total": 0 * student.logits.sum()}


def test_new_rows_of_the_head_are_the_first_that_the_seed_draws(tmp_path, monkeypatch):
    monkeypatch.setitem(losses.METHODS, "nothing", losses.Method(nothing_learned, asks_teacher=False))
    assert trainer.main([*SMALL, "--epochs", "1", "--output-dir", str(tmp_path)]) == 0
    flags = ["--teacher", str(tmp_path / "teacher_model.pth"), "--method", "nothing", "--epochs", "1", "--seed", "5"]
    assert incremental.main([*flags, "--output-dir", str(tmp_path)]) == 0
    rows = checkpoint.load(tmp_path / "student_model.pth")["model"]["fc.weight"][2:]
    torch.manual_seed(5)
    assert torch.equal(rows, torch.nn.Linear(rows.shape[1], 4).weight[2:])
