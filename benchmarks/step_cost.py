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
    cases = {method: step_of(options, method) for method in METHODS} | {"forward, eval": forward_of(options)}
    seconds = interleaved(cases, options.repeats)
    # Each round compares its own times: what slows a round down slows both.
    ratio = {
        name: round(statistics.median(a / b for a, b in zip(times, seconds["finetune"], strict=True)), 3)
        for name, times in seconds.items()
    }
    speed = {name: round(options.batch_size / statistics.median(times), 1) for name, times in seconds.items()}
    memory = {method: memory_in_a_process_of_its_own(method) for method in METHODS}
    report(
        options,
        ratio=ratio,
        floor=round(1 + ratio["forward, eval"], 3),
        images_per_second=speed,
        memory_ratio={name: round(value / memory["finetune"], 3) for name, value in memory.items()},
    )


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


def report(options, **figures) -> None:
    """Print the figures with the command, the date and the machine, and write them to --json if that is given."""
    script = Path(sys.argv[0])
    command = f"python3 {script.parent.name}/{script.name} {' '.join(sys.argv[1:])}".strip()
    text = json.dumps({"command": command, **figures, **hardware.machine()}, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


# The cases --------------------------------------------------------------------------------------------------------


def student_and_teacher(options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """On the device; the teacher in eval mode, its batch-norm not folded yet."""
    device = hardware.pick_device(options.device)
    torch.manual_seed(0)
    student = models.build(options.model, OLD + NEW, options.image_size).train()
    teacher = models.build(options.model, OLD, options.image_size).eval().requires_grad_(False)
    return hardware.to_device(student, device), hardware.to_device(teacher, device)


def batch(options) -> tuple[torch.Tensor, torch.Tensor]:
    """Images on the device, in the layout that the training loop has, and labels of new classes."""
    device = hardware.pick_device(options.device)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    labels = torch.arange(options.batch_size, device=device) % NEW + OLD
    return images.to(device, memory_format=torch.channels_last), labels


def step_of(options, name: str) -> Callable[[], object]:
    """One step of the optimiser of a method, as the training loop takes it, on images that are in place."""
    student, teacher = student_and_teacher(options)
    images, labels = batch(options)
    method = losses.METHODS.get(name) or losses.Method(autograd_loss(student, teacher, images))
    if name in losses.METHODS:
        teacher = models.fold_batch_norm(teacher) if method.asks_teacher else None
    form = method.form or SETTINGS["loss_form"]
    settings = types.SimpleNamespace(**SETTINGS | {"loss_form": form}, precision=options.precision)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=5e-4)
    for network in (student, teacher) if options.compile else ():
        if network is not None:
            network.compile()
    batches = Batches([(images, labels, 1.0)])
    named = labels.unique()
    return lambda: train_one_epoch(student, teacher, batches, method.loss, OLD, settings, optimizer, SCHEDULE, named)


def autograd_loss(student, teacher, images: torch.Tensor) -> Callable:
    """lwm with the general form of Grad-CAM."""

    def loss(student_output, teacher_output, labels, old, settings):
        terms = losses.distil(student_output, teacher_output, labels, old, settings)
        classes = student_output.logits[:, :old].detach().argmax(1)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            ours = autograd_map(student, images, classes, student.last_layer, create_graph=True)
            theirs = autograd_map(teacher, images, classes, teacher.last_layer)
        return losses.with_attention(terms, ours.float(), theirs.float(), settings.gamma)

    return loss


def forward_of(options) -> Callable[[], object]:
    """A forward pass of the teacher."""
    teacher = models.fold_batch_norm(student_and_teacher(options)[1])
    if options.compile:
        teacher.compile()
    images, _ = batch(options)

    def run() -> object:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=options.precision == "bf16"), torch.no_grad():
            return teacher(images)

    return run


# Measuring --------------------------------------------------------------------------------------------------------


def interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each case in each round, after two rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + 2):
        for name, case in cases.items():
            seconds[name].append(seconds_of(case))
    return {name: times[2:] for name, times in seconds.items()}


def seconds_of(case: Callable[[], object]) -> float:
    wait()
    started = time.perf_counter()
    case()
    wait()
    return time.perf_counter() - started


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_in_a_process_of_its_own(method: str) -> float:
    command = [sys.executable, *sys.argv, "--memory-of", method]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory(step: Callable[[], object], device: str) -> float:
    """MiB that three steps take at the most: of the device, or of the process beyond what it had before them."""
    before = resident("VmRSS")
    for _ in range(3):
        step()
    if hardware.pick_device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """A figure of Linux's /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) / 1024


if __name__ == "__main__":
    main()
