"""Run a whole protocol through the three scripts and make its table.

    python3 reproduce.py digits-2+2 --seeds 0,1,2,3,4
    python3 reproduce.py photos32-10+10 --data-dir photos32 --seeds 0,1,2

Every cell (a variant with a seed) lies in its own folder under --work-dir: what is finished is skipped, what was
interrupted is resumed. results/<protocol>/ gets accuracy.csv, table.md and environment.json. ``--table`` only makes
the table again from the CSV.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from errors import InputError, RunError, one_line_errors
from settings import OneLineParser, require_folder

ROOT = Path(__file__).resolve().parent
COLUMNS = ["accuracy", "accuracy_old", "accuracy_new", "task_aware_old", "task_aware_new", "forgetting"]


@dataclass(frozen=True)
class Protocol:
    """One step on top of a teacher: ``old`` classes of the pool, then ``new`` ones.

    ``pool`` is a slice of the class order; each seed starts ``rotation`` classes further on in the pool, so that
    settings are not chosen for one pair of groups alone.
    """

    about: str
    dataset: str
    pool: slice
    old: int
    new: int
    rotation: int
    flags: str  # of both training scripts
    variants: dict[str, str]  # name -> flags; a teacher is trained for each loss form and shared


METHODS = {
    "finetune": "--method finetune",
    "lwf": "--method lwf",
    "lwf-mc": "--method lwf-mc",
    "lwm": "--method lwm",
}
PHOTOS = "--model resnet32 --image-size 32 --precision bf16"


def grid(rates: list[float], gammas: list[float]) -> dict[str, str]:
    """Variants of lwm for a search over the student's learning rate and gamma."""
    pairs = [(rate, gamma) for rate in rates for gamma in gammas]
    return {f"lr {r}, gamma {g}": f"--method lwm --incremental-lr {r} --gamma {g}" for r, g in pairs}


PROTOCOLS = {
    "digits-2+2": Protocol(
        about="scikit-learn digits, ResNet-18: teacher 0 and 1, student 2 and 3, judged on the test images",
        dataset="digits",
        pool=slice(0, 4),
        old=2,
        new=2,
        rotation=0,
        flags="",
        # The last two are no choices of ours: learned faster, they lean to the new classes and show the frontier.
        variants=METHODS
        | {
            "lwm, lr 0.02": "--method lwm --incremental-lr 0.02",
            "lwm, lr 0.02, gamma 1": "--method lwm --incremental-lr 0.02 --gamma 1",
        },
    ),
    "digits-search": Protocol(
        about="scikit-learn digits 4 to 9, ResNet-18: 4 and 5 then 6 and 7 (seed 0), 6 and 7 then 8 and 9 (seed 1), "
        "8 and 9 then 4 and 5 (seed 2), judged on a fifth of the training images, held back",
        dataset="digits",
        pool=slice(4, 10),
        old=2,
        new=2,
        rotation=2,
        flags="--hold-back 0.2",
        variants=grid([0.01, 0.0125], [0, 0.1, 1]) | grid([0.02], [0, 1]),
    ),
    "photos32-10+10": Protocol(
        about="mini-ImageNet at 32 px, ResNet-32: classes 1-10 of the order, then 11-20, judged on the test images",
        dataset="folder",
        pool=slice(0, 20),
        old=10,
        new=10,
        rotation=0,
        flags=PHOTOS,
        variants=METHODS,
    ),
    "photos32-search": Protocol(
        about="mini-ImageNet at 32 px, ResNet-32: classes 81-90 of the order, then 91-100, judged on a tenth of the "
        "training images, held back",
        dataset="folder",
        pool=slice(80, 100),
        old=10,
        new=10,
        rotation=0,
        flags=f"{PHOTOS} --hold-back 0.1",
        variants={"finetune": METHODS["finetune"], "lwf": METHODS["lwf"], **grid([0.1], [0, 0.1])},
    ),
}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--data-dir", help="the folder of a protocol on photos32, with train/ and test/")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--variants", help="names, separated by semicolons (default: all of the protocol)")
    parser.add_argument("--jobs", default="1", help="cells at once; the CPU cores are shared out (default: 1)")
    parser.add_argument("--work-dir", default="runs/reproduce")
    parser.add_argument("--table", action="store_true", help="only make table.md again from accuracy.csv")
    options = parser.parse_args(argv)
    protocol = PROTOCOLS[options.protocol]
    results = ROOT / "results" / options.protocol
    chosen = list(protocol.variants) if options.variants is None else options.variants.split(";")
    for name in chosen:
        if name not in protocol.variants:
            raise InputError(f"--variants: {options.protocol} has no {name!r}: {'; '.join(protocol.variants)}")
    seeds = [whole_number("--seeds", seed, 0, 2**32 - 1) for seed in options.seeds.split(",")]
    for flag, values in (("--variants", chosen), ("--seeds", seeds)):
        if len(set(values)) < len(values):  # two runs at once in one folder
            raise InputError(f"{flag}: {statistics.mode(values)!r} is named twice")
    options.jobs = whole_number("--jobs", options.jobs, 1, 1024)
    if not options.table:
        run_cells(options, protocol, chosen, seeds, results)
    rows = read_rows(results / "accuracy.csv")
    if not rows:
        raise InputError(f"--table: there is no row in {results / 'accuracy.csv'}; run the protocol without it first")
    (results / "table.md").write_text(table(protocol, rows))
    print(table(protocol, rows))


