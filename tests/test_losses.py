"""The losses and the methods made of them, against an independent route: by hand, NumPy, scikit-learn."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import loss_settings
from hypothesis import given
from hypothesis import strategies as st
from lwm.models import Output
from otherroute import numpy_attention, numpy_map, random
from sklearn.metrics import log_loss

from lwm.attention import closed_form_map
from lwm.losses import (
    METHODS,
    attention_distillation,
    classification_loss,
    distillation_sigmoid,
    distillation_softmax,
    finetune,
    first_step,
)
from lwm.runtime.settings import Settings


def numpy_sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


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
