"""The computation that a GPU gets, on the CPU: its kernels' arithmetic, and how many launches it would take.

    with computed_as_on_gpu("unpadded"):
        decoder.read_rows(...)
    with counted() as launches:
        ...
    launches.count
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from laserrec.llm import kernels, varlen

_rms_norm = F.rms_norm
WAYS = ["cpu", "padded", "unpadded"]
"""On a CPU; on a GPU where only torch's fused attention is there, and where attention over any lengths is."""


@contextmanager
def computed_as_on_gpu(way: str) -> Iterator[None]:
    """One of WAYS."""
    with (mock.patch.object(kernels, "on_gpu", lambda device: way != "cpu"),
          mock.patch.object(varlen, "usable", lambda *_: way == "unpadded"),
          mock.patch.object(varlen, "attend", attend)):
        yield


# -- one operation where a CPU has several ------------------------------------------------------------------------


class _One(torch.autograd.Function):
    """`work` of tensors counts as one launch, and so does its gradient."""

    @staticmethod
    def forward(ctx, work, *inputs):
        ctx.work = work
        ctx.save_for_backward(*inputs)
        with _as_one():
            return work(*inputs)

    @staticmethod
    def backward(ctx, *gradients):
        with _as_one(), torch.enable_grad():
            inputs = [x.detach().clone().requires_grad_() for x in ctx.saved_tensors]
            return (None, *torch.autograd.grad(ctx.work(*inputs), inputs, gradients))


def attend(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """laserrec.llm.varlen.attend for any device and type; checks what the real one can't be given."""
    with _as_one(0):
        assert ends_q.dtype == ends_k.dtype == torch.int32
        sizes_q, sizes_k = ends_q.diff(), ends_k.diff()
        assert len(sizes_q) == len(sizes_k) and longest_q == sizes_q.max() and longest_k >= sizes_k.max()
        assert int(ends_q[-1]) == len(q) and int(ends_k[-1]) == len(k)
    return _One.apply(lambda *qkv: varlen._reference(*qkv, ends_q, ends_k, longest_q, longest_k).to(q.dtype), q, k, v)


# -- launches -----------------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Operations that aren't views: about what a GPU launches."""

    current: Launches | None = None

    def __init__(self):
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.counts = True

    @property
    def count(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if self.counts and not func.is_view and name not in ("_unsafe_view", "detach", "empty", "empty_like"):
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_one(launches: int = 1) -> Iterator[None]:
    """What is done inside counts as so many."""
    if (mode := Launches.current) is None:
        yield
        return
    mode.counts = False
    try:
        yield
    finally:
        mode.counts = True
        mode.by_name["one kernel"] += launches


@contextmanager
def counted() -> Iterator[Launches]:
    """RMS norm counts as the one operation that it is on a GPU."""
    def norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return _One.apply(lambda given: _rms_norm(given, shape, eps=eps), x)

    with mock.patch.object(F, "rms_norm", norm), Launches() as launches:
        Launches.current = launches
        try:
            yield launches
        finally:
            Launches.current = None
