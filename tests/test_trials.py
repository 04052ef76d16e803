"""benchmarks/trials.py: its plain trial is the scripts' training, each other one changes what it says."""

import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY, run_tiny

import checkpoint
import data
import field
import losses
import models
from protocols import PROTOCOLS
from settings import read_settings
from tables import read_rows, write_rows


@pytest.fixture(scope="module")
def trials():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(field.ROOT / "benchmarks")
        patch.setitem(PROTOCOLS, "tiny", TINY)
        import trials

        yield trials


@pytest.fixture(scope="module")
def training(trials):
    import trial_training

    return trial_training


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def plain(trials, work):
    return trials.cell("tiny", None, "plain", 0, str(work))


def test_the_plain_trial_trains_as_the_scripts_do(plain, tmp_path):
    run_tiny(tmp_path, "lwm")
    saved = checkpoint.load(tmp_path / "first-binary" / "teacher_model.pth")
    for number in range(3):
        path = tmp_path / "lwm" / str(number) / "student_model.pth"
        saved = checkpoint.load(path) if number else saved
        found = {row["readout"]: row for row in plain[number]}
        for name in ("head", "prototypes", "discriminant"):
            whole = saved["readouts"][name]["accuracy"]
            assert found[name]["accuracy"] == pytest.approx(whole, abs=0.6)  # one of 180 images
        old, every = 2 * number, 2 * number + 2  # of about as many images each
        parts = [(found["head"][f"accuracy_{part}"] or 0) * share for part, share in (("old", old), ("new", 2))]
        assert sum(parts) / every == pytest.approx(found["head"]["accuracy"], abs=2)
        assert (found["head"]["means_off"] is None) == (number == 0)


def test_a_cell_that_was_stopped_goes_on_after_its_last_step(trials, training, plain, work, monkeypatch, tmp_path):
    shutil.copytree(work / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "seed0" / "plain" / "2.pth").unlink()
    usual, begun = training.train_model, []
    monkeypatch.setattr(training, "train_model", lambda *given: (begun.append(len(given[2].labels)), usual(*given)))
    assert trials.cell("tiny", None, "plain", 0, str(tmp_path)) == plain
    assert len(begun) == 1
    monkeypatch.setitem(trials.TRIALS, "shorter", trials.Trial("--method lwm --epochs 1"))
    trials.cell("tiny", None, "shorter", 0, str(tmp_path))  # it begins as plain does
    assert len(begun) == 3


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
    assert table.startswith("| trial | head | discriminant | over plain | Mahalanobis | over plain | seeds |\n")
    assert "| plain | 50.0 | 50.0 | – | 50.0 | – | 1 |\n| longer | 51.5 | 51.5 | +1.5 | 51.5 | +1.5 | 1 |" in table  # noqa: RUF001
    assert "| plain | head |  | 50.0" in table
    assert "| plain | 0.38 | 0.75 | 1 |" in table
    assert "cosine" not in table


def test_test_images_choose_no_option_and_unit_length_has_its_table(trials, tmp_path):
    accuracies = {
        "photos32-search": {"plain": (40, 80)},
        trials.SEARCH: {"plain": (80, 40), "lwf": (40, 80)},
        "photos32-5x4": {"plain": (60, 70), "lwf longer-all": (60, 50)},
    }
    for protocol, methods in accuracies.items():
        for method, (small, large) in methods.items():
            key = {"protocol": protocol, "method": method, "seed": 0, "step": 0, "means_off": None}
            found = [("head", "", 50), ("discriminant", "", 50)]
            found += [("unit-length", "", 53)] if protocol == trials.SEARCH else []
            found += [("mahalanobis", "1.0", small), ("mahalanobis", "3.0", large)]
            names = ("readout", "option", "accuracy")
            rows = [key | {"covariances_off": None} | dict(zip(names, each, strict=True)) for each in found]
            write_rows(tmp_path / protocol / "trials.csv", rows)
    judged = trials.table(tmp_path / "photos32-5x4" / "trials.csv")
    assert "| plain | mahalanobis | 1.0 | 60.0 |" in judged
    assert "| lwf longer-all | mahalanobis | 3.0 | 50.0 |" in judged
    assert "| plain | mahalanobis | 3.0 | 80.0 |" in trials.table(tmp_path / "photos32-search" / "trials.csv")
    assert "unit-length" not in judged
    assert "| plain | +3.0 | +3.0 | 1 |" in trials.table(tmp_path / trials.SEARCH / "trials.csv")


def test_a_trial_that_no_search_had_is_not_judged(trials, monkeypatch, tmp_path, capsys):
    key = {"protocol": trials.SEARCH, "seed": 0, "step": 0, "option": "", "accuracy": 50}
    rows = [key | {"method": name, "readout": "discriminant"} for name in ("plain", "lwf")]
    write_rows(tmp_path / "results" / trials.SEARCH / "trials.csv", rows)
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    for names, words in (("plain,longer", "photos32-search-fp32 has no row of 'longer'"), ("lwf longer-all", "'gone'")):
        assert trials.main(["photos32-5x4", "--data-dir", "gone", "--trials", names]) == 2
        assert words in capsys.readouterr().err


