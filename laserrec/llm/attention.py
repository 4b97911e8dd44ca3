"""Who attends to whom: whole sequences packed without padding, or new tokens behind text that was read before.

Both take a flat tensor of tokens, [tokens, heads + 2 kv_heads, head_dim] = queries, keys and values before rotary
embedding, and give the attended values of every token, or of each sequence's last token alone. These are for a CPU;
laserrec.llm.gpu_attention has the same for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.llm.causal import causal_products
from laserrec.llm.kernels import Pointwise
from laserrec.util.device import move


@dataclass(frozen=True)
class Heads:
    """heads is a multiple of kv_heads; queries head h reads key head h // (heads // kv_heads)."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class TextCache:
    """Keys (before rotary embedding) and values of text tokens, one flat row per token."""

    keys: Float[Tensor, "layers tokens kv_dim"]
    values: Float[Tensor, "layers tokens kv_dim"]


@dataclass(frozen=True)
class Past:
    """Which rows of a cache each example reads: row `index[b, j]` stands at position j; j < length[b] is real."""

    cache: TextCache
    index: Int[Tensor, "batch past"]
    length: Int[Tensor, "batch"]


def rotary_tables(
    positions: Int[Tensor, "*some"], inverse_frequency: Float[Tensor, "half"]
) -> tuple[Float[Tensor, "*some half"], Float[Tensor, "*some half"]]:
    """Cosines and sines of rotary embedding, float32."""
    angle = positions[..., None].float() * inverse_frequency
    return angle.cos(), angle.sin()


def _per_token(positions: Int[Tensor, "tokens"], inverse_frequency: Float[Tensor, "half"]) -> tuple[Tensor, Tensor]:
    """Tables [tokens, 1, half], the same for all heads."""
    cos, sin = rotary_tables(positions, inverse_frequency)
    return cos[:, None], sin[:, None]


_ALIKE = 0.85
"""Sequences at least this share of a block's longest are attended together, padded."""
_PRODUCTS_UP_TO = 1024
"""Longest sequence that is attended with batched products; beyond it the kept weights would weigh too much."""


class Blocks:
    """Sequences that lie one behind another, as padded blocks of like length. All indices are made on the CPU and sent
    at once: a device is never asked for a number."""

    def __init__(self, lengths: Sequence[int], device: torch.device, alike: float = _ALIKE, at_least: int = 0):
        """alike: a block holds sequences of at least this share of its longest, and more while it has no more than
        `at_least` slots. Raises ValueError for an empty sequence."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be at least 1: {list(lengths)[:5]}")
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        order = torch.argsort(sizes, descending=True, stable=True)
        self.shapes: list[tuple[int, int]] = []
        """Sequences and slots per sequence of each block."""
        rows, real = [], []
        at = 0
        while at < len(lengths):
            longest = int(sizes[order[at]])
            alone = int((sizes[order[at:]] >= alike * longest).sum())
            members = order[at : at + max(alone, at_least // longest)]
            place = torch.arange(longest)
            rows.append((starts[members, None] + torch.minimum(place, sizes[members, None] - 1)).flatten())
            real.append((place < sizes[members, None]).flatten())
            self.shapes.append((len(members), longest))
            at += len(members)
        flat, taken = torch.cat(rows), torch.cat(real)
        slots = torch.empty(int(sizes.sum()), dtype=torch.long)
        slots[flat[taken]] = torch.arange(len(flat))[taken]
        ends, positions = starts + sizes - 1, torch.arange(len(slots)) - starts.repeat_interleave(sizes)
        # The flat row of each slot (a padded one repeats its sequence's last), which are real, the slot of each row.
        self.rows, self.real, self.slots = (move(t, device) for t in (flat, taken, slots))
        self.positions: Int[Tensor, "tokens"] = move(positions, device)
        self.ends: Int[Tensor, "batch"] = move(ends, device)
        """Each sequence's last row."""
        self.sizes: Int[Tensor, "batch"] = move(sizes[order], device)
        """In the blocks' order."""
        self.order: Int[Tensor, "batch"] = move(torch.argsort(order), device)
        """Where each sequence stands in the blocks' order."""

    def spread(self, x: Float[Tensor, "tokens wide"]) -> Float[Tensor, "slots wide"]:
        """Flat rows, block by block. Padded slots attend to nothing that counts, so they bring no gradient back."""
        return _Spread.apply(x, self.rows, self.slots)

    def collect(self, x: Float[Tensor, "slots wide"]) -> Float[Tensor, "tokens wide"]:
        """The real slots, as flat rows."""
        return _Collect.apply(x, self.rows, self.slots, self.real)


