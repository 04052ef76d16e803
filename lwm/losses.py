"""The losses of Learning without Memorizing (Dhar et al., CVPR 2019), and the methods made of them.

Notation: N old classes, K new ones; the first N logits are the old classes'. B images in a batch.
The loss of a method is a function ``loss(student, teacher, labels, old, settings)``. It returns a dict of named scalar
terms, "total" among them: the training loop minimises that one and logs them all.

    student, teacher   models.Output: logits (B, N+K) and (B, N), features (B, C, h, w); teacher None if it is not asked
    labels             int64 (B,), position of the class in the student's outputs
    old                N; 0 in task 0
    settings           anything with loss_form, beta, gamma and temperature
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lwm.attention import attention_distances, closed_form_map, differentiated_map
from lwm.models import Output
from lwm.runtime.errors import InputError

Terms = dict[str, Tensor]


def classification_loss(logits: Tensor, labels: Tensor, old: int, form: str) -> Tensor:
    """L_C for labels that are all >= ``old``, mean over the batch.

    ``binary``: binary cross-entropy over the K new logits, summed over classes (iCaRL, CVPR 2017, section 3.2;
    the old logits' targets come from L_D). ``softmax``: cross-entropy over the K new logits. ``softmax-all``:
    cross-entropy over all N+K logits, which teaches that no image is ever of an old class.
    """
    if form == "softmax-all":
        return F.cross_entropy(logits, labels)
    new_logits, new_labels = logits[:, old:], labels - old
    if form == "softmax":
        return F.cross_entropy(new_logits, new_labels)
    if form != "binary":
        raise ValueError(f"no loss form {form!r}")
    targets = F.one_hot(new_labels, new_logits.shape[1]).to(new_logits.dtype)
    return F.binary_cross_entropy_with_logits(new_logits, targets, reduction="sum") / len(labels)


def distillation_sigmoid(student: Tensor, teacher: Tensor) -> Tensor:
    """L_D of the paper (section 3.1): cross-entropy between sigmoids of the N old logits, both (B, N).

    Summed over classes: a mean would divide the weight of every old class by N.
    """
    targets = teacher.detach().sigmoid()
    return F.binary_cross_entropy_with_logits(student, targets, reduction="sum") / len(student)


def distillation_softmax(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """L_D of LwF (Li and Hoiem, ECCV 2016, eq. 2-3): softmax at ``temperature`` over the N old logits, times T^2.

    T^2 keeps the gradient's size when T changes (Hinton et al., 2015, section 2).
    """
    targets = (teacher.detach() / temperature).softmax(1)
    log_probabilities = (student / temperature).log_softmax(1)
    return -(targets * log_probabilities).sum(1).mean() * temperature**2


def attention_distillation(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """L_AD (paper, section 3.2, eq. 4): the mean over the batch of the distances of the maps (B, h, w).

    Returns the loss and the share of images for which either map is all zero: they contribute 0, and their gradient
    is 0.
    """
    distance, alive = attention_distances(student_map, teacher_map)
    loss = distance.where(alive, 0.0).mean()
    return loss, 1 - alive.to(loss.dtype).mean()


# The methods' losses ----------------------------------------------------------------------------------------------


def classify(student: Output, teacher: Output | None, labels: Tensor, old: int, settings: Any) -> Terms:
    """L_C alone: task 0, fine-tuning (the lower bound, over all N+K logits), and a student with a frozen backbone."""
    classification = classification_loss(student.logits, labels, old, settings.loss_form)
    return {"total": classification, "classification": classification}


def distil(student: Output, teacher: Output, labels: Tensor, old: int, settings: Any) -> Terms:
    """L_C over the new logits + beta * L_D over the old, both in one form.

    In the softmax form this is Learning without Forgetting (Li and Hoiem, ECCV 2016), in the binary one LwF-MC (iCaRL,
    CVPR 2017, section 4).
    """
    classification = classification_loss(student.logits, labels, old, settings.loss_form)
    of_teacher = teacher.logits.detach()
    # Less the teacher's own entropy, which no student can fall below: the gradient is the same, and 0 means alike.
    if settings.loss_form == "softmax":
        distillation = distillation_softmax(student.logits[:, :old], of_teacher, settings.temperature)
        distillation = distillation - distillation_softmax(of_teacher, of_teacher, settings.temperature)
    else:
        distillation = distillation_sigmoid(student.logits[:, :old], of_teacher)
        distillation = distillation - distillation_sigmoid(of_teacher, of_teacher)
    total = classification + settings.beta * distillation
    return {"total": total, "classification": classification, "distillation": distillation}


def lwm(student: Output, teacher: Output, labels: Tensor, old: int, settings: Any) -> Terms:
    """Learning without Memorizing (paper, eq. 5): L = L_C + beta * L_D + gamma * L_AD.

    Both maps explain one old class an image: the student's top one.
    """
    return with_attention(
        distil(student, teacher, labels, old, settings), *compared_maps(student, teacher, old), settings.gamma
    )


def with_attention(terms: Terms, student_map: Tensor, teacher_map: Tensor, gamma: float) -> Terms:
    """The terms with gamma * L_AD of the two maps (B, h, w) in the total."""
    attention, zero_maps = attention_distillation(student_map, teacher_map)
    return {**terms, "total": terms["total"] + gamma * attention, "attention": attention, "zero_maps": zero_maps}


def compared_maps(student: Output, teacher: Output, old: int) -> tuple[Tensor, Tensor]:
    """Grad-CAM (B, h, w) of the student's top old class by student and teacher; the teacher's has no gradient."""
    classes = student.logits[:, :old].detach().argmax(1)
    if student.head is None or teacher.head is None:
        ours = differentiated_map(student.logits, student.features, classes, create_graph=True)
        return ours, differentiated_map(teacher.logits, teacher.features, classes)
    ours = closed_form_map(student.features, student.head, classes)
    return ours, closed_form_map(teacher.features, teacher.head, classes).detach()


def of_named(loss: Callable[..., Terms], again: Tensor, old: int, outputs: int) -> Callable[..., Terms]:
    """A method's loss on images of new classes and of the old ones ``again`` int64 (k,), of ``outputs`` in all.

    For the loss these old classes are new too, so that it gets all outputs in another order: first those of which there
    are no images, which are distilled.
    """
    if not len(again):
        return loss
    rest = torch.tensor([label for label in range(old) if label not in again], dtype=torch.long)
    order = torch.cat([rest, again, torch.arange(old, outputs)])
    rank = order.argsort()

    def reordered(output: Output, order: Tensor) -> Output:
        order = order.to(output.logits.device)
        return output._replace(logits=output.logits[:, order], head=None if output.head is None else output.head[order])

    def loss_of_named(student: Output, teacher: Output | None, labels: Tensor, old: int, settings: Any) -> Terms:
        asked = None if teacher is None else reordered(teacher, rest)
        return loss(reordered(student, order), asked, rank.to(labels.device)[labels], len(rest), settings)

    return loss_of_named


@dataclass(frozen=True)
class Method:
    """All that is known of a method.

    ``loss`` None: there is no epoch, and the head is made in closed form (closed_form.py). ``form`` is the form of L_C
    and L_D; None: the teacher's. A method that does not ask the teacher runs none, and one that does not train the
    backbone trains the head alone.
    """

    loss: Callable[..., Terms] | None
    form: str | None = None
    asks_teacher: bool = True
    trains_backbone: bool = True


METHODS: dict[str, Method] = {
    "closed-form": Method(None, asks_teacher=False, trains_backbone=False),
    "finetune": Method(classify, "softmax-all", asks_teacher=False),
    "frozen": Method(classify, asks_teacher=False, trains_backbone=False),
    "lwf": Method(distil, "softmax"),
    "lwf-mc": Method(distil, "binary"),
    "lwm": Method(lwm),
}


def loss_form(settings: Any, otherwise: str) -> str:
    """The form of L_C and L_D: that of the method, else the one that is set, else ``otherwise``.

    Without an epoch it is ``otherwise`` in any case, since nothing shapes the outputs anew. Raises InputError if the
    method has another form than the one that is set.
    """
    method = METHODS[settings.method]
    own = method.form if method.loss else otherwise
    if own and settings.loss_form not in (None, own):
        raise InputError(
            f"{settings.where('loss_form')} is {settings.loss_form!r}, but method {settings.method} is {own}; "
            "leave the loss form out, or take --method lwm"
        )
    return own or settings.loss_form or otherwise
