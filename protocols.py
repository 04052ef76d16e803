"""The protocols that reproduce.py runs: which classes, in which steps, and with which settings.

A protocol takes a part of an order of classes, its pool. Digits stand in the order of their value, the photos in the
field's shuffle of the sorted names (seed 1993, that of iCaRL's CIFAR-100). Where it says so, a seed from 1 on shuffles
the pool once more: then the order of the classes differs between seeds, as initialisation, batches and crops always do.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Protocol:
    """``groups`` is the number of classes of each step; with ``rotation`` seed s starts s * rotation classes later."""

    about: str
    dataset: str
    pool: slice
    groups: tuple[int, ...]
    flags: str  # of both training scripts, in every step
    methods: dict[str, str]  # name -> flags of the incremental script: accuracy.csv
    ablation: dict[str, str] = field(default_factory=dict)  # likewise: ablation.csv
    shuffle: bool = False
    rotation: int = 0


# Trained on all classes at once by the first script: the upper bound. Its flags are that script's.
JOINT = "joint"
METHODS = {
    "finetune": "--method finetune",
    "frozen": "--method frozen --weight-decay 0",  # decay would shrink the old rows of the head, which nothing teaches
    "lwf": "--method lwf",
    "lwf-mc": "--method lwf-mc",
    "lwm": "--method lwm",
    JOINT: "--loss-form softmax",
}
PHOTOS = "--model resnet32 --image-size 32 --epochs 20 --batch-size 128 --lr 0.1 --incremental-lr 0.1"
PHOTOS += " --weight-decay 5e-4 --flip --beta 1 --gamma 0.1"
BF16 = f"{PHOTOS} --precision bf16"


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


def rates(method: str, values: list[float]) -> dict[str, str]:
    """A variant of a method for each learning rate."""
    return {f"{method} incremental_lr={rate}": f"{METHODS[method]} --incremental-lr {rate}" for rate in values}


PROTOCOLS = {
    "digits-2+2": Protocol(
        about="scikit-learn digits, ResNet-18: teacher 0 and 1, student 2 and 3, judged on the test images",
        dataset="digits",
        pool=slice(0, 4),
        groups=(2, 2),
        flags="",
        # The last two are no choices of ours: learned faster, they lean to the new classes and show the frontier.
        methods={name: METHODS[name] for name in ("finetune", "lwf", "lwf-mc", "lwm")}
        | {
            "lwm lr=0.02": "--method lwm --incremental-lr 0.02",
            "lwm lr=0.02 gamma=1": "--method lwm --incremental-lr 0.02 --gamma 1",
        },
    ),
    "digits-search": Protocol(
        about="scikit-learn digits 4 to 9, ResNet-18: 4 and 5 then 6 and 7 (seed 0), 6 and 7 then 8 and 9 (seed 1), "
        "8 and 9 then 4 and 5 (seed 2), judged on a fifth of the training images, held back",
        dataset="digits",
        pool=slice(4, 10),
        groups=(2, 2),
        flags="--hold-back 0.2",
        methods={},
        ablation=grid("lwm", incremental_lr=[0.01, 0.0125], gamma=[0, 0.1, 1])
        | grid("lwm", incremental_lr=[0.02], gamma=[0, 1]),
        rotation=2,
    ),
    "photos32-10+10": Protocol(
        about="mini-ImageNet at 32 px, ResNet-32: classes 1-10 of the order, then 11-20, judged on the test images",
        dataset="folder",
        pool=slice(0, 20),
        groups=(10, 10),
        flags=BF16,
        methods={name: METHODS[name] for name in ("finetune", "lwf", "lwf-mc", "lwm")},
    ),
    "photos32-10+10-fp32": Protocol(
        about="lwm of photos32-10+10 in both precisions, the teacher's too",
        dataset="folder",
        pool=slice(0, 20),
        groups=(10, 10),
        flags=f"{PHOTOS} --precision fp32",
        methods={"lwm": METHODS["lwm"]},
    ),
    "photos32-search": Protocol(
        about="mini-ImageNet at 32 px, ResNet-32: classes 81-100 of the order in 5 steps of 4, judged on a tenth of "
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
