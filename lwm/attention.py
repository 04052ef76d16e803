"""Grad-CAM (Selvaraju et al., ICCV 2017, section 3): where a network looks for a class.

With A the feature map (C, h, w) and y_c the logit of class c,

    alpha_k = mean over pixels of d y_c / d A_k          Q = ReLU(sum_k alpha_k A_k)

``closed_form_map`` is Q at the last feature map of a network that ends in global average pooling and one linear
layer: there d y_c / d A_k(i, j) = W_ck / (h w) exactly, so Q needs no second backward pass. ``differentiated_map`` is Q
at the last feature map where more stands before the head, ``autograd_map`` at any layer of any network. All can be
differentiated, in A and in alpha.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lwm.models import Network, Output
from lwm.runtime.errors import RunError


def closed_form_map(features: Tensor, head_weight: Tensor, classes: Tensor, relu: bool = True) -> Tensor:
    """Grad-CAM at the feature map that pooling and the linear head see.

    features (B, C, h, w), head_weight (outputs, C), classes int64 (B,); returns (B, h, w), >= 0 with ``relu``.
    """
    # index_select, not head_weight[classes]: the backward of the latter adds in no fixed order on several threads.
    rows = head_weight.index_select(0, classes)
    height, width = features.shape[2:]
    weighted = rows.unsqueeze(1).bmm(features.flatten(2)).squeeze(1) / (height * width)
    return (weighted.relu() if relu else weighted).unflatten(1, (height, width))


def differentiated_map(
    logits: Tensor, features: Tensor, classes: Tensor, relu: bool = True, create_graph: bool = False
) -> Tensor:
    """Grad-CAM at ``features`` (B, C, h, w), from which ``logits`` (B, outputs) were computed with their graph.

    classes int64 (B,); returns (B, h, w), >= 0 with ``relu``. ``create_graph`` keeps the graph of alpha, so that a
    loss on the map reaches the parameters through A and through alpha; without it the map is detached.
    """
    with torch.enable_grad():
        scores = logits.gather(1, classes.unsqueeze(1)).sum()
    (gradients,) = torch.autograd.grad(scores, features, create_graph=create_graph, retain_graph=True)
    maps = (gradients.mean((2, 3), keepdim=True) * features).sum(1)
    maps = maps.relu() if relu else maps
    return maps if create_graph else maps.detach()


def last_map(output: Output, classes: Tensor) -> Tensor:
    """The detached map (B, h, w) of ``classes`` int64 (B,) at the last feature map."""
    if output.head is None:
        return differentiated_map(output.logits, output.features, classes)
    return closed_form_map(output.features, output.head, classes).detach()


def require_closed_form(model: Network, images: Tensor) -> None:
    """Compare the closed form with automatic differentiation, in eval mode, where the network is said to have it.

    images (B, 3, H, W), normalised. Raises RunError where the two differ.
    """
    if not model.closed_form:
        return
    model.eval()
    with torch.no_grad():
        output = model(images)
    classes = output.logits.argmax(1)
    weight = output.head
    closed = closed_form_map(output.features, weight, classes, relu=False)
    difference = (closed - autograd_map(model, images, classes, model.last_layer, relu=False)).abs().max()
    terms = closed_form_map(output.features.abs(), weight.abs(), classes)  # a map is a difference of such
    if not difference <= 1e-4 * terms.max():
        raise RunError(f"Grad-CAM in closed form differs from automatic differentiation by {difference.item():.2g}")


def autograd_map(
    model: nn.Module, images: Tensor, classes: Tensor, layer: str, relu: bool = True, create_graph: bool = False
) -> Tensor:
    """Grad-CAM at the named layer, by differentiating the logits of ``classes`` int64 (B,).

    images (B, 3, H, W), normalised; returns (B, h, w). ``relu`` and ``create_graph`` are as in ``differentiated_map``.
    The mode of the model (train or eval) is the caller's. Raises AttributeError where the model has no such layer.
    """
    captured: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # a frozen network: start the graph here
            output = output.detach().requires_grad_()
        captured.append(output)
        return output.clone()  # what follows may work in place, and the captured map must stay as it is

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            return differentiated_map(model(images).logits, captured[-1], classes, relu, create_graph)
    finally:
        handle.remove()


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
    """L1 distance (B,) of the L2-normalised maps, both (B, h, w), summed over pixels (LwM, section 3.2, eq. 4).

    Also bool (B,), whether both maps have something in them: if not, the distance says nothing.
    """
    student, student_alive = _unit_length(student_map)
    teacher, teacher_alive = _unit_length(teacher_map)
    return (teacher - student).abs().sum(1), student_alive & teacher_alive
