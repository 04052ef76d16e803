"""What only a GPU can show: the losses' gradients there, and the scripts from start to resumed end."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import loss_settings, randomised
from otherroute import random

import demo
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm.losses import lwm
from lwm.runtime import checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")


@pytest.mark.parametrize("architecture", ["resnet18", "resnet32"])
def test_the_loss_of_lwm_and_its_gradients_are_those_of_the_cpu(architecture):
    teacher, student = randomised(architecture, 3, 16).eval(), randomised(architecture, 5, 16, seed=1)
    for model in (teacher, student):
        model.fc.weight.data.abs_()  # maps that are not all zero
    images, labels, found = random(4, 3, 16, 16), torch.tensor([3, 4, 3, 4]), []
    for device in ("cpu", "cuda"):
        here, frozen = copy.deepcopy(student).to(device), copy.deepcopy(teacher).to(device)
        inputs = images.to(device)
        terms = lwm(here(inputs), frozen(inputs), labels.to(device), 3, loss_settings())
        gradients = torch.autograd.grad(terms["total"], list(here.parameters()))
        found.append([terms["attention"], terms["total"], *gradients])
    assert found[0][0] > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teacher_student_resume_and_demo(tmp_path, precision):
    teacher, student = (str(tmp_path / f"{role}_model.pth") for role in ("teacher", "student"))
    common = ["--output-dir", str(tmp_path), "--device", "cuda", "--quiet"]
    training = [*common, "--epochs", "2", "--precision", precision]
    assert trainer.main(training) == 0
    assert incremental.main([*training, "--teacher", teacher]) == 0
    saved = checkpoint.load(student)
    assert saved["tasks"][-1]["precision"] == precision
    assert all(tensor.device.type == "cpu" for tensor in saved["model"].values())
    assert incremental.main([*training, "--teacher", teacher, "--student", student, "--resume"]) == 0
    assert demo.main([*common, "--teacher", teacher, "--student", student]) == 0
