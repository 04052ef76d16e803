"""Every code block of README and docs is executed, page by page, in a folder with what the page takes for granted.

Training is made short and has small images; make, pip, torchrun and the tools of a contributor are looked up rather
than run, and of reproduce.py the command line is read.
"""

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
import export
import gradcam
import incremental_learning_system
import predict
import reproduce
import train_teacher_model
from lwm import losses

pytestmark = pytest.mark.usefixtures("unrendered")

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SCRIPTS = {
    f"{module.__name__}.py": module.main
    for module in (train_teacher_model, incremental_learning_system, demo, gradcam, export, predict)
}
CLASSES = ["cat", "dog", "horse", "rabbit", "hamster"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the reader of a page has: images, a network of their own, and the student of the first example."""
    monkeypatch.chdir(tmp_path)
    image_folder(Path("photos"), dict.fromkeys(CLASSES, 6))
    write_images(Path("holiday"), 2)
    shutil.copy("holiday/000.png", "cat.png")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), "model.pth")
    Path("classes.txt").write_text("".join(f"class {number}\n" for number in range(10)))
    return tmp_path


def commands_of(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := line.split("  #")[0].strip())]


def run(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python3", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    program, script, *flags = [*words, ""]
    flags = flags[:-1] or []
    if program == "make":
        assert script in ("", *re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    elif program == "pip":
        assert (ROOT / words[-1]).exists()
    elif program.startswith(".venv/bin/") and script != "reproduce.py":
        tool = words[2] if program.endswith("python") else Path(program).name
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
    if script == "train_teacher_model.py" and "--image-size" not in flags:
        more += ["--model", "resnet32", "--image-size", "16"]
    return [*flags, *more]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_code_block_can_be_executed(page, folder, monkeypatch, capsys):
    blocks = BLOCK.findall(page.read_text())
    assert page.read_text().count("```") == 2 * len(blocks)
    images = torch.randn(4, 3, 16, 16)
    names = {**vars(config), "loader": [(images, torch.tensor([4, 5, 4, 5]))]}
    for language, block in blocks:
        if page.name == "adding-a-method.md":
            names |= vars(losses)  # where it is to stand
        if language == "python":
            exec(block, names)
        else:
            assert language == ""
            for command in commands_of(block):
                run(command)
    if page.name == "README.md":
        assert names["OLD_CLASSES"] == ["apple", "aquarium_fish"]
        assert names["terms"].keys() >= {"classification", "distillation", "attention"}
        assert (folder / "own.onnx").exists()
    if page.name == "adding-a-method.md":
        terms = tried(names["entropy_too"])
        assert terms["entropy"] > 0


def tried(method) -> dict:
    """What a method of the reader's own says of random outputs; its gradient can be taken."""
    from conftest import loss_settings
    from lwm.models import Output

    student = Output(torch.randn(4, 5, requires_grad=True), torch.randn(4, 8, 2, 2))
    teacher = Output(torch.randn(4, 3), torch.randn(4, 8, 2, 2))
    terms = method(student, teacher, torch.tensor([3, 4, 3, 4]), (None, None), loss_settings())
    terms["total"].backward()
    assert student.logits.grad.abs().sum() > 0
    return terms


def test_every_command_of_reproduce_in_a_text_is_one():
    texts = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    commands = re.findall(r"python3 reproduce\.py ([^`\n<]+)", texts)
    assert len(commands) > 5
    for command in commands:
        options = reproduce.arguments(shlex.split(command))
        if options.methods:
            protocol = reproduce.PROTOCOLS[options.protocol]
            assert set(options.methods.split(",")) <= protocol.methods.keys() | protocol.ablation.keys()
