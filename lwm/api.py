"""A trained model in a Python program: ``from lwm import Classifier``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lwm import closed_form
from lwm.attention import last_map
from lwm.calibration import calibrate
from lwm.classifiers import answer_with, to_checkpoint
from lwm.evaluation import predict
from lwm.images.batches import to_input
from lwm.images.datasets import Place, open_source
from lwm.images.files import decode_image, fitted, from_pillow
from lwm.models import Build, Network, replace_head
from lwm.probabilities import is_unknown, likeliest
from lwm.runtime.checkpoint import batch_size_of, load, restore_model, save, whole
from lwm.runtime.errors import InputError
from lwm.runtime.files import write_atomically
from lwm.runtime.run_folder import TASK_SETTINGS, describe_task
from lwm.task import Task, new_classes, student_of

CALIBRATION = 0.1  # of a new class's images, as in config.py

Picture = str | Path | np.ndarray | Image.Image | Tensor  # a file, uint8 (H, W, 3), Pillow's, or uint8 (3, H, W)


class Answer(NamedTuple):
    label: str  # the likeliest class
    probability: float
    unknown: bool  # less like any class than the share of images of taught classes that was asked for


class Classifier:
    """A network with what answers for it; a picture is a file, an array uint8 (H, W, 3), Pillow's, or a tensor uint8
    (3, H, W).

    classifier = Classifier.load("runs/first/student_model.pth")
    print(classifier.predict(["cat.png"], unknown=0.05))
    heat = classifier.explain("cat.png")
    classifier.add_classes("photos").save("wider.pth")
    """

    def __init__(self, saved: dict[str, Any], classifier: str = "auto", build: Build | None = None) -> None:
        """Of a whole checkpoint; the arguments are those of ``load``."""
        self._saved, self._asked, self._build = saved, classifier, build
        network, self.checkpoint = answer_with(restore_model(saved, build), saved, classifier)
        self.network: Network = network.eval()
        self.class_names: list[str] = saved["class_names"]

    @classmethod
    def load(cls, path: str | Path, classifier: str = "auto", build: Build | None = None) -> Classifier:
        """Of a checkpoint; ``classifier`` is auto, head, ncm, lda or aligned. Raises InputError.

        Of a network of your own, ``build(classes)`` makes the ``nn.Module``, as in models/own.py.
        """
        return cls(load(path), classifier, build)

    def save(self, path: str | Path) -> None:
        """A checkpoint, for ``load`` and for the scripts; it takes the place of a file that is there."""
        save(Path(path), self._saved)

    def export(self, path: str | Path, input: str = "float32", maps: bool = False) -> None:
        """An ONNX file, as export.py writes it. Raises InputError for maps that have no closed form, and RunError."""
        from lwm.exporting import exported  # needs onnx and its runtime

        content, _ = exported(self.network, self.checkpoint, input, maps)
        write_atomically(Path(path), content)

    def add_classes(self, folder: str | Path, favour: str = "balanced") -> Classifier:
        """One that also knows the classes of ``folder``/<class>/, in closed form: nothing is trained.

        Folders of known classes are left out. A tenth of the images calibrates. ``favour`` is old, balanced or new.
        Raises InputError if there is no new class, for one with fewer than two images, and for one that cannot be read.
        """
        before = self._saved
        source = open_source(Place("folder", str(folder), calibration=CALIBRATION), before["image_size"])
        new = new_classes(source, before["class_names"])
        outputs, batch_size = [*before["class_names"], *new], batch_size_of(before)
        train, held = source.train(new, outputs), source.held_back(new, outputs)
        test = source.test([name for name in new if source.has_test(name)], outputs)
        form = closed_form.form_after(before)
        network = restore_model(before, self._build)  # the features of which the new head does not move
        task = Task(network, network, before, train, test, False, batch_size, favour)
        task.warn(sigmoids=form == "binary")
        replace_head(network, *task.head())
        settings = dict.fromkeys(TASK_SETTINGS) | {"dataset": "folder", "data_dir": str(folder), "epochs": 0}
        settings |= {"method": "closed-form", "loss_form": form, "batch_size": batch_size}
        settings |= {"calibration": CALIBRATION, "hold_back": 0.0}
        described = describe_task(SimpleNamespace(**settings), new, None, source.record(test), images=len(train.labels))
        saved = whole(student_of(before, described))
        saved |= {
            "statistics": to_checkpoint(task.seen),
            "model": network.state_dict(),
            "finished": True,
            "training": {},
        }
        calibrate(network, saved, task.seen, held, batch_size, before)
        described |= {"answers": task.answers(saved), "seconds": round(task.seconds * len(train.labels), 1)}
        return Classifier(saved, self._asked, self._build)

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
        if isinstance(picture, Image.Image):
            return from_pillow(picture, size)
        if isinstance(picture, Tensor):
            if picture.dtype != torch.uint8 or picture.dim() != 3:
                raise InputError(f"a tensor uint8 (3, H, W) is needed, not {picture.dtype} {tuple(picture.shape)}")
            picture = picture.cpu().numpy().transpose(1, 2, 0)
        return fitted(picture, size) if isinstance(picture, np.ndarray) else decode_image(picture, size)
