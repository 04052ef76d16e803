"""ViT, Swin and the networks of timm: their maps by an independent route, and their way through the scripts."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import image_folder, loss_settings, refused

import demo
import export
import gradcam
import incremental_learning_system as incremental
import predict
import train_teacher_model as trainer
from lwm import losses, models
from lwm.attention import autograd_map, last_map, require_closed_form
from lwm.experiments import rename_weights
from lwm.runtime import checkpoint

OLD, NEW = ["a", "b", "c"], ["d", "e"]
# Whether nothing but pooling stands behind the map, and what enters where the map is seen: None for the features.
KINDS: dict[str, tuple[bool, str | None]] = {
    "vit_b_32": (False, "encoder.layers.encoder_layer_2"),
    "swin_t": (True, None),
    "timm/vit_tiny_patch16_224": (False, "blocks.11"),
    "timm/swin_tiny_patch4_window7_224": (True, None),
    "timm/eva02_tiny_patch14_336": (False, None),
    "timm/convnext_atto": (False, None),
    "timm/tf_efficientnet_lite0": (True, None),
    "timm/mobilenetv4_conv_small": (False, None),
}
SERVED = [name for name in KINDS if name.startswith("timm/") and "swin" not in name and "eva" not in name]


SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2]}


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """torchvision's ViT and both Swins with fewer blocks: as they are they have tens of millions of parameters."""
    theirs, timms = torchvision.models.get_model, timm.create_model

    def get_model(architecture: str, image_size: int = 0, num_classes: int = 0, **more):
        if architecture == "vit_b_32":
            return torchvision.models.VisionTransformer(image_size, 16, 3, 2, 32, 64, num_classes=num_classes)
        if architecture == "swin_t":
            return torchvision.models.SwinTransformer([4, 4], window_size=[7, 7], num_classes=num_classes, **SWIN)
        return theirs(architecture, num_classes=num_classes, **more)

    def create_model(name: str, **more):
        return timms(name, **(SWIN if name.startswith("swin") else {}), **more)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    monkeypatch.setattr(timm, "create_model", create_model)


def original(architecture: str, classes: int = 3, size: int = 64) -> torch.nn.Module:
    """The network as its makers have it, every parameter somewhat off its initial value."""
    torch.manual_seed(1)
    name = architecture.removeprefix("timm/")
    if name == architecture:
        sized = {"image_size": size} if name.startswith("vit") else {}
        network = torchvision.models.get_model(name, weights=None, num_classes=classes, **sized)
    else:
        sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        network = timm.create_model(name, num_classes=classes, **sized)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def built(architecture: str, size: int = 64) -> tuple[models.Network, torch.nn.Module]:
    theirs = original(architecture, size=size)
    ours = models.build(architecture, 3, size)
    assert ours.training
    assert models.load_torchvision(ours, theirs.state_dict()) == 3
    return ours.eval(), theirs


def map_by_hand(network: torch.nn.Module, architecture: str, images: torch.Tensor, classes: list[int]) -> torch.Tensor:
    """Grad-CAM by a hook on the makers' network: at the input of a block, or at what its head gets."""
    block, seen = KINDS[architecture][1], []
    parts = [network.get_submodule(block)] if block else []

    def keep(module: torch.nn.Module, given: tuple) -> None:
        given[0].retain_grad()
        seen.append(given[0])

    if architecture == "swin_t":
        parts = [network.permute]  # channels last before it
    hooks = [part.register_forward_pre_hook(keep) for part in parts]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if parts:
            logits = network(images)
        else:
            seen.append(network.forward_features(images))
            seen[0].retain_grad()
            logits = network.forward_head(seen[0])
        logits[range(len(classes)), classes].sum().backward()
    for hook in hooks:
        hook.remove()
    tokens, gradient = seen[0].detach(), seen[0].grad
    if tokens.dim() == 3:
        side = int(tokens.shape[1] ** 0.5)
        tokens, gradient = (each[:, -(side**2) :].unflatten(1, (side, side)) for each in (tokens, gradient))
    elif "swin" not in architecture:
        tokens, gradient = (each.permute(0, 2, 3, 1) for each in (tokens, gradient))
    return (gradient.mean((1, 2), keepdim=True) * tokens).sum(3).relu()


