"""The classifier in a Python program: it answers as predict.py does."""

import json

import numpy as np
import pytest
import torch
from conftest import image_folder, picture, refused, write_images
from PIL import Image

import incremental_learning_system as incremental
import predict
from lwm import Classifier, attention
from lwm.images.batches import to_input
from lwm.images.files import fitted
from lwm.runtime.checkpoint import load


@pytest.fixture
def student(whole):
    return str(whole / "student_model.pth")


def test_it_answers_for_files_and_arrays_as_predict_py_does(tmp_path, student, capsys):
    files = write_images(tmp_path / "images", 3, size=21)
    assert predict.main(["--checkpoint", student, "--json", *map(str, files)]) == 0
    expected = [row["classes"][0] for row in json.loads(capsys.readouterr().out)]
    classifier = Classifier.load(student)
    arrays = [np.asarray(Image.open(file)) for file in files]
    tensors = [torch.from_numpy(array.transpose(2, 0, 1).copy()) for array in arrays]
    for pictures in (files, arrays, tensors, list(map(Image.open, files))):
        answers = classifier.predict(pictures)
        assert [answer.label for answer in answers] == [row["name"] for row in expected]
        assert [answer.probability for answer in answers] == pytest.approx(
            [r["probability"] for r in expected], abs=1e-6
        )
        assert not any(answer.unknown for answer in answers)
    assert classifier.predict([]) == []


def test_a_picture_of_pillow_is_answered_as_its_file(tmp_path, student):
    generator = np.random.default_rng(0)
    grey, alpha = generator.integers(0, 2**16, (12, 9), dtype=np.uint16), generator.integers(0, 256, (12, 9, 4))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(alpha.astype(np.uint8)).save(tmp_path / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture(1, 12, 9)).save(tmp_path / "turned.jpg", exif=turned)
    classifier = Classifier.load(student)
    for file in tmp_path.iterdir():
        expected = classifier.logits(classifier._pixels(file)[None])
        np.testing.assert_array_equal(classifier.logits(classifier._pixels(Image.open(file))[None]), expected)


def test_unknown_is_what_is_below_the_quantile_of_taught_classes(student):
    classifier, pictures = Classifier.load(student), [picture(seed) for seed in range(4)]
    refused(classifier.predict, pictures, 0.05)  # nothing was held back to judge it by
    classifier.checkpoint["unknown"] = {classifier.checkpoint["classifier"]: [-1e9] * 51 + [1e9] * 50}
    assert not any(answer.unknown for answer in classifier.predict(pictures, 0.05))
    assert all(answer.unknown for answer in classifier.predict(pictures, 0.95))


def test_a_class_is_explained_by_its_map(student):
    classifier, image = Classifier.load(student, "head"), picture(5, 8, 8)
    heat = classifier.explain(image, "2")
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    inputs = to_input(pixels, classifier.checkpoint["mean"], classifier.checkpoint["std"])
    label = classifier.class_names.index("2")
    expected = attention.autograd_map(classifier.network, inputs, torch.tensor([label]), classifier.network.last_layer)[
        0
    ]
    np.testing.assert_allclose(heat, expected.numpy(), rtol=1e-4, atol=1e-6)
    answer = classifier.predict([image])[0].label
    assert np.array_equal(classifier.explain(image), classifier.explain(image, answer))


def test_what_it_cannot_use_is_refused_in_a_line(tmp_path, student):
    classifier = Classifier.load(student)
    assert "nobody" in refused(classifier.explain, picture(1), "nobody")
    for odd in (np.zeros((8, 8, 3)), torch.zeros(3, 8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)):
        assert "float64" in refused(classifier.predict, [odd])
    assert "absent.png" in refused(classifier.predict, [tmp_path / "absent.png"])
    assert "oracle" in refused(Classifier.load, student, "oracle")


def test_it_learns_the_new_classes_of_a_folder_as_the_script_does(tmp_path, student, monkeypatch):
    """And is saved, exported and extended again; the one that learned stays as it is."""
    photos = image_folder(tmp_path / "photos", {"owl": 12, "fox": 12, "2": 6})
    narrow = Classifier.load(student)
    wide = narrow.add_classes(photos)
    assert wide.class_names == [*narrow.class_names, "fox", "owl"]
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "folder", "--data-dir", str(photos), "--output-dir", "script", "--method", "closed-form"]
    flags += ["--precision", "fp32", "--new-classes", "all", "--teacher", student]
    assert incremental.main(flags) == 0
    wide.save("wide.pth")
    saved, scripts = load("wide.pth"), load("script/student_model.pth")
    for part in ("model", "statistics"):
        for name, tensor in scripts[part].items():
            torch.testing.assert_close(saved[part][name], tensor, rtol=1e-4, atol=1e-5)
    assert saved["temperatures"] == pytest.approx(scripts["temperatures"], rel=1e-2)
    for key in ("calibrated_on", "loss_form", "class_names"):
        assert saved[key] == scripts[key]
    assert saved["tasks"][-1].keys() == scripts["tasks"][-1].keys()
    assert saved["tasks"][-1]["apart"] == scripts["tasks"][-1]["apart"] != []
    wider = Classifier.load("wide.pth").add_classes(image_folder(tmp_path / "more", {"elk": 12}), favour="new")
    assert wider.class_names[-1] == "elk"
    wider.export("wider.onnx", input="uint8")
    image = picture(3)
    shown = predict.open_onnx("wider.onnx").logits(fitted(image, 8)[None])
    np.testing.assert_allclose(shown, wider.logits(fitted(image, 8)[None]), rtol=1e-3, atol=1e-3)
    assert "known already" in refused(wider.add_classes, photos)
    assert "absent" in refused(wider.add_classes, tmp_path / "absent")
