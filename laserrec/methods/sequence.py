"""The transformer that the ID-based sequential recommenders share, and how it is trained.

Item rows 0 to n_items - 1 are the items, row n_items is padding, row n_items + 1 BERT4Rec's mask token. Batches are
padded on the right and padding is masked, so an output doesn't depend on its batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.config import IdLoss, IdModelConfig, ItemTable
from laserrec.data.histories import Histories
from laserrec.methods.protocol import TwoTower
from laserrec.methods.sampled_softmax import Sampler, is_sampled, sampled_loss
from laserrec.methods.targets import Targets, next_item_targets, with_offset
from laserrec.methods.terms import SeenOffset
from laserrec.util.device import move
from laserrec.util.errors import UserError

WEIGHT_STD = 0.02
"""Standard deviation of fresh weights."""
_SHORT = 4
"""Histories up to so many items are not grouped by their length."""
_SEEN_OFFSET_START = -2.0
"""Where a learnt seen offset starts, in logits: most people buy something new."""


class Block(nn.Module):
    """Attention, then a feed-forward of width `inner`, both residual.

    Normalised behind the sum, or with pre_norm in front of it. SASRec normalises behind it (on amazon-scientific: fewer
    epochs than in front of it, and a better validation NDCG); BERT4Rec in front, since behind the sum its cloze task
    hardly gets off the ground.
    """

    def __init__(self, d: int, inner: int, heads: int, dropout: float, pre_norm: bool = False):
        super().__init__()
        self.heads, self.rate, self.pre_norm = heads, dropout, pre_norm
        self.attention_norm, self.feed_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed = nn.Sequential(nn.Linear(d, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, d))
        self.dropout = nn.Dropout(dropout)

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=rate)
        return self.dropout(self.out(y.transpose(1, 2).flatten(-2)))

    def forward(self, x: Float[Tensor, "batch seq d_id"], mask: Bool[Tensor, "batch one seq_or_one seq"]) -> Tensor:
        """[batch seq d_id]; mask: which positions each one reads."""
        if self.pre_norm:
            x = x + self._attend(self.attention_norm(x), mask)
            return x + self.dropout(self.feed(self.feed_norm(x)))
        x = self.attention_norm(x + self._attend(x, mask))
        return self.feed_norm(x + self.dropout(self.feed(x)))


def by_length(rows: Int[Tensor, "batch seq"], lengths: Int[Tensor, "batch"],
              make: Callable[[Tensor, Tensor], Float[Tensor, "some *more"]]) -> Float[Tensor, "batch *more"]:
    """make(rows, lengths) of rows that are padded on the right, in groups of like length, each cut to its longest:
    users come in any order, and most of a batch would be padding. All at once on a GPU, where the number of calls is
    what takes time. Training needs no groups: its batches are of like length."""
    if rows.device.type != "cpu" or rows.shape[1] <= _SHORT:
        return make(rows, lengths)
    group = lengths.clamp(min=_SHORT).log2().ceil()
    order, parts = [], []
    for size in group.unique():
        some = (group == size).nonzero()[:, 0]
        order.append(some)
        parts.append(make(rows[some, : max(1, int(lengths[some].max()))], lengths[some]))
    return torch.cat(parts)[torch.cat(order).argsort()]


def initialise(model: nn.Module) -> None:
    """Small normal weights of tables and linear layers, no biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=WEIGHT_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def seen_offset(wanted: bool) -> SeenOffset | None:
    """A learnt one that starts where the loss can use it, if one is wanted."""
    return SeenOffset(_SEEN_OFFSET_START) if wanted else None


