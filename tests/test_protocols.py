"""The protocols: their flags, classes and orders, and what is compared with what."""

import re
import shlex

import pytest
from conftest import FIVE

import config
import reproduce
from lwm.experiments import protocols
from lwm.experiments.protocols import PROTOCOLS, is_joint
from lwm.runtime.run_folder import STEP_SETTINGS
from lwm.runtime.settings import read_settings


def test_a_seed_shuffles_the_pool_or_starts_later_in_it():
    pool = [str(digit) for digit in range(10)]
    assert protocols.groups_of(FIVE, pool, 0) == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]
    orders = [protocols.groups_of(FIVE, pool, seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(sum(order, [])) == pool for order in orders)  # noqa: RUF017
    turned = protocols.groups_of(PROTOCOLS["digits-search"], pool[4:], 2)
    assert turned == [["8", "9"], ["4", "5"]]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_flags_of_a_protocol_are_flags_of_the_scripts(name):
    protocol = PROTOCOLS[name]
    common = [*protocol.flags.split(), "--dataset", protocol.dataset]
    for variant, text in (protocol.methods | protocol.ablation).items():
        flags = shlex.split(text)
        if is_joint(variant):
            read_settings("train_teacher_model", [*common, *flags])
            continue
        form = reproduce.form_of(flags)
        first = read_settings("train_teacher_model", [*common, "--loss-form", form])
        assert first.loss_form == form
        second = read_settings("incremental_learning_system", [*common, *flags, "--teacher", "x"])
        assert {"softmax-all": "softmax", None: form}.get(second.loss_form, second.loss_form) == form
        assert second.precision != "auto"
        if name != "folder":  # what stands in config.py decides nothing
            said = first.given | second.given | {"seed"} | {name.lower() for name in reproduce.OPEN}
            assert said >= {*STEP_SETTINGS, "model", "image_size", "lr", "incremental_lr", "epochs"}


def test_the_pool_is_as_large_as_the_steps_take_and_each_name_is_a_folder_of_its_own():
    for protocol in PROTOCOLS.values():
        if protocol.groups:
            assert sum(protocol.groups) <= protocol.pool.stop - protocol.pool.start
        names = [*protocol.methods, *protocol.ablation]
        folders = {name.replace(" ", "_") for name in names}
        assert len(folders) == len(names)
        assert not any("," in name or "/" in name for name in names)


def test_a_protocol_in_fp32_has_the_classes_and_the_flags_of_its_twin_but_for_the_precision():
    twins = [name.removesuffix("-fp32") for name in PROTOCOLS if name.endswith("-fp32")]
    assert {"photos32-search", "photos32-10x10"} < set(twins)
    for twin, own in ((PROTOCOLS[name], PROTOCOLS[f"{name}-fp32"]) for name in twins):
        assert (own.dataset, own.pool, own.groups, own.order) == (twin.dataset, twin.pool, twin.groups, twin.order)
        assert twin.flags.count("--precision bf16") == 1
        assert own.flags == twin.flags.replace("--precision bf16", "--precision fp32")


def test_settings_are_searched_on_other_classes_than_those_reported():
    for data in ("digits", "photos32"):
        searched = PROTOCOLS[f"{data}-search"]
        for name, reported in PROTOCOLS.items():
            if name.startswith(data) and "search" not in name:
                # The protocols on all classes contain those of the search.
                everything = 10 if data == "digits" else 100
                assert reported.pool.stop <= searched.pool.start or reported.pool == slice(0, everything)
                assert "--hold-back 0 " in reported.flags
        assert re.search(r"--hold-back 0\.[12]$", searched.flags)


def test_cifar_comes_in_the_order_of_the_field():
    names = protocols.class_order(PROTOCOLS["cifar100-10x10"], None)
    assert len(set(names)) == 100
    # iCaRL's shuffle of the class numbers with seed 1993 begins 68, 56, 78, 8, 23, 84, 90, 65, 74, 76.
    alphabet = sorted(names)
    assert [alphabet.index(name) for name in names[:10]] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]


def test_what_a_variant_is_compared_with_is_in_the_same_table():
    assert protocols.REFERENCES["softmax gamma=0.3"] == "softmax gamma=0"
    for protocol in PROTOCOLS.values():
        compared = {protocols.REFERENCES.get(name) for name in protocol.ablation} - {None}
        assert compared <= set(protocol.ablation)


def test_a_grid_names_what_it_varies():
    made = protocols.grid("lwf lwm", incremental_lr=[0.1], gamma=[0, 1])
    assert made["lwm incremental_lr=0.1 gamma=1"] == "--method lwm --incremental-lr 0.1 --gamma 1"
    assert len(made) == 4


def test_what_a_protocol_leaves_open_is_as_config_has_it():
    for name, value in reproduce.OPEN.items():
        assert getattr(config, name) == value
