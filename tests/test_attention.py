"""Grad-CAM and L_AD, in float64 and against an independent route: autograd, finite differences, NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import loss_settings, randomised
from hypothesis import given
from hypothesis import strategies as st
from otherroute import numpy_attention, numpy_map, random
from torch import nn

from lwm import models
from lwm.attention import autograd_map, closed_form_map
from lwm.losses import METHODS, attention_distillation


def lively_classes(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """For each image a class whose map is not all zero: the mean of the map before ReLU is the logit less its bias."""
    with torch.no_grad():
        return (model(images).logits - model.fc.bias).argmax(1)


# Grad-CAM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("architecture", ["resnet18", "resnet32", "resnet110"])
def test_closed_form_is_autograd_in_value_and_gradient(architecture, mode):
    model = randomised(architecture, 5, 16).train(mode == "train")
    images = random(3, 3, 16, 16)
    classes = lively_classes(model, images)
    side = model(images).features.shape[2:]
    teacher_map = random(3, *side, seed=1).abs()

    features = model(images).features
    closed = closed_form_map(features, model.fc.weight, classes)
    general = autograd_map(model, images, classes, model.last_layer, create_graph=True)
    assert (closed.flatten(1).amax(1) > 0).all()
    torch.testing.assert_close(closed, general, rtol=1e-10, atol=1e-14)

    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [
        torch.autograd.grad(attention_distillation(maps, teacher_map)[0], parameters, allow_unused=True)
        for maps in (closed, general)
    ]
    # The bias of the head is in no map; every other parameter is.
    assert [n for n, g in zip(names, gradients[0], strict=True) if g is None] == ["fc.bias"]
    for name, parameter, one, other in zip(names, parameters, *gradients, strict=True):
        one, other = (torch.zeros_like(parameter) if g is None else g for g in (one, other))
        scale = max(one.abs().max().item(), 1e-12)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * scale, msg=lambda m, n=name: f"{n}: {m}")
    assert all(g.abs().max() > 0 for g in gradients[0] if g is not None)


@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 6),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    outputs=st.integers(1, 7),
    data=st.data(),
)
def test_closed_form_map_against_numpy(batch, channels, height, width, outputs, data):
    features = random(batch, channels, height, width, seed=2)
    weight = random(outputs, channels, seed=3)
    classes = data.draw(st.lists(st.integers(0, outputs - 1), min_size=batch, max_size=batch))
    maps = closed_form_map(features, weight, torch.tensor(classes))
    expected = numpy_map(features.numpy(), weight.numpy(), np.array(classes))
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-12, atol=1e-14)


def with_output_of_layer_replaced(model: nn.Module, images: torch.Tensor, layer: str, value: torch.Tensor):
    """The logits when the named layer gives ``value`` instead."""
    handle = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: value.clone())
    try:
        with torch.no_grad():
            return model(images).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer", ["conv1", "bn1", "layer1", "layer2.0.conv1", "layer2.0.bn1"])
def test_autograd_map_at_an_inner_layer_by_finite_differences(layer, frozen):
    """bn1 is followed by a ReLU that works in place: the map must be of what the layer gave, not of what became of it.

    The logits are differentiated with the layer's output replaced, a whole channel at a time.
    """
    model = randomised("resnet32", 4, 8).eval().requires_grad_(not frozen)
    images, classes = random(2, 3, 8, 8), torch.tensor([3, 1])
    outputs: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, i, output: outputs.append(output.clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    features, step = outputs[0], 1e-6

    alpha = torch.zeros(features.shape[:2], dtype=torch.float64)
    for channel in range(features.shape[1]):
        shift = torch.zeros_like(features)
        shift[:, channel] = step
        above = with_output_of_layer_replaced(model, images, layer, features + shift)
        below = with_output_of_layer_replaced(model, images, layer, features - shift)
        alpha[:, channel] = ((above - below) / (2 * step)).gather(1, classes[:, None])[:, 0]
    alpha /= features.shape[2] * features.shape[3]
    expected = np.maximum(np.einsum("bk,bkij->bij", alpha.numpy(), features.numpy()), 0)

    maps = autograd_map(model, images, classes, layer)
    assert maps.shape == expected.shape
    assert expected.max() > 0
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-5, atol=1e-7 * expected.max())
    assert not maps.requires_grad
    # The hook is gone, the mode is as it was, nothing was added to the parameters' gradients.
    assert not model.get_submodule(layer)._forward_hooks
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("layer", ["conv1", "bn1", "layer1"])
def test_autograd_map_with_a_graph_reaches_the_parameters(layer):
    """Central differences of a loss on the map, in one weight before the layer and one after it.

    With ReLUs a map is piecewise smooth in the weights, so a step of 1e-6 meets no kink here.
    """
    model = randomised("resnet32", 3, 8).eval()
    images, classes, target = random(2, 3, 8, 8), torch.tensor([0, 2]), random(2, 8, 8, seed=5)

    def loss() -> torch.Tensor:
        return (autograd_map(model, images, classes, layer, create_graph=True) * target).sum()

    value = loss()
    assert value.requires_grad
    weights = {"conv1.weight": (1, 0, 1, 1), "layer3.4.conv2.weight": (5, 7, 1, 1), "fc.weight": (2, 11)}
    gradients = torch.autograd.grad(value, [model.get_parameter(name) for name in weights])
    for (name, index), gradient in zip(weights.items(), gradients, strict=True):
        parameter, step, values = model.get_parameter(name), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
            values.append(loss().item())
            with torch.no_grad():
                parameter[index] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert gradient[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-9), name
        assert gradient[index] != 0, name


def test_autograd_map_with_a_graph_on_a_frozen_network():
    model = randomised("resnet32", 3, 8).eval().requires_grad_(False)
    images, classes = random(2, 3, 8, 8), torch.tensor([0, 2])
    for layer in ("conv1", "layer1", "layer3"):
        with_graph = autograd_map(model, images, classes, layer, create_graph=True)
        torch.testing.assert_close(with_graph.detach(), autograd_map(model, images, classes, layer), rtol=0, atol=0)


def test_autograd_map_works_under_no_grad_and_names_a_missing_layer():
    model = randomised("resnet32", 3, 8).eval()
    images, classes = random(2, 3, 8, 8), lively_classes(model, random(2, 3, 8, 8))
    with torch.no_grad():
        maps = autograd_map(model, images, classes, "layer3")
    torch.testing.assert_close(maps, closed_form_map(model(images).features, model.fc.weight, classes).detach())
    with pytest.raises(AttributeError, match="layer9"):
        autograd_map(model, images, classes, "layer9")


def test_the_gradient_of_the_map_is_reproducible_on_two_threads():
    """Advanced indexing, W[c], fails this: its backward adds in no fixed order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # So large that the threads do meet: at batch 128 W[c] passes on a busy machine.
        generator = torch.Generator().manual_seed(0)
        features = torch.rand(4096, 512, 2, 2, generator=generator)
        classes = torch.randint(0, 10, (4096,), generator=generator)
        weight = torch.randn(10, 512, generator=generator, requires_grad=True)
        weighting = torch.randn(4096, 2, 2, generator=generator)
        gradients = [
            torch.autograd.grad((closed_form_map(features, weight, classes) * weighting).sum(), weight)[0]
            for _ in range(20)
        ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# L_AD -------------------------------------------------------------------------------------------------------------


def away_from_kinks(batch: int, channels: int, side: int, outputs: int):
    """Features, head and teacher maps such that no ReLU and no absolute value is near its kink."""
    for seed in range(10_000):
        features, weight = random(batch, channels, side, side, seed=seed), random(outputs, channels, seed=seed + 1)
        classes = torch.randint(0, outputs, (batch,), generator=torch.Generator().manual_seed(seed))
        before_relu = torch.einsum("bk,bkij->bij", weight[classes], features)
        teacher = random(batch, side, side, seed=seed + 2).abs()
        maps = before_relu.relu()
        if (maps.flatten(1).amax(1) == 0).any() or before_relu.abs().min() < 1e-2:
            continue
        unit = maps / maps.flatten(1).norm(dim=1).view(-1, 1, 1)
        distance = (teacher / teacher.flatten(1).norm(dim=1).view(-1, 1, 1) - unit).abs()
        if distance.min() > 1e-3 and (maps == 0).any():
            return features.requires_grad_(), weight.requires_grad_(), classes, teacher
    raise AssertionError("no such point was found")


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (2, 3, 2, 4), (3, 4, 3, 2)])
def test_attention_gradient_by_finite_differences_in_features_and_head(shape):
    features, weight, classes, teacher = away_from_kinks(*shape)

    def loss(features, weight):
        return attention_distillation(closed_form_map(features, weight, classes), teacher)[0]

    assert torch.autograd.gradcheck(loss, (features, weight), eps=1e-7, atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(loss(features, weight), (features, weight))
    assert all(g.abs().max() > 1e-4 for g in gradients)


@given(batch=st.integers(1, 5), height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 999))
def test_attention_against_numpy(batch, height, width, seed):
    student, teacher = (random(batch, height, width, seed=seed + i).abs() + 1e-3 for i in (0, 1))
    loss, zero_maps = attention_distillation(student, teacher)
    assert loss.item() == pytest.approx(numpy_attention(student.numpy(), teacher.numpy()), rel=1e-12, abs=1e-13)
    assert zero_maps.item() == 0


