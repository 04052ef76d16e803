"""The field's read-outs: each against another route to the same answer, and the script on a small run."""

import argparse
import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from torch.nn import functional as F

import checkpoint
import data
import field
import incremental_learning_system as incremental
import losses
import models
import readout
import train_teacher_model as trainer
from field import Step
from protocols import PROTOCOLS, Protocol
from settings import read_settings
from tables import read_rows, write_rows

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
    known = readout.carried(steps[-1].known if steps else None, before, after, labels)
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
    scores = list(field.sdc([steps[0], moved], 0.3))
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
    scores = list(field.sdc(steps, 1e-4))[1]
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
    scores = list(field.fetril(steps, 1.0))
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
    scores = list(field.dpcr(steps, 0.01))[1]
    features, labels = all_real(steps, linear)
    gram = features.T @ features
    ridge = Ridge(alpha=0.01 * float(gram.diagonal().mean()), fit_intercept=False)
    weight = torch.from_numpy(ridge.fit(features, F.one_hot(labels).double()).coef_)
    expected = steps[1].test @ F.normalize(weight, dim=1).T
    assert torch.allclose(scores, expected, atol=1e-3)
    assert not torch.allclose(scores, list(field.dpcr(two_steps(), 0.01))[1], atol=0.1)


def test_mahalanobis_is_the_distance_among_features_of_unit_length_in_correlations():
    steps = two_steps(linear)
    known = steps[1].known
    scores = list(field.mahalanobis(steps, 3.0))[1]
    for label in range(5):
        covariance = known.covariances[known.of[label]].numpy()
        covariance = covariance + 3 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
        inverse = np.linalg.inv(covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal())))
        mean = (known.means[label] / known.means[label].norm()).numpy()
        for row, feature in enumerate(steps[1].test[:10]):
            distance = mahalanobis((feature / feature.norm()).numpy(), mean, inverse)
            assert float(scores[row, label]) == pytest.approx(-(distance**2))


TINY = Protocol(
    about="digits in three steps",
    dataset="digits",
    order=None,
    pool=slice(0, 6),
    groups=(2, 2, 2),
    flags="--model resnet32 --image-size 8 --epochs 1",
    methods={"lwf": "--method lwf", "lwm": "--method lwm"},
)


