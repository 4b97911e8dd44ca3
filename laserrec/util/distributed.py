"""Data-parallel training in several processes, started by torchrun or Accelerate.

Every process has a full copy of the trained weights and does its share of the work. Gradients are summed and results
gathered over all processes, so that the copies stay equal. CPU tensors are sent by gloo, those of a GPU by NCCL where
each process has a GPU to itself. With a single process nothing here has any effect.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from laserrec.util.device import CPU, own_gpu, seeded
from laserrec.util.errors import UserError

_PATIENCE = timedelta(hours=24)
"""How long a process waits for the others. A process that dies closes its connections, which the others notice at once;
this limit is for a machine that disappears. It must be longer than a slow machine lags behind a fast one."""
_MEETING = timedelta(minutes=30)
"""How long the first process waits for all others to connect."""

_LETTING_GO = 0.2
"""Seconds for gloo's threads to let go of the last tensors, at the end of a process; they need microseconds."""


class PeerLostError(UserError):
    """Another process ended while this one was waiting for it."""


@dataclass(frozen=True)
class World:
    """All processes of one training; this one is number `rank` of `size`, from 0.

    All processes must call the same methods in the same order. They raise PeerLostError when another process has ended.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """None: torch's default group."""

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which writes files and prints."""
        return self.rank == 0

    # -- dividing work ------------------------------------------------------------------------------------------

    def share(self, n: int) -> np.ndarray:
        """Indices (Int64) of this process's part of n pieces of work. Shares are disjoint, cover n, may be empty."""
        return np.arange(self.rank, n, self.size)

    def even_share(self, n: int) -> np.ndarray:
        """Like `share`, but equally long in all processes, for `gather_rows`: indices past n wrap around to 0."""
        return (np.arange(-(-n // self.size)) * self.size + self.rank) % max(1, n)

    def gather_rows(self, rows: Tensor, n: int) -> Tensor:
        """Gather n rows in order. `rows` are those of this process's `even_share(n)`."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        with self._together():
            dist.all_gather(parts, rows.contiguous(), group=self.group)
        return torch.stack(parts, dim=1).flatten(0, 1)[:n]

    # -- agreeing -----------------------------------------------------------------------------------------------

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], numbers: Tensor) -> Tensor:
        """Replace every gradient by its sum over the processes, and return the sum of `numbers` [n]. Sparse gradients
        travel as dense ones and are sparse again afterwards.

        `numbers` are on the parameters' device. A parameter whose gradient is None in all processes keeps None, so that
        the optimiser does not update it.
        """
        if self.size == 1:
            return numbers
        # On the CPU, so that no GPU waits: 0 none, 1 dense, 2 sparse.
        given = torch.tensor([0 if p.grad is None else 1 + p.grad.is_sparse for p in parameters], dtype=torch.uint8)
        flat = torch.cat([*(p.new_zeros(p.numel()) if p.grad is None else p.grad.to_dense().flatten()
                            for p in parameters), numbers.float()])
        with self._together():
            dist.all_reduce(given, dist.ReduceOp.MAX, group=self.group)
            dist.all_reduce(flat, group=self.group)
        *parts, numbers = flat.split([*(p.numel() for p in parameters), len(numbers)])
        for p, part, kind in zip(parameters, parts, given.tolist(), strict=True):
            p.grad = None if kind == 0 else part.view_as(p) if kind == 1 else part.view_as(p).to_sparse(1)
        return numbers

    def most(self, number: int) -> int:
        """The maximum of `number` over all processes."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        with self._together():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return self.most(int(flag)) > 0

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        self.most(0)

    # -- following the first ------------------------------------------------------------------------------------

    def follow(self, tensors: Iterable[Tensor], leader: int = 0) -> None:
        """Overwrite these contiguous tensors with those of process `leader`."""
        if self.size > 1:
            for tensor in tensors:
                self._send(tensor.detach(), leader)

    def from_main(self, make: Callable[[], tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        """Call `make` in the first process only and return its result in all: tensors by name, and a JSON value.

        Tensors that were on the first process's GPU are on each process's own GPU.
        """
        if self.size == 1:
            return make()
        tensors, value = make() if self.is_main else ({}, None)
        kinds = {name: (str(t.dtype).removeprefix("torch."), list(t.shape), t.is_cuda) for name, t in tensors.items()}
        kinds, value = self._send_json([kinds, value])
        out = {}
        for name, (dtype, shape, on_gpu) in kinds.items():
            out[name] = tensors[name].contiguous() if self.is_main else torch.empty(
                shape, dtype=getattr(torch, dtype), device=own_gpu() if on_gpu else "cpu")
            self._send(out[name])
        return out, value

    def told(self, make: Callable[[], Any]) -> Any:
        """Call `make` in the first process only and return its JSON value in all."""
        return self.from_main(lambda: ({}, make()))[1]

    def _send_json(self, value: Any) -> Any:
        text = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor(len(text))
        self._send(length)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.is_main else torch.empty(
            int(length), dtype=torch.uint8)
        self._send(data)
        return json.loads(data.numpy().tobytes())

    def _send(self, tensor: Tensor, leader: int = 0) -> None:
        data = tensor.view(-1).view(torch.uint8)  # bytes: gloo does not know every dtype
        if len(data):
            with self._together():
                dist.broadcast(data, group=self.group, group_src=leader)

    # -- chance -------------------------------------------------------------------------------------------------

    @contextmanager
    def own_randomness(self, *key: int) -> Iterator[None]:
        """Context with a random generator of its own in each process, seeded with `key` and the rank.

        On leaving, torch's generators are as they were, so that all processes continue with the same sequence.
        """
        if self.size == 1:
            yield
            return
        seed = int(np.random.SeedSequence((*key, self.rank)).generate_state(1, np.uint64)[0])
        with seeded(own_gpu() or CPU, seed):
            yield

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch has several classes for it, all of them RuntimeErrors
            raise PeerLostError(f"process {self.rank} of {self.size} stops because another one ended without a word; "
                                "was it killed, for want of memory perhaps?") from error


_joined: World | None = None
_store: dist.Store | None = None


def several() -> bool:
    """Whether this process is one of several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> World:
    """Connect to the other processes of this training; a World of size 1 if there are none. May be called again.

    A torch.distributed that is already initialised is used; otherwise the environment variables that torchrun and
    Accelerate set. Raises UserError if the other processes cannot be reached.
    """
    global _joined, _store
    if not several():
        return World()
    if _joined is None and dist.is_initialized():
        group = dist.new_group(backend=_backend(), timeout=_PATIENCE)  # the one that runs may be for GPUs only
        _joined = World(dist.get_rank(), dist.get_world_size(), group)
    elif _joined is None:
        try:
            _store, rank, size = next(dist.rendezvous("env://", timeout=_MEETING))
            dist.init_process_group(_backend(), store=_store, rank=rank, world_size=size, timeout=_PATIENCE)
            atexit.register(_leave)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes can't be met: "
                            f"{str(error).splitlines()[0]}. Start several with torchrun; unset WORLD_SIZE to run "
                            "one") from None
        _joined = World(rank, size)
    return _joined


def _backend() -> str:
    """The backends: gloo for CPU tensors, and NCCL for those of a GPU where each process has one to itself."""
    gpu = own_gpu()
    if gpu is None or not dist.is_nccl_available():
        return "gloo"
    torch.cuda.set_device(gpu)
    return "cpu:gloo,cuda:nccl"


def _leave() -> None:
    """Close gloo's threads: a process that exits while they run is sometimes aborted, a failure to torchrun.

    Threads of a sharded LLM's group do not close, since torch keeps the group. A thread like that must have let go of
    its last tensor before Python ends; sleeping gives it the interpreter's lock, which it needs for that.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_LETTING_GO)


def alone(what: str) -> None:
    """Raise UserError if this is one of several processes. `what` names the work that must run in one."""
    if several():
        raise UserError(f"{what} runs in one process; start it without torchrun (only `laserrec fit` takes several)")


def speaks() -> bool:
    """Whether this process should print the error it failed with: True for the first of all processes that asks."""
    if _store is None:
        return not several() or os.environ.get("RANK", "0") == "0"
    try:
        return _store.add("laserrec/failed", 1) == 1
    except RuntimeError:  # the store has gone with the process that held it
        return True
