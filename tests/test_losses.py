"""The losses, the methods and the controls made of them, against NumPy and automatic differentiation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import loss_settings
from hypothesis import given
from hypothesis import strategies as st
from lwm.models import Output
from otherroute import numpy_attention, numpy_map, random

from lwm.attention import differentiated_map
from lwm.experiments import controls
from lwm.losses import (
    METHODS,
    attention_distillation,
    classification_loss,
    distillation_sigmoid,
    distillation_softmax,
    lwm,
    of_named,
)

OLD = 3  # classes of ``case``


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def numpy_classification(logits: np.ndarray, labels: np.ndarray, old: int, form: str) -> float:
    first = 0 if form == "softmax-all" else old
    own, rows = labels - first, np.arange(len(labels))
    if form != "binary":
        return -np.log(softmax(logits[:, first:])[rows, own]).mean()
    p, target = sigmoid(logits[:, first:]), np.eye(logits.shape[1] - first)[own]
    return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum() / len(labels)


def numpy_distillation(student: np.ndarray, teacher: np.ndarray, form: str, temperature: float) -> float:
    if form == "binary":
        p, q = sigmoid(student), sigmoid(teacher)
        return -(q * np.log(p) + (1 - q) * np.log(1 - p)).sum() / len(student)
    p, q = softmax(student / temperature), softmax(teacher / temperature)
    return temperature**2 * -(q * np.log(p)).sum(1).mean()


def case(new: int = 2, batch: int = 40, channels: int = 4, seed: int = 5) -> tuple[Output, Output, torch.Tensor]:
    """Student, teacher and labels, with everything that could carry a gradient made to carry one.

    Some of the images have a map that is all zero, some have not.
    """
    outputs = []
    for index, classes in enumerate((OLD + new, OLD)):
        head = random(classes, channels, seed=seed + index).requires_grad_()
        features = random(batch, channels, 2, 2, seed=seed + 2 + index).exp().requires_grad_()
        outputs.append(Output(features.mean((2, 3)) @ head.T, features, head, features.mean((2, 3))))
    labels = torch.randint(OLD, OLD + new, (batch,), generator=torch.Generator().manual_seed(seed))
    return outputs[0], outputs[1], labels


# The terms --------------------------------------------------------------------------------------------------------


@given(
    form=st.sampled_from(["binary", "softmax"]),
    old=st.integers(1, 40),
    batch=st.integers(1, 5),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_distillation_and_its_gradient(form, old, batch, temperature):
    """The sigmoids' is summed over the classes, so that the gradient on one logit does not depend on their number.

    That of the softmax, times the square of the temperature, keeps its size when the temperature changes.
    """
    student, teacher = random(batch, old, seed=old).requires_grad_(), random(batch, old, seed=batch)
    ours, theirs = student.detach().numpy(), teacher.numpy()
    if form == "binary":
        loss, expected = distillation_sigmoid(student, teacher), sigmoid(ours) - sigmoid(theirs)
    else:
        loss = distillation_softmax(student, teacher, temperature)
        expected = temperature * (softmax(ours / temperature) - softmax(theirs / temperature))
    assert loss.item() == pytest.approx(numpy_distillation(ours, theirs, form, temperature), rel=1e-10, abs=1e-14)
    (gradient,) = torch.autograd.grad(loss, student)
    np.testing.assert_allclose(gradient.numpy(), expected / batch, rtol=1e-9, atol=1e-14)


@given(old=st.integers(0, 4), new=st.integers(1, 5), batch=st.integers(1, 6), seed=st.integers(0, 999))
def test_classification_forms_and_which_logits_they_reach(old, new, batch, seed):
    logits = random(batch, old + new, seed=seed).requires_grad_()
    labels = torch.randint(old, old + new, (batch,), generator=torch.Generator().manual_seed(seed))
    for form in ("binary", "softmax", "softmax-all"):
        loss = classification_loss(logits, labels, old, form)
        expected = numpy_classification(logits.detach().numpy(), labels.numpy(), old, form)
        assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-14), form
        (gradient,) = torch.autograd.grad(loss, logits)
        # Only the softmax over all pushes the old logits, down.
        assert bool((gradient[:, :old] > 0).all() if form == "softmax-all" else (gradient[:, :old] == 0).all()), form


# The methods ------------------------------------------------------------------------------------------------------


TRAINING = [name for name, method in METHODS.items() if method.loss]


@pytest.mark.parametrize("name", TRAINING)
def test_only_a_loss_that_needs_the_teacher_has_it_run(name):
    method, (student, _, labels) = METHODS[name], case()
    settings = loss_settings(loss_form=method.form or "binary", beta=1.0, gamma=1.0, temperature=2.0)
    try:
        method.loss(student, None, labels, OLD, settings)
    except AttributeError:
        assert method.asks_teacher
    else:
        assert not method.asks_teacher


@pytest.mark.parametrize("set_form", ["binary", "softmax"])
@pytest.mark.parametrize("name", TRAINING)
def test_terms_and_total_of_every_method(name, set_form):
    method, (student, teacher, labels) = METHODS[name], case()
    form = method.form or set_form
    settings = loss_settings(loss_form=form, beta=0.3, gamma=1.7, temperature=3.0)
    terms = method.loss(student, teacher if method.asks_teacher else None, labels, OLD, settings)

    logits, theirs = student.logits.detach().numpy(), teacher.logits.detach().numpy()
    expected = {"classification": numpy_classification(logits, labels.numpy(), OLD, form)}
    expected["total"] = expected["classification"]
    if name in ("lwf", "lwf-mc", "lwm"):
        entropy = numpy_distillation(theirs, theirs, form, 3.0)  # of the teacher: a student like it is at 0
        expected["distillation"] = numpy_distillation(logits[:, :OLD], theirs, form, 3.0) - entropy
        expected["total"] += 0.3 * expected["distillation"]
    if name == "lwm":
        classes = logits[:, :OLD].argmax(1)  # the top old class of the student, for both
        assert (classes != theirs.argmax(1)).any()
        assert (classes != logits.argmax(1)).any()
        maps = [numpy_map(o.features.detach().numpy(), o.head.detach().numpy(), classes) for o in (student, teacher)]
        expected["zero_maps"] = np.mean([not (q.any() and p.any()) for q, p in zip(*maps, strict=True)])
        assert 0 < expected["zero_maps"] < 1
        expected["attention"] = numpy_attention(*maps)
        expected["total"] += 1.7 * expected["attention"]
    assert {term: value.item() for term, value in terms.items()} == pytest.approx(expected, rel=1e-12)
    to_teacher = torch.autograd.grad(terms["total"], tuple(teacher), allow_unused=True)
    assert to_teacher == (None,) * 4


def test_the_attention_loss_reaches_the_student_through_features_and_head():
    student, teacher, labels = case()
    leaves = {"features": student.features, "head": student.head}
    attention = lwm(student, teacher, labels, OLD, loss_settings())["attention"]
    whole = dict(zip(leaves, torch.autograd.grad(attention, leaves.values()), strict=True))
    assert all(gradient.abs().max() > 1e-4 for gradient in whole.values())
    assert (whole["head"][OLD:] == 0).all()  # no map is of a new class
    for name, other in (("features", "head"), ("head", "features")):
        alone = student._replace(**{other: leaves[other].detach()})
        same = lwm(alone, teacher, labels, OLD, loss_settings())["attention"]
        gradients = dict(zip(leaves, torch.autograd.grad(same, leaves.values(), allow_unused=True), strict=True))
        assert same == attention
        torch.testing.assert_close(gradients[name], whole[name])
        assert gradients[other] is None
    # Without a closed form the maps come from the graphs of the logits, which give the same.
    general = lwm(student._replace(head=None), teacher._replace(head=None), labels, OLD, loss_settings())["attention"]
    torch.testing.assert_close(general, attention)
    for gradient, expected in zip(torch.autograd.grad(general, leaves.values()), whole.values(), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", controls.METHODS)
def test_a_control_compares_what_it_says(name):
    student, teacher, labels = case()
    control = name.removeprefix("lwm-")
    judge = teacher.logits if control == "teacher-class" else student.logits[:, :OLD]
    classes = labels if control == "new-class" else judge.argmax(1)

    def explained(features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        if control == "features":
            return features
        logits = features.mean((2, 3)) @ head.T
        return differentiated_map(logits, features, classes, control != "signed", create_graph=True)

    theirs = explained(teacher.features, student.head if control == "new-class" else teacher.head).detach()
    expected, zero_maps = attention_distillation(explained(student.features, student.head), theirs)
    terms = controls.METHODS[name].loss(student, teacher, labels, OLD, loss_settings(beta=0.3, gamma=1.7))
    assert 0 <= zero_maps < 1
    assert terms["attention"].item() == pytest.approx(expected.item(), rel=1e-12)
    distilled = terms["classification"] + 0.3 * terms["distillation"]
    assert terms["total"].item() == pytest.approx((distilled + 1.7 * expected).item(), rel=1e-12)
    leaves, stopped = (student.features, student.head), {"through-features": 1, "through-head": 0, "features": 1}
    gradients = torch.autograd.grad(terms["attention"], (*leaves, *teacher), allow_unused=True)
    assert gradients[2:] == (None,) * 4
    for route, whole in enumerate(torch.autograd.grad(expected, leaves, allow_unused=True)):
        if stopped.get(control) == route:
            assert gradients[route] is None
        else:
            assert whole.abs().max() > 1e-6
            torch.testing.assert_close(gradients[route], whole)


@pytest.mark.parametrize("form", ["binary", "softmax"])
def test_known_classes_with_images_are_classified_and_the_others_distilled(form):
    """Of five old classes two have images, beside two new ones: each term has a gradient at its own logits alone."""
    again, settings = torch.tensor([1, 3]), loss_settings(loss_form=form)
    torch.manual_seed(0)
    features = torch.randn(6, 4, 2, 2)
    head, teachers = torch.randn(7, 4, requires_grad=True), torch.randn(5, 4)
    pooled = features.mean((2, 3))
    logits = pooled @ head.T
    student, teacher = Output(logits, features, head, pooled), Output(pooled @ teachers.T, features, teachers, pooled)
    labels = torch.tensor([1, 3, 5, 6, 1, 5])
    terms = of_named(lwm, again, 5, 7)(student, teacher, labels, 5, settings)
    for name, own in (("classification", [1, 3, 5, 6]), ("distillation", [0, 2, 4]), ("attention", [0, 2, 4])):
        (gradient,) = torch.autograd.grad(terms[name], head, retain_graph=True)
        touched = gradient.abs().sum(1) > 0
        assert {*touched.nonzero().flatten().tolist()} <= {*own} and touched.any(), name
    expected = {1: 0, 3: 1, 5: 2, 6: 3}
    positions = torch.tensor([expected[int(label)] for label in labels])
    classification = classification_loss(logits[:, [1, 3, 5, 6]], positions, 0, form)
    torch.testing.assert_close(terms["classification"], classification)
    assert of_named(lwm, again[:0], 5, 7) is lwm
