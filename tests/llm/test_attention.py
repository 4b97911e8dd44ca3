"""Packed sequences are attended as if each stood alone."""

import pytest
import torch

from laserrec.llm import attention, causal
from laserrec.llm.attention import Heads, PackedAttention, Past, PastAttention, TextCache
from laserrec.llm.kernels import Pointwise

HEADS = Heads(heads=6, kv_heads=2, head_dim=8)
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


@pytest.mark.parametrize("way", ["products", "long", "fused"])
@pytest.mark.parametrize("last_only", [False, True])
def test_each_sequence_alone(way, last_only, monkeypatch):
    """On a CPU, there with sequences too long for products, and as on a GPU."""
    monkeypatch.setattr(attention, "_PRODUCTS_UP_TO", 10**6 if way == "products" else 0)
    monkeypatch.setattr(attention, "_fused", lambda device: way == "fused")
    flat = torch.randn(sum(LENGTHS), 10, 8, dtype=torch.float64)
    mine, theirs = flat.clone().requires_grad_(), flat.clone().requires_grad_()
    got = PackedAttention(LENGTHS, HEADS, Pointwise(False))(mine, 0, last_only)
    parts = [naive(part) for part in theirs.split(LENGTHS)]
    want = torch.stack([p[-1] for p in parts]) if last_only else torch.cat(parts)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}  # a softmax is taken in float32
    torch.testing.assert_close(got, want, **tolerance)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, **tolerance)


@pytest.mark.parametrize("last_only", [False, True])
def test_fused_attention_behind_a_past_is_the_other(last_only, monkeypatch):
    keys, values = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(1))
    index, length = torch.arange(15).view(3, 5), torch.tensor([5, 2, 0])
    past = Past(TextCache(keys, values), index, length)
    flat, results = torch.randn(12, 10, 8), []
    for fused in (False, True):
        monkeypatch.setattr(attention, "_fused", lambda device, fused=fused: fused)
        qkv = flat.clone().requires_grad_()
        out = PastAttention(past, 4, HEADS, torch.tensor([1.0, 0.3, 0.1, 0.03]))(qkv, 1, last_only)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), qkv.grad))
    assert results[0][0].shape == (3 if last_only else 12, 48)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_block_size_changes_nothing(block, monkeypatch):
    x = torch.randn(3, 20, 10, 8)
    want = causal.causal_products(x, 2, Pointwise(False))
    monkeypatch.setattr(causal, "_BLOCK", block)
    torch.testing.assert_close(causal.causal_products(x, 2, Pointwise(False)), want)


def test_positions_ends_and_little_padding():
    packed = PackedAttention([3, 1, 2], HEADS, Pointwise(False))
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.ends.tolist() == [2, 3, 5]
    many = PackedAttention(list(range(1, 200)), HEADS, Pointwise(False))
    assert len(many._rows) < 1.15 * sum(range(1, 200))


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_an_empty_sequence_is_an_error(lengths):
    with pytest.raises(ValueError, match="at least 1"):
        PackedAttention(lengths, HEADS, Pointwise(False))
