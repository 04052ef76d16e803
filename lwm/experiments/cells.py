"""Running the scripts for a protocol: a cell is a method (or variant) with a seed, task after task.

Every cell lies in its own folder. What is finished is skipped, what was interrupted is resumed; the CSV gets a row as
each task is done.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lwm import losses
from lwm.classifiers import features_of
from lwm.evaluation import forgetting
from lwm.experiments import controls
from lwm.experiments.own_images import OLD, SPLITS, classes_of, linked
from lwm.experiments.protocols import REFERENCE, Protocol, class_order, groups_of, is_joint
from lwm.experiments.tables import OURS, ROOT, beside, write_rows
from lwm.images.datasets import Place, open_source
from lwm.runtime.checkpoint import AT_A_TIME, load, restore_model
from lwm.runtime.errors import InputError, Interrupted, RunError

running: set[subprocess.Popen[str]] = set()
SETTINGS = ("loss_form", "batch_norm", "learning_rate", "epochs", "precision")
UNTRAINED = {name for name, method in losses.METHODS.items() if method.loss is None}
STEPS = (3, 2)  # classes of each task of ``students``, after the teacher's
LEAVES = {
    "train_teacher_model.py": "teacher_model.pth",
    "incremental_learning_system.py": "student_model.pth",
    "demo.py": "metrics.json",
}


@dataclass(frozen=True)
class Study:
    """A protocol on its data: where its cells lie, with how many threads a script runs, and the CSV of its rows."""

    name: str
    protocol: Protocol
    data_dir: str | None
    work_dir: Path
    table: Path
    threads: int = 1
    weights_dir: Path = Path()

    def common(self, seed: int) -> list[str]:
        """Flags of every script."""
        data_dir = self.drawn(seed) if self.protocol.taken else self.data_dir
        data = ["--data-dir", str(data_dir)] if data_dir else []
        return [*self.protocol.flags.split(), "--dataset", self.protocol.dataset, *data]

    def drawn(self, seed: int) -> Path:
        """A folder of links to the images of a protocol on a network that is taken: those that ``seed`` draws to train
        on, and every test image.
        """
        taken, generator, folder = self.protocol.taken, np.random.RandomState(seed), self.folder(seed, "images")
        assert taken is not None
        for part, split in ((taken.new, "train"), (taken.new, "test"), ("old", "test")):
            for own in sorted((Path(self.data_dir or "") / part / split).iterdir()):
                images = sorted(own.iterdir())
                if split == "train":
                    images = [images[index] for index in generator.permutation(len(images))[: taken.images]]
                (folder / split / own.name).mkdir(parents=True, exist_ok=True)
                for image in images:
                    link = folder / split / own.name / image.name
                    if not link.exists():
                        link.symlink_to(image.resolve())
        return folder

    def groups(self, seed: int) -> list[list[str]]:
        """The classes of each task."""
        return groups_of(self.protocol, class_order(self.protocol, self.data_dir)[self.protocol.pool], seed)

    def folder(self, seed: int, name: str) -> Path:
        return self.work_dir / self.name / f"seed{seed}" / name.replace(" ", "_")

    def checkpoints(self, seed: int, name: str, flags: str) -> list[Path]:
        """Those of a cell, after each of its tasks."""
        first, later = LEAVES["train_teacher_model.py"], LEAVES["incremental_learning_system.py"]
        folders = [self.folder(seed, name) / str(number) for number in range(1, len(self.protocol.groups))]
        return [self.folder(seed, f"first-{self.form(flags)}") / first, *(folder / later for folder in folders)]

    def form(self, flags: str) -> str:
        """The form that the first task of a variant is trained with; a network that is taken has softmax outputs."""
        return "softmax" if self.protocol.taken else first_form(flags)

    def run(self, variants: dict[str, str], seeds: list[int], jobs: int) -> None:
        """First tasks first, then the others of every variant and seed; ``jobs`` at once."""
        forms = sorted({self.form(flags) for name, flags in variants.items() if not is_joint(name)})
        with concurrent.futures.ThreadPoolExecutor(jobs) as workers:
            list(workers.map(lambda pair: self.first_task(*pair), itertools.product(seeds, forms)))
            list(workers.map(lambda pair: self.cell(pair[0], *pair[1]), itertools.product(seeds, variants.items())))

    def first_task(self, seed: int, form: str) -> Path:
        flags = [*self.common(seed), *self.protocol.first.split(), "--seed", str(seed), "--loss-form", form]
        if taken := self.protocol.taken:
            flags += [*taken.flags.split(), "--weights", str(self.weights_dir / taken.weights), "--epochs", "0"]
            flags += ["--old-classes-file", str(Path(self.data_dir or "") / taken.names)]
        else:
            flags += ["--old-classes", ",".join(self.groups(seed)[0])]
        return run_script("train_teacher_model.py", self.folder(seed, f"first-{form}"), flags, self.threads)

    def cell(self, seed: int, name: str, flags: str) -> None:
        own, groups = [*self.common(seed), *flags.split(), "--seed", str(seed)], self.groups(seed)
        if name == REFERENCE:
            key = {"protocol": self.name, "method": name, "seed": seed, "task": len(groups) - 1}
            network, new = load(self.first_task(seed, "softmax")), list(itertools.chain(*groups[1:]))
            accuracy = logistic_regression(network, self.drawn(seed), new)
            write_rows(self.table, [{**key, "accuracy_later": accuracy}])
        elif is_joint(name):
            own += [*self.protocol.first.split(), "--old-classes", ",".join(itertools.chain(*groups))]
            model = run_script("train_teacher_model.py", self.folder(seed, name), own, self.threads)
            accuracy = self.add_rows(seed, name, len(groups) - 1, model)
        else:
            model = self.first_task(seed, self.form(flags))
            accuracy = self.add_rows(seed, name, 0, model)
            for task, group in enumerate(groups[1:], 1):
                teacher, folder = model, self.folder(seed, name) / str(task)
                task_flags = [*own, "--teacher", str(teacher), "--new-classes", ",".join(group)]
                model = run_script("incremental_learning_system.py", folder, task_flags, self.threads, after=teacher)
                accuracy = self.add_rows(seed, name, task, model, teacher)
        print(f"{name}, seed {seed}: {accuracy:.1f} % after the last task", flush=True)

    def add_rows(self, seed: int, name: str, task: int, model: Path, teacher: Path | None = None) -> float:
        """The row of a task; if it has a teacher, also a row for each old class with what demo.py says of it.

        Returns the accuracy over all classes, in percent.
        """
        key = {"protocol": self.name, "method": name, "seed": seed, "task": task}
        row = row_of(load(model))
        if self.protocol.taken:
            row |= of_taken(load(model), model.parent)
        write_rows(self.table, [{**key, **row}])
        if teacher is not None and not self.protocol.taken:
            flags = [*self.common(seed), "--teacher", str(teacher), "--student", str(model), "--classifier", "head"]
            metrics = run_script("demo.py", model.parent / "demo", flags, self.threads, after=model)
            rows = rows_of_classes(json.loads(metrics.read_text()))
            write_rows(beside(self.table, "attention.csv"), [{**key, **each} for each in rows])
        return row["accuracy"]


# Rows -------------------------------------------------------------------------------------------------------------


def row_of(saved: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its last task; None for what it does not have."""
    task, by_head = saved["tasks"][-1], saved["classifiers"].get("head", {})
    history = [each["group_accuracy"] for each in saved["tasks"]]
    # Without an epoch there is no log; a network that is taken as it is has no other classifier.
    log = saved["training"].get("log") or [{f"test_{name}": value for name, value in by_head.items()}]
    log[-1].setdefault("test_accuracy", history[-1][0])
    losses = [lost for lost in forgetting(history[:-1], history[-1]) if lost is not None]
    return {
        "accuracy": log[-1]["test_accuracy"],
        "accuracy_old": log[-1].get("test_accuracy_old"),
        "accuracy_new": log[-1].get("test_accuracy_new"),
        "task_aware": log[-1].get("test_task_aware"),
        "forgetting": statistics.mean(losses) if losses else None,
        "zero_maps": log[-1].get("zero_maps"),
        **{name: saved["classifiers"].get(name, {}).get("accuracy") for name in OURS},
        "beta": task["beta"] if "distillation" in log[-1] else None,
        "gamma": task["gamma"] if "attention" in log[-1] else None,
        **{name: task[name] for name in SETTINGS},
    }


