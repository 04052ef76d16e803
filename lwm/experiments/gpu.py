"""What waits for a GPU, in one command that ends in time and goes on where it stopped.

    python3 -m lwm.experiments.gpu --data-dir cifar100 --minutes 10

First the tests that need CUDA and what a step costs, then the protocols on CIFAR-100, several runs at once on one GPU.
What was finished is not run again; a run that the end comes upon saves and is resumed. results/ gets everything, with
the hardware, as from the same commands by hand.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from lwm.experiments import tables
from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.hardware import pick_device
from lwm.runtime.settings import OneLineParser

SAVING = 20  # seconds for runs to save once they are told to end
FIGURES = "results/performance/cuda"
COMMANDS = (
    "-m pytest -q tests/test_cuda.py",
    f"benchmarks/step_cost.py --device cuda --precision bf16 --json {FIGURES}-resnet32-bf16.json",
    f"benchmarks/step_cost.py --device cuda --precision fp32 --json {FIGURES}-resnet32-fp32.json",
    f"benchmarks/step_cost.py --device cuda --precision bf16 --model resnet18 --json {FIGURES}-resnet18-bf16.json",
    f"benchmarks/epoch_overhead.py --device cuda --precision bf16 --json {FIGURES}-epoch-resnet32-bf16.json",
    "reproduce.py cifar100-10x10-resnet18 --methods lwf,lwm,joint",
    "reproduce.py cifar100-10x10 --methods joint,lwf,lwm,lwf-mc --seeds 0,1,2",
    "reproduce.py cifar100-5x20 --ablation --seeds 0,1,2",
    "reproduce.py cifar100-5x20 --seeds 0,1,2",
    "reproduce.py cifar100-10x10",
)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data-dir", required=True, type=Path, help="CIFAR-100, its archive or train/ and test/")
    parser.add_argument("--minutes", type=float, default=10, help="after which it ends (default: 10)")
    parser.add_argument("--jobs", type=int, default=4, help="runs at once (default: 4)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args(argv)
    end = time.monotonic() + 60 * options.minutes - SAVING
    if pick_device("auto").type != "cuda":
        raise InputError("no GPU is here; the same protocols run on a CPU by reproduce.py")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    done = options.work_dir / "done"
    finished = done.read_text().splitlines() if done.exists() else []
    for command in COMMANDS:
        if command in finished:
            continue
        words = shlex.split(command)
        if words[0] == "reproduce.py":
            words += ["--data-dir", str(options.data_dir.resolve()), "--work-dir", str(options.work_dir.resolve())]
            words += ["--jobs", str(options.jobs)]
        print(command, flush=True)
        status = run_until(end, [sys.executable, *words])
        if status is None:
            print("time is up; the same command goes on", flush=True)
            return
        print(f"  ended with {status}", flush=True)
        if not status:
            with done.open("a") as file:
                file.write(f"{command}\n")


def run_until(end: float, command: list[str]) -> int | None:
    """The exit status of a command, or None if it was told to end at this time of time.monotonic()."""
    environment = os.environ | {"PYTHONPATH": str(tables.ROOT)}
    with subprocess.Popen(command, cwd=tables.ROOT, env=environment) as child:
        try:
            return child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(SAVING)
            except subprocess.TimeoutExpired:
                child.kill()
            return None


if __name__ == "__main__":
    sys.exit(main())
