"""The CSVs of results/ and the tables made of them: means with their spread, and differences in pairs by seed."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import shlex
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from lwm.experiments.intervals import interval
from lwm.runtime.errors import InputError
from lwm.runtime.files import make_folder, write_atomically
from lwm.runtime.hardware import machine

ROOT = Path(__file__).resolve().parents[2]
NOT_THERE = "–"  # noqa: RUF001
KEY = ["method", "seed", "task"]
TEXT = ("protocol", "method", "class", "classifier", "option", "loss_form", "batch_norm", "precision")
MEASURES = {
    "average": "average incremental",
    "accuracy": "all",
    "accuracy_old": "old",
    "accuracy_new": "new",
    "task_aware": "task-aware",
    "forgetting": "forgetting",
}
CLASSIFIERS = {"head": "accuracy", "ncm": "ncm", "lda": "lda", "aligned": "aligned"}  # name -> column
# A table of results/ in a document, between two markers.
BLOCK = re.compile(r"(<!-- (results/\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


# Files ------------------------------------------------------------------------------------------------------------


def beside(path: Path, name: str) -> Path:
    """What belongs to a CSV: ``name`` for accuracy.csv, and for another one ``name`` behind its own."""
    return path.with_name(name if path.stem == "accuracy" else f"{path.stem}_{name}")


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a CSV, NaN for an empty cell; without the file there are none."""
    if not path.exists():
        return pd.DataFrame()
    return pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=[""])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the rows of one method, seed and task in their place, replacing earlier ones. Numbers there stay as typed."""
    new = pd.DataFrame([{name: _typed(value) for name, value in row.items()} for row in rows])
    make_folder(path.parent)
    with _held(path):
        if path.exists():
            there = pd.read_csv(path, dtype=str, keep_default_na=False)
            new = pd.concat([there[(there[KEY] != new.loc[0, KEY]).any(axis=1)], new])
        new = new.sort_values(KEY, key=lambda column: column if column.name == "method" else column.astype(int))
        write_atomically(path, new.to_csv(index=False, lineterminator="\n").encode())


def _typed(value: object) -> str:
    return "" if value is None else str(round(value, 4) if isinstance(value, float) else value)


def _held(path: Path) -> FileLock:
    """Of several processes one at a time changes what lies beside ``path``."""
    return FileLock(path.with_name(".lock"))


def command_of(script: str, options: argparse.Namespace, flags: str) -> list[str]:
    """The call of a script for a protocol with those of ``flags`` that are set; a folder goes by its name alone."""
    words = [*script.split(), options.protocol]
    for name in flags.split():
        value = getattr(options, name)
        if value:
            value = Path(value).name if name == "data_dir" else value
            words += ["--" + name.replace("_", "-"), *([] if value is True else [value])]
    return words


def record_call(path: Path, command: Sequence[str], threads: int) -> None:
    """Add to ``path`` by which command, on what and from which commit rows were made, unless it has this already."""
    commit = ""  # of an unpacked archive, or without git
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip()
    this = {"command": f"python3 {shlex.join(command)}", "commit": commit, **machine(threads)}
    make_folder(path.parent)
    with _held(path):
        calls = recorded_calls(path)
        if this not in calls:
            write_atomically(path, (json.dumps([*calls, this], indent=1) + "\n").encode())


def recorded_calls(path: Path) -> list[dict[str, str]]:
    return json.loads(path.read_text()) if path.exists() else []


def fingerprint(*paths: Path) -> str:
    """SHA-256 of the CSVs that exist: a figure carries that of what it was drawn from."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths if path.exists())).hexdigest()


def publish(tables: Mapping[Path, str]) -> None:
    """Write tables, put them between their markers in README and docs, and print them."""
    for path, text in tables.items():
        write_atomically(path, text.encode())
    for document in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        text = document.read_text() if document.exists() else ""
        if filled(text) != text:
            write_atomically(document, filled(text).encode())
    for text in tables.values():  # last: who reads it may have closed the pipe
        print(text)


def filled(document: str) -> str:
    """A document with each of its marked tables as the file under results/ has it."""

    def block(found: re.Match[str]) -> str:
        path = ROOT / found[2]
        if not path.exists():
            raise InputError(
                f"a document shows {found[2]}, which is not there; run its protocol, or take the marker out"
            )
        return f"{found[1]}\n{path.read_text()}\n{found[3]}"

    return BLOCK.sub(block, document)


