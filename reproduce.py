"""Run a whole protocol through the three scripts and make its tables.

    python3 reproduce.py digits-2+2 --seeds 0,1,2,3,4
    python3 reproduce.py photos32-search --data-dir photos32 --ablation

Every cell (a method with a seed) lies in its own folder under --work-dir: what is finished is skipped, what was
interrupted is resumed. results/<protocol>/ gets accuracy.csv (ablation.csv with --ablation), a row a task;
attention.csv, what demo.py says of each old class after each task; environment.json, an entry for each call; and tables
and figures made of them. README and docs show a table between two lines with the name of its file. ``--table`` makes
tables and figures from the CSVs alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
from pathlib import Path

import torch

from lwm.experiments import cells, figures, tables
from lwm.experiments.protocols import PROTOCOLS, REFERENCE, REFERENCES, SEARCH, Protocol, class_order
from lwm.experiments.tables import beside, read_rows
from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.files import require_folder
from lwm.runtime.hardware import pick_device, warn_of_emulation
from lwm.runtime.settings import OneLineParser, load_page

# Of config.py what shapes a result and has no flag in a protocol.
OPEN = dict.fromkeys(("METHOD", "LOSS_FORM", "BACKBONE_LR", "NEW_ROWS", "STEM", "MEAN", "STD"))
OPEN |= {"STATISTICS": True, "FAVOUR": "balanced"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__,
        epilog="protocols:\n" + "\n".join(f"  {name}: {protocol.about}" for name, protocol in PROTOCOLS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("protocol", choices=PROTOCOLS, metavar="protocol", help="one of those below")
    data = "the folder of a protocol on photos, with train/ (and test/)"
    parser.add_argument("--data-dir", type=os.path.expanduser, help=data)
    parser.add_argument("--weights-dir", type=os.path.expanduser, help="of real-1000: where weights lie")
    parser.add_argument(
        "--groups", type=cells.numbers, help="of the protocol folder: classes of each task, as in 10,5,5"
    )
    parser.add_argument("--methods", help="comma-separated (default: all of the protocol)")
    parser.add_argument("--seeds", type=cells.numbers, default=[0], help="comma-separated (default: 0)")
    parser.add_argument("--ablation", action="store_true", help="the ablation's variants in place of the methods")
    jobs = "cells at once; the CPU cores are shared out (default: 1)"
    parser.add_argument("--jobs", type=cells.number_of_jobs, default=1, help=jobs)
    parser.add_argument("--work-dir", type=os.path.expanduser, default="runs/reproduce")
    parser.add_argument("--table", action="store_true", help="only make the tables and figures again from the CSVs")
    return parser.parse_args(argv)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    protocol = with_groups(PROTOCOLS[options.protocol], options.groups)
    results = tables.ROOT / "results" / options.protocol
    if not options.table:
        run(options, protocol, results)
    make_tables(protocol, results)
    if protocol.methods and protocol.ablation:
        figures.draw(protocol, results)


def with_groups(protocol: Protocol, groups: list[int] | None) -> Protocol:
    if bool(groups) != (not protocol.groups):
        raise InputError("--groups is for the protocol folder, and that needs it: how many classes each task has")
    return dataclasses.replace(protocol, groups=tuple(groups), pool=slice(0, sum(groups))) if groups else protocol


def run(options: argparse.Namespace, protocol: Protocol, results: Path) -> None:
    """The chosen cells of a protocol, after what they need is found to be there."""
    require_same_page(protocol)
    ablation = options.ablation or not protocol.methods
    path = results / ("ablation.csv" if ablation else "accuracy.csv")
    variants = cells.chosen(options.methods, protocol.ablation if ablation else protocol.methods)
    if not variants:
        raise InputError(f"--ablation: {options.protocol} has none; leave it out")
    class_order(protocol, options.data_dir)
    require_folder("--work-dir", options.work_dir)
    if "--precision bf16" in protocol.flags:  # what the scripts themselves say of it is not shown
        warn_of_emulation("bf16", pick_device("auto"))
    threads = max(1, torch.get_num_threads() // options.jobs)
    about, command = beside(path, "environment.json"), tables.command_of("reproduce.py", options)
    # Of your own images the name of the protocol does not say which these are.
    same = f" {shlex.join(command[:6])} "
    calls = tables.recorded_calls(about)
    if options.groups and path.exists() and not any(same in f"{call['command']} " for call in calls):
        raise InputError(f"{results} has rows of another --data-dir or --groups; move that folder away first")
    tables.record_call(about, command, threads)
    work, weights = Path(options.work_dir), Path(options.weights_dir or "").resolve()
    study = cells.Study(options.protocol, protocol, options.data_dir, work, path, threads, weights)
    study.run(variants, sorted(set(options.seeds)), options.jobs)


def require_same_page(protocol: Protocol) -> None:
    """Raises InputError if config.py has something else for what the flags of the protocol leave open."""
    page = load_page()
    for name, value in OPEN.items() if protocol.flags else ():
        has = getattr(page, name, value)
        if has != value:
            raise InputError(f"config.py: {name} is {has!r}; the protocol was run with {value!r}: set it back")


def make_tables(protocol: Protocol, results: Path) -> None:
    made, count = {}, len(protocol.groups)
    for name, variants in {"accuracy.csv": protocol.methods, "ablation.csv": protocol.ablation}.items():
        path, methods = results / name, list(variants)
        rows, classes = read_rows(path), read_rows(beside(path, "attention.csv"))
        if len(rows) and protocol.taken:
            made[beside(path, "table.md")] = tables.taken_table(rows, methods, count, REFERENCE)
            continue
        if len(rows):
            made[beside(path, "table.md")] = tables.methods_tables(rows, methods, count, REFERENCES)
            made[beside(path, "classifiers.md")] = tables.classifiers_tables(rows, classes, methods, count)
        if len(rows) and name == "accuracy.csv" and count > 2:
            made[results / "summary.md"] = tables.summary_table(rows, methods, count)
        if len(classes):
            made[beside(path, "attention.md")] = tables.attention_table(classes, methods)
    if not made:
        raise InputError(f"--table: there is no row in {results}; run the protocol without it first")
    if (compared := results / "compare_classifiers.csv").exists():
        search = results.with_name(SEARCH.get(results.name, results.name)) / compared.name
        made[compared.with_suffix(".md")] = tables.comparison_table(compared, search)
    tables.publish({path: text for path, text in made.items() if text})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, cells.stop)
    sys.exit(main())
