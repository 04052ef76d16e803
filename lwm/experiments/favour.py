"""What new classes in closed form cost the old ones, on a network with a thousand classes and real photographs.

    python3 -m lwm.experiments.favour runs/mobilenet_v2/teacher_model.pth --data-dir real224 --unlabelled photos

``--data-dir`` holds old/test, whose folders are named as some of the teacher's classes, and for each of ``SETS`` the
folders train and test of classes that the teacher does not know. Features are taken once and kept beside the teacher.
Each seed draws ``IMAGES`` training images of each class anew. results/closed-form/ gets a row for each teacher, set,
favour and seed, and a table: what is right of the old photographs, answered over all classes, and of the new ones.
Two other ways to shift the new biases stand beside it. They rise until ``RISK`` of the images of a new class would be
taken if that class were unknown (the mean over classes), or until ``RISK`` of the images in ``--unlabelled`` are taken,
which are of anything. So do the best that one more shift reaches in hindsight with at most ``LOSS`` points of old
accuracy lost, and the reference: a logistic regression on the features of all new training images, asked among the new
classes alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lwm import classifiers
from lwm.classifiers import Linear
from lwm.closed_form import FAVOURS, new_rows
from lwm.experiments import tables
from lwm.images.datasets import Place, open_source
from lwm.images.files import decode_all
from lwm.images.folders import images_below
from lwm.runtime import hardware
from lwm.runtime.checkpoint import batch_size_of, load, restore_model
from lwm.runtime.errors import one_line_errors
from lwm.runtime.settings import OneLineParser

# How many tasks of how many classes: settings were chosen on the first, the others are reported.
SETS = {"tune": (3, 3), "new": (3, 5), "signs": (1, 10)}
IMAGES, LOSS, RISK = 30, 2.0, 0.05
WAYS = ("left-out", "unlabelled")
UNLABELLED = 400  # images are enough
MEASURES = ("teacher", "old", "new", "among_new", "hindsight", "reference")

Labelled = tuple[Tensor, Tensor]  # features (n, C), labels (n,)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="+", type=Path, help="checkpoints; a teacher goes by the name of its folder")
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--unlabelled", required=True, type=Path, help="a folder of images of anything, at any depth")
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    options = parser.parse_args(argv)
    path = tables.ROOT / "results" / "closed-form" / "accuracy.csv"
    for teacher in options.teachers:
        kept = features_of(teacher, options.data_dir, options.unlabelled)
        for name in SETS:
            for seed in range(options.seeds):
                for way, row in judged(kept, name, seed).items():
                    method = f"{teacher.parent.name} {name} {way}"
                    key = {"protocol": name, "method": method, "seed": seed, "task": 0}
                    tables.write_rows(path, [{**key, **row, **hardware.machine()}])
    tables.publish({path.with_name("table.md"): table_of(tables.read_rows(path))})


def table_of(rows: pd.DataFrame) -> str:
    """Means over the seeds: old and new accuracy by the way to shift; what hindsight and reference get of new."""
    lines = []
    named = rows["method"].str.rsplit(" ", n=1)
    rows = rows.assign(data=named.str[0], way=named.str[1])
    for data, own in rows.groupby("data", sort=False):
        means = own.groupby("way")[list(MEASURES)].agg("mean")
        cells = {
            f"{name}: old, new": "{:.1f}, {:.1f}".format(*means.loc[name, ["old", "new"]]) for name in [*FAVOURS, *WAYS]
        }
        balanced = {name: f"{means.loc['balanced', name]:.1f}" for name in ("teacher", "hindsight", "reference")}
        lines.append({"network, classes": data, "network, old": balanced.pop("teacher"), **cells, **balanced})
    return tables.markdown(lines)


def features_of(teacher: Path, data_dir: Path, unlabelled: Path) -> dict[str, Any]:
    """The head, and (features, labels) of old/test and of each set's train and test, from beside the teacher; and the
    features of images without labels.
    """
    beside = teacher.with_suffix(".features.pt")
    if not beside.exists():
        saved = load(teacher)
        model, classes, side = restore_model(saved), saved["class_names"], saved["image_size"]

        def features(pixels: Tensor) -> Tensor:
            return classifiers.features_of(model, pixels, saved["mean"], saved["std"], batch_size_of(saved))

        paths = images_below(unlabelled)
        random.Random(0).shuffle(paths)
        others = torch.from_numpy(decode_all(paths[:UNLABELLED], side, skip_bad_images=True)[0])
        made: dict[str, Any] = {"head": classifiers.linear_layer("head", None, model), "unlabelled": features(others)}
        for part in ("old", *SETS):
            source = open_source(Place("folder", str(data_dir / part)), side)
            names = sorted(source.classes["test"])
            for split in ("test",) if part == "old" else ("train", "test"):
                images = getattr(source, split)(names, classes if part == "old" else names)
                made[f"{part}/{split}"] = features(images.pixels), images.labels
        torch.save(made, beside)
    return torch.load(beside, weights_only=True)


def judged(kept: dict[str, Any], name: str, seed: int) -> dict[str, dict[str, float]]:
    """The row of a set for each way to shift: percent after all its tasks, one after another."""
    tasks, classes = SETS[name]
    generator, order = torch.Generator().manual_seed(seed), list(range(int(kept[f"{name}/train"][1].max()) + 1))
    random.Random(seed).shuffle(order)
    order = order[: tasks * classes]
    images = [_draw(kept[f"{name}/train"], order[n * classes :][:classes], generator) for n in range(tasks)]
    new, new_labels = _draw(kept[f"{name}/test"], order)
    all_labels = torch.cat([own + n * classes for n, (_, own) in enumerate(images)])
    reference = LogisticRegression(max_iter=1000).fit(torch.cat([each for each, _ in images]), all_labels)
    rows = {}
    for way in (*FAVOURS, *WAYS):
        weight, bias = kept["head"]
        known = len(bias)
        for each, own in images:
            more = shifted(way, (weight, bias), each, own, kept["unlabelled"])
            weight, bias = torch.cat([weight, more[0]]), torch.cat([bias, more[1]])
        row = measures((weight, bias), known, kept["old/test"], (new, new_labels))
        rows[way] = row | {"reference": 100 * float(reference.score(new, new_labels))}
    return rows


def shifted(way: str, head: Linear, features: Tensor, labels: Tensor, unlabelled: Tensor) -> Linear:
    """New rows whose biases are shifted in one of ``FAVOURS`` or ``WAYS``."""
    if way in FAVOURS:
        return new_rows(head, features, labels, way)
    weight, bias = new_rows(head, features, labels)
    if way == "unlabelled":
        return weight, bias + _room(head, (weight, bias), unlabelled)
    rooms = []
    for label in labels.unique():
        left_out = labels == label
        others = labels[~left_out].unique(return_inverse=True)[1]
        rooms.append(_room(head, new_rows(head, features[~left_out], others), features[left_out]))
    return weight, bias + torch.stack(rooms).mean()


def _room(head: Linear, rows: Linear, others: Tensor) -> Tensor:
    """How far the biases of new rows may rise until they take ``RISK`` of the images of other things."""
    highest, taken = ((others @ weight.T + bias).max(1).values for weight, bias in (head, rows))
    return (highest - taken).quantile(RISK)


def measures(layer: Linear, known: int, old: Labelled, new: Labelled) -> dict[str, float]:
    """All but the reference, of a layer whose first ``known`` rows are the teacher's; new labels count from 0."""
    of_old, of_new = (features @ layer[0].T + layer[1] for features, _ in (old, new))
    teacher, among = of_old[:, :known].argmax(1) == old[1], of_new[:, known:].argmax(1) == new[1]
    # The more all new biases are raised, the more of the old photographs are lost, each at its own shift.
    lost = (of_old[:, :known].max(1).values - of_old[:, known:].max(1).values)[teacher].sort().values
    shift = lost[int(LOSS / 100 * len(of_old))] - 1e-9
    right = {
        "teacher": teacher,
        "old": of_old.argmax(1) == old[1],
        "new": of_new.argmax(1) == new[1] + known,
        "among_new": among,
        "hindsight": among & (of_new[:, known:].max(1).values + shift > of_new[:, :known].max(1).values),
    }
    return {name: 100 * float(each.double().mean()) for name, each in right.items()}


def _draw(images: Labelled, order: list[int], generator: torch.Generator | None = None) -> Labelled:
    """The images of these classes, labelled by their place in ``order``; with a generator ``IMAGES`` of each."""
    features, labels = images
    chosen = []
    for label in order:
        own = (labels == label).nonzero().squeeze(1)
        chosen.append(own[torch.randperm(len(own), generator=generator)[:IMAGES]] if generator else own)
    counts = torch.tensor([len(own) for own in chosen])
    return features[torch.cat(chosen)], torch.arange(len(order)).repeat_interleave(counts)


if __name__ == "__main__":
    sys.exit(main())
