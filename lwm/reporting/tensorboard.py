"""TensorBoard, if a run asks for it: settings, a curve for each number of an epoch, and maps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lwm.reporting import plots
from lwm.runtime.errors import InputError, process_number
from lwm.runtime.files import require_folder

SHOWN = 12  # images with their maps


class Board:
    """What a run writes to ``folder``/tensorboard/``role``; nothing unless ``settings.tensorboard``."""

    def __init__(self, settings: Any, folder: Path, role: str) -> None:
        """Raises InputError if TensorBoard is not installed, or if its folder cannot be written."""
        self.settings, self.role, self.path = settings, role, folder / "tensorboard" / role
        self.make: Any = None
        if settings.tensorboard and not process_number():
            require_folder(settings.where("tensorboard"), self.path)
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(f"{settings.where('tensorboard')}: pip install tensorboard first") from error
            self.make = SummaryWriter

    @functools.cached_property
    def writer(self) -> Any:
        """Made when there is something to write: a run that is refused leaves no trace."""
        writer = self.make(str(self.path))
        shown = {name: value for name, value in vars(self.settings).items() if name not in ("given", "arguments")}
        writer.add_text("settings", "\n".join(f"    {name} = {value!r}" for name, value in shown.items()))
        return writer

    def write(self, row: dict[str, Any]) -> None:
        """The numbers of an epoch."""
        if self.make is None:
            return
        for name, value in row.items():
            if value is not None and name != "epoch":
                self.writer.add_scalar(f"{self.role}/{name}", value, row["epoch"])
        self.writer.flush()

    def maps(self, pixels: Tensor, maps: Tensor, epoch: int) -> None:
        """Some of the images uint8 (n, 3, H, W), each beside its m maps (n, m, h, w) on one scale."""
        if self.make is not None and len(pixels):
            some = slice(None, None, -(-len(pixels) // SHOWN))
            images, heats = pixels[some].numpy(), maps[some].numpy()
            rows = [
                np.concatenate(
                    [image.transpose(1, 2, 0), *(plots.overlay(image, heat, heats.max()) for heat in own)], 1
                )
                for image, own in zip(images, heats, strict=True)
            ]
            self.writer.add_image(f"{self.role}/maps", np.concatenate(rows), epoch, dataformats="HWC")
            self.writer.flush()