def test_what_nobody_will_collect_is_not_run(trials, monkeypatch, tmp_path):
    begun, told = [], threading.Event()

    class Told(Threads):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            told.set()
            super().shutdown(wait=wait)

    def full(*_):
        raise OSError("no space left")

    def cell(protocol, data_dir, name, seed, work_dir):
        begun.append(seed)
        assert seed == 0 or told.wait(60)  # the second is still at work when the first has failed
        return one_fails(protocol, data_dir, name, seed, work_dir)

    monkeypatch.setattr(trials, "ROOT", tmp_path)
    monkeypatch.setattr(trials, "cell", cell)
    monkeypatch.setattr(trials.concurrent.futures, "ProcessPoolExecutor", Told)
    monkeypatch.setattr("protocols.class_order", lambda *_: [])
    monkeypatch.setattr("tables.write_rows", full)
    with pytest.raises(OSError, match="no space left"):
        trials.main(["photos32-search", "--data-dir", "x", "--trials", "plain,plain", "--seeds", "0,1,2,3,4,5"])
    assert begun in ([0], [0, 1])


def one_fails(protocol, data_dir, name, seed, work_dir):
    if name == "cosine":
        raise RuntimeError("no root")
    off = [{"means_off": off, "covariances_off": 2 * off if off else None} for off in (None, 0.25, 0.25, 0.25, 0.75)]
    read = ("head", "discriminant", "mahalanobis")
    accuracies = [{"readout": each, "option": "", "accuracy": 51.5 if name == "longer" else 50.0} for each in read]
    return [[row | step for row in accuracies] for step in off]


class Threads(ThreadPoolExecutor):
    def __init__(self, jobs, mp_context):
        super().__init__(jobs)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("photos32-5x4 --data-dir x", "photos32-5x4 is judged on test images"),
        ("photos32-search --data-dir x --trials plain,sgd", "there is no 'sgd'"),
        ("photos32-5x4 --data-dir x --trials plain", "run this on photos32-search-fp32 first"),
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
def test_each_trial_changes_something_and_tells_the_digits_apart(trials, plain, work, monkeypatch, name):
    monkeypatch.setitem(trials.TRIALS, "strong", trials.Trial(strong=True))
    found = trials.cell("tiny", None, name, 0, str(work))
    assert plain != found
    read = [(name, option) for name, made in trials.OPTIONS.items() for option in made]
    assert [[(row["readout"], row["option"]) for row in step] for step in found] == [read] * 3
    (discriminant,) = (row for row in found[2] if row["readout"] == "discriminant")
    assert discriminant["accuracy"] > 2 * 100 / 6  # twice what guessing has


def test_what_a_projection_misses_is_a_share_of_the_variance(training):
    features = torch.randn(6, 3, dtype=torch.float64)
    assert training.unexplained(features, features) == 0
    assert training.unexplained(features.mean(0), features).item() == pytest.approx(1)
    assert training.unexplained(features + 2, features).item() == pytest.approx(
        4 / features.var(0, correction=0).mean()
    )


def test_anti_collapse_is_that_of_the_cholesky_factor_each_up_to_1(training):
    features = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(features.T.cov()), (features - features.mean(0)).T, upper=False
    ).T
    factor = torch.tensor([[3.0, 0, 0, 0], [1, 0.5, 0, 0], [0, 1, 0.8, 0], [2, 0, 1, 0.4]], dtype=torch.float64)
    made = (whitened @ factor.T).requires_grad_()
    found = training.anti_collapse(made)
    assert found.item() == pytest.approx(-(1 + 0.5 + 0.8 + 0.4) / 4, abs=1e-3)
    found.backward()
    assert training.anti_collapse(made.detach() - made.grad) < found  # a step against it spreads the features
    assert training.anti_collapse(features[:3]).isfinite()  # fewer images than channels


def test_a_warm_up_moves_the_new_rows_alone(training):
    model = models.build("resnet32", 3, 8)
    before = [each.detach().clone() for each in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    training.put_back(model, before, 2)
    for parameter, was in zip(model.parameters(), before, strict=True):
        if parameter is model.fc.weight or parameter is model.fc.bias:
            assert torch.equal(parameter[:2], was[:2])
            assert torch.equal(parameter[2:], was[2:] + 1)
        else:
            assert torch.equal(parameter, was)


def test_an_averaged_student_has_batch_norm_statistics_of_its_own_weights(trials, training):
    images = data.open_source(data.Place("digits", "", 0.0), 8).train(["1"], ["0", "1"])
    settings = read_settings("incremental_learning_system", ["--teacher", "-", "--epochs", "3", "--image-size", "8"])
    settings = dataclasses.replace(settings, loss_form="binary")
    teacher = models.build("resnet32", 1, 8).eval()
    model = models.build("resnet32", 2, 8)
    trial = dataclasses.replace(trials.TRIALS["ema=0.99"], ema=0.9)
    training.train_model(model, teacher, images, ([0.5] * 3, [0.5] * 3), losses.METHODS["lwm"], settings, trial, 0.1)
    batches = -(-len(images.labels) // settings.batch_size)
    counted = {each.num_batches_tracked.item() for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)}
    assert counted == {batches}  # of one pass, where three were trained


def test_rotations_are_told_apart_in_the_first_step_alone(trials, monkeypatch, tmp_path):
    seen = {"first_step": set(), "lwm": set()}

    def watched(name: str, loss):
        def recorded(student, teacher, labels, heads, settings):
            seen[name] |= set(labels.tolist())
            return loss(student, teacher, labels, heads, settings)

        return recorded

    monkeypatch.setattr(losses, "first_step", watched("first_step", losses.first_step))
    monkeypatch.setitem(losses.METHODS, "lwm", watched("lwm", losses.lwm))
    trials.cell("tiny", None, "rotations", 0, str(tmp_path))
    assert seen == {"first_step": set(range(8)), "lwm": {2, 3, 4, 5}}  # four for each of two classes
