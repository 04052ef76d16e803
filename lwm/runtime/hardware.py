"""What a run computes on: the device, its precision and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwm.runtime import distributed
from lwm.runtime.errors import InputError, log


def prepare(settings: Any) -> tuple[Any, torch.device]:
    """The device of a training run, set up as the settings say; "auto" is decided in the settings that return.

    Meets the other processes of a torchrun job. Raises InputError for what the machine cannot do.
    """
    with settings.naming("device"):
        device = distributed.join(pick_device(settings.device))
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
        log.info(f"PRECISION = {precision} (auto, on {device})")
    elif precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise InputError(f"{settings.where('precision')}: bf16: {torch.cuda.get_device_name()} has no bf16; use fp32")
    warn_of_emulation(precision, device)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    return dataclasses.replace(settings, precision=precision), device


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, else Apple's MPS, else the CPU; a numbered one becomes the current one.

    Raises InputError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # what is asked of "the" device is then asked of this one
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("mps: there is none on this machine; use cpu or auto")
    return device


def warn_of_emulation(precision: str, device: torch.device) -> None:
    if precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        log.warning("this processor is not known to have bf16, which may then take ten times as long as fp32")


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself, rather than by way of fp32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(bf16_instruction())
    return False


def bf16_instruction() -> str:
    """The fastest by which the processor multiplies bf16; empty without one, and where an older torch does not tell."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if capabilities.get(name, False)), "")


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next step, instead of giving it back to the system each time.

    A step with a teacher frees and takes some more than one without, and the pages would be cleared anew:
    docs/performance.md has the figures. Only glibc knows these two options (mallopt(3)).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks below it come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top of the heap that is kept


def to_device(model: Any, device: torch.device) -> Any:
    """Channels-last memory: the layout in which convolutions are fastest on CPUs and GPUs alike."""
    return model.to(device).to(memory_format=torch.channels_last)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``, without waiting for what the device is doing."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def random_state(device: torch.device) -> Tensor | None:
    """Of the device's own generator, from which dropout draws; None for a CPU, whose generator is torch's."""
    if device.type == "cpu":
        return None
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()


def set_random_state(device: torch.device, state: Tensor | None) -> None:
    """Nothing where ``state`` is of a device of another kind. Raises InputError where it is damaged."""
    now = random_state(device)
    if state is None or now is None or len(state) != len(now):
        return
    try:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.mps.set_rng_state(state)
    except RuntimeError as error:
        raise InputError("cannot resume: the saved random state of the device is damaged") from error


def has_room_for(pixels: Tensor, device: torch.device) -> bool:
    """Whether all images of a run can lie on the device; half of its free memory is left to the networks."""
    return device.type != "cuda" or pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2


def machine(threads: int | None = None) -> dict[str, str]:
    """Date, hardware and versions, as every committed figure has them beside it.

    With the instruction by which a processor multiplies bf16: on it hang the time and the last digits.
    """
    import torchvision

    bf16 = f" with {name}" if (name := bf16_instruction()) else ""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = threads or torch.get_num_threads()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{gpu}{processor()}{bf16}, {threads} thread(s) a run",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
