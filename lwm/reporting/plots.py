"""Every figure, drawn without a screen."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from PIL import Image

from lwm.experiments.intervals import interval
from lwm.runtime.checkpoint import write_atomically


def _write(figure: plt.Figure, path: Path | io.BytesIO, drawn_from: str | None = None) -> None:
    """``drawn_from`` goes into the file, so that it can be told from one that was drawn from other figures."""
    if isinstance(path, io.BytesIO):
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "same figure, same file"}):
            figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Description": drawn_from})
    plt.close(figure)
    write_atomically(path, buffer.getbuffer())


def svg(draw: Callable[..., None], *content: Any) -> bytes:
    """The figure that ``draw`` makes of ``content``, as SVG and not in a file."""
    buffer = io.BytesIO()
    draw(*content, buffer)
    return buffer.getvalue()


def _under(heat: np.ndarray, pixels: np.ndarray, peak: float) -> np.ndarray:
    height, width = pixels.shape[1:]
    scaled = np.clip(heat / peak, 0, 1) if peak > 0 else np.zeros_like(heat)
    grown = Image.fromarray(scaled.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    colours = matplotlib.colormaps["inferno"](np.asarray(grown))[..., :3]
    grey = pixels.mean(0)[..., None] / 255
    return np.round(255 * (0.6 * colours + 0.4 * grey)).astype(np.uint8)


def overlay(pixels: np.ndarray, heat: np.ndarray | None, peak: float) -> bytes:
    """A PNG (a JPEG from 128 px on) of an image uint8 (3, H, W), under its map (h, w) >= 0 where there is one.

    ``peak`` is the value drawn in the strongest colour: one for all maps that are to be compared.
    """
    picture = pixels.transpose(1, 2, 0) if heat is None else _under(heat, pixels, peak)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG" if picture.shape[1] < 128 else "JPEG", quality=85)
    return buffer.getvalue()


def strips(pixels: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Images uint8 (n, 3, H, W) below each other, each beside its maps (n, m, h, w) >= 0, all maps on one scale.

    Returns uint8 (n H, (1 + m) W, 3).
    """
    peak = float(maps.max())
    rows = [
        [image.transpose(1, 2, 0), *(_under(heat, image, peak) for heat in own)]
        for image, own in zip(pixels, maps, strict=True)
    ]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def curves(log: Sequence[dict[str, Any]], title: str, path: Path | io.BytesIO) -> None:
    """Loss terms and accuracies over the epochs, beside each other."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name in ("loss", "classification", "distillation", "attention"):
        if name in log[0]:
            left.plot([row["epoch"] for row in log], [row[name] for row in log], label=name)
    left.set(title=f"{title}: loss terms", xlabel="epoch", ylabel="loss (mean over images)")
    names = [name for name in dict.fromkeys(key for row in log for key in row) if "accuracy" in name]
    for name in names:
        points = [(row["epoch"], row[name]) for row in log if row.get(name) is not None]
        if points:
            right.plot(
                *zip(*points, strict=True),
                "-" if name == "accuracy" else "o-",
                label="training accuracy" if name == "accuracy" else name.replace("_", " "),
            )
    right.set(title=f"{title}: accuracy", xlabel="epoch", ylabel="%", ylim=(-3, 103))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _write(figure, path)


def confusion(counts: np.ndarray, class_names: Sequence[str], path: Path | io.BytesIO) -> None:
    """Confusion matrix, a row for each true class, in percent of that class's images."""
    totals = counts.sum(1, keepdims=True)
    shares = 100 * counts / np.maximum(totals, 1)
    # Of very many classes only some are named: the figure's memory grows with its area.
    side = min(max(3.5, 0.32 * len(class_names) + 1.5), 40)
    named = range(0, len(class_names), -(-len(class_names) // 120))
    labels = [class_names[index] for index in named]
    figure, axes = plt.subplots(figsize=(side + 1, side))
    picture = axes.imshow(shares, cmap="Greys", vmin=0, vmax=100)
    axes.set(xlabel="answer", ylabel="true class, in the order taught")
    axes.set_xticks(named, labels, rotation=90, parse_math=False)  # dollars in a name are no formula
    axes.set_yticks(named, labels, parse_math=False)
    figure.colorbar(picture, label="% of the class's images")
    _write(figure, path)


def side_by_side(
    pixels: np.ndarray, captions: Sequence[tuple[str, str, str]], maps: np.ndarray, title: str, path: Path
) -> None:
    """A row an image: the image, the teacher's map over it, the student's, all maps on one scale.

    pixels uint8 (n, 3, H, W); captions (image, teacher, student) for each; maps (n, 2, h, w) >= 0.
    """
    count, _, height, width = pixels.shape
    peak = max(float(maps.max()), 1e-12)
    columns = 2 if count > 4 else 1
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, 3 * columns, figsize=(5.6 * columns, 2.05 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.axis("off")
    for number in range(count):
        row, first = number % rows, 3 * (number // rows)
        grey = pixels[number].mean(0)
        for offset, caption in enumerate(captions[number]):
            axes = grid[row, first + offset]
            axes.set_title(caption, fontsize=8, parse_math=False)
            if offset == 0:
                axes.imshow(pixels[number].transpose(1, 2, 0))
                continue
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
            heat = axes.imshow(
                maps[number, offset - 1],
                cmap="inferno",
                vmin=0,
                vmax=peak,
                alpha=0.6,
                interpolation="bilinear",
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
    figure.suptitle(title, fontsize=10)
    figure.colorbar(heat, ax=grid, label="Grad-CAM of the class named at the image", shrink=0.6)
    _write(figure, path)


def growth(tables: dict[str, Sequence[dict[str, str]]], path: Path) -> None:
    """How a step's cost grows: rows of benchmarks/growth.py's CSVs by "classes", "size" and "steps"."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))

    def column(name: str, key: str) -> list[float]:
        return [float(row[key]) for row in tables[name]]

    for place, name, key, label in ((0, "classes", "outputs", "outputs"), (1, "size", "px", "image size, px")):
        for method, shown, line in (("finetune", "fine-tuning", "o-"), ("lwm", "lwm", "s--")):
            axes[place].plot(column(name, key), column(name, f"{method}_ms"), line, label=shown)
        axes[place].set(xlabel=label, ylabel="ms a step", xscale="log")
        axes[place].set_xticks(column(name, key), [row[key] for row in tables[name]])
        axes[place].minorticks_off()
    axes[0].set(title="128 images of 32 px", ylim=(0, 1.2 * max(column("classes", "lwm_ms"))))
    axes[1].set(title="32 images", yscale="log")
    steps = column("steps", "step")
    axes[2].plot(steps, column("steps", "images_per_second"), "o-", label="images/s in training")
    axes[2].plot(steps, column("steps", "checkpoint_kb"), "s--", label="checkpoint, kB")
    axes[2].set(xlabel="step (0: the teacher's)", ylim=(0, None), title="ten steps in a row")
    for each in axes:
        each.grid(alpha=0.3)
        each.legend(fontsize=8)
    _write(figure, path)


# Of protocols: mean over the seeds with its 95 % interval, told apart by marker and line and not by colour alone -----

FEWEST = 5  # classes in a mean with an interval
STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:")


def _mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half its 95 % interval."""
    low, high = interval(values)
    return (low + high) / 2, (high - low) / 2


def _errorbar(
    axes: plt.Axes, number: int, label: str, places: Sequence[float], values: Sequence[Any], **across: Any
) -> list[float]:
    """The means that are drawn; a method keeps its ``number`` in every panel, and with it style and colour."""
    means, halves = zip(*(_mean_and_half(each) for each in values), strict=True)
    look: dict[str, Any] = {
        "fmt": STYLES[number % len(STYLES)],
        "color": f"C{number}",
        "capsize": 2,
        "markersize": 5,
        "linewidth": 1.2,
    }
    axes.errorbar(places, means, halves, label=label, **look, **across)
    return list(means)


def over_steps(
    panels: dict[str, dict[str, dict[int, list[float]]]],
    path: Path,
    drawn_from: str,
    lost: dict[str, list[tuple[float, float]]] | None = None,
) -> None:
    """A panel for each label of a vertical axis: for each method, step -> the values of the seeds.

    ``lost`` adds one: for each method, classes in a step as (distance of the maps, accuracy lost), fifths by distance
    of at least FEWEST each, if any method has so many.
    """
    enough = any(len(pairs) >= 5 * FEWEST for pairs in (lost or {}).values())
    count = len(panels) + enough
    figure, grid = plt.subplots(1, count, figsize=(5.2 * count, 3.8), squeeze=False, layout="constrained")
    for axes, (label, methods) in zip(grid[0], panels.items(), strict=False):
        for number, (name, by_step) in enumerate(methods.items()):
            places = [step + 0.05 * (number - len(methods) / 2) for step in by_step]
            if places:
                _errorbar(axes, number, name, places, list(by_step.values()))
        steps = sorted({step for by_step in methods.values() for step in by_step})
        axes.set(xlabel="step (0: the first classes)", ylabel=label, xticks=steps)
        axes.margins(x=0.05 if len(steps) > 1 else 1)
    for number, (name, pairs) in enumerate((lost or {}).items()):
        fifths = np.array_split(np.array(sorted(pairs)), 5) if len(pairs) >= 5 * FEWEST else []
        places = [part[:, 0].mean() for part in fifths]
        if len(set(places)) > 1:  # maps that never move are not shown
            _errorbar(grid[0][-1], number, name, places, [part[:, 1] for part in fifths])
    if enough:
        grid[0][-1].set(xlabel="distance of the maps (L_AD), fifths", ylabel="accuracy of the class lost, points")
    for axes in grid[0]:
        axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=8)
    _write(figure, path, drawn_from)


def plane(curves: dict[str, list[tuple[str, list[float], list[float]]]], path: Path, drawn_from: str) -> None:
    """Old against new accuracy after the last step: a curve for each key, through (label, old, new) over the seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 5))
    for number, (name, points) in enumerate(curves.items()):
        new, across = zip(*(_mean_and_half(values) for _, _, values in points), strict=True)
        old = _errorbar(axes, number, name, new, [values for _, values, _ in points], xerr=across, elinewidth=0.5)
        order = sorted(range(len(points)), key=new.__getitem__)
        for rank, point in enumerate(order):  # neighbours' labels on either side, that they do not cover each other
            axes.annotate(
                points[point][0],
                (new[point], old[point]),
                xytext=(3, (4, -10)[rank % 2]),
                textcoords="offset points",
                fontsize=8,
                color=f"C{number}",
                path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
            )
    axes.set(xlabel="accuracy of the newest classes, no hint, %", ylabel="accuracy of all older classes, no hint, %")
    # Intervals of few seeds reach beyond what an accuracy can be.
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(max(left, -3), min(right, 103)), ylim=(max(bottom, -3), min(top, 103)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    _write(figure, path, drawn_from)
