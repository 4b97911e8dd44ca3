"""Packed sequences are attended as if each stood alone."""

import pytest
import torch
from gpu_kernels import computed_as_on_gpu

from laserrec.llm import attention, causal, gpu_attention, varlen
from laserrec.llm.attention import Blocks, Heads, PackedAttention, Past, PastAttention, TextCache
from laserrec.llm.gpu_attention import PackedOnGpu, PastOnGpu
from laserrec.llm.kernels import Pointwise

HEADS = Heads(heads=6, kv_heads=2, head_dim=8)
STILL = torch.zeros(4)
"""No rotary embedding."""
LENGTHS = [5, 1, 37, 36, 9, 150, 2, 5, 131]


def naive(qkv: torch.Tensor) -> torch.Tensor:
    """One sequence [seq, all_heads, head_dim], query by query."""
    q, k, v = qkv.split([6, 2, 2], dim=1)
    rows = []
    for t in range(len(qkv)):
        heads = []
        for h in range(6):
            weights = torch.softmax(k[: t + 1, h // 3] @ q[t, h] * 8**-0.5, dim=0)
            heads.append(weights @ v[: t + 1, h // 3])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("way", ["products", "long", "padded", "padded in blocks", "unpadded"])
@pytest.mark.parametrize("last_only", [False, True])
def test_each_sequence_alone(way, last_only, monkeypatch):
    """On a CPU, there with sequences too long for products, and as on a GPU."""
    monkeypatch.setattr(attention, "_PRODUCTS_UP_TO", 10**6 if way == "products" else 0)
    monkeypatch.setattr(gpu_attention, "_FEW_SLOTS", 1 if way == "padded in blocks" else 2**16)
    flat = torch.randn(sum(LENGTHS), 10, 8, dtype=torch.float64)
    mine, theirs = flat.clone().requires_grad_(), flat.clone().requires_grad_()
    with computed_as_on_gpu(way):
        if way in ("products", "long"):
            packed = PackedAttention(LENGTHS, HEADS, Pointwise(False), STILL)
        else:
            packed = PackedOnGpu(LENGTHS, HEADS, STILL, torch.float64)
        got = packed(mine, 0, last_only)
    parts = [naive(part) for part in theirs.split(LENGTHS)]
    want = torch.stack([p[-1] for p in parts]) if last_only else torch.cat(parts)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}  # a softmax is taken in float32
    torch.testing.assert_close(got, want, **tolerance)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, **tolerance)


@pytest.mark.parametrize("at_once", [1, 2**28])
@pytest.mark.parametrize("way", ["padded", "unpadded"])
@pytest.mark.parametrize("last_only", [False, True])
def test_behind_a_past_a_gpu_computes_what_a_cpu_does(way, last_only, at_once, monkeypatch):
    """In any order of layers, since a layer may be computed again on the way back."""
    monkeypatch.setattr(gpu_attention, "_GATHERED_BYTES", at_once)
    keys, values = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(1))
    index, length = torch.arange(15).view(3, 5), torch.tensor([5, 2, 0])
    past, frequency = Past(TextCache(keys, values), index, length), torch.tensor([1.0, 0.3, 0.1, 0.03])
    flat, results = torch.randn(12, 10, 8), []
    with computed_as_on_gpu(way):
        for read in (PastAttention(past, 4, HEADS, Pointwise(False), frequency), PastOnGpu(past, 4, HEADS, frequency)):
            for layer in (1, 0, 2):
                qkv = flat.clone().requires_grad_()
                out = read(qkv, layer, last_only)
                (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
                results += [out.detach(), qkv.grad]
    assert results[0].shape == (3 if last_only else 12, 48)
    for want, got in zip(results[:6], results[6:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_the_probe_of_the_unpadded_attention_compares_with_is_right():
    """Where there is no such attention, it is not used and nothing fails."""
    q, (k, v) = torch.randn(5, 6, 8), torch.randn(2, 5, 2, 8)
    ends = torch.tensor([0, 5], dtype=torch.int32)
    want = naive(torch.cat([q, k, v], dim=1))
    torch.testing.assert_close(varlen._reference(q, k, v, ends, ends, 5, 5).flatten(1), want)
    assert not varlen.usable(torch.device("cpu"), torch.bfloat16, 6, 2, 8)
    assert not varlen.usable(torch.device("cuda", 0), torch.float32, 6, 2, 8)
    if not torch.cuda.is_available():
        assert not varlen.usable(torch.device("cuda", 0), torch.bfloat16, 6, 2, 8)


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_the_probe_tells_right_from_wrong(wrong, monkeypatch):
    monkeypatch.setattr(varlen, "attend", lambda q, *others: varlen._reference(q * (1 + wrong), *others))
    error = varlen._error(torch.device("cpu"), torch.float32, 6, 2, 8)
    assert error > 0.03 if wrong else error < 1e-6


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_block_size_changes_nothing(block, monkeypatch):
    x = torch.randn(3, 20, 10, 8)
    want = causal.causal_products(x, 2, Pointwise(False))
    monkeypatch.setattr(causal, "_BLOCK", block)
    torch.testing.assert_close(causal.causal_products(x, 2, Pointwise(False)), want)


def test_positions_ends_and_little_padding():
    packed = Blocks([3, 1, 2], torch.device("cpu"))
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.ends.tolist() == [2, 3, 5]
    many = Blocks(list(range(1, 200)), torch.device("cpu"))
    assert len(many.rows) < 1.15 * sum(range(1, 200))
    few = Blocks(list(range(1, 200)), torch.device("cpu"), 0.5, 2000)
    assert len(few.shapes) < len(many.shapes) and len(few.rows) < 1.5 * sum(range(1, 200))
    assert Blocks([50, 1, 1], torch.device("cpu"), 0.5, 200).shapes == [(3, 50)]


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_an_empty_sequence_is_an_error(lengths):
    with pytest.raises(ValueError, match="at least 1"):
        PackedAttention(lengths, HEADS, Pointwise(False), STILL)
    with pytest.raises(ValueError, match="at least 1"):
        PackedOnGpu(lengths, HEADS, STILL, torch.float32)
