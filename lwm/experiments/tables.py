"""The CSVs of results/, and the tables made of them: means with their spread, and differences in pairs by seed."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import re
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lwm.experiments.intervals import Interval, bootstrapped, interval
from lwm.experiments.protocols import REFERENCES, Protocol
from lwm.runtime.lock import held
from lwm.runtime.settings import READOUTS

ROOT = Path(__file__).resolve().parents[2]
NOT_THERE = "–"  # noqa: RUF001
COLUMNS = {
    "average": "average of the steps",
    "accuracy": "all",
    "accuracy_old": "old",
    "accuracy_new": "new",
    "task_aware": "task-aware",
    "forgetting": "forgetting",
}


def heads_of(*heads: str) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]


def beside(path: Path, name: str) -> Path:
    """What belongs to a CSV: ``name`` for accuracy.csv, and for another one ``name`` behind its own."""
    return path.with_name(name if path.stem == "accuracy" else f"{path.stem}_{name}")


def table_path(path: Path) -> Path:
    return beside(path, "table.md")


def attention_path(path: Path) -> Path:
    return beside(path, "attention.csv")


def variants_of(protocol: Protocol, path: Path) -> dict[str, str]:
    return protocol.ablation if path.stem == "ablation" else protocol.methods


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Put the rows of one method, seed and step in their place, replacing earlier ones of that step."""
    key = ("method", "seed", "step")
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.with_suffix(".lock"), str(path), wait=True):
        others = [row for row in read_rows(path) if any(row[name] != str(rows[0][name]) for name in key)]
        _write(path, others, rows)


def _write(path: Path, others: list[dict], rows: list[dict]) -> None:
    rounded = [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted([*others, *rounded], key=lambda r: (r["method"], int(r["seed"]), int(r["step"]))))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue())
    temporary.replace(path)


def command_of(script: str, options: argparse.Namespace, flags: str) -> list[str]:
    """The call of a script for a protocol with those of ``flags`` that are set; a folder goes by its name alone."""
    words = [script, options.protocol]
    for name in flags.split():
        value = getattr(options, name)
        if value:
            value = Path(value).name if name == "data_dir" else value
            words += ["--" + name.replace("_", "-"), *([] if value is True else [value])]
    return words


def record_call(path: Path, command: Sequence[str], threads: int) -> None:
    """Add to ``path`` by which command, on what and from which commit rows were made, unless it has this already."""
    from lwm.runtime.hardware import machine

    commit = ""  # of an unpacked archive, or without git
    with contextlib.suppress(FileNotFoundError):
        said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = said.stdout.strip()
    this = {"command": f"python3 {shlex.join(command)}", "commit": commit, **machine(threads)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.with_suffix(".lock"), str(path), wait=True):
        calls = recorded_calls(path)
        if this not in calls:
            path.write_text(json.dumps([*calls, this], indent=1) + "\n")


def recorded_calls(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def table_of(protocol: Protocol, path: Path) -> str:
    """Mean and standard deviation over the seeds, in percent, after the last step; a line a method."""
    rows = read_rows(path)
    columns = [name for name in COLUMNS if name != "average" or len(protocol.groups) > 2]
    heads = ["method", *(COLUMNS[name] for name in columns), "seeds"]
    lines = [f"{protocol.about}.", "", *heads_of(*heads)]
    for name in variants_of(protocol, path):
        values = per_seed(rows, name, len(protocol.groups) - 1)
        if values:
            cells = [mean_and_spread([row[column] for row in values]) for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(values)} |")
    return "\n".join([*lines, *_differences(protocol, path, rows, columns)]) + "\n"


def _differences(protocol: Protocol, path: Path, rows: list[dict], columns: list[str]) -> list[str]:
    """Lines for what is compared with something else on the same seeds, three at least."""
    lines = []
    for name in variants_of(protocol, path):
        ones, others = (
            {row["seed"]: row for row in per_seed(rows, each, len(protocol.groups) - 1)}
            for each in (name, REFERENCES.get(name))
        )
        seeds = [seed for seed in ones if seed in others]
        if len(seeds) >= 3:
            pairs = [[(ones[seed][column], others[seed][column]) for seed in seeds] for column in columns]
            cells = [paired(each) for each in pairs]
            lines.append(f"| {name} − {REFERENCES[name]} | {' | '.join(cells)} | {len(seeds)} |")  # noqa: RUF001
            cells = [paired(each, bootstrapped).partition(" ")[2] or NOT_THERE for each in pairs]
            lines.append(f"| by bootstrap | {' | '.join(cells)} | |")
    if lines:
        heads = ["difference", *(COLUMNS[name] for name in columns), "seeds"]
        return [
            "",
            "In pairs by seed, with the 95 % interval of the mean by Student's t; below it by bootstrap, too narrow "
            "for few seeds:",
            "",
            *heads_of(*heads),
            *lines,
        ]
    return []


def paired(pairs: Sequence[tuple[float | None, float | None]], within: Interval = interval) -> str:
    """Mean of the differences with its 95 % interval."""
    differences = [one - other for one, other in pairs if one is not None and other is not None]
    if len(differences) < len(pairs):
        return NOT_THERE
    low, high = within(differences)
    return f"{statistics.mean(differences):+.1f} ({low:+.1f} to {high:+.1f})"


def per_seed(rows: list[dict], name: str | None, last: int) -> list[dict]:
    """For each seed that has finished: its last row in numbers, None where a cell is empty, with the average accuracy
    over all steps, the first one included.
    """
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows if row["method"] == name):
        own = {int(row["step"]): row for row in rows if (row["method"], row["seed"]) == (name, seed)}
        if last in own:
            numbers = {key: float(own[last][key]) if own[last][key] else None for key in COLUMNS if key != "average"}
            steps = [float(row["accuracy"]) for row in own.values()]
            found.append({"seed": seed, "average": statistics.mean(steps) if len(own) == last + 1 else None, **numbers})
    return found


