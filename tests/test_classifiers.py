"""The classifiers: statistics of features, their drift compensation, and the linear layers made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import checkpoint_of, refused
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge

from lwm import classifiers, evaluation, models
from lwm.attention import autograd_map
from lwm.classifiers import ClassStatistics
from lwm.images.batches import Images, to_input
from lwm.runtime.errors import RunError


def gaussians(classes: int = 3, width: int = 4, count: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, C) of overlapping classes that share a covariance, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(width, width, generator=generator, dtype=torch.float64)
    means = 2 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(classes, count, width, generator=generator, dtype=torch.float64)
    return (means.unsqueeze(1) + noise @ root.T).flatten(0, 1), torch.arange(classes).repeat_interleave(count)


def plain(features: torch.Tensor, labels: torch.Tensor) -> ClassStatistics:
    """Without shrinkage, which an affine map does not commute with."""
    statistics = classifiers.measure(features, labels, int(labels.max()) + 1)
    return statistics._replace(shrinkages=torch.zeros_like(statistics.shrinkages))


def moved_by(features: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """An affine drift of features (n, 4)."""
    generator = torch.Generator().manual_seed(5)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 4), (4,)))
    drawn = torch.randn(len(features), 4, generator=generator, dtype=torch.float64)
    return features @ weight.T + bias + noise * drawn


# Statistics -------------------------------------------------------------------------------------------------------


def test_means_and_covariances_are_those_of_each_class():
    features, labels = gaussians()
    statistics = classifiers.measure(features, labels, 3)
    each = classifiers.covariances(statistics)
    for label, (mean, covariance) in enumerate(zip(statistics.means, each, strict=True)):
        own = features[labels == label].numpy()
        assert np.allclose(mean, own.mean(0))
        assert np.allclose(covariance, LedoitWolf().fit(own).covariance_)
        assert np.allclose(statistics.scatters[label], 400 * np.cov(own.T, bias=True))
    (one, other), two = features[:2], classifiers.measure(features[:2], labels[:2], 1)
    # Of two images only how much they vary counts.
    spread = (one - other).square().mean() / 4 * torch.eye(4, dtype=torch.float64)
    assert torch.allclose(classifiers.covariances(two)[0], spread)
    kept = classifiers.to_checkpoint(statistics)
    assert {part.dtype for part in kept.values()} == {torch.float32}
    again = classifiers.from_checkpoint({"statistics": kept})
    for part, before in zip(again, statistics, strict=True):
        assert part.dtype == torch.float64
        assert torch.allclose(part, before, rtol=1e-6)
    assert again.counts.tolist() == [400] * 3
    assert classifiers.from_checkpoint({"statistics": {}}) is None


def same(one: ClassStatistics, other: ClassStatistics) -> bool:
    return all(torch.allclose(*parts, rtol=1e-9, atol=1e-9) for parts in zip(one, other, strict=True))


@pytest.mark.parametrize("width", [4, classifiers.WIDEST + 1])
def test_the_sums_of_two_tasks_are_those_of_both_at_once(width):
    """Twenty tasks are no larger than one, and each image counts alike, however many a class has."""
    features, labels = gaussians(classes=5, width=width, count=40)
    features, labels = features[:170], labels[:170]  # of the last class ten
    first = labels < 2
    whole = classifiers.measure(features, labels, 5)
    joined = classifiers.measure(features[first], labels[first], 2)
    joined = joined.with_images(classifiers.measure(features[~first], labels[~first] - 2, 3), torch.arange(2, 5))
    assert same(joined, whole)
    assert whole.counts.tolist() == [40] * 4 + [10]
    assert len(whole.scatters) == (5 if width == 4 else 1)
    each = [torch.from_numpy(LedoitWolf().fit(features[labels == k].numpy()).covariance_) for k in range(5)]
    plain = [features[labels == k].T.cov(correction=0) for k in range(5)]
    shares = whole.counts / 170
    if width > 4:  # what all share is shrunk as far as the classes are in the mean
        mean, amount = sum(s * c for s, c in zip(shares, plain, strict=True)), float((shares * whole.shrinkages).sum())
        expected = (1 - amount) * mean + amount * mean.trace() / width * torch.eye(width, dtype=torch.float64)
    else:
        expected = sum(share * covariance for share, covariance in zip(shares, each, strict=True))
    assert torch.allclose(classifiers.shared_covariance(whole), expected)


@pytest.mark.parametrize("width", [4, classifiers.WIDEST + 1])
def test_more_images_of_known_classes_give_the_sums_of_all_at_once(width):
    features, labels = gaussians(classes=5, width=width, count=40)
    whole, first = classifiers.measure(features, labels, 5), torch.arange(200) % 40 < 25
    first &= labels < 3
    start = classifiers.measure(features[first], labels[first], 3)
    rest, at = labels[~first], torch.tensor([0, 1, 2, 3, 4])
    more = start.with_images(classifiers.measure(features[~first], rest, 5), at)
    assert same(more._replace(shrinkages=whole.shrinkages), whole)
    own = classifiers.measure(features[~first], rest, 5).shrinkages
    expected = torch.cat([(25 * start.shrinkages + 15 * own[:3]) / 40, own[3:]])
    torch.testing.assert_close(more.shrinkages, expected)


@pytest.mark.parametrize("width", [4, classifiers.WIDEST + 1])
def test_what_was_derived_of_a_class_gives_way_to_what_was_measured(width):
    features, labels = gaussians(classes=3, width=width, count=40)
    whole = classifiers.measure(features, labels, 3)
    covariance = torch.eye(width, dtype=torch.float64)
    guess = ClassStatistics(
        torch.full((3,), 7.0).double(),
        torch.randn(3, width).double(),
        7 * covariance.expand(3, -1, -1) if width == 4 else 3 * 7 * covariance[None],
        torch.zeros(3).double(),
        torch.ones(3).double(),
    )
    assert same(guess.with_images(whole, torch.arange(3)), whole)
    own = labels == 1
    one = guess.with_images(classifiers.measure(features[own], labels[own] - 1, 1), torch.tensor([1]))
    assert one.derived.tolist() == [1, 0, 1] and one.counts.tolist() == [7, 40, 7]
    assert torch.allclose(one.means, guess.means.index_put((torch.tensor([1]),), whole.means[1]))
    seen = (features[own] - whole.means[1]).T @ (features[own] - whole.means[1])
    expected = torch.stack([7 * covariance, seen, 7 * covariance])
    assert torch.allclose(one.scatters, expected if width == 4 else expected.sum(0, keepdim=True))


# Drift compensation -----------------------------------------------------------------------------------------------


def test_an_affine_drift_is_undone_and_the_new_classes_are_those_of_the_new_network():
    features, labels = gaussians(classes=5)
    after, old = moved_by(features), labels < 3
    statistics, truth = plain(features[old], labels[old]), plain(after, labels)
    drift = classifiers.fit_drift(features[~old], after[~old])
    assert drift.penalty == classifiers.PENALTIES[0]
    updated = classifiers.update(statistics, features[~old], after[~old], labels[~old])
    assert torch.allclose(updated.means, truth.means, atol=0.02)
    assert torch.allclose(updated.scatters[:3] / 400, truth.scatters[:3] / 400, rtol=0.01, atol=0.02)
    for one, other in ((statistics.means, truth.means), (statistics.scatters / 400, truth.scatters / 400)):
        assert (one - other[:3]).abs().max() > 1  # they did move
    added = classifiers.measure(after[~old], labels[~old] - 3, 2)
    assert same(
        updated,
        classifiers.compensate(statistics, drift, float(updated.shrinkages[0])).with_images(
            added, torch.tensor([3, 4])
        ),
    )
    assert updated.shrinkages[:3].max() < 1e-4  # the map explains all


@pytest.mark.parametrize("widest", [4, 3])
def test_what_did_not_move_keeps_its_shrinkage_and_a_rough_map_shrinks_more(monkeypatch, widest):
    monkeypatch.setattr(classifiers, "WIDEST", widest)
    features, labels = gaussians(classes=5, count=30)
    old, new = labels < 3, labels[labels > 2]
    statistics, before = classifiers.measure(features[old], labels[old], 3), features[~old]
    assert same(classifiers.update(statistics, before, before, new), classifiers.measure(features, labels, 5))
    noise = torch.randn(len(before), 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    amounts = [classifiers.update(statistics, before, before + n * noise, new).shrinkages[:3] for n in (0.3, 1, 100)]
    assert (statistics.shrinkages < amounts[0]).all()
    assert (amounts[0] < amounts[1]).all()
    assert amounts[2].tolist() == pytest.approx([1] * 3)


def test_the_map_and_its_residual_are_those_of_a_ridge_regression_by_scikit_learn():
    """The residual is what is missed on images that the map was not fitted on: of few images it is the larger."""
    features, _ = gaussians(classes=2, count=6)
    after = 3 * moved_by(features, noise=1 / 3)
    drift, missed = classifiers.fit_drift(features, after), []

    def ridge(kept: np.ndarray) -> Ridge:
        x, difference = features[kept], (after - features)[kept]
        scale = float((x - x.mean(0)).square().sum()) / 4
        return Ridge(drift.penalty * scale, solver="cholesky").fit(x.numpy(), difference.numpy())

    for fold in range(5):
        left_out = np.arange(12) % 5 == fold
        predicted = torch.from_numpy(ridge(~left_out).predict(features[left_out].numpy()))
        missed.append((after - features)[left_out] - predicted)
    missed = torch.cat(missed)
    assert torch.allclose(drift.residual, missed.T @ missed / 12)
    whole = ridge(np.ones(12, bool))
    assert np.allclose(drift.weight, np.eye(4) + whole.coef_)
    assert np.allclose(drift.bias, whole.intercept_)
    assert drift.penalty > classifiers.PENALTIES[0]
    statistics = classifiers.measure(features, torch.arange(2).repeat_interleave(6), 2)
    expected = drift.weight @ statistics.scatters @ drift.weight.T + 6 * drift.residual
    moved = classifiers.compensate(statistics, drift, 0.25)
    assert torch.allclose(moved.scatters, expected)
    assert torch.allclose(moved.shrinkages, statistics.shrinkages + 0.25 * (1 - statistics.shrinkages))
    seen = after - features @ drift.weight.T - drift.bias
    assert drift.residual.trace() > 1.5 * seen.square().sum() / 12


def test_what_the_images_say_nothing_of_stays_as_it_is():
    features, _ = gaussians()
    features[:, 3] = 2.5  # dead for all new images
    after = features.clone()
    after[:, 0] *= 3
    drift, identity = classifiers.fit_drift(features, after), torch.eye(4, dtype=torch.float64)
    assert torch.allclose(drift.weight[3], identity[3], atol=1e-6)
    assert drift.weight[0, 0] == pytest.approx(3, abs=0.01)
    for few in (features[:2], features[:1].repeat(2, 1)):  # two images, and such that do not even differ
        drift = classifiers.fit_drift(few, few + 1)
        assert torch.allclose(drift.weight, identity)
        assert torch.allclose(drift.bias, torch.ones(4, dtype=torch.float64))


# The classifiers --------------------------------------------------------------------------------------------------


def test_ncm_is_the_nearest_mean_by_cosine():
    statistics, (features, _) = classifiers.measure(*gaussians(), 3), gaussians(seed=9)
    cosine = torch.nn.functional.cosine_similarity(features.unsqueeze(1), statistics.means.unsqueeze(0), dim=2)
    weight, bias = classifiers.ncm(statistics)
    assert torch.equal((features @ weight.T + bias).argmax(1), cosine.argmax(1))


@pytest.mark.parametrize("widest", [4, 3])
def test_lda_is_the_likeliest_of_gaussians_with_one_covariance(monkeypatch, widest):
    monkeypatch.setattr(classifiers, "WIDEST", widest)
    features, labels = gaussians()
    statistics = classifiers.measure(features, labels, 3)
    weight, bias = classifiers.lda(statistics)
    shared = classifiers.shared_covariance(statistics)
    likelihood = [torch.distributions.MultivariateNormal(mean, shared).log_prob(features) for mean in statistics.means]
    logits = features @ weight.T + bias
    assert torch.allclose(logits.softmax(1), torch.stack(likelihood, 1).softmax(1), atol=1e-4)
    assert torch.allclose(weight.sum(0), torch.zeros(4, dtype=torch.float64), atol=1e-9)


def test_lda_is_as_good_as_scikit_learns_if_images_are_few():
    """Whose amount of shrinkage is Ledoit and Wolf's too."""
    features, labels = gaussians(classes=6, width=classifiers.WIDEST + 22, count=20, seed=1)
    (test, truth), means = gaussians(classes=6, width=classifiers.WIDEST + 22, count=200, seed=1), 0.3
    features, test = means * features, means * test
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features.numpy(), labels.numpy())
    weight, bias = classifiers.lda(classifiers.measure(features, labels, 6))
    ours = ((test @ weight.T + bias).argmax(1) == truth).double().mean().item()
    assert ours > theirs.score(test.numpy(), truth.numpy()) - 0.01


