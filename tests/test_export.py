"""The ONNX file answers as torch does, and predict.py answers from it without torch."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import checkpoint_of, picture, randomised, write_images
from PIL import Image

import export
import predict
import reproduce
from lwm import exporting
from lwm.attention import autograd_map
from lwm.probabilities import likeliest, probabilities_of
from lwm.runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["a", "b, c", "Ärmel", "d"]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def pictures(count: int, height: int, width: int) -> np.ndarray:
    return np.stack([picture(seed, width, height).transpose(2, 0, 1) for seed in range(count)])


def normalised(pixels: np.ndarray) -> torch.Tensor:
    images = torch.from_numpy(pixels).double() / 255
    return ((images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)).float()


def saved(path: Path, architecture: str = "resnet32", image_size: int = 16, form: str = "binary") -> torch.nn.Module:
    """Write a checkpoint; returns its network."""
    model = randomised(architecture, len(NAMES), image_size).float().eval()
    with torch.no_grad():
        scale = model(normalised(pictures(9, 16, 16))).logits.abs().max()  # so that no answer is certain
        model.fc.bias.div_(scale)
        model.fc.weight.div_(scale)
    changes = {"mean": MEAN, "std": STD, "loss_form": form}
    checkpoint.save(path, checkpoint_of(model, architecture, NAMES, image_size, **changes))
    return model


def answers(path: Path | str, pixels: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": pixels})


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with model.pth, and model.onnx of it for uint8 images with maps; and the network."""
    folder = tmp_path_factory.mktemp("made")
    model = saved(folder / "model.pth")
    flags = ["--checkpoint", str(folder / "model.pth"), "--output", str(folder / "model.onnx")]
    assert export.main([*flags, "--input", "uint8", "--maps"]) == 0
    return folder, model


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "flat", 3, seed=1, size=25)
    for number, name in enumerate("xy"):
        write_images(folder / "nested" / name, 2, seed=number + 2)
    return folder


# export.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 16, 16), (7, 16, 16), (2, 40, 23)])
def test_it_answers_and_explains_as_torch_does_on_images_of_any_size(made, shape):
    folder, model = made
    pixels = pictures(*shape)
    logits, maps = answers(folder / "model.onnx", pixels)
    with torch.no_grad():
        expected = model(normalised(pixels)).logits
    assert np.abs(logits - expected.numpy()).max() < 1e-4
    theirs = autograd_map(model, normalised(pixels), expected.argmax(1), model.last_layer)
    assert np.abs(maps - theirs.numpy()).max() < 1e-4
    assert maps.max() > 0


def test_float_images_from_0_to_1_are_the_default_and_the_metadata_say_what_a_reader_needs(here):
    model = saved(here / "model.pth", "mobilenet_v3_small", 32, "softmax")
    flags = ["--checkpoint", "model.pth", "--output", "deep/model.onnx"]
    assert export.main([*flags, "--maps"]) == 2  # they have no closed form
    assert not Path("deep").exists()
    assert export.main(flags) == 0
    pixels = pictures(3, 32, 32)
    (logits,) = answers("deep/model.onnx", pixels.astype(np.float32) / 255)
    with torch.no_grad():
        assert np.abs(logits - model(normalised(pixels)).logits.numpy()).max() < 1e-4
    meta = {each.key: each.value for each in onnx.load("deep/model.onnx").metadata_props}
    assert json.loads(meta["class_names"]) == NAMES
    assert (meta["image_size"], meta["unknown"]) == ("32", "[]")


