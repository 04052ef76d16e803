"""What probabilities and "unknown" are worth on photographs: five classes, then three more, of 60 images each.

    python3 -m lwm.experiments.calibration --data-dir photos84 --seeds 0,1,2

A seed begins three classes later in the order of the names. The two classes that no task has, and the digits, are what
is to be called unknown. results/calibration/calibration.csv gets a row for each seed and classifier: expected
calibration error (15 equal bins of the answer's probability) and log-loss, both also at temperature 1, the share of
test images of taught classes called unknown at 0.05, and the areas under the ROC curve.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score

from lwm import classifiers
from lwm.evaluation import predict
from lwm.experiments import tables
from lwm.experiments.cells import numbers, run_script
from lwm.images.batches import Images
from lwm.images.datasets import Place, open_source
from lwm.probabilities import familiarity, is_unknown, probabilities_of
from lwm.runtime.checkpoint import load, restore_model
from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.settings import OneLineParser

TAUGHT, TRAINED_ON, BINS, SHARE = (5, 3), 60, 15, 0.05
FLAGS = "--dataset folder --model resnet18 --image-size 96 --batch-size 16 --calibration 0.1"


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data-dir", required=True, help="folder with train and test, of ten classes at least")
    parser.add_argument("--seeds", type=numbers, default=[0], help="comma-separated (default: 0)")
    parser.add_argument("--work-dir", default="runs/calibration", help="where networks are trained")
    options = parser.parse_args(argv)
    path = tables.ROOT / "results" / "calibration" / "calibration.csv"
    for seed in options.seeds:
        rows = rows_of(Path(options.data_dir), Path(options.work_dir) / f"seed{seed}", seed)
        key = {"method": "lwm", "seed": seed, "task": 1}
        tables.write_rows(path, [{**key, **row} for row in rows])
        for row in rows:
            print(f"seed {seed}, {', '.join(f'{k} {v:.3f}' if isinstance(v, float) else v for k, v in row.items())}")
    command = ["-m", "lwm.experiments.calibration", "--data-dir", Path(options.data_dir).name]
    command += ["--seeds", ",".join(map(str, options.seeds))]
    tables.record_call(path.with_name("calibration_environment.json"), command, threads=1)


def rows_of(data: Path, folder: Path, seed: int) -> list[dict[str, str | float]]:
    """Train a teacher and its student in ``folder``, unless they are there, and judge every classifier."""
    names, others = classes_of(data, seed)
    links = link(data, folder / "images", names)
    flags = [*FLAGS.split(), "--data-dir", str(links), "--seed", str(seed)]
    old, new = names[: TAUGHT[0]], names[TAUGHT[0] :]
    teacher = run_script("train_teacher_model.py", folder / "0", [*flags, "--old-classes", ",".join(old)], 1)
    asked = [*flags, "--teacher", str(teacher), "--new-classes", ",".join(new)]
    student = run_script("incremental_learning_system.py", folder / "1", asked, 1, after=teacher)
    saved = load(student)
    size, digits = saved["image_size"], [str(digit) for digit in range(10)]
    taught = open_source(Place("folder", str(links)), size).test(names, names)
    strange = {"others": open_source(Place("folder", str(data)), size).test(others, others)}
    strange["digits"] = open_source(Place("digits", ""), size).test(digits, digits)
    return [judged(saved, name, taught, strange) for name in classifiers.NAMES]


def classes_of(data: Path, seed: int) -> tuple[list[str], list[str]]:
    """Those that are taught, in their order, and two others. Raises InputError if there are too few."""
    names = sorted(each.name for each in (data / "train").glob("*/"))
    count = sum(TAUGHT)
    if len(names) < count + 2:
        raise InputError(f"--data-dir {data}: {count + 2} classes are needed in train, and there are {len(names)}")
    names = names[3 * seed % len(names) :] + names[: 3 * seed % len(names)]
    return names[:count], names[count : count + 2]


def link(data: Path, folder: Path, names: list[str]) -> Path:
    """A folder of links to these classes' test images and to the first ``TRAINED_ON`` training images of each."""
    for split, most in (("train", TRAINED_ON), ("test", None)):
        for name in names:
            own = folder / split / name
            own.mkdir(parents=True, exist_ok=True)
            for image in sorted((data / split / name).iterdir())[:most]:
                if not (own / image.name).exists():
                    (own / image.name).symlink_to(image.resolve())
    return folder


def judged(saved: dict, name: str, taught: Images, strange: dict[str, Images]) -> dict[str, str | float]:
    """The row of a classifier."""

    def logits_of(images: Images, temperatures: dict[str, float]) -> np.ndarray:
        model, _ = classifiers.answer_with(restore_model(saved), saved | {"temperatures": temperatures}, name)
        return predict(model, images.pixels, saved["mean"], saved["std"], 50).numpy()

    logits, labels = logits_of(taught, saved["temperatures"]), taught.labels.numpy()
    row: dict[str, str | float] = {"classifier": name, "temperature": saved["temperatures"][name]}
    row["accuracy"] = 100 * float((logits.argmax(1) == labels).mean())
    for suffix, each in (("", logits), ("_at_1", logits_of(taught, {}))):
        probabilities = probabilities_of(each)
        row[f"calibration_error{suffix}"] = calibration_error(probabilities, labels)
        row[f"log_loss{suffix}"] = float(log_loss(labels, probabilities, labels=range(logits.shape[1])))
    row["unknown"] = 100 * float(is_unknown(logits, saved["unknown"][name], SHARE).mean())
    for where, images in strange.items():
        both = np.concatenate([familiarity(logits), familiarity(logits_of(images, saved["temperatures"]))])
        row[f"auroc_{where}"] = float(roc_auc_score(np.arange(len(both)) < len(labels), both))
    return row


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of the answers' probability and the share that is right, over equal bins, by their images."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((BINS * sure).astype(int), BINS - 1)
    each = [abs(sure[own].sum() - right[own].sum()) for number in range(BINS) if (own := bins == number).any()]
    return float(sum(each) / len(labels))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