class NextItemModel(nn.Module, TwoTower):
    """Histories in, a state for the next item and scores of all items out: a two-tower model, for `SequenceTask`.

    A causal model, whose every state predicts the next item, brings `states` and `item_embeddings`; others bring their
    own `next_item_state` and `targets` too.
    """

    config: Any
    """Of its settings, max_history, shuffle and seed are read here and in `SequenceTask`."""
    n_items: int
    pad: int
    """The row that stands for no item."""
    seen: SeenOffset | None
    """A learnt number that is added to the logits of the items that a state has seen."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def terms(self) -> list[SeenOffset]:
        """The learnt seen offset, if there is one."""
        return [] if self.seen is None else [self.seen]

    @abstractmethod
    def item_embeddings(self) -> Float[Tensor, "n_items d"]:
        """Vectors of all items, with which states are compared."""

    @abstractmethod
    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d"]:
        """One state per item of each history, which is padded on the right; the padding changes no item's state."""

    def next_item_state(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch d"]:
        """The state that predicts the item after each history: a causal model's newest."""
        newest = (items != self.pad).sum(dim=1) - 1
        return self.states(items)[torch.arange(len(items), device=items.device), newest]

    def targets(self, items: Int[Tensor, "batch seq"]) -> Targets:
        """Training sequences (on the CPU) -> inputs and targets of one step. A causal model's: all positions that have
        a next item; a sequence's last item is a target only."""
        return next_item_targets(items, self.pad, self.seen is not None)

    def note_trained(self, items: Int[Tensor, "total"]) -> None:
        """Items of the training sequences, before the first epoch."""

    def sampler(self, sequences: Histories) -> Sampler | None:
        """Of the items in the loss of these training sequences; None: the loss goes over all items."""
        return None

    def pad_histories(self, histories: Histories) -> Int[Tensor, "batch seq"]:
        """The newest max_history items of each, on the model's device. Raises UserError for an empty history."""
        if len(histories) and int(histories.lengths.min()) == 0:
            row = int(histories.lengths.argmin())
            raise UserError(f"history {row} (counted from 0) is empty; a sequence model needs at least one item")
        return move(histories.last(self.config.max_history).padded(self.pad), self.device)

    def last_states(self, histories: Histories) -> Float[Tensor, "users d"]:
        """The state for the next item. Raises UserError for an empty history."""
        items = self.pad_histories(histories)
        lengths = histories.lengths.to(items.device).clamp(max=items.shape[1])
        return by_length(items, lengths, lambda some, _: self.next_item_state(some))

    def users(self, histories: Histories) -> Float[Tensor, "users d_out"]:
        """The state for the next item."""
        return self.last_states(histories)

    def items(self, rows: Int[Tensor, "some"] | None = None) -> Float[Tensor, "items d_out"]:
        """Embeddings."""
        table = self.item_embeddings()
        return table if rows is None else table[rows]

    def logits(self, states: Float[Tensor, "some d"]) -> Float[Tensor, "some n_items"]:
        """Of all items, without the seen offset."""
        return states @ self.item_embeddings().T

    def loss(self, part: Targets) -> Float[Tensor, ""]:
        """The sum of the targets' cross-entropies over all items."""
        part = part.to(self.device)
        logits = self.logits(self.states(part.inputs).flatten(0, 1)[part.places])
        if self.seen is not None:
            logits = with_offset(logits, part.seen, self.seen.offset)
        return F.cross_entropy(logits, part.items, reduction="sum")


class SequenceModel(NextItemModel):
    """SASRec and BERT4Rec: a table of items, a transformer over it, and a bias of each item, which is a dimension of
    the vectors.

    `known`: Bool[n_items], the items that it can tell something of. An item that stands in no training sequence has an
    embedding too, which training has only pushed away from other items' users.

    Parameters: `text`: Float[n_items d_text] whitened vectors of the items' texts, most important dimension first;
    needed by the item tables that are made from them (`config.items`). Raises ValueError without.
    """

    causal: bool
    known: Bool[Tensor, "n_items"]

    def __init__(self, config: IdModelConfig, n_items: int, text: Float[Tensor, "n_items d_text"] | None = None):
        super().__init__()
        if text is None and config.items != ItemTable.IDS:
            raise ValueError(f"item table {config.items!r} is made from text vectors")
        self.config, self.n_items, self.pad, self.mask_token = config, n_items, n_items, n_items + 1
        self.max_history, self.d_id = config.max_history, config.d_id
        self.item = nn.Embedding(n_items + 2, config.d_id, padding_idx=self.pad, sparse=is_sampled(config, n_items))
        self.position = nn.Embedding(config.max_history + 1, config.d_id)
        self.embedding_dropout = nn.Dropout(config.dropout)
        inner = config.d_id * (1 if self.causal else 4)  # as published
        self.blocks = nn.ModuleList(Block(config.d_id, inner, config.heads, config.dropout, pre_norm=not self.causal)
                                    for _ in range(config.blocks))
        self.norm = nn.Identity() if self.causal else nn.LayerNorm(config.d_id)
        self.bias = nn.Parameter(torch.zeros(n_items))
        self.register_buffer("known", torch.ones(n_items, dtype=torch.bool))
        initialise(self)
        self.adaptor = None
        self.seen = seen_offset(config.seen_offset)
        with torch.no_grad():
            self.item.weight[self.pad].zero_()
        if text is not None and config.items == ItemTable.LLM_START:
            self._start_from(text)
        elif text is not None and config.items == ItemTable.TEXT:
            self.register_buffer("text", text.clone())
            self.adaptor = nn.Linear(text.shape[1], config.d_id, bias=False)
            nn.init.normal_(self.adaptor.weight, std=WEIGHT_STD / text.shape[1] ** 0.5)

    def whitened_by(self, mean: Float[Tensor, "d_means"], matrix: Float[Tensor, "d_means dims"]) -> None:
        """Keep the map that whitened its text vectors, by which texts of other catalogues are read as these were."""
        self.register_buffer("text_mean", mean)
        self.register_buffer("text_matrix", matrix)

    @property
    def whitening(self) -> tuple[Float[Tensor, "d_means"], Float[Tensor, "d_means dims"]] | None:
        """The map that it keeps: mean and matrix (laserrec.llm.whitening.whiten)."""
        kept = dict(self.named_buffers(recurse=False))
        return (kept["text_mean"], kept["text_matrix"]) if "text_matrix" in kept else None

    @torch.no_grad()
    def _start_from(self, text: Float[Tensor, "n_items d_text"]) -> None:
        some = text[:, : self.d_id]
        if bool(some.any()):  # texts that are all alike have no directions
            self.item.weight[: self.n_items, : some.shape[1]] = some / some.std().clamp(min=1e-8) * WEIGHT_STD

    @classmethod
    def shapes(cls, config: IdModelConfig, n_known: int) -> dict[str, tuple[int, ...]]:
        """Of the largest weights, as the settings claim them."""
        return {"item.weight": (n_known + 2, config.d_id), "position.weight": (config.max_history + 1, config.d_id),
                f"blocks.{config.blocks - 1}.out.weight": (config.d_id, config.d_id)}

    def item_embeddings(self) -> Float[Tensor, "n_items d_id"]:
        """Without padding and mask token."""
        return self.item.weight[: self.n_items] if self.adaptor is None else self.adaptor(self.text)

    def embed(self, items: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_id"]:
        """Vectors of items, padding and mask tokens."""
        if self.adaptor is None:
            return self.item(items)
        if self.item.sparse:  # the catalogue is too large to go through the adaptor at each step
            rows, place = torch.unique(items, return_inverse=True)
            text = self.adaptor(self.get_buffer("text")[rows.clamp(max=self.n_items - 1)])
            return F.embedding(place, torch.where((rows < self.n_items)[:, None], text, self.item(rows)))
        return F.embedding(items, torch.cat([self.item_embeddings(), self.item.weight[self.n_items :]]))

    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_id"]:
        """C_u: one state per item of the history (SASRec: of the items up to it; BERT4Rec: of all given items)."""
        real = items != self.pad
        x = self.embedding_dropout(self.embed(items) + self.position(self._positions(real)))
        mask = real[:, None, None, :].expand(-1, 1, items.shape[1], -1)
        if self.causal:
            mask = mask & torch.ones(items.shape[1], items.shape[1], dtype=torch.bool, device=items.device).tril()
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    @abstractmethod
    def _positions(self, real: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch_or_one seq"]:
        """Rows of the position table."""

    def sampler(self, sequences: Histories) -> Sampler | None:
        """Of the items in the loss of these training sequences; None: the loss goes over all items."""
        if not is_sampled(self.config, self.n_items):
            return None
        targets = sequences.without_oldest() if self.causal else sequences
        return Sampler(targets, self.n_items, self.config.negatives)

    def note_trained(self, items: Int[Tensor, "total"]) -> None:
        """With an item table made of text alone, all items are known."""
        if self.adaptor is None:
            self.known.zero_()[items.to(self.device)] = True

    def users(self, histories: Histories) -> Float[Tensor, "users d_out"]:
        """The state for the next item, and a one that takes the item's bias."""
        state = super().users(histories)
        return torch.cat([state, state.new_ones(len(state), 1)], dim=1)

    def items(self, rows: Int[Tensor, "some"] | None = None) -> Float[Tensor, "items d_out"]:
        """Embeddings, and the biases behind them."""
        table = torch.cat([self.item_embeddings(), self.bias[:, None]], dim=1)
        return table if rows is None else table[rows]

    def logits(self, states: Float[Tensor, "some d_id"]) -> Float[Tensor, "some n_items"]:
        """Of all items, without the seen offset."""
        return super().logits(states) + self.bias

    def loss(self, part: Targets) -> Float[Tensor, ""]:
        """The sum of the targets' losses."""
        if self.config.loss != IdLoss.BCE and part.candidates is None:
            return super().loss(part)
        part = part.to(self.device)
        states = self.states(part.inputs).flatten(0, 1)[part.places]
        if part.candidates is not None:
            offset = None if self.seen is None else self.seen.offset
            return sampled_loss(self._logits_of(states, part.candidates.items), part, offset)
        negatives = torch.randint(0, self.n_items, part.items.shape, device=states.device)
        positive, negative = (self._pair_logits(states, i) for i in (part.items, negatives))
        return F.softplus(-positive).sum() + F.softplus(negative).sum()

    def _logits_of(self, states: Float[Tensor, "targets d_id"], rows: Int[Tensor, "some"]
                   ) -> Float[Tensor, "targets some"]:
        vectors = self.item(rows) if self.adaptor is None else self.adaptor(self.get_buffer("text")[rows])
        return torch.addmm(self.bias[rows], states, vectors.T)

    def _pair_logits(self, states: Tensor, items: Tensor) -> Tensor:
        return (states * self.embed(items)).sum(dim=-1) + self.bias[items]
