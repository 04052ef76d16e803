"""How the cost of a step grows: with the number of classes, with the image size, and over ten tasks in a row.

    python3 benchmarks/growth.py photos32

Writes results/performance/growth-{classes,size,tasks}.csv and the figure docs/growth.png; ``--figure`` only draws it
again. Classes and sizes are measured as in step_cost.py, ten tasks with the scripts, an epoch each.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from step_cost import NEW, arguments, interleaved, step_of

from lwm.experiments.figures import growth
from lwm.experiments.tables import ROOT, read_rows
from lwm.runtime import hardware
from lwm.runtime.checkpoint import load

OUTPUTS = (20, 50, 100, 200, 500, 1000)
SIZES = (32, 48, 64, 96, 128, 224)
TASKS, A_TASK = 10, 9  # tasks after the first, and classes in each: 99 of the folder's
RESULTS = ROOT / "results" / "performance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train/<class>/ and test/<class>/, of 99 classes at least")
    parser.add_argument("--figure", action="store_true", help="only draw the figure again from the CSVs")
    options = parser.parse_args()
    parts = {"classes": by_classes, "size": by_size, "tasks": by_tasks}
    for name, rows in {} if options.figure else parts.items():
        write(RESULTS / f"growth-{name}.csv", list(rows(options.folder)))
    growth({name: read_rows(RESULTS / f"growth-{name}.csv") for name in parts}, ROOT / "docs" / "growth.png")


def by_classes(folder: Path) -> Iterator[dict]:
    """Steps of 128 images at 32 px, ten of the outputs being new."""
    options = arguments("").parse_args([])
    yield from compared("outputs", {outputs: (options, outputs - NEW) for outputs in OUTPUTS})


def by_size(folder: Path) -> Iterator[dict]:
    """Steps of 32 images."""
    options = arguments("").parse_args(["--batch-size", "32"])
    cases = {}
    for size in SIZES:
        cases[size] = copy.copy(options), 10
        cases[size][0].image_size = size
    yield from compared("px", cases)


def compared(column: str, cases: dict[int, tuple[argparse.Namespace, int]]) -> Iterator[dict]:
    """Milliseconds of a step of fine-tuning and of lwm, and their ratio, for each case's options and old classes."""
    hardware.keep_freed_memory()
    for value, (options, old) in cases.items():
        options.compile = False
        steps = {method: step_of(options, method, old) for method in ("finetune", "lwm")}
        seconds = interleaved(steps, 9)
        ratios = [lwm / base for base, lwm in zip(*seconds.values(), strict=True)]
        row = {f"{method}_ms": round(1e3 * statistics.median(times), 2) for method, times in seconds.items()}
        yield {column: value, **row, "ratio": round(statistics.median(ratios), 3)}


def by_tasks(folder: Path) -> Iterator[dict]:
    names = sorted(path.name for path in (folder / "train").iterdir())
    with tempfile.TemporaryDirectory() as work:
        common = ["--dataset", "folder", "--data-dir", str(folder.resolve()), "--cache-dir", f"{work}/cache"]
        common += ["--epochs", "1", "--precision", "bf16"]
        script = ["train_teacher_model.py", "--model", "resnet32", "--image-size", "32", "--old-classes"]
        for task in range(TASKS + 1):
            out, outputs = Path(work) / str(task), (task + 1) * A_TASK
            classes = ",".join(names[outputs - A_TASK : outputs])
            started = time.perf_counter()
            command = [sys.executable, *script, classes, *common, "--output-dir", str(out)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            model = out / f"{'student' if task else 'teacher'}_model.pth"
            yield {
                "task": task,
                "outputs": outputs,
                "images_per_second": load(model)["training"]["log"][-1]["images_per_second"],
                "script_seconds": round(seconds, 1),
                "checkpoint_kb": round(model.stat().st_size / 1e3, 1),
            }
            script = ["incremental_learning_system.py", "--teacher", str(model), "--new-classes"]


def write(path: Path, rows: list[dict]) -> None:
    about = hardware.machine()
    extra = {"date": about["date"], "hardware": about["hardware"], "torch": torch.__version__}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *extra], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | extra for row in rows)


if __name__ == "__main__":
    main()
