"""Runs of the training scripts that take a second: two epochs of five steps on digits at 8 px."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import train_teacher_model as trainer
from lwm import losses
from lwm.runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
FP32 = ["--precision", "fp32"]  # whatever the processor has: several processes and one are compared
SMALL = ["--model", "resnet32", "--image-size", "8", *FP32]
STEPS = 5  # of an epoch
# The first epoch's end is saved only where the run stops there.
RUN = ["--epochs", "2", "--save-interval", "2", "--calibration", "0", *FP32]


# Children are forked from a process that has imported what takes seconds, and has run nothing yet.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torchvision", "sklearn.covariance", "matplotlib.pyplot"])


def forked(act: Callable, *arguments: Any, said: Path | None = None, **environment: str) -> BaseProcess:
    """A started process of its own that calls ``act``, with one thread; what it prints goes to the file ``said``."""
    child = SERVER.Process(target=_in_a_child, args=(act, arguments, said or Path(os.devnull), environment))
    child.start()
    return child


def _in_a_child(act: Callable, arguments: tuple, said: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.exit(act(*arguments))


def wait_until(there: Callable[[], object], exit_code: Callable[[], int | None]) -> None:
    """Wait, unless the process of that ``exit_code`` has ended."""
    while not there():
        assert exit_code() is None
        time.sleep(0.005)


def first(whole: Path) -> Path:
    return whole / "first" / "teacher_model.pth"


def one_line(capsys) -> str:
    """The last of what a run says, which is why it ends; nothing of it is a traceback."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


def at_step(monkeypatch, step: int | None, act: Callable[[dict], object]) -> None:
    """Call ``act(terms)`` on the loss terms of the ``step``-th step from now, or of every one; it may return others."""
    count = itertools.count(1)

    def patched(loss):
        def acting(*arguments):
            terms = loss(*arguments)
            return (act(terms) or terms) if next(count) == step or step is None else terms

        return acting

    monkeypatch.setattr(trainer, "classify", patched(trainer.classify))
    lwm = losses.METHODS["lwm"]
    monkeypatch.setitem(losses.METHODS, "lwm", dataclasses.replace(lwm, loss=patched(lwm.loss)))


def interrupt(*arguments: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def said_where(role: str, folder: Path, capsys) -> str:
    """The command that the last line gives; if it says that the run stopped, there is the checkpoint."""
    saved = checkpoint.load(folder / f"{role}_model.pth")
    done, position = len(saved["training"]["log"]), saved["training"]["position"]
    where = f"stopped after epoch {done}"
    if position:
        where = f"stopped in epoch {done + 1}/{saved['training']['epochs']} after step {position['batches']} of {STEPS}"
    line = one_line(capsys)
    assert line.startswith(where)
    assert not saved["finished"]
    return line.split("go on with: ")[1]
