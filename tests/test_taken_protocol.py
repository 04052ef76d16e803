"""A protocol on a network that is taken as it is: the scripts themselves, on somebody's network of three classes."""

from __future__ import annotations

import pytest
import torch
from conftest import image_folder

import incremental_learning_system as incremental
import reproduce
import train_teacher_model as trainer
from lwm import models
from lwm.experiments import cells, tables
from lwm.experiments.protocols import PROTOCOLS, REFERENCE, Protocol, Taken
from lwm.runtime import checkpoint

SCRIPTS = {"train_teacher_model.py": trainer.main, "incremental_learning_system.py": incremental.main}
TINY = Protocol(
    about="three classes, then two and one",
    dataset="folder",
    pool=slice(0, 6),
    groups=(3, 2, 1),
    flags="--image-size 8",
    methods={"closed-form": "--method closed-form", REFERENCE: ""},
    taken=Taken("--model resnet32", "weights.pth", new="new", names="names.txt", images=6),
)


@pytest.mark.usefixtures("unrendered")
def test_a_network_that_is_taken_learns_in_tasks_on_the_images_that_a_seed_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(cells, "call", lambda script, flags, threads: SCRIPTS[script](flags))
    monkeypatch.setitem(PROTOCOLS, "tiny", TINY)
    image_folder(tmp_path / "data" / "new", dict.fromkeys("def", 8), dict.fromkeys("def", 4))
    image_folder(tmp_path / "data" / "old", {}, {"a": 4, "b": 4})
    (tmp_path / "data" / "names.txt").write_text("a\nb\nc\n")
    torch.manual_seed(0)
    torch.save(models.build("resnet32", 3, 8).state_dict(), tmp_path / "weights.pth")
    flags = ["--data-dir", str(tmp_path / "data"), "--weights-dir", str(tmp_path), "--work-dir", str(tmp_path / "w")]
    assert reproduce.main(["tiny", *flags, "--seeds", "0,1"]) == 0
    drawn = []
    for seed in (0, 1):
        saved = checkpoint.load(tmp_path / "w" / "tiny" / f"seed{seed}" / "closed-form" / "2" / "student_model.pth")
        assert [len(task["classes"]) for task in saved["tasks"]] == [3, 2, 1]
        images = tmp_path / "w" / "tiny" / f"seed{seed}" / "images"
        assert {path.name for path in (images / "test").iterdir()} == set("abdef")
        drawn.append({path.name for path in (images / "train" / "d").iterdir()})
        assert len(drawn[-1]) == 6
    assert drawn[0] != drawn[1]
    rows = tables.read_rows(tmp_path / "results" / "tiny" / "accuracy.csv")
    own = rows[rows["method"] == "closed-form"].set_index(["seed", "task"])
    first = checkpoint.load(tmp_path / "w" / "tiny" / "seed0" / "first-softmax" / "teacher_model.pth")
    assert own.loc[(0, 0), "accuracy_first"] == pytest.approx(first["tasks"][0]["group_accuracy"][0])
    last = saved["tasks"][-1]["group_accuracy"]
    assert own.loc[(1, 2), "accuracy_first"] == pytest.approx(last[0])
    assert own.loc[(1, 2), "accuracy_later"] == pytest.approx(sum(last[1:]) / 2, abs=1e-3)
    assert (own["minutes"] > 0).all()
    header, _, network, closed, reference = (tmp_path / "results" / "tiny" / "table.md").read_text().splitlines()
    assert "the network itself" in network and "closed-form" in closed and REFERENCE in reference
    assert header.count("|") == closed.count("|")
