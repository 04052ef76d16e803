"""The protocols that reproduce.py runs: which classes, in which tasks, and with which settings.

From the literature are the binary form, the cold start in 10 tasks of 10 classes and ResNet-32 for 32 px (iCaRL,
Rebuffi et al., CVPR 2017), 50 classes before 5 tasks of 10 (Hou et al., CVPR 2019), and T = 2 of LwF (Li and Hoiem,
ECCV 2016). The epochs, the rates and the protocols on digits and on 20 classes are ours, for two CPU cores.

A protocol takes a part of an order of classes, its pool. Digits stand in the order of their value, the photos and
CIFAR-100 in the field's shuffle of the sorted names (seed 1993, that of iCaRL), your own classes by name. If it says
so, a seed from 1 on shuffles the pool once more. Then the order of the classes differs between seeds, as
initialisation, batches and crops always do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lwm import losses
from lwm.runtime.errors import InputError
from lwm.runtime.settings import cifar100_classes


@dataclass(frozen=True)
class Protocol:
    """``groups`` is the number of classes of each task; with ``rotation`` seed s starts s * rotation classes later."""

    about: str
    dataset: str
    pool: slice
    groups: tuple[int, ...]
    flags: str  # of both training scripts, in every task
    methods: dict[str, str]  # name -> flags of the incremental script: accuracy.csv
    ablation: dict[str, str] = field(default_factory=dict)  # likewise: ablation.csv
    order: int | None = 1993  # seed of the shuffle of the sorted names, None for none
    shuffle: bool = False
    rotation: int = 0


# Trained on all classes at once by the first script: the upper bound. Its flags are that script's.
JOINT = "joint"
# Decay would shrink the old rows of the head, which nothing teaches if only the head is trained.
METHODS = {
    name: f"--method {name}" + ("" if method.trains_backbone else " --weight-decay 0")
    for name, method in losses.METHODS.items()
} | {JOINT: "--loss-form softmax"}
# What photos32-search chose: the highest average over the tasks, on other classes. Elsewhere all take the flags.
PHOTO_METHODS = METHODS | {
    "frozen": f"{METHODS['frozen']} --incremental-lr 0.3",
    "lwf": f"{METHODS['lwf']} --beta 3",
    "lwf-mc": f"{METHODS['lwf-mc']} --beta 3",
}
# What digits-search-3x2 chose, likewise. The others take DIGITS, which is what it chose for each of them.
DIGITS_METHODS = METHODS | {"frozen": f"{METHODS['frozen']} --incremental-lr 0.1"}
# Said even where it is the default of config.py, which users edit.
SAME = "--momentum 0.9 --temperature 2 --batch-norm train --freeze 0 --no-balanced --hold-back 0"
DIGITS = f"{SAME} --model resnet18 --image-size 32 --epochs 10 --batch-size 64 --lr 0.03 --incremental-lr 0.0125"
DIGITS += " --weight-decay 0 --no-flip --beta 1 --gamma 0.1 --precision fp32"
PHOTOS = f"{SAME} --model resnet32 --image-size 32 --epochs 20 --batch-size 128 --lr 0.1 --incremental-lr 0.1"
PHOTOS += " --weight-decay 5e-4 --flip --beta 1 --gamma 0.1"
BF16 = f"{PHOTOS} --precision bf16"


def is_joint(name: str) -> bool:
    """Of a method or variant: whether it is trained on all classes at once, whatever its settings."""
    return name.split()[0] == JOINT


def grid(methods: str, **values: list[float]) -> dict[str, str]:
    """A variant for each method and each pair of values of two flags."""
    (first, ones), (second, others) = values.items()
    return {
        f"{method} {first}={one} {second}={other}": (
            f"{METHODS[method]} --{first.replace('_', '-')} {one} --{second.replace('_', '-')} {other}"
        )
        for method in methods.split()
        for one in ones
        for other in others
    }


def gammas(values: list[float], softmax_beta: float) -> dict[str, str]:
    """Variants of lwm in both forms of L_C and L_D; "softmax" is that over the new logits, with T = 2."""
    forms = {
        "binary": "--method lwm --loss-form binary",
        "softmax": f"--method lwm --loss-form softmax --temperature 2 --beta {softmax_beta}",
    }
    return {f"{form} gamma={gamma}": f"{flags} --gamma {gamma}" for form, flags in forms.items() for gamma in values}


def rates(method: str, values: list[float]) -> dict[str, str]:
    """A variant of a method for each learning rate."""
    return {f"{method} incremental_lr={rate}": f"{METHODS[method]} --incremental-lr {rate}" for rate in values}


WEIGHTS = [0, 0.03, 0.1, 0.3, 1]
GAMMAS = gammas(WEIGHTS, softmax_beta=1)
PHOTO_GAMMAS = gammas(WEIGHTS, softmax_beta=3)  # each form at what photos32-search chose for lwm and for lwf
# What L_D does alone: 0 leaves L_C over the new outputs, and nothing that holds the old ones.
BETAS = {
    f"{method} beta={beta}": f"{METHODS[method]} --beta {beta}"
    for method in ("lwf-mc", "lwf")
    for beta in (0, 0.3, 1, 3, 10)
}
# Methods of controls.py: what in L_AD does it.
CONTROLS = {
    f"lwm {name}": f"--method lwm-{name}"
    for name in ("signed", "through-features", "through-head", "new-class", "features", "teacher-class")
}
# The L1 distance of unit vectors grows with the root of their length, and the features have 64 times that of a map.
CONTROLS["lwm features gamma=0.0125"] = "--method lwm-features --gamma 0.0125"
# With frozen batch-norm the loss is nan in the first epoch at the protocol's own rate, 0.1, and in one seed of three
# at 0.03.
BATCH_NORM = {
    f"batch_norm={value} lr=0.01": f"--method lwm --batch-norm {value} --incremental-lr 0.01"
    for value in ("train", "frozen")
}
TRAINED, FROZEN = BATCH_NORM
# What a method or a variant is compared with, in pairs by seed.
REFERENCES = {"lwm": "lwf-mc", "lwf-mc": "finetune"}
REFERENCES |= {name: f"{name.partition('=')[0]}=0" for name in GAMMAS | BETAS if not name.endswith("=0")}
REFERENCES |= dict.fromkeys([*CONTROLS, TRAINED], "binary gamma=0.1") | {FROZEN: TRAINED}
PROTOCOLS = {
    "digits-2+2": Protocol(
        about="scikit-learn digits, ResNet-18: teacher 0 and 1, student 2 and 3, judged on the test images",
        dataset="digits",
        order=None,
        pool=slice(0, 4),
        groups=(2, 2),
        flags=DIGITS,
        methods={name: flags for name, flags in METHODS.items() if name not in ("frozen", JOINT)},
        # Learned faster: these lean to the new classes and show the frontier.
        ablation={
            "lwm lr=0.02": "--method lwm --incremental-lr 0.02",
            "lwm lr=0.02 gamma=1": "--method lwm --incremental-lr 0.02 --gamma 1",
        },
    ),
    "digits-search": Protocol(
        about="scikit-learn digits 4 to 9, ResNet-18: 4 and 5 then 6 and 7 (seed 0), 6 and 7 then 8 and 9 (seed 1), "
        "8 and 9 then 4 and 5 (seed 2), judged on a fifth of the training images, held back",
        dataset="digits",
        order=None,
        pool=slice(4, 10),
        groups=(2, 2),
        flags=f"{DIGITS} --hold-back 0.2",
        methods={},
        ablation=grid("lwm", incremental_lr=[0.01, 0.0125], gamma=[0, 0.1, 1])
        | grid("lwm", incremental_lr=[0.02], gamma=[0, 1]),
        rotation=2,
    ),
    "digits-search-3x2": Protocol(
        about="scikit-learn digits 4 to 9, ResNet-18: 3 tasks of 2, from 4 on (seed 0), from 6 on (seed 1) or "
        "from 8 on (seed 2), judged on a fifth of the training images, held back",
        dataset="digits",
        order=None,
        pool=slice(4, 10),
        groups=(2, 2, 2),
        flags=f"{DIGITS} --hold-back 0.2",
        methods={},
        ablation=rates("finetune", [0.03, 0.0125, 0.005, 0.002])
        | rates("frozen", [0.3, 0.1, 0.03, 0.0125])
        | grid("lwf lwf-mc lwm", incremental_lr=[0.0125, 0.025], beta=[1, 3]),
        rotation=2,
    ),
    "photos32-10+10": Protocol(
        about="mini-ImageNet at 32 px, ResNet-32: classes 1-10 of the order, then 11-20, judged on the test images",
        dataset="folder",
        pool=slice(0, 20),
        groups=(10, 10),
        flags=BF16,
        methods=PHOTO_METHODS,
        ablation=PHOTO_GAMMAS | BETAS,
        shuffle=True,
    ),
    # What bf16 costs: teacher and student in one precision, everything else the same.
    **{
        f"photos32-10+10-{precision}": Protocol(
            about=f"photos32-10+10 with teacher and student in {precision}",
            dataset="folder",
            pool=slice(0, 20),
            groups=(10, 10),
            flags=f"{PHOTOS} --precision {precision}",
            methods={"lwm": METHODS["lwm"]},
        )
        for precision in ("fp32", "bf16")
    },
    "digits-5x2": Protocol(
        about="scikit-learn digits, ResNet-18: 5 tasks of 2, judged on the test images",
        dataset="digits",
        order=None,
        pool=slice(0, 10),
        groups=(2,) * 5,
        flags=DIGITS,
        methods=DIGITS_METHODS,
        ablation=GAMMAS,
        shuffle=True,
    ),
    "photos32-5x4": Protocol(
        about="mini-ImageNet at 32 px, ResNet-32: classes 1-20 of the order in 5 tasks of 4, judged on the test images",
        dataset="folder",
        pool=slice(0, 20),
        groups=(4,) * 5,
        flags=BF16,
        methods=PHOTO_METHODS,
        # The last says what these images and this network have to give, where time is no matter.
        ablation=PHOTO_GAMMAS | CONTROLS | BATCH_NORM | {f"{JOINT} epochs=100": f"{METHODS[JOINT]} --epochs 100"},
        shuffle=True,
    ),
    **{
        f"{data}-{name}": Protocol(
            about=f"{words}, ResNet-32: {tasks}, judged on the test images",
            dataset=dataset,
            pool=slice(0, 100),
            groups=groups,
            flags=BF16,
            methods=PHOTO_METHODS,
            ablation=PHOTO_GAMMAS,
        )
        for data, dataset, words in (
            ("photos32", "folder", "mini-ImageNet at 32 px"),
            ("cifar100", "cifar100", "CIFAR-100"),
        )
        for name, tasks, groups in (
            ("10x10", "10 tasks of 10", (10,) * 10),
            ("50+5x10", "50 classes, then 5 tasks of 10", (50, *(10,) * 5)),
        )
    },
    "folder": Protocol(
        about="your own images, ResNet-18 at 64 px: the classes of the folder in the order of their names",
        dataset="folder",
        pool=slice(0, None),
        order=None,
        groups=(),  # --groups
        flags="",  # as you have them in config.py
        methods=METHODS,
    ),
    "photos32-search-10+10": Protocol(
        about="mini-ImageNet at 32 px, ResNet-32: classes 81-90 of the order, then 91-100, judged on a tenth of the "
        "training images, held back",
        dataset="folder",
        pool=slice(80, 100),
        groups=(10, 10),
        flags=f"{BF16} --hold-back 0.1",
        methods={},
        ablation={name: METHODS[name] for name in ("finetune", "lwf")}
        | grid("lwm", incremental_lr=[0.1], gamma=[0, 0.1]),
    ),
    "photos32-search": Protocol(
        about="mini-ImageNet at 32 px, ResNet-32: classes 81-100 of the order in 5 tasks of 4, judged on a tenth of "
        "the training images, held back",
        dataset="folder",
        pool=slice(80, 100),
        groups=(4,) * 5,
        flags=f"{BF16} --hold-back 0.1",
        methods={},
        ablation=rates("finetune", [0.1, 0.05, 0.02, 0.01])
        | rates("frozen", [0.3, 0.1, 0.03, 0.01])
        | grid("lwf lwf-mc lwm", incremental_lr=[0.1, 0.03], beta=[1, 3]),
    ),
}

# Protocol -> the one that the options of compare_classifiers.py are searched on. Those with all hundred classes contain
# the classes of the search.
SEARCH = {
    "photos32-5x4": "photos32-search",
    "photos32-10x10": "photos32-search",
    "photos32-50+5x10": "photos32-search",
    "digits-5x2": "digits-search-3x2",
}
# The cells of a search that were trained as the methods of its protocols are.
SEARCHED = {
    "photos32-search": {"lwf": "lwf incremental_lr=0.1 beta=3", "lwm": "lwm incremental_lr=0.1 beta=1"},
    "digits-search-3x2": {"lwf": "lwf incremental_lr=0.0125 beta=1", "lwm": "lwm incremental_lr=0.0125 beta=1"},
}


def class_order(protocol: Protocol, data_dir: str | None) -> list[str]:
    """The names of all classes of the data, sorted, or in the protocol's shuffle of that."""
    if protocol.dataset == "digits":
        names = [str(digit) for digit in range(10)]
    elif protocol.dataset == "cifar100":
        names = cifar100_classes()
    else:
        if not data_dir or not (Path(data_dir) / "train").is_dir():
            raise InputError(f"--data-dir is {data_dir!r}: the folder with train/<class>/ and test/<class>/ is needed")
        names = sorted(path.name for path in (Path(data_dir) / "train").iterdir() if path.is_dir())
        if len(names) < protocol.pool.stop:
            needed = protocol.pool.stop
            raise InputError(f"--data-dir {data_dir}: {len(names)} classes in train, and the protocol needs {needed}")
    if protocol.order is None:
        return names
    return [names[index] for index in np.random.RandomState(protocol.order).permutation(len(names))]


def groups_of(protocol: Protocol, pool: list[str], seed: int) -> list[list[str]]:
    """The classes of each task."""
    if protocol.shuffle and seed:
        pool = [pool[index] for index in np.random.RandomState(seed).permutation(len(pool))]
    start, groups = seed * protocol.rotation, []
    for size in protocol.groups:
        groups.append([pool[(start + index) % len(pool)] for index in range(size)])
        start += size
    return groups
