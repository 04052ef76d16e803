"""Rows in closed form, against discriminant analysis done otherwise, and what they cost old classes."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lwm import classifiers, closed_form
from lwm.closed_form import new_rows
from lwm.runtime.errors import InputError

OLD, NEW, CHANNELS, IMAGES = 12, 4, 24, 40


def gaussians(seed=0, images=IMAGES):
    """Features, their labels and the true means and covariance of OLD + NEW Gaussian classes."""
    random = np.random.default_rng(seed)
    shape = random.normal(size=(CHANNELS, CHANNELS)) / CHANNELS**0.5 + np.eye(CHANNELS)
    means = 2 * random.normal(size=(OLD + NEW, CHANNELS)) @ shape.T + 1
    labels = np.repeat(np.arange(OLD + NEW), images)
    features = means[labels] + random.normal(size=(len(labels), CHANNELS)) @ shape.T
    return torch.tensor(features), torch.tensor(labels), torch.tensor(means), torch.tensor(shape @ shape.T)


def taught(seed=0):
    """A head for the old classes, by scikit-learn, and the new classes' images with labels from 0."""
    features, labels, _, _ = gaussians(seed)
    old = labels < OLD
    model = LinearDiscriminantAnalysis().fit(features[old], labels[old])
    head = torch.tensor(model.coef_), torch.tensor(model.intercept_)
    return head, features[~old], labels[~old] - OLD


def right(head, rows, features, labels):
    weight, bias = (torch.cat(parts) for parts in zip(head, rows, strict=True))
    return float(((features @ weight.T + bias).argmax(1) == labels).double().mean())


def test_rows_are_those_of_discriminant_analysis():
    features, labels, _, _ = gaussians()
    model = LinearDiscriminantAnalysis(solver="lsqr").fit(features, labels)
    means, covariance = torch.tensor(model.means_), torch.tensor(model.covariance_)
    weight, bias = closed_form._Gaussians(means[OLD:], means.mean(0), torch.linalg.cholesky(covariance)).rows()
    # scikit-learn's have no centre: theirs differ by what all classes have in common.
    theirs = features @ torch.tensor(model.coef_).T + torch.tensor(model.intercept_)
    ours = features @ weight.T + bias
    common = theirs[:, OLD:] - ours
    torch.testing.assert_close(common, common[:, :1].expand_as(common))


def test_old_and_new_are_told_apart_without_an_old_image():
    head, images, labels = taught()
    features, truth, _, _ = gaussians(seed=0)
    rows = new_rows(head, images, labels)
    assert rows[0].shape == (NEW, CHANNELS) and rows[1].shape == (NEW,)
    old = truth < OLD
    assert right(head, rows, features[old], truth[old]) > 0.9
    assert right(head, rows, features[~old], truth[~old]) > 0.9


def test_what_is_favoured_moves_new_biases_alone_and_one_class_will_do():
    head, images, labels = taught()
    for many in (labels >= 0, labels == 0):
        rows = [new_rows(head, images[many], labels[many], favour) for favour in ("old", "balanced", "new")]
        assert all(torch.equal(weight, rows[0][0]) for weight, _ in rows)
        shifts = [float((bias - rows[0][1]).mean()) for _, bias in rows]
        assert shifts == sorted(shifts)
        assert all(
            torch.allclose(bias - rows[0][1], bias.new_tensor(shift))
            for (_, bias), shift in zip(rows, shifts, strict=True)
        )
    with pytest.raises(InputError, match="two images"):
        new_rows(head, images[:41], labels[:41])


def test_a_head_knows_the_means_of_its_classes_up_to_one_offset():
    """And up to their length, which S changes. The centre alone, the floor, has a cosine of 0 with what is centred."""
    head, images, labels = taught()
    features, truth, means, _ = gaussians()
    derived = closed_form.derived_statistics(head, images, labels)
    assert derived.derived.tolist() == [1.0] * OLD
    centred, true = (each - each.mean(0) for each in (derived.means, means[:OLD]))
    assert float(torch.cosine_similarity(centred.flatten(), true.flatten(), dim=0)) > 0.3
    old = truth < OLD
    weight, bias = classifiers.lda(derived)
    right = ((features[old] @ weight.T + bias).argmax(1) == truth[old]).double().mean()
    by_head = ((features[old] @ head[0].T + head[1]).argmax(1) == truth[old]).double().mean()
    assert right > by_head - 0.2 > 5 / OLD


@pytest.mark.parametrize("same", ["means", "everything"])
def test_classes_that_do_not_differ_get_finite_rows(same):
    head, images, labels = taught()
    images = images - torch.stack([images[labels == label].mean(0) for label in range(NEW)])[labels]
    if same == "everything":
        images = torch.ones_like(images)
    assert all(part.isfinite().all() for part in new_rows(head, images, labels))
