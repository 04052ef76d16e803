"""Bad input: exit code 2, one line that names what was wrong, and not a file made or changed.

test_settings.py has the single values; here are the scripts as a whole, and values that are wrong only together. All
cases share one folder, the desk, with a copy of the scripts and files of every wrong kind.
"""

from __future__ import annotations

import errno
import os
import platform
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import image_folder, picture, write_images
from PIL import Image
from settingvalues import BAD_VALUES, FILES, reader_of

import config
import demo
import gradcam
import incremental_learning_system as step
import reproduce
import train_teacher_model as trainer
from lwm import __version__ as VERSION
from lwm.runtime import checkpoint, run_folder
from lwm.runtime.errors import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
MAINS = {module.__name__: module.main for module in (trainer, step, demo, gradcam, reproduce)}
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
    for source in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(source, desk)
    shutil.copytree(ROOT / "models", desk / "models", ignore=shutil.ignore_patterns("__pycache__"))

    full = desk / "full"  # a run that is there
    place = ["--dataset", "folder", "--data-dir", str(image_folder(desk / "four", dict.fromkeys("0123", 4)))]
    flags = [*place, "--epochs", "1", "--output-dir", str(full)]
    assert trainer.main([*flags, "--model", "resnet32", "--image-size", "16"]) == 0
    assert step.main([*flags, "--teacher", str(full / "teacher_model.pth")]) == 0
    shutil.copy(full / "teacher_model.pth", desk / "teacher.pth")
    shutil.copy(full / "student_model.pth", desk / "student.pth")
    teacher = checkpoint.load(desk / "teacher.pth")
    checkpoint.save(desk / "unfinished.pth", {**teacher, "finished": False})
    student = checkpoint.load(desk / "student.pth")
    steps = [{**known, "data_dir": str(desk / "gone")} for known in student["steps"]]
    checkpoint.save(desk / "homeless.pth", {**student, "steps": steps})

    (desk / "file").write_text("a file\n")
    (desk / "text.pth").write_text("no checkpoint\n")
    (desk / "text.png").write_text("no image\n")
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

    def begun(*arguments):
        pytest.fail("a run began that was to be refused")

    monkeypatch.chdir(desk)
    monkeypatch.setattr(reproduce, "ROOT", desk)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(run_folder.Run, "writing", begun)
    monkeypatch.setattr(reproduce, "call", begun)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the folder and all that is in it; a file that came and went shows in the time of its folder.

    The cache of decoded images is left out: it is there before a run is compared with the one it is to go on from.
    """
    (folder / "cache").mkdir(exist_ok=True)
    stats = {str(path): path.lstat() for path in (folder, *folder.rglob("*")) if folder / "cache" not in path.parents}
    del stats[str(folder / "cache")]
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def the_line(code: int, out: str, err: str) -> str:
    assert code == 2, (code, err)
    assert "Traceback" not in out + err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def refused(desk: Path, capfd, script: str, flags: list[str]) -> str:
    """The line of a script that refuses, run in this process."""
    before = snapshot(desk)
    capfd.readouterr()
    code = MAINS[script](flags)
    line = the_line(code, *capfd.readouterr())
    assert snapshot(desk) == before
    return line


def refused_by_command(folder: Path, script: str, flags: str = "") -> str:
    """The line of a script that refuses, run by its command line in a folder that holds it."""
    before = snapshot(folder)
    done = subprocess.run(
        [sys.executable, f"{script}.py", *shlex.split(flags)],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    line = the_line(done.returncode, done.stdout, done.stderr)
    assert snapshot(folder) == before
    return line


def case(module: ModuleType, flags: str, *words: str, fault: str = "", **constants):
    """A row of the table. ``constants`` go to config.py, where ``...`` takes one out; ``fault`` is not mended yet."""
    marks = [pytest.mark.xfail(strict=True, reason=fault)] if fault else []
    label = " ".join([module.__name__, flags, *constants])
    return pytest.param(module.__name__, flags, words, constants, marks=marks, id=label.replace(LONG, "LONG")[:120])


CASES = [
    # Single values, through the whole script.
    case(trainer, "--epochs 0", "--epochs is 0", "only --weights need none"),
    case(trainer, "--epochs 10001", "--epochs is 10001", "at most 10000"),
    case(trainer, "--seed 4294967296", "--seed is 4294967296", "at most 4294967295"),
    case(trainer, "--image-size 7", "--image-size is 7", "at least 8"),
    case(trainer, "--device cuda:200", "--device is 'cuda:200'", "cuda:N"),
    case(trainer, "--device cuda:07", "--device is 'cuda:07'", "cuda:N"),
    case(trainer, "--device cuda:²", "--device is 'cuda:²'", "cuda:N"),
    case(trainer, "--epoch 3", "unknown flag --epoch", "did you mean --epochs?"),
    case(trainer, f"{TEACHER}", "unknown flag --teacher"),
    case(trainer, "--old-classes 0, 1", "'1' belongs to no flag", "without spaces"),
    case(trainer, "--epochs", "--epochs"),
    case(step, "", "--teacher"),
    case(step, "--teacher ''", "--teacher is ''", "not empty"),
    case(step, f"{TEACHER} --resume --student ''", "--student is ''", "not empty"),
    case(demo, f"{BOTH} --images ''", "--images is ''", "not empty"),
    case(gradcam, f"{GRADCAM} --layer ''", "--layer is ''", "not empty"),
    case(gradcam, f"{GRADCAM} --class ant", "unknown flag --class", "--class-name"),
    # config.py.
    case(trainer, "", "config.py: OLD_CLASSES is 2", "list of class names", OLD_CLASSES=2),
    case(trainer, "", "config.py: OLD_CLASSES is 0", "two classes at least", OLD_CLASSES=["0"]),
    case(trainer, "", "config.py: OLD_CLASSES is ['0', '1', '0']", "'0' is named twice", OLD_CLASSES=["0", "1", "0"]),
    case(trainer, "", "config.py: EPOCHS is 0", "only --weights need none", EPOCHS=0),
    case(trainer, "", "config.py: EPOCHS is '5'", "a whole number is needed", EPOCHS="5"),
    case(trainer, "", "config.py: EPOCH is not a setting", "did you mean EPOCHS?", EPOCH=5),
    case(trainer, "", "config.py: SEED is missing", SEED=...),
    case(trainer, "", "config.py: SEED is None", "a whole number is needed", SEED=None),
    case(trainer, "", "config.py: SEED is a value of type int", "at most", SEED=10**5000),
    case(trainer, "", "config.py: DATASET is None", "digits, cifar10, cifar100, folder", DATASET=None),
    case(trainer, "", "config.py: DATASET is 'cifar'", "did you mean cifar10?", DATASET="cifar"),
    case(trainer, "", "config.py: OUTPUT_DIR is None", "a text", OUTPUT_DIR=None),
    case(trainer, "", "config.py: OUTPUT_DIR is 'file'", "no folder", OUTPUT_DIR="file"),
    case(trainer, "", "config.py: FLIP is 'no'", "True or False", FLIP="no"),
    case(step, TEACHER, "config.py: NEW_CLASSES is []", "at least one class name", NEW_CLASSES=[]),
    case(step, TEACHER, "config.py: GAMMA is -1", "at least 0", GAMMA=-1),
    case(step, TEACHER, "config.py: BETTA is not a setting", "did you mean BETA?", BETTA=1),
    case(step, TEACHER, "config.py: NEW_CLASSES: new class '1'", "already knows", NEW_CLASSES=["1", "2"]),
    case(demo, BOTH, "config.py: DEVICE is 0", "auto, cpu, mps, cuda", DEVICE=0),
    case(demo, BOTH, "config.py: DEVICE is missing", DEVICE=...),
    case(gradcam, GRADCAM, "config.py: SEEDS is not a setting", "did you mean SEED?", SEEDS=1),
    # Loss form and method.
    case(trainer, "--method lwf --loss-form binary", "--loss-form is 'binary'", "lwf is softmax", "--method lwm"),
    case(trainer, "--method lwf", "config.py: LOSS_FORM is 'binary'", "lwf is softmax", LOSS_FORM="binary"),
    case(step, f"{TEACHER} --loss-form softmax", "--loss-form is 'softmax'", "lwf-mc is binary", METHOD="lwf-mc"),
    case(step, f"{TEACHER} --method finetune --loss-form softmax", "--loss-form", "finetune is softmax-all"),
    case(step, f"{TEACHER} --loss-form softmax --new-classes 2", "--new-classes", "one new class", "binary"),
    case(step, f"{TEACHER} --method lwf --new-classes 2", "--new-classes", "one new class", "--method lwm"),
    # Classes.
    case(trainer, "--old-classes 3", "--old-classes is 3", "two classes at least"),
    case(trainer, "--old-classes 0,0", "--old-classes is ['0', '0']", "'0' is named twice"),
    case(trainer, "--old-classes 0,ten", "digits has no class 'ten'", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
    case(trainer, "--old-classes 0,ten", "--old-classes"),
    case(trainer, f"{FOLDER} --old-classes ant,bees", "no class 'bees'", "did you mean 'bee'?"),
    case(step, f"{TEACHER} --new-classes 1,5", "--new-classes: new class '1'", "already knows"),
    case(step, f"{TEACHER} {FOLDER} --new-classes ants", "no class 'ants'", "did you mean 'ant'?"),
    # The checkpoints.
    case(step, "--teacher none.pth", "--teacher: none.pth: no such file"),
    case(step, "--teacher data", "--teacher: data: is a folder"),
    case(step, "--teacher text.pth", "--teacher: text.pth: ", "not a checkpoint"),
    case(step, f"--teacher {LONG}", "--teacher: ", "File name too long"),
    case(step, "--teacher unfinished.pth", "--teacher unfinished.pth", "not finished", "--resume"),
    case(step, f"{TEACHER} --old-classes 1,0", "--old-classes contradicts the teacher", "has 0,1", "not 1,0"),
    case(step, f"{TEACHER} --model resnet18", "--model contradicts the teacher", "has resnet32", "not resnet18"),
    case(step, f"{TEACHER} --image-size 32", "--image-size contradicts the teacher", "has 16", "not 32"),
    case(step, f"{TEACHER} --student student.pth", "--student", "needs --resume"),
    case(step, f"{TEACHER} --student none.pth --resume", "none.pth: no such file"),
    case(step, f"{TEACHER} --student text.pth --resume", "text.pth: ", "not a checkpoint"),
    case(step, f"{AGAIN} teacher.pth", "cannot resume"),
    case(step, f"{AGAIN} student.pth --new-classes 3,2", "cannot resume", "class_names was", "'2', '3'"),
    case(step, f"{AGAIN} student.pth --loss-form softmax", "cannot resume", "loss_form was binary and is now softmax"),
    case(demo, TEACHER, "--student"),
    case(demo, f"{TEACHER} --student none.pth", "--student: none.pth: no such file"),
    case(demo, "--teacher text.pth --student student.pth", "--teacher: text.pth: ", "not a checkpoint"),
    case(demo, f"{TEACHER} --student teacher.pth", "--student teacher.pth is no student of --teacher teacher.pth"),
    case(demo, "--teacher student.pth --student teacher.pth", "is no student of"),
    # Outputs.
    case(trainer, "--output-dir file", "--output-dir is 'file'", "no folder"),
    case(trainer, "--output-dir file/below/it", "--output-dir is 'file/below/it'", "file is no folder"),
    case(trainer, f"--output-dir {LONG}", "--output-dir is 'xxx", "File name too long"),
    case(trainer, "--output-dir full", "full/teacher_model.pth exists", "--overwrite", "--resume"),
    case(step, f"{TEACHER} --output-dir full", "full/student_model.pth exists", "--overwrite", "--resume"),
    case(step, f"{TEACHER} --output-dir full --student student.pth --resume", "full/student_model.pth exists"),
    case(step, "--teacher full/student_model.pth --new-classes 4 --output-dir full", "the --teacher itself"),
    case(step, f"{TEACHER} --output-dir picture.png", "--output-dir is 'picture.png'", "no folder"),
    case(demo, f"{BOTH} --output-dir file/x", "--output-dir is 'file/x'", "file is no folder"),
    case(gradcam, f"{GRADCAM} --output file/map.png", "--output is 'file'", "file is no folder"),
    case(gradcam, f"{GRADCAM} --output data", "--output: data is a folder", "PNG"),
    case(gradcam, f"{GRADCAM} --output {LONG}", "--output: ", "File name too long"),
    case(gradcam, f"{GRADCAM} --output ./student.pth", "the --checkpoint itself"),
    case(gradcam, f"{GRADCAM} --output picture.png", "the --image itself"),
    # Images.
    case(trainer, "--dataset folder --data-dir gone", "--data-dir: gone: no folder train"),
    case(trainer, "--dataset folder --data-dir bare", "--data-dir: bare: no folder train", "bare/train/<class>/"),
    case(trainer, "", "config.py: DATA_DIR: bare: no folder train", DATASET="folder", DATA_DIR="bare"),
    case(trainer, f"--dataset folder --data-dir {LONG}", "--data-dir: ", "File name too long"),
    case(trainer, f"{FOLDER} --old-classes ant,empty", "class 'empty'", "no images in data/train/empty"),
    case(trainer, f"{FOLDER} --old-classes ant,lone", "class 'lone'", "one image to train on"),
    case(trainer, "--dataset folder --data-dir untested --old-classes ant,lone", "class 'lone' has one image"),
    case(trainer, f"{FOLDER} --old-classes ant,cow", "class 'cow' but no test images"),
    case(trainer, f"{FOLDER} --old-classes ant,spoilt", "data/train/spoilt/001.png"),
    case(trainer, f"{FOLDER} --old-classes ant,text --skip-bad-images", "class 'text'"),
    case(step, f"{TEACHER} {FOLDER} --new-classes bee,cow", "class 'cow' but no test images"),
    case(step, f"{TEACHER} {FOLDER} --new-classes empty", "no images in data/train/empty"),
    case(step, f"{TEACHER} {FOLDER} --method lwf --new-classes bee,cow", "class 'cow' but no test images"),
    case(trainer, "--dataset cifar100 --data-dir bare", "--data-dir: cifar100", "no network", "cifar-100-python"),
    case(demo, f"{BOTH} --images gone", "--images gone: no such folder"),
    case(demo, f"{BOTH} --images bare", "--images bare: holds no images"),
    case(demo, f"{BOTH} --images file", "--images file: no such folder"),
    case(demo, f"{BOTH} --images strange", "--images strange", "no subfolder", "0, 1, 2, 3"),
    case(demo, f"{BOTH} --images flat", "flat/001.png", "not an image"),
    case(demo, f"{BOTH} --dataset folder --data-dir gone", "--data-dir: gone: no folder train"),
    case(demo, f"{TEACHER} --student homeless.pth", "no test images of any class", "--images", DATASET="folder"),
    case(gradcam, "--checkpoint student.pth --image none.png", "--image: none.png", "No such file"),
    case(gradcam, "--checkpoint student.pth --image text.png", "--image: text.png", "not an image"),
    case(gradcam, "--checkpoint student.pth --image data", "--image: data"),
    case(gradcam, "--checkpoint text.pth --image picture.png", "--checkpoint: text.pth: ", "not a checkpoint"),
    case(gradcam, f"{GRADCAM} --class-name 9", "--class-name 9", "0, 1, 2, 3"),
    case(gradcam, f"{GRADCAM} --layer layer9", "--layer layer9", "layer3"),
    # The device.
    case(trainer, "--device cuda", "--device: cuda", "0 CUDA devices"),
    case(step, f"{TEACHER} --device cuda:99", "--device: cuda:99", "0 CUDA devices"),
    case(demo, f"{BOTH} --device mps", "--device: mps", "none on this machine"),
    case(trainer, "", "config.py: DEVICE", DEVICE="cuda"),
    # The protocols.
    case(reproduce, "", "protocol"),
    case(reproduce, "digits", "protocol", "'digits'", "digits-2+2"),
    case(reproduce, "digits-2+2 --seed 1", "unknown flag --seed", "did you mean --seeds?"),
    case(reproduce, "digits-2+2 --seeds a,b", "--seeds is 'a'", "a whole number of at least 0"),
    case(reproduce, "digits-2+2 --seeds ''", "--seeds is ''", "a whole number of at least 0"),
    case(reproduce, "digits-2+2 --seeds=-1", "--seeds is '-1'", "a whole number of at least 0"),
    case(reproduce, "digits-2+2 --seeds 0,4294967296", "--seeds is '4294967296'", "at most 4294967295"),
    case(reproduce, "digits-2+2 --seeds 0,1,0", "--seeds: 0 is named twice"),
    case(reproduce, "digits-2+2 --jobs 0", "--jobs is '0'", "a whole number of at least 1"),
    case(reproduce, "digits-2+2 --jobs x", "--jobs is 'x'", "a whole number of at least 1"),
    case(reproduce, "digits-2+2 --methods ewc", "--methods", "has no 'ewc'", "lwf-mc"),
    case(reproduce, "digits-2+2 --methods ''", "--methods", "has no ''", "lwf-mc"),
    case(reproduce, "digits-2+2 --methods lwm,lwm", "--methods: 'lwm' is named twice"),
    case(reproduce, "digits-2+2 --work-dir file/x", "--work-dir is 'file/x'", "file is no folder"),
    case(reproduce, "digits-2+2 --table", "--table", "no row", "results/digits-2+2"),
    case(reproduce, "photos32-search", "--data-dir is None", "train/<class>/"),
    case(reproduce, "photos32-search --data-dir gone", "--data-dir is 'gone'", "train/<class>/"),
    case(reproduce, "photos32-search --data-dir bare", "--data-dir is 'bare'", "train/<class>/"),
    case(reproduce, "photos32-search --data-dir data", "--data-dir data: 7 classes", "needs 100"),
]


@pytest.mark.parametrize(("script", "flags", "words", "constants"), CASES)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    desk, capfd, monkeypatch, script, flags, words, constants
):
    for name, value in constants.items():
        if value is ...:
            monkeypatch.delattr(config, name)
        else:
            monkeypatch.setattr(config, name, value, raising=False)
    line = refused(desk, capfd, script, shlex.split(flags))
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("name", BAD_VALUES)
def test_every_bad_value_of_every_setting_is_refused_by_the_script_itself(desk, capfd, monkeypatch, name):
    script = reader_of(name)
    on_page, as_flags = BAD_VALUES[name]
    flag = "--" + name.replace("_", "-")
    for text in as_flags:
        assert f"{flag} is " in refused(desk, capfd, script, [*FILES[script], f"{flag}={text}"])
    for value in on_page:
        monkeypatch.setattr(config, name.upper(), value)
        assert f"config.py: {name.upper()} is " in refused(desk, capfd, script, FILES[script])


# The real command lines, most of which are refused before torch is loaded ---------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train_teacher_model", "--epoch 3", "did you mean --epochs?"),
        ("train_teacher_model", "--old-classes 3", "--old-classes is 3"),
        ("train_teacher_model", "--lr fast", "--lr is 'fast'"),
        ("train_teacher_model", "--output-dir file/x", "--output-dir is 'file/x'"),
        ("train_teacher_model", "--method lwf --loss-form binary", "lwf is softmax"),
        ("incremental_learning_system", "", "--teacher"),
        ("incremental_learning_system", f"{TEACHER} --new-classes 2,2", "'2' is named twice"),
        ("incremental_learning_system", f"{TEACHER} --gamma=-1", "--gamma is -1.0"),
        ("incremental_learning_system", f"{TEACHER} --output-dir file", "--output-dir is 'file'"),
        ("incremental_learning_system", f"{TEACHER} --output-dir full", "full/student_model.pth exists"),
        ("demo", TEACHER, "--student"),
        ("demo", f"{BOTH} --image picture.png", "did you mean --images?"),
        ("demo", f"{BOTH} --device gpu", "--device is 'gpu'"),
        ("demo", f"{BOTH} --output-dir file/x", "--output-dir is 'file/x'"),
        ("demo", f"{TEACHER} --student text.pth", "--student: text.pth: "),
        ("gradcam", "--image picture.png", "--checkpoint"),
        ("gradcam", f"{GRADCAM} --class ant", "did you mean --class-name?"),
        ("gradcam", f"{GRADCAM} --output data", "--output: data is a folder"),
        ("gradcam", f"{GRADCAM} --output file/map.png", "file is no folder"),
        ("gradcam", "--checkpoint student.pth --image text.png", "--image: text.png"),
        ("reproduce", "", "protocol"),
        ("reproduce", "digits-2+2 --seeds a,b", "--seeds is 'a'"),
        ("reproduce", "digits-2+2 --jobs 0", "--jobs is '0'"),
        ("reproduce", "digits-2+2 --methods ewc", "has no 'ewc'"),
        ("reproduce", "photos32-search --data-dir gone", "--data-dir is 'gone'"),
        ("reproduce", f"photos32-search --data-dir {LONG}", f"{LONG}/train: File name too long"),
        ("predict", f"--checkpoint student.onnx {LONG}", f"{LONG}: File name too long"),
        ("export", f"--checkpoint student.pth --output {LONG}", f"{LONG}: File name too long"),
    ],
)
def test_the_command_line_refuses_in_the_same_way(desk, script, flags, words):
    assert words in refused_by_command(desk, script, flags)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("EPOCHS = 3\nOLD_CLASSES = ['0', '1'\n", "config.py, line 2: '[' was never closed"),
        ("EPOCHS = 3\n  LR = 1\n", "config.py, line 2: unexpected indent"),
        ("EPOCHS = three\n", "config.py, line 1: NameError: name 'three' is not defined"),
        ("\nEPOCHS = 1 / 0\n", "config.py, line 2: ZeroDivisionError"),
        ("import nothing_of_this_name\n", "config.py, line 1: ModuleNotFoundError"),
        ("\n\nimport pathlib; pathlib.Path(3)\n", "config.py, line 3: TypeError"),  # raised in a line 493 elsewhere
        ("raise SystemExit(3)\n", "config.py, line 1: SystemExit: 3"),
        ("EPOCHS = '\0'\n", "config.py: source code string cannot contain null bytes"),
        ("EPOCHS = 3\n", "config.py: ATTENTION is missing"),
        (None, "config.py: ModuleNotFoundError"),
    ],
)
def test_a_page_that_python_cannot_read_is_said_with_its_line(tmp_path, source, words):
    for name in ("train_teacher_model.py", "settings.py", "kinds.py", "errors.py", "progress.py"):
        shutil.copy(ROOT / name, tmp_path)
    if source is not None:
        (tmp_path / "config.py").write_text(source)
    assert words in refused_by_command(tmp_path, "train_teacher_model")


def test_a_file_that_may_not_be_read_is_named_and_a_full_disk_is_no_bad_input(capsys):
    @one_line_errors
    def main(number):
        raise OSError(number, os.strerror(number), "locked/cat.png")

    assert main(errno.EACCES) == 2
    assert capsys.readouterr().err == "error: locked/cat.png: Permission denied; name another file or folder\n"
    with pytest.raises(OSError, match="No space left"):
        main(errno.ENOSPC)


def test_an_error_that_nobody_has_foreseen_says_what_to_report(capsys):
    @one_line_errors
    def main(argv=None):
        raise KeyError("lost")

    with pytest.raises(KeyError) as caught:
        main([])
    (note,) = caught.value.__notes__
    assert f"version {VERSION}, Python {platform.python_version()}, torch {torch.__version__}" in note