@pytest.mark.parametrize(("apart", "widest"), [(1.0, 4), (30.0, 4), (1.0, 3)])
def test_aligned_is_the_softmax_regression_on_drawn_features(monkeypatch, apart, widest):
    """Also of classes that lie far apart, as those of a wide network do."""
    monkeypatch.setattr(classifiers, "WIDEST", widest)
    statistics, classes, count = classifiers.measure(*gaussians(), 3), 3, classifiers.DRAWN
    statistics = statistics._replace(means=apart * statistics.means)
    noise = torch.randn(classes, count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    roots = torch.linalg.cholesky(classifiers.covariances(statistics))
    drawn = (statistics.means.unsqueeze(1) + noise @ roots.mT).flatten(0, 1)
    # Its penalty is on weights for features that are white under the shared covariance.
    whiten = torch.linalg.inv(torch.linalg.cholesky(classifiers.shared_covariance(statistics)))
    regression = LogisticRegression(C=classes / (classifiers.DECAY * len(drawn)), tol=1e-8, max_iter=1000)
    regression.fit((drawn @ whiten.T).numpy(), np.arange(classes).repeat(count))
    features = apart * gaussians(seed=7)[0]
    weight, bias = classifiers.aligned(statistics)
    expected = regression.predict_proba((features @ whiten.T).numpy())
    assert np.allclose((features @ weight.T + bias).softmax(1), expected, atol=2e-3)
    assert torch.equal(weight, classifiers.aligned(statistics)[0])
    assert not torch.equal(weight, classifiers.aligned(statistics, seed=1)[0])


def test_covariances_that_are_flat_or_lost_digits_still_make_every_classifier():
    """Of rank one, such as a map can leave, and in single precision, as a checkpoint has them."""
    lines, means = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts, nothing = torch.ones(40).double(), torch.zeros(40).double()
    rank_one = ClassStatistics(counts, means, lines.unsqueeze(2) * lines.unsqueeze(1), nothing, nothing)
    lost = classifiers.from_checkpoint({"statistics": classifiers.to_checkpoint(rank_one)})
    assert torch.linalg.cholesky_ex(classifiers.regular(classifiers.covariances(lost))).info.any()
    flat = ClassStatistics(
        counts[:2], torch.zeros(2, 4).double(), torch.zeros(2, 4, 4).double(), nothing[:2], nothing[:2]
    )
    for name in classifiers.CLASSIFIERS:
        for statistics in (lost, flat):
            assert all(part.isfinite().all() for part in classifiers.CLASSIFIERS[name](statistics))


# With networks ----------------------------------------------------------------------------------------------------


def own_statistics(model: models.Network, saved: dict, images: Images) -> ClassStatistics:
    """Those of a network's classes, which its checkpoint is given too."""
    known = images.labels < len(saved["class_names"])
    statistics = classifiers.after_first_task(model, saved, Images(images.pixels[known], images.labels[known]), 20)
    saved["statistics"] = classifiers.to_checkpoint(statistics)
    return statistics


def random_images(count: int, classes: int, size: int) -> Images:
    torch.manual_seed(0)
    return Images(torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8), torch.arange(count) % classes)


