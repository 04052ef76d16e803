"""What is made of a protocol's rows: tables, intervals, and the points of the figures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lwm.experiments import tables

ROOT = Path(__file__).resolve().parent.parent
ROWS = dict.fromkeys(["accuracy", "accuracy_old", "accuracy_new", "task_aware", "forgetting"])


def row(method: str, seed: int, task: int, accuracy: float) -> dict:
    return {"method": method, "seed": seed, "task": task, **dict.fromkeys(ROWS, accuracy)}


def cells(text: str) -> list[list[str]]:
    """Of a table without its header."""
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def test_methods_have_mean_and_spread_after_the_last_task_in_the_order_that_is_asked():
    last = {"lwm": [[90.0, 50.0], [80.0, 61.0], [70.0, 55.0]], "finetune": [[60.0, 30.0]]}
    rows = [
        row(method, seed, task, accuracy)
        for method, seeds in last.items()
        for seed, accuracies in enumerate(seeds)
        for task, accuracy in zip((1, 2), accuracies, strict=True)
    ]
    finetune, lwm = cells(tables.methods_tables(pd.DataFrame(rows), ["finetune", "lwm"], 3, {}))
    assert finetune == ["finetune", "–", "30.0", "30.0", "30.0", "30.0", "30.0", "1"]  # noqa: RUF001
    assert lwm[2] == f"{np.mean([50, 61, 55]):.1f} ± {np.std([50, 61, 55], ddof=1):.1f}"
    whole = pd.DataFrame([row("finetune", 0, 0, 90.0), *rows])
    assert cells(tables.methods_tables(whole, ["finetune"], 3, {}))[0][1] == "60.0"
    assert "average" not in tables.methods_tables(whole, ["finetune"], 2, {})
    assert cells(tables.summary_table(whole, ["finetune"], 3)) == [["finetune", "60.0", "30.0"]]


def test_differences_are_taken_in_pairs_by_seed_with_an_interval():
    lwm, lwf_mc = {0: 70.0, 1: 50.0, 2: 61.0, 3: 40.0}, {0: 68.0, 1: 49.0, 2: 58.0, 4: 10.0}
    rows = [row("lwm", seed, 1, value) for seed, value in lwm.items()]
    rows += [row("lwf-mc", seed, 1, value) for seed, value in lwf_mc.items()]
    text = tables.methods_tables(pd.DataFrame(rows), ["lwf-mc", "lwm"], 2, {"lwm": "lwf-mc", "lwf-mc": "finetune"})
    (line,) = cells(text.partition("\n\n")[2])
    # Of three differences 2, 1 and 3 the mean is 2; Student's t with two degrees of freedom has 4.303 standard errors
    # of 1 / sqrt(3).
    assert [line[0], line[1], line[-1]] == ["lwm − lwf-mc", "+2.0 (-0.5 to +4.5)", "3"]  # noqa: RUF001


def test_an_interval_of_few_seeds_holds_the_mean_19_times_of_20():
    draws = np.random.default_rng(0).normal(size=(2000, 3)).tolist()
    held = [low <= 0 <= high for low, high in map(tables.interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
    assert tables.interval([2.0]) == tables.interval([2.0, 2.0]) == (2.0, 2.0)


def test_a_row_that_is_run_again_replaces_the_earlier_one_and_leaves_the_others_as_they_are(tmp_path):
    path = tmp_path / "accuracy.csv"
    path.write_text("method,seed,task,accuracy,epochs\nlwm,3,10,1e-3,020\n")
    for accuracy in (10.0, 100 / 3):
        tables.write_rows(path, [{"method": "lwm", "seed": 3, "task": 2, "accuracy": accuracy, "epochs": None}])
    assert path.read_text() == "method,seed,task,accuracy,epochs\nlwm,3,2,33.3333,\nlwm,3,10,1e-3,020\n"


def test_two_processes_write_one_csv(tmp_path):
    path, script = tmp_path / "accuracy.csv", "import sys, pathlib\nfrom lwm.experiments import tables\n"
    script += "for task in range(40):\n"
    script += " tables.write_rows(pathlib.Path(sys.argv[1]), [{'method': 'lwm', 'seed': sys.argv[2], 'task': task}])"
    calls = [subprocess.Popen([sys.executable, "-c", script, str(path), seed], cwd=ROOT) for seed in "12"]
    assert [call.wait() for call in calls] == [0, 0]
    assert len(tables.read_rows(path)) == 80


def class_row(seed: int, task: int, name: str, distance: float | None, lost: float, method: str = "lwm") -> dict:
    moved = {"distance": distance, "overlap": 50.0, "accuracy_teacher": 90.0, "accuracy": 90.0 - lost}
    return {"method": method, "seed": seed, "task": task, "class": name, **moved}


def test_attention_has_means_over_classes_and_tasks():
    rows = [class_row(0, 1, name, 0.0, 3.0, "frozen") for name in "ab"]
    for seed, lost in enumerate(([1.0, 20.0, 30.0], [30.0, 20.0, 1.0])):
        rows += [class_row(seed, 1, "a", 0.1, lost[0]), class_row(seed, 1, "b", 0.2, lost[1])]
        rows += [class_row(seed, 2, "a", 0.9, lost[2]), class_row(seed, 2, "b", None, 90.0)]  # without a map
    frozen, lwm = cells(tables.attention_table(pd.DataFrame(rows), ["frozen", "lwm"]))
    assert frozen == ["frozen", "0.000", "50.0", "0.0", "3.0", "1"]
    assert lwm == ["lwm", "0.400 ± 0.000", "50.0 ± 0.0", "25.0 ± 0.0", "35.2 ± 0.0", "2"]


def test_each_classifier_is_compared_with_the_head_in_pairs():
    gains, rows = {"ncm": 1.0, "lda": 5.0, "aligned": -2.0}, []
    for seed in range(3):
        for task in range(5):
            accuracy = 80.0 - 10 * task + seed
            values = {name: accuracy + gain + (seed if task == 4 else 0) for name, gain in gains.items()}
            rows.append(row("lwm", seed, task, accuracy) | values)
    rows.append(row("lwm", 3, 0, 99.0) | dict.fromkeys(gains, 1.0))  # not finished
    rows.append(row("lwf", 0, 4, 1.0) | dict.fromkeys(gains))  # without statistics
    off = {"mean_off_compensated": 0.2, "mean_off_uncompensated": 0.5}
    classes = pd.DataFrame([{"method": "lwm", "seed": seed} | off for seed in (0, 1)])
    first, second = tables.classifiers_tables(pd.DataFrame(rows), classes, ["lwf", "lwm"], 5).split("\n\n")
    head, _, lda, aligned = cells(first)
    assert head == ["lwm", "head", "61.0 ± 1.0", "–", "41.0 ± 1.0", "–", "3"]  # noqa: RUF001
    assert lda[2:5] == ["66.2 ± 1.2", "+5.2 (+4.7 to +5.7)", "47.0 ± 2.0"]
    assert aligned[5] == "-1.0 (-3.5 to +1.5)"
    assert cells(second) == [["lwm", "0.20 ± 0.00", "0.50 ± 0.00", "2"]]
    assert tables.classifiers_tables(pd.DataFrame(), pd.DataFrame(), ["lwm"], 5) == ""
