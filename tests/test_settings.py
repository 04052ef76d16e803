"""Constants and flags: what is wrong is named, a flag wins, and None is the recommended value."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import fields

import pytest
from conftest import page
from hypothesis import given
from hypothesis import strategies as st
from settingvalues import (
    BAD_VALUES,
    CONSTANTS,
    DEMO,
    FILES,
    GOOD_FLAGS,
    GRADCAM,
    NONSENSE,
    STEP,
    TRAINER,
    read,
    reader_of,
    refused,
    short,
)

from lwm.runtime.errors import InputError
from lwm.runtime.settings import RECOMMENDED, SCRIPTS, Settings, read_settings

# What is wrong is named ---------------------------------------------------------------------------------------------


def test_the_table_of_bad_values_has_every_setting():
    assert list(BAD_VALUES) == CONSTANTS


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
        ([""], "''", "belongs to no flag"),
        ([" "], "''", "belongs to no flag"),
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
    path.write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")  # as Windows marks UTF-8
    assert read(TRAINER, ["--old-classes-file", str(path)]).old_classes == ("cat", "dog")
    path.write_text("n01440764\ttench\n")  # what no checkpoint may hold is said before the training
    assert r"'n01440764\ttench'" in refused(TRAINER, ["--old-classes-file", str(path)])


# The flag wins; None is the recommended value -----------------------------------------------------------------------

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
