"""How good is the estimate of what a student keeps of its old classes (lwm/estimate.py)? Against the truth.

    python3 -m lwm.experiments.estimates digits
    python3 -m lwm.experiments.estimates photos84 --methods closed-form --flags="--image-size 48"

Teachers of five classes learn three more and then two, by each of three methods: ``digits``, or the folders
train/<class>/ and test/<class>/ of another data set, with so many ``--images`` of each class. The truth is the
accuracy on the old classes' test images; the estimate is the teacher's accuracy times what is kept. Of trained students
nothing is said, and the table shows why. results/estimates/ gets a row a student.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from lwm import classifiers, estimate
from lwm.experiments import tables
from lwm.experiments.cells import students
from lwm.experiments.own_images import IMAGES, SPLITS
from lwm.runtime import hardware
from lwm.runtime.checkpoint import load, restore_model
from lwm.runtime.errors import one_line_errors
from lwm.runtime.settings import OneLineParser

METHODS = ("closed-form", "lwm", "finetune")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", type=Path, help="digits, or a folder with train/<class>/ and test/<class>/")
    parser.add_argument("--images", type=int, default=IMAGES, help="of each class of a folder (default: 60)")
    parser.add_argument("--methods", default=",".join(METHODS), help="(default: %(default)s)")
    parser.add_argument("--flags", default="", help="further flags of the teacher's script")
    parser.add_argument("--work-dir", default=Path("runs/estimates"), type=Path)
    options = parser.parse_args(argv)
    path = tables.ROOT / "results" / "estimates" / "accuracy.csv"
    how = options.images, options.flags, options.methods.split(","), options.work_dir / options.data.name
    for split in range(len(SPLITS)):
        for method, task, teacher, student in students(options.data, split, *how):
            key = {"protocol": "estimates", "method": f"{options.data.name} {method}", "seed": split, "task": task}
            tables.write_rows(path, [{**key, **row_of(teacher, student), **hardware.machine(1)}])
    tables.publish({path.with_name("table.md"): table_of(tables.read_rows(path))})


def row_of(teacher: Path, student: Path) -> dict[str, float | str]:
    """Accuracies on the old classes in percent, and what the estimate is made of."""
    before, after = load(teacher), load(student)
    known, now = classifiers.from_checkpoint(before), classifiers.from_checkpoint(after)
    assert known and now  # of networks that were trained here
    names = [classifiers.choose("auto", each) for each in (before, after)]
    layers = [
        classifiers.linear_layer(name, statistics, restore_model(each))
        for name, statistics, each in zip(names, (known, now), (before, after), strict=True)
    ]
    teacher_accuracy, kept = before["classifiers"][names[0]]["accuracy"], after["tasks"][-1]["answers"]["kept"]
    if after["tasks"][-1]["epochs"]:  # what would be said: the ratio of right answers on features drawn
        drawn = [classifiers.draw(each, estimate.SEED) for each in (known, now.only(range(len(known.counts))))]
        right = [estimate.right(layer, *each) for layer, each in zip(layers, drawn, strict=True)]
        kept = min(100.0, 100 * right[1] / right[0])
    return {
        "classifier": names[1],
        "teacher": teacher_accuracy,
        "old": after["classifiers"][names[1]]["accuracy_old"],
        "estimate": round(kept * teacher_accuracy / 100, 4),
    }


def table_of(rows: pd.DataFrame) -> str:
    """For each data set and method the means, and how far the estimates are off."""
    lines = []
    for name, own in rows.groupby("method", sort=True):
        numbers = own[["teacher", "old", "estimate"]].apply(pd.to_numeric)
        error = (numbers["estimate"] - numbers["old"]).abs()
        means = {f"{column}, %": f"{numbers[column].mean():.1f}" for column in numbers}
        off = {"mean error, points": f"{error.mean():.1f}", "largest": f"{error.max():.1f}"}
        lines.append({"students": name, "number": len(own), **means, **off})
    return tables.markdown(lines)


if __name__ == "__main__":
    sys.exit(main())
