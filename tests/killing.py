"""Kill a small run with SIGKILL again and again, go on each time, and say how its bits differ from another run's.

Half of the kills come at a random moment of the training, half as soon as a temporary file is seen in the folder, which
is in the middle of a save. Compared is all that the last checkpoint holds, and the log; their times aside.
"""

from __future__ import annotations

import collections
import csv
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tinyruns import forked

from lwm.runtime import checkpoint

TINY = ["--model", "resnet32", "--image-size", "8", "--batch-size", "16"]
SAVES = ["--save-interval", "2", "--save-interval-steps", "3"]
TIMES = {"images_per_second", "seconds"}


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


def kill_and_resume(
    act: Callable[[list[str]], int], flags: list[str], model: Path, kills: int, seconds: float, moments: random.Random
) -> collections.Counter:
    """Kill the run ``act(flags)`` of ``model`` ``kills`` times within some ``seconds`` of training, and go on each time
    but the last. Counts the kills and those inside a save; fewer if the run has ended before.
    """
    counts: collections.Counter = collections.Counter()
    aims = [True, False] * (kills // 2) + [False] * (kills % 2)
    moments.shuffle(aims)
    for at_a_save in aims:
        there = set(left_behind(model.parent))
        child = forked(act, [*flags, "--resume"])
        while child.exitcode is None and not _holds(child, model.with_name(".lock")):  # which it does while it trains
            time.sleep(0.002)
        time.sleep(moments.uniform(0, seconds / kills))
        while at_a_save and child.exitcode is None and not _fresh(model.parent, there):
            pass
        child.kill()
        child.join()
        if child.exitcode == 0:
            return counts
        assert child.exitcode == -signal.SIGKILL, f"{' '.join(flags)} --resume failed"
        counts["kills"] += 1
        counts["inside a save"] += bool(_fresh(model.parent, there))
        if model.exists():
            checkpoint.load(model)  # it is whole
    return counts


def _holds(child: BaseProcess, lock: Path) -> bool:
    """Rather than one that was killed before it, whose file is still there."""
    descriptors = Path("/proc", str(child.pid), "fd")
    try:
        return any(os.path.samefile(path, lock) for path in descriptors.iterdir())
    except OSError:  # a file that has been closed, a process that has ended
        return False


def _fresh(folder: Path, there: set[str]) -> set[str]:
    return {name for name in left_behind(folder) if name.endswith(".tmp")} - there
