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

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from lwm import losses
from lwm.images.folders import Folder
from lwm.runtime.errors import InputError
from lwm.runtime.settings import cifar100_classes


@dataclass(frozen=True)
class Taken:
    """A network that knows the old classes already; it is taken as it is, in place of a first task.

    The folder of the data has the old classes' names in ``names``, a line each, test images of some of them in
    old/test/<class>/, and the new classes' images in ``new``/{train,test}/<class>/. A seed draws ``images`` training
    images of each new class.
    """

    flags: str  # of the teacher's script
    weights: str  # a file in --weights-dir
    new: str
    names: str = "imagenet_classes.txt"
    images: int = 30


@dataclass(frozen=True)
class Protocol:
    """``groups`` is the number of classes of each task; with ``rotation`` seed s starts s * rotation classes later."""

    about: str  # it is judged on the test images, or on training images that are held back
    dataset: str
    pool: slice
    groups: tuple[int, ...]
    flags: str  # of both training scripts, in every task
    methods: dict[str, str] = field(default_factory=dict)  # name -> flags of the incremental script: accuracy.csv
    ablation: dict[str, str] = field(default_factory=dict)  # likewise: ablation.csv
    first: str = ""  # further flags of the first task and of joint training
    taken: Taken | None = None
    by_name: bool = False  # photos in the order of their classes' names
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
SAME = "--warm-up 0 --momentum 0.9 --temperature 2 --batch-norm train --freeze 0 --no-balanced --calibration 0"
SAME += " --hold-back 0"
DIGITS = f"{SAME} --model resnet18 --image-size 32 --epochs 10 --batch-size 64 --lr 0.03 --incremental-lr 0.0125"
DIGITS += " --weight-decay 0 --no-flip --beta 1 --gamma 0.1 --precision fp32"
PHOTOS = f"{SAME} --model resnet32 --image-size 32 --epochs 20 --batch-size 128 --lr 0.1 --incremental-lr 0.1"
PHOTOS += " --weight-decay 5e-4 --flip --beta 1 --gamma 0.1"
BF16 = f"{PHOTOS} --precision bf16"


def is_joint(name: str) -> bool:
    """Of a method or variant: whether it is trained on all classes at once, whatever its settings."""
    return name.split()[0] == JOINT


def grid(methods: str, **values: Sequence[float]) -> dict[str, str]:
    """A variant for each method and each combination of values of these settings."""
    variants = {}
    for method in methods.split():
        for chosen in itertools.product(*values.values()):
            settings = list(zip(values, chosen, strict=True))
            name = " ".join([method, *(f"{setting}={value}" for setting, value in settings)])
            flags = (f"--{setting.replace('_', '-')} {value}" for setting, value in settings)
            variants[name] = " ".join([METHODS[method], *flags])
    return variants


def gammas(softmax_beta: float) -> dict[str, str]:
    """Variants of lwm in both forms of L_C and L_D; "softmax" is that over the new logits, with T = 2."""
    forms = {
        "binary": "--method lwm --loss-form binary",
        "softmax": f"--method lwm --loss-form softmax --temperature 2 --beta {softmax_beta}",
    }
    return {
        f"{form} gamma={gamma}": f"{flags} --gamma {gamma}"
        for form, flags in forms.items()
        for gamma in (0, 0.03, 0.1, 0.3, 1)
    }


GAMMAS = gammas(softmax_beta=1)
PHOTO_GAMMAS = gammas(softmax_beta=3)  # each form at what photos32-search chose for lwm and for lwf
# What L_D does alone: 0 leaves L_C over the new outputs, and nothing that holds the old ones.
BETAS = grid("lwf-mc lwf", beta=[0, 0.3, 1, 3, 10])
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
# What a variant is compared with, in pairs by seed.
REFERENCES = {name: f"{name.partition('=')[0]}=0" for name in GAMMAS | BETAS if not name.endswith("=0")}
REFERENCES |= dict.fromkeys([*CONTROLS, TRAINED], "binary gamma=0.1") | {FROZEN: TRAINED}

