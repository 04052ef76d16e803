"""The page config.py, and what each script says of it in --help."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from conftest import page
from test_settings import CHOICES, FILES, TRAINER

import config
from lwm.runtime.settings import CONSTANTS, SCRIPTS, cifar100_classes, read_constant, read_settings

PAGE = Path(__file__).parent.parent / "config.py"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_as_it_stands_is_good(script):
    settings = read_settings(script, FILES[script])
    for name in SCRIPTS[script][0].split():
        value = getattr(config, name.upper())
        assert value is None or getattr(settings, name) == (tuple(value) if isinstance(value, list) else value)
    assert read_constant("classifier") == "auto"


def test_constants_and_fields_agree_and_each_has_a_comment():
    assert sorted(name for name in vars(config) if name.isupper()) == sorted(name.upper() for name in CONSTANTS)
    assert all(set(reads.split()) <= CONSTANTS.keys() for reads, _, _ in SCRIPTS.values())
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"[A-Z_]+ = ", line)]
    assert [line for line in lines if "  # " not in line] == []


def test_the_groups_of_cifar100_have_its_classes_in_order_and_can_be_named_on_the_page(tmp_path):
    names = cifar100_classes()
    assert names == sorted(set(names))
    assert len(names) == 100
    assert config.select_classes_2_1 + config.select_classes_2_2 == names[:4]
    assert {"aquarium_fish", "maple_tree", "pickup_truck", "sweet_pepper", "lawn_mower", "worm"} <= set(names)
    edited = PAGE.read_text().replace('OLD_CLASSES = ["0", "1"]', "OLD_CLASSES = select_classes_0_10")
    (tmp_path / "config.py").write_text(edited)
    assert runpy.run_path(str(tmp_path / "config.py"))["OLD_CLASSES"] == names[:10]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_files_the_choices_and_the_defaults_of_the_page(script, capsys):
    changed = page(OUTPUT_DIR="100%done", OLD_CLASSES=["x", "y"], SEED=77)
    with pytest.raises(SystemExit) as caught:
        read_settings(script, ["--help"], changed, **CHOICES)
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in SCRIPTS[script][0].split():
        value = getattr(changed, name.upper())
        default = ",".join(value) if isinstance(value, list) else value
        default = "(none|recommended)" if value is None else re.escape(str(default))
        assert re.search(rf"--{name.replace('_', '-')}[ ,].*?\(default: {default}", shown), name
    assert all(flag in shown for flag in FILES[script][::2])
    assert "auto, head, lda" in shown or script == TRAINER
