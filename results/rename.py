"""Give the committed CSVs the names of today, once: python3 results/rename.py. Every number stays as it is."""

import csv
import io
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
CLASSIFIERS = {"prototypes": "ncm", "discriminant": "lda", "rebalanced": "aligned"}
COLUMNS = CLASSIFIERS | {
    "step": "task",
    "readout": "classifier",
    "accuracy_before": "accuracy_teacher",
    "mean_off_carried": "mean_off_compensated",
    "mean_off_left": "mean_off_uncompensated",
    "covariance_off_carried": "covariance_off_compensated",
    "covariance_off_left": "covariance_off_uncompensated",
}
METHODS = {
    f"attention={name}": f"lwm {name}"
    for name in ("signed", "through-features", "through-head", "new-class", "features")
}
METHODS |= {"attention=features at 0.0125": "lwm features gamma=0.0125", "attention_class=teacher": "lwm teacher-class"}
SAID_BY_THE_METHOD = ("attention", "attention_class")
FILES = {
    "field.csv": "compare_classifiers.csv",
    "field_environment.json": "compare_classifiers_environment.json",
    "growth-steps.csv": "growth-tasks.csv",
}


def main() -> None:
    for path in sorted(RESULTS.glob("*/*.csv")):
        rename_in(path)
    for old, new in FILES.items():
        for path in RESULTS.glob(f"*/{old}"):
            path.rename(path.with_name(new))
    for name in ("field.md", "trials.md", "readouts.md", "ablation_readouts.md"):
        for path in RESULTS.glob(f"*/{name}"):
            path.unlink()


def rename_in(path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = COLUMNS | ({"step": "epoch"} if path.parent.name == "start-at-prior" else {})
    for row in rows:
        method = row.get("method", "")
        values = {name: row.pop(name) for name in SAID_BY_THE_METHOD if name in row}
        said = method.partition("attention=")[2].partition(" ")[0] or "grad-cam"
        assert values.get("attention", "") in ("", said)
        said = method.partition("attention_class=")[2] or "student"
        assert values.get("attention_class", "") in ("", said)
        if method:
            row["method"] = METHODS.get(method, method)
        if "readout" in row:
            row["readout"] = CLASSIFIERS.get(row["readout"], row["readout"])
    renamed = [{columns.get(name, name): value for name, value in row.items()} for row in rows]
    if "task" in renamed[0] and "method" in renamed[0]:
        renamed.sort(key=lambda row: (row["method"], int(row["seed"]), int(row["task"])))
    text = io.StringIO()
    writer = csv.DictWriter(text, renamed[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(renamed)
    path.write_text(text.getvalue())


if __name__ == "__main__":
    main()
