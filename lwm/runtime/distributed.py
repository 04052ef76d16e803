"""Several processes that train one network: all that they say to each other goes through here.

torchrun starts them and tells each its number; alone, every function does nothing. Each process reads the same files,
draws the same random numbers and takes its share of each batch; the first one writes.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lwm.runtime.errors import InputError, RunError, process_number

rank = process_number


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if torchrun has started any; returns the device of this one.

    Raises InputError for a device that they cannot share out, RunError where they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():  # another launcher's
        raise InputError("WORLD_SIZE is set, and not all that torchrun sets beside it; start with torchrun or unset it")
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"{device}: {here} processes would share it; take cuda, and each has its own")
        if here > torch.cuda.device_count():
            raise InputError(f"{here} processes need as many CUDA devices; there are {torch.cuda.device_count()}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise InputError(f"{device.type}: several processes train on cpu or cuda")
    try:
        # gloo beside nccl: what the processes agree on in each step must not wait for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes do not find each other ({str(error).splitlines()[0]})") from error
    return device


def leave() -> None:
    """Part from the others once all of them are here: nobody ends while another still writes."""
    if size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def is_loss_of_a_process(error: BaseException) -> bool:
    """Whether a call failed because another process has ended; torch has no one kind for it."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def replicated(model: nn.Module) -> nn.Module:
    """The network as DistributedDataParallel, which averages gradients and starts all at the first one's weights.

    On GPUs batch-norm takes its statistics over all shares. torch cannot do so on a CPU: there each process has those
    of its share, and the running statistics are the first one's.
    """
    if size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model)


def same_buffers(model: nn.Module) -> None:
    """Give every process the running statistics of the first."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def share(rows: Tensor) -> Tensor:
    """This process's part of the rows of a tensor that all of them have; the parts differ by one row at most."""
    return rows.tensor_split(size())[rank()] if size() > 1 else rows


def gathered(part: Tensor, count: int) -> Tensor:
    """The ``count`` rows of which each process has computed its ``share``, on every process."""
    if size() == 1:
        return part
    whole = part.new_zeros(count, *part.shape[1:])
    whole[share(torch.arange(count))] = part
    return summed(whole)


def summed(values: Tensor) -> Tensor:
    """The sum over the processes; ``values`` is left as it is."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    whole = torch.tensor(number)
    if size() > 1:
        dist.all_reduce(whole, dist.ReduceOp.MAX)
    return int(whole)


def require_same(**values: Any) -> None:
    """Raises InputError where the processes, on several machines perhaps, have not read the same files."""
    if size() == 1:
        return
    everyone: list[dict[str, Any]] = [{}] * size()
    dist.all_gather_object(everyone, values)
    for name, first in everyone[0].items():
        own = [other[name] for other in everyone]
        if any(value != first for value in own):
            raise InputError(f"the processes have different {name}: {own}; every machine needs the same files")