@pytest.mark.parametrize(("architecture", "size"), [("resnet32", 8), ("mobilenet_v3_small", 32)])
def test_a_network_answers_with_the_classifier_that_is_put_in(architecture, size):
    images, model = random_images(30, 3, size), models.build(architecture, 3, size)
    saved = checkpoint_of(model, architecture, "abc", size)
    statistics, channels = own_statistics(model, saved, images), (saved["mean"], saved["std"])
    features = classifiers.features_of(model, images.pixels, *channels, batch_size=20)
    accuracies = evaluation.by_classifier(model, statistics, features, images.labels, 1)
    assert tuple(accuracies) == classifiers.NAMES == ("head", "ncm", "lda", "aligned")
    assert accuracies["lda"]["accuracy"] > 60  # on what it was made of
    for name in classifiers.NAMES:
        answering, now = classifiers.answer_with(model, saved, name)
        assert now["classifier"] == name
        logits = evaluation.predict(answering, images.pixels, *channels, 20)
        again = torch.nn.functional.linear(features, answering.fc.weight.double(), answering.fc.bias.double())
        torch.testing.assert_close(logits.double(), again, rtol=1e-4, atol=1e-3)
        assert evaluation.accuracies(logits, images.labels, 2) == pytest.approx(accuracies[name])
        calibrated, _ = classifiers.answer_with(model, saved | {"temperatures": {name: 4.0}}, name)
        colder = evaluation.predict(calibrated, images.pixels, *channels, 20)
        torch.testing.assert_close(4 * colder, logits, rtol=1e-4, atol=1e-3)
    assert torch.equal(model.fc.weight, classifiers.answer_with(model, saved, "head")[0].fc.weight)


