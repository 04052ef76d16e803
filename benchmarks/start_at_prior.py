"""What it is worth that sigmoid outputs start at their prior (models.start_at_prior) and not at one half.

    python3 benchmarks/start_at_prior.py photos32 --jobs 2

Trains the first step of photos32-search-10+10 (ten classes, judged on training images held back) both ways with three
seeds, and writes results/start-at-prior/{curves.csv,table.md,environment.json}: accuracy in percent, by epoch, which is
the column step of the CSV.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EPOCHS = (1, 2, 5, 10, 15, 20)  # shown in the table
SEEDS = (0, 1, 2)
PROTOCOL = "photos32-search-10+10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with train/<class>/ and test/<class>/")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once; the CPU cores are shared out")
    options = parser.parse_args()

    from reproduce import threads_of
    from tables import mean_and_spread, record_call, write_rows

    threads = threads_of(options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    results = ROOT / "results" / "start-at-prior"
    cases = [(options.folder, seed, start) for seed in SEEDS for start in ("prior", "half")]
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, list[list[float]]] = {"prior": [], "half": []}
    # A process for each, since "half" changes the module that it runs with.
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=spawn, max_tasks_per_child=1) as workers:
        for (_, seed, start), accuracies in zip(cases, workers.map(trained, *zip(*cases, strict=True)), strict=True):
            found[start].append(accuracies)
            for epoch, accuracy in enumerate(accuracies, 1):
                key = {"protocol": PROTOCOL, "method": start, "seed": seed, "step": epoch}
                write_rows(results / "curves.csv", [{**key, "accuracy": accuracy}])
    lines = [
        f"| outputs start at | {' | '.join(f'epoch {epoch}' for epoch in EPOCHS)} |",
        "|---" * (1 + len(EPOCHS)) + "|",
    ]
    for start, name in (("prior", "1 / classes"), ("half", "one half")):
        cells = [mean_and_spread([accuracies[epoch - 1] for accuracies in found[start]]) for epoch in EPOCHS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (results / "table.md").write_text("\n".join(lines) + "\n")
    command = ["benchmarks/start_at_prior.py", Path(options.folder).name, "--jobs", str(options.jobs)]
    record_call(results / "environment.json", command, threads)
    print("\n".join(lines))


def trained(folder: str, seed: int, start: str) -> list[float]:
    """Accuracy after each epoch on what is held back, in percent."""
    import models
    import train_teacher_model
    from checkpoint import load
    from protocols import PROTOCOLS, class_order, groups_of

    protocol = PROTOCOLS[PROTOCOL]
    if start == "half":
        models.start_at_prior = lambda model, first: None
    classes = groups_of(protocol, class_order(protocol, folder)[protocol.pool], seed)[0]
    with tempfile.TemporaryDirectory() as output:
        flags = ["--dataset", "folder", "--data-dir", folder, "--old-classes", ",".join(classes)]
        flags += ["--seed", str(seed), "--save-interval", "1", "--output-dir", output]
        if train_teacher_model.main([*protocol.flags.split(), *flags]):
            raise SystemExit(1)
        return [row["test_accuracy"] for row in load(Path(output) / "teacher_model.pth")["training"]["log"]]


if __name__ == "__main__":
    main()
