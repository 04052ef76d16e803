"""Read-outs of the field, re-implemented on the same networks, classes and images as ours, to be compared with them.

    python3 reproduce.py photos32-search --data-dir photos32 --ablation \\
        --methods "lwf incremental_lr=0.1 beta=3,lwm incremental_lr=0.1 beta=1"
    python3 reproduce.py photos32-5x4 --data-dir photos32 --methods lwf,lwm --seeds 0,1,2,3,4
    python3 field.py photos32-search --data-dir photos32
    python3 field.py photos32-5x4 --data-dir photos32 --seeds 0,1,2,3,4
    python3 field.py digits-search-3x2 --seeds 0,1

What reproduce.py has left in --work-dir is read, nothing is trained. On a protocol of a search every option of every
read-out is tried (four each); on another one each has the option whose average over the steps was highest there.
results/<protocol>/ gets field.csv and field.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lwm import classifiers, evaluation
from lwm.images.datasets import Images
from lwm.models import Network
from lwm.runtime.errors import InputError, one_line_errors

ROOT = Path(__file__).resolve().parents[2]
# Protocol -> the one that its options are searched on, whose classes are among the hundred of those with ten a step.
SEARCH = {
    "photos32-5x4": "photos32-search",
    "photos32-10x10": "photos32-search",
    "photos32-10x10-fp32": "photos32-search",
    "photos32-50+5x10": "photos32-search",
    "digits-5x2": "digits-search-3x2",
}
# The cells of a search that were trained as the methods of its protocols are.
CELLS = {
    "photos32-search": {"lwf": "lwf incremental_lr=0.1 beta=3", "lwm": "lwm incremental_lr=0.1 beta=1"},
    "digits-search-3x2": {"lwf": "lwf incremental_lr=0.0125 beta=1", "lwm": "lwm incremental_lr=0.0125 beta=1"},
}
METHODS = ("lwf", "lwm")
OURS = ("prototypes", "discriminant", "rebalanced")

Scores = Iterator[Tensor]  # after each step (m, N+K): the class with the highest is the answer


class Step(NamedTuple):
    """Features, float64, and what the head says, after a step; labels are positions in the output."""

    before: Tensor  # (n, C), of the new classes' training images in the network before the step; first step: as after
    after: Tensor  # (n, C), in the network after it
    first: Tensor  # (n, C), in the network of the first step
    labels: Tensor  # int64 (n,)
    test: Tensor  # (m, C), of test images of all classes so far
    first_test: Tensor  # (m, C), in the network of the first step
    test_labels: Tensor  # int64 (m,)
    logits: Tensor  # (m, N+K), of the head
    known: classifiers.Statistics  # as a checkpoint keeps them


def look(
    steps: Sequence[Step], networks: Sequence[Network], train: Images, test: Images, mean: list[float], std: list[float]
) -> Step:
    """The step after ``steps``: ``networks`` are those after each step, this one included."""
    before, after, first = (
        classifiers.features_of(network, train.pixels, mean, std)
        for network in (networks[-2:][0], networks[-1], networks[0])
    )
    tested, first_tested = (
        classifiers.features_of(each, test.pixels, mean, std) for each in (networks[-1], networks[0])
    )
    with torch.no_grad():
        logits = networks[-1].fc(tested.float()).double()
    known = classifiers.carried(steps[-1].known if steps else None, before, after, train.labels)
    return Step(before, after, first, train.labels, tested, first_tested, test.labels, logits, known)


def accuracy(scores: Tensor, step: Step) -> float | None:
    """Over all classes, in percent."""
    return evaluation.accuracies(scores, step.test_labels, 0)["accuracy"]


def head(steps: Sequence[Step]) -> Scores:
    yield from (step.logits for step in steps)


def sdc(steps: Sequence[Step], sigma: float) -> Scores:
    """Semantic drift compensation (Yu et al., CVPR 2020, sections 3.3 and 3.4): nearest class mean, on unit length.

    An old mean moves as the new images near it do, weighted by a Gaussian of width ``sigma``.
    """
    means = steps[0].after[:0]
    for step in steps:
        before, after, test = (F.normalize(each, dim=1) for each in (step.before, step.after, step.test))
        near = (-torch.cdist(means, before).square() / (2 * sigma**2)).softmax(1)
        means = torch.cat([means + near @ (after - before), _means(after, step.labels)])
        yield -torch.cdist(test, means)


def fetril(steps: Sequence[Step], penalty: float) -> Scores:
    """FeTrIL (Petit et al., WACV 2023, section 3): a linear SVM on real features of new and moved ones of old classes.

    For an old class stand the features of the new class whose mean is nearest by cosine, moved by the difference of the
    means. The network is that of the first step all along; ``penalty`` is the C of the SVM.
    """
    from sklearn.svm import LinearSVC

    means = steps[0].first[:0]
    for step in steps:
        new, known = _means(step.first, step.labels), len(means)
        nearest = (F.normalize(means, dim=1) @ F.normalize(new, dim=1).T).argmax(1)
        features, labels = [step.first], [step.labels]
        for old, other in enumerate(nearest.tolist()):
            own = step.first[step.labels == known + other]
            features.append(own + means[old] - new[other])
            labels.append(torch.full((len(own),), old))
        means = torch.cat([means, new])
        svm = LinearSVC(C=penalty, dual=False, random_state=0)
        svm.fit(F.normalize(torch.cat(features), dim=1).numpy(), torch.cat(labels).numpy())
        scores = torch.from_numpy(svm.decision_function(F.normalize(step.first_test, dim=1).numpy()))
        yield scores if scores.ndim == 2 else torch.stack([-scores, scores], dim=1)  # of two classes one column


def dpcr(steps: Sequence[Step], penalty: float) -> Scores:
    """DPCR (He et al., ICML 2025, section 3): ridge regression from means and second moments that are carried along.

    The carrying map is the ridge regression from the old network's features of the new images to the new one's. The
    paper also projects each class to the space that its own features span, which is left out: where a class has more
    images than there are channels, none of them dead, that is the whole space. ``penalty`` is that of the classifier,
    in units of the mean diagonal; its columns have unit length, so that the number of images of a class cancels.
    """
    means, moment = steps[0].after[:0], steps[0].after.new_zeros(2 * steps[0].after.shape[1:])
    for step in steps:
        shift = torch.linalg.solve(classifiers.regular(step.before.T @ step.before), step.before.T @ step.after)
        means = torch.cat([means @ shift, _means(step.after, step.labels)])
        moment = shift.T @ moment @ shift + step.after.T @ step.after
        yield step.test @ F.normalize(torch.linalg.solve(classifiers.regular(moment, penalty), means.T), dim=0)


def mahalanobis(steps: Sequence[Step], shrinkage: float) -> Scores:
    """Nearest mean by Mahalanobis' distance, as in AdaGauss's code (Rypesc et al., NeurIPS 2024).

    Each class has its covariance, or above WIDEST channels that of its step, to which ``shrinkage`` times its
    mean variance is added in all directions, scaled to correlations; features and means have unit length. The
    statistics are ours: shrunk as Ledoit and Wolf have it, and carried by an affine map whose residual is added to the
    covariances, where AdaGauss takes in mirrored images, shrinks here alone, and trains a network as the map. FeCAM
    (Goswami et al., NeurIPS 2023, section 3), where it comes from, keeps the network as it is, transforms the features
    (Tukey) and shrinks twice.
    """
    for step in steps:
        covariances = classifiers.regular(step.known.covariances, shrinkage)
        spread = covariances.diagonal(dim1=1, dim2=2).sqrt()
        roots = torch.linalg.cholesky(covariances / (spread.unsqueeze(2) * spread.unsqueeze(1)))
        means, test = F.normalize(step.known.means, dim=1), F.normalize(step.test, dim=1)
        yield torch.stack(
            [
                -torch.linalg.solve_triangular(roots[which], (test - mean).T, upper=False).square().sum(0)
                for which, mean in zip(step.known.of, means, strict=True)
            ],
            dim=1,
        )


def ours(make: Callable[[classifiers.Statistics], classifiers.Linear]) -> Callable[[Sequence[Step]], Scores]:
    def scores(steps: Sequence[Step]) -> Scores:
        for step in steps:
            weight, bias = make(step.known)
            yield step.test @ weight.T + bias

    return scores


def unit_length(steps: Sequence[Step]) -> Scores:
    """Our discriminant on features of unit length, u = x / |x|, of which it keeps the statistics.

    It is a linear layer of x itself: for its bias b, which would be b |x| there, stands b a'x, where a'u comes nearest
    to 1 (least squares, all classes alike): a = E[uu']^-1 E[u].
    """
    known = None
    for step in steps:
        before, after = (F.normalize(each, dim=1) for each in (step.before, step.after))
        known = classifiers.carried(known, before, after, step.labels)
        weight, bias = classifiers.discriminant(known)
        moment = known.means.T @ known.means / len(known.means) + classifiers.shared_covariance(known)
        one = torch.linalg.solve(classifiers.regular(moment), known.means.mean(0))
        yield step.test @ (weight + torch.outer(bias, one)).T


def within(steps: Sequence[Step]) -> Scores:
    """Our discriminant with covariances that are carried within the classes (``carried_within``)."""
    known = None
    for step in steps:
        known = carried_within(known, step.before, step.after, step.labels)
        weight, bias = classifiers.discriminant(known)
        yield step.test @ weight.T + bias


def carried_within(
    known: classifiers.Statistics | None, before: Tensor, after: Tensor, labels: Tensor
) -> classifiers.Statistics:
    """As classifiers.carried, but for the covariances of the old classes.

    There one map carries means and covariances, fitted on all new images together. What the new network tells these
    classes apart by, and the old one did not, is in its residual, and so in every covariance from then on. But a
    covariance is of differences from a class's mean: here its map and its residual are fitted on those alone.
    """
    new = classifiers.carried(None, before, after, labels)
    if known is None:
        return new
    by = classifiers.fitted(before, after)
    apart = classifiers.fitted(_from_means(before, labels), _from_means(after, labels))
    covariances = classifiers.transported(known, apart).covariances
    return classifiers.transported(known, by)._replace(covariances=covariances).joined(new)


def _from_means(features: Tensor, labels: Tensor) -> Tensor:
    return features - _means(features, labels)[labels - labels.min()]


def _means(features: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([features[labels == label].mean(0) for label in labels.unique()])


SHRINKAGES = (0.0, 0.3, 1.0, 3.0)
# Four of each that has any. The table compares them with the best of our three, which have nine together.
OPTIONS: dict[str, dict[str, Callable[[Sequence[Step]], Scores]]] = {
    "head": {"": head},
    "sdc": {f"sigma={sigma}": partial(sdc, sigma=sigma) for sigma in (0.1, 0.2, 0.3, 1.0)},
    "fetril": {f"C={c}": partial(fetril, penalty=c) for c in (0.1, 1.0, 10.0, 100.0)},
    "dpcr": {f"penalty={penalty}": partial(dpcr, penalty=penalty) for penalty in (0.001, 0.01, 0.1, 1.0)},
    "mahalanobis": {f"shrinkage={more}": partial(mahalanobis, shrinkage=more) for more in (0.3, 1.0, 3.0, 10.0)},
    "prototypes": {"": ours(classifiers.prototypes)},
    "discriminant": {f"shrinkage={s}": ours(partial(classifiers.discriminant, shrinkage=s)) for s in SHRINKAGES},
    "rebalanced": {f"shrinkage={s}": ours(partial(classifiers.rebalanced, shrinkage=s)) for s in SHRINKAGES},
    # Changes of our discriminant that are tried and not kept (docs/results-trials.md), without an option.
    "unit-length": {"": unit_length},
    "within": {"": within},
}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    from lwm.runtime.settings import OneLineParser

    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("protocol", choices=sorted({*SEARCH, *SEARCH.values()}))
    parser.add_argument("--data-dir", help="as for reproduce.py")
    parser.add_argument("--methods", help=f"those that trained the networks (default: {','.join(METHODS)})")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--work-dir", default="runs/reproduce", help="where reproduce.py has trained")
    parser.add_argument("--table", action="store_true", help="only make the table again from the CSV")
    options = parser.parse_args(argv)
    path = ROOT / "results" / options.protocol / "field.csv"
    search = path.parent.with_name(SEARCH.get(options.protocol, options.protocol)) / path.name
    if not options.table:
        evaluate(options, best_options(search) if search != path else None, path)
    text = table(path, search)
    path.with_suffix(".md").write_text(text)
    print(text)


def evaluate(options: argparse.Namespace, chosen: dict | None, path: Path) -> None:
    """Rows of every cell and read-out, with all options where none is ``chosen``."""
    from lwm.experiments.tables import command_of, record_call, write_rows
    from reproduce import seeds_of

    methods = options.methods.split(",") if options.methods else METHODS
    for name in methods:
        if name not in METHODS:
            raise InputError(f"--methods: {name!r} is none of {', '.join(METHODS)}")
    command = command_of("field.py", options, "data_dir methods seeds")
    for seed in seeds_of(options.seeds):
        for method in methods:
            steps = chain(options, method, seed)
            scores = {
                (name, option): list(make(steps))
                for name, tried in OPTIONS.items()
                for option, make in tried.items()
                if not option or chosen is None or chosen[method, name] == option
            }
            for number, step in enumerate(steps):
                key = {"protocol": options.protocol, "method": method, "seed": seed, "step": number}
                write_rows(
                    path,
                    [
                        {**key, "readout": name, "option": option, "accuracy": accuracy(each[number], step)}
                        for (name, option), each in scores.items()
                    ],
                )
            record_call(path.with_name("field_environment.json"), command, torch.get_num_threads())
            print(f"{method}, seed {seed}: done", flush=True)


def chain(options: argparse.Namespace, method: str, seed: int) -> list[Step]:
    """What the networks of a cell see after each of its steps."""
    from lwm.experiments.protocols import PROTOCOLS, class_order, groups_of
    from lwm.images import datasets
    from lwm.runtime import checkpoint
    from reproduce import MADE, form_of

    protocol = PROTOCOLS[options.protocol]
    cells = protocol.methods or protocol.ablation
    name = method if protocol.methods else CELLS[options.protocol][method]
    folder = Path(options.work_dir) / options.protocol / f"seed{seed}"
    first = folder / f"first-{form_of(cells[name].split())}" / MADE["train_teacher_model.py"]
    groups = groups_of(protocol, class_order(protocol, options.data_dir)[protocol.pool], seed)
    own = folder / name.replace(" ", "_")
    later = [own / str(number) / MADE["incremental_learning_system.py"] for number in range(1, len(groups))]
    paths = [first, *later]
    if not paths[-1].exists():
        raise InputError(
            f"{paths[-1]} is not there: reproduce.py {options.protocol} --methods {name!r} --seeds {seed} makes it"
        )
    names: list[str] = []
    networks: list[Network] = []
    steps: list[Step] = []
    for path, group in zip(paths, groups, strict=True):
        names += group
        saved = checkpoint.load(path)
        if saved["class_names"] != names:
            raise InputError(f"{path} knows other classes, or in another order: train again in an empty folder")
        if not networks:
            place = datasets.Place(protocol.dataset, options.data_dir or "", saved["steps"][0]["hold_back"])
            source = datasets.open_source(place, saved["image_size"])
        networks.append(checkpoint.restore_model(saved))
        train, test = source.train(group, names), source.test(names, names)
        steps.append(look(steps, networks, train, test, saved["mean"], saved["std"]))
    return steps


def best_options(search: Path) -> dict[tuple[str, str], str]:
    """Of each method and read-out the option with the highest average over the steps in the CSV of a search."""
    found = _ranked(search)
    if not found:
        raise InputError(f"the options come from a search: run this on {search.parent.name} first")
    best: dict[tuple[str, str], str] = {}
    for method, name, option in found:
        best.setdefault((method, name), option)
    return best


def _ranked(path: Path) -> list[tuple[str, str, str]]:
    """(method, read-out, option), the highest average over the steps first."""
    found = averages(path)
    return sorted(found, key=lambda key: -statistics.mean(average for average, _ in found[key].values()))


def averages(path: Path) -> dict[tuple[str, str, str], dict[str, tuple[float, float]]]:
    """(method, read-out, option) -> seed -> accuracy on the average of the steps and after the last, in percent.

    A seed of which not all steps are there, since something stopped between them, is left out.
    """
    from lwm.experiments.tables import read_rows

    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in read_rows(path):  # in the order of the steps
        seeds = found.setdefault((row["method"], row["readout"], row["option"]), {})
        seeds.setdefault(row["seed"], []).append(float(row["accuracy"]))
    steps = max((len(each) for seeds in found.values() for each in seeds.values()), default=0)
    whole = {key: {s: a for s, a in seeds.items() if len(a) == steps} for key, seeds in found.items()}
    return {key: {s: (statistics.mean(a), a[-1]) for s, a in seeds.items()} for key, seeds in whole.items() if seeds}


def table(path: Path, search: Path) -> str:
    """Accuracy over all classes by training and read-out, and what ours has over each in pairs by seed.

    Ours is lwm with the one of our read-outs that is best in the CSV of the ``search``.
    """
    from lwm.experiments.tables import NOT_THERE, heads_of, mean_and_spread, paired

    found = averages(path)
    if not found:
        raise InputError(f"--table: there is no row in {path}; run it without --table first")
    ours = next((key for key in _ranked(search) if key[0] == "lwm" and key[1] in OURS), None)
    best = found.get(ours, {}) if ours else {}
    heads = ["trained with", "read-out", "option", "average of the steps", "after the last step"]
    heads += ["ours over it, average", "ours over it, last", "seeds"]
    lines = heads_of(*heads)
    for key, seeds in found.items():
        cells = [mean_and_spread([values[column] for values in seeds.values()]) for column in (0, 1)]
        common = [seed for seed in seeds if seed in best]
        for column in (0, 1):
            pairs = [(best[seed][column], seeds[seed][column]) for seed in common]
            cells.append(paired(pairs) if len(pairs) >= 3 and key != ours else NOT_THERE)
        lines.append(f"| {' | '.join([*key, *cells])} | {len(seeds)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
