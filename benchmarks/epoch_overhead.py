"""What surrounds the steps of an epoch: the scripts' own loop against a bare loop of the same steps.

    python3 benchmarks/epoch_overhead.py --model resnet32 --json epoch_overhead.json

The scripts' epoch (training.Training: order, crops and flips, normalisation, terms, log, progress; without its saves
and accuracies) and the same steps on batches that are ready, on the device and already normalised, take turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from step_cost import NEW, OLD, SCHEDULE, SETTINGS, Batches, arguments, batch, report, seconds_of, student_and_teacher

from lwm import losses, models
from lwm.images.batches import Images
from lwm.runtime import hardware
from lwm.runtime.run_folder import RunFolder
from lwm.training import Training, train_one_epoch

# Of a run, beside those of a loss.
OF_A_RUN = {"batch_norm": "train", "momentum": 0.9, "weight_decay": 5e-4, "flip": True, "seed": 0, "save_interval": 10}
OF_A_RUN |= {"save_interval_steps": 0, "balanced": False, "backbone_lr": None, "warm_up": 0.0}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch (default: 20)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each (default: 5)")
    options = parser.parse_args()
    hardware.keep_freed_memory()
    own = {"batch_size": options.batch_size, "precision": options.precision}
    settings = types.SimpleNamespace(**SETTINGS, **OF_A_RUN, **own)
    pairs = [(scripts_epoch(options, settings), bare_epoch(options, settings)) for _ in range(options.repeats + 1)][1:]
    report(
        options,
        ratio=round(statistics.median(scripts / bare for scripts, bare in pairs), 3),
        seconds=[[round(seconds, 3) for seconds in pair] for pair in pairs],
    )


def scripts_epoch(options, settings) -> float:
    """Seconds of an epoch of the scripts' loop, by its own log."""
    student, teacher = student_and_teacher(options)
    count, size = options.steps * options.batch_size, options.image_size
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    train = Images(pixels, torch.arange(count) % NEW + OLD)
    checkpoint = {"mean": [0.5] * 3, "std": [0.25] * 3}
    checkpoint["tasks"] = [{"epochs": 1, "learning_rate": 0.01, "group_accuracy": []}]
    teacher = models.fold_batch_norm(teacher)
    with tempfile.TemporaryDirectory() as folder:
        run_folder = RunFolder("student", Path(folder), Path(folder) / "student_model.pth", None)
        with Training(run_folder, checkpoint, student, train, losses.lwm, settings, teacher, OLD) as training:
            (row,) = training.epochs()
    return count / row["images_per_second"]


def bare_epoch(options, settings) -> float:
    """Seconds of as many steps on batches that are ready."""
    student, teacher = student_and_teacher(options)
    teacher = models.fold_batch_norm(teacher)
    batches = Batches((*batch(options), 1.0) for _ in range(options.steps))
    optimizer, named = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=5e-4), torch.arange(NEW) + OLD
    return seconds_of(
        lambda: train_one_epoch(student, teacher, batches, losses.lwm, OLD, settings, optimizer, SCHEDULE, named)
    )


if __name__ == "__main__":
    main()
