"""A file of weights under other names, made one of timm's: its tensors have the same shapes in the same order.

    python3 -m lwm.experiments.rename_weights efficientnet-lite0.pth timm/tf_efficientnet_lite0

The order is taken at its word, so that this is never done unasked: judge the result on some images.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from lwm import models
from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.files import require_folder, write_atomically
from lwm.runtime.settings import OneLineParser
from lwm.runtime.weights import load_weights


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=os.path.expanduser, help="the weights, as torch writes them")
    parser.add_argument("network", help="timm/<name>, whose names they get")
    parser.add_argument("--output", type=os.path.expanduser, help="(default: FILE with -renamed before its ending)")
    options = parser.parse_args(argv)
    file = Path(options.file)
    output = Path(options.output or file.with_stem(f"{file.stem}-renamed"))
    if not models.is_timm(options.network):
        raise InputError(f"{options.network}: the name of one of timm's networks is needed, as timm/<name>")
    if file.suffix == ".safetensors":
        raise InputError(f"{file}: a safetensors file keeps no order")
    require_folder("--output", output.parent)
    if output.exists():
        raise InputError(f"{output} exists; take another name with --output")
    weights = load_weights(file)
    renamed = in_order(weights, models.timm_names(options.network, len(list(weights.values())[-1])))
    buffer = io.BytesIO()
    torch.save(renamed, buffer)
    write_atomically(output, buffer.getvalue())
    changed = sum(one != other for one, other in zip(weights, renamed, strict=True))
    counts = f"{len(renamed)} tensors in their order, {changed} of them renamed"
    print(f"{output}: {counts}; each has the shape that {options.network} wants")


def in_order(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``weights`` under the names of ``like``; counts of batches are left out if the file has none.

    Raises InputError if the shapes are not the same in their order.
    """
    if len(weights) < len(like):
        like = {name: tensor for name, tensor in like.items() if not name.endswith("num_batches_tracked")}
    if len(weights) != len(like):
        raise InputError(f"the file has {len(weights)} tensors, and the network {len(like)}")
    for (name, tensor), (wanted, other) in zip(weights.items(), like.items(), strict=True):
        if tensor.shape != other.shape:
            shapes = f"{list(tensor.shape)}, and {wanted!r} in its place is {list(other.shape)}"
            raise InputError(f"the order is not the network's: {name!r} is {shapes}")
    return dict(zip(like, weights.values(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
