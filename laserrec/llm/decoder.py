"""A Llama-family decoder whose weights are frozen and whose inputs carry the gradient.

It computes what transformers' own forward computes (tests hold both against each other), and two things more: batches
are packed, without padding; and new tokens can read keys and values that were computed before (`TextCache`), placed
anywhere, since keys are kept before rotary embedding and turned to their place when they are read.

Each RMSNorm's scale is folded into the matrix behind it; q, k, v and gate, up are one product each. Weights are
buffers, so they are in no optimiser and autograd computes no weight gradient. Where only the last token's output is
wanted, the last layer computes no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laserrec.llm import kernels
from laserrec.llm.attention import Heads, PackedAttention, Past, PastAttention
from laserrec.llm.gpu_attention import PackedOnGpu, PastOnGpu
from laserrec.llm.kernels import Pointwise

Attention = PackedAttention | PastAttention | PackedOnGpu | PastOnGpu
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape(Heads):
    """Sizes of a decoder."""

    layers: int
    d_llm: int
    norm_eps: float
    rope_theta: float


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
    are copied in `dtype`; `layers` keeps the first so many. compiled: fuse the pointwise steps (needs a C++ compiler).
    recompute: keep only each layer's input for the way back and compute the layer again there (gradient
    checkpointing): less memory, a third more time. mean_layers: those that `read_layers` is asked for.
    """

    final_norm: Tensor
    inverse_frequency: Tensor

    def __init__(self, model: Any, dtype: torch.dtype, layers: int | None = None, compiled: bool = False,
                 recompute: bool = False, mean_layers: Sequence[int] = ()):
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
        self.pointwise, self.recompute = Pointwise(compiled), recompute
        self.layers = nn.ModuleList(
            _Layer(model.layers[i], self.shape, dtype, self.pointwise) for i in range(self.shape.layers))
        self.deeper = nn.ModuleList(
            _Layer(model.layers[i], self.shape, dtype, self.pointwise)
            for i in range(self.shape.layers, max(mean_layers, default=0)))
        self.register_buffer("final_norm", model.norm.weight.detach().float().clone(), persistent=False)
        inverse = self.shape.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        self.register_buffer("inverse_frequency", inverse.float(), persistent=False)
        self.dtype = dtype

    def forward(
        self, embeds: Float[Tensor, "batch seq d_llm"], past: Past | None = None
    ) -> Float[Tensor, "batch seq d_llm"]:
        """Causal pass over `embeds` (pad on the right: a token never sees what stands behind it), reading `past`
        first if given. Outputs after the final norm, float32."""
        batch, seq, _ = embeds.shape
        return self.read(embeds.flatten(0, 1), self._attention(batch, seq, past)).unflatten(0, (batch, seq))

    def read_rows(self, rows: Sequence[Float[Tensor, "_ d_llm"]], last_only: bool) -> Float[Tensor, "some d_llm"]:
        """Outputs of whole sequences, packed: one behind another, or (last_only) each one's last."""
        return self.read(torch.cat(list(rows)), self.packed([len(row) for row in rows]), last_only)

    def packed(self, lengths: Sequence[int]) -> Attention:
        """For sequences of these lengths that lie one behind another in one flat tensor."""
        if kernels.on_gpu(self.final_norm.device):
            return PackedOnGpu(lengths, self.shape, self.inverse_frequency, self.dtype)
        return PackedAttention(lengths, self.shape, self.pointwise, self.inverse_frequency)

    def behind(self, past: Past, seq: int) -> Attention:
        """For `seq` new tokens per example, example after example in one flat tensor, behind their past."""
        if kernels.on_gpu(self.final_norm.device):
            return PastOnGpu(past, seq, self.shape, self.inverse_frequency)
        return PastAttention(past, seq, self.shape, self.pointwise, self.inverse_frequency)

    def read(
        self, embeds: Float[Tensor, "tokens d_llm"], attention: Attention, last_only: bool = False
    ) -> Float[Tensor, "tokens_or_batch d_llm"]:
        """Outputs after the final norm, float32, of every token, or (last_only) of each sequence's last."""
        x, delta = embeds.to(self.dtype), None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            arguments = (x, delta, attention, i, last_only and i == last)
            if self.recompute and torch.is_grad_enabled():
                x, delta = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, delta = layer(*arguments)
        return self._final(x, delta)

    def _final(self, x: Tensor, delta: Tensor | None) -> Tensor:
        assert delta is not None  # every layer leaves one
        return _rms_norm(x.float() + delta.float(), self.shape.norm_eps) * self.final_norm

    @torch.no_grad()
    def read_layers(self, rows: Sequence[Float[Tensor, "_ d_llm"]], at: Sequence[int]) -> Float[Tensor, "some d_all"]:
        """Outputs of every token of whole sequences, packed, as they are behind the first at[0], at[1] ... layers
        (ascending, from 1), the final norm included, side by side."""
        attention = self.packed([len(row) for row in rows])
        x, delta, outputs = torch.cat(list(rows)).to(self.dtype), None, []
        for i, layer in enumerate([*self.layers, *self.deeper][: max(at)]):
            x, delta = layer(x, delta, attention, i, False)
            if i + 1 in at:
                outputs.append(self._final(x, delta))
        return torch.cat(outputs, dim=-1)

    @torch.no_grad()
    def encode_text(
        self, embeds: Float[Tensor, "batch seq d_llm"], past: Past | None = None
    ) -> tuple[Float[Tensor, "layers batch seq kv_dim"], Float[Tensor, "layers batch seq kv_dim"]]:
        """Keys (before rotary embedding) and values of every layer for these tokens."""
        batch, seq, _ = embeds.shape
        attention = self._attention(batch, seq, past)
        x, delta = embeds.flatten(0, 1).to(self.dtype), None
        s, keys, values = self.shape, [], []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            x, qkv = layer.project(x, delta)
            keys.append(qkv[:, s.heads : s.heads + s.kv_heads].flatten(1))
            values.append(qkv[:, s.heads + s.kv_heads :].flatten(1))
            if i + 1 < len(self.layers):
                x, delta = layer.rest(x, qkv, attention, i)
        return torch.stack(keys).unflatten(1, (batch, seq)), torch.stack(values).unflatten(1, (batch, seq))

    def _attention(self, batch: int, seq: int, past: Past | None) -> Attention:
        return self.packed([seq] * batch) if past is None else self.behind(past, seq)


