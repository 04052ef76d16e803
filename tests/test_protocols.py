"""The protocols: their flags, classes and orders, the controls of L_AD, and what is compared with what."""

import re
from types import SimpleNamespace

import pytest
import torch
from lwm.models import Output
from studies import FIVE

import config
import reproduce
from lwm import classifiers, losses
from lwm.experiments import cells, controls, protocols
from lwm.experiments.protocols import PROTOCOLS, is_joint
from lwm.runtime.errors import RunError
from lwm.runtime.run_folder import TASK_SETTINGS
from lwm.runtime.settings import read_settings

CHOICES = {"method": losses.METHODS | controls.METHODS, "classifier": classifiers.NAMES}


def test_a_seed_shuffles_the_pool_or_starts_later_in_it():
    pool = [str(digit) for digit in range(10)]
    assert protocols.groups_of(FIVE, pool, 0) == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]
    orders = [protocols.groups_of(FIVE, pool, seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(sum(order, [])) == pool for order in orders)  # noqa: RUF017
    assert protocols.groups_of(PROTOCOLS["digits-search"], pool[4:], 2) == [["8", "9"], ["4", "5"]]


# On a network that is taken, the recommended settings are what is judged.
@pytest.mark.parametrize("name", [name for name, protocol in PROTOCOLS.items() if not protocol.taken])
def test_the_flags_of_a_protocol_are_flags_of_the_scripts_and_leave_nothing_to_the_page(name):
    protocol = PROTOCOLS[name]
    common = [*protocol.flags.split(), "--dataset", protocol.dataset]
    for variant, flags in (protocol.methods | protocol.ablation).items():
        if is_joint(variant):
            read_settings("train_teacher_model", [*common, *flags.split()], **CHOICES)
            continue
        form = cells.first_form(flags)
        first = read_settings("train_teacher_model", [*common, "--loss-form", form], **CHOICES)
        second = read_settings("incremental_learning_system", [*common, *flags.split(), "--teacher", "x"], **CHOICES)
        own = CHOICES["method"][second.method].form or second.loss_form or "binary"
        assert first.loss_form == form == own.removesuffix("-all")
        if name != "folder":
            assert second.precision != "auto"
            said = first.given | second.given | {"seed"} | {name.lower() for name in reproduce.OPEN}
            assert said >= {*TASK_SETTINGS, "model", "image_size", "lr", "incremental_lr", "epochs"}


def test_the_pool_is_as_large_as_the_tasks_take_and_each_name_is_a_folder_of_its_own():
    for protocol in PROTOCOLS.values():
        if protocol.groups:
            assert sum(protocol.groups) <= protocol.pool.stop - protocol.pool.start
        names = [*protocol.methods, *protocol.ablation]
        assert len({name.replace(" ", "_") for name in names}) == len(names)
        assert not any("," in name or "/" in name for name in names)
        # What a variant is compared with is in the same table.
        assert {protocols.REFERENCES.get(name) for name in protocol.ablation} - {None} <= set(protocol.ablation)


def test_settings_are_searched_on_other_classes_than_those_reported():
    for data in ("digits", "photos32"):
        searched = PROTOCOLS[f"{data}-search"]
        for name, reported in PROTOCOLS.items():
            if name.startswith(data) and "search" not in name:
                # The protocols on all classes contain those of the search.
                everything = 10 if data == "digits" else 100
                assert reported.pool.stop <= searched.pool.start or reported.pool == slice(0, everything)
                assert reported.flags.endswith("--hold-back 0") or "--hold-back 0 " in reported.flags
        assert re.search(r"--hold-back 0\.[12]$", searched.flags)


def test_cifar_comes_in_the_order_of_the_field():
    names = protocols.class_order(PROTOCOLS["cifar100-10x10"], None)
    # iCaRL's shuffle of the class numbers with seed 1993 begins 68, 56, 78, 8, 23, 84, 90, 65, 74, 76.
    assert [sorted(names).index(name) for name in names[:10]] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]


def test_what_a_protocol_leaves_open_is_as_config_has_it():
    assert {name: getattr(config, name) for name in reproduce.OPEN} == reproduce.OPEN


def outputs(seed: int, classes: int) -> Output:
    torch.manual_seed(seed)
    features = torch.rand(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    head = torch.randn(classes, 3, dtype=torch.float64, requires_grad=True)
    return Output(features.mean((2, 3)) @ head.T, features, head, features.mean((2, 3)))


def test_each_control_has_what_lwm_has_but_for_what_it_changes():
    student, teacher, labels = outputs(0, 5), outputs(1, 3), torch.tensor([3, 4, 3, 4])
    settings = SimpleNamespace(loss_form="binary", beta=1.0, gamma=0.5, temperature=2.0)
    lwm = losses.lwm(student, teacher, labels, 3, settings)
    reached = {}
    for name, method in controls.METHODS.items():
        terms = method.loss(student, teacher, labels, 3, settings)
        assert terms["total"] == lwm["total"] + 0.5 * (terms["attention"] - lwm["attention"])
        gradients = torch.autograd.grad(terms["attention"], [student.features, student.head], allow_unused=True)
        reached[name] = tuple(gradient is not None for gradient in gradients)
        same = name in ("lwm-through-features", "lwm-through-head")
        assert bool(terms["attention"] == lwm["attention"]) is same, name
    alone = dict.fromkeys(["lwm-through-features", "lwm-features"], (True, False)) | {"lwm-through-head": (False, True)}
    assert reached == dict.fromkeys(controls.METHODS, (True, True)) | alone
    assert {flags.split()[1] for flags in protocols.CONTROLS.values()} == set(controls.METHODS)


def test_a_control_is_run_by_the_script_itself(tmp_path):
    flags = ["--method", "lwm-signed", "--teacher", str(tmp_path / "nothing.pth"), "--output-dir", str(tmp_path)]
    with pytest.raises(RunError, match=r"nothing\.pth: no such file"):
        cells.call("incremental_learning_system.py", flags, 1)
    with pytest.raises(RunError, match="lwm-signed"):  # without the module there is no such method
        cells.call("incremental_learning_system.py", ["--method=lwm-signed", *flags[2:]], 1)