def rows_of_classes(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What demo.py measured of each old class on its test images: accuracies, attention, how far statistics are off."""
    classes, attention = metrics["classes"], metrics["attention"]
    old = len(attention["distance"])
    columns = {
        "class": classes["names"],
        "accuracy_teacher": classes["teacher"],
        "accuracy": classes["student"],
        "distance": attention["distance"],
        "overlap": attention["overlap"],
    }
    for measure in ("mean", "covariance"):
        for how in ("compensated", "uncompensated"):
            columns[f"{measure}_off_{how}"] = metrics[f"{measure}s_off"].get(how, [None] * old)
    return [{name: values[index] for name, values in columns.items()} for index in range(old)]


# Scripts ----------------------------------------------------------------------------------------------------------


def of_taken(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Accuracy of the classes that the network knew and of all that came later, and how long the script took."""
    known, *later = saved["tasks"][-1]["group_accuracy"]
    return {
        "accuracy_first": known,
        "accuracy_later": statistics.mean(later) if later else None,
        "minutes": float((folder / "seconds").read_text()) / 60,
    }


def logistic_regression(teacher: dict[str, Any], data_dir: Path, classes: list[str]) -> float:
    """Accuracy in percent on test images of ``classes``, told that they are of these: a regression on the teacher's
    features of all their training images at once. It is what a frozen network has to give.
    """
    source = open_source(Place("folder", str(data_dir)), teacher["image_size"])
    images = [source.train(classes, classes), source.test(classes, classes)]
    model, channels = restore_model(teacher), (teacher["mean"], teacher["std"])
    train, test = (features_of(model, each.pixels, *channels, AT_A_TIME).numpy() for each in images)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1)).fit(train, images[0].labels)
    return 100 * float(regression.score(test, images[1].labels))


