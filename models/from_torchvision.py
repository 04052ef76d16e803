"""torchvision's classification networks, cut in three where Grad-CAM looks: backbone, neck and head.

The cut is found in the network's graph (torch.fx): the last linear layer is the head, the global average pooling
before it belongs to the neck, and what goes into the pooling is the feature map.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import warnings

import torch
import torchvision
from lwm.models.network import Network, Output, stages_of
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth, stochastic_depth

from lwm.runtime.errors import InputError

# Between pooling and head these leave d y_c / d A_k as it is; dropout does so in eval mode.
PASSING = (nn.Flatten, nn.Dropout, nn.Identity)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # Traced through, it would keep for good the mode that it is in now.
        return isinstance(module, StochasticDepth) or super().is_leaf_module(module, name)


def torchvision_network(architecture: str, classes: int, image_size: int) -> nn.Module:
    """torchvision's own network of that name, freshly initialised; ``image_size`` matters to a ViT alone.

    Raises InputError for one that torchvision does not have, or that has several outputs.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        near = difflib.get_close_matches(architecture, ["resnet32", "resnet110", *known], n=1)
        hint = f"did you mean {near[0]}?" if near else "resnet32, resnet110 and those of torchvision are known"
        raise InputError(f"no architecture {architecture!r}; {hint}")
    size = {"image_size": image_size} if architecture.startswith("vit_") else {}
    with warnings.catch_warnings(action="ignore"):  # of changes to come in how some networks are initialised
        try:
            network: nn.Module = torchvision.models.get_model(architecture, weights=None, num_classes=classes, **size)
        except AssertionError as error:
            raise InputError(f"{architecture} does not take images of {image_size} px ({error})") from error
    if hasattr(network, "aux_logits"):  # GoogLeNet and Inception
        raise InputError(f"{architecture} has outputs beside its last layer's")
    return network


class FromTorchvision(Network):
    """``backbone`` makes features (B, C, h, w) of images (B, 3, H, W), ``neck`` a row each of them, ``fc`` the logits.

    ``closed_form`` says that nothing but dropout stands between pooling and head (attention.closed_form_map).
    Raises InputError for a network that has no such three parts.
    """

    last_layer = "backbone"

    def __init__(self, network: nn.Module, architecture: str, image_size: int):
        super().__init__()
        try:
            graph = _Tracer().trace(network)
        except Exception as error:  # fx has no kind of its own for what it cannot trace
            raise InputError(f"{architecture}: its graph cannot be read ({str(error).splitlines()[0]})") from error
        modules = dict(network.named_modules())
        head, pooling, between = _head_and_pooling(graph, modules)
        if head is None:
            raise InputError(f"{architecture} does not end in one linear layer")
        if modules[str(head.target)].bias is None:
            raise InputError(f"the last layer of {architecture} has no bias")
        if pooling is None:
            raise InputError(f"{architecture} has no global average pooling of a feature map before its last layer")
        if any(node.target in (F.dropout, stochastic_depth) for node in graph.nodes):
            raise InputError(f"{architecture} drops out by a function, which cannot be turned off again")
        features = pooling.all_input_nodes[0]
        self.backbone = _part(network, graph, None, features)
        self.neck = _part(network, graph, features, head.all_input_nodes[0])
        self.fc = modules[head.target]
        self.closed_form = all(
            isinstance(_module(node, modules), PASSING) or node.target in (torch.flatten, "flatten") for node in between
        )
        self.head_name = head.target
        if self.fc.weight.is_meta:
            return
        try:
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # fx prints what went wrong
                self.eval()(torch.zeros(1, 3, image_size, image_size))
        except RuntimeError as error:
            raise InputError(f"{architecture} does not take images of {image_size} px") from error
        self.train()

    def forward(self, images: Tensor) -> Output:
        return self.classified(self.backbone(images))

    def pooled(self, features: Tensor) -> Tensor:
        return self.neck(features)

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        return stages_of(self.backbone)

    def from_original(self, name: str) -> str:
        """The name here of what torchvision's network calls ``name``; its files of densenets have an older form."""
        name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name)
        if name.rpartition(".")[0] == self.head_name:
            return f"fc.{name.rpartition('.')[2]}"
        return f"neck.{name}" if name in self.neck.state_dict() else f"backbone.{name}"


def _head_and_pooling(
    graph: fx.Graph, modules: dict[str, nn.Module]
) -> tuple[fx.Node | None, fx.Node | None, list[fx.Node]]:
    """The nodes of the last linear layer and of the pooling before it, and those between the two."""
    (out,) = (node for node in graph.nodes if node.op == "output")
    head = out.args[0]
    if not isinstance(head, fx.Node) or not isinstance(_module(head, modules), nn.Linear):
        return None, None, []
    between: list[fx.Node] = []
    node = head.all_input_nodes[0]
    while not _pools(node, modules):
        between.append(node)
        # A parameter of the node's own, as of a layer-norm, is no second way in.
        before = [one for one in node.all_input_nodes if one.op != "get_attr"]
        if len(before) != 1:
            return head, None, []
        node = before[0]
    return head, node, between


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _pools(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Is it the mean over all pixels?"""
    module = _module(node, modules)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1] in (1, (1, 1))
    return node.op == "call_method" and node.target == "mean" and node.args[1:] in (([2, 3],), ((2, 3),))


def _part(network: nn.Module, graph: fx.Graph, start: fx.Node | None, end: fx.Node) -> fx.GraphModule:
    """The nodes after ``start`` (None: from the input) up to ``end``, as a module of one input."""
    part = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {} if start is None else {start: part.placeholder("features")}
    reached = start is None
    for node in graph.nodes:
        if reached:
            if any(source not in copied for source in node.all_input_nodes):
                raise InputError(f"what follows its feature map needs more than that: {node.name}")
            copied[node] = part.node_copy(node, lambda source: copied[source])
        reached = reached or node is start
        if node is end:
            break
    part.output(copied[end])
    return fx.GraphModule(network, part)
