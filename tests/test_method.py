"""The mathematics, in float64 and against an independent route: autograd, finite differences, NumPy, scikit-learn."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import loss_settings, randomised
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from torch import nn

import models
from gradcam import autograd_map, closed_form_map
from losses import (
    METHODS,
    attention_distillation,
    classification_loss,
    distillation_sigmoid,
    distillation_softmax,
    finetune,
    first_step,
)
from models import Output
from settings import Settings


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numpy_map(features: np.ndarray, weight: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Grad-CAM at the last feature map, image by image."""
    maps = [np.maximum(np.tensordot(weight[c], a, 1), 0) for a, c in zip(features, classes, strict=True)]
    return np.stack(maps) / features[0, 0].size


def numpy_attention(student: np.ndarray, teacher: np.ndarray) -> float:
    """L_AD, image by image; every map must have something in it."""
    total = 0.0
    for q, p in zip(student, teacher, strict=True):
        total += np.abs(p.ravel() / np.linalg.norm(p) - q.ravel() / np.linalg.norm(q)).sum()
    return total / len(student)


def numpy_sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


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


# The methods ------------------------------------------------------------------------------------------------------


def case(old: int = 3, new: int = 2, batch: int = 6, channels: int = 4, seed: int = 30):
    """Student, teacher, labels and heads with everything that could carry a gradient made to carry one.

    Some of the images have a map that is all zero, some have not.
    """
    heads = (
        random(old + new, channels, seed=seed).requires_grad_(),
        random(old, channels, seed=seed + 1).requires_grad_(),
    )
    outputs = []
    for index, head in enumerate(heads):
        features = random(batch, channels, 2, 2, seed=seed + 2 + index).exp().requires_grad_()
        outputs.append(Output((features.mean((2, 3)) @ head.T), features))
    labels = torch.randint(old, old + new, (batch,), generator=torch.Generator().manual_seed(seed))
    return outputs[0], outputs[1], labels, heads


def test_attention_reaches_the_student_through_features_and_head_and_never_the_teacher():
    student, teacher, labels, heads = case()
    terms = METHODS["lwm"](student, teacher, labels, heads, loss_settings())
    assert 0 < terms["zero_maps"] < 1
    leaves = (student.features, heads[0], teacher.features, heads[1], teacher.logits)
    through_a, through_alpha, *teachers = torch.autograd.grad(terms["attention"], leaves, allow_unused=True)
    assert through_a.abs().max() > 1e-4
    assert through_alpha.abs().max() > 1e-4
    assert through_alpha[3:].abs().max() == 0  # no map is of a new class
    assert teachers == [None, None, None]


def attention_of(what: str) -> tuple[float, list[torch.Tensor | None]]:
    """L_AD with a control of the ablation, and its gradients in A, in the student's head and in the teacher."""
    student, teacher, labels, heads = case(seed=0)
    attention = METHODS["lwm"](student, teacher, labels, heads, loss_settings(attention=what))["attention"]
    leaves = (student.features, heads[0], teacher.features, heads[1])
    return attention.item(), list(torch.autograd.grad(attention, leaves, allow_unused=True))


def test_the_two_routes_are_the_parts_of_the_whole_gradient():
    value, (through_a, through_alpha, *_) = attention_of("grad-cam")
    for what, own, other in (("through-features", 0, 1), ("through-head", 1, 0)):
        same, gradients = attention_of(what)
        assert same == value
        torch.testing.assert_close(gradients[own], (through_a, through_alpha)[own])
        assert gradients[other] is None


