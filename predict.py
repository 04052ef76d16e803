"""Answers for images of your own, from a checkpoint or from an ONNX file, for which torch is not needed.

    python3 predict.py --checkpoint student.onnx cat.jpg holiday/
    python3 predict.py --checkpoint runs/first/student_model.pth cat.jpg --json

Images are read as they are for training: upright, RGB, the shorter side scaled, the centre cut out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lwm.images.files import decode_all, printable
from lwm.images.folders import images_below
from lwm.probabilities import is_unknown, likeliest, share_of
from lwm.runtime.errors import InputError, log, one_line_errors
from lwm.runtime.settings import OneLineParser, read_constant

BATCH = 64  # images in memory at a time


class Predictor(NamedTuple):
    """``logits`` makes float32 (n, classes) of uint8 (n, 3, size, size); their softmax are probabilities.

    ``unknown`` are the quantiles of the familiarity of images of taught classes, or empty.
    """

    class_names: list[str]
    image_size: int
    unknown: list[float]
    logits: Callable[[np.ndarray], np.ndarray]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("images", nargs="+", type=os.path.expanduser, metavar="image-or-folder")
    checkpoint = "a checkpoint (.pth), or an ONNX file of export.py"
    parser.add_argument("--checkpoint", required=True, type=os.path.expanduser, help=checkpoint)
    parser.add_argument("--model", help="of your own network, the code that builds it: path/to/file.py:build")
    parser.add_argument("--top", default=3, type=int, help="so many of the likeliest classes (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    parser.add_argument("--csv", action="store_true", help="CSV on stdout, a row an image and class")
    parser.add_argument(
        "--classifier", help="of a checkpoint: auto, head, ncm, lda, aligned (default: as in config.py)"
    )
    about = 'answer "unknown" if the image is less like any class than this share of images of taught classes: 0.05'
    parser.add_argument("--unknown", metavar="SHARE", help=about)
    parser.add_argument("--skip-bad-images", action="store_true", help="count images that cannot be read")
    options = parser.parse_args(argv)
    if options.top < 1 or (options.json and options.csv):
        raise InputError("--top is a number of at least 1, and --json and --csv exclude each other")
    share = None if options.unknown is None else share_of(options.unknown)
    paths = files_of(options.images)
    if Path(options.checkpoint).suffix.lower() == ".onnx":
        if options.classifier:
            raise InputError("--classifier: the ONNX file answers as it was exported; give the flag to export.py")
        network = open_onnx(options.checkpoint)
    else:
        classifier = options.classifier or read_constant("classifier")
        network = open_checkpoint(options.checkpoint, classifier, options.model)
    rows: list[dict[str, Any]] = []
    for path, logits in answers(network, paths, options.skip_bad_images):
        best = likeliest(logits, network.class_names, options.top)
        row: dict[str, Any] = {
            "image": str(path),
            "classes": [{"name": n, "probability": round(p, 6)} for n, p in best],
        }
        if share is not None:
            row["unknown"] = bool(is_unknown(logits[None], network.unknown, share)[0])
        rows.append(row)
    if not rows:
        raise InputError(f"none of the {len(paths)} images can be read")
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        asked = [] if share is None else ["unknown"]
        writer.writerow(["image", "rank", "class", "probability", *asked])
        for row in rows:
            for rank, each in enumerate(row["classes"], 1):
                said = [int(row[name]) for name in asked]
                writer.writerow([row["image"], rank, each["name"], each["probability"], *said])
    else:
        width = max(len(printable(row["image"])) for row in rows)
        for row in rows:
            shown = ", ".join(f"{each['name']} {100 * each['probability']:.0f} %" for each in row["classes"])
            shown = f"unknown ({shown})" if row.get("unknown") else shown
            print(f"{printable(row['image']):<{width}}  {printable(shown)}")


def files_of(given: Sequence[str]) -> list[Path]:
    """Each file, and of each folder its images at any depth. Raises InputError for a folder without."""
    files: list[Path] = []
    for path in map(Path, given):
        if not path.is_dir():
            files.append(path)
            continue
        own = images_below(path)
        if not own:
            raise InputError(f"{path}: there is no image in this folder nor in its subfolders")
        files += own
    return files


def open_onnx(path: str) -> Predictor:
    """Raises InputError for a file that export.py did not write."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("an ONNX file needs onnxruntime: pip install onnxruntime") from error
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        properties = session.get_modelmeta().custom_metadata_map
    except Exception as error:  # onnxruntime has kinds of its own for each way in which a file can be wrong
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise InputError(f"--checkpoint {path}: cannot be read as ONNX ({printable(reason)})") from error
    try:
        names = json.loads(properties["class_names"])
        size, unknown = int(properties["image_size"]), json.loads(properties["unknown"])
        good = all(isinstance(name, str) for name in names) and all(isinstance(each, float) for each in unknown)
        (image,), outputs = session.get_inputs(), [each.name for each in session.get_outputs()]
        if not (good and 8 <= size <= 1024 and image.name == "image" and "logits" in outputs):
            raise ValueError
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"--checkpoint {path}: is an ONNX file, but none of export.py's") from error

    def logits(pixels: np.ndarray) -> np.ndarray:
        fed = pixels if image.type == "tensor(uint8)" else pixels.astype(np.float32) / 255
        return session.run(["logits"], {"image": fed})[0]

    return Predictor(names, size, unknown, logits)


def open_checkpoint(path: str, classifier: str, model: str | None = None) -> Predictor:
    """Of a user's own network ``model`` names the code. Raises InputError for a file that is no checkpoint of ours."""
    from lwm import Classifier, models

    loaded = Classifier.load(path, classifier, models.builder(model))
    return Predictor(loaded.class_names, loaded.checkpoint["image_size"], loaded.unknown, loaded.logits)


def answers(network: Predictor, paths: Sequence[Path], skip_bad_images: bool) -> Iterator[tuple[Path, np.ndarray]]:
    """Each file that can be read, and its logits (classes,). Raises InputError for the first that cannot."""
    bad = 0
    for first in range(0, len(paths), BATCH):
        part = paths[first : first + BATCH]
        pixels, wrong = decode_all(part, network.image_size, skip_bad_images)
        bad += len(wrong)
        good = [path for index, path in enumerate(part) if index not in wrong]
        if good:
            yield from zip(good, network.logits(pixels), strict=True)
    if bad:
        log.warning(f"{bad} of {len(paths)} images cannot be read and are skipped")


if __name__ == "__main__":
    sys.exit(main())
