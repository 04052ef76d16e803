"""The loop: what it trains, what it leaves alone, when it stops."""

import copy
import math
import types

import pytest
import torch
from conftest import picture

from lwm import losses, models, training
from lwm.attention import autograd_map
from lwm.images.datasets import Images
from lwm.runtime import hardware
from lwm.runtime.errors import InputError, RunError
from lwm.runtime.run_folder import Run
from lwm.runtime.settings import read_settings

CLASSES_OLD, CLASSES_NEW = 3, 2


def settings(**changes):
    values = {
        "method": "lwm",
        "loss_form": "binary",
        "beta": 1.0,
        "gamma": 0.5,
        "temperature": 2.0,
        "attention": "grad-cam",
        "attention_class": "student",
        "batch_norm": "train",
        "batch_size": 6,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "flip": True,
        "balanced": False,
        "backbone_lr": None,
        "precision": "fp32",
        "save_interval": 1,
        "save_interval_steps": 0,
        "seed": 0,
    }
    return types.SimpleNamespace(**(values | changes))


def images() -> Images:
    pixels = torch.stack([torch.from_numpy(picture(seed).copy()).permute(2, 0, 1) for seed in range(12)])
    return Images(pixels, CLASSES_OLD + torch.arange(12) % CLASSES_NEW)


@pytest.fixture
def pair():
    """A teacher that has seen some data, and its widened student."""
    torch.manual_seed(0)
    teacher = models.build("resnet32", CLASSES_OLD, 16)
    teacher.train()
    with torch.no_grad():
        for _ in range(50):  # until the running statistics are those of the data
            teacher(torch.randn(16, 3, 16, 16))
    teacher.eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    models.widen_head(student, CLASSES_NEW)
    return teacher, student


def fit(tmp_path, teacher, student, epochs=2, learning_rate=0.01, **changes):
    head = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "steps": [{}, {"epochs": epochs, "learning_rate": learning_rate, "group_accuracy": []}],
    }
    (tmp_path / "student_model.pth").unlink(missing_ok=True)
    run = Run("student", tmp_path, tmp_path / "student_model.pth", None)
    chosen = settings(**changes)
    loss = losses.METHODS[chosen.method]
    return training.fit(run, student, images(), loss, chosen, head, lambda model: ({}, [None]), teacher)


def changed(before: dict, after: dict, words: tuple[str, ...] = ("",)) -> bool:
    names = [name for name in before if any(word in name for word in words)]
    return any(not torch.equal(before[name], after[name]) for name in names)


def test_the_teacher_is_untouched_and_the_student_is_not(tmp_path, pair):
    teacher, student = pair
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    fit(tmp_path, teacher, student)
    assert not changed(before, teacher.state_dict())
    assert not teacher.training
    assert changed(start, student.state_dict(), ("conv",))


@pytest.mark.parametrize("method", ["lwm", "finetune"])
def test_frozen_batch_norm_keeps_the_running_statistics(tmp_path, pair, method):
    teacher, student = pair
    teacher = teacher if method == "lwm" else None
    trained = copy.deepcopy(student)
    start = copy.deepcopy(student.state_dict())
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    fit(tmp_path, teacher, student, method=method, batch_norm="frozen")
    fit(tmp_path, teacher, trained, method=method, batch_norm="train")
    assert not changed(start, student.state_dict(), statistics)
    assert changed(start, trained.state_dict(), statistics)
    assert changed(start, student.state_dict(), ("bn1.weight",))


def test_the_speed_counts_the_wait_for_the_device(tmp_path, pair, monkeypatch):
    """A device is given a step and works on: only the look at the loss terms waits until it is done."""
    now = [0.0]

    def waits(self, part, about):
        now[0] += 3.0

    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training._Loop, "_check_terms", waits)
    rows = fit(tmp_path, *pair)
    assert [row["images_per_second"] for row in rows] == [4.0, 4.0]  # 12 images in 3 s