# Cells of a table -------------------------------------------------------------------------------------------------


def markdown(lines: Sequence[Mapping[str, object]]) -> str:
    """A table; its columns are the keys of the first line."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(line.values() for line in lines)]
    text = "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
    return text.replace(f"| {' | '.join(['---'] * len(lines[0]))} |", "|---" * len(lines[0]) + "|")


def mean_and_spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean and standard deviation over the seeds, if every seed has a value."""
    values = [float(value) for value in values]
    if not values or any(value != value for value in values):
        return NOT_THERE
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def paired(ours: pd.Series, others: pd.Series) -> str:
    """Mean of the differences by seed with its 95 % interval; both have the seeds as index."""
    differences = [float(ours[seed]) - float(others[seed]) for seed in ours.index]
    if any(value != value for value in differences):
        return NOT_THERE
    low, high = interval(differences)
    return f"{statistics.mean(differences):+.1f} ({low:+.1f} to {high:+.1f})"


def by_seed(rows: pd.DataFrame, column: str, seeds: Iterable[int] | None = None) -> pd.Series:
    """For each seed the mean of ``column`` over the rows that have something there."""
    means = rows.dropna(subset=[column]).groupby("seed")[column].agg(statistics.mean)
    return means if seeds is None else means.reindex(list(seeds))


# Tables -----------------------------------------------------------------------------------------------------------


def finished(rows: pd.DataFrame, method: str, tasks: int) -> pd.DataFrame:
    """MEASURES after the last task, a line for each seed that has finished; NaN for what is not there."""
    own = rows[rows["method"] == method]
    last = own[own["task"] == tasks - 1].set_index("seed")
    whole = own.groupby("seed").filter(lambda seed: len(seed) == tasks)
    return last.assign(average=by_seed(whole, "accuracy", last.index))[list(MEASURES)].astype(float)


def methods_tables(rows: pd.DataFrame, methods: Iterable[str], tasks: int, references: Mapping[str, str]) -> str:
    """Accuracies in percent after the last task; below, what ``references`` compares, in pairs by seed."""
    measures = {column: name for column, name in MEASURES.items() if column != "average" or tasks > 2}
    lines, differences = [], []
    for method in methods:
        ours = finished(rows, method, tasks)
        if ours.empty:
            continue
        cells = {name: mean_and_spread(ours[column]) for column, name in measures.items()}
        lines.append({"method": method, **cells, "seeds": len(ours)})
        others = finished(rows, references.get(method, ""), tasks)
        ours = ours[ours.index.isin(others.index)]
        if len(ours) >= 3:
            cells = {name: paired(ours[column], others[column]) for column, name in measures.items()}
            name = f"{method} − {references[method]}"  # noqa: RUF001
            differences.append({"difference": name, **cells, "seeds": len(ours)})
    return "\n".join(markdown(table) for table in (lines, differences) if table)


def summary_table(rows: pd.DataFrame, methods: Iterable[str], tasks: int) -> str:
    """The two accuracies that the field reports, for README."""
    columns = {"average": "average incremental", "accuracy": "last task"}
    seeds = {method: finished(rows, method, tasks) for method in methods}
    return markdown(
        [
            {"method": method, **{name: mean_and_spread(own[column]) for column, name in columns.items()}}
            for method, own in seeds.items()
            if len(own)
        ]
    )


def classifiers_tables(rows: pd.DataFrame, classes: pd.DataFrame, methods: Sequence[str], tasks: int) -> str:
    """Accuracy over all classes with each classifier, and its gain over the head in pairs by seed; "" without any.

    Below, from the rows of ``classes``: how far off means and covariances of old classes are, over all tasks, with
    drift compensation and without.
    """
    lines = []
    for method in methods if "aligned" in rows else ():
        own = rows[(rows["method"] == method) & rows["aligned"].notna()]
        own = own.groupby("seed").filter(lambda seed: len(seed) == tasks)
        parts = {"average incremental": own} if tasks > 2 else {}
        parts["all, last task"] = own[own["task"] == tasks - 1]
        for name, column in CLASSIFIERS.items() if len(own) else ():
            line: dict[str, object] = {"method": method, "classifier": name}
            for measure, part in parts.items():
                ours, heads = by_seed(part, column), by_seed(part, "accuracy")
                compared = name != "head" and len(ours) > 2
                line[measure] = mean_and_spread(ours)
                line[f"over the head, {measure.split(',')[0]}"] = paired(ours, heads) if compared else NOT_THERE
            lines.append(line | {"seeds": own["seed"].nunique()})
    off = [_statistics_off(classes, methods, measure) for measure in ("mean", "covariance")]
    return "\n".join(markdown(table) for table in (lines, *off) if lines and table)


