"""The figures of a run, drawn without a screen."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from PIL import Image

from lwm.runtime.errors import log
from lwm.runtime.files import write_atomically

SMALLEST = 320  # px of a photograph's longer side from which it is shown at its own size


def write(figure: plt.Figure, path: Path | io.BytesIO, drawn_from: str | None = None, **how: Any) -> None:
    """As PNG into a file, or as SVG into a buffer; the figure is closed.

    ``drawn_from`` goes into the file, so that it can be told from one that was drawn from other numbers. ``how`` are
    options of ``Figure.savefig``.
    """
    if isinstance(path, io.BytesIO):
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "same figure, same file"}):
            figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        return
    buffer = io.BytesIO()
    how = {"dpi": 120, "bbox_inches": "tight", **how}
    figure.savefig(buffer, format="png", metadata={"Description": drawn_from}, **how)
    plt.close(figure)
    write_atomically(path, buffer.getbuffer())


@contextlib.contextmanager
def fonts_for(texts: Iterable[str], path: Path | io.BytesIO) -> Iterator[None]:
    """Within it, figures have fonts of this system for all letters of ``texts``; letters that none has are said.

    Nothing is said of an SVG, whose letters its reader draws.
    """
    missing = {letter for letter in "".join(texts) if letter.isprintable()} - _letters(font_manager.findfont("sans"))
    families = list(plt.rcParams["font.family"])
    for font in font_manager.fontManager.ttflist if missing else ():
        if not font.name.startswith("Last Resort") and (has := missing & _letters(font.fname)):  # which draws boxes
            families.append(font.name)
            missing -= has
    if missing and isinstance(path, Path):
        named = "".join(sorted(missing)[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        log.warning(f"{path} has boxes in place of letters: no font of this system has {named}; install one")
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")
        yield


def _letters(font: str) -> set[str]:
    try:
        return set(map(chr, font_manager.get_font(font).get_charmap()))
    except (OSError, RuntimeError):  # a font that matplotlib cannot draw with
        return set()


def svg(draw: Callable[..., None], *content: Any) -> bytes:
    """The figure that ``draw`` makes of ``content``, as SVG and not in a file."""
    buffer = io.BytesIO()
    draw(*content, buffer)
    return buffer.getvalue()


def overlay(pixels: np.ndarray, heat: np.ndarray, peak: float) -> np.ndarray:
    """The map (h, w) >= 0 over the image uint8 (3, H, W), as uint8 (H, W, 3).

    The image is grey, and the more covered the stronger the map is. ``peak`` is the value in the strongest colour: pass
    one peak for all maps whose strengths are to be compared, since a map stretched for itself always looks strong.
    """
    height, width = pixels.shape[1:]
    scaled = np.clip(heat / peak, 0, 1) if peak > 0 else np.zeros_like(heat)
    grown = Image.fromarray(scaled.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return _coloured(pixels.mean(0), np.asarray(grown))


def _coloured(grey: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of grey values (H, W) from 0 to 255 and strengths (H, W) from 0 to 1."""
    cover = 0.7 * strength[..., None]
    colours = matplotlib.colormaps["inferno"](0.25 + 0.75 * strength)[..., :3]  # its darkest quarter looks like shade
    return np.round(255 * cover * colours + (1 - cover) * grey[..., None]).astype(np.uint8)


