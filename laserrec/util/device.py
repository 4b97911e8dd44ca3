"""The device that a run computes on. It is chosen once, at the start, and passed down."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from laserrec.util.errors import UserError

CPU = torch.device("cpu")


def choose(name: str = "auto") -> torch.device:
    """The device called `name`: auto, cpu, cuda, cuda:N or mps.

    auto takes a CUDA GPU where there is one, else Apple's GPU (mps), else the CPU. Where torchrun started several
    processes, auto and cuda give each process the GPU of its local rank; auto takes the CPU where the machine has
    fewer GPUs than processes. A CUDA device always has an index, so that two equal devices compare equal.

    Raises UserError, naming the devices of this machine, for one that is not there.
    """
    gpus, local_rank, local_size = _gpus(), int(os.environ.get("LOCAL_RANK", 0)), _local_size()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        if gpus >= local_size:
            return torch.device("cuda", local_rank)
        return torch.device("mps") if has_mps and not gpus and local_size == 1 else CPU
    if name == "cpu":
        return CPU
    if name == "mps" and has_mps and local_size == 1:
        return torch.device("mps")
    if name == "cuda" and gpus >= local_size:
        return torch.device("cuda", local_rank)
    if (match := re.fullmatch(r"cuda:(\d{1,4})", name)) and int(match[1]) < gpus and local_size == 1:
        return torch.device("cuda", int(match[1]))
    there = ["cpu", *(f"cuda:{i}" for i in range(gpus)), *(["mps"] if has_mps else [])]
    together = f", for {local_size} processes" if local_size > 1 else ""
    advice = "; several processes take auto, cpu or cuda (one GPU each)" if local_size > 1 else ""
    raise UserError(f"device {name!r} is not there; this machine has {', '.join(there)}{together}. Choose one of them, "
                    f"or auto{advice}")


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. To a CUDA device it goes through pinned memory, so that the CPU doesn't wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Context in which torch's generators of the CPU and of `device` begin at `seed`. On leaving, these two are as they
    were (Apple's GPU is not set back); other GPUs are not touched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach all GPUs
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def own_gpu() -> torch.device | None:
    """Where several processes run on this machine and each has a GPU to itself, this one's; else None."""
    local_rank = int(os.environ.get("LOCAL_RANK", -1))
    return torch.device("cuda", local_rank) if local_rank >= 0 and _local_size() <= _gpus() else None


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _local_size() -> int:
    """Processes of this run on this machine, as torchrun announces them; 1 without it."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
