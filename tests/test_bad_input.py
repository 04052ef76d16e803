"""Bad input: exit code 2, one line that names the culprit, no traceback, and not a file made or changed.

One table, one way in: a script, its flags and constants of config.py, and what the line must name. All cases share one
folder, the desk, with files of every wrong kind. test_settings.py has the single values.
"""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpointfiles
import pytest
import torch
from conftest import image_folder, picture, write_images
from PIL import Image

import config
import demo
import edit_classes
import export
import gradcam
import incremental_learning_system as step
import predict
import reproduce
import train_teacher_model as trainer
from lwm import __version__ as VERSION
from lwm.runtime import checkpoint, run_folder
from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.settings import load_page

ROOT = Path(__file__).resolve().parent.parent
LONG = "x" * 300  # longer than a file's name can be
TEACHER = "--teacher teacher.pth"
BOTH = f"{TEACHER} --student student.pth"
AGAIN = f"{TEACHER} --dataset folder --data-dir four --epochs 1 --resume --student"
FOLDER = "--dataset folder --data-dir data"
GRADCAM = "--checkpoint student.pth --image picture.png"

# A warning would be a second line in a real run.
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The working folder of all cases, which none of them may change."""
    desk = tmp_path_factory.mktemp("desk")
    full = desk / "full"  # a run that is there
    place = ["--dataset", "folder", "--data-dir", str(image_folder(desk / "four", dict.fromkeys("0123", 4)))]
    flags = [*place, "--epochs", "1", "--output-dir", str(full), "--cache-dir", str(desk / "cache"), "--device", "cpu"]
    assert trainer.main([*flags, "--model", "resnet32", "--image-size", "16"]) == 0
    assert step.main([*flags, "--teacher", str(full / "teacher_model.pth")]) == 0
    teacher, student = (checkpoint.load(full / f"{name}_model.pth") for name in ("teacher", "student"))
    homeless = [{**task, "judged": {**task["judged"], "data_dir": str(desk / "gone")}} for task in student["tasks"]]
    checkpoint.save(desk / "teacher.pth", teacher)
    checkpoint.save(desk / "student.pth", student)
    checkpoint.save(desk / "unfinished.pth", checkpointfiles.unfinished())
    checkpoint.save(desk / "homeless.pth", {**student, "tasks": homeless})
    checkpoint.save(desk / "bare.pth", {**student, "statistics": {}})
    scatters = student["statistics"]["scatters"].neg()
    checkpoint.save(desk / "broken.pth", {**student, "statistics": {**student["statistics"], "scatters": scatters}})

    for name in ("file", "text.pth", "text.png", "text.onnx"):
        (desk / name).write_text("no image, no checkpoint\n")
    Image.fromarray(picture(1)).save(desk / "picture.png")
    counts = {"ant": 4, "bee": 4, "cow": 4, "lone": 1, "spoilt": 3, "text": 1}
    data = image_folder(desk / "data", counts, {name: 2 for name in counts if name != "cow"})
    (data / "train" / "empty").mkdir()
    (data / "train" / "spoilt" / "001.png").write_text("no image\n")
    (data / "train" / "text" / "000.png").write_text("no image\n")
    image_folder(desk / "untested", {"ant": 4, "lone": 1})
    (desk / "bare").mkdir()
    write_images(desk / "strange" / "wasp", 2)
    (desk / "flat").mkdir()
    (desk / "flat" / "001.png").write_text("no image\n")
    return desk


@pytest.fixture(autouse=True)
def surroundings(desk, monkeypatch):
    """The desk is the working folder, on a machine without GPU and network, where no run may begin."""

    def unreachable(*arguments, **named):
        raise urllib.error.URLError("no network")

    def begun(*arguments, **named):
        pytest.fail("a run began that was to be refused")

    monkeypatch.chdir(desk)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(run_folder.RunFolder, "writing", begun)
    monkeypatch.setattr(subprocess, "Popen", begun)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the folder and all that is in it; a file that came and went shows in the time of its folder.

    The cache of decoded images is left out: it is there before a run is compared with the one it is to go on from.
    """
    stats = {str(path): path.lstat() for path in (folder, *folder.rglob("*")) if "cache" not in path.parts}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def the_line(code: int, out: str, err: str) -> str:
    assert code == 2, (code, err)
    assert "Traceback" not in out + err
    *before, last = err.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if line.startswith(("error", "warning"))]
    return last


