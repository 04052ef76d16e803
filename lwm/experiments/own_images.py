"""README's "Your own images" as a new user follows it, on photographs: three splits of ten classes into five and three.

    python3 -m lwm.experiments.own_images --data-dir photos84
    python3 -m lwm.experiments.own_images --data-dir photos84 --code ../earlier
    python3 -m lwm.experiments.own_images --data-dir photos84 --size 64 --flags="--stem cifar"

Of each class come 60 training images and all test images. The commands are those in the README of ``--code``, a
checkout, with these classes, this folder, ``--size`` and further ``--flags`` of the teacher. results/own-images/ gets a
row for each split, and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from lwm.experiments import tables
from lwm.runtime import hardware
from lwm.runtime.errors import InputError, RunError, one_line_errors
from lwm.runtime.settings import OneLineParser

SPLITS = (0, 3, 6)  # so many classes later, in the order of their names, a split begins
OLD, NEW, IMAGES = 5, 3, 60
SCRIPTS = ("train_teacher_model.py", "incremental_learning_system.py", "demo.py")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=Path, help="a folder with train/<class>/ and test/<class>/")
    parser.add_argument("--code", default=tables.ROOT, type=Path, help="a checkout (default: this one)")
    parser.add_argument("--size", default=96, type=int, help="of the images, px (default: 96)")
    parser.add_argument("--flags", default="", help="further flags of the teacher's script")
    parser.add_argument("--work-dir", default=Path("runs/own-images"), type=Path)
    options = parser.parse_args(argv)
    code, results = options.code.resolve(), tables.ROOT / "results" / "own-images"
    commit = subprocess.check_output(["git", "-C", str(code), "rev-parse", "--short", "HEAD"], text=True).strip()
    name = f"{commit}, {options.size} px {options.flags}".strip()
    for number, shift in enumerate(SPLITS):
        chosen, _ = classes_of(options.data_dir, shift)
        photos = linked(options.data_dir, chosen, options.work_dir / f"split{number}")
        folder = options.work_dir / re.sub(r"\W+", "-", name) / str(number)
        row = follow(code, photos, chosen, options.size, options.flags.split(), folder)
        key = {"protocol": "own-images", "method": name, "seed": number, "task": 1}
        tables.write_rows(results / "accuracy.csv", [{**key, **row}])
    tables.publish({results / "table.md": table_of(tables.read_rows(results / "accuracy.csv"))})


def parser_of_runs(about: str | None) -> OneLineParser:
    """Of a study on the networks that this one leaves, with ``about`` as its description."""
    parser = OneLineParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data-dir", required=True, type=Path, help="as of own_images.py")
    parser.add_argument("--runs", required=True, type=Path, help="a folder that own_images.py made, of one checkout")
    return parser


def table_of(rows: pd.DataFrame) -> str:
    """Means over the splits."""
    lines = []
    for run, own in rows.groupby("method", sort=False):
        means = own[["teacher", "accuracy", "old", "new", "head", "minutes"]].mean().map("{:.1f}".format)
        lines.append({"commit, size, flags": run, "splits": len(own), **means})
    return tables.markdown(lines)


def classes_of(data_dir: Path, shift: int) -> tuple[list[str], list[str]]:
    """The classes of a split, in their order, and those that it leaves out. Raises InputError if there are too few."""
    names = sorted(path.name for path in (data_dir / "train").glob("*") if path.is_dir())
    if len(names) < OLD + NEW:
        raise InputError(f"--data-dir {data_dir}: {OLD + NEW} classes are needed in its folder train")
    names = [names[(shift + index) % len(names)] for index in range(len(names))]
    return names[: OLD + NEW], names[OLD + NEW :]


def linked(data_dir: Path, classes: list[str], folder: Path, images: int = IMAGES) -> Path:
    """A folder of links to so many training images of each of these classes, and to all their test images."""
    for split, count in (("train", images), ("test", None)):
        for name in classes:
            own = folder / split / name
            own.mkdir(parents=True, exist_ok=True)
            for image in sorted((data_dir / split / name).iterdir())[:count]:
                if not (own / image.name).exists():
                    (own / image.name).symlink_to(image.resolve())
    return folder


def follow(
    code: Path, photos: Path, classes: list[str], size: int, more: list[str], folder: Path
) -> dict[str, float | str]:
    """The accuracies in percent after README's commands; a script that has been done in ``folder`` is not run again."""
    own = {
        "--data-dir": str(photos.resolve()),
        "--old-classes": ",".join(classes[:OLD]),
        "--new-classes": ",".join(classes[OLD:]),
        "--image-size": str(size),
        "--output-dir": str(folder.resolve()),
        "--teacher": str(folder.resolve() / "teacher_model.pth"),
        "--student": str(folder.resolve() / "student_model.pth"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    for script in SCRIPTS:
        words = shlex.split(command_of(code, script))[1:]
        flags = [own.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        if script == SCRIPTS[0]:
            flags += ["--image-size", str(size), *more]
        done, started = folder / f"{script}.seconds", time.perf_counter()
        if not done.exists():
            with (folder / f"{script}.log").open("w") as said:
                command = [sys.executable, *flags, *(["--overwrite"] if script != SCRIPTS[2] else [])]
                if subprocess.run(command, cwd=code, stdout=said, stderr=said).returncode:
                    raise RunError(f"{' '.join(flags)}: see {said.name}")
            done.write_text(str(time.perf_counter() - started))
        seconds += float(done.read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    head = (metrics.get("classifiers") or metrics["readouts"])["head"]
    student = metrics["student"]
    return {
        "teacher": metrics["teacher"]["accuracy"],
        "accuracy": student["accuracy"],
        "old": student["accuracy_old"],
        "new": student["accuracy_new"],
        "head": head["accuracy"],
        "minutes": seconds / 60,
        **hardware.machine(int(os.environ.get("OMP_NUM_THREADS", "0")) or None),
    }


def command_of(code: Path, script: str) -> str:
    """The first line in README's section "Your own images" that calls ``script``."""
    section = (code / "README.md").read_text().split("## Your own images")[1].split("\n## ")[0]
    found = re.search(rf"^python3 {script}.*$", section, re.MULTILINE)
    if found is None:
        raise InputError(f"--code {code}: its README has no command with {script} under 'Your own images'")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
