"""The read-outs in the scripts: what is kept, carried along, answered with and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import checkpoint_of, image_folder

import config
import demo
import export
import gradcam
import incremental_learning_system as incremental
import predict
import train_teacher_model as trainer
from lwm import classifiers, evaluation, models
from lwm.images import datasets
from lwm.runtime import checkpoint, settings
from lwm.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("unrendered")

SMALL = ["--model", "resnet32", "--image-size", "8", "--epochs", "2"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Teacher, student, and the student of a second step, of a folder's classes."""
    root = tmp_path_factory.mktemp("readout")
    images = image_folder(root / "images", dict.fromkeys("abcdef", 8), dict.fromkeys("abcdef", 3))
    flags = [*SMALL, "--dataset", "folder", "--data-dir", str(images), "--cache-dir", str(root / "cache")]
    assert trainer.main([*flags, "--old-classes", "a,b", "--output-dir", str(root / "0")]) == 0
    before = root / "0" / "teacher_model.pth"
    for number, new in enumerate(("c,d", "e,f"), 1):
        here = root / str(number)
        assert (
            incremental.main([*flags, "--teacher", str(before), "--new-classes", new, "--output-dir", str(here)]) == 0
        )
        before = here / "student_model.pth"
    return root, flags


def test_every_step_keeps_and_carries_the_statistics_of_all_classes(steps, capsys):
    root, _ = steps
    for number, name in enumerate(("0/teacher", "1/student", "2/student")):
        saved = checkpoint.load(root / f"{name}_model.pth")
        classes = 2 + 2 * number
        assert saved["statistics"]["means"].shape == (classes, 64)
        assert saved["statistics"]["of"] == list(range(classes))
        assert list(saved["readouts"]) == list(settings.READOUTS)
        assert saved["readouts"]["head"]["accuracy"] == pytest.approx(saved["training"]["log"][-1]["test_accuracy"])
    before = checkpoint.load(root / "1" / "student_model.pth")["statistics"]["means"]
    after = checkpoint.load(root / "2" / "student_model.pth")["statistics"]["means"][:4]
    assert not torch.allclose(before, after, atol=1e-3)  # the network has moved, and they with it


