"""Networks of torchvision and of other people: cut where Grad-CAM looks, loaded, frozen in part, taught new classes."""

from __future__ import annotations

import copy
import re
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import checkpoint_of, image_folder, loss_settings, randomised

import demo
import gradcam
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import losses, models, training
from lwm.attention import autograd_map, last_map, require_closed_form
from lwm.images.batches import batch_order
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError, RunError

CLOSED = ["regnet_y_400mf", "mobilenet_v2", "efficientnet_b0", "densenet121", "shufflenet_v2_x0_5", "swin_t"]
REFUSED = ["squeezenet1_1", "googlenet", "inception_v3", "vgg11", "maxvit_t", "resnet81"]
DIFFERENTIATED = ["mobilenet_v3_small", "convnext_tiny"]
OLD, NEW = ["a", "b", "c"], ["d", "e"]


def original(architecture: str, classes: int = 3) -> torch.nn.Module:
    """torchvision's network, with batch-norms that are not at their plain initial values."""
    torch.manual_seed(1)
    network = torchvision.models.get_model(architecture, weights=None, num_classes=classes)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.8, 1.2)
                module.bias.uniform_(0.0, 0.2)
    return network


@pytest.mark.parametrize("architecture", [*CLOSED, *DIFFERENTIATED, "resnet34", "resnet50", "resnext50_32x4d"])
def test_it_answers_and_explains_as_torchvisions_network_does(architecture):
    theirs = original(architecture).eval()
    ours = models.build(architecture, 3, 64, models.stem_of(architecture, theirs.state_dict()))
    assert models.load_torchvision(ours, theirs.state_dict()) == 3
    assert ours.training
    assert sum(map(torch.numel, ours.parameters())) == sum(map(torch.numel, theirs.parameters()))  # each is in it once
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = ours.eval()(images)
        assert torch.allclose(output.logits, theirs(images), atol=1e-5)
        assert torch.allclose(models.fold_batch_norm(ours)(images).logits, output.logits, atol=1e-3)
    assert output.features.dim() == 4
    assert (output.head is not None) == ours.closed_form == (architecture not in DIFFERENTIATED)
    classes = torch.tensor([0, 2])
    expected = autograd_map(ours, images, classes, ours.last_layer)
    assert torch.allclose(last_map(output, classes), expected, atol=1e-5)
    require_closed_form(ours, images)


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_served_is_named_at_once(architecture, capsys):
    with pytest.raises(InputError, match=architecture):
        models.build(architecture, 3, 64)
    assert capsys.readouterr().err == ""


def test_a_closed_form_that_is_none_is_found_out():
    model = models.build("mobilenet_v2", 3, 32)
    model.neck = torch.nn.Sequential(model.neck, torch.nn.Softplus())
    with pytest.raises(RunError, match="closed form"):
        require_closed_form(model, torch.randn(2, 3, 32, 32))


def test_differentiated_maps_make_the_loss_and_the_gradients_of_the_closed_form():
    student, teacher = randomised("resnet32", 5, 16), randomised("resnet32", 3, 16, seed=1).eval()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([3, 4, 3, 4, 3, 4])
    gradients, totals = [], []
    for closed in (True, False):
        model, their_network = copy.deepcopy(student), copy.deepcopy(teacher)
        model.closed_form = their_network.closed_form = closed
        with torch.no_grad():
            features = teacher(images).features
        theirs = their_network.classified(features.requires_grad_(not closed))
        total = losses.lwm(model(images), theirs, labels, 3, loss_settings())["total"]
        total.backward()
        totals.append(total.item())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert totals[0] == pytest.approx(totals[1], abs=1e-10)
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(*gradients, strict=True))


def test_the_maps_of_a_frozen_network_without_closed_form_need_no_graph_from_outside():
    teacher = models.build("mobilenet_v3_small", 3, 32).requires_grad_(False).eval()
    with torch.no_grad():
        output = teacher(torch.randn(2, 3, 32, 32))
    assert last_map(output, torch.tensor([0, 1])).shape == output.features.shape[:1] + output.features.shape[2:]
    with torch.inference_mode():
        assert teacher(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3)


