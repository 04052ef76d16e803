"""How sharply distillation bends in a student's weights, which bounds the rate at which it still learns safely.

Gradient descent with momentum m diverges from a minimum where the rate exceeds 2 (1 + m) / lambda, with lambda the
largest eigenvalue of the loss's Hessian (Polyak, 1964). A student begins as its teacher, at the minimum of beta * L_D.
There lambda is in the thousands for pretrained networks, whatever the temperature (T squared cancels), and depends on
network, form and number of classes in a way that no formula of their sizes gives. So it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwm.images.batches import Images, to_input
from lwm.losses import Terms, distil
from lwm.models import Network
from lwm.runtime.errors import log

SAFE = 0.5  # of 1 / lambda, the rate that is taken
MOST = 0.01
PASSES = 8  # of the power iteration
SHIFT = 3e-3  # length of the step in weight space between two gradients
IMAGES = 16


def stable_rate(
    student: Network,
    teacher: Network,
    images: Images,
    channels: tuple[Any, Any],
    old: int,
    settings: Any,
    loss: Callable[..., Terms] = distil,
) -> float:
    """The learning rate at which a student that begins as its ``teacher`` stays near it: ``SAFE`` / lambda.

    Measured on ``IMAGES`` of the new classes' ``images``, normalised by ``channels`` (mean, std); takes as long as nine
    steps. ``loss`` has the term "distillation", and ``settings`` has loss_form, beta and temperature. At most ``MOST``,
    as without distillation.
    """
    device = next(student.parameters()).device
    index = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))[:IMAGES]
    inputs, labels = to_input(images.pixels[index].to(device), *channels), images.labels[index].to(device)
    with torch.no_grad():
        asked = teacher.eval()(inputs)
    student.eval()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def distillation() -> Tensor:
        return settings.beta * loss(student(inputs), asked, labels, old, settings)["distillation"]

    curvature = largest_curvature(distillation, parameters)
    rate = float(f"{min(MOST, SAFE / max(curvature, 1e-9)):.1g}")
    log.info(f"INCREMENTAL_LR = {rate} (distillation bends by {curvature:.2g} in the weights; {SAFE} of the inverse)")
    return rate


def largest_curvature(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> float:
    """The largest eigenvalue of the Hessian of ``loss()`` in ``parameters``, which come back as they were.

    By power iteration on differences of gradients, so that no second derivative is needed. It is a little too low.
    """
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    start = torch.autograd.grad(loss(), parameters)
    direction = [torch.randn(each.shape, generator=generator).to(each) for each in kept]
    curvature = 0.0
    for _ in range(PASSES):
        length = _dot(direction, direction) ** 0.5
        if not length:
            break
        direction = [each / length for each in direction]
        _set(parameters, [there + SHIFT * each for there, each in zip(kept, direction, strict=True)])
        shifted = torch.autograd.grad(loss(), parameters)
        product = [(one - other) / SHIFT for one, other in zip(shifted, start, strict=True)]
        curvature, direction = _dot(direction, product), product
    _set(parameters, kept)
    return curvature


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
