"""Every code block of README and docs is executed, page by page, in a folder with what the page takes for granted.

Training is made short and has small images; make, pip, torchrun and the tools of a contributor are looked up rather
than run, and of reproduce.py the command line is read.
"""

import glob
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import image_folder, write_images

import config
import demo
import edit_classes
import export
import gradcam
import history
import incremental_learning_system
import predict
import reproduce
import train_teacher_model
from lwm import losses
from lwm.reporting import serve

pytestmark = pytest.mark.usefixtures("unrendered")

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SCRIPTS = {
    f"{module.__name__}.py": module.main
    for module in (
        train_teacher_model,
        incremental_learning_system,
        demo,
        gradcam,
        export,
        predict,
        edit_classes,
        history,
    )
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the reader of a page has: images and a network of their own."""
    monkeypatch.chdir(tmp_path)
    image_folder(Path("photos"), dict.fromkeys(["cat", "dog", "horse", "rabbit", "hamster"], 6))
    write_images(Path("holiday"), 2)
    shutil.copy("holiday/000.png", "cat.png")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), "model.pth")
    Path("classes.txt").write_text("".join(f"class {number}\n" for number in range(10)))


def run(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "torchrun":
        program, words = "python3", words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    script, flags = words[0] if words else "", words[1:]
    if program == "make":
        assert not script or re.search(rf"^{script}:", (ROOT / "Makefile").read_text(), re.M)
    elif program.startswith(".venv/bin/") and script != "reproduce.py":
        tool = words[1] if program.endswith("python") else Path(program).name
        assert re.search(rf"^{tool}\b", (ROOT / "requirements-dev.txt").read_text(), re.M)
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif script == "reproduce.py":
        reproduce.arguments(flags)
    else:
        assert program == "python3"
        assert SCRIPTS[script](shortened(script, flags)) == 0, command


def shortened(script: str, flags: list[str]) -> list[str]:
    if script not in ("train_teacher_model.py", "incremental_learning_system.py"):
        return flags
    flags = ["64" if word == "224" else word for word in flags]
    more = [] if "--epochs" in flags else ["--epochs", "1"]
    if script == "train_teacher_model.py" and "--weights" in flags:
        more += ["--image-size", "64"]
    elif script == "train_teacher_model.py" and "--image-size" not in flags:
        more += ["--model", "resnet32", "--image-size", "16"]
    return [*flags, *more]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_code_block_can_be_executed(page, folder, monkeypatch):
    monkeypatch.setattr(serve.Server, "serve_forever", lambda self: None)
    text = page.read_text()
    blocks = BLOCK.findall(text)
    assert text.count("```") == 2 * len(blocks)
    monkeypatch.setattr(losses, "METHODS", dict(losses.METHODS))
    names = {**vars(config), "loader": [(torch.randn(4, 3, 16, 16), torch.tensor([4, 5, 4, 5]))]}
    if page.name == "adding-a-method.md":
        names |= vars(losses)  # where it is to stand
    for language, block in blocks:
        if language == "python":
            exec(block, names)
            continue
        assert language == ""
        for line in block.replace("\\\n", " ").splitlines():
            if command := line.split("  #")[0].strip():
                run(command)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.ipynb")), ids=lambda path: path.name)
def test_every_cell_of_a_notebook_can_be_executed(page, folder):
    names: dict = {}
    for cell in json.loads(page.read_text())["cells"]:
        lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
        exec("\n".join(line for line in lines if not line.startswith("!")), names)
        for line in lines:
            if line.startswith("!"):
                run(line[1:])


def test_every_command_of_reproduce_in_a_text_is_one():
    texts = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    commands = re.findall(r"python3 reproduce\.py ([^`\n<]+)", texts)
    assert len(commands) > 5
    for command in commands:
        options = reproduce.arguments(shlex.split(command))
        if options.methods:
            protocol = reproduce.PROTOCOLS[options.protocol]
            assert set(options.methods.split(",")) <= protocol.methods.keys() | protocol.ablation.keys()
