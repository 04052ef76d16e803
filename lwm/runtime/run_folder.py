"""A run's folder: who may write there, what the run goes on from, and what it leaves behind."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwm.runtime import checkpoint as checkpoints
from lwm.runtime.errors import InputError, RunError, process_number
from lwm.runtime.lock import held

Row = dict[str, Any]
# Recorded for each step, and compared when a run goes on.
STEP_SETTINGS = (
    *("method", "loss_form", "beta", "gamma", "temperature", "attention", "attention_class", "batch_norm"),
    *("batch_size", "momentum", "weight_decay", "flip", "precision", "hold_back", "seed"),
    *("backbone_lr", "freeze", "balanced"),
)
OF_STUDENTS = ("beta", "gamma", "temperature", "attention", "attention_class", "batch_norm")  # None of a first step
# What it was where a checkpoint of an earlier release does not say.
ADDED: dict[str, Any] = {"attention": "grad-cam", "freeze": 0, "balanced": False}
LOCK = ".lock"


def describe_step(settings: Any, classes: Sequence[str], learning_rate: float, first: bool = False) -> dict[str, Any]:
    """What the checkpoint says of a step: its classes, where their images were, and how it was trained."""
    return {
        "classes": list(classes),
        "dataset": settings.dataset,
        "data_dir": str(Path(settings.data_dir).resolve()),
        **{name: None if first and name in OF_STUDENTS else getattr(settings, name) for name in STEP_SETTINGS},
        "learning_rate": learning_rate,
        "epochs": settings.epochs,
        "group_accuracy": [],
    }


@dataclass(frozen=True)
class Run:
    """The files of a run, ``kind`` being "teacher" or "student", and the checkpoint it goes on from, if any."""

    kind: str
    folder: Path
    source: Path
    resumed: dict[str, Any] | None
    seen: tuple[int, int] | None = None  # what the model's file was when the run was opened
    command: str = ""  # with which an interrupted run goes on

    @property
    def model(self) -> Path:
        return self.folder / f"{self.kind}_model.pth"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.kind}_log.csv"

    @property
    def curves(self) -> Path:
        return self.folder / f"{self.kind}_curves.png"

    @property
    def report(self) -> Path:
        return self.folder / f"{self.kind}_report.html"

    def check_resumed(self, head: dict[str, Any], identity: dict[str, Any]) -> None:
        """Raises InputError where the run to go on from was another run; says what differs and does no harm.

        ``identity`` has the number of epochs, the hashes of the teacher and of the training images, and the machine.
        """
        if self.resumed is None:
            return
        was, training = self.resumed, self.resumed["training"]
        if not training:
            raise InputError(f"cannot resume: {self.source} holds a network alone, without the state of a run")
        step, now = was["steps"][-1], head["steps"][-1]
        pairs = [(key, was[key], head[key]) for key in ("architecture", "image_size", "class_names")]
        pairs += [
            (key, step.get(key, ADDED.get(key)), now[key])
            for key in ("dataset", *STEP_SETTINGS, "learning_rate")
            if self.kind == "student" or key not in OF_STUDENTS
        ]
        pairs += [("teacher (hash of its weights)", training["teacher"], identity["teacher"])]
        if training["images"] is not None:
            pairs += [("training images (number, hash of their pixels)", training["images"], identity["images"])]
        # Measured anew on these images: another processor may round the last digit otherwise.
        for key in ("mean", "std"):
            before, after = ([round(x, 6) for x in values[key]] for values in (was, head))
            pairs.append((key, before, after))
        for key, before, after in pairs:
            if before != after:
                raise InputError(
                    f"cannot resume: {key} was {before} and is now {after}; "
                    "set it back, or begin anew with --overwrite or another --output-dir"
                )
        planned, epochs = training["epochs"], identity["epochs"]
        if epochs != planned and not was["finished"]:
            raise InputError(
                f"cannot resume: the run was planned with --epochs {planned} and is now to have {epochs}; "
                f"finish it with --epochs {planned} first"
            )
        if epochs < planned:
            raise InputError(f"cannot resume: the run already has {planned} epochs; give --epochs {planned} or more")
        for key, before in training["machine"].items():
            after = identity["machine"].get(key)
            if before != after:
                print(f"{key} was {before} and is now {after}: the result is as good, but not the same to the last bit")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for this run alone, and clear away what a killed one left half-written.

        Raises InputError where another run holds it, or has written there since this run was opened. Of the processes
        of a torchrun job the first one holds and writes.
        """
        if process_number():
            yield
            return
        checkpoints.make_folder(self.folder)
        with _held(self.folder):
            if _identity(self.model) != self.seen:
                raise InputError(f"{self.model} has been written by another run in the meantime; start this one again")
            for stale in self.folder.glob(".*.tmp"):
                if stale.name.startswith((".teacher_", ".student_")):
                    stale.unlink(missing_ok=True)
            yield

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Raises RunError where it cannot be written; the last checkpoint stays whole."""
        if process_number():
            return
        with self._losing_nothing():
            checkpoints.save(self.model, checkpoint)

    def write_log(self, rows: list[Row]) -> None:
        """The CSV of the epochs; a column for everything that any row has, empty where it has none."""
        if process_number():
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with self._losing_nothing():
            checkpoints.write_atomically(self.log, text.getvalue().encode())

    def what_is_left(self) -> str:
        """For a run that breaks off: what can be gone on from."""
        last = next((path for path in (self.model, self.source) if os.path.exists(path)), None)
        return f"the last checkpoint, {last}, is whole" if last else "there is no checkpoint to go on from"

    @contextlib.contextmanager
    def _losing_nothing(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise RunError(f"{error}; {self.what_is_left()}") from error


def open_run(settings: Any, kind: str) -> Run:
    """The run of a script, ``kind`` being "teacher" or "student". Nothing is written yet.

    Raises InputError where its folder is in use or cannot be written, or where the output would be the run's own
    teacher or would replace a model unasked.
    """
    folder = Path(settings.output_dir)
    if (folder / LOCK).exists() and not process_number():  # somebody's, or left by a run that was killed
        with _held(folder):
            pass
    own = folder / f"{kind}_model.pth"
    seen = _identity(own)
    if settings.teacher and seen and own.resolve() == Path(settings.teacher).resolve():
        raise InputError(f"{own} is the --teacher itself and would be replaced; choose another --output-dir")
    if settings.student and not settings.resume:
        raise InputError("--student names a run to go on from, and that needs --resume (or RESUME in config.py)")
    resumed = None
    source = Path(settings.student) if settings.student else own
    if settings.resume:
        if settings.student or seen:
            resumed = checkpoints.load(source)
        else:
            print(f"nothing to resume from at {own}: a fresh start")
    replaces = seen and not (resumed and source.resolve() == own.resolve())
    if replaces and not settings.overwrite:
        raise InputError(
            f"{own} exists; --overwrite replaces it, --resume goes on from it (without --student), "
            "--output-dir writes elsewhere"
        )
    return Run(kind, folder, source, resumed, seen, _command_to_go_on(settings.arguments))


def _held(folder: Path) -> contextlib.AbstractContextManager[None]:
    return held(folder / LOCK, f"--output-dir {folder}")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except OSError:
        return None


def _command_to_go_on(arguments: Sequence[str]) -> str:
    """The command line as it was given, going on from the run's own model."""
    given = list(arguments)
    program = ["python3", *sys.argv[:1]]
    processes, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes != "1":
        several = [f"--nnodes={int(processes) // int(here)}"] if processes != here else ["--standalone"]
        program = ["torchrun", *several, f"--nproc_per_node={here}", *sys.argv[:1]]
    elif given == sys.argv[1:]:
        program = sys.orig_argv[: len(sys.orig_argv) - len(given)]
    kept = []
    while given:
        word = given.pop(0)
        if word == "--student":
            given = given[1:]
        elif word.split("=")[0] not in ("--student", "--resume", "--no-resume", "--overwrite", "--no-overwrite"):
            kept.append(word)
    return shlex.join([*program, *kept, "--resume"])
