"""Constants and flags: what is wrong is named, a flag wins, and None is the recommended value."""

from __future__ import annotations

import dataclasses
import logging

import conftest
import pytest
from conftest import page
from hypothesis import given
from hypothesis import strategies as st

from lwm.runtime import recommended
from lwm.runtime.errors import InputError
from lwm.runtime.recommended import OF_DATASET, RATES
from lwm.runtime.settings import CONSTANTS, OPTIONAL, SCRIPTS, Settings, read_settings

TRAINER, STEP, DEMO, GRADCAM = SCRIPTS
FILES = {
    TRAINER: [],
    STEP: ["--teacher", "t.pth"],
    DEMO: ["--teacher", "t.pth", "--student", "s.pth"],
    GRADCAM: ["--checkpoint", "c.pth", "--image", "i.png"],
}
CHOICES = {"method": ("lwf", "lwm"), "classifier": ("head", "lda")}
NONSENSE = object()  # of no use to anything
NAMES = [2, "0", [0, 1], [], ["0", ""], ["0", "1", "0"], {"0": 1}, ["a\x7f"], ["\udce9"]]
VALUES = {  # constant: bad values of config.py, bad flags, a good flag and what it means; a switch has no flag
    "dataset": (["mnist", 3, ["digits"], None], ["mnist", ""], "folder", "folder"),
    "data_dir": (["", 3, "a\0b"], ["", "a\udce9"], "some/where", "some/where"),
    "old_classes": (NAMES, ["", "0,,1", "0,1,0", "0, 0", "a\tb"], "apple, baby", ("apple", "baby")),
    "new_classes": (NAMES, ["", "0,,1", "0,1,0"], "cow", ("cow",)),
    "model": (["", 18, ["resnet18"]], [""], "resnet110", "resnet110"),
    "image_size": ([7, 32.0, "32", True, 1025, float("nan")], ["7", "32.0", "big", "-32", ""], "48", 48),
    "stem": (["", 3, ["cifar"]], [""], "fine", "fine"),
    "mean": ([0.5, [0.5, 0.5], [0.5, 0.5, True]], ["0.5", "0.5,0.5", "a,b,c", "nan,0,0"], "0.5,.4,.3", (0.5, 0.4, 0.3)),
    "std": ([1.0, [1, 1, 0], [1, 1, float("inf")]], ["1", "1,1,0", "1,1,-1"], "1,1,0.25", (1.0, 1.0, 0.25)),
    "method": (["LwM", 3, ["lwm"]], ["LwM", "ewc", ""], "lwf", "lwf"),
    "favour": (["all", 3, None], ["all", ""], "old", "old"),
    "new_rows": (["zero", 1], ["zero", ""], "closed-form", "closed-form"),
    "loss_form": (["sigmoid", 3, "softmax-all"], ["sigmoid"], "softmax", "softmax"),
    "beta": ([-0.1, "1", True, float("nan"), float("inf")], ["-0.1", "x", "nan", "inf"], "0", 0.0),
    "gamma": ([-0.1, 10**400], ["-0.1", "1e400"], "1e-3", 0.001),
    "temperature": ([0, "2"], ["0", "warm"], "4", 4.0),
    "batch_norm": (["eval", True], ["eval"], "frozen", "frozen"),
    "epochs": ([0, -1, 2.5, "5", True, [5]], ["0", "-1", "2.5", "1e3", "five", "10001", ""], "7", 7),
    "batch_size": ([1, 64.0], ["1", "9" * 20], "2", 2),
    "lr": ([0, "0.1", False], ["0", "fast", "inf"], "0.25", 0.25),
    "warm_up": ([-0.1, 0.95, "0"], ["-0.1", "short"], "0.2", 0.2),
    "incremental_lr": ([0, "0.1"], ["0", "slow"], ".5", 0.5),
    "backbone_lr": ([0, "0.1"], ["0", "slow"], "1e-3", 0.001),
    "freeze": ([-1, 1.5, None], ["-1", "all"], "2", 2),
    "balanced": (["yes", 1, None], [], "", True),
    "momentum": ([-0.1, 1], ["1", "-1"], "0", 0.0),
    "weight_decay": ([-1e-4, "0"], ["-1", "none"], "0", 0.0),
    "flip": (["yes", 1], [], "", True),
    "precision": (["fp16", 32], ["float32"], "bf16", "bf16"),
    "cache_dir": (["", None, 3], [""], "some/cache", "some/cache"),
    "skip_bad_images": (["yes", 1], [], "", True),
    "hold_back": ([0.6, "0.1"], ["-0.1", "half"], "0.2", 0.2),
    "calibration": ([0.6, "0.1"], ["-0.1", "half"], "0", 0.0),
    "seed": ([-1, 0.0, 2**32, 10**5000, None], ["-1", "0.5", str(2**32), "1" + "0" * 5000], "4294967295", 2**32 - 1),
    "device": (["cpu:0", "cuda:x", 0], ["gpu", "cuda:-1", "cuda:200", "cuda:07", "cuda:²", ""], "cuda:1", "cuda:1"),
    "deterministic": (["yes", 1], [], "", True),
    "statistics": (["yes", 1], [], "", True),
    "classifier": (["heads", 1, None], ["heads", ""], "lda", "lda"),
    "save_interval": ([0, 1.5], ["0", "1.5"], "3", 3),
    "save_interval_steps": ([-1, None], ["-1", "1.5"], "500", 500),
    "resume": (["no", 0, None], [], "", True),
    "overwrite": (["no", 1], [], "", True),
    "quiet": (["yes", 1], [], "", True),
    "json": (["yes", 1], [], "", True),
    "tensorboard": (["yes", 1], [], "", True),
    "output_dir": (["", 5, None], [""], "runs/x", "runs/x"),
}


