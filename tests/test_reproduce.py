"""Runs of protocols: steps, rows, what is published and refused. Most scripts only say what they were asked."""

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FIVE, checkpoint_of, image_folder, step_of, write_images
from PIL import Image

import config
import reproduce
from lwm import models
from lwm.experiments import protocols, tables
from lwm.experiments.protocols import JOINT, METHODS, PROTOCOLS
from lwm.runtime import checkpoint, hardware
from lwm.runtime.errors import RunError
from lwm.runtime.settings import READOUTS, read_settings

ROOT = Path(__file__).resolve().parent.parent


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
        found = {name: {"accuracy": 10.0 * number, "accuracy_old": 5.0} for number, name in enumerate(READOUTS[:-1])}
        saved = checkpoint_of(model, "resnet32", names, 8, steps=steps, training=training, readouts=found)
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
    assert [own[-1][name] for name in ("accuracy_old", "accuracy_new", "task_aware")] == ["1.0", "2.0", "99.0"]
    assert [own[-1][name] for name in READOUTS[1:]] == ["10.0", "20.0", ""]
    assert {call["settings"].seed for call in calls} == {1}
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
    assert [rows[0][name] for name in ("accuracy_before", "accuracy")] == ["80.0", "20.0"]
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


def test_the_cores_that_the_process_may_use_are_shared_out(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [reproduce.threads_of(jobs) for jobs in (1, 2, 3, 8)] == [4, 2, 1, 1]


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
    for groups in ("1,1", "2"):  # the last is how the recorded one begins
        assert reproduce.main([*flags, "--groups", groups]) == 2
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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["digits-2+2", "--methods", "x"], "has no 'x'"),
        (["photos32-search"], "--data-dir"),
        (["photos32-10+10-fp32", "--ablation"], "--ablation: photos32-10+10-fp32 has none"),
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


def test_what_a_script_says_as_it_fails_is_passed_on(tmp_path):
    flags = ["--checkpoint", str(tmp_path / "nothing.pth"), "--output", str(tmp_path / "it.onnx")]
    with pytest.raises(RunError, match=r"^export\.py .*error: .*nothing\.pth: no such file"):
        reproduce.call("export.py", flags, 1)


def test_the_command_that_is_recorded_parses():
    options = reproduce.arguments(["photos32-search", "--data-dir", "some/photos", "--ablation", "--jobs", "2"])
    words = tables.command_of("reproduce.py", options, "data_dir groups methods seeds ablation jobs")
    assert words[1:] == ["photos32-search", "--data-dir", "photos", "--seeds", "0", "--ablation", "--jobs", "2"]
    reproduce.arguments(words[1:])
