"""gradcam.py: the whole photograph, the square that the network sees, and its map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, picture, randomised
from PIL import Image

import gradcam
import incremental_learning_system as incremental
from lwm import models
from lwm.attention import autograd_map
from lwm.images.batches import to_input
from lwm.images.files import LARGEST, decode_image, decode_whole
from lwm.reporting import plots
from lwm.runtime import checkpoint

NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    model = randomised("resnet32", 4, 16).float()
    with torch.no_grad():
        model.fc.weight[0].abs_()
        model.fc.weight[3] = -model.fc.weight[0]  # says nothing for the class, anywhere
    path = tmp_path_factory.mktemp("gradcam") / "student.pth"
    checkpoint.save(path, checkpoint_of(model, "resnet32", NAMES, 16))
    return path, model


def drawn(tmp_path, student, photograph: np.ndarray, *flags: str) -> np.ndarray:
    Image.fromarray(photograph).save(tmp_path / "photo.png")
    base = ["--checkpoint", str(student), "--image", str(tmp_path / "photo.png"), "--class-name", "a"]
    assert gradcam.main([*base, *flags, "--output", str(tmp_path / "map.png")]) == 0
    return np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))


@pytest.mark.parametrize(("width", "height"), [(700, 400), (360, 640)])
def test_the_photograph_is_whole_and_the_map_lies_in_the_cut_alone(tmp_path, student, width, height):
    photograph = picture(3, width, height)
    found = drawn(tmp_path, student[0], photograph)
    assert found.shape[0] == height
    assert found.shape[1] > width  # a colour bar beside it
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    outside = np.ones((height, width), bool)
    outside[max(top - 4, 0) : top + side + 4, max(left - 4, 0) : left + side + 4] = False  # the cut and its mark
    assert outside.sum() > 100 * side
    assert (found[:, :width][outside] == photograph[outside]).all()
    inside = found[top + 4 : top + side - 4, left + 4 : left + side - 4]
    saved = checkpoint.load(student[0])
    pixels = torch.from_numpy(decode_image(tmp_path / "photo.png", 16))
    heat = autograd_map(
        student[1].eval(), to_input(pixels[None], saved["mean"], saved["std"]), torch.tensor([0]), "layer3"
    )
    square = photograph[top : top + side, left : left + side].transpose(2, 0, 1)
    expected = plots.overlay(square, heat[0].numpy(), float(heat.max()))[4:-4, 4:-4]
    assert np.abs(inside.astype(int) - expected).max() <= 1
    assert (inside.max(2) - inside.min(2)).max() > 60  # one sees it


def test_a_large_photograph_is_scaled_and_one_that_lies_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(1, 2400, 1200)).save(tmp_path / "it.png", exif=exif)
    whole = decode_whole(tmp_path / "it.png")
    assert whole.shape == (3, LARGEST, LARGEST // 2)
    upright = np.rot90(picture(1, 2400, 1200), -1)
    assert np.abs(whole[:, ::100, ::100].transpose(1, 2, 0).astype(int) - upright[::150, ::150]).max() < 12


def test_a_small_one_is_enlarged_and_a_map_of_nothing_is_said(tmp_path, student, capsys):
    assert drawn(tmp_path, student[0], picture(2, 40, 30)).shape[0] >= 8 * 30
    assert capsys.readouterr().err == ""
    found = drawn(tmp_path, student[0], picture(2, 40, 30), "--class-name", "d")
    assert "warning: the map of d" in capsys.readouterr().err
    grey = found[100:200, 80:160]
    assert (grey.max(2) == grey.min(2)).all()


def test_of_a_thousand_classes_ten_are_named(tmp_path, capsys):
    names = [f"class {number}" for number in range(1000)]
    path = tmp_path / "many.pth"
    checkpoint.save(path, checkpoint_of(models.build("resnet32", 1000, 16), "resnet32", names, 16))
    Image.fromarray(picture(1)).save(tmp_path / "photo.png")
    flags = ["--checkpoint", str(path), "--image", str(tmp_path / "photo.png"), "--class-name", "x"]
    assert gradcam.main([*flags, "--output", str(tmp_path / "map.png")]) == 2
    said = capsys.readouterr().err
    assert "class 9 and 990 more" in said
    flags = ["--teacher", str(path), "--dataset", "folder", "--data-dir", str(tmp_path), "--new-classes", "x"]
    assert incremental.main([*flags, "--old-classes", "a,b"]) == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) < 2000
