"""What else may help a student to keep its classes apart: ways to train that are tried, and kept only if they win.

    python3 benchmarks/trials.py photos32-search --data-dir photos32 --seeds 0,1,2 --jobs 2
    python3 benchmarks/trials.py photos32-search --data-dir photos32 --trials plain,ema=0.99

All steps of a protocol with LwM (``plain``), and with one change each; a training after AdaGauss is among them. Every
network is read in all the ways of field.py. A cell (a trial with a seed) that is in the CSV is not run again, even
where the trial has changed: delete its rows then. A seed from 1 on shuffles the classes of photos32-search here too.

The rule, set before the first run. On photos32-search, three seeds, but for what after seed 0 is more than 3 points
below ``plain`` (after AdaGauss: below the best of the four): at most two changes of ``plain`` go on, those with the
highest mean of the discriminant's average over the steps, if it is above ``plain``'s, and their combination; of the
four after AdaGauss the best by Mahalanobis' distance, its own read-out; and LwF with the same changes. On photos32-5x4,
five seeds, by name, beside ``plain`` on the same machine: kept is what is above ``plain`` with its whole interval.
results/<protocol>/ gets trials.csv, trials.md and trials_environment.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import dataclasses
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import field  # noqa: E402
from errors import InputError, RunError, one_line_errors  # noqa: E402
from protocols import PHOTO_METHODS  # noqa: E402
from settings import OneLineParser  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Trial:
    flags: str = "--method lwm"  # of the incremental script, beside the protocol's
    first_flags: str = ""  # likewise, of the first step's
    # Weight of feature distillation through a learned map, as a share of the variance: a linear one, where AdaGauss's
    # code (Rypesc et al., NeurIPS 2024) has two layers.
    projection: float = 0.0
    anti_collapse: float = 0.0  # weight of AdaGauss's L_AC, in all steps
    ema: float = 0.0  # decay of an exponential moving average of a student, which then takes its place
    warm_up: int = 0  # epochs that train the new rows of the head alone, before the others
    # The first step tells 4 N classes apart, an image in four rotations (as PASS, CVPR 2021), in as many batches.
    rotations: bool = False
    strong: bool = False  # TrivialAugment (Mueller and Hutter, ICCV 2021) after crop and mirror, in all steps
    # The head sees unit length, and has it, times 10; other read-outs still see the features' own length. L_AD still
    # compares features weighted by rows of the head, which for this head is not the gradient any more.
    cosine: bool = False


def adagauss(rate: float, form: str, rotations: bool = False) -> Trial:
    """L_C over the new classes and no distillation of logits; the head cannot hold old classes so.

    The code of AdaGauss has, beside the projection's layers, features that are no outputs of a ReLU, a learned map of
    two layers for the statistics, with L_AC too, those of mirrored images, 200 epochs a step, a rate that falls in
    steps to begin at a tenth after the first step, and with rotations a quarter of the images in a batch.
    """
    method = {"softmax": "lwf", "binary": "lwf-mc"}[form]
    flags = f"--method {method} --beta 0 --incremental-lr {rate}"
    return Trial(flags, f"--loss-form {form}", projection=10, anti_collapse=1, rotations=rotations)


# gamma 0 and 1 are in the ablations, and so is a gentler rate, 0.01.
TRIALS = {
    "plain": Trial(),
    "longer-first": Trial("--method lwm", "--epochs 100"),
    "longer": Trial("--method lwm --epochs 40"),
    "longer-all": Trial("--method lwm --epochs 40", "--epochs 40"),
    "strong-longer-all": Trial("--method lwm --epochs 40", "--epochs 40", strong=True),
    "rotations": Trial(rotations=True),
    "projection=1": Trial(projection=1),
    "projection=10": Trial(projection=10),
    "ema=0.99": Trial(ema=0.99),
    "cosine": Trial(cosine=True),
    "warm-up=3": Trial(warm_up=3),
    "adagauss lr=0.1": adagauss(0.1, "softmax"),
    "adagauss binary lr=0.1": adagauss(0.1, "binary"),
    "adagauss rotations lr=0.1": adagauss(0.1, "softmax", rotations=True),
    "adagauss rotations lr=0.03": adagauss(0.03, "softmax", rotations=True),
    "lwf": Trial(PHOTO_METHODS["lwf"], "--loss-form softmax"),
    "lwf longer-first": Trial(PHOTO_METHODS["lwf"], "--loss-form softmax --epochs 100"),
    "lwf longer-all": Trial(f"{PHOTO_METHODS['lwf']} --epochs 40", "--loss-form softmax --epochs 40"),
}
# Of ours what readout.py does with 64 channels; of the field's, as in field.py, what the search has chosen.
OPTIONS = {
    name: {"shrinkage=0.0": made["shrinkage=0.0"]} if name in ("discriminant", "rebalanced") else made
    for name, made in field.OPTIONS.items()
}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("protocol", choices=["photos32-search", "photos32-5x4"])
    parser.add_argument("--data-dir", help="as for reproduce.py")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--trials", help="comma-separated (default, on a search alone: all)")
    parser.add_argument("--jobs", default="1", help="cells at once; the CPU cores are shared out (default: 1)")
    parser.add_argument("--table", action="store_true", help="only make the table again")
    options = parser.parse_args(argv)
    path = ROOT / "results" / options.protocol / "trials.csv"
    failed = [] if options.table else run(options, path)
    path.with_suffix(".md").write_text(text := table(path))
    print(text)
    if failed:
        raise RunError(f"not done: {'; '.join(failed)}")


def run(options: argparse.Namespace, path: Path) -> list[str]:
    """Cells that failed, and why."""
    from protocols import PROTOCOLS, class_order
    from reproduce import seeds_of, threads_of, whole_number
    from tables import command_of, read_rows, record_call, write_rows

    jobs = whole_number("--jobs", options.jobs, 1, 1024)
    threads = threads_of(jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    last = str(len(PROTOCOLS[options.protocol].groups) - 1)
    done = {(row["method"], int(row["seed"])) for row in read_rows(path) if row["step"] == last}
    if not options.trials and PROTOCOLS[options.protocol].methods:
        raise InputError(f"--trials: {options.protocol} is judged on test images; name what a search has chosen")
    chosen = list(dict.fromkeys(options.trials.split(","))) if options.trials else list(TRIALS)
    if unknown := set(chosen) - set(TRIALS):
        raise InputError(f"--trials: there is no {unknown.pop()!r}: {', '.join(TRIALS)}")
    cells = [(name, seed) for seed in seeds_of(options.seeds) for name in chosen]
    spawn = multiprocessing.get_context("spawn")
    command = command_of("benchmarks/trials.py", options, "data_dir seeds trials jobs")
    class_order(PROTOCOLS[options.protocol], options.data_dir)  # what is wrong with the folder is said before any work
    record_call(path.with_name("trials_environment.json"), command, threads)
    failed = []
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as workers:
        wanted = [cell for cell in cells if cell not in done]
        waiting = {
            workers.submit(cell, options.protocol, options.data_dir, name, seed): (name, seed) for name, seed in wanted
        }
        try:
            for finished in concurrent.futures.as_completed(waiting):
                name, seed = waiting[finished]
                if error := finished.exception():  # the others are to be kept
                    failed.append(f"{name}, seed {seed} ({error})")
                    continue
                for number, found in enumerate(finished.result()):
                    key = {"protocol": options.protocol, "method": name, "seed": seed, "step": number}
                    write_rows(path, [key | row for row in found])
                last_of = {row["readout"]: row["accuracy"] for row in found}
                print(
                    f"{name}, seed {seed}: {last_of['head']:.1f} by the head, {last_of['discriminant']:.1f}", flush=True
                )
        finally:  # after an error what nobody will collect need not be run
            workers.shutdown(cancel_futures=True)
    return failed


def cell(protocol_name: str, data_dir: str | None, name: str, seed: int) -> list[list[dict[str, Any]]]:
    """After each step, for each read-out and option: accuracies in percent, and how far old statistics are off."""
    import torch

    import data
    import evaluation
    import losses
    import models
    from hardware import keep_freed_memory, to_device
    from protocols import PROTOCOLS, class_order, groups_of
    from settings import read_settings

    keep_freed_memory()
    protocol, trial = dataclasses.replace(PROTOCOLS[protocol_name], shuffle=True), TRIALS[name]
    common = [*protocol.flags.split(), "--dataset", protocol.dataset, "--seed", str(seed)]
    common += ["--data-dir", data_dir] if data_dir else []
    settings = read_settings("train_teacher_model", [*common, *trial.first_flags.split()])
    later = read_settings("incremental_learning_system", [*common, *trial.flags.split(), "--teacher", "-"])
    later = dataclasses.replace(later, loss_form=later.loss_form or settings.loss_form)
    place = data.Place(protocol.dataset, data_dir or "", settings.hold_back)
    source = data.open_source(place, settings.image_size)
    groups = groups_of(protocol, class_order(protocol, data_dir)[protocol.pool], seed)

    names: list[str] = []
    steps: list[field.Step] = []
    networks: list[models.Network] = []
    for group in groups:
        names += group
        train, test = source.train(group, names), source.test(names, names)
        torch.manual_seed(seed)
        teacher = networks[-1] if networks else None
        if teacher is None:
            mean, std = data.channel_statistics(train.pixels)
            model = models.build(settings.model, 4 * len(group) if trial.rotations else len(group), settings.image_size)
            first, rate, loss = 0, settings.lr, losses.first_step
        else:
            settings, rate, loss = later, later.incremental_lr, losses.METHODS[later.method]
            model = copy.deepcopy(teacher)
            first = model.fc.out_features
            for _ in range(2):  # as the script, which builds both from the checkpoint before: the new rows are its own
                models.build(settings.model, first, settings.image_size)
            models.widen_head(model, len(group))
        if settings.loss_form == "binary":
            models.start_at_prior(model, first)
        if trial.cosine:
            model.fc.__class__ = cosine_head()
        model = to_device(model, torch.device("cpu"))
        train_model(model, teacher, train, (mean, std), loss, settings, trial, rate)
        if trial.rotations and teacher is None:
            models.replace_head(model, model.fc.weight.detach()[::4], model.fc.bias.detach()[::4])
        networks.append(model.eval().requires_grad_(False))
        steps.append(field.look(steps, networks, train, test, mean, std))
    old = [len(step.known.means) - len(step.labels.unique()) for step in steps]
    off = [
        {
            measure.__name__: statistics.mean(measure(step.known, step.test, step.test_labels)[:known])
            if known
            else None
            for measure in (evaluation.means_off, evaluation.covariances_off)
        }
        for step, known in zip(steps, old, strict=True)
    ]
    found: list[list[dict[str, Any]]] = [[] for _ in steps]
    for readout_name, made in OPTIONS.items():
        for option, scores_of in made.items():
            for number, scores in enumerate(scores_of(steps)):
                right = evaluation.accuracies(scores, steps[number].test_labels, old[number])
                accuracies = {column: right[column] for column in ("accuracy", "accuracy_old", "accuracy_new")}
                found[number].append({"readout": readout_name, "option": option} | accuracies | off[number])
    return found


def train_model(
    model: Any, teacher: Any, images: Any, channels: Any, loss: Any, settings: Any, trial: Trial, rate: float
) -> None:
    """As training.fit does it, with what the trial changes."""
    import torch
    from torch import nn
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
    from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

    from batches import augment, batches, draw_augmentation
    from data import to_input
    from hardware import to_device
    from models import fold_batch_norm
    from training import optimisation_step

    model.requires_grad_(True)
    teacher = to_device(fold_batch_norm(teacher), torch.device("cpu")) if teacher is not None else None
    rotates = trial.rotations and teacher is None
    projection = nn.Linear(model.fc.in_features, model.fc.in_features)
    nn.init.eye_(projection.weight)
    nn.init.zeros_(projection.bias)
    beside = torch.optim.Adam(projection.parameters(), 1e-2)  # a step has but some 300 batches

    def total(student: Any, known: Any, labels: Any, heads: Any, settings: Any) -> dict[str, Any]:
        terms = loss(student, known, labels, heads, settings)
        pooled = model.pooled(student.features)
        if trial.projection and teacher is not None:
            missed = unexplained(projection(pooled), model.pooled(known.features))
            terms["total"] = terms["total"] + trial.projection * missed
        if trial.anti_collapse:
            terms["total"] = terms["total"] + trial.anti_collapse * anti_collapse(pooled)
        return terms

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1)

    optimizer = torch.optim.SGD(model.parameters(), rate, settings.momentum, weight_decay=settings.weight_decay)
    if trial.anti_collapse:  # as AdaGauss's code
        optimizer.register_step_pre_hook(clip)
    count = -(-len(images.labels) // settings.batch_size)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, settings.epochs * count) for each in (optimizer, beside)
    ]
    averaged = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(trial.ema))
        if trial.ema and teacher is not None  # of a first step it would keep some of the random start
        else None
    )
    strong = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    generator = torch.Generator().manual_seed(settings.seed)

    def drawn(index: Any) -> Any:
        edge = images.pixels.shape[-1]
        pixels = augment(images.pixels[index], draw_augmentation(len(index), edge, settings.flip, generator))
        if trial.strong:
            pixels = torch.stack([strong(each) for each in pixels])
        if rotates:
            pixels = torch.cat([pixels.rot90(turns, (2, 3)) for turns in range(4)])
        return to_input(pixels, *channels).contiguous(memory_format=torch.channels_last)

    warm_up = trial.warm_up if teacher is not None else 0
    for epoch in range(-warm_up, settings.epochs):
        model.train(epoch >= 0)
        for index in batches(images.labels, settings.batch_size, generator):
            inputs, labels = drawn(index), images.labels[index]
            if rotates:
                labels = torch.cat([4 * labels + turns for turns in range(4)])
            before = [each.detach().clone() for each in model.parameters()] if epoch < 0 else []
            optimisation_step(model, teacher, inputs, labels, total, settings, optimizer)
            if epoch < 0:
                put_back(model, before, teacher.fc.out_features)
                beside.zero_grad()
                continue
            beside.step()
            beside.zero_grad()
            for schedule in schedules:
                schedule.step()
            if averaged:
                averaged.update_parameters(model)
        if epoch == -1:
            optimizer.state.clear()
    if averaged:  # an average of batch-norm's statistics would not be the statistics of averaged weights
        update_bn((drawn(index) for index in batches(images.labels, settings.batch_size, generator)), averaged.module)
        model.load_state_dict(averaged.module.state_dict())


def unexplained(guess: Any, features: Any) -> Any:
    """The share of the variance of ``features`` (B, C) that ``guess`` (B, C) misses."""
    return (guess - features).square().sum() / (features - features.mean(0)).square().sum()


def anti_collapse(features: Any) -> Any:
    """L_AC of AdaGauss (Rypesc et al., NeurIPS 2024) of features (B, C): it is low where no direction is flat.

    Minus the mean of the diagonal of the Cholesky factor of their covariance, of which each counts up to 1.
    """
    import torch

    spread = features.T.cov() + 1e-4 * torch.eye(features.shape[1], dtype=features.dtype)  # fewer than C have no factor
    return -torch.linalg.cholesky(spread).diagonal().clamp(max=1).mean()


def put_back(model: Any, before: list[Any], old: int) -> None:
    """All but the new rows of the head as they were."""
    import torch

    head = {id(model.fc.weight), id(model.fc.bias)}
    with torch.no_grad():
        for parameter, was in zip(model.parameters(), before, strict=True):
            if id(parameter) in head:
                parameter[:old] = was[:old]
            else:
                parameter.copy_(was)


def cosine_head() -> type:
    from torch import Tensor, nn
    from torch.nn import functional as F

    class Cosine(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            return 10 * F.linear(F.normalize(features), F.normalize(self.weight)) + self.bias

    return Cosine


def table(path: Path) -> str:
    """Of each trial and read-out the accuracies, and in pairs by seed what it has over the same of ``plain``.

    A read-out has the option whose average was highest in the CSV of the search. Below: how far the statistics of old
    classes, which were carried along, are off, as evaluation.py measures it.
    """
    from tables import NOT_THERE, mean_and_spread, paired, read_rows, seed_means

    found = field.averages(path)
    search = path.parent.with_name(field.SEARCH.get(path.parent.name, path.parent.name)) / path.name
    best = field.best_options(search)
    heads = ["trial", "read-out", "option"]
    heads += ["average of the steps", "over plain", "after the last step", "over plain", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for trial in TRIALS:
        for readout in OPTIONS:
            option = best.get((trial, readout), "")
            seeds = found.get((trial, readout, option), {})
            plain = found.get(("plain", readout, best.get(("plain", readout), "")), {})
            cells = []
            for column in (0, 1):
                cells.append(mean_and_spread([values[column] for values in seeds.values()]) if seeds else "")
                pairs = [(seeds[seed][column], plain[seed][column]) for seed in seeds if seed in plain]
                cells.append(paired(pairs) if len(pairs) >= 3 and trial != "plain" else NOT_THERE)
            if seeds:
                lines.append(f"| {trial} | {readout} | {option} | {' | '.join(cells)} | {len(seeds)} |")
    lines += ["", "| trial | means of old classes are off | covariances of old classes are off | seeds |"]
    lines.append("|---|---|---|---|")
    rows = [row for row in read_rows(path) if row["readout"] == "head"]
    for trial in TRIALS:
        means, covariances = (seed_means(rows, trial, column) for column in ("means_off", "covariances_off"))
        if means:
            off = f"{mean_and_spread(means, 2)} | {mean_and_spread(covariances, 2)}"
            lines.append(f"| {trial} | {off} | {len(means)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
