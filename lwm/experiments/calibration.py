"""What probabilities and "unknown" are worth on photographs: five classes, then three more, of 60 images each.

    python3 -m lwm.experiments.own_images --data-dir photos84
    python3 -m lwm.experiments.calibration --data-dir photos84 --runs runs/own-images/...

The networks that own_images.py has left in ``--runs`` are read and calibrated, none is trained. The two classes that a
split leaves out, and the digits, are what is to be called unknown. results/calibration/ gets a row for each split and
classifier, and a table: expected calibration error (15 equal bins of the answer's probability) and log-loss, both also
at temperature 1, the share of test images of taught classes called unknown at 0.05, and the areas under the ROC curve.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from lwm import classifiers
from lwm.calibration import calibrate
from lwm.classifiers import from_checkpoint
from lwm.experiments import tables
from lwm.experiments.own_images import SPLITS, classes_of, linked, parser_of_runs
from lwm.images.datasets import Place, open_source
from lwm.probabilities import familiarity, is_unknown, probabilities_of
from lwm.runtime import hardware
from lwm.runtime.checkpoint import batch_size_of, load, restore_model
from lwm.runtime.errors import one_line_errors

BINS, SHARE = 15, 0.05


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = parser_of_runs(__doc__)
    options = parser.parse_args(argv)
    path = tables.ROOT / "results" / "calibration" / "accuracy.csv"
    for number, shift in enumerate(SPLITS):
        saved, teacher = (load(options.runs / str(number) / f"{role}_model.pth") for role in ("student", "teacher"))
        names, others = classes_of(options.data_dir, shift)
        photos = linked(options.data_dir, names, options.runs.parent / f"split{number}")
        size, digits = saved["image_size"], [str(digit) for digit in range(10)]
        place = Place("folder", str(photos), calibration=saved["tasks"][-1]["calibration"])
        taught, known = open_source(place, size).test(names, names), teacher["class_names"]
        for each, before, first in ((teacher, None, 0), (saved, teacher, len(known))):
            own = each["class_names"]
            held, statistics = open_source(place, size).held_back(own[first:], own), from_checkpoint(each)
            calibrate(restore_model(each), each, statistics, held, batch_size_of(each), before)
        strange = {"others": open_source(Place("folder", str(options.data_dir)), size).test(others, others)}
        strange["digits"] = open_source(Place("digits", ""), size).test(digits, digits)
        model, channels = restore_model(saved), (saved["mean"], saved["std"])
        features = {
            where: classifiers.features_of(model, images.pixels, *channels, batch_size_of(saved))
            for where, images in {"taught": taught, **strange}.items()
        }
        others_features = {where: features[where] for where in strange}
        for name in classifiers.NAMES:
            key = {"protocol": "own-images", "method": name, "seed": number, "task": 1}
            row = judged(saved, name, features["taught"], taught.labels.numpy(), others_features)
            tables.write_rows(path, [{**key, **row, **hardware.machine()}])
    tables.publish({path.with_name("table.md"): table_of(tables.read_rows(path))})


def table_of(rows: pd.DataFrame) -> str:
    """Means over the splits."""
    lines = []
    for name, own in rows.groupby("method", sort=False):
        columns = [each for each in own if each.startswith(("calibration", "log_loss", "unknown", "auroc"))]
        lines.append({"classifier": name, "splits": len(own), **own[columns].mean().map("{:.3g}".format)})
    return tables.markdown(lines)


def judged(saved: dict, name: str, taught: Tensor, labels: np.ndarray, strange: dict[str, Tensor]) -> dict[str, float]:
    """The row of a classifier, by features (n, C) of images of taught classes, and of strange ones by their kind."""
    weight, bias = classifiers.linear_layer(name, from_checkpoint(saved), restore_model(saved))
    temperature = saved["temperatures"][name]
    plain = (taught @ weight.T + bias).detach().numpy()
    logits = plain / temperature
    row: dict[str, float] = {"temperature": temperature}
    row["accuracy"] = 100 * float((logits.argmax(1) == labels).mean())
    for suffix, each in (("", logits), ("_at_1", plain)):
        probabilities = probabilities_of(each)
        row[f"calibration_error{suffix}"] = calibration_error(probabilities, labels)
        row[f"log_loss{suffix}"] = float(log_loss(labels, probabilities, labels=range(logits.shape[1])))
    row["unknown"] = 100 * float(is_unknown(logits, saved["unknown"][name], SHARE).mean())
    for where, features in strange.items():
        others = (features @ weight.T + bias).detach().numpy() / temperature
        both = np.concatenate([familiarity(logits), familiarity(others)])
        row[f"auroc_{where}"] = float(roc_auc_score(np.arange(len(both)) < len(labels), both))
    return row


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of the answers' probability and the share that is right, over equal bins, by their images."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((BINS * sure).astype(int), BINS - 1)
    each = [abs(sure[own].sum() - right[own].sum()) for number in range(BINS) if (own := bins == number).any()]
    return float(sum(each) / len(labels))


if __name__ == "__main__":
    sys.exit(main())
