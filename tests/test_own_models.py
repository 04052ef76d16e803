"""Networks of torchvision and of other people: cut where Grad-CAM looks, loaded, frozen in part, taught new classes."""

import copy
import urllib.error

import pytest
import torch
import torchvision
from conftest import checkpoint_of, image_folder, loss_settings, randomised
from lwm.models.from_torchvision import FromTorchvision

import demo
import gradcam
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import losses, models, training
from lwm.attention import autograd_map, last_map, require_closed_form
from lwm.images import batches
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError, RunError, one_line_errors

pytestmark = pytest.mark.usefixtures("unrendered")

CLOSED = ["regnet_y_400mf", "mobilenet_v2", "efficientnet_b0", "densenet121", "shufflenet_v2_x0_5", "swin_t"]
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
    ours = models.build(architecture, 3, 64)
    assert models.load_torchvision(ours, theirs.state_dict()) == 3
    assert ours.training
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = ours.eval()(images)
        assert torch.allclose(output.logits, theirs(images), atol=1e-5)
        assert torch.allclose(models.fold_batch_norm(ours)(images).logits, output.logits, atol=1e-3)
    assert output.features.dim() == 4
    assert ours.closed_form == (architecture not in DIFFERENTIATED)
    classes = torch.tensor([0, 2])
    expected = autograd_map(ours, images, classes, ours.last_layer)
    assert torch.allclose(last_map(output, models.head_weight(ours), classes), expected, atol=1e-5)
    require_closed_form(ours, images)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("squeezenet1_1", "does not end in one linear layer"),
        ("googlenet", "does not end in one linear layer"),
        ("vgg11", "no global average pooling"),
        ("vit_b_16", "no global average pooling"),
        ("maxvit_t", "does not take images of 64 px"),
        ("resnet81", "did you mean resnet18?"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(architecture, words, capsys):
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        models.build(architecture, 3, 64)
    assert capsys.readouterr().err == ""


def test_a_closed_form_that_is_none_is_found_out():
    model = models.build("mobilenet_v2", 3, 32)
    model.neck = torch.nn.Sequential(model.neck, torch.nn.Softplus())
    with pytest.raises(RunError, match="closed form differs"):
        require_closed_form(model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("relu", ["grad-cam", "signed"])
def test_differentiated_maps_make_the_loss_and_the_gradients_of_the_closed_form(relu):
    student, teacher = randomised("resnet32", 5, 16), randomised("resnet32", 3, 16, seed=1).eval()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([3, 4, 3, 4, 3, 4])
    settings, gradients, totals = loss_settings(attention=relu), [], []
    for closed in (True, False):
        model = copy.deepcopy(student)
        with torch.no_grad():
            features = teacher(images).features
        features.requires_grad_(not closed)
        theirs = models.Output(teacher.fc(features.mean((2, 3))), features)
        heads = (model.fc.weight, teacher.fc.weight) if closed else (None, None)
        total = losses.lwm(model(images), theirs, labels, heads, settings)["total"]
        total.backward()
        totals.append(total.item())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert totals[0] == pytest.approx(totals[1], abs=1e-10)
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(*gradients, strict=True))


def test_the_maps_of_a_frozen_network_without_closed_form_need_no_graph_from_outside():
    teacher = models.build("mobilenet_v3_small", 3, 32).requires_grad_(False).eval()
    with torch.no_grad():
        output = teacher(torch.randn(2, 3, 32, 32))
    assert last_map(output, None, torch.tensor([0, 1])).shape == output.features.shape[:1] + output.features.shape[2:]
    with torch.inference_mode():
        assert teacher(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3)


# Weights from elsewhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "model"])
def test_weights_come_bare_or_wrapped_and_with_the_prefix_of_dataparallel(tmp_path, wrapped):
    network = torch.nn.DataParallel(original("resnet18"))
    state = network.state_dict()
    torch.save(state if wrapped == "bare" else {wrapped: state, "epoch": 3}, tmp_path / "model.pth")
    found = checkpoint.load_weights(tmp_path / "model.pth")
    assert found.keys() == network.module.state_dict().keys()
    assert torch.equal(found["layer3.0.conv1.weight"], network.module.layer3[0].conv1.weight)


@pytest.mark.parametrize(
    "content", [{}, [1, 2], {"state_dict": {}}, {"model": {"a": 1}}, {"epoch": 3}, {0: torch.zeros(1)}]
)
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"model\.pth: holds no state_dict"):
        checkpoint.load_weights(tmp_path / "model.pth")


