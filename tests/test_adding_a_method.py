"""A method is added in one place: a function, and a record in losses.METHODS."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from conftest import refused
from tinyruns import SMALL

import demo
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import classifiers, losses
from lwm.experiments import protocols
from lwm.runtime import checkpoint
from lwm.runtime.settings import read_settings

pytestmark = pytest.mark.usefixtures("unrendered")


def pulled(student, teacher, labels, old, settings):
    """Features are pulled to the teacher's; the labels are learned over all outputs."""
    classification = losses.classification_loss(student.logits, labels, old, settings.loss_form)
    pull = (student.features - teacher.features).square().mean()
    return {"total": classification + settings.beta * pull, "classification": classification, "pull": pull}


ADDED = {
    "pulled": losses.Method(pulled, "softmax-all"),
    "no-epoch": losses.Method(None, trains_backbone=False),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    assert trainer.main([*SMALL, "--epochs", "1", "--output-dir", str(folder)]) == 0
    return folder / "teacher_model.pth"


@pytest.mark.parametrize("name", ADDED)
def test_a_method_is_a_function_and_a_record(teacher, tmp_path, capsys, monkeypatch, name):
    flags = ["--teacher", str(teacher), "--method", name, "--epochs", "1", "--output-dir", str(tmp_path)]
    assert incremental.main(flags) == 2
    monkeypatch.setitem(losses.METHODS, name, ADDED[name])
    assert incremental.main(flags) == 0
    before, after = checkpoint.load(teacher), checkpoint.load(tmp_path / "student_model.pth")
    assert [after["tasks"][1][key] for key in ("method", "loss_form")] == [name, ADDED[name].form or "softmax"]
    assert after["class_names"] == ["0", "1", "2", "3"]
    backbone = [key for key in before["model"] if not key.startswith("fc.")]
    assert all(torch.equal(before["model"][key], after["model"][key]) for key in backbone) is (name == "no-epoch")
    if name == "pulled":
        assert after["training"]["log"][0].keys() >= {"loss", "classification", "pull", "test_accuracy"}
    else:  # the head is LDA, from statistics that the checkpoint keeps in single precision
        weight, bias = classifiers.lda(classifiers.from_checkpoint(after))
        torch.testing.assert_close(after["model"]["fc.weight"], weight.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(after["model"]["fc.bias"], bias.float(), rtol=1e-3, atol=1e-3)
        assert after["classifiers"]["head"] == pytest.approx(after["classifiers"]["lda"])
        assert incremental.main([*flags, "--new-classes", "5,6", "--resume"]) == 2  # there is no training to resume
        assert checkpoint.load(tmp_path / "student_model.pth")["class_names"] == after["class_names"]
    # The student is the teacher of a next task, and can be shown.
    more = [*flags[2:4], "--teacher", str(tmp_path / "student_model.pth"), "--new-classes", "4,5", "--epochs", "1"]
    assert incremental.main([*more, "--output-dir", str(tmp_path / "next")]) == 0
    assert demo.main([*flags[:2], "--student", str(tmp_path / "student_model.pth"), "--output-dir", str(tmp_path)]) == 0
    # The settings offer it, with every flag's help, and so do the protocols, which name the record's needs.
    script = "incremental_learning_system"
    with pytest.raises(SystemExit):
        read_settings(script, ["--help"], method=losses.METHODS)
    assert name in capsys.readouterr().out
    assert f"did you mean {name}?" in refused(
        read_settings, script, ["--teacher", "x", "--method", name + "s"], method=losses.METHODS
    )
    known = runpy.run_path(protocols.__file__)
    assert known["METHODS"][name].startswith(f"--method {name}")
    assert name in known["PROTOCOLS"]["digits-5x2"].methods
