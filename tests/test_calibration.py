"""Temperatures and "unknown": what they are worth on Gaussians, in a checkpoint, in predict.py and in demo.py."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, image_folder, randomised, refused, write_images
from sklearn.linear_model import LogisticRegression

import demo
import export
import incremental_learning_system as incremental
import predict
import train_teacher_model as trainer
from lwm import calibration, classifiers
from lwm.calibration import Examples
from lwm.experiments.calibration import calibration_error
from lwm.images import datasets
from lwm.probabilities import familiarity, is_unknown, probabilities_of, share_of
from lwm.runtime import checkpoint


def sampled(count: int, temperature: float, seed: int = 0) -> Examples:
    """Logits (n, 4) that are right as often as they say if divided by ``temperature``."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return Examples(temperature * logits, labels)


def test_the_temperature_is_that_of_the_least_log_loss_with_each_class_alike():
    examples = sampled(20_000, 2.5)
    assert calibration.best_temperature(examples) == pytest.approx(2.5, rel=0.05)
    cold = sampled(20_000, 0.01)
    assert calibration.best_temperature(cold) == pytest.approx(0.01, rel=0.05)
    two = Examples(examples.values[:, :2], (examples.labels % 2))
    margin = (two.values[:, 1] - two.values[:, 0])[:, None].numpy()
    fitted = LogisticRegression(C=1e9, fit_intercept=False, class_weight="balanced").fit(margin, two.labels.numpy())
    assert 1 / calibration.best_temperature(two) == pytest.approx(fitted.coef_[0, 0], rel=1e-3)
    twice = Examples(*(torch.cat([part, part[two.labels == 1]]) for part in two))
    assert calibration.best_temperature(twice) == pytest.approx(calibration.best_temperature(two))


def test_a_head_whose_few_images_are_all_right_keeps_a_temperature_near_1():
    few = Examples(3 * torch.eye(4, dtype=torch.float64).repeat(3, 1), torch.arange(12) % 4)
    assert calibration.best_temperature(few) < 0.1
    tried = np.linspace(0.3, 2, 10_000)
    lost = 12 * np.log(1 + 3 * np.exp(-3 / tried)) + np.log(tried) ** 2 / (2 * np.log(2) ** 2)
    assert calibration.best_temperature(few, np.log(2)) == pytest.approx(tried[lost.argmin()], abs=1e-3)
    unsure = sampled(40, 2.5)  # above 1 nothing holds it
    assert calibration.best_temperature(unsure) > 1.5
    assert calibration.best_temperature(unsure, np.log(2)) == pytest.approx(calibration.best_temperature(unsure))


def test_old_classes_add_what_drawn_features_of_all_need_more_than_those_of_the_new():
    held, drawn = sampled(5000, 3.0), sampled(5000, 1.0, seed=1)
    held = held.only(held.labels >= 2)
    harder = drawn._replace(values=torch.where(drawn.labels[:, None] < 2, 2 * drawn.values, drawn.values))
    new = calibration.best_temperature(harder.only(harder.labels >= 2))
    ratio = calibration.best_temperature(harder) / new
    assert ratio > 1.2
    found = calibration.temperature_of(held, harder)
    assert found == pytest.approx(calibration.best_temperature(held) * ratio)
    assert calibration.temperature_of(held, None) == calibration.best_temperature(held)


def test_the_quantiles_are_those_of_scores_and_old_ones_move_as_the_new_ones_did():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 4
    drawn = Examples(torch.randn(4000, generator=generator, dtype=torch.float64) + 5 * (labels < 2), labels)
    held = drawn.only(labels >= 2)
    held = Examples(3 * held.values - 7, held.labels)
    alone = calibration.quantiles_of(held, None)
    assert alone[5] == pytest.approx(np.quantile(held.values, 0.05), abs=0.05)
    expected = torch.cat([3 * drawn.only(labels < 2).values - 7, held.values])
    found = calibration.quantiles_of(held, drawn)
    assert found[::10] == pytest.approx(np.quantile(expected, np.linspace(0, 1, 11)).tolist(), abs=0.2)