@pytest.mark.parametrize("architecture", KINDS)
def test_it_answers_and_explains_as_the_makers_network_does(architecture):
    ours, theirs = built(architecture, 112 if "eva" in architecture else 64)
    size = 112 if "eva" in architecture else 64
    images, classes = torch.randn(3, 3, size, size), [0, 1, 2]
    with torch.no_grad():
        output = ours(images)
        assert torch.allclose(output.logits, theirs(images), atol=1e-4)
        assert torch.allclose(ours.fc(output.pooled), output.logits, atol=1e-5)
    assert ours.closed_form == (output.head is not None) == KINDS[architecture][0]
    require_closed_form(ours, images)
    found, expected = last_map(output, torch.tensor(classes)), map_by_hand(theirs, architecture, images, classes)
    assert expected.any()
    assert torch.allclose(found, expected, atol=1e-5 + 1e-3 * float(expected.max()))
    assert torch.allclose(found, autograd_map(ours, images, torch.tensor(classes), ours.last_layer), atol=1e-5)
    frozen = copy.deepcopy(ours).requires_grad_(False)  # as a teacher is asked
    with torch.no_grad():
        assert torch.allclose(last_map(frozen(images), torch.tensor(classes)), found, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(frozen(images).logits, output.logits, atol=1e-4)
    expected_state = models.empty_state(architecture, 3, size)
    assert {name: one.shape for name, one in ours.state_dict().items()} == {
        n: o.shape for n, o in expected_state.items()
    }


@pytest.mark.parametrize("architecture", KINDS)
def test_attention_distillation_has_the_gradient_that_it_is_to_have(architecture):
    """Of a step of all parameters in one direction, against the difference that such a step makes."""
    size = 112 if "eva" in architecture else 64
    student = built(architecture, size)[0].double()
    teacher = copy.deepcopy(student).requires_grad_(False)
    models.widen_head(student, 2)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().std() for p in student.parameters()]
    images, labels = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([3, 4])

    def moved(by: float) -> None:
        with torch.no_grad():
            for parameter, step in zip(student.parameters(), steps, strict=True):
                parameter.add_(step.nan_to_num(), alpha=by)

    def attention() -> torch.Tensor:
        with torch.no_grad():
            theirs = teacher(images)
        return losses.lwm(student(images), theirs, labels, 3, loss_settings())["attention"]

    moved(0.02)
    loss = attention()
    assert loss > 1e-4
    backbone = [p for p in student.parameters() if all(p is not own for own in student.fc.parameters())]
    gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in gradients) > 0.8 * len(backbone)
    expected = sum((g * s.nan_to_num()).sum() for g, s in zip(gradients, steps, strict=True) if g is not None)
    moved(1e-8)
    after = attention().detach()
    moved(-2e-8)
    found = (after - attention().detach()) / 2e-8
    assert float(found) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("architecture", KINDS)
def test_stages_are_all_but_the_head_in_order(architecture):
    model = models.build(architecture, 3, 112 if "eva" in architecture else 64)
    parts = [part for stage in model.stages() for part in stage]
    own = [id(p) for part in parts for p in ([part] if isinstance(part, torch.nn.Parameter) else part.parameters())]
    head = {id(parameter) for parameter in model.fc.parameters()}
    assert own == [id(parameter) for parameter in model.parameters() if id(parameter) not in head]
    assert len(model.stages()) >= 4
    models.freeze(model, 2)
    assert not all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "size", "why"),
    [
        ("timm/deit_tiny_distilled_patch16_224", 64, "2 last layers"),
        ("timm/levit_128s", 224, "2 last layers"),
        ("timm/vit_tiny_patch16_224", 8, "8 px"),
        ("timm/dla46x_c", 64, "one linear layer"),
        ("timm/resnet811", 64, "did you mean timm/resnet"),
        ("timm/hf-hub:somebody/network", 64, "lists no"),
        ("timm/", 64, "lists no"),
        ("vit_b_32", 65, "65 px"),
    ],
)
def test_what_cannot_be_served_is_named(architecture, size, why):
    line = refused(models.build, architecture, 3, size)
    assert architecture.removeprefix("timm/") in line and why in line


def test_without_timm_it_says_how_to_have_it(monkeypatch, tmp_path):
    checkpoint_path = tmp_path / "m.pth"
    monkeypatch.setitem(sys.modules, "timm", None)
    models.empty_state.cache_clear()
    assert "pip install timm" in refused(models.build, "timm/convnext_atto", 3, 64)
    assert not checkpoint_path.exists()


# By the scripts ---------------------------------------------------------------------------------------------------

