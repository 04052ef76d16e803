"""Is LwM worth its time with few images? Five classes, then three, then two, against no training.

    python3 -m lwm.experiments.against_frozen --data-dir cifar100 --images 60,125,250,500 --flags="--model resnet32"
    python3 -m lwm.experiments.against_frozen --data-dir photos84 --images 60 --flags="--image-size 96"

Teachers are trained by the first script, with ``--flags``, on so many images of each class; LwM and the closed
form, which is LDA on the teacher's features, learn three more classes and then two. Accuracy is that of the classifier
which answers, over all classes. results/against-frozen/ gets a row for each number of images, split, method and task.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import pandas as pd

from lwm.classifiers import choose
from lwm.experiments import cells, tables
from lwm.experiments.own_images import IMAGES, OLD, SPLITS
from lwm.runtime import hardware
from lwm.runtime.checkpoint import load
from lwm.runtime.errors import one_line_errors
from lwm.runtime.settings import OneLineParser

METHODS = ("lwm", "closed-form")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data-dir", required=True, type=Path, help="a folder with train/<class>/ and test/<class>/")
    parser.add_argument("--images", type=cells.numbers, default=[IMAGES], help="of each class (default: 60)")
    parser.add_argument("--flags", default="", help="further flags of the teacher's script")
    parser.add_argument("--work-dir", default=Path("runs/against-frozen"), type=Path)
    options = parser.parse_args(argv)
    path = tables.ROOT / "results" / "against-frozen" / "accuracy.csv"
    for split, images in itertools.product(range(len(SPLITS)), options.images):
        name, work = f"{options.data_dir.name}, {images} images", f"{options.data_dir.name}-{images}"
        how = images, options.flags, METHODS, options.work_dir / work
        for method, task, _, student in cells.students(options.data_dir, split, *how):
            saved = load(student)
            accuracies = saved["classifiers"][choose("auto", saved)]
            key = {"protocol": "against-frozen", "method": f"{name} {method}", "seed": split, "task": task}
            row = {column: accuracies[column] for column in ("accuracy", "accuracy_old", "accuracy_new")}
            tables.write_rows(path, [{**key, **row, **hardware.machine(1)}])
    tables.publish({path.with_name("table.md"): table_of(tables.read_rows(path))})


def table_of(rows: pd.DataFrame) -> str:
    """Means over the splits after each task, and what LwM has over the closed form on the same split."""
    named = rows["method"].str.rsplit(" ", n=1)
    rows = rows.assign(data=named.str[0], method=named.str[1])
    accuracy = rows.pivot_table(index=["data", "task", "seed"], columns="method", values="accuracy").dropna()
    lines = []
    for (data, task), own in sorted(accuracy.groupby(level=["data", "task"]), key=lambda pair: _images(pair[0])):
        values = {method: tables.mean_and_spread(own[method]) for method in METHODS}
        difference = tables.mean_and_spread(own["lwm"] - own["closed-form"])
        classes = OLD + sum(cells.STEPS[: int(task)])
        lines.append({"images of a class": data, "classes": classes, **values, "difference": difference})
        lines[-1]["splits"] = len(own)
    return tables.markdown(lines)


def _images(of: tuple[str, int]) -> tuple[str, int, int]:
    """Of a data set's name with its number of images, and a task: what rows of the table are sorted by."""
    name, images, _ = of[0].rsplit(" ", 2)
    return name, int(images), of[1]


if __name__ == "__main__":
    sys.exit(main())
