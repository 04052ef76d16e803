"""The networks: parameter counts, shapes, torchvision's weights, and a head that grows without forgetting a row."""

from __future__ import annotations

import pickle

import pytest
import torch
import torchvision
from conftest import randomised
from hypothesis import given
from hypothesis import strategies as st

from lwm import models

ARCHITECTURES = ("resnet18", "resnet32", "resnet110")


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("architecture", "count"), [("resnet32", 464_154), ("resnet110", 1_727_962)])
def test_parameter_counts(architecture, count):
    assert parameters(models.build(architecture, 10, 32)) == count
    assert parameters(models.build(architecture, 100, 32)) == count + 90 * 65


@pytest.mark.parametrize("classes", [10, 1000])
def test_resnet18_with_the_imagenet_stem_is_torchvisions(classes):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=classes)
    ours = models.build("resnet18", classes, 64)
    shapes = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (theirs, ours)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for mode in (True, False):  # training first: the running statistics must go the same way
        theirs.train(mode), ours.train(mode)
        torch.testing.assert_close(ours(images).logits, theirs(images), rtol=0, atol=0)


def test_resnet18_with_the_cifar_stem_differs_from_torchvisions_in_the_stem_alone():
    theirs = torchvision.models.resnet18(num_classes=10).state_dict()
    ours = models.build("resnet18", 10, 63).state_dict()
    assert list(theirs) == list(ours)
    assert [name for name in theirs if theirs[name].shape != ours[name].shape] == ["conv1.weight"]
    assert ours["conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.parametrize(
    ("architecture", "image_size", "shape"),
    [
        ("resnet18", 32, (512, 4, 4)),
        ("resnet18", 63, (512, 8, 8)),
        ("resnet18", 64, (512, 2, 2)),
        ("resnet18", 224, (512, 7, 7)),
        ("resnet32", 32, (64, 8, 8)),
        ("resnet32", 64, (64, 16, 16)),
        ("resnet110", 32, (64, 8, 8)),
        ("resnet110", 64, (64, 16, 16)),
    ],
)
def test_shapes(architecture, image_size, shape):
    model = models.build(architecture, 7, image_size).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, image_size, image_size))
    assert output.logits.shape == (2, 7)
    assert output.features.shape == (2, *shape)
    assert (output.features >= 0).all()
    # What is returned is what pooling and the head see.
    again = output.features.double().mean((2, 3)) @ model.fc.weight.double().T + model.fc.bias.double()
    torch.testing.assert_close(output.logits.double(), again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["resnet32", "resnet110"])
def test_option_a_shortcuts_have_no_parameters_and_keep_every_second_pixel(architecture):
    model = models.build(architecture, 10, 32)
    assert not [name for name in model.state_dict() if "downsample" in name or "shortcut" in name]
    x = torch.randn(2, 16, 6, 6)
    out = model.layer2[0].downsample(x)
    assert out.shape == (2, 32, 3, 3)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert (out[:, :8] == 0).all()
    assert (out[:, 24:] == 0).all()


def contents(model: torch.nn.Module) -> dict:
    """Every attribute of every module, by identity; and those of its dicts (parameters, buffers, hooks, children)."""
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            found[name, attribute] = value if isinstance(value, int | float | str) else id(value)
            if isinstance(value, dict):
                found |= {(name, attribute, key): id(item) for key, item in value.items()}
    return found


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_stores_nothing_on_the_network(architecture, mode):
    model = models.build(architecture, 4, 16).train(mode == "train")
    before = contents(model)
    model(torch.randn(2, 3, 16, 16)).logits.sum().backward()
    assert contents(model) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_networks_pickle(architecture):
    model = models.build(architecture, 4, 32).eval()
    copy = pickle.loads(pickle.dumps(model))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(copy(images).logits, model(images).logits, rtol=0, atol=0)


@given(old=st.integers(1, 30), new=st.integers(1, 30), architecture=st.sampled_from(["resnet32", "resnet18"]))
def test_widen_head_keeps_the_old_rows(old, new, architecture):
    model = randomised(architecture, old, 8, seed=old).eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    others = {name: t.clone() for name, t in model.state_dict().items()}
    weight, bias = others.pop("fc.weight"), others.pop("fc.bias")
    with torch.no_grad():
        before = model(images)
    models.widen_head(model, new)
    with torch.no_grad():
        after = model(images)
    assert model.fc.out_features == old + new
    assert model.fc.weight.shape == (old + new, weight.shape[1])
    assert torch.equal(model.fc.weight[:old], weight)
    assert torch.equal(model.fc.bias[:old], bias)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in others.items())
    assert after.logits.shape == (2, old + new)
    assert (after.logits[:, :old] - before.logits).abs().max() <= 1e-12
    # The new rows are initialised, not zeros, not copies, and everything can be trained.
    assert model.fc.weight[old:].abs().amax(1).min() > 0
    assert not any(torch.equal(row, weight[i % old]) for i, row in enumerate(model.fc.weight[old:]))
    assert model.fc.weight.dtype == torch.float64
    assert model.fc.weight.requires_grad
    assert model.fc.bias.requires_grad


def test_widen_by_one_class_twice():
    model = randomised("resnet32", 2, 8).eval()
    first = model.fc.weight.clone()
    models.widen_head(model, 1)
    second = model.fc.weight.clone()
    models.widen_head(model, 1)
    assert model(torch.randn(1, 3, 8, 8).double()).logits.shape == (1, 4)
    assert torch.equal(model.fc.weight[:2], first)
    assert torch.equal(model.fc.weight[:3], second)


def test_widening_is_fixed_by_the_seed():
    heads = []
    for seed in (1, 1, 2):
        model = models.build("resnet32", 2, 8)
        torch.manual_seed(seed)
        models.widen_head(model, 3)
        heads.append(model.fc.weight[2:].clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("name", ["vit", "", "ResNet18", "resnet-32"])
def test_unknown_architecture_is_refused(name):
    with pytest.raises(ValueError, match="no architecture"):
        models.build(name, 10, 32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_last_layer_names_the_module_that_gives_the_features(architecture):
    model = models.build(architecture, 3, 32).eval()
    seen = []
    handle = model.get_submodule(model.last_layer).register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.no_grad():
        output = model(torch.randn(1, 3, 32, 32))
    handle.remove()
    assert torch.equal(seen[0], output.features)


@pytest.mark.parametrize("first", [0, 3])
def test_sigmoid_outputs_start_at_their_prior(first):
    model = randomised("resnet32", 5, 16)
    before = model.fc.bias.detach().clone()
    models.start_at_prior(model, first)
    assert torch.equal(model.fc.bias[:first], before[:first])
    torch.testing.assert_close(model.fc.bias[first:].sigmoid(), torch.full((5 - first,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("architecture", ["resnet32", "regnet_y_400mf"])  # the latter cannot be built without memory
def test_an_empty_state_is_that_of_the_network_and_takes_no_memory(architecture):
    found, whole = models.empty_state(architecture, 3, 32), models.build(architecture, 3, 32).state_dict()
    assert all(tensor.is_meta for tensor in found.values())
    assert [(name, t.shape, t.dtype) for name, t in found.items()] == [(n, t.shape, t.dtype) for n, t in whole.items()]
