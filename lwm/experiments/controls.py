"""Controls of the attention loss: methods that compare something else than LwM does, for the ablation.

    python3 -m lwm.experiments.controls incremental_learning_system.py --method lwm-signed --teacher ...

adds them to losses.METHODS and runs the script. Each is L_C + beta * L_D + gamma * L_AD as lwm, but for what L_AD
compares. They need a network with closed-form maps.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lwm import losses
from lwm.attention import closed_form_map
from lwm.models import Output
from lwm.runtime.errors import InputError

Maps = tuple[Tensor, Tensor]  # student's with gradient, teacher's without


def signed(student: Output, teacher: Output, labels: Tensor, old: int) -> Maps:
    """LwM's maps without the ReLU."""
    return _maps(student, teacher, _top(student, old), relu=False)


def through_features(student: Output, teacher: Output, labels: Tensor, old: int) -> Maps:
    """The gradient reaches the student through the feature map A alone."""
    return _maps(student._replace(head=_weight(student).detach()), teacher, _top(student, old))


def through_head(student: Output, teacher: Output, labels: Tensor, old: int) -> Maps:
    """The gradient reaches the student through the head, that is alpha, alone."""
    return _maps(student._replace(features=student.features.detach()), teacher, _top(student, old))


def new_class(student: Output, teacher: Output, labels: Tensor, old: int) -> Maps:
    """Maps of the image's own class, both by the student's head since the teacher has none for it."""
    return _maps(student, teacher._replace(head=_weight(student)), labels)


def teacher_class(student: Output, teacher: Output, labels: Tensor, old: int) -> Maps:
    """Maps of the teacher's top class, where LwM takes the student's top old class."""
    return _maps(student, teacher, _top(teacher, old))


def features(student: Output, teacher: Output, labels: Tensor, old: int) -> Maps:
    """The feature maps (B, C, h, w) themselves."""
    return student.features, teacher.features.detach()


def _top(output: Output, old: int) -> Tensor:
    return output.logits[:, :old].detach().argmax(1)


def _weight(output: Output) -> Tensor:
    if output.head is None:
        raise InputError("this control needs a network whose maps have a closed form; take resnet32")
    return output.head


def _maps(student: Output, teacher: Output, classes: Tensor, relu: bool = True) -> Maps:
    ours = closed_form_map(student.features, _weight(student), classes, relu)
    return ours, closed_form_map(teacher.features, _weight(teacher), classes, relu).detach()


def _method(compared: Callable[[Output, Output, Tensor, int], Maps]) -> losses.Method:
    def loss(student: Output, teacher: Output, labels: Tensor, old: int, settings: Any) -> losses.Terms:
        terms = losses.distil(student, teacher, labels, old, settings)
        return losses.with_attention(terms, *compared(student, teacher, labels, old), settings.gamma)

    return losses.Method(loss)


METHODS = {
    f"lwm-{compared.__name__.replace('_', '-')}": _method(compared)
    for compared in (signed, through_features, through_head, new_class, teacher_class, features)
}


if __name__ == "__main__":
    losses.METHODS.update(METHODS)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
