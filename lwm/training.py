"""The training loop, and what lets a run stop anywhere and go on to the same bits."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lwm import verdict
from lwm.images.batches import Images, augment, batch_order, draw_augmentation, to_input
from lwm.losses import Terms
from lwm.models import Network
from lwm.runtime import distributed, progress
from lwm.runtime.checkpoint import checked_optimizer, checked_state
from lwm.runtime.errors import InputError, Interrupted, RunError, log
from lwm.runtime.hardware import has_room_for, moved, random_state, set_random_state
from lwm.runtime.interrupts import StopSignal, failures_named
from lwm.runtime.run_folder import Row, RunFolder

FORECAST_STEPS, FORECAST_SECONDS = 20, 30  # whichever is first; then a long run says how long it will take
LONG = 600  # seconds
CHECK_INTERVAL = 50  # steps between looks at whether every loss term is still finite: a look waits for the device


def train_one_epoch(
    student: nn.Module,
    teacher: Network | None,
    batches: Any,
    loss: Callable[..., Terms],
    old: int,
    settings: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    named: Tensor,
) -> None:
    """A step of the optimiser for each of ``batches``: normalised images (B, 3, H, W), labels (B,), a weight.

    The weight multiplies the gradient; ``batches.record`` gets the loss terms, and in percent "correct", among the
    classes ``named`` int64 (k,) that have images, and, with a teacher, "agreement": the images of which both networks
    think of the same class of the others first.
    """
    device = next(student.parameters()).device
    own = named.to(device)
    others = torch.tensor([label for label in range(old) if label not in named], dtype=torch.long, device=device)
    for images, labels, weight in batches:
        # The heads, and so all maps and losses, are in the precision of the weights.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            output = student(images)
            with torch.no_grad():
                asked = None if teacher is None else teacher(images)
        terms = loss(output, asked, labels, old, settings)
        optimizer.zero_grad(set_to_none=True)
        (weight * terms["total"]).backward()
        optimizer.step()
        schedule.step()
        correct = 100 * (own[output.logits[:, own].argmax(1)] == labels).float().mean()
        measured = terms | {"correct": correct}
        if asked is not None:
            alike = output.logits[:, others].argmax(1) == asked.logits[:, others].argmax(1)
            measured["agreement"] = 100 * alike.float().mean()
        batches.record(measured)


class Training:
    """The training of a network, and its way to and from a checkpoint.

        with Training(...) as training:
            for row in training.epochs():
                if training.is_due(row):
                    row |= ...  # accuracies
                    training.save()
            training.save(finished=True)

    ``checkpoint`` is that of the network as far as it is known; the rate and the number of epochs are those of its last
    task. Several processes each train on their share of every batch; batch size and loss terms are those of all.
    Raises InputError if the run to go on from was another one. Within ``with``, RunError if a loss term is no longer
    finite, memory runs out or a save fails, and Interrupted after a signal, with everything saved.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        checkpoint: dict[str, Any],
        student: Network,
        images: Images,
        loss: Callable[..., Terms],
        settings: Any,
        teacher: Network | None = None,
        old: int = 0,
        teacher_hash: str = "",
    ) -> None:
        self.run_folder, self.checkpoint, self.settings = run_folder, checkpoint, settings
        self.student, self.teacher, self.images, self.loss, self.old = student, teacher, images, loss, old
        self.device = next(student.parameters()).device
        task = checkpoint["tasks"][-1]
        self.planned: int = task["epochs"]
        self.identity = {
            "epochs": self.planned,
            "teacher": teacher_hash,
            "images": f"{len(images.labels)}, {images.fingerprint()}",
            "machine": {
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "processes": distributed.size(),
                "torch": str(torch.__version__),
            },
        }
        run_folder.check_resumed(checkpoint, self.identity)
        resumed = run_folder.resumed
        self.log: list[Row] = resumed["training"]["log"] if resumed else []
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.SGD(
            _parameters(student, settings.backbone_lr),
            task["learning_rate"],
            settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.steps = -(-len(images.labels) // settings.batch_size)  # of an epoch
        steps = max(1, (self.planned - len(self.log)) * self.steps)
        self.schedule = LambdaLR(self.optimizer, WarmUpThenCosine(steps, settings.warm_up))
        self.batches: ResumableBatches | None = None  # of the epoch that is not done yet
        if resumed:
            self._go_on(resumed)
        smallest, processes = len(images.labels) // self.steps, distributed.size()
        if processes > 1 and smallest < 2 * processes:
            raise InputError(
                f"a batch of {smallest} images is too small for {processes} processes; raise --batch-size or take fewer"
            )
        distributed.require_same(
            teacher=teacher_hash,
            images=self.identity["images"],
            what_is_done=f"{len(self.log)} epochs and {self.batches.done if self.batches else 0} steps",
            class_names=checkpoint.get("class_names"),
        )
        self.replica = distributed.replicated(student)
        self.mean, self.std = (torch.tensor(checkpoint[name], device=self.device) for name in ("mean", "std"))

    def __enter__(self) -> Training:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.run_folder.writing())
            self.stop = stack.enter_context(StopSignal())
            what_is_left = self.run_folder.what_is_left
            stack.enter_context(failures_named(self.device, self.settings.batch_size, what_is_left))
            if self.log:  # a run that was killed may have written a row that it had not saved
                self.run_folder.write_log(self.log)
            if has_room_for(self.images.pixels, self.device):
                self.images = self.images.to(self.device)
            self.contexts = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self.contexts:
            if error[1] is not None:
                raise error[1]
            distributed.leave()

    @property
    def seconds(self) -> float:
        """That all epochs took, of earlier runs too."""
        return sum(len(self.images.labels) / row["images_per_second"] for row in self.log)

    def epochs(self) -> Iterator[Row]:
        """Train the epochs that are left; of each its row of the log, to which the caller may add."""
        self.started, self.done_here, self.is_forecast, done = time.perf_counter(), 0, False, len(self.log)
        for number in range(done + 1, self.planned + 1):
            self._to_train_mode()
            self.batches = self.batches or ResumableBatches(self)
            train_one_epoch(
                self.replica,
                self.teacher,
                self.batches,
                self.loss,
                self.old,
                self.settings,
                self.optimizer,
                self.schedule,
                self.images.labels.unique(),
            )
            row, self.batches = self.batches.row(number), None
            self.log.append(row)
            if left := verdict.has_left(self.log):
                log.warning(left)
            self.seconds_left = (time.perf_counter() - self.started) / (number - done) * (self.planned - number)
            yield row
            signum = self.stop.agreed()  # asked once: it may come at any moment
            if signum and not self.is_due(row):
                self.save()
            self.run_folder.write_log(self.log)
            if signum and number < self.planned:
                self._interrupt(signum, f"stopped after epoch {number}")

    def forecast(self) -> None:
        """Once, after some steps of this run: a line if the rest of it takes long."""
        self.done_here += 1
        passed = time.perf_counter() - self.started
        if self.is_forecast or (self.done_here < FORECAST_STEPS and passed < FORECAST_SECONDS):
            return
        self.is_forecast = True
        done = len(self.log) * self.steps + (self.batches.done if self.batches else 0)
        seconds = passed / self.done_here * (self.planned * self.steps - done)
        if seconds > LONG:
            about = f"some {seconds / 60:.0f} minutes to go for {self.planned} epochs"
            log.info(f"{about}; smaller images (--image-size) or fewer --epochs take less")

    def is_due(self, row: Row) -> bool:
        """Whether the epoch is to be evaluated and saved."""
        return row["epoch"] == self.planned or row["epoch"] % self.settings.save_interval == 0

    @property
    def is_done(self) -> bool:
        """Whether the run's own file holds the finished network, with what was asked for: nothing is left to save."""
        resumed, model = self.run_folder.resumed, self.run_folder.model
        return bool(
            resumed
            and resumed["finished"]
            and len(resumed["training"]["log"]) == self.planned == resumed["training"]["epochs"]
            and (resumed["statistics"] or not self.settings.statistics)
            and self.run_folder.source.resolve() == model.resolve()
        )

    def save(self, finished: bool = False) -> None:
        """The network as it is now, and all that it takes to go on from here."""
        if not all(bool(tensor.isfinite().all()) for tensor in self.student.state_dict().values()):
            raise RunError(
                f"epoch {len(self.log) + bool(self.batches)}: the weights are no longer finite; a lower learning rate "
                f"may help; {self.run_folder.what_is_left()}"
            )
        training = {
            **self.identity,
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "device_rng": random_state(self.device),
            "log": self.log,
        }
        if not finished:  # more epochs begin with a new optimiser and a new schedule
            training |= {
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "position": self.batches.position() if self.batches else None,
            }
        self.run_folder.save(
            {**self.checkpoint, "model": self.student.state_dict(), "finished": finished, "training": training}
        )

    def _go_on(self, resumed: dict[str, Any]) -> None:
        state = resumed["training"]
        self.student.load_state_dict(resumed["model"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        set_random_state(self.device, state["device_rng"])
        for judged in ("group_accuracy", "answers"):
            self.checkpoint["tasks"][-1][judged] = resumed["tasks"][-1][judged]
        if resumed["finished"]:
            more = self.planned - len(self.log)
            done = f"{len(self.log)} epochs are done, "
            log.info(done + (f"{more} more with a new cosine schedule" if more else "all of them: nothing is left"))
            return
        if len(self.log) == self.planned:  # the optimiser, whose learning rate has come to 0, makes no step any more
            log.info(f"going on from {self.run_folder.source}, with what comes after its last epoch")
            return
        self.optimizer.load_state_dict(checked_optimizer(state["optimizer"], self.optimizer))
        self.schedule.load_state_dict(checked_state(state["schedule"], self.schedule.state_dict(), "schedule"))
        where = f"after epoch {len(self.log)}"
        if state["position"]:
            self.batches = ResumableBatches(self, state["position"])
            where = f"in epoch {len(self.log) + 1}, after step {self.batches.done} of {self.steps}"
        log.info(f"going on from {self.run_folder.source}, {where}")

    def _to_train_mode(self) -> None:
        """With frozen batch-norm the student computes as its teacher does, without dropout too."""
        self.student.train(self.old == 0 or self.settings.batch_norm == "train")
        for module in self.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.train(module.training and module.weight.requires_grad)

    def _interrupt(self, signum: int, where: str) -> None:
        distributed.leave()
        raise Interrupted(signum, f"{where}; go on with: {self.run_folder.command}")


class ResumableBatches:
    """The batches of one epoch, or of the rest of one; the loss terms are summed on the device.

    Between two batches it saves if it is time, and stops if a signal has come. With the state of the training's
    generator the ``position`` says what the next batch is.
    """

    def __init__(self, training: Training, position: dict[str, Any] | None = None) -> None:
        self.training = training
        self.done, self.seconds, self.names = 0, 0.0, list[str]()
        if position is None:
            self.order_state = training.generator.get_state()  # before the order is drawn
            self.learning_rate = float(training.schedule.get_last_lr()[0])
            return
        if not 0 < position["batches"] < training.steps:
            source = training.run_folder.source
            raise InputError(f"cannot resume: {source} is damaged, its epoch has no such step")
        self.order_state, self.learning_rate = position["order"], position["learning_rate"]
        self.done, self.seconds, self.names = position["batches"], position["seconds"], list(position["sums"])
        self.sums = torch.tensor(list(position["sums"].values()), device=training.device)
        if distributed.rank():  # they are those of all processes, and the first one goes on from them
            self.sums.zero_()
        self.broken = torch.full_like(self.sums, -1)  # the batch in which each term broke first, or -1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        training, settings = self.training, self.training.settings
        generator, now = training.generator, training.generator.get_state()
        generator.set_state(self.order_state)
        order = batch_order(training.images.labels.cpu(), settings.batch_size, generator, settings.balanced)
        if self.done:
            generator.set_state(now)
        about = f"epoch {len(training.log) + 1}/{training.planned}"
        started = time.perf_counter() - self.seconds
        bar = progress.bar(order[self.done :], desc=about, total=len(order), initial=self.done, unit="batch")
        for index in bar:
            yield self._batch(index)
            last = self.done == len(order)
            due = settings.save_interval_steps and self.done % settings.save_interval_steps == 0
            signum = training.stop.agreed()  # asked once: it may come at any moment
            saves = (due or signum) and not last
            if saves or last or self.done % CHECK_INTERVAL == 0:
                self._check_terms(about)
            self.seconds = time.perf_counter() - started  # after the check, which waits for the device
            training.forecast()
            if not bar.disable and self.done % 20 == 1:
                bar.set_postfix(
                    {name: f"{term:.3g}" for name, term in zip(self.names, self.latest.tolist(), strict=True)}
                )
            if saves:
                training.save()
            if signum and not last:
                training._interrupt(signum, f"stopped in {about} after step {self.done} of {len(order)}, and saved")

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor, float]:
        """The images ``index``, or this process's share of them."""
        training = self.training
        pixels, labels = training.images
        # Drawn for the whole batch, so that it does not depend on the number of processes.
        drawn = draw_augmentation(len(index), pixels.shape[-1], training.settings.flip, training.generator)
        own, drawn = (moved(distributed.share(rows), pixels.device) for rows in (index, drawn))
        inputs = to_input(moved(augment(pixels[own], drawn), training.device), training.mean, training.std)
        self.own = len(own)
        # The terms are means over the share, and the processes' gradients are averaged: a share counts by its size.
        return inputs, moved(labels[own], training.device), distributed.size() * len(own) / len(index)

    def record(self, terms: Terms) -> None:
        """Add the terms of a batch that is done, which has as many images as ``__iter__`` gave last."""
        self.latest = values = torch.stack([term.detach() for term in terms.values()])
        if not self.names:
            self.names, self.sums, self.broken = list(terms), torch.zeros_like(values), torch.full_like(values, -1)
        elif self.names != list(terms):
            source = self.training.run_folder.source
            raise InputError(f"cannot resume: {source} has sums of {self.names}, not {list(terms)}")
        self.sums += values * self.own
        self.broken = torch.where((self.broken < 0) & ~values.isfinite(), self.done, self.broken)
        self.done += 1

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of an epoch that is not done."""
        return {
            "order": self.order_state,
            "learning_rate": self.learning_rate,
            "batches": self.done,
            "seconds": self.seconds,
            "sums": dict(zip(self.names, distributed.summed(self.sums).tolist(), strict=True)),
        }

    def row(self, epoch: int) -> Row:
        """The log's row of the epoch: means over the images, training accuracy in percent, speed."""
        count = len(self.training.images.labels)
        means = dict(zip(self.names, (distributed.summed(self.sums) / count).tolist(), strict=True))
        return {
            "epoch": epoch,
            "loss": means.pop("total"),
            "accuracy": means.pop("correct"),
            **means,
            "lr": self.learning_rate,
            "images_per_second": round(count / self.seconds, 1),
        }

    def _check_terms(self, about: str) -> None:
        broken = dict(zip(self.names, self.broken.tolist(), strict=True))
        # The first that broke, and a term rather than the total that it spoils.
        candidates = [(batch, name == "total", name) for name, batch in broken.items() if batch >= 0]
        if candidates:
            batch, _, name = min(candidates)
            raise RunError(
                f"{about}, step {int(batch) + 1} of {self.training.steps}: the loss term {name!r} is "
                f"{self.sums[self.names.index(name)]}; a lower learning rate may help; "
                f"{self.training.run_folder.what_is_left()}"
            )


class WarmUpThenCosine:
    """Of the peak rate at each step of ``steps``: a line up to it for the share ``warm_up``, then half a cosine.

    An object and no function: LambdaLR puts its numbers into a checkpoint, and a run that goes on keeps its steps.
    """

    def __init__(self, steps: int, warm_up: float) -> None:
        self.steps, self.rising = steps, round(warm_up * steps)

    def __call__(self, step: int) -> float:
        if step < self.rising:
            return (step + 1) / (self.rising + 1)
        return (1 + math.cos(math.pi * (step - self.rising) / (self.steps - self.rising))) / 2


def _parameters(model: Network, backbone_lr: float | None) -> list[Any]:
    """For the optimiser: all in one group, or those of the backbone with a learning rate of their own."""
    if backbone_lr is None:
        return list(model.parameters())
    head: list[nn.Parameter] = list(model.fc.parameters())
    others = [parameter for parameter in model.parameters() if all(parameter is not own for own in head)]
    return [{"params": head}, {"params": others, "lr": backbone_lr}]
