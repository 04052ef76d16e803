"""What every network here has beside its forward pass.

A forward pass takes images (B, 3, H, W), already normalised, and returns ``Output``. Nothing is kept on the network:
the feature map travels with the logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDEST = 128  # channels of ``pooled``; of more all classes have one scatter: 512 x 512 numbers are 1 MB
# Modules of these names stand for their parts where a network is frozen in part.
CONTAINERS = ("blocks", "stages", "layers", "features", "encoder", "trunk_output")


class Output(NamedTuple):
    """What a network makes of B images: ``logits`` (B, classes) and ``features`` (B, C, h, w), the last feature map.

    ``head`` (classes, C) is the weight of the last linear layer if Grad-CAM follows from it in closed form, else None.
    ``pooled`` (B, D) is what that layer sees.
    """

    logits: Tensor
    features: Tensor
    head: Tensor | None
    pooled: Tensor


class Network(nn.Module):
    """What every network here has beside its forward pass, of images (B, 3, H, W) already normalised to ``Output``."""

    avgpool: nn.Module
    fc: nn.Linear
    last_layer: str  # the name of the layer that makes the features
    stem = ""  # of STEMS, where the architecture has a choice
    folds = True  # whether bn1 is what follows conv1, and so on (fold_batch_norm)
    closed_form: bool  # whether nothing but pooling stands between the features and ``fc``

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """The parts before the head, in order."""
        raise NotImplementedError

    def pooled(self, features: Tensor) -> Tensor:
        """What ``fc`` sees of the features (B, C, h, w): a row (B, C) each."""
        return self.avgpool(features).flatten(1)

    @contextlib.contextmanager
    def from_the_map_on(self, device: torch.device) -> Iterator[None]:
        """What follows the features works in the precision of the head's weights, also under autocast.

        Without a closed form maps are differentiated: there is a graph then, for a frozen network too, and attention is
        computed in the plain way, since the faster ones have no second derivative.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, enabled=False))
            if not self.closed_form and not _for_answers_alone():
                stack.enter_context(torch.enable_grad())
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def in_graph(self, features: Tensor) -> Tensor:
        """The same, of which maps can be differentiated if they have to be."""
        if self.closed_form or features.requires_grad or _for_answers_alone():
            return features
        return features.requires_grad_()

    def classified(self, features: Tensor) -> Output:
        with self.from_the_map_on(features.device):
            features = self.in_graph(features.to(self.fc.weight.dtype))
            pooled = self.pooled(features)
            return Output(self.fc(pooled), features, self.fc.weight if self.closed_form else None, pooled)


def _for_answers_alone() -> bool:
    return torch.is_inference_mode_enabled() or torch.compiler.is_exporting()


def stages_of(network: nn.Module) -> list[list[nn.Module | nn.Parameter]]:
    """The parts of the network that have parameters, in order; a container stands for its own parts."""
    stages: list[list[nn.Module | nn.Parameter]] = []
    loose: list[nn.Module | nn.Parameter] = []  # such as a class token: they go with what follows
    for part in _parts(network):
        loose.append(part)
        if isinstance(part, nn.Module):
            stages.append(loose)
            loose = []
    return stages


def _parts(module: nn.Module) -> Iterator[nn.Module | nn.Parameter]:
    yield from module.parameters(recurse=False)
    for name, part in module.named_children():
        if name in CONTAINERS:
            yield from _parts(part)
        elif any(True for _ in part.parameters()):
            yield part
