"""Runs of the training scripts that take a second: two epochs of five steps on digits at 8 px."""

from __future__ import annotations

import importlib.util
import itertools
import signal
from collections.abc import Callable
from pathlib import Path

from lwm import losses
from lwm.runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "resnet32", "--image-size", "8"]
STEPS = 5  # of an epoch
RUN = ["--epochs", "2", "--save-interval", "2"]  # so the first epoch's end is saved only where the run stops there


def load_harness():
    path = ROOT / "benchmarks" / "kill_and_resume.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HARNESS = load_harness()
differences = HARNESS.differences


def first(whole: Path) -> Path:
    return whole / "first" / "teacher_model.pth"


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def at_step(monkeypatch, step: int | None, act: Callable[[dict], object]) -> None:
    """Call ``act(terms)`` on the loss terms of the ``step``-th step from now, or of every one; it may return others."""
    count = itertools.count(1)

    def patched(loss):
        def acting(*arguments):
            terms = loss(*arguments)
            return (act(terms) or terms) if next(count) == step or step is None else terms

        return acting

    monkeypatch.setattr(losses, "first_step", patched(losses.first_step))
    monkeypatch.setitem(losses.METHODS, "lwm", patched(losses.METHODS["lwm"]))


def interrupt(*arguments: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def said_where(kind: str, folder: Path, capsys) -> str:
    """The command that the last line gives; where it says that the run stopped is where the checkpoint is."""
    saved = checkpoint.load(folder / f"{kind}_model.pth")
    done, position = len(saved["training"]["log"]), saved["training"]["position"]
    where = f"stopped after epoch {done}"
    if position:
        where = f"stopped in epoch {done + 1}/{saved['training']['epochs']} after step {position['batches']} of {STEPS}"
    line = one_line(capsys)
    assert line.startswith(where)
    assert not saved["finished"]
    return line.split("go on with: ")[1]
