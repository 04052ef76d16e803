"""The loop: what it trains, what it leaves alone, when it stops."""

from __future__ import annotations

import copy
import math
import types

import numpy as np
import pytest
import torch
from conftest import picture

from lwm import losses, models, training, verdict
from lwm.images.batches import Images
from lwm.runtime import hardware
from lwm.runtime.errors import RunError, start_log
from lwm.runtime.run_folder import RunFolder
from lwm.runtime.settings import read_settings

OLD, NEW = 3, 2


def settings(**changes):
    values = {"method": "lwm", "loss_form": "binary", "beta": 1.0, "gamma": 0.5, "temperature": 2.0}
    values |= {
        "batch_norm": "train",
        "batch_size": 6,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "flip": True,
        "warm_up": 0.0,
    }
    values |= {"balanced": False, "backbone_lr": None, "precision": "fp32", "seed": 0}
    values |= {"save_interval": 1, "save_interval_steps": 0, "statistics": False}
    return types.SimpleNamespace(**(values | changes))


def images() -> Images:
    pixels = torch.stack([torch.from_numpy(picture(seed).copy()).permute(2, 0, 1) for seed in range(12)])
    return Images(pixels, OLD + torch.arange(12) % NEW)


@pytest.fixture(scope="module")
def seen() -> models.Network:
    """A teacher that has seen some data."""
    torch.manual_seed(0)
    teacher = models.build("resnet32", OLD, 16)
    teacher.train()
    with torch.no_grad():
        for _ in range(50):  # until the running statistics are those of the data
            teacher(torch.randn(16, 3, 16, 16))
    return teacher.eval().requires_grad_(False)


@pytest.fixture
def pair(seen):
    """The teacher, and its widened student."""
    teacher, student = copy.deepcopy(seen), copy.deepcopy(seen).requires_grad_(True)
    torch.manual_seed(1)
    models.widen_head(student, NEW)
    return teacher, student


def fit(tmp_path, teacher, student, epochs=2, learning_rate=0.01, **changes):
    """The log of a training, and the student's state after it."""
    task = {"epochs": epochs, "learning_rate": learning_rate, "group_accuracy": []}
    checkpoint, chosen = {"mean": [0.5] * 3, "std": [0.25] * 3, "tasks": [{}, task]}, settings(**changes)
    folder, loss = (
        RunFolder("student", tmp_path, tmp_path / "student_model.pth", None),
        losses.METHODS[chosen.method].loss,
    )
    with training.Training(folder, checkpoint, student, images(), loss, chosen, teacher, OLD) as run:
        list(run.epochs())
    return run.log, student.state_dict()


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_teacher_is_untouched_and_a_run_is_reproducible(tmp_path, pair):
    teacher, student = pair
    before, start, twin = (
        copy.deepcopy(teacher.state_dict()),
        copy.deepcopy(student.state_dict()),
        copy.deepcopy(student),
    )
    _, after = fit(tmp_path, teacher, student)
    assert not changed(before, teacher.state_dict())
    assert not teacher.training
    assert changed(start, after) == set(start)
    assert not changed(after, fit(tmp_path, teacher, twin)[1])


