"""A trained model in a Python program: ``from lwm import Classifier``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lwm.attention import last_map
from lwm.classifiers import answer_with
from lwm.evaluation import predict
from lwm.images.batches import to_input
from lwm.images.files import decode_image, fitted
from lwm.models import Build, Network
from lwm.probabilities import is_unknown, likeliest
from lwm.runtime.checkpoint import batch_size_of, load, restore_model
from lwm.runtime.errors import InputError

Picture = str | Path | np.ndarray  # a file, or uint8 (H, W, 3)


class Answer(NamedTuple):
    label: str  # the likeliest class
    probability: float
    unknown: bool  # less like any class than the share of images of taught classes that was asked for


class Classifier:
    """A network with what answers for it; a picture is a file, or an array uint8 (H, W, 3).

    classifier = Classifier.load("runs/first/student_model.pth")
    print(classifier.predict(["cat.png"], unknown=0.05))
    heat = classifier.explain("cat.png")
    """

    def __init__(self, network: Network, checkpoint: dict[str, Any]) -> None:
        self.network, self.checkpoint = network.eval(), checkpoint
        self.class_names: list[str] = checkpoint["class_names"]

    @classmethod
    def load(cls, path: str | Path, classifier: str = "auto", build: Build | None = None) -> Classifier:
        """Of a checkpoint; ``classifier`` is auto, head, ncm, lda or aligned. Raises InputError.

        Of a network of your own, ``build(classes)`` makes the ``nn.Module``, as in models/own.py.
        """
        saved = load(path)
        return cls(*answer_with(restore_model(saved, build), saved, classifier))

    def predict(self, pictures: Sequence[Picture], unknown: float | None = None) -> list[Answer]:
        """An answer for each picture. Raises InputError for a file that cannot be read, and for ``unknown`` where no
        images were held back to judge it by.
        """
        if not len(pictures):
            return []
        logits = self.logits(np.stack([self._pixels(picture) for picture in pictures]))
        strange = np.zeros(len(logits), bool)
        if unknown is not None:
            strange = is_unknown(logits, self.unknown, unknown)
        best = [likeliest(row, self.class_names)[0] for row in logits]
        return [Answer(*pair, bool(each)) for pair, each in zip(best, strange, strict=True)]

    def explain(self, picture: Picture, class_name: str | None = None) -> np.ndarray:
        """Grad-CAM float32 (h, w), >= 0, of a class, by default the answer, over the centre square of the picture.

        Raises InputError for a class that the network does not know.
        """
        pixels = torch.from_numpy(self._pixels(picture))[None]
        with torch.no_grad():
            output = self.network(to_input(pixels, self.checkpoint["mean"], self.checkpoint["std"]))
        if class_name is not None and class_name not in self.class_names:
            raise InputError(f"there is no class {class_name!r}")
        label = output.logits.argmax(1)
        if class_name is not None:
            label = torch.tensor([self.class_names.index(class_name)])
        return last_map(output, label)[0].numpy()

    @property
    def unknown(self) -> list[float]:
        """Quantiles of how familiar images of taught classes are, for ``probabilities.is_unknown``; may be empty."""
        return self.checkpoint["unknown"].get(self.checkpoint["classifier"], [])

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """float32 (n, classes), calibrated, of uint8 (n, 3, size, size)."""
        channels = self.checkpoint["mean"], self.checkpoint["std"]
        return predict(self.network, torch.from_numpy(pixels), *channels, batch_size_of(self.checkpoint)).numpy()

    def _pixels(self, picture: Picture) -> np.ndarray:
        size = self.checkpoint["image_size"]
        return fitted(picture, size) if isinstance(picture, np.ndarray) else decode_image(picture, size)
