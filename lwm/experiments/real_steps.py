"""What happens to a student of a real network, step by step, and when it leaves its teacher.

    python3 -m lwm.experiments.real_steps NAME --old-images real224/old -- --teacher runs/own/teacher_model.pth
        --dataset folder --data-dir real224/tune --new-classes all --method lwm --output-dir runs/steps

What stands behind ``--`` are flags of incremental_learning_system.py, which runs with them. Before its first step,
every ten steps and after the last the student answers the test images of the new classes and those of the old ones in
``--old-images``, a folder with test/<class>/, over all classes. results/real-1000/steps.csv gets the rows under NAME:

    old, new        percent right, asked over all classes; old_told, new_told: among the old or the new alone
    kl_old, kl_new  divergence of the student's old outputs from the teacher's, nats an image: on the old classes'
                    photographs, which training never sees, and on the new classes' test images
    weights, statistics     length of the change of the backbone's weights, and of the running statistics of its
                    batch-norms, as a share of their own length
    agreement, loss terms   as in the log, of the step before
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lwm import training
from lwm.evaluation import predict
from lwm.experiments import tables
from lwm.images.batches import Images
from lwm.images.datasets import Place, open_source
from lwm.losses import Terms
from lwm.runtime import hardware
from lwm.runtime.errors import InputError, log, one_line_errors
from lwm.runtime.settings import OneLineParser

RESULTS = tables.ROOT / "results" / "real-1000"
EVERY, AT_A_TIME = 10, 25
SHOWN = ("old", "old_told", "new", "new_told", "kl_old", "kl_new", "agreement", "weights", "statistics")


class Watch:
    """The rows of one training."""

    def __init__(self, old_images: Path) -> None:
        self.place = Place("folder", str(old_images))
        self.rows: list[dict[str, float]] = []
        self.step = self.seed = 0

    def begin(self, run: training.Training) -> None:
        self.seed = run.settings.seed
        checkpoint, names = run.checkpoint, run.checkpoint["class_names"]
        self.channels, known = (checkpoint["mean"], checkpoint["std"]), names[: run.old]
        sources = [
            open_source(place, checkpoint["image_size"])
            for place in (self.place, Place("folder", run.settings.data_dir))
        ]
        there = [name for name in known if name in sources[0].classes.get("test", ())]
        if not there:
            raise InputError(f"--old-images {self.place.data_dir}: no folder in test/ is named like an old class")
        self.images = {"old": sources[0].test(there, names), "new": sources[1].test(names[run.old :], names)}
        self.start = {name: value.clone() for name, value in run.student.state_dict().items()}
        self.teachers = {group: self.logits(run.student, images)[:, : run.old] for group, images in self.images.items()}
        self.add(run, {})

    def logits(self, network: Any, images: Images) -> Tensor:
        """(n, outputs); the network's modules stay in the mode that they are in."""
        modes = [(module, module.training) for module in network.modules()]
        logits = predict(network, images.pixels, *self.channels, AT_A_TIME)
        for module, mode in modes:
            module.training = mode
        return logits

    def after_step(self, run: training.Training, terms: Terms) -> None:
        self.step += 1
        if self.step % EVERY == 0 or self.step == run.planned * run.steps:
            self.add(run, {name: float(term.detach()) for name, term in terms.items()})

    @torch.no_grad()
    def add(self, run: training.Training, terms: dict[str, float]) -> None:
        row: dict[str, float] = {"step": self.step}
        for group, (images, own) in {
            "old": (self.images["old"], slice(0, run.old)),
            "new": (self.images["new"], slice(run.old, None)),
        }.items():
            logits = self.logits(run.student, images)
            told = logits[:, own].argmax(1) + (own.start or 0)
            row[group] = _percent(logits.argmax(1) == images.labels)
            row[f"{group}_told"] = _percent(told == images.labels)
            row[f"kl_{group}"] = divergence(self.teachers[group], logits[:, : run.old])
        now = run.student.state_dict()
        row["weights"] = _change(self.start, now, lambda name: name.endswith("weight") and not name.startswith("fc."))
        row["statistics"] = _change(self.start, now, lambda name: name.endswith(("running_mean", "running_var")))
        self.rows.append(row := row | terms)
        log.info(f"step {self.step}: " + ", ".join(f"{name} {row[name]:.3g}" for name in SHOWN if name in row))


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Kullback-Leibler, in nats, of softmax outputs with logits (n, N) both, mean over images."""
    ours, theirs = student.log_softmax(1), teacher.log_softmax(1)
    return float((theirs.exp() * (theirs - ours)).sum(1).mean())


def _percent(right: Tensor) -> float:
    return 100 * float(right.float().mean())


def _change(start: dict[str, Tensor], now: dict[str, Tensor], which: Any) -> float:
    pairs = [(start[name].float(), now[name].float()) for name in start if which(name)]
    moved = sum(float((after - before).square().sum()) for before, after in pairs)
    return (moved / max(sum(float(before.square().sum()) for before, _ in pairs), 1e-30)) ** 0.5


def watched(watch: Watch) -> type[training.ResumableBatches]:
    class Watched(training.ResumableBatches):
        def __iter__(self) -> Any:
            if not watch.rows:
                watch.begin(self.training)
            return super().__iter__()

        def record(self, terms: Terms) -> None:
            super().record(terms)
            watch.after_step(self.training, terms)

    return Watched


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the rows in the table")
    parser.add_argument("--old-images", required=True, type=Path, help="a folder with test/<class>/ of old classes")
    options, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    watch = Watch(options.old_images)
    script, before = str(tables.ROOT / "incremental_learning_system.py"), (training.ResumableBatches, sys.argv)
    training.ResumableBatches, sys.argv = watched(watch), [script, *flags]  # type: ignore[misc]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        training.ResumableBatches, sys.argv = before  # type: ignore[misc]
        if watch.rows:  # those of a run that broke off too
            keep(options.name, watch, flags)


def keep(name: str, watch: Watch, flags: list[str]) -> None:
    """Write the rows of a run into the CSV of all runs, and the table anew."""
    about = {"flags": " ".join(shown(flags)), **hardware.machine()}
    key = {"protocol": "real-1000", "method": name, "seed": watch.seed, "task": 1}
    path = RESULTS / "steps.csv"
    tables.write_rows(path, [{**key, **row, **about} for row in watch.rows])
    tables.publish({path.with_suffix(".md"): table_of(tables.read_rows(path))})


def shown(flags: list[str]) -> list[str]:
    """The flags without folders, which are another's on another machine: of a path its name."""
    return [Path(flag).name if "/" in flag else flag for flag in flags]


def table_of(rows: pd.DataFrame) -> str:
    """Of every run its first row and its last one."""
    lines = []
    for name, own in rows.groupby("method", sort=False):
        for _, row in own.iloc[[0, -1]].iterrows():
            values = {column: "" if pd.isna(row[column]) else f"{row[column]:.3g}" for column in SHOWN}
            lines.append({"run": name, "step": int(row["step"]), **values})
    return tables.markdown(lines)


if __name__ == "__main__":
    sys.exit(main())
