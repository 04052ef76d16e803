"""config.py and the command line: what is wrong is named, and a script checks only what it reads."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import conftest
import pytest
from conftest import page
from hypothesis import given
from hypothesis import strategies as st

import config
from errors import InputError
from settings import RECOMMENDED, SCRIPTS, Settings, read_settings

ROOT = Path(__file__).parent.parent
TRAINER, STEP, DEMO, GRADCAM = SCRIPTS
FILES = {
    TRAINER: [],
    STEP: ["--teacher", "t.pth"],
    DEMO: ["--teacher", "t.pth", "--student", "s.pth"],
    GRADCAM: ["--checkpoint", "c.pth", "--image", "i.png"],
}
CONSTANTS = [f.name for f in fields(Settings) if f.metadata]
NONSENSE = object()  # of no use to anything


def read(script: str = TRAINER, flags: str | list[str] = "", **constants) -> Settings:
    flags = flags.split() if isinstance(flags, str) else flags
    return read_settings(script, FILES[script] + flags, page(**constants))


def refused(script: str = TRAINER, flags: str | list[str] = "", **constants) -> str:
    return conftest.refused(read, script, flags, **constants)


# What is wrong is named ---------------------------------------------------------------------------------------------

BAD_VALUES = {  # constant: values that config.py could hold, and as texts of the command line
    "dataset": (["mnist", 3, ["digits"]], ["mnist", ""]),
    "data_dir": (["", 3, "a\0b"], [""]),
    "old_classes": ([2, "0", [0, 1], [], ["0", ""], ["0", "1", "0"], {"0": 1}], ["", "0,,1", "0,1,0", ",", "0, 0"]),
    "new_classes": ([2, "0", [0, 1], [], ["0", ""], ["0", "1", "0"]], ["", "0,,1", "0,1,0"]),
    "model": (["", 18, ["resnet18"]], [""]),
    "image_size": ([7, 32.0, "32", True, 1025, float("nan")], ["7", "32.0", "big", "1025", "-32", ""]),
    "mean": ([0.5, "0.5,0.5,0.5", [0.5, 0.5], [0.5, 0.5, True]], ["0.5", "0.5,0.5", "a,b,c", "nan,0,0"]),
    "std": ([1.0, [1, 1, 0], [1, 1, float("inf")]], ["1", "1,1,0", "1,1,-1"]),
    "method": (["LwM", 3, ["lwm"]], ["LwM", "ewc", ""]),
    "loss_form": (["sigmoid", 3], ["sigmoid"]),
    "beta": ([-0.1, "1", True, float("nan"), float("inf")], ["-0.1", "x", "nan", "inf"]),
    "gamma": ([-0.1, "1", True, float("nan"), 10**400], ["-0.1", "x", "nan", "1e400"]),
    "temperature": ([0, -1, "2"], ["0", "0.0", "-1", "warm"]),
    "attention": (["Grad-CAM", None], ["both"]),
    "attention_class": (["Student", 1], ["both"]),
    "batch_norm": (["eval", True], ["eval"]),
    "epochs": ([0, -1, 2.5, "5", True, [5]], ["-1", "2.5", "1e3", "five", ""]),
    "batch_size": ([1, 0, 64.0], ["1", "0", "64.0"]),
    "lr": ([0, -0.1, "0.1", float("inf"), False, 10**400], ["0", "-0.1", "fast", "inf"]),
    "incremental_lr": ([0, -0.1, "0.1", float("nan")], ["0", "-0.1", "slow"]),
    "backbone_lr": ([0, -0.1, "0.1"], ["0", "-0.1", "slow"]),
    "freeze": ([-1, 1.5, None, "2"], ["-1", "all"]),
    "balanced": (["yes", 1, None], []),
    "momentum": ([-0.1, 1, "0.9"], ["1", "-1", "1.0"]),
    "weight_decay": ([-1e-4, "0"], ["-1", "none"]),
    "flip": (["yes", 1, 0], []),
    "precision": (["fp16", 32], ["fp16", "float32"]),
    "cache_dir": (["", None, 3], [""]),
    "skip_bad_images": (["yes", 1], []),
    "hold_back": ([0.6, -0.1, "0.1"], ["0.6", "-0.1", "half"]),
    "seed": ([-1, 0.0, 2**32, "0", 10**400], ["-1", "0.5", str(2**32), "x", "1" + "0" * 400, "1" + "0" * 5000]),
    "device": (["gpu", "cpu:0", "cuda:", "cuda:x", 0], ["gpu", "cpu:0", "cuda:", "cuda:-1", ""]),
    "deterministic": (["yes", 1], []),
    "statistics": (["yes", 1], []),
    "readout": (["heads", 1, None], ["heads", ""]),
    "save_interval": ([0, 1.5], ["0", "1.5"]),
    "save_interval_steps": ([-1, 1.5, None], ["-1", "1.5"]),
    "resume": (["no", 0], []),
    "overwrite": (["no", 1], []),
    "quiet": (["yes", 1], []),
    "json": (["yes", 1], []),
    "tensorboard": (["yes", 1], []),
    "output_dir": (["", 5], [""]),
}


def reader_of(name: str) -> str:
    return next(script for script, (reads, _, _) in SCRIPTS.items() if name in reads.split())


def test_the_table_of_bad_values_has_every_setting():
    assert list(BAD_VALUES) == CONSTANTS


def short(value) -> str:
    return repr(value)[:20]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (values, _) in BAD_VALUES.items() for value in values], ids=short
)
def test_a_bad_constant_is_named(name, value):
    text = refused(reader_of(name), **{name.upper(): value})
    assert f"config.py: {name.upper()}" in text


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, values) in BAD_VALUES.items() for value in values], ids=short
)
def test_a_bad_flag_is_named(name, value):
    flag = "--" + name.replace("_", "-")
    for flags in ([f"{flag}={value}"], [flag, value]):
        assert flag in refused(reader_of(name), flags)
    # A flag is checked even by a script that does not read it: somebody typed it.
    assert flag in refused(GRADCAM, [f"{flag}={value}"])


@pytest.mark.parametrize("flag", ["--resume=yes", "--flip=1", "--no-overwrite=x"])
def test_a_switch_takes_no_value(flag):
    assert flag.split("=")[0].replace("--no-", "--") in refused(TRAINER, [flag])


@pytest.mark.parametrize(
    ("flags", "wrong", "hint"),
    [
        ("--epoch 3", "--epoch", "--epochs"),
        ("--epoch=3", "--epoch", "--epochs"),
        ("--old-clases a,b", "--old-clases", "--old-classes"),
        ("--old_classes a,b", "--old_classes", "--old-classes"),
        ("--no-resum", "--no-resum", "--no-resume"),
        ("--outputdir x", "--outputdir", "--output-dir"),
        ("--qqqq", "--qqqq", "--help"),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest(flags, wrong, hint):
    text = refused(TRAINER, flags)
    assert wrong in text
    assert hint in text


@pytest.mark.parametrize("script", [STEP, DEMO, GRADCAM])
def test_a_missing_file_flag_is_named(script):
    with pytest.raises(InputError, match=FILES[script][0]):
        read_settings(script, [], page())


def test_a_flag_without_its_value_is_named():
    assert "--epochs" in refused(TRAINER, "--epochs")


@pytest.mark.parametrize(
    ("name", "hint"), [("EPOCH", "EPOCHS"), ("LEARNING_RATE", ""), ("NEW_CLASS", "NEW_CLASSES"), ("BETTA", "BETA")]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_constant_is_named_with_the_nearest(script, name, hint):
    text = refused(script, **{name: 3})
    assert f"config.py: {name} " in text
    assert not hint or f"did you mean {hint}?" in text


def test_lower_case_names_on_the_page_are_the_users_own():
    assert read(select_classes_mine=["a"], my_number=3).epochs == RECOMMENDED["digits"]["epochs"]


@pytest.mark.parametrize("name", ["EPOCHS", "OLD_CLASSES", "RESUME"])
def test_a_constant_that_is_gone_is_named(name):
    assert f"config.py: {name} is missing" in refused(TRAINER, **{name: ...})


def test_a_count_in_place_of_class_names_is_corrected():
    text = refused(TRAINER, OLD_CLASSES=2)
    assert "config.py: OLD_CLASSES is 2" in text
    assert "list of class names" in text
    assert "['apple', 'baby']" in text


def test_duplicate_class_is_named():
    assert "'cat'" in refused(TRAINER, OLD_CLASSES=["dog", "cat", "cow", "cat"])


def test_a_wrong_choice_gets_the_choices_and_the_nearest():
    text = refused(TRAINER, "--method lwn")
    assert "finetune, frozen, lwf, lwf-mc, lwm" in text
    assert "did you mean lwm?" in text


@pytest.mark.parametrize("script", [TRAINER, STEP])
def test_no_epochs_are_for_weights_alone(script):
    assert "--epochs is 0" in refused(script, "--epochs 0")
    assert read(TRAINER, "--epochs 0 --weights model.pth").epochs == 0


def test_old_classes_come_from_a_file_a_line_each(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("tabby cat\n  dog \n\nÄrmelkanal, der\n", encoding="utf-8")
    assert read(TRAINER, ["--old-classes-file", str(path)]).old_classes == ("tabby cat", "dog", "Ärmelkanal, der")
    assert "leave one out" in refused(TRAINER, ["--old-classes-file", str(path), "--old-classes", "a,b"])
    path.write_text("cat\ncat\n")
    assert "'cat'" in refused(TRAINER, ["--old-classes-file", str(path)])
    path.write_bytes(b"\xff\xfe\0c")
    assert "UTF-8" in refused(TRAINER, ["--old-classes-file", str(path)])
    assert "No such file" in refused(TRAINER, ["--old-classes-file", str(tmp_path / "x")])


# The flag wins; None is the recommended value -----------------------------------------------------------------------

GOOD_FLAGS = {
    "dataset": ("folder", "folder"),
    "data_dir": ("some/where", "some/where"),
    "old_classes": ("apple, baby", ("apple", "baby")),
    "new_classes": ("cow", ("cow",)),
    "model": ("resnet110", "resnet110"),
    "image_size": ("48", 48),
    "mean": ("0.5, 0.4,.3", (0.5, 0.4, 0.3)),
    "std": ("1,1,0.25", (1.0, 1.0, 0.25)),
    "method": ("lwf", "lwf"),
    "loss_form": ("softmax", "softmax"),
    "beta": ("0", 0.0),
    "gamma": ("1e-3", 0.001),
    "temperature": ("4", 4.0),
    "attention": ("signed", "signed"),
    "attention_class": ("teacher", "teacher"),
    "batch_norm": ("frozen", "frozen"),
    "epochs": ("7", 7),
    "batch_size": ("2", 2),
    "lr": ("0.25", 0.25),
    "incremental_lr": (".5", 0.5),
    "backbone_lr": ("1e-3", 0.001),
    "freeze": ("2", 2),
    "momentum": ("0", 0.0),
    "weight_decay": ("0", 0.0),
    "precision": ("bf16", "bf16"),
    "cache_dir": ("some/cache", "some/cache"),
    "hold_back": ("0.2", 0.2),
    "seed": ("4294967295", 2**32 - 1),
    "device": ("cuda:1", "cuda:1"),
    "readout": ("discriminant", "discriminant"),
    "save_interval": ("3", 3),
    "save_interval_steps": ("500", 500),
    "output_dir": ("runs/x", "runs/x"),
}
SWITCHES = (
    "balanced",
    "flip",
    "skip_bad_images",
    "deterministic",
    "statistics",
    "resume",
    "overwrite",
    "quiet",
    "json",
    "tensorboard",
)


def test_the_table_of_good_flags_has_every_setting():
    assert sorted([*GOOD_FLAGS, *SWITCHES]) == sorted(CONSTANTS)


@pytest.mark.parametrize("name", GOOD_FLAGS)
def test_the_flag_wins_over_the_page_whatever_stands_there(name):
    text, value = GOOD_FLAGS[name]
    flag = "--" + name.replace("_", "-")
    script = reader_of(name)
    on_page = NONSENSE if name != "loss_form" else "binary"
    method = {"METHOD": "lwm"} if name != "method" else {}
    settings = read(script, [flag, text], **({name.upper(): on_page} | method))
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert settings.given == {name}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("on_page", [True, False])
def test_switches_go_both_ways(name, on_page):
    flag = name.replace("_", "-")
    assert getattr(read(TRAINER, [f"--{flag}"], **{name.upper(): on_page}), name) is True
    assert getattr(read(TRAINER, [f"--no-{flag}"], **{name.upper(): on_page}), name) is False
    assert getattr(read(TRAINER, **{name.upper(): on_page}), name) is on_page


def test_the_page_is_used_where_no_flag_is_given():
    settings = read(TRAINER, EPOCHS=3, LR=1, OLD_CLASSES=["b", "a"], OUTPUT_DIR="x")
    assert (settings.epochs, settings.lr, settings.old_classes, settings.output_dir) == (3, 1.0, ("b", "a"), "x")
    assert isinstance(settings.lr, float)
    assert settings.given == frozenset()


@given(
    st.lists(
        st.text(st.characters(exclude_characters=",\0", exclude_categories=["C", "Z"]), min_size=1),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_class_lists_keep_their_order_and_spelling(names):
    assert read(TRAINER, OLD_CLASSES=names).old_classes == tuple(names)
    assert read(TRAINER, ["--old-classes=" + ",".join(names)]).old_classes == tuple(names)


@pytest.mark.parametrize("dataset", RECOMMENDED)
def test_none_takes_the_recommended_value_and_says_so(dataset, capsys):
    settings = read(STEP, DATASET=dataset, BATCH_SIZE=None, FLIP=None)
    printed = capsys.readouterr().out.splitlines()
    named = {line.split(" = ")[0].lower() for line in printed}
    reads = set(SCRIPTS[STEP][0].split())
    for name, value in RECOMMENDED[dataset].items():
        if name in reads:
            assert getattr(settings, name) == value
            assert f"{name.upper()} = {value} (recommended for {dataset})" in printed
    assert named == set(RECOMMENDED[dataset]) & reads


def test_a_value_that_is_set_is_neither_replaced_nor_announced(capsys):
    settings = read(STEP, "--epochs 3", BETA=0.0, GAMMA=0)
    assert (settings.epochs, settings.beta, settings.gamma) == (3, 0.0, 0.0)
    printed = capsys.readouterr().out
    assert not re.search("^(EPOCHS|BETA|GAMMA) ", printed, re.MULTILINE)
    assert "INCREMENTAL_LR" in printed


def test_digits_are_never_flipped_by_default():
    assert RECOMMENDED["digits"]["flip"] is False
    assert read(TRAINER, DATASET="digits", FLIP=None).flip is False


@pytest.mark.parametrize("dataset", RECOMMENDED)
def test_recommended_values_pass_their_own_checks(dataset):
    checks = {f.name: f.metadata["check"] for f in fields(Settings) if f.metadata}
    assert all(checks[name](value) == value for name, value in RECOMMENDED[dataset].items())


@pytest.mark.parametrize("name", ["OLD_CLASSES", "SEED", "OUTPUT_DIR", "METHOD", "DATASET", "RESUME"])
def test_none_without_a_recommended_value_is_refused(name):
    assert f"config.py: {name} is None" in refused(TRAINER, **{name: None})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().epochs = 5


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


# The form of the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [TRAINER, STEP])
@pytest.mark.parametrize(("method", "form"), [("finetune", "softmax-all"), ("lwf", "softmax"), ("lwf-mc", "binary")])
def test_the_form_follows_the_method(script, method, form):
    assert read(script, f"--method {method}").loss_form == form
    assert read(script, METHOD=method, LOSS_FORM=None).loss_form == form
    assert read(script, f"--method {method} --loss-form {form}").loss_form == form


@pytest.mark.parametrize("method", ["frozen", "lwm"])
def test_a_teacher_is_binary_a_student_of_a_method_without_a_form_is_as_its_teacher(method):
    assert read(TRAINER, f"--method {method}").loss_form == "binary"
    assert read(TRAINER, f"--method {method} --weights model.pth").loss_form == "softmax"
    assert read(STEP, f"--method {method}").loss_form is None


@pytest.mark.parametrize("form", ["binary", "softmax", "softmax-all"])
def test_lwm_takes_any_form(form):
    assert read(STEP, f"--method lwm --loss-form {form}").loss_form == form
    assert read(STEP, METHOD="lwm", LOSS_FORM=form).loss_form == form


@pytest.mark.parametrize(
    ("method", "form"),
    [("finetune", "binary"), ("finetune", "softmax"), ("lwf", "binary"), ("lwf", "softmax-all"), ("lwf-mc", "softmax")],
)
def test_a_form_that_contradicts_the_method_is_refused(method, form):
    text = refused(STEP, f"--method {method} --loss-form {form}")
    assert "--loss-form" in text
    assert form in text
    assert method in text
    text = refused(STEP, METHOD=method, LOSS_FORM=form)
    assert "config.py: LOSS_FORM" in text
    assert method in text


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
