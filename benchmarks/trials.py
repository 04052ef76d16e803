"""What else may help a student to keep its classes apart: ways to train that are tried, and kept only if they win.

    python3 benchmarks/trials.py photos32-search --data-dir photos32 --seeds 0,1,2 --jobs 2
    python3 benchmarks/trials.py photos32-search --data-dir photos32 --trials plain,ema=0.99

All steps of a protocol with LwM (``plain``), and with one change each; trainings like AdaGauss's are among them. Every
network is read in all the ways of field.py. A seed from 1 on shuffles the classes of photos32-search here too. A cell
(a trial with a seed) that is in the CSV is not run again; one that was stopped goes on after its last step, from
--work-dir, where trials that begin alike share their first network. Delete both where a trial, the code or the images
have changed.

The rule, set before the first run. What is compared is the average over the steps, by the discriminant (for the last
point it had named no read-out; so amended before seeds 3 and 4 of photos32-5x4 were there, 2026-11-28).

- On photos32-search a trial has three seeds, but for one that with seed 0 is more than 3 points below ``plain`` (of
  the four like AdaGauss: below the best of them).
- To photos32-5x4 go on: of the changes of ``plain`` at most the two with the highest means, if these are above
  ``plain``'s, and their combination; of the four like AdaGauss the best by Mahalanobis' distance, its own read-out; and
  LwF with the same changes, unsearched, with the options of ``lwf``.
- On photos32-5x4 each has five seeds, beside ``plain`` on the same machine. Kept is what is above ``plain`` with its
  whole interval.

photos32-search-fp32 is that search for a processor without bf16. There, so amended before the first row (2026-11-27,
when seed 0 of five trials was there in bf16), only what with seed 0 is above ``plain`` (of the four like AdaGauss: the
best) has other seeds. It took the place of the search in bf16, which was given up, but for longer, projection=1 and
ema=0.99, which have their one seed there. So photos32-5x4 takes from it what goes on, and the read-outs' options,
though it is in bf16; and, before its first row (2026-11-28), one change goes on, the one with the highest mean.

unit-length came when seed 0 of nine trials was there. It is kept where on photos32-5x4 it is above the discriminant on
the same networks, ``plain``'s, with its whole interval.

results/<protocol>/ gets trials.csv, trials.md and trials_environment.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
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
from settings import OneLineParser, require_folder  # noqa: E402


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
    steps to begin at a tenth after the first step, and with rotations a quarter of the images in a batch. Its weight of
    10 is that of the plain squared error, and its projection has the network's optimiser and clipping.
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

SEARCH = "photos32-search-fp32"  # of which photos32-5x4 takes the options

# (trial, read-out) -> its option, its seeds' accuracies, and what a table shows of them.
Cells = dict[tuple[str, str], tuple[str, dict[str, Any], list[str]]]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    from reproduce import publish

    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("protocol", choices=["photos32-search", SEARCH, "photos32-5x4"])
    parser.add_argument("--data-dir", help="as for reproduce.py")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--trials", help="comma-separated (default, on a search alone: all)")
    parser.add_argument("--jobs", default="1", help="cells at once; the CPU cores are shared out (default: 1)")
    parser.add_argument("--work-dir", default="runs/trials", help="where the networks are kept (default: runs/trials)")
    parser.add_argument("--table", action="store_true", help="only make the table again")
    options = parser.parse_args(argv)
    path = ROOT / "results" / options.protocol / "trials.csv"
    failed = [] if options.table else run(options, path)
    publish(path.with_suffix(".md"), table(path))
    if failed:
        raise RunError(f"not done: {'; '.join(failed)}")


def run(options: argparse.Namespace, path: Path) -> list[str]:
    """Cells that failed, and why."""
    from protocols import PROTOCOLS, class_order
    from reproduce import require_open, seeds_of, threads_of, whole_number
    from tables import command_of, read_rows, record_call, write_rows

    require_open(PROTOCOLS[options.protocol])
    jobs = whole_number("--jobs", options.jobs, 1, 1024)
    require_folder("--work-dir", options.work_dir)
    threads = threads_of(jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    last = str(len(PROTOCOLS[options.protocol].groups) - 1)
    done = {(row["method"], int(row["seed"])) for row in read_rows(path) if row["step"] == last}
    judged = bool(PROTOCOLS[options.protocol].methods)
    if not options.trials and judged:
        raise InputError(f"--trials: {options.protocol} is judged on test images; name what a search has chosen")
    chosen = list(dict.fromkeys(options.trials.split(","))) if options.trials else list(TRIALS)
    if unknown := set(chosen) - set(TRIALS):
        raise InputError(f"--trials: there is no {unknown.pop()!r}: {', '.join(TRIALS)}")
    best = field.best_options(search_of(path)) if judged else {}
    for name in chosen if judged else []:
        if not options_of(name, best):
            raise InputError(f"--trials: {SEARCH} has no row of {name!r}, and so no options for its read-outs")
    cells = [(name, seed) for seed in seeds_of(options.seeds) for name in chosen]
    spawn = multiprocessing.get_context("spawn")
    command = command_of("benchmarks/trials.py", options, "data_dir seeds trials jobs")
    class_order(PROTOCOLS[options.protocol], options.data_dir)  # what is wrong with the folder is said before any work
    record_call(path.with_name("trials_environment.json"), command, threads)
    failed = []
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as workers:
        wanted = [cell for cell in cells if cell not in done]
        waiting = {
            workers.submit(cell, options.protocol, options.data_dir, name, seed, options.work_dir): (name, seed)
            for name, seed in wanted
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


def first_of(trial: Trial) -> Trial:
    """What its first step depends on."""
    return dataclasses.replace(trial, flags="", projection=0, ema=0, warm_up=0)


def cell(protocol_name: str, data_dir: str | None, name: str, seed: int, work_dir: str) -> list[list[dict[str, Any]]]:
    """After each step, for each read-out and option: accuracies in percent, and how far old statistics are off.

    The network of each step is kept in ``work_dir``, and trained only where it is not there yet.
    """
    import torch
    from trial_training import Cosine, trained

    import data
    import evaluation
    import models
    from checkpoint import load_weights, make_folder, write_torch
    from hardware import keep_freed_memory, to_device, warn_of_emulation
    from protocols import PROTOCOLS, class_order, groups_of
    from settings import read_settings

    keep_freed_memory()
    cpu = torch.device("cpu")
    protocol, trial = dataclasses.replace(PROTOCOLS[protocol_name], shuffle=True), TRIALS[name]
    common = [*protocol.flags.split(), "--dataset", protocol.dataset, "--seed", str(seed)]
    common += ["--data-dir", data_dir] if data_dir else []
    settings = read_settings("train_teacher_model", [*common, *trial.first_flags.split()])
    later = read_settings("incremental_learning_system", [*common, *trial.flags.split(), "--teacher", "-"])
    warn_of_emulation(settings.precision, cpu)
    later = dataclasses.replace(later, loss_form=later.loss_form or settings.loss_form)
    place = data.Place(protocol.dataset, data_dir or "", settings.hold_back)
    source = data.open_source(place, settings.image_size)
    groups = groups_of(protocol, class_order(protocol, data_dir)[protocol.pool], seed)
    alike = next(each for each in TRIALS if first_of(TRIALS[each]) == first_of(trial))

    names: list[str] = []
    steps: list[field.Step] = []
    networks: list[models.Network] = []
    for number, group in enumerate(groups):
        names += group
        train, test = source.train(group, names), source.test(names, names)
        if not number:
            mean, std = data.channel_statistics(train.pixels)
        kept = Path(work_dir, protocol_name, f"seed{seed}", name if number else alike, f"{number}.pth")
        if not kept.exists():
            model = trained(networks, train, (mean, std), later if number else settings, trial)
            make_folder(kept.parent)
            write_torch(kept, model.state_dict())
            print(f"{name}, seed {seed}: step {number + 1} of {len(groups)} is trained", flush=True)
        model = models.build(settings.model, len(names), settings.image_size)
        model.load_state_dict(load_weights(kept))
        if trial.cosine:
            model.fc.__class__ = Cosine
        networks.append(to_device(model, cpu).eval().requires_grad_(False))
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


def table(path: Path) -> str:
    """Of each trial and read-out the accuracies, and in pairs by seed what it has over the same of ``plain``.

    A read-out has the option whose average was highest in the search. First a ``summary``; behind these what
    unit-length has over the discriminant of the same networks, and how far the statistics of old classes, which were
    carried along, are off, as evaluation.py measures it.
    """
    from tables import heads_of, mean_and_spread, read_rows, seed_means

    found = cells_of(path)
    columns = ("average of the steps", "over plain", "after the last step", "over plain")
    lines = [summary(found), *heads_of("trial", "read-out", "option", *columns, "seeds")]
    for (trial, readout), (option, seeds, cells) in found.items():
        lines.append(f"| {trial} | {readout} | {option} | {' | '.join(cells)} | {len(seeds)} |")
    if read := [trial for trial in TRIALS if (trial, "unit-length") in found]:
        lines += ["", *heads_of("trial", "unit-length over the discriminant, average", "after the last step", "seeds")]
        for trial in read:
            own, other = (found[trial, name][1] for name in ("unit-length", "discriminant"))
            lines.append(f"| {trial} | {over(own, other, 0)} | {over(own, other, 1)} | {len(own)} |")
    lines += ["", *heads_of("trial", "means of old classes are off", "covariances of old classes are off", "seeds")]
    rows = [row for row in read_rows(path) if row["readout"] == "head"]
    for trial in TRIALS:
        means, covariances = (seed_means(rows, trial, column) for column in ("means_off", "covariances_off"))
        if means:
            off = f"{mean_and_spread(means, 2)} | {mean_and_spread(covariances, 2)}"
            lines.append(f"| {trial} | {off} | {len(means)} |")
    return "\n".join(lines) + "\n"


def summary(found: Cells) -> str:
    """Average of the steps, by the read-outs that the rule asks for and by the head."""
    from tables import heads_of

    columns = ("head", "discriminant", "over plain", "Mahalanobis", "over plain")
    lines = heads_of("trial", *columns, "seeds")
    for trial in dict.fromkeys(name for name, _ in found):
        head, discriminant, mahalanobis = (found[trial, name] for name in ("head", "discriminant", "mahalanobis"))
        cells = [head[2][0], *discriminant[2][:2], *mahalanobis[2][:2]]
        lines.append(f"| {trial} | {' | '.join(cells)} | {len(head[1])} |")
    return "\n".join(lines) + "\n"


def cells_of(path: Path) -> Cells:
    """On average of the steps and after the last one: accuracy, and what it has over ``plain``, from three seeds on
    with its interval.
    """
    from tables import NOT_THERE, mean_and_spread

    found = field.averages(path)
    best = field.best_options(search_of(path))
    of_plain = options_of("plain", best)
    shown = {}
    for trial in TRIALS:
        for readout, option in options_of(trial, best).items():
            seeds = found.get((trial, readout, option), {})
            if not seeds:
                continue
            plain = found.get(("plain", readout, of_plain[readout]), {})
            cells = []
            for column in (0, 1):
                cells.append(mean_and_spread([values[column] for values in seeds.values()]))
                cells.append(over(seeds, plain, column) if trial != "plain" else NOT_THERE)
            shown[trial, readout] = option, seeds, cells
    return shown


def search_of(path: Path) -> Path:
    """The CSV of the search that chooses for the one at ``path``."""
    return path.parent.with_name(SEARCH if path.parent.name == "photos32-5x4" else path.parent.name) / path.name


def options_of(trial: str, best: dict[tuple[str, str], str]) -> dict[str, str]:
    """Of each read-out the option that a search found best for the trial; LwF with a change has those of ``lwf``."""
    own = "lwf" if trial.startswith("lwf ") and (trial, "discriminant") not in best else trial
    return {readout: best[own, readout] for readout in OPTIONS if (own, readout) in best}


def over(these: dict[str, Any], those: dict[str, Any], column: int) -> str:
    """What the first have more, in pairs by seed; from three pairs on with its interval."""
    from tables import NOT_THERE, paired

    pairs = [(these[seed][column], those[seed][column]) for seed in these if seed in those]
    if not pairs:
        return NOT_THERE
    return paired(pairs) if len(pairs) >= 3 else f"{statistics.mean(one - other for one, other in pairs):+.1f}"


if __name__ == "__main__":
    sys.exit(main())