def whole_number(flag: str, text: str, least: int, most: int) -> int:
    number = int(text) if text.strip().isdecimal() and len(text) < 20 else -1
    if not least <= number <= most:
        raise InputError(f"{flag} is {text!r}: a whole number of at least {least} and at most {most} is needed")
    return number


def run_cells(options, protocol: Protocol, variants: list[str], seeds: list[int], results: Path) -> None:
    """Teachers first, then the students of every seed; the CSV grows by a row as each is done."""
    pool = class_order(protocol, options.data_dir)[protocol.pool]
    require_folder("--work-dir", options.work_dir)
    results.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    work = Path(options.work_dir) / options.protocol
    common = [*protocol.flags.split(), "--dataset", protocol.dataset, "--resume"]
    if options.data_dir:
        common += ["--data-dir", options.data_dir]

    def classes(seed: int, first: int, count: int) -> str:
        start = first + seed * protocol.rotation
        return ",".join(pool[(start + index) % len(pool)] for index in range(count))

    def teacher(seed: int, form: str) -> None:
        folder = work / f"seed{seed}" / f"teacher-{form}"
        if not (folder / "done").exists():
            flags = ["--old-classes", classes(seed, 0, protocol.old), "--loss-form", form, "--seed", str(seed)]
            call("train_teacher_model.py", [*common, *flags, "--output-dir", str(folder)], threads)
            (folder / "done").touch()

    def student(seed: int, variant: str) -> dict:
        flags = protocol.variants[variant].split()
        first = work / f"seed{seed}" / f"teacher-{form_of(flags)}" / "teacher_model.pth"
        folder = work / f"seed{seed}" / variant.replace(" ", "_").replace(",", "")
        if not (folder / "metrics.json").exists():
            new = [*common, *flags, "--new-classes", classes(seed, protocol.old, protocol.new), "--seed", str(seed)]
            output = ["--teacher", str(first), "--output-dir", str(folder)]
            call("incremental_learning_system.py", [*new, *output], threads)
            call("demo.py", [*output, "--student", str(folder / "student_model.pth")], threads)
        return row_of(options.protocol, variant, seed, folder)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as workers:
        forms = sorted({form_of(protocol.variants[name].split()) for name in variants})
        list(workers.map(lambda cell: teacher(*cell), [(seed, form) for seed in seeds for form in forms]))
        cells = [workers.submit(student, seed, name) for seed in seeds for name in variants]
        for cell in concurrent.futures.as_completed(cells):
            row = cell.result()
            print(f"{row['variant']}, seed {row['seed']}: {row['accuracy']:.1f} %", flush=True)
            write_rows(results / "accuracy.csv", row)
    (results / "environment.json").write_text(json.dumps(environment(options, threads), indent=1) + "\n")