def test_what_makes_no_classifier_is_said():
    model = models.build("resnet32", 2, 8)
    saved = checkpoint_of(model, "resnet32", "ab", 8)
    good = {"counts": torch.ones(2), "means": torch.zeros(2, 64), "scatters": torch.eye(64).repeat(2, 1, 1)}
    good |= {"shrinkages": torch.zeros(2), "derived": torch.zeros(2)}
    for name, statistics, text in (
        ("lda", {}, "no statistics of its classes"),
        ("heads", good, "no classifier 'heads'"),
        ("lda", good | {"scatters": -good["scatters"]}, "statistics are damaged"),
        ("aligned", good | {"scatters": -good["scatters"]}, "statistics are damaged"),
        ("lda", good | {"means": torch.full((2, 64), 1e30)}, "is not finite"),
    ):
        assert text in refused(classifiers.answer_with, model, saved | {"statistics": statistics}, name)
    torch.nn.init.constant_(model.conv1.weight, torch.inf)
    with pytest.raises(RunError, match="features are not finite"):
        classifiers.features_of(model, random_images(1, 1, 8).pixels, [0.5] * 3, [0.25] * 3, 1)


def test_the_maps_compared_are_those_of_the_heads_and_true_classes_whatever_answers():
    images, answering = random_images(40, 4, 8), []
    heads = [models.build("resnet32", classes, 8) for classes in (2, 4)]
    for model, names in zip(heads, ("ab", "abcd"), strict=True):
        saved = checkpoint_of(model, "resnet32", names, 8)
        own_statistics(model, saved, images)
        answering.append(classifiers.answer_with(model, saved, "lda"))
    both = [part for parts in zip(*answering, strict=True) for part in parts]
    of_heads, of_lda = evaluation.compare(*both, images, 20, heads=heads), evaluation.compare(*both, images, 20)
    labels, inputs = images.labels[of_heads.shown], to_input(images.pixels[of_heads.shown], saved["mean"], saved["std"])
    assert labels.tolist() == [0, 1] * 10
    for side, model in enumerate(heads):
        expected = autograd_map(model.eval(), inputs, labels, model.last_layer)
        torch.testing.assert_close(of_heads.maps[:, side], expected, rtol=1e-4, atol=1e-6)
        assert (of_lda.maps[:, side] - expected).abs().max() > 1e-3
    assert torch.equal(of_heads.sides[1].logits, of_lda.sides[1].logits)
    nothing = evaluation.of_statistics(heads[1], *both[2:], Images(images.pixels[:0], images.labels[:0]), 20)
    assert nothing == {"classifiers": {}, "means_off": {}, "covariances_off": {}}


def test_how_far_statistics_are_off_is_in_units_of_the_images():
    features, labels = gaussians()
    statistics = plain(features, labels)
    spread = [covariance.trace().sqrt().item() for covariance in classifiers.covariances(statistics)]
    shift = torch.tensor([3.0, 0, 4.0, 0], dtype=torch.float64)
    for part, changed, expected in (  # of the means, of the covariances
        (0, features, [0, 0, 0]),
        (0, features + shift, [5 / each for each in spread]),
        (1, features + shift, [0, 0, 0]),
        (1, 2 * features, [3 / 4] * 3),
    ):
        assert evaluation.statistics_off(statistics, changed, labels)[part] == pytest.approx(expected, abs=1e-9)
        for times in (0, 1, 3):  # of one image, however often, nothing is said to be off
            few = torch.cat([changed[:1].repeat(times, 1), changed[labels > 0]])
            found = evaluation.statistics_off(statistics, few, torch.cat([labels[:times], labels[labels > 0]]))
            assert found[part] == [None, *(pytest.approx(value, abs=1e-9) for value in expected[1:])]
