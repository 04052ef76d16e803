"""Good and bad values of every setting, and how a script reads them."""

from __future__ import annotations

from dataclasses import fields

import conftest
from conftest import page

from lwm.runtime.settings import SCRIPTS, Settings, read_settings

TRAINER, STEP, DEMO, GRADCAM = SCRIPTS
FILES = {
    TRAINER: [],
    STEP: ["--teacher", "t.pth"],
    DEMO: ["--teacher", "t.pth", "--student", "s.pth"],
    GRADCAM: ["--checkpoint", "c.pth", "--image", "i.png"],
}
CONSTANTS = [f.name for f in fields(Settings) if f.metadata]
NONSENSE = object()  # of no use to anything


def read(script: str = TRAINER, flags: str | list[str] = "", **constants) -> Settings:
    flags = flags.split() if isinstance(flags, str) else flags
    return read_settings(script, FILES[script] + flags, page(**constants))


def refused(script: str = TRAINER, flags: str | list[str] = "", **constants) -> str:
    return conftest.refused(read, script, flags, **constants)


BAD_VALUES = {  # constant: values that config.py could hold, and as texts of the command line
    "dataset": (["mnist", 3, ["digits"]], ["mnist", ""]),
    "data_dir": (["", 3, "a\0b"], ["", "a\udce9"]),
    "old_classes": (
        [2, "0", [0, 1], [], ["0", ""], ["0", "1", "0"], {"0": 1}],
        ["", "0,,1", "0,1,0", ",", "0, 0", "a\tb"],
    ),
    "new_classes": ([2, "0", [0, 1], [], ["0", ""], ["0", "1", "0"], ["a\x7f"], ["\udce9"]], ["", "0,,1", "0,1,0"]),
    "model": (["", 18, ["resnet18"]], [""]),
    "image_size": ([7, 32.0, "32", True, 1025, float("nan")], ["7", "32.0", "big", "1025", "-32", ""]),
    "mean": ([0.5, "0.5,0.5,0.5", [0.5, 0.5], [0.5, 0.5, True]], ["0.5", "0.5,0.5", "a,b,c", "nan,0,0"]),
    "std": ([1.0, [1, 1, 0], [1, 1, float("inf")]], ["1", "1,1,0", "1,1,-1"]),
    "method": (["LwM", 3, ["lwm"]], ["LwM", "ewc", ""]),
    "loss_form": (["sigmoid", 3], ["sigmoid"]),
    "beta": ([-0.1, "1", True, float("nan"), float("inf")], ["-0.1", "x", "nan", "inf"]),
    "gamma": ([-0.1, "1", True, float("nan"), 10**400], ["-0.1", "x", "nan", "1e400"]),
    "temperature": ([0, -1, "2"], ["0", "0.0", "-1", "warm"]),
    "attention": (["Grad-CAM", None], ["both"]),
    "attention_class": (["Student", 1], ["both"]),
    "batch_norm": (["eval", True], ["eval"]),
    "epochs": ([0, -1, 2.5, "5", True, [5]], ["-1", "2.5", "1e3", "five", ""]),
    "batch_size": ([1, 0, 64.0, 10**20], ["1", "0", "64.0", "9" * 20]),
    "lr": ([0, -0.1, "0.1", float("inf"), False, 10**400], ["0", "-0.1", "fast", "inf"]),
    "incremental_lr": ([0, -0.1, "0.1", float("nan")], ["0", "-0.1", "slow"]),
    "backbone_lr": ([0, -0.1, "0.1"], ["0", "-0.1", "slow"]),
    "freeze": ([-1, 1.5, None, "2"], ["-1", "all"]),
    "balanced": (["yes", 1, None], []),
    "momentum": ([-0.1, 1, "0.9"], ["1", "-1", "1.0"]),
    "weight_decay": ([-1e-4, "0"], ["-1", "none"]),
    "flip": (["yes", 1, 0], []),
    "precision": (["fp16", 32], ["fp16", "float32"]),
    "cache_dir": (["", None, 3], [""]),
    "skip_bad_images": (["yes", 1], []),
    "hold_back": ([0.6, -0.1, "0.1"], ["0.6", "-0.1", "half"]),
    "seed": ([-1, 0.0, 2**32, "0", 10**400], ["-1", "0.5", str(2**32), "x", "1" + "0" * 400, "1" + "0" * 5000]),
    "device": (["gpu", "cpu:0", "cuda:", "cuda:x", 0], ["gpu", "cpu:0", "cuda:", "cuda:-1", ""]),
    "deterministic": (["yes", 1], []),
    "statistics": (["yes", 1], []),
    "readout": (["heads", 1, None], ["heads", ""]),
    "save_interval": ([0, 1.5], ["0", "1.5"]),
    "save_interval_steps": ([-1, 1.5, None], ["-1", "1.5"]),
    "resume": (["no", 0], []),
    "overwrite": (["no", 1], []),
    "quiet": (["yes", 1], []),
    "json": (["yes", 1], []),
    "tensorboard": (["yes", 1], []),
    "output_dir": (["", 5], [""]),
}
GOOD_FLAGS = {
    "dataset": ("folder", "folder"),
    "data_dir": ("some/where", "some/where"),
    "old_classes": ("apple, baby", ("apple", "baby")),
    "new_classes": ("cow", ("cow",)),
    "model": ("resnet110", "resnet110"),
    "image_size": ("48", 48),
    "mean": ("0.5, 0.4,.3", (0.5, 0.4, 0.3)),
    "std": ("1,1,0.25", (1.0, 1.0, 0.25)),
    "method": ("lwf", "lwf"),
    "loss_form": ("softmax", "softmax"),
    "beta": ("0", 0.0),
    "gamma": ("1e-3", 0.001),
    "temperature": ("4", 4.0),
    "attention": ("signed", "signed"),
    "attention_class": ("teacher", "teacher"),
    "batch_norm": ("frozen", "frozen"),
    "epochs": ("7", 7),
    "batch_size": ("2", 2),
    "lr": ("0.25", 0.25),
    "incremental_lr": (".5", 0.5),
    "backbone_lr": ("1e-3", 0.001),
    "freeze": ("2", 2),
    "momentum": ("0", 0.0),
    "weight_decay": ("0", 0.0),
    "precision": ("bf16", "bf16"),
    "cache_dir": ("some/cache", "some/cache"),
    "hold_back": ("0.2", 0.2),
    "seed": ("4294967295", 2**32 - 1),
    "device": ("cuda:1", "cuda:1"),
    "readout": ("discriminant", "discriminant"),
    "save_interval": ("3", 3),
    "save_interval_steps": ("500", 500),
    "output_dir": ("runs/x", "runs/x"),
}


def reader_of(name: str) -> str:
    return next(script for script, (reads, _, _) in SCRIPTS.items() if name in reads.split())


def short(value) -> str:
    return repr(value)[:20]