def _statistics_off(classes: pd.DataFrame, methods: Sequence[str], measure: str) -> list[dict[str, object]]:
    lines = []
    for method in methods if f"{measure}_off_compensated" in classes else ():
        own = classes[classes["method"] == method]
        seeds = {how: by_seed(own, f"{measure}_off_{how}") for how in ("compensated", "uncompensated")}
        if len(seeds["compensated"]):
            cells = {f"{measure}s off, {how}": mean_and_spread(values, 2) for how, values in seeds.items()}
            lines.append({"method": method, **cells, "seeds": len(seeds["compensated"])})
    return lines


def attention_table(classes: pd.DataFrame, methods: Iterable[str]) -> str:
    """How far the maps of the old classes move, and how much accuracy these classes lose.

    Mean and standard deviation over the seeds of the mean over all tasks and old classes. A class without a map on any
    image, the teacher's or the student's, has no distance and no overlap.
    """
    lines = []
    for method in methods:
        own = classes[classes["method"] == method]
        if own.empty:
            continue
        seeds = own["seed"].unique()
        silent = own.assign(silent=100.0 * own["distance"].isna())
        lost = own.assign(lost=own["accuracy_teacher"] - own["accuracy"])
        lines.append(
            {
                "method": method,
                "distance of L_AD": mean_and_spread(by_seed(own, "distance", seeds), 3),
                "overlap of the top fifth, %": mean_and_spread(by_seed(own, "overlap", seeds)),
                "no map left, % of the classes": mean_and_spread(by_seed(silent, "silent")),
                "accuracy lost, points": mean_and_spread(by_seed(lost, "lost")),
                "seeds": len(seeds),
            }
        )
    return markdown(lines)


# Classifiers of the field ----------------------------------------------------------------------------------------


def averages(path: Path) -> pd.DataFrame:
    """Accuracy over all classes: "average" over the tasks and after the "last", a row by (method, classifier, option,
    seed). A seed of which not all tasks are there, since something stopped between them, is left out.
    """
    rows = read_rows(path)
    if rows.empty:
        return rows
    key = ["method", "classifier", "option", "seed"]
    seeds = rows.fillna({"option": ""}).groupby(key, sort=False)["accuracy"]
    made = seeds.agg(average=statistics.mean, last="last", tasks="size")
    return made[made["tasks"] == made["tasks"].max()]


def ranked(seeds: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(method, classifier, option) of ``averages``, that with the highest average incremental accuracy first."""
    if seeds.empty:
        return []
    means = seeds.groupby(level=[0, 1, 2], sort=False)["average"].agg(statistics.mean)
    return list(means.sort_values(ascending=False, kind="stable").index)


def comparison_table(path: Path, search: Path) -> str:
    """Accuracy over all classes by method and classifier, and what ours has over each in pairs by seed.

    Ours is lwm with the one of our classifiers that is best in the CSV of the ``search``.
    """
    found, lines = ranked(averages(search)), []
    ours = next((key for key in found if key[0] == "lwm" and key[1] in ("ncm", "lda", "aligned")), None)
    groups = averages(path).groupby(level=[0, 1, 2], sort=False)
    cells = {key: seeds.droplevel([0, 1, 2]) for key, seeds in groups}
    for key, other in cells.items():
        line = dict(zip(("trained with", "classifier", "option"), key, strict=True))
        line["average incremental"], line["all, last task"] = (mean_and_spread(other[c]) for c in ("average", "last"))
        best = cells[ours] if ours in cells and key != ours else other[:0]
        best = best[best.index.isin(other.index)]
        for column in ("average", "last"):
            compared = len(best) >= 3
            line[f"ours over it, {column}"] = paired(best[column], other[column]) if compared else NOT_THERE
        lines.append(line | {"seeds": len(other)})
    return markdown(lines)
