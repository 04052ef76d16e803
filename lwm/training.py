"""The one training loop, with its progress and its way to go on from a save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lwm.images.batches import augment, batches, draw_augmentation
from lwm.images.datasets import Images, to_input
from lwm.models import Network, Output, head_weight
from lwm.runtime import distributed, progress
from lwm.runtime.checkpoint import VERSION, checked_optimizer, checked_state
from lwm.runtime.errors import InputError, Interrupted, RunError
from lwm.runtime.hardware import has_room_for, moved, random_state, set_random_state
from lwm.runtime.interrupts import StopSignal, failures_named
from lwm.runtime.run_folder import Row, Run

CHECK_INTERVAL = 50  # steps between looks at whether every loss term is still finite: a look waits for the device


def forward(model: nn.Module, inputs: Tensor, precision: str) -> Output:
    """The network in ``precision``; its head, and so all maps and losses, are in the precision of the weights."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(inputs)


def optimisation_step(
    model: nn.Module,
    teacher: Network | None,
    inputs: Tensor,
    labels: Tensor,
    loss: Callable[..., dict[str, Tensor]],
    settings: Any,
    optimizer: torch.optim.Optimizer,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """One step on normalised ``inputs`` (B, 3, H, W); returns the loss terms and "correct", the share of right answers
    in percent, detached and still on the device. ``weight`` multiplies the gradient.
    """
    student_output = forward(model, inputs, settings.precision)
    teacher_output = None
    if teacher is not None:
        with torch.no_grad():
            teacher_output = forward(teacher, inputs, settings.precision)
    heads = (head_weight(distributed.unwrapped(model)), teacher and head_weight(teacher))
    terms = loss(student_output, teacher_output, labels, heads, settings)
    optimizer.zero_grad(set_to_none=True)
    (weight * terms["total"]).backward()
    optimizer.step()
    terms = {name: term.detach() for name, term in terms.items()}
    return terms | {"correct": 100 * (student_output.logits.argmax(1) == labels).float().mean()}


# The loop ---------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """The part of an epoch that is done; with the generator's state now it says what the next batch is."""

    order: Tensor  # the generator's state before the epoch's order was drawn
    learning_rate: float
    batches: int = 0
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)  # of the loss terms
    sums: Tensor = field(default_factory=lambda: torch.empty(0))  # over the images so far, on the device
    broken: Tensor = field(default_factory=lambda: torch.empty(0))  # the batch in which each broke first, or -1


def fit(
    run: Run,
    model: Network,
    train: Images,
    loss: Callable[..., dict[str, Tensor]],
    settings: Any,
    head: dict[str, Any],
    judge: Callable[[Network], tuple[Row, list[float | None]]],
    teacher: Network | None = None,
    teacher_hash: str = "",
    watch: Callable[[Row], None] = lambda row: None,
    last: Callable[[Network], dict[str, Any]] = lambda model: {},
) -> list[Row]:
    """Train ``model`` in place, where it is, and save it; returns the log, a row an epoch.

    ``head`` is the checkpoint without weights and training state; the learning rate and the number of epochs are
    those of its last step. ``judge(model)`` returns columns for the log and the accuracy of each group of classes;
    it is asked every SAVE_INTERVAL epochs. ``watch(row)`` is called after every epoch, and what ``last(model)`` returns
    goes into the last save. That is of the model of the last epoch: nothing is chosen by accuracy. A run that was
    interrupted goes on to the same bits. Of several processes, which ``fit`` ends, each trains on its share of every
    batch, and batch size, terms and accuracies are those of all.
    Raises InputError where the run to go on from was another one, RunError where a loss term is no longer finite,
    memory runs out or a save fails, and Interrupted after a signal.
    """
    loop = _Loop(run, model, teacher, train, loss, settings, head, teacher_hash)
    step, rows = head["steps"][-1], loop.rows
    with run.writing(), StopSignal() as stop, failures_named(loop.device, settings.batch_size, run):
        if rows:  # a run that was killed may have written a row that it had not saved, or not yet the last one
            run.write_log(rows)
        if run.resumed and len(rows) == step["epochs"]:  # in another folder perhaps, or without statistics yet
            more = {} if run.resumed["statistics"] else last(model)
            if more or run.source.resolve() != run.model.resolve():
                run.save(run.resumed | more | {"version": VERSION})
        if has_room_for(train.pixels, loop.device):
            loop.train = train.to(loop.device)
        for epoch in range(len(rows) + 1, step["epochs"] + 1):
            row = loop.epoch(epoch, stop)
            finished = epoch == step["epochs"]
            judged = finished or epoch % settings.save_interval == 0
            if judged:
                columns, step["group_accuracy"] = judge(model)
                row.update(columns)
            rows.append(row)
            signum = stop.agreed()  # asked once: it may come at any moment
            if finished:
                loop.check_weights()
                head |= last(model)
            if judged or signum:
                loop.save(finished)
            run.write_log(rows)
            watch(row)
            if signum and not finished:
                distributed.leave()
                raise Interrupted(signum, f"stopped after epoch {epoch}; go on with: {run.command}")
        distributed.leave()
    return rows


