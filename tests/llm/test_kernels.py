"""Hand-written gradients against autograd's, compiled steps against plain ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu_kernels import computed_as_on_gpu

from laserrec.llm.kernels import Pointwise

PLAIN = Pointwise(False)


@pytest.fixture(params=["cpu", "padded"], autouse=True)
def way(request):
    with computed_as_on_gpu(request.param):
        yield


def same_gradients(ours, reference, *inputs):
    mine, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    got, want = ours(*mine), reference(*theirs)
    weights = [torch.randn_like(w) for w in want]
    for outputs, given in ((got, mine), (want, theirs)):
        sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
        assert all(x.grad is not None for x in given)
    for a, b in zip([*got, *(x.grad for x in mine)], [*want, *(x.grad for x in theirs)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_add_norm():
    def reference(x, delta):
        total = x + delta
        return total, total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    x, delta = torch.randn(7, 12), torch.randn(7, 12)
    same_gradients(lambda a, b: PLAIN.add_norm(a, b, 1e-5), reference, x, delta)
    same_gradients(lambda a: PLAIN.add_norm(a, None, 1e-5), lambda a: reference(a, 0.0), x)


def test_swiglu():
    same_gradients(lambda x: [PLAIN.swiglu(x)], lambda x: [F.silu(x[:, :6]) * x[:, 6:]], torch.randn(5, 12))


def test_rotate_turns_the_first_heads_and_passes_the_rest():
    angle = torch.randn(5, 1, 3)

    def reference(x):
        a, b = x[:, :3].chunk(2, dim=-1)
        turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
        return [torch.cat([turned, x[:, 3:]], dim=1)]

    same_gradients(lambda x: [PLAIN.rotate(x, angle.cos(), angle.sin(), 3)], reference, torch.randn(5, 4, 6))


_COMPILED = """
import sys, torch, tiny
from laserrec.llm.decoder import NativeDecoder
from torch._dynamo.utils import counters
torch.set_num_threads(1)
model = tiny.make_llm("qwen3").model.requires_grad_(False).eval()
results, compilations = [], []
for compiled in (False, True):
    decoder = NativeDecoder(model, torch.float32, compiled=compiled)
    for lengths in ([9, 4, 5], [30, 8], [70], [11, 12, 2, 3]):
        generator = torch.Generator().manual_seed(len(lengths))
        rows = [torch.randn(n, 32, generator=generator).requires_grad_() for n in lengths]
        outputs = decoder.read_rows(rows, last_only=True)
        outputs.square().sum().backward()
        results += [outputs.detach(), *(row.grad for row in rows)]
        compilations.append(counters["stats"]["unique_graphs"])
half = len(results) // 2
for ours, theirs in zip(results[half:], results[:half]):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
print(*compilations)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_are_the_plain_ones():
    """In a process of its own: with checked shapes every function here would be one to the compiler."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    compilations = [int(n) for n in done.stdout.split()]
    assert compilations[:4] == [0, 0, 0, 0] and compilations[4] > 0
    assert compilations[-1] <= compilations[4] + 6  # other numbers of tokens are hardly ever a new compilation
