"""Causal grouped-query attention as batched matrix products.

torch's fused attention is fast forward, but its backward on a CPU takes several times as long as the products it is
made of. Here queries are taken in blocks of positions, each against the keys up to the block's end, so that little
above the diagonal is computed; the weights are kept for the way back.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.llm.kernels import Pointwise

_BLOCK = 64
"""Positions per block."""


def causal_products(
    block: Float[Tensor, "count longest all_heads head_dim"], kv_heads: int, pointwise: Pointwise
) -> Float[Tensor, "count longest all_query_dims"]:
    """Attended values of queries, keys and values that lie side by side (heads + 2 kv_heads)."""
    return _CausalProducts.apply(block, kv_heads, pointwise)


def _apart(block: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [count*kv_heads, longest*groups, head_dim], keys and values [count*kv_heads, longest, head_dim]."""
    heads = block.shape[2] - 2 * kv_heads
    q, k, v = block.split([heads, kv_heads, kv_heads], dim=2)
    q = q.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return q, k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)


def _together(x: Tensor, count: int, kv_heads: int, longest: int) -> Tensor:
    """[count*kv_heads, longest*n, head_dim] -> [count, longest, kv_heads*n, head_dim]."""
    return x.view(count, kv_heads, longest, -1, x.shape[-1]).transpose(1, 2).flatten(2, 3)


class _CausalProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, kv_heads, pointwise):
        count, longest = block.shape[:2]
        q, k, v = _apart(block, kv_heads)
        groups = q.shape[1] // longest
        ctx.facts = (count, longest, kv_heads, groups, pointwise)
        out, kept = torch.empty_like(q), []
        position = torch.arange(longest, device=q.device)
        for at in range(0, longest, _BLOCK):
            end = min(at + _BLOCK, longest)
            rows = slice(at * groups, end * groups)
            hidden = position[None, :end] > position[at:end].repeat_interleave(groups)[:, None]
            scores = q[:, rows] @ k[:, :end].transpose(1, 2)
            weights = pointwise.softmax(scores, hidden, q.shape[-1] ** -0.5)
            out[:, rows] = weights @ v[:, :end]
            if ctx.needs_input_grad[0]:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return _together(out, count, kv_heads, longest).flatten(2)

    @staticmethod
    def backward(ctx, *gradients):
        (d_out,) = gradients
        count, longest, kv_heads, groups, pointwise = ctx.facts
        q, k, v, *kept = ctx.saved_tensors
        d_out = d_out.unflatten(-1, (kv_heads, groups, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for at, weights in zip(range(0, longest, _BLOCK), kept, strict=True):
            end = min(at + _BLOCK, longest)
            rows = slice(at * groups, end * groups)
            d_weights = d_out[:, rows] @ v[:, :end].transpose(1, 2)
            d_scores = pointwise.softmax_back(d_weights, weights, q.shape[-1] ** -0.5)
            d_q[:, rows] = d_scores @ k[:, :end]
            d_k[:, :end] += d_scores.transpose(1, 2) @ q[:, rows]
            d_v[:, :end] += weights.transpose(1, 2) @ d_out[:, rows]
        parts = (_together(d, count, kv_heads, longest) for d in (d_q, d_k, d_v))
        return torch.cat(list(parts), dim=2), None, None
