"""The protocols: their steps, their rows, their tables, what they refuse. The runs are those of the scripts."""

import copy
import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import checkpoint_of, image_folder, step_of, write_images
from PIL import Image

import checkpoint
import config
import hardware
import intervals
import models
import plots
import protocols
import reproduce
import tables
from protocols import JOINT, METHODS, PROTOCOLS, Protocol, is_joint
from run import STEP_SETTINGS
from settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
FIVE = Protocol("about", "digits", slice(0, 10), (2,) * 5, "--epochs 1", METHODS, order=None, shuffle=True)


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
            values = row(name, 0, 1, 10.0 + number) | ({"accuracy_old": None} if name == JOINT else {})
            tables.write_rows(tmp_path / f"{stem}.csv", [values])
    points = tables.points_of(protocol, tmp_path / "ablation.csv")
    assert points == {
        "lwm, binary, by gamma, seeds 0": [("0", [10.0], [10.0]), ("1", [11.0], [11.0])],
        "lwf-mc, by beta, seeds 0": [("3", [13.0], [13.0])],
    }
    assert tables.points_of(protocol, tmp_path / "accuracy.csv") == {"lwf, seeds 0": [("", [10.0], [10.0])]}


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


def test_a_seed_shuffles_the_pool_or_starts_later_in_it():
    pool = [str(digit) for digit in range(10)]
    assert protocols.groups_of(FIVE, pool, 0) == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]
    orders = [protocols.groups_of(FIVE, pool, seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(sum(order, [])) == pool for order in orders)  # noqa: RUF017
    turned = protocols.groups_of(PROTOCOLS["digits-search"], pool[4:], 2)
    assert turned == [["8", "9"], ["4", "5"]]


# A whole protocol, with scripts that only say what they were asked ------------------------------------------------


@pytest.fixture
def calls(monkeypatch, tmp_path, judged) -> list[dict]:
    """What the scripts are called with; each leaves a checkpoint whose accuracy is the number of its classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setitem(PROTOCOLS, "five", FIVE)
    seen: list[dict] = []

    def call(script: str, flags: list[str], threads: int) -> None:
        settings = read_settings(script.removesuffix(".py"), flags)
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if script == "demo.py":
            judged.append(flags)
            before, after = (checkpoint.load(path)["class_names"] for path in (settings.teacher, settings.student))
            old = len(before)
            metrics = {
                "classes": {"names": after, "teacher": [80.0] * old, "student": [10.0 * old] * len(after)},
                "attention": {"distance": [0.25] * (old - 1) + [None], "overlap": [60.0] * old},
                "means_off": {"carried": [0.5] * old} if old > 2 else {},
                "covariances_off": {"left": [0.75] * old},
            }
            (folder / "metrics.json").write_text(json.dumps(metrics))
            return
        steps, kind = [step_of(settings.old_classes, group_accuracy=[90.0])], "teacher"
        if settings.teacher:
            kind, steps = "student", copy.deepcopy(checkpoint.load(settings.teacher)["steps"])
            names = list(settings.new_classes)
            accuracies = [accuracy - 10 for accuracy in steps[-1]["group_accuracy"]]
            steps.append(step_of(names, group_accuracy=[*accuracies, 90.0]))
        names = [name for step in steps for name in step["classes"]]
        steps[-1] |= {n: getattr(settings, n) for n in reproduce.SETTINGS + reproduce.WEIGHED if hasattr(settings, n)}
        steps[-1] |= {"method": settings.method, "learning_rate": settings.lr}
        log = [{"epoch": 1, "loss": 1.0, "test_accuracy": float(len(names)), "test_task_aware": 99.0}]
        if settings.teacher:
            log[0] |= {"test_accuracy_old": 1.0, "test_accuracy_new": 2.0}
        model = models.build("resnet32", len(names), 8)
        training = {"epochs": 1, "log": log}
        saved = checkpoint_of(model, "resnet32", names, 8, steps=steps, training=training)
        monkeypatch.setattr(checkpoint, "load", lambda path: kept[Path(path)])
        kept[folder / f"{kind}_model.pth"] = saved
        seen.append({"script": script, "settings": settings, "names": names})

    kept: dict[Path, dict] = {}
    monkeypatch.setattr(reproduce, "call", call)
    return seen


@pytest.fixture
def judged() -> list[list[str]]:
    """The flags of every call of demo.py."""
    return []


def five(*flags: str) -> int:
    return reproduce.main(["five", "--seeds", "1", *flags])


def test_steps_are_chained_and_the_first_is_shared(calls, tmp_path):
    assert five("--methods", "lwf-mc,lwm,frozen") == 0
    assert [call["script"] for call in calls].count("train_teacher_model.py") == 1
    assert len(calls) == 1 + 3 * 4
    order = protocols.groups_of(FIVE, [str(digit) for digit in range(10)], 1)
    last = [call for call in calls if len(call["names"]) == 10]
    assert [call["names"] for call in last] == [sum(order, [])] * 3  # noqa: RUF017
    rows = tables.read_rows(tmp_path / "results" / "five" / "accuracy.csv")
    assert len(rows) == 3 * 5
    own = [r for r in rows if r["method"] == "lwm"]
    assert [float(r["accuracy"]) for r in own] == [2, 4, 6, 8, 10]
    assert [r["forgetting"] for r in own] == ["", "10.0", "15.0", "20.0", "25.0"]
    assert [r["gamma"] for r in own] == ["", *["0.1"] * 4]
    assert {r["gamma"] for r in rows if r["method"] != "lwm"} == {""}
    assert "| lwm | 6.0 | 10.0 |" in (tmp_path / "results" / "five" / "table.md").read_text()
    (about,) = json.loads((tmp_path / "results" / "five" / "environment.json").read_text())
    assert about["command"] == "python3 reproduce.py five --methods lwf-mc,lwm,frozen --seeds 1 --jobs 1"


def test_attention_has_a_row_for_each_old_class_after_each_step(calls, judged, tmp_path):
    assert five("--methods", "lwm") == 0
    assert five("--methods", "lwm") == 0
    assert len(judged) == 4  # once for each step, and not again
    rows = tables.read_rows(tmp_path / "results" / "five" / "attention.csv")
    assert [int(r["step"]) for r in rows] == [1] * 2 + [2] * 4 + [3] * 6 + [4] * 8
    order = sum(protocols.groups_of(FIVE, [str(digit) for digit in range(10)], 1), [])  # noqa: RUF017
    assert [r["class"] for r in rows[-8:]] == order[:8]
    last = rows[-1]
    assert [last[name] for name in ("method", "accuracy_before", "accuracy", "distance", "overlap")] == [
        "lwm",
        "80.0",
        "80.0",
        "",
        "60.0",
    ]
    assert rows[-2]["distance"] == "0.25"
    assert [last["mean_off_carried"], rows[0]["mean_off_carried"], last["mean_off_left"]] == ["0.5", "", ""]
    assert [last["covariance_off_carried"], last["covariance_off_left"]] == ["", "0.75"]


def test_a_protocol_of_several_steps_has_figures_that_name_what_they_show(calls, monkeypatch, tmp_path):
    monkeypatch.setitem(PROTOCOLS, "five", dataclasses.replace(FIVE, ablation=protocols.GAMMAS))
    assert five("--methods", "lwm,frozen") == 0
    assert five("--ablation", "--methods", "binary gamma=0,binary gamma=1") == 0
    results = tmp_path / "results" / "five"
    sources = {"steps": ["accuracy"], "attention": ["attention"], "plane": ["ablation", "accuracy"]}
    for name, tables_ in sources.items():
        text = Image.open(results / f"{name}.png").text["Description"]
        assert text == tables.fingerprint(*(results / f"{table}.csv" for table in tables_))
    assert len(set(map(str, (Image.open(results / f"{name}.png").text for name in sources)))) == 3
    assert "| lwm |" in (results / "attention.md").read_text()
    assert "| binary gamma=1 |" in (results / "ablation_attention.md").read_text()


def test_every_call_is_in_the_environment_once(calls, tmp_path):
    for methods in ("lwm", "lwm", "lwf-mc"):
        assert five("--methods", methods) == 0
    about = json.loads((tmp_path / "results" / "five" / "environment.json").read_text())
    assert [each["command"].split()[4] for each in about] == ["lwm", "lwf-mc"]


def test_what_comes_after_a_model_is_made_again_when_that_was_made_otherwise(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(reproduce, "call", lambda script, flags, threads: called.append(flags[-1]))
    teacher = tmp_path / "first" / "teacher_model.pth"
    for folder in ("first", "student"):
        (tmp_path / folder).mkdir()
    for history in ("one", "one", "another"):
        (tmp_path / "first" / "done").write_text(history)
        reproduce.step("incremental_learning_system.py", tmp_path / "student", ["--seed", "1"], 1, after=teacher)
    assert called == ["--resume", "--overwrite"]


def test_what_is_done_is_skipped_unless_it_was_done_otherwise(calls, monkeypatch):
    assert five("--methods", "lwm") == 0
    before = len(calls)
    assert five("--methods", "lwm") == 0
    assert len(calls) == before
    monkeypatch.setitem(METHODS, "lwm", "--method lwm --gamma 2")
    assert five("--methods", "lwm") == 0
    again = calls[before:]
    assert len(again) == 4
    assert all(call["settings"].overwrite and call["settings"].gamma == 2 for call in again)


def test_an_interrupted_step_is_resumed(calls, tmp_path):
    assert five("--methods", "lwm") == 0
    (tmp_path / "runs/reproduce/five/seed1/lwm/4/done").unlink()
    before = len(calls)
    assert five("--methods", "lwm") == 0
    (again,) = calls[before:]
    assert again["settings"].resume
    assert not again["settings"].overwrite


def test_a_closed_pipe_leaves_no_old_table(tmp_path, monkeypatch):
    """As of ``reproduce.py ... --table | head``."""

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("before\n\n| 1 |\n\nbehind\n")
    (tmp_path / "table.md").write_text("| 1 |\n")
    with pytest.raises(BrokenPipeError):
        reproduce.publish(tmp_path / "table.md", "| 2 |\n")
    assert (tmp_path / "table.md").read_text() == "| 2 |\n"
    assert "| 2 |" in (tmp_path / "README.md").read_text()


def test_the_documents_show_the_new_tables_where_they_showed_the_old(calls, tmp_path):
    readme, results, table = (tmp_path / name for name in ("README.md", "docs/results.md", "results/five/table.md"))
    results.parent.mkdir()
    for methods in ("lwf", "lwm"):
        assert five("--methods", methods) == 0
        text = table.read_text()
        whole, only = (f"before\n\n{shown}\nafter\n" for shown in (text, text.partition("\n\n")[2]))
        if methods == "lwf":
            results.write_text(whole)
            readme.write_text(only)
    assert "| lwm | " in text
    assert (results.read_text(), readme.read_text()) == (whole, only)


def test_sigterm_is_passed_on_to_the_script_that_runs_which_saves_and_ends(tmp_path):
    for source in (*ROOT.glob("*.py"), ROOT / "models"):
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / source.name)
    image_folder(tmp_path / "photos", dict.fromkeys("abcd", 16), dict.fromkeys("abcd", 2))
    command = [sys.executable, "reproduce.py", "folder", "--data-dir", "photos", "--groups", "2,2"]
    folder = tmp_path / "runs" / "reproduce" / "folder" / "seed0" / "first-binary"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "teacher_model.pth").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.terminate()
        _, said = process.communicate()
    assert (process.returncode, said) == (128 + signal.SIGTERM, "interrupted; the same command goes on\n")
    assert not (folder / ".lock").exists()
    assert not checkpoint.load(folder / "teacher_model.pth")["finished"]


def test_joint_is_trained_on_all_classes_at_once(calls, tmp_path):
    assert five("--methods", JOINT) == 0
    (call,) = calls
    assert call["script"] == "train_teacher_model.py"
    assert len(call["names"]) == 10
    assert call["settings"].loss_form == "softmax"
    (only,) = tables.read_rows(tmp_path / "results" / "five" / "accuracy.csv")
    assert (only["step"], only["accuracy"], only["accuracy_old"]) == ("4", "10.0", "")


def test_joint_with_other_settings_is_trained_at_once_too(calls, monkeypatch, tmp_path):
    more = {f"{JOINT} epochs=2": f"{METHODS[JOINT]} --epochs 2"}
    monkeypatch.setitem(PROTOCOLS, "five", dataclasses.replace(FIVE, ablation=more))
    assert five("--ablation") == 0
    (call,) = calls
    assert (len(call["names"]), call["settings"].epochs) == (10, 2)
    assert not (tmp_path / "results/five/plane.png").exists()  # there are neither old nor new classes


# The protocols ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_flags_of_a_protocol_are_flags_of_the_scripts(name):
    protocol = PROTOCOLS[name]
    common = [*protocol.flags.split(), "--dataset", protocol.dataset]
    for variant, text in (protocol.methods | protocol.ablation).items():
        flags = shlex.split(text)
        if is_joint(variant):
            read_settings("train_teacher_model", [*common, *flags])
            continue
        form = reproduce.form_of(flags)
        first = read_settings("train_teacher_model", [*common, "--loss-form", form])
        assert first.loss_form == form
        second = read_settings("incremental_learning_system", [*common, *flags, "--teacher", "x"])
        assert {"softmax-all": "softmax", None: form}.get(second.loss_form, second.loss_form) == form
        assert second.precision != "auto"
        if name != "folder":  # what stands in config.py decides nothing
            said = first.given | second.given | {"seed"} | {name.lower() for name in reproduce.OPEN}
            assert said >= {*STEP_SETTINGS, "model", "image_size", "lr", "incremental_lr", "epochs"}


def test_the_pool_is_as_large_as_the_steps_take_and_each_name_is_a_folder_of_its_own():
    for protocol in PROTOCOLS.values():
        if protocol.groups:
            assert sum(protocol.groups) <= protocol.pool.stop - protocol.pool.start
        names = [*protocol.methods, *protocol.ablation]
        folders = {name.replace(" ", "_") for name in names}
        assert len(folders) == len(names)
        assert not any("," in name or "/" in name for name in names)


def test_settings_are_searched_on_other_classes_than_those_reported():
    for data in ("digits", "photos32"):
        searched = PROTOCOLS[f"{data}-search"]
        for name, reported in PROTOCOLS.items():
            if name.startswith(data) and "search" not in name:
                # The protocols on all classes contain those of the search.
                everything = 10 if data == "digits" else 100
                assert reported.pool.stop <= searched.pool.start or reported.pool == slice(0, everything)
                assert "--hold-back 0 " in reported.flags
        assert re.search(r"--hold-back 0\.[12]$", searched.flags)


def test_your_own_classes_come_by_name_in_the_groups_that_you_say(calls, tmp_path, capsys):
    for name in ("dog", "ant", "cat", "bee", "elk"):
        for split in ("train", "test"):
            write_images(tmp_path / "mine" / split / name, 2)
    flags = ["folder", "--data-dir", "mine", "--methods", "lwm"]
    assert reproduce.main([*flags, "--groups", "2,1"]) == 0
    assert [call["names"] for call in calls] == [["ant", "bee"], ["ant", "bee", "cat"]]
    rows = tables.read_rows(tmp_path / "results/folder/accuracy.csv")
    assert [row["step"] for row in rows] == ["0", "1"]
    # Rows of other images or groups would be averaged with these.
    assert reproduce.main([*flags, "--groups", "2,1", "--jobs", "2"]) == 0
    assert reproduce.main([*flags, "--groups", "1,1"]) == 2
    assert "move that folder away" in capsys.readouterr().err
    assert tables.read_rows(tmp_path / "results/folder/accuracy.csv") == rows


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("folder --data-dir mine", "--groups"),
        ("digits-2+2 --groups 2,2", "--groups"),
        ("folder --groups 2,x", "--groups is 'x'"),
        ("folder --data-dir mine --groups 3,3", "5 classes in train, and the protocol needs 6"),
    ],
)
def test_groups_that_cannot_be_are_said(calls, tmp_path, capsys, flags, words):
    for name in "abcde":
        (tmp_path / "mine" / "train" / name).mkdir(parents=True)
    assert reproduce.main(flags.split()) == 2
    assert words in capsys.readouterr().err
    assert calls == []


def test_cifar_comes_in_the_order_of_the_field():
    names = protocols.class_order(PROTOCOLS["cifar100-10x10"], None)
    assert len(set(names)) == 100
    # iCaRL's shuffle of the class numbers with seed 1993 begins 68, 56, 78, 8, 23, 84, 90, 65, 74, 76.
    alphabet = sorted(names)
    assert [alphabet.index(name) for name in names[:10]] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]


def test_what_a_variant_is_compared_with_is_in_the_same_table():
    assert protocols.REFERENCES["softmax gamma=0.3"] == "softmax gamma=0"
    for protocol in PROTOCOLS.values():
        compared = {protocols.REFERENCES.get(name) for name in protocol.ablation} - {None}
        assert compared <= set(protocol.ablation)


def test_a_grid_names_what_it_varies():
    made = protocols.grid("lwf lwm", incremental_lr=[0.1], gamma=[0, 1])
    assert made["lwm incremental_lr=0.1 gamma=1"] == "--method lwm --incremental-lr 0.1 --gamma 1"
    assert len(made) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["digits-2+2", "--methods", "x"], "has no 'x'"),
        (["photos32-search"], "--data-dir"),
        (["cifar100-10x10", "--ablation"], "--ablation: cifar100-10x10 has none"),
    ],
)
def test_what_is_refused_is_said_in_a_line(flags, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    assert reproduce.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(("name", "value"), [("LOSS_FORM", "softmax"), ("METHOD", "lwf"), ("BACKBONE_LR", 0.1)])
def test_what_config_has_of_its_own_does_not_leak_into_a_protocol(name, value, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(config, name, value)
    assert reproduce.main(["digits-2+2", "--work-dir", str(tmp_path / "work")]) == 2
    assert f"config.py: {name} is {value!r}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has", [True, False])
def test_bf16_where_it_is_emulated_is_warned_of_before_hours_are_spent(calls, monkeypatch, tmp_path, capsys, has):
    monkeypatch.setattr(hardware, "has_bf16", lambda device: has)
    monkeypatch.setitem(PROTOCOLS, "five", dataclasses.replace(FIVE, flags="--precision bf16"))
    assert reproduce.main(["five", "--methods", "lwm", "--work-dir", str(tmp_path / "work")]) == 0
    assert ("ten times as long as fp32" in capsys.readouterr().err) is not has


def test_what_a_protocol_leaves_open_is_as_config_has_it():
    for name, value in reproduce.OPEN.items():
        assert getattr(config, name) == value


def test_the_command_that_is_recorded_parses():
    options = reproduce.arguments(["photos32-search", "--data-dir", "some/photos", "--ablation", "--jobs", "2"])
    words = tables.command_of("reproduce.py", options, "data_dir groups methods seeds ablation jobs")
    assert words[1:] == ["photos32-search", "--data-dir", "photos", "--seeds", "0", "--ablation", "--jobs", "2"]
    reproduce.arguments(words[1:])


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
