"""Build a network by name, and widen its head when classes arrive."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping

import torch
from lwm.models.from_timm import PREFIX, timm_network
from lwm.models.from_timm import timm_config as timm_config
from lwm.models.from_timm import timm_names as timm_names
from lwm.models.from_timm import timm_weights as timm_weights
from lwm.models.from_torchvision import FromTorchvision, torchvision_network
from lwm.models.network import WIDEST as WIDEST
from lwm.models.network import Network as Network
from lwm.models.network import Output as Output
from lwm.models.own import OWN as OWN
from lwm.models.own import Build as Build
from lwm.models.own import builder as builder
from lwm.models.own import names_code as names_code
from lwm.models.own import own_network
from lwm.models.resnet import DEEPER, STEMS, CifarResNet, ImageNetResNet, recommended_stem
from lwm.models.resnet import FEWEST_CELLS as FEWEST_CELLS
from lwm.models.whole import Whole as Whole
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models import VisionTransformer

from lwm.runtime.errors import InputError


def build(architecture: str, classes: int, image_size: int, stem: str = "") -> Network:
    """A freshly initialised network with ``classes`` outputs for images of ``image_size`` px.

    ``resnet32`` and ``resnet110``, or any classification network of torchvision or, as ``timm/<name>``, of timm that
    can be served. Those of ``DEEPER`` begin with ``stem``, by default the recommended one for the size. Raises
    InputError for a name that is none of these, and for a stem that the network does not have.
    """
    if architecture in DEEPER:
        if (stem := stem or recommended_stem(image_size)) not in STEMS:
            raise InputError(f"there is no stem {stem!r}; {', '.join(STEMS)} are known")
        return ImageNetResNet(architecture, classes, stem)
    if stem:
        raise InputError(f"{architecture} has one stem only; the choice is for {', '.join(DEEPER)}")
    if architecture == "resnet32":
        return CifarResNet(5, classes)
    if architecture == "resnet110":
        return CifarResNet(18, classes)
    if architecture == OWN or names_code(architecture):
        raise InputError("the network is your own: name the code that builds it, as in --model path/to/file.py:build")
    if is_timm(architecture):
        theirs = timm_network(architecture, classes, image_size)
        head = theirs.get_classifier()
        return Whole(theirs, head, architecture, image_size, before="forward_features", after="forward_head")
    network = torchvision_network(architecture, classes, image_size)
    if not isinstance(network, VisionTransformer):
        return FromTorchvision(network, architecture, image_size)
    *_, (block, _) = network.encoder.layers.named_children()
    block = f"encoder.layers.{block}"
    return Whole(network, network.heads[-1], architecture, image_size, before="forward", block=block)


def build_own(own: Build, classes: int, image_size: int) -> Network:
    """The network that ``own`` builds (own.py). Raises InputError."""
    return Whole(*own_network(own, classes), image_size, before="features", after="pooled", compare=False)


def is_timm(architecture: str) -> bool:
    return architecture.startswith(PREFIX)


def stem_of(architecture: str, weights: Mapping[str, Tensor]) -> str:
    """The stem with which these ``weights`` were trained, as far as they tell; for ``build``."""
    if architecture not in DEEPER or "conv1.weight" not in weights:
        return ""
    return "cifar" if weights["conv1.weight"].shape[-1] == STEMS["cifar"].kernel else "imagenet"


@torch.no_grad()
def cells(model: Network, image_size: int) -> int:
    """How many cells the last map has in each direction; the model is left in eval mode."""
    output: Output = model.eval()(torch.zeros(1, 3, image_size, image_size))
    return output.features.shape[-1]


@functools.lru_cache(maxsize=16)  # every checkpoint that is read is compared with it
def empty_state(architecture: str, classes: int, image_size: int, stem: str = "") -> Mapping[str, Tensor]:
    """Names, shapes and kinds of the network's tensors, without their memory. Raises InputError."""
    try:
        with torch.device("meta"):
            return build(architecture, classes, image_size, stem).state_dict()
    except RuntimeError:  # not all operations are there without memory: it is given back
        return build(architecture, classes, image_size, stem).to("meta").state_dict()