def test_the_controls_of_the_ablation_compare_what_they_say():
    student, teacher, labels, heads = case(seed=0)
    ours, theirs, head, old_head = (x.detach().numpy() for x in (student.features, teacher.features, *heads))
    classes = student.logits[:, :3].detach().argmax(1).numpy()

    def signed(features: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.stack([np.tensordot(weight[c], a, 1) for a, c in zip(features, classes, strict=True)])

    expected = {
        "signed": numpy_attention(signed(ours, head), signed(theirs, old_head)),
        "features": numpy_attention(ours, theirs),
    }
    for what, value in expected.items():
        found, gradients = attention_of(what)
        assert found == pytest.approx(value, rel=1e-12), what
        assert gradients[2:] == [None, None]
    maps = [numpy_map(features, head, labels.numpy()) for features in (ours, theirs)]
    alive = np.array([all(part[i].any() for part in maps) for i in range(len(labels))])
    assert alive.any()
    found, gradients = attention_of("new-class")
    value = numpy_attention(*(part[alive] for part in maps)) * alive.mean()
    assert found == pytest.approx(value, rel=1e-12)
    assert gradients[1][3:].abs().max() > 1e-6
    assert gradients[2:] == [None, None]


@pytest.mark.parametrize("form", ["binary", "softmax"])
def test_a_frozen_backbone_learns_by_classification_alone(form):
    student, teacher, labels, heads = case()
    terms = METHODS["frozen"](student, teacher, labels, heads, loss_settings(loss_form=form))
    assert set(terms) == {"total", "classification"}
    assert terms["total"].item() == classification_loss(student.logits, labels, 3, form).item()


@pytest.mark.parametrize("route", ["A", "alpha"])
def test_each_route_alone_carries_a_gradient(route):
    student, teacher, _, heads = case()
    classes = student.logits[:, :3].detach().argmax(1)
    features = student.features if route == "A" else student.features.detach()
    head = heads[0] if route == "alpha" else heads[0].detach()
    teacher_map = closed_form_map(teacher.features, heads[1], classes).detach()
    loss, _ = attention_distillation(closed_form_map(features, head, classes), teacher_map)
    (gradient,) = torch.autograd.grad(loss, student.features if route == "A" else heads[0])
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("form", ["binary", "softmax", "softmax-all"])
@pytest.mark.parametrize("method", METHODS)
def test_no_term_of_any_method_sends_a_gradient_to_the_teacher(method, form):
    student, teacher, labels, heads = case()
    terms = METHODS[method](student, teacher, labels, heads, loss_settings(loss_form=form))
    gradients = torch.autograd.grad(terms["total"], (teacher.features, heads[1], teacher.logits), allow_unused=True)
    assert [gradient is None for gradient in gradients] == [True, True, True]


@pytest.mark.parametrize("judge", ["student", "teacher"])
def test_both_maps_are_of_one_old_class(judge):
    """New logits are the largest of all, and student and teacher disagree about the old class."""
    features = [random(2, 4, 3, 3, seed=seed).abs() + 0.01 for seed in (1, 2)]
    heads = (random(5, 4, seed=3).abs(), random(3, 4, seed=4).abs())
    student_logits = torch.tensor([[0.0, 2.0, 1.0, 9.0, 8.0], [3.0, 1.0, 2.0, 7.0, 9.0]], dtype=torch.float64)
    teacher_logits = torch.tensor([[5.0, 4.0, 0.0], [-3.0, -2.0, -1.0]], dtype=torch.float64)
    student, teacher = Output(student_logits, features[0]), Output(teacher_logits, features[1])
    settings = loss_settings(attention_class=judge)
    attention = METHODS["lwm"](student, teacher, torch.tensor([3, 4]), heads, settings)["attention"].item()

    def expected(student_classes: list[int], teacher_classes: list[int]) -> float:
        return numpy_attention(
            numpy_map(features[0].numpy(), heads[0].numpy(), np.array(student_classes)),
            numpy_map(features[1].numpy(), heads[1].numpy(), np.array(teacher_classes)),
        )

    of_student, of_teacher, new = [1, 0], [0, 2], [3, 4]
    right = of_student if judge == "student" else of_teacher
    assert attention == pytest.approx(expected(right, right), rel=1e-12)
    wrong = [(of_student, of_teacher), (of_teacher, of_student), (new, of_teacher), (new, of_student)]
    wrong.append((of_teacher, of_teacher) if judge == "student" else (of_student, of_student))
    assert all(abs(attention - expected(*classes)) > 1e-3 for classes in wrong)


def test_sigmoid_distillation_by_hand():
    """Teacher logits ln 3 and 0 are probabilities 3/4 and 1/2; student logits 0 and ln 3 likewise.

    Image 1: -(3/4 ln 1/2 + 1/4 ln 1/2) - (1/2 ln 3/4 + 1/2 ln 1/4); image 2, both networks at 1/2: 2 ln 2.
    """
    log3 = math.log(3)
    student = torch.tensor([[0.0, log3], [0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[log3, 0.0], [0.0, 0.0]], dtype=torch.float64)
    first = math.log(2) - (math.log(3 / 4) + math.log(1 / 4)) / 2
    expected = (first + 2 * math.log(2)) / 2
    assert distillation_sigmoid(student, teacher).item() == pytest.approx(expected, rel=1e-14)


@given(old=st.integers(1, 40), batch=st.integers(1, 4))
def test_the_gradient_on_one_old_logit_does_not_depend_on_the_number_of_classes(old, batch):
    student, teacher = random(batch, old), random(batch, old, seed=1)
    student[:, 0], teacher[:, 0] = 0.7, -1.1
    student.requires_grad_()
    distillation_sigmoid(student, teacher).backward()
    expected = (numpy_sigmoid(0.7) - numpy_sigmoid(-1.1)) / batch
    np.testing.assert_allclose(student.grad[:, 0].numpy(), expected, rtol=1e-12)


@given(old=st.integers(1, 6), batch=st.integers(1, 5), seed=st.integers(0, 999))
def test_sigmoid_distillation_against_numpy(old, batch, seed):
    student, teacher = random(batch, old, seed=seed), random(batch, old, seed=seed + 1)
    p, q = numpy_sigmoid(student.numpy()), numpy_sigmoid(teacher.numpy())
    expected = -(q * np.log(p) + (1 - q) * np.log(1 - p)).sum() / batch
    assert distillation_sigmoid(student, teacher).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_softmax_distillation_against_numpy_with_the_square_of_the_temperature(temperature):
    student, teacher = 3 * random(5, 4), 3 * random(5, 4, seed=1)
    p, q = numpy_softmax(student.numpy() / temperature), numpy_softmax(teacher.numpy() / temperature)
    expected = temperature**2 * -(q * np.log(p)).sum(1).mean()
    assert distillation_softmax(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_softmax(student, teacher, temperature), student)
    np.testing.assert_allclose(gradient.numpy(), temperature * (p - q) / 5, rtol=1e-10, atol=1e-15)


@given(old=st.integers(0, 4), new=st.integers(2, 5), batch=st.integers(1, 6), seed=st.integers(0, 999))
def test_classification_forms_against_scikit_learn(old, new, batch, seed):
    logits = random(batch, old + new, seed=seed)
    labels = torch.randint(old, old + new, (batch,), generator=torch.Generator().manual_seed(seed))
    new_logits, new_labels = logits[:, old:].numpy(), labels.numpy() - old
    binary = sum(
        log_loss(new_labels == index, numpy_sigmoid(new_logits[:, index]), labels=[False, True]) for index in range(new)
    )
    softmax = log_loss(new_labels, numpy_softmax(new_logits), labels=list(range(new)))
    over_all = log_loss(labels.numpy(), numpy_softmax(logits.numpy()), labels=list(range(old + new)))
    for form, expected in (("binary", binary), ("softmax", softmax), ("softmax-all", over_all)):
        assert classification_loss(logits, labels, old, form).item() == pytest.approx(expected, rel=1e-10), form


@pytest.mark.parametrize(("form", "reached"), [("binary", False), ("softmax", False), ("softmax-all", True)])
def test_only_softmax_all_pushes_the_old_logits_down(form, reached):
    logits = random(4, 5).requires_grad_()
    classification_loss(logits, torch.tensor([3, 4, 3, 4]), 3, form).backward()
    assert (logits.grad[:, :3].abs().max() > 0) == reached
    assert logits.grad[:, 3:].abs().max() > 0
    if reached:
        assert (logits.grad[:, :3] > 0).all()


def test_binary_works_for_one_new_class():
    logits = random(3, 4)
    expected = -np.log(numpy_sigmoid(logits[:, 3].numpy())).mean()
    loss = classification_loss(logits, torch.tensor([3, 3, 3]), 3, "binary")
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="sofmax"):
        classification_loss(random(2, 3), torch.tensor([1, 2]), 1, "sofmax")


@pytest.mark.parametrize("form", ["binary", "softmax", "softmax-all"])
def test_total_of_lwm(form):
    student, teacher, labels, heads = case()
    settings = loss_settings(loss_form=form, beta=0.3, gamma=1.7, temperature=3.0)
    terms = METHODS["lwm"](student, teacher, labels, heads, settings)
    classification = classification_loss(student.logits, labels, 3, form)
    old_logits = student.logits[:, :3]
    distillation = (
        distillation_softmax(old_logits, teacher.logits, 3.0)
        if form == "softmax"
        else distillation_sigmoid(old_logits, teacher.logits)
    )
    classes = old_logits.detach().numpy().argmax(1)
    student_map, teacher_map = (
        numpy_map(output.features.detach().numpy(), head.detach().numpy(), classes)
        for output, head in ((student, heads[0]), (teacher, heads[1]))
    )
    alive = (student_map.max((1, 2)) > 0) & (teacher_map.max((1, 2)) > 0)
    attention = numpy_attention(student_map[alive], teacher_map[alive]) * alive.mean()
    assert 0 < alive.sum() < len(alive)
    assert terms["classification"].item() == pytest.approx(classification.item(), rel=1e-12)
    assert terms["distillation"].item() == pytest.approx(distillation.item(), rel=1e-12)
    assert terms["attention"].item() == pytest.approx(attention, rel=1e-12)
    assert terms["zero_maps"].item() == pytest.approx(1 - alive.mean())
    expected = classification.item() + 0.3 * distillation.item() + 1.7 * attention
    assert terms["total"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["binary", "softmax", "softmax-all"])
def test_total_of_the_lwf_family_whatever_the_form_and_gamma_say(form):
    student, teacher, labels, heads = case()
    settings = loss_settings(loss_form=form, beta=0.3, gamma=1.7, temperature=3.0)
    old_logits = student.logits[:, :3]
    expected = {
        "lwf": classification_loss(student.logits, labels, 3, "softmax")
        + 0.3 * distillation_softmax(old_logits, teacher.logits, 3.0),
        "lwf-mc": classification_loss(student.logits, labels, 3, "binary")
        + 0.3 * distillation_sigmoid(old_logits, teacher.logits),
    }
    for method, value in expected.items():
        terms = METHODS[method](student, teacher, labels, heads, settings)
        assert terms["total"].item() == pytest.approx(value.item(), rel=1e-14), method
        assert "attention" not in terms


def test_finetune_and_the_first_step_ask_no_teacher():
    student, teacher, labels, heads = case()
    expected = log_loss(labels.numpy(), numpy_softmax(student.logits.detach().numpy()), labels=list(range(5)))
    for other, other_head in ((None, None), (teacher, heads[1])):
        terms = finetune(student, other, labels, (heads[0], other_head), loss_settings(loss_form="binary"))
        assert set(terms) == {"total", "classification"}
        assert terms["total"].item() == pytest.approx(expected, rel=1e-12)
    for form in ("binary", "softmax", "softmax-all"):
        terms = first_step(student, None, labels, (heads[0], None), loss_settings(loss_form=form))
        assert terms["total"].item() == classification_loss(student.logits, labels, 0, form).item()


def test_methods_are_the_choices_of_the_setting():
    (method,) = [f for f in fields(Settings) if f.name == "method"]
    assert sorted(method.metadata["help"].split(": ")[1].split(", ")) == sorted(METHODS)
    for name in METHODS:
        assert method.metadata["check"](name) == name
    with pytest.raises(ValueError, match="one of"):
        method.metadata["check"]("ewc")