@pytest.fixture(autouse=True)
def log_level():
    """--quiet lowers it for the rest of the process."""
    log = logging.getLogger("lwm")
    level = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(level)


def read(script: str = TRAINER, flags: str | list[str] = "", **constants) -> Settings:
    flags = flags.split() if isinstance(flags, str) else flags
    return read_settings(script, FILES[script] + flags, page(**constants), **CHOICES)


def refused(script: str = TRAINER, flags: str | list[str] = "", **constants) -> str:
    return conftest.refused(read, script, flags, **constants)


def reader_of(name: str) -> str:
    return next(script for script, (reads, _, _) in SCRIPTS.items() if name in reads.split())


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_the_table_of_values_has_every_constant():
    assert list(VALUES) == list(CONSTANTS)


@pytest.mark.parametrize("name", VALUES)
def test_every_bad_value_is_named_with_the_place_that_it_comes_from(name):
    on_page, as_flags, _, _ = VALUES[name]
    for value in on_page:
        assert f"config.py: {name.upper()} is " in refused(reader_of(name), **{name.upper(): value})
    for text in as_flags:
        assert f"{flag_of(name)} is " in refused(reader_of(name), [f"{flag_of(name)}={text}"])
        # A flag is checked even by a script that does not read it: somebody typed it.
        assert (name, text) == ("epochs", "0") or f"{flag_of(name)} is " in refused(GRADCAM, [flag_of(name), text])


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_good_flag_is_taken_by_every_script_and_wins_over_the_page(script, name):
    *_, text, value = VALUES[name]
    settings = read(script, [flag_of(name), *([text] if text else [])], **{name.upper(): NONSENSE})
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert settings.given == {name}
    if value is True:
        assert getattr(read(script, ["--no-" + flag_of(name)[2:]], **{name.upper(): NONSENSE}), name) is False


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ignores_the_constants_that_it_does_not_read(script):
    reads = SCRIPTS[script][0].split()
    for nonsense in (NONSENSE, "x", [], {}, float("nan")):
        settings = read(script, **{name.upper(): nonsense for name in CONSTANTS if name not in reads})
        assert all(getattr(settings, name) is not nonsense for name in reads)


@pytest.mark.parametrize(
    ("flags", "wrong", "hint"),
    [
        ("--epoch 3", "--epoch", "--epochs"),
        ("--old_classes a,b", "--old_classes", "--old-classes"),
        ("--no-resum", "--no-resum", "--no-resume"),
        ("--qqqq", "--qqqq", "--help"),
        ("--old-classes a, b", "'b'", "spaces"),
        ([""], "''", "flag"),
        ("--epochs", "--epochs", ""),
        ("--resume=yes", "--resume", ""),
        ("--method lwn", "lwf, lwm", "lwm?"),
    ],
)
def test_a_flag_that_is_wrong_is_named_with_the_nearest(flags, wrong, hint):
    text = refused(TRAINER, flags)
    assert wrong in text
    assert hint in text


def test_a_choice_that_is_open_takes_any_text_from_a_script_that_gives_none():
    assert read_settings(GRADCAM, [*FILES[GRADCAM], "--method", "ewc"], page()).method == "ewc"
    assert "--classifier" in conftest.refused(read_settings, GRADCAM, [*FILES[GRADCAM], "--classifier="], page())
    assert read(STEP, "--classifier auto").classifier == "auto"


@pytest.mark.parametrize("script", [STEP, DEMO, GRADCAM])
def test_a_missing_file_flag_is_named(script):
    with pytest.raises(InputError, match=FILES[script][0]):
        read_settings(script, [], page())