def test_attention_by_hand():
    """(3, 4) / 5 against (4, 3) / 5: two differences of 0.2; (1, 0) against (0, 1): 2. The mean over two images."""
    student = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[8.0, 6.0]], [[0.0, 7.0]]], dtype=torch.float64)
    assert attention_distillation(student, teacher)[0].item() == pytest.approx((0.4 + 2) / 2, rel=1e-14)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet32"])
def test_attention_is_zero_for_identical_networks(architecture):
    teacher = randomised(architecture, 4, 16).eval()
    student = randomised(architecture, 4, 16).eval()
    models.widen_head(student, 3)
    images = random(4, 3, 16, 16)
    with torch.no_grad():
        mine, theirs = student(images), teacher(images)
    heads = (student.fc.weight, teacher.fc.weight)
    terms = METHODS["lwm"](mine, theirs, torch.tensor([4, 5, 6, 4]), heads, loss_settings())
    assert terms["attention"].item() == pytest.approx(0, abs=1e-12)
    assert terms["zero_maps"] < 1  # it is not zero for want of maps


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 7.0, 1e20])
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_attention_is_unchanged_when_a_map_is_scaled(which, scale):
    student, teacher = random(3, 4, 4).abs().float(), random(3, 4, 4, seed=1).abs().float()
    plain = attention_distillation(student, teacher)[0]
    scaled_student = (student * (scale if which != "teacher" else 1)).requires_grad_()
    scaled, zero_maps = attention_distillation(scaled_student, teacher * (scale if which != "student" else 1))
    assert zero_maps == 0
    assert plain > 0.1
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)
    scaled.backward()
    assert scaled_student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("dead_student", "dead_teacher"),
    [([1], []), ([], [1]), ([1], [1]), ([0], [3]), ([0, 1, 2, 3], []), ([], [0, 1, 2, 3])],
)
def test_zero_maps_contribute_nothing_and_are_counted(dead_student, dead_teacher, dtype):
    student, teacher = random(4, 3, 3).abs().to(dtype), random(4, 3, 3, seed=1).abs().to(dtype)
    student[dead_student], teacher[dead_teacher] = 0, 0
    student.requires_grad_()
    dead = sorted({*dead_student, *dead_teacher})
    alive = [i for i in range(4) if i not in dead]
    loss, zero_maps = attention_distillation(student, teacher)
    assert zero_maps.item() == len(dead) / 4
    # The mean is over the whole batch: a dead image counts as 0, it is not left out.
    expected = 0.0
    if alive:
        expected = numpy_attention(student.detach().numpy()[alive], teacher.numpy()[alive]) * len(alive) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)
    loss.backward()
    assert student.grad.isfinite().all()
    assert (student.grad[dead] == 0).all()
    assert all(student.grad[i].abs().max() > 0 for i in alive)


def test_a_zero_map_of_a_network_leaves_every_gradient_finite():
    """Features that are all zero, and a head row that is all negative, the two ways in which maps die."""
    features = random(3, 4, 2, 2).abs()
    features[0] = 0
    weight = random(3, 4, seed=1).abs()
    weight[1] = -weight[1]
    features.requires_grad_()
    weight.requires_grad_()
    teacher = random(3, 2, 2, seed=2).abs()
    loss, zero_maps = attention_distillation(closed_form_map(features, weight, torch.tensor([0, 1, 2])), teacher)
    loss.backward()
    assert zero_maps.item() == pytest.approx(2 / 3)
    assert features.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert (features.grad[:2] == 0).all()
    assert features.grad[2].abs().max() > 0
