"""The M-Former: a router chooses one of K query experts by the user's ID states; its L queries pass Z transformer
blocks, every other one reading those states, and a projection turns them into the LLM's prefix (paper, 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.config import MFormerConfig, Prefix, Routing


@dataclass(frozen=True)
class Route:
    """What the router said of a batch."""

    probabilities: Float[Tensor, "batch items experts"]
    """p_ij (Eq. 6); zeros where `mask` is False."""
    mask: Bool[Tensor, "batch items"]
    scores: Float[Tensor, "batch experts"]
    """r_j (Eq. 7); 1/K for a user without known items."""
    expert: Int[Tensor, "batch"]
    """argmax of scores."""

    def users_per_expert(self) -> Float[Tensor, "experts"]:
        """How many users each expert was chosen for; those without ID states count for none."""
        chosen = F.one_hot(self.expert, self.scores.shape[1]) * self.mask.any(dim=1)[:, None]
        return chosen.sum(dim=0).float()


class Router(nn.Module):
    """One linear map from an ID state to a score per expert (Eq. 5-7)."""

    def __init__(self, d_id: int, experts: int):
        super().__init__()
        self.weight = nn.Linear(d_id, experts, bias=False)

    def forward(self, states: Float[Tensor, "batch items d_id"], mask: Bool[Tensor, "batch items"]) -> Route:
        probabilities = self.weight(states).softmax(dim=-1) * mask[..., None]
        count = mask.sum(dim=1, keepdim=True)
        scores = probabilities.sum(dim=1) / count.clamp(min=1)
        scores = torch.where(count > 0, scores, torch.full_like(scores, 1 / scores.shape[1]))
        return Route(probabilities, mask, scores, scores.argmax(dim=-1))


class Attention(nn.Module):
    """Multi-head attention from queries to a memory (or to themselves); a query with nothing to read gets zeros."""

    def __init__(self, d_model: int, d_memory: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_memory, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(
        self,
        x: Float[Tensor, "batch queries d_model"],
        memory: Float[Tensor, "batch items d_memory"],
        mask: Bool[Tensor, "batch items"] | None = None,
    ) -> Float[Tensor, "batch queries d_model"]:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        empty = None
        if mask is not None:
            empty = ~mask.any(dim=1)
            mask = (mask | empty[:, None])[:, None, None]  # softmax over nothing is NaN; the result is zeroed below
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out(y.transpose(1, 2).flatten(-2))
        return y if empty is None else y.masked_fill(empty[:, None, None], 0.0)


class Block(nn.Module):
    """Pre-norm: self-attention, cross-attention to the ID states (if `cross`), feed-forward."""

    def __init__(self, d_model: int, d_id: int, heads: int, dropout: float, cross: bool):
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(d_model), Attention(d_model, d_model, heads, dropout)
        self.cross_norm = nn.LayerNorm(d_model) if cross else None
        self.cross_attention = Attention(d_model, d_id, heads, dropout) if cross else None
        self.feed_norm = nn.LayerNorm(d_model)
        self.feed = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch queries d_model"],
        states: Float[Tensor, "batch items d_id"],
        mask: Bool[Tensor, "batch items"],
    ) -> Float[Tensor, "batch queries d_model"]:
        y = self.self_norm(x)
        x = x + self.dropout(self.self_attention(y, y))
        if self.cross_attention is not None and self.cross_norm is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), states, mask))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class MFormer(nn.Module):
    """ID states -> prefix of L tokens.

    Parameters: `token_std`: the standard deviation of the LLM's token embeddings, which the prefix starts with;
    `base`: Float[queries d_llm], added to the projection's output (trained; used with zero_init) or None.
    """

    def __init__(self, config: MFormerConfig, d_id: int, d_llm: int, token_std: float, base: Tensor | None = None):
        super().__init__()
        self.config = config
        experts = 1 if config.prefix == Prefix.ONE_EXPERT else config.experts
        self.router = Router(d_id, experts) if experts > 1 else None
        self.experts = nn.Parameter(torch.randn(experts, config.queries, config.d_model) * 0.02)
        self.blocks = nn.ModuleList(
            Block(config.d_model, d_id, config.heads, config.dropout, cross=i % 2 == 0) for i in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.projection = nn.Linear(config.d_model, d_llm)
        self.base = None if base is None else nn.Parameter(base.clone())
        nn.init.zeros_(self.projection.bias)
        if config.zero_init:
            nn.init.zeros_(self.projection.weight)
        else:  # the norm's output has unit variance, so the prefix starts with the token embeddings' spread
            nn.init.normal_(self.projection.weight, std=token_std / config.d_model**0.5)

    def forward(
        self, states: Float[Tensor, "batch items d_id"], mask: Bool[Tensor, "batch items"]
    ) -> tuple[Float[Tensor, "batch queries d_llm"], Route | None]:
        """`mask` is False at padding; a row without any True (no item known) gets the expert's tokens unread."""
        route = None if self.router is None else self.router(states, mask)
        if route is None:
            x = self.experts[:1].expand(states.shape[0], -1, -1)
        else:
            x = self.experts[route.expert]
            if self.config.routing == Routing.GATE_SCALED:
                gate = route.scores.gather(1, route.expert[:, None])[..., None]
                x = x * (gate / gate.detach())  # 1 forward; backward it carries the task's gradient to the router
        for block in self.blocks:
            x = block(x, states, mask)
        prefix = self.projection(self.norm(x))
        return (prefix if self.base is None else prefix + self.base), route
