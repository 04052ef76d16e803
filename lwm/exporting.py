"""A network as an ONNX file, which answers without this project and without torch; its outputs are compared first."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from lwm import __version__
from lwm.attention import closed_form_map
from lwm.models import Network, Whole
from lwm.runtime.errors import InputError, RunError

FORMAT = "learning-without-memorizing network"
LARGEST_DIFFERENCE = 1e-3  # between torch and onnxruntime, relative to the largest value or 1
AXES = {0: "batch", 2: "height", 3: "width"}
OPSETS = range(18, 24)  # below it torch would convert, above it knows none
# The first onnxruntime that reads a file of this format (ONNX's IR version) and opset.
RUNTIMES = ((8, 18, "1.14"), (9, 19, "1.15"), (9, 20, "1.17"), (10, 21, "1.18"), (10, 22, "1.21"), (11, 23, "1.23"))


def exported(
    network: Network, checkpoint: dict[str, Any], kind: str, maps: bool = False, opset: int | None = None
) -> tuple[bytes, float]:
    """The file of a network that answers, and by how much its outputs differ from torch's.

    ``network`` and ``checkpoint`` are those of classifiers.answer_with, and ``kind`` is the input's, float32 or uint8.
    Raises InputError for maps that have no closed form, and RunError if the outputs differ.
    """
    if maps and not network.closed_form:
        architecture = checkpoint["architecture"]
        raise InputError(f"--maps: {architecture} has no maps in closed form, and no others can be exported")
    metadata = {  # what a reader of the file needs, as texts: predict.py reads them
        "format": FORMAT,
        "version": __version__,
        "architecture": checkpoint["architecture"],
        "class_names": json.dumps(checkpoint["class_names"], ensure_ascii=False),
        "image_size": str(checkpoint["image_size"]),
        "classifier": checkpoint["classifier"],
        "unknown": json.dumps(checkpoint["unknown"].get(checkpoint["classifier"], [])),
    }
    whole = WithNormalisation(network, checkpoint["mean"], checkpoint["std"], maps).eval()
    content = onnx_file(whole, checkpoint["image_size"], kind, metadata, opset)
    difference = largest_difference(whole, content, checkpoint["image_size"], kind)
    if not difference <= LARGEST_DIFFERENCE:
        raise RunError(f"the outputs of onnxruntime and torch differ by {difference:.2g}: nothing was written")
    return content, difference


class WithNormalisation(nn.Module):
    """A network on images (B, 3, H, W) in 0..1, or uint8; it returns logits, and with ``maps`` the answer's map too."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, mean: list[float], std: list[float], maps: bool) -> None:
        super().__init__()
        self.network, self.maps = network, maps
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if image.dtype == torch.uint8:
            image = image.float() / 255
        output = self.network((image - self.mean) / self.std)
        if not self.maps:
            return output.logits
        return output.logits, closed_form_map(output.features, output.head, output.logits.argmax(1))


def onnx_file(
    whole: WithNormalisation, image_size: int, kind: str, metadata: dict[str, str], opset: int | None = None
) -> bytes:
    """Height and width are free, unless the network stays whole or its graph ties them. Raises RunError."""
    # Tokens have a place each, and torch takes minutes where the padding follows the size, as in timm's EfficientNets.
    free = dict.fromkeys([0] if isinstance(getattr(whole, "network", None), Whole) else AXES, torch.export.Dim.AUTO)
    # The exporter speaks of its own workings, on stdout, by warnings and by its log.
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                whole,
                (example(2, image_size, image_size, kind),),
                dynamo=True,
                dynamic_shapes=(free,),
                input_names=["image"],
                output_names=["logits", "map"] if whole.maps else ["logits"],
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise RunError(f"torch cannot export this network ({str(error).splitlines()[0]})") from error
    finally:
        logging.disable(logging.NOTSET)
    assert program is not None  # dynamo=True returns one
    proto = program.model_proto
    name_axes(proto.graph)
    onnx.helper.set_model_props(proto, metadata)
    return proto.SerializeToString()


def name_axes(graph: onnx.GraphProto) -> None:
    """The free axes of the input get the names of AXES, wherever torch's own ("s40") stand, in sums too."""
    sides = graph.input[0].type.tensor_type.shape.dim
    names: dict[str, str] = {}
    for axis, name in AXES.items():
        names.setdefault(sides[axis].dim_param, name)  # a square alone: height and width have one name in the graph
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), side.dim_param)
    for axis, name in AXES.items():
        if sides[axis].dim_param:
            sides[axis].dim_param = name


def needs(content: bytes) -> str:
    """The opset, and the first onnxruntime that reads it."""
    proto = onnx.load_from_string(content)
    (opset,) = (each.version for each in proto.opset_import if each.domain in ("", "ai.onnx"))
    fits = (runtime for format, last, runtime in RUNTIMES if proto.ir_version <= format and opset <= last)
    return f"opset {opset}, for onnxruntime {next(fits, RUNTIMES[-1][2])} or later"


def example(count: int, height: int, width: int, kind: str) -> Tensor:
    """Random images of the input's ``kind``, always the same."""
    images = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(height))
    return images.to(torch.uint8) if kind == "uint8" else images.float() / 255


def largest_difference(whole: nn.Module, content: bytes, image_size: int, kind: str) -> float:
    """Between torch's outputs and onnxruntime's, relative to the largest value or 1; for several batches and sizes."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    sizes = [(1, image_size, image_size), (5, image_size, image_size)]
    if not any(isinstance(side, int) for side in session.get_inputs()[0].shape[2:]):
        sizes += [(2, image_size + 13, image_size + 6)]
    differences = []
    for size in sizes:
        images = example(*size, kind)
        with torch.no_grad():
            expected = whole(images)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, theirs in zip(expected, session.run(None, {"image": images.numpy()}), strict=True):
            differences.append((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max().clamp(min=1))
    return torch.stack(differences).max().item()  # NaN if one of them is