def run_script(script: str, folder: Path, flags: list[str], threads: int, after: Path | None = None) -> Path:
    """What the script leaves in ``folder``; it is called unless it has finished there with these flags, and with the
    same for the model that it comes ``after``.
    """
    made, done = folder / LEAVES[script], folder / "done"
    history = (after.parent / "done").read_text() if after else ""
    history += shlex.join([script, *flags]) + "\n"
    if not (done.exists() and done.read_text() == history):
        anew = done.exists() or not UNTRAINED.isdisjoint(flags)  # these have nothing to resume
        how = [] if script == "demo.py" else ["--overwrite" if anew else "--resume"]
        done.unlink(missing_ok=True)
        started = time.perf_counter()
        call(script, [*flags, "--output-dir", str(folder), *how], threads)
        (folder / "seconds").write_text(str(time.perf_counter() - started))
        done.write_text(history)
    return made


def students(
    data_dir: Path, split: int, images: int, flags: str, methods: Sequence[str], work_dir: Path
) -> Iterator[tuple[str, int, Path, Path]]:
    """Method, task, teacher and student of each step of a split: five classes, then three, then two, on so many images.

    ``data_dir`` is a folder, or "digits". What has been trained in ``work_dir`` is not trained again.
    """
    work, shift = (work_dir / str(split)).resolve(), SPLITS[split]
    if str(data_dir) == "digits":
        classes, data = [str((shift + index) % 10) for index in range(10)], ["--dataset", "digits"]
    else:
        classes = [*itertools.chain(*classes_of(data_dir, shift))][: OLD + sum(STEPS)]
        data = ["--dataset", "folder", "--data-dir", str(linked(data_dir, classes, work / "photos", images))]
    given = [*data, *flags.split(), "--old-classes", ",".join(classes[:OLD])]
    first = run_script("train_teacher_model.py", work / "teacher", given, threads=1)
    for method in methods:
        teacher, known = first, OLD
        for task, count in enumerate(STEPS, 1):
            new, known = classes[known : known + count], known + count
            given = ["--teacher", str(teacher), "--method", method, "--new-classes", ",".join(new), *data]
            student = run_script("incremental_learning_system.py", work / method / str(task), given, threads=1)
            yield method, task, teacher, student
            teacher = student


def first_form(flags: str) -> str:
    """The form that task 0 of a variant is trained with; softmax-all is softmax if no class is old."""
    words = flags.split()
    named = dict(zip(words[::2], words[1::2], strict=True))
    method = (losses.METHODS | controls.METHODS)[named["--method"]]
    form = method.form or named.get("--loss-form", "binary")
    return "softmax" if form == "softmax-all" else form


def call(script: str, flags: list[str], threads: int) -> None:
    """Raises RunError with the end of what the script says if it fails."""
    command = [str(ROOT / script), *flags]
    if not controls.METHODS.keys().isdisjoint(flags):
        command = ["-m", controls.__name__, *command]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *command], env=environment, stdout=pipe, stderr=pipe, text=True) as child:
        running.add(child)
        _, said = child.communicate()
        running.remove(child)
    if child.returncode:
        raise RunError(f"{script} {' '.join(flags)}: {said.strip()[-300:]}")


def stop(signum: int, frame: object) -> None:
    """SIGTERM, which other than Ctrl-C comes to this process alone: it is passed on, and the scripts save and end."""
    for child in list(running):
        child.terminate()
    raise Interrupted(signum, "interrupted; the same command goes on")


# Arguments --------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """Of a list with commas. Of a ValueError argparse makes a line."""
    found = [int(word) for word in text.split(",")]
    if not 0 <= min(found) <= max(found) < 2**32:
        raise ValueError
    return found


def number_of_jobs(text: str) -> int:
    if not 1 <= int(text) <= 1024:
        raise ValueError
    return int(text)


def chosen(methods: str | None, variants: dict[str, str]) -> dict[str, str]:
    """Those that are named, in a list with commas, or all. Raises InputError for one that is not there."""
    names = methods.split(",") if methods else list(variants)
    for name in names:
        if name not in variants:
            raise InputError(f"--methods: there is no {name!r}; there are {', '.join(variants)}")
    return {name: variants[name] for name in names}
