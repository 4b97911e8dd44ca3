"""The pointwise parts of a Llama layer, with hand-written input gradients that keep little for the way back.

Each exists twice: as plain torch calls, and compiled (one fused loop each, any number of tokens), which needs a C++
compiler at run time. Weights are frozen, so nothing here has a weight gradient.

On a GPU a layer's time is that of its kernel launches unless the batch is large, and there the plain ones are torch's
own fused operations with its own gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from laserrec.llm.fetch import cache_folder


def on_gpu(device: torch.device) -> bool:
    """Whether the fewest launches count, and not the fewest passes over memory."""
    return device.type != "cpu"


def _add_norm(x: Tensor, delta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x if delta is None else x + delta
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return total, (wide * scale).to(x.dtype), scale


def _add_norm_back(d_total: Tensor, d_normed: Tensor, total: Tensor, scale: Tensor) -> Tensor:
    normed, d_wide = total.float() * scale, d_normed.float()
    through = scale * (d_wide - normed * (d_wide * normed).mean(dim=-1, keepdim=True))
    return (through + d_total.float()).to(total.dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate_up.dtype)


def _swiglu_back(d_out: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (part.float() for part in gate_up.chunk(2, dim=-1))
    wide, share = d_out.float(), torch.sigmoid(gate)
    d_gate = wide * up * share * (1 + gate * (1 - share))
    return torch.cat([d_gate, wide * gate * share], dim=-1).to(gate_up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    heads = x[:, :turned]
    first, second = heads.float().chunk(2, dim=-1)
    front = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([front, x[:, turned:]], dim=1)


def _softmax(scores: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return torch.softmax((scores.float() * scale).masked_fill(hidden, -torch.inf), dim=-1).to(scores.dtype)


def _softmax_back(d_weights: Tensor, weights: Tensor, scale: float) -> Tensor:
    wide, share = d_weights.float(), weights.float()
    return (share * (wide - (wide * share).sum(dim=-1, keepdim=True)) * scale).to(weights.dtype)


# Where nothing fuses the steps, each widening to float32 is a copy: the plain ones stay in the outputs' own type, as
# transformers' do.
def _plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _plain_rotate(x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    out, half, (cos, sin) = x.clone(), x.shape[-1] // 2, (cos.to(x.dtype), sin.to(x.dtype))
    first, second = x[:, :turned, :half], x[:, :turned, half:]
    out[:, :turned, :half].mul_(cos).addcmul_(second, sin, value=-1)
    out[:, :turned, half:].mul_(cos).addcmul_(first, sin)
    return out


@dataclass(frozen=True)
class _Kernels:
    add_norm: Callable = _add_norm
    add_norm_back: Callable = _add_norm_back
    swiglu: Callable = _swiglu
    swiglu_back: Callable = _swiglu_back
    rotate: Callable = _rotate
    softmax: Callable = _softmax
    softmax_back: Callable = _softmax_back


_FUSIBLE = _Kernels()
_PLAIN = _Kernels(swiglu=_plain_swiglu, rotate=_plain_rotate)


@cache
def _compiled() -> _Kernels:
    # torch's own default is a folder that a restart of the machine empties.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))

    def fuse(function: Callable) -> Callable:
        return torch.compile(function, dynamic=True)

    return _Kernels(*(fuse(getattr(_FUSIBLE, field.name)) for field in fields(_Kernels)))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, eps, kernels):
        # Detached: whether an input wants a gradient would be another compilation.
        total, normed, scale = kernels.add_norm(x.detach(), None if delta is None else delta.detach(), eps)
        ctx.save_for_backward(total, scale)
        ctx.kernels, ctx.two = kernels, delta is not None
        return total, normed

    @staticmethod
    def backward(ctx, *gradients):
        d_total, d_normed = gradients
        d = ctx.kernels.add_norm_back(d_total, d_normed, *ctx.saved_tensors)
        return d, d if ctx.two else None, None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, kernels):
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up.detach())

    @staticmethod
    def backward(ctx, *gradients):
        (d_out,) = gradients
        return ctx.kernels.swiglu_back(d_out, *ctx.saved_tensors), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, turned, kernels):
        ctx.save_for_backward(cos, sin)
        ctx.turned, ctx.kernels = turned, kernels
        return kernels.rotate(x.detach(), cos, sin, turned)

    @staticmethod
    def backward(ctx, *gradients):
        (d_out,) = gradients
        cos, sin = ctx.saved_tensors  # the inverse of a turn is the turn by the negative angle
        return ctx.kernels.rotate(d_out, cos, -sin, ctx.turned), None, None, None, None


class Pointwise:
    """The three steps between a layer's products."""

    def __init__(self, compiled: bool):
        self.compiled, self._kernels = compiled, _compiled() if compiled else _PLAIN

    def add_norm(
        self, x: Float[Tensor, "tokens d_llm"], delta: Float[Tensor, "tokens d_llm"] | None, eps: float
    ) -> tuple[Float[Tensor, "tokens d_llm"], Float[Tensor, "tokens d_llm"]]:
        """x + delta, and that sum over its root mean square."""
        if on_gpu(x.device) and not self.compiled:
            total = x if delta is None else x + delta
            return total, F.rms_norm(total, total.shape[-1:], eps=eps)
        return _AddNorm.apply(x, delta, eps, self._kernels)

    def swiglu(self, gate_up: Float[Tensor, "tokens two_width"]) -> Float[Tensor, "tokens width"]:
        """silu(gate) * up, gate and up side by side."""
        if on_gpu(gate_up.device) and not self.compiled:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate) * up
        return _SwiGlu.apply(gate_up, self._kernels)

    def rotate(
        self, x: Float[Tensor, "tokens heads head_dim"], cos: Float[Tensor, "tokens one half"],
        sin: Float[Tensor, "tokens one half"], turned: int,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Rotary embedding of the first `turned` heads; the others pass."""
        return _Rotate.apply(x, cos, sin, turned, self._kernels)

    def softmax(self, scores: Float[Tensor, "batch rows columns"], hidden: Bool[Tensor, "rows columns"], scale: float
                ) -> Float[Tensor, "batch rows columns"]:
        """Softmax of scaled scores over columns that are not hidden, without gradient."""
        return self._kernels.softmax(scores, hidden, scale)

    def softmax_back(self, d_weights: Float[Tensor, "batch rows columns"], weights: Float[Tensor, "batch rows columns"],
                     scale: float) -> Float[Tensor, "batch rows columns"]:
        """The gradient of the unscaled scores; hidden ones have weight zero and get none."""
        return self._kernels.softmax_back(d_weights, weights, scale)
