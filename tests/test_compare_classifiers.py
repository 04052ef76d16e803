"""The field's classifiers: each against another route to the same answer, and the script on a small run."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from studies import TINY
from torch.nn import functional as F

import demo
import incremental_learning_system as incremental
import reproduce
import train_teacher_model as trainer
from lwm import classifiers
from lwm.experiments import cells, compare_classifiers, protocols, tables
from lwm.experiments.compare_classifiers import Task
from lwm.experiments.protocols import PROTOCOLS
from lwm.runtime import checkpoint

WIDTH, COUNT = 5, 60
MATRIX = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def drawn(classes: range, seed: int = 0, count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, C) of Gaussian classes, each the same for every call of its number but for the noise."""
    parts = []
    for label in classes:
        means, noise = (torch.Generator().manual_seed(s) for s in (label, 1000 * seed + label))
        mean, *root = torch.randn(1 + WIDTH, WIDTH, generator=means, dtype=torch.float64)
        parts.append(3 * mean + torch.randn(count, WIDTH, generator=noise, dtype=torch.float64) @ torch.stack(root))
    return torch.cat(parts), torch.tensor(classes).repeat_interleave(count)


def two_tasks(shift: torch.Tensor) -> list[Task]:
    """Classes 0 and 1, then 2, 3 and 4 with half as many images; in between ``shift`` turns the network's features."""
    tasks: list[Task] = []
    for new, move in ((range(2), torch.eye(WIDTH, dtype=torch.float64)), (range(2, 5), shift)):
        features, labels = drawn(new, count=COUNT // (1 + len(tasks)))
        test, test_labels = drawn(range(new[-1] + 1), seed=1)
        statistics = classifiers.update(tasks[-1].statistics if tasks else None, features, features @ move, labels)
        seen = features, features @ move, features, labels, test @ move, test, test_labels
        tasks.append(Task(*seen, torch.zeros(0), statistics))
    return tasks


def test_sdc_moves_an_old_mean_as_the_new_images_near_it_move():
    tasks = two_tasks(MATRIX)
    scores = list(compare_classifiers.sdc(tasks, 0.3))[1]
    earlier, now, test = (F.normalize(each, dim=1) for each in (tasks[1].earlier, tasks[1].now, tasks[1].test))
    for label in (0, 1):
        mean = F.normalize(tasks[0].now[tasks[0].labels == label], dim=1).mean(0)
        weights = torch.exp(-(earlier - mean).square().sum(1) / (2 * 0.3**2))
        drift = (weights / weights.sum()) @ (now - earlier)
        assert torch.allclose(-scores[:, label], (test - mean - drift).norm(dim=1), atol=1e-5)
    own = now[tasks[1].labels == 3].mean(0)
    assert torch.allclose(-scores[:, 3], (test - own).norm(dim=1))
    assert list(compare_classifiers.sdc(tasks, 1e-4))[1].isfinite().all()  # the nearest image alone


def test_fetril_sees_real_features_if_old_classes_are_new_ones_moved():
    old, labels = drawn(range(2))
    new = old + 0.5  # so that moved back by the difference of the means they are the old ones
    both = torch.cat([old, new]), torch.cat([labels, labels + 2])
    blank = two_tasks(MATRIX)[0]
    tasks = [blank._replace(first=old, labels=labels, first_test=old)]
    tasks.append(blank._replace(first=new, labels=labels + 2, first_test=both[0]))
    two, four = compare_classifiers.fetril(tasks, 1.0)
    order = torch.cat([torch.where(both[1] == label)[0] for label in (2, 3, 0, 1)])  # of training
    inputs = F.normalize(both[0], dim=1)
    svm = LinearSVC(C=1.0, dual=False).fit(inputs[order], both[1][order])
    assert torch.allclose(four, torch.from_numpy(svm.decision_function(inputs)), atol=1e-2)
    svm = LinearSVC(C=1.0, dual=False).fit(F.normalize(old, dim=1), labels)
    assert (two.argmax(1).numpy() == svm.predict(F.normalize(old, dim=1))).all()


def test_dpcr_is_ridge_regression_on_all_images_if_the_drift_is_linear():
    tasks = two_tasks(MATRIX)
    features, labels = (torch.cat(both) for both in zip(drawn(range(2)), tasks[1][1:4:2], strict=True))
    features[: 2 * COUNT] = features[: 2 * COUNT] @ MATRIX
    penalty = 0.01 * float((features.T @ features).diagonal().mean())
    weight = torch.from_numpy(Ridge(alpha=penalty, fit_intercept=False).fit(features, F.one_hot(labels).double()).coef_)
    scores = list(compare_classifiers.dpcr(tasks, 0.01))[1]
    assert torch.allclose(scores, tasks[1].test @ F.normalize(weight, dim=1).T, atol=1e-3)


def test_mahalanobis_is_the_distance_among_features_of_unit_length_in_correlations():
    task = two_tasks(MATRIX)[1]
    (scores,) = compare_classifiers.mahalanobis([task], 3.0)
    for label in range(5):
        covariance = classifiers.covariances(task.statistics)[label].numpy()
        covariance = covariance + 3 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
        inverse = np.linalg.inv(covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal())))
        mean, test = (F.normalize(each, dim=-1).numpy() for each in (task.statistics.means[label], task.test))
        expected = [-(mahalanobis(feature, mean, inverse) ** 2) for feature in test[:10]]
        assert scores[:10, label].tolist() == pytest.approx(expected)


