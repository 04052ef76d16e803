"""What one step of the optimiser costs, in fine-tuning steps: every method interleaved with the others in one run.

    python3 benchmarks/step_cost.py --model resnet32 --precision bf16 --json step_cost.json

The floor of a method with a teacher is one forward pass in eval mode more: 1 + F_eval / (a fine-tuning step).
"lwm-autograd" is the same loss with the maps of attention.autograd_map at the last layer, which passes forward anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lwm import losses, models
from lwm.attention import autograd_map
from lwm.runtime import hardware
from lwm.runtime.hardware import machine
from lwm.training import train_one_epoch

METHODS = ("finetune", "lwf", "lwf-mc", "lwm", "lwm-autograd")
OLD, NEW = 10, 10
SETTINGS = {"loss_form": "binary", "beta": 1.0, "gamma": 0.1, "temperature": 2.0}
SCHEDULE = types.SimpleNamespace(step=lambda: None)  # at one learning rate


class Batches(list):
    """Batches that are ready: normalised images, labels, and the weight 1."""

    def record(self, terms: losses.Terms) -> None:
        """The loss terms are not kept."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="networks by torch.compile")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; each method runs once in each (default: 15)")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_memory(step_of(options, options.memory_of), options.device))
        return
    hardware.keep_freed_memory()
    cases = {method: step_of(options, method) for method in METHODS}
    cases |= {f"forward, {mode}": forward_of(options, mode) for mode in ("train", "eval")}
    seconds = interleaved(cases, options.repeats)
    memory = {method: memory_in_a_process_of_its_own(method) for method in METHODS}
    figures = report(options, **summary(options, seconds, memory))
    print(json.dumps(figures, indent=1))


def arguments(description: str) -> argparse.ArgumentParser:
    """What every benchmark of a step or an epoch asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32", choices=["resnet18", "resnet32", "resnet110"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser


def report(options, **figures) -> dict:
    """The figures with the command, the date and the machine; written to --json if that is given."""
    script = Path(sys.argv[0])
    command = f"python3 {script.parent.name}/{script.name} {' '.join(sys.argv[1:])}".strip()
    figures = {"command": command, **figures, **machine()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


# The cases --------------------------------------------------------------------------------------------------------


def network(options, classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = models.build(options.model, classes, options.image_size)
    return hardware.to_device(model, hardware.pick_device(options.device))


def images(options) -> torch.Tensor:
    """A batch on the device, in the layout that the training loop has."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(options.batch_size, 3, options.image_size, options.image_size, generator=generator)
    return pixels.to(hardware.pick_device(options.device), memory_format=torch.channels_last)


def step_of(options, name: str) -> Callable[[], object]:
    """One step of the optimiser of a method, as the training loop takes it, on images that are in place."""
    student, teacher = network(options, OLD + NEW).train(), network(options, OLD).eval().requires_grad_(False)
    inputs = images(options)
    labels = torch.arange(options.batch_size, device=inputs.device) % NEW + OLD
    method = losses.METHODS.get(name) or losses.Method(autograd_loss(student, teacher, inputs))
    if name in losses.METHODS:
        teacher = models.fold_batch_norm(teacher) if method.asks_teacher else None
    form = method.form or SETTINGS["loss_form"]
    settings = types.SimpleNamespace(**SETTINGS | {"loss_form": form}, precision=options.precision)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=5e-4)
    if options.compile:
        student.compile()
        if teacher is not None:
            teacher.compile()
    batches = Batches([(inputs, labels, 1.0)])
    return lambda: train_one_epoch(student, teacher, batches, method.loss, OLD, settings, optimizer, SCHEDULE)


def autograd_loss(student, teacher, inputs: torch.Tensor) -> Callable:
    """lwm with the general form of Grad-CAM."""

    def loss(student_output, teacher_output, labels, old, settings):
        terms = losses.distil(student_output, teacher_output, labels, old, settings)
        classes = student_output.logits[:, :old].detach().argmax(1)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            ours = autograd_map(student, inputs, classes, student.last_layer, create_graph=True)
            theirs = autograd_map(teacher, inputs, classes, teacher.last_layer)
        return losses.with_attention(terms, ours.float(), theirs.float(), settings.gamma)

    return loss


def forward_of(options, mode: str) -> Callable[[], object]:
    """A forward pass: in train mode with what the backward pass needs, in eval mode as the teacher's."""
    model = network(options, OLD).train(mode == "train")
    if mode == "eval":
        model = models.fold_batch_norm(model)
    if options.compile:
        model.compile()
    inputs = images(options)

    def run() -> object:
        autocast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=options.precision == "bf16")
        with autocast, torch.set_grad_enabled(mode == "train"):
            return model(inputs)

    return run


# Measuring --------------------------------------------------------------------------------------------------------


def interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each case in each round, after two rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats + 2):
        for name, case in cases.items():
            wait()
            started = time.perf_counter()
            case()
            wait()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_in_a_process_of_its_own(method: str) -> float:
    done = subprocess.run(
        [sys.executable, *sys.argv, "--memory-of", method], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def peak_memory(step: Callable[[], object], device: str) -> float:
    """MiB that three steps take at the most: of the device, or of the process beyond what it had before them."""
    if hardware.pick_device(device).type == "cuda":
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() / 2**20
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """A figure of Linux's /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) / 1024


def summary(options, seconds: dict[str, list[float]], memory: dict[str, float]) -> dict:
    base = seconds["finetune"]
    # Each round compares its own times: what slows a round down slows both.
    ratios = {name: [a / b for a, b in zip(times, base, strict=True)] for name, times in seconds.items()}
    ratio = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    return {
        "ratio": ratio,
        "ratio_quartiles": {name: [round(q, 3) for q in quartiles(values)] for name, values in ratios.items()},
        "floor": round(1 + ratio["forward, eval"], 3),
        "images_per_second": {
            name: round(options.batch_size / statistics.median(times), 1) for name, times in seconds.items()
        },
        "milliseconds": {
            name: {"median": round(1e3 * statistics.median(times), 2), "minimum": round(1e3 * min(times), 2)}
            for name, times in seconds.items()
        },
        "memory_mib": {name: round(value, 1) for name, value in memory.items()},
        "memory_ratio": {name: round(value / memory["finetune"], 3) for name, value in memory.items()},
    }


def quartiles(values: list[float]) -> tuple[float, float]:
    first, _, third = statistics.quantiles(values, n=4)
    return first, third


if __name__ == "__main__":
    main()
