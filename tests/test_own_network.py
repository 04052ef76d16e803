"""A network of one's own, by the code that builds it: through every script, and what is wrong with it in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import checkpoint_of, image_folder, loss_settings, refused

import demo
import export
import gradcam
import incremental_learning_system as incremental
import predict
import train_teacher_model as trainer
from lwm import Classifier, losses, models
from lwm.attention import autograd_map, last_map
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError

CODE = """
import torch
from torch import nn


class Mine(nn.Module):
    def __init__(self, classes, width=8):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.Conv2d(width, 6, 3))
        self.rows = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.last = nn.Linear(5, classes)

    def features(self, images):
        return self.scale * self.body(images)

    def pooled(self, features):
        return self.rows(features.relu_().mean((2, 3)))  # in place

    def head(self):
        return self.last


def build(classes):
    return Mine(classes)


def wider(classes):
    return Mine(classes, 9)


def forgetful(classes):
    network = Mine(classes)
    network.pooled = None
    return network


def without_bias(classes):
    network = Mine(classes)
    network.last = nn.Linear(5, classes, bias=False)
    return network


def of_two_layers(classes):
    network = Mine(classes)
    network.last = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, classes))
    return network


def other_width(classes):
    return Mine(classes + 1)


def blind(classes):
    network = Mine(classes)
    network.pooled = lambda features: torch.zeros(len(features), 5)
    return network


def failing(classes):
    raise KeyError("weights")
"""
IMAGES = ["--dataset", "folder", "--data-dir", "images", "--output-dir", "out"]
MODEL = ["--model", "net.py:build"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", dict.fromkeys("abcd", 6), dict.fromkeys("abcd", 2))
    (tmp_path / "net.py").write_text(CODE)
    return tmp_path


def test_answers_maps_and_gradients_are_those_of_its_three_methods(folder):
    torch.manual_seed(0)
    ours = models.build_own(models.builder("net.py:build"), 4, 16).eval()
    assert not ours.closed_form
    theirs, images, classes = ours.network, torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 3])
    output = ours(images)
    features = theirs.features(images).detach().requires_grad_()
    logits = ours.fc(theirs.pooled(features.clone()))
    assert torch.allclose(output.logits, logits, atol=1e-6)
    (gradient,) = torch.autograd.grad(logits[range(3), classes].sum(), features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    assert expected.any()
    assert torch.allclose(last_map(output, classes), expected, atol=1e-6)
    assert torch.allclose(autograd_map(ours, images, classes, ours.last_layer), expected, atol=1e-6)
    with torch.no_grad():
        teacher = ours(images + 0.5)
    models.widen_head(ours, 1)
    terms = losses.lwm(ours(images), teacher, torch.tensor([4, 4, 4]), 4, loss_settings())
    assert torch.autograd.grad(terms["attention"], theirs.body[0].weight)[0].any()


def test_every_script_takes_it_and_asks_for_its_code(folder, unrendered, capsys):
    first = [*MODEL, "--old-classes", "a,b", "--epochs", "2", "--image-size", "16", *IMAGES]
    assert trainer.main(first) == 0
    second = ["--teacher", "out/teacher_model.pth", "--new-classes", "c,d", "--epochs", "1", *IMAGES]
    shown = ["--teacher", "out/teacher_model.pth", "--student", "out/student_model.pth", *IMAGES]
    student = ["--checkpoint", "out/student_model.pth"]
    scripts = [
        (incremental, second),
        (demo, shown),
        (gradcam, [*student, "--image", "images/test/a/000.png", "--output", "o.png"]),
        (export, [*student, "--output", "student.onnx"]),
        (predict, [*student, "images/test"]),
    ]
    for script, flags in scripts:
        capsys.readouterr()
        assert script.main(flags) == 2
        assert "--model path/to/file.py:build" in capsys.readouterr().err.splitlines()[-1]
        assert script.main([*flags, "--model", "net.py:wider"]) == 2
        assert "the network that --model builds" in capsys.readouterr().err.splitlines()[-1]
        assert script.main([*flags, *MODEL]) == 0
        assert "not read" not in capsys.readouterr().err
    saved = checkpoint.load("out/student_model.pth")
    assert (saved["architecture"], saved["class_names"]) == ("own", ["a", "b", "c", "d"])
    assert b"net.py" not in Path("out/student_model.pth").read_bytes()  # nothing in it names the code
    assert predict.main(["--checkpoint", "student.onnx", "images/test"]) == 0
    own_function = models.builder("net.py:build")
    answers = Classifier.load("out/student_model.pth", build=lambda classes: own_function(classes)).predict(
        ["images/test/a/000.png"]
    )
    assert answers[0].label in saved["class_names"]
    with pytest.raises(InputError, match="your own"):
        Classifier.load("out/student_model.pth")
    assert incremental.main([*second, "--resume", *MODEL]) == 0


def test_a_file_of_its_weights_has_its_own_names(folder):
    torch.manual_seed(0)
    network = models.build_own(models.builder("net.py:build"), 2, 16)
    state = {name.removeprefix("network.").replace("fc.", "last."): one for name, one in network.state_dict().items()}
    torch.save(state, "model.pth")
    flags = [*MODEL, "--weights", "model.pth", "--old-classes", "a,b", "--epochs", "0", "--image-size", "16", *IMAGES]
    assert trainer.main(flags) == 0
    saved = checkpoint.load("out/teacher_model.pth")
    assert all(torch.equal(saved["model"][name], one) for name, one in network.state_dict().items())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("nowhere.py:build", "nowhere.py"),
        ("net.py:nothing", "nothing"),
        ("broken.py:build", "line 3: ZeroDivisionError"),
        ("net.py:forgetful", "has no pooled"),
        ("net.py:without_bias", "no bias"),
        ("net.py:of_two_layers", "one linear layer"),
        ("net.py:other_width", "3 outputs"),
        ("net.py:blind", "map"),
        ("net.py:failing", "KeyError: 'weights'"),
    ],
)
def test_what_is_wrong_with_the_code_is_said_in_a_line(folder, capsys, model, why):
    (folder / "broken.py").write_text("\n\n1 / 0\n")
    assert trainer.main(["--model", model, "--old-classes", "a,b", "--epochs", "1", "--image-size", "16", *IMAGES]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--model" in line and why in line
    assert not (folder / "out" / "teacher_model.pth").exists()


@pytest.mark.parametrize("change", [{"fc.bias": torch.zeros(3)}, {"fc.weight": None}, {"network.scale": "no tensor"}])
def test_a_damaged_checkpoint_of_such_a_network_is_found_without_its_code(folder, change):
    model = models.build_own(models.builder("net.py:build"), 2, 16)
    content = checkpoint_of(model, "own", ["a", "b"], 16)
    checkpoint.save(folder / "m.pth", content)
    checkpoint.load(folder / "m.pth")
    state = {name: one for name, one in (model.state_dict() | change).items() if one is not None}
    checkpoint.save(folder / "m.pth", content | {"model": state})
    assert "m.pth" in refused(checkpoint.load, folder / "m.pth")
