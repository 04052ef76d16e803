"""What is made of a protocol's rows: tables, intervals, and the points of the figures."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FIVE
from PIL import Image

from lwm.experiments import intervals, tables
from lwm.experiments.protocols import JOINT, PROTOCOLS
from lwm.reporting import plots

ROOT = Path(__file__).resolve().parent.parent


def row(method: str, seed: int, step: int, accuracy: float | None) -> dict:
    columns = [name for name in tables.COLUMNS if name != "average"]
    return {"method": method, "seed": seed, "step": step, **dict.fromkeys(columns, accuracy)}


def test_the_table_has_mean_and_spread_after_the_last_step_in_the_order_of_the_protocol(tmp_path):
    path = tmp_path / "accuracy.csv"
    values = {"lwm": [[90.0, 50.0], [80.0, 61.0], [70.0, 55.0]], "finetune": [[60.0, 30.0]], JOINT: [[None, 99.0]]}
    for method, seeds in values.items():
        for seed, accuracies in enumerate(seeds):
            for step, accuracy in zip((3, 4), accuracies, strict=True):
                if accuracy is not None:
                    tables.write_rows(path, [row(method, seed, step, accuracy)])
    lines = tables.table_of(FIVE, path).splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines] == ["| finetune", "| lwm", f"| {JOINT}"]
    assert lines[0].split(" | ")[2] == "30.0"
    last = [50.0, 61.0, 55.0]
    assert lines[1].split(" | ")[2] == f"{np.mean(last):.1f} ± {np.std(last, ddof=1):.1f}"
    assert lines[1].split(" | ")[1] == "–"  # noqa: RUF001  not all steps are there
    assert lines[1].endswith("| 3 |")
    for step in range(3):
        tables.write_rows(path, [row("finetune", 0, step, 100.0)])
    finetune = tables.table_of(FIVE, path).splitlines()[4]
    assert finetune.split(" | ")[1] == f"{(3 * 100 + 60 + 30) / 5:.1f}"
    assert "average" not in tables.table_of(PROTOCOLS["digits-2+2"], path)


def test_a_row_that_is_run_again_replaces_the_earlier_one(tmp_path):
    path = tmp_path / "accuracy.csv"
    for accuracy in (10.0, 20.0):
        tables.write_rows(path, [row("lwm", 3, 1, accuracy)])
    tables.write_rows(path, [row("lwm", 3, 2, 30.0)])
    assert [r["accuracy"] for r in tables.read_rows(path)] == ["20.0", "30.0"]


def test_a_call_is_recorded_without_git_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    tables.record_call(tmp_path / "environment.json", ["reproduce.py", "digits-2+2"], 1)
    (call,) = tables.recorded_calls(tmp_path / "environment.json")
    assert (call["command"], call["commit"]) == ("python3 reproduce.py digits-2+2", "")


def test_two_processes_write_one_csv(tmp_path):
    path, script = tmp_path / "accuracy.csv", "import sys, tables, pathlib\nfor step in range(40):\n"
    script += " tables.write_rows(pathlib.Path(sys.argv[1]), [{'method': 'lwm', 'seed': sys.argv[2], 'step': step}])"
    calls = [subprocess.Popen([sys.executable, "-c", script, str(path), seed], cwd=ROOT) for seed in "12"]
    assert [call.wait() for call in calls] == [0, 0]
    assert len(tables.read_rows(path)) == 80
    assert list(tmp_path.iterdir()) == [path]


def test_differences_are_taken_in_pairs_by_seed_with_an_interval(tmp_path):
    path = tmp_path / "accuracy.csv"
    lwm, lwf_mc = {0: 70.0, 1: 50.0, 2: 61.0, 3: 40.0}, {0: 68.0, 1: 49.0, 2: 58.0, 4: 10.0}
    for method, values in (("lwm", lwm), ("lwf-mc", lwf_mc)):
        for seed, accuracy in values.items():
            tables.write_rows(path, [row(method, seed, 4, accuracy)])
    text = tables.table_of(FIVE, path)
    (line,) = [line for line in text.splitlines() if line.startswith("| lwm − lwf-mc |")]  # noqa: RUF001
    # Of three differences 2, 1 and 3 the mean is 2; Student's t with two degrees of freedom has 4.303 standard errors
    # of 1 / sqrt(3), and a bootstrap sample of three lies between 1 and 3.
    assert line.split(" | ")[1:3] == ["–", "+2.0 (-0.5 to +4.5)"]  # noqa: RUF001
    assert "\n| by bootstrap | – | (+1.0 to +3.0) | " in text  # noqa: RUF001
    assert line.endswith("| 3 |")
    assert "lwf-mc − finetune" not in text  # noqa: RUF001


def test_an_interval_is_that_of_the_normal_distribution_for_many_seeds():
    differences = np.random.default_rng(1).normal(0.5, 2, 400)
    mean, low, high = map(float, re.findall(r"[+-][\d.]+", tables.paired([(d, 0.0) for d in differences])))
    half = 1.96 * differences.std(ddof=1) / 20
    assert mean == pytest.approx(differences.mean(), abs=0.05)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.08)


def test_an_interval_of_few_seeds_holds_the_mean_19_times_of_20_where_that_by_bootstrap_does_not():
    draws = np.random.default_rng(0).normal(size=(2000, 3)).tolist()
    held = [low <= 0 <= high for low, high in map(intervals.interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
    for count, share in ((3, 3 / 4), (5, 5 / 6)):  # as docs/results.md says
        few = np.random.default_rng(0).normal(size=(300, count)).tolist()
        assert np.mean([low <= 0 <= high for low, high in map(intervals.bootstrapped, few)]) == pytest.approx(
            share, abs=0.03
        )
    assert intervals.bootstrapped(draws[0]) == (min(draws[0]), max(draws[0]))
    assert (
        intervals.interval([2.0]) == intervals.interval([2.0, 2.0]) == intervals.bootstrapped([2.0, 2.0]) == (2.0, 2.0)
    )


def classes_row(method: str, seed: int, step: int, name: str, distance: float | None, lost: float) -> dict:
    moved = {"distance": distance, "overlap": 50.0, "accuracy_before": 90.0, "accuracy": 90.0 - lost}
    return {"method": method, "seed": seed, "step": step, "class": name, **moved}


def test_the_attention_table_has_means_over_classes_and_steps_and_the_correlation_within_a_seed(tmp_path):
    path = tmp_path / "accuracy.csv"
    # By rank seed 0 agrees, seed 1 is reversed, and seed 2 has 1 - 6 * 2 / (3 * 8) = 0.5; the last class has no map.
    for seed, lost in enumerate(([1.0, 20.0, 30.0], [30.0, 20.0, 1.0], [20.0, 1.0, 30.0])):
        rows = [classes_row("lwm", seed, 1, "a", 0.1, lost[0]), classes_row("lwm", seed, 1, "b", 0.2, lost[1])]
        tables.write_rows(tables.attention_path(path), rows)
        rows = [classes_row("lwm", seed, 2, "a", 0.9, lost[2]), classes_row("lwm", seed, 2, "b", None, 90.0)]
        tables.write_rows(tables.attention_path(path), rows)
    tables.write_rows(tables.attention_path(path), [classes_row("frozen", 0, 1, name, 0.0, 3.0) for name in "ab"])
    frozen, lwm = tables.attention_table(FIVE, path).splitlines()[2:]
    assert frozen == "| frozen | 0.000 | 50.0 | 0.0 | 3.0 | – | – | 1 |"  # noqa: RUF001
    assert lwm.startswith("| lwm | 0.400 ± 0.000 | 50.0 ± 0.0 | 25.0 ± 0.0 | 35.2 ± 0.0 | +0.17 (-2.42 to +2.75) | ")


def test_correlation_among_classes_of_one_age_leaves_out_what_age_alone_does(tmp_path):
    """The younger classes move more and lose more; among those of one age the one that moves more loses less."""
    path = tmp_path / "accuracy.csv"
    tables.write_rows(
        tables.attention_path(path), [classes_row("lwm", 0, 1, "a", 5, 40), classes_row("lwm", 0, 1, "b", 6, 30)]
    )
    second = [("a", 1, 10), ("b", 2, 5), ("c", 7, 50), ("d", 8, 45)]
    tables.write_rows(tables.attention_path(path), [classes_row("lwm", 0, 2, *each) for each in second])
    line = tables.attention_table(FIVE, path).splitlines()[2]
    over_all, of_one_age = map(float, line.split(" | ")[5:7])
    ranks = np.array([[3, 4], [4, 3], [1, 2], [2, 1], [5, 6], [6, 5]])
    assert over_all == pytest.approx(np.corrcoef(ranks.T)[0, 1], abs=0.005)
    assert of_one_age == -1


def test_values_by_step_are_one_a_seed(tmp_path):
    rows = [
        {k: str(v) for k, v in classes_row("lwm", seed, step, "a", 1.0 * seed, 0).items()}
        for seed in (1, 2)
        for step in (1, 2)
    ]
    rows += [{k: str(v) for k, v in classes_row("lwm", 2, 2, "b", 4.0, 0).items()}]
    assert tables.by_step(rows, "lwm", "distance") == {1: [1.0, 2.0], 2: [1.0, 3.0]}


def test_the_points_of_the_plane_are_the_weights_of_a_form_and_each_method(tmp_path):
    protocol = PROTOCOLS["photos32-10+10"]
    protocol = dataclasses.replace(protocol, ablation=protocol.ablation | {"attention=signed": ""})
    for stem, names in (
        ("ablation", ["binary gamma=0", "binary gamma=1", "attention=signed", "lwf-mc beta=3"]),
        ("accuracy", ["lwf", JOINT]),
    ):
        for number, name in enumerate(names):
            values = row(name, 0, 1, 10.0 + number) | {"accuracy_new": 50.0 + number}
            values |= {"accuracy_old": None} if name == JOINT else {}
            tables.write_rows(tmp_path / f"{stem}.csv", [values])
    points = tables.points_of(protocol, tmp_path / "ablation.csv")
    assert points == {
        "lwm, binary, by gamma, seeds 0": [("0", [10.0], [50.0]), ("1", [11.0], [51.0])],
        "lwf-mc, by beta, seeds 0": [("3", [13.0], [53.0])],
    }
    assert tables.points_of(protocol, tmp_path / "accuracy.csv") == {"lwf, seeds 0": [("", [10.0], [50.0])]}


def test_the_points_of_a_curve_are_of_the_same_seeds(tmp_path):
    path = tmp_path / "ablation.csv"
    for name, seed, value in (
        ("binary gamma=0", 0, 10.0),
        ("binary gamma=0", 1, 20.0),
        ("binary gamma=1", 1, 21.0),
        ("binary gamma=1", 2, 31.0),
        ("softmax gamma=0", 0, 10.0),
        ("softmax gamma=1", 1, 10.0),
    ):
        tables.write_rows(path, [row(name, seed, 4, value)])
    points = tables.points_of(PROTOCOLS["photos32-5x4"], path)
    assert points == {"lwm, binary, by gamma, seeds 1": [("0", [20.0], [20.0]), ("1", [21.0], [21.0])]}


def test_fifths_of_few_classes_are_not_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_errorbar", lambda axes, number, *rest: drawn.append(number) or [])
    lost = {"few": [(0.1 * k, 5.0) for k in range(24)], "more": [(0.1 * k, 5.0) for k in range(25)]}
    widths = []
    for shown in (lost, {"few": lost["few"]}):
        plots.over_steps({"accuracy": {}}, tmp_path / "figure.png", "", shown)
        widths.append(Image.open(tmp_path / "figure.png").width)
    assert drawn == [1]
    assert widths[0] > 1.5 * widths[1]  # of nothing there is no panel


def test_the_table_of_read_outs_compares_each_with_the_head_in_pairs(tmp_path):
    path = tmp_path / "accuracy.csv"
    gains = {"prototypes": 1.0, "discriminant": 5.0, "rebalanced": -2.0}
    for seed in range(3):
        for step in range(5):
            head = 80.0 - 10 * step + seed
            values = {name: head + gain + (seed if step == 4 else 0) for name, gain in gains.items()}
            tables.write_rows(path, [row("lwm", seed, step, head) | values])
    tables.write_rows(path, [row("lwm", 3, 0, 99.0) | dict.fromkeys(gains, 1.0)])  # not finished
    tables.write_rows(path, [row("lwf", 0, step, 1.0) | dict.fromkeys(gains) for step in (4,)])  # without read-outs
    text = tables.readouts_table(FIVE, path)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert [line[:2] for line in lines] == [["lwm", name] for name in ("head", *gains)]
    assert lines[0] == ["lwm", "head", "61.0 ± 1.0", "–", "41.0 ± 1.0", "–", "3"]  # noqa: RUF001
    assert lines[2][2] == "66.2 ± 1.2"
    assert lines[2][3].startswith("+5.2 (+4.7 to +5.7)")
    assert lines[2][4] == "47.0 ± 2.0"
    assert lines[3][5].startswith("-1.0 (-3.5 to +1.5)")
    assert tables.readouts_table(PROTOCOLS["digits-2+2"], tmp_path / "none.csv") == ""
    for seed, off in ((0, 0.1), (1, 0.3)):
        off_by = {"mean_off_carried": off, "mean_off_left": 0.5}
        off_by |= {"covariance_off_carried": 0.25, "covariance_off_left": off + 1}
        tables.write_rows(tables.attention_path(path), [classes_row("lwm", seed, 1, "a", 0.1, 1.0) | off_by])
    assert tables.readouts_table(FIVE, path) == text + (
        "\n| method | means of old classes are off, carried along | left as they were | seeds |\n|---|---|---|---|\n"
        "| lwm | 0.20 ± 0.14 | 0.50 ± 0.00 | 2 |\n"
        "\n| method | covariances of old classes are off, carried along | left as they were | seeds |\n"
        "|---|---|---|---|\n"
        "| lwm | 0.25 ± 0.00 | 1.20 ± 0.14 | 2 |\n"
    )