def test_a_frozen_backbone_stays_bit_for_bit_and_the_new_rows_learn(tmp_path, pair):
    teacher, student = pair
    models.freeze_backbone(student)
    start = copy.deepcopy(student.state_dict())
    fit(tmp_path, teacher, student, method="frozen")
    after = student.state_dict()
    assert {name for name in start if not torch.equal(start[name], after[name])} == {"fc.weight", "fc.bias"}
    assert torch.equal(start["fc.weight"][:CLASSES_OLD], after["fc.weight"][:CLASSES_OLD])
    assert not torch.equal(start["fc.weight"][CLASSES_OLD:], after["fc.weight"][CLASSES_OLD:])


def test_nothing_in_a_step_waits_for_the_device(tmp_path, pair, monkeypatch):
    """What would wait for a GPU is refused inside the steps of two epochs."""
    waiting = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
    whole = training._Loop.step

    def watched(loop, part, index):
        with monkeypatch.context() as patch:
            for name in waiting:
                patch.setattr(torch.Tensor, name, lambda *arguments, name=name: pytest.fail(f"{name} in a step"))
            # The optimiser reads its own numbers, on the CPU.
            return whole(loop, part, index)

    monkeypatch.setattr(training._Loop, "step", watched)
    assert len(fit(tmp_path, *pair)) == 2


@pytest.mark.parametrize("weight", ["gamma", "beta"])
def test_the_weight_of_a_term_changes_the_student(tmp_path, pair, weight):
    teacher, student = pair
    other = copy.deepcopy(student)
    fit(tmp_path, teacher, student, **{weight: 0.0})
    fit(tmp_path, teacher, other, **{weight: 1.0})
    assert changed(student.state_dict(), other.state_dict(), ("conv",))


def test_a_step_has_the_gradient_of_the_general_maps_with_each_networks_own_head(pair):
    teacher, student = (model.double().eval() for model in pair)
    with torch.no_grad():  # as after some steps: the old rows are no longer the teacher's
        student.fc.weight += 0.3 * torch.randn_like(student.fc.weight)
    inputs = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    labels, chosen = CLASSES_OLD + torch.arange(8) % CLASSES_NEW, settings(gamma=3.0)
    optimizer = torch.optim.SGD(student.parameters(), 0.0)
    terms = training.optimisation_step(student, teacher, inputs, labels, losses.lwm, chosen, optimizer)
    found = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    output, known = student(inputs), teacher(inputs)
    classes = output.logits[:, :CLASSES_OLD].detach().argmax(1)
    ours = autograd_map(student, inputs, classes, student.last_layer, create_graph=True)
    theirs = autograd_map(teacher, inputs, classes, teacher.last_layer)
    attention, _ = losses.attention_distillation(ours, theirs.detach())
    (losses.lwf_mc(output, known, labels, (None, None), chosen)["total"] + 3.0 * attention).backward()
    assert terms["zero_maps"] < 1
    assert terms["attention"].item() == pytest.approx(attention.item(), rel=1e-9)
    for gradient, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-7, atol=1e-10)


def test_decay_and_rate_of_every_step_are_those_of_the_settings(tmp_path, pair):
    """Rows of the head that no image teaches shrink by 1 - rate * decay in each of the four steps."""
    teacher, student = pair
    models.freeze_backbone(student)
    before = student.fc.weight[:CLASSES_OLD].detach().clone()
    fit(tmp_path, teacher, student, learning_rate=0.1, method="frozen", momentum=0.0, weight_decay=0.5)
    shrunk = math.prod(1 - 0.5 * 0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4))
    torch.testing.assert_close(student.fc.weight[:CLASSES_OLD].detach(), shrunk * before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("flip", False), ("balanced", True), ("backbone_lr", 1e-4), ("precision", "bf16"), ("seed", 1), ("batch_size", 4)],
)
def test_a_setting_reaches_the_training(tmp_path, pair, name, value):
    teacher, student = pair
    other = copy.deepcopy(student)
    fit(tmp_path, teacher, student)
    fit(tmp_path, teacher, other, **{name: value})
    assert changed(student.state_dict(), other.state_dict(), ("conv",))