@pytest.mark.parametrize(("changes", "hint"), [({"EPOCH": 3}, "EPOCHS?"), ({"BETTA": 3}, "BETA?"), ({"SEED": ...}, "")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_constant_that_is_unknown_or_gone_is_named(script, changes, hint):
    text = refused(script, **changes)
    assert f"config.py: {next(iter(changes))} " in text
    assert hint in text


def test_no_epochs_are_for_weights_alone():
    assert read(TRAINER, "--epochs 0 --weights model.pth").epochs == 0
    assert read(DEMO, "--epochs 0").epochs == 0


def test_home_is_expanded_in_every_path_of_the_page_and_of_the_command_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = read(
        STEP, ["--teacher", "~/t.pth", "--data-dir=~/data", "--student", "~"], OUTPUT_DIR="~/runs", CACHE_DIR="~x~"
    )
    assert (settings.teacher, settings.data_dir, settings.student) == ("/home/me/t.pth", "/home/me/data", "/home/me")
    assert (settings.output_dir, settings.cache_dir) == ("/home/me/runs", "~x~")
    settings = read(GRADCAM, "--image ~/cat.png --output=~/x.png --class-name ~ --layer ~")
    assert (settings.image, settings.output) == ("/home/me/cat.png", "/home/me/x.png")
    assert (settings.class_name, settings.layer) == ("~", "~")


def test_flags_that_a_script_does_not_read_are_named_in_one_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lwm"), "propagate", True)
    read(GRADCAM, "--gamma 5 --classifier lda --no-balanced")
    (line,) = caplog.messages
    assert "gradcam.py" in line
    assert "--gamma" in line
    assert "--balanced" in line
    assert "--classifier" not in line
    caplog.clear()
    read(GRADCAM, "--classifier lda")
    assert caplog.messages == []


def test_old_classes_come_from_a_file_a_line_each(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbftabby cat\r\n  dog \n\n\xc3\x84rmel, der\n")  # Windows marks UTF-8 so
    assert read(TRAINER, ["--old-classes-file", str(path)]).old_classes == ("tabby cat", "dog", "Ärmel, der")
    assert "--old-classes-file" in refused(TRAINER, ["--old-classes-file", str(path), "--old-classes", "a,b"])
    for content, culprit in ((b"cat\ncat\n", "'cat'"), (b"\xff\xfe\0c", "UTF-8"), (b"a\tb\n", r"'a\tb'")):
        path.write_bytes(content)
        assert culprit in refused(TRAINER, ["--old-classes-file", str(path)])
    assert "none.txt" in refused(TRAINER, ["--old-classes-file", "none.txt"])


def test_the_page_is_used_where_no_flag_is_given():
    settings = read(TRAINER, EPOCHS=3, LR=1, OLD_CLASSES=["b", "a"], OUTPUT_DIR="x", select_classes_mine=["a"])
    assert (settings.epochs, settings.lr, settings.old_classes, settings.output_dir) == (3, 1.0, ("b", "a"), "x")
    assert isinstance(settings.lr, float)
    assert settings.given == frozenset()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.epochs = 5


CHARACTERS = st.characters(exclude_characters=",\0", exclude_categories=["C", "Z"])


@given(st.lists(st.text(CHARACTERS, min_size=1), min_size=1, max_size=6, unique=True))
def test_class_lists_keep_their_order_and_spelling(names):
    assert read(TRAINER, OLD_CLASSES=names).old_classes == tuple(names)
    assert read(TRAINER, ["--old-classes=" + ",".join(names)]).old_classes == tuple(names)


@pytest.mark.parametrize("dataset", OF_DATASET)
def test_none_takes_the_recommended_value_and_a_training_says_so(dataset, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lwm"), "propagate", True)
    settings = read(STEP, "--epochs 3 --batch-size 8 --incremental-lr 1", DATASET=dataset, GAMMA=0)
    assert caplog.messages == []
    recommended.by_images(settings, 100, "incremental_lr", False)
    said = {line.split(" = ")[0].lower() for line in caplog.messages}
    given = {"epochs", "gamma", "batch_size", *RATES}
    assert said - {"batch_norm"} == (set(OF_DATASET[dataset]) & set(SCRIPTS[STEP][0].split())) - given
    assert all(getattr(settings, name) == OF_DATASET[dataset][name] for name in said - {"batch_norm"})
    assert (settings.epochs, settings.gamma) == (3, 0.0)
    assert all(CONSTANTS[name]["check"](value) == value for name, value in OF_DATASET[dataset].items() if value)
    assert all(getattr(read(STEP), name) is None for name in OPTIONAL)
    caplog.clear()
    read(STEP, "--quiet", DATASET=dataset)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("method", "epochs", "dataset", "pretrained", "images", "expected"),
    [
        (None, None, "digits", False, 20, "lwm"),
        (None, None, "folder", False, recommended.FEW, "lwm"),
        (None, None, "folder", False, recommended.FEW - 1, "closed-form"),
        (None, None, "digits", True, 10**4, "closed-form"),
        (None, 3, "folder", True, 2, "lwm"),  # a training was asked for
        ("lwf", None, "folder", True, 2, "lwf"),
    ],
)
def test_the_recommended_method_follows_teacher_and_images(method, epochs, dataset, pretrained, images, expected):
    settings = read_settings("incremental_learning_system", ["--teacher", "x", "--dataset", dataset])
    settings = dataclasses.replace(settings, method=method, epochs=epochs)
    assert recommended.method(settings, pretrained, images).method == expected