# With it joint training gets to 68.6 % on a held-back tenth (cifar100-search, one seed).
CIFAR = f"{SAME.replace('--warm-up 0', '--warm-up 0.1')} --model resnet32 --image-size 32 --epochs 60 --batch-size 128"
CIFAR += " --lr 0.1 --incremental-lr 0.1 --weight-decay 5e-4 --flip --beta 1 --gamma 0.1 --precision bf16"
JOINTS = {"lr=0.2": "--lr 0.2", "decay=0.001": "--weight-decay 1e-3"}
# As the strong harnesses weigh distillation: 10 at T = 2 without the factor T^2 that L_D has here.
STRONG = "--temperature 2 --beta 2.5"
CIFAR_METHODS = METHODS | {
    "lwf": f"{METHODS['lwf']} {STRONG}",
    "lwm softmax": f"--method lwm --loss-form softmax {STRONG}",
}

digits = partial(Protocol, dataset="digits", flags=DIGITS)
photos = partial(Protocol, dataset="folder", flags=BF16, methods=PHOTO_METHODS)
twenty_photos = partial(photos, pool=slice(0, 20), shuffle=True)
cifar = partial(Protocol, dataset="cifar100", flags=CIFAR, methods=CIFAR_METHODS)
apple_and_baby = partial(cifar, pool=slice(0, 4), groups=(2, 2), by_name=True)
# What is recommended for 1,000 images.
FOUR = CIFAR.replace("--epochs 60 --batch-size 128", "--epochs 25 --batch-size 32").replace("lr 0.1", "lr 0.025")
ten_by_ten = partial(cifar, pool=slice(0, 100), groups=(10,) * 10)
hundred = partial(photos, pool=slice(0, 100), ablation=PHOTO_GAMMAS)
# Settings are searched on other classes, and judged on held-back training images.
digits_search = partial(digits, pool=slice(4, 10), flags=f"{DIGITS} --hold-back 0.2", rotation=2)
photos_search = partial(photos, pool=slice(80, 100), flags=f"{BF16} --hold-back 0.1", methods={})
# Old are 500 photographs of ten of ImageNet's classes, answered over all 1,000 and the new ones.
MOBILENET = Taken("--model mobilenet_v2", "mobilenet_v2-b0353104.pth", new="new")
LITE = Taken("--model timm/tf_efficientnet_lite0", "efficientnet-lite0-57934424-renamed.pth", new="new")
REAL_METHODS = {name: METHODS[name] for name in ("closed-form", "finetune", "frozen", "lwf")}
# On the teacher's features of all training images of the new classes, asked among these alone; no script is run.
REFERENCE = "logistic regression"
REAL_METHODS |= {REFERENCE: "", "lwm": "--method lwm --new-rows random"}
REAL_METHODS["lwm from closed-form"] = "--method lwm --new-rows closed-form"
real = partial(Protocol, dataset="folder", flags="--image-size 224 --hold-back 0", methods=REAL_METHODS)
real_caltech = partial(real, pool=slice(0, 1015), groups=(1000, 5, 5, 5))
real_signs = partial(real, pool=slice(0, 1010), groups=(1000, 10))
PROTOCOLS = {
    "real-1000+5x3": real_caltech("MobileNetV2 of ImageNet: 15 Caltech-101 classes in 3 tasks of 5", taken=MOBILENET),
    "real-1000+5x3-lite0": real_caltech("the same with EfficientNet-Lite0", taken=LITE),
    "real-1000+10signs": real_signs(
        "MobileNetV2 of ImageNet: 10 traffic signs of GTSRB", taken=dataclasses.replace(MOBILENET, new="signs")
    ),
    "real-1000+10signs-lite0": real_signs(
        "the same with EfficientNet-Lite0", taken=dataclasses.replace(LITE, new="signs")
    ),
    "digits-2+2": digits(
        "scikit-learn digits, ResNet-18: teacher 0 and 1, student 2 and 3",
        pool=slice(0, 4),
        groups=(2, 2),
        methods={name: flags for name, flags in METHODS.items() if name not in ("frozen", JOINT)},
        # Learned faster: these lean to the new classes and show the frontier.
        ablation={
            "lwm lr=0.02": "--method lwm --incremental-lr 0.02",
            "lwm lr=0.02 gamma=1": "--method lwm --incremental-lr 0.02 --gamma 1",
        },
    ),
    "digits-search": digits_search(
        "digits, held back: 2 tasks of 2, from 4 on (seed 0), from 6 on (seed 1) or from 8 on, then 4 and 5 (seed 2)",
        groups=(2, 2),
        ablation=grid("lwm", incremental_lr=[0.01, 0.0125], gamma=[0, 0.1, 1])
        | grid("lwm", incremental_lr=[0.02], gamma=[0, 1]),
    ),
    "digits-search-3x2": digits_search(
        "digits, held back: 3 tasks of 2, from 4 on (seed 0), from 6 on (seed 1) or from 8 on, then 4 to 7 (seed 2)",
        groups=(2, 2, 2),
        ablation=grid("finetune", incremental_lr=[0.03, 0.0125, 0.005, 0.002])
        | grid("frozen", incremental_lr=[0.3, 0.1, 0.03, 0.0125])
        | grid("lwf lwf-mc lwm", incremental_lr=[0.0125, 0.025], beta=[1, 3]),
    ),
    "photos32-10+10": twenty_photos(
        "mini-ImageNet at 32 px, ResNet-32: classes 1-10 of the order, then 11-20",
        groups=(10, 10),
        ablation=PHOTO_GAMMAS | BETAS,
    ),
    # What bf16 costs: teacher and student in one precision, everything else the same.
    **{
        f"photos32-10+10-{precision}": photos(
            f"photos32-10+10 with teacher and student in {precision}",
            pool=slice(0, 20),
            groups=(10, 10),
            flags=f"{PHOTOS} --precision {precision}",
            methods={"lwm": METHODS["lwm"]},
        )
        for precision in ("fp32", "bf16")
    },
    "digits-5x2": digits(
        "scikit-learn digits, ResNet-18: 5 tasks of 2",
        pool=slice(0, 10),
        groups=(2,) * 5,
        methods=DIGITS_METHODS,
        ablation=GAMMAS,
        shuffle=True,
    ),
    "photos32-5x4": twenty_photos(
        "mini-ImageNet at 32 px, ResNet-32: classes 1-20 of the order in 5 tasks of 4",
        groups=(4,) * 5,
        # The last says what these images and this network have to give, where time is no matter.
        ablation=PHOTO_GAMMAS | CONTROLS | BATCH_NORM | {f"{JOINT} epochs=100": f"{METHODS[JOINT]} --epochs 100"},
    ),
    "photos32-10x10": hundred("mini-ImageNet at 32 px, ResNet-32: 10 tasks of 10", groups=(10,) * 10),
    "photos32-50+5x10": hundred("the same: 50 classes, then 5 tasks of 10", groups=(50, *(10,) * 5)),
    **{
        f"cifar100-2+2{suffix}": apple_and_baby(
            f"CIFAR-100, {model}: apple and aquarium_fish, then baby and bear",
            flags=FOUR.replace("--model resnet32", f"--model {model}"),
        )
        for suffix, model in {"": "resnet32", "-resnet18": "resnet18", "-resnet110": "resnet110"}.items()
    },
    "cifar100-5x20": cifar(
        "CIFAR-100, ResNet-32: 5 tasks of 20",
        pool=slice(0, 100),
        groups=(20,) * 5,
        ablation=grid("lwm", gamma=[0, 0.03, 0.1, 0.3, 1]),
    ),
    "cifar100-10x10": ten_by_ten("CIFAR-100, ResNet-32: 10 tasks of 10"),
    "cifar100-10x10-resnet18": ten_by_ten(
        "the same with ResNet-18, 200 epochs and then 100",
        flags=CIFAR.replace("--model resnet32", "--model resnet18 --stem cifar").replace("--epochs 60", "--epochs 100"),
        first="--epochs 200",
    ),
    "cifar100-50+5x10": cifar(
        "CIFAR-100, ResNet-32: 50 classes, then 5 tasks of 10", pool=slice(0, 100), groups=(50, *(10,) * 5)
    ),
    "cifar100-search": Protocol(
        "CIFAR-100, ResNet-32, held back: joint training on all classes",
        dataset="cifar100",
        pool=slice(0, 100),
        groups=(10,) * 10,
        flags=f"{CIFAR} --hold-back 0.1",
        ablation={f"{JOINT} lr=0.1": METHODS[JOINT]}
        | {f"{JOINT} {name}": f"{METHODS[JOINT]} {flags}" for name, flags in JOINTS.items()},
    ),
    "folder": Protocol(
        "your own images, ResNet-18 at 64 px: the classes of the folder in the order of their names",
        dataset="folder",
        pool=slice(0, None),
        groups=(),  # --groups
        flags="",  # as you have them in config.py
        methods=METHODS,
        by_name=True,
    ),
    "photos32-search-10+10": photos_search(
        "mini-ImageNet, held back: classes 81-90 of the order, then 91-100",
        groups=(10, 10),
        ablation=grid("finetune lwf") | grid("lwm", incremental_lr=[0.1], gamma=[0, 0.1]),
    ),
    "photos32-search": photos_search(
        "mini-ImageNet, held back: classes 81-100 of the order in 5 tasks of 4",
        groups=(4,) * 5,
        ablation=grid("finetune", incremental_lr=[0.1, 0.05, 0.02, 0.01])
        | grid("frozen", incremental_lr=[0.3, 0.1, 0.03, 0.01])
        | grid("lwf lwf-mc lwm", incremental_lr=[0.1, 0.03], beta=[1, 3]),
    ),
}