def case(module: ModuleType, flags: str, *culprits: str, **constants: Any) -> Any:
    """A row of the table. ``constants`` go to config.py."""
    label = " ".join([module.__name__, flags, *constants]).replace(LONG, "LONG")
    return pytest.param(module, flags, culprits, constants, id=label[:120])


CASES = [
    # Values that are wrong only for this script, or together.
    case(trainer, f"{TEACHER}", "--teacher"),
    case(trainer, "", "config.py: OLD_CLASSES", OLD_CLASSES=["0"]),
    case(trainer, "--method lwf --loss-form binary", "--loss-form", "lwf"),
    case(trainer, "--method lwf", "config.py: LOSS_FORM", "lwf", LOSS_FORM="binary"),
    case(step, "", "--teacher"),
    case(step, TEACHER, "config.py: METHOD", METHOD="ewc"),
    case(step, f"{TEACHER} --classifier knn", "--classifier", "lda"),
    case(step, f"{TEACHER} --classifier lda --no-statistics", "--classifier", "--statistics"),
    case(step, f"{TEACHER} --loss-form softmax --new-classes 2", "--new-classes"),
    case(step, f"{TEACHER} --student student.pth", "--student", "--resume"),
    case(gradcam, f"{GRADCAM} --class-nam ant", "--class-nam;", "--class-name?"),
    case(predict, "picture.png --checkpoint student.pth --top 0", "--top"),
    case(predict, "picture.png --checkpoint student.pth --classifier knn", "knn"),
    # Classes.
    case(trainer, "--old-classes 0,ten", "--old-classes", "'ten'"),
    case(trainer, f"{FOLDER} --old-classes ant,bees", "'bees'", "'bee'?"),
    case(trainer, f"{FOLDER} --old-classes ant,COW", "'COW'", "'cow'?"),
    case(step, "--teacher student.pth --dataset folder --data-dir four --new-classes all", "--new-classes", "four"),
    case(step, f"{TEACHER} --new-classes-file none.txt", "--new-classes-file none.txt"),
    case(step, f"{TEACHER} --new-classes 1,5", "--new-classes", "'1'"),
    case(step, TEACHER, "config.py: NEW_CLASSES", "'1'", NEW_CLASSES=["1", "2"]),
    # The checkpoints.
    case(step, "--teacher none.pth", "--teacher: none.pth"),
    case(step, "--teacher unfinished.pth", "--teacher unfinished.pth"),
    case(step, f"{TEACHER} --old-classes 1,0", "--old-classes", "0,1"),
    case(step, f"{TEACHER} --model resnet18", "--model", "resnet32"),
    case(step, f"{TEACHER} --student text.pth --resume", "text.pth"),
    case(step, f"{AGAIN} teacher.pth", "cannot resume"),
    case(step, f"{AGAIN} student.pth --new-classes 3,2", "cannot resume: class_names"),
    case(step, f"{AGAIN} student.pth --loss-form softmax", "cannot resume: loss_form"),
    case(demo, f"{TEACHER} --student text.pth", "--student: text.pth"),
    case(demo, "--teacher student.pth --student teacher.pth", "--student teacher.pth"),
    case(demo, f"{TEACHER} --student bare.pth --classifier lda --images four/train", "lda"),
    case(gradcam, "--checkpoint broken.pth --image picture.png --classifier lda", "statistics"),
    case(predict, "picture.png --checkpoint text.pth", "text.pth"),
    case(predict, "picture.png --checkpoint text.onnx", "--checkpoint text.onnx"),
    # Outputs.
    case(trainer, "", "config.py: OUTPUT_DIR is 'file'", OUTPUT_DIR="file"),
    case(trainer, f"--output-dir {LONG}", "--output-dir is 'xxx"),
    case(trainer, "--output-dir full", "full/teacher_model.pth", "--overwrite"),
    case(step, f"{TEACHER} --output-dir full --student student.pth --resume", "full/student_model.pth"),
    case(step, "--teacher full/student_model.pth --new-classes 4 --output-dir full", "--teacher"),
    case(demo, f"{BOTH} --output-dir file/x", "--output-dir is 'file/x'"),
    case(gradcam, f"{GRADCAM} --output file/map.png", "--output is 'file'"),
    case(gradcam, f"{GRADCAM} --output {LONG}", "--output"),
    case(gradcam, f"{GRADCAM} --output ./student.pth", "--checkpoint"),
    case(edit_classes, "student.pth", "--rename", "--merge", "--remove"),
    case(edit_classes, "student.pth --rename wasp=bee", "'wasp'"),
    case(edit_classes, "student.pth --rename zero", "--rename", "cat=tomcat"),
    case(edit_classes, "student.pth --merge 0,1=", "--merge"),
    case(edit_classes, "student.pth --merge 0,7=one", "'7'"),
    case(edit_classes, "bare.pth --merge 0,1=one", "--measure-old"),
    case(edit_classes, "student.pth --remove 0,1,2,3", "every class"),
    case(edit_classes, "unfinished.pth --remove 0", "--resume"),
    case(edit_classes, ". --remove 0", "."),
    case(edit_classes, "student.pth --rename 0=a,b", "--rename", "comma"),
    case(demo, f"{BOTH} --serve {'9' * 5000}", "--serve"),
    case(demo, f"{BOTH} --serve h\u00e9..:1", "--serve"),
    case(edit_classes, "text.pth --remove 0", "text.pth"),
    case(edit_classes, "student.pth --remove 0 --output student.pth --overwrite", "student.pth exists"),
    case(export, "--checkpoint student.pth --output a.onnx --class-order text.png", "--class-order"),
    case(export, "--checkpoint student.pth --output picture.png", "--output picture.png"),
    case(export, f"--checkpoint student.pth --output {LONG}", LONG),
    # Images.
    case(trainer, "", "config.py: DATA_DIR: bare", DATASET="folder", DATA_DIR="bare"),
    case(trainer, "--dataset cifar100 --data-dir bare", "--data-dir", "cifar-100-python"),
    case(trainer, f"{FOLDER} --old-classes ant,empty", "'empty'"),
    case(trainer, f"{FOLDER} --old-classes ant,lone", "'lone'"),
    case(trainer, "--dataset folder --data-dir untested --old-classes ant,lone", "'lone'"),
    case(trainer, f"{FOLDER} --old-classes ant,spoilt", "data/train/spoilt/001.png"),
    case(trainer, f"{FOLDER} --old-classes ant,text --skip-bad-images", "'text'"),
    case(trainer, f"{FOLDER} --old-classes ant,bee --cache-dir file", "--cache-dir file"),
    case(step, f"{TEACHER} {FOLDER} --new-classes bee,cow", "'cow'"),
    case(demo, f"{BOTH} --images strange", "--images strange", "0, 1, 2, 3"),
    case(demo, f"{BOTH} --images flat", "flat/001.png"),
    case(demo, f"{BOTH} --dataset folder --data-dir gone", "--data-dir: gone"),
    case(demo, f"{TEACHER} --student homeless.pth", "--images", DATASET="folder"),
    case(gradcam, "--checkpoint student.pth --image none.png", "--image: none.png"),
    case(gradcam, f"{GRADCAM} --class-name 9", "--class-name 9", "0, 1, 2, 3"),
    case(gradcam, f"{GRADCAM} --layer layer9", "--layer layer9", "layer3"),
    case(predict, "bare --checkpoint student.pth", "bare"),
    # The device.
    case(trainer, "", "config.py: DEVICE", DEVICE="cuda"),
    case(step, f"{TEACHER} --device cuda:99", "--device: cuda:99"),
    case(demo, f"{BOTH} --device mps", "--device: mps"),
    # The protocols.
    case(reproduce, "digits", "'digits'", "digits-2+2"),
    case(reproduce, "digits-2+2 --seed 1", "--seed", "--seeds?"),
    case(reproduce, "digits-2+2 --seeds 0,4294967296", "--seeds", "4294967296"),
    case(reproduce, "digits-2+2 --jobs 0", "--jobs"),
    case(reproduce, "digits-2+2 --methods ewc", "--methods", "'ewc'"),
    case(reproduce, "digits-2+2 --work-dir file/x", "--work-dir is 'file/x'"),
    case(reproduce, "photos32-search --data-dir data", "--data-dir", "100"),
]