class PackedAttention:
    """Causal attention inside sequences that lie one behind another, on a CPU. Sequences of like length are attended as
    one padded block; all else in a layer sees real tokens only."""

    def __init__(self, lengths: Sequence[int], heads: Heads, pointwise: Pointwise,
                 inverse_frequency: Float[Tensor, "half"]):
        """Raises ValueError for an empty sequence."""
        self.heads, self.pointwise = heads, pointwise
        self.blocks = Blocks(lengths, inverse_frequency.device)
        self.ends = self.blocks.ends
        self._rotary = _per_token(self.blocks.positions, inverse_frequency)

    def __call__(self, qkv: Float[Tensor, "tokens all_heads head_dim"], layer: int, last_only: bool) -> Tensor:
        """[tokens or batch, heads * head_dim]."""
        h, blocks = self.heads, self.blocks
        qkv = self.pointwise.rotate(qkv, *self._rotary, h.heads + h.kv_heads)
        padded = blocks.spread(qkv.flatten(1))
        attend = self._last if last_only else self._causal
        parts, at, row = [], 0, 0
        for count, longest in blocks.shapes:
            block = padded[at : at + count * longest].view(count, longest, -1, h.head_dim)
            parts.append(attend(block, blocks.sizes[row : row + count]))
            at, row = at + count * longest, row + count
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out[blocks.order] if last_only else blocks.collect(out)

    def _causal(self, block: Tensor, sizes: Tensor) -> Tensor:
        h = self.heads
        if block.shape[1] <= _PRODUCTS_UP_TO:
            return causal_products(block, h.kv_heads, self.pointwise).flatten(0, 1)
        q, k, v = block.transpose(1, 2).split([h.heads, h.kv_heads, h.kv_heads], dim=1)
        k, v = k.repeat_interleave(h.groups, dim=1), v.repeat_interleave(h.groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(-1, h.heads * h.head_dim)

    def _last(self, block: Tensor, sizes: Tensor) -> Tensor:
        h = self.heads
        q, k, v = block.split([h.heads, h.kv_heads, h.kv_heads], dim=2)
        q = q[torch.arange(len(sizes), device=q.device), sizes - 1].unflatten(1, (h.kv_heads, h.groups))
        hidden = torch.arange(block.shape[1], device=q.device) >= sizes[:, None]
        scores = (q @ k.permute(0, 2, 3, 1)).float() * h.head_dim**-0.5
        weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(dim=-1).to(v.dtype)
        return (weights @ v.transpose(1, 2)).flatten(1)


class PastAttention:
    """`seq` new tokens per example behind its past, on a CPU; causal among themselves. The past carries no gradient.

    Grouped-query attention as batched products: the queries that share a key head stand in one matrix, and what was
    read before is never copied into one tensor with what is new.
    """

    def __init__(self, past: Past, seq: int, heads: Heads, pointwise: Pointwise,
                 inverse_frequency: Float[Tensor, "half"]):
        self.past, self.seq, self.heads, self.pointwise = past, seq, heads, pointwise
        device = past.index.device
        batch, slots = past.index.shape
        here = torch.arange(seq, device=device)
        self._rotary = _per_token((past.length[:, None] + here).flatten(), inverse_frequency)
        self.ends = torch.arange(1, batch + 1, device=device) * seq - 1
        place = torch.arange(slots, device=device)
        dtype = past.cache.keys.dtype
        self._old_rotary = tuple(t.to(dtype) for t in rotary_tables(place, inverse_frequency))
        kv = torch.arange(heads.kv_heads, device=device)
        self._rows = (past.index.flatten() * heads.kv_heads + kv[:, None]).flatten()
        """Rows of the cache taken as [tokens * kv_heads, head_dim], head by head."""
        unread = (place >= past.length[:, None])[:, None].expand(-1, seq, -1)
        later = torch.ones(seq, seq, dtype=torch.bool, device=device).triu(1).expand(batch, -1, -1)
        self._hidden = torch.cat([unread, later], dim=2)[:, None]

    def __call__(self, qkv: Float[Tensor, "tokens all_heads head_dim"], layer: int, last_only: bool) -> Tensor:
        """[tokens or batch, heads * head_dim]."""
        h, cache = self.heads, self.past.cache
        batch, slots = self.past.index.shape
        shape = (h.kv_heads, batch, slots, h.head_dim)
        old_k = cache.keys[layer].view(-1, h.head_dim).index_select(0, self._rows).view(shape)
        old_v = cache.values[layer].view(-1, h.head_dim).index_select(0, self._rows).view(shape)
        old_k = _turn(old_k, *self._old_rotary)
        qkv = self.pointwise.rotate(qkv, *self._rotary, h.heads + h.kv_heads)
        q, new_k, new_v = qkv.unflatten(0, (batch, self.seq)).split([h.heads, h.kv_heads, h.kv_heads], dim=2)
        hidden = self._hidden
        if last_only:
            q, hidden = q[:, -1:], hidden[:, :, -1:]
        new_k, new_v = new_k.permute(2, 0, 1, 3), new_v.permute(2, 0, 1, 3)
        queries = (h.groups, q.shape[1])
        q = q.unflatten(2, (h.kv_heads, h.groups)).permute(2, 0, 3, 1, 4).flatten(2, 3)
        scores = torch.cat([q @ old_k.transpose(-1, -2), q @ new_k.transpose(-1, -2)], dim=-1).float()
        scores = (scores * h.head_dim**-0.5).unflatten(2, queries)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).to(q.dtype).flatten(2, 3)
        out = weights[..., :slots] @ old_v + weights[..., slots:] @ new_v
        return out.unflatten(2, queries).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def _turn(x: Float[Tensor, "*batch seq head_dim"], cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Spread(torch.autograd.Function):
    """Flat rows -> padded slots. Padded slots attend to nothing that counts, so they bring no gradient back."""

    @staticmethod
    def forward(ctx, x, rows, slots):
        ctx.save_for_backward(slots)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, *gradients):
        (d_padded,) = gradients
        return d_padded.index_select(0, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """Padded slots -> flat rows."""

    @staticmethod
    def forward(ctx, x, rows, slots, real):
        ctx.save_for_backward(rows, real)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, *gradients):
        (d_rows,) = gradients
        rows, real = ctx.saved_tensors
        return d_rows.index_select(0, rows).masked_fill_(~real[:, None], 0), None, None, None
