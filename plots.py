"""Every figure, drawn without a screen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from checkpoint import write_atomically


def _write(figure: plt.Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, buffer.getbuffer())


def curves(log: Sequence[dict[str, Any]], path: Path, title: str) -> None:
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


def confusion(counts: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Confusion matrix, a row for each true class, in percent of that class's images."""
    totals = counts.sum(1, keepdims=True)
    shares = 100 * counts / np.maximum(totals, 1)
    side = max(3.5, 0.32 * len(class_names) + 1.5)
    figure, axes = plt.subplots(figsize=(side + 1, side))
    picture = axes.imshow(shares, cmap="Greys", vmin=0, vmax=100)
    axes.set(xlabel="answer of the student", ylabel="true class, in the order taught")
    axes.set_xticks(range(len(class_names)), class_names, rotation=90)
    axes.set_yticks(range(len(class_names)), class_names)
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
            axes.set_title(caption, fontsize=8)
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
