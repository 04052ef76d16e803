"""The scripts as a user runs them: what they write, what they refuse, and that old images stay unread."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_folder, picture
from PIL import Image

import config
import demo
import gradcam
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import attention, classifiers
from lwm.evaluation import accuracies, predict, task_aware
from lwm.images.datasets import Place, open_source, to_input
from lwm.images.files import decode_image
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "resnet32", "--image-size", "16"]
SMALL = [*TINY, "--epochs", "2"]
FAST = ["--epochs", "2"]


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True)


def refused(capsys, main, *flags: str) -> str:
    """Run a script that must refuse: exit code 2 and one line, which is returned."""
    capsys.readouterr()
    assert main(list(flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """Teacher and student of 2 + 2 digits, by the real command lines."""
    folder = tmp_path_factory.mktemp("quick")
    output = ["--output-dir", str(folder)]
    made = run("train_teacher_model.py", *SMALL, *output)
    assert made.returncode == 0, made.stderr
    made = run("incremental_learning_system.py", "--teacher", str(folder / "teacher_model.pth"), *FAST, *output)
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    return folder


@pytest.fixture
def teacher(quick) -> str:
    return str(quick / "teacher_model.pth")


@pytest.fixture
def student(quick) -> str:
    return str(quick / "student_model.pth")


def test_training_writes_the_fixed_names(quick):
    names = {"teacher_model.pth", "teacher_log.csv", "student_model.pth", "student_log.csv"}
    assert names <= {path.name for path in quick.iterdir()}
    first, second = rows(quick / "teacher_log.csv"), rows(quick / "student_log.csv")
    assert [row["epoch"] for row in first] == [row["epoch"] for row in second] == ["1", "2"]
    assert {"loss", "accuracy", "lr", "images_per_second"} <= first[0].keys()
    terms = {"classification", "distillation", "attention", "zero_maps", "test_accuracy_old", "test_accuracy_new"}
    assert terms <= second[0].keys()


def test_the_checkpoint_is_the_whole_hand_over(quick):
    saved = checkpoint.load(quick / "student_model.pth")
    assert saved["class_names"] == ["0", "1", "2", "3"]
    assert [step["classes"] for step in saved["steps"]] == [["0", "1"], ["2", "3"]]
    assert (saved["architecture"], saved["image_size"], saved["loss_form"]) == ("resnet32", 16, "binary")
    assert len(saved["mean"]) == len(saved["std"]) == 3
    assert saved["finished"] is True


def test_demo_by_its_command_line(tmp_path, quick, teacher, student):
    named = ["--teacher", teacher, "--student", student, "--output-dir", str(tmp_path)]
    judged = run("demo.py", *named, "--readout", "head")
    assert judged.returncode == 0, judged.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    keys = {"accuracy", "accuracy_old", "accuracy_new", "task_aware_old", "task_aware_new"}
    assert metrics["teacher"].keys() == metrics["student"].keys() == keys
    assert metrics["teacher"]["accuracy_new"] is None
    last = rows(quick / "student_log.csv")[-1]
    for name, value in metrics["student"].items():
        assert value == pytest.approx(float(last[f"test_{name}"]))
    lines = judged.stdout.splitlines()
    hint = next(i for i, line in enumerate(lines) if "no hint" in line)
    assert hint < next(i for i, line in enumerate(lines) if "task-aware" in line)
    assert np.sum(metrics["confusion"]) == 180
    for name in ("means", "covariances"):
        carried, left = (np.mean(metrics[f"{name}_off"][when]) for when in ("carried", "left"))
        (said,) = (line for line in lines if line.startswith(f"{name} of old classes are off"))
        assert f"by {carried:.2f} of" in said
        assert said.endswith(f"{left:.2f}")
    attention = metrics["attention"]
    assert [len(values) for values in attention.values()] == [2, 2]
    seen = [pair for pair in zip(*attention.values(), strict=True) if None not in pair]
    assert seen  # after an epoch some maps of a class may be all zero
    assert all(0 < distance < 4 and 0 <= overlap <= 100 for distance, overlap in seen)
    group = metrics["steps"][0]
    assert group["forgetting"] == pytest.approx(metrics["teacher"]["accuracy_old"] - group["accuracy"])
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 400


def test_demo_judges_a_folder_of_own_images(tmp_path, teacher, student, capsys):
    for name in ("1", "3"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for seed in range(3):
            Image.fromarray(picture(seed)).save(tmp_path / "own" / name / f"{seed}.png")
    models = ["--teacher", teacher, "--student", student, "--output-dir", str(tmp_path / "out")]
    assert demo.main([*models, "--images", str(tmp_path / "own")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["classes"]["student"][0] is metrics["classes"]["student"][2] is None
    assert metrics["classes"]["student"][1] is not None
    assert "no test images of 0, 2" in capsys.readouterr().out

    assert (
        demo.main([*models[:4], "--output-dir", str(tmp_path / "flat"), "--images", str(tmp_path / "own" / "1")]) == 0
    )
    said = capsys.readouterr().out
    assert all(f"{seed}.png: " in said for seed in range(3))
    assert not (tmp_path / "flat" / "metrics.json").exists()
    assert (tmp_path / "flat" / "demo.png").exists()

    refused(capsys, demo.main, *models, "--images", str(tmp_path / "nothing"))

    other = tmp_path / "other.pth"  # the same classes, trained once more for larger images
    checkpoint.save(other, checkpoint.load(teacher) | {"image_size": 32})
    said = refused(capsys, demo.main, "--teacher", str(other), *models[2:])
    assert "image_size is 16 there and 32 here" in said


def test_gradcam_by_its_command_line(tmp_path, student):
    Image.fromarray(picture(1, 40, 30)).save(tmp_path / "cat.png")
    out = tmp_path / "map.png"
    flags = ["--checkpoint", student, "--image", str(tmp_path / "cat.png"), "--output", str(out)]
    made = run("gradcam.py", *flags, "--class-name", "2", "--layer", "layer2")
    assert made.returncode == 0, made.stderr
    assert "the map of 2 at layer2" in made.stdout
    saved = checkpoint.load(student)
    pixels, model = decode_image(tmp_path / "cat.png", 16), checkpoint.restore_model(saved).eval()
    model, saved = classifiers.use(model, saved, classifiers.chosen("auto", saved))
    inputs = to_input(torch.from_numpy(pixels)[None], saved["mean"], saved["std"])
    heat = attention.autograd_map(model, inputs, torch.tensor([2]), "layer2")[0].numpy()
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.array(image), gradcam.overlay(pixels.transpose(1, 2, 0), heat, heat.max()))


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [("--class-name", "9", "0, 1, 2, 3"), ("--layer", "x", "layer3"), ("--layer", "fc", "layer3")],
)
def test_gradcam_refuses_what_is_not_there(tmp_path, student, capsys, flag, value, words):
    Image.fromarray(picture(1)).save(tmp_path / "cat.png")
    base = ["--checkpoint", student, "--image", str(tmp_path / "cat.png"), "--output", str(tmp_path / "o.png")]
    assert words in refused(capsys, gradcam.main, *base, flag, value)
    assert not (tmp_path / "o.png").exists()


def test_a_run_never_replaces_a_model_unasked(quick, teacher, student, capsys):
    before = files(quick)
    output = ["--output-dir", str(quick)]
    assert "--overwrite" in refused(capsys, trainer.main, *SMALL, *output)
    assert "--overwrite" in refused(capsys, incremental.main, "--teacher", teacher, *FAST, *output)
    own = refused(capsys, incremental.main, "--teacher", student, "--new-classes", "4", *output, "--overwrite")
    assert "is the --teacher itself" in own
    assert files(quick) == before


def test_overwrite_replaces(tmp_path, teacher):
    flags = ["--teacher", teacher, *FAST, "--output-dir", str(tmp_path)]
    assert incremental.main([*flags, "--gamma", "0"]) == 0
    first = weights(tmp_path / "student_model.pth")
    assert incremental.main([*flags, "--gamma", "5", "--overwrite"]) == 0
    assert not same(first, weights(tmp_path / "student_model.pth"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--new-classes", "1,5"], "new class '1'"),
        (["--new-classes", "2,x"], "no class 'x'"),
        (["--old-classes", "1,0"], "--old-classes contradicts the teacher, which has 0,1"),
        (["--model", "resnet18"], "--model contradicts the teacher, which has resnet32"),
        (["--image-size", "32"], "--image-size contradicts the teacher, which has 16"),
        (["--loss-form", "softmax", "--new-classes", "2"], "one new class"),
        (["--student", "x.pth"], "needs --resume"),
        (["--resume", "--student", "x.pth"], "x.pth: no such file"),
        (["--method", "lwf", "--loss-form", "binary"], "method lwf is softmax"),
        (["--device", "cuda:7"], "CUDA devices"),
    ],
)
def test_the_incremental_script_refuses(tmp_path, teacher, capsys, flags, words):
    output = tmp_path / "out"
    said = refused(capsys, incremental.main, "--teacher", teacher, "--output-dir", str(output), *flags)
    assert words in said
    assert not output.exists()


def test_refusals_by_the_real_command_lines(tmp_path, teacher):
    output = ["--output-dir", str(tmp_path / "out")]
    for script, flags in [
        ("train_teacher_model.py", ["--epoch", "3"]),
        ("train_teacher_model.py", ["--old-classes", "3"]),
        ("incremental_learning_system.py", []),
        ("incremental_learning_system.py", ["--teacher", str(tmp_path / "none.pth")]),
        ("demo.py", ["--teacher", teacher, "--student", teacher]),
        ("gradcam.py", ["--checkpoint", teacher, "--image", str(ROOT / "README.md")]),
    ]:
        done = run(script, *flags, *([] if script == "gradcam.py" else output))
        assert done.returncode == 2, (script, flags)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_explicit_flags_that_agree_with_the_teacher_are_taken(tmp_path, teacher):
    agree = ["--old-classes", "0,1", "--model", "resnet32", "--image-size", "16"]
    assert incremental.main(["--teacher", teacher, *FAST, *agree, "--output-dir", str(tmp_path)]) == 0


def test_the_old_training_images_are_never_read(tmp_path, capsys):
    """The student of a folder is the same to the last bit when the old classes' images, train and test, are gone."""
    counts = {"zebra": 8, "ant": 8, "mole": 8, "bee": 8}
    data = image_folder(tmp_path / "data", counts, dict.fromkeys(counts, 3))
    place = ["--dataset", "folder", "--data-dir", str(data)]
    common = [*place, "--epochs", "2", "--batch-size", "8"]
    first = tmp_path / "first"
    assert trainer.main([*common, *TINY, "--old-classes", "zebra,mole", "--output-dir", str(first)]) == 0
    step = ["--teacher", str(first / "teacher_model.pth"), *common, "--new-classes", "bee,ant"]
    assert incremental.main([*step, "--output-dir", str(tmp_path / "all")]) == 0
    for name in ("zebra", "mole"):
        (data / "train" / name / "000.png").write_bytes(b"whoever reads this fails")
    assert incremental.main([*step, "--output-dir", str(tmp_path / "spoilt")]) == 0
    for name in ("zebra", "mole"):
        shutil.rmtree(data / "train" / name)
        shutil.rmtree(data / "test" / name)
    capsys.readouterr()
    assert incremental.main([*step, "--output-dir", str(tmp_path / "gone")]) == 0
    assert "no test images of zebra, mole: their accuracy is left empty" in capsys.readouterr().out
    students = [weights(tmp_path / name / "student_model.pth") for name in ("all", "spoilt", "gone")]
    assert same(students[0], students[1])
    assert same(students[0], students[2])
    last = rows(tmp_path / "gone" / "student_log.csv")[-1]
    assert last["test_accuracy_old"] == ""
    assert last["test_accuracy_new"] != ""

    models = ["--teacher", str(first / "teacher_model.pth"), "--student", str(tmp_path / "gone/student_model.pth")]
    assert demo.main([*models, "--output-dir", str(tmp_path / "gone")]) == 0
    metrics = json.loads((tmp_path / "gone" / "metrics.json").read_text())
    assert metrics["student"]["accuracy_old"] is metrics["student"]["task_aware_old"] is None
    assert metrics["student"]["accuracy_new"] is not None


