"""Run a whole protocol through the three scripts and make its table.

    python3 reproduce.py digits-2+2 --seeds 0,1,2,3,4
    python3 reproduce.py photos32-search --data-dir photos32 --ablation

protocols.py says what there is. Every cell (a method with a seed) lies in its own folder under --work-dir: what is
finished is skipped, what was interrupted is resumed. results/<protocol>/ gets accuracy.csv (ablation.csv with
--ablation), a row a step, its table, and environment.json, an entry for each call; and
attention.csv, what demo.py says of the old classes: a row for each of them after each step. README.md and the
pages in docs show the new tables where they showed those before. ``--table`` only makes the tables and figures again
from the CSVs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path

from lwm.experiments.protocols import PROTOCOLS, Protocol, class_order, groups_of, is_joint
from lwm.experiments.tables import (
    attention_path,
    attention_table,
    beside,
    by_step,
    command_of,
    fingerprint,
    moved,
    points_of,
    read_rows,
    readouts_table,
    record_call,
    recorded_calls,
    table_of,
    table_path,
    variants_of,
    write_rows,
)
from lwm.runtime.errors import InputError, Interrupted, RunError, one_line_errors
from lwm.runtime.settings import READOUTS, OneLineParser, load_page, require_folder

ROOT = Path(__file__).resolve().parent
running: set[subprocess.Popen[str]] = set()
WEIGHED = ("beta", "gamma", "attention", "attention_class")  # of a later step, and of the methods that use them
SETTINGS = ("loss_form", "batch_norm", "learning_rate", "epochs", "precision")
# Of config.py what shapes a result and has no flag in a protocol.
OPEN = {"METHOD": "lwm", "LOSS_FORM": None, "BACKBONE_LR": None, "MEAN": None, "STD": None, "STATISTICS": True}
MADE = {
    "train_teacher_model.py": "teacher_model.pth",
    "incremental_learning_system.py": "student_model.pth",
    "demo.py": "metrics.json",
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--data-dir", help="the folder of a protocol on photos, with train/ (and test/)")
    parser.add_argument("--groups", help="for the protocol folder: how many classes each step has, as in 10,5,5")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--methods", help="comma-separated (default: all of the protocol)")
    parser.add_argument("--ablation", action="store_true", help="the ablation's variants in place of the methods")
    parser.add_argument("--jobs", default="1", help="cells at once; the CPU cores are shared out (default: 1)")
    parser.add_argument("--work-dir", default="runs/reproduce")
    parser.add_argument("--table", action="store_true", help="only make the tables again from the CSVs")
    return parser.parse_args(argv)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    protocol = PROTOCOLS[options.protocol]
    if bool(options.groups) != (not protocol.groups):
        raise InputError("--groups is for the protocol folder, and that needs it: how many classes each step has")
    if options.groups:
        sizes = [whole_number("--groups", size, 1, 10**6) for size in options.groups.split(",")]
        protocol = dataclasses.replace(protocol, groups=tuple(sizes), pool=slice(0, sum(sizes)))
    results = ROOT / "results" / options.protocol
    if not options.table:
        table = "ablation" if options.ablation or not protocol.methods else "accuracy"
        run_cells(options, protocol, results / f"{table}.csv")
    made = [path for path in (results / "accuracy.csv", results / "ablation.csv") if read_rows(path)]
    if not made:
        raise InputError(f"--table: there is no row in {results}; run the protocol without it first")
    for path in made:
        publish(table_path(path), table_of(protocol, path))
        if text := readouts_table(protocol, path):
            publish(beside(path, "readouts.md"), text)
        if read_rows(attention_path(path)):
            publish(attention_path(path).with_suffix(".md"), attention_table(protocol, path))
    if protocol.methods and protocol.ablation:
        draw(protocol, results)


def publish(path: Path, text: str) -> None:
    """Write tables, put them in the place of those before in the documents, whole or one by one, and print them."""
    from lwm.runtime.checkpoint import write_atomically

    before = path.read_text() if path.exists() else ""
    write_atomically(path, text.encode())
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        if document.exists() and before not in ("", text):
            shown = document.read_text()
            for old, new in ((before, text), *zip(before.split("\n\n"), text.split("\n\n"), strict=False)):
                shown = shown.replace(f"\n\n{old.strip()}\n\n", f"\n\n{new.strip()}\n\n")
            write_atomically(document, shown.encode())
    print(text)  # last: who reads it may have closed the pipe


def draw(protocol: Protocol, results: Path) -> None:
    """Accuracy and attention over the steps, and the plane of old against new accuracy."""
    from lwm.reporting import plots

    accuracy, ablation = results / "accuracy.csv", results / "ablation.csv"
    rows, attention, names = read_rows(accuracy), read_rows(attention_path(accuracy)), protocol.methods
    if len(protocol.groups) > 2 and rows:
        labels = {"accuracy": "accuracy over all classes so far, %", "task_aware": "told the step (task-aware), %"}
        panels = {label: {name: by_step(rows, name, column) for name in names} for column, label in labels.items()}
        plots.over_steps(panels, results / "steps.png", fingerprint(accuracy))
    if attention:
        labels = {"distance": "distance of the maps (L_AD)", "overlap": "overlap of the strongest fifth, %"}
        panels = {label: {name: by_step(attention, name, column) for name in names} for column, label in labels.items()}
        seen = [row for row in attention if row["distance"]]
        lost = {
            name: [(float(row["distance"]), moved(row)[2]) for row in seen if row["method"] == name] for name in names
        }
        plots.over_steps(panels, results / "attention.png", fingerprint(attention_path(accuracy)), lost)
    if curves := points_of(protocol, ablation) | points_of(protocol, accuracy):
        plots.plane(curves, results / "plane.png", fingerprint(ablation, accuracy))


def whole_number(flag: str, text: str, least: int, most: int) -> int:
    number = int(text) if text.strip().isdecimal() and len(text) < 20 else -1
    if not least <= number <= most:
        raise InputError(f"{flag} is {text!r}: a whole number of at least {least} and at most {most} is needed")
    return number


def seeds_of(text: str) -> list[int]:
    """Those of --seeds. Raises InputError for what is none."""
    return [whole_number("--seeds", seed, 0, 2**32 - 1) for seed in text.split(",")]


def threads_of(jobs: int) -> int:
    """For each of ``jobs`` runs at once: the CPU cores that this process may use are shared out."""
    import torch

    return max(1, torch.get_num_threads() // jobs)


def run_cells(options: argparse.Namespace, protocol: Protocol, path: Path) -> None:
    """First steps first, then the others of every method and seed; the CSV grows by a row as each step is done."""
    require_open(protocol)
    variants = variants_of(protocol, path)
    if not variants:
        raise InputError(f"--ablation: {options.protocol} has none; leave it out")
    chosen = list(variants) if options.methods is None else options.methods.split(",")
    for name in chosen:
        if name not in variants:
            raise InputError(f"--methods: {options.protocol} has no {name!r}: {', '.join(variants)}")
    seeds = seeds_of(options.seeds)
    for flag, values in (("--methods", chosen), ("--seeds", seeds)):
        if len(set(values)) < len(values):  # two runs at once in one folder
            raise InputError(f"{flag}: {statistics.mode(values)!r} is named twice")
    jobs = whole_number("--jobs", options.jobs, 1, 1024)
    pool = class_order(protocol, options.data_dir)[protocol.pool]
    require_folder("--work-dir", options.work_dir)
    if "--precision bf16" in protocol.flags:  # what the scripts themselves say of it is not shown
        from lwm.runtime.hardware import pick_device, warn_of_emulation

        warn_of_emulation("bf16", pick_device("auto"))
    threads = threads_of(jobs)
    about = beside(path, "environment.json")
    # Of your own images the name of the protocol does not say which these are.
    command = command_of("reproduce.py", options, "data_dir groups methods seeds ablation jobs")
    which = f" {shlex.join(command[:6])} "
    if options.groups and path.exists() and not any(which in f"{call['command']} " for call in recorded_calls(about)):
        raise InputError(f"{path.parent} has rows of another --data-dir or --groups; move that folder away first")
    record_call(about, command, threads)
    common = [*protocol.flags.split(), "--dataset", protocol.dataset]
    if options.data_dir:
        common += ["--data-dir", options.data_dir]
    writing = threading.Lock()

    def flags_of(seed: int, name: str) -> list[str]:
        return [*common, *variants[name].split(), "--seed", str(seed)]

    def folder_of(seed: int, name: str) -> Path:
        return Path(options.work_dir) / options.protocol / f"seed{seed}" / name.replace(" ", "_")

    def first(seed: int, form: str) -> Path:
        old = ",".join(groups_of(protocol, pool, seed)[0])
        flags = [*common, "--seed", str(seed), "--old-classes", old, "--loss-form", form]
        return step("train_teacher_model.py", folder_of(seed, f"first-{form}"), flags, threads)

    def judge_attention(seed: int, name: str, number: int, teacher: Path, student: Path) -> None:
        flags = [*common, "--teacher", str(teacher), "--student", str(student), "--readout", "head"]
        metrics = step("demo.py", student.parent / "demo", flags, threads, after=student)
        key = {"protocol": options.protocol, "method": name, "seed": seed, "step": number}
        with writing:
            write_rows(
                attention_path(path), [{**key, **row} for row in rows_of_classes(json.loads(metrics.read_text()))]
            )

    def cell(seed: int, name: str) -> None:
        flags, groups = flags_of(seed, name), groups_of(protocol, pool, seed)

        def write(model: Path) -> dict:
            row = row_of(options.protocol, name, seed, len(groups) - 1 if is_joint(name) else None, model)
            with writing:
                write_rows(path, [row])
            return row

        if is_joint(name):
            everything = ["--old-classes", ",".join(name for group in groups for name in group)]
            row = write(step("train_teacher_model.py", folder_of(seed, name), [*flags, *everything], threads))
        else:
            model = first(seed, form_of(variants[name].split()))
            write(model)
            for number, group in enumerate(groups[1:], 1):
                more = ["--teacher", str(model), "--new-classes", ",".join(group)]
                folder, teacher = folder_of(seed, name) / str(number), model
                model = step("incremental_learning_system.py", folder, [*flags, *more], threads, after=teacher)
                row = write(model)
                judge_attention(seed, name, number, teacher, model)
        print(f"{name}, seed {seed}: {row['accuracy']:.1f} % after the last step", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as workers:
        forms = sorted({form_of(variants[name].split()) for name in chosen if not is_joint(name)})
        list(workers.map(lambda pair: first(*pair), [(seed, form) for seed in seeds for form in forms]))
        list(workers.map(lambda pair: cell(*pair), [(seed, name) for seed in seeds for name in chosen]))


def require_open(protocol: Protocol) -> None:
    """Raises InputError where config.py has something else for what the flags of the protocol leave open."""
    page = load_page()
    for name, value in OPEN.items() if protocol.flags else ():
        has = getattr(page, name, value)
        if has != value:
            raise InputError(f"config.py: {name} is {has!r}; the protocol was run with {value!r}: set it back")


def step(script: str, folder: Path, flags: list[str], threads: int, after: Path | None = None) -> Path:
    """What the script leaves in ``folder``; it is called unless it has finished there with these flags, and with the
    same for the model that it comes ``after``.
    """
    made, done = folder / MADE[script], folder / "done"
    history = (after.parent / "done").read_text() if after else ""
    history += shlex.join([script, *flags]) + "\n"
    if not (done.exists() and done.read_text() == history):
        how = [] if script == "demo.py" else ["--overwrite" if done.exists() else "--resume"]
        done.unlink(missing_ok=True)
        call(script, [*flags, "--output-dir", str(folder), *how], threads)
        done.write_text(history)
    return made


def form_of(flags: list[str]) -> str:
    """The form that the teacher of a variant is trained with; softmax-all is softmax where no class is old."""
    from lwm.runtime.settings import METHOD_FORMS

    named = dict(zip(flags[::2], flags[1::2], strict=True))
    form = METHOD_FORMS.get(named["--method"], named.get("--loss-form", "binary"))
    return "softmax" if form == "softmax-all" else form


def call(script: str, flags: list[str], threads: int) -> None:
    command = [sys.executable, str(ROOT / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as child:
        running.add(child)
        _, said = child.communicate()
        running.remove(child)
    if child.returncode:
        raise RunError(f"{script} {' '.join(flags)}: {said.strip()[-300:]}")


def stop(signum: int, frame: object) -> None:
    """SIGTERM, which other than Ctrl-C comes to this process alone: it is passed on, and the scripts save and end."""
    for child in list(running):
        child.terminate()
    raise Interrupted(signum, "interrupted; the same command goes on")


def row_of(protocol: str, name: str, seed: int, step: int | None, model: Path) -> dict:
    """A row of the CSV from what a checkpoint says of its last step; ``step`` is its number, unless that counts."""
    from lwm.evaluation import forgetting
    from lwm.runtime.checkpoint import load

    saved = load(model)
    made, last = saved["steps"][-1], saved["training"]["log"][-1]
    first = len(saved["steps"]) == 1
    history = [done["group_accuracy"] for done in saved["steps"]]
    losses = [] if first else [lost for lost in forgetting(history[:-1], history[-1]) if lost is not None]
    unused = {"finetune": WEIGHED, "frozen": WEIGHED, "lwf": WEIGHED[1:], "lwf-mc": WEIGHED[1:]}.get(made["method"], ())
    return {
        "protocol": protocol,
        "method": name,
        "seed": seed,
        "step": len(saved["steps"]) - 1 if step is None else step,
        "accuracy": last["test_accuracy"],
        "accuracy_old": last.get("test_accuracy_old"),
        "accuracy_new": last.get("test_accuracy_new"),
        "task_aware": last.get("test_task_aware"),
        "forgetting": statistics.mean(losses) if losses else None,
        "zero_maps": last.get("zero_maps"),
        **{name: saved["readouts"].get(name, {}).get("accuracy") for name in READOUTS if name != "head"},
        **{key: None if key in unused or first else made[key] for key in WEIGHED},
        **{key: made[key] for key in SETTINGS},
    }


def rows_of_classes(metrics: dict) -> list[dict]:
    """What demo.py found of each old class on its test images: accuracies, attention, how far statistics are off."""
    classes, attention = metrics["classes"], metrics["attention"]
    columns = {
        "class": classes["names"],
        "accuracy_before": classes["teacher"],
        "accuracy": classes["student"],
        "distance": attention["distance"],
        "overlap": attention["overlap"],
    }
    old = len(attention["distance"])
    for measure in ("mean", "covariance"):
        off = metrics.get(f"{measure}s_off", {})  # a metrics.json of an earlier version has none of covariances
        columns |= {f"{measure}_off_{name}": off.get(name, [None] * old) for name in ("carried", "left")}
    return [{name: values[index] for name, values in columns.items()} for index in range(old)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
