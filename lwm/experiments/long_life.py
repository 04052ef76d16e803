"""One new class a task, twenty times: what grows, and what is lost. Or two hundred classes at once.

    python3 -m lwm.experiments.long_life mobilenet --data-dir photos --first mobilenet_v2-b0353104.pth --old names.txt
    python3 -m lwm.experiments.long_life cifar --data-dir cifar100 --old 80 --methods closed-form,lwm
    python3 -m lwm.experiments.long_life at-once --data-dir mixed --first ... --old names.txt --tasks 1

``--data-dir`` has train/<class>/ and test/<class>/. The teacher is a network that is there already (``--first``), whose
classes ``--old`` names, or is trained on the first ``--old`` classes of the field's order (seed 1993). All other
classes come in ``--tasks`` tasks. results/long-life/ gets a row a task: seconds of a core and peak memory of the
script, megabytes of its checkpoint, and accuracies; a table and a figure are made of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from lwm.experiments import cells, tables
from lwm.experiments.figures import STYLES
from lwm.reporting.plots import plt, write
from lwm.runtime import hardware
from lwm.runtime.checkpoint import load
from lwm.runtime.errors import RunError, one_line_errors
from lwm.runtime.settings import OneLineParser

PANELS = {
    "accuracy": "all classes, %",
    "accuracy_first": "the teacher's classes, %",
    "seconds": "seconds of a core",
    "memory": "peak memory, MB",
    "size": "checkpoint, MB",
}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", help="of the run, in the table")
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--old", required=True, help="how many classes, or with --first the file that names them")
    parser.add_argument("--first", type=Path, help="weights of a MobileNetV2")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--methods", default="closed-form")
    parser.add_argument("--flags", default="", help="further flags of the teacher's script")
    parser.add_argument("--work-dir", default=Path("runs/long-life"), type=Path)
    options = parser.parse_args(argv)
    work, data = (options.work_dir / options.name).resolve(), ["--dataset", "folder"]
    data += ["--data-dir", str(options.data_dir.resolve())]
    names = sorted(path.name for path in (options.data_dir / "train").iterdir())
    if options.first:
        taken = ["--model", "mobilenet_v2", "--weights", str(options.first), "--old-classes-file", options.old]
        flags, new = [*data, *taken, "--epochs", "0", "--image-size", "224"], names
    else:
        order = [names[index] for index in np.random.RandomState(1993).permutation(len(names))]
        old, new = order[: int(options.old)], order[int(options.old) :]
        flags = [*data, "--old-classes", ",".join(old)]
    first = cells.run_script("train_teacher_model.py", work / "teacher", [*flags, *options.flags.split()], threads=1)
    path = tables.ROOT / "results" / "long-life" / "accuracy.csv"
    for method in options.methods.split(","):
        teacher = first
        for task, classes in enumerate(np.array_split(new, options.tasks), 1):
            folder = work / method / str(task)
            flags = ["--teacher", str(teacher), "--method", method, "--new-classes", ",".join(classes), *data]
            teacher = folder / "student_model.pth"
            if not (folder / "student_report.html").exists():  # the last that a run leaves
                seconds, memory = measured([*flags, "--output-dir", str(folder), "--overwrite"])
                answers = load(teacher)["tasks"][-1]["answers"]
                row = {"accuracy": answers["accuracy"], "accuracy_first": answers["groups"][0], "seconds": seconds}
                row |= {"memory": memory, "size": round(teacher.stat().st_size / 1e6, 1)}
                key = {"protocol": "long-life", "method": f"{options.name} {method}", "seed": 0, "task": task}
                tables.write_rows(path, [{**key, **row, **hardware.machine(1)}])
    rows = tables.read_rows(path)
    tables.publish({path.with_name("table.md"): table_of(rows)})
    draw(rows, path)


def measured(flags: list[str]) -> tuple[float, float]:
    """Seconds of a core and peak memory in MB of a run of the student's script. Raises RunError if it fails."""
    command = [sys.executable, str(tables.ROOT / "incremental_learning_system.py"), *flags]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as child:
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RunError(f"incremental_learning_system.py {' '.join(flags)} failed")
    return round(used.ru_utime + used.ru_stime, 1), round(used.ru_maxrss / 1e3)


def table_of(rows: pd.DataFrame) -> str:
    """The first task, the tenth and the last of each run."""
    lines = []
    for name, own in rows.groupby("method", sort=False):
        own = own.sort_values("task")
        for row in own[own["task"].isin({1, 10, own["task"].max()})].to_dict("records"):
            numbers = {label: f"{float(row[column]):.4g}" for column, label in PANELS.items()}
            lines.append({"run": name, "task": row["task"], **numbers})
    return tables.markdown(lines)


def draw(rows: pd.DataFrame, table: Path) -> None:
    """A panel for each measure, over the tasks; beside the ``table`` that the rows are from."""
    figure, grid = plt.subplots(1, len(PANELS), figsize=(3.2 * len(PANELS), 3.2), layout="constrained")
    for axes, (column, label) in zip(grid, PANELS.items(), strict=True):
        several = rows[rows["task"] > 1]["method"].unique()
        for name, style in zip(several, STYLES, strict=False):
            own = rows[rows["method"] == name].sort_values("task")
            axes.plot(own["task"], own[column], style, markersize=4, label=name)
        axes.set(xlabel="task", ylabel=label, ylim=(0, 1.05 * axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    write(figure, table.with_name("life.png"), tables.fingerprint(table))


if __name__ == "__main__":
    sys.exit(main())
