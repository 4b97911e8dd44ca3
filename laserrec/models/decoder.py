"""A Llama-family decoder whose weights are frozen and whose inputs carry the gradient.

It computes what transformers' own forward computes (tests hold both against each other), and one thing more: new
tokens can read keys and values that were computed before (`TextCache`), placed anywhere, since keys are kept before
rotary embedding and turned to their place when they are read.

Each RMSNorm's scale is folded into the matrix behind it; q, k, v and gate, up are one product each. Weights are
buffers, so they are in no optimiser and autograd computes no weight gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_llm: int
    norm_eps: float
    rope_theta: float

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


def native_reason(config) -> str | None:
    """Why this transformers config can't use the native decoder; None if it can."""
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return f"rotary embedding of type {rope['rope_type']!r}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"activation {config.hidden_act!r}"
    if config.model_type in ("qwen2", "qwen3") and getattr(config, "use_sliding_window", False):
        return "sliding-window attention"
    if config.model_type == "mistral" and getattr(config, "sliding_window", None):
        return "sliding-window attention"
    return None


class NativeDecoder(nn.Module):
    """The decoder stack: embeddings in, final-norm outputs out.

    Parameters: `model` is transformers' bare decoder (LlamaModel, MistralModel, Qwen2Model, Qwen3Model); its weights
    are copied in `dtype`; `layers` keeps the first so many.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, layers: int | None = None):
        super().__init__()
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.shape = Shape(
            layers=min(layers or config.num_hidden_layers, config.num_hidden_layers),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            d_llm=config.hidden_size,
            norm_eps=config.rms_norm_eps,
            rope_theta=float(config.rope_parameters["rope_theta"]),
        )
        self.layers = nn.ModuleList(_Layer(model.layers[i], self.shape, dtype) for i in range(self.shape.layers))
        self.register_buffer("final_norm", model.norm.weight.detach().float().clone(), persistent=False)
        inverse = self.shape.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        self.register_buffer("inverse_frequency", inverse.float(), persistent=False)
        self.dtype = dtype

    def forward(
        self, embeds: Float[Tensor, "batch seq d_llm"], past: Past | None = None
    ) -> Float[Tensor, "batch seq d_llm"]:
        """Causal pass over `embeds` (pad on the right: a token never sees what stands behind it), reading `past`
        first if given. Outputs after the final norm, float32."""
        x = embeds.to(self.dtype)
        reader = self._reader(x, past)
        for i, layer in enumerate(self.layers):
            x = layer(x, reader, i)
        return _rms_norm(x.float(), self.shape.norm_eps) * self.final_norm

    @torch.no_grad()
    def encode_text(
        self, embeds: Float[Tensor, "batch seq d_llm"], past: Past | None = None
    ) -> tuple[Float[Tensor, "layers batch seq kv_dim"], Float[Tensor, "layers batch seq kv_dim"]]:
        """Keys (before rotary embedding) and values of every layer for these tokens."""
        x = embeds.to(self.dtype)
        reader = self._reader(x, past)
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            _, k, v = layer.project(x)
            keys.append(k)
            values.append(v)
            if i + 1 < len(self.layers):
                x = layer(x, reader, i)
        return torch.stack(keys), torch.stack(values)

    def _reader(self, x: Tensor, past: Past | None) -> _Reader:
        batch, seq, _ = x.shape
        here = torch.arange(seq, device=x.device)
        if past is None:
            return _Reader(self._rotary(here))
        slots = torch.arange(past.index.shape[1], device=x.device)
        unread = (slots >= past.length[:, None])[:, None].expand(-1, seq, -1)
        later = torch.ones(seq, seq, dtype=torch.bool, device=x.device).triu(1).expand(batch, -1, -1)
        heads = torch.arange(self.shape.kv_heads, device=x.device)
        return _Reader(
            rotary=self._rotary(past.length[:, None] + here),
            past=past,
            past_rotary=self._rotary(slots),
            past_rows=(past.index.flatten() * self.shape.kv_heads + heads[:, None]).flatten(),
            hidden=torch.cat([unread, later], dim=2)[:, None],
        )

    def _rotary(self, positions: Int[Tensor, "*batch seq"]) -> tuple[Tensor, Tensor]:
        angle = positions[..., None].float() * self.inverse_frequency
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)


@dataclass(frozen=True)
class _Reader:
    """What every layer shares: rotary tables of new and past tokens, the past, who can't see whom."""

    rotary: tuple[Tensor, Tensor]
    past: Past | None = None
    past_rotary: tuple[Tensor, Tensor] | None = None
    past_rows: Int[Tensor, "kv_heads_batch_past"] | None = None
    """Rows of the cache taken as [tokens * kv_heads, head_dim], head by head."""
    hidden: Bool[Tensor, "batch one seq past_and_seq"] | None = None


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module, shape: Shape, dtype: torch.dtype):
        super().__init__()
        self.shape = shape
        attention, mlp = layer.self_attn, layer.mlp
        self._hold("qkv", [attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm, dtype)
        self._hold("out", [attention.o_proj], None, dtype)
        self._hold("gate_up", [mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm, dtype)
        self._hold("down", [mlp.down_proj], None, dtype)
        for name in ("q_norm", "k_norm"):  # Qwen3 normalises queries and keys per head
            norm = getattr(attention, name, None)
            self.register_buffer(name, None if norm is None else norm.weight.detach().to(dtype), persistent=False)

    def _hold(self, name: str, linears: list[nn.Linear], norm: nn.Module | None, dtype: torch.dtype) -> None:
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        if norm is not None:
            weight = weight * norm.weight.detach().float()
        biases = [linear.bias for linear in linears]
        bias = None
        if any(b is not None for b in biases):
            parts = zip(biases, linears, strict=True)
            bias = torch.cat([torch.zeros(n.out_features) if b is None else b.detach().float() for b, n in parts])
        self.register_buffer(name, weight.to(dtype), persistent=False)
        self.register_buffer(f"{name}_bias", None if bias is None else bias.to(dtype), persistent=False)

    def project(self, x: Float[Tensor, "batch seq d_llm"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch seq heads*head_dim], keys and values [batch seq kv_dim], before rotary embedding."""
        s = self.shape
        qkv = F.linear(_rms_norm(x, s.norm_eps), self.qkv, self.qkv_bias)
        q, k, v = qkv.split([s.heads * s.head_dim, s.kv_dim, s.kv_dim], dim=-1)
        if self.q_norm is not None:
            q = (_rms_norm(q.unflatten(-1, (s.heads, s.head_dim)), s.norm_eps) * self.q_norm).flatten(-2)
            k = (_rms_norm(k.unflatten(-1, (s.kv_heads, s.head_dim)), s.norm_eps) * self.k_norm).flatten(-2)
        return q, k, v

    def forward(self, x: Float[Tensor, "batch seq d_llm"], reader: _Reader, i: int) -> Tensor:
        q, k, v = self.project(x)
        attended = self._attend(q, k, v, reader) if reader.past is None else self._attend_past(q, k, v, reader, i)
        x = x + F.linear(attended, self.out, self.out_bias)
        gate, up = F.linear(_rms_norm(x, self.shape.norm_eps), self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down, self.down_bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, reader: _Reader) -> Tensor:
        s = self.shape
        q = _rotate(q.unflatten(-1, (s.heads, s.head_dim)).transpose(1, 2), reader.rotary)
        k = _rotate(k.unflatten(-1, (s.kv_heads, s.head_dim)).transpose(1, 2), reader.rotary)
        v = v.unflatten(-1, (s.kv_heads, s.head_dim)).transpose(1, 2)
        groups = s.heads // s.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)

    def _attend_past(self, q: Tensor, k: Tensor, v: Tensor, reader: _Reader, i: int) -> Tensor:
        """Grouped-query attention as batched products: the queries that share a key head stand in one matrix, and
        what was read before is never copied into one tensor with what is new."""
        s, past = self.shape, reader.past
        batch, seq, _ = q.shape
        groups = s.heads // s.kv_heads
        shape = (s.kv_heads, batch, past.index.shape[1], s.head_dim)
        old_k = past.cache.keys[i].view(-1, s.head_dim).index_select(0, reader.past_rows).view(shape)
        old_v = past.cache.values[i].view(-1, s.head_dim).index_select(0, reader.past_rows).view(shape)
        old_k = _rotate(old_k, reader.past_rotary)
        heads = (s.kv_heads, s.head_dim)
        new_k = _rotate(k.unflatten(-1, heads).permute(2, 0, 1, 3), reader.rotary)
        new_v = v.unflatten(-1, heads).permute(2, 0, 1, 3)
        q = _rotate(q.unflatten(-1, (s.kv_heads, groups, s.head_dim)).permute(2, 3, 0, 1, 4), reader.rotary)
        q = q.transpose(1, 2).flatten(2, 3)  # kv_heads batch groups*seq head_dim
        scores = torch.cat([q @ old_k.transpose(-1, -2), q @ new_k.transpose(-1, -2)], dim=-1).float()
        scores = (scores * s.head_dim**-0.5).unflatten(2, (groups, seq))
        weights = scores.masked_fill(reader.hidden, -torch.inf).softmax(dim=-1).to(v.dtype).flatten(2, 3)
        old = shape[2]
        out = weights[..., :old] @ old_v + weights[..., old:] @ new_v
        return out.unflatten(2, (groups, seq)).permute(1, 3, 0, 2, 4).flatten(2)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Float[Tensor, "*batch seq head_dim"], rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding; the tables [... seq head_dim/2] broadcast over x's leading axes."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