IMAGES = ["--dataset", "folder", "--data-dir", "images", "--batch-size", "10", "--output-dir", "out", "--overwrite"]
TAUGHT = ["--teacher", "out/teacher_model.pth", "--new-classes", "d,e", *IMAGES]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", {"d": 10, "e": 10}, {"d": 2, "e": 2})
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    return tmp_path


@pytest.mark.parametrize("architecture", SERVED)
def test_it_goes_all_the_way(folder, unrendered, capsys, architecture):
    torch.save(original(architecture).state_dict(), "model.pth")
    own = ["--model", architecture, "--weights", "model.pth", "--old-classes-file", "classes.txt", "--image-size", "64"]
    assert trainer.main([*own, "--epochs", "0", *IMAGES]) == 0
    teacher = checkpoint.load("out/teacher_model.pth")
    config = timm.get_pretrained_cfg(architecture.removeprefix("timm/"))
    assert (teacher["mean"], teacher["std"]) == (list(config.mean), list(config.std))
    assert incremental.main([*TAUGHT, "--method", "closed-form"]) == 0
    student = checkpoint.load("out/student_model.pth")
    changed = [name for name, one in student["model"].items() if not torch.equal(one, teacher["model"].get(name))]
    assert changed == ["fc.weight", "fc.bias"]
    assert incremental.main([*TAUGHT, "--method", "lwm", "--epochs", "1", "--no-statistics"]) == 0
    student = checkpoint.load("out/student_model.pth")
    assert student["class_names"] == OLD + NEW
    assert student["training"]["log"][-1]["attention"] > 0
    assert demo.main(["--teacher", "out/teacher_model.pth", "--student", "out/student_model.pth", *IMAGES[:-1]]) == 0
    of_student = ["--checkpoint", "out/student_model.pth"]
    assert gradcam.main([*of_student, "--image", "images/test/d/000.png", "--output", "o.png"]) == 0
    assert export.main([*of_student, "--output", "student.onnx"]) == 0
    capsys.readouterr()
    answers = []
    for network in (of_student, ["--checkpoint", "student.onnx"]):
        assert predict.main([*network, "--csv", "--top", "5", "images/test"]) == 0
        answers.append(sorted(row.rsplit(",", 1)[0].split(",", 2)[::2] for row in capsys.readouterr().out.splitlines()))
    assert answers[0] == answers[1]


def test_its_own_weights_are_asked_for_and_a_line_says_if_they_cannot_be_had(folder, capsys, monkeypatch):
    asked, make = [], timm.create_model

    def create(name: str, pretrained: bool = False, **more):
        asked.append((name, pretrained))
        if pretrained and len(asked) < 2:
            raise OSError("no network")
        return make(name, **more)

    monkeypatch.setattr(timm, "create_model", create)
    flags = ["--model", "timm/mobilenetv4_conv_small", "--weights", "imagenet", "--old-classes-file", "classes.txt"]
    assert trainer.main([*flags, "--epochs", "0", *IMAGES]) == 2
    assert "no network" in capsys.readouterr().err.splitlines()[-1]
    assert asked == [("mobilenetv4_conv_small", True)]
    (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(1000)))
    assert trainer.main([*flags, "--epochs", "0", *IMAGES]) == 0
    assert ("mobilenetv4_conv_small", True) in asked[1:]
    assert checkpoint.load("out/teacher_model.pth")["image_size"] == 224


# Other names ------------------------------------------------------------------------------------------------------


def test_weights_under_other_names_are_renamed_in_order_and_only_if_every_shape_fits(folder, capsys):
    state = timm.create_model("mobilenetv4_conv_small", num_classes=7).state_dict()
    strange = {f"part{number}.x": tensor for number, tensor in enumerate(state.values())}
    torch.save(strange, "strange.pth")
    assert rename_weights.main(["strange.pth", "timm/mobilenetv4_conv_small"]) == 0
    renamed = torch.load("strange-renamed.pth")
    assert list(renamed) == list(state)
    assert all(torch.equal(renamed[name], state[name]) for name in state)
    assert rename_weights.main(["strange.pth", "timm/mobilenetv4_conv_small"]) == 2  # it is there
    for wrong in (dict(reversed(strange.items())), dict(list(strange.items())[1:])):
        torch.save(wrong, "wrong.pth")
        assert rename_weights.main(["wrong.pth", "timm/mobilenetv4_conv_small"]) == 2
    assert rename_weights.main(["strange.pth", "resnet18"]) == 2
    assert not (folder / "wrong-renamed.pth").exists()