def test_what_is_unknown_is_below_the_quantile():
    logits = np.array([[0.0, 0.0], [5.0, 0.0], [900.0, -900.0]])
    assert familiarity(logits) == pytest.approx([np.log(2), 5 + np.log1p(np.exp(-5)), 900])
    quantiles = np.linspace(0, 10, 101).tolist()
    assert is_unknown(logits, quantiles, 0.05).tolist() == [False, False, False]
    assert is_unknown(logits, quantiles, 0.2).tolist() == [True, False, False]
    assert is_unknown(logits, quantiles, 1.0).tolist() == [True, True, False]
    assert "--calibration" in refused(is_unknown, logits, [], 0.05)
    for wrong in ("2", "-0.1", "nan", "much"):
        assert "share" in refused(share_of, wrong)


def test_the_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.91, 0.09], [0.6, 0.4], [0.2, 0.8]])
    found = calibration_error(probabilities, np.array([0, 1, 0, 0]))
    assert found == pytest.approx((abs(1.81 - 1) + abs(0.6 - 1) + abs(0.8 - 0)) / 4)


# In the scripts ---------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher and a student of a folder's classes, whose test images are held back too."""
    root = tmp_path_factory.mktemp("calibration")
    images = image_folder(root / "images", dict.fromkeys("abcd", 8), dict.fromkeys("abcd", 4))
    flags = ["--model", "resnet32", "--image-size", "8", "--epochs", "2", "--dataset", "folder"]
    flags += ["--data-dir", str(images), "--cache-dir", str(root / "cache"), "--output-dir", str(root)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.Source, "held_back", datasets.Source.test, raising=False)
        assert trainer.main([*flags, "--old-classes", "a,b"]) == 0
        both = ["--teacher", str(root / "teacher_model.pth"), "--new-classes", "c,d"]
        assert incremental.main([*flags, *both]) == 0
    return root, flags


def test_checkpoints_keep_what_the_images_held_back_say(runs):
    root, _ = runs
    place, before = datasets.Place("folder", str(root / "images")), None
    for role, names, old in (("teacher", "ab", 0), ("student", "abcd", 2)):
        saved = checkpoint.load(root / f"{role}_model.pth")
        assert tuple(saved["temperatures"]) == tuple(saved["unknown"]) == classifiers.NAMES
        assert all(values == sorted(values) for values in saved["unknown"].values())
        model, again = checkpoint.restore_model(saved), dict(saved)
        held = datasets.open_source(place, 8).test(names[old:], names)
        calibration.calibrate(model, again, classifiers.from_checkpoint(saved), held, 8, before)
        assert again["temperatures"] == pytest.approx(saved["temperatures"], rel=1e-3)
        assert saved["calibrated_on"] == (8 if before is None else 16)
        before = saved


def test_the_teachers_temperature_has_as_many_votes_as_its_images(runs):
    root, _ = runs
    saved, teacher = (checkpoint.load(root / f"{role}_model.pth") for role in ("student", "teacher"))
    held = datasets.open_source(datasets.Place("folder", str(root / "images")), 8).test("cd", "abcd")
    found = []
    for before in (None, teacher, teacher | {"calibrated_on": 8 * 10**6}):
        calibration.calibrate(
            checkpoint.restore_model(saved), saved, classifiers.from_checkpoint(saved), held, 8, before
        )
        found.append(saved["temperatures"]["lda"])
    alone, both, outvoted = found
    assert both == pytest.approx((alone * teacher["temperatures"]["lda"]) ** 0.5)
    assert outvoted == pytest.approx(teacher["temperatures"]["lda"], rel=1e-3)


def test_without_images_nothing_is_kept_and_without_statistics_the_head_alone(runs, caplog):
    root, _ = runs
    saved = checkpoint.load(root / "student_model.pth")
    model, held = (
        checkpoint.restore_model(saved),
        datasets.open_source(datasets.Place("folder", str(root / "images")), 8),
    )
    held = held.test("cd", "abcd")
    bare = saved | {"temperatures": {}, "unknown": {}}
    calibration.calibrate(model, bare, None, held._replace(pixels=held.pixels[:0], labels=held.labels[:0]), 8)
    assert bare["temperatures"] == bare["unknown"] == {}
    calibration.calibrate(model, bare, None, held, 8)
    known, derived = classifiers.from_checkpoint(saved), dict(bare)
    calibration.calibrate(model, derived, known._replace(derived=torch.ones(4)), held, 8)
    assert derived["unknown"]["head"] == bare["unknown"]["head"] != saved["unknown"]["head"]
    assert list(bare["temperatures"]) == list(bare["unknown"]) == ["head"]