def spoiled(change) -> dict[str, torch.Tensor]:
    state = original("resnet18").state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), "only the network has 'layer1.0.conv1.weight'"),
        (lambda state: state.update(extra=torch.ones(1)), "only the file has 'extra'"),
        (lambda state: state.update({"bn1.bias": torch.ones(3)}), r"'bn1.bias' is \[3\], \[64\] is needed"),
        (lambda state: state.update({"bn1.bias": torch.full((64,), torch.nan)}), "'bn1.bias' are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, words):
    with pytest.raises(InputError, match=words):
        models.load_torchvision(models.build("resnet18", 3, 64), spoiled(change))


def test_old_files_do_not_count_their_batches_and_a_head_of_another_width_stays_out():
    state = {name: tensor for name, tensor in original("mobilenet_v2", 7).state_dict().items() if "num_b" not in name}
    model = models.build("mobilenet_v2", 3, 32)
    before = model.fc.weight.clone()
    assert models.load_torchvision(model, state) == 7
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.state_dict()["backbone.features.0.0.weight"], state["features.0.0.weight"])


# Frozen in part, and with two learning rates ----------------------------------------------------------------------


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
    with pytest.raises(InputError, match=f"has {len(stages)} stages"):
        models.freeze(model, len(stages) + 1)


def test_the_backbone_has_its_own_learning_rate():
    model = models.build("resnet32", 3, 16)
    head, others = training._parameters(model, 0.25)
    assert others["lr"] == 0.25
    assert "lr" not in head
    assert {id(p) for p in head["params"]} == {id(p) for p in model.fc.parameters()}
    assert len(head["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert len(training._parameters(model, None)) == len(list(model.parameters()))


# Unbalanced folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[50, 3, 7], [1, 1, 40, 2], [5, 5]])
def test_balanced_batches_draw_the_classes_equally_often(counts):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for _ in range(30):
        order = torch.cat(batches.batches(labels, 8, generator, balanced=True))
        assert len(order) == len(labels)
        drawn = labels[order].bincount(minlength=len(counts))
        assert drawn.max() - drawn.min() <= 1
        times = order.bincount(minlength=len(labels))
        for label in range(len(counts)):  # no image twice before each was there once
            assert times[labels == label].max() - times[labels == label].min() <= 1
        seen |= set(order.tolist())
    assert len(seen) == len(labels)


# By the scripts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of two new classes, unbalanced, and somebody's network of three old ones, whose images are gone."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", {"d": 9, "e": 4}, {"d": 2, "e": 2})
    torch.save(original("resnet18").state_dict(), "model.pth")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    return tmp_path


IMAGES = ["--dataset", "folder", "--data-dir", "images", "--batch-size", "6"]
OWN = ["--weights", "model.pth", "--old-classes-file", "classes.txt", "--image-size", "64", *IMAGES]


def test_somebodys_network_becomes_a_teacher_as_it_is_and_learns_two_classes(folder, capsys):
    assert trainer.main(["--model", "resnet18", *OWN, "--epochs", "0", "--mean", "0.5,0.5,0.5"]) == 0
    assert "no test images over 3 classes" in capsys.readouterr().out
    teacher = checkpoint.load("runs/first/teacher_model.pth")
    state = torch.load("model.pth")
    assert all(torch.equal(teacher["model"][name], state[name]) for name in state)
    assert (teacher["class_names"], teacher["loss_form"]) == (OLD, "softmax")
    assert teacher["mean"] == [0.5] * 3
    assert teacher["std"] == trainer.IMAGENET[1]
    flags = ["--teacher", "runs/first/teacher_model.pth", "--new-classes", "d,e", *IMAGES, "--epochs", "1"]
    assert incremental.main([*flags, "--freeze", "2", "--backbone-lr", "1e-3", "--balanced", "--gamma", "1"]) == 0
    assert "LOSS_FORM = softmax (the teacher's)" in capsys.readouterr().out
    student = checkpoint.load("runs/first/student_model.pth")
    assert (student["class_names"], student["loss_form"]) == (OLD + NEW, "softmax")
    for name, tensor in student["model"].items():
        if name.startswith(("conv1", "bn1", "layer1")):  # the running statistics too
            assert torch.equal(tensor, state[name])
    assert not torch.equal(student["model"]["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])
    step = student["steps"][-1]
    assert (step["freeze"], step["backbone_lr"], step["balanced"]) == (2, 1e-3, True)
    shown = ["--teacher", "runs/first/teacher_model.pth", "--student", "runs/first/student_model.pth"]
    assert demo.main(shown) == 0


def test_weights_taken_as_they_are_cannot_be_resumed(folder, capsys):
    assert trainer.main(["--model", "resnet18", *OWN, "--epochs", "0"]) == 0
    before = (folder / "runs/first/teacher_model.pth").read_bytes()
    torch.save(original("resnet18", 3).state_dict() | {"fc.bias": torch.ones(3)}, "model.pth")
    assert trainer.main(["--model", "resnet18", *OWN, "--epochs", "0", "--resume"]) == 2
    assert "--epochs is 0: there is no training to resume" in capsys.readouterr().err
    assert (folder / "runs/first/teacher_model.pth").read_bytes() == before


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
    for layer in offered:
        assert gradcam.main([*flags, "--layer", layer]) == 0


def test_a_network_without_closed_form_goes_all_the_way(folder):
    torch.save(original("mobilenet_v3_small").state_dict(), "model.pth")
    assert trainer.main(["--model", "mobilenet_v3_small", *OWN, "--epochs", "0"]) == 0
    flags = ["--teacher", "runs/first/teacher_model.pth", "--new-classes", "d,e", *IMAGES, "--epochs", "1"]
    assert incremental.main([*flags, "--attention", "through-head"]) == 2
    assert incremental.main([*flags, "--gamma", "1", "--lr", "0.001"]) == 0
    saved = checkpoint.load("runs/first/student_model.pth")
    assert saved["training"]["log"][-1]["attention"] > 0
    flags = ["--teacher", "runs/first/teacher_model.pth", "--student", "runs/first/student_model.pth"]
    assert demo.main([*flags, "--images", "images/train/d"]) == 0


def test_a_head_of_another_width_is_replaced_in_training_alone(folder, capsys):
    (folder / "classes.txt").write_text("d\ne\n")
    assert trainer.main(["--model", "resnet18", *OWN, "--epochs", "0"]) == 2
    assert "2 classes are named, and the weights have 3 outputs" in capsys.readouterr().err
    assert trainer.main(["--model", "resnet18", *OWN, "--epochs", "1", "--lr", "0.001"]) == 0
    assert "a new head for 2 classes" in capsys.readouterr().out
    saved = checkpoint.load("runs/first/teacher_model.pth")
    assert saved["model"]["fc.weight"].shape == (2, 512)
    # Trained from the weights, not from scratch.
    assert (saved["model"]["conv1.weight"] - torch.load("model.pth")["conv1.weight"]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights", "nowhere.pth"], "--weights: nowhere.pth: no such file"),
        (["--weights", "classes.txt"], "--weights: classes.txt: is a text file"),
        (["--model", "resnet50"], "not of this architecture"),
        (["--image-size", "32"], "'conv1.weight' is [64, 3, 7, 7], [64, 3, 3, 3] is needed"),
        (["--model", "vit_b_16"], "--model: vit_b_16 has no global average pooling"),
        (["--freeze", "9"], "--freeze: the network has 5 stages"),
        (["--weights", "imagenet", "--model", "resnet32"], "torchvision has no weights for resnet32"),
        (["--weights", "imagenet"], "cannot be downloaded"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line_and_nothing_is_written(folder, capsys, monkeypatch, flags, words):
    def offline(*arguments, **more):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    assert trainer.main(["--model", "resnet18", *OWN, "--epochs", "0", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (folder / "runs").exists()


def test_torchvisions_own_weights_are_taken_where_they_can_be_had(folder, capsys, monkeypatch):
    network = original("resnet18", 1000)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: network.state_dict())
    (folder / "classes.txt").write_text("d\ne\n")
    assert trainer.main(["--model", "resnet18", *OWN, "--weights", "imagenet", "--epochs", "1", "--lr", "1e-6"]) == 0
    assert "the weights have 1000 outputs: a new head for 2 classes" in capsys.readouterr().out
    saved = checkpoint.load("runs/first/teacher_model.pth")
    assert torch.allclose(saved["model"]["conv1.weight"], network.conv1.weight, atol=1e-4)
    assert saved["mean"] == trainer.IMAGENET[0]


def test_a_reader_that_is_gone_is_no_traceback(capfd):
    @one_line_errors
    def main(argv=None):
        raise BrokenPipeError

    assert main([]) == 141
    assert capfd.readouterr().err == ""


def test_the_parts_are_in_the_graph_once():
    model = FromTorchvision("mobilenet_v2", 3, 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        parameter.numel() for parameter in original("mobilenet_v2").parameters()
    )
