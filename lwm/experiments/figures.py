"""The figures of a study, each drawn from its CSV and carrying its fingerprint.

Of protocols: mean over the seeds with its 95 % interval, told apart by marker and line and not by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lwm.experiments.protocols import Protocol
from lwm.experiments.tables import fingerprint, interval, read_rows
from lwm.reporting.plots import plt, write

STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:")


def draw(protocol: Protocol, results: Path) -> None:
    """Accuracy over the tasks, and how far the maps of the old classes move."""
    if len(protocol.groups) > 2:
        labels = {"accuracy": "accuracy over all classes so far, %", "task_aware": "told the task (task-aware), %"}
        over_tasks(results / "accuracy.csv", labels, list(protocol.methods), results / "tasks.png")
    labels = {"distance": "distance of the maps (L_AD)", "overlap": "overlap of the strongest fifth, %"}
    over_tasks(results / "attention.csv", labels, list(protocol.methods), results / "attention.png")


def over_tasks(table: Path, labels: Mapping[str, str], methods: list[str], path: Path) -> None:
    """A panel for each column of ``labels``, with a line for each method; values of classes are averaged in a seed."""
    rows = read_rows(table)
    if rows.empty:
        return
    figure, grid = plt.subplots(1, len(labels), figsize=(5.2 * len(labels), 3.8), squeeze=False, layout="constrained")
    for axes, (column, label) in zip(grid[0], labels.items(), strict=True):
        there = rows[rows["method"].isin(methods)].dropna(subset=[column])
        for number, name in enumerate(methods):
            seeds = there[there["method"] == name].groupby(["task", "seed"])[column].mean()
            bounds = {task: interval(values.tolist()) for task, values in seeds.groupby("task")}
            if not bounds:
                continue
            axes.errorbar(
                [task + 0.05 * (number - len(methods) / 2) for task in bounds],
                [(low + high) / 2 for low, high in bounds.values()],
                [(high - low) / 2 for low, high in bounds.values()],
                fmt=STYLES[number % len(STYLES)],
                color=f"C{number}",  # a method keeps its number in every panel, and with it style and colour
                capsize=2,
                markersize=5,
                linewidth=1.2,
                label=name,
            )
        tasks = sorted(there["task"].unique())
        axes.set(xlabel="task (0: the first classes)", ylabel=label, xticks=tasks)
        axes.margins(x=0.05 if len(tasks) > 1 else 1)
        axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=8)
    write(figure, path, fingerprint(table))
