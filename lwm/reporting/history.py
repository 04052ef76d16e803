"""The tasks of several models side by side, as a table and as a page; history.html.jinja is its template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lwm.reporting import plots, report
from lwm.runtime.errors import listed
from lwm.runtime.files import write_atomically

COLUMNS = ("run", "task", "classes", "method", "images", "time", "answers", "all, %", "kept, %", "by task, %")


class Run(NamedTuple):
    """A model's file and what its checkpoint says of the tasks."""

    name: str
    tasks: list[dict[str, Any]]


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One for each task of each run, as plain numbers and texts; None for what was not judged or is not known."""
    found = []
    for run in runs:
        for number, task in enumerate(run.tasks):
            answers = task["answers"] or dict.fromkeys(("classifier", "accuracy", "kept")) | {"groups": []}
            found.append(
                {
                    "run": run.name,
                    "task": number,
                    "classes": task["classes"],
                    "more_images_of": task["again"],
                    "method": task["method"] if task["data_dir"] or task["epochs"] else "taken as it is",
                    "images": task["images"],
                    "seconds": task["seconds"],
                    "classifier": answers["classifier"],
                    "accuracy": answers["accuracy"],
                    "accuracy_by_task": answers["groups"],
                    "estimated_kept": answers["kept"],
                }
            )
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """A row as it is shown, a text for each of ``COLUMNS``."""
    again = f"more of {listed(row['more_images_of'], 3)}" if row["more_images_of"] else ""
    seconds, by_task = row["seconds"], [_percent(each) for each in row["accuracy_by_task"]]
    return [
        row["run"],
        str(row["task"]),
        ", ".join(part for part in (listed(row["classes"], 3), again) if part),
        row["method"],
        str(row["images"] or "-"),
        "-" if not seconds else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min",
        row["classifier"] or "-",
        _percent(row["accuracy"]),
        _percent(row["estimated_kept"]),
        " ".join(by_task) or "-",
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The ``rows`` that were found, as text."""
    lines = [list(COLUMNS), *map(cells, found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write_page(path: Path, found: Sequence[dict[str, Any]]) -> None:
    judged = any(row["accuracy"] is not None for row in found)
    figure = report.uri(plots.svg(plots.accuracy_over_tasks, _lines(found))) if judged else None
    template = report.environment().get_template("history.html.jinja")
    write_atomically(path, template.render(columns=COLUMNS, rows=map(cells, found), figure=figure).encode())


def _lines(found: Sequence[dict[str, Any]]) -> list[tuple[str, list[float | None], list[float | None]]]:
    """Of each run the accuracies over tasks, of all classes and of the first task's."""
    lines: list[tuple[str, list[float | None], list[float | None]]] = []
    for row in found:
        if row["task"] == 0:
            lines.append((row["run"], [], []))
        _, every, first = lines[-1]
        every.append(row["accuracy"])
        first.append(row["accuracy_by_task"][0] if row["accuracy_by_task"] else None)
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
