"""The ID-based sequential recommenders: SASRec (Kang & McAuley 2018) and BERT4Rec (Sun et al. 2019).

Both share one body. Batches are padded on the right and padding is masked, so an output doesn't depend on its batch.
SASRec's positions count from the window's first item: counted back from the newest (the left-padded original), all but
the last position of a short training sequence would be trained at places that are never asked for. BERT4Rec's count
back from the newest: its mask at inference then stands where the masks of cut sequences stood in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.config import IdLoss, IdModelConfig, IdModelKind, ItemTable
from laserrec.util.errors import UserError

_PREFIX_SHARE = 0.5
"""BERT4Rec: share of sequences that are cut to a random start and hide its last item alone, as at inference. With the
whole sequence's last item instead, validation NDCG@10 on amazon-scientific was .053, with random starts .0555 and
positions from the end .0563."""


_ITEM_STD = 0.02
"""Spread of fresh weights."""
_SEEN_OFFSET_START = -2.0
"""Where a learnt seen offset starts, in logits: most people buy something new."""


def pad_histories(histories: Sequence[np.ndarray], max_history: int) -> Int[Tensor, "batch seq"]:
    """The last `max_history` items of each, padded with 0 on the right. Raises UserError for an empty history."""
    for row, history in enumerate(histories):
        if len(history) == 0:
            raise UserError(f"history {row} (counted from 0) is empty; a sequence model needs at least one item")
    cut = [torch.as_tensor(h[-max_history:].astype(np.int64)) for h in histories]
    return nn.utils.rnn.pad_sequence(cut, batch_first=True)


def _rows_and_lengths(items: Int[Tensor, "batch seq"]) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
    return torch.arange(len(items), device=items.device), (items > 0).sum(dim=1)


class _Block(nn.Module):
    """Attention, then a feed-forward (d_id wide inside for SASRec, 4 d_id for BERT4Rec, as published), both residual.

    SASRec normalises behind the sum (on amazon-scientific: fewer epochs than in front of it, and a better validation
    NDCG); BERT4Rec in front, since behind the sum its cloze task hardly gets off the ground.
    """

    def __init__(self, config: IdModelConfig, pre_norm: bool):
        super().__init__()
        d, inner = config.d_id, config.d_id * (4 if pre_norm else 1)
        self.heads, self.rate, self.pre_norm = config.heads, config.dropout, pre_norm
        self.attention_norm, self.feed_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed = nn.Sequential(nn.Linear(d, inner), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(inner, d))
        self.dropout = nn.Dropout(config.dropout)

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=rate)
        return self.dropout(self.out(y.transpose(1, 2).flatten(-2)))

    def forward(self, x: Float[Tensor, "batch seq d_id"], mask: Bool[Tensor, "batch one seq_or_one seq"]) -> Tensor:
        if self.pre_norm:
            x = x + self._attend(self.attention_norm(x), mask)
            return x + self.dropout(self.feed(self.feed_norm(x)))
        x = self.attention_norm(x + self._attend(x, mask))
        return self.feed_norm(x + self.dropout(self.feed(x)))


class IdModel(nn.Module):
    """Body and interface of both: item ids in, states [d_id] and scores of all items out.

    Row 0 of the item table is padding, rows 1..n_items the items, row n_items + 1 BERT4Rec's mask token.

    Parameters: `text`: Float[n_items d_text] whitened vectors of the items' texts, most important dimension first;
    needed by the item tables that are made from them (`config.items`). Raises ValueError without.
    """

    causal: bool

    def __init__(self, config: IdModelConfig, n_items: int, text: Float[Tensor, "n_items d_text"] | None = None):
        super().__init__()
        if text is None and config.items != ItemTable.IDS:
            raise ValueError(f"item table {config.items!r} is made from text vectors")
        self.config, self.n_items = config, n_items
        self.max_history, self.d_id = config.max_history, config.d_id
        self.item = nn.Embedding(n_items + 2, config.d_id, padding_idx=0)
        self.position = nn.Embedding(config.max_history + 1, config.d_id)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config, pre_norm=not self.causal) for _ in range(config.blocks))
        self.norm = nn.Identity() if self.causal else nn.LayerNorm(config.d_id)
        self.bias = nn.Parameter(torch.zeros(n_items))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_ITEM_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.adaptor = None
        self.seen_offset = nn.Parameter(torch.tensor(_SEEN_OFFSET_START)) if config.seen_offset else None
        with torch.no_grad():
            self.item.weight[0].zero_()
        if config.items == ItemTable.LLM_START:
            self._start_from(text)
        elif config.items == ItemTable.TEXT:
            self.register_buffer("text", text.clone())
            self.adaptor = nn.Linear(text.shape[1], config.d_id, bias=False)
            nn.init.normal_(self.adaptor.weight, std=_ITEM_STD / text.shape[1] ** 0.5)

    @torch.no_grad()
    def _start_from(self, text: Float[Tensor, "n_items d_text"]) -> None:
        dims = min(self.d_id, text.shape[1])
        start = text[:, :dims] / text[:, :dims].std().clamp(min=1e-8) * _ITEM_STD
        self.item.weight[1 : self.n_items + 1, :dims] = start

    def table(self) -> Float[Tensor, "rows d_id"]:
        """The whole item table, padding and mask token included."""
        if self.adaptor is None:
            return self.item.weight
        ends = self.item.weight[:1], self.item.weight[self.n_items + 1 :]
        return torch.cat([ends[0], self.adaptor(self.text), ends[1]])

    def embed(self, items: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_id"]:
        """Rows of the item table."""
        return self.item(items) if self.adaptor is None else F.embedding(items, self.table())

    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_id"]:
        """C_u: one state per item of the history (SASRec: of the items up to it; BERT4Rec: of all given items)."""
        real, place = items > 0, torch.arange(items.shape[1], device=items.device)
        if not self.causal:
            place = (real.sum(dim=1, keepdim=True) - 1 - place).clamp(min=0)
        x = self.embedding_dropout(self.embed(items) + self.position(place))
        mask = real[:, None, None, :].expand(-1, 1, items.shape[1], -1)
        if self.causal:
            mask = mask & torch.ones(items.shape[1], items.shape[1], dtype=torch.bool, device=items.device).tril()
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def item_embeddings(self) -> Float[Tensor, "n_items d_id"]:
        return self.table()[1 : self.n_items + 1]

    def logits(self, states: Float[Tensor, "*batch d_id"]) -> Float[Tensor, "*batch n_items"]:
        return states @ self.item_embeddings().T + self.bias

    def scores(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch n_items"]:
        """Of the next item after each history (0 = padding on the right)."""
        return self._add_seen_offset(self.logits(self.next_item_state(items)), items)

    def _add_seen_offset(
        self, logits: Float[Tensor, "rows n_items"], visible: Int[Tensor, "rows seq"]
    ) -> Float[Tensor, "rows n_items"]:
        """`visible`: the items each row has seen, 0 where there is none."""
        if self.seen_offset is None:
            return logits
        row, place = visible.nonzero(as_tuple=True)
        pairs = torch.unique(row * self.n_items + visible[row, place] - 1)
        return logits.flatten().index_add(0, pairs, self.seen_offset.expand(len(pairs))).view_as(logits)

    def score(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        """`scores` for the evaluator."""
        return self.scores(pad_histories(histories, self.max_history))


class SASRec(IdModel):
    """Causal self-attention; every position predicts the next item."""

    causal = True

    def next_item_state(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch d_id"]:
        rows, length = _rows_and_lengths(items)
        return self.states(items)[rows, length - 1]

    def loss(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
        """Mean over all positions of a training sequence that have a next item."""
        inputs = items[:, :-1].masked_fill(items[:, 1:] == 0, 0)  # a sequence's last item is a target only
        targets = items[:, 1:]
        real = targets > 0
        states, targets = self.states(inputs)[real], targets[real]
        if self.config.loss == IdLoss.CROSS_ENTROPY:
            row, place = real.nonzero(as_tuple=True)
            seen = inputs[row].masked_fill(torch.arange(inputs.shape[1], device=items.device) > place[:, None], 0)
            return F.cross_entropy(self._add_seen_offset(self.logits(states), seen), targets - 1)
        negatives = torch.randint(1, self.n_items + 1, targets.shape, device=targets.device)
        positive, negative = (self._pair_logits(states, i) for i in (targets, negatives))
        return F.softplus(-positive).mean() + F.softplus(negative).mean()

    def _pair_logits(self, states: Tensor, items: Tensor) -> Tensor:
        return (states * self.embed(items)).sum(dim=-1) + self.bias[items - 1]


class BERT4Rec(IdModel):
    """Bidirectional self-attention; hidden items are predicted from both sides (cloze)."""

    causal = False

    def next_item_state(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch d_id"]:
        """The state of a mask token put behind the history."""
        rows, length = _rows_and_lengths(items)
        masked = F.pad(items, (0, 1))
        masked[rows, length] = self.n_items + 1
        return self.states(masked)[rows, length]

    def loss(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
        """Cloze over random positions; some sequences are cut to a random start and hide its last item alone, since
        that is the task at inference (the original adds last-item samples and slides a window for the same end)."""
        length = (items > 0).sum(dim=1, keepdim=True)
        prefix = torch.rand(len(items), 1, device=items.device) < _PREFIX_SHARE
        shorter = 2 + (torch.rand(len(items), 1, device=items.device) * (length - 1)).long()
        length = torch.where(prefix, shorter.clamp(max=length), length)
        place = torch.arange(items.shape[1], device=items.device)
        items = items.masked_fill(place >= length, 0)
        hidden = (torch.rand(items.shape, device=items.device) < self.config.mask_probability) & (items > 0)
        hidden = torch.where(prefix | ~hidden.any(dim=1, keepdim=True), place == length - 1, hidden)
        states = self.states(items.masked_fill(hidden, self.n_items + 1))[hidden]
        seen = items.masked_fill(hidden, 0)[hidden.nonzero(as_tuple=True)[0]]
        return F.cross_entropy(self._add_seen_offset(self.logits(states), seen), items[hidden] - 1)


def make_id_model(
    config: IdModelConfig, n_items: int, text: Float[Tensor, "n_items d_text"] | None = None
) -> IdModel:
    """A fresh model; seed torch first. `text`: see IdModel."""
    return {IdModelKind.SASREC: SASRec, IdModelKind.BERT4REC: BERT4Rec}[config.kind](config, n_items, text)


def load_weights(config: IdModelConfig, n_items: int, weights: dict[str, Tensor]) -> IdModel:
    """A trained model from its state_dict, ready for use: frozen and in evaluation mode. Raises RuntimeError where the
    weights don't fit."""
    text = weights.get("text")
    if text is None and config.items != ItemTable.IDS:
        text = torch.zeros(n_items, config.d_id)  # it started the item table, which the weights hold now
    model = make_id_model(config, n_items, text)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)