class _Layer(nn.Module):
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None

    def __init__(self, layer: Any, shape: Shape, dtype: torch.dtype, pointwise: Pointwise):
        super().__init__()
        self.shape, self.pointwise = shape, pointwise
        attention, mlp = layer.self_attn, layer.mlp
        self._hold("qkv", [attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm, dtype)
        self._hold("out", [attention.o_proj], None, dtype)
        self._hold("gate_up", [mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm, dtype)
        self._hold("down", [mlp.down_proj], None, dtype)
        for name in ("q_norm", "k_norm"):  # Qwen3 normalises queries and keys per head
            norm = getattr(attention, name, None)
            self.register_buffer(name, None if norm is None else norm.weight.detach().to(dtype), persistent=False)

    def _hold(self, name: str, linears: list[nn.Linear], norm: Any, dtype: torch.dtype) -> None:
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        if norm is not None:
            weight = weight * norm.weight.detach().float()
        biases = [linear.bias for linear in linears]
        bias = None
        if any(b is not None for b in biases):
            parts = zip(biases, linears, strict=True)
            bias = torch.cat([weight.new_zeros(n.out_features) if b is None else b.detach().float() for b, n in parts])
        self.register_buffer(name, weight.to(dtype), persistent=False)
        self.register_buffer(f"{name}_bias", None if bias is None else bias.to(dtype), persistent=False)

    def project(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Float[Tensor, "tokens all_heads head_dim"]]:
        """x + delta, and its queries, keys and values before rotary embedding."""
        s = self.shape
        x, normed = self.pointwise.add_norm(x, delta, s.norm_eps)
        qkv = F.linear(normed, self.qkv, self.qkv_bias).unflatten(-1, (-1, s.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
            q, k = _rms_norm(q, s.norm_eps) * self.q_norm, _rms_norm(k, s.norm_eps) * self.k_norm
            qkv = torch.cat([q, k, v], dim=1)
        return x, qkv

    def forward(
        self, x: Tensor, delta: Tensor | None, attention: Attention, i: int, last_only: bool,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream is x + delta; both are [tokens d_llm], the sum is left to the next step's norm."""
        return self.rest(*self.project(x, delta), attention, i, last_only)

    def rest(
        self, x: Tensor, qkv: Tensor, attention: Attention, i: int, last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """All behind `project`."""
        s = self.shape
        attended = attention(qkv, i, last_only)
        if last_only:
            x = x[attention.ends]
        x, normed = self.pointwise.add_norm(x, F.linear(attended, self.out, self.out_bias), s.norm_eps)
        inner = self.pointwise.swiglu(F.linear(normed, self.gate_up, self.gate_up_bias))
        return x, F.linear(inner, self.down, self.down_bias)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
