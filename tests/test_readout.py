"""The read-outs: statistics of features, their transport, and the heads made of them."""

import copy

import numpy as np
import pytest
import torch
from conftest import checkpoint_of
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge

import config
from lwm import classifiers, evaluation, models
from lwm.classifiers import Statistics
from lwm.images.datasets import Images
from lwm.runtime import checkpoint, settings
from lwm.runtime.errors import InputError, RunError


def gaussians(classes: int = 3, width: int = 4, count: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, C) of overlapping classes that share a covariance, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(width, width, generator=generator, dtype=torch.float64)
    means = 2 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(classes, count, width, generator=generator, dtype=torch.float64)
    return (means.unsqueeze(1) + noise @ root.T).flatten(0, 1), torch.arange(classes).repeat_interleave(count)


def plain(features: torch.Tensor, labels: torch.Tensor) -> Statistics:
    """Without shrinkage, which an affine map does not commute with."""
    own = [features[labels == label] for label in labels.unique()]
    return Statistics(
        torch.stack([each.mean(0) for each in own]),
        torch.stack([each.T.cov(correction=0) for each in own]),
        list(range(len(own))),
    )


def affine(width: int = 4, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return weight, torch.randn(width, generator=generator, dtype=torch.float64)


# Statistics -------------------------------------------------------------------------------------------------------


def test_means_and_covariances_are_those_of_each_class():
    features, labels = gaussians()
    found = classifiers.measured(features, labels, 3)
    assert found.of == [0, 1, 2]
    for label in range(3):
        own = features[labels == label].numpy()
        assert np.allclose(found.means[label], own.mean(0))
        assert np.allclose(found.covariances[label], LedoitWolf().fit(own).covariance_)


def test_wide_features_have_one_covariance_for_all_classes_of_a_step():
    features, labels = gaussians(classes=2, width=classifiers.WIDEST + 1, count=40)
    found = classifiers.measured(features, labels, 2)
    assert found.covariances.shape == (1, classifiers.WIDEST + 1, classifiers.WIDEST + 1)
    each = [torch.from_numpy(LedoitWolf().fit(features[labels == label].numpy()).covariance_) for label in (0, 1)]
    assert torch.allclose(found.covariances[0], (each[0] + each[1]) / 2)
    both = found.joined(classifiers.measured(3 * features[:40], labels[:40], 1))
    assert both.of == [0, 0, 1]
    assert len(both.means) == 3
    one, other = both.covariances
    assert torch.allclose(classifiers.shared_covariance(both), (2 * one + other) / 3)  # each class alike, not each step


def test_of_two_images_only_how_much_they_vary_is_kept():
    features, labels = gaussians(classes=2, width=5, count=2)
    found = classifiers.measured(features, labels, 2)
    for label in (0, 1):
        (one, other), covariance = features[labels == label], found.covariances[label]
        assert torch.allclose(covariance, (one - other).square().mean() / 4 * torch.eye(5, dtype=torch.float64))


def test_what_is_packed_is_unpacked_in_double_precision():
    known = classifiers.measured(*gaussians(), 3)
    packed = classifiers.packed(known)
    assert {packed[name].dtype for name in ("means", "covariances")} == {torch.float32}
    again = classifiers.unpacked({"statistics": packed})
    assert again.means.dtype == torch.float64
    assert torch.allclose(again.covariances, known.covariances, rtol=1e-6)
    assert again.of == known.of
    assert classifiers.packed(None) == {}
    assert classifiers.unpacked({"statistics": {}}) is None


# Transport --------------------------------------------------------------------------------------------------------


def test_an_affine_drift_is_found_and_undone():
    features, labels = gaussians(classes=5)
    weight, bias = affine()
    after = features @ weight.T + bias
    old, new = labels < 3, labels >= 3
    found = classifiers.fitted(features[new], after[new])
    assert found.penalty == classifiers.PENALTIES[0]
    known, truth = plain(features[old], labels[old]), plain(after[old], labels[old])
    carried = classifiers.transported(known, found)
    assert torch.allclose(carried.means, truth.means, atol=0.02)
    assert torch.allclose(carried.covariances, truth.covariances, rtol=0.01, atol=0.02)
    assert (known.means - truth.means).abs().max() > 1  # they did move
    assert (known.covariances - truth.covariances).abs().max() > 1


def test_the_ridge_regression_is_that_of_the_closed_form_of_a_longer_system():
    """Ridge as least squares with rows sqrt(penalty) * identity below, whose targets are zero differences."""
    features, _ = gaussians(count=30)
    after = features @ affine()[0].T + 0.3 * torch.randn(len(features), 4, dtype=torch.float64)
    weight, bias = classifiers._ridge(features, after, 0.1)
    x, moved = features - features.mean(0), (after - features) - (after - features).mean(0)
    scale = 0.1 * x.square().sum() / 4
    longer = torch.cat([x, scale.sqrt() * torch.eye(4, dtype=torch.float64)])
    solved = torch.linalg.lstsq(longer, torch.cat([moved, torch.zeros(4, 4, dtype=torch.float64)])).solution
    assert torch.allclose(weight, torch.eye(4, dtype=torch.float64) + solved.T)
    assert torch.allclose(features.mean(0) @ weight.T + bias, after.mean(0))


def test_two_images_are_enough_not_to_break_it():
    features, _ = gaussians(count=1)
    found = classifiers.fitted(features[:2], features[:2] + 1)
    assert torch.allclose(found.weight, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(found.bias, torch.ones(4, dtype=torch.float64))
    same = classifiers.fitted(features[:1].repeat(2, 1), features[:1].repeat(2, 1))  # they do not even differ
    assert same.weight.isfinite().all()


def test_what_is_carried_is_the_old_classes_moved_and_the_new_ones_as_the_new_network_sees_them():
    features, labels = gaussians(classes=5)
    weight, bias = affine()
    old, before, after = labels < 2, features[labels >= 2], (features @ weight.T + bias)[labels >= 2]
    known = classifiers.measured(features[old], labels[old], 2)
    found = classifiers.carried(known, before, after, labels[labels >= 2])
    moved = classifiers.transported(known, classifiers.fitted(before, after))
    expected = moved.joined(classifiers.measured(after, labels[labels >= 2] - 2, 3))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    torch.testing.assert_close(found.means[2:], after.view(3, -1, 4).mean(1))  # the classes come one after another


def test_directions_that_the_images_say_nothing_of_stay_as_they_are():
    features, _ = gaussians()
    features[:, 3] = 2.5  # dead for all new images, and moved for them
    after = features.clone()
    after[:, 0] *= 3
    found = classifiers.fitted(features, after)
    assert torch.allclose(found.weight[3], torch.tensor([0.0, 0, 0, 1], dtype=torch.float64), atol=1e-6)
    assert found.weight[0, 0] == pytest.approx(3, abs=0.01)


def test_noise_is_added_to_the_covariances_and_raises_the_penalty():
    features, labels = gaussians(count=12)
    noise = 5 * torch.randn(len(features), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = classifiers.fitted(features, features + noise)
    assert found.penalty > classifiers.PENALTIES[0]
    known = classifiers.measured(features, labels, 3)
    carried = classifiers.transported(known, found)
    assert torch.allclose(carried.covariances, found.weight @ known.covariances @ found.weight.T + found.residual)
    assert found.residual.trace() > 50


def test_the_residual_is_what_is_missed_on_images_that_the_map_was_not_fitted_on():
    """By scikit-learn's ridge regression of the difference; of the few images it is fitted on it misses far less."""
    features, _ = gaussians(classes=2, count=6)
    noise = torch.randn(12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    after = 3 * features @ affine()[0].T + noise
    found, missed = classifiers.fitted(features, after), []
    for fold in range(5):
        left_out = np.arange(12) % 5 == fold
        x, moved = features[~left_out], (after - features)[~left_out]
        ridge = Ridge(found.penalty * float((x - x.mean(0)).square().sum()) / 4).fit(x.numpy(), moved.numpy())
        predicted = torch.from_numpy(ridge.predict(features[left_out].numpy()))
        missed.append((after - features)[left_out] - predicted)
    missed = torch.cat(missed)
    assert torch.allclose(found.residual, missed.T @ missed / 12)
    seen = after - features @ found.weight.T - found.bias
    assert found.residual.trace() > 1.5 * seen.square().sum() / 12


# The heads --------------------------------------------------------------------------------------------------------


def answers(head, features):
    weight, bias = head
    return (features @ weight.T + bias).argmax(1)


def test_prototypes_are_the_nearest_by_cosine():
    known, (features, _) = classifiers.measured(*gaussians(), 3), gaussians(seed=9)
    cosine = torch.nn.functional.cosine_similarity(features.unsqueeze(1), known.means.unsqueeze(0), dim=2)
    assert torch.equal(answers(classifiers.prototypes(known), features), cosine.argmax(1))


@pytest.mark.parametrize("shrinkage", [None, 3.0])
def test_the_discriminant_is_the_likeliest_of_gaussians_with_one_covariance(shrinkage):
    features, labels = gaussians(count=20_000)
    known = classifiers.measured(features, labels, 3)
    weight, bias = classifiers.discriminant(known, shrinkage)
    shared = known.covariances.mean(0)
    shared = shared + (shrinkage or 0) * shared.trace() / len(shared) * torch.eye(len(shared), dtype=shared.dtype)
    likelihood = [torch.distributions.MultivariateNormal(mean, shared).log_prob(features) for mean in known.means]
    posterior = torch.stack(likelihood, 1).softmax(1)
    assert torch.allclose((features @ weight.T + bias).softmax(1), posterior, atol=1e-4)
    assert torch.allclose(weight.sum(0), torch.zeros(4, dtype=torch.float64), atol=1e-9)
    theirs = LinearDiscriminantAnalysis().fit(features.numpy(), labels.numpy()).predict(features.numpy())
    assert (
        answers(classifiers.discriminant(known, 0.0), features).numpy() == theirs
    ).mean() > 0.99  # which does not shrink


@pytest.mark.parametrize("apart", [1.0, 30.0])
def test_the_rebalanced_head_is_the_softmax_regression_on_drawn_features(apart):
    """Also of classes that lie far apart, as those of a wide network do."""
    known, classes, count = classifiers.measured(*gaussians(), 3), 3, classifiers.DRAWN
    known = known._replace(means=apart * known.means)
    noise = torch.randn(classes, count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    roots = torch.linalg.cholesky(known.covariances)
    drawn = (known.means.unsqueeze(1) + noise @ roots.mT).flatten(0, 1)
    labels = torch.arange(classes).repeat_interleave(count)
    # Its penalty is on weights for features that are white under the shared covariance.
    whiten = torch.linalg.inv(torch.linalg.cholesky(known.covariances.mean(0)))
    regression = LogisticRegression(C=classes / (classifiers.DECAY * len(drawn)), tol=1e-8, max_iter=1000)
    regression.fit((drawn @ whiten.T).numpy(), labels.numpy())
    features = apart * gaussians(seed=7)[0]
    weight, bias = classifiers.rebalanced(known)
    expected = regression.predict_proba((features @ whiten.T).numpy())
    assert np.allclose((features @ weight.T + bias).softmax(1), expected, atol=2e-3)
    assert torch.equal(weight, classifiers.rebalanced(known)[0])
    assert not torch.equal(weight, classifiers.rebalanced(known, seed=1)[0])


def test_what_wide_features_are_shrunk_by_is_their_width_s(monkeypatch):
    known = classifiers.measured(*gaussians(), 3)
    for make in (classifiers.discriminant, classifiers.rebalanced):
        assert torch.equal(make(known)[0], make(known, 0.0)[0])
        with monkeypatch.context() as patch:
            patch.setattr(classifiers, "WIDEST", 3)
            assert torch.equal(make(known)[0], make(known, classifiers.SHRINKAGE)[0])
            assert not torch.allclose(make(known)[0], make(known, 0.0)[0], rtol=0.1)


def test_features_that_do_not_vary_and_many_classes_are_no_error():
    flat = Statistics(torch.zeros(2, 4).double(), torch.zeros(2, 4, 4).double(), [0, 1])
    for make in classifiers.HEADS.values():
        weight, bias = make(flat)
        assert weight.isfinite().all()
        assert bias.isfinite().all()


def test_the_names_are_the_same_everywhere():
    names = ("head", *classifiers.HEADS)
    assert names == settings.READOUTS
    choices = next(f for f in settings.fields(settings.Settings) if f.name == "readout").metadata["help"]
    assert choices.endswith(", ".join(("auto", *names)))
    assert config.READOUT == "auto"


# With networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet18", "resnet32", "mobilenet_v3_small"])
def test_the_features_are_what_the_head_sees(architecture):
    torch.manual_seed(0)
    model = models.build(architecture, 3, 32)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    mean, std = [0.4] * 3, [0.3] * 3
    features = classifiers.features_of(model, pixels, mean, std, batch_size=2)
    assert features.dtype == torch.float64
    logits = features.float() @ model.fc.weight.T + model.fc.bias
    assert torch.allclose(logits, evaluation.predict(model, pixels, mean, std), atol=1e-5)


def test_a_network_answers_with_the_read_out_that_is_put_in():
    torch.manual_seed(0)
    model = models.build("resnet32", 3, 8)
    pixels = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    images = Images(pixels, torch.arange(30) % 3)
    saved = checkpoint_of(model, "resnet32", "abc", 8)
    known = classifiers.after_first_step(model, saved, images)
    saved["statistics"] = classifiers.packed(known)
    features = classifiers.features_of(model, pixels, saved["mean"], saved["std"])
    found = evaluation.by_readout(model, known, features, images.labels, 1)
    assert list(found) == list(settings.READOUTS)
    assert found["discriminant"]["accuracy"] > 60  # on what it was made of
    for name in settings.READOUTS:
        own, now = classifiers.use(model, saved, name)
        assert now["readout"] == name
        assert now["loss_form"] == ("binary" if name == "head" else "softmax")
        logits = evaluation.predict(own, pixels, saved["mean"], saved["std"])
        assert evaluation.accuracies(logits, images.labels, 2) == pytest.approx(found[name])
    nothing = Images(pixels[:0], images.labels[:0])
    assert evaluation.of_statistics(model, saved, saved, nothing)["readouts"] == {}


def test_covariances_that_lost_digits_in_single_precision_still_make_every_head():
    """Of rank one, such as a map can leave; a checkpoint may have them, so that all the heads must come of them."""
    generator = torch.Generator().manual_seed(0)
    lines = torch.randn(40, 128, generator=generator, dtype=torch.float64)
    means = torch.randn(40, 128, generator=generator, dtype=torch.float64)
    packed = classifiers.packed(Statistics(means, lines.unsqueeze(2) * lines.unsqueeze(1), list(range(40))))
    lost = packed["covariances"].double()
    assert torch.linalg.cholesky_ex(classifiers.regular(lost)).info.any()
    checkpoint._check_statistics(packed, torch.zeros(40, 128))
    for name in classifiers.HEADS:
        assert all(
            part.isfinite().all() for part in classifiers.made(name, classifiers.unpacked({"statistics": packed}))
        )


def test_features_that_are_not_finite_are_said():
    model = models.build("resnet32", 2, 8)
    torch.nn.init.constant_(model.conv1.weight, torch.inf)
    with pytest.raises(RunError, match="features are not finite"):
        classifiers.features_of(model, torch.ones(1, 3, 8, 8, dtype=torch.uint8), [0.5] * 3, [0.25] * 3)


def test_statistics_that_are_none_are_said():
    model = models.build("resnet32", 2, 8)
    saved = checkpoint_of(model, "resnet32", "ab", 8, statistics={})
    with pytest.raises(InputError, match="no statistics of its classes"):
        classifiers.use(model, saved, "discriminant")
    negative = {"means": torch.zeros(2, 64), "covariances": -torch.eye(64).repeat(2, 1, 1), "of": [0, 1]}
    for name in ("discriminant", "rebalanced"):
        with pytest.raises(InputError, match="statistics are damaged"):
            classifiers.use(model, saved | {"statistics": negative}, name)
    with pytest.raises(InputError, match="statistics are damaged"):
        known = classifiers.unpacked({"statistics": negative})
        evaluation.by_readout(model, known, torch.zeros(2, 64).double(), torch.tensor([0, 1]), 1)
    huge = {"means": torch.full((2, 64), 1e30), "covariances": torch.eye(64).repeat(2, 1, 1), "of": [0, 1]}
    with pytest.raises(InputError, match="the head made of them is not finite"):
        classifiers.use(model, saved | {"statistics": huge}, "discriminant")


def test_attention_is_that_of_the_heads_whatever_answers():
    """A student that has only got new outputs looks where its teacher does; its discriminant, of more classes, not."""
    torch.manual_seed(0)
    teacher = models.build("resnet32", 2, 8)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    images = Images(pixels, torch.arange(40) % 4)
    student = copy.deepcopy(teacher)
    models.widen_head(student, 2)
    saved = []
    for model, names in ((teacher, "ab"), (student, "abcd")):
        own = checkpoint_of(model, "resnet32", names, 8)
        known = images.labels < len(names)
        after = classifiers.after_first_step(model, own, Images(pixels[known], images.labels[known]))
        saved.append(own | {"statistics": classifiers.packed(after)})
    first, before = classifiers.use(teacher, saved[0], "discriminant")
    second, after = classifiers.use(student, saved[1], "discriminant")
    found = evaluation.compare(first, second, before, after, images, heads=(teacher, student))
    assert found.distance.nan_to_num().abs().max() < 1e-5
    assert found.distance.isfinite().any()
    by_itself = evaluation.compare(first, second, before, after, images)
    assert by_itself.distance.nan_to_num().max() > 0.1
    assert torch.equal(found.student_logits, by_itself.student_logits)


def test_how_far_means_are_off_is_in_units_of_the_spread():
    features, labels = gaussians()
    known = plain(features, labels)
    assert evaluation.means_off(known, features, labels) == pytest.approx([0, 0, 0], abs=1e-9)
    shift = torch.tensor([3.0, 0, 4.0, 0], dtype=torch.float64)
    off = evaluation.means_off(known, features + shift, labels)
    assert off == pytest.approx([5 / known.covariances[label].trace().sqrt().item() for label in range(3)])
    assert evaluation.means_off(known, features[labels > 0], labels[labels > 0])[0] is None


@pytest.mark.parametrize("times", [1, 2, 3])
def test_of_one_image_nothing_is_said_to_be_off(times):
    features, labels = gaussians()
    known, same = plain(features, labels), features[:1].repeat(times, 1)
    seen, of = torch.cat([same, features[labels > 0]]), torch.cat([labels[:times], labels[labels > 0]])
    for measure in (evaluation.means_off, evaluation.covariances_off):
        assert measure(known, seen, of) == [None, *(pytest.approx(0, abs=1e-9) for _ in range(2))]


def test_how_far_covariances_are_off_is_relative_to_those_of_the_images():
    features, labels = gaussians()
    known = plain(features, labels)
    assert evaluation.covariances_off(known, features + 1, labels) == pytest.approx([0, 0, 0], abs=1e-9)
    assert evaluation.covariances_off(known, 2 * features, labels) == pytest.approx([3 / 4] * 3)
    assert evaluation.covariances_off(known, features[labels > 0], labels[labels > 0])[0] is None
