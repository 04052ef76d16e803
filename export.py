"""Write a checkpoint as an ONNX file that answers without this project and without torch.

    python3 export.py --checkpoint runs/first/student_model.pth --output student.onnx

Input "image", float32 (B, 3, H, W) in 0..1, or uint8 with ``--input uint8``: the normalisation is inside. Output
"logits" (B, classes), and with ``--maps`` "map" (B, h, w), the Grad-CAM map of the answer. The batch is free, and
height and width too in networks that models/ cuts. The metadata say what else is needed: class names, image size, and
for predict.py --unknown the scores of images that were held back. The softmax of the logits are probabilities.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

from lwm import exporting, models
from lwm.classifiers import NAMES, answer_with
from lwm.runtime.checkpoint import load, restore_model
from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.files import make_folder, require_folder, write_atomically
from lwm.runtime.settings import OneLineParser, lines_of, read_constant


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    path = os.path.expanduser
    parser.add_argument("--checkpoint", required=True, type=path, help="any checkpoint of this project")
    parser.add_argument("--model", help="of your own network, the code that builds it: path/to/file.py:build")
    parser.add_argument("--output", required=True, type=path, help="the ONNX file to write")
    parser.add_argument("--input", default="float32", choices=("float32", "uint8"), help="(default: float32)")
    parser.add_argument("--classifier", help=f"auto, {', '.join(NAMES)} (default: as in config.py)")
    parser.add_argument(
        "--class-order", type=path, help="a file with the classes in the order of the outputs, a line each"
    )
    parser.add_argument("--maps", action="store_true", help="the Grad-CAM map of the answer as a second output")
    parser.add_argument(
        "--opset",
        type=int,
        help=f"{exporting.OPSETS[0]} to {exporting.OPSETS[-1]} (default: the one that torch chooses)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an ONNX file that is there")
    options = parser.parse_args(argv)
    if options.opset is not None and options.opset not in exporting.OPSETS:
        raise InputError(f"--opset is {options.opset}: {exporting.OPSETS[0]} to {exporting.OPSETS[-1]} is needed")
    output = Path(options.output)
    if output.suffix.lower() != ".onnx":
        raise InputError(f"--output {output}: an ONNX file is written; let the name end in .onnx")
    require_folder("--output", output.parent)
    if output.exists() and (not options.overwrite or output.resolve() == Path(options.checkpoint).resolve()):
        raise InputError(f"--output {output} exists; take another name, or replace an earlier export with --overwrite")

    checkpoint = load(options.checkpoint)
    classifier = options.classifier or read_constant("classifier")
    own = models.builder(options.model)
    network, checkpoint = answer_with(restore_model(checkpoint, own), checkpoint, classifier)
    if options.class_order:
        ordered = lines_of("--class-order", options.class_order)
        network, checkpoint = in_order(network, checkpoint, ordered)
    content, difference = exporting.exported(network, checkpoint, options.input, options.maps, options.opset)

    make_folder(output.parent)
    write_atomically(output, content)
    print(f"largest difference between torch and onnxruntime: {difference:.1e}")
    classes = f"{len(checkpoint['class_names'])} classes, classifier {checkpoint['classifier']}"
    print(f"{output}: {classes}, {len(content) / 1e6:.1f} MB, {exporting.needs(content)}")


def in_order(
    network: models.Network, checkpoint: dict[str, Any], names: list[str]
) -> tuple[models.Network, dict[str, Any]]:
    """Both with the outputs in the order of ``names``. Raises InputError unless these are the classes."""
    known = checkpoint["class_names"]
    if sorted(names) != sorted(known):
        odd = sorted({*names} ^ {*known}) or [name for name in known if names.count(name) > 1]
        raise InputError(f"--class-order is to name each class of the checkpoint once, and {odd[0]!r} is wrong there")
    positions = [known.index(name) for name in names]
    network = copy.deepcopy(network)
    models.replace_head(network, network.fc.weight[positions], network.fc.bias[positions])
    return network, checkpoint | {"class_names": names}


if __name__ == "__main__":
    sys.exit(main())