def covered(whole: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A photograph uint8 (3, H, W) with the map (h, w) over its middle square, as uint8 (H, W, 3)."""
    picture = whole.transpose(1, 2, 0).copy()
    top, left, side = _middle(*picture.shape[:2])
    square = picture[top : top + side, left : left + side]
    square[:] = overlay(square.transpose(2, 0, 1), heat, float(heat.max()))
    return picture


def _middle(height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side of the middle square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def photograph(whole: np.ndarray, heat: np.ndarray, label: str, path: Path) -> None:
    """A photograph uint8 (3, H, W) with the map (h, w) of its middle square, which is marked, and a colour bar.

    One pixel of the file is one of the photograph; a small one is enlarged by a whole number.
    """
    times = max(1, SMALLEST // max(whole.shape[1:]))
    picture = covered(whole.repeat(times, axis=1).repeat(times, axis=2), heat)
    height, width = picture.shape[:2]
    top, left, side = _middle(height, width)
    peak = float(heat.max())
    with fonts_for([label], path):
        dpi, wide, tall = 100, width + 110, max(height, SMALLEST)
        figure = plt.figure(figsize=(wide / dpi, tall / dpi))
        axes = figure.add_axes((0, (tall - height) // 2 / tall, width / wide, height / tall))
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.axis("off")
        for colour, style in (("black", "-"), ("white", "--")):
            corner = (left - 0.5, top - 0.5)
            edge = plt.Rectangle(corner, side, side, edgecolor=colour, linestyle=style, linewidth=2, fill=False)
            axes.add_patch(edge)
        bar = figure.add_axes(((width + 15) / wide, 0.05, 15 / wide, 0.9))
        shades = _coloured(np.full((256, 1), 160.0), np.linspace(1, 0, 256)[:, None])
        bar.imshow(shades, extent=(0, 1, 0, peak or 1), aspect="auto")
        bar.yaxis.tick_right()
        bar.yaxis.set_label_position("right")
        bar.set_xticks([])
        bar.set_ylabel(label, parse_math=False)
        write(figure, path, dpi=dpi, bbox_inches=None)


def encode(picture: np.ndarray, kind: str | None = None) -> bytes:
    """uint8 (H, W, 3) as a file of ``kind``; by default PNG, and JPEG from 128 px on."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind or ("PNG" if picture.shape[1] < 128 else "JPEG"), quality=85)
    return buffer.getvalue()


def curves(log: Sequence[dict[str, Any]], title: str, path: Path | io.BytesIO) -> None:
    """Loss terms and accuracies over the epochs, beside each other; one below the other for a page, as on a phone."""
    rows, columns, size = (2, 1, (6, 7)) if isinstance(path, io.BytesIO) else (1, 2, (10, 3.6))
    figure, (left, right) = plt.subplots(rows, columns, figsize=size, layout="constrained")
    for name in ("loss", "classification", "distillation", "attention"):
        if name in log[0]:
            left.plot([row["epoch"] for row in log], [row[name] for row in log], label=name)
    left.set(title=f"{title}: loss terms", xlabel="epoch", ylabel="loss (mean over images)")
    for name in [name for name in dict.fromkeys(key for row in log for key in row) if "accuracy" in name]:
        points = [(row["epoch"], row[name]) for row in log if row.get(name) is not None]
        style, label = ("-", "training accuracy") if name == "accuracy" else ("o-", name.replace("_", " "))
        if points:
            right.plot(*zip(*points, strict=True), style, label=label)
    right.set(title=f"{title}: accuracy of the head", xlabel="epoch", ylabel="%", ylim=(-3, 103))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    write(figure, path)


def accuracy_over_tasks(runs: Sequence[tuple[str, Sequence[float | None], Sequence[float | None]]], path: Any) -> None:
    """A line for each run: after each task the accuracy of all classes, and of the first task's."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    drawn = {}
    with fonts_for((name for name, *_ in runs), path):
        for (name, *lines), marker in zip(runs, itertools.cycle("os^Dv"), strict=False):
            for axis, values in zip(axes, lines, strict=True):
                numbers = [np.nan if value is None else value for value in values]
                (line,) = axis.plot(range(len(numbers)), numbers, marker=marker)
            drawn[name] = line
        for axis, title in zip(axes, ("all classes", "classes of the first task"), strict=True):
            axis.set(title=title, xlabel="task", ylim=(0, 102))
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_ylabel("right, %")
        legend = figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2, fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)  # dollars in a name are no formula
        write(figure, path)


def confusion(counts: np.ndarray, class_names: Sequence[str], path: Path | io.BytesIO) -> None:
    """Confusion matrix, a row for each true class, in percent of that class's images."""
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Of very many classes only some are named: the figure's memory grows with its area.
    side = min(max(3.5, 0.32 * len(class_names) + 1.5), 40)
    named = range(0, len(class_names), -(-len(class_names) // 120))
    labels = [class_names[index] for index in named]
    with fonts_for(labels, path):
        figure, axes = plt.subplots(figsize=(side + 1, side))
        picture = axes.imshow(shares, cmap="Greys", vmin=0, vmax=100)
        axes.set(xlabel="answer", ylabel="true class, in the order taught")
        axes.set_xticks(named, labels, rotation=90, parse_math=False)  # dollars in a name are no formula
        axes.set_yticks(named, labels, parse_math=False)
        figure.colorbar(picture, label="% of the class's images")
        write(figure, path)


def side_by_side(
    pixels: np.ndarray, captions: Sequence[tuple[str, str, str]], maps: np.ndarray, title: str, path: Path
) -> None:
    """A row an image: the image, the teacher's map over it, the student's, all maps on one scale.

    pixels uint8 (n, 3, H, W); captions (image, teacher, student) for each; maps (n, 2, h, w) >= 0.
    """
    with fonts_for([*itertools.chain(*captions), title], path):
        _side_by_side(pixels, captions, maps, title, path)


def _side_by_side(
    pixels: np.ndarray, captions: Sequence[tuple[str, str, str]], maps: np.ndarray, title: str, path: Path
) -> None:
    count, _, height, width = pixels.shape
    columns = 2 if count > 4 else 1
    rows = -(-count // columns)
    size = (5.6 * columns, 2.05 * rows + 0.6)
    figure, grid = plt.subplots(rows, 3 * columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    heat_style = {"cmap": "inferno", "vmin": 0, "vmax": max(float(maps.max()), 1e-12), "alpha": 0.6}
    heat_style |= {"interpolation": "bilinear", "extent": (-0.5, width - 0.5, height - 0.5, -0.5)}
    for number, (image, texts, heats) in enumerate(zip(pixels, captions, maps, strict=True)):
        row, first = number % rows, 3 * (number // rows)
        for axes, text in zip(grid[row, first : first + 3], texts, strict=True):
            axes.set_title(text, fontsize=8, parse_math=False)
        grid[row, first].imshow(image.transpose(1, 2, 0))
        for axes, heat in zip(grid[row, first + 1 : first + 3], heats, strict=True):
            axes.imshow(image.mean(0), cmap="gray", vmin=0, vmax=255)
            drawn = axes.imshow(heat, **heat_style)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(drawn, ax=grid, label="Grad-CAM of the class named at the image", shrink=0.6)
    write(figure, path)