SCRIPTS = {f"{module.__name__}.py": module.main for module in (trainer, incremental, demo)}


def test_every_option_is_searched_and_the_best_is_judged_on_what_the_checkpoints_say_too(monkeypatch, tmp_path, capsys):
    """On two methods of a small protocol, which is then its own search."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(cells, "call", lambda script, flags, threads: SCRIPTS[script](flags))
    monkeypatch.setitem(protocols.SEARCH, "tiny", "tiny-search")
    monkeypatch.setitem(protocols.SEARCHED, "tiny-search", {"lwf": "lwf", "lwm": "lwm"})
    monkeypatch.setitem(PROTOCOLS, "tiny", TINY)
    monkeypatch.setitem(PROTOCOLS, "tiny-search", dataclasses.replace(TINY, methods={}, ablation=TINY.methods))
    (tmp_path / "tiny-search").symlink_to(tmp_path / "tiny")
    work = ["--work-dir", str(tmp_path)]
    assert compare_classifiers.main(["tiny", *work]) == 2
    assert "run this on tiny-search first" in capsys.readouterr().err
    assert compare_classifiers.main(["tiny-search", *work]) == 2
    assert "--methods 'lwf' --seeds 0 makes it" in capsys.readouterr().err
    assert reproduce.main(["tiny", *work]) == 0
    assert compare_classifiers.main(["tiny-search", *work]) == compare_classifiers.main(["tiny", *work]) == 0
    searched, rows = (
        tables.read_rows(tmp_path / f"results/{name}/compare_classifiers.csv") for name in ("tiny-search", "tiny")
    )
    assert len(searched) == 2 * 3 * sum(map(len, compare_classifiers.OPTIONS.values()))
    assert len(rows) == 2 * 3 * len(compare_classifiers.OPTIONS)
    assert len(tables.read_rows(tmp_path / "results/tiny/attention.csv")) == 2 * (2 + 4)
    means = searched.fillna("").groupby(["method", "classifier", "option"])["accuracy"].mean()
    for (method, name), own in rows.fillna("").groupby(["method", "classifier"]):
        (option,) = own["option"].unique()
        assert means[method, name, option] == pytest.approx(means[method, name].max())
        for task in (1, 2) if name in ("head", "ncm", "lda") else ():
            saved = checkpoint.load(tmp_path / "tiny/seed0" / method / str(task) / "student_model.pth")
            assert own["accuracy"].tolist()[task] == pytest.approx(saved["classifiers"][name]["accuracy"], abs=0.01)
    monkeypatch.setitem(PROTOCOLS, "tiny", dataclasses.replace(TINY, pool=slice(1, 7)))
    assert compare_classifiers.main(["tiny", *work]) == 2
    assert "teacher_model.pth has other classes, or in another order" in capsys.readouterr().err


def test_what_ours_has_over_another_is_taken_in_pairs_by_seed_of_whole_runs(tmp_path):
    path = tmp_path / "compare_classifiers.csv"
    for seed, task in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]:
        key = {"method": "lwm", "seed": seed, "task": task, "option": ""}
        values = {"lda": 50.0 + seed + 10 * task, "sdc": 48.0 + 10 * task}
        tables.write_rows(path, [{**key, "classifier": name, "accuracy": value} for name, value in values.items()])
    ours, sdc = tables.comparison_table(path, path).splitlines()[2:]
    assert ours == "| lwm | lda |  | 56.0 ± 1.0 | 61.0 ± 1.0 | – | – | 3 |"  # noqa: RUF001
    assert sdc == "| lwm | sdc |  | 53.0 ± 0.0 | 58.0 ± 0.0 | +3.0 (+0.5 to +5.5) | +3.0 (+0.5 to +5.5) | 3 |"
