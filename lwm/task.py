"""What the features of a task's images tell: where new outputs begin, and the statistics of all classes afterwards."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from lwm import classifiers, closed_form, evaluation, verdict
from lwm.classifiers import ClassStatistics, Linear
from lwm.images.batches import Images
from lwm.models import Network
from lwm.runtime.errors import log


class Task:
    """New classes for a teacher: the features of its images ``train`` and ``test``, each taken once.

    ``moves`` says whether the student's backbone is trained; if not, its features are the teacher's. ``favour`` is for
    closed_form.new_rows. ``known`` are the statistics of the old classes; those of a teacher without any are derived.
    """

    def __init__(
        self,
        teacher: Network,
        student: Network,
        teacher_checkpoint: dict[str, Any],
        train: Images,
        test: Images,
        moves: bool,
        batch_size: int,
        favour: str,
    ) -> None:
        self.networks, self.images = {"teacher": teacher, "student": student}, {"train": train, "test": test}
        self.moves, self.batch_size, self.favour = moves, batch_size, favour
        self.channels = teacher_checkpoint["mean"], teacher_checkpoint["std"]
        self.old = len(teacher_checkpoint["class_names"])
        self.labels = train.labels - self.old  # among the new classes
        self.becomes_lda = closed_form.becomes_lda(teacher_checkpoint)
        self.rows = classifiers.linear_layer("head", None, teacher)
        self.seconds = 0.0  # that the network took for a training image
        self._known = classifiers.from_checkpoint(teacher_checkpoint)
        self._taken: dict[tuple[str, str], Tensor] = {}

    def features(self, of: str, images: str) -> Tensor:
        """(n, C) of the "train" or "test" images in the "teacher", or in the "student" once it is trained."""
        of = of if self.moves else "teacher"
        if (of, images) not in self._taken:
            started, pixels = time.perf_counter(), self.images[images].pixels
            network = self.networks[of]
            self._taken[of, images] = classifiers.features_of(network, pixels, *self.channels, self.batch_size)
            took = time.perf_counter() - started
            log.info(f"features of {len(pixels)} {images} images in the {of}: {took:.1f} s")
            if images == "train":
                self.seconds = took / len(pixels)
        return self._taken[of, images]

    @property
    def known(self) -> ClassStatistics:
        if self._known is None:
            log.info(
                f"statistics of the {self.old} old classes are derived from the teacher's head: none were measured"
            )
            self._known = closed_form.derived_statistics(self.rows, self.features("teacher", "train"), self.labels)
        return self._known

    def new_rows(self) -> Linear:
        return closed_form.new_rows(self.rows, self.features("teacher", "train"), self.labels, self.favour)

    def head(self) -> Linear:
        """Over all classes, in closed form: what there is without training."""
        if self.becomes_lda:
            return closed_form.lda_over_all(self.known, self.features("teacher", "train"), self.labels)
        weight, bias = self.new_rows()
        return torch.cat([self.rows[0], weight]), torch.cat([self.rows[1], bias])

    def logits(self, of: str) -> Tensor:
        """float32 (n, N) of the test images, by the head of the "teacher" or of the "student" as it is now."""
        layer = classifiers.linear_layer("head", None, self.networks[of])
        return evaluation.linear_logits(layer, self.features(of, "test"))

    def statistics(self) -> ClassStatistics:
        """Of all classes in the student, the old ones' with drift compensation."""
        before, after = self.features("teacher", "train"), self.features("student", "train")
        if self.moves:
            return classifiers.update(self.known, before, after, self.images["train"].labels)
        return self.known.joined(classifiers.measure(after, self.labels, int(self.labels.max()) + 1))

    def by_classifier(self, statistics: ClassStatistics) -> dict[str, dict[str, float | None]]:
        """Accuracies of each classifier on the test images, and of what there would be without training."""
        labels, student = self.images["test"].labels, self.networks["student"]
        tested, new = self.features("student", "test"), int(self.labels.max()) + 1
        accuracies = evaluation.by_classifier(student, statistics, tested, labels, new)
        if self.moves:
            untrained = evaluation.linear_logits(self.head(), self.features("teacher", "test"))
            accuracies[verdict.UNTRAINED] = evaluation.accuracies(untrained, labels, self.old)
        return accuracies