@pytest.mark.parametrize("name", ["head", "lda"])
def test_predict_and_onnx_say_unknown_alike_with_calibrated_probabilities(runs, tmp_path, capsys, name):
    root, _ = runs
    student, onnx = str(root / "student_model.pth"), str(tmp_path / "student.onnx")
    assert export.main(["--checkpoint", student, "--output", onnx, "--classifier", name]) == 0
    images = str(root / "images" / "test")
    both = []
    for flags in (["--checkpoint", student, "--classifier", name], ["--checkpoint", onnx]):
        capsys.readouterr()
        assert predict.main([images, *flags, "--json", "--unknown", "0.5", "--top", "4"]) == 0
        both.append(json.loads(capsys.readouterr().out))
    assert [row["unknown"] for row in both[0]] == [row["unknown"] for row in both[1]]
    assert 0 < sum(row["unknown"] for row in both[0]) < len(both[0])
    saved = checkpoint.load(student)
    model, _ = classifiers.answer_with(checkpoint.restore_model(saved), saved | {"temperatures": {}}, name)
    pixels = datasets.open_source(datasets.Place("folder", str(root / "images")), 8).test("abcd", "abcd").pixels
    features = classifiers.features_of(model, pixels, saved["mean"], saved["std"], 8)
    logits = (features @ model.fc.weight.double().T + model.fc.bias.double()).detach() / saved["temperatures"][name]
    expected = probabilities_of(logits.numpy()).max(1)
    for rows in both:
        assert [row["classes"][0]["probability"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-3)
    assert predict.main([images, "--checkpoint", student, "--csv", "--unknown", "1", "--top", "1"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["unknown"] for row in rows} >= {"1"}
    assert predict.main([images, "--checkpoint", onnx, "--unknown", "2"]) == 2


def test_demo_says_unknown_of_a_flat_folder(runs, tmp_path, capsys):
    root, _ = runs
    write_images(tmp_path / "mine", 4, seed=5)
    flags = ["--teacher", str(root / "teacher_model.pth"), "--student", str(root / "student_model.pth")]
    flags += ["--images", str(tmp_path / "mine"), "--output-dir", str(tmp_path / "out")]
    said = []
    for share in ("0", "1"):
        assert demo.main([*flags, "--unknown", share]) == 0
        said.append(capsys.readouterr().out.count(": unknown"))
    assert said[0] <= said[1]
    assert said[1] > 0
    assert demo.main([*flags, "--unknown", "much"]) == 2


def test_a_network_without_scores_refuses_to_say_unknown(tmp_path, capsys):
    model = randomised("resnet32", 2, 8).float()
    checkpoint.save(tmp_path / "bare.pth", checkpoint_of(model, "resnet32", "ab", 8))
    (image,) = write_images(tmp_path / "one", 1)
    assert predict.main([str(image), "--checkpoint", str(tmp_path / "bare.pth"), "--unknown", "0.05"]) == 2
    assert "--calibration" in capsys.readouterr().err


def test_a_network_whose_features_have_collapsed_keeps_scores_that_can_be_read_again(tmp_path):
    """LDA divides by their variance: its scores are huge, and a run must not lose its model over them."""
    model = randomised("resnet32", 2, 8).double()
    features = 0.5 + 1e-8 * torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = classifiers.measure(features, torch.arange(40) % 2, 2)
    held = datasets.Images(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6) % 2)
    saved = checkpoint_of(model.float(), "resnet32", "ab", 8, statistics=classifiers.to_checkpoint(statistics))
    calibration.calibrate(model, saved, classifiers.from_checkpoint(saved), held, 8)
    assert abs(saved["unknown"]["lda"][0]) > 1e9
    checkpoint.save(tmp_path / "it.pth", saved)
    assert checkpoint.load(tmp_path / "it.pth")["unknown"] == saved["unknown"]