def _of_seeds(rows: list[dict], name: str, column: str) -> list[list[dict]]:
    """For each seed the rows of a method that have something in ``column``."""
    seeds: dict[str, list[dict]] = {}
    for row in rows:
        if row["method"] == name and row.get(column):
            seeds.setdefault(row["seed"], []).append(row)
    return list(seeds.values())


def seed_means(rows: list[dict], name: str, column: str) -> list[float]:
    """For each seed the mean of ``column`` over the rows of a method that have something there."""
    return [statistics.mean(float(row[column]) for row in own) for own in _of_seeds(rows, name, column)]


def by_step(rows: list[dict], name: str, column: str) -> dict[int, list[float]]:
    """Step -> the values of the seeds; of rows for classes, the mean over a seed's classes is its value."""
    found: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        if row["method"] == name and row[column]:
            found.setdefault(int(row["step"]), {}).setdefault(row["seed"], []).append(float(row[column]))
    return {step: [statistics.mean(values) for values in seeds.values()] for step, seeds in sorted(found.items())}


def points_of(protocol: Protocol, path: Path) -> dict[str, list[tuple[str, list[float], list[float]]]]:
    """Curve -> points (label, accuracies of the old classes, of the new ones), after the last step, over the seeds.

    Variants that differ in gamma, beta or learning rate alone are the points of one curve, each method of the protocol
    is one of its own. All points of a curve are of the same seeds, those that all of them have, which its name says; a
    curve without one is left out.
    """
    rows, last = read_rows(path), len(protocol.groups) - 1
    found: dict[str, dict[str, dict[str, dict]]] = {}  # curve -> weight -> seed -> row
    for name in variants_of(protocol, path):
        values = per_seed(rows, name, last)
        varied = re.fullmatch(r"([\w-]+) (gamma|beta|lr)=(\S+)", name)
        if values and values[0]["accuracy_old"] is not None and (varied or name in protocol.methods):
            form = "lwm, " if varied and varied[2] == "gamma" else ""
            key, weight = (f"{form}{varied[1]}, by {varied[2]}", varied[3]) if varied else (name, "")
            found.setdefault(key, {})[weight] = {row["seed"]: row for row in values}
    curves = {}
    for key, points in found.items():
        common = [seed for seed in next(iter(points.values())) if all(seed in each for each in points.values())]
        if common:
            curves[f"{key}, seeds {','.join(common)}"] = [
                (weight, [each[s]["accuracy_old"] for s in common], [each[s]["accuracy_new"] for s in common])
                for weight, each in points.items()
            ]
    return curves


