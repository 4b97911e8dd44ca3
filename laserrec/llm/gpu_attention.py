"""Attention on a GPU, where launches count: whole sequences, or new tokens behind text that was read before.

Used as laserrec.llm.attention's. All that layers share is made once per pass. In 16 bits on CUDA nothing is padded
(laserrec.llm.varlen); elsewhere sequences are attended in padded blocks by torch's fused attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.llm import varlen
from laserrec.llm.attention import Blocks, Heads, Past, rotary_tables
from laserrec.util.device import move

_FEW_SLOTS = 2**16
"""Padded blocks of no more slots are one: what padding costs there is less than a launch."""
_GATHERED_BYTES = 2**28
"""Of a cache are gathered at once: as many layers as fit, and at least one."""


class PackedOnGpu:
    """Causal attention inside sequences that lie one behind another."""

    def __init__(self, lengths: Sequence[int], heads: Heads, inverse_frequency: Float[Tensor, "half"],
                 dtype: torch.dtype):
        """Raises ValueError for an empty sequence."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be at least 1: {list(lengths)[:5]}")
        device, self.heads, self._longest = inverse_frequency.device, heads, max(lengths)
        self._blocks = None
        if varlen.usable(device, dtype, heads.heads, heads.kv_heads, heads.head_dim):
            sizes, total = torch.tensor(lengths), sum(lengths)
            behind = move(F.pad(sizes.cumsum(0), (1, 0)), device)
            self._bounds = behind.int()
            self._singles = torch.arange(len(behind), dtype=torch.int32, device=device)
            self.ends = behind[1:] - 1
            starts = behind[:-1].repeat_interleave(behind.diff(), output_size=total)
            self._rotary = _tables(torch.arange(total, device=device) - starts, inverse_frequency, dtype)
        else:
            self._blocks = blocks = Blocks(lengths, device, 0.5, _FEW_SLOTS)
            self.ends, self._last_slots = blocks.ends, blocks.slots[blocks.ends][blocks.order.argsort()]
            self._rotary = _tables(blocks.positions[blocks.rows], inverse_frequency, dtype)
            self._real = [real.view(shape)[:, None, None] for real, shape in zip(
                blocks.real.split([count * longest for count, longest in blocks.shapes]), blocks.shapes, strict=True)]

    def __call__(self, qkv: Float[Tensor, "tokens all_heads head_dim"], layer: int, last_only: bool) -> Tensor:
        """[tokens or batch, heads * head_dim]."""
        if self._blocks is not None:
            return self._padded(self._blocks, qkv, last_only)
        q, k, v = _turned_apart(qkv, *self._rotary, self.heads)
        ends, longest = self._bounds, self._longest
        if last_only:
            q, ends, longest = q.index_select(0, self.ends), self._singles, 1
        return varlen.attend(q, k, v, ends, self._bounds, longest, self._longest).flatten(1)

    def _padded(self, blocks: Blocks, qkv: Tensor, last_only: bool) -> Tensor:
        h = self.heads
        padded = blocks.spread(qkv.flatten(1)).unflatten(1, (-1, h.head_dim))
        q, k, v = _turned_apart(padded, *self._rotary, h)
        slots = [count * longest for count, longest in blocks.shapes]
        queries = [count for count, _ in blocks.shapes] if last_only else slots
        q = q.index_select(0, self._last_slots) if last_only else q
        parts = []
        for i, block in enumerate(zip(q.split(queries), k.split(slots), v.split(slots), strict=True)):
            own_q, own_k, own_v = (x.unflatten(0, (blocks.shapes[i][0], -1)).transpose(1, 2) for x in block)
            parts.append(_last(own_q, own_k, own_v, self._real[i], h) if last_only else _causal(own_q, own_k, own_v, h))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.index_select(0, blocks.order) if last_only else blocks.collect(out)


