"""The figures of a study, each drawn from its CSVs and carrying their fingerprint.

Of protocols: mean over the seeds with its 95 % interval, told apart by marker and line and not by colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import patheffects

from lwm.experiments.intervals import interval
from lwm.experiments.protocols import Protocol
from lwm.experiments.tables import beside, fingerprint, finished, read_rows, with_loss
from lwm.reporting.plots import plt, write

FEWEST = 5  # classes in a mean with an interval
STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:")
Curves = dict[str, list[tuple[str, list[float], list[float]]]]


def draw(protocol: Protocol, results: Path) -> None:
    """Accuracy and attention over the tasks, and the plane of old against new accuracy."""
    accuracy, ablation = results / "accuracy.csv", results / "ablation.csv"
    rows, classes = read_rows(accuracy), read_rows(beside(accuracy, "attention.csv"))
    if len(protocol.groups) > 2 and len(rows):
        labels = {"accuracy": "accuracy over all classes so far, %", "task_aware": "told the task (task-aware), %"}
        over_tasks(panels(rows, protocol, labels), results / "tasks.png", fingerprint(accuracy))
    if len(classes):
        labels = {"distance": "distance of the maps (L_AD)", "overlap": "overlap of the strongest fifth, %"}
        seen = with_loss(classes).dropna(subset=["distance"])
        lost = {name: seen[seen["method"] == name][["distance", "lost"]].to_numpy() for name in protocol.methods}
        drawn_from = fingerprint(beside(accuracy, "attention.csv"))
        over_tasks(panels(classes, protocol, labels), results / "attention.png", drawn_from, lost)
    tasks = len(protocol.groups)
    curves = points_of(read_rows(ablation), protocol.ablation, tasks) | points_of(rows, protocol.methods, tasks)
    if curves:
        plane(curves, results / "plane.png", fingerprint(ablation, accuracy))


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


def points_of(rows: pd.DataFrame, variants: Mapping[str, str], tasks: int) -> Curves:
    """Curve -> points (label, accuracies of the old classes, of the new ones), after the last task, over the seeds.

    Variants that differ in gamma, beta or learning rate alone are the points of one curve, each method of the protocol
    is one of its own. All points of a curve are of the same seeds, those that all of them have, which its name says; a
    curve without one is left out.
    """
    points: dict[str, dict[str, pd.DataFrame]] = {}
    for name in variants if len(rows) else ():
        seeds = finished(rows, name, tasks).dropna(subset=["accuracy_old"])
        varied = re.fullmatch(r"([\w-]+) (gamma|beta|lr)=(\S+)", name)
        if len(seeds) and (varied or " " not in name):
            form = "lwm, " if varied and varied[2] == "gamma" else ""
            key, weight = (f"{form}{varied[1]}, by {varied[2]}", varied[3]) if varied else (name, "")
            points.setdefault(key, {})[weight] = seeds
    curves = {}
    for key, of_weights in points.items():
        common = sorted(set.intersection(*(set(seeds.index) for seeds in of_weights.values())))
        if common:
            curves[f"{key}, seeds {','.join(map(str, common))}"] = [
                (weight, *(seeds.loc[common, f"accuracy_{group}"].tolist() for group in ("old", "new")))
                for weight, seeds in of_weights.items()
            ]
    return curves


def _mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half its 95 % interval."""
    low, high = interval(values)
    return (low + high) / 2, (high - low) / 2


def _errorbar(
    axes: plt.Axes, number: int, label: str, places: Sequence[float], values: Sequence[Any], **across: Any
) -> list[float]:
    """The means that are drawn; a method keeps its ``number`` in every panel, and with it style and colour."""
    means, halves = zip(*(_mean_and_half(each) for each in values), strict=True)
    look: dict[str, Any] = {
        "fmt": STYLES[number % len(STYLES)],
        "color": f"C{number}",
        "capsize": 2,
        "markersize": 5,
        "linewidth": 1.2,
    }
    axes.errorbar(places, means, halves, label=label, **look, **across)
    return list(means)


