"""The losses of Learning without Memorizing (Dhar et al., CVPR 2019) and the methods made of them.

Notation: N old classes, K new ones; the first N logits are the old classes'. B images in a batch.
A method is a function ``loss(student, teacher, labels, heads, settings)`` that returns a dict of named scalar
terms, "total" among them: the training loop minimises that one and logs them all.

    student, teacher   models.Output: logits (B, N+K) and (B, N), features (B, C, h, w); teacher None in step 0
    labels             int64 (B,), position of the class in the student's outputs
    heads              the two rows-by-class weights of the heads, (N+K, C) and (N, C); None for a network whose maps
                       have no closed form: its logits bring the graph from its features with them
    settings           anything with loss_form, beta, gamma, temperature, attention_class and attention
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lwm.attention import closed_form_map, differentiated_map
from lwm.models import Output

Terms = dict[str, Tensor]
Heads = tuple[Tensor | None, Tensor | None]


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


def _unit_length(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Each map (B, ...) as a row (B, pixels) of L2 length 1, and which rows are not all zero."""
    rows = maps.flatten(1)
    peak = rows.detach().abs().amax(1, keepdim=True)
    alive = peak > 0
    # Division by the peak changes nothing after normalisation, and squares of tiny maps no longer underflow.
    rows = rows / peak.where(alive, 1.0)
    squares = rows.square().sum(1, keepdim=True)
    return rows / squares.where(alive, 1.0).sqrt(), alive.squeeze(1)


def attention_distances(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance (B,) of the L2-normalised maps, both (B, h, w), summed over pixels; and where both have something
    in them, bool (B,): elsewhere the distance says nothing.
    """
    student, student_alive = _unit_length(student_map)
    teacher, teacher_alive = _unit_length(teacher_map)
    return (teacher - student).abs().sum(1), student_alive & teacher_alive


def attention_distillation(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """L_AD (paper, section 3.2, eq. 4): the mean over the batch of the distances of the maps.

    Returns the loss and the share of images for which either map is all zero: they contribute 0, and their gradient
    is 0.
    """
    distance, alive = attention_distances(student_map, teacher_map)
    loss = distance.where(alive, 0.0).mean()
    return loss, 1 - alive.to(loss.dtype).mean()


def _classify_and_distil(student: Output, teacher: Output, labels: Tensor, form: str, settings: Any) -> Terms:
    """L_C + beta * L_D, both in one form; ``softmax-all`` takes the paper's L_D."""
    old = teacher.logits.shape[1]
    old_logits = student.logits[:, :old]
    classification = classification_loss(student.logits, labels, old, form)
    if form == "softmax":
        distillation = distillation_softmax(old_logits, teacher.logits, settings.temperature)
    else:
        distillation = distillation_sigmoid(old_logits, teacher.logits)
    total = classification + settings.beta * distillation
    return {"total": total, "classification": classification, "distillation": distillation}


def first_step(student: Output, teacher: Output | None, labels: Tensor, heads: Heads, settings: Any) -> Terms:
    """Step 0: L_C alone, no class is old."""
    classification = classification_loss(student.logits, labels, 0, settings.loss_form)
    return {"total": classification, "classification": classification}


def finetune(student: Output, teacher: Output | None, labels: Tensor, heads: Heads, settings: Any) -> Terms:
    """The lower bound: softmax cross-entropy over all N+K logits; the teacher is not asked."""
    classification = classification_loss(student.logits, labels, 0, "softmax-all")
    return {"total": classification, "classification": classification}


def lwf(student: Output, teacher: Output, labels: Tensor, heads: Heads, settings: Any) -> Terms:
    """Learning without Forgetting (ECCV 2016): softmax L_C over the new logits, softmax L_D over the old."""
    return _classify_and_distil(student, teacher, labels, "softmax", settings)


def lwf_mc(student: Output, teacher: Output, labels: Tensor, heads: Heads, settings: Any) -> Terms:
    """LwF-MC (iCaRL, CVPR 2017, section 4): binary L_C over the new logits, sigmoid L_D over the old."""
    return _classify_and_distil(student, teacher, labels, "binary", settings)


def lwm(student: Output, teacher: Output, labels: Tensor, heads: Heads, settings: Any) -> Terms:
    """Learning without Memorizing (paper, eq. 5): L = L_C + beta * L_D + gamma * L_AD.

    Both maps are those of one old class an image: the top one of the student, as in the paper, or of the teacher.
    """
    terms = _classify_and_distil(student, teacher, labels, settings.loss_form, settings)
    attention, zero_maps = attention_distillation(*_compared(student, teacher, labels, heads, settings))
    total = terms["total"] + settings.gamma * attention
    return {**terms, "total": total, "attention": attention, "zero_maps": zero_maps}


CLOSED_FORM = ("through-features", "through-head", "new-class")


def _compared(student: Output, teacher: Output, labels: Tensor, heads: Heads, settings: Any) -> tuple[Tensor, Tensor]:
    """What L_AD compares, of student and teacher: by default the paper's maps, otherwise a control of the ablation.

    ``grad-cam``: maps (B, h, w) of one old class. ``signed``: the same without the ReLU. ``through-features`` and
    ``through-head``: the same maps, but the gradient reaches the student through A alone, or through alpha alone.
    ``new-class``: maps of the image's own class, both by the student's head since the teacher has none for it.
    ``features``: the feature maps (B, C, h, w) themselves. Three of them (CLOSED_FORM) need the heads' weights.
    """
    student_head, teacher_head = heads
    features, what = student.features, settings.attention
    if what == "features":
        return features, teacher.features.detach()
    old = teacher.logits.shape[1]
    judge = student.logits[:, :old] if settings.attention_class == "student" else teacher.logits
    classes, relu = judge.detach().argmax(1), what != "signed"
    if student_head is None or teacher_head is None:
        if what in CLOSED_FORM:
            raise ValueError(f"attention {what!r} needs the weights of the heads")
        ours = differentiated_map(student.logits, features, classes, relu, create_graph=True)
        return ours, differentiated_map(teacher.logits, teacher.features, classes, relu)
    if what == "new-class":
        theirs = closed_form_map(teacher.features, student_head, labels).detach()
        return closed_form_map(features, student_head, labels), theirs
    ours = closed_form_map(
        features.detach() if what == "through-head" else features,
        student_head.detach() if what == "through-features" else student_head,
        classes,
        relu,
    )
    return ours, closed_form_map(teacher.features, teacher_head, classes, relu).detach()


def frozen(student: Output, teacher: Output, labels: Tensor, heads: Heads, settings: Any) -> Terms:
    """A lower bound: L_C alone over the new logits, for a student whose backbone does not move."""
    classification = classification_loss(student.logits, labels, teacher.logits.shape[1], settings.loss_form)
    return {"total": classification, "classification": classification}


METHODS: dict[str, Callable[..., Terms]] = {
    "finetune": finetune,
    "frozen": frozen,
    "lwf": lwf,
    "lwf-mc": lwf_mc,
    "lwm": lwm,
}