def test_the_log_has_each_term_and_they_add_up(tmp_path, pair):
    for row in fit(tmp_path, *pair, beta=0.7, gamma=0.3):
        total = row["classification"] + 0.7 * row["distillation"] + 0.3 * row["attention"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert 0 <= row["zero_maps"] <= 1
    written = (tmp_path / "student_log.csv").read_text().splitlines()
    assert len(written) == 3
    assert written[0].startswith("epoch,loss,accuracy,classification,distillation,attention,zero_maps,lr")


def test_the_rate_follows_a_cosine_over_all_steps(tmp_path, pair):
    log = fit(tmp_path, *pair, epochs=4, learning_rate=0.02)
    expected = [0.01 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [row["lr"] for row in log] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, pair):
    teacher, student = pair
    with torch.no_grad():
        student.fc.bias[CLASSES_OLD] = math.nan
    with pytest.raises(RunError, match=r"epoch 1/2, step 1 of 2: the loss term 'classification' is nan"):
        fit(tmp_path, teacher, student)
    assert list(tmp_path.iterdir()) == []


def test_bf16_leaves_the_network_as_fp32_and_differs_from_it(pair):
    _, student = pair
    inputs = torch.randn(2, 3, 16, 16)
    exact = training.forward(student.eval(), inputs, "fp32")
    short = training.forward(student, inputs, "bf16")
    assert short.logits.dtype == short.features.dtype == torch.float32
    assert not torch.equal(exact.features, short.features)
    # The head is not in bf16, nor is what it is given once it has left the last layer.
    assert torch.equal(short.logits, student.fc(short.features.mean((2, 3))))
    assert torch.equal(short.features, short.features.bfloat16().float())
    error = (exact.features - short.features).norm() / exact.features.norm()
    assert error < 0.05


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")]
)
def test_auto_is_bf16_where_the_hardware_has_it(monkeypatch, capsys, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    flags = ["--device", "cpu", "--precision", "auto"]
    chosen, device = hardware.prepare(read_settings("train_teacher_model", flags))
    assert chosen.precision == expected
    assert device == torch.device("cpu")
    assert f"PRECISION = {expected} (auto, on cpu)" in capsys.readouterr().out
    chosen, _ = hardware.prepare(read_settings("train_teacher_model", ["--device", "cpu"]))
    assert chosen.precision == "fp32"


@pytest.mark.parametrize("has", [True, False])
def test_bf16_on_a_processor_without_it_is_warned_of(monkeypatch, capsys, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has}, raising=False)
    chosen, _ = hardware.prepare(read_settings("train_teacher_model", ["--device", "cpu", "--precision", "bf16"]))
    assert chosen.precision == "bf16"
    assert ("--precision fp32" in capsys.readouterr().err) is not has


def test_images_stay_where_they_are_when_the_device_has_no_room_for_them(monkeypatch):
    pixels = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    assert hardware.has_room_for(pixels, torch.device("cpu"))
    for free, fits in ((2 * pixels.nbytes + 2, True), (2 * pixels.nbytes, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert hardware.has_room_for(pixels, torch.device("cuda")) is fits


def test_images_that_stay_behind_train_to_the_same_student(tmp_path, pair, monkeypatch):
    teacher, student = pair
    other = copy.deepcopy(student)
    fit(tmp_path, teacher, student)
    monkeypatch.setattr(training, "has_room_for", lambda pixels, device: False)
    fit(tmp_path, teacher, other)
    assert not changed(student.state_dict(), other.state_dict())


def test_a_device_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="0 CUDA devices"):
        hardware.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="2 CUDA devices"):
        hardware.pick_device("cuda:2")
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert hardware.pick_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert hardware.pick_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="mps"):
        hardware.pick_device("mps")