def test_frozen_batch_norm_keeps_the_running_statistics(tmp_path, pair):
    start = copy.deepcopy(pair[1].state_dict())
    _, after = fit(tmp_path, *pair, batch_norm="frozen")
    kept = {name for name in start if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed(start, after) == set(start) - kept


def test_with_frozen_batch_norm_the_student_computes_as_its_teacher_does_without_dropout(tmp_path):
    torch.manual_seed(0)
    teacher = models.build("mobilenet_v2", OLD, 32).requires_grad_(False).eval()
    with torch.no_grad():
        teacher.fc.weight *= 100
    student = copy.deepcopy(teacher).requires_grad_(True)
    models.widen_head(student, NEW)
    assert any(isinstance(module, torch.nn.Dropout) for module in student.modules())
    one_step = {"epochs": 1, "batch_size": 12, "loss_form": "softmax", "learning_rate": 1e-6}
    for batch_norm, alike in (("frozen", True), ("train", False)):
        (row,), _ = fit(tmp_path, teacher, copy.deepcopy(student), batch_norm=batch_norm, **one_step)
        assert (row["distillation"] == pytest.approx(0, abs=1e-5)) is alike


def test_a_student_that_leaves_its_teacher_is_warned_of_once(tmp_path, pair, capsys):
    teacher, student = pair
    start_log()
    for rate, warnings in ((1e-6, 0), (0.03, 1)):
        own = copy.deepcopy(student)
        log, _ = fit(tmp_path, teacher, own, epochs=6, learning_rate=rate, beta=0.0, gamma=0.0, batch_norm="frozen")
        said = [line for line in capsys.readouterr().err.splitlines() if "leaves its teacher" in line]
        assert len(said) == warnings
        assert (min(row["agreement"] for row in log) < verdict.STAYS) is bool(warnings)


def test_of_a_frozen_backbone_the_head_alone_learns_at_the_rate_and_decay_of_the_settings(tmp_path, pair):
    """Rows of the head that no image teaches shrink by 1 - rate * decay in each of the eight steps of four epochs."""
    _, student = pair
    models.freeze_backbone(student)
    start, chosen = copy.deepcopy(student.state_dict()), {"momentum": 0.0, "weight_decay": 0.5}
    log, after = fit(tmp_path, None, student, epochs=4, learning_rate=0.1, method="frozen", **chosen)
    assert changed(start, after) == {"fc.weight", "fc.bias"}
    rates = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    shrunk = math.prod(1 - 0.5 * rate for rate in rates) * start["fc.weight"]
    torch.testing.assert_close(after["fc.weight"][:OLD], shrunk[:OLD])
    assert not torch.allclose(after["fc.weight"][OLD:], shrunk[OLD:])
    assert [row["lr"] for row in log] == pytest.approx(rates[::2])


def test_nothing_in_a_step_waits_for_the_device(tmp_path, pair, monkeypatch):
    """What would wait for a GPU is refused from the making of a batch to the record of its terms."""
    batches, inside = training.ResumableBatches, pytest.MonkeyPatch()
    begin, end = batches._batch, batches.record

    def watched(self, index):
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            # The optimiser reads its own numbers, on the CPU.
            inside.setattr(torch.Tensor, name, lambda *arguments, name=name: pytest.fail(f"{name} in a step"))
        return begin(self, index)

    def recorded(self, terms):
        end(self, terms)
        inside.undo()

    monkeypatch.setattr(batches, "_batch", watched)
    monkeypatch.setattr(batches, "record", recorded)
    try:
        assert len(fit(tmp_path, *pair)[0]) == 2
    finally:
        inside.undo()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("beta", 0.0), ("gamma", 0.0), ("flip", False), ("balanced", True), ("backbone_lr", 1e-4)],
        *[
            ("precision", "bf16"),
            ("seed", 1),
            ("batch_size", 4),
            ("momentum", 0.0),
            ("warm_up", 0.5),
            ("weight_decay", 0.1),
        ],
    ],
)
def test_a_setting_reaches_the_training(tmp_path, pair, name, value):
    teacher, student = pair
    other = copy.deepcopy(student)
    _, after = fit(tmp_path, teacher, student, epochs=1)
    assert "layer1.0.conv1.weight" in changed(after, fit(tmp_path, teacher, other, epochs=1, **{name: value})[1])


class Batches(list):
    """Batches for ``train_one_epoch``, and the terms that it gives for them."""

    def record(self, terms):
        self.terms = terms


def one_step(teacher, student, inputs, loss, chosen):
    """The terms of a step on ``inputs``, whose gradient stays with the student."""
    labels, optimizer = OLD + torch.arange(len(inputs)) % NEW, torch.optim.SGD(student.parameters(), 0.0)
    batches, schedule = Batches([(inputs, labels, 1.0)]), types.SimpleNamespace(step=lambda: None)
    training.train_one_epoch(student, teacher, batches, loss, OLD, chosen, optimizer, schedule, OLD + torch.arange(NEW))
    return labels, batches.terms


def test_a_step_has_the_gradient_of_the_loss_with_each_networks_own_head(pair):
    teacher, student = (model.double().eval() for model in pair)
    with torch.no_grad():  # as after some steps: the old rows are no longer the teacher's
        student.fc.weight += 0.3 * torch.randn_like(student.fc.weight)
    inputs, chosen = torch.randn(8, 3, 16, 16, dtype=torch.float64), settings(gamma=3.0)
    labels, terms = one_step(teacher, student, inputs, losses.lwm, chosen)
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    ours, theirs = student(inputs), teacher.requires_grad_(True)(inputs)
    # Without the heads the maps come from automatic differentiation.
    expected = losses.lwm(ours._replace(head=None), theirs._replace(head=None), labels, OLD, chosen)
    expected["total"].backward()
    expected["correct"] = 100 * (ours.logits[:, OLD:].argmax(1) == labels - OLD).double().mean()  # among the new
    expected["agreement"] = 100 * (ours.logits[:, :OLD].argmax(1) == theirs.logits.argmax(1)).double().mean()
    assert expected["zero_maps"] < 1
    assert {k: v.item() for k, v in terms.items()} == pytest.approx({k: v.item() for k, v in expected.items()})
    for gradient, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-7, atol=1e-10)