def over_tasks(
    panels: dict[str, dict[str, dict[int, list[float]]]],
    path: Path,
    drawn_from: str,
    lost: Mapping[str, Any] | None = None,
) -> None:
    """A panel for each label of a vertical axis: for each method, task -> the values of the seeds.

    ``lost`` adds one: for each method, classes after a task as (distance of maps, accuracy lost), fifths by distance
    of at least FEWEST each, if any method has so many.
    """
    enough = any(len(pairs) >= 5 * FEWEST for pairs in (lost or {}).values())
    count = len(panels) + enough
    figure, grid = plt.subplots(1, count, figsize=(5.2 * count, 3.8), squeeze=False, layout="constrained")
    for axes, (label, methods) in zip(grid[0], panels.items(), strict=False):
        for number, (name, by_task) in enumerate(methods.items()):
            places = [task + 0.05 * (number - len(methods) / 2) for task in by_task]
            if places:
                _errorbar(axes, number, name, places, list(by_task.values()))
        tasks = sorted({task for by_task in methods.values() for task in by_task})
        axes.set(xlabel="task (0: the first classes)", ylabel=label, xticks=tasks)
        axes.margins(x=0.05 if len(tasks) > 1 else 1)
    for number, (name, pairs) in enumerate((lost or {}).items()):
        fifths = np.array_split(np.array(sorted(map(tuple, pairs))), 5) if len(pairs) >= 5 * FEWEST else []
        places = [part[:, 0].mean() for part in fifths]
        if len(set(places)) > 1:  # maps that never move are not shown
            _errorbar(grid[0][-1], number, name, places, [part[:, 1] for part in fifths])
    if enough:
        grid[0][-1].set(xlabel="distance of the maps (L_AD), fifths", ylabel="accuracy of the class lost, points")
    for axes in grid[0]:
        axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=8)
    write(figure, path, drawn_from)


def plane(curves: Curves, path: Path, drawn_from: str) -> None:
    """Old against new accuracy after the last task: a curve for each key, through (label, old, new) over the seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 5))
    for number, (name, points) in enumerate(curves.items()):
        new, across = zip(*(_mean_and_half(values) for _, _, values in points), strict=True)
        old = _errorbar(axes, number, name, new, [values for _, values, _ in points], xerr=across, elinewidth=0.5)
        order = sorted(range(len(points)), key=new.__getitem__)
        for rank, point in enumerate(order):  # neighbours' labels on either side, that they do not cover each other
            axes.annotate(
                points[point][0],
                (new[point], old[point]),
                xytext=(3, (4, -10)[rank % 2]),
                textcoords="offset points",
                fontsize=8,
                color=f"C{number}",
                path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
            )
    axes.set(xlabel="accuracy of the newest classes, no hint, %", ylabel="accuracy of all older classes, no hint, %")
    # Intervals of few seeds reach beyond what an accuracy can be.
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(max(left, -3), min(right, 103)), ylim=(max(bottom, -3), min(top, 103)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    write(figure, path, drawn_from)


def growth(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """How a step's cost grows: the rows of benchmarks/growth.py by "classes", "size" and "tasks"."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for place, name, key, label in ((0, "classes", "outputs", "outputs"), (1, "size", "px", "image size, px")):
        for method, shown, line in (("finetune", "fine-tuning", "o-"), ("lwm", "lwm", "s--")):
            axes[place].plot(tables[name][key], tables[name][f"{method}_ms"], line, label=shown)
        axes[place].set(xlabel=label, ylabel="ms a step", xscale="log")
        axes[place].set_xticks(tables[name][key], map(str, tables[name][key]))
        axes[place].minorticks_off()
    axes[0].set(title="128 images of 32 px", ylim=(0, 1.2 * tables["classes"]["lwm_ms"].max()))
    axes[1].set(title="32 images", yscale="log")
    tasks = tables["tasks"]
    axes[2].plot(tasks["task"], tasks["images_per_second"], "o-", label="images/s in training")
    axes[2].plot(tasks["task"], tasks["checkpoint_kb"], "s--", label="checkpoint, kB")
    axes[2].set(xlabel="task (0: the teacher's)", ylim=(0, None), title="ten tasks after the first")
    for each in axes:
        each.grid(alpha=0.3)
        each.legend(fontsize=8)
    write(figure, path)
