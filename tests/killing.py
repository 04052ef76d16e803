"""Kill a small run with SIGKILL again and again, go on each time, and say how its bits differ from another run's.

Half of the kills come at a random moment of the training, half as soon as a temporary file is seen in the folder, which
is in the middle of a save. Compared is all that the last checkpoint holds, and the log; their times aside.
"""

from __future__ import annotations

import collections
import csv
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lwm.runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"teacher": "train_teacher_model.py", "student": "incremental_learning_system.py"}
TINY = ["--model", "resnet32", "--image-size", "8", "--batch-size", "16"]
SAVES = ["--save-interval", "2", "--save-interval-steps", "3"]
TIMES = {"images_per_second", "seconds"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def differences(role: str, one: Path, other: Path) -> dict[str, int]:
    """How many bits differ between the runs in two folders: the places that differ, and the count in each."""
    first, second = (dict(_content(role, folder)) for folder in (one, other))
    counts = {}
    for place in first | second:
        a, b = first.get(place, b""), second.get(place, b"")
        bits = (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).bit_count() + 8 * abs(len(a) - len(b))
        if bits or (place in first) != (place in second):
            counts[place] = bits
    return counts


def _content(role: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    yield from _values("", checkpoint.load(folder / f"{role}_model.pth"))
    with (folder / f"{role}_log.csv").open(newline="") as file:
        yield from _values("log.csv", list(csv.DictReader(file)))


def _values(where: str, value: Any) -> Iterator[tuple[str, bytes]]:
    """Every number and text in ``value``, with the place that it has there."""
    if isinstance(value, dict | list):
        yield where, str(len(value)).encode() if isinstance(value, list) else b""
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in TIMES:
                yield from _values(f"{where}/{key}", item)
    elif hasattr(value, "dtype"):
        yield f"{where} {value.dtype} {list(value.shape)}", value.contiguous().numpy().tobytes()
    else:
        content = struct.pack("<d", value) if isinstance(value, float) else repr(value).encode()
        yield f"{where} {type(value).__name__}", content


def left_behind(folder: Path) -> list[str]:
    """Temporary files and the lock."""
    return sorted(path.name for path in folder.glob(".*"))


def command(role: str, folder: Path, epochs: int, teacher: Path) -> list[str]:
    flags = [*TINY, *SAVES, "--epochs", str(epochs), "--output-dir", str(folder)]
    if role == "student":
        flags += ["--teacher", str(teacher / "teacher_model.pth")]
    return [sys.executable, str(ROOT / SCRIPTS[role]), *flags]


def kill_and_resume(
    line: list[str], role: str, folder: Path, kills: int, seconds: float, moments: random.Random
) -> collections.Counter:
    """Kill the run ``kills`` times within some ``seconds`` of training, and go on each time but the last.

    Counts the kills and those inside a save; fewer if the run has ended before.
    """
    counts: collections.Counter = collections.Counter()
    aims = [True, False] * (kills // 2) + [False] * (kills % 2)
    moments.shuffle(aims)
    for at_a_save in aims:
        there = set(left_behind(folder))
        child = subprocess.Popen([*line, "--resume"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        while child.poll() is None and not _holds_the_lock(child, folder):  # which it does while it trains
            time.sleep(0.002)
        time.sleep(moments.uniform(0, seconds / kills))
        while at_a_save and child.poll() is None and not _fresh(folder, there):
            pass
        child.kill()
        if child.wait() == 0:
            return counts
        assert child.returncode < 0, f"{' '.join(line)} --resume failed"
        counts["kills"] += 1
        counts["inside a save"] += bool(_fresh(folder, there))
        if (model := folder / f"{role}_model.pth").exists():
            checkpoint.load(model)  # it is whole
    return counts


def _holds_the_lock(child: subprocess.Popen, folder: Path) -> bool:
    """Rather than one that was killed before it, whose file is still there."""
    lock = folder / ".lock"
    descriptors = Path("/proc", str(child.pid), "fd")
    try:
        return any(os.path.samefile(path, lock) for path in descriptors.iterdir())
    except OSError:  # a file that has been closed, a process that has ended
        return False


def _fresh(folder: Path, there: set[str]) -> set[str]:
    return {name for name in left_behind(folder) if name.endswith(".tmp")} - there