def test_what_answers_unasked(steps, tmp_path, capsys, monkeypatch):
    """The discriminant, but for a network of one step, whose head leans to no class, and one without statistics."""
    root, flags = steps
    teacher, student = str(root / "0" / "teacher_model.pth"), str(root / "1" / "student_model.pth")
    bare = str(tmp_path / "bare.pth")
    checkpoint.save(Path(bare), checkpoint.load(Path(teacher)) | {"statistics": {}, "readouts": {}})
    image = str(sorted((root / "images" / "test" / "c").iterdir())[0])

    def explained(path):
        assert gradcam.main(["--checkpoint", path, "--image", image, "--output", str(tmp_path / "map.png")]) == 0
        return capsys.readouterr().out.split("(")[1].split(")")[0]

    assert [explained(path) for path in (teacher, student, bare)] == ["head", "discriminant", "head"]
    both = [*flags, "--student", student, "--output-dir", str(tmp_path)]
    for given, expected in ((teacher, "discriminant"), (bare, "head")):
        assert demo.main([*both, "--teacher", given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["readout"] == expected
    assert demo.main([*both, "--teacher", bare, "--readout", "prototypes"]) == 2
    assert capsys.readouterr().err.startswith("error: --teacher: the checkpoint has no statistics")
    monkeypatch.setattr(config, "READOUT", "head")
    assert explained(student) == "head"
    onnx = str(tmp_path / "student.onnx")
    assert export.main(["--checkpoint", student, "--output", onnx]) == 0
    assert "read-out head" in capsys.readouterr().out
    assert predict.main([image, "--checkpoint", student, "--json", "--top", "4"]) == 0
    shares = [each["probability"] for each in json.loads(capsys.readouterr().out)[0]["classes"]]
    assert sum(shares) != pytest.approx(1, abs=1e-3)  # the sigmoids of the head
    for flag, where in ((["--readout", "heads"], "--readout"), ([], "config.py: READOUT")):
        monkeypatch.setattr(config, "READOUT", "heads")
        assert predict.main([image, "--checkpoint", student, *flag]) == 2
        assert f"error: {where} is 'heads': one of auto, head, " in capsys.readouterr().err


@pytest.mark.parametrize("name", [None, *settings.READOUTS])
def test_demo_predict_and_gradcam_answer_with_it(steps, tmp_path, capsys, name):
    root, flags = steps
    student = str(root / "2" / "student_model.pth")
    both = ["--teacher", str(root / "1" / "student_model.pth"), "--student", student]
    asked = ["--readout", name] if name else []
    name = name or "discriminant"
    assert demo.main([*flags, *both, *asked, "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.endswith("<- answers")] == [name]
    assert ("READOUT = discriminant (auto, of this student)" in said) == (not asked)
    assert ("lost since the teacher" in said) == (name != "head")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["readout"] == name
    assert f"Read-out of both: {name}." in (tmp_path / "demo_report.html").read_text()
    # What was recorded by the head after earlier steps is no yardstick for another read-out.
    teachers = [metrics["classes"]["teacher"][first : first + 2] for first in (0, 2)]
    best = [[sum(each) / 2] for each in teachers]
    if name == "head":
        for step in checkpoint.load(student)["steps"][:-1]:
            for group, accuracy in enumerate(step["group_accuracy"]):
                best[group].append(accuracy)
    lost = [max(before) - step["accuracy"] for before, step in zip(best, metrics["steps"], strict=False)]
    assert [step["forgetting"] for step in metrics["steps"]] == [*map(pytest.approx, lost), None]
    assert metrics["student"]["accuracy"] == pytest.approx(metrics["readouts"][name]["accuracy"])
    assert metrics["readouts"] == checkpoint.load(student)["readouts"]
    assert "Read-outs" in (tmp_path / "demo_report.html").read_text()
    assert predict.main([str(root / "images" / "test" / "e"), "--checkpoint", student, *asked, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    image = str(sorted((root / "images" / "test" / "e").iterdir())[0])
    shown = ["--checkpoint", student, "--image", image, *asked, "--output", str(tmp_path / "map.png")]
    assert gradcam.main(shown) == 0
    assert f"answer ({name}): {answers[0]['classes'][0]['name']};" in capsys.readouterr().out


@pytest.mark.parametrize("name", [None, *settings.READOUTS])
def test_what_is_exported_answers_with_it(steps, tmp_path, capsys, name):
    root, _ = steps
    student, onnx = str(root / "2" / "student_model.pth"), str(tmp_path / "student.onnx")
    asked = ["--readout", name] if name else []
    assert export.main(["--checkpoint", student, "--output", onnx, *asked, "--maps"]) == 0
    assert f"6 classes, read-out {name or 'discriminant'}, " in capsys.readouterr().out
    said = []
    for flags in (["--checkpoint", onnx], ["--checkpoint", student, *asked]):
        assert predict.main([str(root / "images" / "test" / "e"), *flags, "--json", "--top", "6"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    for one, other in zip(*said, strict=True):
        ours, theirs = ({each["name"]: each["probability"] for each in row["classes"]} for row in (one, other))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert name == "head" or sum(ours.values()) == pytest.approx(1, abs=1e-4)


def test_without_statistics_the_head_answers_and_the_rest_is_said(steps, tmp_path, capsys):
    root, flags = steps
    own = ["--output-dir", str(tmp_path)]
    assert trainer.main([*flags, "--old-classes", "a,b", "--no-statistics", *own]) == 0
    teacher = str(tmp_path / "teacher_model.pth")
    assert checkpoint.load(teacher)["statistics"] == {}
    capsys.readouterr()
    assert incremental.main([*flags, "--teacher", teacher, "--new-classes", "c,d", *own]) == 0
    assert "has no statistics of its classes" in capsys.readouterr().out
    student = str(tmp_path / "student_model.pth")
    both = [*flags, "--teacher", teacher, "--student", student, *own]
    assert demo.main(both) == 0
    assert capsys.readouterr().err.count("no statistics of its classes: the head answers") == 1
    asked = ["--teacher", teacher, "--new-classes", "c,d", "--no-statistics", "--readout", "discriminant", *own]
    assert incremental.main([*flags, *asked, "--overwrite"]) == 2
    assert "--readout is 'discriminant', which needs the statistics" in capsys.readouterr().err
    onnx = str(tmp_path / "student.onnx")
    for script, given in (
        (demo, [*both, "--readout", "prototypes"]),
        (export, ["--checkpoint", student, "--output", onnx, "--readout", "prototypes"]),
        (predict, [str(root / "images" / "test" / "a"), "--checkpoint", student, "--readout", "prototypes"]),
    ):
        assert script.main(given) == 2
        assert "no statistics of its classes, which the read-out prototypes needs" in capsys.readouterr().err
    assert export.main(["--checkpoint", student, "--output", onnx]) == 0
    assert predict.main([str(root / "images" / "test" / "a"), "--checkpoint", onnx, "--readout", "head"]) == 2
    assert "give the flag to export.py" in capsys.readouterr().err


def test_a_run_that_finished_without_them_gets_them_when_it_is_resumed(steps, tmp_path, capsys):
    root, flags = steps
    shutil.copytree(root / "1", tmp_path / "again")
    path = tmp_path / "again" / "student_model.pth"
    whole = checkpoint.load(path)
    checkpoint.save(path, whole | {"statistics": {}, "readouts": {}})
    teacher = ["--teacher", str(root / "0" / "teacher_model.pth"), "--new-classes", "c,d"]
    for asked, name in (([], "discriminant"), (["--readout", "head"], "head")):
        capsys.readouterr()
        assert incremental.main([*flags, *teacher, *asked, "--resume", "--output-dir", str(tmp_path / "again")]) == 0
        said = capsys.readouterr().out
        assert [line.split()[0] for line in said.splitlines() if line.endswith("<- answers")] == [name]
        page = (tmp_path / "again" / "student_report.html").read_text()
        assert f"Read-out of both: {name}." in page
        assert f"the student answers {whole['readouts'][name]['accuracy_old']:.1f} % of the old" in page
    again = checkpoint.load(path)
    assert again["readouts"] == whole["readouts"]
    assert torch.equal(again["statistics"]["means"], whole["statistics"]["means"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"means": torch.zeros(3, 64)}, "do not fit the head"),
        ({"covariances": torch.zeros(2, 64, 63)}, "do not fit the head"),
        ({"more": 1}, "do not fit the head"),
        ({"of": [0, 2]}, "not those of the classes"),
        ({"of": [0]}, "not those of the classes"),
        ({"of": [0, True]}, "not those of the classes"),
        ({"means": torch.full((2, 64), float("nan"))}, "are not finite numbers"),
        ({"covariances": torch.zeros(2, 64, 64).double()}, "are not finite numbers"),
        ({"covariances": -torch.ones(2, 64, 64)}, "a variance of the statistics is negative"),
        ({"covariances": torch.full((2, 64, 64), 2.0) - torch.eye(64)}, "a covariance of the statistics is none"),
        ({"means": [0.0]}, "'means' of the statistics is missing or not a Tensor"),
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path, change, said):
    good = {"means": torch.zeros(2, 64), "covariances": torch.eye(64).repeat(2, 1, 1), "of": [0, 1]}
    model = models.build("resnet32", 2, 8)
    checkpoint.save(tmp_path / "good.pth", checkpoint_of(model, "resnet32", "ab", 8, statistics=good))
    assert checkpoint.load(tmp_path / "good.pth")["statistics"]["of"] == [0, 1]
    checkpoint.save(tmp_path / "bad.pth", checkpoint_of(model, "resnet32", "ab", 8, statistics=good | change))
    with pytest.raises(InputError, match=said):
        checkpoint.load(tmp_path / "bad.pth")


@pytest.mark.parametrize("readouts", [{"head": 1.0}, {"head": {"accuracy": 101.0}}, {"head": {"accuracy": "x"}}])
def test_accuracies_of_read_outs_that_cannot_be_are_refused(tmp_path, readouts):
    model = models.build("resnet32", 2, 8)
    checkpoint.save(tmp_path / "bad.pth", checkpoint_of(model, "resnet32", "ab", 8, readouts=readouts))
    with pytest.raises(InputError, match="read-out"):
        checkpoint.load(tmp_path / "bad.pth")


def test_carried_means_are_nearer_than_those_that_were_left(steps):
    root, flags = steps
    before, after = (checkpoint.load(root / f"{number}" / "student_model.pth") for number in (1, 2))
    model = checkpoint.restore_model(after)
    images = datasets.open_source(datasets.Place("folder", flags[flags.index("--data-dir") + 1]), 8).test(
        "abcdef", "abcdef"
    )
    found = evaluation.of_statistics(model, before, after, images)
    assert found["readouts"] == after["readouts"]
    assert [len(values) for values in found["means_off"].values()] == [4, 4]
    assert sum(found["means_off"]["carried"]) < sum(found["means_off"]["left"])
    features = classifiers.features_of(model, images.pixels, after["mean"], after["std"])
    for name, saved in (("carried", after), ("left", before)):
        known = classifiers.unpacked(saved)
        off = evaluation.covariances_off(known, features[images.labels < 4], images.labels[images.labels < 4])
        assert found["covariances_off"][name] == off[:4]
    nothing = {"readouts": {}, "means_off": {}, "covariances_off": {}}
    assert evaluation.of_statistics(model, before, after | {"statistics": {}}, images) == nothing