def class_order(protocol: Protocol, data_dir: str | None) -> list[str]:
    """Digits by value; the photos in the field's shuffle of the sorted names (seed 1993, as iCaRL's CIFAR-100)."""
    if protocol.dataset == "digits":
        return [str(digit) for digit in range(10)]
    if not data_dir or not (Path(data_dir) / "train").is_dir():
        raise InputError(f"--data-dir is {data_dir!r}: the folder with train/<class>/ and test/<class>/ is needed")
    import numpy as np

    names = sorted(path.name for path in (Path(data_dir) / "train").iterdir() if path.is_dir())
    if len(names) < protocol.pool.stop:
        needed = protocol.pool.stop
        raise InputError(f"--data-dir {data_dir}: {len(names)} classes in train, and the protocol needs {needed}")
    return [names[index] for index in np.random.RandomState(1993).permutation(len(names))]


def form_of(flags: list[str]) -> str:
    """The form that the teacher of a variant is trained with; softmax-all is softmax where no class is old."""
    from settings import METHOD_FORMS

    named = dict(zip(flags[::2], flags[1::2], strict=True))
    form = METHOD_FORMS.get(named["--method"], named.get("--loss-form", "binary"))
    return "softmax" if form == "softmax-all" else form


def call(script: str, flags: list[str], threads: int) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RunError(f"{script} {' '.join(flags)}: {done.stderr.strip()[-300:]}")


def row_of(protocol: str, variant: str, seed: int, folder: Path) -> dict:
    """A row of accuracy.csv from what the demo and the log of a student say."""
    from checkpoint import load

    metrics = json.loads((folder / "metrics.json").read_text())
    saved = load(folder / "student_model.pth")
    step, last = saved["steps"][-1], saved["training"]["log"][-1]
    names = ["method", "loss_form", "learning_rate", "epochs", "batch_norm", "precision"]
    unused = {"finetune": ["beta", "gamma"], "lwm": []}.get(step["method"], ["gamma"])
    return {
        "protocol": protocol,
        "variant": variant,
        "seed": seed,
        "step": len(saved["steps"]) - 1,
        **{name: metrics["student"][name] for name in COLUMNS[:-1]},
        "forgetting": metrics["steps"][0]["forgetting"],
        "teacher_accuracy": metrics["teacher"]["accuracy"],
        "zero_maps": last.get("zero_maps"),
        **{name: step[name] for name in names},
        **{name: None if name in unused else step[name] for name in ("beta", "gamma")},
    }


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, row: dict) -> None:
    """Put a row in its place by variant and seed, replacing an earlier one."""
    rows = [r for r in read_rows(path) if (r["variant"], r["seed"]) != (row["variant"], str(row["seed"]))]
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    rows = sorted([*rows, rounded], key=lambda r: (r["variant"], int(r["seed"])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(protocol: Protocol, rows: list[dict]) -> str:
    """Mean and standard deviation over the seeds, in percent, a line a variant in the protocol's order."""
    head = ["variant", "all", "old", "new", "task-aware old", "task-aware new", "forgetting", "seeds"]
    lines = [f"{protocol.about}.", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant in protocol.variants:
        found = [row for row in rows if row["variant"] == variant]
        if not found:
            continue
        cells = []
        for column in COLUMNS:
            values = [float(row[column]) for row in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {variant} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines) + "\n"


def environment(options, threads: int) -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    folder = "--data-dir photos32 " if options.data_dir else ""
    return {
        "command": f"python3 reproduce.py {options.protocol} {folder}--seeds {options.seeds} --jobs {options.jobs}",
        "commit": commit,
        **machine(threads),
    }


def machine(threads: int | None = None) -> dict:
    """Date, hardware and versions, as every committed figure has them beside it."""
    import torch
    import torchvision

    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = threads or torch.get_num_threads()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{gpu}{processor()}, {threads} thread(s) a run",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
