"""The field's read-outs: each against another route to the same answer, and the script on a small run."""

import argparse
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_FORMS, run_tiny
from scipy.spatial.distance import mahalanobis
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from torch.nn import functional as F

from lwm import classifiers
from lwm.experiments import compare_classifiers
from lwm.experiments.compare_classifiers import Step
from lwm.experiments.protocols import PROTOCOLS
from lwm.experiments.tables import read_rows, write_rows
from lwm.images import datasets
from lwm.runtime import checkpoint

WIDTH, COUNT = 5, 60


def drawn(classes: list[int], seed: int = 0, count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, C) of Gaussian classes, each the same for every call of its number but for the noise."""
    parts = []
    for label in classes:
        means = torch.Generator().manual_seed(label)
        noise = torch.Generator().manual_seed(1000 * seed + label)
        mean = 3 * torch.randn(WIDTH, generator=means, dtype=torch.float64)
        root = torch.randn(WIDTH, WIDTH, generator=means, dtype=torch.float64)
        parts.append(mean + torch.randn(count, WIDTH, generator=noise, dtype=torch.float64) @ root.T)
    return torch.cat(parts), torch.tensor(classes).repeat_interleave(count)


def step_after(steps, before, after, labels, test, test_labels) -> Step:
    """Without a head; the network of the first step is nowhere to be seen."""
    known = classifiers.carried(steps[-1].known if steps else None, before, after, labels)
    nothing = torch.full_like(after, torch.nan), torch.full_like(test, torch.nan)
    return Step(before, after, nothing[0], labels, test, nothing[1], test_labels, torch.zeros(0), known)


def two_steps(shift=lambda features: features) -> list[Step]:
    """Classes 0 and 1, then 2, 3 and 4 with half as many images; in between the network moves by ``shift``."""
    steps: list[Step] = []
    for new, move in (([0, 1], lambda features: features), ([2, 3, 4], shift)):
        features, labels = drawn(new, count=COUNT // (1 + len(steps)))
        test, test_labels = drawn(list(range(new[-1] + 1)), seed=1)
        steps.append(step_after(steps, features, move(features), labels, move(test), test_labels))
    return steps


def linear(features: torch.Tensor) -> torch.Tensor:
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return features @ matrix


def all_real(steps: list[Step], shift) -> tuple[torch.Tensor, torch.Tensor]:
    """The training features of all classes as they are after the last step."""
    old, labels = drawn([0, 1])
    return torch.cat([shift(old), steps[-1].after]), torch.cat([labels, steps[-1].labels])


def test_sdc_undoes_a_drift_that_is_the_same_for_all_and_weighs_the_near_ones_otherwise():
    steps = two_steps()
    unit = F.normalize(steps[1].after, dim=1)
    # A shift of unit vectors cannot be the same for all; one that depends on a feature shows the weights.
    moved = steps[1]._replace(after=steps[1].after + steps[1].before[:, :1].abs())
    scores = list(compare_classifiers.sdc([steps[0], moved], 0.3))
    means = torch.stack([F.normalize(steps[0].after[steps[0].labels == c], dim=1).mean(0) for c in (0, 1)])
    for label, mean in enumerate(means):
        weights = torch.tensor([float(torch.exp(-(mean - each).square().sum() / (2 * 0.3**2))) for each in unit])
        weights = weights.double() / weights.double().sum()
        drift = sum(w * d for w, d in zip(weights, F.normalize(moved.after, dim=1) - unit, strict=True))
        expected = (F.normalize(moved.test, dim=1) - mean - drift).norm(dim=1)
        assert torch.allclose(-scores[1][:, label], expected, atol=1e-5)
    own = F.normalize(moved.after[moved.labels == 3], dim=1).mean(0)
    assert torch.allclose(-scores[1][:, 3], (F.normalize(moved.test, dim=1) - own).norm(dim=1))
    assert scores[0].shape == (2 * COUNT, 2)
    assert scores[1].shape == (5 * COUNT, 5)


def test_sdc_with_a_narrow_gaussian_takes_the_nearest_image_and_does_not_divide_by_zero():
    steps = two_steps(linear)
    scores = list(compare_classifiers.sdc(steps, 1e-4))[1]
    assert scores.isfinite().all()


def test_fetril_sees_real_features_where_old_classes_are_new_ones_moved():
    old, labels = drawn([0, 1])
    offset = torch.full((WIDTH,), 0.5, dtype=torch.float64)
    new = old + offset  # so that moved back by the difference of the means they are the old ones
    both = torch.cat([old, new]), torch.cat([labels, labels + 2])
    # In the network of the first step; what the others see is something else.
    steps = [step_after([], linear(old), linear(old), labels, linear(old), labels)._replace(first=old, first_test=old)]
    more = step_after(steps, linear(new), linear(new), labels + 2, linear(both[0]), both[1])
    steps.append(more._replace(first=new, first_test=both[0]))
    scores = list(compare_classifiers.fetril(steps, 1.0))
    order = [2, 3, 0, 1]  # the order of the training set, which a convex problem does not depend on
    features = torch.cat([both[0][both[1] == c] for c in order])
    svm = LinearSVC(C=1.0, dual=False).fit(
        F.normalize(features, dim=1), torch.cat([both[1][both[1] == c] for c in order])
    )
    expected = svm.decision_function(F.normalize(both[0], dim=1))
    assert torch.allclose(scores[1], torch.from_numpy(expected), atol=1e-2)
    assert scores[0].shape == (2 * COUNT, 2)
    two = LinearSVC(C=1.0, dual=False).fit(F.normalize(old, dim=1), labels).predict(F.normalize(old, dim=1))
    assert (scores[0].argmax(1).numpy() == two).all()


def test_dpcr_is_ridge_regression_on_all_images_where_the_drift_is_linear():
    steps = two_steps(linear)
    scores = list(compare_classifiers.dpcr(steps, 0.01))[1]
    features, labels = all_real(steps, linear)
    gram = features.T @ features
    ridge = Ridge(alpha=0.01 * float(gram.diagonal().mean()), fit_intercept=False)
    weight = torch.from_numpy(ridge.fit(features, F.one_hot(labels).double()).coef_)
    expected = steps[1].test @ F.normalize(weight, dim=1).T
    assert torch.allclose(scores, expected, atol=1e-3)
    assert not torch.allclose(scores, list(compare_classifiers.dpcr(two_steps(), 0.01))[1], atol=0.1)


def test_mahalanobis_is_the_distance_among_features_of_unit_length_in_correlations():
    steps = two_steps(linear)
    known = steps[1].known
    scores = list(compare_classifiers.mahalanobis(steps, 3.0))[1]
    for label in range(5):
        covariance = known.covariances[known.of[label]].numpy()
        covariance = covariance + 3 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
        inverse = np.linalg.inv(covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal())))
        mean = (known.means[label] / known.means[label].norm()).numpy()
        for row, feature in enumerate(steps[1].test[:10]):
            distance = mahalanobis((feature / feature.norm()).numpy(), mean, inverse)
            assert float(scores[row, label]) == pytest.approx(-(distance**2))


CELLS = compare_classifiers.CELLS["photos32-search"]


def test_on_unit_length_the_discriminant_is_a_linear_layer_of_features_of_any_length():
    """Where all features lie on a cone a'u is 1, and the layer is length times the discriminant of u, bias and all."""

    def on_a_cone(classes: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        features, labels = drawn(classes, seed)
        around = 0.6 * F.normalize(features[:, 1:], dim=1)
        lengths = 0.5 + torch.rand(len(around), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return lengths * torch.cat([torch.full_like(around[:, :1], 0.8), around], dim=1), labels

    steps: list[Step] = []
    for new, longer in (([0, 1], 1.0), ([2, 3, 4], 3.0)):
        (features, labels), (test, test_labels) = on_a_cone(new), on_a_cone(list(range(new[-1] + 1)), seed=1)
        steps.append(step_after(steps, features, longer * features, labels, longer * test, test_labels))
    known = None
    for step, scores in zip(steps, compare_classifiers.unit_length(steps), strict=True):
        before, after, test = (F.normalize(each, dim=1) for each in (step.before, step.after, step.test))
        known = classifiers.carried(known, before, after, step.labels)
        weight, bias = classifiers.discriminant(known)
        exact = test @ weight.T + bias
        torch.testing.assert_close(scores / step.test.norm(dim=1, keepdim=True), exact, rtol=0.03, atol=0)
        assert torch.equal(scores.argmax(1), exact.argmax(1))
        assert not torch.equal((test @ weight.T).argmax(1), exact.argmax(1))  # the bias matters


def test_within_the_classes_a_covariance_does_not_grow_by_what_tells_the_new_classes_apart():
    """The new network moves two new classes apart in a direction where the old one has nothing but their scatter."""
    old, old_labels = drawn([0], count=4000)
    new, labels = drawn([1, 2], count=4000)
    scatter = compare_classifiers._from_means(new, labels)
    one = torch.ones(WIDTH, dtype=torch.float64)
    sides = torch.where(labels == 1, -3.0, 3.0).double().unsqueeze(1)
    before, after = scatter, scatter @ linear(torch.eye(WIDTH, dtype=torch.float64)) + sides * one
    known = compare_classifiers.carried_within(None, old, old, old_labels)
    moved = compare_classifiers.carried_within(known, before, after, labels)
    exact = linear(linear(known.covariances[0]).T)
    assert float((moved.covariances[0] - exact).norm() / exact.norm()) < 0.01
    together = classifiers.carried(known, before, after, labels)
    excess = together.covariances[0] - exact
    torch.testing.assert_close(excess, 9 * torch.outer(one, one), rtol=0.05, atol=0.05)
    assert torch.equal(moved.means, together.means)
    assert torch.equal(moved.covariances[1:], together.covariances[1:])
    steps = [step_after([], old, old, old_labels, old, old_labels)]
    steps.append(step_after(steps, before, after, labels, after, labels))
    weight, bias = classifiers.discriminant(moved)
    assert torch.allclose(list(compare_classifiers.within(steps))[1], after @ weight.T + bias)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Both cells of seed 0 as reproduce.py leaves them, and a search of the very same."""
    root = tmp_path_factory.mktemp("work")
    cells, searched = root / "tiny" / "seed0", root / "tiny-search" / "seed0"
    searched.mkdir(parents=True)
    for method, form in TINY_FORMS.items():
        run_tiny(cells, method)
        (searched / CELLS[method].replace(" ", "_")).symlink_to(cells / method)
        (searched / f"first-{form}").symlink_to(cells / f"first-{form}")
    return root


@pytest.fixture
def compare(work, monkeypatch, tmp_path):
    """Calls compare_classifiers.py on these cells; the results go to tmp_path."""
    monkeypatch.setattr(compare_classifiers, "ROOT", tmp_path)
    monkeypatch.setattr(compare_classifiers, "SEARCH", {"tiny": "tiny-search"})
    monkeypatch.setitem(compare_classifiers.CELLS, "tiny-search", CELLS)
    monkeypatch.setitem(PROTOCOLS, "tiny", TINY)
    search = {CELLS[method]: flags for method, flags in TINY.methods.items()}
    monkeypatch.setitem(PROTOCOLS, "tiny-search", dataclasses.replace(TINY, methods={}, ablation=search))
    return lambda *flags: compare_classifiers.main(["--work-dir", str(work), *flags])


def test_every_option_is_searched_and_the_best_is_judged_on_what_the_checkpoints_say_too(compare, work, tmp_path):
    compare("tiny-search")
    searched = read_rows(tmp_path / "results" / "tiny-search" / "field.csv")
    assert {(row["readout"], row["option"]) for row in searched} == {
        (name, option) for name, tried in compare_classifiers.OPTIONS.items() for option in tried
    }
    compare("tiny")
    rows = read_rows(tmp_path / "results" / "tiny" / "field.csv")
    assert len(rows) == 2 * len(compare_classifiers.OPTIONS) * 3
    for method in ("lwf", "lwm"):
        for name in compare_classifiers.OPTIONS:
            own = [row for row in rows if (row["method"], row["readout"]) == (method, name)]
            (option,) = {row["option"] for row in own}
            averages = {
                each: np.mean(
                    [float(r["accuracy"]) for r in searched if (r["method"], r["readout"], r["option"]) == each]
                )
                for each in {(method, name, option) for option in compare_classifiers.OPTIONS[name]}
            }
            assert averages[method, name, option] == max(averages.values())
        for step in (1, 2):
            saved = checkpoint.load(work / "tiny" / "seed0" / method / str(step) / "student_model.pth")
            said = {"head": saved["training"]["log"][-1]["test_accuracy"]}
            said |= {name: saved["readouts"][name]["accuracy"] for name in ("prototypes", "discriminant")}
            for name, accuracy in said.items():
                (found,) = [r for r in rows if (r["method"], r["readout"], r["step"]) == (method, name, str(step))]
                assert float(found["accuracy"]) == pytest.approx(accuracy, abs=0.01)
    options = argparse.Namespace(protocol="tiny", work_dir=str(work), data_dir=None)
    steps = compare_classifiers.chain(options, "lwm", 0)
    (found,) = [row for row in rows if (row["method"], row["readout"], row["step"]) == ("lwm", "fetril", "2")]
    answers = list(compare_classifiers.OPTIONS["fetril"][found["option"]](steps))[2].argmax(1)
    assert float(found["accuracy"]) == pytest.approx(100 * (answers == steps[2].test_labels).double().mean(), abs=0.01)
    text = (tmp_path / "results" / "tiny" / "field.md").read_text()
    assert text.count("\n") == 2 + 2 * len(compare_classifiers.OPTIONS)
    (call,) = json.loads((tmp_path / "results" / "tiny" / "field_environment.json").read_text())
    assert call["command"] == "python3 compare_classifiers.py tiny --seeds 0"


def test_the_networks_of_one_method_may_be_there_alone(compare, work, tmp_path):
    other = tmp_path / "work"
    shutil.copytree(work / "tiny-search", other / "tiny-search")
    shutil.rmtree(other / "tiny-search" / "seed0" / CELLS["lwf"].replace(" ", "_"))
    assert compare("tiny-search", "--methods", "lwm", "--work-dir", str(other)) == 0
    assert {row["method"] for row in read_rows(tmp_path / "results" / "tiny-search" / "field.csv")} == {"lwm"}
    assert compare("tiny-search", "--work-dir", str(other)) == 2


def test_a_step_has_what_the_networks_before_it_after_it_and_of_the_first_step_see(compare, work):
    steps = compare_classifiers.chain(argparse.Namespace(protocol="tiny", work_dir=str(work), data_dir=None), "lwm", 0)
    cells = work / "tiny" / "seed0"
    paths = [cells / "first-binary" / "teacher_model.pth"]
    paths += [cells / "lwm" / number / "student_model.pth" for number in ("1", "2")]
    saved = [checkpoint.load(path) for path in paths]
    networks = [checkpoint.restore_model(each) for each in saved]
    source, names = datasets.open_source(datasets.Place("digits", ""), 8), [str(digit) for digit in range(6)]
    for number, step in enumerate(steps):
        train, test = (
            source.train(names[2 * number : 2 * number + 2], names),
            source.test(names[: 2 * number + 2], names),
        )
        seen = {"before": (max(0, number - 1), train), "after": (number, train), "first": (0, train)}
        seen |= {"test": (number, test), "first_test": (0, test)}
        for field_name, (which, images) in seen.items():
            of = saved[0]["mean"], saved[0]["std"]
            assert torch.equal(getattr(step, field_name), classifiers.features_of(networks[which], images.pixels, *of))
        kept = classifiers.unpacked(saved[number])
        assert torch.allclose(step.known.means, kept.means, atol=1e-4)
        assert torch.allclose(step.known.covariances, kept.covariances, atol=1e-4)
        assert torch.equal(step.test_labels, test.labels)
    assert not torch.allclose(steps[1].after, steps[1].first)
    assert not torch.allclose(steps[2].before, steps[2].first)


def test_networks_of_other_classes_are_not_judged_on_these(compare, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, "tiny-search", dataclasses.replace(PROTOCOLS["tiny-search"], pool=slice(1, 7)))
    assert compare("tiny-search") == 2
    assert "teacher_model.pth knows other classes, or in another order" in capsys.readouterr().err


def test_what_ours_has_over_another_is_taken_in_pairs_by_seed(tmp_path):
    path = tmp_path / "field.csv"
    for seed in range(3):
        for step, more in ((0, 0.0), (1, 10.0)):
            key = {"method": "lwm", "seed": seed, "step": step}
            values = {"discriminant": 50.0 + seed + more, "sdc": 48.0 + more}
            write_rows(path, [{**key, "readout": n, "option": "", "accuracy": v} for n, v in values.items()])
    ours, sdc = compare_classifiers.table(path, path).splitlines()[2:]
    assert ours == "| lwm | discriminant |  | 56.0 ± 1.0 | 61.0 ± 1.0 | – | – | 3 |"  # noqa: RUF001
    assert sdc == "| lwm | sdc |  | 53.0 ± 0.0 | 58.0 ± 0.0 | +3.0 (+0.5 to +5.5) | +3.0 (+0.5 to +5.5) | 3 |"


def test_a_seed_that_stopped_between_its_steps_is_left_out(tmp_path):
    path = tmp_path / "field.csv"
    for method, seed, steps in (("lwm", 0, 3), ("lwm", 1, 2), ("lwf", 0, 1)):
        for step in range(steps):
            key = {"method": method, "seed": seed, "step": step}
            write_rows(path, [{**key, "readout": "sdc", "option": "", "accuracy": 90.0 - 30 * step}])
    assert compare_classifiers.averages(path) == {("lwm", "sdc", ""): {"0": (60.0, 30.0)}}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["tiny"], "run this on tiny-search first"),
        (
            ["tiny-search", "--seeds", "1"],
            "reproduce.py tiny-search --methods 'lwf incremental_lr=0.1 beta=3' --seeds 1",
        ),
        (["tiny-search", "--methods", "lwm,finetune"], "--methods: 'finetune' is none of lwf, lwm"),
        (["tiny-search", "--seeds", "x"], "--seeds is 'x'"),
        (["tiny-search", "--table"], "run it without --table first"),
    ],
)
def test_what_is_missing_is_said_in_a_line(compare, flags, words, capsys):
    assert compare(*flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
