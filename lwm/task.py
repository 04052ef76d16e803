"""What the features of a task's images tell: where new outputs begin, and the statistics of all classes afterwards."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwm import classifiers, closed_form, estimate, evaluation, verdict
from lwm.classifiers import ClassStatistics, Linear
from lwm.images.batches import Images
from lwm.images.datasets import Source
from lwm.models import Network
from lwm.runtime.errors import InputError, listed, log
from lwm.runtime.setting_types import check_names


def new_classes(source: Source, known: Sequence[str]) -> tuple[str, ...]:
    """Those with training images that are not ``known``, by name; logs what is left out.

    Raises InputError if there are none, or if a folder's name cannot be a class's.
    """
    folded = {name.casefold() for name in known}
    there = [name for name in sorted(source.classes["train"]) if name not in known]
    new = [name for name in there if name.casefold() not in folded and source.parts(name).train]
    if not new:
        raise InputError(f"all of {source.place.data_dir}: every class with training images is known already")
    try:
        check_names(new)
    except ValueError as error:
        raise InputError(f"{error}; rename its folder") from error
    left_out = [name for name in there if name not in new]
    beside = f"; left out are {listed(left_out)}, empty or known in another case" if left_out else ""
    log.info(f"NEW_CLASSES = {listed(new)} ({len(new)} classes, all that are new{beside})")
    return tuple(new)


def student_of(teacher_checkpoint: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of a student as far as it is known before it learns; ``described`` is its task's dict."""
    kept = ("architecture", "stem", "image_size", "mean", "std", "held_back")
    return {
        **{key: teacher_checkpoint[key] for key in kept},
        "class_names": teacher_checkpoint["class_names"] + described["classes"],
        "loss_form": described["loss_form"],
        "tasks": [*teacher_checkpoint["tasks"], described],
        "statistics": {},
    }


class Task:
    """Images for a teacher: of new classes, and without training also more of old ones. Features are taken once.

    ``named`` int64 (K,) are the positions of the classes of ``train`` in the output, rising. ``moves`` says whether the
    student's backbone is trained; if not, its features are the teacher's. ``favour`` is for closed_form.new_rows.
    ``known`` are the statistics of the old classes; those of a teacher without any are derived.
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
        self.named, self.labels = train.labels.unique(return_inverse=True)
        self.again = self.named[self.named < self.old]  # old classes of which there are images
        self.becomes_lda = closed_form.becomes_lda(teacher_checkpoint, len(self.again))
        self.rows = classifiers.linear_layer("head", None, teacher)
        self.seconds = 0.0  # that the network took for a training image
        self._known = classifiers.from_checkpoint(teacher_checkpoint)
        self._before = _answering(teacher_checkpoint)
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

    def warn(self, sigmoids: bool) -> None:
        """Say what is doubtful of new rows in closed form beside those of a head, whose outputs may be ``sigmoids``."""
        if sigmoids:
            log.warning("the teacher's outputs are sigmoids, so the scale of the new rows beside them is a guess")
        elif not self.becomes_lda and self.old < closed_form.SURE:
            log.warning(
                f"a head of {self.old} classes tells little of what is old: new classes may take many of their images; "
                "if you have some, take the network again with --measure-old"
            )

    @property
    def known(self) -> ClassStatistics:
        if self._known is None:
            log.info(
                f"statistics of the {self.old} old classes are derived from the teacher's head: none were measured"
            )
            self._known = closed_form.derived_statistics(self.rows, self.features("teacher", "train"), self.labels)
        return self._known

    @functools.cached_property
    def seen(self) -> ClassStatistics:
        """Of all classes in the teacher, with the images of ``train``."""
        measured = classifiers.measure(self.features("teacher", "train"), self.labels, len(self.named))
        return self.known.with_images(measured, self.named)

    def new_rows(self) -> Linear:
        """Of the classes ``named``, beside the rows of all others."""
        weight, bias = self.rows
        others = ~torch.isin(torch.arange(self.old), self.again)
        means = self.seen.means[self.named] if len(self.again) else None
        beside, features = (weight[others], bias[others]), self.features("teacher", "train")
        return closed_form.new_rows(beside, features, self.labels, self.favour, means)

    def head(self) -> Linear:
        """Over all classes, in closed form: what there is without training."""
        if self.becomes_lda:
            return classifiers.lda(self.seen)
        outputs = max(self.old, int(self.named[-1]) + 1)
        head = tuple(torch.cat([part, part.new_zeros(outputs - self.old, *part.shape[1:])]) for part in self.rows)
        for part, rows in zip(head, self.new_rows(), strict=True):
            part[self.named] = rows
        return head[0], head[1]

    def logits(self, of: str) -> Tensor:
        """float32 (n, N) of the test images, by the head of the "teacher" or of the "student" as it is now."""
        layer = classifiers.linear_layer("head", None, self.networks[of])
        return evaluation.linear_logits(layer, self.features(of, "test"))

    def statistics(self) -> ClassStatistics:
        """Of all classes in the student, the old ones' with drift compensation."""
        if not self.moves:
            return self.seen
        before, after = self.features("teacher", "train"), self.features("student", "train")
        return classifiers.update(self.known, before, after, self.images["train"].labels)

    def by_classifier(self, statistics: ClassStatistics) -> dict[str, dict[str, float | None]]:
        """Accuracies of each classifier on the test images, and of what there would be without training."""
        labels, student = self.images["test"].labels, self.networks["student"]
        tested, new = self.features("student", "test"), len(statistics.means) - self.old
        accuracies = evaluation.by_classifier(student, statistics, tested, labels, new)
        if self.moves:
            untrained = evaluation.linear_logits(self.head(), self.features("teacher", "test"))
            accuracies[verdict.UNTRAINED] = evaluation.accuracies(untrained, labels, self.old)
        return accuracies

    def answers(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Of evaluation.answers, for the student's ``checkpoint`` as it has become."""
        now, name = classifiers.from_checkpoint(checkpoint), _answering(checkpoint)
        layer = classifiers.linear_layer(name, now, self.networks["student"])
        logits = evaluation.linear_logits(layer, self.features("student", "test"))
        sizes, kept = [len(task["classes"]) for task in checkpoint["tasks"]], None
        if now and not self.moves:
            before = self.rows
            if self._before != "head":
                before = classifiers.linear_layer(self._before, self.known, self.networks["teacher"])
            kept = estimate.kept(before, layer, now.only(range(self.old)))
            if self.becomes_lda and not len(self.again):
                taken = estimate.taken(self.known, self.features("teacher", "train"), self.labels)
                kept = min(kept, 100 * (1 - taken))
        return evaluation.answers(name, logits, self.images["test"].labels, sizes, kept)


def _answering(checkpoint: dict[str, Any]) -> str:
    return classifiers.choose("auto", checkpoint) if checkpoint["statistics"] else "head"
