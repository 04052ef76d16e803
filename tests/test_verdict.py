"""What a page says first: intervals that hold what they promise, and the classes that come first."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lwm import verdict


@pytest.mark.parametrize(("right", "images"), [(0, 10), (7, 10), (10, 10), (61, 130), (1, 1)])
def test_wilsons_interval_is_where_the_score_test_changes_its_mind(right, images):
    for end in verdict.interval(100 * right / images, images):
        if 1e-9 < end < 100 - 1e-9:
            p = end / 100
            assert abs(right / images - p) / math.sqrt(p * (1 - p) / images) == pytest.approx(1.96, abs=1e-3)
    low, high = verdict.interval(100 * right / images, images)
    assert 0 <= low <= 100 * right / images <= high <= 100
    assert high - low > 5


@pytest.mark.parametrize("images", [20, 130])
def test_the_interval_of_what_is_lost_holds_the_truth_in_95_of_100_samples(images):
    """Teacher and student on the same images: 15 % are lost and 5 % gained."""
    generator = np.random.default_rng(0)
    held = []
    for once, now, _ in generator.multinomial(images, [0.15, 0.05, 0.8], 2000):
        found = verdict.lost(int(once), int(now), images)
        assert found["points"] == pytest.approx(100 * (once - now) / images)
        held.append(found["low"] <= 10 <= found["high"])
    assert 0.93 < np.mean(held) < 0.99


def metrics(**changes) -> dict:
    return {
        "student": {"accuracy": 57.0},
        "lost": {"points": 12.2, "low": 4.1, "high": 19.8, "images": 130},
        "classes": {"names": ["cat", "dog", "llama"], "teacher": [80.0, 90.0]},
        "confusion": [[40, 3, 20], [2, 50, 15], [0, 9, 30]],
    } | changes


def test_the_verdict_has_what_was_lost_to_what_and_what_is_had_without_training():
    said = verdict.of_student(metrics(), {verdict.UNTRAINED: {"accuracy": 65.4}})
    for part in ("lost 12 points", "4 to 20", "130 images", "llama (35 of 40)", "57 %", "65 %"):
        assert part in said
    gained = verdict.of_student(metrics(lost={"points": -3.0, "low": -8.0, "high": 2.0, "images": 9}), {})
    for part in ("gained 3 points", "-2 to 8", "chance"):
        assert part in gained
    assert "without training" not in gained
    assert "lost" not in verdict.of_student(metrics(lost=None), {})
    first = verdict.of_teacher(80.0, [[8, 2], [2, 8]], ["cat", "dog"])
    low, high = verdict.interval(80, 20)
    for part in ("80 %", f"{low:.0f} to {high:.0f}", "20 images", "(2 of 4)"):
        assert part in first


def test_first_come_those_that_lost_most_and_then_the_worst():
    teacher, student = [90.0] * 40, [90.0 - label for label in range(40)] + [5.0, 95.0, None]
    assert verdict.notable(teacher, student) == [*range(39, 29, -1), 40, *range(29, 20, -1)]
    assert verdict.notable([], [30.0, None, 10.0]) == [2, 0]


@pytest.mark.parametrize(
    ("agreements", "leaves"),
    [([90, 51], False), ([90, 49], True), ([49], True), ([49, 40], False), ([40, 60, 40], False), ([None], False)],
)
def test_a_student_has_left_its_teacher_in_the_first_epoch_in_which_they_agree_on_less_than_half(agreements, leaves):
    log = [{} if value is None else {"agreement": value} for value in agreements]
    assert bool(verdict.has_left(log)) is leaves
