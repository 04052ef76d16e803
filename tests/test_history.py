"""The tasks of several models side by side."""

import json
import shutil

import pytest

import edit_classes
import history
from lwm.reporting import plots
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")


def test_every_task_of_every_run_has_a_row(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    drawn, draw = [], plots.accuracy_over_tasks
    monkeypatch.setattr(plots, "accuracy_over_tasks", lambda lines, path: drawn.append(lines) or draw(lines, path))
    runs = [str(whole / "first"), str(whole), str(tmp_path / "empty")]
    assert history.main(runs) == 0
    out, err = capsys.readouterr()
    shown = [line.split()[:2] for line in out.splitlines()[1:]]
    student = str(whole / "student_model.pth")
    assert shown == [[str(whole / "first"), "0"], [str(whole), "0"], [str(whole), "1"]]
    assert "left out" in err and str(tmp_path / "empty") in err
    assert history.main([*runs, "--json", "--output", "other.html"]) == 0
    rows = json.loads(capsys.readouterr().out)
    answers = checkpoint.load(student)["tasks"][1]["answers"]
    assert rows[2]["classes"] == ["2", "3"] and rows[2]["accuracy_by_task"] == answers["groups"]
    assert (rows[2]["accuracy"], rows[2]["classifier"]) == (answers["accuracy"], answers["classifier"])
    lengths = [(name, len(every), len(first)) for name, every, first in drawn[-1]]
    assert lengths == [(str(whole / "first"), 1, 1), (str(whole), 2, 2)]
    page = (tmp_path / "other.html").read_text()
    assert page.count("<tr>") == 1 + len(rows) and "svg" in page and f"{answers['accuracy']:.1f}" in page


def test_what_is_not_known_is_left_empty_and_names_of_strangers_are_text(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(whole / "student_model.pth", "student.pth")
    assert edit_classes.main(["student.pth", "--rename", "0=<script>", "--remove", "1"]) == 0
    assert history.main(["student_edited.pth", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert [row["accuracy"] for row in rows] == [None, None] and rows[0]["accuracy_by_task"] == []
    page = (tmp_path / "history.html").read_text()
    assert "&lt;script&gt;" in page and "<script>" not in page and "<img" not in page


def test_what_is_no_run_is_refused_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, culprit in ((["."], "student_model.pth"), (["absent.pth"], "absent.pth"), ([".", "--output", "a"], "a")):
        assert history.main(flags) == 2
        assert culprit in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
