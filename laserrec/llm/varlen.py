"""torch's attention over sequences of any lengths that lie one behind another (FlashAttention): one launch, no padding.

It is there on CUDA devices in 16 bits. Whether it is, and computes what it should, is tried once per device.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger(__name__)


def attend(
    q: Float[Tensor, "queries heads head_dim"], k: Float[Tensor, "keys kv_heads head_dim"],
    v: Float[Tensor, "keys kv_heads head_dim"], ends_q: Int[Tensor, "ends"], ends_k: Int[Tensor, "ends"],
    longest_q: int, longest_k: int,
) -> Float[Tensor, "queries heads head_dim"]:
    """Causal attention in each sequence; its last query reads all its keys. ends_q, ends_k: Int32, 0 and behind which
    row each sequence ends."""
    return _kernel()(q, k, v, ends_q, ends_k, longest_q, longest_k, window_size=(-1, 0), **_grouped())


@cache
def _kernel():
    from torch.nn.attention.varlen import varlen_attn  # new in torch 2.10

    return varlen_attn


@cache
def _grouped() -> dict[str, bool]:
    """Since torch 2.12 fewer key heads than query heads must be allowed."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(_kernel()).parameters else {}


@cache
def usable(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether `attend` gives right values and gradients there; logged if not."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        with torch.enable_grad():
            error = _error(device, dtype, heads, kv_heads, head_dim)
    except Exception as reason:  # whatever it is, the padded attention is there
        log.info("no attention over unpadded sequences on %s: %s", device, str(reason).split("\n")[0])
        return False
    if not error < 0.03:
        log.warning("attention over unpadded sequences is wrong on %s by %.3f and is not used", device, error)
    return error < 0.03


def _error(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> float:
    """Largest difference of output or gradients from plain products, over the largest value. The second sequence has
    keys and no query, as padding has."""
    queries, keys = (3, 0, 5), (7, 4, 5)
    ends = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device) for n in (queries, keys)]
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, 16, heads + 2 * kv_heads, head_dim, generator=generator).to(device, dtype)
    weight, results = draw[1, :8, :heads].float(), []
    for attended in (attend, _reference):
        qkv = draw[0].clone().requires_grad_()
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        out = attended(q[:8], k, v, *ends, 5, 7).float()
        gradient = torch.autograd.grad((out * weight).sum(), qkv)[0].float()
        results.append((out.detach(), gradient[:7], gradient[11:]))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def _reference(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int
               ) -> Tensor:
    """`attend` in plain float32 products, sequence by sequence."""
    groups, scale, parts = q.shape[1] // k.shape[1], q.shape[2] ** -0.5, []
    starts_q, starts_k = ends_q.tolist(), ends_k.tolist()
    for i in range(len(starts_q) - 1):
        own_q = q[starts_q[i] : starts_q[i + 1]].float()
        own_k, own_v = (x[starts_k[i] : starts_k[i + 1]].float().repeat_interleave(groups, dim=1) for x in (k, v))
        hidden = torch.ones(len(own_q), len(own_k), dtype=torch.bool, device=q.device)
        hidden = hidden.triu(1 + len(own_k) - len(own_q))
        scores = torch.einsum("qhd,khd->hqk", own_q, own_k) * scale
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), own_v))
    return torch.cat(parts)
