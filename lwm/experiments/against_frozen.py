"""Is LwM worth its time on photographs? Five classes, then three, then two, of 60 images each, against no training.

    python3 -m lwm.experiments.own_images --data-dir photos84
    python3 -m lwm.experiments.against_frozen --data-dir photos84 --runs runs/own-images/...

The teachers and first students that own_images.py has left in ``--runs`` go on: LwM learns the two classes left, and
the closed form, which is LDA on the teacher's features, learns the three and then the two. Accuracy is that of the
classifier which answers, over all classes. results/against-frozen/ gets a row for each split, method and task.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from lwm.classifiers import choose
from lwm.experiments import cells, tables
from lwm.experiments.own_images import OLD, SPLITS, classes_of, linked, parser_of_runs
from lwm.runtime import hardware
from lwm.runtime.checkpoint import load
from lwm.runtime.errors import one_line_errors

TASKS = (3, 2)  # classes of each, after the teacher's
METHODS = ("lwm", "closed-form")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = parser_of_runs(__doc__)
    parser.add_argument("--work-dir", default=Path("runs/against-frozen"), type=Path)
    options = parser.parse_args(argv)
    results = tables.ROOT / "results" / "against-frozen"
    for split, shift in enumerate(SPLITS):
        classes = [*classes_of(options.data_dir, shift)[0], *classes_of(options.data_dir, shift)[1]]
        photos = linked(options.data_dir, classes, options.work_dir / f"split{split}").resolve()
        for method in METHODS:
            model, first = (options.runs / str(split) / "teacher_model.pth").resolve(), OLD
            for task, count in enumerate(TASKS, 1):
                new, first = classes[first : first + count], first + count
                if (method, task) == ("lwm", 1):  # it is there
                    model = model.with_name("student_model.pth")
                else:
                    folder = options.work_dir.resolve() / method / str(split) / str(task)
                    flags = ["--teacher", str(model), "--method", method, "--new-classes", ",".join(new)]
                    flags += ["--dataset", "folder", "--data-dir", str(photos)]
                    model = cells.run_script("incremental_learning_system.py", folder, flags, threads=1)
                saved = load(model)
                accuracies = saved["classifiers"][choose("auto", saved)]
                key = {"protocol": "against-frozen", "method": method, "seed": split, "task": task}
                row = {name: accuracies[name] for name in ("accuracy", "accuracy_old", "accuracy_new")}
                tables.write_rows(results / "accuracy.csv", [{**key, **row, **hardware.machine(1)}])
    tables.publish({results / "table.md": table_of(tables.read_rows(results / "accuracy.csv"))})


def table_of(rows: pd.DataFrame) -> str:
    """Means over the splits after each task, and what LwM has over the closed form on the same split."""
    accuracy = rows.pivot_table(index=["task", "seed"], columns="method", values="accuracy")
    lines = []
    for task, own in accuracy.groupby("task"):
        difference = own["lwm"] - own["closed-form"]
        classes = OLD + sum(TASKS[: int(str(task))])
        values = {name: tables.mean_and_spread(own[name]) for name in METHODS}
        lines.append(
            {"classes": classes, **values, "difference": tables.mean_and_spread(difference), "splits": len(own)}
        )
    return tables.markdown(lines)


if __name__ == "__main__":
    sys.exit(main())