class PastOnGpu:
    """`seq` new tokens per example behind its past; causal among themselves. The past carries no gradient.

    Each example's keys stand at the end of `slots + seq` places, so that its last token always has the last place.
    """

    def __init__(self, past: Past, seq: int, heads: Heads, inverse_frequency: Float[Tensor, "half"]):
        self.past, self.seq, self.heads = past, seq, heads
        device, dtype = past.index.device, past.cache.keys.dtype
        batch, slots = past.index.shape
        self._places = slots + seq
        examples = torch.arange(1, batch + 1, device=device)
        self.ends = examples * seq - 1
        unused = slots - past.length
        positions = torch.arange(self._places, device=device) - unused[:, None]
        self._rotary = _tables(positions[:, slots:], inverse_frequency, dtype)
        there = positions[:, :slots].clamp(min=0)
        self._old_rotary = _tables(there.flatten(), inverse_frequency, dtype)
        self._rows = past.index.gather(1, there).flatten()
        layers, row_bytes = len(past.cache.keys), 2 * heads.kv_dim * past.cache.keys.element_size()
        self._at_once = max(1, min(layers, _GATHERED_BYTES // max(1, row_bytes * batch * slots)))
        self._gathered: tuple[int, Tensor, Tensor] | None = None
        self._bias = None
        if varlen.usable(device, dtype, heads.heads, heads.kv_heads, heads.head_dim):
            # Unused places are sequences of keys without a query.
            self._ends_k = _bounds((examples - 1) * self._places + unused, examples * self._places)
            self._ends_q = _bounds((examples - 1) * seq, examples * seq)
            self._ends_last = _bounds(examples - 1, examples)
        else:
            self._bias = _bias(positions, seq, heads.groups, dtype)

    def __call__(self, qkv: Float[Tensor, "tokens all_heads head_dim"], layer: int, last_only: bool) -> Tensor:
        """[tokens or batch, heads * head_dim]."""
        h, seq = self.heads, 1 if last_only else self.seq
        q, k, v = _turned_apart(qkv.unflatten(0, (-1, self.seq)), *self._rotary, h)
        old_k, old_v = self._old(layer)
        k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        q = q[:, -1:] if last_only else q
        if self._bias is None:
            ends = self._ends_last if last_only else self._ends_q
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            return varlen.attend(q, k, v, ends, self._ends_k, seq, self._places).flatten(1)
        # The queries that share a key head stand in one matrix, group by group.
        q = q.unflatten(2, (h.kv_heads, h.groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        bias = self._bias[:, :, self.seq - 1 :: self.seq] if last_only else self._bias
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        return out.unflatten(2, (h.groups, seq)).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)

    @torch.no_grad()
    def _old(self, layer: int) -> tuple[Float[Tensor, "batch slots kv_heads head_dim"], ...]:
        """The layer's cached keys, turned to their places, and values."""
        first = layer - layer % self._at_once
        if self._gathered is None or self._gathered[0] != first:
            self._gathered = None  # frees the layers before
            some, cache, shape = slice(first, first + self._at_once), self.past.cache, (-1, self.heads.head_dim)
            keys, values = (x[some].index_select(1, self._rows).unflatten(2, shape) for x in (cache.keys, cache.values))
            self._gathered = (first, _turned(keys, *self._old_rotary), values)
        batch = self.past.index.shape
        return tuple(x[layer - first].unflatten(0, batch) for x in self._gathered[1:])


def _bounds(*ends: Int[Tensor, "batch"]) -> Int[Tensor, "bounds"]:
    """0, and each example's ends one after another."""
    return F.pad(torch.stack(ends, dim=1).flatten(), (1, 0)).int()


def _bias(positions: Int[Tensor, "batch places"], seq: int, groups: int, dtype: torch.dtype
          ) -> Float[Tensor, "batch one group_queries places"]:
    """What is added to scores: nothing, or minus infinity at places that are unused or later. Rows in memory are a
    multiple of 8 apart: torch's kernels copy other masks in every call."""
    (batch, places), new = positions.shape, positions[:, -seq:, None]
    hidden = (positions[:, None] < 0) | (positions[:, None] > new)
    wide = torch.zeros(batch, 1, groups * seq, -(-places // 8) * 8, dtype=dtype, device=positions.device)
    return wide[..., :places].masked_fill_(hidden.repeat(1, groups, 1)[:, None], -torch.inf)


def _causal(q: Tensor, k: Tensor, v: Tensor, h: Heads) -> Float[Tensor, "slots dims"]:
    """[count heads longest head_dim] each."""
    # Only the kernels for 16 bits read one key head for several query heads; others would fall back to products.
    shared = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
    if not shared:
        k, v = k.repeat_interleave(h.groups, dim=1), v.repeat_interleave(h.groups, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _last(q: Tensor, k: Tensor, v: Tensor, real: Tensor, h: Heads) -> Float[Tensor, "count dims"]:
    """One query [count heads 1 head_dim] per sequence: those of a key head are as so many tokens."""
    q = q.flatten(1, 2).unflatten(1, (h.kv_heads, h.groups))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=real).flatten(1)


# -- rotary embedding -----------------------------------------------------------------------------------------------


def _tables(positions: Int[Tensor, "*tokens"], inverse_frequency: Float[Tensor, "half"], dtype: torch.dtype
            ) -> tuple[Float[Tensor, "*tokens one head_dim"], Float[Tensor, "*tokens one head_dim"]]:
    """Cosines and sines of both halves; the first half's sines are negative."""
    cos, sin = (t[..., None, :].to(dtype) for t in rotary_tables(positions, inverse_frequency))
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _halves_swapped(x: Float[Tensor, "*some head_dim"]) -> Float[Tensor, "*some head_dim"]:
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def _turned(x: Float[Tensor, "*some tokens heads head_dim"], cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in three launches."""
    return (x * cos).addcmul_(_halves_swapped(x), sin)


def _turned_apart(qkv: Float[Tensor, "*tokens all_heads head_dim"], cos: Tensor, sin: Tensor, h: Heads
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys after rotary embedding, and values."""
    return _TurnedApart.apply(qkv, cos, sin, h.heads, h.kv_heads)


class _TurnedApart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads):
        ctx.save_for_backward(cos, sin)
        ctx.turned = heads + kv_heads
        turned = _turned(qkv[..., : ctx.turned, :], cos, sin)
        return turned[..., :heads, :], turned[..., heads:, :], qkv[..., ctx.turned :, :]

    @staticmethod
    def backward(ctx, *gradients):
        cos, sin = ctx.saved_tensors
        d = torch.cat(gradients, dim=-2)
        part = d[..., : ctx.turned, :]
        other = _halves_swapped(part)
        part.mul_(cos).addcmul_(other, sin, value=-1)  # the turn by the negative angle
        return d, None, None, None, None
