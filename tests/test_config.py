"""What each script reads of config.py and says in --help, and the page itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import page
from settingvalues import (
    CONSTANTS,
    DEMO,
    FILES,
    GOOD_FLAGS,
    GRADCAM,
    NONSENSE,
    STEP,
    TRAINER,
    read,
    short,
)

import config
from lwm.runtime.settings import SCRIPTS, read_settings

ROOT = Path(__file__).parent.parent


# Each script checks only what it reads ------------------------------------------------------------------------------


@pytest.mark.parametrize("nonsense", [NONSENSE, "x", -5, [], ["digits"], {}, float("nan")], ids=short)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ignores_the_constants_that_it_does_not_read(script, nonsense):
    reads = SCRIPTS[script][0].split()
    others = {name.upper(): nonsense for name in CONSTANTS if name not in reads}
    assert others
    settings = read(script, **others)
    assert all(getattr(settings, name) is not nonsense for name in reads)


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (TRAINER, "new_classes"),
        (TRAINER, "incremental_lr"),
        (TRAINER, "beta"),
        (STEP, "old_classes"),
        (STEP, "model"),
        (STEP, "image_size"),
        (STEP, "lr"),
        (DEMO, "epochs"),
        (DEMO, "old_classes"),
        (DEMO, "new_classes"),
        (DEMO, "model"),
        (DEMO, "method"),
        (GRADCAM, "dataset"),
        (GRADCAM, "output_dir"),
    ],
)
def test_what_a_script_does_not_read(script, name):
    assert name not in SCRIPTS[script][0].split()


FIXED_FLAGS = [
    "--dataset",
    "--data-dir",
    "--old-classes",
    "--new-classes",
    "--model",
    "--method",
    "--loss-form",
    "--epochs",
    "--batch-size",
    "--lr",
    "--incremental-lr",
    "--beta",
    "--gamma",
    "--temperature",
    "--batch-norm",
    "--save-interval",
    "--seed",
    "--device",
    "--output-dir",
    "--image-size",
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", FIXED_FLAGS)
def test_every_script_accepts_the_fixed_flags(script, flag):
    name = flag[2:].replace("-", "_")
    text, value = GOOD_FLAGS[name]
    settings = read(script, [flag, text])
    assert getattr(settings, name) == value
    assert name in settings.given


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_accepts_the_switches(script):
    settings = read(script, "--resume --overwrite")
    assert settings.resume is True
    assert settings.overwrite is True


def test_file_flags_are_handed_on():
    settings = read(STEP, "--student s.pth --resume")
    assert (settings.teacher, settings.student) == ("t.pth", "s.pth")
    assert read(DEMO, "--images mine").images == "mine"
    settings = read(GRADCAM, "--class-name cat --layer layer1 --output o.png")
    assert (settings.checkpoint, settings.image) == ("c.pth", "i.png")
    assert (settings.class_name, settings.layer, settings.output) == ("cat", "layer1", "o.png")
    assert read(GRADCAM).output == "gradcam.png"


# config.py ----------------------------------------------------------------------------------------------------------


def test_constants_and_fields_agree():
    assert sorted(name for name in vars(config) if name.isupper()) == sorted(name.upper() for name in CONSTANTS)
    for script, (reads, _, _) in SCRIPTS.items():
        assert set(reads.split()) <= set(CONSTANTS), script


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_as_it_stands_is_good(script):
    settings = read_settings(script, FILES[script])
    if script == TRAINER:
        assert settings.old_classes == tuple(config.OLD_CLASSES)
        assert settings.dataset == "digits"
        assert settings.method == "lwm"


def test_the_groups_of_cifar100():
    groups = [getattr(config, f"select_classes_{first}_{first + 10}") for first in range(0, 100, 10)]
    assert [len(group) for group in groups] == [10] * 10
    names = [name for group in groups for name in group]
    assert names == sorted(set(names))
    assert len(names) == 100
    assert config.select_classes_2_1 == ["apple", "aquarium_fish"] == names[:2]
    assert config.select_classes_2_2 == ["baby", "bear"] == names[2:4]
    assert {"maple_tree", "pickup_truck", "sweet_pepper", "lawn_mower"} <= set(names)
    assert names[-1] == "worm"


def test_every_constant_has_a_comment_of_its_own():
    source = (ROOT / "config.py").read_text().splitlines()
    assert [line for line in source if re.match(r"[A-Z_]+ = ", line) and "  # " not in line] == []


# --help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_defaults_and_imports_nothing_heavy(script):
    """Heavy modules are what would make --help slow; -X importtime lists every module that is imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / f"{script}.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"settings", "config", "argparse"} <= imported
    assert not imported & {"torch", "torchvision", "numpy", "cv2", "PIL", "sklearn", "matplotlib", "tqdm", "scipy"}
    shown = " ".join(done.stdout.split())
    for name in SCRIPTS[script][0].split():
        value = getattr(config, name.upper())
        default = "recommended for the data set" if value is None else value
        default = ",".join(value) if isinstance(value, list) else default
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"{flag}[ ,].*?\(default: {re.escape(str(default))}\)", shown), name
    for flag in FILES[script][::2]:
        assert flag in shown


def test_help_shows_changed_defaults_and_survives_percent_signs(capsys):
    with pytest.raises(SystemExit) as caught:
        read_settings(TRAINER, ["--help"], page(EPOCHS=77, OUTPUT_DIR="100%done", OLD_CLASSES=["x", "y"]))
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 77)" in shown
    assert "(default: 100%done)" in shown
    assert "(default: x,y)" in shown