def test_classes_in_any_order_keep_their_labels(tmp_path):
    """Old classes that come last in the alphabet, judged against labels made here."""
    common = [*TINY, "--epochs", "6"]
    assert trainer.main([*common, "--old-classes", "1,0", "--output-dir", str(tmp_path)]) == 0
    saved = checkpoint.load(tmp_path / "teacher_model.pth")
    source = open_source(Place("digits", "data"), 16)
    model = checkpoint.restore_model(saved)
    zeros = source.test(["0"], ["0"]).pixels
    answers = predict(model, zeros, saved["mean"], saved["std"]).argmax(1)
    expected = float(rows(tmp_path / "teacher_log.csv")[-1]["test_accuracy"])
    ones = source.test(["1"], ["1"]).pixels
    right = (answers == 1).sum() + (predict(model, ones, saved["mean"], saved["std"]).argmax(1) == 0).sum()
    assert 100 * right / (len(zeros) + len(ones)) == pytest.approx(expected)
    assert expected > 70  # labels that were mixed up would give the other answer


def test_three_steps_from_the_student_alone_and_one_single_class(tmp_path, student):
    second = tmp_path / "second"
    flags = ["--teacher", student, "--new-classes", "9", *FAST, "--output-dir", str(second)]
    assert incremental.main(flags) == 0
    third = tmp_path / "third"
    flags = ["--teacher", str(second / "student_model.pth"), "--new-classes", "5,4", *FAST, "--output-dir", str(third)]
    assert incremental.main(flags) == 0
    saved = checkpoint.load(third / "student_model.pth")
    assert saved["class_names"] == ["0", "1", "2", "3", "9", "5", "4"]
    assert [len(step["group_accuracy"]) for step in saved["steps"]] == [1, 2, 3, 4]
    tests = open_source(Place("digits", ""), 16).test(saved["class_names"], saved["class_names"])
    logits = predict(checkpoint.restore_model(saved), tests.pixels, saved["mean"], saved["std"])
    expected = accuracies(logits, tests.labels, 5) | {"task_aware": task_aware(logits, tests.labels, [2, 2, 1, 2])}
    last = rows(third / "student_log.csv")[-1]
    assert {name: float(last[f"test_{name}"]) for name in expected} == pytest.approx(expected)
    models = ["--teacher", str(second / "student_model.pth"), "--student", str(third / "student_model.pth")]
    assert demo.main([*models, "--readout", "head", "--output-dir", str(third)]) == 0
    metrics = json.loads((third / "metrics.json").read_text())
    assert [step["classes"] for step in metrics["steps"]] == [["0", "1"], ["2", "3"], ["9"], ["5", "4"]]
    best = max(step["group_accuracy"][0] for step in saved["steps"][:-1])
    assert metrics["steps"][0]["forgetting"] == pytest.approx(best - metrics["steps"][0]["accuracy"])
    assert metrics["steps"][3]["forgetting"] is None
    assert demo.main(["--teacher", student, *models[2:], "--output-dir", str(tmp_path / "earlier")]) == 0
    metrics = json.loads((tmp_path / "earlier" / "metrics.json").read_text())
    assert [len(metrics["classes"][who]) for who in ("teacher", "student")] == [4, 7]
    assert (tmp_path / "earlier" / "demo_report.html").exists()


