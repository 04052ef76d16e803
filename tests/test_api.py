"""The classifier in a Python program: it answers as predict.py does."""

import json

import numpy as np
import pytest
import torch
from conftest import picture, refused, write_images
from PIL import Image

import predict
from lwm import Classifier, attention
from lwm.images.batches import to_input


@pytest.fixture
def student(whole):
    return str(whole / "student_model.pth")


def test_it_answers_for_files_and_arrays_as_predict_py_does(tmp_path, student, capsys):
    files = write_images(tmp_path / "images", 3, size=21)
    assert predict.main(["--checkpoint", student, "--json", *map(str, files)]) == 0
    expected = [row["classes"][0] for row in json.loads(capsys.readouterr().out)]
    classifier = Classifier.load(student)
    for pictures in (files, [np.asarray(Image.open(file)) for file in files]):
        answers = classifier.predict(pictures)
        assert [answer.label for answer in answers] == [row["name"] for row in expected]
        assert [answer.probability for answer in answers] == pytest.approx(
            [r["probability"] for r in expected], abs=1e-6
        )
        assert not any(answer.unknown for answer in answers)
    assert classifier.predict([]) == []


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
    assert "float64" in refused(classifier.predict, [np.zeros((8, 8, 3))])
    assert "absent.png" in refused(classifier.predict, [tmp_path / "absent.png"])
    assert "oracle" in refused(Classifier.load, student, "oracle")
