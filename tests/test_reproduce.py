"""The protocols: their rows, their table, what they refuse. The runs themselves are those of the three scripts."""

import numpy as np
import pytest

import reproduce
from settings import read_settings


def row(variant: str, seed: int, accuracy: float) -> dict:
    return {"variant": variant, "seed": seed, **dict.fromkeys(reproduce.COLUMNS, accuracy)}


def test_the_table_has_mean_and_spread_in_the_order_of_the_protocol(tmp_path):
    path = tmp_path / "accuracy.csv"
    values = {"lwm": [50.0, 61.0, 55.0], "finetune": [30.0]}
    for variant, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            reproduce.write_rows(path, row(variant, seed, accuracy))
    lines = reproduce.table(reproduce.PROTOCOLS["digits-2+2"], reproduce.read_rows(path)).splitlines()[4:]
    mean, spread = np.mean(values["lwm"]), np.std(values["lwm"], ddof=1)
    assert [line.split(" | ")[0] for line in lines] == ["| finetune", "| lwm"]
    assert lines[0].split(" | ")[1] == "30.0"
    assert lines[1].split(" | ")[1] == f"{mean:.1f} ± {spread:.1f}"
    assert lines[1].endswith("| 3 |")


def test_a_row_that_is_run_again_replaces_the_earlier_one(tmp_path):
    path = tmp_path / "accuracy.csv"
    for accuracy in (10.0, 20.0):
        reproduce.write_rows(path, row("lwm", 3, accuracy))
    assert [r["accuracy"] for r in reproduce.read_rows(path)] == ["20.0"]


@pytest.mark.parametrize("name", reproduce.PROTOCOLS)
def test_the_flags_of_a_protocol_are_flags_of_the_scripts(name, capsys):
    protocol = reproduce.PROTOCOLS[name]
    common = [*protocol.flags.split(), "--dataset", protocol.dataset]
    for flags in protocol.variants.values():
        form = reproduce.form_of(flags.split())
        first = read_settings("train_teacher_model", [*common, "--loss-form", form])
        assert first.loss_form == form
        second = read_settings("incremental_learning_system", [*common, *flags.split(), "--teacher", "x"])
        assert {"softmax-all": "softmax"}.get(second.loss_form, second.loss_form) == form


def test_settings_are_searched_on_other_classes_than_those_reported():
    for data in ("digits", "photos32"):
        searched = reproduce.PROTOCOLS[f"{data}-search"]
        (reported,) = (p for n, p in reproduce.PROTOCOLS.items() if n.startswith(data) and p is not searched)
        assert reported.pool.stop <= searched.pool.start
        assert "--hold-back" in searched.flags
        assert "--hold-back" not in reported.flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["digits-2+2", "--variants", "x"], "has no 'x'"), (["photos32-search"], "--data-dir")],
)
def test_what_is_refused_is_said_in_a_line(flags, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    assert reproduce.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
