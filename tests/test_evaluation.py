"""Accuracies, confusion and forgetting, by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, randomised, step_of
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix

from lwm import evaluation
from lwm.attention import autograd_map
from lwm.images.datasets import Images, to_input

# Two old classes (0, 1) and two new ones (2, 3); what each image's logits answer is beside it.
LOGITS = torch.tensor(
    [
        [5.0, 1.0, 0.0, 0.0],  # class 0: right
        [3.0, 1.0, 9.0, 0.0],  # class 0: answers 2; right once told "old"
        [0.0, 2.0, 1.0, 1.0],  # class 0: answers 1; wrong either way
        [0.0, 4.0, 1.0, 1.0],  # class 1: right
        [0.0, 0.0, 7.0, 1.0],  # class 2: right
        [8.0, 0.0, 1.0, 6.0],  # class 3: answers 0; right once told "new"
    ]
)
LABELS = torch.tensor([0, 0, 0, 1, 2, 3])


def test_accuracies_by_hand():
    assert evaluation.accuracies(LOGITS, LABELS, 2) == pytest.approx(
        {"accuracy": 50.0, "accuracy_old": 50.0, "accuracy_new": 50.0, "task_aware_old": 75.0, "task_aware_new": 100.0}
    )
    assert tuple(evaluation.accuracies(LOGITS, LABELS, 2)) == evaluation.ACCURACIES
    assert evaluation.class_accuracies(LOGITS, LABELS) == pytest.approx([100 / 3, 100, 100, 0])
    assert evaluation.group_accuracies(LOGITS, LABELS, [2, 2]) == pytest.approx([50, 50])
    assert evaluation.group_accuracies(LOGITS, LABELS, [1, 2, 1]) == pytest.approx([100 / 3, 100, 0])
    assert evaluation.confusion(LOGITS, LABELS).tolist() == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("kept", "none"),
    [
        ([], set(evaluation.ACCURACIES)),
        ([0, 3], {"accuracy_new", "task_aware_new"}),
        ([4, 5], {"accuracy_old", "task_aware_old"}),
        ([1, 5], set()),
    ],
)
def test_none_where_there_are_no_images(kept, none):
    result = evaluation.accuracies(LOGITS[kept], LABELS[kept], 2)
    assert {name for name, value in result.items() if value is None} == none


def test_none_for_classes_and_groups_without_images():
    kept = [0, 4]
    assert evaluation.class_accuracies(LOGITS[kept], LABELS[kept]) == [100.0, None, 100.0, None]
    assert evaluation.group_accuracies(LOGITS[kept], LABELS[kept], [1, 1, 2]) == [100.0, None, 100.0]
    nothing: list[int] = []
    assert evaluation.class_accuracies(LOGITS[nothing], LABELS[nothing]) == [None] * 4
    assert evaluation.confusion(LOGITS[nothing], LABELS[nothing]).tolist() == [[0] * 4] * 4


def test_told_the_step_the_best_of_its_classes_is_the_answer():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 6, generator=generator), torch.arange(60) % 6
    steps = [[0, 1, 2], [3], [4, 5]]
    right = 0
    for scores, label in zip(logits.tolist(), labels.tolist(), strict=True):
        (own,) = [step for step in steps if label in step]
        right += max(own, key=lambda c: scores[c]) == label
    assert evaluation.task_aware(logits, labels, [3, 1, 2]) == pytest.approx(100 * right / 60)
    assert evaluation.task_aware(logits[:0], labels[:0], [3, 1, 2]) is None


def test_drift_is_the_distance_of_l_ad_and_the_overlap_of_the_strongest_fifth():
    generator = torch.Generator().manual_seed(1)
    before, after = torch.rand(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    after[3] = before[3] * 7  # the same map, stronger
    after[4] = 0
    distance, overlap = evaluation.attention_drift(before, after)
    for index in range(4):
        one, other = (maps[index].numpy().ravel() for maps in (before, after))
        expected = np.abs(one / np.linalg.norm(one) - other / np.linalg.norm(other)).sum()
        assert distance[index].item() == pytest.approx(expected, abs=1e-12)
        strongest = [set(np.argsort(values)[-3:]) for values in (one, other)]  # of 12 pixels
        assert overlap[index].item() == pytest.approx(100 * len(strongest[0] & strongest[1]) / 3)
    assert (distance[3], overlap[3]) == (pytest.approx(0, abs=1e-12), 100)
    assert distance[4].isnan()
    assert overlap[4].isnan()


@pytest.mark.parametrize("batch_size", [2, 500])
def test_maps_are_those_of_the_images_classes_in_eval_mode(batch_size):
    model = randomised("resnet32", 4, 8).float()
    pixels = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    classes = torch.tensor([0, 3, 1, 1, 2])
    found = evaluation.maps(model.train(), pixels, classes, [0.5] * 3, [0.2] * 3, batch_size)
    inputs = to_input(pixels, [0.5] * 3, [0.2] * 3)
    expected = autograd_map(model.eval(), inputs, classes, model.last_layer)
    assert expected.amax() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_has_no_new_classes():
    result = evaluation.accuracies(LOGITS[:4, :2], LABELS[:4], 2)
    assert result["accuracy_new"] is None
    assert result["task_aware_new"] is None
    assert result["accuracy"] == result["accuracy_old"] == result["task_aware_old"] == 75.0


@given(old=st.integers(1, 5), new=st.integers(1, 5), count=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_against_scikit_learn(old, new, count, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, old + new, generator=generator)
    labels = torch.randint(0, old + new, (count,), generator=generator)
    truth, answers, classes = labels.numpy(), logits.numpy().argmax(1), list(range(old + new))
    result = evaluation.accuracies(logits, labels, old)
    is_old = truth < old

    def percent(mask, given_answers) -> float | None:
        return 100 * accuracy_score(truth[mask], given_answers) if mask.any() else None

    expected = {
        "accuracy": percent(truth >= 0, answers),
        "accuracy_old": percent(is_old, answers[is_old]),
        "accuracy_new": percent(~is_old, answers[~is_old]),
        "task_aware_old": percent(is_old, logits.numpy()[is_old, :old].argmax(1)),
        "task_aware_new": percent(~is_old, logits.numpy()[~is_old, old:].argmax(1) + old),
    }
    assert result == pytest.approx(expected)
    counts = confusion_matrix(truth, answers, labels=classes)
    np.testing.assert_array_equal(evaluation.confusion(logits, labels).numpy(), counts)
    for index, accuracy in enumerate(evaluation.class_accuracies(logits, labels)):
        row = counts[index]
        assert accuracy == (pytest.approx(100 * row[index] / row.sum()) if row.sum() else None)
    groups = evaluation.group_accuracies(logits, labels, [old, new])
    assert groups == pytest.approx([expected["accuracy_old"], expected["accuracy_new"]])


def test_forgetting_by_hand():
    """Three steps. Group 0 was at 90, then 70, now 60: 30 points. Group 1 was at 50 and is now at 65: -15, a gain."""
    assert evaluation.forgetting([[90.0], [70.0, 50.0]], [60.0, 65.0, 80.0]) == [30.0, -15.0, None]


def test_forgetting_takes_the_best_earlier_step_not_the_last():
    assert evaluation.forgetting([[40.0], [75.0, 1.0], [55.0, 2.0]], [50.0, 2.0, 3.0]) == [25.0, 0.0, None]


@pytest.mark.parametrize(
    ("earlier", "now", "expected"),
    [
        ([], [90.0], [None]),
        ([[None], [None, 50.0]], [60.0, 40.0], [None, 10.0]),
        ([[None], [80.0, 50.0]], [60.0, None], [20.0, None]),
    ],
)
def test_forgetting_without_images(earlier, now, expected):
    assert evaluation.forgetting(earlier, now) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 500])
def test_predict_normalises_and_judges_in_eval_mode_whatever_the_batch(batch_size):
    model = randomised("resnet32", 3, 16).float().train()
    pixels = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    logits = evaluation.predict(model, pixels, mean, std, batch_size)
    assert not model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    array = (pixels.numpy() / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    with torch.no_grad():
        expected = model(torch.from_numpy(array).float()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert not logits.requires_grad


def test_the_maps_compared_are_those_of_the_true_classes_of_teacher_and_student():
    networks = randomised("resnet32", 2, 8).float().eval(), randomised("resnet32", 4, 8, seed=1).float().eval()
    steps = [step_of("ab"), step_of("cd", group_accuracy=[50.0, 50.0])]
    before = checkpoint_of(networks[0], "resnet32", "ab", 8, steps=steps[:1])
    after = checkpoint_of(networks[1], "resnet32", "abcd", 8, steps=steps)
    pixels = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = Images(pixels, torch.arange(16) % 4)
    found = evaluation.compare(*networks, before, after, images)
    labels = images.labels[found.shown]
    assert labels.tolist() == [0, 1] * 4
    assert (found.teacher_logits[found.shown].argmax(1) != labels).any()
    inputs = to_input(pixels[found.shown], before["mean"], before["std"])
    for side, model in enumerate(networks):
        expected = autograd_map(model, inputs, labels, model.last_layer)
        torch.testing.assert_close(found.maps[:, side], expected, rtol=1e-4, atol=1e-6)
