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
from scipy import stats

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
OURS = ("ncm", "lda", "aligned")  # our classifiers, and the columns of what they get right
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
    if isinstance(value, float):
        value = round(value, 4) if abs(value) >= 0.01 else float(f"{value:.4g}")  # a rate may be small
    return "" if value is None else str(value)


def _held(path: Path) -> FileLock:
    """Of several processes and threads one at a time changes what lies beside ``path``."""
    return FileLock(path.with_name(".lock"))


def command_of(script: str, options: argparse.Namespace) -> list[str]:
    """The call of a script for a protocol with the flags that are set; a folder goes by its name alone."""
    words = [*script.split(), options.protocol]
    for name, value in vars(options).items():
        if not value or name in ("protocol", "work_dir"):
            continue
        words.append("--" + name.replace("_", "-"))
        if name in ("data_dir", "weights_dir"):
            words.append(Path(value).name)
        elif value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, list) else str(value))
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


def fingerprint(path: Path) -> str:
    """SHA-256 of a CSV: a figure carries that of what it was drawn from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
            raise InputError(f"a document shows {found[2]}, which is not there; run its protocol first")
        return f"{found[1]}\n{path.read_text()}\n{found[3]}"

    return BLOCK.sub(block, document)


# Cells of a table -------------------------------------------------------------------------------------------------


def markdown(lines: Sequence[Mapping[str, object]]) -> str:
    """A table; its columns are the keys of the first line."""
    header, *rows = (f"| {' | '.join(map(str, cells))} |\n" for cells in (lines[0], *(line.values() for line in lines)))
    return "".join([header, "|---" * len(lines[0]) + "|\n", *rows])


def mean_and_spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean and standard deviation over the seeds, if every seed has a value."""
    values = [float(value) for value in values]
    if not values or any(value != value for value in values):
        return NOT_THERE
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; of a single value, that value."""
    mean = statistics.mean(values)
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else 0.0
    return float(mean - half), float(mean + half)


def paired(ours: pd.Series, others: pd.Series) -> str:
    """Mean of the differences with its 95 % interval over the seeds, the index of both, if three have both or more."""
    differences = [float(ours[seed]) - float(others[seed]) for seed in ours.index if seed in others.index]
    if len(differences) < 3 or any(value != value for value in differences):
        return NOT_THERE
    low, high = interval(differences)
    return f"{statistics.mean(differences):+.1f} ({low:+.1f} to {high:+.1f})"


def by_seed(rows: pd.DataFrame, column: str) -> pd.Series:
    """For each seed the mean of ``column`` over the rows that have something there, NaN without any."""
    means = rows.dropna(subset=[column]).groupby("seed")[column].agg(statistics.mean)
    return means.reindex(rows["seed"].unique())


# Tables -----------------------------------------------------------------------------------------------------------


def finished(rows: pd.DataFrame, method: str, tasks: int) -> pd.DataFrame:
    """MEASURES after the last task, a line for each seed that has finished; NaN for what is not there."""
    own = rows[rows["method"] == method]
    last = own[own["task"] == tasks - 1].set_index("seed")
    whole = own.groupby("seed").filter(lambda seed: len(seed) == tasks)
    return last.assign(average=by_seed(whole, "accuracy"))[list(MEASURES)].astype(float)


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
        seeds = len(ours.index.intersection(others.index))
        if seeds >= 3:
            cells = {name: paired(ours[column], others[column]) for column, name in measures.items()}
            name = f"{method} − {references[method]}"  # noqa: RUF001
            differences.append({"difference": name, **cells, "seeds": seeds})
    return "\n".join(markdown(table) for table in (lines, differences) if table)


def taken_table(rows: pd.DataFrame, methods: Iterable[str], tasks: int, reference: str) -> str:
    """Of networks that were taken as they are: accuracies in percent after the last task, minutes of all its tasks.

    The first line is the network itself, before any task. The mean is that of old and new.
    """
    of_network = rows[rows["task"] == 0].groupby("seed").first()
    lines = [{"method": "the network itself", "old": mean_and_spread(of_network["accuracy_first"]), "new": NOT_THERE}]
    lines[0] |= {"mean": NOT_THERE, "minutes": NOT_THERE, "seeds": str(len(of_network))}
    for method in methods:
        own = rows[rows["method"] == method]
        last = own[own["task"] == tasks - 1].set_index("seed")
        if last.empty:
            continue
        old, new = last["accuracy_first"], last["accuracy_later"]
        # A task that was held up in between has none, and then its seed has not.
        minutes = own[own["task"] > 0].groupby("seed")["minutes"].agg(lambda each: each.sum(skipna=False))
        of_reference = method == reference
        cells = {
            "old": NOT_THERE if of_reference else mean_and_spread(old),
            "new": mean_and_spread(new),
            "mean": NOT_THERE if of_reference else mean_and_spread((old + new) / 2),
            "minutes": NOT_THERE if of_reference else mean_and_spread(minutes[last.index].dropna()),
        }
        lines.append({"method": method, **cells, "seeds": str(len(last))})
    return markdown(lines)


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
        for name in ("head", *OURS) if len(own) else ():
            line: dict[str, object] = {"method": method, "classifier": name}
            for measure, part in parts.items():
                heads = by_seed(part, "accuracy")
                ours = heads if name == "head" else by_seed(part, name)
                line[measure] = mean_and_spread(ours)
                line[f"over the head, {measure.split(',')[0]}"] = NOT_THERE if name == "head" else paired(ours, heads)
            lines.append(line | {"seeds": own["seed"].nunique()})
    tables = [lines, *(_statistics_off(classes, methods, measure) for measure in ("mean", "covariance"))]
    return "\n".join(markdown(table) for table in tables if lines and table)


def _statistics_off(classes: pd.DataFrame, methods: Sequence[str], measure: str) -> list[dict[str, object]]:
    compensated, uncompensated = f"{measure}_off_compensated", f"{measure}_off_uncompensated"
    lines = []
    for method in methods if compensated in classes else ():
        own = classes[(classes["method"] == method) & classes[compensated].notna()]
        if own.empty:
            continue
        lines.append(
            {
                "method": method,
                f"{measure}s off, compensated": mean_and_spread(by_seed(own, compensated), 2),
                f"{measure}s off, uncompensated": mean_and_spread(by_seed(own, uncompensated), 2),
                "seeds": own["seed"].nunique(),
            }
        )
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
        lost = own["accuracy_teacher"] - own["accuracy"]
        own = own.assign(silent=100.0 * own["distance"].isna(), lost=lost)
        lines.append(
            {
                "method": method,
                "distance of L_AD": mean_and_spread(by_seed(own, "distance"), 3),
                "overlap of the top fifth, %": mean_and_spread(by_seed(own, "overlap")),
                "no map left, % of the classes": mean_and_spread(by_seed(own, "silent")),
                "accuracy lost, points": mean_and_spread(by_seed(own, "lost")),
                "seeds": own["seed"].nunique(),
            }
        )
    return markdown(lines)


# Classifiers of the field ----------------------------------------------------------------------------------------


def averages(path: Path) -> dict[tuple[str, str, str], pd.DataFrame]:
    """(method, classifier, option) -> accuracy over all classes, a row a seed: "average" over the tasks, and "last".

    A seed of which not all tasks are there, since something stopped between them, is left out.
    """
    rows = read_rows(path)
    if rows.empty:
        return {}
    key = ["method", "classifier", "option"]
    seeds = rows.fillna({"option": ""}).groupby([*key, "seed"], sort=False)["accuracy"]
    made = seeds.agg(average=statistics.mean, last="last", tasks="size")
    made = made[made["tasks"] == made["tasks"].max()]
    return {name: seeds.droplevel(key) for name, seeds in made.groupby(key, sort=False)}


def ranked(path: Path) -> list[tuple[str, str, str]]:
    """(method, classifier, option), that with the highest average incremental accuracy first."""
    means = {key: statistics.mean(seeds["average"]) for key, seeds in averages(path).items()}
    return sorted(means, key=means.__getitem__, reverse=True)


def comparison_table(path: Path, search: Path) -> str:
    """Accuracy over all classes by method and classifier, and what ours has over each in pairs by seed.

    Ours is lwm with the one of our classifiers that is best in the CSV of the ``search``.
    """
    best = next((key for key in ranked(search) if key[0] == "lwm" and key[1] in OURS), None)
    compared, lines = averages(path), []
    ours = compared.get(best) if best else None
    for key, other in compared.items():
        line: dict[str, object] = dict(zip(("trained with", "classifier", "option"), key, strict=True))
        line["average incremental"], line["all, last task"] = (mean_and_spread(other[c]) for c in ("average", "last"))
        for column in ("average", "last"):
            difference = NOT_THERE if ours is None or key == best else paired(ours[column], other[column])
            line[f"ours over it, {column}"] = difference
        lines.append(line | {"seeds": len(other)})
    return markdown(lines)