def linear_onnx(path: str, size: int = 32) -> None:
    """A file as of export.py, whose logits are sums of pixels with random weights: each pixel counts."""
    weights = np.random.default_rng(0).normal(size=(3 * size**2, len(NAMES))).astype(np.float32) / size
    nodes = [
        onnx.helper.make_node("Flatten", ["image"], ["row"]),
        onnx.helper.make_node("MatMul", ["row", "weights"], ["logits"]),
    ]
    given = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, size, size])
    answer = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", len(NAMES)])
    graph = onnx.helper.make_graph(
        nodes, "linear", [given], [answer], [onnx.numpy_helper.from_array(weights, "weights")]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    names = json.dumps(NAMES)
    onnx.helper.set_model_props(model, {"class_names": names, "image_size": str(size), "unknown": "[]"})
    onnx.save(model, path)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P"])
def test_the_code_in_the_docs_answers_as_predict_does_for_an_oblong_photograph_on_its_side(here, kind, capsys):
    linear_onnx("student.onnx")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(picture(5, 300, 100)).convert(kind)
    if kind == "RGBA":
        photo.putalpha(Image.fromarray(picture(6, 300, 100)[:, :, 0]))
    photo.save("cat.png", exif=exif)
    (code,) = re.findall("```python\n(.*?)```", (ROOT / "docs" / "own-data.md").read_text(), re.S)
    names: dict = {}
    exec(code, names)
    ((_, logits),) = predict.answers(predict.open_onnx("student.onnx"), [Path("cat.png")], False)
    assert np.abs(names["logits"][0] - logits).max() < 0.02
    squeezed = photo.convert("RGB").resize((32, 32))
    pixels = np.float32(squeezed).transpose(2, 0, 1)[None] / 255
    assert np.abs(answers("student.onnx", pixels)[0][0] - logits).max() > 0.1  # so that the reading matters
    found = predicted(capsys, "--checkpoint", "student.onnx", "cat.png", "--top", "1")
    assert found[0]["classes"][0]["name"] == NAMES[names["logits"][0].argmax()]


class Tied(torch.nn.Module):
    """Its graph has one name for height and width."""

    maps = False

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + image.transpose(2, 3)


def test_axes_have_names_also_if_height_and_width_are_one():
    content = exporting.onnx_file(Tied(), 16, "float32", {})
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    assert axes_of(content) == ["batch", 3, "height", "width"]


def axes_of(content: bytes) -> list[str | int]:
    (given,) = onnx.load_from_string(content).graph.input
    return [side.dim_param or side.dim_value for side in given.type.tensor_type.shape.dim]


def test_axes_of_a_network_have_names(made):
    content = (made[0] / "model.onnx").read_bytes()
    assert axes_of(content) == ["batch", 3, "height", "width"]
    graph = onnx.load_from_string(content).graph
    shapes = [[side.dim_param for side in each.type.tensor_type.shape.dim] for each in graph.output]
    assert [shape[0] for shape in shapes] == ["batch", "batch"]
    assert "height" in shapes[1][1]
    assert "width" in shapes[1][2]


def test_an_opset_can_be_chosen_and_what_reads_it_is_said(made, here, capsys):
    flags = ["--checkpoint", str(made[0] / "model.pth"), "--output", "x.onnx"]
    for bad in ("17", "24", "-1"):
        assert export.main([*flags, "--opset", bad]) == 2
    assert export.main([*flags, "--opset", "18"]) == 0
    model = onnx.load("x.onnx")
    assert [each.version for each in model.opset_import if not each.domain] == [18]
    assert "opset 18" in capsys.readouterr().out
    for format, opset, runtime in ((8, 18, "1.14"), (9, 20, "1.17"), (10, 18, "1.18"), (10, 20, "1.18")):
        model.ir_version, model.opset_import[0].version = format, opset
        assert exporting.needs(model.SerializeToString()).split()[-3] == runtime


@pytest.mark.parametrize("name", ["x.tflite", "x", "x.onnx.gz"])
def test_another_suffix_is_refused(made, here, name, capsys):
    assert export.main(["--checkpoint", str(made[0] / "model.pth"), "--output", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not any(here.iterdir())


@pytest.mark.parametrize("spoil", [2, float("nan")])
def test_a_file_that_answers_otherwise_is_not_written(made, here, monkeypatch, capsys, spoil):
    def spoiled(*arguments):
        model = onnx.load(made[0] / "model.onnx")
        (bias,) = (each for each in model.graph.initializer if each.name.endswith("fc.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(spoil * onnx.numpy_helper.to_array(bias), bias.name))
        return model.SerializeToString()

    monkeypatch.setattr(exporting, "onnx_file", spoiled)
    checkpoint_path = shutil.copy(made[0] / "model.pth", here)
    (here / "model.onnx").write_text("earlier")
    for name, code in (("model.onnx", 1), ("model.pth", 2)):  # what is no ONNX file is never replaced
        before = (here / name).read_bytes()
        flags = ["--checkpoint", str(checkpoint_path), "--output", name, "--overwrite"]
        assert export.main([*flags, "--input", "uint8", "--maps"]) == code
        assert capsys.readouterr().err.startswith("error: ")
        assert (here / name).read_bytes() == before


# predict.py -------------------------------------------------------------------------------------------------------


def predicted(capsys, *flags: str) -> list[dict]:
    capsys.readouterr()
    assert predict.main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_checkpoint_and_onnx_give_the_same_answers(made, photos, capsys):
    both = []
    for name in ("model.pth", "model.onnx"):
        found = predicted(capsys, "--checkpoint", str(made[0] / name), "--top", "4", str(photos / "flat"))
        assert [row["image"] for row in found] == [str(photos / "flat" / f"00{i}.png") for i in range(3)]
        both.append([{each["name"]: each["probability"] for each in row["classes"]} for row in found])
    for one, other in zip(*both, strict=True):
        assert list(one) == list(other)
        assert one == pytest.approx(other, abs=1e-4)
    first = [row["a"] for row in both[0]]
    assert max(first) - min(first) > 1e-3  # not one answer for all


def test_the_likeliest_come_first_even_if_probabilities_are_rounded_to_one():
    logits = torch.tensor([-901.0, 50.0, 40.0, -900.0], dtype=torch.float64)
    assert probabilities_of(logits[None].numpy())[0] == pytest.approx(logits.softmax(0).numpy(), abs=1e-12)
    found = likeliest(logits.numpy(), "abcd", 9)
    assert [name for name, _ in found] == list("bcda")
    assert likeliest(logits.numpy(), "abcd", 2) == found[:2]


def test_folders_give_their_images_or_those_of_subfolders_in_batches(made, photos, capsys, monkeypatch):
    flags = ["--checkpoint", str(made[0] / "model.onnx"), str(photos / "nested"), str(photos / "flat" / "001.png")]
    whole = predicted(capsys, *flags)
    names = [Path(row["image"]).relative_to(photos).as_posix() for row in whole]
    assert names == ["nested/x/000.png", "nested/x/001.png", "nested/y/000.png", "nested/y/001.png", "flat/001.png"]
    monkeypatch.setattr(predict, "BATCH", 2)
    assert predicted(capsys, *flags) == whole


def test_csv_has_a_row_for_each_image_and_class_and_the_table_a_line_an_image(made, photos, capsys):
    flags = ["--checkpoint", str(made[0] / "model.onnx"), str(photos / "flat"), "--top", "2"]
    expected = predicted(capsys, *flags)
    assert predict.main([*flags, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    pairs = [(row["image"], each["name"]) for row in expected for each in row["classes"]]
    assert [(row["image"], row["class"]) for row in rows] == pairs
    assert predict.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(row["image"] in line for row, line in zip(expected, lines, strict=True))


WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "matplotlib", "cv2"):
    sys.modules[name] = None
import predict
sys.exit(predict.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("model", "fine"), [("model.onnx", True), ("model.pth", False)])
def test_an_onnx_file_needs_no_torch(made, photos, model, fine):
    flags = ["--checkpoint", str(made[0] / model), str(photos / "flat"), "--json"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *flags], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == fine, done.stderr
    assert not fine or len(json.loads(done.stdout)) == 3


def test_a_bad_image_stops_it_or_is_counted(made, here, capsys):
    write_images(here / "mixed", 2)
    (here / "mixed" / "0000.png").write_bytes(b"no image")
    flags = ["--checkpoint", str(made[0] / "model.onnx")]
    assert predict.main([*flags, "mixed"]) == 2
    assert "mixed/0000.png" in capsys.readouterr().err
    assert predict.main([*flags, "mixed", "--skip-bad-images"]) == 0
    done = capsys.readouterr()
    assert "1 of 3 images" in done.err
    assert [line.split()[0] for line in done.out.splitlines()] == ["mixed/000.png", "mixed/001.png"]
    assert predict.main([*flags, "mixed/0000.png", "--skip-bad-images"]) == 2


@pytest.mark.parametrize(
    "changes",  # of what the file says of itself
    ["", "class_names=[1]", "class_names={", "image_size=big", "image_size=99999", "unknown=none", "unknown=[1]"],
)
def test_an_onnx_file_of_another_program_is_refused(made, here, capsys, changes):
    model = onnx.load(made[0] / "model.onnx")
    meta = {each.key: each.value for each in model.metadata_props} | dict([changes.split("=")] if changes else ())
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, meta if changes else {})
    onnx.save(model, "x.onnx")
    assert predict.main(["--checkpoint", "x.onnx", "cat.png"]) == 2
    assert "x.onnx" in capsys.readouterr().err


def test_home_is_expanded(here, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(here))
    write_images(here / "cats", 1)
    linear_onnx("model.onnx")
    assert predicted(capsys, "--checkpoint=~/model.onnx", "~/cats")[0]["image"] == str(here / "cats" / "000.png")
    assert export.main(["--checkpoint=~/none.pth", "--output=~/x.onnx"]) == 2
    assert f"{here / 'none.pth'}" in capsys.readouterr().err
    options = reproduce.arguments(["folder", "--data-dir=~/cats", "--work-dir", "~/work"])
    assert (options.data_dir, options.work_dir) == (str(here / "cats"), str(here / "work"))


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}])
@pytest.mark.parametrize("name", ["猫.png", "gone 猫.png"])
def test_names_that_the_terminal_has_no_characters_for_are_written_in_escapes(here, encoding, name):
    linear_onnx("x.onnx")
    model = onnx.load("x.onnx")
    (classes,) = (each for each in model.metadata_props if each.key == "class_names")
    classes.value = json.dumps(["猫", "狗", "牛", "羊"])
    onnx.save(model, "x.onnx")
    Image.fromarray(picture(1)).save("猫.png")
    environment = {key: value for key, value in os.environ.items() if key not in ("LANG", "LC_ALL", "LC_CTYPE")}
    environment |= encoding | {"PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    flags = ["--checkpoint", "x.onnx", name]
    done = subprocess.run(
        [sys.executable, ROOT / "predict.py", *flags], env=environment, capture_output=True, cwd=here, check=False
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == (2 if name.startswith("gone") else 0)
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert done.returncode or b"\\u" in done.stdout