CELLS = field.CELLS["photos32-search"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Both cells of seed 0 as reproduce.py leaves them, and a search of the very same."""
    root = tmp_path_factory.mktemp("work")
    cells, searched = root / "tiny" / "seed0", root / "tiny-search" / "seed0"
    searched.mkdir(parents=True)
    flags = [*TINY.flags.split(), "--dataset", "digits", "--seed", "0"]
    for method, form in (("lwf", "softmax"), ("lwm", "binary")):
        model = cells / f"first-{form}" / "teacher_model.pth"
        trainer.main([*flags, "--old-classes", "0,1", "--loss-form", form, "--output-dir", str(model.parent)])
        for number, new in ((1, "2,3"), (2, "4,5")):
            more = ["--method", method, "--teacher", str(model), "--new-classes", new]
            model = cells / method / str(number) / "student_model.pth"
            incremental.main([*flags, *more, "--output-dir", str(model.parent)])
        (searched / CELLS[method].replace(" ", "_")).symlink_to(cells / method)
        (searched / f"first-{form}").symlink_to(cells / f"first-{form}")
    return root


@pytest.fixture
def compare(work, monkeypatch, tmp_path):
    """Calls field.py on these cells; the results go to tmp_path."""
    monkeypatch.setattr(field, "ROOT", tmp_path)
    monkeypatch.setattr(field, "SEARCH", {"tiny": "tiny-search"})
    monkeypatch.setitem(field.CELLS, "tiny-search", CELLS)
    monkeypatch.setitem(PROTOCOLS, "tiny", TINY)
    search = {CELLS[method]: flags for method, flags in TINY.methods.items()}
    monkeypatch.setitem(PROTOCOLS, "tiny-search", dataclasses.replace(TINY, methods={}, ablation=search))
    return lambda *flags: field.main(["--work-dir", str(work), *flags])


def test_every_option_is_searched_and_the_best_is_judged_on_what_the_checkpoints_say_too(compare, work, tmp_path):
    compare("tiny-search")
    searched = read_rows(tmp_path / "results" / "tiny-search" / "field.csv")
    assert {(row["readout"], row["option"]) for row in searched} == {
        (name, option) for name, tried in field.OPTIONS.items() for option in tried
    }
    compare("tiny")
    rows = read_rows(tmp_path / "results" / "tiny" / "field.csv")
    assert len(rows) == 2 * len(field.OPTIONS) * 3
    for method in ("lwf", "lwm"):
        for name in field.OPTIONS:
            own = [row for row in rows if (row["method"], row["readout"]) == (method, name)]
            (option,) = {row["option"] for row in own}
            averages = {
                each: np.mean(
                    [float(r["accuracy"]) for r in searched if (r["method"], r["readout"], r["option"]) == each]
                )
                for each in {(method, name, option) for option in field.OPTIONS[name]}
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
    steps = field.chain(options, "lwm", 0)
    (found,) = [row for row in rows if (row["method"], row["readout"], row["step"]) == ("lwm", "fetril", "2")]
    answers = list(field.OPTIONS["fetril"][found["option"]](steps))[2].argmax(1)
    assert float(found["accuracy"]) == pytest.approx(100 * (answers == steps[2].test_labels).double().mean(), abs=0.01)
    text = (tmp_path / "results" / "tiny" / "field.md").read_text()
    assert text.count("\n") == 2 + 2 * len(field.OPTIONS)
    (call,) = json.loads((tmp_path / "results" / "tiny" / "field_environment.json").read_text())
    assert call["command"] == "python3 field.py tiny --seeds 0"


def test_a_step_has_what_the_networks_before_it_after_it_and_of_the_first_step_see(compare, work):
    steps = field.chain(argparse.Namespace(protocol="tiny", work_dir=str(work), data_dir=None), "lwm", 0)
    cells = work / "tiny" / "seed0"
    paths = [cells / "first-binary" / "teacher_model.pth"]
    paths += [cells / "lwm" / number / "student_model.pth" for number in ("1", "2")]
    saved = [checkpoint.load(path) for path in paths]
    networks = [checkpoint.restore_model(each) for each in saved]
    source, names = data.open_source(data.Place("digits", ""), 8), [str(digit) for digit in range(6)]
    for number, step in enumerate(steps):
        train, test = (
            source.train(names[2 * number : 2 * number + 2], names),
            source.test(names[: 2 * number + 2], names),
        )
        seen = {"before": (max(0, number - 1), train), "after": (number, train), "first": (0, train)}
        seen |= {"test": (number, test), "first_test": (0, test)}
        for field_name, (which, images) in seen.items():
            of = saved[0]["mean"], saved[0]["std"]
            assert torch.equal(getattr(step, field_name), readout.features_of(networks[which], images.pixels, *of))
        kept = readout.unpacked(saved[number])
        assert torch.allclose(step.known.means, kept.means, atol=1e-4)
        assert torch.allclose(step.known.covariances, kept.covariances, atol=1e-4)
        assert torch.equal(step.test_labels, test.labels)
    assert not torch.allclose(steps[1].after, steps[1].first)
    assert not torch.allclose(steps[2].before, steps[2].first)


def test_what_ours_has_over_another_is_taken_in_pairs_by_seed(tmp_path):
    path = tmp_path / "field.csv"
    for seed in range(3):
        for step, more in ((0, 0.0), (1, 10.0)):
            key = {"method": "lwm", "seed": seed, "step": step}
            values = {"discriminant": 50.0 + seed + more, "sdc": 48.0 + more}
            write_rows(path, [{**key, "readout": n, "option": "", "accuracy": v} for n, v in values.items()])
    ours, sdc = field.table(path, path).splitlines()[2:]
    assert ours == "| lwm | discriminant |  | 56.0 ± 1.0 | 61.0 ± 1.0 | – | – | 3 |"  # noqa: RUF001
    assert sdc == "| lwm | sdc |  | 53.0 ± 0.0 | 58.0 ± 0.0 | +3.0 (+0.5 to +5.5) | +3.0 (+0.5 to +5.5) | 3 |"


def test_a_seed_that_stopped_between_its_steps_is_left_out(tmp_path):
    path = tmp_path / "field.csv"
    for method, seed, steps in (("lwm", 0, 3), ("lwm", 1, 2), ("lwf", 0, 1)):
        for step in range(steps):
            key = {"method": method, "seed": seed, "step": step}
            write_rows(path, [{**key, "readout": "sdc", "option": "", "accuracy": 90.0 - 30 * step}])
    assert field.averages(path) == {("lwm", "sdc", ""): {"0": (60.0, 30.0)}}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["tiny"], "run field.py tiny-search first"),
        (
            ["tiny-search", "--seeds", "1"],
            "reproduce.py tiny-search --methods 'lwf incremental_lr=0.1 beta=3' --seeds 1",
        ),
        (["tiny-search", "--seeds", "x"], "--seeds is 'x'"),
        (["tiny-search", "--table"], "run it without --table first"),
    ],
)
def test_what_is_missing_is_said_in_a_line(compare, flags, words, capsys):
    assert compare(*flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# Trials: benchmarks/trials.py --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trials():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(field.ROOT / "benchmarks")
        patch.setitem(PROTOCOLS, "tiny", TINY)
        import trials

        yield trials


@pytest.fixture(scope="module")
def plain(trials):
    return trials.cell("tiny", None, "plain", 0)


def test_the_plain_trial_trains_as_the_scripts_do(plain, work):
    saved = checkpoint.load(work / "tiny" / "seed0" / "first-binary" / "teacher_model.pth")
    for number in range(3):
        path = work / "tiny" / "seed0" / "lwm" / str(number) / "student_model.pth"
        saved = checkpoint.load(path) if number else saved
        found = {row["readout"]: row for row in plain[number]}
        for name in ("head", "prototypes", "discriminant"):
            whole = saved["readouts"][name]["accuracy"]
            assert found[name]["accuracy"] == pytest.approx(whole, abs=0.6)  # one of 180 images
        old, every = 2 * number, 2 * number + 2  # of about as many images each
        parts = [(found["head"][f"accuracy_{part}"] or 0) * share for part, share in (("old", old), ("new", 2))]
        assert sum(parts) / every == pytest.approx(found["head"]["accuracy"], abs=2)
        assert (found["head"]["means_off"] is None) == (number == 0)


def test_a_cell_that_fails_is_named_and_the_others_are_kept(trials, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    monkeypatch.setattr(trials, "cell", one_fails)
    monkeypatch.setattr(trials.concurrent.futures, "ProcessPoolExecutor", Threads)
    flags = ["photos32-search", "--data-dir", str(tmp_path), "--trials", "plain,cosine,longer", "--jobs", "2"]
    monkeypatch.setattr("protocols.class_order", lambda *_: [])
    assert trials.main(flags) == 1
    assert "not done: cosine, seed 0 (no root)" in capsys.readouterr().err
    rows = read_rows(tmp_path / "results" / "photos32-search" / "trials.csv")
    assert {(row["method"], row["step"]) for row in rows} == {
        (n, str(k)) for n in ("plain", "longer") for k in range(5)
    }
    table = (tmp_path / "results" / "photos32-search" / "trials.md").read_text()
    assert "| plain | head |  | 50.0" in table
    assert "| plain | 0.38 | 0.75 | 1 |" in table
    assert "cosine" not in table


def test_what_nobody_will_collect_is_not_run(trials, monkeypatch, tmp_path):
    begun, told = [], threading.Event()

    class Told(Threads):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            told.set()
            super().shutdown(wait=wait)

    def full(*_):
        raise OSError("no space left")

    def cell(protocol, data_dir, name, seed):
        begun.append(seed)
        assert seed == 0 or told.wait(60)  # the second is still at work when the first has failed
        return one_fails(protocol, data_dir, name, seed)

    monkeypatch.setattr(trials, "ROOT", tmp_path)
    monkeypatch.setattr(trials, "cell", cell)
    monkeypatch.setattr(trials.concurrent.futures, "ProcessPoolExecutor", Told)
    monkeypatch.setattr("protocols.class_order", lambda *_: [])
    monkeypatch.setattr("tables.write_rows", full)
    with pytest.raises(OSError, match="no space left"):
        trials.main(["photos32-search", "--data-dir", "x", "--trials", "plain,plain", "--seeds", "0,1,2,3,4,5"])
    assert begun in ([0], [0, 1])


def one_fails(protocol, data_dir, name, seed):
    if name == "cosine":
        raise RuntimeError("no root")
    off = [{"means_off": off, "covariances_off": 2 * off if off else None} for off in (None, 0.25, 0.25, 0.25, 0.75)]
    accuracies = [{"readout": each, "option": "", "accuracy": 50.0} for each in ("head", "discriminant")]
    return [[row | step for row in accuracies] for step in off]


class Threads(ThreadPoolExecutor):
    def __init__(self, jobs, mp_context):
        super().__init__(jobs)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("photos32-5x4 --data-dir x", "photos32-5x4 is judged on test images"),
        ("photos32-search --data-dir x --trials plain,sgd", "there is no 'sgd'"),
        ("photos32-search --data-dir x --jobs 0", "--jobs is '0'"),
        ("photos32-search --data-dir gone", "--data-dir is 'gone'"),
    ],
)
def test_what_cannot_be_tried_is_said_in_a_line(trials, flags, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    assert trials.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["projection=1", "warm-up=3", "ema=0.99", "rotations", "strong", "cosine", "adagauss rotations lr=0.03"],
)
def test_each_trial_changes_something_and_tells_the_digits_apart(trials, plain, monkeypatch, name):
    monkeypatch.setitem(trials.TRIALS, "strong", trials.Trial(strong=True))
    found = trials.cell("tiny", None, name, 0)
    assert plain != found
    read = [(name, option) for name, made in trials.OPTIONS.items() for option in made]
    assert [[(row["readout"], row["option"]) for row in step] for step in found] == [read] * 3
    (discriminant,) = (row for row in found[2] if row["readout"] == "discriminant")
    assert discriminant["accuracy"] > 2 * 100 / 6  # twice what guessing has


def test_what_a_projection_misses_is_a_share_of_the_variance(trials):
    features = torch.randn(6, 3, dtype=torch.float64)
    assert trials.unexplained(features, features) == 0
    assert trials.unexplained(features.mean(0), features).item() == pytest.approx(1)
    assert trials.unexplained(features + 2, features).item() == pytest.approx(4 / features.var(0, correction=0).mean())


def test_anti_collapse_is_that_of_the_cholesky_factor_each_up_to_1(trials):
    features = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(features.T.cov()), (features - features.mean(0)).T, upper=False
    ).T
    factor = torch.tensor([[3.0, 0, 0, 0], [1, 0.5, 0, 0], [0, 1, 0.8, 0], [2, 0, 1, 0.4]], dtype=torch.float64)
    made = (whitened @ factor.T).requires_grad_()
    found = trials.anti_collapse(made)
    assert found.item() == pytest.approx(-(1 + 0.5 + 0.8 + 0.4) / 4, abs=1e-3)
    found.backward()
    assert trials.anti_collapse(made.detach() - made.grad) < found  # a step against it spreads the features
    assert trials.anti_collapse(features[:3]).isfinite()  # fewer images than channels


def test_a_warm_up_moves_the_new_rows_alone(trials):
    model = models.build("resnet32", 3, 8)
    before = [each.detach().clone() for each in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    trials.put_back(model, before, 2)
    for parameter, was in zip(model.parameters(), before, strict=True):
        if parameter is model.fc.weight or parameter is model.fc.bias:
            assert torch.equal(parameter[:2], was[:2])
            assert torch.equal(parameter[2:], was[2:] + 1)
        else:
            assert torch.equal(parameter, was)


def test_an_averaged_student_has_batch_norm_statistics_of_its_own_weights(trials):
    images = data.open_source(data.Place("digits", "", 0.0), 8).train(["1"], ["0", "1"])
    settings = read_settings("incremental_learning_system", ["--teacher", "-", "--epochs", "3", "--image-size", "8"])
    settings = dataclasses.replace(settings, loss_form="binary")
    teacher = models.build("resnet32", 1, 8).eval()
    model = models.build("resnet32", 2, 8)
    trial = dataclasses.replace(trials.TRIALS["ema=0.99"], ema=0.9)
    trials.train_model(model, teacher, images, ([0.5] * 3, [0.5] * 3), losses.METHODS["lwm"], settings, trial, 0.1)
    batches = -(-len(images.labels) // settings.batch_size)
    counted = {each.num_batches_tracked.item() for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)}
    assert counted == {batches}  # of one pass, where three were trained


def test_rotations_are_told_apart_in_the_first_step_alone(trials, monkeypatch):
    seen = {"first_step": set(), "lwm": set()}

    def watched(name: str, loss):
        def recorded(student, teacher, labels, heads, settings):
            seen[name] |= set(labels.tolist())
            return loss(student, teacher, labels, heads, settings)

        return recorded

    monkeypatch.setattr(losses, "first_step", watched("first_step", losses.first_step))
    monkeypatch.setitem(losses.METHODS, "lwm", watched("lwm", losses.lwm))
    trials.cell("tiny", None, "rotations", 0)
    assert seen == {"first_step": set(range(8)), "lwm": {2, 3, 4, 5}}  # four for each of two classes