def fingerprint(*paths: Path) -> str:
    """SHA-256 of CSVs, where they exist: a figure carries that of what it was drawn from."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths if path.exists())).hexdigest()


def mean_and_spread(values: Sequence[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return NOT_THERE
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


# Read-outs --------------------------------------------------------------------------------------------------------


def readouts_table(protocol: Protocol, path: Path) -> str:
    """Accuracy over all classes with each read-out, and what it has over the head in pairs by seed; "" without any."""
    rows, last = read_rows(path), len(protocol.groups) - 1
    measures = {"average of the steps": slice(None)} if last > 1 else {}
    measures["after the last step"] = slice(-1, None)
    lines = []
    for name in variants_of(protocol, path):
        whole = [own for own in _of_seeds(rows, name, READOUTS[-1]) if len(own) == last + 1]
        for readout in READOUTS if whole else ():
            cells = []
            for steps in measures.values():
                ours, heads = (_means(whole, steps, column) for column in (readout, "head"))
                cells.append(mean_and_spread(ours))
                compared = readout != "head" and len(whole) > 2
                cells.append(paired(list(zip(ours, heads, strict=True))) if compared else NOT_THERE)
            lines.append(f"| {name} | {readout} | {' | '.join(cells)} | {len(whole)} |")
    if not lines:
        return ""
    columns = ["method", "read-out", *(name for each in measures for name in (each, "over the head")), "seeds"]
    lines = [*heads_of(*columns), *lines, *_statistics_off(protocol, path)]
    return "\n".join(lines) + "\n"


def _statistics_off(protocol: Protocol, path: Path) -> list[str]:
    """Lines on how far means and covariances of old classes are off, over all steps, as evaluation.py measures it."""
    rows = read_rows(attention_path(path))
    lines = []
    for measure in ("mean", "covariance"):
        columns = [f"{measure}_off_{name}" for name in ("carried", "left")]
        found = []
        for name in variants_of(protocol, path):
            carried, left = (seed_means(rows, name, column) for column in columns)
            if carried:
                found.append(
                    f"| {name} | {mean_and_spread(carried, 2)} | {mean_and_spread(left, 2)} | {len(carried)} |"
                )
        if found:
            heads = f"| method | {measure}s of old classes are off, carried along | left as they were | seeds |"
            lines += ["", heads, "|---|---|---|---|", *found]
    return lines


def _means(seeds: list[list[dict]], steps: slice, readout: str) -> list[float]:
    column = "accuracy" if readout == "head" else readout
    return [statistics.mean(float(row[column]) for row in own[steps]) for own in seeds]


# Attention --------------------------------------------------------------------------------------------------------


def attention_table(protocol: Protocol, path: Path) -> str:
    """How far the maps of the old classes move in a step, and whether the classes whose maps move are those forgotten.

    Mean and standard deviation over the seeds of the mean over all steps and old classes; a class without a map on any
    image, the teacher's or the student's, has no distance and no overlap. Spearman's correlation is that of the
    distance and the accuracy lost, with the 95 % interval of its mean over the seeds: within a seed over all its steps
    and classes, and once more where a class is ranked among those alone that came together with it, in one step.
    """
    rows = read_rows(attention_path(path))
    heads = ["method", "distance of L_AD", "overlap of the top fifth, %", "no map left, % of the classes"]
    heads += ["accuracy lost, points", "Spearman", "of classes of one age", "seeds"]
    lines = heads_of(*heads)
    for name in variants_of(protocol, path):
        seeds = _of_seeds(rows, name, "accuracy_before")
        if seeds:
            silent = [100 * statistics.mean(not row["distance"] for row in own) for own in seeds]
            cells = [_spread_of_means(seeds, 0, 3), _spread_of_means(seeds, 1), mean_and_spread(silent)]
            cells.append(_spread_of_means(seeds, 2))
            cells += [_correlation(seeds, together) for together in (False, True)]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def moved(row: dict) -> tuple[float | None, float | None, float]:
    """Distance, overlap and accuracy lost of a class in a step."""
    distance, overlap = (float(row[column]) if row[column] else None for column in ("distance", "overlap"))
    return distance, overlap, float(row["accuracy_before"]) - float(row["accuracy"])


def _spread_of_means(seeds: list[list[dict]], column: int, digits: int = 1) -> str:
    known = [[value for row in own if (value := moved(row)[column]) is not None] for own in seeds]
    return mean_and_spread([statistics.mean(values) if values else None for values in known], digits)


def _correlation(seeds: list[list[dict]], together: bool) -> str:
    """Of distance and accuracy lost by rank, among all classes and steps of a seed or among classes of one age."""
    import numpy as np
    from scipy.stats import rankdata

    found = []
    for own in seeds:
        since: dict[str, str] = {}  # class -> the first step that finds it old; rows are in the order of the steps
        blocks: dict[tuple, list[tuple]] = {}
        for row in own:
            age = (row["step"], since.setdefault(row["class"], row["step"])) if together else ()
            if row["distance"]:
                blocks.setdefault(age, []).append(moved(row)[::2])
        ranks = [rankdata(block, axis=0) - (len(block) + 1) / 2 for block in blocks.values()]
        distance, lost = np.concatenate(ranks).T if ranks else np.zeros((2, 1))
        if not distance.any() or not lost.any():
            return NOT_THERE
        found.append(float(distance @ lost / np.linalg.norm(distance) / np.linalg.norm(lost)))
    if len(found) < 3:
        return f"{statistics.mean(found):+.2f}"
    low, high = interval(found)
    return f"{statistics.mean(found):+.2f} ({low:+.2f} to {high:+.2f})"
