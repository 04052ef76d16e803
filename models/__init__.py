"""Build a network by name, and widen its head when classes arrive."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from models.resnet import CifarResNet, Output, ResNet18

__all__ = ["Output", "build", "fold_batch_norm", "freeze_backbone", "start_at_prior", "widen_head"]


def build(architecture: str, classes: int, image_size: int) -> nn.Module:
    """A freshly initialised network with ``classes`` outputs for images of ``image_size`` px.

    Raises ValueError for a name that is not ``resnet18``, ``resnet32`` or ``resnet110``.
    """
    if architecture == "resnet18":
        return ResNet18(classes, image_size)
    if architecture == "resnet32":
        return CifarResNet(5, classes)
    if architecture == "resnet110":
        return CifarResNet(18, classes)
    raise ValueError(f"no architecture {architecture!r}: resnet18, resnet32 and resnet110 are known")


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy for inference in which each batch-norm is part of the convolution before it, computed in its precision.

    The answers are the same but for rounding; one pass over every feature map is saved.
    """
    folded = copy.deepcopy(model).eval()
    for block in list(folded.modules()):
        for convolution, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
            pair = [getattr(block, name, None) for name in (convolution, norm)]
            if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                setattr(block, convolution, fuse_conv_bn_eval(*pair))
                setattr(block, norm, nn.Identity())
    return folded


def freeze_backbone(model: nn.Module) -> None:
    """From now on only the head is trained; the loop leaves batch-norms that are not trained in eval mode."""
    model.requires_grad_(False)
    model.fc.requires_grad_(True)


def widen_head(model: nn.Module, new_classes: int) -> None:
    """Give ``model.fc`` ``new_classes`` more rows, in place; the old rows are copied bit for bit.

    The new rows get PyTorch's initialisation of a linear layer, from the global random state.
    """
    old = model.fc
    wide = nn.Linear(old.in_features, old.out_features + new_classes)
    wide = wide.to(device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        wide.weight[: old.out_features] = old.weight
        wide.bias[: old.out_features] = old.bias
    model.fc = wide


def start_at_prior(model: nn.Module, first: int) -> None:
    """Set the biases of the outputs from ``first`` on so that each starts at probability 1 / outputs, in place.

    For sigmoid outputs alone (Lin et al., ICCV 2017, section 3.3). At the usual zero all outputs first have to learn
    to say no, in one common direction of the features that the network recovers from only slowly.
    """
    with torch.no_grad():
        model.fc.bias[first:] = -math.log(max(model.fc.out_features - 1, 1))
