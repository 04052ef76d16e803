"""Watching a run: a bar, a line an epoch, TensorBoard where it is asked for, and a last line for programs."""

from __future__ import annotations

import functools
import io
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lwm.runtime.errors import InputError, process_number

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

STRIPS = 12  # images that TensorBoard shows with their maps


class _Silent(io.TextIOBase):
    """Takes what is printed, and keeps the stream that it would have gone to."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text)


def be_quiet() -> None:
    """From now on nothing that is printed is shown, but for ``last_line``; errors.one_line_errors ends it."""
    sys.stdout = _Silent(sys.stdout)


def bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm's, where somebody watches a terminal: not with ``--quiet``, nor in the other processes of a torchrun job."""
    from tqdm import tqdm

    hidden = isinstance(sys.stdout, _Silent) or process_number()
    return tqdm(items, disable=True if hidden else None, leave=False, **options)


def last_line(settings: Any, values: dict[str, Any]) -> None:
    """With ``--json``, one JSON object on a line of its own."""
    if settings.json:
        print(json.dumps(values), file=getattr(sys.stdout, "stream", sys.stdout))


def print_readouts(readouts: dict[str, dict[str, float | None]], answering: str) -> None:
    """A line for each read-out with its accuracies in percent, where there are any; the one that answers is marked."""
    columns = {"accuracy": "all", "accuracy_old": "old", "accuracy_new": "new"}
    if readouts:
        print(f"read-out, no hint, %  {''.join(f'{shown:>8}' for shown in columns.values())}")
    for name, accuracies in readouts.items():
        cells = ["-" if (value := accuracies.get(key)) is None else f"{value:.1f}" for key in columns]
        print(f"  {name:<20}{''.join(f'{cell:>8}' for cell in cells)}{'  <- answers' if name == answering else ''}")


class Watch:
    """Called with every epoch's row: prints it in a line, and writes its numbers for TensorBoard."""

    def __init__(self, settings: Any, folder: Path, kind: str) -> None:
        """Raises InputError where TensorBoard is asked for and not installed."""
        self.epochs, self.kind, self.started, self.done = settings.epochs, kind, time.perf_counter(), 0
        self.settings, self.folder, self.writer = settings, folder / "tensorboard" / kind, None
        if settings.tensorboard and not process_number():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(f"{settings.where('tensorboard')}: pip install tensorboard first") from error
            self.writer = SummaryWriter

    @functools.cached_property
    def board(self) -> Any:
        """Made when there is something to write: a run that is refused leaves no trace."""
        if self.writer is None:
            return None
        board = self.writer(str(self.folder))
        shown = {name: value for name, value in vars(self.settings).items() if name not in ("given", "arguments")}
        board.add_text("settings", "\n".join(f"    {name} = {value!r}" for name, value in shown.items()))
        return board

    def __call__(self, row: dict[str, Any]) -> None:
        self.done += 1
        print(line_of(row, self.epochs, (time.perf_counter() - self.started) / self.done), flush=True)
        if self.board:
            for name, value in row.items():
                if value is not None and name != "epoch":
                    self.board.add_scalar(f"{self.kind}/{name}", value, row["epoch"])
            self.board.flush()

    def maps(self, pixels: Tensor, maps: Tensor) -> None:
        """For TensorBoard, some of the images uint8 (n, 3, H, W), each beside its m maps (n, m, h, w) on one scale."""
        if self.board and len(pixels):
            from lwm.reporting import plots

            some = slice(None, None, -(-len(pixels) // STRIPS))
            strips = plots.strips(pixels[some].numpy(), maps[some].numpy())
            self.board.add_image(f"{self.kind}/maps", strips, self.epochs, dataformats="HWC")
            self.board.flush()


def line_of(row: dict[str, Any], epochs: int, seconds: float) -> str:
    """An epoch's loss with its terms, accuracies in percent, speed and the time left at ``seconds`` an epoch."""
    terms = [f"{name} {row[name]:.3g}" for name in ("classification", "distillation", "attention") if name in row]
    shown = [f"loss {row['loss']:.3g} ({', '.join(terms)})", f"training accuracy {row['accuracy']:.1f} %"]
    if row.get("test_accuracy") is not None:
        shown.append(f"test accuracy {row['test_accuracy']:.1f} %")
    shown.append(f"{row['images_per_second']:.0f} images/s")
    left = seconds * (epochs - row["epoch"])
    if left:
        shown.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
    return f"epoch {row['epoch']}/{epochs}: {', '.join(shown)}"
