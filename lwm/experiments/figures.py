"""The figures of a study, each drawn from its CSVs and carrying their fingerprint.

Of protocols: mean over the seeds with its 95 % interval, told apart by marker and line and not by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from lwm.experiments.intervals import interval
from lwm.experiments.protocols import Protocol
from lwm.experiments.tables import fingerprint, read_rows
from lwm.reporting.plots import plt, write

STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:")


def draw(protocol: Protocol, results: Path) -> None:
    """Accuracy over the tasks, and how far the maps of the old classes move."""
    accuracy, attention = results / "accuracy.csv", results / "attention.csv"
    rows, classes = read_rows(accuracy), read_rows(attention)
    if len(protocol.groups) > 2 and len(rows):
        labels = {"accuracy": "accuracy over all classes so far, %", "task_aware": "told the task (task-aware), %"}
        over_tasks(panels(rows, protocol, labels), results / "tasks.png", fingerprint(accuracy))
    if len(classes):
        labels = {"distance": "distance of the maps (L_AD)", "overlap": "overlap of the strongest fifth, %"}
        over_tasks(panels(classes, protocol, labels), results / "attention.png", fingerprint(attention))


def panels(rows: pd.DataFrame, protocol: Protocol, labels: Mapping[str, str]) -> dict[str, dict]:
    """Label -> method -> task -> the values of the seeds, those of classes averaged within a seed."""
    return {
        label: {
            name: {
                task: seeds.groupby("seed")[column].mean().tolist()
                for task, seeds in rows[rows["method"] == name].dropna(subset=[column]).groupby("task")
            }
            for name in protocol.methods
        }
        for column, label in labels.items()
    }


def over_tasks(panels: dict[str, dict[str, dict[int, list[float]]]], path: Path, drawn_from: str) -> None:
    """A panel for each label of a vertical axis: for each method, task -> the values of the seeds."""
    figure, grid = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axes, (label, methods) in zip(grid[0], panels.items(), strict=True):
        for number, (name, by_task) in enumerate(methods.items()):
            if not by_task:
                continue
            places = [task + 0.05 * (number - len(methods) / 2) for task in by_task]
            bounds = [interval(values) for values in by_task.values()]
            axes.errorbar(
                places,
                [(low + high) / 2 for low, high in bounds],
                [(high - low) / 2 for low, high in bounds],
                fmt=STYLES[number % len(STYLES)],
                color=f"C{number}",  # a method keeps its number in every panel, and with it style and colour
                capsize=2,
                markersize=5,
                linewidth=1.2,
                label=name,
            )
        tasks = sorted({task for by_task in methods.values() for task in by_task})
        axes.set(xlabel="task (0: the first classes)", ylabel=label, xticks=tasks)
        axes.margins(x=0.05 if len(tasks) > 1 else 1)
        axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=8)
    write(figure, path, drawn_from)