def test_the_example_of_two_and_two_on_cifar100(tmp_path, serve_cifar, monkeypatch):
    """Only config.py is edited: the data set, the two groups, and a short run."""
    taught = config.select_classes_2_1 + config.select_classes_2_2
    archive = serve_cifar("cifar100", ["worm", *reversed(taught)], train=6, test=2)
    changes = {"DATASET": "cifar100", "DATA_DIR": str(tmp_path / "data"), "OUTPUT_DIR": str(tmp_path / "out")}
    changes |= {"OLD_CLASSES": config.select_classes_2_1, "NEW_CLASSES": config.select_classes_2_2, "EPOCHS": 1}
    for name, value in changes.items():
        monkeypatch.setattr(config, name, value)
    assert trainer.main([]) == 0
    archive.unlink()
    assert incremental.main(["--teacher", str(tmp_path / "out/teacher_model.pth")]) == 0
    models = [
        "--teacher",
        str(tmp_path / "out/teacher_model.pth"),
        "--student",
        str(tmp_path / "out/student_model.pth"),
    ]
    assert demo.main(models) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["classes"]["names"] == ["apple", "aquarium_fish", "baby", "bear"]
    assert np.sum(metrics["confusion"], axis=1).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("method", ["finetune", "lwf", "lwf-mc"])