def fold_batch_norm(model: Network) -> Network:
    """A copy for inference in which each batch-norm is part of the convolution before it, computed in its precision.

    The answers are the same but for rounding; one pass over every feature map is saved. In a network that stays whole
    names do not tell what follows what: it is copied as it is.
    """
    folded = copy.deepcopy(model).eval()
    for block in list(folded.modules()) if model.folds else ():
        for convolution, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            first, second = getattr(block, convolution, None), getattr(block, norm, None)
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(block, convolution, fuse_conv_bn_eval(first, second))
                setattr(block, norm, nn.Identity())
    return folded


def freeze(model: Network, stages: int) -> None:
    """From now on the first ``stages`` of ``model.stages()`` are not trained. Raises InputError if it has fewer."""
    own = model.stages()
    if stages > len(own):
        raise InputError(f"the network has {len(own)} stages before its head")
    for stage in own[:stages]:
        for module in stage:
            module.requires_grad_(False)


def load_torchvision(model: Network, weights: dict[str, Tensor]) -> int:
    """Load a state_dict that names its tensors as the network's origin does; returns the number of outputs that it has.

    A head with another number of outputs than the model's is left out, and the model's stays as it is. Raises
    InputError for weights that do not fit or are not finite.
    """
    name_here: Callable[[str], str] = getattr(model, "from_original", str)
    weights, own = {name_here(name): tensor for name, tensor in weights.items()}, model.state_dict()
    outputs = weights["fc.bias"].numel() if "fc.bias" in weights else model.fc.out_features
    if outputs != model.fc.out_features:
        for name in ("fc.weight", "fc.bias"):
            weights.pop(name, None)
            own.pop(name)
    # Old files do not count the batches.
    missing = {name for name in own.keys() - weights.keys() if not name.endswith("num_batches_tracked")}
    odd = sorted(missing | (weights.keys() - own.keys()))
    if odd:
        more = f" (and {len(odd) - 1} more like it)" if odd[1:] else ""
        where = "the network" if odd[0] in own else "the file"
        raise InputError(f"the weights are not of this architecture: only {where} has {odd[0]!r}{more}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, and {list(own[name].shape)} is needed"
            raise InputError(f"the weights are not of this architecture at this image size: {name!r} is {shapes}")
        if not tensor.isfinite().all():
            raise InputError(f"the weights {name!r} are not finite")
    model.load_state_dict(weights, strict=False)
    return outputs


def freeze_backbone(model: Network) -> None:
    """From now on only the head is trained; the loop leaves batch-norms that are not trained in eval mode."""
    model.requires_grad_(False)
    model.fc.requires_grad_(True)


def widen_head(model: Network, new_classes: int) -> None:
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


def replace_head(model: Network, weight: Tensor, bias: Tensor) -> None:
    """Give the model a head of these numbers, (N, C) and (N,), in place."""
    old = model.fc.weight
    model.fc = nn.Linear(weight.shape[1], len(weight), device=old.device, dtype=old.dtype)
    with torch.no_grad():
        model.fc.weight.copy_(weight)
        model.fc.bias.copy_(bias)


def set_last_rows(model: Network, weight: Tensor, bias: Tensor) -> None:
    """Give the last outputs these rows, (K, C) and (K,), in place."""
    with torch.no_grad():
        model.fc.weight[-len(weight) :] = weight
        model.fc.bias[-len(bias) :] = bias


def start_at_prior(model: Network, first: int) -> None:
    """Set the biases of the outputs from ``first`` on so that each starts at probability 1 / outputs, in place.

    For sigmoid outputs alone (Lin et al., ICCV 2017, section 3.3). At the usual zero all outputs first have to learn
    to say no, in one common direction of the features that the network recovers from only slowly.
    """
    with torch.no_grad():
        model.fc.bias[first:] = -math.log(max(model.fc.out_features - 1, 1))