def test_bf16_differs_from_fp32_and_leaves_head_and_losses_in_it(pair):
    outputs = []

    def loss(student, teacher, labels, old, chosen):
        outputs.append(student)
        return {"total": student.logits.square().sum()}

    inputs, student = torch.randn(2, 3, 16, 16), pair[1].eval()
    for precision in ("fp32", "bf16"):
        one_step(None, student, inputs, loss, settings(precision=precision))
    exact, short = outputs
    assert short.logits.dtype == short.features.dtype == torch.float32
    assert torch.equal(short.logits, student.fc(short.features.mean((2, 3))))
    assert torch.equal(short.features, short.features.bfloat16().float())
    assert 0 < (exact.features - short.features).norm() < 0.05 * exact.features.norm()


def test_the_log_has_each_term_and_they_add_up(tmp_path, pair):
    log, _ = fit(tmp_path, *pair, beta=0.7, gamma=0.3)
    for row in log:
        total = row["classification"] + 0.7 * row["distillation"] + 0.3 * row["attention"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert 0 <= row["zero_maps"] <= 1
    columns, *rows = (tmp_path / "student_log.csv").read_text().splitlines()
    assert columns.startswith("epoch,loss,accuracy,classification,distillation,attention,zero_maps,agreement,lr")
    assert len(rows) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, pair):
    teacher, student = pair
    with torch.no_grad():
        student.fc.bias[OLD] = math.nan
    with pytest.raises(RunError, match=r"epoch 1/2, step 1 of 2: the loss term 'classification' is nan"):
        fit(tmp_path, teacher, student)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has", [True, False])
def test_auto_is_bf16_if_the_hardware_has_it_and_its_emulation_is_warned_of(monkeypatch, capsys, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has}, raising=False)
    start_log()
    for asked, precision in (("auto", "bf16" if has else "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        flags = ["--device", "cpu", "--precision", asked]
        assert hardware.prepare(read_settings("train_teacher_model", flags))[0].precision == precision
        assert ("warning: " in capsys.readouterr().err) is (asked == "bf16" and not has)


def test_images_for_which_the_device_has_no_room_stay_behind_and_train_to_the_same_student(tmp_path, pair, monkeypatch):
    pixels = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    assert hardware.has_room_for(pixels, torch.device("cpu"))
    for free, fits in ((2 * pixels.nbytes + 2, True), (2 * pixels.nbytes, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert hardware.has_room_for(pixels, torch.device("cuda")) is fits
    teacher, student = pair
    other = copy.deepcopy(student)
    _, after = fit(tmp_path, teacher, student)
    monkeypatch.setattr(training, "has_room_for", lambda pixels, device: False)
    assert not changed(after, fit(tmp_path, teacher, other)[1])


def test_the_rate_rises_in_a_line_and_falls_by_a_cosine():
    rates = [*map(training.WarmUpThenCosine(100, 0.1), range(101))]
    assert np.allclose(np.diff(rates[:11]), 1 / 11)
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    without = [*map(training.WarmUpThenCosine(100, 0.0), range(100))]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for own in without:
        assert own == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step(), schedule.step()


@pytest.mark.parametrize(
    ("accuracies", "classes", "failed"),
    [
        ([20, 46, 46, 46, 46], 5, "no more"),
        ([20, 30, 40, 50, 57], 5, "still rises"),
        ([20, 60, 70, 70, 70], 5, None),
        ([100.0], 1, None),
        ([50.0], 2, "no more"),
        ([1, 20, 30, 40, 52], 100, None),
    ],
)
def test_a_training_that_has_not_learned_is_said_to_have_failed(accuracies, classes, failed):
    said = verdict.what_failed([{"accuracy": value} for value in accuracies], classes)
    assert (said is None) if failed is None else failed in said
