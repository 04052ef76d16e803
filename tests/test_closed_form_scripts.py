"""``--method closed-form`` in the scripts: old rows, statistics, and classes that were not measured."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import image_folder
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import demo
import incremental_learning_system as incremental
import train_teacher_model as trainer
from lwm import classifiers, closed_form, models
from lwm.images import datasets
from lwm.losses import METHODS
from lwm.runtime import checkpoint
from lwm.runtime.settings import read_settings

pytestmark = pytest.mark.usefixtures("unrendered")

NAMES = "abcdefgh"
SIZE = ["--image-size", "8", "--model", "resnet32"]
CLOSED = ["--method", "closed-form"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    return image_folder(root, dict.fromkeys(NAMES, 12), dict.fromkeys(NAMES, 4))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's network of three classes, a teacher as it is."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    network = models.build("resnet32", 3, 8)
    with torch.no_grad():
        network.fc.weight.mul_(20)
    torch.save(network.state_dict(), folder / "weights.pth")
    (folder / "classes.txt").write_text("a\nb\nc\n")
    taken = [*SIZE, "--weights", str(folder / "weights.pth"), "--old-classes-file", str(folder / "classes.txt")]
    assert trainer.main([*taken, "--epochs", "0", "--output-dir", str(folder)]) == 0
    return folder / "teacher_model.pth"


def step(teacher: Path, photos: Path, new: str, folder: Path, *more: str) -> Path:
    data = ["--dataset", "folder", "--data-dir", str(photos), "--cache-dir", str(photos.parent / "cache")]
    flags = ["--teacher", str(teacher), *data, "--new-classes", new, "--output-dir", str(folder), *more]
    assert incremental.main(flags) == 0
    return folder / "student_model.pth"


def test_a_network_that_was_taken_keeps_its_rows_and_its_answers_over_tasks(own, photos, tmp_path, capsys):
    """One class and then two; the method is the one recommended for such a network."""
    one = step(own, photos, "d", tmp_path / "1")
    said = capsys.readouterr().err
    assert "METHOD = closed-form" in said and "--method lwm" not in said  # which would refuse one class
    two = step(one, photos, "e,f", tmp_path / "2")
    before, after = checkpoint.load(own), checkpoint.load(two)
    assert [task["epochs"] for task in after["tasks"]] == [0, 0, 0]
    for name, tensor in before["model"].items():
        assert torch.equal(after["model"][name][:3] if name.startswith("fc.") else after["model"][name], tensor)
    images = datasets.open_source(datasets.Place("folder", str(photos)), 8).test("abc", "abc")
    channels = before["mean"], before["std"]
    answers = []
    for path in (own, two):
        saved = checkpoint.load(path)
        network, answering = classifiers.answer_with(checkpoint.restore_model(saved), saved, "auto")
        assert answering["classifier"] == "head"
        features = classifiers.features_of(network, images.pixels, *channels, 4).float()
        temperature = saved["temperatures"].get("head", 1.0)
        answers.append(torch.nn.functional.linear(features, network.fc.weight[:3], network.fc.bias[:3]) * temperature)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-4)
    # Statistics of old classes were derived, those of new ones measured; training can go on from both.
    assert after["statistics"]["derived"].tolist() == [1] * 3 + [0] * 3
    assert after["held_back"] == before["held_back"] == {}
    lwm = step(two, photos, "g,h", tmp_path / "3", "--method", "lwm", "--epochs", "1", "--incremental-lr", "1e-3")
    assert checkpoint.load(lwm)["statistics"]["derived"].tolist() == [1] * 3 + [0] * 5


def test_new_rows_of_a_training_begin_in_closed_form(own, photos, tmp_path):
    """With a rate of nearly nothing they end there."""
    closed = checkpoint.load(step(own, photos, "d,e", tmp_path / "0"))["model"]
    trained = ["--method", "lwm", "--epochs", "1", "--incremental-lr", "1e-12"]
    for begins in ("closed-form", "random"):
        flags = [*trained, "--new-rows", begins, "--batch-norm", "frozen"]
        model = checkpoint.load(step(own, photos, "d,e", tmp_path / begins, *flags))["model"]
        same = torch.allclose(model["fc.weight"], closed["fc.weight"], rtol=1e-3, atol=1e-4)
        assert same is (begins == "closed-form")


def test_where_every_class_was_measured_the_head_is_lda_on_all_images_at_once(photos, tmp_path):
    """By scikit-learn, with the covariance that the images asked for."""
    data = ["--dataset", "folder", "--data-dir", str(photos), "--calibration", "0"]
    first = [*SIZE, *data, "--old-classes", "a,b,c", "--epochs", "1", "--output-dir", str(tmp_path)]
    assert trainer.main(first) == 0
    student = tmp_path / "teacher_model.pth"
    for number, new in enumerate(("d,e", "f")):
        student = step(student, photos, new, tmp_path / str(number), *CLOSED, "--calibration", "0")
    saved, network = checkpoint.load(student), checkpoint.restore_model(checkpoint.load(student))
    source = datasets.open_source(datasets.Place("folder", str(photos)), 8)
    train, test = source.train("abcdef", "abcdef"), source.test("abcdef", "abcdef")
    seen, judged = (
        classifiers.features_of(network, each.pixels, saved["mean"], saved["std"], 4).numpy() for each in (train, test)
    )
    covariances = [
        ledoit_wolf(seen[train.labels == label] - seen[train.labels == label].mean(0), assume_centered=True)[0]
        for label in range(6)
    ]
    lda = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 6] * 6)
    lda.fit(seen, train.labels)
    lda.covariance_ = sum(covariances) / 6
    lda.coef_ = torch.linalg.solve(torch.tensor(lda.covariance_), torch.tensor(lda.means_).T).T.numpy()
    lda.intercept_ = -(lda.coef_ * lda.means_).sum(1) / 2
    ours = judged @ saved["model"]["fc.weight"].double().numpy().T + saved["model"]["fc.bias"].double().numpy()
    theirs = lda.decision_function(judged)
    difference = (ours - theirs) - (ours - theirs).mean(1, keepdims=True)
    assert abs(difference).max() < 1e-2 * abs(theirs).max()
    assert saved["loss_form"] == "softmax"


def test_more_images_of_known_classes_and_a_new_one_are_as_all_images_at_once(photos, tmp_path, capsys):
    """The first images are not needed again: the folder of the second task has none of them."""
    parts = []
    for part in (slice(0, 7), slice(7, 12)):
        parts.append(tmp_path / f"part{part.start}")
        for name in "abcd":
            (parts[-1] / "train" / name).mkdir(parents=True)
            for file in sorted((photos / "train" / name).iterdir())[part]:
                shutil.copy(file, parts[-1] / "train" / name)
        shutil.copytree(photos / "test", parts[-1] / "test")
    plain = ["--calibration", "0", *CLOSED]
    first = [*SIZE, "--dataset", "folder", "--data-dir", str(parts[0]), "--calibration", "0", "--old-classes", "a,b"]
    assert trainer.main([*first, "--epochs", "1", "--output-dir", str(tmp_path)]) == 0
    teacher = tmp_path / "teacher_model.pth"
    one = step(teacher, parts[0], "c", tmp_path / "one", *plain)
    capsys.readouterr()
    two = step(one, parts[1], "d,b,c", tmp_path / "two", *plain)
    out, err = capsys.readouterr()
    assert "LwM" not in err and "b: " in out
    saved = checkpoint.load(two)
    assert (saved["class_names"], saved["tasks"][-1]["again"]) == (list("abcd"), ["b", "c"])
    assert saved["statistics"]["counts"].tolist() == [7, 12, 12, 5]
    network, everything = checkpoint.restore_model(saved), []
    for part, names in ((parts[0], "abc"), (parts[1], "bcd")):
        images = datasets.open_source(datasets.Place("folder", str(part)), 8).train(names, "abcd")
        features = classifiers.features_of(network, images.pixels, saved["mean"], saved["std"], 4)
        everything.append((features, images.labels))
    features, labels = map(torch.cat, zip(*everything, strict=True))
    expected = classifiers.measure(features, labels, 4)
    kept = classifiers.from_checkpoint(saved)
    for name in ("counts", "means", "scatters"):
        torch.testing.assert_close(getattr(kept, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    # Known classes alone are a task too, which can be judged and shown.
    three = step(two, parts[1], "a", tmp_path / "three", *plain)
    assert checkpoint.load(three)["class_names"] == list("abcd")
    assert "more images of a" in (tmp_path / "three" / "student_report.html").read_text()
    shown = ["--teacher", str(two), "--student", str(three), "--output-dir", str(tmp_path / "demo")]
    assert demo.main(shown) == 0
    assert demo.main([*shown[:3], str(two), *shown[4:]]) == 2  # no student of itself
    data = ["--dataset", "folder", "--data-dir", str(parts[1]), "--output-dir", str(tmp_path / "no")]
    # The same command twice is not to count its images twice.
    assert incremental.main(["--teacher", str(two), *data, "--new-classes", "a"]) == 2
    assert "closed-form" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("method", ["lwm", "finetune", "frozen"])
def test_a_training_takes_more_images_of_known_classes_too(method, own, photos, tmp_path, capsys):
    """With a rate of nearly nothing every row is in its place, and answers as in the teacher."""
    closed = step(own, photos, "d,e", tmp_path / "1")
    rate = ["--method", method, "--epochs", "1", "--incremental-lr", "1e-12", "--batch-norm", "frozen"]
    more = checkpoint.load(step(closed, photos, "f,b,d", tmp_path / "2", *rate))
    before = checkpoint.load(closed)
    assert (more["class_names"], more["tasks"][-1]["again"]) == (list("abcdef"), ["b", "d"])
    torch.testing.assert_close(more["model"]["fc.weight"][:5], before["model"]["fc.weight"], rtol=1e-4, atol=1e-5)
    assert more["statistics"]["derived"].tolist() == [1, 0, 1, 0, 0, 0]
    assert more["statistics"]["counts"][3] == 2 * before["statistics"]["counts"][3]
    # Known classes alone: they are the last of the loss, but not of the network.
    alone = checkpoint.load(step(closed, photos, "b,d", tmp_path / "3", *rate))
    assert alone["class_names"] == list("abcde")
    torch.testing.assert_close(alone["model"]["fc.weight"], before["model"]["fc.weight"], rtol=1e-4, atol=1e-5)
    flags = ["--teacher", str(own), "--dataset", "folder", "--data-dir", str(photos), "--new-classes", "a,b,c"]
    if method != "lwm":
        assert incremental.main([*flags, *rate, "--output-dir", str(tmp_path / "4")]) == 0
    else:
        capsys.readouterr()
        assert incremental.main([*flags, "--method", "lwm", "--output-dir", str(tmp_path / "4")]) == 2
        assert "every class" in capsys.readouterr().err.splitlines()[-1]


def test_more_images_change_their_own_class_alone_in_a_network_that_was_taken(own, photos, tmp_path):
    closed = step(own, photos, "d,e", tmp_path / "1")
    more = checkpoint.load(step(closed, photos, "b,e", tmp_path / "2", *CLOSED))
    before = checkpoint.load(closed)
    same = (more["model"]["fc.weight"] == before["model"]["fc.weight"]).all(1).tolist()
    assert same == [True, False, True, True, False]
    assert more["statistics"]["derived"].tolist() == [1, 0, 1, 0, 0]
    # Earlier images count in the row of e; of b there were none.
    before["statistics"]["means"][4] += 1
    checkpoint.save(tmp_path / "moved.pth", before)
    moved = checkpoint.load(step(tmp_path / "moved.pth", photos, "b,e", tmp_path / "4", *CLOSED))
    same = (moved["model"]["fc.weight"] == more["model"]["fc.weight"]).all(1).tolist()
    assert same == [True] * 4 + [False]
    every = checkpoint.load(step(own, photos, "a,b,c", tmp_path / "3", *CLOSED))  # which leaves no row of its own: LDA
    statistics = classifiers.from_checkpoint(every)
    torch.testing.assert_close(
        every["model"]["fc.weight"].double(), classifiers.lda(statistics)[0], rtol=1e-2, atol=1e-3
    )


def test_old_classes_can_be_measured_all_or_some(own, photos, tmp_path, capsys, monkeypatch):
    """Some: the others are derived. All: the head of a student is LDA, unless the network's own rows are better."""
    weights, names = own.parent / "weights.pth", own.parent / "classes.txt"
    taken = [*SIZE, "--weights", str(weights), "--old-classes-file", str(names), "--epochs", "0"]
    some = image_folder(tmp_path / "some", dict.fromkeys("ac", 12))
    for folder, derived in ((some, [0, 1, 0]), (photos, [0] * 3)):
        flags = [*taken, "--measure-old", str(folder), "--output-dir", str(tmp_path / "t"), "--overwrite"]
        assert trainer.main(flags) == 0
        saved = checkpoint.load(tmp_path / "t" / "teacher_model.pth")
        assert saved["statistics"]["derived"].tolist() == derived
        assert saved["held_back"].keys() == {"head", "ncm", "lda", "aligned"}
        assert torch.equal(saved["model"]["fc.weight"], torch.load(weights)["fc.weight"])
    assert closed_form.becomes_lda(saved | {"held_back": {"head": 90.0, "lda": 80.0}})  # there are three classes only
    monkeypatch.setattr(closed_form, "SURE", 3)
    for held, kept in (({"head": 90.0, "lda": 80.0}, True), ({"head": 80.0, "lda": 90.0}, False)):
        teacher = tmp_path / "held.pth"
        checkpoint.save(teacher, saved | {"held_back": held})
        student = checkpoint.load(step(teacher, photos, "d", tmp_path / str(kept), *CLOSED))
        assert torch.equal(student["model"]["fc.weight"][:3], saved["model"]["fc.weight"]) is kept
    capsys.readouterr()
    assert trainer.main([*taken[:-1], "1", "--measure-old", str(photos), "--output-dir", str(tmp_path / "u")]) == 2
    assert trainer.main([*taken, "--measure-old", str(tmp_path / "t"), "--output-dir", str(tmp_path / "u")]) == 2
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(refused) == 2 and all("--measure-old" in line for line in refused), refused
    assert not (tmp_path / "u" / "teacher_model.pth").exists()


def test_a_student_in_closed_form_is_shown_and_judged_and_names_the_command_that_trains(own, photos, tmp_path, capsys):
    student = step(own, photos, "d,e", tmp_path, "--json", "--overwrite")
    out, err = capsys.readouterr()
    said = json.loads(out)
    command = shlex.split(next(line for line in err.splitlines() if "LwM" in line).partition(": ")[2])
    asked = read_settings("incremental_learning_system", command[2:], method=METHODS)
    assert (asked.method, asked.teacher, asked.new_classes) == ("lwm", str(own), ("d", "e"))
    assert Path(asked.output_dir) == tmp_path.with_name(f"{tmp_path.name}-lwm")
    assert not asked.overwrite and asked.json
    assert said["classifier"] == "head"
    assert said["classifiers"]["head"]["accuracy"] == pytest.approx(said["test_accuracy"])
    flags = ["--teacher", str(own), "--student", str(student), "--output-dir", str(tmp_path)]
    assert demo.main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["student"]["accuracy"] == pytest.approx(said["test_accuracy"])