# Weights from elsewhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"layer1.0.conv1.weight": None}, "'layer1.0.conv1.weight'"),
        ({"extra": torch.ones(1)}, "'extra'"),
        ({"bn1.bias": torch.ones(3)}, "'bn1.bias'"),
        ({"bn1.bias": torch.full((64,), torch.nan)}, "'bn1.bias'"),
    ],
)
def test_weights_that_do_not_fit_are_named(changes, culprit):
    state = {name: value for name, value in (original("resnet18").state_dict() | changes).items() if value is not None}
    with pytest.raises(InputError, match=culprit):
        models.load_torchvision(models.build("resnet18", 3, 64), state)


def test_old_files_do_not_count_their_batches_and_a_head_of_another_width_stays_out():
    state = {name: tensor for name, tensor in original("mobilenet_v2", 7).state_dict().items() if "num_b" not in name}
    model = models.build("mobilenet_v2", 3, 32)
    before = model.fc.weight.clone()
    assert models.load_torchvision(model, state) == 7
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.state_dict()["backbone.features.0.0.weight"], state["features.0.0.weight"])


def test_the_names_of_torchvisions_own_densenet_files_are_known():
    """They have a point between "norm" and its number, as in densenet201-c1103571.pth."""
    state = original("densenet121", 3).state_dict()
    old = {re.sub(r"(layer\d+\.[a-z]+)(\d)", r"\1.\2", name): tensor for name, tensor in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    model = models.build("densenet121", 3, 32)
    assert models.load_torchvision(model, old) == 3
    name = "features.denseblock1.denselayer1.conv1.weight"
    assert torch.equal(model.state_dict()[f"backbone.{name}"], state[name])


# Frozen in part, two learning rates, unbalanced folders -----------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet18", "resnet32", "mobilenet_v2", "regnet_y_400mf", "densenet121"])
def test_stages_are_the_backbone_in_order(architecture):
    model = models.build(architecture, 3, 32)
    stages = model.stages()
    own = [id(parameter) for stage in stages for module in stage for parameter in module.parameters()]
    head = {id(parameter) for parameter in model.fc.parameters()}
    assert own == [id(parameter) for parameter in model.parameters() if id(parameter) not in head]
    assert len(stages) >= 4
    models.freeze(model, 2)
    expected = {id(p) for stage in stages[:2] for module in stage for p in module.parameters()}
    assert {id(p) for p in model.parameters() if not p.requires_grad} == expected != set()
    with pytest.raises(InputError, match=str(len(stages))):
        models.freeze(model, len(stages) + 1)


def test_the_backbone_has_its_own_learning_rate():
    model = models.build("resnet32", 3, 16)
    head, others = training._parameters(model, 0.25)
    assert others["lr"] == 0.25
    assert "lr" not in head
    assert {id(p) for p in head["params"]} == {id(p) for p in model.fc.parameters()}
    assert len(head["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert len(training._parameters(model, None)) == len(list(model.parameters()))


@pytest.mark.parametrize("counts", [[50, 3, 7], [1, 1, 40, 2], [5, 5]])
def test_balanced_batches_draw_the_classes_equally_often(counts):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for _ in range(30):
        order = torch.cat(batch_order(labels, 8, generator, balanced=True))
        assert len(order) == len(labels)
        drawn = labels[order].bincount(minlength=len(counts))
        assert drawn.max() - drawn.min() <= 1
        times = order.bincount(minlength=len(labels))
        for label in range(len(counts)):  # no image twice before each was there once
            assert times[labels == label].max() - times[labels == label].min() <= 1
        seen |= set(order.tolist())
    assert len(seen) == len(labels)


# By the scripts ---------------------------------------------------------------------------------------------------

IMAGES = ["--dataset", "folder", "--data-dir", "images", "--batch-size", "6", "--output-dir", "out"]
OWN = ["--weights", "model.pth", "--old-classes-file", "classes.txt", "--image-size", "64", "--epochs", "0", *IMAGES]
TAUGHT = ["--teacher", "out/teacher_model.pth", "--method", "lwm", "--new-classes", "d,e", "--epochs", "1", *IMAGES]
SHOWN = ["--teacher", "out/teacher_model.pth", "--student", "out/student_model.pth", "--output-dir", "out"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Images of two new classes, unbalanced, and somebody's network of three old ones, whose images are gone."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", {"d": 9, "e": 4}, {"d": 2, "e": 2})
    torch.save(original("resnet18").state_dict(), "model.pth")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    return tmp_path


def test_somebodys_network_becomes_a_teacher_as_it_is_and_learns_two_classes(folder, capsys):
    assert trainer.main(["--model", "resnet18", *OWN, "--mean", "0.5,0.5,0.5"]) == 0
    teacher, state = checkpoint.load("out/teacher_model.pth"), torch.load("model.pth")
    assert all(torch.equal(teacher["model"][name], state[name]) for name in state)
    assert (teacher["class_names"], teacher["loss_form"]) == (OLD, "softmax")
    assert (teacher["mean"], teacher["std"]) == ([0.5] * 3, trainer.IMAGENET[1])
    assert incremental.main([*TAUGHT, "--freeze", "2", "--backbone-lr", "1e-3", "--balanced"]) == 0
    student = checkpoint.load("out/student_model.pth")
    assert (student["class_names"], student["loss_form"]) == (OLD + NEW, "softmax")
    for name, tensor in student["model"].items():
        if name.startswith(("conv1", "bn1", "layer1")):  # the running statistics too
            assert torch.equal(tensor, state[name])
    assert not torch.equal(student["model"]["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])
    task = student["tasks"][-1]
    assert (task["freeze"], task["backbone_lr"], task["balanced"]) == (2, 1e-3, True)
    assert demo.main(SHOWN) == 0
    before = Path("out/teacher_model.pth").read_bytes()
    capsys.readouterr()
    assert trainer.main(["--model", "resnet18", *OWN, "--resume"]) == 2  # there was no training
    assert "--epochs" in capsys.readouterr().err
    assert Path("out/teacher_model.pth").read_bytes() == before


def test_a_network_without_closed_form_goes_all_the_way(folder):
    torch.save(original("mobilenet_v3_small").state_dict(), "model.pth")
    assert trainer.main(["--model", "mobilenet_v3_small", *OWN]) == 0
    assert incremental.main(TAUGHT) == 0
    assert checkpoint.load("out/student_model.pth")["training"]["log"][-1]["attention"] > 0
    assert demo.main([*SHOWN, "--images", "images/train/d"]) == 0


@pytest.mark.parametrize(
    ("architecture", "others"),
    [("mobilenet_v2", ["backbone.features", "neck"]), ("convnext_tiny", ["backbone.features.1.0.block.2"])],
)
def test_gradcam_offers_the_layers_that_make_a_map(folder, capsys, architecture, others):
    """A network that was cut by its graph has modules that are never called; some pool, or have the channels last."""
    checkpoint.save(folder / "m.pth", checkpoint_of(models.build(architecture, 3, 32), architecture, OLD))
    flags = ["--checkpoint", "m.pth", "--image", "images/train/d/000.png", "--output", "o.png"]
    for layer in others:
        assert gradcam.main([*flags, "--layer", layer]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        offered = line.split("for example ")[1].split(", ")
        assert layer not in offered
    for layer in offered[-2:]:
        assert gradcam.main([*flags, "--layer", layer]) == 0


@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_another_width_is_replaced_in_training_alone(folder, capsys, monkeypatch, own):
    """Of somebody's weights, and of torchvision's own if they can be had."""
    network = original("resnet18", 3 if own else 1000)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: network.state_dict())
    (folder / "classes.txt").write_text("d\ne\n")
    flags = ["--model", "resnet18", *OWN, *([] if own else ["--weights", "imagenet"])]
    assert trainer.main(flags) == 2
    assert "--old-classes" in capsys.readouterr().err
    assert trainer.main([*flags, "--epochs", "1", "--lr", "1e-5"]) == 0
    saved = checkpoint.load("out/teacher_model.pth")
    assert saved["model"]["fc.weight"].shape == (2, 512)
    assert torch.allclose(saved["model"]["conv1.weight"], network.conv1.weight, atol=1e-3)  # not trained from scratch
    assert saved["mean"] == trainer.IMAGENET[0]


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--weights", "nowhere.pth"], "--weights: nowhere.pth"),
        (["--weights", "classes.txt"], "--weights: classes.txt"),
        (["--model", "resnet50"], "--weights: "),
        (["--stem", "cifar"], "'conv1.weight'"),
        (["--model", "vgg11"], "--model: vgg11"),
        (["--freeze", "9"], "--freeze: "),
        (["--weights", "imagenet", "--model", "resnet32"], "resnet32"),
        (["--weights", "imagenet"], "--weights: "),
        (["--weights-key", "ema"], "'ema'"),
        (["--weights", "imagenet", "--weights-key", "ema"], "--weights-key"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(folder, capsys, monkeypatch, flags, culprit):
    def offline(*arguments, **more):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    assert trainer.main(["--model", "resnet18", *OWN, *flags]) == 2
    assert culprit in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "out").exists()
