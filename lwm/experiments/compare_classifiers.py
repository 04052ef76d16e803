"""Classifiers of the field, re-implemented on the same networks, classes and images as ours, to be compared with them.

    python3 reproduce.py photos32-search --data-dir photos32 --ablation \\
        --methods "lwf incremental_lr=0.1 beta=3,lwm incremental_lr=0.1 beta=1"
    python3 reproduce.py photos32-5x4 --data-dir photos32 --methods lwf,lwm --seeds 0,1,2,3,4
    python3 -m lwm.experiments.compare_classifiers photos32-search --data-dir photos32
    python3 -m lwm.experiments.compare_classifiers photos32-5x4 --data-dir photos32 --seeds 0,1,2,3,4

What reproduce.py has left in --work-dir is read, nothing is trained. On a protocol of a search every option of every
classifier is tried (four each); on another one each has the option whose average incremental accuracy was highest
there. results/<protocol>/ gets compare_classifiers.csv and its table.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional as F

from lwm import classifiers
from lwm.experiments import tables
from lwm.experiments.cells import Study, numbers
from lwm.experiments.protocols import PROTOCOLS, SEARCH, SEARCHED
from lwm.images import datasets
from lwm.images.batches import Images
from lwm.models import Network
from lwm.runtime import checkpoint
from lwm.runtime.errors import InputError, one_line_errors
from lwm.runtime.settings import OneLineParser

METHODS = ["lwf", "lwm"]
Scores = Iterator[Tensor]  # after each task (m, N+K): the class with the highest is the answer


class Task(NamedTuple):
    """Features, float64, and what the head says, after a task; labels are positions in the output."""

    earlier: Tensor  # (n, C), of the new classes' training images in the network before the task; task 0: as ``now``
    now: Tensor  # (n, C), in the network after it
    first: Tensor  # (n, C), in the network of task 0
    labels: Tensor  # int64 (n,)
    test: Tensor  # (m, C), of test images of all classes so far
    first_test: Tensor  # (m, C), in the network of task 0
    test_labels: Tensor  # int64 (m,)
    logits: Tensor  # (m, N+K), of the head
    statistics: classifiers.ClassStatistics  # as a checkpoint keeps them


def task_after(tasks: Sequence[Task], networks: Sequence[Network], train: Images, test: Images, saved: dict) -> Task:
    """The task after ``tasks``: ``networks`` are those after each of them, this one included; ``saved`` is its file."""
    size = checkpoint.batch_size_of(saved)
    features_of = partial(classifiers.features_of, mean=saved["mean"], std=saved["std"], batch_size=size)
    first, earlier, now = networks[0], networks[-2:][0], networks[-1]
    old, new, at_first = (features_of(network, train.pixels) for network in (earlier, now, first))
    tested, first_tested = (features_of(network, test.pixels) for network in (now, first))
    with torch.no_grad():
        logits = now.fc(tested.float()).double()
    statistics = classifiers.update(tasks[-1].statistics if tasks else None, old, new, train.labels)
    return Task(old, new, at_first, train.labels, tested, first_tested, test.labels, logits, statistics)


# Classifiers ------------------------------------------------------------------------------------------------------


def head(tasks: Sequence[Task]) -> Scores:
    yield from (task.logits for task in tasks)


def sdc(tasks: Sequence[Task], sigma: float) -> Scores:
    """Semantic drift compensation (Yu et al., CVPR 2020, sections 3.3 and 3.4): nearest class mean, on unit length.

    An old mean moves as the new images near it do, weighted by a Gaussian of width ``sigma``.
    """
    means = tasks[0].now[:0]
    for task in tasks:
        earlier, now, test = (F.normalize(each, dim=1) for each in (task.earlier, task.now, task.test))
        near = (-torch.cdist(means, earlier).square() / (2 * sigma**2)).softmax(1)
        means = torch.cat([means + near @ (now - earlier), _means(now, task.labels)])
        yield -torch.cdist(test, means)


def fetril(tasks: Sequence[Task], C: float) -> Scores:
    """FeTrIL (Petit et al., WACV 2023, section 3): a linear SVM on real features of new and moved ones of old classes.

    For an old class stand the features of the new class whose mean is nearest by cosine, moved by the difference of the
    means. The network is that of task 0 all along; ``C`` is that of the SVM.
    """
    means = tasks[0].first[:0]
    for task in tasks:
        new, old = _means(task.first, task.labels), len(means)
        nearest = (F.normalize(means, dim=1) @ F.normalize(new, dim=1).T).argmax(1)
        features, labels = [task.first], [task.labels]
        for label, other in enumerate(nearest.tolist()):
            own = task.first[task.labels == old + other]
            features.append(own + means[label] - new[other])
            labels.append(torch.full((len(own),), label))
        means = torch.cat([means, new])
        svm = LinearSVC(C=C, dual=False, random_state=0)
        svm.fit(F.normalize(torch.cat(features), dim=1).numpy(), torch.cat(labels).numpy())
        scores = torch.from_numpy(svm.decision_function(F.normalize(task.first_test, dim=1).numpy()))
        yield scores if scores.ndim == 2 else torch.stack([-scores, scores], dim=1)  # of two classes one column


def dpcr(tasks: Sequence[Task], penalty: float) -> Scores:
    """DPCR (He et al., ICML 2025, section 3): ridge regression from compensated means and second moments.

    The drift map is the ridge regression from the old network's features of the new images to the new one's. The paper
    also projects each class to the space that its own features span. That is left out: if a class has more images than
    there are channels, none of them dead, it is the whole space. ``penalty`` is that of the classifier, in units of the
    mean diagonal; its columns have unit length, so that the number of images of a class cancels.
    """
    means, moment = tasks[0].now[:0], tasks[0].now.new_zeros(2 * tasks[0].now.shape[1:])
    for task in tasks:
        drift = torch.linalg.solve(classifiers.regular(task.earlier.T @ task.earlier), task.earlier.T @ task.now)
        means = torch.cat([means @ drift, _means(task.now, task.labels)])
        moment = drift.T @ moment @ drift + task.now.T @ task.now
        yield task.test @ F.normalize(torch.linalg.solve(classifiers.regular(moment, penalty), means.T), dim=0)


def mahalanobis(tasks: Sequence[Task], shrinkage: float) -> Scores:
    """Nearest mean by Mahalanobis' distance, as in AdaGauss's code (Rypesc et al., NeurIPS 2024).

    Each class has its covariance, or above WIDEST channels that of all, to which ``shrinkage`` times its mean
    variance is added in all directions, scaled to correlations; features and means have unit length. The statistics are
    ours: shrunk as in Ledoit and Wolf, and compensated by an affine map whose residual is added to the covariances.
    AdaGauss takes in mirrored images, shrinks here alone, and trains a network as the map. FeCAM (Goswami et al.,
    NeurIPS 2023, section 3), where it comes from, keeps the network as it is, transforms the features (Tukey) and
    shrinks twice.
    """
    for task in tasks:
        covariances = classifiers.regular(classifiers.covariances(task.statistics), shrinkage)
        spread = covariances.diagonal(dim1=1, dim2=2).sqrt()
        roots = torch.linalg.cholesky(covariances / (spread.unsqueeze(2) * spread.unsqueeze(1)))
        means, test = F.normalize(task.statistics.means, dim=1), F.normalize(task.test, dim=1)
        away = (test - means.unsqueeze(1)).mT  # (N+K, C, m)
        yield -torch.linalg.solve_triangular(roots.expand(len(means), -1, -1), away, upper=False).square().sum(1).T


def ours(tasks: Sequence[Task], make: Callable[..., classifiers.Linear], **option: float) -> Scores:
    """One of ``classifiers``, as a checkpoint's statistics make it."""
    for task in tasks:
        weight, bias = make(task.statistics, **option)
        yield task.test @ weight.T + bias


