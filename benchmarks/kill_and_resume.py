"""Kill a small run with SIGKILL again and again, go on each time, and compare its bits with those of a run left alone.

    python3 benchmarks/kill_and_resume.py --kills 20 --script both

Half of the kills come at a random moment of the training, half as soon as a temporary file is seen in the folder, which
is in the middle of a save. Compared is all that the last checkpoint holds, and the log; their times aside.
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lwm.runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"teacher": "train_teacher_model.py", "student": "incremental_learning_system.py"}
TINY = ["--model", "resnet32", "--image-size", "8", "--batch-size", "16"]
SAVES = ["--save-interval", "2", "--save-interval-steps", "3"]
TIMES = {"images_per_second", "seconds"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


# What differs -----------------------------------------------------------------------------------------------------


def differences(kind: str, one: Path, other: Path) -> dict[str, int]:
    """How many bits differ between the runs in two folders: the places that differ, and the count in each."""
    first, second = (dict(_content(kind, folder)) for folder in (one, other))
    counts = {}
    for place in first | second:
        a, b = first.get(place, b""), second.get(place, b"")
        bits = (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).bit_count() + 8 * abs(len(a) - len(b))
        if bits or (place in first) != (place in second):
            counts[place] = bits
    return counts


def _content(kind: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    yield from _values("", checkpoint.load(folder / f"{kind}_model.pth"))
    with (folder / f"{kind}_log.csv").open(newline="") as file:
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


# Killing ----------------------------------------------------------------------------------------------------------


def command(kind: str, folder: Path, epochs: int, teacher: Path) -> list[str]:
    flags = [*TINY, *SAVES, "--epochs", str(epochs), "--output-dir", str(folder)]
    if kind == "student":
        flags += ["--teacher", str(teacher / "teacher_model.pth")]
    return [sys.executable, str(ROOT / SCRIPTS[kind]), *flags]


def start(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def wait_for_training(child: subprocess.Popen, folder: Path) -> bool:
    """Until the child holds the lock of its folder, which it does while it trains; False where it has ended."""
    lock = folder / ".lock"
    while child.poll() is None:
        try:
            if lock.read_text().startswith(f"process {child.pid} "):  # not that of the one killed before it
                return True
        except OSError:
            pass
        time.sleep(0.002)
    return False


def run_alone(line: list[str], folder: Path) -> float:
    """Let a run end; returns the seconds that it trained."""
    child = start(line)
    wait_for_training(child, folder)
    started = time.perf_counter()
    if child.wait():
        sys.exit(f"{' '.join(line)} failed")
    return time.perf_counter() - started


def kill_and_resume(
    line: list[str], kind: str, folder: Path, kills: int, seconds: float, moments: random.Random
) -> collections.Counter:
    """Kill the run ``kills`` times within some ``seconds`` of training, and go on each time but the last.

    Counts where the kills fell, by what they left; fewer of them where the run has ended before.
    """
    counts = collections.Counter()
    aims = [True, False] * (kills // 2) + [False] * (kills % 2)
    moments.shuffle(aims)
    for at_a_save in aims:
        there = set(left_behind(folder))
        child = start([*line, "--resume"])
        wait_for_training(child, folder)
        time.sleep(moments.uniform(0, seconds / kills))
        while at_a_save and child.poll() is None and not _fresh(folder, there):
            pass
        child.kill()
        if child.wait() == 0:
            return counts
        if child.returncode > 0:
            sys.exit(f"{' '.join(line)} --resume failed")
        counts["kills"] += 1
        counts["inside a save"] += bool(_fresh(folder, there))
        counts[_goes_on(folder / f"{kind}_model.pth")] += 1
    return counts


def _fresh(folder: Path, there: set[str]) -> set[str]:
    return {name for name in left_behind(folder) if name.endswith(".tmp")} - there


def _goes_on(model: Path) -> str:
    """From where a killed run does; its checkpoint is read and checked whole."""
    if not model.exists():
        return "from nothing"
    return "inside an epoch" if checkpoint.load(model)["training"]["position"] else "between epochs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--script", default="both", choices=[*SCRIPTS, "both"])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    moments, wrong = random.Random(options.seed), False
    with tempfile.TemporaryDirectory() as temporary:
        teacher = Path(temporary, "teacher")
        run_alone(command("teacher", teacher, 2, teacher), teacher)
        for kind in SCRIPTS if options.script == "both" else [options.script]:
            alone = Path(temporary, f"{kind}-alone")
            seconds = run_alone(command(kind, alone, options.epochs, teacher), alone)
            counts, attempts = collections.Counter(), 0
            while counts["kills"] < options.kills:  # a run that ended before that is compared, and another begun
                attempts += 1
                killed = Path(temporary, f"{kind}-killed-{attempts}")
                line = command(kind, killed, options.epochs, teacher)
                counts += kill_and_resume(line, kind, killed, options.kills - counts["kills"], seconds, moments)
                run_alone([*line, "--resume"], killed)
                different, left = differences(kind, alone, killed), left_behind(killed)
                wrong = wrong or bool(different or left)
                places = ", ".join(list(different)[:5])
                print(
                    f"{kind}: {sum(different.values())} of {sum(8 * len(v) for _, v in _content(kind, alone))} bits "
                    f"differ{places and ' in ' + places}; left behind: {', '.join(left) or 'nothing'}"
                )
            print(
                f"{kind}: {counts['kills']} kills in {attempts} run(s) that would train for {seconds:.1f} s, "
                f"{counts['inside a save']} of them inside a save; gone on from inside an epoch "
                f"{counts['inside an epoch']} times, from between epochs {counts['between epochs']}, "
                f"from nothing {counts['from nothing']}",
                flush=True,
            )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