@pytest.mark.parametrize(("module", "flags", "culprits", "constants"), CASES)
def test_the_culprit_is_named_in_one_line_and_nothing_is_written(
    desk, capfd, monkeypatch, module, flags, culprits, constants
):
    for name, value in constants.items():
        monkeypatch.setattr(config, name, value, raising=False)
    before = snapshot(desk)
    line = the_line(module.main(shlex.split(flags)), *capfd.readouterr())
    assert [culprit for culprit in culprits if culprit not in line] == [], line
    assert snapshot(desk) == before


@pytest.mark.parametrize(
    ("script", "flags", "culprit"),
    [
        ("train_teacher_model", "--epoch 3", "--epochs?"),
        ("predict", f"--checkpoint student.pth {LONG}", LONG),
    ],
)
def test_the_command_line_refuses_in_the_same_way(desk, monkeypatch, script, flags, culprit):
    monkeypatch.undo()  # this is a process of its own
    before = snapshot(desk)
    command = [sys.executable, str(ROOT / f"{script}.py"), *shlex.split(flags)]
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False)
    assert culprit in the_line(done.returncode, done.stdout, done.stderr)
    assert snapshot(desk) == before


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("EPOCHS = 3\nOLD_CLASSES = ['0', '1'\n", ", line 2"),
        ("EPOCHS = three\n", ", line 1"),
        ("\n\nimport pathlib; pathlib.Path(3)\n", ", line 3"),  # raised in a line elsewhere
        ("raise SystemExit(3)\n", ", line 1"),
        ("EPOCHS = '\0'\n", ""),
        (None, ""),
    ],
)
def test_a_page_that_python_cannot_read_is_said_with_its_line(tmp_path, monkeypatch, source, line):
    if source is not None:
        (tmp_path / "config.py").write_text(source)
    monkeypatch.delitem(sys.modules, "config")
    monkeypatch.setattr(
        sys, "path", [str(tmp_path), *(path for path in sys.path if not Path(path, "config.py").exists())]
    )
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises(InputError, match=rf"^config\.py{line}: .") as caught:
        load_page()
    assert len(str(caught.value).splitlines()) == 1


def test_what_nobody_has_foreseen_is_told_apart_from_bad_input(capsys, monkeypatch):
    monkeypatch.undo()  # the report asks the system for its name

    def main(argv: list[str] | None = None) -> None:
        raise error

    error: Exception = OSError(errno.EACCES, os.strerror(errno.EACCES), "locked/cat.png")
    assert one_line_errors(main)([]) == 2
    assert "locked/cat.png" in the_line(2, *capsys.readouterr())
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "full.png")
    with pytest.raises(OSError, match="full"):
        one_line_errors(main)([])
    error = KeyError("lost")
    with pytest.raises(KeyError) as caught:
        one_line_errors(main)([])
    (note,) = caught.value.__notes__
    assert all(version in note for version in (VERSION, torch.__version__))
    error = BrokenPipeError()
    assert one_line_errors(main)([]) == 141
