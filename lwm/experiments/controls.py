"""Controls of the attention loss: methods that compare something else than LwM does, for the ablation.

    python3 -m lwm.experiments.controls incremental_learning_system.py --method lwm-signed --teacher ...

adds them to losses.METHODS and runs the script. Each is L_C + beta * L_D + gamma * L_AD as lwm, but for what L_AD
compares. They need a network with closed-form maps.
"""

from __future__ import annotations

import runpy
import sys
from functools import partial
from typing import Any

from torch import Tensor

from lwm import losses
from lwm.attention import closed_form_map
from lwm.models import Output
from lwm.runtime.errors import InputError

NAMES = ("signed", "through-features", "through-head", "new-class", "teacher-class", "features")


def compared(control: str, student: Output, teacher: Output, labels: Tensor, old: int) -> tuple[Tensor, Tensor]:
    """What L_AD compares: the student's with gradient, the teacher's without. It begins with what lwm compares."""
    features, head, teacher_head = student.features, student.head, teacher.head
    if head is None or teacher_head is None:
        raise InputError("this control needs a network whose maps have a closed form; take resnet32")
    classes, relu = student.logits[:, :old].detach().argmax(1), True
    match control:
        case "signed":  # the maps without the ReLU
            relu = False
        case "through-features":  # the gradient reaches the student through the feature map A alone
            head = head.detach()
        case "through-head":  # through the head, that is alpha, alone
            features = features.detach()
        case "new-class":  # the image's own class, both by the student's head since the teacher has none for it
            classes, teacher_head = labels, head
        case "teacher-class":  # the teacher's top class, not the student's top old one
            classes = teacher.logits[:, :old].detach().argmax(1)
        case "features":  # the feature maps (B, C, h, w) themselves
            return features, teacher.features.detach()
    ours = closed_form_map(features, head, classes, relu)
    return ours, closed_form_map(teacher.features, teacher_head, classes, relu).detach()


def _loss(control: str, student: Output, teacher: Output, labels: Tensor, old: int, settings: Any) -> losses.Terms:
    terms = losses.distil(student, teacher, labels, old, settings)
    return losses.with_attention(terms, *compared(control, student, teacher, labels, old), settings.gamma)


METHODS = {f"lwm-{control}": losses.Method(partial(_loss, control)) for control in NAMES}


if __name__ == "__main__":
    losses.METHODS.update(METHODS)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
