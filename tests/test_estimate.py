"""What a student keeps of its old classes, estimated without an image."""

import json
import math

import pytest
import torch

import incremental_learning_system as incremental
from lwm import classifiers, estimate, models
from lwm.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")


def clouds(channels: int, counts: tuple[int, ...], seed: int = 0) -> classifiers.ClassStatistics:
    """Classes along the axes, ten times as far from the origin as their images are from the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = torch.randn(len(labels), channels, generator=generator, dtype=torch.float64)
    features[torch.arange(len(labels)), labels] += 10
    return classifiers.measure(features, labels, len(counts))


def along_axes(channels: int, *axes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.eye(channels, dtype=torch.float64)[list(axes)], torch.zeros(len(axes), dtype=torch.float64)


@pytest.mark.parametrize("channels", [6, models.WIDEST + 2])
def test_it_is_the_share_of_right_answers_that_new_outputs_do_not_take(channels):
    """The new output points to the second old class and is above it: half of the old answers are lost."""
    statistics = clouds(channels, (30, 30, 3000)).only([0, 1])
    before, after = along_axes(channels, 0, 1), along_axes(channels, 0, 1, 1)
    after[1][2] = 1.0
    assert estimate.kept(before, after, statistics) == pytest.approx(50, abs=1)
    after[1][2] = -20.0
    assert estimate.kept(before, after, statistics) == pytest.approx(100, abs=1)
    poor = along_axes(channels, 1, 1)  # a teacher that is right on half of them
    assert estimate.kept(poor, (torch.cat([poor[0], after[0][2:]]), after[1]), statistics) == 100


def test_a_covariance_that_classes_share_is_taken_as_it_is():
    """Of few images of the old classes and very many of a new one: all have the same spread, and errors show it."""
    channels = models.WIDEST + 2
    statistics = clouds(channels, (30, 30, 3000)).only([0, 1])
    before, after = along_axes(channels, 0, 1), along_axes(channels, 0, 1, 5)
    after[1][2] = 9.0  # N(10, 1) against 9 + N(0, 1)
    expected = 50 * math.erfc(-1 / 2)
    assert estimate.kept(before, after, statistics) == pytest.approx(expected, abs=5)


def test_as_many_old_images_are_taken_for_new_as_new_ones_for_old():
    """Two classes 2 deviations apart, one of them old: Phi(-1) of each are on the other's side."""
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.randn(20_000, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    old[:, 1] += 50  # another old class lies far away
    second = torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    new[:, 0] += 2
    labels = torch.arange(2).repeat_interleave(20_000)
    known = classifiers.measure(torch.cat([second, old]), labels, 2)
    share = 0.5 * math.erfc(1 / math.sqrt(2))
    lost = estimate.taken(known, new, torch.zeros(20_000, dtype=torch.int64))
    assert lost == pytest.approx(share / 2, rel=0.05)  # of the two old classes one loses
    weight, bias = classifiers.lda(known.with_images(classifiers.measure(new, labels[:20_000], 1), torch.tensor([2])))
    answers = (torch.cat([second, old]) @ weight.T + bias).argmax(1)
    assert lost == pytest.approx(float((answers == 2).double().mean()), rel=0.05)
    single = estimate.taken(known, new[:1], torch.zeros(1, dtype=torch.int64))
    assert single == 0


def test_a_run_says_it_and_the_checkpoint_keeps_it(whole, tmp_path, capsys):
    flags = ["--teacher", str(whole / "first" / "teacher_model.pth"), "--output-dir", str(tmp_path)]
    assert incremental.main([*flags, "--method", "closed-form", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    saved = checkpoint.load(tmp_path / "student_model.pth")
    answers = saved["tasks"][-1]["answers"]
    assert 0 < answers["kept"] == kept <= 100
    assert answers["accuracy"] == pytest.approx(saved["classifiers"][answers["classifier"]]["accuracy"])
    groups = saved["classifiers"][answers["classifier"]]
    assert answers["groups"] == pytest.approx([groups["accuracy_old"], groups["accuracy_new"]])
    assert estimate.said(kept) in (tmp_path / "student_report.html").read_text()
    assert saved["tasks"][-1]["images"] > 100
    trained = checkpoint.load(whole / "student_model.pth")["tasks"][-1]
    assert trained["answers"]["kept"] is None and trained["answers"]["accuracy"] > 0 and trained["seconds"] > 0
    assert estimate.said(None) in (whole / "student_report.html").read_text()
