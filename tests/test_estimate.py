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
    assert f"{kept:.0f} % of what the teacher gets right" in (tmp_path / "student_report.html").read_text()
    assert saved["tasks"][-1]["images"] > 100 and saved["tasks"][-1]["seconds"] > 0
    lwm = checkpoint.load(whole / "student_model.pth")["tasks"][-1]["answers"]
    assert lwm["kept"] is None and lwm["accuracy"] > 0
    assert "is not known without images" in (whole / "student_report.html").read_text()
