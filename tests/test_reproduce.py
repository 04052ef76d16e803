"""Runs of protocols: tasks, rows, what is published and refused. The scripts only say what they were asked."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import image_folder
from PIL import Image
from studies import FIVE

import config
import reproduce
from lwm.experiments import cells, protocols, tables
from lwm.experiments.protocols import JOINT, METHODS, PROTOCOLS
from lwm.runtime import checkpoint, hardware

ROOT = Path(__file__).resolve().parent.parent
TASK = dict.fromkeys(cells.SETTINGS) | {"beta": 1.0, "gamma": 0.1}
LOG = {"test_accuracy": 70.0, "test_accuracy_old": 60.0, "test_accuracy_new": 80.0, "test_task_aware": 99.0}
SAVED = {
    "tasks": [TASK | {"group_accuracy": accuracies} for accuracies in ([90.0], [80.0, 60.0], [85.0, 30.0, 50.0])],
    "classifiers": {"lda": {"accuracy": 75.0}},
    "training": {"log": [LOG | {"distillation": 1.0, "attention": 1.0}]},
}
METRICS = {
    "classes": {"names": ["1", "0", "2"], "teacher": [80.0, 70.0], "student": [10.0, 20.0, 30.0]},
    "attention": {"distance": [0.25, None], "overlap": [60.0, 50.0]},
    "means_off": {"compensated": [0.5, 0.25]},
    "covariances_off": {},
}


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[SimpleNamespace]:
    """What the scripts are called with; each seems to leave SAVED or METRICS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setitem(PROTOCOLS, "five", FIVE)
    monkeypatch.setattr(cells, "load", lambda path: SAVED)
    seen: list[SimpleNamespace] = []

    def call(script: str, flags: list[str], threads: int) -> None:
        named = dict(zip(flags[::2], flags[1::2], strict=False))
        folder = Path(named["--output-dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(METRICS))
        seen.append(SimpleNamespace(script=script, named=named, how=flags[-1]))

    monkeypatch.setattr(cells, "call", call)
    return seen


def trained(calls) -> list[SimpleNamespace]:
    return [call for call in calls if call.script != "demo.py"]


def five(*flags: str) -> int:
    return reproduce.main(["five", "--seeds", "1", *flags])


def test_tasks_are_chained_and_the_first_is_shared(calls, tmp_path):
    assert five("--methods", "lwf-mc,lwm,frozen") == 0
    first, *later = trained(calls)
    groups = [",".join(group) for group in protocols.groups_of(FIVE, [str(digit) for digit in range(10)], 1)]
    assert (first.script, first.named["--old-classes"]) == ("train_teacher_model.py", groups[0])
    assert [call.named["--new-classes"] for call in later] == 3 * groups[1:]
    work = "runs/reproduce/five/seed1"
    teachers = [f"{work}/lwm/{task}/student_model.pth" for task in (1, 2, 3)]
    assert [call.named["--teacher"] for call in later[4:8]] == [f"{work}/first-binary/teacher_model.pth", *teachers]
    assert {call.named["--seed"] for call in trained(calls)} == {"1"}
    assert {call.named["--classifier"] for call in calls if call.script == "demo.py"} == {"head"}
    assert len(tables.read_rows(tmp_path / "results/five/accuracy.csv")) == 3 * 5
    assert len(tables.read_rows(tmp_path / "results/five/attention.csv")) == 3 * 4 * 2
    (about,) = tables.recorded_calls(tmp_path / "results/five/environment.json")
    assert about["command"] == "python3 reproduce.py five --methods lwf-mc,lwm,frozen --seeds 1 --jobs 1"
    reproduce.arguments(about["command"].split()[2:])


def test_a_row_has_what_the_checkpoint_says_of_its_last_task():
    row = cells.row_of(SAVED)
    names = ("accuracy", "accuracy_old", "accuracy_new", "task_aware", "lda", "ncm")
    assert [row[name] for name in names] == [70.0, 60.0, 80.0, 99.0, 75.0, None]
    assert row["forgetting"] == ((90 - 85) + (60 - 30)) / 2
    assert (row["beta"], row["gamma"]) == (1.0, 0.1)
    first = cells.row_of(SAVED | {"tasks": SAVED["tasks"][:1], "training": {"log": [LOG]}})
    assert (first["forgetting"], first["beta"], first["gamma"]) == (None, None, None)
    by_head = {"accuracy": 50.0, "accuracy_new": 40.0}
    assert cells.row_of(SAVED | {"training": {}, "classifiers": {"head": by_head}})["accuracy_new"] == 40.0


def test_each_old_class_has_a_row():
    one, other = cells.rows_of_classes(METRICS)
    off = {"mean_off_uncompensated": None, "covariance_off_compensated": None, "covariance_off_uncompensated": None}
    assert list((one | off).values()) == ["1", 80.0, 10.0, 0.25, 60.0, 0.5, None, None, None]
    assert list((other | off).values()) == ["0", 70.0, 20.0, None, 50.0, 0.25, None, None, None]


def test_tables_and_figures_name_what_they_show(calls, monkeypatch, tmp_path):
    monkeypatch.setitem(PROTOCOLS, "five", dataclasses.replace(FIVE, ablation=protocols.GAMMAS))
    readme, results = tmp_path / "README.md", tmp_path / "results/five"
    results.mkdir(parents=True)
    (results / "table.md").touch()
    readme.write_text("before\n\n<!-- results/five/table.md -->\n\nold\n\n<!-- end -->\n\nbehind\n")
    assert five("--methods", "lwm,frozen") == five("--ablation", "--methods", "binary gamma=0,binary gamma=1") == 0
    for name, csv in {"tasks": "accuracy", "attention": "attention"}.items():
        text = Image.open(results / f"{name}.png").text["Description"]
        assert text == tables.fingerprint(results / f"{csv}.csv")
    table = (results / "table.md").read_text()
    assert "| lwm | 70.0 | 70.0 | 60.0 | 80.0 |" in table
    assert readme.read_text() == f"before\n\n<!-- results/five/table.md -->\n\n{table}\n<!-- end -->\n\nbehind\n"
    for name in ("table", "attention"):
        assert "| binary gamma=1 |" in (results / f"ablation_{name}.md").read_text()


def test_what_is_done_is_skipped_unless_it_or_what_it_comes_after_was_done_otherwise(calls, monkeypatch, tmp_path):
    for _ in range(2):
        assert five("--methods", "lwm") == 0
        assert len(calls) == 1 + 2 * 4
        assert len(tables.recorded_calls(tmp_path / "results/five/environment.json")) == 1
    (tmp_path / "runs/reproduce/five/seed1/lwm/4/done").unlink()  # interrupted
    assert five("--methods", "lwm") == 0
    assert [call.how for call in calls[9:]] == ["--resume"]
    monkeypatch.setitem(METHODS, "lwm", "--method lwm --gamma 2")
    assert five("--methods", "lwm") == 0
    assert [call.how for call in trained(calls[10:])] == ["--overwrite"] * 4
    teacher, student = tmp_path / "first/teacher_model.pth", tmp_path / "student"
    teacher.parent.mkdir()
    for history in ("one", "one", "another"):
        (teacher.parent / "done").write_text(history)
        cells.run_script("incremental_learning_system.py", student, ["--seed", "1"], 1, after=teacher)
    assert [call.how for call in calls[18:]] == ["--resume", "--overwrite"]


def test_joint_is_trained_on_all_classes_at_once(calls, monkeypatch, tmp_path):
    more = {f"{JOINT} epochs=2": f"{METHODS[JOINT]} --epochs 2"}
    monkeypatch.setitem(PROTOCOLS, "five", dataclasses.replace(FIVE, ablation=more))
    assert five("--methods", JOINT) == five("--ablation") == 0
    assert [call.script for call in calls] == ["train_teacher_model.py"] * 2
    assert {len(call.named["--old-classes"].split(",")) for call in calls} == {10}
    for name in ("accuracy", "ablation"):
        assert tables.read_rows(tmp_path / f"results/five/{name}.csv")["task"].tolist() == [4]


def test_sigterm_is_passed_on_to_the_script_that_runs_which_saves_and_ends(tmp_path):
    for name in ("lwm", "models"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    image_folder(tmp_path / "photos", dict.fromkeys("abcd", 16), dict.fromkeys("abcd", 2))
    folder = tmp_path / "runs/reproduce/folder/seed0/first-binary"
    command = [sys.executable, "reproduce.py", "folder", "--data-dir", "photos", "--groups", "2,2", "--methods", "lwm"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "teacher_model.pth").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.terminate()
        _, said = process.communicate()
    assert (process.returncode, said) == (128 + signal.SIGTERM, "interrupted; the same command goes on\n")
    assert not checkpoint.load(folder / "teacher_model.pth")["finished"]


def test_your_own_classes_come_by_name_in_the_groups_that_you_say(calls, tmp_path, capsys):
    for name in ("dog", "ant", "cat", "bee", "elk"):
        (tmp_path / "mine/train" / name).mkdir(parents=True)
    flags = ["folder", "--data-dir", "mine", "--methods", "lwm"]
    for more in ([], ["--jobs", "2"]):
        assert reproduce.main([*flags, "--groups", "2,1", *more]) == 0
    first, later = trained(calls)
    assert (first.named["--old-classes"], later.named["--new-classes"]) == ("ant,bee", "cat")
    for groups in ("1,1", "2"):  # the last is how the recorded one begins
        assert reproduce.main([*flags, "--groups", groups]) == 2
        assert "move that folder away" in capsys.readouterr().err  # the rows would be averaged with these


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("folder --data-dir mine", "--groups is for the protocol folder"),
        ("digits-2+2 --groups 2,2", "--groups is for the protocol folder"),
        ("folder --groups 2,x", "--groups: invalid"),
        ("folder --data-dir mine --groups 3,3", "5 classes in train, and the protocol needs 6"),
        ("five --ablation", "--ablation: five has none"),
        ("five --table", "no row"),
        ("five --jobs 0", "--jobs: invalid"),
        ("five --methods lwm,lwn", "there is no 'lwn'"),
        ("five --methods lwf", "config.py: METHOD is 'lwf'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(calls, monkeypatch, tmp_path, capsys, flags, words):
    for name in "abcde":
        (tmp_path / "mine/train" / name).mkdir(parents=True)
    if "config.py" in words:
        monkeypatch.setattr(config, "METHOD", "lwf")
    assert reproduce.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert calls == []


@pytest.mark.parametrize("has", [True, False])
def test_bf16_that_is_emulated_is_warned_of_before_hours_are_spent(calls, monkeypatch, capsys, has):
    monkeypatch.setattr(hardware, "has_bf16", lambda device: has)
    monkeypatch.setitem(PROTOCOLS, "five", dataclasses.replace(FIVE, flags="--precision bf16"))
    assert five("--methods", JOINT) == 0
    assert ("ten times as long as fp32" in capsys.readouterr().err) is not has


def test_what_has_no_training_is_made_anew_where_it_was_interrupted(calls):
    assert five("--methods", "closed-form,lwm") == 0
    how = {call.named.get("--method"): call.how for call in trained(calls)}
    assert how == {None: "--resume", "closed-form": "--overwrite", "lwm": "--resume"}
