"""What figures do with the names of strangers, and with very many of them."""

import io
import warnings

import fontTools.ttLib
import numpy as np
import pytest
from matplotlib import font_manager

from lwm.reporting import plots
from lwm.runtime.errors import start_log

DOLLARS = ["US$ and A$", "a$_$"]  # the first would be set as mathematics, the second is none


def test_dollars_in_a_name_are_no_formula(tmp_path):
    source = plots.svg(plots.confusion, np.eye(2), DOLLARS).decode()
    assert all(source.count(f">{name}<") == 2 for name in DOLLARS)
    runs = [(name, [90.0, None], [90.0, 80.0]) for name in (*DOLLARS, "_under")]
    source = plots.svg(plots.accuracy_over_tasks, runs).decode()
    assert all(source.count(f">{name}<") == 1 for name, *_ in runs)
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


def test_letters_that_no_font_has_are_said_in_one_line(tmp_path, capsys):
    start_log()
    names = ["\U00010a00猫", "dog"]  # Kharoshthi: no system has all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.confusion(np.eye(2), names, tmp_path / "it.png")
        captions = [(name, name, name) for name in names]
        plots.side_by_side(
            np.zeros((2, 3, 8, 8), np.uint8), captions, np.ones((2, 2, 4, 4)), "title", tmp_path / "b.png"
        )
    assert len(capsys.readouterr().err.splitlines()) == 2  # one for each picture
    plots.svg(plots.confusion, np.eye(2), names)
    assert capsys.readouterr().err == ""  # whoever opens it has fonts of their own


def test_a_font_of_the_system_that_has_the_letters_is_taken(tmp_path, capsys, monkeypatch):
    """A font in which the letter is drawn as an A."""
    font = fontTools.ttLib.TTFont(font_manager.findfont("DejaVu Sans"))
    for table in font["cmap"].tables:
        table.cmap = {0x10A10: table.cmap[ord("A")]} if table.format == 12 else {}
    for record in font["name"].names:
        record.string = "Kharoshthi Test"
    font.save(tmp_path / "font.ttf")
    start_log()
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    for name, said in (("\U00010a10", 1), ("A", 0)):
        plots.confusion(np.eye(2), [name, "b"], tmp_path / f"{said}.png")
        assert len(capsys.readouterr().err.splitlines()) == said
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    plots.confusion(np.eye(2), ["\U00010a10", "b"], tmp_path / "found.png")
    assert capsys.readouterr().err == ""
    pictures = [plots.Image.open(tmp_path / f"{name}.png").tobytes() for name in ("found", "0", "1")]
    assert pictures[0] == pictures[1] != pictures[2]
