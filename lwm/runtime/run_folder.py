"""A run's folder: who may write there, what the run goes on from, and what it leaves behind."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from lwm.runtime import checkpoint as checkpoints
from lwm.runtime.errors import InputError, RunError, log, process_number
from lwm.runtime.files import locked, make_folder, require_folder, write_atomically

Row = dict[str, Any]
# Recorded for each task, and compared when a run goes on.
TASK_SETTINGS = (
    *("method", "loss_form", "beta", "gamma", "temperature", "batch_norm"),
    *("batch_size", "warm_up", "momentum", "weight_decay", "flip", "precision", "hold_back", "calibration", "seed"),
    *("backbone_lr", "freeze", "balanced"),
)
OF_STUDENTS = ("beta", "gamma", "temperature", "batch_norm")  # None of task 0
OF_TAKEN = ("method", "loss_form", "hold_back")  # the others are None of a network that was taken as it is
LOCK = ".lock"


def describe_task(
    settings: Any,
    classes: Sequence[str],
    learning_rate: float | None,
    record: dict[str, Any] | None,
    first: bool = False,
    again: Sequence[str] = (),
    images: int = 0,
) -> dict[str, Any]:
    """What the checkpoint says of a task: its classes, where their images were, how it was trained, and what judged it.

    ``again`` are old classes of which there were more images; ``images`` is the number of all. ``record`` is that of
    the source; None for a network that was taken as it is, of whose images nothing is known.
    """
    place = {"dataset": settings.dataset, "data_dir": str(Path(settings.data_dir).resolve())}
    values = {name: None if first and name in OF_STUDENTS else getattr(settings, name) for name in TASK_SETTINGS}
    if record is None:
        place, record = {"dataset": "", "data_dir": ""}, {"judged": None, "apart": []}
        values, learning_rate = {name: values[name] if name in OF_TAKEN else None for name in TASK_SETTINGS}, None
    return {
        "classes": list(classes),
        "again": list(again),
        **place,
        **record,
        **values,
        "learning_rate": learning_rate,
        "pretrained": first and bool(settings.weights),
        "epochs": settings.epochs,
        "images": images,
        "seconds": 0.0,
        "group_accuracy": [],
        "answers": {},
    }


class RunFolder:
    """The files of a run, and the checkpoint ``resumed`` from ``source``, if any; ``role`` is "teacher" or "student".

    ``seen`` is what the model's file was when the run was opened, and with ``command`` an interrupted run goes on.
    """

    def __init__(
        self,
        role: str,
        folder: Path,
        source: Path,
        resumed: dict[str, Any] | None,
        seen: tuple[int, int] | None = None,
        command: str = "",
    ) -> None:
        self.folder, self.source, self.resumed, self.seen, self.command = folder, source, resumed, seen, command
        self.model, self.log = folder / f"{role}_model.pth", folder / f"{role}_log.csv"
        self.curves, self.report = folder / f"{role}_curves.png", folder / f"{role}_report.html"

    def check_resumed(self, checkpoint: dict[str, Any], identity: dict[str, Any]) -> None:
        """Raises InputError if the run to go on from was another run; says what differs and does no harm.

        ``checkpoint`` is that of this run as far as it is known, and ``identity`` has the number of epochs, the hashes
        of the teacher and of the training images, and the machine.
        """
        if self.resumed is None:
            return
        resumed, training = self.resumed, self.resumed["training"]
        if not training:
            raise InputError(f"cannot resume: {self.source} holds a network alone, without the state of a run")
        then, now = resumed["tasks"][-1], checkpoint["tasks"][-1]
        pairs = [(key, resumed[key], checkpoint[key]) for key in ("architecture", "image_size", "class_names")]
        pairs += [(key, then[key], now[key]) for key in ("dataset", *TASK_SETTINGS, "learning_rate")]
        pairs += [("teacher (hash of its weights)", training["teacher"], identity["teacher"])]
        pairs += [("training images (number, hash of their pixels)", training["images"], identity["images"])]
        # Measured anew on these images: another processor may round the last digit otherwise.
        for key in ("mean", "std"):
            one, other = ([round(x, 6) for x in values[key]] for values in (resumed, checkpoint))
            pairs.append((key, one, other))
        for key, one, other in pairs:
            if one != other:
                way_out = "set it back, or begin anew with --overwrite or another --output-dir"
                raise InputError(f"cannot resume: {key} was {one} and is now {other}; {way_out}")
        planned, epochs = training["epochs"], identity["epochs"]
        if epochs < planned or (epochs != planned and not resumed["finished"]):
            more = " or more" if resumed["finished"] else ", and more once it is finished"
            raise InputError(f"cannot resume: the run was planned for {planned} epochs; give --epochs {planned}{more}")
        for key, one in training["machine"].items():
            other = identity["machine"].get(key)
            if one != other:
                log.info(f"{key} was {one} and is now {other}: the result is as good, but not the same to the last bit")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for this run alone, and clear away what a killed one left half-written.

        Raises InputError if another run holds it, or has written there since this run was opened. Of the processes
        of a torchrun job the first one holds and writes.
        """
        if process_number():
            yield
            return
        make_folder(self.folder)
        with _held(self.folder):
            if _identity(self.model) != self.seen:
                raise InputError(f"{self.model} has been written by another run in the meantime; start this one again")
            for stale in (*self.folder.glob(".teacher_*.tmp"), *self.folder.glob(".student_*.tmp")):
                stale.unlink()
            yield

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Raises RunError if it cannot be written; the last checkpoint stays whole."""
        if process_number():
            return
        with self._losing_nothing():
            checkpoints.save(self.model, checkpoint)

    def write_log(self, rows: list[Row]) -> None:
        """The CSV of the epochs; a column for everything that any row has, empty if a row has none."""
        if process_number():
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with self._losing_nothing():
            write_atomically(self.log, text.getvalue().encode())

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


def open_run_folder(settings: Any, role: str) -> RunFolder:
    """The folder of a script's run, ``role`` being "teacher" or "student". Nothing is written yet.

    Raises InputError if the folder is in use or cannot be written, or if the output would be the run's own teacher or
    would replace a model unasked.
    """
    folder = Path(settings.output_dir)
    require_folder(settings.where("output_dir"), folder)
    if (folder / LOCK).exists() and not process_number():  # somebody's, or left by a run that was killed
        with _held(folder):
            pass
    own = folder / f"{role}_model.pth"
    seen = _identity(own)
    if settings.teacher and seen and own.resolve() == Path(settings.teacher).resolve():
        raise InputError(f"{own} is the --teacher itself and would be replaced; choose another --output-dir")
    if settings.student and not settings.resume:
        raise InputError("--student names a run to go on from, and that needs --resume (or RESUME in config.py)")
    resumed, source = None, Path(settings.student or own)
    if settings.resume and (settings.student or seen):
        resumed = checkpoints.load(source)
    elif settings.resume:
        log.info(f"nothing to resume from at {own}: a fresh start")
    replaces = seen and not (resumed and source.resolve() == own.resolve())
    if replaces and not settings.overwrite:
        raise InputError(f"{own} exists; --overwrite replaces it, --resume goes on, --output-dir writes elsewhere")
    return RunFolder(role, folder, source, resumed, seen, _command_to_go_on(settings.arguments))


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK, wait=False))
        except filelock.Timeout as error:
            raise InputError(f"--output-dir {folder} is in use by another run; wait, or take another folder") from error
        except OSError as error:
            raise InputError(f"--output-dir {folder}: cannot be written to ({error.strerror})") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _command_to_go_on(arguments: Sequence[str]) -> str:
    """The command line as it was given, going on from the run's own model."""
    return command_with(arguments, ("student", "resume", "overwrite"), "--resume")


def command_with(arguments: Sequence[str], without: Sequence[str], *more: str) -> str:
    """The command line as it was given, ``without`` some flags and their values, and with ``more`` at its end."""
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
        if word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") not in without:
            kept.append(word)
        elif "=" not in word and given and not given[0].startswith("--"):
            given.pop(0)  # its value
    return shlex.join([*program, *kept, *more])