# Protocol -> the one that the options of compare_classifiers.py are searched on. Those with all hundred classes contain
# the classes of the search.
SEARCH = dict.fromkeys(["photos32-5x4", "photos32-10x10", "photos32-50+5x10"], "photos32-search")
SEARCH["digits-5x2"] = "digits-search-3x2"
# The cells of a search that were trained as the methods of its protocols are.
SEARCHED = {
    "photos32-search": {"lwf": "lwf incremental_lr=0.1 beta=3", "lwm": "lwm incremental_lr=0.1 beta=1"},
    "digits-search-3x2": {"lwf": "lwf incremental_lr=0.0125 beta=1", "lwm": "lwm incremental_lr=0.0125 beta=1"},
}


def class_order(protocol: Protocol, data_dir: str | None) -> list[str]:
    """The names of all classes of the data, in the order that the protocol takes its pool from."""
    old: list[str] = []
    if protocol.dataset == "digits":
        return [str(digit) for digit in range(10)]
    if protocol.dataset == "cifar100" and not (data_dir and (Path(data_dir) / "train").is_dir()):
        names = cifar100_classes()
    else:
        if not data_dir:
            raise InputError("--data-dir is missing: the folder with train/<class>/ and test/<class>/ is needed")
        if protocol.taken:
            old = (Path(data_dir) / protocol.taken.names).read_text().splitlines()
            names = Folder(Path(data_dir) / protocol.taken.new).classes.get("train", [])
        else:
            names = Folder(Path(data_dir)).classes.get("train", [])
        if len(old + names) < (needed := protocol.pool.stop):
            raise InputError(f"--data-dir {data_dir}: {len(names)} classes in train, and the protocol needs {needed}")
    if protocol.by_name:
        return names
    return old + [names[index] for index in np.random.RandomState(1993).permutation(len(names))]


def groups_of(protocol: Protocol, pool: list[str], seed: int) -> list[list[str]]:
    """The classes of each task."""
    if protocol.shuffle and seed:
        pool = [pool[index] for index in np.random.RandomState(seed).permutation(len(pool))]
    start, groups = seed * protocol.rotation, []
    for size in protocol.groups:
        groups.append([pool[(start + index) % len(pool)] for index in range(size)])
        start += size
    return groups
