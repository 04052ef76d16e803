"""The networks: parameter counts, shapes, torchvision's weights, and a head that grows without forgetting a row."""

from __future__ import annotations

import pytest
import torch
import torchvision
from conftest import randomised

import train_teacher_model as trainer
from lwm import models


@pytest.mark.parametrize(("architecture", "count"), [("resnet32", 464_154), ("resnet110", 1_727_962)])
def test_parameter_counts(architecture, count):
    for classes in (10, 100):
        model = models.build(architecture, classes, 32)
        assert sum(p.numel() for p in model.parameters()) == count + (classes - 10) * 65


def test_resnet18_is_torchvisions_but_for_the_stem_of_small_images():
    torch.manual_seed(0)
    theirs, ours = torchvision.models.resnet18(num_classes=10), models.build("resnet18", 10, 224)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for mode in (True, False):  # training first: the running statistics must go the same way
        theirs.train(mode), ours.train(mode)
        torch.testing.assert_close(ours(images).logits, theirs(images), rtol=0, atol=0)
    small, large = models.empty_state("resnet18", 10, 63), theirs.state_dict()
    assert list(small) == list(large)
    assert [name for name in small if small[name].shape != large[name].shape] == ["conv1.weight"]
    assert small["conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.parametrize(
    ("architecture", "image_size", "shape"),
    [
        ("resnet18", 32, (512, 4, 4)),  # as in the field's figures
        ("resnet18", 63, (512, 8, 8)),
        ("resnet18", 64, (512, 8, 8)),
        ("resnet18", 96, (512, 12, 12)),
        ("resnet18", 112, (512, 7, 7)),
        ("resnet18", 193, (512, 7, 7)),
        ("resnet18", 224, (512, 7, 7)),
        ("resnet32", 32, (64, 8, 8)),
        ("resnet110", 64, (64, 16, 16)),
    ],
)
def test_the_output_is_what_the_last_layer_gives_and_the_head_makes_of_it(architecture, image_size, shape):
    model, seen = models.build(architecture, 7, image_size).eval(), []
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        output = model(images)
    logits, features, head, pooled = output
    assert logits.shape == (2, 7)
    assert features.shape == (2, *shape)
    torch.testing.assert_close(pooled, features.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert (features >= 0).all()
    assert head is model.fc.weight
    again = features.double().mean((2, 3)) @ head.double().T + model.fc.bias.double()
    torch.testing.assert_close(logits.double(), again, rtol=1e-4, atol=1e-5)
    model.get_submodule(model.last_layer).register_forward_hook(lambda module, i, output: seen.append(output))
    with torch.no_grad():
        model(images)
    assert torch.equal(seen[0], features)


@pytest.mark.parametrize(("size", "said"), [(64, "2 x 2 cells"), (193, None)])
def test_maps_too_coarse_to_look_at_are_said(tmp_path, capsys, size, said):
    (tmp_path / "names").write_text("a\nb\n")
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), tmp_path / "it.pth")
    flags = ["--weights", str(tmp_path / "it.pth"), "--old-classes-file", str(tmp_path / "names"), "--epochs", "0"]
    flags += ["--model", "resnet18", "--image-size", str(size), "--output-dir", str(tmp_path / "out")]
    assert trainer.main(flags) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "cells" in line]
    assert len(lines) == bool(said)
    assert not said or said in lines[0]


def test_option_a_shortcuts_have_no_parameters_and_keep_every_second_pixel():
    model = models.build("resnet32", 10, 32)
    assert not [name for name in model.state_dict() if "downsample" in name or "shortcut" in name]
    x = torch.randn(2, 16, 6, 6)
    expected = torch.zeros(2, 32, 3, 3)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(model.layer2[0].downsample(x), expected)


@pytest.mark.parametrize(("architecture", "old", "new"), [("resnet32", 2, 1), ("resnet32", 30, 7), ("resnet18", 1, 30)])
def test_widen_head_keeps_the_old_rows(architecture, old, new):
    model = randomised(architecture, old, 8, seed=old).eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    logits = model(images).logits
    rows = []
    for seed in (1, 1, 2):  # the new rows are fixed by the seed
        model.fc = torch.nn.Linear(model.fc.in_features, old, dtype=torch.float64)
        model.load_state_dict(before)
        torch.manual_seed(seed)
        models.widen_head(model, new)
        rows.append(model.fc.weight[old:].detach())
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert rows[0].abs().amax(1).min() > 0
    assert rows[0].dtype == torch.float64
    assert all(
        torch.equal(t[:old] if name.startswith("fc.") else t, before[name]) for name, t in model.state_dict().items()
    )
    torch.testing.assert_close(model(images).logits[:, :old], logits, rtol=0, atol=1e-12)
    assert model(images).logits.shape == (2, old + new)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("first", [0, 3])
def test_sigmoid_outputs_start_at_their_prior(first):
    model = randomised("resnet32", 5, 16)
    before = model.fc.bias.detach().clone()
    models.start_at_prior(model, first)
    assert torch.equal(model.fc.bias[:first], before[:first])
    torch.testing.assert_close(model.fc.bias[first:].sigmoid(), torch.full((5 - first,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("architecture", ["resnet32", "regnet_y_400mf"])  # the latter cannot be built without memory
def test_an_empty_state_is_that_of_the_network_and_takes_no_memory(architecture):
    empty, whole = models.empty_state(architecture, 3, 32), models.build(architecture, 3, 32).state_dict()
    assert all(tensor.is_meta for tensor in empty.values())
    assert [(name, t.shape, t.dtype) for name, t in empty.items()] == [(n, t.shape, t.dtype) for n, t in whole.items()]
