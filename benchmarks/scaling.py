"""How much faster two processes are than one, a thread each, on the same global batch.

    python3 benchmarks/scaling.py --model resnet32 --json scaling.json

torchrun starts each run; runs of one and of two processes take turns. Beside the steps it measures their parts: the
all-reduce of the gradients alone, and the agreement on whether to stop, which each step asks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from epoch_overhead import bare_epoch, scripts_epoch
from step_cost import NEW, OLD, arguments, network, report

from lwm.runtime import distributed, hardware


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch (default: 20)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: 5)")
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return
    torch.set_num_threads(1)  # as many as each process has, and as the report is to say
    rows = {count: [] for count in (1, 2)}
    for _ in range(options.repeats):
        for count in rows:
            rows[count].append(run(count))
    ratios = [one["step_ms"] / two["step_ms"] for one, two in zip(rows[1], rows[2], strict=True)]
    figures = report(
        options,
        speed_up=round(statistics.median(ratios), 3),
        speed_ups=[round(ratio, 3) for ratio in ratios],
        **{name: {count: median(rows[count], name) for count in rows} for name in rows[1][0]},
        gradient_mb=round(4e-6 * sum(p.numel() for p in network(options, OLD + NEW).parameters()), 2),
    )
    print(json.dumps(figures, indent=1))


def run(count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *sys.argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def median(rows: list[dict[str, float]], name: str) -> float:
    return round(statistics.median(row[name] for row in rows), 3)


def measure(options) -> None:
    """What one process of a run does; the first prints the milliseconds."""
    torch.set_num_threads(1)
    hardware.keep_freed_memory()
    bare_epoch(options)  # warms up
    distributed.join(torch.device("cpu"))
    gradients = torch.zeros(sum(p.numel() for p in network(options, OLD + NEW).parameters()))
    all_reduce = timed(lambda: distributed.summed(gradients))
    agreement = timed(lambda: distributed.largest(0))
    step = 1e3 * scripts_epoch(options) / options.steps
    row = {"step_ms": step, "all_reduce_ms": all_reduce, "agreement_ms": agreement}
    if not distributed.rank():
        print(json.dumps(row))


def timed(act) -> float:
    """Milliseconds, the median of 50 calls."""
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main()