def _means(features: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([features[labels == label].mean(0) for label in labels.unique()])


def _options(classify: Callable[..., Scores], name: str, *values: float) -> dict[str, Callable[..., Scores]]:
    return {f"{name}={value}": partial(classify, **{name: value}) for value in values}


# Four of each that has any. The table compares them with the best of our three, which have nine together.
OPTIONS: dict[str, dict[str, Callable[[Sequence[Task]], Scores]]] = {
    "head": {"": head},
    "sdc": _options(sdc, "sigma", 0.1, 0.2, 0.3, 1.0),
    "fetril": _options(fetril, "C", 0.1, 1.0, 10.0, 100.0),
    "dpcr": _options(dpcr, "penalty", 0.001, 0.01, 0.1, 1.0),
    "mahalanobis": _options(mahalanobis, "shrinkage", 0.3, 1.0, 3.0, 10.0),
    "ncm": {"": partial(ours, make=classifiers.ncm)},
    "lda": _options(partial(ours, make=classifiers.lda), "shrinkage", 0.0, 0.3, 1.0, 3.0),
    "aligned": _options(partial(ours, make=classifiers.aligned), "shrinkage", 0.0, 0.3, 1.0, 3.0),
}


# The study --------------------------------------------------------------------------------------------------------


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("protocol", choices=sorted({*SEARCH, *SEARCH.values()}))
    parser.add_argument("--data-dir", type=os.path.expanduser, help="as for reproduce.py")
    parser.add_argument("--seeds", type=numbers, default=[0], help="comma-separated (default: 0)")
    work = "where reproduce.py has trained"
    parser.add_argument("--work-dir", type=os.path.expanduser, default="runs/reproduce", help=work)
    options = parser.parse_args(argv)
    path = tables.ROOT / "results" / options.protocol / "compare_classifiers.csv"
    search = path.parent.with_name(SEARCH.get(options.protocol, options.protocol)) / path.name
    evaluate(options, path, best_options(search) if search != path else None)
    tables.publish({path.with_suffix(".md"): tables.comparison_table(path, search)})


def evaluate(options: argparse.Namespace, path: Path, best: dict[tuple[str, str], str] | None) -> None:
    """Rows of every cell and classifier, each with its ``best`` option, or with all."""
    command = tables.command_of("-m lwm.experiments.compare_classifiers", options)
    for seed, method in itertools.product(options.seeds, METHODS):
        tasks = tasks_of(options, method, seed)
        scores = {
            (name, option): list(classify(tasks))
            for name, tried in OPTIONS.items()
            for option, classify in tried.items()
            if best is None or best[method, name] == option
        }
        for number, task in enumerate(tasks):
            key = {"protocol": options.protocol, "method": method, "seed": seed, "task": number}
            rows = []
            for (name, option), each in scores.items():
                right = each[number].argmax(1) == task.test_labels
                accuracy = 100 * right.double().mean().item()
                rows.append({**key, "classifier": name, "option": option, "accuracy": accuracy})
            tables.write_rows(path, rows)
        about = path.with_name("compare_classifiers_environment.json")
        tables.record_call(about, command, torch.get_num_threads())
        print(f"{method}, seed {seed}: done", flush=True)


def best_options(search: Path) -> dict[tuple[str, str], str]:
    """Of each method and classifier the option with the highest average incremental accuracy in the CSV of a search."""
    best = {(method, name): option for method, name, option in reversed(tables.ranked(search))}
    if not best:
        raise InputError(f"the options come from a search: run this on {search.parent.name} first")
    return best


def tasks_of(options: argparse.Namespace, method: str, seed: int) -> list[Task]:
    """What the networks of a cell see after each of its tasks."""
    protocol = PROTOCOLS[options.protocol]
    name = method if protocol.methods else SEARCHED[options.protocol][method]
    study = Study(options.protocol, protocol, options.data_dir, Path(options.work_dir), Path())
    paths = study.checkpoints(seed, name, (protocol.methods or protocol.ablation)[name])
    if not paths[-1].exists():
        command = f"reproduce.py {options.protocol} --methods {name!r} --seeds {seed}"
        raise InputError(f"{paths[-1]} is not there: {command} makes it")
    names: list[str] = []
    networks: list[Network] = []
    tasks: list[Task] = []
    for path, group in zip(paths, study.groups(seed), strict=True):
        names += group
        saved = checkpoint.load(path)
        if saved["class_names"] != names:
            raise InputError(f"{path} has other classes, or in another order: train again in an empty folder")
        if not networks:
            place = datasets.Place(protocol.dataset, options.data_dir or "", saved["tasks"][0]["hold_back"])
            source = datasets.open_source(place, saved["image_size"])
        networks.append(checkpoint.restore_model(saved))
        tasks.append(task_after(tasks, networks, source.train(group, names), source.test(names, names), saved))
    return tasks


if __name__ == "__main__":
    sys.exit(main())
