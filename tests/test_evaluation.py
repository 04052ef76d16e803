"""Accuracies, confusion and forgetting, against scikit-learn; predictions, maps and how far they moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import randomised
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix

from lwm import evaluation
from lwm.attention import autograd_map
from lwm.images.batches import Images


@given(old=st.integers(2, 5), new=st.integers(0, 5), count=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_against_scikit_learn(old, new, count, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, old + new, generator=generator)
    labels = torch.randint(0, old + new, (count,), generator=generator)
    truth, answers, scores, is_old = labels.numpy(), logits.numpy().argmax(1), logits.numpy(), labels.numpy() < old

    def percent(mask: np.ndarray, given_answers: np.ndarray) -> float | None:
        return 100 * accuracy_score(truth[mask], given_answers) if mask.any() else None

    expected = {
        "accuracy": percent(truth >= 0, answers),
        "accuracy_old": percent(is_old, answers[is_old]),
        "accuracy_new": percent(~is_old, answers[~is_old]),
        "told_old": percent(is_old, scores[is_old, :old].argmax(1)),
        "told_new": percent(~is_old, scores[~is_old, old:].argmax(1) + old) if new else None,
    }
    assert evaluation.accuracies(logits, labels, old) == pytest.approx(expected)
    counts = confusion_matrix(truth, answers, labels=list(range(old + new)))
    np.testing.assert_array_equal(evaluation.confusion(logits, labels).numpy(), counts)
    of_classes = [100 * row[index] / row.sum() if row.sum() else None for index, row in enumerate(counts)]
    assert evaluation.class_accuracies(logits, labels) == pytest.approx(of_classes)
    groups = evaluation.group_accuracies(logits, labels, [old, new])
    assert groups == pytest.approx([expected["accuracy_old"], expected["accuracy_new"]])


def test_without_images_there_is_no_accuracy():
    logits, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert list(evaluation.accuracies(logits, labels, 2).values()) == [None] * 5
    assert evaluation.class_accuracies(logits, labels) == [None] * 4
    assert evaluation.confusion(logits, labels).tolist() == [[0] * 4] * 4
    assert evaluation.task_aware(logits, labels, [2, 2]) is None


def test_told_the_task_the_best_of_its_classes_is_the_answer():
    logits, labels = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 6
    own = [max(task, key=lambda c: row[c]) for row in logits.tolist() for task in ([0, 1, 2], [3], [4, 5])]
    right = [answer in own[3 * index : 3 * index + 3] for index, answer in enumerate(labels.tolist())]
    assert evaluation.task_aware(logits, labels, [3, 1, 2]) == pytest.approx(100 * np.mean(right))


@pytest.mark.parametrize(
    ("earlier", "now", "expected"),
    [
        ([[90.0], [70.0, 50.0]], [60.0, 65.0, 80.0], [30.0, -15.0, None]),  # the second group has gained
        ([[40.0], [75.0, 1.0], [55.0, 2.0]], [50.0, 2.0, 3.0], [25.0, 0.0, None]),  # the best earlier one, not the last
        ([], [90.0], [None]),
        ([[None], [None, 50.0]], [60.0, 40.0], [None, 10.0]),
        ([[None], [80.0, 50.0]], [60.0, None], [20.0, None]),
    ],
)
def test_forgetting_by_hand(earlier, now, expected):
    assert evaluation.forgetting(earlier, now) == expected


def test_drift_is_the_distance_of_l_ad_and_the_overlap_of_the_strongest_fifth():
    before, after = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
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


def random_pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 500])
def test_predictions_and_maps_are_in_eval_mode_whatever_the_batch(batch_size):
    model, pixels, mean, std = randomised("resnet32", 4, 8).float(), random_pixels(7), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    logits = evaluation.predict(model.train(), pixels, mean, std, batch_size)
    inputs = (pixels.numpy() / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    inputs, classes = torch.from_numpy(inputs).float(), torch.arange(7) % 4
    maps = evaluation.maps(model.train(), pixels, classes, mean, std, batch_size)
    expected = autograd_map(model.eval(), inputs, classes, model.last_layer)
    assert expected.amax() > 0
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits, model(inputs).logits, rtol=1e-3, atol=1e-4)
    assert not logits.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    none = evaluation.Side("", model, {"mean": mean, "std": std}, logits[:0], batch_size)
    assert evaluation.explain([none], Images(pixels[:0], classes[:0])) == {}


def test_the_images_of_a_page_are_spread_over_classes_and_how_sure_the_model_is():
    labels, sure = torch.tensor([0] * 500 + [1] * 3 + [-1] * 10), torch.rand(513, generator=torch.manual_seed(0))
    chosen = evaluation.spread(labels, sure)
    assert sure[chosen].tolist() == sorted(sure[chosen].tolist())
    assert sorted(labels[chosen].tolist()) == [0] * 30 + [1] * 3
    first = sure[:500]
    own = sure[[index for index in chosen if index < 500]]
    assert (own[0], own[-1]) == (first.min(), first.max())
    assert abs(own.median() - first.median()) < 0.1
    assert len(evaluation.spread(torch.arange(513), sure)) == evaluation.SHOWN
