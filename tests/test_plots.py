"""What figures do with the names of strangers, and with very many of them."""

import io

import numpy as np
import pytest

from lwm.reporting import plots

DOLLARS = ["US$ and A$", "a$_$"]  # the first would be set as mathematics, the second is none


def test_dollars_in_a_name_are_no_formula(tmp_path):
    source = plots.svg(plots.confusion, np.eye(2), DOLLARS).decode()
    assert all(source.count(f">{name}<") == 2 for name in DOLLARS)
    captions = [(name, name, name) for name in DOLLARS]
    plots.side_by_side(np.zeros((2, 3, 8, 8), np.uint8), captions, np.ones((2, 2, 4, 4)), "title", tmp_path / "it.png")


@pytest.mark.parametrize(("classes", "every"), [(5, 1), (1000, 9)])
def test_of_very_many_classes_some_are_named_in_a_figure_of_bounded_size(monkeypatch, classes, every):
    figures = []
    monkeypatch.setattr(plots, "write", lambda figure, *arguments: figures.append(figure))
    names = [f"class {number}" for number in range(classes)]
    plots.confusion(np.eye(classes), names, io.BytesIO())
    axes = figures[0].axes[0]
    assert max(figures[0].get_size_inches()) <= 41
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == names[::every]
    plots.plt.close("all")
