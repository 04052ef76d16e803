"""Grad-CAM and L_AD, in float64 and against an independent route: autograd, finite differences, NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import loss_settings, randomised
from otherroute import numpy_attention, random

from lwm import models
from lwm.attention import autograd_map, closed_form_map
from lwm.losses import attention_distillation, lwm

# Grad-CAM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "mode"), [("resnet18", "eval"), ("resnet32", "eval"), ("resnet32", "train")])
def test_closed_form_is_autograd_in_value_and_gradient(architecture, mode):
    model = randomised(architecture, 5, 16).train(mode == "train")
    images = random(3, 3, 16, 16)
    output = model(images)
    # The mean of a map before ReLU is the logit less its bias, so that these maps are not all zero.
    classes = (output.logits - model.fc.bias).argmax(1)
    teacher_map = random(3, *output.features.shape[2:], seed=1).abs()
    closed = closed_form_map(output.features, output.head, classes)
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
        scale = one.abs().max().item()
        assert name == "fc.bias" or scale > 0, name
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("layer", "frozen"), [("bn1", False), ("layer1", True), ("layer2.0.conv1", False)])
def test_autograd_map_at_an_inner_layer_by_finite_differences(layer, frozen):
    """bn1 is followed by a ReLU that works in place: the map must be of what the layer gave, not of what became of it.

    The logits are differentiated with the layer's output replaced, a whole channel at a time.
    """
    model = randomised("resnet32", 4, 8).eval().requires_grad_(not frozen)
    images, classes, outputs, step = random(2, 3, 8, 8), torch.tensor([3, 1]), [], 1e-6

    def logits(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        handle = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: change(output.clone()))
        with handle, torch.no_grad():
            return model(images).logits.gather(1, classes[:, None])[:, 0]

    logits(lambda output: outputs.append(output))
    features = outputs[0]
    alpha = torch.zeros(features.shape[:2], dtype=torch.float64)
    for channel in range(features.shape[1]):
        shift = torch.zeros_like(features)
        shift[:, channel] = step
        above, below = (logits(lambda output, change=change: output + change) for change in (shift, -shift))
        alpha[:, channel] = (above - below) / (2 * step) / features[0, 0].numel()
    expected = np.maximum(np.einsum("bk,bkij->bij", alpha.numpy(), features.numpy()), 0)

    with torch.no_grad():  # the maps do without a graph around them
        maps = autograd_map(model, images, classes, layer)
    assert expected.max() > 0
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-5, atol=1e-7 * expected.max())
    torch.testing.assert_close(autograd_map(model, images, classes, layer, create_graph=True).detach(), maps)
    # The hooks are gone, the mode is as it was, nothing was added to the parameters' gradients.
    assert not model.get_submodule(layer)._forward_hooks
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(AttributeError, match="layer9"):
        autograd_map(model, images, classes, "layer9")


def test_autograd_map_with_a_graph_reaches_the_parameters():
    """Central differences of a loss on the map, in a weight before the layer, one after it and one of the head.

    With ReLUs a map is piecewise smooth in the weights, so a step of 1e-6 meets no kink here.
    """
    model = randomised("resnet32", 3, 8).eval()
    images, classes, target = random(2, 3, 8, 8), torch.tensor([0, 2]), random(2, 8, 8, seed=5)

    def loss() -> torch.Tensor:
        return (autograd_map(model, images, classes, "bn1", create_graph=True) * target).sum()

    weights = {"conv1.weight": (1, 0, 1, 1), "layer3.4.conv2.weight": (5, 7, 1, 1), "fc.weight": (2, 11)}
    gradients = torch.autograd.grad(loss(), [model.get_parameter(name) for name in weights])
    for (name, index), gradient in zip(weights.items(), gradients, strict=True):
        parameter, step, values = model.get_parameter(name), 1e-6, []
        for shift in (step, -2 * step):
            with torch.no_grad():
                parameter[index] += shift
            values.append(loss().item())
        with torch.no_grad():
            parameter[index] += step
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9), name
        assert gradient[index] != 0, name


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
        loss = (closed_form_map(features, weight, classes) * torch.randn(4096, 2, 2, generator=generator)).sum()
        gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# L_AD -------------------------------------------------------------------------------------------------------------


def test_attention_gradient_by_finite_differences_in_features_and_head():
    """At a point where no ReLU and no absolute value is near its kink."""
    features, weight = random(3, 4, 3, 3).abs().requires_grad_(), random(2, 4, seed=1).abs().requires_grad_()
    classes, teacher = torch.tensor([0, 1, 1]), random(3, 3, 3, seed=2).abs()

    def loss(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return attention_distillation(closed_form_map(features, weight, classes), teacher)[0]

    assert torch.autograd.gradcheck(loss, (features, weight), eps=1e-7, atol=1e-6, rtol=1e-5)
    assert all(g.abs().max() > 1e-4 for g in torch.autograd.grad(loss(features, weight), (features, weight)))


def test_attention_is_zero_for_identical_networks():
    teacher, student = (randomised("resnet32", 4, 16).eval() for _ in range(2))
    models.widen_head(student, 3)
    with torch.no_grad():
        ours, theirs = (model(random(4, 3, 16, 16)) for model in (student, teacher))
    terms = lwm(ours, theirs, torch.tensor([4, 5, 6, 4]), 4, loss_settings())
    assert terms["attention"].item() == pytest.approx(0, abs=1e-12)
    assert terms["zero_maps"] < 1  # it is not zero for want of maps


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20])
def test_attention_is_unchanged_when_a_map_is_scaled(scale):
    student, teacher = random(3, 4, 4).abs().float(), random(3, 4, 4, seed=1).abs().float()
    plain = attention_distillation(student, teacher)[0]
    assert plain > 0.1
    for ours, theirs in ((scale, 1), (1, scale), (scale, scale)):
        mine = (student * ours).requires_grad_()
        scaled, zero_maps = attention_distillation(mine, teacher * theirs)
        assert zero_maps == 0
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)
        scaled.backward()
        assert mine.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dead_student", "dead_teacher"), [([], []), ([1], []), ([], [1]), ([0, 1], [3, 1]), ([0, 1, 2, 3], [])]
)
def test_zero_maps_contribute_nothing_and_are_counted(dead_student, dead_teacher):
    """The mean is over the whole batch: an image without a map counts as 0, it is not left out."""
    student, teacher = random(4, 3, 5).abs(), random(4, 3, 5, seed=1).abs()
    student[dead_student], teacher[dead_teacher] = 0, 0
    dead = sorted({*dead_student, *dead_teacher})
    student.requires_grad_()
    loss, zero_maps = attention_distillation(student, teacher)
    assert zero_maps.item() == len(dead) / 4
    assert loss.item() == pytest.approx(numpy_attention(student.detach().numpy(), teacher.numpy()), rel=1e-12)
    loss.backward()
    assert student.grad.isfinite().all()
    assert (student.grad.flatten(1).abs().amax(1) == 0).nonzero().squeeze(1).tolist() == dead