def _parameters(model: Network, backbone_lr: float | None) -> list[Any]:
    """For the optimiser: all in one group, or those of the backbone with a learning rate of their own."""
    if backbone_lr is None:
        return list(model.parameters())
    head: list[nn.Parameter] = list(model.fc.parameters())
    others = [parameter for parameter in model.parameters() if all(parameter is not own for own in head)]
    return [{"params": head}, {"params": others, "lr": backbone_lr}]


class _Loop:
    """What changes while a run trains, and its way to and from a checkpoint."""

    def __init__(
        self,
        run: Run,
        model: Network,
        teacher: Network | None,
        train: Images,
        loss: Callable[..., dict[str, Tensor]],
        settings: Any,
        head: dict[str, Any],
        teacher_hash: str,
    ) -> None:
        self.run, self.model, self.teacher, self.train, self.loss = run, model, teacher, train, loss
        self.settings, self.head = settings, head
        self.device = next(model.parameters()).device
        self.epochs = head["steps"][-1]["epochs"]
        self.identity = {
            "epochs": self.epochs,
            "teacher": teacher_hash,
            "images": f"{len(train.labels)}, {train.fingerprint()}",
            "machine": {
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "processes": distributed.size(),
                "torch": str(torch.__version__),
            },
        }
        run.check_resumed(head, self.identity)
        self.rows: list[Row] = run.resumed["training"]["log"] if run.resumed else []
        self.part: Part | None = None
        self.generator = torch.Generator().manual_seed(settings.seed)
        rate = head["steps"][-1]["learning_rate"]
        self.optimizer = torch.optim.SGD(
            _parameters(model, settings.backbone_lr), rate, settings.momentum, weight_decay=settings.weight_decay
        )
        self.steps = -(-len(train.labels) // settings.batch_size)  # of an epoch
        self.schedule = CosineAnnealingLR(self.optimizer, max(1, (self.epochs - len(self.rows)) * self.steps))
        if run.resumed:
            self._go_on(run.resumed)
        smallest, processes = len(train.labels) // self.steps, distributed.size()
        if processes > 1 and smallest < 2 * processes:
            raise InputError(
                f"a batch of {smallest} images is too small for {processes} processes; raise --batch-size or take fewer"
            )
        done = f"{len(self.rows)} epochs and {self.part.batches if self.part else 0} steps"
        distributed.require_same(
            teacher=teacher_hash, images=self.identity["images"], what_is_done=done, class_names=head.get("class_names")
        )
        self.replica = distributed.replicated(model)
        self.mean, self.std = (torch.tensor(head[name], device=self.device) for name in ("mean", "std"))

    def _go_on(self, saved: dict[str, Any]) -> None:
        state = saved["training"]
        self.model.load_state_dict(saved["model"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        set_random_state(self.device, state["device_rng"])
        self.head["steps"][-1]["group_accuracy"] = saved["steps"][-1]["group_accuracy"]
        if saved["finished"]:
            more = self.epochs - len(self.rows)
            done = f"{len(self.rows)} epochs are done, "
            print(done + (f"{more} more with a new cosine schedule" if more else "all of them: nothing is left to do"))
            return
        self.optimizer.load_state_dict(checked_optimizer(state["optimizer"], self.optimizer))
        self.schedule.load_state_dict(checked_state(state["schedule"], self.schedule.state_dict(), "schedule"))
        where = f"after epoch {len(self.rows)}"
        position = state["position"]
        if position:
            if not 0 < position["batches"] < self.steps:
                raise InputError(f"cannot resume: {self.run.source} is damaged, its epoch has no such step")
            sums = torch.tensor(list(position["sums"].values()), device=self.device)
            if distributed.rank():  # they are those of all processes, and the first one goes on from them
                sums.zero_()
            self.part = Part(
                position["order"],
                position["learning_rate"],
                position["batches"],
                position["seconds"],
                list(position["sums"]),
                sums,
                torch.full_like(sums, -1),
            )
            where = f"in epoch {len(self.rows) + 1}, after step {self.part.batches} of {self.steps}"
        print(f"going on from {self.run.source}, {where}")

    def check_weights(self) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in self.model.state_dict().values()):
            raise RunError(
                f"epoch {len(self.rows) + bool(self.part)}: the weights are no longer finite; a lower learning rate "
                f"may help; {self.run.what_is_left()}"
            )

    def save(self, finished: bool = False) -> None:
        self.check_weights()
        part = self.part
        position = part and {
            **{name: getattr(part, name) for name in ("order", "learning_rate", "batches", "seconds")},
            "sums": dict(zip(part.names, distributed.summed(part.sums).tolist(), strict=True)),
        }
        training = {
            **self.identity,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "device_rng": random_state(self.device),
            "log": self.rows,
            "position": position,
        }
        self.run.save({**self.head, "model": self.model.state_dict(), "finished": finished, "training": training})

    def epoch(self, number: int, stop: StopSignal) -> Row:
        """One pass over the training images, or the rest of one; the terms are summed on the device."""
        self._to_train_mode()
        part = self.part = self.part or Part(self.generator.get_state(), float(self.schedule.get_last_lr()[0]))
        now = self.generator.get_state()
        self.generator.set_state(part.order)
        order = batches(self.train.labels.cpu(), self.settings.batch_size, self.generator, self.settings.balanced)
        if part.batches:
            self.generator.set_state(now)
        about = f"epoch {number}/{self.epochs}"
        started = time.perf_counter() - part.seconds
        bar = progress.bar(order[part.batches :], desc=about, total=len(order), initial=part.batches, unit="batch")
        for index in bar:
            terms = self.step(part, index)
            last = part.batches == len(order)
            due = self.settings.save_interval_steps and part.batches % self.settings.save_interval_steps == 0
            signum = stop.agreed()  # asked once: it may come at any moment
            saves = (due or signum) and not last
            if saves or last or part.batches % CHECK_INTERVAL == 0:
                self._check_terms(part, about)
            part.seconds = time.perf_counter() - started  # after the check, which waits for the device
            if not bar.disable and part.batches % 20 == 1:
                shown = {name: f"{term.item():.3g}" for name, term in terms.items()}
                rate = f"{len(self.train.labels) * part.batches / self.steps / part.seconds:.0f}"
                bar.set_postfix(shown | {"images/s": rate})
            if saves:
                self.save()
            if signum and not last:
                distributed.leave()
                raise Interrupted(
                    signum,
                    f"stopped in {about} after step {part.batches} of {len(order)}, and saved; "
                    f"go on with: {self.run.command}",
                )
        self.part = None
        means = dict(zip(part.names, (distributed.summed(part.sums) / len(self.train.labels)).tolist(), strict=True))
        return {
            "epoch": number,
            "loss": means.pop("total"),
            "accuracy": means.pop("correct"),
            **means,
            "lr": part.learning_rate,
            "images_per_second": round(len(self.train.labels) / part.seconds, 1),
        }

    def step(self, part: Part, index: Tensor) -> dict[str, Tensor]:
        """One step of the optimiser on the images ``index``, or on this process's share of them; returns its loss
        terms, still on the device.
        """
        train = self.train
        # Drawn for the whole batch, so that it does not depend on the number of processes.
        drawn = draw_augmentation(len(index), train.pixels.shape[-1], self.settings.flip, self.generator)
        where = train.pixels.device
        own, drawn = (moved(distributed.share(rows), where) for rows in (index, drawn))
        pixels = moved(augment(train.pixels[own], drawn), self.device)
        terms = optimisation_step(
            self.replica,
            self.teacher,
            to_input(pixels, self.mean, self.std),
            moved(train.labels[own], self.device),
            self.loss,
            self.settings,
            self.optimizer,
            # The terms are means over the share, and the processes' gradients are averaged: a share counts by its size.
            distributed.size() * len(own) / len(index),
        )
        self.schedule.step()
        values = torch.stack(list(terms.values()))
        if not part.names:
            part.names, part.sums = list(terms), torch.zeros_like(values)
            part.broken = torch.full_like(values, -1)
        elif part.names != list(terms):
            raise InputError(f"cannot resume: {self.run.source} has sums of {part.names}, not {list(terms)}")
        part.sums += values * len(own)
        part.broken = torch.where((part.broken < 0) & ~values.isfinite(), part.batches, part.broken)
        part.batches += 1
        return terms

    def _to_train_mode(self) -> None:
        self.model.train()
        keeps_statistics = self.settings.batch_norm == "frozen" and len(self.head["steps"]) > 1
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(not keeps_statistics and module.weight.requires_grad)

    def _check_terms(self, part: Part, about: str) -> None:
        broken = dict(zip(part.names, part.broken.tolist(), strict=True))
        # The first that broke, and a term rather than the total that it spoils.
        found = [(batch, name == "total", name) for name, batch in broken.items() if batch >= 0]
        if found:
            batch, _, name = min(found)
            raise RunError(
                f"{about}, step {int(batch) + 1} of {self.steps}: the loss term {name!r} is "
                f"{part.sums[part.names.index(name)]}; a lower learning rate may help; {self.run.what_is_left()}"
            )