def test_every_method_and_the_warning_where_forms_are_mixed(tmp_path, teacher, capsys, method):
    flags = ["--teacher", teacher, "--method", method, "--epochs", "1", "--output-dir", str(tmp_path)]
    assert incremental.main(flags) == 0
    assert ("different scales" in capsys.readouterr().err) == (method != "lwf-mc")


def test_a_frozen_student_keeps_its_backbone_and_its_old_rows(tmp_path, teacher):
    flags = ["--teacher", teacher, "--method", "frozen", "--epochs", "1", "--output-dir", str(tmp_path)]
    assert incremental.main(flags) == 0
    before, after = weights(Path(teacher)), weights(tmp_path / "student_model.pth")
    assert same({k: v for k, v in before.items() if k[:2] != "fc"}, {k: v for k, v in after.items() if k[:2] != "fc"})
    assert torch.equal(after["fc.weight"][:2], before["fc.weight"])
    assert len(after["fc.weight"]) == 4


def test_what_is_held_back_is_not_trained_on(tmp_path, capsys):
    source = open_source(Place("digits", ""), 16)
    counts = [len(source.train([name], [name]).labels) for name in "0123"]
    held = [-(-count // 5) for count in counts]
    flags = ["--hold-back", "0.2", "--epochs", "1", "--output-dir", str(tmp_path)]
    assert trainer.main([*TINY, *flags]) == 0
    said = f"{sum(counts[:2]) - sum(held[:2])} training and {sum(held[:2])} test images"
    assert said in capsys.readouterr().out
    assert incremental.main(["--teacher", str(tmp_path / "teacher_model.pth"), *flags]) == 0
    assert f"{sum(counts[2:]) - sum(held[2:])} training images of 2 new classes" in capsys.readouterr().out


def test_the_deepest_network(tmp_path):  # the widest, ResNet-18, is in docs/own-data.md, whose examples are run
    folder = image_folder(tmp_path / "data", dict.fromkeys("abcd", 8), dict.fromkeys("abcd", 2))
    output = ["--dataset", "folder", "--data-dir", str(folder), "--epochs", "1", "--output-dir", str(tmp_path)]
    assert trainer.main(["--model", "resnet110", "--image-size", "16", "--old-classes", "a,b", *output]) == 0
    assert incremental.main(["--teacher", str(tmp_path / "teacher_model.pth"), *output, "--new-classes", "c,d"]) == 0
    models = ["--teacher", str(tmp_path / "teacher_model.pth"), "--student", str(tmp_path / "student_model.pth")]
    assert demo.main([*models, "--output-dir", str(tmp_path)]) == 0


def test_a_new_class_without_test_images_is_refused(tmp_path, capsys):
    counts = dict.fromkeys("abcd", 4)
    data = image_folder(tmp_path / "data", counts, dict.fromkeys("abc", 2))
    common = ["--dataset", "folder", "--data-dir", str(data), "--epochs", "1", "--output-dir", str(tmp_path)]
    assert trainer.main([*common, *TINY, "--old-classes", "a,b"]) == 0
    step = ["--teacher", str(tmp_path / "teacher_model.pth"), *common, "--new-classes", "c,d"]
    assert "class 'd' but no test images" in refused(capsys, incremental.main, *step)
    assert not (tmp_path / "student_model.pth").exists()


def test_each_class_is_judged_on_what_its_own_step_held_back(tmp_path, teacher):
    """The teacher held nothing back, so its classes are judged on test images; the student's on those held back."""
    flags = ["--teacher", teacher, *FAST, "--hold-back", "0.2", "--output-dir", str(tmp_path)]
    assert incremental.main(flags) == 0
    models = ["--teacher", teacher, "--student", str(tmp_path / "student_model.pth")]
    assert demo.main([*models, "--readout", "head", "--output-dir", str(tmp_path)]) == 0
    counts = np.sum(json.loads((tmp_path / "metrics.json").read_text())["confusion"], axis=1).tolist()
    source = open_source(Place("digits", ""), 16)
    tests = [len(source.test([name], [name]).labels) for name in "01"]
    held = [-(-len(source.train([name], [name]).labels) // 5) for name in "23"]
    assert counts == tests + held
    last = rows(tmp_path / "student_log.csv")[-1]
    assert float(last["test_accuracy_old"]) == pytest.approx(
        json.loads((tmp_path / "metrics.json").read_text())["student"]["accuracy_old"]
    )
